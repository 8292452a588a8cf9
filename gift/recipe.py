"""A run's recipe: typed, strict, one YAML file, `key=value` overrides. Defaults are the paper's (Appendix E)."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from gift.cli import UserError, nearest

RECIPES = Path(__file__).parent / "recipes"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW and its learning-rate schedule."""

    lr: float
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this L2 norm; 0 leaves them alone."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How DeepSpeed trains."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the model computes in."""
    master_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the optimizer steps on where `dtype` is bfloat16. 'bfloat16' is the setting of the authors' released code,
    in which most updates of a small learning rate are rounded away."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What ZeRO keeps in the host's memory: nothing, the optimizer's state, or (stage 3) the parameters as well."""
    gradient_checkpointing: bool = False
    """Computes activations a second time in the backward pass instead of keeping them."""
    packing: bool = False
    """Puts a micro-batch's sequences into one row, each attending to itself alone, instead of padding them."""
    micro_tokens: int = 16384
    """Tokens, padding included, a rank passes through the model at once. The batch size does not depend on it."""
    keep_states: int = 2
    """How many of the newest states to resume from are kept."""
    threads: int | None = None
    """CPU threads of a process; null leaves the choice to torch. Another number can change the last bits of a sum."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters in place of training all weights; checkpoints are written merged."""

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """How the embedded base is made (only read where base.model is 'nano')."""

    seed: int = 0
    documents: int = 48_000
    hidden: int = 96
    layers: int = 4
    heads: int = 4
    vocab: int = 512
    batch_size: int = 32
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=3e-3, schedule="cosine", warmup_steps=50))


@dataclass(frozen=True, kw_only=True)
class Base:
    """The base model everything starts from and drift is measured against."""

    model: str
    """'nano' (made here), a checkpoint folder, or a Hub repository."""
    revision: str | None = None
    pretrain: Pretrain = field(default_factory=Pretrain)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where problems come from, and the sizes of the three disjoint subsets."""

    source: str
    """'nano' (generated), a .jsonl or .parquet file, or a data set of the Hub such as zwhe99/DeepMath-103K."""
    revision: str | None = None
    split: str = "train"
    """Revision and split of a data set of the Hub."""
    prompt: str = "prompt"
    response: str = "response"
    answer: str = "answer"
    """Names of the columns. The response may lie in a conversation instead: see `messages`."""
    messages: str | None = None
    """Name of a column of chat messages; its last one is the response, those before it are the prompt."""
    template: str | None = None
    """How a prompt becomes text: null is the tokenizer's own chat template, else a name in gift.templates."""
    sft: int = 10_000
    rl: int = 10_000
    validation: int = 1_000
    max_length: int = 8192
    """Tokens of prompt and response together; longer examples are cut on the right."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """How the objectives that need the base model get at it."""

    mode: Literal["online", "cached"] = "online"
    """'online' runs the base model beside the policy; 'cached' scores the data with it once, before training."""
    tolerance: float = 1e-3
    """Largest total-variation error of a cached token's target."""
    budget_gb: float = 20.0
    """Largest size of the cache, in 1e9 bytes. Where it does not suffice for `tolerance`, the reference is online."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of a comparison: how the policy gets from the base to its last checkpoint."""

    label: str
    objective: str | None = None
    """The stage-1 objective, of gift.objectives; null goes from the base straight to RL."""
    options: dict[str, float | str] = field(default_factory=dict)
    """The objective's options."""
    data: Literal["separate", "joint"] = "separate"
    """'joint' gives every stage of this method the SFT and the RL problems together."""
    init: dict[str, Any] = field(default_factory=dict)
    """What this method changes in the recipe's `init`."""
    rl: dict[str, Any] | None = field(default_factory=dict)
    """What this method changes in the recipe's `rl`; null stops after initialization."""


@dataclass(frozen=True, kw_only=True)
class Init:
    """Stage 1, the same for every method unless the method says otherwise."""

    epochs: int = 6
    select_epoch: int | None = None
    """The epoch after which the initialization is taken; null takes the last. Later epochs only add to the log."""
    batch_size: int = 128
    updates_per_batch: int = 1
    """Optimizer steps per batch, each on an equal part of it; PSFT's old policy is that of the batch's beginning."""
    reduction: Literal["token_mean", "seq_sum"] = "token_mean"
    """A step's loss: mean over all response tokens, or sum over tokens and mean over sequences (paper, Eq. 8)."""
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-5))
    save_every: int = 50
    """Batches between saves of the state a killed run continues from."""


@dataclass(frozen=True, kw_only=True)
class Luffy:
    """LUFFY: demonstrations inside the groups (ElliottYan/LUFFY)."""

    demonstrations: int = 1
    """Of a group's samples, how many are the expert's solution."""
    gamma: float = 0.1
    """Off-policy rows have the loss -A pi / (pi + gamma)."""


@dataclass(frozen=True, kw_only=True)
class Relift:
    """ReLIFT: an SFT step whenever enough all-wrong prompts have gathered (TheRoadQaQ/ReLIFT)."""

    buffer: int = 128
    """How many of them make a step."""
    entropy_coef: float = 0.001
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-6))
    """The SFT step's own AdamW."""


@dataclass(frozen=True, kw_only=True)
class RL:
    """Stage 2. Defaults: paper, Appendix E, and verl 0.4 where it is silent."""

    algorithm: Literal["grpo", "luffy", "relift"] = "grpo"
    batch_size: int = 128
    """Prompts per rollout batch."""
    updates_per_batch: int = 2
    group_size: int = 8
    temperature: float = 1.0
    max_tokens: int = 8192
    normalize_std: bool = False
    """Divides advantages by their group's standard deviation."""
    clip: bool = True
    """Whether the ratio is clipped at all; LUFFY and ReLIFT do not."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    """Bound on the ratio where the advantage is negative; 0 turns it off."""
    aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_sum_norm"] = "token_mean"
    """An update's loss: mean over all tokens; mean over sequences of token means or of token sums; the sum of all
    token losses over sequences x `norm_length` (Dr. GRPO)."""
    norm_length: int | None = None
    """The constant of seq_sum_norm in tokens; null is max_tokens."""
    kl_coef: float = 0.0
    """Weight of the KL penalty towards the policy that RL began with; 0 keeps no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    dynamic_sampling: int = 0
    """DAPO: how many more rollout batches may be drawn to replace groups whose samples earned all the same; 0: none."""
    mask_truncated: bool = False
    """Leaves responses that hit max_tokens out of the loss."""
    importance_cap: float = 0.0
    """Truncated importance sampling: cap on the ratio of trainer to generator probability; 0 does not correct it."""
    luffy: Luffy = field(default_factory=Luffy)
    relift: Relift = field(default_factory=Relift)
    epochs: int = 1
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-6, betas=(0.9, 0.999)))
    validate_every: int = 10
    """Rollout batches between measurements of held-out accuracy; 0 measures none."""
    validation_items: int = 100
    save_every: int = 5


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluation of every checkpoint."""

    suites: tuple[str, ...] = ("math",)
    data_dir: str | None = None
    limit: int | None = None
    """Items per task; all of them where this is null."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Distances between checkpoints on the held-out expert solutions."""

    sequences: int | None = None
    """How many held-out sequences; all of them where this is null."""
    batch_size: int = 16


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run does."""

    name: str
    base: Base
    data: Data
    methods: dict[str, Method]
    seed: int = 0
    engine: Engine = field(default_factory=Engine)
    lora: LoRA | None = None
    reference: Reference = field(default_factory=Reference)
    init: Init = field(default_factory=Init)
    rl: RL | None = field(default_factory=RL)
    """null stops after initialization."""
    eval: Eval = field(default_factory=Eval)
    drift: Drift = field(default_factory=Drift)

    def init_of(self, method: str) -> Init | None:
        """Stage 1 of a method, or None where it has none. Raises UserError for a key or value that is not one."""
        if self.methods[method].objective is None:
            return None
        return merged(self.init, self.methods[method].init, f"methods.{method}.init")

    def rl_of(self, method: str) -> RL | None:
        """Stage 2 of a method, or None where it has none. Raises UserError for a key or value that is not one."""
        changes = self.methods[method].rl
        return None if self.rl is None or changes is None else merged(self.rl, changes, f"methods.{method}.rl")


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a name in gift/recipes or of a YAML file, with `key=value` overrides (dotted keys, YAML values).

    Raises UserError naming the file and key for an unknown key (with the nearest known one), a missing key, a value of
    the wrong type, and a file that is not there or not YAML.
    """
    path = find_recipe(name)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, this is {type(tree).__name__}")
    tree.setdefault("name", path.stem)
    for override in overrides:
        apply_override(tree, override)
    recipe = build(Recipe, tree, str(path), "")
    check(recipe, str(path))
    return recipe


def merged(settings: T, changes: Mapping[str, Any], key: str) -> T:
    """`settings`, a dataclass, with a tree of changes in it; `key` names the changes in messages."""

    def merge(tree: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        for name, value in changes.items():
            old = tree.get(name)
            tree[name] = merge(dict(old), value) if isinstance(old, dict) and isinstance(value, Mapping) else value
        return tree

    tree = merge(dataclasses.asdict(settings), changes)  # type: ignore[call-overload]
    return build(type(settings), tree, "recipe", key)


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by name. Raises UserError naming the nearest recipe."""
    if Path(name).suffix in {".yaml", ".yml"}:
        if not Path(name).is_file():
            raise UserError(f"{name}: no such recipe file")
        return Path(name)
    known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    if name not in known:
        raise UserError(f"no recipe {name!r}{nearest(name, known)}; give a YAML file or one of: {', '.join(known)}")
    return RECIPES / f"{name}.yaml"


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets the dotted key of `key=value` in the tree. Raises UserError for anything else."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r}: an override is key=value, such as init.optimizer.lr=1e-5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{override!r}: {text!r} is not a YAML value; quote it") from None
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"{override!r}: {parent!r} has no keys below it")
        node[parent] = dict(child)  # a YAML alias is one mapping in two places: change it in this one alone
        node = node[parent]
    node[last] = value


def build(cls: type[T], tree: Any, file: str, key: str) -> T:
    """A dataclass from a mapping, checked key by key. `key` is where in `file` the mapping lies, for messages."""
    if not isinstance(tree, Mapping):
        raise UserError(f"{file}: {key or 'the recipe'} must be a mapping of keys to values, got {tree!r:.60}")
    hints = typing.get_type_hints(cls)
    known = {entry.name: entry for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in tree:
        if name not in known:
            raise UserError(f"{file}: unknown key {dotted(key, name)!r}{nearest(str(name), known)}")
    for name, entry in known.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and name not in tree:
            raise UserError(f"{file}: missing key {dotted(key, name)!r}")
    return cls(**{name: convert(hints[name], value, file, dotted(key, name)) for name, value in tree.items()})


def convert(kind: Any, value: Any, file: str, key: str) -> Any:
    """`value` as the annotated type `kind`. Raises UserError naming file and key where it is not one."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return build(kind, value, file, key)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [option for option in arguments if option is not type(None)]
        for option in kinds[:-1]:
            with contextlib.suppress(UserError):
                return convert(option, value, file, key)
        return convert(kinds[-1], value, file, key)
    if kind is Any:
        return value
    if origin is Literal:
        if not any(type(value) is type(option) and value == option for option in arguments):
            options = ", ".join(map(str, arguments))
            raise UserError(f"{file}: {key} is {value!r}{nearest(str(value), map(str, arguments))}; options: {options}")
        return value
    if origin is tuple:
        items = arguments if arguments[-1] is not Ellipsis else [arguments[0]] * (len(value) if is_list(value) else 0)
        if not is_list(value) or len(value) != len(items):
            size = "" if Ellipsis in arguments else f" of {len(items)}"
            raise UserError(f"{file}: {key} must be a list{size}, got {value!r:.60}")
        parts = enumerate(zip(items, value, strict=True))
        return tuple(convert(item, part, file, f"{key}[{i}]") for i, (item, part) in parts)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{file}: {key} must be a mapping of keys to values, got {value!r:.60}")
        return {str(name): convert(arguments[1], part, file, dotted(key, str(name))) for name, part in value.items()}
    return scalar(kind, value, file, key)


def scalar(kind: type, value: Any, file: str, key: str) -> Any:
    """A bool, int, float or str; '1e-5', which YAML 1.1 reads as text, and inf are floats, nan is not."""
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            if not math.isnan(number := float(value)):
                return number
    elif type(value) is kind:
        return value
    raise UserError(f"{file}: {key} must be {kind.__name__}, got {value!r:.60}")


def is_list(value: Any) -> bool:
    """Whether a YAML value is a list."""
    return isinstance(value, (list, tuple))


def dotted(key: str, name: str) -> str:
    """The path of `name` below `key`."""
    return f"{key}.{name}" if key else str(name)


POSITIVE = (
    *(f"base.pretrain.{key}" for key in ("documents", "hidden", "layers", "heads", "vocab", "batch_size")),
    *(f"data.{key}" for key in ("sft", "validation", "max_length")),
    *(f"init.{key}" for key in ("epochs", "batch_size", "save_every")),
    *(f"rl.{key}" for key in ("epochs", "batch_size", "updates_per_batch", "temperature", "max_tokens")),
    *(f"rl.{key}" for key in ("validation_items", "save_every")),
    *(f"{stage}.optimizer.lr" for stage in ("base.pretrain", "init", "rl")),
    *("engine.micro_tokens", "eval.limit", "drift.sequences", "drift.batch_size"),
)


def check(recipe: Recipe, file: str) -> None:
    """Raises UserError for values that are well typed but make no sense together."""
    from gift.objectives import resolve

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise UserError(f"{file}: {message}")

    is_folder_name = Path(recipe.name).name == recipe.name and recipe.name not in ("", "..")
    require(is_folder_name, f"name {recipe.name!r} must be usable as a folder's name")
    low_precision_alone = recipe.engine.zero_stage == 0 and recipe.engine.dtype == "bfloat16"
    require(not low_precision_alone, "engine: bfloat16 needs zero_stage 1 or 2, which keep fp32 master weights")
    require(bool(recipe.methods), "methods is empty: name at least one, such as sft: {objective: sft, label: SFT}")
    for name, method in recipe.methods.items():
        require(
            name.isidentifier() and name != "base", f"methods.{name}: a method's name must be an identifier, not 'base'"
        )
        try:
            resolve(method.objective, method.options)
        except UserError as error:
            raise UserError(f"{file}: methods.{name}: {error}") from None
    tree = as_tree(recipe)
    for key in POSITIVE:
        value = at(tree, key)
        require(value is None or 0 < value < math.inf, f"{key} must be positive, got {value}")
    data, nano = recipe.data, recipe.base.model == "nano"
    require((data.source == "nano") == nano, "data.source and base.model: both nano or neither")
    require(data.rl >= 0, "data.rl must not be negative")
    require(data.sft >= recipe.init.batch_size, "data.sft is smaller than init.batch_size: no step could be made")
    if nano:
        pretrain = recipe.base.pretrain
        require(pretrain.documents >= pretrain.batch_size, "base.pretrain.documents is smaller than its batch_size")
        require(
            pretrain.heads % 2 == 0 and pretrain.hidden % (2 * pretrain.heads) == 0,
            "base.pretrain.heads must be even, and hidden a multiple of twice that",
        )
    if recipe.rl is not None:
        rl = recipe.rl
        require(data.rl >= rl.batch_size, "data.rl is smaller than rl.batch_size: no step could be made")
        require(rl.group_size > 1, "rl.group_size must be at least 2: the advantage of a group of one is always 0")
        require(rl.batch_size % rl.updates_per_batch == 0, "rl.batch_size must be a multiple of rl.updates_per_batch")
        require(0 <= rl.clip_low <= 1 and rl.clip_high >= 0, "rl.clip_low must lie in [0, 1], rl.clip_high be >= 0")
        require(rl.dual_clip == 0 or rl.dual_clip > 1, "rl.dual_clip must be above 1, or 0 to turn it off")


def at(tree: Any, key: str) -> Any:
    """The value at a dotted key, or None where a part of the way is null."""
    for name in key.split("."):
        tree = None if tree is None else tree[name]
    return float(tree) if isinstance(tree, str) else tree


def as_tree(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain JSON values; an infinite option is written as the text 'inf'."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(part) for part in value]
        return str(value) if isinstance(value, float) and value in (float("inf"), float("-inf")) else value

    tree: dict[str, Any] = plain(dataclasses.asdict(recipe))
    return tree
