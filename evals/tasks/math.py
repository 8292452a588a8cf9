r"""GSM8K, MATH-500, AIME 2024 and AIME 2025: problems whose answer is asked for in `\boxed{}`.

The rows come from `<data_dir>/<task>/test.jsonl`, or from the Hub. The paper states no prompt; this one is among the
templates in its authors' repository (zzy1127/GIFT, utils/chat_template.py) and is recorded with every result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evals.source import Row, Source, check_ids, column, present
from evals.tasks import Answer, Check, Grades, Item, Task, TaskData, gold_checks, single_turn
from gift.cli import UserError
from gift.data import read_rows
from gift.rewards import GRADER_NAME, GRADER_VERSION, Mode, grade_math_modes

PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."

MODES: tuple[Mode, ...] = ("strict", "paper")  # the first is the reported one
CHUNK = 64  # answers per call of the grader: what a kill can lose


def after_hashes(solution: str) -> str:
    """The final answer of a GSM8K solution, which stands after `####`; '' if there is none."""
    return solution.rpartition("####")[2].strip() if "####" in solution else ""


@dataclass(frozen=True)
class BoxedTask(Task):
    """A task whose final answer the math grader compares with the gold one, in its strict mode and in the paper's."""

    @property
    def graders(self) -> Mapping[str, str]:
        """The math grader's modes."""
        return dict.fromkeys(MODES, f"{GRADER_NAME} {GRADER_VERSION}")

    def grade(self, answers: Sequence[Answer]) -> Iterator[tuple[int, Grades]]:
        """A verdict in each mode per answer, in order, CHUNK answers at a time."""
        for start in range(0, len(answers), CHUNK):
            chunk = answers[start : start + CHUNK]
            graded = grade_math_modes([each.response for each in chunk], [each.item.gold for each in chunk], MODES)
            yield from enumerate(graded, start)

    def checks(self, items: Sequence[Item]) -> Sequence[Check]:
        """The gold answers in a box, the same with another value, and the labelled responses of `labelled/math.jsonl`.

        In the mode 'paper', an integer of 10,000 or more that is one too large is right: that is within its tolerance.
        """
        right = [in_box(item.gold) for item in items]
        wrong = [in_box(another_value(item.gold)) for item in items]
        return [*gold_checks(items, right, wrong), *labelled_checks()]


def in_box(answer: str) -> str:
    """An answer as the prompt asks for it."""
    return f"Therefore, the answer is $\\boxed{{{answer}}}$."


def another_value(gold: str) -> str:
    """An answer of the same form that is certainly wrong: the first whole number in it is one more.

    An answer without digits gives way to a number that no such answer is.
    """
    integer = re.compile(r"[0-9]+(?:,(?:\\!)?[0-9]{3}(?![0-9]))*")
    if integer.search(gold) is None:
        return "-97"
    sign = -1 if re.fullmatch(rf"\$?-{integer.pattern}\$?", gold) else 1
    return integer.sub(lambda digits: str(abs(sign * int(re.sub(r"[^0-9]", "", digits[0])) + 1)), gold, count=1)


def labelled_checks() -> list[Check]:
    """Responses written for this project and judged by hand: every form of answer, and what a grader stumbles over."""
    path = Path(__file__).with_name("labelled") / "math.jsonl"
    return [
        Check(
            single_turn(Item(f"labelled-{number}", "", row["gold"], row["form"]), row["response"]),
            row["correct"],
            "labelled",
        )
        for number, row in enumerate(read_rows(path), 1)
    ]


@dataclass(frozen=True)
class MathTask(BoxedTask):
    """A math benchmark: its source, and the columns that hold it there, the first present wins."""

    source: Source = field(kw_only=True)
    problem: tuple[str, ...] = ("problem",)
    answer: tuple[str, ...] = ("answer",)
    id: tuple[str, ...] = ("id",)
    extract: Callable[[str], str] = str.strip

    @property
    def origin(self) -> str:
        """Where `load` looks, for people."""
        return self.source.origin

    def load(self, data_dir: Path | None) -> TaskData:
        """All problems. Ids are the rows' own, or numbers."""
        found = self.source.load(data_dir)
        items = tuple(self._item(*each) for each in zip(found.rows, range(len(found.rows)), found.names, strict=True))
        check_ids([item.id for item in items], found.names)
        return TaskData(items, found.source)

    def _item(self, row: Row, index: int, where: str) -> Item:
        problem = column(row, self.problem, where)
        gold = self.extract(column(row, self.answer, where))
        if not gold:
            raise UserError(f"{where}: no final answer in column {present(row, self.answer)!r}")
        own_id = present(row, self.id)
        return Item(
            id=f"{self.name.partition('@')[0]}-{index}" if own_id is None else str(row[own_id]),
            prompt=self.prompt.replace("{problem}", problem),
            gold=gold,
            category=str(row.get("subject", "")),
        )


def source(label: str, name: str, hub: str, config: str | None, split: str) -> Source:
    """The source of a benchmark whose file is named like its task."""
    return Source(label, f"{name}/test.jsonl", hub, config, split)


AIME_ANSWER = ("expected_answer", "answer", "Answer")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        MathTask(
            "gsm8k",
            "GSM8K",
            "math",
            PROMPT,
            source=source("GSM8K", "gsm8k", "openai/gsm8k", "main", "test"),
            problem=("question",),
            extract=after_hashes,
        ),
        MathTask(
            "math500",
            "MATH-500",
            "math",
            PROMPT,
            source=source("MATH-500", "math500", "HuggingFaceH4/MATH-500", None, "test"),
            id=("unique_id",),
        ),
        MathTask(
            "aime24",
            "AIME 2024",
            "math",
            PROMPT,
            source=source("AIME 2024", "aime24", "Maxwell-Jia/AIME_2024", None, "train"),
            problem=("problem", "Problem"),
            answer=AIME_ANSWER,
            id=("id", "ID"),
        ),
        MathTask(
            "aime25",
            "AIME 2025",
            "math",
            PROMPT,
            source=source("AIME 2025", "aime25", "math-ai/aime25", None, "test"),
            answer=AIME_ANSWER,
        ),
    )
}
