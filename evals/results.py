"""What a run's samples say: the counts that other tools join on, and the table of a summary."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from evals.sampling import Throughput
from evals.stats import Interval, accuracy_interval, pass_at_k
from evals.suites import Protocol, Suite
from evals.tasks import Item, Task
from gift.records import RunDir, read_jsonl, write_table

PASS_AT = (1, 2, 4, 8)


@dataclass(frozen=True)
class TaskResult:
    """One policy on one task.

    `truncated` and `no_answer` are shares of samples, `repetitive` (ended by the guard) and `ungraded` count samples,
    `no_room` and `less_room` count items whose prompt leaves no or less room than the protocol allows, `tokens` is the
    mean length of the completions whose length is known, None where it is of none.
    """

    policy: str
    task: str
    items: int
    accuracy: Interval
    pass_at: dict[int, float]
    truncated: float
    no_answer: float
    repetitive: int
    ungraded: int
    no_room: int
    less_room: int
    tokens: float | None
    tokens_per_second: float | None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: a result per policy and task, and for each task that could not be had, what to do."""

    results: list[TaskResult]
    missing: dict[str, str]


def log_path(run: RunDir, policy: str, task: Task) -> Path:
    """The log of a policy's samples on a task."""
    return run.path / "samples" / policy / f"{task.name}.jsonl"


def write_items(run: RunDir) -> None:
    """Writes `items.parquet`: samples and correct ones per task, item, policy and run, from every log of the run."""
    counts: dict[tuple[str, str, str, int], list[int]] = defaultdict(lambda: [0, 0])
    for path in (run.path / "samples").glob("*/*.jsonl"):
        for row in read_jsonl(path):
            count = counts[row["task"], row["item"], row["policy"], row["run"]]
            count[0] += 1
            count[1] += row["status"] == "correct"
    if counts:
        columns = zip(*((*key, *counts[key]) for key in sorted(counts)), strict=True)
        names = ("task", "item", "policy", "run", "n", "correct")
        write_table(run.path / "items.parquet", dict(zip(names, columns, strict=True)))


def summarize(
    run: RunDir, policy: str, task: Task, items: Sequence[Item], protocol: Protocol, spent: Throughput
) -> TaskResult:
    """The result over these items, from the log."""
    wanted = {item.id for item in items}
    rows = [row for row in read_jsonl(log_path(run, policy, task)) if row["item"] in wanted]
    correct = dict.fromkeys(wanted, 0)
    for row in rows:
        correct[row["item"]] += row["status"] == "correct"
    n = protocol.samples
    lengths = [row["tokens"] for row in rows if row["tokens"] is not None]
    return TaskResult(
        policy=policy,
        task=task.name,
        items=len(items),
        accuracy=accuracy_interval([(n, c) for c in correct.values()]),
        pass_at={k: fmean(pass_at_k(n, c, k) for c in correct.values()) for k in PASS_AT if k <= n},
        truncated=fmean(row["finish_reason"] == "length" for row in rows),
        no_answer=fmean(row["status"] == "no_answer" for row in rows),
        repetitive=sum(row["finish_reason"] == "repetition" for row in rows),
        ungraded=sum(row["status"] in ("timeout", "error") for row in rows),
        no_room=len({row["item"] for row in rows if row["max_tokens"] == 0}),
        less_room=len({row["item"] for row in rows if 0 < (row["max_tokens"] or 0) < protocol.max_tokens}),
        tokens=fmean(lengths) if lengths else None,
        tokens_per_second=spent.tokens_per_second,
    )


def print_results(run: RunDir, suite: Suite, protocol: Protocol, origin: str, evaluation: Evaluation) -> None:
    """The summary of one suite: a table, what deserves a remark, what is missing, and the files.

    `origin` says where the samples come from.
    """
    order = list(suite.tasks)
    results = sorted(evaluation.results, key=lambda result: order.index(result.task))
    print(f"\n{suite.name}: {protocol.runs} x {protocol.samples_per_run} samples an item, {origin}")
    if results:
        ks = [k for k in PASS_AT if 1 < k <= protocol.samples]
        pass_at = [f"pass@{k}" for k in ks]
        header = ["task", "policy", "items", "pass@1 [95%]", *pass_at, "cut off", "no answer", "tokens", "tokens/s"]
        print_table([header, *(cells_of(result, ks) for result in results)])
        graders = {"{name} {version}".format(**suite.tasks[result.task].grader) for result in results}
        print(
            "pass@1 is the mean accuracy of the runs, pass@k the unbiased estimate from all samples of an item;"
            f" graded by {', '.join(sorted(graders))}"
        )
    for result in results:
        for remark in remarks(result, protocol):
            print(f"{result.task}, {result.policy}: {remark}")
    for name, reason in evaluation.missing.items():
        print(f"not evaluated: {name}: {reason}")
    if results:
        print(f"wrote {run.path}/samples/<policy>/<task>.jsonl, {run.path}/items.parquet, {run.path}/manifest.json")


def cells_of(result: TaskResult, ks: Sequence[int]) -> list[str]:
    """A result as a row of the table, in percent."""
    low, high = 100 * result.accuracy.low, 100 * result.accuracy.high
    return [
        result.task,
        result.policy,
        str(result.items),
        f"{100 * result.accuracy.estimate:.1f} [{low:.1f}, {high:.1f}]",
        *(f"{100 * result.pass_at[k]:.1f}" for k in ks),
        f"{result.truncated:.1%}",
        f"{result.no_answer:.1%}",
        *("-" if number is None else f"{number:.0f}" for number in (result.tokens, result.tokens_per_second)),
    ]


def remarks(result: TaskResult, protocol: Protocol) -> Iterator[str]:
    """What a reader of the numbers should know."""
    if result.no_room:
        yield f"{result.no_room} prompts fill the model's window; they count as not answered"
    if result.less_room:
        yield f"{result.less_room} prompts leave the model's window less room than {protocol.max_tokens} tokens"
    if result.repetitive:
        yield f"{result.repetitive} completions were ended because they repeated themselves"
    if result.ungraded:
        yield f"{result.ungraded} answers could not be graded (status timeout or error); they count as wrong"


def print_table(table: Sequence[Sequence[str]]) -> None:
    """Prints rows of cells, the first two columns to the left, numbers to the right."""
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    for cells in table:
        sized = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        print("  ".join(sized).rstrip())
