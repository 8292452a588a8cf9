"""Advantages, losses and reductions against loops in float64, written from their definitions."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import naive_rl
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gift.policy import (
    TokenInputs,
    clipped_policy_loss,
    demonstration_loss,
    group_advantages,
    kl_estimate,
    token_weight,
    truncated_importance,
    update_loss,
)
from gift.recipe import RL, Luffy

LOGP = st.floats(-30, 0)
TOKENS = st.lists(st.tuples(LOGP, LOGP, st.floats(-3, 3)), min_size=1, max_size=8)
CLIPS = st.tuples(st.floats(0, 0.9), st.floats(0, 2), st.sampled_from([0.0, 1.5, 3.0, 10.0]))
LOGITS = st.lists(st.floats(-4, 4), min_size=2, max_size=6)


def one_token(logp, old, advantage, low, high, dual):
    """Loss, whether clipped, and d loss / d logp of one token, by cases."""
    gap = logp - old
    ratio = math.exp(min(max(gap, -20.0), 20.0))
    slope = ratio if -20 <= gap <= 20 else 0.0  # d ratio / d logp
    if advantage >= 0:
        if ratio > 1 + high:  # the upper clip binds: no more credit
            return -(1 + high) * advantage, advantage > 0, 0.0
        return -ratio * advantage, False, -slope * advantage
    if 0 < dual < ratio:  # the second clip binds: no more blame
        return -dual * advantage, True, 0.0
    if ratio < 1 - low:  # the lower clip binds
        return -(1 - low) * advantage, True, 0.0
    return -ratio * advantage, False, -slope * advantage


@settings(deadline=None)
@given(TOKENS, CLIPS)
def test_loss_clip_and_gradient_are_those_of_the_loop(tokens, clips):
    low, high, dual = clips
    for logp, old, _ in tokens:  # where a clip begins, the gradient is either side's
        ratio = math.exp(min(max(logp - old, -20), 20))
        assume(all(abs(ratio - edge) > 1e-9 for edge in (1 - low, 1 + high, dual)) and abs(abs(logp - old) - 20) > 1e-9)
    logp, old, advantages = (torch.tensor(column, dtype=torch.float64) for column in zip(*tokens, strict=True))
    logp.requires_grad_()
    loss, active = clipped_policy_loss(logp, old, advantages, clip_low=low, clip_high=high, dual_clip=dual)
    loss.sum().backward()
    expected = [one_token(*token, low, high, dual) for token in tokens]
    for index, (value, clipped, slope) in enumerate(expected):
        assert loss[index].item() == pytest.approx(value, rel=1e-12, abs=1e-300)
        assert active[index].item() == clipped
        assert logp.grad[index].item() == pytest.approx(slope, rel=1e-12, abs=1e-300)


def test_first_update_is_plain_policy_gradient():
    logp = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantages = torch.tensor([0.5, -0.25, 0.0])
    loss, active = clipped_policy_loss(logp, logp.detach(), advantages, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    loss.sum().backward()
    assert torch.equal(logp.grad, -advantages)  # a good token becomes likelier, a bad one less likely
    assert not active.any()


@pytest.mark.parametrize("gap", [-1e4, 1e4])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
@pytest.mark.parametrize("options", [{"dual_clip": 0.0}, {"clip": False}, {"kl_coef": 1.0}])
def test_an_extreme_ratio_stays_finite(gap, advantage, options):
    logp = torch.tensor([gap], requires_grad=True)
    zero = torch.zeros(1)
    inputs = TokenInputs(zero, torch.tensor([advantage]), torch.ones(1), zero.bool(), ref_logp=zero)
    loss, _ = update_loss(logp, zero, inputs, RL(**options))
    loss.backward()
    assert loss.isfinite()
    assert logp.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Advantages


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 2**31), st.booleans())
def test_advantages_are_centred_by_group_and_scaled_on_demand(prompts, group, seed, normalize_std):
    rewards = torch.rand(prompts, group, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    advantages = group_advantages(rewards, normalize_std=normalize_std)
    for row in rewards.tolist():
        scale = statistics.stdev(row) + 1e-6 if normalize_std else 1.0
        expected = [(reward - statistics.fmean(row)) / scale for reward in row]
        assert advantages[rewards.tolist().index(row)].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-14)


@settings(deadline=None)
@given(st.floats(-10, 10), st.integers(2, 9), st.booleans())
def test_equal_rewards_give_no_advantage_at_all(reward, group, normalize_std):
    # 0.1 is not the mean of seven 0.1s in floating point: without care, a residue would be divided by 1e-6
    rewards = torch.full((2, group), reward, dtype=torch.float64)
    assert not group_advantages(rewards, normalize_std=normalize_std).any()


# ---------------------------------------------------------------------------------------------------------------------
# Terms


@settings(deadline=None)
@given(LOGP, st.floats(-3, 3), st.floats(0.01, 1))
def test_a_demonstrations_loss_and_slope_are_luffys(logp, advantage, gamma):
    found = torch.tensor([logp], dtype=torch.float64, requires_grad=True)
    loss = demonstration_loss(found, torch.tensor([advantage], dtype=torch.float64), gamma=gamma)
    loss.sum().backward()
    prob = math.exp(logp)
    assert loss.item() == pytest.approx(-advantage * prob / (prob + gamma), rel=1e-9)
    assert found.grad.item() == pytest.approx(-advantage * gamma * prob / (prob + gamma) ** 2, rel=1e-9)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 0), st.floats(-9, 0)), min_size=1, max_size=8))
def test_kl_estimators_are_their_formulas(pairs):
    logp, ref_logp = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    for index, (a, b) in enumerate(pairs):
        k3 = math.exp(b - a) - 1 - (b - a)
        formulas = {"k1": a - b, "k2": (a - b) ** 2 / 2, "k3": min(k3, 10.0)}
        for name, expected in formulas.items():
            found = kl_estimate(logp, ref_logp, name)[index].item()
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-13)
            assert name == "k1" or found >= 0


@settings(deadline=None)
@given(LOGITS, st.randoms(use_true_random=False))
def test_kl_estimators_have_the_mean_and_slope_they_are_used_for(logits, rng):
    """Means over pi are taken by enumeration: k1 and k3 average to the divergence, k2's slope to the divergence's."""
    z = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    ref_logp = torch.tensor([rng.uniform(-2, 2) for _ in logits], dtype=torch.float64).log_softmax(-1)
    logp = z.log_softmax(-1)
    pi = logp.exp()
    divergence = (pi * (logp - ref_logp)).sum()
    (slope,) = torch.autograd.grad(divergence, z, retain_graph=True)
    assume(float((ref_logp - logp).detach().max()) < 2)  # k3 is clamped at 10
    means = {name: (pi.detach() * kl_estimate(logp, ref_logp, name)).sum() for name in ("k1", "k2", "k3")}
    slopes = {name: torch.autograd.grad(mean, z, retain_graph=True)[0] for name, mean in means.items()}
    assert means["k1"].item() == pytest.approx(divergence.item(), abs=1e-12)
    assert means["k3"].item() == pytest.approx(divergence.item(), abs=1e-12)
    torch.testing.assert_close(slopes["k2"], slope, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(slopes["k1"], torch.zeros_like(slope), rtol=0, atol=1e-12)


@settings(deadline=None)
@given(st.lists(st.tuples(LOGP, LOGP), min_size=1, max_size=8), st.floats(1, 5))
def test_importance_is_the_truncated_ratio_and_a_constant(pairs, cap):
    old, generator = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    weights = truncated_importance(old.requires_grad_(), generator, cap)
    expected = [min(math.exp(max(a - b, -20)), cap) for a, b in pairs]
    assert weights.tolist() == pytest.approx(expected, rel=1e-12)
    assert not weights.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# The loss of an update

AGGREGATIONS = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_sum_norm"]
PLAIN = RL(max_tokens=9)
VARIANTS = [
    *(replace(PLAIN, aggregation=name) for name in AGGREGATIONS),
    replace(PLAIN, aggregation="seq_sum_norm", norm_length=4),
    replace(PLAIN, clip=False),
    replace(PLAIN, clip_low=0.1, clip_high=0.6, dual_clip=0.0),
    replace(PLAIN, dual_clip=1.2, temperature=0.7),
    *(replace(PLAIN, kl_coef=0.3, kl_estimator=name, aggregation="seq_mean_token_mean") for name in ("k1", "k2", "k3")),
    replace(PLAIN, entropy_coef=0.2, aggregation="seq_mean_token_sum"),
    replace(PLAIN, importance_cap=1.3),
    replace(PLAIN, clip=False, entropy_coef=0.05, aggregation="seq_sum_norm", luffy=Luffy(gamma=0.3)),
    replace(PLAIN, clip=False, kl_coef=0.1, entropy_coef=0.05, importance_cap=1.1, temperature=1.4),
]


def random_responses(seed: int, vocab: int = 5) -> list[naive_rl.Response]:
    """Responses of one to five tokens; old and reference policies far enough away for every clip to bind somewhere."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    responses = []
    for number in range(rng.randint(2, 6)):
        length = rng.randint(1, 5)
        logits = torch.randn(length, vocab, generator=generator, dtype=torch.float64, requires_grad=True)
        tokens = [rng.randrange(vocab) for _ in range(length)]
        logp = logits.detach().log_softmax(-1)
        near = [[float(logp[t, tokens[t]]) + rng.gauss(0, 0.6) for t in range(length)] for _ in range(3)]
        responses.append(naive_rl.Response(logits, tokens, rng.uniform(-1, 1), *near, demonstration=number == 1))
    return responses


def our_loss(responses: list[naive_rl.Response], options: RL, pieces: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss by gift.policy, from what a micro-batch gives it; cut in pieces it is the sum of theirs."""
    sizes = {
        "tokens": sum(len(response.tokens) for response in responses),
        "sequences": len(responses),
        "norm_length": options.norm_length or options.max_tokens,
    }
    total, logged = torch.zeros((), dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for start in range(pieces):
        piece = responses[start::pieces]
        logp = torch.cat([(response.logits / options.temperature).log_softmax(-1) for response in piece])
        labels = torch.tensor([token for response in piece for token in response.tokens])

        def column(values, dtype=torch.float64):
            return torch.tensor([value for row in values for value in row], dtype=dtype)

        lengths = [len(response.tokens) for response in piece]
        weights = [[token_weight(options.aggregation, n, **sizes)] * n for n in lengths]
        old, generator = (
            column(getattr(response, name) for response in piece) for name in ("old_logp", "generator_logp")
        )
        demonstration = column(
            ([response.demonstration] * n for response, n in zip(piece, lengths, strict=True)), torch.bool
        )
        inputs = TokenInputs(
            torch.where(demonstration, 0, old),
            column([response.advantage] * n for response, n in zip(piece, lengths, strict=True)),
            column(weights),
            demonstration,
            column(response.ref_logp for response in piece) if options.kl_coef else None,
            truncated_importance(old, generator, options.importance_cap) if options.importance_cap else None,
        )
        entropy = -(logp.exp() * logp).sum(-1)
        loss, sums = update_loss(logp.gather(1, labels[:, None])[:, 0], entropy, inputs, options)
        total, logged = total + loss, logged + sums
    return total, logged


@settings(max_examples=20, deadline=None)
@pytest.mark.parametrize("options", VARIANTS)
@given(seed=st.integers(0, 2**31), pieces=st.integers(1, 2))
def test_every_option_is_the_naive_loss_in_value_and_gradient(options, seed, pieces):
    responses = random_responses(seed)
    logits = [response.logits for response in responses]
    mine, _ = our_loss(responses, options, pieces)
    theirs = naive_rl.update_loss(responses, options)
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-9, abs=1e-12)
    gradients = torch.autograd.grad(mine, logits), torch.autograd.grad(theirs, logits)
    for ours, naive in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-8, atol=1e-11)


def test_what_is_logged_leaves_demonstrations_out():
    responses = random_responses(4)
    options = replace(PLAIN, kl_coef=0.1, kl_estimator="k2")
    _, logged = our_loss(responses, options)
    drawn, clipped, moved, kl = 0, 0, 0.0, 0.0
    for response in responses:
        for t, token in enumerate(response.tokens):
            if response.demonstration:
                continue
            logp = float(response.logits[t].detach().log_softmax(-1)[token])
            drawn += 1
            clipped += one_token(logp, response.old_logp[t], response.advantage, 0.2, 0.2, 3.0)[1]
            moved += response.old_logp[t] - logp
            kl += (logp - response.ref_logp[t]) ** 2 / 2
    assert 0 < clipped < drawn
    assert logged.tolist() == pytest.approx([drawn, clipped, moved, kl])


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="token_median"):
        token_weight("token_median", 1, tokens=1, sequences=1, norm_length=1)
