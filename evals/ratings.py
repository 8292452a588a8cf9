"""MT-Bench in the form in which it is published: mean ratings by category and by turn, and their total."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from evals.stats import Interval, clustered_mean
from evals.stats.intervals import student
from evals.tasks.chat import DISPUTED


@dataclass(frozen=True)
class Ratings:
    """Mean ratings (1 to 10) with intervals over questions, and what is behind them.

    `total` is the plain mean of the category means, as the paper's Table 5 has it; None where a category has no
    rating. `undisputed` is the same without the questions whose references are disputed; `disputed` says which of the
    questions asked those are. `turns` are the means of the first and of the second turns. `errors` counts the answers
    that have a verdict but no rating: they are in no mean.
    """

    total: Interval | None
    categories: Mapping[str, Interval]
    turns: Mapping[int, Interval]
    undisputed: Interval | None
    disputed: tuple[int, ...]
    rated: int
    errors: int


class _Rating(NamedTuple):
    question: int
    turn: int
    category: str
    score: float | None  # None: there is a verdict, but no rating


def category_ratings(rows: Iterable[Mapping[str, Any]], level: float = 0.95) -> Ratings:
    """Ratings from rows of `item` ("81-2"), `category`, `status` and `score`: one for each verdict, of any run.

    An interval clusters all ratings of a question, of both turns and all runs; that of a total takes the categories as
    given, and their questions as sampled (variances add; Welch and Satterthwaite's degrees of freedom). A single
    question has an infinite one. Categories are in the rows' order.
    """
    asked = [_rating(row) for row in rows]
    categories: dict[str, list[_Rating]] = {rating.category: [] for rating in asked}
    turns: dict[int, list[_Rating]] = {1: [], 2: []}
    for rating in asked:
        if rating.score is not None:
            categories[rating.category].append(rating)
            turns[rating.turn].append(rating)
    rated = sum(map(len, categories.values()))
    undisputed = [[each for each in part if each.question not in DISPUTED] for part in categories.values()]
    return Ratings(
        total=_total(list(categories.values()), level),
        categories={category: _mean(part, level) for category, part in categories.items() if part},
        turns={turn: _mean(part, level) for turn, part in turns.items() if part},
        undisputed=_total(undisputed, level),
        disputed=tuple(sorted({rating.question for rating in asked} & DISPUTED)),
        rated=rated,
        errors=len(asked) - rated,
    )


def _rating(row: Mapping[str, Any]) -> _Rating:
    question, _, turn = row["item"].rpartition("-")
    score = float(row["score"]) if row["status"] == "rated" else None
    return _Rating(int(question), int(turn), row["category"], score)


def _mean(ratings: Sequence[_Rating], level: float) -> Interval:
    """The mean rating, clustered by question."""
    clusters: dict[int, list[float]] = defaultdict(list)
    for rating in ratings:
        assert rating.score is not None
        clusters[rating.question].append(rating.score)
    n = np.array([len(scores) for scores in clusters.values()], dtype=np.float64)
    return clustered_mean(n, np.array([sum(scores) for scores in clusters.values()]), level)


def _total(strata: Sequence[Sequence[_Rating]], level: float) -> Interval | None:
    """The plain mean of the strata's means; None where one has no ratings."""
    if not strata or not all(strata):
        return None
    means = [_mean(ratings, level) for ratings in strata]
    estimate = fmean(mean.estimate for mean in means)
    degrees = [len({rating.question for rating in ratings}) - 1 for ratings in strata]
    if 0 in degrees:  # of a single question nothing is known but its own ratings
        return Interval(estimate, -math.inf, math.inf)
    variances = [
        ((mean.high - mean.estimate) / student(level, degree)) ** 2 for mean, degree in zip(means, degrees, strict=True)
    ]
    variance = sum(variances)
    if variance == 0:
        return Interval(estimate, estimate, estimate)
    freedom = variance**2 / sum(each**2 / degree for each, degree in zip(variances, degrees, strict=True))
    margin = student(level, freedom) * math.sqrt(variance) / len(means)
    return Interval(estimate, estimate - margin, estimate + margin)
