"""Scoring a data set once with the frozen base model: what `CachedReference` reads.

The examples are shuffled and cut into shards of some ten thousand tokens; that plan depends on the data alone. Ranks
take shards in turn, each written whole or not at all, so that a stopped scoring goes on where it was, with any number
of ranks. Shuffled, because after every round of shards the size of all is estimated from those there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from gift.batches import IGNORED, Encoded, by_length, collate, epoch_order, response_tokens
from gift.caches import cache_root, only_one
from gift.cli import UserError, progress
from gift.distributed import barrier, rank, total_over_ranks, world_size
from gift.models import lm_head, logit_map, on_device
from gift.records import atomic_path, remove, sha256_file, utc_now, write_json
from gift.reference.cache import (
    META,
    CachedReference,
    CacheInfo,
    Demand,
    cache_folder,
    find_cache,
    read_shard,
    target_errors,
)
from gift.reference.online import OnlineReference
from gift.states import disk_errors
from gift.steps import announce
from gift.vocab import DenseReference
from gift.vocab.head import unmasked_size
from gift.vocab.truncation import truncate

SHARD_TOKENS = 2**15
MARGIN = 1.25  # an estimated size beyond this many times the budget ends the scoring


def obtain(
    load: Callable[[], PreTrainedModel],
    encoded: Sequence[Encoded],
    demand: Demand,
    *,
    key: Mapping[str, Any],
    budget_bytes: float,
    micro_tokens: int,
    root: Path,
) -> CachedReference | None:
    """The cache of this base and data, scored now with the model that `load` returns unless one in `root` serves.

    Returns None, having said so, where `demand.tolerance` takes more than `budget_bytes`: use the online reference.
    Raises UserError where the cache made for this demand is damaged. All ranks call this together.
    """
    found = find_cache(root, key, demand)
    if on_all_ranks(found is not None):
        return found
    return score(load, encoded, demand, key=key, budget_bytes=budget_bytes, micro_tokens=micro_tokens, root=root)


def obtain_most(
    load: Callable[[], PreTrainedModel],
    encoded: Sequence[Encoded],
    demand: Demand,
    *,
    key: Mapping[str, Any],
    budget_bytes: float,
    micro_tokens: int,
    root: Path,
) -> tuple[CachedReference | None, Demand]:
    """As `obtain`, for as many of the demand's settings as the budget allows, and those it then serves.

    The setting that asks for most of p goes first: in a sweep, the smallest beta.
    """
    while demand.objectives:
        cache = obtain(load, encoded, demand, key=key, budget_bytes=budget_bytes, micro_tokens=micro_tokens, root=root)
        if cache is not None:
            return cache, demand
        demand = demand.without_costliest()
    return None, demand


def score(
    load: Callable[[], PreTrainedModel],
    encoded: Sequence[Encoded],
    demand: Demand,
    *,
    key: Mapping[str, Any],
    budget_bytes: float,
    micro_tokens: int,
    root: Path,
) -> CachedReference | None:
    """Scores the response tokens of `encoded`, whose ids are distinct, with the model that `load` returns.

    The folder is `gift.reference.cache.cache_folder(root, key, demand)`. A finished cache there is returned as it is,
    a damaged one is made again, and an unfinished one is finished. `micro_tokens` (padding included) pass through the
    model at once. Returns None and leaves nothing where the cache would exceed `budget_bytes`. All ranks call this
    together.
    """
    folder = cache_folder(root, key, demand)
    with only_one(folder):
        finished: CachedReference | None = None
        with contextlib.suppress(UserError):  # none there, or a damaged one
            finished = CachedReference(folder, key)
        if on_all_ranks(finished is not None):
            return finished
        if rank() == 0 and (folder / META).exists():
            remove(folder)
        barrier()
        started = time.perf_counter()
        model, shards = load(), plan(encoded)
        if not write_shards(OnlineReference(model), shards, demand, budget_bytes, micro_tokens, folder):
            if rank() == 0:
                remove(folder)
            barrier()
            return None
        if rank() == 0:
            write_meta(folder, shards, demand, key, unmasked_size(*lm_head(model)), time.perf_counter() - started)
        barrier()
        return CachedReference(folder, key)


def cache_home() -> Path:
    """Where caches are kept unless another folder is named."""
    return cache_root() / "reference"


def on_all_ranks(holds: bool) -> bool:
    """Whether it holds on every rank."""
    return total_over_ranks([float(holds)]) == [world_size()]


def plan(encoded: Sequence[Encoded]) -> list[list[Encoded]]:
    """The examples in random order, in shards of about SHARD_TOKENS response tokens."""
    shards: list[list[Encoded]] = []
    size = SHARD_TOKENS
    for index in epoch_order(len(encoded), 0, 0):
        if size >= SHARD_TOKENS:
            shards.append([])
            size = 0
        shards[-1].append(encoded[index])
        size += response_tokens([encoded[index]])
    return shards


def write_shards(
    reference: OnlineReference,
    shards: Sequence[Sequence[Encoded]],
    demand: Demand,
    budget_bytes: float,
    micro_tokens: int,
    folder: Path,
) -> bool:
    """Writes those shards that are not there yet, shared among the ranks; False where they would take too many bytes.

    Every rank comes to the same answer.
    """
    total = sum(map(response_tokens, shards))
    size, tokens = 0.0, 0.0
    bar = progress(total, "reference: scoring", unit="tok")
    for first in range(0, len(shards), world_size()):
        number, mine = first + rank(), (0, 0, 0)
        if number < len(shards):
            file = shard_file(folder, number)
            mine = write_shard(reference, shards[number], demand, budget_bytes, micro_tokens, file)
        new_size, new_tokens, cut = total_over_ranks(mine)
        size, tokens = size + new_size, tokens + new_tokens
        bar.update(new_tokens)
        needed = size * total / max(1, tokens)
        if cut or size > budget_bytes or needed > MARGIN * budget_bytes:
            bar.close()
            announce(
                f"reference: a cache within {demand.tolerance:g} needs about {needed / 1e9:.3g} GB (estimated from"
                f" {tokens / total:.0%} of the tokens), but reference.budget_gb allows {budget_bytes / 1e9:.3g}:"
                " the online reference is used"
            )
            return False
    bar.close()
    return True


def write_shard(
    reference: OnlineReference,
    examples: Sequence[Encoded],
    demand: Demand,
    budget_bytes: float,
    micro_tokens: int,
    file: Path,
) -> tuple[int, int, int]:
    """Scores and writes one shard unless it is there; returns its bytes, its tokens, and 1 where it was cut short.

    It is cut short, and not written, once it alone exceeds the budget of the whole cache.
    """
    if is_finished(file, examples):
        return file.stat().st_size, response_tokens(examples), 0
    scored: dict[str, dict[str, Tensor]] = {}
    size, tokens = 0, 0
    for piece in by_length(examples, lambda example: len(example.ids), micro_tokens):
        for example, tensors in zip(piece, score_examples(reference, piece, demand), strict=True):
            scored[example.id] = tensors
            size += sum(tensor.nbytes for tensor in tensors.values())
        tokens += response_tokens(piece)
        if size > budget_bytes:
            return size, tokens, 1
    parts = [scored[example.id] for example in examples]
    shard = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    shard["token_starts"] = starts([len(part["logp"]) for part in parts])
    shard["entry_starts"] = starts([len(part["probs"]) for part in parts])
    with disk_errors(file), atomic_path(file) as scratch:
        save_file(shard, scratch)
    return file.stat().st_size, tokens, 0


def score_examples(reference: OnlineReference, examples: Sequence[Encoded], demand: Demand) -> list[dict[str, Tensor]]:
    """What a shard holds of each example: logp, entropy, left_out and counts [N], columns and probs [E]."""
    batch = on_device(collate(examples, pad_id=0), reference.model)
    selected = batch["labels"] != IGNORED
    hidden = reference.hidden(batch["input_ids"], batch["attention_mask"], selected)
    weight, bias = reference.head()
    share = partial(demand.share, vocab_size=unmasked_size(weight, bias))
    dense, labels = DenseReference(hidden, weight, bias), batch["labels"][selected]
    sparse, left_out = truncate(dense, labels, share, demand.tolerance, **logit_map(reference.model))
    counts = torch.bincount(sparse.rows.cpu(), minlength=len(left_out))
    tokens = [response_tokens([example]) for example in examples]
    entries = [int(part.sum()) for part in counts.split(tokens)]
    columns = {
        "logp": sparse.logp.float().cpu().split(tokens),
        "entropy": sparse.entropy.float().cpu().split(tokens),
        "left_out": left_out.float().cpu().split(tokens),
        "counts": counts.int().split(tokens),
        "columns": sparse.columns.int().cpu().split(entries),
        "probs": sparse.probs.float().cpu().split(entries),
    }
    return [dict(zip(columns, parts, strict=True)) for parts in zip(*columns.values(), strict=True)]


def is_finished(file: Path, examples: Sequence[Encoded]) -> bool:
    """Whether a shard of these examples is there and whole."""
    if not file.is_file():
        return False
    with contextlib.suppress(UserError):
        return torch.equal(read_shard(file)["token_starts"], starts([response_tokens([one]) for one in examples]))
    return False


def starts(sizes: Sequence[int]) -> Tensor:
    """Where consecutive parts of these sizes begin, and where the last one ends: [len(sizes) + 1] int64."""
    return torch.tensor([0, *sizes]).cumsum(0)


def shard_file(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"{number:05d}.safetensors"


def write_meta(
    folder: Path,
    shards: Sequence[Sequence[Encoded]],
    demand: Demand,
    key: Mapping[str, Any],
    vocab_size: int,
    seconds: float,
) -> None:
    """Measures the shards and writes meta.json, which makes the folder a cache."""
    tokens = soft = entries = size = 0
    largest, total = 0.0, 0.0
    described = []
    for number, examples in enumerate(shards):
        file = shard_file(folder, number)
        shard = read_shard(file)
        errors = target_errors(shard, demand, vocab_size)
        largest, total = max(largest, float(errors.max())), total + float(errors.sum())
        tokens += len(errors)
        soft += int((shard["counts"] > 0).sum())
        entries += len(shard["probs"])
        size += file.stat().st_size
        names = [example.id for example in examples]
        described.append({"file": file.name, "sha256": sha256_file(file), "examples": names})
    info = CacheInfo(
        tolerance=demand.tolerance,
        max_error=largest,
        mean_error=total / max(1, tokens),
        tokens=tokens,
        soft_tokens=soft,
        entries=entries,
        bytes=size,
        seconds=round(seconds, 1),
        vocab_size=vocab_size,
    )
    about = {"created": utc_now(), "key": dict(key), **demand.as_tree(), "info": dataclasses.asdict(info)}
    write_json(folder / META, {**about, "shards": described})
