"""What a run would do, without doing any of it: its recipe, steps, downloads, and the memory and disk they need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from gift import nano
from gift.cli import UserError
from gift.memory import MicroBatch, Part, Prediction, Shape, predict, width
from gift.models import is_local, load_config
from gift.objectives import OBJECTIVES, warnings_for
from gift.recipe import Engine, Init, Recipe, as_tree, inline, leaves, rl_warnings, shadowed


@dataclass(frozen=True)
class StagePlan:
    """One stage of one method, in numbers."""

    method: str
    stage: Literal["init", "rl"]
    policy: str
    problems: int
    epochs: int
    batches: int
    """Over all epochs; what of an epoch fills no batch is dropped."""
    updates: int
    """Optimizer steps."""
    sequences: int
    """Per update, over all ranks."""
    max_length: int
    """Tokens of the longest sequence, prompt and response."""

    @property
    def tokens_per_update(self) -> int:
        """The most tokens an update can see."""
        return self.sequences * self.max_length


def stages(recipe: Recipe, window: int | None = None) -> list[StagePlan]:
    """Every stage of every method, in the order in which they are run; `window` is the model's, in tokens, if known.

    Prompts are taken to be shorter than `data.max_length`, as those of stage 1 have to be.
    """
    inits, rls = [], []
    for name in recipe.methods:
        if (init := recipe.init_of(name)) is not None:
            problems = recipe.problems_of(name, "init")
            batches = problems // init.batch_size * init.epochs
            updates, sequences = batches * init.updates_per_batch, init.batch_size // init.updates_per_batch
            length = recipe.data.max_length
            inits.append(StagePlan(name, "init", name, problems, init.epochs, batches, updates, sequences, length))
        if (rl := recipe.rl_of(name)) is not None:
            problems = recipe.problems_of(name, "rl")
            batches = problems // rl.batch_size * rl.epochs
            updates = batches * rl.updates_per_batch
            sequences = rl.batch_size // rl.updates_per_batch * rl.group_size
            policy, length = f"{name}-rl", recipe.data.max_length + rl.max_tokens
            length = length if window is None else min(length, window)
            rls.append(StagePlan(name, "rl", policy, problems, rl.epochs, batches, updates, sequences, length))
    return [*inits, *rls]


def base_config(recipe: Recipe) -> Any:
    """The base model's config. Raises UserError where that cannot be read."""
    base = recipe.base
    if base.model == "nano":
        return nano.base_config(base.pretrain, base.pretrain.vocab)
    model = Path(base.model).expanduser() if is_local(base.model) else base.model
    return load_config(model, revision=base.revision)


def window_of(config: Any) -> int | None:
    """The longest sequence a model takes, in tokens; None where its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def optimizers_of(recipe: Recipe, stage: StagePlan) -> int:
    """How many optimizers with moments of their own a stage has."""
    rl = recipe.rl_of(stage.method) if stage.stage == "rl" else None
    return 2 if rl is not None and rl.algorithm == "relift" else 1


def memory_of(recipe: Recipe, stage: StagePlan, shape: Shape, *, ranks: int, on_gpu: bool) -> Prediction:
    """The memory of one rank during a stage."""
    share = -(-stage.sequences // ranks)
    rollouts = None
    held = (stage.problems + recipe.data.validation) * recipe.data.max_length
    if stage.stage == "init":
        objective = OBJECTIVES[recipe.methods[stage.method].objective or ""]
        reference = objective.needs_reference and recipe.reference.mode == "online"
    else:
        rl = recipe.rl_of(stage.method)
        assert rl is not None
        reference, held = rl.kl_coef > 0, 0
        rollouts = MicroBatch(-(-rl.batch_size // ranks) * rl.group_size, stage.max_length)
    return predict(
        shape,
        recipe.engine,
        MicroBatch.largest(recipe.engine, sequences=share, max_length=stage.max_length),
        ranks=ranks,
        on_gpu=on_gpu,
        lora=recipe.lora,
        reference=reference,
        recompute=stage.stage == "rl",
        optimizers=optimizers_of(recipe, stage),
        encoded_tokens=held,
        generation=recipe.generation,
        rollouts=rollouts,
    )


def state_bytes(recipe: Recipe, stage: StagePlan, shape: Shape, *, ranks: int) -> int:
    """The size of a state that the stage resumes from, of all ranks: masters, and two moments of every optimizer.

    Without ZeRO every rank writes all of it.
    """
    numbers = (1 + 2 * optimizers_of(recipe, stage)) * shape.trained(recipe.lora)
    return precision(recipe.engine) * numbers * (1 if recipe.engine.zero_stage else ranks)


@dataclass(frozen=True)
class Plan:
    """A recipe's plan on so many ranks; as text, what `--dry-run` prints. `shape` is None where none could be had."""

    recipe: Recipe
    ranks: int
    on_gpu: bool
    overrides: Sequence[str]
    """Those that the recipe was loaded with."""
    stages: Sequence[StagePlan]
    shape: Shape | None
    reason: str
    """Why there is no shape."""

    def __str__(self) -> str:
        each = f" of each of {self.ranks} ranks" if self.ranks > 1 else ""
        sections = {
            "recipe": self.recipe_lines(),
            "steps": self.step_lines(),
            "downloads": self.download_lines(),
            f"memory{each} on a {'GPU' if self.on_gpu else 'CPU'}": self.memory_lines(),
            "disk": self.disk_lines(),
        }
        return "\n\n".join("\n".join([f"# {title}", *lines]) for title, lines in sections.items())

    def recipe_lines(self) -> Iterator[str]:
        """The resolved recipe, itself a recipe file."""
        yield yaml.safe_dump(as_tree(self.recipe), sort_keys=False, width=120).rstrip()

    def step_lines(self) -> Iterator[str]:
        """A table of the stages, the policies there will be, what methods change, and warnings."""
        rows: list[tuple[str, ...]] = [
            ("policy", "stage", "problems", "epochs", "batches", "updates", "tokens per update")
        ]
        for stage in self.stages:
            numbers = (stage.problems, stage.epochs, stage.batches, stage.updates)
            tokens = f"<= {stage.tokens_per_update:,}"
            rows.append((stage.policy, stage.stage, *(f"{number:,}" for number in numbers), tokens))
        yield from table(rows, "<<>>>>>")
        yield "policies: " + ", ".join(["base", *(stage.policy for stage in self.stages)])
        for name, method in self.recipe.methods.items():
            changes = {"init": method.init, "rl": {} if self.recipe.rl is None else method.rl}
            if words := [f"{key}={inline(value)}" for key, value in leaves(changes)]:
                yield f"{name} changes: {' '.join(words)}"
        for stage in self.stages:
            init, method = self.recipe.init_of(stage.method), self.recipe.methods[stage.method]
            if stage.stage == "init" and init is not None:
                yield from notes(stage, init)
        yield from (f"warning: {warning}" for warning in self.warnings())

    def warnings(self) -> Iterator[str]:
        """Settings that do not do what they seem to."""
        yield from shadowed(self.recipe, self.overrides)
        policies: dict[str, list[str]] = {}
        for stage in self.stages:
            method = self.recipe.methods[stage.method]
            init, rl = self.recipe.init_of(stage.method), self.recipe.rl_of(stage.method)
            found: list[str] = []
            if stage.stage == "rl" and rl is not None:
                found = rl_warnings(rl)
            elif init is not None and method.objective is not None:
                found = warnings_for(method.objective, method.options, updates_per_batch=init.updates_per_batch)
            for warning in found:
                policies.setdefault(warning, []).append(stage.policy)
        yield from (f"{', '.join(names)}: {warning}" for warning, names in policies.items())

    def download_lines(self) -> Iterator[str]:
        """What has to come from the Hub unless it is in its cache already."""
        base, data = self.recipe.base, self.recipe.data
        if base.model == "nano":
            yield f"none: base and data are made here ({base.pretrain.documents:,} documents of pretraining)"
            return
        if is_local(base.model):
            there = Path(base.model).expanduser().is_dir()
            yield f"model {base.model}: {'on this machine' if there else 'no such checkpoint folder'}"
        else:
            size = "" if self.shape is None else f", about {readable(2 * self.shape.parameters)} in 16 bits"
            yield f"model {base.model}, revision {base.revision or 'newest'}{size}"
        if data.source.endswith((".jsonl", ".parquet", ".json")) or is_local(data.source):
            there = Path(data.source).expanduser().exists()
            yield f"data {data.source}: {'on this machine' if there else 'no such file or folder'}"
        else:
            yield f"data {data.source}, split {data.split}, revision {data.revision or 'newest'}"

    def memory_lines(self) -> Iterator[str]:
        """The peak of every stage and its parts; stages that take the same are shown once."""
        if self.shape is None:
            yield f"not known: {self.reason}"
            return
        alike: dict[tuple[str, tuple[Part, ...]], list[StagePlan]] = {}
        for stage in self.stages:
            found = memory_of(self.recipe, stage, self.shape, ranks=self.ranks, on_gpu=self.on_gpu)
            alike.setdefault((stage.stage, tuple(found.parts)), []).append(stage)
        yield f"predicted for {self.shape.parameters:,} parameters and the longest sequences there may be"
        for (kind, parts), same in alike.items():
            prediction = Prediction(parts, self.on_gpu)
            where = f"GPU {readable(prediction.peak)}, host {readable(prediction.host)}"
            peak = where if self.on_gpu else readable(prediction.peak)
            with_vllm = kind == "rl" and self.recipe.generation.engine == "vllm"
            more = ", not counting what vLLM needs beside its weights and cache" * with_vllm
            yield f"{', '.join(stage.policy for stage in same)}: at most {peak}{more}"
            rows = [
                (f"  {part.name}", readable(part.size), ", ".join(part.phases) or "always", "host" * part.on_host)
                for part in parts
            ]
            yield from table(rows, "<><<")

    def disk_lines(self) -> Iterator[str]:
        """What checkpoints and states to resume from take."""
        if self.shape is None:
            yield f"not known: {self.reason}"
            return
        recipe = self.recipe
        checkpoint = width(recipe.engine) * self.shape.parameters
        kept = recipe.engine.keep_states
        # Of the stage that needs most; the newest state is written before the oldest is removed.
        state = max(state_bytes(recipe, stage, self.shape, ranks=self.ranks) for stage in self.stages)
        yield f"checkpoints: {len(self.stages)} x {readable(checkpoint)}"
        yield f"states to resume from, of one stage at a time: at most {kept + 1} x {readable(state)}"
        if recipe.reference.mode == "cached":
            yield f"cached reference: at most {recipe.reference.budget_gb:g} GB"


def plan(recipe: Recipe, ranks: int, on_gpu: bool | None = None, overrides: Sequence[str] = ()) -> Plan:
    """The plan of a recipe, loaded with these overrides, on `ranks` ranks; loads and downloads no weights.

    `on_gpu` says which device to predict memory for; None is a GPU where there is one, or where the recipe computes in
    bfloat16, as it would on one.
    """
    if on_gpu is None:
        on_gpu = recipe.engine.dtype == "bfloat16" or torch.cuda.is_available()
    shape, window, reason = None, None, ""
    try:
        config = base_config(recipe)
        shape, window = Shape.of(config), window_of(config)
    except UserError as error:
        reason = str(error)
    return Plan(recipe, ranks, on_gpu, overrides, stages(recipe, window), shape, reason)


def precision(engine: Engine) -> int:
    """Bytes of a number in the optimizer's state."""
    return 2 if engine.master_dtype == "bfloat16" else 4


def notes(stage: StagePlan, init: Init) -> Iterator[str]:
    """What the table cannot say of a stage."""
    if init.select_epoch not in (None, init.epochs):
        yield f"{stage.policy}: taken after epoch {init.select_epoch} of {init.epochs}"


def readable(size: float) -> str:
    """A number of bytes in units of 1e9, 1e6 or 1e3."""
    if size < 1e5:
        return f"{size / 1e3:.1f} kB"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def table(rows: Sequence[Sequence[str]], align: str) -> Iterator[str]:
    """Aligned lines; `align` has < or > for every column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:{side}{size}}" for cell, side, size in zip(row, align, widths, strict=True))
        yield "  ".join(cells).rstrip()
