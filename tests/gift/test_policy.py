"""The clipped loss against a loop over tokens in float64, written from verl's definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gift.policy import clipped_policy_loss, group_advantages

LOGP = st.floats(-30, 0)
TOKENS = st.lists(st.tuples(LOGP, LOGP, st.floats(-3, 3)), min_size=1, max_size=8)
CLIPS = st.tuples(st.floats(0, 0.9), st.floats(0, 2), st.sampled_from([0.0, 1.5, 3.0, 10.0]))


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
def test_an_extreme_ratio_stays_finite(gap, advantage):
    logp = torch.tensor([gap], requires_grad=True)
    loss, _ = clipped_policy_loss(
        logp, torch.zeros(1), torch.tensor([advantage]), clip_low=0.2, clip_high=0.2, dual_clip=0.0
    )
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logp.grad.isfinite().all()


@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 2**31))
def test_advantages_are_centred_by_group_and_not_scaled(prompts, group, seed):
    rewards = torch.rand(prompts, group, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    advantages = group_advantages(rewards)
    for row in range(prompts):
        mean = sum(rewards[row].tolist()) / group
        assert advantages[row].tolist() == pytest.approx([reward - mean for reward in rewards[row].tolist()], abs=1e-15)
    assert not group_advantages(torch.ones(2, group)).any()
