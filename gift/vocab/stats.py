"""Statistics of the LM head as tensors that any loss can be made of: logits are computed again in the backward pass.

The forward pass keeps running softmax sums over blocks of the vocabulary (online softmax).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gift.vocab.head import (
    Coefficients,
    DenseReference,
    Head,
    LogitMap,
    VocabStats,
    add_product,
    buffers,
    check_head,
    check_labels,
    check_reference,
    slices,
    sum_dtype,
    unmasked_size,
    view,
)

TILE_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
TILE_TOKENS = {"cpu": 1024, "cuda": 4096}


def vocab_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> VocabStats:
    """Statistics of the softmax over the logits of each token, with gradients, in memory independent of N * V.

    Shapes: hidden [N, H], weight [V, H], labels [N] int64, bias [V]; of the reference, which is held constant,
    ref_hidden [N, H_ref], ref_weight [V, H_ref], ref_bias [V]. `temperature`, `scale` and `softcap` act on both models'
    logits (see the package). Tiles are [chunk_tokens, chunk_vocab]: their size changes speed and memory, not results.

    Without tokens (N = 0) the statistics are empty but part of the graph: gradients are zeros, not None.

    Raises ValueError where shapes, dtypes or options do not fit together, IndexError for a label outside [0, V).
    """
    check_head(hidden, weight, bias)
    if (ref_hidden is None) != (ref_weight is None):
        raise ValueError("give both ref_hidden and ref_weight, or neither")
    if ref_hidden is not None and ref_weight is not None:
        check_reference(DenseReference(ref_hidden, ref_weight, ref_bias), hidden, weight)
    check_labels(labels, len(hidden), len(weight))
    logit_map = LogitMap(temperature, scale, softcap)
    for name, size in (("chunk_tokens", chunk_tokens), ("chunk_vocab", chunk_vocab)):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    tile = _tile_shape(hidden, len(weight), chunk_tokens, chunk_vocab)
    logp, entropy, mean_logp, ref_ce, ref_logp, ref_entropy = _VocabStats.apply(
        hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, logit_map, tile
    )
    return VocabStats(logp, entropy, mean_logp, ref_ce, ref_logp, ref_entropy, vocab_size=unmasked_size(weight, bias))


def _tile_shape(hidden: Tensor, vocab: int, chunk_tokens: int | None, chunk_vocab: int | None) -> tuple[int, int]:
    """Rows and columns of a tile. Nearly square blocks, unlike [few tokens, V], keep the matrix products efficient."""
    kind = "cuda" if hidden.is_cuda else "cpu"
    rows = max(1, min(chunk_tokens or TILE_TOKENS[kind], len(hidden)))
    columns = chunk_vocab or TILE_BYTES[kind] // (4 * rows)
    return rows, max(1, min(columns, vocab))


class _OnlineSoftmax:
    """Softmax sums of N tokens over blocks of the vocabulary, relative to the largest logit so far.

    `moments[k]` accumulates sum_v exp(z_v - max) x_v for a quantity x; divided by `total` it is the mean of x.
    """

    def __init__(self, moments: int, labels: Tensor, dtype: torch.dtype) -> None:
        self.labels = labels
        self.total = torch.zeros(labels.shape, dtype=dtype, device=labels.device)
        self.max = torch.full_like(self.total, -math.inf)
        self.label_logit = torch.zeros_like(self.total)
        self.moments = self.total.repeat(moments, 1)

    def update(self, rows: slice, columns: slice, logits: Tensor, buffer: Tensor) -> Tensor:
        """Adds a tile of logits; returns exp(logits - max so far), written into the flat `buffer`."""
        inside, index = _locate(self.labels[rows], columns)
        self.label_logit[rows] = torch.where(inside, logits.gather(1, index)[:, 0], self.label_logit[rows])
        top = torch.maximum(self.max[rows], logits.amax(-1))
        decay = torch.exp(self.max[rows] - top)
        exps = torch.sub(logits, top[:, None], out=view(buffer, logits.shape)).exp_()
        self.max[rows] = top
        self.total[rows] = self.total[rows] * decay + exps.sum(-1)
        self.moments[:, rows] *= decay
        return exps

    def logsumexp(self) -> Tensor:
        return self.max + self.total.log()

    def mean(self, moment: int) -> Tensor:
        return self.moments[moment] / self.total


class _VocabStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        logit_map: LogitMap,
        tile: tuple[int, int],
    ) -> tuple[Tensor | None, ...]:
        dtype = sum_dtype(hidden, weight)
        student, sums = Head(hidden, weight, bias, dtype, logit_map), _OnlineSoftmax(1, labels, dtype)
        reference, ref_sums = None, _OnlineSoftmax(2, labels, dtype)
        if ref_hidden is not None and ref_weight is not None:
            reference = Head(ref_hidden, ref_weight, ref_bias, dtype, logit_map)
        logit_sum = torch.zeros_like(sums.total)
        z_buffer, exp_buffer, *ref_buffer = buffers(3 if reference else 2, tile, sums.total)

        for columns in slices(len(weight), tile[1]):
            student.load(columns)
            if reference:
                reference.load(columns)
            for rows in slices(len(hidden), tile[0]):
                z = student.logits(rows, z_buffer)
                logit_sum[rows] += student.logit_sum(z)
                exps = sums.update(rows, columns, z, exp_buffer)
                sums.moments[0, rows] += exps.mul_(z).sum(-1)
                if reference:
                    ref_z = reference.logits(rows, ref_buffer[0])
                    exps = ref_sums.update(rows, columns, ref_z, exp_buffer)
                    ref_sums.moments[0, rows] += ref_z.mul_(exps).sum(-1)
                    ref_sums.moments[1, rows] += exps.mul_(z).sum(-1)

        lse, ref_lse = sums.logsumexp(), ref_sums.logsumexp()
        logp = student.hide(sums.label_logit - lse, labels)
        entropy = lse - sums.mean(0)
        mean_logp = logit_sum / student.unmasked_size - lse
        ctx.save_for_backward(hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, lse, entropy, ref_lse)
        ctx.logit_map, ctx.tile, ctx.dtype = logit_map, tile, dtype
        ctx.set_materialize_grads(False)
        if reference is None:
            return logp, entropy, mean_logp, None, None, None
        ref_logp = reference.hide(ref_sums.label_logit - ref_lse, labels)
        ref_entropy = ref_lse - ref_sums.mean(0)
        ctx.mark_non_differentiable(ref_logp, ref_entropy)
        ref_ce = lse - ref_sums.mean(1)
        if student.masks_more_than(reference):
            ref_ce.fill_(math.inf)
        return logp, entropy, mean_logp, ref_ce, ref_logp, ref_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, lse, entropy, ref_lse = ctx.saved_tensors
        student, reference = Head(hidden, weight, bias, ctx.dtype, ctx.logit_map), None
        coefficients = Coefficients.of(grads[:4], entropy, student)
        if coefficients.ref is not None:
            reference = Head(ref_hidden, ref_weight, ref_bias, ctx.dtype, ctx.logit_map)
        dz_buffer, buffer = buffers(2, ctx.tile, lse)

        def tile_gradient(rows: slice, columns: slice, local: Tensor) -> Tensor:
            """dz of a tile; `local` are those of its rows that involve the reference."""
            z, of_rows = student.logits(rows, dz_buffer), coefficients[rows]
            damping = ctx.logit_map.damping(z)
            dz = of_rows.begin(z, lse[rows], view(buffer, z.shape), student.unmasked)
            if of_rows.label is not None:
                inside, index = _locate(labels[rows], columns)
                dz.scatter_add_(1, index, torch.where(inside, of_rows.label, 0)[:, None])
            if coefficients.ref is not None and reference and len(local):
                tokens = local + rows.start
                p = reference.logits(tokens, buffer).sub_(ref_lse[tokens, None]).exp_()
                dz.index_add_(0, local, p.mul_(coefficients.ref[tokens, None]), alpha=-1)
            return student.finish(dz, damping)

        surprised = _exceeds_rounding(coefficients)  # tokens whose gradient involves the reference
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden, dtype=ctx.dtype) if wants_hidden else None
        d_weight = torch.zeros_like(weight) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=ctx.dtype) if wants_bias else None
        chunks = [(rows, surprised[rows].nonzero()[:, 0]) for rows in slices(len(hidden), ctx.tile[0])]
        for columns in slices(len(weight), ctx.tile[1]):
            student.load(columns)
            if reference:
                reference.load(columns)
            d_block = None if d_weight is None else d_weight[columns].to(ctx.dtype)  # a view if no cast is needed
            for rows, local in chunks:
                dz = tile_gradient(rows, columns, local)
                if d_bias is not None:
                    d_bias[columns] += dz.sum(0)
                dz = dz.to(student.operand_dtype)
                if d_hidden is not None:
                    add_product(d_hidden[rows], dz, student.block)
                if d_block is not None:
                    add_product(d_block, dz.T, student.states(rows))
            if d_weight is not None and d_block is not None and d_weight.dtype != ctx.dtype:
                d_weight[columns] = d_block
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            d_weight,
            None if d_bias is None else d_bias.to(bias.dtype),
            *[None] * 6,
        )


def _exceeds_rounding(coefficients: Coefficients) -> Tensor:
    """Which tokens [N] have a coefficient of the reference that exceeds the rounding error of that of their label.

    Under GIFT the others are those where the base model is not surprised: their backward pass costs what SFT's costs.
    """
    label, ref = coefficients.label, coefficients.ref
    if ref is None:
        return torch.zeros_like(coefficients.pi, dtype=torch.bool)
    return ref.abs() > (0 if label is None else torch.finfo(ref.dtype).eps / 2 * label.abs())


def _locate(labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which labels [n] lie in a block of the vocabulary, and their columns in it [n, 1] (0 for the others)."""
    inside = (labels >= columns.start) & (labels < columns.stop)
    return inside, torch.where(inside, labels - columns.start, 0)[:, None]
