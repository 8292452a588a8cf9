"""Estimates with the uncertainty that comes from the choice of items: would new problems give this number?

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


@dataclass(frozen=True)
class PairedResult:
    """The mean over `items` of the rate of a minus that of b, its confidence interval and two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float
    items: int


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k samples drawn without replacement from n, of which c are right, is right.

    It is 1 - C(n-c, k) / C(n, k), the unbiased estimator of pass@k (Chen et al. 2021, arXiv 2107.03374, Eq. 1),
    computed in integers and rounded once. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"{c} right out of {n} samples")
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples")
    total = math.comb(n, k)
    return (total - math.comb(n - c, k)) / total


def accuracy_interval(counts: Counts, level: float = 0.95) -> Interval:
    """Mean accuracy over items with a Wilson interval at the effective number of samples.

    That number is p(1-p) / SE^2 with the SE clustered by item, kept between half the number of items and the number
    of samples. Where the SE says nothing (a single item, or all answers alike) it is the number of items.
    """
    rates = _rates(counts)
    estimate = float(rates.mean())
    effective = float(len(rates))
    if 0 < estimate < 1 and len(rates) > 1:
        variance = float(rates.var(ddof=1)) / len(rates)
        most = float(sum(n for n, _ in counts))
        effective = most if variance == 0 else estimate * (1 - estimate) / variance
        effective = min(max(effective, len(rates) / 2), most)
    return _wilson(estimate, effective, level)


def pass_at_k_interval(counts: Counts, k: int, level: float = 0.95, seed: int = 0, resamples: int = 2000) -> Interval:
    """Mean pass@k over items with a percentile interval from resampling items.

    Where all items have the same pass@k, as at 0/30, resampling would give an interval of no width: there it is
    Wilson's at the number of items. Raises ValueError if an item has fewer than k samples.
    """
    _rates(counts)
    values = np.array([pass_at_k(n, c, k) for n, c in counts])
    estimate = float(values.mean())
    if np.ptp(values) == 0:
        return _wilson(estimate, len(values), level)
    random = np.random.default_rng(seed)
    uniform = np.full(len(values), 1 / len(values))
    means = np.concatenate(
        [random.multinomial(len(values), uniform, size=rows) @ values for rows in _chunks(resamples, len(values))]
    )
    low, high = np.quantile(means / len(values), [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high))


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
    margin = _student(level, clusters - 1) * error
    return Interval(mean, mean - margin, mean + margin)


def paired_difference(a: Counts, b: Counts, level: float = 0.95, seed: int = 0, resamples: int = 9999) -> PairedResult:
    """Compares two policies on the same items, in the same order: the mean of rate(a) - rate(b) per item.

    The p-value is that of the sign-flip permutation test: exact where the items that differ have no more than
    `resamples` sign patterns, else from `resamples` random ones and the observed. The interval is Student's over the
    items' differences, within [-1, 1]. If all items have the same difference, its half-width is the share of items
    that may yet differ: Wilson's upper limit for none seen.
    """
    if len(a) != len(b):
        raise ValueError(f"paired counts of different length: {len(a)} and {len(b)} items")
    differences = _rates(a) - _rates(b)
    items = len(differences)
    mean = float(differences.mean())
    if np.ptp(differences) < 1e-12:
        margin = _wilson(0.0, items, level).high if items > 1 else 2.0
    else:
        margin = _student(level, items - 1) * float(differences.std(ddof=1)) / math.sqrt(items)
    p_value = _sign_flip_p_value(differences[differences != 0], seed, resamples)
    return PairedResult(mean, max(mean - margin, -1.0), min(mean + margin, 1.0), p_value, items)


def _sign_flip_p_value(differences: Floats, seed: int, resamples: int) -> float:
    """Share of sign patterns over the differences [m] whose sum is at least as far from zero as the observed sum."""
    m = len(differences)
    total = float(differences.sum())
    exact = m < resamples.bit_length()  # 2^m <= resamples
    threshold = abs(total) - 1e-9 * float(np.abs(differences).sum())  # sums that tie in exact arithmetic must tie here
    random = np.random.default_rng(seed)
    extreme = start = 0
    for rows in _chunks(2**m if exact else resamples, max(m, 1)):
        if exact:
            flips = (np.arange(start, start + rows)[:, None] >> np.arange(m) & 1).astype(np.uint8)
        else:
            bits = np.frombuffer(random.bytes(rows * (m + 7 >> 3)), dtype=np.uint8).reshape(rows, -1)
            flips = np.unpackbits(bits, axis=1, count=m)
        sums = total - 2 * (flips.astype(np.float64) @ differences)
        extreme += int((np.abs(sums) >= threshold).sum())
        start += rows
    return extreme / 2**m if exact else (extreme + 1) / (resamples + 1)


def _rates(counts: Counts) -> Floats:
    """The share of right samples of each item [items]."""
    if not counts:
        raise ValueError("no items")
    for index, (n, correct) in enumerate(counts):
        if n < 1 or not 0 <= correct <= n:
            raise ValueError(f"item {index}: {correct} right out of {n} samples")
    pairs = np.array(counts, dtype=np.float64)
    rates: Floats = pairs[:, 1] / pairs[:, 0]
    return rates


def _wilson(estimate: float, n: float, level: float) -> Interval:
    """Wilson's score interval for a proportion observed in n independent trials; n need not be whole."""
    z2 = float(special.ndtri((1 + _checked(level)) / 2)) ** 2
    centre = (estimate + z2 / (2 * n)) / (1 + z2 / n)
    margin = math.sqrt(z2 * (estimate * (1 - estimate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return Interval(estimate, max(min(centre - margin, estimate), 0.0), min(max(centre + margin, estimate), 1.0))


def _student(level: float, degrees: int) -> float:
    """The two-sided quantile of Student's t."""
    return float(special.stdtrit(degrees, (1 + _checked(level)) / 2))


def _checked(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"a confidence level lies between 0 and 1, got {level}")
    return level


def _chunks(rows: int, columns: int) -> Iterator[int]:
    """Splits `rows` into pieces whose matrices of `columns` columns stay below CHUNK_ELEMENTS."""
    size = max(CHUNK_ELEMENTS // columns, 1)
    for start in range(0, rows, size):
        yield min(size, rows - start)
