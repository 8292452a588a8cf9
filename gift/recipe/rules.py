"""What the types of a recipe's settings cannot say: ranges, and values that make no sense together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
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
    Eval: ("limit",),
    Drift: ("sequences", "batch_size"),
}
NOT_NEGATIVE: dict[type, tuple[str, ...]] = {
    Optimizer: ("warmup_steps", "weight_decay", "max_grad_norm"),
    Data: ("rl",),
    RL: ("clip_low", "clip_high", "dual_clip", "kl_coef", "dynamic_sampling", "importance_cap", "validate_every"),
}


def check(recipe: Recipe, source: str) -> None:
    """Raises UserError naming `source`, a file, and the key whose value makes no sense, alone or with others."""
    with in_context(source):
        is_folder_name = Path(recipe.name).name == recipe.name and recipe.name not in ("", "..")
        require(is_folder_name, f"name {recipe.name!r} must be usable as a folder's name")
        check_numbers(recipe, "")
        check_engine(recipe.engine)
        check_base(recipe)
        require(recipe.reference.tolerance < 1, "reference.tolerance must lie between 0 and 1")
        if recipe.lora is not None:
            require(bool(recipe.lora.targets), "lora.targets is empty: name the layers to adapt")
        check_init(recipe.init, "init")
        if recipe.rl is not None:
            check_rl(recipe.rl, "rl")
        require(bool(recipe.methods), "methods is empty: name at least one, such as sft: {objective: sft, label: SFT}")
        for name in recipe.methods:
            check_method(recipe, name)


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


def check_numbers(settings: Any, key: str) -> None:
    """Raises UserError for a number out of its range in a dataclass, or in one that it holds."""
    for name in POSITIVE.get(type(settings), ()):
        value = getattr(settings, name)
        require(value is None or 0 < value < math.inf, f"{dotted(key, name)} must be positive, got {value}")
    for name in NOT_NEGATIVE.get(type(settings), ()):
        value = getattr(settings, name)
        require(0 <= value < math.inf, f"{dotted(key, name)} must not be negative, got {value}")
    if isinstance(settings, Optimizer):
        require(all(0 <= beta < 1 for beta in settings.betas), f"{key}.betas must lie in [0, 1)")
    for entry in dataclasses.fields(settings):
        if dataclasses.is_dataclass(part := getattr(settings, entry.name)):
            check_numbers(part, dotted(key, entry.name))


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


def check_init(init: Init, key: str) -> None:
    """Raises UserError for a stage 1 that could not be run."""
    divides = init.batch_size % init.updates_per_batch == 0
    require(divides, f"{key}.batch_size must be a multiple of {key}.updates_per_batch")
    exists = init.select_epoch is None or init.select_epoch <= init.epochs
    require(exists, f"{key}.select_epoch is {init.select_epoch}, but {key}.epochs is {init.epochs}")


def check_rl(rl: RL, key: str) -> None:
    """Raises UserError for a stage 2 that could not be run, or could not learn."""
    require(rl.group_size > 1, f"{key}.group_size must be at least 2: the advantage of a group of one is always 0")
    divides = rl.batch_size % rl.updates_per_batch == 0
    require(divides, f"{key}.batch_size must be a multiple of {key}.updates_per_batch")
    require(rl.clip_low <= 1, f"{key}.clip_low must lie in [0, 1]")
    require(rl.dual_clip == 0 or rl.dual_clip > 1, f"{key}.dual_clip must be above 1, or 0 to turn it off")
    require(
        rl.luffy.demonstrations < rl.group_size,
        f"{key}.luffy.demonstrations must be below {key}.group_size, or nothing would be sampled",
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
        where = f"{key}.init" if method.init else "init"
        check_numbers(init, where)
        check_init(init, where)
        enough = recipe.problems_of(name, "init") >= init.batch_size
        require(enough, f"{problems or 'data.sft'} is smaller than {where}.batch_size: no step could be made")
    if rl is not None:
        where = f"{key}.rl" if method.rl else "rl"
        answered = recipe.data.answer is not None
        require(answered, f"data.answer is null, but RL rewards answers: set {key}.rl to null, or name their column")
        check_numbers(rl, where)
        check_rl(rl, where)
        enough = recipe.problems_of(name, "rl") >= rl.batch_size
        require(enough, f"{problems or 'data.rl'} is smaller than {where}.batch_size: no step could be made")
