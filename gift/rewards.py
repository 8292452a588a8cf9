r"""Verifiable rewards: is a response's final answer the gold answer? The same code for RL reward and for evaluation.

Two modes, whose rules and measured differences are in docs/grading.md:

'strict' (gift/math_strict.py), for evaluation and RL: the answer the response commits to, in a box or after words such
as "the answer is", equals the gold one. Numbers are compared exactly, other forms by math-verify
(github.com/huggingface/Math-Verify).

'paper' (gift/math_paper.py): what the RL reward of arXiv 2601.09233 is (Appendix E.3, utils/reward_utils of
zzy1127/GIFT), by its rules: OpenMathInstruct's equality of the boxed answer, or else math-verify's of the whole
response. 5000 is 50 there, 120006 is 120000, and a number that merely occurs in the text can be an answer.

In neither mode is a comparison that runs out of time correct, as it is in the paper's code, nor is model text ever
evaluated, as it is there by sympy's `parse_expr`.

Importing this module is cheap: the worker processes (gift/math_pool.py) start when an answer first needs them. No
answer can hang or bloat them, or change the verdict on another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gift import math_paper, math_pool, math_strict
from gift.math_pool import Job, Reading, Result, Status
from gift.math_strict import MAX_ANSWER_CHARS

GRADER_NAME = "gift.rewards"
GRADER_VERSION = "3"  # raised whenever a verdict can change: records of different versions are not comparable

Mode = Literal["strict", "paper"]

_READERS = {"strict": math_strict.read, "paper": math_paper.read}


@dataclass(frozen=True)
class Verdict:
    """What the grader says of one response.

    `score` is 1.0 for the status 'correct' and 0.0 for any other; 'error' means that the grader failed, or that there
    is no gold answer. `extracted` is the answer found, cut to MAX_ANSWER_CHARS. `method` is `<where>:<how>`: where the
    answer stood ('boxed'; 'stated' as in "the answer is 18"; 'response': math-verify took it from the whole response),
    and what settled it ('string', 'number', 'openmath', 'math_verify', or 'too_long': past MAX_ANSWER_CHARS and not the
    gold answer word for word, hence wrong). Both are None where there is no answer. Graders of evaluation that give
    marks have the status 'rated', their mark being the score. `note` is what a reader of the verdict should know, such
    as why it is an 'error'.
    """

    score: float
    status: Status
    extracted: str | None
    method: str | None
    note: str | None = None


def grade_math(
    responses: list[str],
    golds: list[str],
    *,
    timeout_s: float = 10.0,
    workers: int | None = None,
    mode: Mode = "strict",
) -> list[Verdict]:
    r"""Grades each response against the gold answer at the same index, in one mode.

    Strictly, a response's answer stands in its last complete `\boxed{...}`, else after its last "####", "answer is" or
    "answer:"; otherwise it has none. A gold answer is bare ("18", "1,000", r"\frac{1}{2}") or marked in the same way.
    `timeout_s` bounds the comparison of each answer (seconds). `workers` is the number of processes for the answers
    that are not settled in process (default: one per core, at most 8); verdicts do not depend on it. Any thread may
    call this, one call runs at a time. An exception that an answer causes makes its own verdict an 'error' with a note.
    Raises ValueError for lists of different lengths, an unknown mode or a limit that is not positive, UserError if
    math-verify is needed and cannot be imported.
    """
    graded = grade_math_modes(responses, golds, (mode,), timeout_s=timeout_s, workers=workers)
    return [verdicts[mode] for verdicts in graded]


def grade_math_modes(
    responses: Sequence[str],
    golds: Sequence[str],
    modes: Sequence[Mode] = ("strict", "paper"),
    *,
    timeout_s: float = 10.0,
    workers: int | None = None,
) -> list[dict[str, Verdict]]:
    """The verdicts of `grade_math` in each of `modes`, by one pass over the workers."""
    if len(responses) != len(golds):
        raise ValueError(f"{len(responses)} responses but {len(golds)} gold answers")
    if timeout_s <= 0 or (workers is not None and workers < 1):
        raise ValueError(f"timeout_s and workers must be positive, got {timeout_s} and {workers}")
    if unknown := set(modes) - set(_READERS):
        raise ValueError(f"unknown mode {', '.join(sorted(unknown))}; known: {', '.join(_READERS)}")
    readings = [
        {mode: _read(mode, response, gold) for mode in modes} for response, gold in zip(responses, golds, strict=True)
    ]
    outcomes = [reading.outcome for by_mode in readings for reading in by_mode.values()]
    # Rollouts of one prompt often agree, so each distinct comparison goes to the workers once.
    jobs = list(dict.fromkeys(outcome for outcome in outcomes if isinstance(outcome, Job)))
    results = dict(zip(jobs, math_pool.run(jobs, timeout_s, workers), strict=True))
    return [
        {
            mode: _verdict(reading, results[reading.outcome] if isinstance(reading.outcome, Job) else reading.outcome)
            for mode, reading in by_mode.items()
        }
        for by_mode in readings
    ]


def _read(mode: Mode, response: str, gold: str) -> Reading:
    try:
        return _READERS[mode](response, gold)
    except Exception as error:  # whatever a response does to a parser of ours stays with that response
        return Reading(Result("error", note=f"{type(error).__name__}: {error}"[:200]))


def _verdict(reading: Reading, result: Result) -> Verdict:
    if result.status == "no_answer":
        return Verdict(0.0, "no_answer", None, None)
    extracted, method = result.extracted or reading.extracted, result.method or reading.method
    if extracted is not None:
        extracted = extracted[:MAX_ANSWER_CHARS]
    return Verdict(float(result.status == "correct"), result.status, extracted, method, result.note)


def close() -> None:
    """Ends the grading processes. The next call of `grade_math` starts new ones; at exit this happens by itself."""
    math_pool.close()
