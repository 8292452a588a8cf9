"""HumanEval+ and MBPP+: functions to write, run on evalplus' inputs in a sandbox and compared by evalplus' rules.

The rows come from evalplus' release files, or are downloaded by it. Its own chat prompt starts the answer for the
model, which leaves no room for reasoning; this one asks for the program at the end.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from evals.ground_truth import NoTruthError, Problem, Truths
from evals.oracles import Dataset, Expected, accepts
from evals.programs import Extracted, extract_code, preamble
from evals.sandbox import Limits, Program, Reply, Sandbox, StoppedError, sandbox
from evals.source import check_ids, column
from evals.tasks import Answer, Check, Grades, Item, Task, TaskData, gold_checks
from gift.cli import UserError
from gift.models import first_line
from gift.records import sha256_file
from gift.rewards import Verdict

GRADER_VERSION = "1"  # raised whenever a verdict can change
SHOWN_CHARS = 20_000  # of a program, in its verdict

PROMPT = (
    "Write a self-contained Python program that solves the following problem. Put the complete program in one"
    " ```python code block at the end of your answer.\n\n```python\n{prompt}\n```"
)


Key = tuple[str, Extracted]
"""A problem's id and a program for it."""
Outcome = Literal["correct", "wrong", "timeout", "error"]


@dataclass(frozen=True)
class Release:
    """One of evalplus' data files: where it lies under the data folder, its name, version and MD5 of the JSON lines."""

    label: str
    file: str
    name: str
    version: str
    md5: str

    @property
    def origin(self) -> str:
        """Where it is looked for, for people."""
        return f"DATA_DIR/{self.file}, or {self.url}"

    @property
    def url(self) -> str:
        """Where evalplus has it."""
        repository = f"github.com/evalplus/{self.name.lower()}_release"
        return f"https://{repository}/releases/download/{self.version}/{self.name}.jsonl.gz"

    def path(self, data_dir: Path | None) -> Path:
        """The file, downloaded by evalplus into its cache where `data_dir` is None. Raises UserError."""
        if data_dir is not None:
            path = data_dir / self.file
            if not path.is_file():
                raise UserError(f"{path}: no such file; put {self.url} there")
            return path
        instead = f"put {self.url} at DIR/{self.file} and give --data-dir DIR"
        try:
            from evalplus.data.utils import get_dataset_metadata, make_cache
        except ImportError:
            raise UserError(f"{self.label}: no evalplus to download it: pip install evalplus, or {instead}") from None
        url, cached = get_dataset_metadata(self.name, self.version, False)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                make_cache(url, cached)
        except Exception as error:  # whatever wget, gzip and the network raise
            raise UserError(f"{self.label}: cannot download it ({first_line(error)}); {instead}") from error
        return Path(cached)

    def load(self, data_dir: Path | None) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
        """Rows, what names them in messages, and their origin as a manifest records it. Raises UserError."""
        path = self.path(data_dir)
        try:
            text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            lines = [line for line in text.decode().split("\n") if line.strip()]
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{path}: not readable ({first_line(error)}); get {self.url} again") from error
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON; get {self.url} again") from error
            if not isinstance(rows[-1], dict):
                raise UserError(f"{path}:{number}: not an object; get {self.url} again")
        known = hashlib.md5(text, usedforsecurity=False).hexdigest() == self.md5
        source = {
            "name": self.url if data_dir is None else self.file,
            "revision": self.version if known else None,
            "sha256": sha256_file(path),
            "rows": len(rows),
        }
        return rows, [f"{path}:{number}" for number in range(1, len(rows) + 1)], source


@dataclass(frozen=True)
class CodeItem(Item):
    """A function to write. `stub` is the prompt's code, for a response that goes on from it."""

    problem: Problem = field(kw_only=True, compare=False, repr=False)
    stub: str = field(kw_only=True, compare=False, repr=False)


@dataclass(frozen=True)
class CodeTask(Task):
    """A code benchmark.

    `unsafe` runs programs also where they cannot be isolated; `workers` is how many run at once (default: one per
    core); `limits` is what each gets.
    """

    dataset: Dataset = field(kw_only=True)
    release: Release = field(kw_only=True)
    unsafe: bool = False
    workers: int | None = None
    limits: Limits = field(default_factory=Limits)

    @property
    def origin(self) -> str:
        """Where `load` looks, for people."""
        return self.release.origin

    @property
    def graders(self) -> Mapping[str, str]:
        """All of evalplus' inputs, which is what is reported, and the benchmark's original ones."""
        return {"plus": f"evals.code {GRADER_VERSION}", "base": f"evals.code {GRADER_VERSION}"}

    def load(self, data_dir: Path | None) -> TaskData:
        """All problems, by their own ids."""
        rows, names, source = self.release.load(data_dir)
        if not rows:
            raise UserError(f"{names or self.release.file}: no rows; get {self.release.url} again")
        items = tuple(self._item(row, where) for row, where in zip(rows, names, strict=True))
        check_ids([item.id for item in items], names)
        return TaskData(items, source)

    def _item(self, row: Mapping[str, Any], where: str) -> CodeItem:
        task_id, prompt, entry_point, canonical = (
            column(row, (name,), where) for name in ("task_id", "prompt", "entry_point", "canonical_solution")
        )
        is_code = self.dataset == "humaneval"
        program = prompt + canonical if is_code else canonical.strip()
        problem = Problem(
            dataset=self.dataset,
            id=task_id,
            entry_point=entry_point,
            preamble=preamble(prompt, entry_point) if is_code else "",
            canonical=program,
            groups=(self._inputs(row, "base_input", where), self._inputs(row, "plus_input", where)),
            atol=float(row.get("atol", 0)),
            key=hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest(),
        )
        return CodeItem(
            id=task_id,
            prompt=self.prompt.replace("{prompt}", prompt.strip()),
            gold=program,
            problem=problem,
            stub=prompt if is_code else "",
        )

    def _inputs(self, row: Mapping[str, Any], name: str, where: str) -> Sequence[Sequence[Any]]:
        """The argument lists of a group. MBPP+'s are restored from JSON to the tuples, sets and numbers they were."""
        inputs = [] if row.get(name) == {} else row.get(name)  # Mbpp/793 has no plus inputs
        if not isinstance(inputs, list) or not all(isinstance(each, list) for each in inputs):
            raise UserError(f"{where}: column {name!r} is not a list of argument lists")
        if self.dataset == "humaneval":
            return inputs
        try:
            from evalplus.data.mbpp import mbpp_deserialize_inputs
        except ImportError:
            raise UserError("MBPP+ is read with evalplus: pip install evalplus") from None
        try:
            return mbpp_deserialize_inputs(row["task_id"], inputs)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{where}: column {name!r}: {first_line(error)}") from error

    def grade(self, answers: Sequence[Answer]) -> Iterator[tuple[int, Grades]]:
        """A verdict on all inputs and one on the original ones. Equal programs are run once.

        A program that ran out of time is run again, alone, after all others: the machine may have been busy.
        """
        indices: defaultdict[Key, list[int]] = defaultdict(list)
        for index, answer in enumerate(answers):
            item = _code_item(answer.item)
            extracted = extract_code(answer.response, item.problem.entry_point, item.stub)
            if extracted is None:
                verdict = Verdict(0.0, "no_answer", None, None)
                yield index, {"plus": verdict, "base": verdict}
            else:
                indices[item.id, extracted].append(index)
        if not indices:
            return
        problems = {key: _code_item(answers[found[0]].item).problem for key, found in indices.items()}
        with contextlib.closing(sandbox(unsafe=self.unsafe, limits=self.limits)) as box:
            truths = Truths(box)
            overdue = []
            for key, grades in self._at_once(box, truths, problems):
                if any(verdict.status == "timeout" for verdict in grades.values()):
                    overdue.append(key)
                else:
                    yield from ((index, grades) for index in indices[key])
            for key in overdue:
                grades = _grade(box, truths, problems[key], key[1])
                yield from ((index, grades) for index in indices[key])

    def _at_once(self, box: Sandbox, truths: Truths, problems: Mapping[Key, Problem]) -> Iterator[tuple[Key, Grades]]:
        """The verdicts on all programs, as they are found by threads that each watch one process at a time."""
        with ThreadPoolExecutor(self.workers or len(os.sched_getaffinity(0))) as pool:
            running = {pool.submit(_grade, box, truths, problem, key[1]): key for key, problem in problems.items()}
            try:
                for future in as_completed(running):
                    yield running[future], future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                box.close()
                raise

    def checks(self, items: Sequence[Item]) -> Sequence[Check]:
        """The canonical programs, and the same with every output in a list beside None."""
        right = [f"```python\n{item.gold}\n```" for item in items]
        names = [_code_item(item).problem.entry_point for item in items]
        wrapped = "{0}\n\n_right = {1}\n\ndef {1}(*inputs):\n    return [_right(*inputs), None]"
        wrong = [f"```python\n{wrapped.format(item.gold, name)}\n```" for item, name in zip(items, names, strict=True)]
        return gold_checks(items, right, wrong)


def _code_item(item: Item) -> CodeItem:
    assert isinstance(item, CodeItem)
    return item


def _grade(box: Sandbox, truths: Truths, problem: Problem, program: Extracted) -> Grades:
    """The verdicts on one program. It is run up to its first wrong output: one that fails base fails plus as well."""

    def verdict(status: Outcome, note: str | None = None) -> Verdict:
        return Verdict(float(status == "correct"), status, program.code[:SHOWN_CHARS], program.method, note)

    try:
        truth = truths.of(problem)
    except NoTruthError as error:
        return dict.fromkeys(("plus", "base"), verdict("error", f"{problem.id}: {error}"))
    sources = [problem.preamble, program.code]
    run = box.run(Program(sources, problem.entry_point, problem.groups, truth.limits), truth.total_s(box.limits))
    base = None
    with contextlib.closing(run):
        for name, group, wanted, tolerances in zip(
            ("base", "plus"), problem.groups, truth.expected, truth.tolerances, strict=True
        ):
            failed = _first_failure(problem, group, wanted, tolerances, run)
            grade = verdict("correct") if failed is None else verdict(failed[0], f"{name} {failed[1]}")
            if base is None:
                base = grade
            if failed is not None:
                break
    assert base is not None
    return {"plus": grade, "base": base}


def _first_failure(
    problem: Problem,
    group: Sequence[Sequence[Any]],
    wanted: Sequence[Expected],
    tolerances: Sequence[float],
    replies: Iterator[Reply],
) -> tuple[Outcome, str] | None:
    """The status and place of the first output that is not right; None if all are."""
    for number, (arguments, expected, atol) in enumerate(zip(group, wanted, tolerances, strict=True)):
        try:
            reply = next(replies)
        except StoppedError as stopped:
            return stopped.status, f"input {number}: {stopped}"
        if not accepts(problem.dataset, problem.entry_point, arguments, expected, reply, atol):
            what = f"raised {reply.payload.decode(errors='replace')}" if reply.kind == "raised" else "wrong output"
            return "wrong", f"input {number}: {what}"
    return None


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        CodeTask(
            "humaneval_plus",
            "HumanEval+",
            "code",
            PROMPT,
            dataset="humaneval",
            release=Release(
                "HumanEval+",
                "humanevalplus/HumanEvalPlus.jsonl.gz",
                "HumanEvalPlus",
                "v0.1.10",
                "fe585eb4df8c88d844eeb463ea4d0302",
            ),
        ),
        CodeTask(
            "mbpp_plus",
            "MBPP+",
            "code",
            PROMPT,
            dataset="mbpp",
            release=Release(
                "MBPP+",
                "mbppplus/MbppPlus.jsonl.gz",
                "MbppPlus",
                "v0.2.0",
                "ee43ecabebf20deef4bb776a405ac5b1",
            ),
        ),
    )
}
