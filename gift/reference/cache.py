"""A cached reference: folders of safetensors that say what the base model says about a data set's responses.

    <root>/<hash>/meta.json             what was scored, for whom, how exact it is, and every shard's hash: written last
    <root>/<hash>/00000.safetensors     some examples, in the order of meta.json:
        logp, entropy, left_out [N]     log p(y), H(p) and 1 - p(y) - sum of the stored p(v), of every response token
        counts [N]                      how many entries a token has
        columns, probs [E]              the entries: place in the vocabulary and p(v), largest first
        token_starts, entry_starts [examples + 1]

A method multiplies p by a factor share(log p(y)) in its gradient d loss / d logits (GIFT by 1 - w). Counting what is
not stored as the label's changes its target by share * left_out in total variation, and the gradient of a token with
respect to its logits by twice that in the L1 norm. GIFT's factor falls as beta grows, so that one cache serves all
larger beta of a sweep; `CachedReference.error` says what it is worth to any method, without the base model.

A folder without meta.json is one whose scoring was stopped; it is never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gift.batches import Encoded
from gift.cli import UserError
from gift.data import Example, fingerprint
from gift.objectives import OBJECTIVES, needs_reference
from gift.recipe import Recipe
from gift.records import read_json, sha256_file, sha256_json
from gift.vocab import SparseReference

FORMAT = 1
META = "meta.json"
AGAIN = "score again with python -m gift.reference score RECIPE"
TYPICAL_VOCAB = 100_000
ROUNDING = 1 + 1e-5  # how far a bound may be exceeded by float32's rounding
KEY_NAMES = {
    "format": "format of the cache",
    "weights": "base model (sha256 of its weights)",
    "dtype": "precision of the base model",
    "tokenizer": "tokenizer (sha256 of its vocabulary)",
    "chat_template": "chat template",
    "template": "data.template",
    "max_length": "data.max_length",
    "data": "data (their sha256)",
    "tokens": "tokens of the data (their sha256)",
}


# ---------------------------------------------------------------------------------------------------------------------
# What a cache is made of, and for


def cache_key(
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    *,
    weights_sha256: str,
    data_sha256: str,
    dtype: str,
    template: str | None,
    max_length: int,
) -> dict[str, Any]:
    """What the scores depend on, as JSON: the base model, and how the data became tokens.

    The tokens' own hash would do; the others say what is different where they differ.
    """
    return {
        "format": FORMAT,
        "weights": weights_sha256,
        "dtype": dtype,
        "tokenizer": sha256_json(tokenizer.get_vocab()),
        "chat_template": sha256_json(tokenizer.chat_template),
        "template": template,
        "max_length": max_length,
        "data": data_sha256,
        "tokens": sha256_tokens(encoded),
    }


def key_of(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
    weights_sha256: str,
) -> dict[str, Any]:
    """`cache_key` of a recipe's examples, as tokens, and its base model."""
    return cache_key(
        tokenizer,
        encoded,
        weights_sha256=weights_sha256,
        data_sha256=fingerprint(examples),
        dtype=recipe.engine.dtype,
        template=recipe.data.template,
        max_length=recipe.data.max_length,
    )


def sha256_tokens(encoded: Sequence[Encoded]) -> str:
    """Hex SHA-256 of the examples' ids, prompt lengths and tokens, in order."""
    digest = hashlib.sha256()
    for example in encoded:
        digest.update(repr((example.id, example.prompt_length, len(example.ids))).encode(errors="backslashreplace"))
        digest.update(np.asarray(example.ids, dtype=np.int64).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Demand:
    """What training asks of a cache: whose targets it has to serve, and how exactly."""

    objectives: tuple[tuple[str, Mapping[str, float | str]], ...]
    """Names in gift.objectives.OBJECTIVES, each with its options."""
    tolerance: float
    """Largest total-variation error of a token's target."""

    def share(self, ref_logp: Tensor, vocab_size: int) -> Tensor:
        """The largest factor [N] with which one of the objectives multiplies p in its gradient.

        ref_logp: log p(y) [N] in nats; vocab_size: entries of the vocabulary that are not masked.
        """
        largest = torch.zeros_like(ref_logp)
        for name, options in self.objectives:
            share = OBJECTIVES[name].reference_share(ref_logp, vocab_size=vocab_size, **options)
            largest = torch.maximum(largest, share)
        return largest

    def without_costliest(self) -> Demand:
        """The demand without the setting that multiplies p by most, at surprisals from none to 30 nats."""

        def cost(setting: tuple[str, Mapping[str, float | str]]) -> float:
            surprisals = torch.arange(0.0, 31.0)
            return float(Demand((setting,), self.tolerance).share(-surprisals, TYPICAL_VOCAB).sum())

        costliest = max(self.objectives, key=cost)
        return replace(self, objectives=tuple(setting for setting in self.objectives if setting is not costliest))

    def as_tree(self) -> dict[str, Any]:
        """As JSON values, in an order that does not depend on that of the objectives."""
        objectives = [
            {"objective": name, "options": {key: plain(value) for key, value in options.items()}}
            for name, options in self.objectives
        ]
        return {"objectives": sorted(objectives, key=sha256_json), "tolerance": self.tolerance}


def demands_of(recipe: Recipe, *, beta: float | None = None, tolerance: float | None = None) -> dict[str, Demand]:
    """What the methods of a recipe that need the base model ask for, and GIFT at `beta`, if that is given.

    One demand, hence one cache, per objective: KD and ASFT need p for nearly every token, GIFT for few. `tolerance`
    replaces the recipe's. Raises UserError for a beta that is not a number >= 0.
    """
    wanted: dict[str, list[tuple[str, Mapping[str, float | str]]]] = {}
    for method in recipe.methods.values():
        if method.objective is not None and needs_reference(method.objective):
            wanted.setdefault(method.objective, []).append((method.objective, method.options))
    if beta is not None:
        OBJECTIVES["gift"].check({"beta": beta})
        wanted.setdefault("gift", []).append(("gift", {"beta": beta}))
    exactness = recipe.reference.tolerance if tolerance is None else tolerance
    return {objective: Demand(tuple(settings), exactness) for objective, settings in wanted.items()}


def scored_subsets(recipe: Recipe) -> tuple[str, ...]:
    """The subsets that methods with a reference train on in stage 1."""
    joint = any(
        method.data == "joint" and method.objective is not None and needs_reference(method.objective)
        for method in recipe.methods.values()
    )
    return ("sft", "rl") if joint else ("sft",)


def plain(value: float | str) -> float | str:
    """An option as a JSON value; an infinite one as text."""
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def cache_folder(root: Path, key: Mapping[str, Any], demand: Demand) -> Path:
    """The folder in `root` of the cache with this content."""
    return root / sha256_json({"key": dict(key), **demand.as_tree()})[:16]


@dataclass(frozen=True)
class CacheInfo:
    """A cache in numbers."""

    tolerance: float
    max_error: float
    """Total variation between a token's target and the exact one, up to float32's rounding: the largest ..."""
    mean_error: float
    """... and the mean over all tokens."""
    tokens: int
    soft_tokens: int
    """Tokens with entries."""
    entries: int
    bytes: int
    seconds: float
    vocab_size: int

    def summary(self) -> str:
        """Some lines for a person."""
        each = self.entries / self.soft_tokens if self.soft_tokens else 0.0
        return "\n".join(
            [
                f"tokens           {self.tokens:,}",
                f"soft tokens      {self.soft_tokens:,} ({self.soft_tokens / max(1, self.tokens):.2%}),"
                f" {each:.1f} stored probabilities each",
                f"target's error   at most {self.max_error:.3g}, mean {self.mean_error:.3g}"
                f" (total variation; tolerance {self.tolerance:g})",
                f"size             {self.bytes / 1e6:,.1f} MB",
                f"time             {self.seconds:.1f} s",
            ]
        )


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class CachedReference:
    """A finished cache, mapped into memory: pages are read when a batch needs them."""

    def __init__(self, folder: Path, key: Mapping[str, Any] | None = None) -> None:
        """Opens a cache, and makes sure that its files are whole and, where `key` is given, that it was made for it.

        Raises UserError that says what is missing, damaged or different, and to score again.
        """
        self.folder = folder
        if not (folder / META).is_file():
            raise UserError(f"{folder}: no finished reference cache (it has no {META}); {AGAIN}")
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            self.key: dict[str, Any] = dict(meta["key"])
            self.info = CacheInfo(**meta["info"])
            shards = [(folder / Path(part["file"]).name, part["sha256"], part["examples"]) for part in meta["shards"]]
            self._place = {name: (n, row) for n, (_, _, names) in enumerate(shards) for row, name in enumerate(names)}
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{folder / META}: damaged; {AGAIN}") from None
        check_key(folder, self.key, key)
        self._shards = [open_shard(file, sha256) for file, sha256, _ in shards]

    def batch(self, examples: Sequence[Encoded]) -> SparseReference:
        """What the base says about these examples' response tokens, example after example: the labelled positions of
        `gift.batches.collate(examples)` in row-major order. Without examples it is empty.

        Raises UserError for an example that was not scored, or with another number of tokens.
        """
        parts: dict[str, list[Tensor]] = {name: [] for name in ("logp", "entropy", "counts", "columns", "probs")}
        for example in examples:
            if example.id not in self._place:
                raise UserError(f"{self.folder}: no example {example.id!r} in this reference cache; {AGAIN}")
            number, row = self._place[example.id]
            shard = self._shards[number]
            first, last = shard["token_starts"][row : row + 2].tolist()
            if last - first != (tokens := len(example.ids) - example.prompt_length):
                raise UserError(
                    f"{self.folder}: example {example.id!r} has {tokens} response tokens, {last - first} were scored;"
                    f" {AGAIN}"
                )
            begin, end = shard["entry_starts"][row : row + 2].tolist()
            for name, part in parts.items():
                part.append(shard[name][begin:end] if name in ("columns", "probs") else shard[name][first:last])
        joined = {name: torch.cat(part) if part else torch.empty(0) for name, part in parts.items()}
        counts = joined["counts"].long()
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        return SparseReference(joined["logp"], joined["entropy"], rows, joined["columns"].long(), joined["probs"])

    def error(self, demand: Demand) -> tuple[float, float]:
        """The largest and the mean total-variation error of a token's target, were it trained on by these methods."""
        largest, total = 0.0, 0.0
        for shard in self._shards:
            errors = target_errors(shard, demand, self.info.vocab_size)
            largest, total = max(largest, float(errors.max())), total + float(errors.sum())
        return largest, total / max(1, self.info.tokens)

    def serves(self, demand: Demand) -> bool:
        """Whether every token's target stays within the tolerance."""
        return self.error(demand)[0] <= demand.tolerance * ROUNDING


def target_errors(shard: Mapping[str, Tensor], demand: Demand, vocab_size: int) -> Tensor:
    """The total-variation error [N] float64 of every target of a shard."""
    return demand.share(shard["logp"], vocab_size).double() * shard["left_out"].double()


def open_shard(file: Path, sha256: str) -> dict[str, Tensor]:
    """A shard's tensors, mapped into memory. Raises UserError where it is missing or not the file that was written."""
    if not file.is_file():
        raise UserError(f"{file}: missing from this reference cache; {AGAIN}")
    if sha256_file(file) != sha256:
        raise UserError(f"{file}: not the file that was written (another sha256); {AGAIN}")
    return read_shard(file)


def read_shard(file: Path) -> dict[str, Tensor]:
    """A shard's tensors, mapped into memory. Raises UserError where it is not a safetensors file."""
    try:
        with safe_open(file, "pt") as opened:
            names = opened.keys()
            return {name: opened.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise UserError(f"{file}: damaged: {error}; {AGAIN}") from None


def check_key(folder: Path, made_for: Mapping[str, Any], wanted: Mapping[str, Any] | None) -> None:
    """Raises UserError naming what differs."""
    if wanted is None:
        return
    differing = [name for name in {**wanted, **made_for} if made_for.get(name) != wanted.get(name)]
    if differing:
        names = ", ".join(KEY_NAMES.get(name, name) for name in differing)
        raise UserError(f"{folder}: this reference cache is stale: other {names}; {AGAIN}")


def find_cache(root: Path, key: Mapping[str, Any], demand: Demand) -> CachedReference | None:
    """A finished cache in `root` of this base and data that is exact enough: the one made for `demand`, or another.

    Raises UserError where the one made for `demand` is damaged.
    """
    own = cache_folder(root, key, demand)
    if (own / META).is_file():
        return CachedReference(own, key)
    for meta in sorted(root.glob(f"*/{META}")):
        with contextlib.suppress(UserError):  # of other data, or damaged
            made = read_json(meta)
            if not isinstance(made, dict) or made.get("key") != key:
                continue
            if (cache := CachedReference(meta.parent, key)).serves(demand):
                return cache
    return None
