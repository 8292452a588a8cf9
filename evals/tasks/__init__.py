"""Benchmark tasks: where the items come from and how an answer is graded. One module per family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gift.rewards import Verdict

Grades = Mapping[str, Verdict]
"""A verdict by each of a task's graders."""
Message = Mapping[str, str]
"""One turn of a conversation: role ('system', 'user' or 'assistant') and content."""


@dataclass(frozen=True)
class Item:
    """One problem; a family may know more about its own.

    `id` is unique within the task, `prompt` is the user turn as the model sees it, `gold` the right answer for people
    to read, `category` what the benchmark files it under ('' if nothing). An item with `after` continues the
    conversation of the item of that id: it is asked once that one is answered, and sees the same sample's answer.
    """

    id: str
    prompt: str
    gold: str
    category: str = ""
    after: str | None = None


@dataclass(frozen=True)
class TaskData:
    """A task's items in file order, and their origin: name, revision (str or None), sha256 and rows (int)."""

    items: tuple[Item, ...]
    source: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """A completion to grade: the item, the conversation up to and with its prompt, and what the model said."""

    item: Item
    messages: tuple[Message, ...]
    response: str


@dataclass(frozen=True)
class Check:
    """A response whose verdict is known: what a sound grader says of it. `kind` is where that knowledge comes from.

    'gold': the benchmark's own answer, put as a model is asked to put it; 'corrupted': the same with a wrong answer;
    'labelled': judged by people.
    """

    answer: Answer
    correct: bool
    kind: Literal["gold", "corrupted", "labelled"]


@dataclass(frozen=True)
class Task(ABC):
    """A benchmark.

    `group` says what reports put side by side: 'math', 'code', 'choice', 'in-distribution', ... `prompt` is the
    template of the user turn, recorded with every result; what stands in braces is the family's. `metric` is
    'accuracy' where a verdict is right or wrong, 'rating' where its score is a mark.
    """

    name: str
    label: str
    group: str
    prompt: str
    metric: Literal["accuracy", "rating"] = "accuracy"

    @property
    @abstractmethod
    def origin(self) -> str:
        """Where `load` looks, for people."""

    @property
    @abstractmethod
    def graders(self) -> Mapping[str, str]:
        """Name to version of the graders, the reported one first: verdicts of different versions do not compare."""

    @abstractmethod
    def load(self, data_dir: Path | None) -> TaskData:
        """All items, from files under `data_dir`, or from the Hub where it is None.

        Raises UserError naming the file and row of a malformed item, or saying how to get the data.
        """

    @abstractmethod
    def grade(self, answers: Sequence[Answer]) -> Iterator[tuple[int, Grades]]:
        """Yields the index of each answer with its verdicts, in whatever order they are found.

        An answer that breaks the grader has the status 'error' and a note. Raises UserError where grading cannot go on
        at all; what was yielded until then stands.
        """

    def checks(self, items: Sequence[Item]) -> Sequence[Check]:
        """Responses of known verdict, for these items or for the grader at large: what its ceiling is measured by."""
        return ()


def single_turn(item: Item, response: str) -> Answer:
    """A response to the item's prompt alone."""
    return Answer(item, ({"role": "user", "content": item.prompt},), response)


def gold_checks(items: Sequence[Item], right: Sequence[str], wrong: Sequence[str]) -> list[Check]:
    """For each item a response that is right and one that is wrong."""
    return [
        Check(single_turn(item, response), correct, "gold" if correct else "corrupted")
        for responses, correct in ((right, True), (wrong, False))
        for item, response in zip(items, responses, strict=True)
    ]
