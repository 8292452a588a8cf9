"""Keys and values of samples in progress, and attention over them without copying them.

A row's tokens stand at the left, in columns [0, length), and each new one is written behind them: rows of any length
share a batch, none is padded on the left, and only what a new row brings is ever copied into the store.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gift.models import backbone

GROWTH = 128  # fewest columns by which the store grows
ALIGNED = 8  # columns attended to are a multiple of this: GPU kernels want aligned masks
GROUPED = "gift_grouped"


class RowStore(Cache):
    """Keys and values of every layer, [rows, kv_heads, columns, width]; rows and columns beyond those in use are spare.

    As a transformers cache it takes one new token per row, at the columns that `step_at` was last called with.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.slabs: list[tuple[Tensor, Tensor]] = []
        self.rows, self.columns, self.span = 0, 0, 0

    def reserve(self, rows: int, columns: int, widest: int, used: int) -> None:
        """Makes room for so many rows and columns; the first `used` rows keep what they hold.

        No row will need more than `widest` columns: a new store has no more than rows * widest places.
        """
        if rows <= self.rows and columns <= self.columns:
            return
        wanted = self.columns if columns <= self.columns else max(columns + GROWTH, self.columns * 3 // 2)
        self.rows, self.columns = rows, min(wanted, widest)
        for layer, (keys, values) in enumerate(self.slabs):
            self.slabs[layer] = self._resized(keys, used), self._resized(values, used)

    def _resized(self, slab: Tensor, used: int) -> Tensor:
        # Zeros, since what is masked still enters the products, with weight 0
        resized = slab.new_zeros(self.rows, slab.shape[1], self.columns, slab.shape[3])
        kept = min(slab.shape[2], self.columns)
        resized[:used, :, :kept] = slab[:used, :, :kept]
        return resized

    def insert(self, first: int, prompts: Prefilled, owner: Tensor) -> None:
        """Fills the leading columns of rows from `first` on: the keys and values of prompts `owner` [new rows]."""
        if not self.slabs:
            self.slabs = [(self._resized(keys, 0), self._resized(values, 0)) for keys, values in prompts.layers]
        rows = slice(first, first + len(owner))
        for slabs, layer in zip(self.slabs, prompts.layers, strict=True):
            for slab, new in zip(slabs, layer, strict=True):
                slab[rows, :, : new.shape[2]] = new.index_select(0, owner)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copies rows [n] to the places of others [n]."""
        for keys, values in self.slabs:
            keys[target], values[target] = keys[source], values[source]

    def step_at(self, lengths: Tensor, longest: int) -> Tensor:
        """Sets the columns [rows] that the next token of each row is written at, at most `longest`.

        Returns what is to be added to the scores, [rows, 1, 1, columns]: -inf for columns beyond the new token.
        """
        self.at = (torch.arange(len(lengths), device=lengths.device), slice(None), lengths)
        self.span = min(-(-(longest + 1) // ALIGNED) * ALIGNED, self.columns)
        beyond = torch.arange(self.span, device=lengths.device) > lengths[:, None]
        mask = torch.zeros(beyond.shape, dtype=self.slabs[0][0].dtype, device=lengths.device)
        return mask.masked_fill_(beyond, float("-inf"))[:, None, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.slabs[layer_idx]
        keys[self.at], values[self.at] = key_states[:, :, 0], value_states[:, :, 0]
        rows = len(key_states)
        return keys[:rows, :, : self.span], values[:rows, :, : self.span]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.span - 1


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token, query [rows, heads, 1, width], to key and value [rows, kv_heads, T, width].

    The heads that share a key/value head go in as its query positions, so that no key or value is repeated, which
    transformers' sdpa does wherever there is a mask. Returns [rows, 1, heads, width].
    """
    rows, heads, width = len(query), query.shape[1], query.shape[3]
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    mixed = nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return mixed.reshape(rows, 1, heads, value.shape[-1]), None


ALL_ATTENTION_FUNCTIONS.register(GROUPED, grouped_attention)


@contextlib.contextmanager
def grouped(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model attends by `grouped_attention`, if it is one that lets its attention be chosen."""
    if not model._supports_attention_backend:
        yield
        return
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = GROUPED
    try:
        yield
    finally:
        config._attn_implementation = before


@dataclass(frozen=True)
class Prefilled:
    """Prompts after the model: states [P, H] at their last tokens, keys and values [P, kv_heads, T, width] by layer."""

    prompts: Sequence[tuple[int, ...]]
    states: Tensor
    layers: Sequence[tuple[Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def last(self) -> Prefilled:
        """The last of the prompts, in memory of its own."""
        layers = [(keys[-1:].clone(), values[-1:].clone()) for keys, values in self.layers]
        return Prefilled(self.prompts[-1:], self.states[-1:].clone(), layers)


def prompt_batches(prompts: Iterable[tuple[int, ...]], tokens: int, padding: int) -> Iterator[list[tuple[int, ...]]]:
    """Batches of prompts, given the shortest first, of at most so many tokens and so many of padding, or one prompt."""
    batch: list[tuple[int, ...]] = []
    real = 0
    for prompt in prompts:
        whole = (len(batch) + 1) * len(prompt)
        if batch and (whole > tokens or whole - real - len(prompt) > padding):
            yield batch
            batch, real = [], 0
        batch.append(prompt)
        real += len(prompt)
    if batch:
        yield batch


def right_padded(sequences: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """Token ids [rows, T], with zeros behind the shorter sequences."""
    width = max(map(len, sequences))
    return torch.tensor([[*sequence, *[0] * (width - len(sequence))] for sequence in sequences], device=device)


def prefill(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]]) -> Prefilled:
    """Runs prompts through the model: padded on the right, where no token of theirs looks, hence without a mask."""
    ids = right_padded(prompts, model.device)
    cache = DynamicCache()
    states = backbone(model)(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=model.device)
    chosen = states[torch.arange(len(prompts), device=model.device), last]
    return Prefilled(prompts, chosen, [(layer.keys, layer.values) for layer in cache.layers])


def decode(model: PreTrainedModel, tokens: list[int], lengths: list[int], store: RowStore) -> Tensor:
    """States [rows, H] of one more token for every row; `lengths` tokens of each are in the store already."""
    ids, at = torch.tensor([tokens, lengths], device=model.device)
    mask = store.step_at(at, max(lengths))
    with grouped(model):
        states: Tensor = backbone(model)(
            input_ids=ids[:, None], attention_mask=mask, position_ids=at[:, None], past_key_values=store, use_cache=True
        ).last_hidden_state
    return states[:, 0]
