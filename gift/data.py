"""Prompt/response data: where it comes from, its three disjoint subsets, and its way into token batches."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from gift.cli import UserError
from gift.records import read_table, sha256_json, write_text

T = TypeVar("T")
IGNORED = -100  # the label of a token that carries no loss, as in torch and transformers


@dataclass(frozen=True)
class Example:
    """A problem with an expert's solution: what stage 1 imitates, stage 2 samples anew and evaluation grades."""

    id: str
    prompt: str
    response: str
    answer: str


@dataclass(frozen=True)
class Encoded:
    """A tokenized example: `ids` is prompt, response, end token; the first `prompt_length` (at least 1) are prompt."""

    id: str
    ids: tuple[int, ...]
    prompt_length: int
    truncated: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_examples(
    path: Path, *, prompt: str = "prompt", response: str = "response", answer: str = "answer"
) -> list[Example]:
    """Examples from a JSONL or Parquet file with these columns; rows without an `id` are numbered.

    Raises UserError naming the file, and the row and column where a value is missing or not text.
    """
    if not path.exists():
        raise UserError(f"{path}: no such data file")
    if path.suffix == ".parquet":
        columns = read_table(path)
        rows: Iterable[Mapping[str, Any]] = (
            dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
        )
    elif path.suffix in {".jsonl", ".json"}:
        rows = read_rows(path)
    else:
        raise UserError(f"{path}: unknown kind of data file; use .jsonl or .parquet")
    return [to_example(row, path, number, prompt, response, answer) for number, row in enumerate(rows, start=1)]


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file. Raises UserError naming the file and line of one that cannot be read."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: malformed row: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: malformed row: expected a JSON object, got {type(row).__name__}")
            yield row


def to_example(row: Mapping[str, Any], path: Path, number: int, prompt: str, response: str, answer: str) -> Example:
    """An Example from a row's columns. Raises UserError naming the file, the row and the column."""
    where = f"{path}:{number}"

    def text(column: str) -> str:
        if column not in row:
            raise UserError(f"{where}: no column {column!r}; the row has: {', '.join(map(str, row))}")
        value = row[column]
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: column {column!r} is not text: {value!r:.60}")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(f"{where}: column {column!r} has half of a surrogate pair, which is not Unicode text")
        return value

    # Without the folder: an id enters seeds and hashes, which must not depend on where the file lies.
    name = f"{path.stem}-{number}" if row.get("id") is None else str(row["id"])
    return Example(name, text(prompt), text(response), text(answer))


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Writes examples as JSONL, atomically."""
    write_text(path, "".join(json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples))


def fingerprint(examples: Sequence[Example]) -> str:
    """Hex SHA-256 of the examples' content, in order."""
    return sha256_json([asdict(example) for example in examples])


# ---------------------------------------------------------------------------------------------------------------------
# Subsets


def split(examples: Sequence[Example], sizes: Mapping[str, int], seed: int) -> dict[str, list[Example]]:
    """Disjoint random subsets of the given sizes. Of examples with the same prompt, the first is used.

    Raises UserError if there are too few distinct prompts, or if two of them share an id.
    """
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(normalize(example.prompt), example)
    distinct = list(first.values())
    by_id: dict[str, Example] = {}
    for example in distinct:  # an id seeds the samples of its prompt, and names them in the logs
        if by_id.setdefault(example.id, example) is not example:
            raise UserError(f"two prompts of the data share the id {example.id!r}; make ids unique, or leave them out")
    wanted = sum(sizes.values())
    if len(distinct) < wanted:
        raise UserError(f"the data has {len(distinct)} distinct prompts, but {wanted} are asked for ({dict(sizes)})")
    random.Random(seed).shuffle(distinct)
    subsets, start = {}, 0
    for name, size in sizes.items():
        subsets[name] = distinct[start : start + size]
        start += size
    return subsets


def normalize(prompt: str) -> str:
    """A prompt up to case and white space: what counts as the same problem."""
    return " ".join(prompt.lower().split())


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a user turn and the assistant's header, by the tokenizer's chat template (the bare text if none)."""
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(prompt))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer.encode(text, add_special_tokens=False))


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int) -> Encoded:
    """Prompt, then response and end token, tokenized apart and joined as verl does; cut on the right at `max_length`.

    Raises UserError if the prompt alone leaves no room for a response.
    """
    prompt = encode_prompt(tokenizer, example.prompt)
    response = list(tokenizer.encode(example.response, add_special_tokens=False))
    ids = [*prompt, *response, tokenizer.eos_token_id]
    if len(prompt) >= max_length:
        raise UserError(f"{example.id}: the prompt has {len(prompt)} tokens, max_length is {max_length}")
    return Encoded(example.id, tuple(ids[:max_length]), len(prompt), truncated=len(ids) > max_length)


def collate(batch: Sequence[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids`, `attention_mask` and `labels`, each [B, T] int64.

    `labels[b, t]` is the token that position t predicts, token t+1, or IGNORED where that is prompt or padding.
    """
    length = max(len(example.ids) for example in batch)
    input_ids = torch.full((len(batch), length), pad_id)
    attention_mask = torch.zeros((len(batch), length), dtype=torch.int64)
    labels = torch.full((len(batch), length), IGNORED)
    for row, example in enumerate(batch):
        ids = torch.tensor(example.ids)
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, example.prompt_length - 1 : len(ids) - 1] = ids[example.prompt_length :]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def by_length(items: Sequence[T], length: Callable[[T], int], micro_tokens: int) -> list[list[T]]:
    """The items sorted by length, in pieces of at most `micro_tokens` tokens, padding included, or of a single item."""
    pieces: list[list[T]] = []
    for item in sorted(items, key=length):
        if not pieces or (len(pieces[-1]) + 1) * length(item) > micro_tokens:
            pieces.append([])
        pieces[-1].append(item)
    return pieces


def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits `size` examples: a function of the arguments, so that resuming is exact."""
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
