"""The statistics against enumeration, scipy and simulation."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from evals.stats import (
    Interval,
    accuracy_interval,
    clustered_mean,
    pass_at_k,
    pass_at_k_interval,
    rate_interval,
)

COUNTS = st.lists(
    st.tuples(st.integers(1, 8), st.integers(0, 8)).map(lambda p: (p[0], min(p))), min_size=1, max_size=12
)


# ---------------------------------------------------------------------------------------------------------------------
# pass@k


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_counts_subsets(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == float(Fraction(sum(map(any, subsets)), len(subsets)))


@pytest.mark.parametrize(("n", "c", "k"), [(200, 3, 100), (200, 1, 1), (1000, 17, 64), (32, 2, 32), (500, 499, 2)])
def test_pass_at_k_agrees_with_binomial_coefficients(n, c, k):
    expected = 1 - scipy.special.comb(n - c, k, exact=True) / scipy.special.comb(n, k, exact=True)
    assert pass_at_k(n, c, k) == pytest.approx(expected, rel=1e-12)


def test_pass_at_k_keeps_what_a_difference_from_one_would_lose():
    assert pass_at_k(10**17, 1, 1) == 1e-17


@pytest.mark.parametrize(
    ("n", "c", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, -1), (0, 0, 1), (-1, -1, 1)]
)
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="samples"):
        pass_at_k(n, c, k)


def test_pass_at_k_interval_agrees_with_scipy_bootstrap():
    random = np.random.default_rng(1)
    counts = [(8, int(random.binomial(8, p))) for p in random.beta(0.6, 1.2, 60)]
    values = np.array([pass_at_k(n, c, 4) for n, c in counts])
    ours = pass_at_k_interval(counts, 4, resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, random_state=2
    ).confidence_interval
    assert ours.estimate == pytest.approx(values.mean())
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.05 * width
    assert abs(ours.high - theirs.high) < 0.05 * width


def test_pass_at_k_interval_is_reproducible_and_never_without_width():
    counts = [(4, c) for c in (0, 1, 4, 2, 0, 3)]
    assert pass_at_k_interval(counts, 2, seed=3) == pass_at_k_interval(counts, 2, seed=3)
    few = [pass_at_k_interval(counts, 2, seed=seed, resamples=20) for seed in range(5)]
    assert len(set(few)) > 1
    none, every = pass_at_k_interval([(4, 0)] * 30, 4), pass_at_k_interval([(4, 4)] * 30, 4)
    assert (none.estimate, none.low, every.estimate, every.high) == (0, 0, 1, 1)
    assert none.high == pytest.approx(1 - every.low) == pytest.approx(wilson(0, 30)[1])


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    interval = scipy.stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return interval.low, interval.high


@pytest.mark.parametrize("n", [1, 4])
def test_accuracy_at_the_edges_is_wilson_on_items(n):
    none, every = accuracy_interval([(n, 0)] * 30), accuracy_interval([(n, n)] * 30)
    assert (none.low, none.high) == pytest.approx(wilson(0, 30))
    assert (every.low, every.high) == pytest.approx(wilson(30, 30))
    assert (none.estimate, none.low, every.estimate, every.high) == (0, 0, 1, 1)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_accuracy_of_single_runs_is_wilson_up_to_bessel(level):
    """With one run an item the clustered SE is that of n - 1 independent trials."""
    ours = accuracy_interval([(1, 1)] * 60 + [(1, 0)] * 40, level)
    n, z = 99, scipy.stats.norm.ppf((1 + level) / 2)
    roots = np.roots([1 + z**2 / n, -(2 * 0.6 + z**2 / n), 0.6**2])  # Wilson: |p - q| = z sqrt(q (1-q) / n)
    assert (ours.low, ours.high) == pytest.approx(sorted(roots))


def test_accuracy_uses_runs_as_far_as_they_are_independent():
    def width(counts: list[tuple[int, int]]) -> float:
        interval = accuracy_interval(counts)
        return interval.high - interval.low

    single = width([(1, 1), (1, 0)] * 20)
    assert width([(8, 8), (8, 0)] * 20) == pytest.approx(single)  # runs that repeat each other add nothing
    alike = accuracy_interval([(8, 4)] * 40)  # runs like independent coin flips count in full
    assert (alike.low, alike.high) == pytest.approx(wilson(160, 320))


@pytest.mark.parametrize(
    ("items", "runs", "truth", "icc"),
    [
        (30, 1, 0.5, 0.05),
        (30, 4, 0.22, 0.3),
        (30, 4, 0.5, 0.7),
        (30, 32, 0.22, 0.3),
        (200, 1, 0.9, 0.3),
        (200, 4, 0.5, 0.05),
        (200, 4, 0.22, 0.7),
    ],
)
def test_accuracy_interval_covers(items, runs, truth, icc):
    """Among them AIME's design, where binomial intervals on all samples cover 0.76 with 4 runs and 0.37 with 32."""
    assert 0.93 <= coverage(items, runs, truth, icc) <= 0.97


@pytest.mark.parametrize(("runs", "truth", "icc"), [(4, 0.9, 0.7), (32, 0.9, 0.7), (4, 0.08, 0.3)])
def test_accuracy_interval_covers_nearly_where_few_items_decide(runs, truth, icc):
    assert 0.90 <= coverage(30, runs, truth, icc) <= 0.97


def coverage(items: int, runs: int, truth: float, icc: float) -> float:
    """How often the interval holds the mean of a Beta population of items whose runs correlate by `icc`."""
    random = np.random.default_rng(0)
    strength = 1 / icc - 1  # a + b: the intraclass correlation of a beta-binomial is 1 / (a + b + 1)
    chances = random.beta(truth * strength, (1 - truth) * strength, (1000, items))
    intervals = [accuracy_interval([(runs, c) for c in row]) for row in random.binomial(runs, chances).tolist()]
    return float(np.mean([interval.low <= truth <= interval.high for interval in intervals]))


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 300), (7, 30), (30, 30), (3, 1319), (5000, 9000)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_rate_interval_is_exact(k, n, level):
    theirs = scipy.stats.binomtest(k, n).proportion_ci(level, method="exact")
    ours = rate_interval(k, n, level)
    assert (ours.estimate, ours.low, ours.high) == pytest.approx((k / n, theirs.low, theirs.high), rel=1e-9)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_rate_interval_refuses_impossible_counts(k, n):
    with pytest.raises(ValueError, match="events out of"):
        rate_interval(k, n)


@given(COUNTS)
def test_intervals_lie_within_zero_and_one_around_their_estimate(counts):
    for interval in (accuracy_interval(counts), pass_at_k_interval(counts, 1, resamples=200)):
        assert 0 <= interval.low <= interval.high <= 1
        assert interval.estimate == pytest.approx(np.mean([c / n for n, c in counts]))
    ours = accuracy_interval(counts)
    assert ours.low <= ours.estimate <= ours.high
    assert ours.low < ours.high


# ---------------------------------------------------------------------------------------------------------------------
# Clustered means


def test_clustered_mean_of_equal_clusters_is_the_t_interval_of_their_means():
    random = np.random.default_rng(0)
    means = random.normal(3, 1, 25)
    ours = clustered_mean(np.full(25, 40.0), 40 * means)
    theirs = scipy.stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert (ours.estimate, ours.low, ours.high) == pytest.approx((means.mean(), theirs.low, theirs.high))


def test_clustered_mean_covers_with_unequal_clusters():
    """Long sequences differ from short ones and tokens of a sequence from those of another."""
    random = np.random.default_rng(0)
    trials, clusters = 1500, 50
    n = random.integers(5, 200, (trials, clusters)).astype(float)
    total = n * random.gamma(2, 0.5, n.shape) * (0.5 + n / 200) + np.sqrt(n) * random.normal(size=n.shape)
    lengths = np.arange(5, 200)
    truth = (lengths * (0.5 + lengths / 200)).mean() / lengths.mean()
    intervals = [clustered_mean(row, sums) for row, sums in zip(n, total, strict=True)]
    assert 0.92 <= np.mean([interval.low <= truth <= interval.high for interval in intervals]) <= 0.98


def test_clustered_mean_of_one_cluster_claims_nothing_and_empty_clusters_do_not_count():
    alone = Interval(2.5, -math.inf, math.inf)
    assert clustered_mean(np.array([4.0]), np.array([10.0])) == alone
    assert clustered_mean(np.array([4.0, 0.0]), np.array([10.0, 0.0])) == alone
    same = clustered_mean(np.array([1, 2, 3]), np.array([2, 4, 6]))
    assert (same.estimate, same.low, same.high) == (2, 2, 2)


@pytest.mark.parametrize(
    ("n", "total"), [([], []), ([0.0], [0.0]), ([-1.0, 3.0], [1.0, 1.0]), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])]
)
def test_clustered_mean_refuses_what_is_no_vector_of_clusters(n, total):
    with pytest.raises(ValueError, match="n "):
        clustered_mean(np.array(n), np.array(total))


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("counts", [[], [(0, 0)], [(4, 5)], [(4, -1)], [(-4, -4)]])
def test_impossible_counts_are_refused(counts):
    for statistic in (accuracy_interval, lambda counts: pass_at_k_interval(counts, 1)):
        with pytest.raises(ValueError, match=r"item|samples"):
            statistic(counts)


def test_too_few_samples_and_levels_are_refused():
    with pytest.raises(ValueError, match="pass@4 cannot"):
        pass_at_k_interval([(4, 1), (3, 1)], 4)
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match="level"):
            accuracy_interval([(1, 1), (1, 0)], level)
