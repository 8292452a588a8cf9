r"""GSM8K, MATH-500, AIME 2024 and AIME 2025: problems whose answer is asked for in `\boxed{}`.

The rows come from `<data_dir>/<task>/test.jsonl`, or from the Hub. The paper states no prompt; this one is among the
templates in its authors' repository (zzy1127/GIFT, utils/chat_template.py) and is recorded with every result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.tasks import Item, Task, TaskData
from gift.cli import UserError
from gift.data import read_rows
from gift.models import first_line
from gift.records import sha256_file, sha256_json

PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."


def after_hashes(solution: str) -> str:
    """The final answer of a GSM8K solution, which stands after `####`; '' if there is none."""
    return solution.rpartition("####")[2].strip() if "####" in solution else ""


@dataclass(frozen=True)
class MathTask(Task):
    """A math benchmark: its Hub dataset, and the columns that hold it there or in the file, the first present wins."""

    hub: str
    config: str | None
    split: str
    problem: tuple[str, ...] = ("problem",)
    answer: tuple[str, ...] = ("answer",)
    id: tuple[str, ...] = ("id",)
    extract: Callable[[str], str] = str.strip

    @property
    def file(self) -> str:
        """The benchmark's file, relative to the data folder."""
        return f"{self.name}/test.jsonl"

    @property
    def origin(self) -> str:
        """Where `load` looks, for people."""
        return f"DATA_DIR/{self.file}, or {self.hub} ({self.split}) on the Hub"

    def load(self, data_dir: Path | None) -> TaskData:
        """All problems of the file, or of the Hub dataset if `data_dir` is None. Ids are the rows' own, or numbers."""
        if data_dir is None:
            rows, source = self._hub_rows()
            where = f"{self.hub} ({self.split}), row "
        else:
            path = data_dir / self.file
            if not path.is_file():
                raise UserError(f"{path}: no such file; put the {self.label} test set there (Hub: {self.hub})")
            rows = list(read_rows(path))
            source = {"name": self.file, "revision": None, "sha256": sha256_file(path), "rows": len(rows)}
            where = f"{path}:"
        if not rows:
            raise UserError(f"{source['name']}: no rows; get the {self.label} test set again (Hub: {self.hub})")
        items = tuple(self._item(row, index, f"{where}{index + 1}") for index, row in enumerate(rows))
        first_with: dict[str, int] = {}
        for number, item in enumerate(items, start=1):
            if first_with.setdefault(item.id, number) != number:
                raise UserError(f"{where}{number}: id {item.id!r} is already that of row {first_with[item.id]}")
        return TaskData(items, source)

    def _item(self, row: Mapping[str, Any], index: int, where: str) -> Item:
        problem = column(row, self.problem, where)
        gold = self.extract(column(row, self.answer, where))
        if not gold:
            raise UserError(f"{where}: no final answer in column {present(row, self.answer)!r}")
        own_id = present(row, self.id)
        return Item(
            id=f"{self.name}-{index}" if own_id is None else str(row[own_id]),
            prompt=PROMPT.replace("{problem}", problem),
            gold=gold,
        )

    def _hub_rows(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Every row of the Hub dataset, and its source with the commit it was read at (None where that is unknown)."""
        instead = f"put its test set at DIR/{self.file} and give --data-dir DIR"
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"{self.label}: reading {self.hub} from the Hub needs the `datasets` package:"
                f" pip install 'gift-suite[hub]', or {instead}"
            ) from None
        try:
            dataset = datasets.load_dataset(self.hub, self.config, split=self.split)
        except Exception as error:  # the Hub's clients raise a dozen unrelated kinds here
            raise UserError(
                f"{self.label}: cannot read {self.hub} from the Hub ({first_line(error)}); {instead}"
            ) from error
        rows = [dict(row) for row in dataset]
        commits = {
            match[1] for url in dataset.info.download_checksums or {} if (match := re.search(r"@(\w{40})/", url))
        }
        revision = commits.pop() if len(commits) == 1 else None
        return rows, {"name": self.hub, "revision": revision, "sha256": sha256_json(rows), "rows": len(rows)}


def present(row: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    """The first of `columns` that the row has."""
    return next((name for name in columns if name in row), None)


def column(row: Mapping[str, Any], columns: Sequence[str], where: str) -> str:
    """The row's value in the first of `columns` it has, as text. Raises UserError naming `where` and the column."""
    name = present(row, columns)
    if name is None:
        raise UserError(f"{where}: no column {' or '.join(map(repr, columns))}; the row has: {', '.join(row)}")
    value = row[name]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: column {name!r} is neither text nor a whole number: {value!r:.60}")
    return value


AIME_ANSWER = ("expected_answer", "answer", "Answer")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        MathTask("gsm8k", "GSM8K", "math", "openai/gsm8k", "main", "test", problem=("question",), extract=after_hashes),
        MathTask("math500", "MATH-500", "math", "HuggingFaceH4/MATH-500", None, "test", id=("unique_id",)),
        MathTask(
            "aime24",
            "AIME 2024",
            "math",
            "Maxwell-Jia/AIME_2024",
            None,
            "train",
            problem=("problem", "Problem"),
            answer=AIME_ANSWER,
            id=("id", "ID"),
        ),
        MathTask("aime25", "AIME 2025", "math", "math-ai/aime25", None, "test", answer=AIME_ANSWER),
    )
}
