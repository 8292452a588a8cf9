"""What the types of a recipe's settings cannot say: ranges, and values that make no sense together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gift.cli import UserError
from gift.objectives import resolve
from gift.recipe.schema import (
    RL,
    Data,
    Drift,
    Engine,
    Eval,
    Generation,
    Init,
    LoRA,
    Luffy,
    Optimizer,
    Pretrain,
    Recipe,
    Reference,
    Relift,
)
from gift.recipe.strict import dotted

POSITIVE: dict[type, tuple[str, ...]] = {
    Optimizer: ("lr",),
    Engine: ("micro_tokens", "keep_states", "threads"),
    Generation: ("cache_gb", "max_rows", "data_parallel", "tensor_parallel", "probe_tolerance"),
    LoRA: ("rank", "alpha"),
    Pretrain: ("documents", "hidden", "layers", "heads", "vocab", "batch_size"),
    Data: ("sft", "validation", "max_length"),
    Reference: ("tolerance", "budget_gb"),
    Init: ("epochs", "select_epoch", "batch_size", "updates_per_batch", "save_every"),
    Luffy: ("demonstrations", "gamma"),
    Relift: ("buffer",),
    RL: (
        *("batch_size", "updates_per_batch", "group_size", "temperature", "max_tokens", "norm_length"),
        *("epochs", "validation_items", "save_every"),
    ),
    Eval: ("limit", "every", "every_limit", "every_runs"),
    Drift: ("sequences", "batch_size"),
}
NOT_NEGATIVE: dict[type, tuple[str, ...]] = {
    Optimizer: ("warmup_steps", "weight_decay", "max_grad_norm"),
    Data: ("rl",),
    Relift: ("entropy_coef",),
    RL: (
        *("clip_low", "clip_high", "dual_clip", "kl_coef", "entropy_coef"),
        *("dynamic_sampling", "importance_cap", "validate_every"),
    ),
}
KeyOf = Callable[[str], str]
"""From the name of a setting within a part of the recipe to its dotted key, for messages."""


def check(recipe: Recipe, source: str) -> None:
    """Raises UserError naming `source`, a file, and the key whose value makes no sense, alone or with others."""
    with in_context(source):
        is_folder_name = Path(recipe.name).name == recipe.name and recipe.name not in ("", "..")
        require(is_folder_name, f"name {recipe.name!r} must be usable as a folder's name")
        check_numbers(recipe, str)
        check_engine(recipe.engine)
        check_generation(recipe.generation)
        check_base(recipe)
        require(recipe.reference.tolerance < 1, "reference.tolerance must lie between 0 and 1")
        if recipe.lora is not None:
            require(bool(recipe.lora.targets), "lora.targets is empty: name the layers to adapt")
        check_init(recipe.init, "init.{}".format)
        if recipe.rl is not None:
            check_rl(recipe.rl, "rl.{}".format)
        require(bool(recipe.methods), "methods is empty: name at least one, such as sft: {objective: sft, label: SFT}")
        for name in recipe.methods:
            check_method(recipe, name)
        check_labels(recipe)


@contextmanager
def in_context(context: str) -> Iterator[None]:
    """Puts `context` before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{context}: {error}") from None


def require(holds: bool, message: str) -> None:
    """Raises UserError unless the condition holds."""
    if not holds:
        raise UserError(message)


def check_numbers(settings: Any, key_of: KeyOf, part: str = "") -> None:
    """Raises UserError for a number out of its range in a dataclass, the `part` of a larger one, or in its parts."""
    for name in POSITIVE.get(type(settings), ()):
        value = getattr(settings, name)
        require(value is None or 0 < value < math.inf, f"{key_of(dotted(part, name))} must be positive, got {value}")
    for name in NOT_NEGATIVE.get(type(settings), ()):
        value = getattr(settings, name)
        inside = value is None or 0 <= value < math.inf
        require(inside, f"{key_of(dotted(part, name))} must not be negative, got {value}")
    if isinstance(settings, Optimizer):
        require(all(0 <= beta < 1 for beta in settings.betas), f"{key_of(dotted(part, 'betas'))} must lie in [0, 1)")
    for entry in dataclasses.fields(settings):
        if dataclasses.is_dataclass(inner := getattr(settings, entry.name)):
            check_numbers(inner, key_of, dotted(part, entry.name))


def check_engine(engine: Engine) -> None:
    """Raises UserError for a combination that DeepSpeed does not have."""
    stage = engine.zero_stage
    require(engine.offload != "all" or stage == 3, f"engine.offload all needs zero_stage 3, not {stage}")
    require(engine.offload == "none" or stage > 0, "engine.offload needs zero_stage 1, 2 or 3")
    low_precision = engine.dtype == "bfloat16"
    require(low_precision or engine.master_dtype == "float32", "engine.master_dtype bfloat16 needs dtype bfloat16")
    flash = engine.attention == "flash_attention_2"
    require(low_precision or not flash, "engine.attention flash_attention_2 needs dtype bfloat16")
    offloaded_bf16 = engine.offload != "none" and engine.master_dtype == "bfloat16"
    require(not offloaded_bf16, "engine.offload needs engine.master_dtype float32: the host steps in float32 alone")


def check_generation(generation: Generation) -> None:
    """Raises UserError for an engine that lacks what it needs, or is given what only another has."""
    engine = generation.engine
    require(
        engine == "vllm" or generation.tensor_parallel == 1, "generation.tensor_parallel is a setting of vllm alone"
    )
    is_server = engine == "server"
    require(
        is_server == (generation.url is not None), "generation.url belongs to generation.engine server, and to it alone"
    )
    one_copy = not is_server or generation.data_parallel == 1
    require(one_copy, "generation.data_parallel: a server has its own; start vllm serve with --data-parallel-size")


def check_base(recipe: Recipe) -> None:
    """Raises UserError where base and data do not belong together, or the embedded base cannot be made."""
    nano = recipe.base.model == "nano"
    require((recipe.data.source == "nano") == nano, "data.source and base.model: both nano or neither")
    if nano:
        pretrain = recipe.base.pretrain
        require(pretrain.documents >= pretrain.batch_size, "base.pretrain.documents is smaller than its batch_size")
        require(
            pretrain.heads % 2 == 0 and pretrain.hidden % (2 * pretrain.heads) == 0,
            "base.pretrain.heads must be even, and hidden a multiple of twice that",
        )


def check_init(init: Init, key_of: KeyOf) -> None:
    """Raises UserError for a stage 1 that could not be run."""
    divides = init.batch_size % init.updates_per_batch == 0
    require(divides, f"{key_of('batch_size')} must be a multiple of {key_of('updates_per_batch')}")
    exists = init.select_epoch is None or init.select_epoch <= init.epochs
    require(exists, f"{key_of('select_epoch')} is {init.select_epoch}, but {key_of('epochs')} is {init.epochs}")


def check_rl(rl: RL, key_of: KeyOf) -> None:
    """Raises UserError for a stage 2 that could not be run, or could not learn."""
    require(rl.group_size > 1, f"{key_of('group_size')} must be at least 2: a group of one has no advantage")
    divides = rl.batch_size % rl.updates_per_batch == 0
    require(divides, f"{key_of('batch_size')} must be a multiple of {key_of('updates_per_batch')}")
    require(rl.clip_low <= 1, f"{key_of('clip_low')} must lie in [0, 1]")
    require(rl.dual_clip == 0 or rl.dual_clip > 1, f"{key_of('dual_clip')} must be above 1, or 0 to turn it off")
    capped = not rl.importance_cap or rl.importance_cap >= 1
    require(capped, f"{key_of('importance_cap')} must be at least 1, or 0 to turn it off")
    require(
        rl.luffy.demonstrations < rl.group_size,
        f"{key_of('luffy.demonstrations')} must be below {key_of('group_size')}, or nothing would be sampled",
    )


def check_method(recipe: Recipe, name: str) -> None:
    """Raises UserError for a row that has no stage, or one that could not be run."""
    key, method = f"methods.{name}", recipe.methods[name]
    usable = name.isidentifier() and name != "base"
    require(usable, f"{key}: a method's name must be an identifier, not 'base'")
    if method.objective is not None:
        with in_context(key):
            resolve(method.objective, method.options)
    else:
        require(not method.options, f"{key}.options: there is no objective to have them")
        require(not method.init, f"{key}.init: there is no objective to train with")
    init, rl = recipe.init_of(name), recipe.rl_of(name)
    require(init is not None or rl is not None, f"{key}: neither an objective nor RL: nothing would be trained")
    problems = "data.sft + data.rl" if method.data == "joint" else None
    if init is not None:
        key_of = origin(method.init, f"{key}.init", "init")
        check_numbers(init, key_of)
        check_init(init, key_of)
        enough = recipe.problems_of(name, "init") >= init.batch_size
        require(enough, f"{problems or 'data.sft'} is smaller than {key_of('batch_size')}: no step could be made")
    if rl is not None:
        answered = recipe.data.answer is not None
        require(answered, f"data.answer is null, but RL rewards answers: set {key}.rl to null, or name their column")
        key_of = origin(method.rl or {}, f"{key}.rl", "rl")
        check_numbers(rl, key_of)
        check_rl(rl, key_of)
        enough = recipe.problems_of(name, "rl") >= rl.batch_size
        require(enough, f"{problems or 'data.rl'} is smaller than {key_of('batch_size')}: no step could be made")


def check_labels(recipe: Recipe) -> None:
    """Raises UserError for a method without a label, or with that of another."""
    owners: dict[str, str] = {}
    for name, method in recipe.methods.items():
        label = method.label.strip()
        require(bool(label), f"methods.{name}.label is empty: it names the method in tables and figures")
        require(label not in owners, f"methods.{name}.label {label!r} is that of methods.{owners.get(label)} already")
        owners[label] = name


def origin(changes: Mapping[str, Any], own: str, shared: str) -> KeyOf:
    """For a stage of a method, where each setting was set: in the method's `changes`, else in the shared settings."""

    def key_of(name: str) -> str:
        node: Any = changes
        for part in name.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return f"{shared}.{name}"
            node = node[part]
        return f"{own}.{name}"

    return key_of


def rl_warnings(rl: RL) -> list[str]:
    """What to tell a user whose strategy is not its authors', or who changed what has no effect: a line each."""
    found = []
    if rl.algorithm != "grpo":
        authors = {"luffy": "LUFFY", "relift": "ReLIFT"}[rl.algorithm]
        if rl.clip:
            found.append(f"rl.clip is true, but {authors}'s authors do not clip the ratio: set rl.clip to false")
        if rl.aggregation != "seq_sum_norm":
            found.append(
                f"rl.aggregation is {rl.aggregation}, but {authors}'s authors divide token losses by a constant:"
                " set rl.aggregation to seq_sum_norm"
            )
    unused: list[tuple[bool, tuple[str, ...], str]] = [
        (rl.aggregation != "seq_sum_norm", ("norm_length",), f"aggregation is {rl.aggregation}"),
        (not rl.clip, ("clip_low", "clip_high", "dual_clip"), "clip is false"),
        (rl.kl_coef == 0, ("kl_estimator",), "kl_coef is 0"),
    ]
    for is_unused, names, reason in unused:
        changed = [name for name in names if getattr(rl, name) != getattr(RL(), name)]
        found += [f"rl.{name} has no effect while rl.{reason}" for name in changed if is_unused]
    return found
