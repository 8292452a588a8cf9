"""Stored generations in place of a model: bring your own, or grade again without generating.

A file has one completion a row, as JSONL or Parquet: `item` and `completion`, and as far as they are known `task`
(default: any), `run` (default 0), `sample` (default: counted up in file order), `finish_reason` (default 'stop'),
`stop_reason` and `tokens`, a count. Other columns are passed over: a run's samples/<policy>/<task>.jsonl will do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift.cli import UserError, nearest
from gift.data import read_rows
from gift.generation import Engine, FinishReason, Request, Sample, SamplingParams
from gift.records import read_table

NO_WINDOW = 2**31 - 1
SHOWN = 3  # how many of the missing keys an error names
REASONS: dict[str, FinishReason] = {reason: reason for reason in get_args(FinishReason)}
Key = tuple[str | None, str, int, int]


@dataclass(frozen=True)
class StoredSample(Sample):
    """A completion that came as text, and its number of tokens where that is known."""

    tokens: int | None = None


class ReplayEngine(Engine):
    """Answers each request with what is stored under its key (task, item, run, sample).

    `source` is a file or its rows. `token_ids` are those of `tokenizer`, without an end token, or [] without one. There
    is no window, and sampling parameters have no say. Raises UserError naming the file and row that cannot be used.
    """

    max_model_len = NO_WINDOW

    def __init__(
        self, source: Path | Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.name = str(source) if isinstance(source, Path) else "stored generations"
        self._tokenizer = tokenizer
        self._samples = stored(read(source) if isinstance(source, Path) else source, self.name)

    def __contains__(self, key: tuple[str | int, ...]) -> bool:
        """Whether there is a completion for requests of this key."""
        return self._found(key) is not None

    def _found(self, key: tuple[Any, ...]) -> StoredSample | None:
        return self._samples.get(key) or self._samples.get((None, *key[1:]))

    def stream(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[tuple[int, Sample]]:
        """As Engine.stream. Raises UserError that says how many requests nothing is stored for, and names some."""
        if params.logps:
            raise UserError(f"{self.name}: stored generations have no log-probabilities")
        found = [self._found(request.key) for request in requests]
        missing = [request.key for request, sample in zip(requests, found, strict=True) if sample is None]
        if missing:
            shown = "; ".join(", ".join(map(str, key)) or "a request without a key" for key in missing[:SHOWN])
            more = ", ..." if len(missing) > SHOWN else ""
            raise UserError(
                f"{self.name}: no completion for {len(missing)} of {len(requests)} samples (task, item, run, sample):"
                f" {shown}{more}"
            )
        for number, sample in enumerate(found):
            assert sample is not None
            yield number, sample if self._tokenizer is None else with_tokens(sample, self._tokenizer)

    def score(self, sequences: Sequence[tuple[int, ...]]) -> NoReturn:
        """Raises UserError: there is no model."""
        raise UserError(f"{self.name}: stored generations have no model to score sequences with")

    def update_weights(self, model: PreTrainedModel) -> NoReturn:
        """Raises UserError: there is no model."""
        raise UserError(f"{self.name}: stored generations have no model whose weights could be updated")

    def close(self) -> None:
        """Nothing to free."""


def with_tokens(sample: StoredSample, tokenizer: PreTrainedTokenizerBase) -> StoredSample:
    """The sample with the tokens that the tokenizer makes of its text."""
    ids: list[int] = tokenizer.encode(sample.text, add_special_tokens=False)
    return replace(sample, token_ids=ids, tokens=len(ids) if sample.tokens is None else sample.tokens)


def read(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a JSONL or Parquet file. Raises UserError naming the file, and the line where it is not JSON."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of generations")
    if path.suffix == ".parquet":
        columns = read_table(path)
        return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    return read_rows(path)


def stored(rows: Iterable[Mapping[str, Any]], name: str) -> dict[Key, StoredSample]:
    """The samples by key. Raises UserError naming the row that cannot be used, or has the key of another."""
    samples: dict[Key, StoredSample] = {}
    origin: dict[Key, int] = {}
    numbered: dict[tuple[str | None, str], bool] = {}  # by task and item: whether rows have a sample number
    seen: Counter[tuple[str | None, str, int]] = Counter()
    for number, row in enumerate(rows, start=1):
        where = f"{name}:{number}"
        fields = Fields(row, where)
        if (item_id := fields.name("item")) is None:
            raise fields.lacks("item")
        task, item, run, sample = fields.text("task"), str(item_id), fields.count("run") or 0, fields.count("sample")
        if numbered.setdefault((task, item), sample is not None) != (sample is not None):
            raise UserError(
                f"{where}: of item {item!r} some rows have a 'sample' and some do not; give all of them one"
            )
        key = task, item, run, seen[task, item, run] if sample is None else sample
        seen[task, item, run] += 1
        if origin.setdefault(key, number) != number:
            raise UserError(f"{where}: item {item!r}, run {run}, sample {key[3]} is that of row {origin[key]} already")
        samples[key] = fields.sample()
    if not samples:
        raise UserError(f"{name}: no rows; a row has an item and a completion")
    return samples


@dataclass(frozen=True)
class Fields:
    """A row's columns, each checked when it is asked for; null is the same as no such column."""

    row: Mapping[str, Any]
    where: str

    def text(self, column: str) -> str | None:
        """A text, or None. Raises UserError naming row and column, as all of these do."""
        value = self.row.get(column)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{self.where}: column {column!r} is not text: {value!r:.60}")
        return value

    def count(self, column: str) -> int | None:
        """A whole number, not negative, or None."""
        value = self.row.get(column)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise UserError(f"{self.where}: column {column!r} is not a whole number from 0 on: {value!r:.60}")
        return value

    def name(self, column: str) -> str | int | None:
        """A text or a whole number, or None."""
        value = self.row.get(column)
        if value is not None and (not isinstance(value, str | int) or isinstance(value, bool)):
            raise UserError(f"{self.where}: column {column!r} is neither text nor a whole number: {value!r:.60}")
        return value

    def sample(self) -> StoredSample:
        """The completion, and how it ended."""
        text = self.text("completion")
        if text is None:
            raise self.lacks("completion")
        reason = self.text("finish_reason") or "stop"
        if reason not in REASONS:
            raise UserError(f"{self.where}: finish_reason is {reason!r}; it must be one of: {', '.join(REASONS)}")
        return StoredSample([], REASONS[reason], [], self.name("stop_reason"), text, self.count("tokens"))

    def lacks(self, column: str) -> UserError:
        """The error that a column is not there, or null."""
        known = ", ".join(map(str, self.row)) or "none"
        return UserError(f"{self.where}: no {column!r}{nearest(column, map(str, self.row))}; its columns: {known}")
