"""Two evaluated checkpoints: what of theirs can be compared item by item, from the files of their runs alone.

A task is compared where both were asked the same items in the same way and graded by the same grader; what differs is
named. What the seed and the place of sampling may change is said, not refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any

from evals.stats import (
    McNemar,
    PairedResult,
    mcnemar,
    paired_difference,
    paired_means,
)
from evals.suites import UNRECORDED
from gift.cli import UserError, nearest
from gift.records import RunDir, read_table

RATING_SPAN = 9.0  # ratings go from 1 to 10
CIRCUMSTANCES = ("engine", "dtype", "batch_size", "seed")
"""Settings of a protocol that change which samples are drawn, not what they are samples of."""

Pairs = tuple[list[tuple[int, int]], list[tuple[int, int]]]


@dataclass(frozen=True)
class Side:
    """One of the two: a policy of a run, with its (samples, correct) and its ratings by task and item."""

    letter: str
    run: RunDir
    policy: str
    counts: Mapping[str, Mapping[str, tuple[int, int]]]
    ratings: Mapping[str, Mapping[str, Sequence[float]]]

    def suites(self) -> Mapping[str, Any]:
        """What the manifest says of the evaluations of this run."""
        suites: Mapping[str, Any] = self.run.manifest["eval"]
        return suites

    def entry(self, suite: str, task: str) -> Mapping[str, Any]:
        """What the manifest says of a task, {} where this policy was not evaluated on it."""
        entry: Mapping[str, Any] = self.suites().get(suite, {}).get("tasks", {}).get(task, {})
        return entry if self.policy in entry.get("policies", {}) else {}


@dataclass(frozen=True)
class Comparison:
    """A task on which both were compared: the means of A and B, their difference, and its p-value.

    `pairs` are the counts of A and B per item (None for ratings), `flips` the items that changed sides (None unless
    items have one sample).
    """

    suite: str
    task: str
    means: tuple[float, float]
    result: PairedResult
    pairs: Pairs | None
    flips: McNemar | None

    @property
    def p_value(self) -> float:
        """Of the exact McNemar test where items have one sample, else of the sign-flip permutation test."""
        return self.result.p_value if self.flips is None else self.flips.p_value


# ---------------------------------------------------------------------------------------------------------------------
# The two sides


def side_of(letter: str, text: str, run: Path | None) -> Side:
    """The policy that `text` means: one of `run`, RUN_DIR where that holds one evaluated policy, or RUN_DIR:POLICY.

    Raises UserError that says what there is to compare.
    """
    path, policy = located(text, run)
    opened = RunDir.open(path)
    evaluated = evaluated_policies(opened)
    if not evaluated:
        raise UserError(f"{path}: nothing was evaluated; first run python -m evals.run --suite SUITE --model {path}")
    if policy is None:
        if len(evaluated) > 1:
            raise UserError(f"{path}: has several evaluated policies; give {path}:POLICY, of {', '.join(evaluated)}")
        policy = evaluated[0]
    if policy not in evaluated:
        opened.node(policy)
        raise UserError(
            f"{path}: policy {policy!r} was not evaluated{nearest(policy, evaluated)}; {there_are(evaluated)}"
        )
    counts, ratings = path / "items.parquet", path / "ratings.parquet"
    if not counts.exists() and not ratings.exists():
        raise UserError(f"{counts}: no such file; run the evaluation of {path} again, which writes it from its samples")
    return Side(letter, opened, policy, read_counts(counts, policy), read_ratings(ratings, policy))


def located(text: str, run: Path | None) -> tuple[Path, str | None]:
    """The run directory and the policy, None where it is not said."""
    policies = [] if run is None else [node["id"] for node in RunDir.open(run).manifest["lineage"]]
    if run is not None and text in policies:
        return run, text
    folder, _, policy = text.rpartition(":")
    if is_run(text):
        return Path(text), None
    if folder and is_run(folder):
        return Path(folder), policy
    if run is not None:
        raise UserError(f"{run}: no policy {text!r}{nearest(text, policies)}, and no run directory of that name")
    raise UserError(f"{text}: not a run directory; give RUN_DIR, RUN_DIR:POLICY, or a policy and its run as --model")


def is_run(text: str) -> bool:
    return (Path(text) / "manifest.json").is_file()


def evaluated_policies(run: RunDir) -> list[str]:
    """The policies that the manifest has samples of."""
    tasks = [entry for about in run.manifest["eval"].values() for entry in about["tasks"].values()]
    return list(dict.fromkeys(policy for entry in tasks for policy in entry["policies"]))


def there_are(policies: Iterable[str]) -> str:
    return f"there are: {', '.join(policies)}"


def read_counts(path: Path, policy: str) -> dict[str, dict[str, tuple[int, int]]]:
    """(samples, correct) of a policy by task and item, all runs together; nothing where there is no such file."""
    counts: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for task, item, n, correct in rows_of(path, policy, ("task", "item", "n", "correct")):
        before = counts[task].get(item, (0, 0))
        counts[task][item] = (before[0] + n, before[1] + correct)
    return counts


def read_ratings(path: Path, policy: str) -> dict[str, dict[str, list[float]]]:
    """The ratings of a policy by task and item; nothing where there is no such file."""
    ratings: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for task, item, score in rows_of(path, policy, ("task", "item", "score")):
        ratings[task][item].append(score)
    return ratings


def rows_of(path: Path, policy: str, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """These columns of a policy's rows. Raises UserError where the file lacks one."""
    table = read_table(path) if path.exists() else {name: [] for name in ("policy", *names)}
    if missing := {"policy", *names} - table.keys():
        raise UserError(f"{path}: no column {sorted(missing)[0]!r}; run the evaluation again, which writes it anew")
    columns = zip(*(table[name] for name in names), strict=True)
    return (row for owner, row in zip(table["policy"], columns, strict=True) if owner == policy)


# ---------------------------------------------------------------------------------------------------------------------
# What can be compared


def comparisons(a: Side, b: Side) -> tuple[list[Comparison], dict[str, str]]:
    """What can be compared, and by task why the others that one of the two was evaluated on cannot."""
    found, left_out = [], {}
    for suite, task in tasks_of(a, b):
        if not a.entry(suite, task) and not b.entry(suite, task):
            continue
        try:
            found.append(compared(a, b, suite, task))
        except UserError as error:
            left_out[task] = str(error)
    return found, left_out


def tasks_of(a: Side, b: Side) -> list[tuple[str, str]]:
    """Every suite and task of either manifest, by whichever policy."""
    pairs = [(suite, task) for side in (a, b) for suite, about in side.suites().items() for task in about["tasks"]]
    order = list(dict.fromkeys(suite for suite, _ in pairs))
    return sorted(dict.fromkeys(pairs), key=lambda pair: order.index(pair[0]))


def compared(a: Side, b: Side, suite: str, task: str) -> Comparison:
    """The comparison on one task. Raises UserError with the reason why there can be none."""
    for side, other in ((a, b), (b, a)):
        if not side.entry(suite, task):
            raise UserError(f"only {other.letter} was evaluated on it")
    first, second = conditions(a, suite, task), conditions(b, suite, task)
    changed = [
        f"{key} is {shown(first[key])} for A, {shown(second[key])} for B"
        for key in first
        if key in second and first[key] != second[key]
    ]
    if changed:
        raise UserError("; ".join(changed))
    return (by_rating if first["metric"] == "rating" else by_accuracy)(a, b, suite, task)


def conditions(side: Side, suite: str, task: str) -> dict[str, Any]:
    """What must be the same for results to compare. How stored generations were sampled is not known."""
    entry, protocol = side.entry(suite, task), side.suites()[suite]["protocol"]
    graders = entry.get("graders") or {}
    if "grader" in entry:  # as written before a task could have several
        graders = {entry["grader"]["name"]: entry["grader"]["version"]}
    sampling = protocol if protocol.get("engine") == "replay" else {**UNRECORDED, **protocol}
    return {
        "metric": entry.get("metric", "accuracy"),
        "data sha256": entry["source"]["sha256"],
        "prompt": entry.get("prompt", protocol.get("prompt")),
        "grader": " ".join(next(iter(graders.items()), ("none",))),
        **{key: value for key, value in sampling.items() if key not in ("prompt", *CIRCUMSTANCES)},
    }


def shown(value: Any) -> str:
    """A value on one line, the middle of a long one left out."""
    text = repr(value)
    return text if len(text) <= 70 else f"{text[:40]}...{text[-25:]}"


def by_accuracy(a: Side, b: Side, suite: str, task: str) -> Comparison:
    """The paired difference of accuracy, in shares."""
    items = same_items({side.letter: side.counts.get(task, {}) for side in (a, b)})
    pairs = ([a.counts[task][item] for item in items], [b.counts[task][item] for item in items])
    protocol = a.suites()[suite]["protocol"]
    samples = protocol["runs"] * protocol["samples_per_run"]
    for side, counts in zip((a, b), pairs, strict=True):
        if unfinished := sum(n != samples for n, _ in counts):
            raise UserError(f"{unfinished} items of {side.letter} lack graded samples; run its evaluation again")
    flips = mcnemar(*pairs) if samples == 1 else None
    means = (mean_rate(pairs[0]), mean_rate(pairs[1]))
    return Comparison(suite, task, means, paired_difference(*pairs), pairs, flips)


def by_rating(a: Side, b: Side, suite: str, task: str) -> Comparison:
    """The paired difference of the mean ratings of questions; a question's turns and samples are a cluster.

    A turn's item is named QUESTION-TURN. Answers without a rating do not count.
    """
    same_items({side.letter: side.ratings.get(task, {}) for side in (a, b)})
    questions = [by_question(side.ratings[task]) for side in (a, b)]
    first, second = ([means[question] for question in questions[0]] for means in questions)
    means = (float(fmean(first)), float(fmean(second)))
    return Comparison(suite, task, means, paired_means(first, second, RATING_SPAN), None, None)


def by_question(ratings: Mapping[str, Sequence[float]]) -> dict[str, Fraction]:
    """The mean rating of each question."""
    clusters: dict[str, list[Fraction]] = defaultdict(list)
    for item, scores in ratings.items():
        clusters[item.rpartition("-")[0] or item].extend(map(Fraction, scores))
    return {question: sum(scores, Fraction(0)) / len(scores) for question, scores in clusters.items()}


def same_items(items: Mapping[str, Mapping[str, object]]) -> list[str]:
    """The items that both have. Raises UserError where one has others, or none."""
    (one, first), (other, second) = items.items()
    for letter, known in items.items():
        if not known:
            raise UserError(f"{letter} has no graded samples of it; run its evaluation again")
    if first.keys() != second.keys():
        raise UserError(
            f"items differ: {len(first.keys() - second.keys())} are only {one}'s,"
            f" {len(second.keys() - first.keys())} only {other}'s"
        )
    return sorted(first)


def mean_rate(counts: Sequence[tuple[int, int]]) -> float:
    """Accuracy, each item weighing the same."""
    return fmean(correct / n for n, correct in counts)


def notes(found: Sequence[Comparison], a: Side, b: Side) -> Iterator[str]:
    """What else than the weights may differ between A and B."""
    for one in found:
        first, second = (side.suites()[one.suite]["protocol"] for side in (a, b))
        for key in CIRCUMSTANCES:
            if first.get(key) != second.get(key):
                yield f"{one.suite}: {key} is {first.get(key)!r} for A, {second.get(key)!r} for B"
        for side, protocol in ((a, first), (b, second)):
            if protocol.get("engine") == "replay":
                yield f"{one.suite}: how the stored generations of {side.letter} were sampled is not recorded"
        made = [side.entry(one.suite, one.task)["policies"][side.policy] for side in (a, b)]
        if len({about["chat_template_sha256"] for about in made} - {None}) > 1:
            yield f"{one.suite}: A and B have different chat templates"
        if one.pairs is None:
            for side, about, protocol in zip((a, b), made, (first, second), strict=True):
                answers = about["items"] * protocol["runs"] * protocol["samples_per_run"]
                if unrated := answers - sum(map(len, side.ratings[one.task].values())):
                    yield f"{one.task}: {unrated} of {answers} answers of {side.letter} have no rating and do not count"
