"""The statistics against enumeration, scipy and simulation."""

import itertools
import math
import time
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
    paired_difference,
    pass_at_k,
    pass_at_k_interval,
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


@pytest.mark.parametrize(("items", "runs", "a", "b"), [(30, 4, 0.6, 2.1), (100, 4, 0.5, 0.5), (200, 1, 2, 1)])
def test_accuracy_interval_covers(items, runs, a, b):
    """Items drawn from a Beta population; naive binomial intervals cover 0.76 in the first design."""
    random = np.random.default_rng(0)
    truth, trials = a / (a + b), 1500
    correct = random.binomial(runs, random.beta(a, b, (trials, items)))
    covered = [
        interval.low <= truth <= interval.high
        for interval in (accuracy_interval([(runs, int(c)) for c in row]) for row in correct)
    ]
    assert 0.92 <= np.mean(covered) <= 0.98


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
# Paired differences


def scipy_p_value(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> float:
    rates = [np.array([correct / n for n, correct in counts]) for counts in (a, b)]
    return scipy.stats.permutation_test(
        rates,
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=True,
    ).pvalue


def test_paired_p_value_is_exact_on_few_items():
    a = [(4, 3), (4, 4), (4, 1), (4, 2), (8, 7), (4, 0), (4, 4), (3, 2), (4, 3), (4, 1)]
    b = [(4, 1), (4, 2), (4, 1), (4, 3), (8, 2), (4, 0), (4, 1), (3, 1), (4, 2), (4, 2)]
    result = paired_difference(a, b)
    assert result.p_value == pytest.approx(scipy_p_value(a, b))
    assert result.items == 10
    rates_a, rates_b = ([correct / n for n, correct in counts] for counts in (a, b))
    theirs = scipy.stats.ttest_rel(rates_a, rates_b).confidence_interval(0.95)
    assert (result.difference, result.low, result.high) == pytest.approx(
        (np.mean(rates_a) - np.mean(rates_b), theirs.low, theirs.high)
    )


@given(st.data())
def test_paired_p_value_agrees_with_scipy_and_is_antisymmetric(data):
    a = data.draw(COUNTS.filter(lambda counts: 2 <= len(counts) <= 6))
    b = [(n, data.draw(st.integers(0, n))) for n, _ in a]
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert there.p_value == pytest.approx(scipy_p_value(a, b))
    assert there.p_value == pytest.approx(back.p_value)
    assert (there.difference, there.low, there.high) == pytest.approx((-back.difference, -back.high, -back.low))
    assert -1 <= there.low <= there.difference <= there.high <= 1


@pytest.mark.parametrize(("wins", "losses", "ties"), [(30, 12, 100), (55, 50, 0), (20, 1, 300)])
def test_sampled_p_value_agrees_with_mcnemar(wins, losses, ties):
    """On single 0/1 runs the sign-flip test is the exact McNemar test."""
    a = [(1, 1)] * wins + [(1, 0)] * losses + [(1, 1)] * ties
    b = [(1, 0)] * wins + [(1, 1)] * losses + [(1, 1)] * ties
    exact = scipy.stats.binomtest(wins, wins + losses).pvalue
    sampled = paired_difference(a, b, resamples=50_000).p_value
    assert sampled == pytest.approx(exact, abs=4 * math.sqrt(exact / 50_000) + 2e-5)


def test_paired_difference_without_any_difference():
    same = [(4, 2)] * 30
    result = paired_difference(same, same)
    assert (result.difference, result.p_value) == (0, 1)
    assert result.high == -result.low == pytest.approx(wilson(0, 30)[1])
    one = paired_difference([(4, 4)], [(4, 1)])
    assert (one.difference, one.low, one.high, one.p_value) == (0.75, -1, 1, 1)


def test_paired_p_values_are_uniform_or_above_under_the_null():
    random = np.random.default_rng(0)
    p_values = []
    for _ in range(400):
        chance = random.beta(1, 1, 40)
        a, b = ([(2, int(c)) for c in random.binomial(2, chance)] for _ in range(2))
        p_values.append(paired_difference(a, b, resamples=999).p_value)
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.08


def test_a_benchmark_of_ordinary_size_is_quick():
    random = np.random.default_rng(0)
    a, b = ([(4, int(c)) for c in random.binomial(4, 0.6, 1319)] for _ in range(2))
    started = time.perf_counter()
    paired_difference(a, b)
    assert time.perf_counter() - started < 2  # 0.2 s on an idle core; scipy takes 4 s


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("counts", [[], [(0, 0)], [(4, 5)], [(4, -1)], [(-4, -4)]])
def test_impossible_counts_are_refused(counts):
    for statistic in (
        accuracy_interval,
        lambda counts: pass_at_k_interval(counts, 1),
        lambda counts: paired_difference(counts, counts),
    ):
        with pytest.raises(ValueError, match=r"item|samples"):
            statistic(counts)


def test_mismatched_pairs_too_few_samples_and_levels_are_refused():
    with pytest.raises(ValueError, match="2 and 1 items"):
        paired_difference([(1, 1), (1, 0)], [(1, 1)])
    with pytest.raises(ValueError, match="pass@4 cannot"):
        pass_at_k_interval([(4, 1), (3, 1)], 4)
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match="level"):
            accuracy_interval([(1, 1), (1, 0)], level)
