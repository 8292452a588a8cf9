r"""The grading process of `gift.math_pool`: compares mathematical answers with math-verify, whatever the answers are.

Run as a script, it imports math-verify once and then forks a child for each comparison. The kernel ends the child when
its time is up: SIGALRM at its default action also stops the big-integer C code that neither a thread nor a Python
signal handler can. It caps the child's memory as well. So no answer can hang or bloat the process, or change the
verdict on another answer. Nothing an answer holds is run: sympy's ways to evaluate text are closed.

Protocol, in JSON lines: "ready" when started, or why it cannot start; then for each request on stdin,
`[kind, arguments, timeout_s]`, one object on stdout: status ("correct", "wrong", "no_answer", "timeout" or "error")
and, where there is something to say, extracted, method and note. It ends with stdin.
"""

import gc
import importlib
import json
import logging
import math
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

MEMORY_BYTES = 4 << 30  # address space of one comparison
MAX_TEXT_CHARS = 2000  # of what a child tells; its pipe holds more

# Compared once before any answer is: the parser learns its grammar from use, and children inherit what it has learnt.
PRACTICE = (
    (r"\frac{x+1}{2}", r"\frac12(1+x)"),
    (r"\left(1,\frac{\pi}{2}\right)", r"(1,\pi/2)"),
    (r"x\in[-2,7)", r"[-2,7)"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"(x+1)^2=0", r"2x^2+4x+2=0"),
    (r"(-1,3)", r"-1<x<3"),
    (r"1,2", r"\{1,2\}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
    (r"\text{Evelyn}", r"x=5"),
)
ROUNDING = 1e-5  # relative difference of numbers that may still be equal when one is rounded
TOLERANCE = 1e-4  # relative, of the paper's rules

Reply = dict[str, str]
Comparison = Callable[..., Reply]


def close_eval() -> None:
    """Leaves sympy nothing that evaluates text as Python, which it does even to make a number of digits.

    To be called after practice: some of sympy's modules evaluate text of their own when they are first needed.
    """
    sympy: Any = importlib.import_module("sympy")
    sympy_parser: Any = importlib.import_module("sympy.parsing.sympy_parser")

    def number(text: str, *_: object, **__: object) -> Any:
        if re.fullmatch(r"[+-]?[0-9]+", text):
            return sympy.Integer(text)
        if re.fullmatch(r"[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+)", text):
            return sympy.Float(text)
        raise SyntaxError(f"not a number: {text}")

    def refuse(*code: object) -> NoReturn:
        raise SyntaxError("text is not evaluated")

    sympy_parser.parse_expr, sympy_parser.eval_expr = number, refuse


def load_comparisons() -> dict[str, Comparison]:
    """The comparisons by kind, with math-verify free of its own timers, which would disarm ours."""
    from math_verify import LatexExtractionConfig, grader, parse, parser, verify

    logging.disable(logging.CRITICAL)
    # The answer as a whole or nothing: by default, math-verify falls back on the last number in what it cannot parse.
    whole = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    def in_box(text: str, **options: Any) -> list[Any]:
        return list(parse(f"\\boxed{{{text}}}", parsing_timeout=None, **options))

    def expression(text: str) -> Any:
        return next(iter(in_box(text, extraction_config=whole, fallback_mode="no_fallback")), None)

    def read_arithmetic(text: str, evaluate: bool) -> Any:
        if (found := expression(text.strip(" .").replace("**", "^"))) is None:
            raise SyntaxError(f"not arithmetic: {text}")
        return found

    parser.parse_expr = read_arithmetic  # digits and operators outside LaTeX, as in "is 19/7"

    agree_rounded = grader.sympy_numeric_eq

    def agree(a: Any, b: Any, *precision: int) -> bool:
        return agree_rounded(a, b, *precision) and not far_apart(a, b)

    def far_apart(a: Any, b: Any) -> bool:
        """Whether both are numbers, no percentages, that differ by more than rounding explains: 1/2006!, 1/2004!."""
        percent = grader.get_pct_val(a) is not None or grader.get_pct_val(b) is not None
        if percent or not (getattr(a, "is_number", False) and getattr(b, "is_number", False)):
            return False
        left, right = a.evalf(30), b.evalf(30)
        return bool(abs(left - right) > ROUNDING * abs(right))

    def strict(answer: str, gold: str, sentence: bool) -> Reply:
        """Answer and gold are LaTeX without a box; `sentence`: the formula or number inside the answer is meant."""
        grader.sympy_numeric_eq = agree  # in this child: it compares the elements of tuples and sets as well
        target = in_box(answer, extraction_config=whole)
        if sentence:
            target += parse(answer, parsing_timeout=None)
        equal = verify(gold=in_box(gold, extraction_config=whole), target=target, timeout_seconds=None)
        return {"status": "correct" if equal else "wrong"}

    def paper(response: str, gold: str, unboxed: bool, alternatives: list[Any]) -> Reply:
        """See gift/math_paper.py; `unboxed`: math-verify alone finds the answer."""
        found = parse(response, parsing_timeout=None)
        texts = [str(each) for each in found[-1:]]
        if verify(gold=in_box(f"${gold}$"), target=found, timeout_seconds=None):
            return {"status": "correct", "method": "response:math_verify", "extracted": texts[0]}
        if holds(alternatives):
            return {"status": "correct", "method": "boxed:openmath"}
        if not unboxed:
            return {"status": "wrong"}
        return {"status": "wrong", "extracted": texts[0]} if texts else {"status": "no_answer"}

    def holds(alternatives: list[Any]) -> bool:
        return any(all(term_holds(term) for term in terms) for terms in alternatives)

    def term_holds(term: list[Any]) -> bool:
        return nearly(*term) if isinstance(term[0], str) else holds(term)

    def nearly(a: str, b: str) -> bool:
        left, right = expression(a), expression(b)
        if left is None or right is None:
            return False
        if grader.sympy_symbolic_eq(left, right):
            return True
        try:
            return math.isclose(float(left.evalf()), float(right.evalf()), rel_tol=TOLERANCE)
        except (TypeError, ValueError, AttributeError, OverflowError):
            return False  # not numbers

    return {"strict": strict, "paper": paper}


def compare_in_child(compare: Comparison, arguments: list[Any], timeout_s: float) -> Reply:
    """The reply of one comparison, made in a child with `timeout_s` seconds and MEMORY_BYTES to live on."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            signal.setitimer(signal.ITIMER_REAL, timeout_s)
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (min(MEMORY_BYTES, hard) if hard > 0 else MEMORY_BYTES, hard))
            try:
                reply = compare(*arguments)
            except Exception as error:
                reply = {"status": "error", "note": f"{type(error).__name__}: {error}"}
            os.write(writer, json.dumps({key: text[:MAX_TEXT_CHARS] for key, text in reply.items()}).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        said = told.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == -signal.SIGALRM:
        return {"status": "timeout"}
    if code or not said:
        return {"status": "error", "note": f"the comparison ended with code {code}"}
    return dict(json.loads(said))


def main() -> None:
    """Serves requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for inherited in signal.SIGALRM, signal.SIGCHLD:
        signal.signal(inherited, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # the LaTeX parser prints its complaints
    os.dup2(silence, 2)
    try:
        comparisons = load_comparisons()
        for answer, gold in PRACTICE:
            comparisons["paper"](f"so $\\boxed{{{answer}}}$", gold, False, [[[answer, gold]]])
            comparisons["paper"](f"The answer is {answer}", gold, True, [])
        close_eval()
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"), file=replies)
        return
    gc.freeze()  # a collection in a child would copy the parent's pages
    print(json.dumps("ready"), file=replies)
    for line in sys.stdin:
        kind, arguments, timeout_s = json.loads(line)
        print(json.dumps(compare_in_child(comparisons[kind], arguments, timeout_s)), file=replies)


if __name__ == "__main__":
    main()
