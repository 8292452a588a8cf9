"""MT-Bench (Zheng et al. 2023, arXiv 2306.05685): 80 questions of two turns, each answer rated from 1 to 10 by a judge.

Questions, references and the judge's prompts are fschat's files, which its wheel lacks; nothing is on the Hub in this
form (there the references differ and the prompts are missing). The protocol is that of lm-sys/FastChat,
fastchat/llm_judge: each turn is rated by itself, the second with the first in view; math, reasoning and coding with a
reference answer by GPT-4. Departures: the last rating of a reply counts, not the first; one without a rating is asked
for again and then counted as an error, where fschat drops it; any model may judge.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.judge import JUDGE_VERSION, Judge, JudgePrompt, judge_from_environment
from evals.source import check_ids, column
from evals.tasks import Answer, Grades, Item, Task, TaskData
from gift.cli import UserError
from gift.data import read_rows
from gift.records import sha256_file, sha256_json

QUESTIONS, PROMPTS, REFERENCES = "question.jsonl", "judge_prompts.jsonl", "reference_answer/gpt-4.jsonl"
REPOSITORY = "lm-sys/FastChat"
REVISION = "0e6d3e4beaab66f4d3f93db72541a4abab8af28d"
# Of the three files at that revision, as `sha256_json` of their names and hashes.
SHA256 = "b3b8002e9f81d6a1b48cbe7c6ecff862303e4166de38631d9108ab637f3befad"
FOLDER = "fastchat/llm_judge/data"

TEMPERATURES = {  # fschat samples at these, by category; a protocol of one temperature departs from it
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
WITH_REFERENCE = ("math", "reasoning", "coding")
# Found wrong in at least one turn by two people who checked all 30 (lm-sys/FastChat pull request 3158).
DISPUTED = frozenset((104, 105, 109, 111, 113, 114, 120, 122, 124, 125, 126, 128, 130))

# By turn and whether there is a reference: the name of fschat's prompt.
PROMPT_NAMES = {
    (1, False): "single-v1",
    (1, True): "single-math-v1",
    (2, False): "single-v1-multi-turn",
    (2, True): "single-math-v1-multi-turn",
}
# By turn: what stands for the questions, the answers and the references in its prompts.
PLACES = {
    1: (("question",), ("answer",), ("ref_answer_1",)),
    2: (("question_1", "question_2"), ("answer_1", "answer_2"), ("ref_answer_1", "ref_answer_2")),
}
NO_TEMPLATE = JudgePrompt("", "", "")


@dataclass(frozen=True)
class ChatItem(Item):
    """One turn of a question, and what its judge is shown beside the answer.

    `questions` are the user's turns up to this one as fschat has them, `references` the right answers to both turns or
    none at all; `disputed`: people have found a mistake in them. `template` is the judge's prompt with its places open.
    """

    question: int = 0
    turn: int = 1
    questions: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    disputed: bool = False
    template: JudgePrompt = NO_TEMPLATE


@dataclass(frozen=True)
class ChatTask(Task):
    """MT-Bench. `prompt` holds {question}. `judge` None means the one that the environment names when grading."""

    judge: Judge | None = None

    @property
    def origin(self) -> str:
        """Where `load` looks, for people."""
        return f"DATA_DIR/{self.name}/{{{','.join((QUESTIONS, PROMPTS, REFERENCES))}}}"

    @property
    def graders(self) -> Mapping[str, str]:
        """The judge, by its model; 'no judge' where none is configured."""
        try:
            return {"judge": (self.judge or judge_from_environment()).version}
        except UserError:
            return {"judge": f"no judge, fschat single-answer, {JUDGE_VERSION}"}

    def load(self, data_dir: Path | None) -> TaskData:
        """Two items for each question, the second after the first; ids are the question's with the turn: "81-2".

        Raises UserError saying which files to put where.
        """
        folder = None if data_dir is None else data_dir / self.name
        files = [] if folder is None else [folder / name for name in (QUESTIONS, PROMPTS, REFERENCES)]
        if folder is None or not all(file.is_file() for file in files):
            missing = ", ".join(f"no file {file}" for file in files if not file.is_file()) or "not on the Hub"
            raise UserError(
                f"{self.label}: {missing}; from github.com/{REPOSITORY} (commit {REVISION[:7]}), put {FOLDER}/mt_bench/"
                f"{{{QUESTIONS},{REFERENCES}}} and {FOLDER}/{PROMPTS} at DIR/{self.name}/{{{QUESTIONS},{REFERENCES},"
                f"{PROMPTS}}} and give --data-dir DIR"
            )
        templates = read_templates(folder / PROMPTS)
        references = dict(read_reference(row, where) for row, where in numbered(folder / REFERENCES))
        rows = numbered(folder / QUESTIONS)
        items = [item for row, where in rows for item in self._items(row, where, references, templates)]
        check_ids([item.id for item in items[::2]], [where for _, where in rows])
        if not items:
            raise UserError(f"{folder / QUESTIONS}: no rows; get it again from {REPOSITORY}")
        sha256 = sha256_json([[name, sha256_file(folder / name)] for name in (QUESTIONS, PROMPTS, REFERENCES)])
        revision = f"{REPOSITORY}@{REVISION}" if sha256 == SHA256 else None
        return TaskData(tuple(items), {"name": self.name, "revision": revision, "sha256": sha256, "rows": len(rows)})

    def grade(self, answers: Sequence[Answer]) -> Iterator[tuple[int, Grades]]:
        """One rating per answer, as the judge gives them. Raises UserError where there is no judge, or it stops."""
        judge = self.judge or judge_from_environment()
        for number, verdict in judge.rate([judge_prompt(answer) for answer in answers]):
            yield number, {"judge": verdict}

    def _items(
        self,
        row: Mapping[str, Any],
        where: str,
        references: Mapping[int, tuple[str, ...]],
        templates: Mapping[str, JudgePrompt],
    ) -> Iterator[ChatItem]:
        question, category = question_id(row, where), column(row, ("category",), where)
        turns = two_texts(row.get("turns"), f"{where}: 'turns'")
        known = references.get(question, ()) if category in WITH_REFERENCE else ()
        if category in WITH_REFERENCE and not known:
            raise UserError(f"{where}: question {question} is of {category}, and {REFERENCES} has no answer to it")
        for turn, text in enumerate(turns, start=1):
            yield ChatItem(
                id=f"{question}-{turn}",
                prompt=self.prompt.replace("{question}", text),
                gold=known[turn - 1] if known else "",
                category=category,
                after=f"{question}-1" if turn == 2 else None,
                question=question,
                turn=turn,
                questions=turns[:turn],
                references=known,
                disputed=bool(known) and question in DISPUTED,
                template=templates[PROMPT_NAMES[turn, bool(known)]],
            )


def judge_prompt(answer: Answer) -> JudgePrompt:
    """The item's template, filled in. Texts that look like a place ("{answer}") are left as they are."""
    item = answer.item
    assert isinstance(item, ChatItem)
    said = [turn["content"] for turn in answer.messages if turn["role"] == "assistant"]
    texts = (item.questions, (*said, answer.response), item.references[: item.turn])
    places = {
        place: text
        for names, values in zip(PLACES[item.turn], texts, strict=True)
        for place, text in zip(names[: len(values)], values, strict=True)  # there may be no references
    }
    filled = re.sub(r"\{(\w+)\}", lambda place: places[place[1]], item.template.user)
    return JudgePrompt(item.template.name, item.template.system, filled)


def numbered(path: Path) -> list[tuple[Mapping[str, Any], str]]:
    """A file's rows, each with what names it in messages."""
    return [(row, f"{path}:{number}") for number, row in enumerate(read_rows(path), start=1)]


def read_templates(path: Path) -> dict[str, JudgePrompt]:
    """The judge's prompts by name. Raises UserError where one of the four is missing or lacks a place."""
    found = {}
    for row, where in numbered(path):
        name, system, user = (column(row, (key,), where) for key in ("name", "system_prompt", "prompt_template"))
        found[name] = JudgePrompt(name, system, user)
    for (turn, reference), name in PROMPT_NAMES.items():
        if name not in found:
            raise UserError(f"{path}: no prompt {name!r}; get the file again from {REPOSITORY}")
        questions, answers, references = PLACES[turn]
        wanted = {*questions, *answers, *(references if reference else ())}
        if set(re.findall(r"\{(\w+)\}", found[name].user)) != wanted:
            raise UserError(f"{path}: prompt {name!r} must hold {', '.join(sorted(wanted))} in braces, and no other")
    return found


def read_reference(row: Mapping[str, Any], where: str) -> tuple[int, tuple[str, ...]]:
    """A question's id and the answers to its turns. Raises UserError naming the row."""
    try:
        turns = row["choices"][0]["turns"]
    except (KeyError, IndexError, TypeError):
        turns = None
    return question_id(row, where), two_texts(turns, f"{where}: 'turns' of the first of 'choices'")


def question_id(row: Mapping[str, Any], where: str) -> int:
    """The row's question_id. Raises UserError."""
    if type(value := row.get("question_id")) is not int:
        raise UserError(f"{where}: 'question_id' is no whole number: {value!r:.60}")
    return value


def two_texts(value: object, what: str) -> tuple[str, ...]:
    """A list of two texts. Raises UserError."""
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(text, str) and text for text in value):
        raise UserError(f"{what} must be a list of two texts, got {value!r:.60}")
    return tuple(value)


TASKS: dict[str, Task] = {
    task.name: task for task in (ChatTask("mt_bench", "MT-Bench", "chat", "{question}", metric="rating"),)
}
