"""Two policies on the same items: differences with interval, test and power.

An item's difference is the number of `a` minus that of `b`. Tests flip the signs of these differences: if neither
policy is better, a's and b's answers to an item could be exchanged (Fisher 1935; Good 2005). Differences are exact
fractions, so that sums which tie do tie and the null distribution can be enumerated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from scipy import special

from evals.stats.intervals import (
    CHUNK_ELEMENTS,
    Counts,
    Floats,
    checked,
    chunks,
    exact_pass_at_k,
    item_rates,
    percentiles,
    student,
    wilson,
)

EXACT_WORK = 1 << 26  # multiplications spent on an exact p-value, about 0.2 s; beyond that it is sampled

Differences = Sequence[Fraction]


@dataclass(frozen=True)
class PairedResult:
    """The mean difference of a and b over `items`, its confidence interval and two-sided p-value.

    `standard_error` is that of the difference, with so many `degrees` of freedom.
    """

    difference: float
    low: float
    high: float
    p_value: float
    items: int
    standard_error: float
    degrees: float


@dataclass(frozen=True)
class McNemar:
    """Items that only a, or only b, answered right, and the two-sided p-value."""

    a_only: int
    b_only: int
    p_value: float


# ---------------------------------------------------------------------------------------------------------------------
# Differences


def paired_difference(a: Counts, b: Counts, level: float = 0.95, seed: int = 0, resamples: int = 9999) -> PairedResult:
    """Compares two policies on the same items, in the same order: the mean of rate(a) - rate(b) per item.

    The p-value is that of the sign-flip permutation test. It is exact where the items' numbers of samples have a
    convenient common multiple (with one number of samples for all, nearly always) or the items that differ have no
    more than `resamples` sign patterns; else it is from `resamples` random ones and the observed. The interval is
    Student's over the items' differences, within [-1, 1]. If all items have the same difference, its half-width is
    the share of items that may yet differ: Wilson's upper limit for none seen.
    """
    return _compare([_rate_differences(a, b)], 1.0, level, seed, resamples)


def stratified_difference(
    strata: Sequence[tuple[Counts, Counts]], level: float = 0.95, seed: int = 0, resamples: int = 9999
) -> PairedResult:
    """Compares two policies by a suite's average: the unweighted mean of its tasks' paired differences.

    `strata` holds (a, b) of each task. The tasks are fixed, their items are a sample: the variance is
    sum_t(s_t^2 / n_t) / T^2 for T tasks of n_t items whose differences have the deviation s_t, with Welch and
    Satterthwaite's degrees of freedom (Satterthwaite 1946). Signs flip within tasks, where an item weighs 1 / (T n_t).
    A task whose items all have the same difference counts with what `paired_difference` allows for it.
    """
    if not strata:
        raise ValueError("no strata")
    return _compare([_rate_differences(a, b) for a, b in strata], 1.0, level, seed, resamples)


def paired_pass_at_k(
    a: Counts, b: Counts, k: int, level: float = 0.95, seed: int = 0, resamples: int = 9999
) -> PairedResult:
    """Compares the mean pass@k of two policies on the same items, in the same order.

    The interval is the percentile bootstrap's over items, the same resample for both; the p-value is that of the
    sign-flip test of the items' pass@k. If all items have the same difference, the interval is `paired_difference`'s.
    Raises ValueError if an item has fewer than k samples.
    """
    _check_paired(a, b)
    estimates = [[exact_pass_at_k(n, c, k) for n, c in counts] for counts in (a, b)]
    differences = [one - other for one, other in zip(*estimates, strict=True)]
    result = _compare([differences], 1.0, level, seed, resamples)
    if len(set(differences)) == 1:
        return result
    low, high = percentiles(_floats(differences), level, seed, resamples)
    return replace(result, low=low, high=high)


def paired_means(
    a: Sequence[float | Fraction],
    b: Sequence[float | Fraction],
    span: float,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 9999,
) -> PairedResult:
    """Compares two policies by a number per item or cluster, in the same order, such as a question's mean rating.

    No two numbers lie further apart than `span`: 9 for ratings from 1 to 10. Interval and test are those of
    `paired_difference`; fractions keep the p-value exact where floats would have it sampled.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"paired numbers of different length, or none: {len(a)} and {len(b)} items")
    differences = [Fraction(one) - Fraction(other) for one, other in zip(a, b, strict=True)]
    if max(map(abs, differences)) > span:
        raise ValueError(f"numbers lie further apart than {span:g}")
    return _compare([differences], span, level, seed, resamples)


def _compare(strata: Sequence[Differences], span: float, level: float, seed: int, resamples: int) -> PairedResult:
    """The mean over strata of their mean differences, none of which is beyond `span`."""
    values = [_floats(differences) for differences in strata]
    mean = float(np.mean([stratum.mean() for stratum in values]))
    variances, degrees = np.array([_variance_of_mean(stratum, span, level) for stratum in values]).T
    variance = float(variances.sum())
    freedom = float(variance**2 / (variances**2 / degrees).sum())
    error = math.sqrt(variance) / len(strata)
    margin = student(level, freedom) * error
    weighted = [value / len(differences) for differences in strata for value in differences]
    return PairedResult(
        difference=mean,
        low=max(mean - margin, -span),
        high=min(mean + margin, span),
        p_value=_sign_flip_p_value([value for value in weighted if value], seed, resamples),
        items=len(weighted),
        standard_error=error,
        degrees=freedom,
    )


def _variance_of_mean(differences: Floats, span: float, level: float) -> tuple[float, int]:
    """The squared standard error of the mean of differences [items], and its degrees of freedom.

    Where all are alike it is what gives the interval a half-width of Wilson's upper limit for none seen, times `span`;
    a single item says nothing.
    """
    items = len(differences)
    degrees = max(items - 1, 1)
    if np.ptp(differences) > 0:
        return float(differences.var(ddof=1)) / items, degrees
    margin = span * (wilson(0.0, items, level).high if items > 1 else 2.0)
    return (margin / student(level, degrees)) ** 2, degrees


def _rate_differences(a: Counts, b: Counts) -> Differences:
    _check_paired(a, b)
    return [Fraction(right, n) - Fraction(other, m) for (n, right), (m, other) in zip(a, b, strict=True)]


def _check_paired(a: Counts, b: Counts) -> None:
    if len(a) != len(b):
        raise ValueError(f"paired counts of different length: {len(a)} and {len(b)} items")
    item_rates(a)
    item_rates(b)


def _floats(differences: Differences) -> Floats:
    return np.array([float(value) for value in differences])


# ---------------------------------------------------------------------------------------------------------------------
# Tests


def mcnemar(a: Counts, b: Counts) -> McNemar:
    """The exact McNemar test (1947) of two policies that answered the same items once each.

    Of the items that one of them alone got right, each is as likely a's as b's if neither is better: the p-value is
    twice the smaller tail of the binomial, at most 1. Raises ValueError if an item has more than one sample.
    """
    _check_paired(a, b)
    if any(n != 1 for n, _ in (*a, *b)):
        raise ValueError("McNemar's test is for one sample an item")
    a_only = sum(one > other for (_, one), (_, other) in zip(a, b, strict=True))
    b_only = sum(one < other for (_, one), (_, other) in zip(a, b, strict=True))
    tail = float(special.bdtr(min(a_only, b_only), a_only + b_only, 0.5))
    return McNemar(a_only, b_only, min(2 * tail, 1.0))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for each other by Holm's step-down procedure (1979), in the order given.

    Calling those below alpha significant errs on any true null hypothesis with a chance of at most alpha, however the
    tests depend on each other. Raises ValueError for what is no p-value.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values lie between 0 and 1, got {list(p_values)}")
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min((len(p_values) - rank) * p_values[index], 1.0))
        adjusted[index] = highest
    return adjusted


def minimum_detectable_difference(
    standard_error: float, degrees: float, alpha: float = 0.05, power: float = 0.8
) -> float:
    """The true difference that a two-sided test at level `alpha` finds with the chance `power`, in the error's units.

    It is the noncentrality at which Student's test has that power, in standard errors (about 2.8 of them; Cohen 1988):
    smaller differences are usually missed. Take both numbers from a PairedResult, or, to plan, sd / sqrt(items) and
    items - 1 with the deviation of the items' differences. For one sample an item sd^2 is the share of items that
    only one policy gets right, less the square of the difference.
    """
    quantile = student(1 - alpha, degrees)
    return standard_error * float(special.nctdtrinc(degrees, 1 - checked(power), quantile))


def _sign_flip_p_value(differences: Differences, seed: int, resamples: int) -> float:
    """Share of sign patterns over the differences, none of them 0, whose sum is as far from zero as the observed."""
    scale = math.lcm(*{value.denominator for value in differences})
    whole = [int(value * scale) for value in differences]
    common = math.gcd(*whole) or 1
    whole = [value // common for value in whole]
    span = sum(map(abs, whole))
    if span < CHUNK_ELEMENTS and len(whole) * span < EXACT_WORK:
        return _exact_p_value(np.array(whole, dtype=np.int64))
    return _sampled_p_value(_floats(differences), seed, resamples)


def _exact_p_value(differences: NDArray[np.int64]) -> float:
    """The share among all sign patterns of whole differences [m].

    Of the m_d differences of size d, a binomial number counts up: the sizes' distributions are convolved.
    """
    span = int(np.abs(differences).sum())
    mass = np.zeros(span + 1)  # mass[s]: the chance that what counts up sums to s, and all to 2 s - span
    mass[0], reached = 1.0, 0
    for size, copies in zip(*np.unique(np.abs(differences), return_counts=True), strict=True):
        grown = np.zeros_like(mass)
        for ups, chance in enumerate(_fair_binomial(copies)):
            grown[ups * size : ups * size + reached + 1] += chance * mass[: reached + 1]
        mass, reached = grown, reached + size * copies
    sums = 2 * np.arange(span + 1) - span
    return min(float(mass[np.abs(sums) >= abs(differences.sum())].sum()), 1.0)


def _fair_binomial(n: int) -> Floats:
    """The chances of 0 to n heads of n fair coins [n + 1]."""
    heads = np.arange(n + 1)
    logs = special.gammaln(n + 1) - special.gammaln(heads + 1) - special.gammaln(n - heads + 1)
    chances: Floats = np.exp(logs - n * math.log(2))
    return chances


def _sampled_p_value(differences: Floats, seed: int, resamples: int) -> float:
    """The share among all sign patterns of differences [m], or if they are many, among random ones and the observed."""
    m = len(differences)
    total = float(differences.sum())
    every = m < resamples.bit_length()  # 2^m <= resamples
    threshold = abs(total) - 1e-9 * float(np.abs(differences).sum())  # sums that tie in exact arithmetic must tie here
    random = np.random.default_rng(seed)
    extreme = start = 0
    for rows in chunks(2**m if every else resamples, m):
        if every:
            flips = (np.arange(start, start + rows)[:, None] >> np.arange(m) & 1).astype(np.uint8)
        else:
            bits = np.frombuffer(random.bytes(rows * (m + 7 >> 3)), dtype=np.uint8).reshape(rows, -1)
            flips = np.unpackbits(bits, axis=1, count=m)
        sums = total - 2 * (flips.astype(np.float64) @ differences)
        extreme += int((np.abs(sums) >= threshold).sum())
        start += rows
    return extreme / 2**m if every else (extreme + 1) / (resamples + 1)
