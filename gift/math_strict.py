r"""Mode 'strict' of `gift.rewards`: the answer a response commits to, and whether it equals the gold one.

Identical strings and plain numbers are settled here, exactly; only a comparison of expressions goes to a worker.
"""

from __future__ import annotations

import re
from fractions import Fraction

from gift.math_pool import Job, Reading, Result, Status

MAX_ANSWER_CHARS = 2000  # no benchmark's answer comes near; the cost of parsing grows faster than the length
NO_GOLD = "there is no gold answer"


def read(response: str, gold: str) -> Reading:
    """What is known of a response without a worker, or what a worker must find out."""
    found, where = find_answer(response)
    answer, wanted = clean(found), clean(bare(gold))
    outcome = settle(answer, wanted)
    if outcome is None and _is_measures(answer) and plain_number(canonical(wanted)):
        return Reading(Result("wrong"), found, f"{where}:number")
    if outcome is None:
        # Only a box is commitment enough for this: what follows "the answer is" may be an unfinished train of thought.
        sentence = where == "boxed" and _is_sentence(answer) and not _is_sentence(wanted)
        return Reading(Job("strict", (answer, wanted, sentence)), found, f"{where}:math_verify")
    status, how = outcome
    return Reading(Result(status, note=NO_GOLD if status == "error" else None), found, f"{where}:{how}")


_DIGITS = re.compile(r"[0-9][0-9,]*(?:\.[0-9]+)?")
_WORDING = re.compile(r"(?:[A-Za-z\s{}$,;:.]|\\[,;: ]|\\(?=(?:text|mathrm|mbox|q?quad)))*")


def bare(gold: str) -> str:
    """A gold answer without its box or the words before it."""
    return find_answer(gold)[0] or gold


def _is_measures(text: str) -> bool:
    """Whether it is different numbers parted by words, as "8 feet 6 inches": math-verify would take one of them."""
    if not _DIGITS.match(text):  # a sentence that comes to its number
        return False
    numbers, between = _DIGITS.findall(text), _DIGITS.split(text)[1:]
    return any(
        first != second and "}{" not in gap and _WORDING.fullmatch(gap) and re.search(r"(?<!\\)\b[A-Za-z]{2,}", gap)
        for first, gap, second in zip(numbers, between, numbers[1:], strict=False)
    )


def _is_sentence(text: str) -> bool:
    """Whether there are two words or more outside formulas."""
    return len(re.findall(r"\b[A-Za-z]{2,}\b", re.sub(r"\$[^$]*\$|\\[A-Za-z]+", " ", text))) >= 2


# ---------------------------------------------------------------------------------------------------------------------
# Finding the answer

_BOX_TOKEN = re.compile(r"\\boxed\{|(?<!\\)\\[{}]|[{}]")
_PLAIN_BOX_TOKEN = re.compile(r"\\boxed\{|[{}]")
_MARKUP = re.compile(r"\\{1,2}boxed\{$|\\(?:text|mathrm|mbox|q?quad)(?![A-Za-z])|\\[()\[\],;: \\]|[\s${}&]")
_CONNECTIVE = re.compile(r"(?:[\w()]+ +){0,3}(?:and|or)|,|;|, *(?:and|or)")
_STATED = re.compile(r"(?:^####(?!#)|\banswer[*_]*\s*(?:is\b|:|=))[\s:*_]*(?=\S)", re.IGNORECASE | re.MULTILINE)
_SENTENCE_END = re.compile(r"\.(?:\s|$)")


def _complete_boxes(text: str) -> list[slice]:
    r"""Where the contents of the complete boxes lie, in the order in which the boxes open.

    Braces are counted, escaped ones (`\{`) skipped, unless no box is complete without them, as in `\boxed{185\}`.
    A box that is never closed, as in a truncated response, is not one.
    """
    return _boxes(text, _BOX_TOKEN) or _boxes(text, _PLAIN_BOX_TOKEN)


def _boxes(text: str, tokens: re.Pattern[str]) -> list[slice]:
    opened: list[tuple[int, bool]] = []  # of each open brace: where its content starts, whether it is a box
    boxes = []
    for token in tokens.finditer(text):
        if token[0].endswith("boxed{") or token[0] == "{":
            opened.append((token.end(), token[0] != "{"))
        elif token[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box:
                boxes.append(slice(start, token.start()))
    return sorted(boxes, key=lambda box: box.start)


def find_answer(response: str) -> tuple[str, str | None]:
    """The final answer a response commits to and where it stood, 'boxed' or 'stated'; ('', None) if there is none.

    One after the reasoning (`</think>`) outranks any in it.
    """
    reasoning, _, said = response.rpartition("</think>")
    found = _find_answer(said)
    return found if found[1] or not reasoning else _find_answer(response)


def _find_answer(response: str) -> tuple[str, str | None]:
    r"""The same of a text without such parts.

    Boxes joined by a comma, or by "and" or "or" with at most three words before it, are one answer with several parts:
    `\boxed{1}` and `\boxed{2}` is "1, 2", which does not equal 2. Of nested boxes the inner one counts. A stated
    answer ends with its line or its sentence. A number elsewhere in the text is not an answer.
    """
    boxes = _complete_boxes(response)
    if boxes:
        parts = [response[boxes[-1]].strip()]
        for earlier, later in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
            between = " ".join(_MARKUP.sub(" ", response[earlier.stop + 1 : later.start]).split())
            if not _CONNECTIVE.fullmatch(between):
                break
            parts.append(response[earlier].strip())
        return ", ".join(dict.fromkeys(reversed(parts))), "boxed"
    marks = list(_STATED.finditer(response))
    if not marks:
        return "", None
    mark = marks[-1]
    tail = response[mark.end() :].split("\n", maxsplit=1)[0]
    if not mark[0].startswith("#"):  # "#### 1. First step" is a heading, not the answer 1
        tail = _SENTENCE_END.split(tail, maxsplit=1)[0]
    return re.sub(r"\\[()\[\]]", "", tail).strip("*_ \t\r"), "stated"


# ---------------------------------------------------------------------------------------------------------------------
# Exact comparison, in process

_THOUSANDS = re.compile(r"\{,\}\s*|,\s*\\!\s*")  # LaTeX's ways to set a comma that is not followed by a space
_SPACING = re.compile(r"(\\\\)|\\[,;: ]|\\q?quad(?![A-Za-z])|~")  # a line break (first group) is not spacing
_WORDS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_PARENTHESES = re.compile(r"\(([^(),]*)\)")
_IDLE_SPACE = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")

_INTEGER = r"(?:[0-9]+|[1-9][0-9]{0,2}(?:[, ][0-9]{3})+)"
_RATIO = rf"(?:(?P<a>{_INTEGER})/(?P<b>{_INTEGER})|\\frac\{{(?P<c>[+-]?{_INTEGER})\}}\{{(?P<d>[+-]?{_INTEGER})\}})"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)(?:(?P<decimal>{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)|(?P<whole>[0-9]+(?: |(?=\\)))?{_RATIO})"
    r"(?: ?(?P<scale>thousand|million|billion|trillion))?"
)
_UNIT = re.compile(r"(.*[0-9.}]) ?([a-z]{3,})(?: (?:per|a|an|each) [a-z]+)?")
# A word after a number that makes it another number.
_NO_UNIT = re.compile(
    r"(?:dozen|score|gross|couple|pair|hundred|thousand|million|billion|trillion|percent|half|halve|third|quarter"
    r"|(?!month)[a-z]+th|squared|cubed|factorial|mod|modulo|base|root|sqrt|times|over|minus|plus|and|not|left|right)s?"
)
_SCALE = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def clean(answer: str) -> str:
    """An answer on one line, as math-verify is given it: no trailing periods and backslashes, LaTeX for "sqrt(3)"."""
    text = _THOUSANDS.sub(",", answer.replace("\\$", "").replace("\u2212", "-"))
    text = re.sub(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = " ".join(text.split()).rstrip("\\. ")
    return text + "." if text.endswith("\\right") else text


def canonical(answer: str) -> str:
    r"""A cleaned answer up to typography: `\dfrac` is `\frac`; dollars, sizing, spacing, `\text`, parentheses go."""
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\!|\$", "", answer)
    text = _SPACING.sub(lambda match: match[1] or " ", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}", text)
    text = _IDLE_SPACE.sub("", _WORDS.sub(r"\1", text)).strip().rstrip(".")
    return whole[1] if (whole := _PARENTHESES.fullmatch(text)) else text


def plain_number(text: str) -> tuple[Fraction, bool] | None:
    r"""The value of a canonical answer that is an integer, decimal or fraction, and whether it is a decimal; or None.

    Understands thousands separators, leading zeros, signs, `1/2`, `\frac{1}{2}`, `7\frac{3}{4}` and "5 million".
    """
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    part = {name: re.sub("[, ]", "", value) for name, value in match.groupdict(default="").items()}
    if part["decimal"]:
        value = Fraction(part["decimal"].rstrip("."))
    else:
        numerator, denominator = int(part["a"] or part["c"]), int(part["b"] or part["d"])
        if denominator == 0:
            return None
        value = int(part["whole"] or 0) + Fraction(numerator, denominator)
    value *= _SCALE.get(part["scale"], 1)
    return (-value if part["sign"] == "-" else value), "." in part["decimal"]


def settle(answer: str, gold: str) -> tuple[Status, str] | None:
    """The status of a cleaned answer and what settled it, or None where only a comparison of expressions can tell."""
    answer, gold = canonical(answer), canonical(gold)
    if not answer or not gold:
        return ("error" if answer else "no_answer"), "string"
    if answer == gold:
        return "correct", "string"
    if len(gold) > MAX_ANSWER_CHARS or len(answer) > MAX_ANSWER_CHARS:
        return "wrong", "too_long"
    given, wanted = plain_number(answer), plain_number(gold)
    if given is None and wanted is not None and (counted := _without_unit(answer)) is not None:
        return ("correct", "number") if counted == wanted[0] else None
    if given is None or wanted is None:
        return None
    if given[0] == wanted[0]:
        return "correct", "number"
    # 0.333333 for 1/3 cannot be exact: math-verify compares such a pair to six places.
    if (given[1] and not _terminates(wanted[0])) or (wanted[1] and not _terminates(given[0])):
        return None
    return "wrong", "number"


def _without_unit(answer: str) -> Fraction | None:
    """The number of "18 dollars" or "5 miles per hour"; None where the word makes another number of it: "18 dozen"."""
    match = _UNIT.fullmatch(answer)
    if match is None or _NO_UNIT.fullmatch(match[2]):
        return None
    number = plain_number(match[1])
    return None if number is None else number[0]


def _terminates(value: Fraction) -> bool:
    """Whether some decimal equals this fraction: its denominator has no prime factor but 2 and 5."""
    return pow(10, value.denominator.bit_length(), value.denominator) == 0
