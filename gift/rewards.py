r"""Verifiable rewards: is a response's final answer the gold answer? The same code for RL reward and for evaluation.

`grade_math` finds the answer that a response commits to, settles identical strings and plain numbers exactly and in
process, and leaves every other form to math-verify (github.com/huggingface/Math-Verify) in worker processes.

The paper's reward accepts what either OpenMathInstruct's `math_equal` or math-verify accepts. Departures from it:
5000 is not 50 (no percent rule between plain numbers) and 120006 is not 120000 (no 1e-4 tolerance); a number that
merely occurs in the text is not an answer; a comparison that runs out of time scores 0; and no name the model writes
reaches sympy's `parse_expr`, which evaluates Python: math-verify gives it digits and arithmetic operators only.

Importing this module is cheap: the worker processes (gift/math_worker.py) start when an answer first needs them. No
answer can hang or bloat them, or change the verdict on another.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gift.cli import UserError

GRADER_NAME = "gift.rewards"
GRADER_VERSION = "1"  # raised whenever a verdict can change: records of different versions are not comparable

MAX_ANSWER_CHARS = 2000  # no benchmark's answer comes near; the cost of parsing grows faster than the length
MAX_WORKERS = 8  # unless the caller asks for more
START_SECONDS = 120.0  # to import math-verify, also on a busy machine
GRACE_SECONDS = 5.0  # after a deadline, by which the kernel should have ended the child: then its worker is killed

Status = Literal["correct", "wrong", "no_answer", "timeout", "error"]


@dataclass(frozen=True)
class Verdict:
    """What the grader says of one response.

    `score` is 1.0 for the status 'correct' and 0.0 for any other; 'error' means that the grader failed, or that there
    is no gold answer. `extracted` is the answer found, cut to MAX_ANSWER_CHARS. `method` is `<where>:<how>`: where the
    answer stood ('boxed', or 'stated' as in "the answer is 18"), and what settled it ('string', 'number',
    'math_verify', or 'too_long': past MAX_ANSWER_CHARS and not the gold answer word for word, hence wrong).
    Both are None where there is no answer.
    """

    score: float
    status: Status
    extracted: str | None
    method: str | None


def grade_math(
    responses: list[str], golds: list[str], *, timeout_s: float = 10.0, workers: int | None = None
) -> list[Verdict]:
    r"""Grades each response against the gold answer at the same index.

    A response's answer stands in its last complete `\boxed{...}`, else after its last "####", "answer is" or
    "answer:"; otherwise it has none. A gold answer is bare ("18", "1,000", r"\frac{1}{2}") or marked in the same way.
    `timeout_s` bounds the comparison of each answer (seconds). `workers` is the number of processes for the answers
    that are not settled in process (default: one per core, at most MAX_WORKERS); verdicts do not depend on it. Any
    thread may call this, one call runs at a time. Raises ValueError for lists of different lengths or a limit that is
    not positive, UserError if math-verify is needed and cannot be imported.
    """
    if len(responses) != len(golds):
        raise ValueError(f"{len(responses)} responses but {len(golds)} gold answers")
    if timeout_s <= 0 or (workers is not None and workers < 1):
        raise ValueError(f"timeout_s and workers must be positive, got {timeout_s} and {workers}")
    found = [find_answer(response) for response in responses]
    pairs = [
        _pair(clean(answer), clean(find_answer(gold)[0] or gold), where)
        for (answer, where), gold in zip(found, golds, strict=True)
    ]
    settled = [settle(pair.answer, pair.gold) for pair in pairs]
    # Rollouts of one prompt often agree, so each distinct pair goes to the workers once.
    unsettled = list(dict.fromkeys(pair for pair, outcome in zip(pairs, settled, strict=True) if outcome is None))
    compared = dict(zip(unsettled, _compare(unsettled, timeout_s, workers), strict=True))
    verdicts = []
    for (answer, where), pair, outcome in zip(found, pairs, settled, strict=True):
        status, how = outcome or (compared[pair], "math_verify")
        shown = (None, None) if status == "no_answer" else (answer[:MAX_ANSWER_CHARS], f"{where}:{how}")
        verdicts.append(Verdict(float(status == "correct"), status, *shown))
    return verdicts


# ---------------------------------------------------------------------------------------------------------------------
# Finding the answer

_BOX_TOKEN = re.compile(r"\\boxed\{|(?<!\\)\\[{}]|[{}]")
_MARKUP = re.compile(r"\\{1,2}boxed\{$|\\(?:text|mathrm|mbox|q?quad)(?![A-Za-z])|\\[()\[\],;: \\]|[\s${}&]")
_CONNECTIVE = re.compile(r"(?:[\w()]+ +){0,3}(?:and|or)|,|;|, *(?:and|or)")
_STATED = re.compile(r"(?:^####(?!#)|\banswer[*_]*\s*(?:is\b|:|=))[\s:*_]*(?=\S)", re.IGNORECASE | re.MULTILINE)
_SENTENCE_END = re.compile(r"\.(?:\s|$)")


def _complete_boxes(text: str) -> list[slice]:
    r"""Where the contents of the complete boxes lie, in the order in which the boxes open.

    Braces are counted, escaped ones (`\{`) skipped. A box that is never closed, as in a truncated response, is not one.
    """
    opened: list[tuple[int, bool]] = []  # of each open brace: where its content starts, whether it is a box
    boxes = []
    for token in _BOX_TOKEN.finditer(text):
        if token[0].endswith("boxed{") or token[0] == "{":
            opened.append((token.end(), token[0] != "{"))
        elif token[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box:
                boxes.append(slice(start, token.start()))
    return sorted(boxes, key=lambda box: box.start)


def find_answer(response: str) -> tuple[str, str | None]:
    r"""The final answer a response commits to and where it stood, 'boxed' or 'stated'; ('', None) if there is none.

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
_IDLE_SPACE = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")

_INTEGER = r"(?:[0-9]+|[1-9][0-9]{0,2}(?:[, ][0-9]{3})+)"
_RATIO = rf"(?:(?P<a>{_INTEGER})/(?P<b>{_INTEGER})|\\frac\{{(?P<c>[+-]?{_INTEGER})\}}\{{(?P<d>[+-]?{_INTEGER})\}})"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)(?:(?P<decimal>{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)|(?P<whole>[0-9]+(?: |(?=\\)))?{_RATIO})"
    r"(?: ?(?P<scale>thousand|million|billion|trillion))?"
)
_SCALE = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def clean(answer: str) -> str:
    """An answer on one line, as math-verify is given it: no trailing periods and backslashes, LaTeX for "sqrt(3)"."""
    text = _THOUSANDS.sub(",", answer.replace("\\$", "").replace("\u2212", "-"))
    text = re.sub(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = " ".join(text.split()).rstrip("\\. ")
    return text + "." if text.endswith("\\right") else text


def canonical(answer: str) -> str:
    r"""A cleaned answer up to typography: `\dfrac` is `\frac`; dollars, sizing, spacing and `\text` go."""
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\!|\$", "", answer)
    text = _SPACING.sub(lambda match: match[1] or " ", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}", text)
    return _IDLE_SPACE.sub("", _WORDS.sub(r"\1", text)).strip().rstrip(".")


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
    if given is None or wanted is None:
        return None
    if given[0] == wanted[0]:
        return "correct", "number"
    # 0.333333 for 1/3 cannot be exact: math-verify compares such a pair to six places.
    if (given[1] and not _terminates(wanted[0])) or (wanted[1] and not _terminates(given[0])):
        return None
    return "wrong", "number"


def _terminates(value: Fraction) -> bool:
    """Whether some decimal equals this fraction: its denominator has no prime factor but 2 and 5."""
    return pow(10, value.denominator.bit_length(), value.denominator) == 0


# ---------------------------------------------------------------------------------------------------------------------
# The pool, as the caller sees it


class _Pair(NamedTuple):
    """What a worker compares, both sides cleaned; `sentence`: the answer is a sentence around a formula or number."""

    answer: str
    gold: str
    sentence: bool


def _pair(answer: str, gold: str, where: str | None) -> _Pair:
    # Only a box is commitment enough for this: what follows "the answer is" may be any unfinished train of thought.
    return _Pair(answer, gold, where == "boxed" and _is_sentence(answer) and not _is_sentence(gold))


def _is_sentence(text: str) -> bool:
    """Whether there are two words or more outside formulas."""
    return len(re.findall(r"\b[A-Za-z]{2,}\b", re.sub(r"\$[^$]*\$|\\[A-Za-z]+", " ", text))) >= 2


class _Worker:
    """A grading process: starting up, idle, or busy with pair number `task` until `deadline`."""

    def __init__(self) -> None:
        # In a process group of its own, Ctrl-C at the terminal does not reach it and killing it takes its child along.
        # -P keeps the script's folder, which has a data.py and a models.py, off its import path.
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout
        self.ready = False
        self.task: int | None = None
        self.deadline = time.monotonic() + START_SECONDS

    def send(self, task: int, pair: _Pair, timeout_s: float) -> None:
        self.task, self.deadline = task, time.monotonic() + timeout_s + GRACE_SECONDS
        with contextlib.suppress(BrokenPipeError):  # it died while idle, which reads as the end of its replies
            self.requests.write(json.dumps([*pair, timeout_s]).encode() + b"\n")
            self.requests.flush()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.replies.close()
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()


class _Pool:
    """Grading processes that stay from one call to the next."""

    def __init__(self) -> None:
        self.workers: list[_Worker] = []

    def compare(self, pairs: Sequence[_Pair], timeout_s: float, size: int) -> list[Status]:
        """The status of each (answer, gold), found by at most `size` processes; all end if this is interrupted."""
        statuses: dict[int, Status] = {}
        tasks = iter(range(len(pairs)))
        for worker in [worker for worker in self.workers if worker.process.poll() is not None]:
            self._dismiss(worker)  # killed from outside since the last call
        try:
            while len(statuses) < len(pairs):
                while len(self.workers) < min(size, len(pairs) - len(statuses)):
                    self.workers.append(_Worker())
                crew = self.workers[:size]
                for worker in crew:
                    if worker.ready and worker.task is None and (task := next(tasks, None)) is not None:
                        worker.send(task, pairs[task], timeout_s)
                self._collect([worker for worker in crew if worker.task is not None or not worker.ready], statuses)
        except BaseException:
            self.close()
            raise
        return [statuses[task] for task in range(len(pairs))]

    def _collect(self, awaited: list[_Worker], statuses: dict[int, Status]) -> None:
        """Waits until a worker speaks, dies or is overdue; notes its status and dismisses it if it cannot go on."""
        patience = min(worker.deadline for worker in awaited) - time.monotonic()
        readable = wait([worker.replies.fileno() for worker in awaited], timeout=max(patience, 0))
        for worker in awaited:
            overdue = worker.replies.fileno() not in readable
            if overdue and time.monotonic() < worker.deadline:
                continue
            reply: Any = "timeout" if overdue else json.loads(worker.replies.readline() or "null")
            if worker.task is None:
                worker.ready = reply == "ready"
                if not worker.ready:
                    raise UserError(f"the math grader cannot start ({reply or 'it died'}): install math-verify")
                continue
            statuses[worker.task] = reply or "error"
            worker.task = None
            if overdue or reply is None:
                self._dismiss(worker)

    def _dismiss(self, worker: _Worker) -> None:
        worker.kill()
        self.workers.remove(worker)

    def close(self) -> None:
        for worker in list(self.workers):
            self._dismiss(worker)


_pool = _Pool()
_lock = threading.Lock()


def _compare(pairs: Sequence[_Pair], timeout_s: float, workers: int | None) -> list[Status]:
    with _lock:
        return _pool.compare(pairs, timeout_s, workers or min(MAX_WORKERS, len(os.sched_getaffinity(0))))


def close() -> None:
    """Ends the grading processes. The next call of `grade_math` starts new ones; at exit this happens by itself."""
    with _lock:
        _pool.close()


def _disown() -> None:
    """In a forked child: the processes, and a lock that another thread may hold, are the parent's."""
    global _pool, _lock
    _pool, _lock = _Pool(), threading.Lock()


atexit.register(close)
os.register_at_fork(after_in_child=_disown)
