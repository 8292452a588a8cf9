"""Drawing tokens from logits: truncation against transformers and naive fp64 code, frequencies by chi-square."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gift.generation import SamplingParams
from gift.generation.draw import draw, truncate

TRUNCATIONS = [
    {},
    {"top_p": 0.8},
    {"top_k": 5},
    {"min_p": 0.2},
    {"min_p": 0.05, "top_k": 6, "top_p": 0.9},
    {"top_k": 1},
    {"top_p": 1e-6},
]


def naive_kept(p: list[float], params: SamplingParams) -> set[int]:
    """Tokens that remain of a distribution: min_p, then the top k, then the nucleus of what these leave."""
    order = sorted(range(len(p)), key=lambda token: -p[token])
    order = [token for token in order if p[token] >= params.min_p * p[order[0]]]
    order = order[: params.top_k or None]
    total, mass, kept = sum(p[token] for token in order), 0.0, set()
    for token in order:
        if mass >= params.top_p * total:
            break
        kept.add(token)
        mass += p[token]
    return kept


@pytest.mark.parametrize("settings", TRUNCATIONS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_fit_the_distribution(temperature, settings):
    count, generator = 20_000, torch.Generator().manual_seed(3)
    logits = 1.5 * torch.randn(12, generator=generator)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    params = SamplingParams(1, temperature, logps=True, **settings)
    tokens, logps = draw(logits.expand(count, -1), uniform, params)
    p = (logits.double() / temperature).softmax(-1).tolist()
    kept = naive_kept(p, params)
    p = [value * (token in kept) / sum(p[other] for other in kept) for token, value in enumerate(p)]
    observed = torch.bincount(tokens, minlength=12).tolist()
    assert all(observed[token] == 0 for token in range(12) if token not in kept)
    if len(kept) > 1:
        assert chisquare([observed[token] for token in kept], [count * p[token] for token in kept]).pvalue > 0.01
    assert logps.tolist() == pytest.approx([math.log(p[token]) for token in tokens.tolist()], abs=1e-5)


@pytest.mark.parametrize("settings", TRUNCATIONS)
def test_truncation_is_that_of_transformers(settings):
    params = SamplingParams(1, 0.7, **settings)
    logits = 2 * torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    warpers = [TemperatureLogitsWarper(0.7)]
    warpers += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    expected = logits.clone()
    for warper in warpers:
        expected = warper(None, expected)
    weights = truncate(((logits - logits.amax(-1, keepdim=True)) / 0.7).exp(), params)
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), expected.softmax(-1))


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=12, unique=True),
    st.floats(0.01, 1),
    st.integers(0, 14),
    st.floats(0, 1),
)
def test_truncations_keep_what_their_definitions_say(counts, top_p, top_k, min_p):
    params = SamplingParams(1, top_p=top_p, top_k=top_k, min_p=min_p)
    p = [count / sum(counts) for count in counts]
    kept = naive_kept(p, params)
    for nudge in (-1e-5, 1e-5):  # no border within rounding of a token
        near = SamplingParams(1, top_p=min(1, top_p + nudge), top_k=top_k, min_p=min(1, max(0, min_p + nudge)))
        assume(naive_kept(p, near) == kept)
    weights = truncate(torch.tensor([p]) / max(p), params)[0]
    assert set(weights.nonzero()[:, 0].tolist()) == kept
    assert all(weights[token].item() == pytest.approx(p[token] / max(p)) for token in kept)


def test_tokens_as_probable_as_the_last_one_kept_are_kept():
    weights = torch.tensor([[0.5, 1.0, 0.5, 0.25]])
    for params in (SamplingParams(1, top_k=2), SamplingParams(1, top_p=0.6), SamplingParams(1, min_p=0.5)):
        assert truncate(weights, params).tolist() == [[0.5, 1.0, 0.5, 0.0]]


def test_a_draw_is_the_inverse_of_the_distribution_function():
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens, _ = draw(logits, uniform, SamplingParams(1, 0.8))
    cumulative = (logits.double() / 0.8).softmax(-1).cumsum(-1)
    assert tokens.tolist() == (cumulative > uniform[:, None]).int().argmax(-1).tolist()


def test_the_ends_of_the_unit_interval_draw_possible_tokens():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(3, -1)
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    tokens, logps = draw(logits, uniform, SamplingParams(1, logps=True))
    assert tokens.tolist() == [1, 3, 3]
    assert logps.tolist() == pytest.approx([-math.log(2)] * 3)


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_extreme_temperatures_stay_finite(temperature):
    logits = 30 * torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens, logps = draw(logits, uniform, SamplingParams(1, temperature, logps=True))
    expected = (logits.double() / temperature).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("damage", [[0.0, math.nan, 1.0], [0.0, math.inf, 1.0], [-math.inf] * 3])
def test_logits_that_are_not_finite_draw_no_token(damage, temperature):
    logits = torch.tensor([[0.0, 1.0, 2.0], damage])
    for logps in (False, True):
        tokens, _ = draw(logits, torch.tensor([0.5, 0.5]).double(), SamplingParams(1, temperature, logps=logps))
        assert tokens[0] < 3
        assert tokens[1] == 3


def test_greedy_decoding_takes_the_most_probable_token_and_its_untempered_logp():
    logits = torch.randn(100, 40, generator=torch.Generator().manual_seed(0))
    tokens, logps = draw(logits, torch.zeros(100).double(), SamplingParams(1, 0.0, logps=True))
    expected, best = logits.double().log_softmax(-1).max(-1)
    assert tokens.tolist() == best.tolist()
    torch.testing.assert_close(logps, expected)
