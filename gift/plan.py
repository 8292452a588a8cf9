"""What a run would do, without doing any of it: its recipe, steps, downloads, and the memory and disk they need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import yaml

from gift import nano
from gift.cli import UserError
from gift.memory import MicroBatch, Part, Prediction, Shape, predict, width
from gift.models import is_local, load_config
from gift.objectives import OBJECTIVES, warnings_for
from gift.recipe import Engine, Init, Recipe, as_tree

STEP_COLUMNS = ("policy", "stage", "problems", "epochs", "batches", "updates", "tokens per update")


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
    """Tokens of the longest sequence: prompt and response in stage 1, the response in stage 2."""

    @property
    def tokens_per_update(self) -> int:
        """The most tokens an update can see."""
        return self.sequences * self.max_length


def stages(recipe: Recipe) -> list[StagePlan]:
    """Every stage of every method, in the order in which they are run."""
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
            policy, length = f"{name}-rl", rl.max_tokens
            rls.append(StagePlan(name, "rl", policy, problems, rl.epochs, batches, updates, sequences, length))
    return [*inits, *rls]


def base_shape(recipe: Recipe) -> Shape:
    """The base model's shape from its config alone. Raises UserError where that cannot be read."""
    if recipe.base.model == "nano":
        return Shape.of(nano.base_config(recipe.base.pretrain, recipe.base.pretrain.vocab))
    return Shape.of(load_config(recipe.base.model))


def memory_of(recipe: Recipe, stage: StagePlan, shape: Shape, *, ranks: int, on_gpu: bool) -> Prediction:
    """The memory of one rank during a stage, of stage 2 while it updates the policy."""
    share = -(-stage.sequences // ranks)
    held = (stage.problems + recipe.data.validation) * recipe.data.max_length
    if stage.stage == "init":
        objective = OBJECTIVES[recipe.methods[stage.method].objective or ""]
        reference, optimizers = objective.needs_reference and recipe.reference.mode == "online", 1
    else:
        rl = recipe.rl_of(stage.method)
        assert rl is not None
        reference, optimizers, held = rl.kl_coef > 0, 2 if rl.algorithm == "relift" else 1, 0
    return predict(
        shape,
        recipe.engine,
        MicroBatch.largest(recipe.engine, sequences=share, max_length=stage.max_length),
        ranks=ranks,
        on_gpu=on_gpu,
        lora=recipe.lora,
        reference=reference,
        recompute=stage.stage == "rl",
        optimizers=optimizers,
        encoded_tokens=held,
    )


@dataclass(frozen=True)
class Plan:
    """A recipe's plan on so many ranks; as text, what `--dry-run` prints. `shape` is None where none could be had."""

    recipe: Recipe
    ranks: int
    on_gpu: bool
    stages: Sequence[StagePlan]
    shape: Shape | None
    reason: str
    """Why there is no shape."""

    def __str__(self) -> str:
        sections = {
            "recipe": self.recipe_lines(),
            "steps": self.step_lines(),
            "downloads": self.download_lines(),
            f"memory of each of {self.ranks} ranks" if self.ranks > 1 else "memory": self.memory_lines(),
            "disk": self.disk_lines(),
        }
        return "\n\n".join("\n".join([f"# {title}", *lines]) for title, lines in sections.items())

    def recipe_lines(self) -> Iterator[str]:
        """The resolved recipe, itself a recipe file."""
        yield yaml.safe_dump(as_tree(self.recipe), sort_keys=False, width=120).rstrip()

    def step_lines(self) -> Iterator[str]:
        """A table of the stages, the policies there will be, and warnings."""
        rows: list[tuple[str, ...]] = [
            ("policy", "stage", "problems", "epochs", "batches", "updates", "tokens per update")
        ]
        for stage in self.stages:
            numbers = (stage.problems, stage.epochs, stage.batches, stage.updates)
            tokens = f"<= {stage.tokens_per_update:,}"
            rows.append((stage.policy, stage.stage, *(f"{number:,}" for number in numbers), tokens))
        yield from table(rows, "<<>>>>>")
        yield "policies: " + ", ".join(["base", *(stage.policy for stage in self.stages)])
        for stage in self.stages:
            init, method = self.recipe.init_of(stage.method), self.recipe.methods[stage.method]
            if stage.stage == "init" and init is not None and method.objective is not None:
                yield from notes(stage, init)
                for warning in warnings_for(method.objective, method.options, updates_per_batch=init.updates_per_batch):
                    yield f"warning: {stage.method}: {warning}"

    def download_lines(self) -> Iterator[str]:
        """What has to come from the Hub unless it is in its cache already."""
        base, data = self.recipe.base, self.recipe.data
        if base.model == "nano":
            yield f"none: base and data are made here ({base.pretrain.documents:,} documents of pretraining)"
            return
        if not is_local(base.model):
            size = "" if self.shape is None else f", about {readable(2 * self.shape.parameters)} in 16 bits"
            yield f"model {base.model}, revision {base.revision or 'newest'}{size}"
        else:
            yield f"model {base.model}: on this machine"
        if data.source.endswith((".jsonl", ".parquet", ".json")) or is_local(data.source):
            yield f"data {data.source}: on this machine"
        else:
            yield f"data {data.source}, split {data.split}, revision {data.revision or 'newest'}"

    def memory_lines(self) -> Iterator[str]:
        """The peak of every stage and its parts; stages that take the same are shown once."""
        if self.shape is None:
            yield f"not known: {self.reason}"
            return
        alike: dict[tuple[Part, ...], list[StagePlan]] = {}
        for stage in self.stages:
            found = memory_of(self.recipe, stage, self.shape, ranks=self.ranks, on_gpu=self.on_gpu)
            alike.setdefault(tuple(found.parts), []).append(stage)
        yield f"predicted for {self.shape.parameters:,} parameters and the longest sequences there may be"
        for parts, same in alike.items():
            prediction = Prediction(parts, self.on_gpu)
            where = f"GPU {readable(prediction.peak)}, host {readable(prediction.host)}"
            peak = where if self.on_gpu else readable(prediction.peak)
            yield f"{', '.join(stage.policy for stage in same)}: at most {peak}"
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
        # Masters and both moments; the newest state is written before the oldest is removed.
        state = 3 * precision(recipe.engine) * self.shape.trained(recipe.lora)
        yield f"checkpoints: {len(self.stages)} x {readable(checkpoint)}"
        yield f"states to resume from, of one stage at a time: {kept + 1} x {readable(state)}"
        if recipe.reference.mode == "cached":
            yield f"cached reference: at most {recipe.reference.budget_gb:g} GB"


def plan(recipe: Recipe, ranks: int) -> Plan:
    """The plan of a recipe on `ranks` ranks with this machine's kind of device; loads and downloads no weights."""
    shape, reason = None, ""
    try:
        shape = base_shape(recipe)
    except UserError as error:
        reason = str(error)
    return Plan(recipe, ranks, torch.cuda.is_available(), stages(recipe), shape, reason)


def precision(engine: Engine) -> int:
    """Bytes of a number in the optimizer's state."""
    return 2 if engine.master_dtype == "bfloat16" else 4


def notes(stage: StagePlan, init: Init) -> Iterator[str]:
    """What the table cannot say of a stage."""
    if init.select_epoch not in (None, init.epochs):
        yield f"{stage.policy}: taken after epoch {init.select_epoch} of {init.epochs}"


def readable(size: float) -> str:
    """A number of bytes in units of 1e9 or 1e6."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def table(rows: Sequence[Sequence[str]], align: str) -> Iterator[str]:
    """Aligned lines; `align` has < or > for every column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:{side}{size}}" for cell, side, size in zip(row, align, widths, strict=True))
        yield "  ".join(cells).rstrip()
