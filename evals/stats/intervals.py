"""One policy: estimates with the uncertainty of the choice of items: would new problems give this number?

Every interval here treats the item (a benchmark problem, a sequence) as the unit that was sampled, and its repeated
runs or tokens as clustered in it (Miller 2024, arXiv 2411.00640). More runs of the same items narrow an interval only
as far as their noise was part of it. What a new training seed would change is in none of these numbers.

`counts` means one (n, correct) per item: samples drawn, samples right. Where items have different n, each item still
weighs the same. All functions raise ValueError on counts that are empty, negative or inconsistent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from scipy import special

Counts = Sequence[tuple[int, int]]
Floats = NDArray[np.float64]

CHUNK_ELEMENTS = 1 << 22  # of a resampling matrix held in memory at once (32 MiB of float64)


@dataclass(frozen=True)
class Interval:
    """An estimate with the two ends of its confidence interval, in the units of the data."""

    estimate: float
    low: float
    high: float


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k samples drawn without replacement from n, of which c are right, is right.

    It is 1 - C(n-c, k) / C(n, k), the unbiased estimator of pass@k (Chen et al. 2021, arXiv 2107.03374, Eq. 1),
    computed in integers and rounded once. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    return float(exact_pass_at_k(n, c, k))


def exact_pass_at_k(n: int, c: int, k: int) -> Fraction:
    """`pass_at_k` before it is rounded."""
    if not 0 <= c <= n:
        raise ValueError(f"{c} right out of {n} samples")
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples")
    total = math.comb(n, k)
    return Fraction(total - math.comb(n - c, k), total)


def accuracy_interval(counts: Counts, level: float = 0.95) -> Interval:
    """Mean accuracy over items with a Wilson interval at the effective number of samples.

    That number is p(1-p) / SE^2 with the SE clustered by item, kept between half the number of items and the number
    of samples. Where the SE says nothing (a single item, or all answers alike) it is the number of items.
    """
    rates = item_rates(counts)
    estimate = float(rates.mean())
    effective = float(len(rates))
    if 0 < estimate < 1 and len(rates) > 1:
        variance = float(rates.var(ddof=1)) / len(rates)
        most = float(sum(n for n, _ in counts))
        effective = most if variance == 0 else estimate * (1 - estimate) / variance
        effective = min(max(effective, len(rates) / 2), most)
    return wilson(estimate, effective, level)


def pass_at_k_interval(counts: Counts, k: int, level: float = 0.95, seed: int = 0, resamples: int = 2000) -> Interval:
    """Mean pass@k over items with a percentile interval from resampling items.

    Where all items have the same pass@k, as at 0/30, resampling would give an interval of no width: there it is
    Wilson's at the number of items. Raises ValueError if an item has fewer than k samples.
    """
    item_rates(counts)
    values = np.array([pass_at_k(n, c, k) for n, c in counts])
    estimate = float(values.mean())
    if np.ptp(values) == 0:
        return wilson(estimate, len(values), level)
    return Interval(estimate, *percentiles(values, level, seed, resamples))


def rate_interval(k: int, n: int, level: float = 0.95) -> Interval:
    """The rate k / n of independent events, such as a grader's errors on n responses, with its exact interval.

    It is Clopper and Pearson's (1934), which covers the true rate at least as often as `level` says, and leaves room
    for one above zero where nothing was seen: 0 of 300 gives [0, 0.0122]. Raises ValueError unless 0 <= k <= n, n >= 1.
    """
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"{k} events out of {n} cases")
    tail = (1 - checked(level)) / 2
    low = float(special.betaincinv(k, n - k + 1, tail)) if k else 0.0
    high = float(special.betainccinv(k + 1, n - k, tail)) if k < n else 1.0
    return Interval(k / n, low, high)


def clustered_mean(n: Floats, total: Floats, level: float = 0.95) -> Interval:
    """The ratio mean sum(total) / sum(n) over clusters, such as sequences of n tokens whose metric sums to `total`.

    `n` and `total` are [clusters]. With residuals r_i = total_i - mean * n_i over G clusters, SE^2 is
    G / (G-1) * sum(r_i^2) / sum(n)^2 (linearised ratio, clusters independent); the quantile is Student's with G-1
    degrees of freedom. Clusters with n = 0 do not count. One cluster has no SE: its interval is (-inf, inf).
    """
    n, total = np.asarray(n, dtype=np.float64), np.asarray(total, dtype=np.float64)
    if n.shape != total.shape or n.ndim != 1:
        raise ValueError(f"n and total must be equally long vectors, got shapes {n.shape} and {total.shape}")
    if (n < 0).any() or not n.sum() > 0:
        raise ValueError("n must hold no negative number and at least one positive one")
    n, total = n[n > 0], total[n > 0]
    mean = float(total.sum() / n.sum())
    clusters = len(n)
    if clusters == 1:
        return Interval(mean, -math.inf, math.inf)
    residuals = total - mean * n
    error = math.sqrt(clusters / (clusters - 1) * float(residuals @ residuals)) / float(n.sum())
    margin = student(level, clusters - 1) * error
    return Interval(mean, mean - margin, mean + margin)


def item_rates(counts: Counts) -> Floats:
    """The share of right samples of each item [items]."""
    if not counts:
        raise ValueError("no items")
    for index, (n, correct) in enumerate(counts):
        if n < 1 or not 0 <= correct <= n:
            raise ValueError(f"item {index}: {correct} right out of {n} samples")
    pairs = np.array(counts, dtype=np.float64)
    rates: Floats = pairs[:, 1] / pairs[:, 0]
    return rates


def wilson(estimate: float, n: float, level: float) -> Interval:
    """Wilson's score interval for a proportion observed in n independent trials; n need not be whole."""
    z2 = float(special.ndtri((1 + checked(level)) / 2)) ** 2
    centre = (estimate + z2 / (2 * n)) / (1 + z2 / n)
    margin = math.sqrt(z2 * (estimate * (1 - estimate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return Interval(estimate, max(min(centre - margin, estimate), 0.0), min(max(centre + margin, estimate), 1.0))


def student(level: float, degrees: float) -> float:
    """The two-sided quantile of Student's t."""
    return float(special.stdtrit(degrees, (1 + checked(level)) / 2))


def percentiles(values: Floats, level: float, seed: int, resamples: int) -> tuple[float, float]:
    """The two ends of the percentile bootstrap interval of the mean of `values` [items]."""
    random = np.random.default_rng(seed)
    uniform = np.full(len(values), 1 / len(values))
    sums = [random.multinomial(len(values), uniform, size=rows) @ values for rows in chunks(resamples, len(values))]
    tail = (1 - checked(level)) / 2
    low, high = np.quantile(np.concatenate(sums) / len(values), [tail, 1 - tail])
    return float(low), float(high)


def checked(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"a confidence level lies between 0 and 1, got {level}")
    return level


def chunks(rows: int, columns: int) -> Iterator[int]:
    """Splits `rows` into pieces whose matrices of `columns` columns stay below CHUNK_ELEMENTS."""
    size = max(CHUNK_ELEMENTS // columns, 1)
    for start in range(0, rows, size):
        yield min(size, rows - start)
