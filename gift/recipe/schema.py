"""All settings of a run, typed. Defaults are the paper's (Appendix E)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gift.recipe.strict import changed


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
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """transformers' implementation of attention in stage 1; stage 2 keeps sdpa, which sampling needs.
    'flash_attention_2' needs the package flash-attn, a GPU and dtype bfloat16."""
    keep_states: int = 2
    """How many of the newest states to resume from are kept."""
    threads: int | None = None
    """CPU threads of a process; null leaves the choice to torch. Another number can change the last bits of a sum."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Where samples come from, in RL and in evaluation."""

    engine: Literal["hf", "vllm", "server"] = "hf"
    """transformers in this process; vLLM in this process, or in processes of its own; a vLLM server at `url`."""
    cache_gb: float = 4.0
    """Memory for keys and values in 1e9 bytes, of each copy of the model on each device."""
    max_rows: int = 512
    """Samples in progress at once in each copy of the model, where `cache_gb` has room for them."""
    data_parallel: int = 1
    """Copies of the model in evaluation, each in its own process. In RL every rank has one."""
    tensor_parallel: int = 1
    """vllm: devices that share a copy of the model; in RL, ranks whose number must be a multiple of it."""
    prefix_caching: bool = True
    """vllm: keeps what prompts have in common, until the weights change."""
    chunked_prefill: bool | None = None
    """vllm: mixes pieces of long prompts into the batches of decoding. null: on a GPU; vLLM 0.32 cannot on a CPU."""
    eager: bool | None = None
    """vllm: neither compiles nor records CUDA graphs: starts sooner, samples slower. null: only on a CPU."""
    sleep: bool = True
    """vllm on a GPU, in RL: gives its memory back while the policy is trained."""
    url: str | None = None
    """server: where it listens, such as http://10.0.0.2:8000."""
    shared_folder: str | None = None
    """server: a folder that it and this job both see; weights are handed over there. RL needs one."""
    probe_tolerance: float | None = None
    """Largest mean difference, in nats, between the engine's and the trainer's log-probabilities of the probe, above
    which the engine's weights count as wrong. null: 1e-3 in float32, 0.1 in bfloat16."""


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
    config: str | None = None
    """The configuration of a data set that has several, such as main of openai/gsm8k."""
    split: str = "train"
    """Revision, configuration and split of a data set of the Hub."""
    prompt: str = "prompt"
    response: str = "response"
    answer: str | None = "answer"
    """Names of the columns. The response may lie in a conversation instead: see `messages`. A null answer: the data
    have none, which RL cannot do without."""
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
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-6, betas=(0.9, 0.999)))
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
    importance_cap: float | None = None
    """Truncated importance sampling: cap on the ratio of trainer to generator probability; 0 does not correct it. null:
    2 in bfloat16, where single tokens differ by a factor; 0 in float32, where none does (docs/generation.md)."""
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
    every: int | None = None
    """RL steps from one evaluation during training to the next, the first before any step; null: only at the end."""
    every_suites: tuple[str, ...] | None = None
    """What is evaluated then, of the suites whose answers are right or wrong; null: those of `suites`."""
    every_limit: int | None = 64
    """Items per task then."""
    every_runs: int = 1
    """Runs then, of one sample of each item."""


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
    generation: Generation = field(default_factory=Generation)
    init: Init = field(default_factory=Init)
    rl: RL | None = field(default_factory=RL)
    """null stops after initialization."""
    eval: Eval = field(default_factory=Eval)
    drift: Drift = field(default_factory=Drift)

    def init_of(self, method: str) -> Init | None:
        """Stage 1 of a method, or None where it has none. Raises UserError for a key or value that is not one."""
        if self.methods[method].objective is None:
            return None
        return changed(self.init, self.methods[method].init, f"methods.{method}.init")

    def rl_of(self, method: str) -> RL | None:
        """Stage 2 of a method, or None where it has none. Raises UserError for a key or value that is not one."""
        changes = self.methods[method].rl
        return None if self.rl is None or changes is None else changed(self.rl, changes, f"methods.{method}.rl")

    def problems_of(self, method: str, stage: Literal["init", "rl"]) -> int:
        """How many problems a stage of a method passes over in an epoch."""
        if self.methods[method].data == "joint":
            return self.data.sft + self.data.rl
        return self.data.sft if stage == "init" else self.data.rl


@dataclass(frozen=True, kw_only=True)
class RecipeFile(Recipe):
    """What a file may say beside the recipe itself; all of it is used up when it is loaded."""

    methods: dict[str, Method | None]  # type: ignore[assignment]
    """null takes away a method of the recipes that this one builds upon."""
    extends: str | tuple[str, ...] = ()
    """Recipes (names, or YAML files relative to this one) that this one builds upon; the later of two wins."""
    objectives: dict[str, dict[str, float | str]] = field(default_factory=dict)
    """Options of objectives, for every method that does not set its own: a backbone's beta, say."""
