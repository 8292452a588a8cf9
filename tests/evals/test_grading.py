import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from toy_suite import Sums
from tqdm import tqdm

import evals.grading
from evals.grading import grade_samples, self_check, ungraded
from evals.tasks import Answer, Check, Grades, Item, single_turn
from gift.cli import UserError
from gift.records import read_jsonl
from gift.rewards import Verdict
from gift.samples import digest, graded_samples, sample_path, verdict_path


@dataclass(frozen=True)
class Parity(Sums):
    """Correct is what ends in the gold digit; `second` says the opposite. Shouting breaks the grader."""

    version: str = "1"
    order: int | None = None
    seen: list[str] = field(default_factory=list, hash=False)

    @property
    def graders(self):
        return {"first": f"parity {self.version}", "second": "opposite 1"}

    def grade(self, answers: Sequence[Answer]) -> Iterator[tuple[int, Grades]]:
        numbers = list(range(len(answers)))
        if self.order is not None:
            random.Random(self.order).shuffle(numbers)
        for number in numbers:
            text = answers[number].response
            self.seen.append(text)
            if text.isupper():
                raise RuntimeError("too loud")
            right = text.endswith(answers[number].item.gold)
            yield number, {"first": verdict(right), "second": verdict(not right)}

    def checks(self, items):
        return [
            *(Check(single_turn(item, item.gold), True, "gold") for item in items),
            *(Check(single_turn(item, "x"), False, "corrupted") for item in items),
            Check(single_turn(Item("", "", "4"), "14"), False, "labelled"),
        ]


def verdict(right: bool) -> Verdict:
    return Verdict(float(right), "correct" if right else "wrong", None, None)


TASK = Parity("sums", "Sums", "easy", count=5)
ITEMS = TASK.load(None).items
FIELDS = {"tokens": 3, "finish_reason": "stop", "max_tokens": 8}


def write_samples(run: Path, completions: dict[tuple[str, int], str], **fields) -> None:
    path = sample_path(run, "sft", "sums")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as log:
        for (item, number), completion in completions.items():
            row = {"item": item, "run": 0, "sample": number, "completion": completion, **FIELDS, **fields}
            log.write(json.dumps(row) + "\n")


def completions(count: int = 3) -> dict[tuple[str, int], str]:
    return {(item.id, n): f"{item.id} {n}" for item in ITEMS for n in range(count)}


def grade(run: Path, task=TASK) -> list[dict]:
    rows = ungraded(run, "sft", task, ITEMS)
    grade_samples(run, "sft", task, ITEMS, rows, None, tqdm(disable=True))
    return read_jsonl(verdict_path(run, "sft", "sums"))


def test_every_grader_speaks_once_of_every_sample(tmp_path):
    write_samples(tmp_path, completions())
    rows = grade(tmp_path)
    gold = {item.id: item.gold for item in ITEMS}
    assert len({(row["item"], row["sample"], row["grader"]) for row in rows}) == len(rows) == 5 * 3 * 2
    for row in rows:
        right = str(row["sample"]).endswith(gold[row["item"]])
        assert (row["status"] == "correct") == (right == (row["grader"] == "first"))
    assert ungraded(tmp_path, "sft", TASK, ITEMS) == []
    assert grade(tmp_path) == rows


def test_a_newer_grader_speaks_anew_and_older_verdicts_stay(tmp_path):
    write_samples(tmp_path, completions())
    before = grade(tmp_path)
    newer = Parity("sums", "Sums", "easy", count=5, version="2")
    samples = sample_path(tmp_path, "sft", "sums").read_bytes()
    rows = grade(tmp_path, newer)
    assert rows[: len(before)] == before
    assert {row["version"] for row in rows[len(before) :]} == {"parity 2"}, "the other grader has spoken already"
    assert sample_path(tmp_path, "sft", "sums").read_bytes() == samples
    both = graded_samples(tmp_path, "sft", "sums", newer.graders)
    assert all(set(row["verdicts"]) == {"first", "second"} for row in both)


def test_a_verdict_on_another_completion_does_not_count(tmp_path):
    write_samples(tmp_path, completions())
    grade(tmp_path)
    changed = completions() | {("sums-1", 2): "other"}
    write_samples(tmp_path, changed)
    assert [(row["item"], row["sample"]) for row in ungraded(tmp_path, "sft", TASK, ITEMS)] == [("sums-1", 2)]
    rows = grade(tmp_path)
    assert rows[-1]["of"] == digest("other") != digest("sums-1 2")


def test_what_breaks_the_grader_is_marked_and_nothing_else(tmp_path):
    write_samples(tmp_path, completions() | {("sums-1", 1): "LOUD", ("sums-3", 0): "LOUDER"})
    rows = [row for row in grade(tmp_path) if row["grader"] == "first"]
    broken = {(row["item"], row["sample"]): row["note"] for row in rows if row["status"] == "error"}
    assert broken == dict.fromkeys([("sums-1", 1), ("sums-3", 0)], "RuntimeError: too loud")
    assert len(rows) == 15


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_what_was_found_before_an_interruption_is_kept(tmp_path, error):
    class Stopped(Parity):
        def grade(self, answers):
            for count, found in enumerate(super().grade(answers)):
                if count == 7:
                    raise error("stop")
                yield found

    write_samples(tmp_path, completions())
    with pytest.raises(error):
        grade(tmp_path, Stopped("sums", "Sums", "easy", count=5, order=1))
    before = read_jsonl(verdict_path(tmp_path, "sft", "sums"))
    assert len(before) == 7 * 2
    rest = Parity("sums", "Sums", "easy", count=5)
    rows = grade(tmp_path, rest)
    assert rows[:14] == before
    assert len(rest.seen) == 15 - 7

    def key(row):
        return row["item"], row["sample"], row["grader"]

    whole = tmp_path / "whole"
    write_samples(whole, completions())
    assert sorted(rows, key=key) == sorted(grade(whole), key=key)


def test_verdicts_reach_the_disk_while_grading_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(evals.grading, "FLUSH_SECONDS", 0.0)
    write_samples(tmp_path, completions())
    lengths = []

    class Bar:
        def update(self, samples: int = 1) -> None:
            lengths.append(len(read_jsonl(verdict_path(tmp_path, "sft", "sums"))))

    rows = ungraded(tmp_path, "sft", TASK, ITEMS)
    grade_samples(tmp_path, "sft", TASK, ITEMS, rows, None, Bar())
    assert lengths[:-1] == [2 * n for n in range(15)]


def test_a_prompt_that_left_no_room_is_not_answered(tmp_path):
    write_samples(tmp_path, completions(), max_tokens=0)
    task = Parity("sums", "Sums", "easy", count=5)
    assert {row["status"] for row in grade(tmp_path, task)} == {"no_answer"}
    assert task.seen == []


def test_a_grader_is_told_the_conversation(tmp_path):
    items = [Item("7-1", "first?", ""), Item("7-2", "second?", "", after="7-1")]
    heard = []

    class Listening(Parity):
        def grade(self, answers):
            heard.extend(answers)
            return super().grade(answers)

    write_samples(tmp_path, {("7-1", 0): "one", ("7-2", 0): "two"})
    task = Listening("sums", "Sums", "easy")
    rows = ungraded(tmp_path, "sft", task, items)
    grade_samples(tmp_path, "sft", task, items, rows, "Be kind.", tqdm(disable=True))
    contents = [[message["content"] for message in answer.messages] for answer in heard]
    assert contents == [["Be kind.", "first?"], ["Be kind.", "first?", "one", "second?"]]
    assert [answer.response for answer in heard] == ["one", "two"]


def test_self_check_counts_what_the_reported_grader_mistakes():
    found = self_check(TASK, ITEMS)
    assert found["grader"] == {"first": "parity 1"}
    assert found["items"] == 5
    assert found["kinds"] == {
        "gold": {"right": 5, "accepted": 5, "wrong": 0, "passed": 0, "mistaken": []},
        "corrupted": {"right": 0, "accepted": 0, "wrong": 5, "passed": 0, "mistaken": []},
        "labelled": {"right": 0, "accepted": 0, "wrong": 1, "passed": 1, "mistaken": ["14"]},
    }
