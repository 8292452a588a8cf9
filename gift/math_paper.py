r"""Mode 'paper' of `gift.rewards`: the reward of arXiv 2601.09233, Appendix E.3, by its rules.

A response is right if either comparison says so:

1. OpenMathInstruct's (NVIDIA/NeMo-Skills, nemo_skills/code_execution/math_grader.py of 2024): the content of the last
   `\boxed{`, normalized, equals the gold answer as a string, as a number to a relative 1e-4 also of a hundredth and of
   a hundred times the gold one, element by element, or as an expression to the same tolerance;
2. math-verify's, between the whole response and `\boxed{$gold$}`.

Strings and numbers are settled here. A worker gets the rest: which expressions would have to be equal
(`Alternatives`), and the response. It reads them with math-verify's LaTeX parser, where the original has sympy's
`parse_expr` run them as Python, and where its `parse_latex` fails unless one version of antlr is installed.
"""

from __future__ import annotations

import math
import re
from itertools import chain
from typing import Any

from gift.math_pool import Job, Reading, Result
from gift.math_strict import MAX_ANSWER_CHARS, NO_GOLD, bare

MAX_PREDICTION_CHARS = 1000
TOLERANCE = 1e-4  # relative

Alternatives = tuple[Any, ...]
"""A condition on expressions. It holds if all terms of one of its members do; a term is two expressions that must be
equal, or Alternatives again."""

TRUE: Alternatives = ((),)
FALSE: Alternatives = ()


def read(response: str, gold: str) -> Reading:
    """What is known of a response without a worker, or what a worker must find out."""
    wanted = bare(gold).strip()
    boxed = last_box(response)
    if not wanted.strip(" $"):
        return Reading(Result("error", note=NO_GOLD), boxed, boxed and "boxed:string")
    equal = FALSE if boxed is None else equality(boxed, wanted)
    if equal == TRUE:
        return Reading(Result("correct"), boxed, f"boxed:{_settled_by(boxed or '', wanted)}")
    if boxed is not None and _plainly_wrong(response, boxed, wanted):
        return Reading(Result("wrong"), boxed, "boxed:number")
    where = "response" if boxed is None else "boxed"
    return Reading(Job("paper", (response, wanted.strip("$"), boxed is None, equal)), boxed, f"{where}:math_verify")


def _settled_by(boxed: str, gold: str) -> str:
    given, wanted = normalize(boxed), normalize(gold)
    if given.lower() == wanted.lower():
        return "string"
    return "openmath" if _number(given) is None else "number"


_INTEGER = re.compile(r"\s*\$?[+-]?(?:[0-9]{1,300}|[1-9][0-9]{0,2}(?:,[0-9]{3}){1,99})\$?\s*")


def _plainly_wrong(response: str, boxed: str, gold: str) -> bool:
    """Whether math-verify can only read the boxed integer, which OpenMathInstruct's rules refuse for this integer.

    Beside a box, math-verify heeds another box and what follows "final answer".
    """
    integers = _INTEGER.fullmatch(boxed) and _INTEGER.fullmatch(gold)
    return bool(integers) and response.count("boxed") == 1 and "final answer" not in response.lower()


# ---------------------------------------------------------------------------------------------------------------------
# Finding the answer and bringing it into one form


def last_box(response: str) -> str | None:
    r"""The content of the last `\boxed`, by counting braces, escaped ones too; None unless `\boxed{` is closed."""
    start = response.rfind("\\boxed")
    if start < 0 or not response.startswith("{", start + len("\\boxed")):
        return None
    start += len("\\boxed{")
    depth = 1
    for token in re.finditer(r"[{}]", response[start:]):
        depth += 1 if token[0] == "{" else -1
        if depth == 0:
            return response[start : start + token.start()]
    return None


_BARE_NUMBER = re.compile(r"(?P<dollar>\$)?(?P<number>[+-]?[0-9][0-9,]*(?:\.[0-9]+)?)(?P<percent>\\?%)?")
_CONJUNCTION = re.compile(r"\s*\\text\{\s*(?:or|and)\s*\}\s*")
_UNWRAPPED = re.compile(r"\\(?:text|mathrm|mathcal|textbf|textit)\{([^{}]*)\}")
_DELETED = re.compile(r"\\!|\\?\$|\\?%|\^\{\\circ\}")
_UNIT = re.compile(
    r"(?<![A-Za-z\\])(?:degree|cm|centimeter|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard"
    r"|p\.m\.|a\.m\.)(?:es|s)?(?![A-Za-z]) *(?:\^\{?[0-9]+\}?)?"
)
_WEEKDAY = re.compile(r"(?:Sun|Mon|Tues|Wednes|Thurs|Fri|Satur)day", re.IGNORECASE)
_POWERS = {"million": 6, "billion": 9, "trillion": 12}


def normalize(answer: str) -> str:
    """An answer in the one form in which OpenMathInstruct compares strings; in the order of its rules."""
    text = answer.strip()
    if number := _BARE_NUMBER.fullmatch(text):
        text = number["number"]
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text)
    text = re.sub(r",\s*,", ",", _CONJUNCTION.sub(",", text))
    text = _without_units(text)
    text = text.partition("\\in ")[2] or text
    if whole := _UNWRAPPED.fullmatch(text.strip()):
        text = whole[1]
    text = _DELETED.sub("", text)
    text = re.sub(r" (?:or|and) ", " , ", text)
    for name, power in _POWERS.items():
        text = re.sub(rf"\s*{name}s?(?![A-Za-z])", f"*10^{power}", text)
    if not _WEEKDAY.search(text):
        text = _UNIT.sub("", text)
    text = text.strip()
    if re.fullmatch(r"\{[^{}]*\}", text):
        text = text[1:-1]
    text = re.sub(r"\\sqrt\s*([0-9A-Za-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"- +", "-", text)
    text = re.sub(r"(?<![-0-9.])([0-9]+)(?: +(?=[0-9]+/)| *(?=\\frac\{[0-9]+\}\{))", r"\1+", text)
    text = text.replace(" ", "")
    value = _float(text)
    return str(round(value)) if value is not None and abs(value - round(value)) < 1e-7 else text


def _without_units(text: str) -> str:
    r"""The text before a single `\text{` or `\mbox{`, which is a unit; where nothing stands before it, its content."""
    before, *rest = text.split("\\text{")
    if len(rest) == 1 and before.strip() not in ("", "("):
        return before.strip()
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    return text.split("\\mbox{")[0] if text.count("\\mbox{") == 1 else text


def _float(text: str) -> float | None:
    """The number a text is; None if it is none, or none that a float can hold."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _number(text: str) -> float | None:
    """The number a text is once its commas are gone; "1,2" is 12 by these rules."""
    return _float(text.replace("{,}", "").replace(",", ""))


# ---------------------------------------------------------------------------------------------------------------------
# Equality


def equality(prediction: str, reference: str) -> Alternatives:
    """When a prediction equals the reference: TRUE, FALSE, or which expressions must be equal for that."""
    given, wanted = normalize(prediction[:MAX_ANSWER_CHARS])[:MAX_PREDICTION_CHARS], normalize(reference)
    if given.lower() == wanted.lower():
        return TRUE
    number, target = _number(given), _number(wanted)
    if number is not None and target is not None:
        references = (target / 100, target, target * 100)
        return TRUE if any(math.isclose(number, each, rel_tol=TOLERANCE) for each in references) else FALSE
    if not given:
        return FALSE
    given, wanted = _interval(given), _interval(wanted)
    if _same_inside(given, wanted):
        return TRUE
    return _either(
        *(_elementwise(*rows) for rows in _rows(given, wanted)),
        (((given, wanted),),),
    )


def _either(*conditions: Alternatives) -> Alternatives:
    return TRUE if TRUE in conditions else tuple(member for condition in conditions for member in condition)


def _elementwise(given: list[str], wanted: list[str]) -> Alternatives:
    if len(given) != len(wanted):
        return FALSE
    terms = [equality(*pair) for pair in zip(given, wanted, strict=True)]
    return FALSE if FALSE in terms else (tuple(term for term in terms if term != TRUE),)


def _rows(given: str, wanted: str) -> list[tuple[list[str], list[str]]]:
    """The ways in which both are sequences of elements: in like brackets, in the open, as points and as matrices."""
    point = given.removeprefix("Point") if wanted.startswith("(") else given
    rows = []
    if _bracketed(point) and _bracketed(wanted) and (point[0], point[-1]) == (wanted[0], wanted[-1]):
        rows.append((point[1:-1].split(","), wanted[1:-1].split(",")))
    if "," in given and "," in wanted:
        rows.append((given.split(","), wanted.split(",")))
    matrix = re.fullmatch(r"Matrix\(\[(.*)\]\)", given)
    latex = re.fullmatch(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", wanted)
    if matrix and latex:
        cells = [row.split("&") for row in latex[1].strip("\\").split("\\\\")]
        entries = [row.split(",") for row in re.findall(r"\[([^\[\]]*)\]", matrix[1])]
        if [len(row) for row in entries] == [len(row) for row in cells]:
            rows.append(([*chain(*entries)], [*chain(*cells)]))
    return rows


def _bracketed(text: str) -> bool:
    return len(text) > 1 and text[0] in "([" and text[-1] in ")]"


def _interval(text: str) -> str:
    """sympy's `Interval.Lopen(a, b)` as (a, b]."""
    match = re.fullmatch(r"Interval(\.open|\.Lopen|\.Ropen)?\((.*)\)", text)
    if match is None:
        return text
    kind = match[1] or ""
    return ("(" if kind in (".open", ".Lopen") else "[") + match[2] + (")" if kind in (".open", ".Ropen") else "]")


def _same_inside(given: str, wanted: str) -> bool:
    """Whether the texts are the same but for braces, parentheses and a pair of brackets of one kind."""
    if _bracketed(given) and (not _bracketed(wanted) or (given[0], given[-1]) == (wanted[0], wanted[-1])):
        given, wanted = given.strip("[]()"), wanted.strip("[]()")
    return re.sub(r"[{}()]", "", given) == re.sub(r"[{}()]", "", wanted)
