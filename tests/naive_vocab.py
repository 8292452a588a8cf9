"""The definitions of gift.vocab's statistics over materialized logits, for its tests: log_softmax in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PARAMETERS = ("hidden", "weight", "bias")


def random_inputs(
    seed: int, tokens: int, vocab: int, width: int, *, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> dict[str, Tensor]:
    """Everything vocab_stats takes, in `dtype`; the reference is of another width."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    inputs = {"hidden": normal(tokens, width), "weight": normal(vocab, width), "bias": normal(vocab)}
    inputs |= {
        "ref_hidden": normal(tokens, width + 1),
        "ref_weight": normal(vocab, width + 1),
        "ref_bias": normal(vocab),
    }
    return inputs | {"labels": torch.randint(vocab, (tokens,), generator=generator)}


def expectation(probabilities: Tensor, values: Tensor) -> Tensor:
    """Row sums of probabilities * values in which 0 * (-inf) is 0."""
    return (probabilities * values.masked_fill(probabilities == 0, 0)).sum(-1)


def naive(
    inputs: dict[str, Tensor], temperature: float = 1.0, scale: float = 1.0, softcap: float | None = None
) -> dict[str, Tensor]:
    """The definitions of VocabStats's fields, over whole matrices."""

    def log_softmax(prefix: str) -> Tensor:
        logits = inputs[f"{prefix}hidden"] @ inputs[f"{prefix}weight"].T
        bias = inputs.get(f"{prefix}bias", logits.new_zeros(1))
        logits = scale * (logits + bias)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return torch.log_softmax(logits.masked_fill(bias.isneginf(), -math.inf) / temperature, -1)

    log_pi, labels = log_softmax(""), inputs["labels"][:, None]
    stats = {
        "logp": log_pi.gather(1, labels)[:, 0],
        "entropy": -expectation(log_pi.exp(), log_pi),
        "mean_logp": log_pi[:, ~log_pi.isneginf().all(0)].mean(-1),
    }
    if "ref_hidden" not in inputs:
        return stats
    log_p = log_softmax("ref_")
    reference = {"ref_logp": log_p.gather(1, labels)[:, 0], "ref_entropy": -expectation(log_p.exp(), log_p)}
    return stats | reference | {"ref_ce": -expectation(log_p.exp(), log_pi)}


def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in float64, the parameters requiring gradients."""
    copies = {name: value.detach().double() if value.is_floating_point() else value for name, value in inputs.items()}
    return {name: value.requires_grad_(name in PARAMETERS) for name, value in copies.items()}
