"""From a model's distribution over the whole vocabulary to the few entries a target needs.

Like `vocab_loss`, this holds a chunk of tokens with their whole vocabulary, [chunk, V], bounded in bytes: the largest
entries of a row are known only when all of them are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gift.vocab.head import DenseReference, Head, LogitMap, SparseReference, check_head, check_labels, slices, sum_dtype

Share = Callable[[Tensor], Tensor]
TILE_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
TOP_SIZES = (64, 512, 4096)  # how many of the largest entries are looked at in turn, before all of them are sorted


@torch.no_grad()
def truncate(
    reference: DenseReference,
    labels: Tensor,
    share: Share,
    tolerance: float,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[SparseReference, Tensor]:
    """The reference over N tokens with the fewest entries that keep every token's target within `tolerance`.

    A target that contains p with the factor share(log p(y)), [n] -> [n], changes by

        share (1 - p(y) - sum of the stored p(v))        in total variation

    when what is not stored counts as the label's. A token where that is within `tolerance` with nothing stored stores
    nothing; of any other, the largest entries besides the label are stored, as few as bring it within.

    Returns the entries and the mass [N] they leave out, 1 - p(y) - sum, both float32 (float64 for float64 inputs).
    Masses are summed in float64, over what is left out, so that small ones keep their digits.

    Raises ValueError where shapes or `tolerance` make no sense, IndexError for a label outside the vocabulary.
    """
    check_head(reference.hidden, reference.weight, reference.bias)
    vocab, total_tokens = len(reference.weight), len(reference.hidden)
    check_labels(labels, total_tokens, vocab)
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    dtype = sum_dtype(reference.hidden, reference.weight)
    head = Head(reference.hidden, reference.weight, reference.bias, dtype, LogitMap(scale=scale, softcap=softcap))
    head.load(slice(0, vocab))
    kind = "cuda" if labels.is_cuda else "cpu"
    size = max(1, min(chunk_tokens or TILE_BYTES[kind] // (dtype.itemsize * vocab), total_tokens))
    buffer, scratch = (torch.empty(size * vocab, dtype=dtype, device=labels.device) for _ in range(2))
    none, no_index = buffer.new_empty(0), labels.new_empty(0)
    columns: list[tuple[Tensor, ...]] = [(none, none, no_index, no_index, none, none)]
    for tokens in slices(total_tokens, size):
        logits, label = head.logits(tokens, buffer), labels[tokens, None]
        top = logits.amax(-1, keepdim=True)
        p = torch.sub(logits, top, out=scratch[: logits.numel()].view_as(logits)).exp_()
        total = p.sum(-1, keepdim=True)
        p.div_(total)
        lse = (top + total.log())[:, 0]
        logp = head.hide(logits.gather(1, label)[:, 0] - lse, labels[tokens])
        entropy = lse - logits.mul_(p).sum(-1)
        mass = p.scatter_(1, label, 0).sum(-1, dtype=torch.float64)
        factor = share(logp).double()
        (soft,) = (factor * mass > tolerance).nonzero(as_tuple=True)
        p.scatter_(1, label, -1)  # never among the largest
        rows = entries = no_index
        probs = none
        if len(soft):
            rows, entries, probs, mass[soft] = top_probabilities(p[soft], mass[soft], factor[soft], tolerance)
        columns.append((logp, entropy, soft[rows] + tokens.start, entries, probs, mass.to(dtype)))
    logp, entropy, rows, entries, probs, left_out = (torch.cat(parts) for parts in zip(*columns, strict=True))
    return SparseReference(logp, entropy, rows, entries, probs), left_out


def top_probabilities(p: Tensor, mass: Tensor, factor: Tensor, tolerance: float) -> tuple[Tensor, ...]:
    """The fewest largest entries of each row that leave out a mass of at most tolerance / factor.

    p: [n, V], with -1 at the label; mass [n] float64: the sum of the others; factor [n] float64.
    Returns rows [E] ascending, columns [E], both int64, probabilities [E], largest first, and the mass left out [n].
    """
    most = p.shape[1] - 1
    pending = torch.arange(len(p), device=p.device)
    left_out = torch.zeros_like(mass)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for k in (*(size for size in TOP_SIZES if size < most), most):
        values, indices = p[pending].topk(k)
        left = (mass[pending, None] - values.cumsum(-1, dtype=torch.float64)).clamp_(min=0)
        if k == most:
            left[:, -1] = 0  # but for rounding
        enough = factor[pending, None] * left <= tolerance
        done = enough[:, -1]
        counts = (~enough[done]).sum(-1) + 1
        kept = torch.arange(k, device=p.device) < counts[:, None]
        found.append((pending[done].repeat_interleave(counts), indices[done][kept], values[done][kept]))
        left_out[pending[done]] = left[done].gather(1, counts[:, None] - 1)[:, 0]
        pending = pending[~done]
        if not len(pending):
            break
    rows, columns, probs = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = rows.argsort(stable=True)
    return rows[order], columns[order], probs[order], left_out
