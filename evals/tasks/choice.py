"""GPQA, MMLU-Pro, MMLU-Redux and ARC-Challenge: questions with two to ten options, one of them right.

The rows come from files under the data folder, or from the Hub. The paper states no prompts; this one asks for the
letter of the answer in a box, without examples, and is recorded with every result. evals/choices.py reads the answers.

What the paper leaves open:

* GPQA: the diamond subset, whose 198 questions are the only size that its percentages fit. The order of a question's
  options is a permutation of its own, by a hash of its record ID. The other benchmarks keep their order.
* MMLU-Redux: version 1 (30 subjects, 3,000 questions), for the same reason. All questions count and the answers are
  MMLU's own, since 3,000 leaves none out and the datasets keep MMLU's in the column "answer". The
  tasks with `_ok` and `_corrected` in their names are the other readings: see `Annotations`.

MMLU-Pro has 5 questions with a single option, which are kept: 12,032 is the number that is reported elsewhere.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from evals.choices import GRADER_VERSION, LETTERS, find_choice, option_lines, shuffled
from evals.source import Row, Source, check_ids, column
from evals.tasks import Answer, Check, Grades, Item, Task, TaskData, gold_checks, single_turn
from gift.cli import UserError
from gift.data import read_rows
from gift.rewards import Verdict

PROMPT = (
    "{question}\n\n{options}\n\nPlease reason step by step, and put the letter of your final answer within \\boxed{}."
)
LABELLED = Path(__file__).with_name("labelled") / "choice.jsonl"

Version = Literal["1", "2.0"]
Annotations = Literal["ignored", "ok_only", "corrected"]
"""What MMLU-Redux' annotations of MMLU's errors do.

'ignored': every question, with MMLU's answer. 'ok_only': only questions with nothing to object to. 'corrected': every
question; where MMLU's answer is wrong and the annotators name one option, theirs.
"""


@dataclass(frozen=True)
class ChoiceItem(Item):
    """A question whose `gold` is the letter of the right one of its options, in the prompt's order."""

    options: tuple[str, ...] = field(kw_only=True)


class Question(NamedTuple):
    """A row as its benchmark states it: `right` is the index of the right option."""

    id: str
    text: str
    options: Sequence[str]
    right: int
    category: str


# ---------------------------------------------------------------------------------------------------------------------
# The rows of each benchmark


def texts(value: Any, where: str, name: str) -> list[str]:
    """`value`, which must be a list of one to ten texts, without the blanks around them.

    Raises UserError naming `where` and the column `name`.
    """
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise UserError(f"{where}: column {name!r} is not a list of texts: {value!r:.60}")
    if not 1 <= len(value) <= len(LETTERS):
        raise UserError(f"{where}: {len(value)} options; a question has 1 to {len(LETTERS)}")
    return [text.strip() for text in value]


def index_of(answer: str, labels: Sequence[str], where: str) -> int:
    """Where the answer is among the options' labels. Raises UserError naming `where` if it is not."""
    if answer not in labels:
        raise UserError(f"{where}: the answer {answer!r} is none of the options: {', '.join(labels)}")
    return labels.index(answer)


def gpqa(row: Row, where: str) -> Question:
    """A row of GPQA (Rein et al. 2023): the right answer and three wrong ones, here shuffled."""
    id_ = column(row, ("Record ID",), where)
    names = ["Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3))]
    answers = [column(row, (name,), where).strip() for name in names]
    order = shuffled(len(answers), id_)
    category = str(row.get("High-level domain") or "")
    return Question(
        id_, column(row, ("Question",), where), [answers[index] for index in order], order.index(0), category
    )


def mmlu_pro(row: Row, where: str) -> Question:
    """A row of MMLU-Pro (Wang et al. 2024)."""
    options = texts(row.get("options"), where, "options")
    right = index_of(column(row, ("answer",), where), list(LETTERS[: len(options)]), where)
    return Question(
        column(row, ("question_id",), where),
        column(row, ("question",), where),
        options,
        right,
        str(row.get("category")),
    )


def arc(row: Row, where: str) -> Question:
    """A row of ARC (Clark et al. 2018), whose options are labelled A, B, ... or 1, 2, ..."""
    choices = row.get("choices")
    if not isinstance(choices, Mapping) or not isinstance(choices.get("label"), list):
        raise UserError(f"{where}: column 'choices' has no lists of 'text' and 'label': {choices!r:.60}")
    options, labels = texts(choices.get("text"), where, "choices"), choices["label"]
    if len(labels) != len(options):
        raise UserError(f"{where}: {len(options)} options, but {len(labels)} labels")
    right = index_of(column(row, ("answerKey",), where), labels, where)
    return Question(column(row, ("id",), where), column(row, ("question",), where), options, right, "")


def mmlu_redux(row: Row, where: str) -> Question:
    """A row of MMLU-Redux (Gema et al. 2024) with MMLU's own answer, which is an index."""
    options = row.get("choices")
    if isinstance(options, str):  # a CSV file holds them as a Python literal
        try:
            options = ast.literal_eval(options)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise UserError(f"{where}: column 'choices' is not a list of texts: {options!r:.60}") from None
    options = texts(options, where, "choices")
    right = index_of(column(row, ("answer",), where), [str(index) for index in range(len(options))], where)
    subject = row["part"]
    return Question(f"{subject}-{row['row']}", column(row, ("question",), where), options, right, subject)


def error_type(row: Row, where: str) -> str:
    """The annotators' judgement of an MMLU question in one spelling: 'ok', 'wrong_groundtruth', ..."""
    return "_".join(column(row, ("error_type",), where).casefold().split())


def correction(row: Row, options: Sequence[str]) -> int | None:
    """The index of the one option that the annotators name: by letter, index or text."""
    named = str(row.get("correct_answer") or "").strip()
    for labels in (LETTERS[: len(options)], [str(index) for index in range(len(options))], options):
        if named in list(labels):
            return labels.index(named)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The tasks


@dataclass(frozen=True)
class ChoiceTask(Task):
    """A benchmark of questions with options: its source, and how to read a row of it."""

    source: Source = field(kw_only=True)
    read: Callable[[Row, str], Question] = field(kw_only=True)

    @property
    def origin(self) -> str:
        """Where `load` looks, for people."""
        return self.source.origin

    @property
    def graders(self) -> Mapping[str, str]:
        """The one grader of letters and option texts."""
        return {"choice": f"evals.choices {GRADER_VERSION}"}

    def question(self, row: Row, where: str) -> Question | None:
        """The question of a row, or None where the task leaves it out. Raises UserError naming a malformed one."""
        return self.read(row, where)

    def load(self, data_dir: Path | None) -> TaskData:
        """The questions in the order of their rows."""
        found = self.source.load(data_dir)
        read = [(self.question(row, where), where) for row, where in zip(found.rows, found.names, strict=True)]
        kept = [(question, where) for question, where in read if question is not None]
        check_ids([question.id for question, _ in kept], [where for _, where in kept])
        return TaskData(tuple(self._item(question) for question, _ in kept), found.source)

    def _item(self, question: Question) -> ChoiceItem:
        parts = {"{question}": question.text.strip(), "{options}": option_lines(question.options)}
        prompt = re.sub("|".join(map(re.escape, parts)), lambda match: parts[match[0]], self.prompt)
        gold = LETTERS[question.right]
        return ChoiceItem(question.id, prompt, gold, question.category, options=tuple(question.options))

    def grade(self, answers: Sequence[Answer]) -> Iterator[tuple[int, Grades]]:
        """One verdict per answer: the letter that evals/choices.py finds, against the right one."""
        for index, answer in enumerate(answers):
            yield index, {"choice": verdict(answer)}

    def checks(self, items: Sequence[Item]) -> Sequence[Check]:
        """The right letters in a box, other letters in a box, and the labelled phrasings that come with the project."""
        right = [boxed(item.gold) for item in items]
        wrong = [boxed(LETTERS[(LETTERS.index(item.gold) + 1) % max(2, len(options_of(item)))]) for item in items]
        return [*gold_checks(items, right, wrong), *labelled()]


@dataclass(frozen=True)
class ReduxTask(ChoiceTask):
    """MMLU-Redux: what its annotations do, and what the source of its files is to be recorded with."""

    annotations: Annotations = "ignored"
    file_note: str = ""

    def question(self, row: Row, where: str) -> Question | None:
        """The question of a row: None, or with another answer, where the annotations say so."""
        question = self.read(row, where)
        if self.annotations == "ok_only":
            return question if error_type(row, where) == "ok" else None
        if self.annotations == "corrected" and error_type(row, where) == "wrong_groundtruth":
            corrected = correction(row, question.options)
            return question if corrected is None else question._replace(right=corrected)
        return question

    def load(self, data_dir: Path | None) -> TaskData:
        """The questions, in the order of their rows; their origin says what the annotations did."""
        data = super().load(data_dir)
        source = {**data.source, "rows": len(data.items), "annotations": self.annotations}
        if data_dir is not None and self.file_note:
            source["note"] = self.file_note
        return TaskData(data.items, source)


def boxed(letter: str) -> str:
    """The response that the prompt asks for."""
    return f"Therefore, the answer is $\\boxed{{{letter}}}$."


def options_of(item: Item) -> tuple[str, ...]:
    """The options of an item, which must be a ChoiceItem."""
    if not isinstance(item, ChoiceItem):
        raise TypeError(f"{item.id}: {type(item).__name__} is no ChoiceItem")
    return item.options


def verdict(answer: Answer) -> Verdict:
    """Whether an answer's response commits to the right option and to no other."""
    letter, method = find_choice(answer.response, options_of(answer.item))
    if letter is None:
        note = None if method is None else f"{method.partition(':')[0]}, but no single option of the question"
        return Verdict(0.0, "no_answer", None, None, note)
    correct = letter == answer.item.gold
    return Verdict(float(correct), "correct" if correct else "wrong", letter, method)


@cache
def labelled() -> tuple[Check, ...]:
    """Phrasings of model answers, written and labelled by hand: what a reader takes each of them to commit to."""
    checks = []
    for number, row in enumerate(read_rows(LABELLED), start=1):
        options = tuple(row["options"])
        item = ChoiceItem(f"labelled-{number}", option_lines(options), row["gold"], options=options)
        checks.append(Check(single_turn(item, row["response"]), row["expected"] == row["gold"], "labelled"))
    return tuple(checks)


# ---------------------------------------------------------------------------------------------------------------------

GPQA_GATE = (
    "its authors ask you to accept their terms at https://huggingface.co/datasets/Idavidrein/gpqa, then set HF_TOKEN"
    " to a token of that account; a .csv file with the columns of theirs will do as well"
)


def gpqa_task(subset: str) -> ChoiceTask:
    """A task of one of GPQA's subsets."""
    name = f"gpqa_{subset}"
    label = f"GPQA-{subset}"
    source = Source(label, f"{name}/test.jsonl", "Idavidrein/gpqa", name, "train", gated=GPQA_GATE)
    return ChoiceTask(name, label, "choice", PROMPT, source=source, read=gpqa)


# sft/eval.py of github.com/aryopg/mmlu-redux at 4563cfa
REDUX_SUBJECTS = """
anatomy astronomy business_ethics clinical_knowledge college_chemistry college_computer_science college_mathematics
college_medicine college_physics conceptual_physics econometrics electrical_engineering formal_logic global_facts
high_school_chemistry high_school_geography high_school_macroeconomics high_school_mathematics high_school_physics
high_school_statistics high_school_us_history human_aging logical_fallacies machine_learning miscellaneous philosophy
professional_accounting professional_law public_relations virology
"""
# the other subjects of MMLU
REDUX2_SUBJECTS = """
abstract_algebra college_biology computer_security elementary_mathematics high_school_biology
high_school_computer_science high_school_european_history high_school_government_and_politics
high_school_microeconomics high_school_psychology high_school_world_history human_sexuality international_law
jurisprudence management marketing medical_genetics moral_disputes moral_scenarios nutrition prehistory
professional_medicine professional_psychology security_studies sociology us_foreign_policy world_religions
"""
VERSIONS: tuple[Version, ...] = get_args(Version)
ANNOTATIONS: tuple[Annotations, ...] = get_args(Annotations)
REDUX_FILE = "mmlu_redux/mmlu_{part}.csv"
# Their questions, options and answers are those of version 1 (the same repository at 1ce2437, June 2024); of its
# annotations, five in global_facts have changed.
REDUX_NOTE = "version 1's subjects in the files of version 2.0 (github.com/aryopg/mmlu-redux at 9fe11d7)"


def redux_task(version: Version, annotations: Annotations) -> ReduxTask:
    """A task of one of MMLU-Redux' versions."""
    first = version == "1"
    suffix = {"ignored": "", "ok_only": "_ok", "corrected": "_corrected"}[annotations]
    label = "MMLU-Redux" if first else "MMLU-Redux 2.0"
    subjects = REDUX_SUBJECTS if first else REDUX_SUBJECTS + REDUX2_SUBJECTS
    hub = "edinburgh-dawg/mmlu-redux" + ("" if first else "-2.0")
    return ReduxTask(
        ("mmlu_redux" if first else "mmlu_redux2") + suffix,
        label + (f" ({suffix[1:]})" if suffix else ""),
        "choice",
        PROMPT,
        source=Source(label, REDUX_FILE, hub, "{part}", "test", parts=tuple(sorted(subjects.split()))),
        read=mmlu_redux,
        annotations=annotations,
        file_note=REDUX_NOTE if first else "",
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(gpqa_task(subset) for subset in ("diamond", "main", "extended")),
        ChoiceTask(
            "mmlu_pro",
            "MMLU-Pro",
            "choice",
            PROMPT,
            source=Source("MMLU-Pro", "mmlu_pro/test.jsonl", "TIGER-Lab/MMLU-Pro", None, "test"),
            read=mmlu_pro,
        ),
        *(redux_task(version, annotations) for version in VERSIONS for annotations in ANNOTATIONS),
        ChoiceTask(
            "arc_challenge",
            "ARC-Challenge",
            "choice",
            PROMPT,
            source=Source("ARC-Challenge", "arc_challenge/test.jsonl", "allenai/ai2_arc", "ARC-Challenge", "test"),
            read=arc,
        ),
    )
}
