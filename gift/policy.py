"""Advantages and policy losses of stage 2, as plain functions over per-token scalars."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor) -> Tensor:
    """Reward minus its group's mean, not divided by the standard deviation (paper, Appendix E; Dr. GRPO).

    rewards: [prompts, group]. Returns the same shape; zero where all samples of a prompt earned the same.
    """
    return rewards - rewards.mean(dim=1, keepdim=True)


def clipped_policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate with a second clip where the advantage is negative (verl 0.4, core_algos.py).

    loss = max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(logp - old_logp); where A < 0 it is at most
    -dual_clip A, so that one improbable token cannot dominate a step (0 turns that off). The exponent is clamped to
    [-20, 20], as in verl, so that r is finite.

    logp, old_logp, advantages: [N]. Returns the loss per token [N] and whether a clip was active [N].
    """
    ratio = (logp - old_logp).clamp(-20, 20).exp()
    plain = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = torch.maximum(plain, clipped)
    active = clipped > plain
    if dual_clip > 0:
        bound = -dual_clip * advantages
        bounded = (advantages < 0) & (loss > bound)
        loss = torch.where(bounded, bound, loss)
        active = active | bounded
    return loss, active.detach()
