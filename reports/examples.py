"""The same prompt answered by every policy: a few items, chosen by hash and not by outcome."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports.commands import evaluate_command
from reports.rundata import Policy, RunData, Suite, Task
from reports.tables import Missing

EXAMPLES = 4
MOST_CHARACTERS = 600
MOST_EXTRACTED = 60
ENDINGS = {"length": "cut at the limit", "repetition": "cut in a loop"}
VERDICTS = {
    "correct": "✓ correct",
    "wrong": "✗ wrong",
    "no_answer": "✗ no answer",
    "timeout": "✗ grader timed out",
    "error": "✗ grader failed",
}


@dataclass(frozen=True)
class Answer:
    """One policy's first sample on an item."""

    policy: str
    label: str
    verdict: str
    extracted: str
    length: str
    text: str
    more: int
    """Characters left out."""


@dataclass(frozen=True)
class Example:
    """An item and each policy's answer to it."""

    task: str
    item: str
    prompt: str
    gold: str
    answers: Sequence[Answer]


Samples = dict[str, dict[str, Mapping[str, Any]]]


def examples(run: RunData, suite: Suite) -> list[Example]:
    """Up to four items, round robin over the tasks, each task's in the order of the SHA-256 of their ids."""
    found: dict[str, list[Example]] = {}
    quota = -(-EXAMPLES // max(len(suite.tasks), 1))
    for task in suite.tasks[:EXAMPLES]:
        firsts = {policy.id: first_samples(run, policy, task) for policy in run.policies}
        firsts = {policy: rows for policy, rows in firsts.items() if rows}
        if firsts:
            shared = set.intersection(*(set(rows) for rows in firsts.values()))
            chosen = sorted(shared, key=lambda item: hashlib.sha256(item.encode(errors="replace")).hexdigest())[:quota]
            found[task.name] = [example(run, task, item, firsts) for item in chosen]
    rounds = [items[turn] for turn in range(quota) for items in found.values() if turn < len(items)]
    return rounds[:EXAMPLES]


def first_samples(run: RunData, policy: Policy, task: Task) -> dict[str, Mapping[str, Any]]:
    """Each item's sample of the lowest (run, sample)."""
    rows = sorted(run.samples(policy.id, task), key=lambda row: (row["run"], row["sample"]))
    firsts: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        firsts.setdefault(str(row["item"]), row)
    return firsts


def example(run: RunData, task: Task, item: str, firsts: Samples) -> Example:
    """An item with the answers of the policies that have samples."""
    answers = [answer(policy, firsts[policy.id][item]) for policy in run.policies if policy.id in firsts]
    row = next(iter(firsts.values()))[item]
    prompt = shorten(str(row["prompt"]), MOST_CHARACTERS)
    return Example(task.label, item, prompt, shorten(str(row.get("gold", "")), MOST_EXTRACTED), answers)


def answer(policy: Policy, row: Mapping[str, Any]) -> Answer:
    """A sample for display."""
    text = str(row["completion"])
    extracted = row.get("extracted")
    ending = ENDINGS.get(str(row.get("finish_reason")), "ended by itself")
    return Answer(
        policy=policy.id,
        label=policy.label,
        verdict=VERDICTS.get(str(row["status"]), str(row["status"])),
        extracted="nothing" if extracted is None else shorten(str(extracted), MOST_EXTRACTED),
        length=f"{row['tokens']} tokens, {ending}" if row.get("tokens") is not None else ending,
        text=text[:MOST_CHARACTERS],
        more=max(0, len(text) - MOST_CHARACTERS),
    )


def shorten(text: str, most: int) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= most else f"{text[:most]}…"


def example_gaps(run: RunData, suite: Suite, found: Sequence[Example]) -> list[Missing]:
    """The samples that evaluation should have left and did not."""
    command = evaluate_command(run, suite.name)
    if not found:
        return [Missing("Examples", "no samples in samples/, or no item that all policies answered", command)]
    shown = {answer.policy for example in found for answer in example.answers}
    return [
        Missing(f"Examples of {policy.label}", "no samples", command)
        for policy in run.policies
        if policy.id not in shown
    ]
