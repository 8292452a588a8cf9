"""Per-token statistics of the LM head and their gradients: the only file that touches [tokens, vocab] matrices.

Every objective of this suite is a function of six numbers per token (`VocabStats`). They are computed tile by tile from
hidden states and head weights, so that no [tokens, vocab] matrix is ever held: the forward pass keeps running softmax
sums over blocks of the vocabulary (online softmax), the backward pass computes each tile of logits a second time.

With logits z, pi = softmax(z), reference p = softmax(z_ref), label y and upstream gradients g, one tile's gradient is

    dz = g_logp (onehot(y) - pi) - g_entropy pi (log pi + H(pi)) + g_mean_logp (1/V - pi) + g_ref_ce (pi - p)

Numerical policy. Logits, softmax and every sum over tokens or vocabulary are float32 (float64 for float64 inputs),
whatever the inputs' dtype; gradients are cast once, at the end. Rounding each tile's share of a weight gradient to
bfloat16 before summing would bias training. On CUDA, half-precision operands enter the matrix products as they are,
with float32 results; dz is rounded to their dtype there, as in an ordinary half-precision backward pass.

Masked vocabulary. A bias of -inf takes an entry out of the vocabulary: its probability is 0 and 0 * (-inf) counts as 0.
`mean_logp` is the mean over the entries that remain. Where a definition is infinite its value is: logp = -inf for a
masked label, ref_ce = +inf if the student masks an entry that the reference does not. No value or gradient is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
TILE_TOKENS = {"cpu": 1024, "cuda": 4096}
MASKED = -1e30  # stands for -inf inside a tile: finite, so that its product with a probability of 0 is 0


@dataclass(frozen=True)
class VocabStats:
    """What the LM head says about each of N tokens; every field is [N], in nats, float32 (float64 for float64 inputs).

    The first four are differentiable with respect to the student's hidden states, weight and bias, the others are
    constants. The fields of the reference are None if there is none, and `old_logp` where no old policy was given.
    """

    logp: Tensor  # log pi(y)
    entropy: Tensor  # -sum_v pi(v) log pi(v)
    mean_logp: Tensor  # mean_v log pi(v)
    ref_ce: Tensor | None = None  # -sum_v p(v) log pi(v)
    ref_logp: Tensor | None = None  # log p(y)
    ref_entropy: Tensor | None = None  # -sum_v p(v) log p(v)
    old_logp: Tensor | None = None  # log pi_old(y), of an earlier state of the policy


@dataclass(frozen=True)
class SparseReference:
    """What a frozen model says about N tokens, with only the largest of its probabilities: the rest counts as y's.

    It stands for the distribution p'(v) = p(v) at the E entries given, p'(y) = 1 - sum of these, 0 elsewhere.
    """

    logp: Tensor  # [N] log p(y) of the whole distribution
    entropy: Tensor  # [N] of the whole distribution
    rows: Tensor  # [E] int64, ascending: which token an entry belongs to
    columns: Tensor  # [E] int64: which entry of the vocabulary; never the token's label, none twice for a token
    probs: Tensor  # [E] p(v)


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
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> VocabStats:
    """Statistics of softmax(hidden @ weight.T + bias) for each token, with gradients, in memory independent of N * V.

    Shapes: hidden [N, H], weight [V, H], labels [N] int64, bias [V]; of the reference, which is held constant,
    ref_hidden [N, H_ref], ref_weight [V, H_ref], ref_bias [V]. Both models' logits are divided by `temperature`.
    Tiles are [chunk_tokens, chunk_vocab]: their size changes speed and memory, not the result.

    Without tokens (N = 0) the statistics are empty but part of the graph: gradients are zeros, not None.

    Raises ValueError where shapes, dtypes or options do not fit together, IndexError for a label outside [0, V).
    """
    _check_head(hidden, weight, bias, "")
    if (ref_hidden is None) != (ref_weight is None):
        raise ValueError("give both ref_hidden and ref_weight, or neither")
    if ref_hidden is not None and ref_weight is not None:
        _check_head(ref_hidden, ref_weight, ref_bias, "ref_")
        if len(ref_hidden) != len(hidden) or len(ref_weight) != len(weight):
            raise ValueError(
                f"student and reference differ: {len(hidden)} and {len(ref_hidden)} tokens,"
                f" vocabularies of {len(weight)} and {len(ref_weight)}"
            )
    _check_labels(labels, len(hidden), len(weight))
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    for name, size in (("chunk_tokens", chunk_tokens), ("chunk_vocab", chunk_vocab)):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    tile = _tile_shape(hidden, len(weight), chunk_tokens, chunk_vocab)
    return VocabStats(
        *_VocabStats.apply(hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, temperature, tile)
    )


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
        raise ValueError(f"{prefix}hidden must be [N, H] and {prefix}weight [V, H], got {shapes}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias must be [{len(weight)}], got {list(bias.shape)}")


def _check_labels(labels: Tensor, tokens: int, vocab: int) -> None:
    if labels.shape != (tokens,) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be [{tokens}] int64, got {list(labels.shape)} {labels.dtype}")
    if tokens:
        low, high = torch.stack(labels.aminmax()).tolist()
        if low < 0 or high >= vocab:
            raise IndexError(f"labels must lie in [0, {vocab}), got {low} to {high}: leave ignored tokens out")


def _tile_shape(hidden: Tensor, vocab: int, chunk_tokens: int | None, chunk_vocab: int | None) -> tuple[int, int]:
    """Rows and columns of a tile. Nearly square blocks, unlike [few tokens, V], keep the matrix products efficient."""
    kind = "cuda" if hidden.is_cuda else "cpu"
    rows = max(1, min(chunk_tokens or TILE_TOKENS[kind], len(hidden)))
    columns = chunk_vocab or TILE_BYTES[kind] // (4 * rows)
    return rows, max(1, min(columns, vocab))


class _Head:
    """One model's hidden states [N, H] and LM head: its logits, one block of the vocabulary at a time."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, temperature: float
    ) -> None:
        self.hidden, self.weight, self.dtype, self.temperature = hidden, weight, dtype, temperature
        common = torch.promote_types(hidden.dtype, weight.dtype)
        self.operand_dtype = common if hidden.is_cuda and common.itemsize == 2 else dtype
        self.bias = None if bias is None else bias.to(dtype).clamp(min=MASKED)
        self.masked = None  # [V] bool, if anything is masked
        self.unmasked_size = len(weight)
        if bias is not None and bias.isneginf().any():
            self.masked = bias.isneginf()
            self.unmasked_size -= int(self.masked.sum())
        if self.unmasked_size == 0:
            raise ValueError("the bias masks the whole vocabulary")

    def load(self, columns: slice) -> None:
        """Makes these entries of the vocabulary the current block; a cast of their weights happens here, once."""
        self.block = self.weight[columns].to(self.operand_dtype)
        self.block_bias = None if self.bias is None else self.bias[columns]
        self.unmasked = None if self.masked is None else (~self.masked[columns]).to(self.dtype)

    def states(self, rows: slice | Tensor) -> Tensor:
        """Hidden states of some tokens, as they enter a matrix product."""
        return self.hidden[rows].to(self.operand_dtype)

    def logits(self, rows: slice | Tensor, buffer: Tensor) -> Tensor:
        """The current block's logits of some tokens, written into the flat `buffer`."""
        states = self.states(rows)
        tile = _view(buffer, (len(states), len(self.block)))
        if self.operand_dtype == self.dtype:
            torch.mm(states, self.block.T, out=tile)
        else:
            torch.mm(states, self.block.T, out_dtype=self.dtype, out=tile)
        if self.block_bias is not None:
            tile.add_(self.block_bias)
        return tile if self.temperature == 1 else tile.div_(self.temperature)

    def hide(self, logp: Tensor, labels: Tensor) -> Tensor:
        """`logp` [N] with -inf where the label is masked."""
        return logp if self.masked is None else logp.masked_fill(self.masked[labels], -math.inf)


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
        exps = torch.sub(logits, top[:, None], out=_view(buffer, logits.shape)).exp_()
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
        temperature: float,
        tile: tuple[int, int],
    ) -> tuple[Tensor | None, ...]:
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        student, sums = _Head(hidden, weight, bias, dtype, temperature), _OnlineSoftmax(1, labels, dtype)
        reference, ref_sums = None, _OnlineSoftmax(2, labels, dtype)
        if ref_hidden is not None and ref_weight is not None:
            reference = _Head(ref_hidden, ref_weight, ref_bias, dtype, temperature)
        logit_sum = torch.zeros_like(sums.total)
        z_buffer, exp_buffer, *ref_buffer = _buffers(3 if reference else 2, tile, sums.total)

        for columns in _slices(len(weight), tile[1]):
            student.load(columns)
            if reference:
                reference.load(columns)
            for rows in _slices(len(hidden), tile[0]):
                z = student.logits(rows, z_buffer)
                logit_sum[rows] += z.sum(-1) if student.unmasked is None else z @ student.unmasked
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
        ctx.temperature, ctx.tile, ctx.dtype = temperature, tile, dtype
        ctx.set_materialize_grads(False)
        if reference is None:
            return logp, entropy, mean_logp, None, None, None
        ref_logp = reference.hide(ref_sums.label_logit - ref_lse, labels)
        ref_entropy = ref_lse - ref_sums.mean(0)
        ctx.mark_non_differentiable(ref_logp, ref_entropy)
        ref_ce = lse - ref_sums.mean(1)
        if student.masked is not None and (reference.masked is None or (student.masked & ~reference.masked).any()):
            ref_ce.fill_(math.inf)
        return logp, entropy, mean_logp, ref_ce, ref_logp, ref_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, lse, entropy, ref_lse = ctx.saved_tensors
        g_logp, g_entropy, g_mean, g_ce = (None if grad is None else grad / ctx.temperature for grad in grads[:4])
        student, reference = _Head(hidden, weight, bias, ctx.dtype, ctx.temperature), None
        surprised = torch.zeros_like(labels, dtype=torch.bool)  # tokens whose gradient involves the reference
        pi_factor = torch.zeros_like(lse)  # dz = pi * (pi_factor - g_entropy * log pi) + what is not a multiple of pi
        if g_logp is not None:
            pi_factor -= g_logp
        if g_entropy is not None:
            pi_factor -= g_entropy * entropy
        if g_mean is not None:
            pi_factor -= g_mean
            g_mean = g_mean / student.unmasked_size
        if g_ce is not None:
            pi_factor += g_ce
            surprised = _exceeds_rounding(g_ce, g_logp)
            reference = _Head(ref_hidden, ref_weight, ref_bias, ctx.dtype, ctx.temperature)
        dz_buffer, buffer = _buffers(2, ctx.tile, lse)

        def tile_gradient(rows: slice, columns: slice, local: Tensor) -> Tensor:
            """dz of a tile; `local` are those of its rows that involve the reference."""
            dz = student.logits(rows, dz_buffer).sub_(lse[rows, None])
            if g_entropy is None:
                dz.exp_().mul_(pi_factor[rows, None])
            else:
                pi = torch.exp(dz, out=_view(buffer, dz.shape))
                dz.mul_(-g_entropy[rows, None]).add_(pi_factor[rows, None]).mul_(pi)
            if g_logp is not None:
                inside, index = _locate(labels[rows], columns)
                dz.scatter_add_(1, index, torch.where(inside, g_logp[rows], 0)[:, None])
            if g_mean is not None:
                dz.add_(g_mean[rows, None] * (1 if student.unmasked is None else student.unmasked))
            if g_ce is not None and reference and len(local):
                tokens = local + rows.start
                p = reference.logits(tokens, buffer).sub_(ref_lse[tokens, None]).exp_()
                dz.index_add_(0, local, p.mul_(g_ce[tokens, None]), alpha=-1)
            return dz

        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden, dtype=ctx.dtype) if wants_hidden else None
        d_weight = torch.zeros_like(weight) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=ctx.dtype) if wants_bias else None
        chunks = [(rows, surprised[rows].nonzero()[:, 0]) for rows in _slices(len(hidden), ctx.tile[0])]
        for columns in _slices(len(weight), ctx.tile[1]):
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
                    _add_product(d_hidden[rows], dz, student.block)
                if d_block is not None:
                    _add_product(d_block, dz.T, student.states(rows))
            if d_weight is not None and d_block is not None and d_weight.dtype != ctx.dtype:
                d_weight[columns] = d_block
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            d_weight,
            None if d_bias is None else d_bias.to(bias.dtype),
            *[None] * 6,
        )


def _exceeds_rounding(g_ce: Tensor, g_logp: Tensor | None) -> Tensor:
    """Which tokens [N] have a coefficient of the reference that exceeds the rounding error of that of their label.

    Under GIFT the others are those where the base model is not surprised: their backward pass costs what SFT's costs.
    """
    return g_ce.abs() > (0 if g_logp is None else torch.finfo(g_ce.dtype).eps / 2 * g_logp.abs())


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _buffers(count: int, tile: tuple[int, int], like: Tensor) -> list[Tensor]:
    """Flat buffers of one tile each. Tiles at the edges are smaller: they use the beginning of a buffer."""
    return [like.new_empty(tile[0] * tile[1]) for _ in range(count)]


def _view(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    """The beginning of a flat buffer as a contiguous matrix."""
    return buffer[: shape[0] * shape[1]].view(shape[0], shape[1])


def _locate(labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which labels [n] lie in a block of the vocabulary, and their columns in it [n, 1] (0 for the others)."""
    inside = (labels >= columns.start) & (labels < columns.stop)
    return inside, torch.where(inside, labels - columns.start, 0)[:, None]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in the precision of `total`, whatever that of the operands."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))
