"""Prompts to samples to records, in batches that a killed run can continue from.

A batch goes to the engine in one call; it is cut into units of whole items, and a unit is appended to the log as a
whole once all its samples are there. What is gone of the log is sampled again by units. Two plans:

* hf in this process: batches of a fixed number of items in file order, each one unit. A matrix product's last bits
  depend on what else is in the batch; this way the engine sees the same batches whether or not the run was
  interrupted, and the records are the same to the bit.
* Engines that keep their rows full by themselves (vllm, a server, several workers): one batch of all that is missing,
  each item a unit, in the order in which they are completed. Batches that each wait for their longest response would
  leave such an engine nearly idle most of the time; a kill loses only the items that were not complete.

Items that continue a conversation, and items of another temperature, have batches of their own.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from evals.conversations import Conversations, rounds
from evals.suites import Protocol
from evals.tasks import Item, Task
from gift.cli import UserError
from gift.data import Example, encode_prompt
from gift.generation import Engine, Request, Sample, completion_text, sample_seed
from gift.generation.follower import Follower
from gift.generation.replay import ReplayEngine, StoredSample
from gift.records import JsonlLog
from gift.samples import SAMPLE_KEY, read_samples

EMPTY = Sample(token_ids=[], finish_reason="length", logps=[])  # what a prompt that fills the model's window gets


@dataclass(frozen=True)
class Batch:
    """What the engine is given at once, in units that are recorded together."""

    units: Sequence[Sequence[Item]]
    temperature: float

    @property
    def items(self) -> list[Item]:
        """The items of all units."""
        return [item for unit in self.units for item in unit]


@dataclass
class Throughput:
    """Tokens generated, and the seconds that took."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of generation; None where nothing was generated."""
        return self.tokens / self.seconds if self.tokens else None


@dataclass(frozen=True)
class Slot:
    """A sample to draw: its place in the log and the request for it. A limit of 0 tokens means there is no room."""

    item: Item
    run: int
    sample: int
    request: Request

    @property
    def has_room(self) -> bool:
        """Whether a response can have any token at all."""
        return self.request.max_tokens != 0


@dataclass(frozen=True)
class Sampler:
    """Samples one policy, by its engine and tokenizer, under one protocol and run seed.

    Without a tokenizer, the engine has stored generations: it is asked by key alone.
    """

    policy: str
    engine: Engine | Follower
    tokenizer: PreTrainedTokenizerBase | None
    protocol: Protocol
    seed: int

    def run(self, task: Task, items: Sequence[Item], batches: Sequence[Batch], path: Path, bar: tqdm) -> Throughput:
        """Samples these batches, made of a task's `items`, and appends them to the log at `path`, one write a unit."""
        spent = Throughput()
        with JsonlLog(path, SAMPLE_KEY) as log:
            conversations = Conversations(items, self.protocol.system, log.rows)
            for batch in batches:
                units = [
                    [slot for item in unit for slot in self.slots(task, item, conversations)] for unit in batch.units
                ]
                for slots, samples in self.generate(units, batch.temperature, spent, bar):
                    rows = [self.record(task, *sampled) for sampled in zip(slots, samples, strict=True)]
                    log.append(rows)
                    conversations.note(rows)
        return spent

    def slots(self, task: Task, item: Item, conversations: Conversations) -> list[Slot]:
        """All samples of an item, in the log's order. Each may be as long as the protocol and the window allow."""
        slots = []
        for _, run, sample in keys_of(item, self.protocol):
            ids: tuple[int, ...] = ()
            room = None
            if self.tokenizer is not None:
                ids = self.encode(item, conversations, run, sample)
                room = max(0, min(self.protocol.max_tokens, self.engine.model_window - len(ids)))
            key = (task.name, item.id, run, sample)
            slots.append(Slot(item, run, sample, Request(ids, sample_seed(self.seed, *key), room, key)))
        return slots

    def encode(self, item: Item, conversations: Conversations, run: int, sample: int) -> tuple[int, ...]:
        """Token ids of the conversation up to the model's turn. One user turn needs no chat template, more turns do."""
        assert self.tokenizer is not None
        messages = conversations.messages(item, run, sample)
        turns = tuple((message["role"], message["content"]) for message in messages)
        asked = Example(item.id, item.prompt, "", "", turns if len(turns) > 1 else ())
        return tuple(encode_prompt(self.tokenizer, asked))

    def generate(
        self, units: Sequence[Sequence[Slot]], temperature: float, spent: Throughput, bar: tqdm
    ) -> Iterator[tuple[Sequence[Slot], list[Sample]]]:
        """The units, each with its samples in order, as they are completed; adds to `spent`.

        A slot without room is EMPTY. The seconds are those until the last sample.
        """
        asked = [(unit, slot) for unit, slots in enumerate(units) for slot in slots if slot.has_room]
        found: list[dict[tuple[Any, ...], Sample]] = [
            {slot.request.key: EMPTY for slot in slots if not slot.has_room} for slots in units
        ]

        def completed(unit: int) -> tuple[Sequence[Slot], list[Sample]]:
            samples, found[unit] = found[unit], {}
            return units[unit], [samples[slot.request.key] for slot in units[unit]]

        for unit, slots in enumerate(units):
            bar.update(len(found[unit]))
            if len(found[unit]) == len(slots):
                yield completed(unit)
        if not asked:
            return
        started = time.perf_counter()
        requests = [slot.request for _, slot in asked]
        params = replace(self.protocol.sampling, temperature=temperature)
        for number, sample in self.engine.stream(requests, params):
            unit, slot = asked[number]
            found[unit][slot.request.key] = sample
            spent.tokens += len(sample.token_ids)
            spent.seconds += time.perf_counter() - started
            started = time.perf_counter()
            bar.update()
            if len(found[unit]) == len(units[unit]):
                yield completed(unit)

    def text(self, sample: Sample) -> str:
        """A completion's text."""
        if self.tokenizer is None:
            assert sample.text is not None
            return sample.text
        return completion_text(self.tokenizer, sample)

    def record(self, task: Task, slot: Slot, sample: Sample) -> dict[str, Any]:
        """The log's line for a sample. `tokens` counts what was generated, the end token included.

        Of a stored generation neither seed nor limit are known here, and its tokens only if it came with their number.
        """
        is_stored = isinstance(sample, StoredSample)
        return {
            "task": task.name,
            "item": slot.item.id,
            "policy": self.policy,
            "run": slot.run,
            "sample": slot.sample,
            "seed": None if is_stored else slot.request.seed,
            "prompt": slot.item.prompt,
            "completion": self.text(sample),
            "tokens": sample.tokens if isinstance(sample, StoredSample) else len(sample.token_ids),
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
            "max_tokens": slot.request.max_tokens,
            "gold": slot.item.gold,
            "category": slot.item.category,
        }


def keys_of(item: Item, protocol: Protocol) -> list[tuple[str, int, int]]:
    """The log's keys of all samples of an item, in order."""
    return [(item.id, run, sample) for run in range(protocol.runs) for sample in range(protocol.samples_per_run)]


def pending_batches(path: Path, items: Sequence[Item], protocol: Protocol, batch_size: int | None) -> list[Batch]:
    """The batches with anything in them that the log lacks, those of later turns after those of earlier ones.

    With a batch size: whole items, together at most that many samples where an item has no more, as one unit. Where
    batches begin depends on nothing but the protocol and the batch size, so that more items only add batches. Without:
    the items that are not complete, each a unit of its own.
    """
    there = {tuple(row[name] for name in SAMPLE_KEY) for row in read_samples(path)}

    def complete(unit: Sequence[Item]) -> bool:
        return all(there.issuperset(keys_of(item, protocol)) for item in unit)

    batches = []
    for alike in rounds(items):
        by_temperature: dict[float, list[Item]] = {}
        for item in alike:
            by_temperature.setdefault(protocol.temperature_of(item), []).append(item)
        for temperature, group in by_temperature.items():
            if batch_size is None:
                missing = [[item] for item in group if not complete([item])]
                batches += [Batch(missing, temperature)] if missing else []
                continue
            size = max(1, batch_size // protocol.samples)
            units = [group[start : start + size] for start in range(0, len(group), size)]
            batches += [Batch([unit], temperature) for unit in units if not complete(unit)]
    return batches


def check_stored(engine: ReplayEngine, task: Task, items: Sequence[Item], protocol: Protocol) -> None:
    """Raises UserError where a file of generations lacks a sample of these items, saying what it could be used for."""
    keys = [(task.name, *key) for item in items for key in keys_of(item, protocol)]
    missing = [key for key in keys if key not in engine]
    if not missing:
        return

    def held(items: Sequence[Item], run: int, sample: int) -> bool:
        return all((task.name, item.id, run, sample) in engine for item in items)

    first = itertools.takewhile(lambda item: held([item], 0, 0), items)
    runs = sum(1 for _ in itertools.takewhile(lambda run: held(items, run, 0), itertools.count()))
    per_run = itertools.takewhile(lambda n: all(held(items, run, n) for run in range(runs)), itertools.count())
    if runs:
        advice = f"give --runs {runs} --samples-per-run {sum(1 for _ in per_run)}"
    elif number := sum(1 for _ in first):
        advice = f"give --limit {number}, or complete it"
    else:
        advice = "complete it, or leave this task out: --task names those to evaluate"
    _, item, run, sample = missing[0]
    raise UserError(
        f"{engine.name}: no completion for {len(missing)} of {len(keys)} samples of {task.name}, the first of them item"
        f" {item!r}, run {run}, sample {sample}; {advice}"
    )
