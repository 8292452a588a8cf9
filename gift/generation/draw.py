"""Drawing tokens: temperature, truncation, inverse CDF."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gift.generation import SamplingParams


def draw(logits: Tensor, uniform: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Tokens [rows], and their log-probabilities [rows] if asked for, from logits [rows, V].

    Draws by inverse CDF, in the vocabulary's order, at `uniform` [rows] in [0, 1): rounding in the logits moves the
    result only where a draw falls on the border of two tokens. Sums run in float64, so that a large vocabulary loses
    none of its tail. The token is V, which no vocabulary has, where the logits are not finite.
    """
    if params.temperature == 0:
        top, best = logits.max(-1)
        tokens = best.where(top.isfinite(), logits.shape[-1])
        return tokens, top.double() - logits.double().logsumexp(-1) if params.logps else None
    shifted = (logits - logits.amax(-1, keepdim=True)).div_(params.temperature)
    weights = truncate(shifted.exp(), params)
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1]
    # Below total, however u is rounded; the first sum above it belongs to a token of positive weight.
    tokens = torch.searchsorted(cumulative, (uniform * total)[:, None], right=True)[:, 0]
    if not params.logps:
        return tokens, None
    drawn = shifted.gather(-1, tokens.clamp(max=logits.shape[-1] - 1)[:, None])[:, 0]
    return tokens, drawn.double() - total.log()


def truncate(weights: Tensor, params: SamplingParams) -> Tensor:
    """Weights [rows, V], the largest of each row being 1, with zeros for what min_p, top_k and top_p take away.

    Tokens as probable as the least probable one that is kept are kept too.
    """
    if params.min_p > 0:
        weights = torch.where(weights >= params.min_p, weights, 0)
    ordered = weights
    if 0 < params.top_k < weights.shape[-1]:
        ordered = weights.topk(params.top_k, sorted=True).values
        weights = torch.where(weights >= ordered[:, -1:], weights, 0)
    if params.top_p < 1:
        weights = torch.where(weights >= nucleus_border(ordered, params.top_p), weights, 0)
    return weights


def nucleus_border(weights: Tensor, top_p: float) -> Tensor:
    """The least weight [rows, 1] in the smallest set of the heaviest whose share of weights [rows, V] reaches top_p."""
    ordered = sort_descending(weights)
    cumulative = ordered.cumsum(-1, dtype=torch.float64)
    size = torch.searchsorted(cumulative, top_p * cumulative[:, -1:]).clamp(max=weights.shape[-1] - 1)
    return ordered.gather(-1, size)


def sort_descending(values: Tensor) -> Tensor:
    """Each row in descending order. On a CPU numpy sorts values alone many times faster than torch, with indices."""
    if values.device.type == "cpu":
        return torch.from_numpy(-np.sort(-values.numpy(), axis=-1))
    return values.sort(-1, descending=True).values
