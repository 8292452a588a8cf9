"""What both ways over the vocabulary share: their inputs and results, one model's LM head, and its tiles of logits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

MASKED = -1e30  # stands for -inf inside a tile: finite, so that its product with a probability of 0 is 0
PRODUCT_COLUMNS = 2048  # of a product on a CPU: its weights stay in the cache, and a fifth of the time is saved
BLOCK_BYTES = 64 * 2**20  # of a float32 product that has to be made before it can be added


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
    vocab_size: int | None = None  # entries of the vocabulary that are not masked


@dataclass(frozen=True)
class DenseReference:
    """A frozen model's states at the same N tokens, and its LM head: hidden [N, H_ref], weight [V, H_ref], bias [V]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


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

    def to(self, device: torch.device) -> SparseReference:
        """The same on another device."""
        return SparseReference(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class LogitMap:
    """What becomes of the LM head's product before the softmax: softcap(scale * product) / temperature."""

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("temperature", self.temperature), ("scale", self.scale), ("softcap", self.softcap)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")

    @property
    def slope(self) -> float:
        """The derivative at zero: by what gradients are multiplied on their way to the product."""
        return self.scale / self.temperature

    def apply(self, product: Tensor) -> Tensor:
        """Logits, in place."""
        if self.softcap is not None:
            return product.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return product if self.slope == 1 else product.mul_(self.slope)

    def damping(self, logits: Tensor) -> Tensor | None:
        """The derivative at these logits relative to `slope`; None where it is 1 everywhere."""
        if self.softcap is None:
            return None
        return (logits * (self.temperature / self.softcap)).square_().neg_().add_(1).clamp_(min=0)  # 0 where masked


class Head:
    """One model's hidden states [N, H] and LM head: its logits, one block of the vocabulary at a time."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, logit_map: LogitMap
    ) -> None:
        self.hidden, self.weight, self.dtype, self.logit_map = hidden, weight, dtype, logit_map
        common = torch.promote_types(hidden.dtype, weight.dtype)
        self.operand_dtype = common if hidden.is_cuda and common.itemsize == 2 else dtype
        self.bias = None if bias is None else bias.to(dtype)
        self.masked = None  # [V] bool, if anything is masked
        self.unmasked_size = len(weight)
        if self.bias is not None and self.bias.isneginf().any():
            self.masked = self.bias.isneginf()
            self.bias = self.bias.masked_fill(self.masked, 0)
            self.unmasked_size -= int(self.masked.sum())
        if self.unmasked_size == 0:
            raise ValueError("the bias masks the whole vocabulary")

    def load(self, columns: slice) -> None:
        """Makes these entries of the vocabulary the current block; a cast of their weights happens here, once."""
        self.block = self.weight[columns].to(self.operand_dtype)
        self.block_bias = None if self.bias is None else self.bias[columns]
        self.block_masked = None if self.masked is None else self.masked[columns]
        self.unmasked = None if self.masked is None else (~self.masked[columns]).to(self.dtype)

    def states(self, rows: slice | Tensor) -> Tensor:
        """Hidden states of some tokens, as they enter a matrix product."""
        return self.hidden[rows].to(self.operand_dtype)

    def logits(self, rows: slice | Tensor, buffer: Tensor) -> Tensor:
        """The current block's logits of some tokens, written into the flat `buffer`."""
        states = self.states(rows)
        tile = view(buffer, (len(states), len(self.block)))
        if self.operand_dtype != self.dtype:
            torch.mm(states, self.block.T, out_dtype=self.dtype, out=tile)
        else:
            width = len(self.block) if tile.is_cuda else PRODUCT_COLUMNS
            for columns in slices(len(self.block), width):
                torch.mm(states, self.block[columns].T, out=tile[:, columns])
        if self.block_bias is not None:
            tile.add_(self.block_bias)
        tile = self.logit_map.apply(tile)
        return tile if self.block_masked is None else tile.masked_fill_(self.block_masked, MASKED)

    def logit_sum(self, logits: Tensor) -> Tensor:
        """A tile of logits [n, block] summed over the entries of its block that are not masked."""
        return logits.sum(-1) if self.unmasked is None else logits @ self.unmasked

    def finish(self, dz: Tensor, damping: Tensor | None) -> Tensor:
        """dz with respect to the LM head's product but for the map's slope, in place; 0 where the block is masked."""
        if damping is not None:
            dz.mul_(damping)
        return dz if self.block_masked is None else dz.masked_fill_(self.block_masked, 0)

    def hide(self, logp: Tensor, labels: Tensor) -> Tensor:
        """`logp` [N] with -inf where the label is masked."""
        return logp if self.masked is None else logp.masked_fill(self.masked[labels], -math.inf)

    def masks_more_than(self, other: Head) -> bool:
        """Whether an entry of the vocabulary is masked here that is not masked there."""
        if self.masked is None:
            return False
        return bool((self.masked if other.masked is None else self.masked & ~other.masked).any())


@dataclass(frozen=True)
class Coefficients:
    """A tile's gradient, dz = pi (self.pi - entropy log pi) + label onehot(y) + mean - ref p, per token: each [n]."""

    pi: Tensor
    label: Tensor | None
    entropy: Tensor | None
    mean: Tensor | None
    ref: Tensor | None

    @staticmethod
    def of(grads: Sequence[Tensor | None], entropy: Tensor, student: Head) -> Coefficients:
        """From the gradients of logp, entropy, mean_logp and ref_ce, and the value of the entropy, [n] each."""
        slope = student.logit_map.slope
        label, g_entropy, mean, ref = (None if grad is None else grad * slope for grad in grads)
        pi = torch.zeros_like(entropy)
        if label is not None:
            pi -= label
        if g_entropy is not None:
            pi -= g_entropy * entropy
        if mean is not None:
            pi -= mean
            mean = mean / student.unmasked_size
        if ref is not None:
            pi += ref
        return Coefficients(pi, label, g_entropy, mean, ref)

    def __getitem__(self, rows: slice) -> Coefficients:
        """Those of some tokens."""
        parts = (self.pi, self.label, self.entropy, self.mean, self.ref)
        return Coefficients(*(None if part is None else part[rows] for part in parts))  # type: ignore[arg-type]

    def begin(self, logits: Tensor, lse: Tensor, scratch: Tensor, unmasked: Tensor | None) -> Tensor:
        """What of dz involves neither label nor reference, in place of the logits; `scratch` is as large as these."""
        dz = logits.sub_(lse[:, None])
        if self.entropy is None:
            dz.exp_().mul_(self.pi[:, None])
        else:
            pi = torch.exp(dz, out=scratch)
            dz.mul_(-self.entropy[:, None]).add_(self.pi[:, None]).mul_(pi)
        if self.mean is not None:
            dz.add_(self.mean[:, None] * (1 if unmasked is None else unmasked))
        return dz


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """Raises ValueError unless the shapes are hidden [N, H], weight [V, H], bias [V]."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
        raise ValueError(f"{prefix}hidden must be [N, H] and {prefix}weight [V, H], got {shapes}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias must be [{len(weight)}], got {list(bias.shape)}")


def unmasked_size(weight: Tensor, bias: Tensor | None) -> int:
    """How many entries of the vocabulary a head's bias does not mask."""
    return len(weight) if bias is None else int((~bias.isneginf()).sum())


def check_reference(reference: DenseReference, hidden: Tensor, weight: Tensor) -> None:
    """Raises ValueError unless the reference has the student's tokens and vocabulary."""
    check_head(reference.hidden, reference.weight, reference.bias, "ref_")
    if len(reference.hidden) != len(hidden) or len(reference.weight) != len(weight):
        raise ValueError(
            f"student and reference differ: {len(hidden)} and {len(reference.hidden)} tokens,"
            f" vocabularies of {len(weight)} and {len(reference.weight)}"
        )


def check_labels(labels: Tensor, tokens: int, vocab: int) -> None:
    """Raises ValueError unless labels are [tokens] int64, IndexError unless they lie in [0, vocab)."""
    if labels.shape != (tokens,) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be [{tokens}] int64, got {list(labels.shape)} {labels.dtype}")
    if tokens:
        low, high = torch.stack(labels.aminmax()).tolist()
        if low < 0 or high >= vocab:
            raise IndexError(f"labels must lie in [0, {vocab}), got {low} to {high}: leave ignored tokens out")


def sum_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What logits and sums are computed in: float32, or float64 where an input is."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def slices(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover `total`."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def buffers(count: int, tile: tuple[int, int], like: Tensor) -> list[Tensor]:
    """Flat buffers of one tile each. Tiles at the edges are smaller: they use the beginning of a buffer."""
    return [like.new_empty(tile[0] * tile[1]) for _ in range(count)]


def view(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    """The beginning of a flat buffer as a contiguous matrix."""
    return buffer[: shape[0] * shape[1]].view(shape[0], shape[1])


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in the precision of `total`, whatever that of the operands."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    for rows in slices(len(total), max(1, BLOCK_BYTES // (total.element_size() * max(1, total.shape[1])))):
        total[rows].add_(torch.mm(a[rows], b, out_dtype=total.dtype))
