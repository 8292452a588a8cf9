"""An objective summed over tokens, its gradients formed in the forward pass: each tile of logits is computed once.

Per chunk of tokens: a product makes the [tokens, V] logits; blocks of a few rows, small enough for the processor's
cache, become statistics, then the objective's loss, then dz in their place; two products add dz to the gradients of
hidden states and head. The objective is differentiated by autograd, with respect to the statistics alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gift.vocab.head import (
    Coefficients,
    DenseReference,
    Head,
    LogitMap,
    SparseReference,
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

Objective = Callable[[VocabStats], Tensor]
CHUNK_BYTES = {"cpu": 120 * 2**20, "cuda": 512 * 2**20}  # of one model's logits; there are at most two
BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": 512 * 2**20}  # of the rows worked on at a time: a CPU's cache, a whole GPU
MOST_TOKENS = 4096


def vocab_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    objective: Objective,
    *,
    bias: Tensor | None = None,
    reference: DenseReference | SparseReference | None = None,
    old_logp: Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, VocabStats]:
    """The objective's losses summed over N tokens (a scalar, differentiable), and the statistics (constants, [N]).

    Shapes: hidden [N, H], weight [V, H], labels [N] int64, bias [V], old_logp [N]. `objective` maps the statistics of
    any n of the tokens to their losses [n]; it must not mix tokens. `temperature`, `scale` and `softcap` act on both
    models' logits (see the package). `chunk_tokens` changes speed and memory, not results.

    Without tokens (N = 0) the loss is 0 but part of the graph: gradients are zeros, not None. The gradients lie ready
    until the backward pass, which can be done once.

    Raises ValueError where shapes or options do not fit together, IndexError for a label outside [0, V).
    """
    check_head(hidden, weight, bias)
    check_labels(labels, len(hidden), len(weight))
    if isinstance(reference, DenseReference):
        check_reference(reference, hidden, weight)
    elif reference is not None:
        _check_entries(reference, len(hidden), len(weight))
    if old_logp is not None and old_logp.shape != labels.shape:
        raise ValueError(f"old_logp must be [{len(labels)}], got {list(old_logp.shape)}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    job = _Job(
        labels,
        objective,
        reference,
        old_logp,
        LogitMap(temperature, scale, softcap),
        chunk_tokens,
        torch.is_grad_enabled(),
    )
    loss, logp, entropy, mean_logp, ref_ce, ref_logp, ref_entropy = _VocabLoss.apply(hidden, weight, bias, job)
    return loss, VocabStats(
        logp, entropy, mean_logp, ref_ce, ref_logp, ref_entropy, old_logp, unmasked_size(weight, bias)
    )


def _check_entries(reference: SparseReference, tokens: int, vocab: int) -> None:
    if reference.logp.shape != (tokens,) or reference.entropy.shape != (tokens,):
        raise ValueError(f"the reference's logp and entropy must be [{tokens}], got {list(reference.logp.shape)}")
    if not reference.rows.shape == reference.columns.shape == reference.probs.shape:
        raise ValueError("the reference's rows, columns and probs must be equally long")
    for name, index, size in (("rows", reference.rows, tokens), ("columns", reference.columns, vocab)):
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise IndexError(f"the reference's {name} must lie in [0, {size})")
    if bool((reference.rows[1:] < reference.rows[:-1]).any()):
        raise ValueError("the reference's rows must be ascending")


@dataclass(frozen=True)
class _Job:
    """What is not a differentiable input of the loss."""

    labels: Tensor
    objective: Objective
    reference: DenseReference | SparseReference | None
    old_logp: Tensor | None
    logit_map: LogitMap
    chunk_tokens: int | None
    differentiate: bool


class _Dense:
    """A reference whose logits are computed, a chunk of tokens at a time."""

    def __init__(self, reference: DenseReference, student: Head, labels: Tensor, buffer: Tensor) -> None:
        self.head = Head(reference.hidden, reference.weight, reference.bias, student.dtype, student.logit_map)
        self.head.load(slice(0, len(reference.weight)))
        self.student_masks_more = student.masks_more_than(self.head)
        self.labels, self.buffer = labels, buffer

    def enter(self, chunk: slice) -> None:
        """Makes these tokens the current chunk."""
        self.start, self.logits = chunk.start, self.head.logits(chunk, self.buffer)

    def _rows(self, tokens: slice) -> Tensor:
        return self.logits[tokens.start - self.start : tokens.stop - self.start]

    def stats(self, tokens: slice, z: Tensor, lse: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """CE(p, pi), log p(y), H(p), each [n], for n tokens with the student's logits z; turns their logits into p."""
        logits = self._rows(tokens)
        logits.sub_(logits.amax(-1, keepdim=True))
        label_logit = _at(logits, self.labels[tokens])
        p = torch.exp(logits, out=scratch)
        total = p.sum(-1)
        ref_lse = total.log()
        entropy = ref_lse - logits.mul_(p).sum(-1) / total
        torch.div(p, total[:, None], out=logits)
        ref_ce = lse - torch.mul(logits, z, out=scratch).sum(-1)
        if self.student_masks_more:
            ref_ce.fill_(math.inf)
        return ref_ce, self.head.hide(label_logit - ref_lse, self.labels[tokens]), entropy

    def subtract(self, tokens: slice, factor: Tensor, dz: Tensor) -> None:
        """dz -= factor * p."""
        dz.addcmul_(self._rows(tokens), factor[:, None], value=-1)


class _Sparse:
    """A reference of which the largest probabilities are given; what these leave over is the label's."""

    def __init__(self, reference: SparseReference, student: Head, labels: Tensor) -> None:
        self.reference, self.labels = reference, labels
        self.probs = reference.probs.to(student.dtype)
        tokens = torch.arange(len(labels) + 1, device=labels.device)
        self.bounds: list[int] = torch.searchsorted(reference.rows, tokens).tolist()
        self.rest = 1 - self.probs.new_zeros(len(labels)).index_add_(0, reference.rows, self.probs)

    def enter(self, chunk: slice) -> None:
        """Nothing depends on the chunk."""

    def _entries(self, tokens: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Row (from 0), column and probability of the entries of some tokens."""
        entries = slice(self.bounds[tokens.start], self.bounds[tokens.stop])
        return self.reference.rows[entries] - tokens.start, self.reference.columns[entries], self.probs[entries]

    def stats(self, tokens: slice, z: Tensor, lse: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """CE(p', pi), log p(y), H(p), each [n], for n tokens with the student's logits z."""
        rows, columns, probs = self._entries(tokens)
        rest = self.rest[tokens]
        mean = torch.where(rest > 0, rest * _at(z, self.labels[tokens]), 0)
        mean.index_add_(0, rows, probs * z[rows, columns])
        return lse - mean, self.reference.logp[tokens].to(z.dtype), self.reference.entropy[tokens].to(z.dtype)

    def subtract(self, tokens: slice, factor: Tensor, dz: Tensor) -> None:
        """dz -= factor * p'."""
        rows, columns, probs = self._entries(tokens)
        dz.index_put_((rows, columns), -factor[rows] * probs, accumulate=True)
        dz.scatter_add_(1, self.labels[tokens, None], (-factor * self.rest[tokens])[:, None])


class _VocabLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> tuple[Tensor | None, ...]:
        dtype, vocab = sum_dtype(hidden, weight), len(weight)
        student = Head(hidden, weight, bias, dtype, job.logit_map)
        student.load(slice(0, vocab))
        zeros = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
        size, block = _sizes(hidden, vocab, job.chunk_tokens)
        (z_buffer,), (scratch,) = buffers(1, (size, vocab), zeros), buffers(1, (block, vocab), zeros)
        reference: _Dense | _Sparse | None = None
        if isinstance(job.reference, DenseReference):
            reference = _Dense(job.reference, student, job.labels, torch.empty_like(z_buffer))
        elif job.reference is not None:
            reference = _Sparse(job.reference, student, job.labels)

        inputs = (hidden, weight, bias)
        totals = [
            torch.zeros_like(like, dtype=dtype) if like is not None and needed and job.differentiate else None
            for like, needed in zip(inputs, ctx.needs_input_grad[:3], strict=True)
        ]
        d_hidden, d_weight, d_bias = totals
        differentiate = any(total is not None for total in totals)
        loss, found = zeros.new_zeros((), dtype=torch.float64), []
        for chunk in slices(len(hidden), size):
            z = student.logits(chunk, z_buffer)
            if reference:
                reference.enter(chunk)
            for rows in slices(len(z), block):
                tokens = slice(chunk.start + rows.start, chunk.start + rows.stop)
                part, values = _loss(z[rows], tokens, student, reference, job, differentiate, scratch)
                loss += part
                found.append(values)
            if differentiate:
                dz = z.to(student.operand_dtype)
                if d_hidden is not None:
                    add_product(d_hidden[chunk], dz, student.block)
                if d_weight is not None:
                    add_product(d_weight, dz.T, student.states(chunk))
                if d_bias is not None:
                    d_bias += z.sum(0)

        ctx.gradients = [
            None if total is None or like is None else total.to(like.dtype)
            for total, like in zip(totals, inputs, strict=True)
        ]
        fields = 6 if reference else 3
        statistics = [torch.cat(column) for column in zip(*found, strict=True)] if found else [zeros] * fields
        ctx.mark_non_differentiable(*statistics)
        return loss.to(dtype), *statistics, *[None] * (6 - fields)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the backward pass of vocab_loss can be done only once")
        gradients, ctx.gradients = ctx.gradients, None
        return *[None if gradient is None else gradient.mul_(g_loss) for gradient in gradients], None


def _sizes(hidden: Tensor, vocab: int, chunk_tokens: int | None) -> tuple[int, int]:
    """Tokens of a chunk, whose logits are held, and of a block of it, which is worked on at a time."""
    kind = "cuda" if hidden.is_cuda else "cpu"
    chunk = chunk_tokens or min(MOST_TOKENS, CHUNK_BYTES[kind] // (4 * vocab))
    chunk = max(1, min(chunk, len(hidden)))
    return chunk, max(1, min(chunk, BLOCK_BYTES[kind] // (4 * vocab)))


def _loss(
    z: Tensor,
    tokens: slice,
    student: Head,
    reference: _Dense | _Sparse | None,
    job: _Job,
    differentiate: bool,
    scratch: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss, summed, and statistics of n tokens; their logits z [n, V] become dz if `differentiate`."""
    labels, scratch = job.labels[tokens], view(scratch, z.shape)
    damping = job.logit_map.damping(z) if differentiate else None
    z.sub_(z.amax(-1, keepdim=True))  # nothing below depends on an offset, and sums are more precise without one
    exps = torch.exp(z, out=scratch)
    total = exps.sum(-1)
    lse = total.log()
    logp = student.hide(_at(z, labels) - lse, labels)
    entropy = lse - exps.mul_(z).sum(-1) / total
    mean_logp = student.logit_sum(z) / student.unmasked_size - lse
    values: tuple[Tensor, ...] = (logp, entropy, mean_logp)
    if reference:
        values += reference.stats(tokens, z, lse, scratch)
    old_logp = None if job.old_logp is None else job.old_logp[tokens]
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_(differentiate) for value in values[:4]]
        stats = replace(VocabStats(*leaves, *values[4:]), old_logp=old_logp, vocab_size=student.unmasked_size)  # type: ignore[arg-type]
        losses = job.objective(stats)
        if differentiate:
            grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    if differentiate:
        coefficients = Coefficients.of([*grads, None][:4], entropy, student)
        dz = coefficients.begin(z, lse, scratch, student.unmasked)
        if coefficients.label is not None:
            dz.scatter_add_(1, labels[:, None], coefficients.label[:, None])
        if coefficients.ref is not None and reference:
            reference.subtract(tokens, coefficients.ref, dz)
        student.finish(dz, damping)
    return losses.detach().double().sum(), values


def _at(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits [n] of the labels [n]."""
    return logits.gather(1, labels[:, None])[:, 0]
