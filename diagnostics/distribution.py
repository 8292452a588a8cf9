"""How far two checkpoints' next-token distributions lie apart, token by token, from their states and LM heads.

Numerical policy. Two checkpoints one RL step apart differ by 1e-6 nats and less, where the textbook sum over
p (log p - log q) in float32 is all rounding error, often negative. So: logits in float32 (bfloat16 logits have a noise
floor near 3e-5 nats and tie at the boundary of the top 10 in a fifth of all rows), with reduced-precision matrix
products off; everything after the logits in float64; and each divergence as a sum of terms that are all >= 0:

    KL(p||q) = sum_v  p (log p - log q) - p + q           JS(p, q) = 1/2 sum_v  p log(p/m) + q log(q/m),  m = (p+q)/2

with p - q taken from expm1 of the log-ratio, so that equal logits give exactly 0.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from gift.cli import UserError

TOP_K = (1, 5, 10, 20, 50, 100)
CHUNK_LOGITS = 2**23  # logits per side and chunk: about 0.7 GB of temporaries


@torch.no_grad()
def compare(
    hidden_a: Tensor,
    weight_a: Tensor,
    hidden_b: Tensor,
    weight_b: Tensor,
    labels: Tensor,
    *,
    top_k: Sequence[int] = TOP_K,
    bias_a: Tensor | None = None,
    bias_b: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> dict[str, Tensor]:
    """Per-token distances between p_a = softmax(hidden_a weight_a^T + bias_a) and p_b; a is the earlier checkpoint.

    hidden_a [N, H_a], hidden_b [N, H_b]: states before the LM head at the same N positions; the widths may differ.
    weight_a [V, H_a], weight_b [V, H_b], bias_a and bias_b [V] or None; labels [N] int64, the tokens that follow.

    Returns float64 [N] tensors on the device of `labels`, in nats but for `tv` and the overlaps:

        kl_new_old        KL(p_b || p_a)          kl_old_new   KL(p_a || p_b)
        js                Jensen-Shannon divergence, at most log 2
        tv                total variation distance, in [0, 1]
        topk_overlap_<K>  share of the K likeliest tokens that both have, for each K of `top_k` up to V; a larger K is
                          left out. Of equally likely tokens the one with the lower index counts as the likelier.
        nll_a, nll_b      -log p(label)           entropy_a, entropy_b   entropy of p

    Inputs narrower than float32 are cast to it, float64 stays. Products run on the device of the weights for
    `chunk_tokens` tokens at a time (by default as many as fill a fixed budget): memory beyond inputs and result does
    not grow with N. Raises UserError where the vocabularies or the numbers of tokens differ, or a label or K is out of
    range.
    """
    _check(hidden_a, weight_a, hidden_b, weight_b, labels, top_k, chunk_tokens)
    vocabulary = weight_a.shape[0]
    overlaps = sorted({k for k in top_k if k <= vocabulary})
    chunk = chunk_tokens or max(1, CHUNK_LOGITS // vocabulary)
    head_a, head_b = _Head(hidden_a, weight_a, bias_a), _Head(hidden_b, weight_b, bias_b)
    parts = []
    with full_precision(weight_a.device.type):
        for start in range(0, max(1, len(labels)), chunk):
            rows = slice(start, start + chunk)
            measured = _compare_logits(head_a.logits(rows), head_b.logits(rows), labels[rows], overlaps)
            parts.append({name: values.to(labels.device) for name, values in measured.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class _Head:
    """One side's states with its LM head, which is cast once rather than once a chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        self.hidden = hidden
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(weight.device, dtype)

    def logits(self, rows: slice) -> Tensor:
        """Logits [C, V] of these tokens."""
        return linear(self.hidden[rows].to(self.weight.device, self.weight.dtype), self.weight, self.bias)


def _compare_logits(logits_a: Tensor, logits_b: Tensor, labels: Tensor, overlaps: list[int]) -> dict[str, Tensor]:
    logits_b, labels = logits_b.to(logits_a.device), labels.to(logits_a.device).unsqueeze(1)
    shared = top_overlap(logits_a, logits_b, overlaps)
    logp_a, logp_b = logits_a.double().log_softmax(-1), logits_b.double().log_softmax(-1)
    del logits_a, logits_b
    p_a, p_b, gap = logp_a.exp(), logp_b.exp(), logp_a - logp_b
    nlls = [-logp.gather(1, labels).squeeze(1) for logp in (logp_a, logp_b)]
    entropies = [logp.mul_(p).sum(-1).neg() for logp, p in ((logp_a, p_a), (logp_b, p_b))]
    del logp_a, logp_b

    smaller, larger, distance = torch.minimum(p_a, p_b), torch.maximum(p_a, p_b), gap.abs()
    shrink = torch.expm1(-distance)  # smaller / larger - 1
    difference = torch.copysign(larger * shrink, gap)  # p_a - p_b without cancellation
    # Each summand is >= 0 but for the rounding of its last bit.
    kl_ab = (p_a * gap - difference).clamp_(min=0).sum(-1)
    kl_ba = (difference - p_b * gap).clamp_(min=0).sum(-1)
    # log(larger/m) = -log1p(shrink/2) and log(smaller/m) = log(larger/m) - distance.
    js = ((p_a + p_b) * torch.log1p(shrink / 2).neg_() - smaller * distance).clamp_(min=0).sum(-1) / 2
    return {
        "kl_new_old": kl_ba,
        "kl_old_new": kl_ab,
        "js": js.clamp_(max=math.log(2)),
        "tv": (difference.abs_().sum(-1) / 2).clamp_(max=1),
        **shared,
        "nll_a": nlls[0],
        "nll_b": nlls[1],
        "entropy_a": entropies[0],
        "entropy_b": entropies[1],
    }


def top_overlap(logits_a: Tensor, logits_b: Tensor, sizes: Sequence[int]) -> dict[str, Tensor]:
    """|TopK_a & TopK_b| / K for each K of the ascending `sizes` (each <= V), from logits [C, V]: float64 [C] each.

    A token is in both top-K sets exactly if the worse of its two ranks is below K: one search per side serves every K.
    """
    if not sizes:
        return {}
    deepest = sizes[-1]
    rank_a = torch.arange(deepest, device=logits_a.device, dtype=torch.int32).expand(len(logits_a), -1)
    rank_b = torch.full_like(logits_b, deepest, dtype=torch.int32)  # [C, V]; `deepest` for all outside the top
    rank_b.scatter_(1, top_tokens(logits_b, deepest), rank_a)
    worse = torch.maximum(rank_a, rank_b.gather(1, top_tokens(logits_a, deepest)))
    return {f"topk_overlap_{k}": (worse < k).sum(-1).double() / k for k in sizes}


def top_tokens(logits: Tensor, k: int) -> Tensor:
    """Indices [C, k] of each row's k largest logits [C, V], largest first and equal ones by index.

    torch.topk alone leaves open which of equal values it returns; only rows with a tie across the boundary are sorted.
    """
    values, indices = logits.topk(min(k + 1, logits.shape[1]))
    indices, order = indices.sort(-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    indices = indices.gather(1, order)
    if values.shape[1] > k:
        tied = values[:, k - 1] == values[:, k]
        if tied.any():
            indices[tied] = logits[tied].sort(dim=-1, descending=True, stable=True).indices[:, : k + 1]
    return indices[:, :k]


@contextlib.contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Float32 matrix products in float32: no TF32, no bfloat16, no autocast. What was set before is restored."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _check(
    hidden_a: Tensor,
    weight_a: Tensor,
    hidden_b: Tensor,
    weight_b: Tensor,
    labels: Tensor,
    top_k: Sequence[int],
    chunk_tokens: int | None,
) -> None:
    vocabulary = weight_a.shape[0]
    if vocabulary != weight_b.shape[0]:
        raise UserError(
            f"the LM heads have different vocabularies: {vocabulary} rows (a) and {weight_b.shape[0]} rows (b);"
            " compare checkpoints that share one"
        )
    if not len(hidden_a) == len(hidden_b) == len(labels):
        raise UserError(
            f"hidden_a, hidden_b and labels have {len(hidden_a)}, {len(hidden_b)} and {len(labels)} tokens;"
            " give the same positions on both sides"
        )
    for side, hidden, weight in (("a", hidden_a, weight_a), ("b", hidden_b, weight_b)):
        if hidden.shape[1] != weight.shape[1]:
            raise UserError(f"hidden_{side} has width {hidden.shape[1]}, but weight_{side} has {weight.shape[1]}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < vocabulary:
        raise UserError(
            f"labels range from {int(labels.min())} to {int(labels.max())}, outside the vocabulary of {vocabulary};"
            " leave out positions without a label"
        )
    if any(k < 1 for k in top_k):
        raise UserError(f"top_k has {min(top_k)}; give sizes of at least 1")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise UserError(f"chunk_tokens is {chunk_tokens}; give at least 1")
