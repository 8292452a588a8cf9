"""Benchmark tasks: where the items come from and how an answer is graded. One module per family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gift.rewards import GRADER_NAME, GRADER_VERSION, Verdict, grade_math


@dataclass(frozen=True)
class Item:
    """One problem: its id, unique within the task, the user turn as the model sees it, and the gold answer."""

    id: str
    prompt: str
    gold: str


@dataclass(frozen=True)
class TaskData:
    """A task's items in file order, and their origin: name, revision (str or None), sha256 and rows (int)."""

    items: tuple[Item, ...]
    source: dict[str, Any]


@dataclass(frozen=True)
class Task(ABC):
    """A benchmark. `group` says what reports put side by side: 'math', 'in-distribution', 'harder', ..."""

    name: str
    label: str
    group: str

    @property
    @abstractmethod
    def origin(self) -> str:
        """Where `load` looks, for people."""

    @abstractmethod
    def load(self, data_dir: Path | None) -> TaskData:
        """All items, from files under `data_dir` where the task has any.

        Raises UserError naming the file and row of a malformed item, or saying how to get the data.
        """

    @property
    def grader(self) -> dict[str, str]:
        """Name and version of what `grade` does: verdicts of different versions are not comparable."""
        return {"name": GRADER_NAME, "version": GRADER_VERSION}

    def grade(self, responses: Sequence[str], items: Sequence[Item]) -> list[Verdict]:
        """One verdict per response to the item at the same index: the boxed answer against the gold one."""
        return grade_math(list(responses), [item.gold for item in items])
