"""Paired comparisons against enumeration, scipy, statsmodels' definitions and simulation."""

import itertools
import math
import time

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from evals.stats import (
    Counts,
    holm,
    mcnemar,
    minimum_detectable_difference,
    paired_difference,
    paired_means,
    paired_pass_at_k,
    pass_at_k,
    stratified_difference,
)
from evals.stats.paired import _sampled_p_value

COUNTS = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)).map(lambda p: (p[0], min(p))), min_size=2, max_size=6)


def wilson_of_none(n: int) -> float:
    """Wilson's upper limit where none of n is seen."""
    return scipy.stats.binomtest(0, n).proportion_ci(method="wilson").high


def rates(counts: Counts) -> np.ndarray:
    return np.array([correct / n for n, correct in counts])


def answers(*groups: tuple[int, int, int]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Single samples of a and b: groups of (items, right by a, right by b)."""
    a = [(1, one) for items, one, _ in groups for _ in range(items)]
    b = [(1, other) for items, _, other in groups for _ in range(items)]
    return a, b


def by_enumeration(differences: np.ndarray) -> float:
    """The sign-flip p-value from every pattern of signs."""
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    return float(np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12))


# ---------------------------------------------------------------------------------------------------------------------
# Paired differences


def test_paired_p_value_and_interval_on_few_items():
    a = [(4, 3), (4, 4), (4, 1), (4, 2), (8, 7), (4, 0), (4, 4), (3, 2), (4, 3), (4, 1)]
    b = [(4, 1), (4, 2), (4, 1), (4, 3), (8, 2), (4, 0), (4, 1), (3, 1), (4, 2), (4, 2)]
    result = paired_difference(a, b)
    permutation = scipy.stats.permutation_test(
        (rates(a), rates(b)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=True,
    )
    assert result.p_value == pytest.approx(permutation.pvalue)
    theirs = scipy.stats.ttest_rel(rates(a), rates(b))
    interval = theirs.confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high))
    assert result.difference == pytest.approx(np.mean(rates(a)) - np.mean(rates(b)))
    assert result.standard_error == pytest.approx(result.difference / theirs.statistic)
    assert (result.items, result.degrees) == (10, pytest.approx(9))


@given(st.data())
def test_paired_p_value_agrees_with_enumeration_and_is_antisymmetric(data):
    a = data.draw(COUNTS)
    b = [(n, data.draw(st.integers(0, n))) for n, _ in a]
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert there.p_value == pytest.approx(by_enumeration(rates(a) - rates(b)))
    assert there.p_value == pytest.approx(back.p_value)
    assert (there.difference, there.low, there.high) == pytest.approx((-back.difference, -back.high, -back.low))
    assert -1 <= there.low <= there.difference <= there.high <= 1


def test_paired_p_value_is_exact_where_samples_have_no_common_multiple():
    """11 items of 991 to 1051 samples: too fine a lattice, few enough patterns."""
    primes = [991, 997, 1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051]
    a, b = [(n, 500 + 9 * i) for i, n in enumerate(primes)], [(n, 540) for n in primes]
    assert paired_difference(a, b).p_value == pytest.approx(by_enumeration(rates(a) - rates(b)))


@pytest.mark.parametrize(("items", "advantage"), [(60, 0.05), (1319, 0.01), (300, 0.0)])
def test_sampled_p_value_agrees_with_the_exact_one(items, advantage):
    random = np.random.default_rng(1)
    chances = random.beta(1, 1, items)
    a, b = ([(4, c) for c in random.binomial(4, p).tolist()] for p in (np.clip(chances + advantage, 0, 1), chances))
    differences = rates(a) - rates(b)
    exact = paired_difference(a, b).p_value
    sampled = _sampled_p_value(differences[differences != 0], seed=0, resamples=20_000)
    assert sampled == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000) + 5e-5)


def test_paired_difference_without_any_difference():
    same = [(4, 2)] * 30
    result = paired_difference(same, same)
    assert (result.difference, result.p_value) == (0, 1)
    assert result.high == -result.low == pytest.approx(wilson_of_none(30))
    one = paired_difference([(4, 4)], [(4, 1)])
    assert (one.difference, one.low, one.high, one.p_value) == (0.75, -1, 1, 1)


def test_paired_p_values_are_uniform_or_above_under_the_null():
    random = np.random.default_rng(0)
    p_values = []
    for _ in range(1000):
        chances = random.beta(1, 1, 40)
        a, b = ([(2, c) for c in random.binomial(2, chances).tolist()] for _ in range(2))
        p_values.append(paired_difference(a, b).p_value)
    for level in (0.01, 0.05, 0.2):
        assert np.mean(np.array(p_values) <= level) <= level + 3 * math.sqrt(level / 1000)
    assert np.mean(np.array(p_values) <= 0.05) >= 0.02


def test_a_benchmark_of_ordinary_size_is_quick():
    random = np.random.default_rng(0)
    a, b = ([(4, c) for c in random.binomial(4, 0.6, 1319).tolist()] for _ in range(2))
    started = time.perf_counter()
    paired_difference(a, b)
    assert time.perf_counter() - started < 2  # 0.03 s on an idle core; scipy takes 4 s


# ---------------------------------------------------------------------------------------------------------------------
# McNemar


@pytest.mark.parametrize(
    ("a_only", "b_only", "alike"), [(30, 12, 100), (5, 5, 0), (6, 0, 24), (0, 0, 7), (1, 20, 300), (900, 700, 9)]
)
def test_mcnemar_is_the_binomial_test_and_the_sign_flip_test(a_only, b_only, alike):
    a, b = answers((a_only, 1, 0), (b_only, 0, 1), (alike, 1, 1), (alike, 0, 0))
    discordant = a_only + b_only
    expected = scipy.stats.binomtest(a_only, discordant).pvalue if discordant else 1.0
    result = mcnemar(a, b)
    assert (result.a_only, result.b_only) == (a_only, b_only)
    assert result.p_value == pytest.approx(expected, rel=1e-9)
    assert paired_difference(a, b).p_value == pytest.approx(expected, rel=1e-9)


def test_mcnemar_wants_one_sample_an_item():
    with pytest.raises(ValueError, match="one sample"):
        mcnemar([(1, 1), (2, 1)], [(1, 1), (2, 2)])


# ---------------------------------------------------------------------------------------------------------------------
# Suite averages


def draw_suite(random: np.random.Generator, sizes: tuple[int, ...], effects: tuple[float, ...], runs: int = 4):
    """Counts of a and b per task: chances of solving an item vary, and a's are higher by the task's effect."""
    strata = []
    for size, effect in zip(sizes, effects, strict=True):
        chances = 0.9 * random.beta(0.8, 1.2, size)
        a, b = (random.binomial(runs, p).tolist() for p in (chances + effect, chances))
        strata.append(([(runs, c) for c in a], [(runs, c) for c in b]))
    return strata


def test_stratified_difference_by_its_formula():
    strata = draw_suite(np.random.default_rng(3), (30, 12, 200), (0.1, 0.05, 0.0))
    differences = [rates(a) - rates(b) for a, b in strata]
    parts = [values.var(ddof=1) / len(values) for values in differences]
    error = math.sqrt(sum(parts)) / 3
    degrees = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, differences, strict=True)
    )
    mean = np.mean([values.mean() for values in differences])
    margin = scipy.stats.t.ppf(0.975, degrees) * error
    result = stratified_difference(strata)
    assert (result.difference, result.standard_error, result.degrees) == pytest.approx((mean, error, degrees))
    assert (result.low, result.high) == pytest.approx((mean - margin, mean + margin))
    assert result.items == 242


def test_stratified_degrees_of_freedom_are_welchs():
    """With two strata of which one is negated, the mean is half the difference of two samples: Welch's test."""
    (a, b), (c, d) = draw_suite(np.random.default_rng(4), (9, 25), (0.1, 0.0))
    result = stratified_difference([(a, b), (d, c)])
    theirs = scipy.stats.ttest_ind(rates(a) - rates(b), rates(c) - rates(d), equal_var=False)
    interval = theirs.confidence_interval(0.95)
    assert result.degrees == pytest.approx(theirs.df)
    assert (2 * result.low, 2 * result.high) == pytest.approx((interval.low, interval.high))


@given(st.data())
def test_stratified_p_value_agrees_with_enumeration(data):
    firsts = data.draw(st.lists(COUNTS.map(lambda counts: counts[:4]), min_size=1, max_size=3))
    strata = [(a, [(n, data.draw(st.integers(0, n))) for n, _ in a]) for a in firsts]
    weighted = np.concatenate([(rates(a) - rates(b)) / len(a) for a, b in strata])
    result = stratified_difference(strata)
    assert result.p_value == pytest.approx(by_enumeration(weighted))
    assert -1 <= result.low <= result.difference <= result.high <= 1


def test_one_stratum_is_a_paired_difference():
    [(a, b)] = draw_suite(np.random.default_rng(5), (50,), (0.1,))
    assert stratified_difference([(a, b)]) == paired_difference(a, b)


def test_a_task_without_any_difference_keeps_its_doubt():
    informative = answers((10, 1, 0), (4, 0, 1), (86, 1, 1))
    silent = answers((30, 0, 0))
    alone, both = paired_difference(*informative), stratified_difference([informative, silent])
    assert both.difference == pytest.approx(alone.difference / 2)
    assert both.p_value == pytest.approx(alone.p_value)
    assert both.high - both.low > (alone.high - alone.low) / 2


@pytest.mark.parametrize("sizes", [(30, 30, 200), (8, 100, 20)])
def test_stratified_interval_covers_and_its_test_keeps_its_level(sizes):
    random = np.random.default_rng(0)
    effects = (0.06, 0.0, 0.03)
    covered, rejected, trials = 0, 0, 300
    for _ in range(trials):
        result = stratified_difference(draw_suite(random, sizes, effects), resamples=199)
        covered += result.low <= 0.03 <= result.high
        null = stratified_difference(draw_suite(random, sizes, (0.0, 0.0, 0.0)), resamples=199)
        rejected += null.p_value <= 0.05
    assert 0.92 <= covered / trials <= 0.98
    assert 0.02 <= rejected / trials <= 0.08


# ---------------------------------------------------------------------------------------------------------------------
# pass@k and ratings


def test_paired_pass_at_k_agrees_with_scipy_bootstrap():
    [(a, b)] = draw_suite(np.random.default_rng(6), (60,), (0.05,), runs=8)
    values = np.array([pass_at_k(n, c, 4) - pass_at_k(m, d, 4) for (n, c), (m, d) in zip(a, b, strict=True)])
    ours = paired_pass_at_k(a, b, 4, resamples=20_000)
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, random_state=2)
    low, high = theirs.confidence_interval
    assert ours.difference == pytest.approx(values.mean())
    assert abs(ours.low - low) < 0.05 * (high - low)
    assert abs(ours.high - high) < 0.05 * (high - low)
    assert paired_pass_at_k(a, b, 1).p_value == pytest.approx(paired_difference(a, b).p_value)


@given(st.data())
def test_paired_pass_at_k_p_value_agrees_with_enumeration(data):
    a = [(8, c) for c in data.draw(st.lists(st.integers(0, 8), min_size=2, max_size=7))]
    b = [(8, data.draw(st.integers(0, 8))) for _ in a]
    values = np.array([pass_at_k(8, c, 4) - pass_at_k(8, d, 4) for (_, c), (_, d) in zip(a, b, strict=True)])
    assert paired_pass_at_k(a, b, 4, resamples=99).p_value == pytest.approx(by_enumeration(values))


def test_paired_pass_at_k_of_policies_that_solve_the_same_items_has_a_width():
    solved = [(4, 4)] * 30
    result = paired_pass_at_k(solved, solved, 4)
    assert (result.difference, result.p_value) == (0, 1)
    assert result.high == -result.low == pytest.approx(wilson_of_none(30))


def test_paired_means_are_those_of_a_paired_t_test():
    random = np.random.default_rng(7)
    b = random.integers(1, 10, 12) + 0.5 * random.integers(0, 2, 12)
    a = np.clip(b + random.normal(0.8, 1, 12), 1, 10)
    result = paired_means(a.tolist(), b.tolist(), span=9)
    theirs = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((theirs.low, theirs.high))
    assert result.p_value == pytest.approx(by_enumeration(a - b))
    alike = paired_means([8.0] * 80, [8.0] * 80, span=9)
    assert alike.high == pytest.approx(9 * wilson_of_none(80))


def test_paired_means_refuse_what_cannot_be_paired():
    with pytest.raises(ValueError, match="2 and 1 items"):
        paired_means([1.0, 2.0], [1.0], span=9)
    with pytest.raises(ValueError, match="further apart than 9"):
        paired_means([11.0, 2.0], [1.0, 2.0], span=9)


# ---------------------------------------------------------------------------------------------------------------------
# Several tests, and power


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_by_its_definition(p_values):
    """A hypothesis is rejected at alpha if every smaller p-value, of rank i of m, is at most alpha / (m - i + 1)."""
    m = len(p_values)
    ordered = sorted(p_values)
    expected = [
        min(1.0, max((m - i) * ordered[i] for i in range(m) if ordered[i] <= p)) for p in p_values
    ]  # also what statsmodels' multipletests(method='holm') computes
    assert holm(p_values) == pytest.approx(expected)


def test_holm_of_a_worked_example():
    """Holm 1979 by hand: 0.01 x 4, 0.02 x 3, then 0.03 x 2 and 0.04 no lower than those before."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.2, math.nan])


@pytest.mark.parametrize(("degrees", "power", "alpha"), [(1, 0.8, 0.05), (29, 0.8, 0.05), (12.4, 0.9, 0.01)])
def test_minimum_detectable_difference_inverts_the_power_of_students_test(degrees, power, alpha):
    quantile = scipy.stats.t.ppf(1 - alpha / 2, degrees)
    expected = scipy.optimize.brentq(lambda shift: scipy.stats.nct.sf(quantile, degrees, shift) - power, 0, 60)
    assert minimum_detectable_difference(2.0, degrees, alpha, power) == pytest.approx(2 * expected, rel=1e-5)


@pytest.mark.parametrize(("items", "runs", "test"), [(500, 1, mcnemar), (60, 4, paired_difference)])
def test_minimum_detectable_difference_is_found_four_times_in_five(items, runs, test):
    """Answers of a and b are independent, with chances half the effect above and below one half."""
    random = np.random.default_rng(0)
    deviation = math.sqrt(2 * 0.25 / runs)
    effect = minimum_detectable_difference(deviation / math.sqrt(items), items - 1)
    found = 0
    for _ in range(500):
        a, b = (random.binomial(runs, chance, items).tolist() for chance in (0.5 + effect / 2, 0.5 - effect / 2))
        found += test([(runs, c) for c in a], [(runs, c) for c in b]).p_value <= 0.05
    assert 0.76 <= found / 500 <= 0.84


def test_minimum_detectable_difference_of_a_large_benchmark_is_the_normal_one():
    """2.80 sqrt(2 p (1 - p) (1 - rho) / n): 3.86 points on 1,319 items at p = 0.5 and rho = 0.5."""
    deviation = math.sqrt(2 * 0.25 * 0.5)
    assert minimum_detectable_difference(deviation / math.sqrt(1319), 1318) == pytest.approx(0.0386, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("counts", [[], [(0, 0)], [(4, 5)], [(4, -1)], [(-4, -4)]])
def test_impossible_counts_are_refused(counts):
    for statistic in (
        paired_difference,
        mcnemar,
        lambda a, b: paired_pass_at_k(a, b, 1),
        lambda a, b: stratified_difference([([(1, 1)], [(1, 1)]), (a, b)]),
    ):
        with pytest.raises(ValueError, match=r"item|samples"):
            statistic(counts, counts)


def test_mismatched_pairs_too_few_samples_and_no_strata_are_refused():
    for statistic in (paired_difference, mcnemar, lambda a, b: paired_pass_at_k(a, b, 1)):
        with pytest.raises(ValueError, match="2 and 1 items"):
            statistic([(1, 1), (1, 0)], [(1, 1)])
    with pytest.raises(ValueError, match="pass@4 cannot"):
        paired_pass_at_k([(4, 1), (3, 1)], [(4, 1), (4, 1)], 4)
    with pytest.raises(ValueError, match="no strata"):
        stratified_difference([])
