"""Token batches: which examples pass through a model at once, padded to one length or packed into one row."""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gift.cli import UserError
from gift.distributed import lockstep
from gift.models import on_device, states_at
from gift.recipe import Engine

T = TypeVar("T")
IGNORED = -100  # the label of a token that carries no loss, as in torch and transformers


@dataclass(frozen=True)
class Encoded:
    """A tokenized example: `ids` is prompt, response, end token; the first `prompt_length` (at least 1) are prompt."""

    id: str
    ids: tuple[int, ...]
    prompt_length: int
    truncated: bool = False


def response_tokens(examples: Iterable[Encoded]) -> int:
    """How many tokens of some examples carry loss."""
    return sum(len(example.ids) - example.prompt_length for example in examples)


def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits `size` examples: a function of the arguments, so that resuming is exact."""
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


# ---------------------------------------------------------------------------------------------------------------------
# Pieces


def pieces(items: Sequence[T], length: Callable[[T], int], *, micro_tokens: int, packing: bool) -> list[list[T]]:
    """The items in pieces that pass through the model one at a time: packed, or sorted by length for padding.

    `length` is an item's number of tokens. A piece holds at most `micro_tokens` tokens, padding included, or a single
    item. With packing a piece is one row, and sdpa and eager attention, which mask a dense [row, row] matrix, take time
    and memory quadratic in it; flash attention works sequence by sequence.
    """
    return (pack if packing else by_length)(items, length, micro_tokens)


def by_length(items: Sequence[T], length: Callable[[T], int], micro_tokens: int) -> list[list[T]]:
    """The items sorted by length, in pieces of at most `micro_tokens` tokens, padding included, or of a single item."""
    found: list[list[T]] = []
    for item in sorted(items, key=length):
        if not found or (len(found[-1]) + 1) * length(item) > micro_tokens:
            found.append([])
        found[-1].append(item)
    return found


def pack(items: Sequence[T], length: Callable[[T], int], micro_tokens: int) -> list[list[T]]:
    """The items in rows of at most `micro_tokens` tokens, or of a single longer item, by best-fit decreasing.

    Longest first (the earlier of two equally long), each goes to the row it leaves the least room in, or to a new one:
    at most 11/9 of the fewest rows possible, plus a constant (Johnson et al., 1974). O(n log n) comparisons.
    """
    rows: list[list[T]] = []
    rooms: list[tuple[int, int]] = []  # (tokens still free, row), sorted
    for item in sorted(items, key=length, reverse=True):
        size = length(item)
        place = bisect.bisect_left(rooms, (size, 0))
        if place < len(rooms):
            room, row = rooms.pop(place)
        else:
            room, row = micro_tokens, len(rows)
            rows.append([])
        rows[row].append(item)
        bisect.insort(rooms, (room - size, row))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def collate(batch: Sequence[Encoded], pad_id: int, *, packing: bool = False) -> dict[str, Tensor]:
    """The tensors of a piece, int64.

    Padded: right-padded `input_ids`, `attention_mask` and `labels`, each [B, T].
    Packed: `input_ids`, `position_ids` and `labels`, each [1, sum of lengths], and no mask: where position ids start
    anew, transformers lets attention begin anew (see `gift.models.states_at`).

    A label is the token that its position predicts, the next of the same example, or IGNORED where that is prompt,
    padding or nothing. In row-major order the labelled positions come example after example both ways.
    """
    ids = [torch.tensor(example.ids) for example in batch]
    labels = [next_tokens(example) for example in batch]
    if packing:
        positions = [torch.arange(len(row)) for row in ids]
        rows = {"input_ids": ids, "position_ids": positions, "labels": labels}
        return {name: torch.cat(parts).unsqueeze(0) for name, parts in rows.items()}
    return {
        "input_ids": padded(ids, pad_id),
        "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
        "labels": padded(labels, IGNORED),
    }


def micro_batches(examples: Sequence[Encoded], settings: Engine, pad: int) -> list[tuple[list[int], dict[str, Tensor]]]:
    """This rank's examples in collated pieces, each with the indices of the examples in it.

    All ranks get as many: those with fewer pieces, or none, get batches without examples and labels.
    """
    found = [
        (piece, collate([examples[index] for index in piece], pad, packing=settings.packing))
        for piece in pieces(
            range(len(examples)),
            lambda index: len(examples[index].ids),
            micro_tokens=settings.micro_tokens,
            packing=settings.packing,
        )
    ]
    nothing = Encoded("", (pad, pad), 2)
    idle: tuple[list[int], dict[str, Tensor]] = ([], collate([nothing], pad, packing=settings.packing))
    return lockstep(found or [idle], lambda _: idle)


def next_tokens(example: Encoded) -> Tensor:
    """The labels [T] of one example."""
    labels = torch.full((len(example.ids),), IGNORED)
    labels[example.prompt_length - 1 : -1] = torch.tensor(example.ids[example.prompt_length :])
    return labels


def padded(rows: Sequence[Tensor], value: int) -> Tensor:
    """Rows [T_i] as one tensor [B, max T_i], filled with `value` on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Raises UserError where a packed sequence changes the states of its neighbour: two short passes, in eval mode.

    Models with recurrent layers, and attention implementations that take no mask from position ids, do that silently.
    """
    vocab = model.get_input_embeddings().num_embeddings
    second = Encoded("second", tuple(number % vocab for number in range(8)), 1)
    states = []
    for token in (0, vocab - 1):
        batch = on_device(collate([Encoded("first", (token,) * 8, 1), second], 0, packing=True), model)
        selected = torch.arange(16, device=model.device).unsqueeze(0) >= 8
        states.append(states_at(model, batch["input_ids"], None, selected, position_ids=batch["position_ids"]))
    change = (states[0] - states[1]).abs().max()
    if change > 1e-3 * states[0].abs().max():
        implementation = model.config._attn_implementation
        raise UserError(
            f"engine.packing: {type(model).__name__} with {implementation} attention mixes the sequences of a row;"
            " set engine.packing=false"
        )
