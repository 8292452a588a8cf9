"""What a run's samples and verdicts say: the counts that other tools join on, and the tables of a summary."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from evals.ratings import Ratings, category_ratings
from evals.sampling import Throughput
from evals.stats import Interval, accuracy_interval, pass_at_k, rate_interval
from evals.suites import Protocol
from evals.tables import print_table
from gift.recipe import build
from gift.records import RunDir, write_table
from gift.samples import graded_samples

PASS_AT = (1, 2, 4, 8, 32)
PROTOCOL_SETTINGS = {entry.name for entry in fields(Protocol)}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class TaskResult:
    """One policy on one task, as far as its samples are graded.

    `score` is the mean accuracy of the runs, or where the metric is 'rating' the total rating; None where nothing is
    graded. `others` has the accuracy by each of the other graders, and on how many samples it differs. `ratings` has
    what a judge says in more detail. `truncated` and `no_answer` are shares of samples; `repetitive` (ended by the
    guard), `ungraded` (the grader failed or ran out of time), `pending` (not graded yet) and `missing` (not drawn yet)
    count samples; `no_room` and `less_room` count items whose prompt leaves no or less room than the protocol allows.
    `tokens` is the mean length of the completions whose length is known, None where it is of none.
    """

    policy: str
    suite: str
    task: str
    metric: str
    items: int
    score: Interval | None
    pass_at: dict[int, float]
    others: dict[str, tuple[float, int]]
    ratings: Ratings | None
    truncated: float
    no_answer: float
    repetitive: int
    ungraded: int
    pending: int
    missing: int
    no_room: int
    less_room: int
    tokens: float | None
    tokens_per_second: float | None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: a result per policy and task, and for each task that could not be had, what to do."""

    results: list[TaskResult]
    missing: dict[str, str]


def recorded_tasks(run: RunDir) -> Iterator[tuple[str, str, Row, str]]:
    """Suite, task, the task's entry in the manifest and policy, of all that was sampled."""
    for suite, about in run.manifest["eval"].items():
        for task, entry in about["tasks"].items():
            for policy in entry["policies"]:
                yield suite, task, entry, policy


def graders_of(entry: Row) -> dict[str, str]:
    """Name to version of a task's graders, the reported one first; {} where nothing has been graded."""
    return dict(entry.get("graders", {}))


def write_items(run: RunDir) -> None:
    """Writes what other tools join on, from every log of the run.

    `items.parquet`: graded samples and correct ones per task, item, policy and run. `ratings.parquet`, where a task has
    ratings: score per task, item, category, policy, run and sample.
    """
    counts: dict[tuple[str, str, str, int], list[int]] = defaultdict(lambda: [0, 0])
    ratings = []
    for _, task, entry, policy in recorded_tasks(run):
        reported = next(iter(graders_of(entry)), "")
        for row in graded_samples(run.path, policy, task, graders_of(entry)):
            if (verdict := row["verdicts"].get(reported)) is None:
                continue
            if entry.get("metric", "accuracy") == "accuracy":
                count = counts[task, row["item"], policy, row["run"]]
                count[0] += 1
                count[1] += verdict["status"] == "correct"
            elif verdict["status"] == "rated":
                ratings.append(
                    (task, row["item"], row["category"], policy, row["run"], row["sample"], verdict["score"])
                )
    write_rows(
        run.path / "items.parquet",
        ("task", "item", "policy", "run", "n", "correct"),
        [(*key, *counts[key]) for key in sorted(counts)],
    )
    names = ("task", "item", "category", "policy", "run", "sample", "score")
    write_rows(run.path / "ratings.parquet", names, sorted(ratings))


def write_rows(path: Path, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Writes rows as a table, if there are any."""
    if rows:
        write_table(path, dict(zip(names, zip(*rows, strict=True), strict=True)))


# ---------------------------------------------------------------------------------------------------------------------
# Results


def summarize(
    run: RunDir,
    suite: str,
    task: str,
    policy: str,
    items: Collection[str] | None = None,
    spent: Throughput | None = None,
) -> TaskResult:
    """The result of a policy on a task over these items (default: all it was asked), from the records alone."""
    about = run.manifest["eval"][suite]
    entry, protocol = about["tasks"][task], about["protocol"]
    graders = graders_of(entry)
    rows = graded_samples(run.path, policy, task, graders)
    if items is None:
        asked = entry["policies"][policy].get("items", 0)
        number = max(asked, len({row["item"] for row in rows}))
    else:
        rows = [row for row in rows if row["item"] in items]
        number = len(items)
    reported = next(iter(graders), "")
    graded = [row for row in rows if reported in row["verdicts"]]
    statuses = [row["verdicts"][reported]["status"] for row in graded]
    metric = entry.get("metric", "accuracy")
    counts = counts_of(graded, reported) if metric == "accuracy" else []
    ratings = ratings_of(graded, reported) if metric == "rating" else None
    lengths = [row["tokens"] for row in rows if row["tokens"] is not None]
    return TaskResult(
        policy=policy,
        suite=suite,
        task=task,
        metric=metric,
        items=number,
        score=ratings.total if ratings is not None else accuracy_interval(counts) if counts else None,
        pass_at=pass_at(counts),
        others={
            name: agreement(graded, reported, name)
            for name in list(graders)[1:]
            if any(name in row["verdicts"] for row in graded)
        },
        ratings=ratings,
        truncated=share(row["finish_reason"] == "length" for row in rows),
        no_answer=share(status == "no_answer" for status in statuses),
        repetitive=sum(row["finish_reason"] == "repetition" for row in rows),
        ungraded=sum(status in ("timeout", "error") for status in statuses),
        pending=len(rows) - len(graded),
        missing=number * protocol["runs"] * protocol["samples_per_run"] - len(rows),
        no_room=len({row["item"] for row in rows if row["max_tokens"] == 0}),
        less_room=len({row["item"] for row in rows if 0 < (row["max_tokens"] or 0) < protocol.get("max_tokens", 0)}),
        tokens=fmean(lengths) if lengths else None,
        tokens_per_second=spent.tokens_per_second if spent is not None else None,
    )


def counts_of(graded: Sequence[Row], grader: str) -> list[tuple[int, int]]:
    """Per item the samples that the grader has spoken of, and the correct ones."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in graded:
        counts[row["item"]][0] += 1
        counts[row["item"]][1] += row["verdicts"][grader]["status"] == "correct"
    return [(n, correct) for n, correct in counts.values()]


def pass_at(counts: Sequence[tuple[int, int]]) -> dict[int, float]:
    """Mean pass@k over the items, for every k that all of them have samples for."""
    least = min((n for n, _ in counts), default=0)
    return {k: fmean(pass_at_k(n, correct, k) for n, correct in counts) for k in PASS_AT if k <= least}


def agreement(graded: Sequence[Row], reported: str, other: str) -> tuple[float, int]:
    """The accuracy by another grader, mean over items, and on how many samples it differs from the reported one."""
    both = [row for row in graded if other in row["verdicts"]]
    differ = sum(
        (row["verdicts"][other]["status"] == "correct") != (row["verdicts"][reported]["status"] == "correct")
        for row in both
    )
    return fmean(correct / n for n, correct in counts_of(both, other)), differ


def ratings_of(graded: Sequence[Row], grader: str) -> Ratings:
    """The ratings that a judge gave."""
    return category_ratings({**row, **row["verdicts"][grader]} for row in graded)


def share(flags: Iterator[bool]) -> float:
    """The share of true ones; 0 where there are none."""
    values = list(flags)
    return fmean(values) if values else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# For people


def print_results(run: RunDir, suite: str, results: Sequence[TaskResult]) -> None:
    """The summary of one suite: a table, its graders, and what deserves a remark."""
    about = run.manifest["eval"][suite]
    protocol, entries = about["protocol"], about["tasks"]
    print(f"\n{suite}: {protocol['runs']} x {protocol['samples_per_run']} samples an item, {origin_of(run, protocol)}")
    ks = sorted({k for result in results for k in result.pass_at if k > 1})
    others = list(dict.fromkeys(name for result in results for name in result.others))
    by_others = [column for name in others for column in (f"by {name}", "differ")]
    pass_columns = [f"pass@{k}" for k in ks]
    lengths = ["cut off", "no answer", "tokens", "tokens/s"]
    header = ["task", "policy", "items", "score [95%]", *by_others, *pass_columns, *lengths]
    print_table([header, *(cells_of(result, others, ks) for result in results)])
    if any(result.metric == "accuracy" for result in results):
        print("score: mean accuracy of the runs (pass@1) in %; pass@k: unbiased estimate from all samples of an item")
    if others:
        print("by, differ: accuracy by a second grader, and on how many samples its verdict is another")
    if any(result.metric == "rating" for result in results):
        print("score: mean of the categories' mean ratings by the judge, 1 to 10")
    for result in results:
        for remark in remarks(result, protocol):
            print(f"{result.task}, {result.policy}: {remark}")
    print_graders({task: entries[task] for task in dict.fromkeys(result.task for result in results)})


def print_graders(entries: Mapping[str, Row]) -> None:
    """Who graded each task, and how far that grader can be trusted: its verdicts where the right one is known."""
    header = ["task", "grader", "gold accepted", "corrupted accepted", "labelled: wrong accepted", "right refused"]
    table = []
    for task, entry in entries.items():
        grader = next((f"{name} ({version})" for name, version in graders_of(entry).items()), "none yet")
        kinds = entry.get("self_check", {}).get("kinds", {})
        gold, corrupted, labelled = (kinds.get(kind) for kind in ("gold", "corrupted", "labelled"))
        checks = [
            gold and f"{gold['accepted']}/{gold['right']}",
            corrupted and f"{corrupted['passed']}/{corrupted['wrong']}",
            labelled and rate(labelled["passed"], labelled["wrong"]),
            labelled and rate(labelled["right"] - labelled["accepted"], labelled["right"]),
        ]
        table.append([task, grader, *(check or "-" for check in checks)])
    print_table([header, *table])


def rate(part: int, whole: int) -> str:
    """A count, and the rate it is an estimate of, in percent."""
    found = rate_interval(part, whole)
    return f"{part}/{whole} [{100 * found.low:.1f}, {100 * found.high:.1f}]%"


def origin_of(run: RunDir, protocol: Row) -> str:
    """How the samples of a recorded protocol came to be, in words."""
    if protocol["engine"] == "replay":
        return f"from {run.manifest['recipe']['generations']}"
    known = {name: value for name, value in protocol.items() if name in PROTOCOL_SETTINGS}
    return build(Protocol, {"name": "", **known}, str(run.path)).described()


def cells_of(result: TaskResult, others: Sequence[str], ks: Sequence[int]) -> list[str]:
    """A result as a row of the table, in percent."""
    return [
        result.task,
        result.policy,
        str(result.items),
        "-" if result.score is None else interval(result.score, result.metric),
        *(cell for name in others for cell in by_other(result, name)),
        *(f"{100 * result.pass_at[k]:.1f}" if k in result.pass_at else "-" for k in ks),
        f"{result.truncated:.1%}",
        f"{result.no_answer:.1%}",
        *("-" if number is None else f"{number:.0f}" for number in (result.tokens, result.tokens_per_second)),
    ]


def interval(value: Interval, metric: str) -> str:
    """An estimate and its interval: an accuracy in percent, a rating as it is. One question alone has no interval."""
    scale, digits = (1, 2) if metric == "rating" else (100, 1)
    estimate, low, high = (f"{scale * number:.{digits}f}" for number in (value.estimate, value.low, value.high))
    return f"{estimate} [{low}, {high}]" if math.isfinite(value.low) else estimate


def by_other(result: TaskResult, grader: str) -> tuple[str, str]:
    """The accuracy by another grader in percent, and on how many samples it differs."""
    if grader not in result.others:
        return "-", "-"
    accuracy, differ = result.others[grader]
    return f"{100 * accuracy:.1f}", str(differ)


def remarks(result: TaskResult, protocol: Row) -> Iterator[str]:
    """What a reader of the numbers should know."""
    if result.ratings is not None:
        yield from rating_remarks(result.ratings)
    if result.missing:
        yield f"{result.missing} samples are not there yet; generate goes on with them"
    if result.pending:
        yield f"{result.pending} samples are not graded yet, and are in no number here; grade goes on with them"
    if result.no_room:
        yield f"{result.no_room} prompts fill the model's window; they count as not answered"
    if result.less_room:
        yield f"{result.less_room} prompts leave the model's window less room than {protocol['max_tokens']} tokens"
    if result.repetitive:
        yield f"{result.repetitive} completions were ended because they repeated themselves"
    if result.ungraded and result.metric == "rating":
        yield f"{result.ungraded} answers have no rating (status error); they are in no mean"
    elif result.ungraded:
        yield f"{result.ungraded} answers could not be graded (status timeout or error); they count as wrong"


def rating_remarks(ratings: Ratings) -> Iterator[str]:
    """Ratings by category and turn, and what is known to be wrong with them."""
    by_category = [f"{category} {interval(value, 'rating')}" for category, value in ratings.categories.items()]
    by_turn = [f"turn {turn} {interval(value, 'rating')}" for turn, value in ratings.turns.items()]
    if by_category:
        yield ", ".join([*by_category, *by_turn])
    if ratings.disputed and ratings.undisputed is not None:
        without = interval(ratings.undisputed, "rating")
        yield f"{len(ratings.disputed)} questions have a disputed reference; without them {without}"


def print_disagreements(run: RunDir, suite: str, results: Sequence[TaskResult]) -> None:
    """Every sample on which another grader differs from the reported one."""
    for result in results:
        graders = graders_of(run.manifest["eval"][suite]["tasks"][result.task])
        for row in graded_samples(run.path, result.policy, result.task, graders):
            statuses = {name: verdict["status"] for name, verdict in row["verdicts"].items()}
            if len({status == "correct" for status in statuses.values()}) > 1:
                said = ", ".join(f"{name} {status}" for name, status in statuses.items())
                extracted = next(iter(row["verdicts"].values()))["extracted"]
                where = f"{result.task}, {result.policy}, item {row['item']}, run {row['run']}, sample {row['sample']}"
                print(f"{where}: {said}; answer {extracted!r:.80}, gold {row['gold']!r:.80}")
