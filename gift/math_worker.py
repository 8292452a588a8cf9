r"""The grading process of `gift.rewards`: compares two mathematical answers with math-verify, whatever the answers are.

Run as a script, it imports math-verify once and then forks a child for each comparison. The kernel ends the child when
its time is up: SIGALRM at its default action also stops the big-integer C code that neither a thread nor a Python
signal handler can. It caps the child's memory as well. So no answer can hang or bloat the process, or change the
verdict on another answer.

Protocol, in JSON lines: "ready" when started, or why it cannot start; then for each request on stdin,
`[answer, gold, sentence, timeout_s]`, one of "correct", "wrong", "timeout" and "error" on stdout. It ends with stdin.
"""

import gc
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable

MEMORY_BYTES = 4 << 30  # address space of one comparison

CORRECT, WRONG = 10, 11  # exit codes of a child; Python's own end at 2
STATUSES = {CORRECT: "correct", WRONG: "wrong", -signal.SIGALRM: "timeout"}

# Compared once before any answer is: the parser learns its grammar from use, and children inherit what it has learnt.
PRACTICE = (
    (r"\frac{x+1}{2}", r"\frac12(1+x)"),
    (r"\left(1,\frac{\pi}{2}\right)", r"(1,\pi/2)"),
    (r"x\in[-2,7)", r"[-2,7)"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"(x+1)^2=0", r"x^2+2x+1=0"),
    (r"1,2", r"\{1,2\}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
    (r"\text{Evelyn}", r"x=5"),
)

Comparison = Callable[[str, str, bool], bool]


def load_comparison() -> Comparison:
    """The function `equal(answer, gold, sentence)`, by math-verify without its own timers, which would disarm ours.

    Both are LaTeX without a box. `sentence` says that the formula or number inside the answer is meant.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    # The answer as a whole or nothing: by default, math-verify falls back on the last number in what it cannot parse.
    whole = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    def expressions(text: str) -> list[object]:
        return list(parse(f"\\boxed{{{text}}}", extraction_config=whole, parsing_timeout=None))

    def equal(answer: str, gold: str, sentence: bool) -> bool:
        target = expressions(answer)
        if sentence:
            target += parse(answer, parsing_timeout=None)
        return bool(verify(gold=expressions(gold), target=target, timeout_seconds=None))

    return equal


def compare_in_child(equal: Comparison, answer: str, gold: str, sentence: bool, timeout_s: float) -> str:
    """The status of one comparison, made in a child with `timeout_s` seconds and MEMORY_BYTES to live on."""
    pid = os.fork()
    if pid:
        return STATUSES.get(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), "error")
    code = 1
    try:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (min(MEMORY_BYTES, hard) if hard > 0 else MEMORY_BYTES, hard))
        code = CORRECT if equal(answer, gold, sentence) else WRONG
    finally:
        os._exit(code)


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
        equal = load_comparison()
        for answer, gold in PRACTICE:
            equal(answer, gold, False)
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"), file=replies)
        return
    gc.freeze()  # a collection in a child would copy the parent's pages
    print(json.dumps("ready"), file=replies)
    for line in sys.stdin:
        print(json.dumps(compare_in_child(equal, *json.loads(line))), file=replies)


if __name__ == "__main__":
    main()
