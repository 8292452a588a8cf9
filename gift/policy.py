"""Advantages, policy losses and their reduction, as plain functions over per-token numbers.

A token's loss is the sum of up to three terms, weighted by the token's share of the update (`token_weight`):

    policy term      PPO's clipped or plain surrogate; LUFFY's shaped one for the tokens of a demonstration
    + kl_coef        x an estimate of KL(pi || pi_ref), pi_ref being the policy that RL began with
    - entropy_coef   x the policy's entropy

All numbers are of the distribution that is sampled from, after temperature.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gift.recipe import RL

STD_FLOOR = 1e-6  # added to a group's standard deviation, as in verl
MAX_LOG_RATIO = 20.0  # log-ratios are clamped to +-this before they are exponentiated, as in verl
MAX_K3 = 10.0  # k3 is clamped to +-this, as verl's low_var_kl


@dataclass(frozen=True)
class TokenInputs:
    """What the loss of an update reads of each of N response tokens beside the policy; every field is [N]."""

    old_logp: Tensor  # nats, of the policy that drew the token; 0 for a demonstration
    advantages: Tensor
    weights: Tensor  # the token's share of the update
    demonstration: Tensor  # bool: written by the expert, not drawn from the policy
    ref_logp: Tensor | None = None  # nats, of the policy that RL began with; where there is a KL term
    importance: Tensor | None = None  # factor of the policy term, where the generator is corrected for


def group_advantages(rewards: Tensor, *, normalize_std: bool = False) -> Tensor:
    """Reward minus its group's mean; divided by the group's standard deviation only on demand (paper, Appendix E).

    rewards: [prompts, group]. Returns the same shape; exactly 0 where all of a group earned the same. The standard
    deviation is the unbiased one plus 1e-6 (verl 0.4, core_algos.py); dividing by it favours prompts that are almost
    always or almost never solved (Dr. GRPO, arXiv 2503.20783).
    """
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if normalize_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + STD_FLOOR)
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return advantages.masked_fill(equal, 0)  # what rounding left of the mean


# ---------------------------------------------------------------------------------------------------------------------
# Terms, each per token


def clipped_policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate with a second clip where the advantage is negative (verl 0.4, core_algos.py).

    loss = max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(logp - old_logp); where A < 0 it is at most
    -dual_clip A, so that one improbable token cannot dominate a step (0 turns that off). clip_high > clip_low is DAPO's
    clip-higher.

    logp, old_logp, advantages: [N]. Returns the loss per token [N] and whether a clip was active [N].
    """
    ratio = policy_ratio(logp, old_logp)
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


def policy_ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """exp(logp - old_logp) [N], the exponent clamped to [-20, 20], so that it is finite."""
    return (logp - old_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def demonstration_loss(logp: Tensor, advantages: Tensor, *, gamma: float) -> Tensor:
    """LUFFY's off-policy term -A f(pi) with f(x) = x / (x + gamma), per token [N] (mix_src/mix_core_alg.py).

    The probability of the behaviour is taken to be 1 and nothing is clipped. The gradient passes through f: A times
    f (1 - f) = gamma pi / (pi + gamma)^2, which lifts improbable tokens more than -A pi would.
    """
    return -advantages * (logp - logp.new_tensor(gamma).log()).sigmoid()


def kl_estimate(logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
    """An estimate of KL(pi || pi_ref) in nats from the log-probabilities of tokens drawn from pi, per token [N].

    With d = logp - ref_logp: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (Schulman, "Approximating KL divergence").
    k1 and k3 have the right mean; k2 alone has, as a loss, the right gradient (that of k1 is zero in the mean). k3 is
    clamped to [-10, 10] and its exponent to [-20, 20] (verl 0.4, low_var_kl): no gradient beyond.
    """
    gap = logp - ref_logp
    if estimator == "k1":
        return gap
    if estimator == "k2":
        return gap.square() / 2
    gap = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (torch.expm1(-gap) + gap).clamp(-MAX_K3, MAX_K3)


def truncated_importance(old_logp: Tensor, generator_logp: Tensor, cap: float) -> Tensor:
    """min(exp(old_logp - generator_logp), cap) [N], a constant: what the trainer thinks of the generator's tokens.

    Both are of the same weights; where the generator computes otherwise than the trainer, its samples are slightly
    off-policy, and this factor corrects for it (truncated importance sampling; verl's and TRL's `tis`).
    """
    return policy_ratio(old_logp, generator_logp).clamp(max=cap).detach()


# ---------------------------------------------------------------------------------------------------------------------
# The update


def token_weight(aggregation: str, length: int, *, tokens: float, sequences: float, norm_length: float) -> float:
    """The share in an update's loss of each token of a response of `length` tokens.

    `tokens` and `sequences` are the update's, over all ranks and micro-batches, so that the loss does not depend on how
    the update is cut. With L_st the loss of token t of sequence s, n_s tokens in it, S sequences, T tokens:

        token_mean           sum_st L_st / T                 (the paper's and DAPO's)
        seq_mean_token_mean  mean_s of sum_t L_st / n_s      (the original GRPO)
        seq_mean_token_sum   mean_s of sum_t L_st
        seq_sum_norm         sum_st L_st / (S norm_length)   (Dr. GRPO)
    """
    match aggregation:
        case "token_mean":
            return 1 / tokens
        case "seq_mean_token_mean":
            return 1 / (sequences * length)
        case "seq_mean_token_sum":
            return 1 / sequences
        case "seq_sum_norm":
            return 1 / (sequences * norm_length)
    raise ValueError(f"unknown aggregation {aggregation!r}")


def update_loss(logp: Tensor, entropy: Tensor, inputs: TokenInputs, settings: RL) -> tuple[Tensor, Tensor]:
    """The share of N tokens in the loss of an update, a scalar, and [4] float64 sums of what is logged.

    logp, entropy: [N], of the policy, in nats. The sums run over the tokens drawn from the policy: how many they are,
    how many of them are clipped, old minus new log-probability, and the estimate of KL(pi || pi_ref) if there is one.
    The KL and entropy terms, as in LUFFY, include demonstrations.
    """
    if settings.clip:
        loss, clipped = clipped_policy_loss(
            logp,
            inputs.old_logp,
            inputs.advantages,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            dual_clip=settings.dual_clip,
        )
    else:
        loss = -policy_ratio(logp, inputs.old_logp) * inputs.advantages
        clipped = torch.zeros_like(inputs.demonstration)
    if inputs.importance is not None:
        loss = inputs.importance * loss
    shaped = demonstration_loss(logp, inputs.advantages, gamma=settings.luffy.gamma)
    loss = torch.where(inputs.demonstration, shaped, loss)
    kl = torch.zeros_like(loss)
    if inputs.ref_logp is not None:
        kl = kl_estimate(logp, inputs.ref_logp, settings.kl_estimator)
        loss = loss + settings.kl_coef * kl
    if settings.entropy_coef:
        loss = loss - settings.entropy_coef * entropy
    drawn = ~inputs.demonstration
    moved = inputs.old_logp - logp.detach()
    logged = torch.stack([part[drawn].double().sum() for part in (drawn, clipped, moved, kl.detach())])
    return (inputs.weights * loss).sum(), logged
