"""Prompts to samples to records, in chunks that a killed run can continue from without changing a record.

The items of a task are cut, in file order, into chunks of whole items. A chunk is generated, graded and appended to
the log as a whole, and generated again as a whole unless every sample of it is there: the engine then sees the same
batches whether or not the run was interrupted, so the records are the same too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from evals.suites import Protocol
from evals.tasks import Item, Task
from gift.data import encode_prompt
from gift.generation import Engine, Request, Sample, SamplingParams, completion_text, sample_seed
from gift.records import JsonlLog, read_jsonl
from gift.rewards import Verdict

KEY = ("item", "run", "sample")
EMPTY = Sample(token_ids=[], finish_reason="length", logps=[])  # what a prompt that fills the model's window gets
NO_ANSWER = Verdict(0.0, "no_answer", None, None)


@dataclass
class Throughput:
    """Tokens generated, and the seconds that took."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of generation; None where nothing was generated."""
        return self.tokens / self.seconds if self.seconds else None


@dataclass(frozen=True)
class Slot:
    """A sample to draw: its place in the log and the request for it. A limit of 0 tokens means there is no room."""

    item: Item
    run: int
    sample: int
    request: Request


@dataclass(frozen=True)
class Sampler:
    """Samples one policy, by its engine and tokenizer, under one protocol and run seed."""

    policy: str
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    protocol: Protocol
    seed: int

    def run(self, task: Task, chunks: Sequence[Sequence[Item]], path: Path, bar: tqdm) -> Throughput:
        """Samples and grades these chunks and appends them to the log at `path`, one write a chunk."""
        spent = Throughput()
        with JsonlLog(path, KEY) as log:
            for chunk in chunks:
                slots = [slot for item in chunk for slot in self.slots(task, item)]
                samples = self.generate(slots, spent)
                texts = [completion_text(self.tokenizer, sample) for sample in samples]
                verdicts = grade(task, slots, texts)
                graded = zip(slots, samples, texts, verdicts, strict=True)
                log.append(self.record(task, *sample) for sample in graded)
                bar.update(len(slots))
        return spent

    def slots(self, task: Task, item: Item) -> list[Slot]:
        """All samples of an item, in the log's order. Each may be as long as the protocol and the window allow."""
        ids = tuple(encode_prompt(self.tokenizer, item.prompt))
        room = max(0, min(self.protocol.max_tokens, self.engine.max_model_len - len(ids)))
        return [
            Slot(item, run, sample, Request(ids, sample_seed(self.seed, task.name, item.id, run, sample), room))
            for _, run, sample in keys_of(item, self.protocol)
        ]

    def generate(self, slots: Sequence[Slot], spent: Throughput) -> list[Sample]:
        """One sample per slot, EMPTY where it has no room; adds to `spent`."""
        params = SamplingParams(self.protocol.max_tokens, self.protocol.temperature, self.protocol.top_p)
        requests = [slot.request for slot in slots if slot.request.max_tokens]
        started = time.perf_counter()
        generated = self.engine.generate(requests, params) if requests else []
        spent.seconds += time.perf_counter() - started
        spent.tokens += sum(len(sample.token_ids) for sample in generated)
        remaining = iter(generated)
        return [next(remaining) if slot.request.max_tokens else EMPTY for slot in slots]

    def record(self, task: Task, slot: Slot, sample: Sample, text: str, verdict: Verdict) -> dict[str, Any]:
        """The log's line for a graded sample. `tokens` counts what was generated, the end token included."""
        return {
            "task": task.name,
            "item": slot.item.id,
            "policy": self.policy,
            "run": slot.run,
            "sample": slot.sample,
            "seed": slot.request.seed,
            "prompt": slot.item.prompt,
            "completion": text,
            "tokens": len(sample.token_ids),
            "finish_reason": sample.finish_reason,
            "max_tokens": slot.request.max_tokens,
            "gold": slot.item.gold,
            "extracted": verdict.extracted,
            "status": verdict.status,
            "score": verdict.score,
            "method": verdict.method,
        }


def grade(task: Task, slots: Sequence[Slot], texts: Sequence[str]) -> list[Verdict]:
    """One verdict per slot; one that had no room for a response is NO_ANSWER without asking the grader."""
    had_room = [slot.request.max_tokens != 0 for slot in slots]
    verdicts = iter(
        task.grade(
            [text for text, room in zip(texts, had_room, strict=True) if room],
            [slot.item for slot, room in zip(slots, had_room, strict=True) if room],
        )
    )
    return [next(verdicts) if room else NO_ANSWER for room in had_room]


def keys_of(item: Item, protocol: Protocol) -> list[tuple[str, int, int]]:
    """The log's keys of all samples of an item, in order."""
    return [(item.id, run, sample) for run in range(protocol.runs) for sample in range(protocol.samples_per_run)]


def pending_chunks(path: Path, items: Sequence[Item], protocol: Protocol, batch_size: int) -> list[Sequence[Item]]:
    """The chunks of whole items, at most `batch_size` samples each where an item is no more, that the log lacks any of.

    Where chunks begin depends on nothing but the protocol and `batch_size`, so that more items only add chunks.
    """
    there = {tuple(row[name] for name in KEY) for row in read_jsonl(path)}
    size = max(1, batch_size // protocol.samples)
    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    return [chunk for chunk in chunks if any(not there.issuperset(keys_of(item, protocol)) for item in chunk)]
