"""Evaluation while RL trains: what it leaves behind, and that training goes as it would without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from naive_rl import (
    PROBLEMS,
    SETTINGS,
    KilledError,
    assert_same_weights,
    fresh_policy,
    keep_nothing,
    make_tokenizer,
    trainer,
    verdicts_by_parity,
)

from evals.periodic import Periodic
from evals.suites import SUITES, plan
from gift import rollouts
from gift.grpo import Watch
from gift.records import read_jsonl

TASKS = ("chain", "gcd")
LIMIT, RUNS, STEPS = 3, 2, 4


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(autouse=True)
def by_parity(monkeypatch):
    monkeypatch.setattr(rollouts, "grade_math", verdicts_by_parity)


def watched(tokenizer, folder: Path, every: int):
    """A trainer that is evaluated on two tasks of the embedded suite every so many steps."""
    suite = SUITES["nano"]
    protocol = replace(suite.protocol, runs=RUNS, samples_per_run=1, max_tokens=4)
    loaded = plan(suite, protocol, tasks=TASKS, limit=LIMIT).load()
    ours = trainer(fresh_policy(tokenizer), tokenizer, folder, SETTINGS)
    ours.watch = Watch(every, Periodic(folder, "p-rl", [loaded], tokenizer))
    return ours


def evaluations(folder: Path) -> list[dict]:
    return [row for row in read_jsonl(folder / "metrics.jsonl") if row["event"] == "evaluation"]


def logs(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in (folder / "during").rglob("*.jsonl")}


@pytest.mark.parametrize(("every", "steps"), [(2, [0, 2, 4]), (3, [0, 3, 4]), (9, [0, 4])])
def test_it_is_evaluated_before_every_so_often_and_at_the_end(tmp_path, tokenizer, every, steps):
    ours = watched(tokenizer, tmp_path, every)
    ours.train(PROBLEMS, PROBLEMS[:3], keep_nothing)
    rows = evaluations(tmp_path)
    assert [row["step"] for row in rows] == steps
    for row in rows:
        for task in TASKS:
            home = tmp_path / "during" / "p-rl" / f"step-{row['step']:06d}"
            samples = read_jsonl(home / "samples" / "p-rl" / f"{task}.jsonl")
            verdicts = read_jsonl(home / "verdicts" / "p-rl" / f"{task}.jsonl")
            assert (
                len({(each["item"], each["run"], each["sample"]) for each in samples}) == len(samples) == LIMIT * RUNS
            )
            strict = [each for each in verdicts if each["grader"] == "strict"]
            assert len(strict) == len(samples)
            found = row[task]
            assert (found["items"], found["samples"]) == (LIMIT, LIMIT * RUNS)
            assert found["accuracy"] == sum(each["status"] == "correct" for each in strict) / len(strict)
            assert 0 <= found["low"] <= found["accuracy"] <= found["high"] <= 1
    assert len(list((tmp_path / "during" / "p-rl").iterdir())) == len(steps)


def test_it_changes_nothing_of_the_training(tmp_path, tokenizer):
    plain = trainer(fresh_policy(tokenizer), tokenizer, tmp_path / "plain", SETTINGS)
    plain.train(PROBLEMS, PROBLEMS[:3], keep_nothing)
    ours = watched(tokenizer, tmp_path / "watched", every=1)
    before = fresh_policy(tokenizer)
    ours.train(PROBLEMS, PROBLEMS[:3], keep_nothing)
    assert_same_weights(ours.engine.model, plain.engine.model, exactly=True)
    with pytest.raises(AssertionError):
        assert_same_weights(ours.engine.model, before, exactly=True)
    assert (tmp_path / "plain" / "rollouts.jsonl").read_bytes() == (
        tmp_path / "watched" / "rollouts.jsonl"
    ).read_bytes()


@pytest.mark.parametrize("stop_at", [0, 2, STEPS])
def test_a_killed_training_goes_on_without_evaluating_anything_twice(tmp_path, tokenizer, stop_at):
    """Killed once the evaluation of a step is in its logs, before or after metrics.jsonl has it."""
    watched(tokenizer, tmp_path / "whole", every=1).train(PROBLEMS, PROBLEMS[:3], keep_nothing)
    for recorded in (False, True):
        folder = tmp_path / f"killed-{recorded}"
        ours = watched(tokenizer, folder, every=1)
        append = ours.log.append

        def die(rows, append=append, recorded=recorded):
            dies = (rows[0]["event"], rows[0]["step"]) == ("evaluation", stop_at)
            if recorded or not dies:
                append(rows)
            if dies:
                raise KilledError

        ours.log.append = die
        with pytest.raises(KilledError):
            ours.train(PROBLEMS, PROBLEMS[:3], keep_nothing)
        watched(tokenizer, folder, every=1).train(PROBLEMS, PROBLEMS[:3], keep_nothing)
        assert evaluations(folder) == evaluations(tmp_path / "whole")
        assert logs(folder) == logs(tmp_path / "whole")
