"""Samples to verdicts: whatever the log holds that a grader has not spoken of yet, in whatever version it has now.

Verdicts are appended as they are found, so that grading can be killed and continued like sampling, and grading again
with a newer grader leaves samples and older verdicts as they are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evals.conversations import Conversations
from evals.tasks import Answer, Check, Grades, Item, Task
from gift.cli import UserError
from gift.records import JsonlLog
from gift.rewards import Verdict
from gift.samples import (
    VERDICT_FIELDS,
    VERDICT_KEY,
    Row,
    digest,
    graded_samples,
    read_samples,
    sample_path,
    verdict_path,
)

FLUSH_SECONDS = 2.0  # how long a verdict waits at most to be written together with others
NO_ANSWER = Verdict(0.0, "no_answer", None, None)


def ungraded(run: Path, policy: str, task: Task, items: Sequence[Item]) -> list[dict[str, Any]]:
    """The samples of these items that some grader of the task has not spoken of."""
    wanted = {item.id for item in items}
    rows = graded_samples(run, policy, task.name, task.graders)
    return [row for row in rows if row["item"] in wanted and row["verdicts"].keys() != task.graders.keys()]


def grade_samples(
    run: Path, policy: str, task: Task, items: Sequence[Item], rows: Sequence[Row], system: str | None, bar: tqdm
) -> None:
    """Grades these samples of a task's items and appends the verdicts to the log of the policy.

    A response that had no room, as its prompt filled the model's window, is no answer, without asking the grader. An
    answer that breaks the grader has the status 'error'. Raises UserError where grading cannot go on.
    """
    by_id = {item.id: item for item in items}
    has_turns = any(item.after is not None for item in items)
    conversations = Conversations(items, system, read_samples(sample_path(run, policy, task.name)) if has_turns else ())
    asked = [row for row in rows if row["max_tokens"] != 0]
    answers = [
        Answer(item, conversations.messages(item, row["run"], row["sample"]), row["completion"])
        for row in asked
        for item in [by_id[row["item"]]]
    ]
    waiting: list[dict[str, Any]] = []
    with JsonlLog(verdict_path(run, policy, task.name), VERDICT_KEY) as log:
        written = time.monotonic()
        try:
            for number, grades in graded(task, answers):
                waiting += verdict_rows(task, policy, asked[number], grades)
                bar.update()
                if time.monotonic() - written > FLUSH_SECONDS:
                    log.append(waiting)
                    waiting, written = [], time.monotonic()
        finally:
            log.append(waiting)
        log.append(
            line
            for row in rows
            if row["max_tokens"] == 0
            for line in verdict_rows(task, policy, row, dict.fromkeys(task.graders, NO_ANSWER))
        )
        bar.update(len(rows) - len(asked))


def graded(task: Task, answers: Sequence[Answer]) -> Iterator[tuple[int, Grades]]:
    """As task.grade; where that fails as no grader should, the rest is graded one by one and failures are marked."""
    done: set[int] = set()
    try:
        for number, grades in task.grade(answers):
            done.add(number)
            yield number, grades
    except UserError:
        raise
    except Exception:
        for number, answer in enumerate(answers):
            if number not in done:
                yield number, graded_alone(task, answer)


def graded_alone(task: Task, answer: Answer) -> Grades:
    """The verdicts of one answer; 'error' with the reason where the grader fails."""
    try:
        return dict(task.grade([answer]))[0]
    except UserError:
        raise
    except Exception as error:
        verdict = Verdict(0.0, "error", None, None, f"{type(error).__name__}: {error}"[:1000])
        return dict.fromkeys(task.graders, verdict)


def verdict_rows(task: Task, policy: str, row: Row, grades: Grades) -> Iterator[dict[str, Any]]:
    """The log's lines for the verdicts of one sample."""
    for grader, verdict in grades.items():
        yield {
            "task": task.name,
            "policy": policy,
            **{name: row[name] for name in ("item", "run", "sample")},
            "grader": grader,
            "version": task.graders[grader],
            "of": digest(row["completion"]),
            **{name: getattr(verdict, name) for name in VERDICT_FIELDS},
        }


# ---------------------------------------------------------------------------------------------------------------------
# The grader itself


def self_check(task: Task, items: Sequence[Item]) -> dict[str, Any]:
    """What the task's reported grader says of responses whose verdict is known, as a manifest records it.

    Per kind of check: how many are right (`right`) and how many of them it accepts (`accepted`), how many are wrong
    (`wrong`) and how many of them it accepts (`passed`), and the items it mistakes (`mistaken`).
    """
    reported, version = next(iter(task.graders.items()))
    by_kind: dict[str, list[Check]] = {}
    for check in task.checks(items):
        by_kind.setdefault(check.kind, []).append(check)
    kinds = {}
    for kind, checks in by_kind.items():
        # The labelled answers are the same for all tasks of a grader, which is what they are graded by.
        known = (type(task).grade, reported, version, len(checks))
        tally = _labelled.get(known) if kind == "labelled" else None
        kinds[kind] = tally or tally_of(task, reported, checks)
        if kind == "labelled":
            _labelled[known] = kinds[kind]
    return {"grader": {reported: version}, "items": len(items), "kinds": kinds}


_labelled: dict[tuple[Any, ...], dict[str, Any]] = {}


def tally_of(task: Task, grader: str, checks: Sequence[Check]) -> dict[str, Any]:
    """What a grader says of these checks."""
    found = {number: grades[grader] for number, grades in graded(task, [check.answer for check in checks])}
    tally: dict[str, Any] = {"right": 0, "accepted": 0, "wrong": 0, "passed": 0, "mistaken": []}
    for number, check in enumerate(checks):
        accepted = found[number].status == "correct"
        tally["right" if check.correct else "wrong"] += 1
        tally["accepted" if check.correct else "passed"] += accepted
        if accepted != check.correct:
            tally["mistaken"].append(describe(check))
    return tally


def describe(check: Check) -> str:
    """What names a check: its item, or for one of no item what was answered."""
    return check.answer.item.id or check.answer.response[:80]
