"""How much memory a training stage will take, part by part, from the model's shape alone: nothing is loaded.

Some parts are there all the time, others in one phase of a step; the peak is the sum of the first and the largest sum
of a phase. Loading comes before: what it takes is beside a few of the first alone. In bytes, with P parameters of b
bytes, of which T are trained, on R ranks, and N tokens per micro-batch:

    parameters   b P, divided by R at ZeRO stage 3
    masters      what AdamW steps on where that is not the parameters themselves: m T, divided by R from stage 1
    moments      2 m T, divided by R from stage 1
    gradients    g T, divided by R from stage 2; twice that at stage 3, which converts them beside the accumulated ones
    activations  what the backward pass needs of each layer: see `layer_bytes`
    head         the LM head's gradient in fp32, 4 V H, and the tiles of logits of `gift.vocab`
    whole        at stage 3 every rank holds the whole model, b P, before it is split; a reference likewise

The formulas are those of a Llama-like decoder with sdpa attention, and of DeepSpeed 0.19; the numbers marked as
measured are of this version, on a CPU; the formulas for a GPU have not been measured. Not counted: on a GPU, the CUDA
context (about 0.5 GB) and fragmentation; the attention weights that `eager` keeps; what vLLM needs beside its weights
and cache. The prediction is for the longest examples there may be and several
micro-batches to a step; less than that takes less.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from transformers import AutoModelForCausalLM

from gift.generation.loop import LOGITS
from gift.recipe import Engine, Generation, LoRA
from gift.vocab.head import BLOCK_BYTES as PRODUCT_BYTES
from gift.vocab.loss import CHUNK_BYTES, MOST_TOKENS

MIB = 2**20
Phase = Literal["load", "forward", "backward", "embedding", "reduce", "step", "rollout"]
FLOAT32 = 4
# Measured on Linux, x86-64, with the packages pinned in pyproject.toml: resident memory of a process on a CPU that has
# imported the suite and passed a first batch through a model, and what ZeRO's modules add to it.
PROCESS_BYTES = 470 * MIB
ZERO_BYTES = 45 * MIB
# glibc keeps much of what is freed in pieces below 32 MiB: activations, and the gradients of single parameters that
# ZeRO holds twice for a moment. Measured: 0.5 to 0.8 of their size.
KEPT_BY_MALLOC = 0.6
REDUCE_BUCKET = 500_000_000  # elements; DeepSpeed's default
SUB_GROUP = 1_000_000_000  # elements that ZeRO 3 steps on at a time; DeepSpeed's default
SAMPLED_BYTES = 20  # of a logit that the hf engine draws from: in fp32, and its probability and their sum in fp64
TOKEN_BYTES = 8  # of a token in an encoded example: the pointer to an integer that all examples share


@dataclass(frozen=True)
class Shape:
    """What of a model's architecture decides how much memory it takes."""

    parameters: int
    largest: int
    """Elements of the largest parameter."""
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    attention: int
    """Heads x width of a head."""
    keys: int
    """Heads of keys x width of a head."""
    tied: bool
    """Whether the LM head is the embedding."""
    linear: dict[str, int]
    """Of every kind of linear layer, by the last part of its name: inputs + outputs, summed over the layers."""

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The shape of a transformers model with this config; no weight is made."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        linear: dict[str, int] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear):
                kind = name.rpartition(".")[2]
                linear[kind] = linear.get(kind, 0) + layer.in_features + layer.out_features
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        head = model.get_output_embeddings().weight
        sizes = [parameter.numel() for parameter in model.parameters()]
        return cls(
            parameters=sum(sizes),
            largest=max(sizes),
            vocab=head.shape[0],
            hidden=config.hidden_size,
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            layers=config.num_hidden_layers,
            attention=heads * width,
            keys=(getattr(config, "num_key_value_heads", None) or heads) * width,
            tied=head is model.get_input_embeddings().weight,
            linear=linear,
        )

    def trained(self, lora: LoRA | None) -> int:
        """How many parameters are trained: all of them, or those of the adapters."""
        if lora is None:
            return self.parameters
        return lora.rank * sum(self.linear.get(target, 0) for target in lora.targets)


@dataclass(frozen=True)
class MicroBatch:
    """What passes through the model at once: `rows` sequences of `length` tokens, padding included."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """How many tokens, padding included."""
        return self.rows * self.length

    @classmethod
    def largest(cls, engine: Engine, *, sequences: int, max_length: int) -> MicroBatch:
        """The largest one that `sequences` examples of at most `max_length` tokens can come in."""
        tokens = min(max(engine.micro_tokens, max_length), sequences * max_length)
        return cls(1, tokens) if engine.packing else cls(tokens // max_length, max_length)


@dataclass(frozen=True)
class Part:
    """One use of memory, in bytes, of one rank."""

    name: str
    size: float
    phases: tuple[Phase, ...] = ()
    """When it is there; in every phase of a step where this is empty."""
    on_host: bool = False
    """In the host's memory even where the model is on a GPU."""
    at_load: bool = False
    """There in every phase, and while the model is loaded as well."""


@dataclass(frozen=True)
class Prediction:
    """The memory of one rank during one stage."""

    parts: Sequence[Part]
    on_gpu: bool

    @property
    def peak(self) -> int:
        """Bytes of a rank where the model is: of its GPU, or of the host."""
        return peak(part for part in self.parts if not (self.on_gpu and part.on_host))

    @property
    def host(self) -> int:
        """Bytes of a rank in the host's memory beside its GPU; 0 where there is no GPU."""
        return peak(part for part in self.parts if part.on_host) if self.on_gpu else 0


def peak(parts: Iterable[Part]) -> int:
    """The sum of what is always there and of the phase that takes most, or what loading takes if that is more."""
    always, phases = 0.0, dict.fromkeys(get_args(Phase), 0.0)
    for part in parts:
        always += 0.0 if part.phases else part.size
        for phase in part.phases:
            phases[phase] += part.size
        phases["load"] += part.size if part.at_load else 0.0
    load = phases.pop("load")
    return round(max(load, always + max(phases.values())))


def predict(
    shape: Shape,
    engine: Engine,
    micro_batch: MicroBatch,
    *,
    ranks: int,
    on_gpu: bool,
    lora: LoRA | None = None,
    reference: bool = False,
    recompute: bool = False,
    optimizers: int = 1,
    encoded_tokens: int = 0,
    generation: Generation | None = None,
    rollouts: MicroBatch | None = None,
) -> Prediction:
    """The memory of one of `ranks` ranks.

    `reference`: a frozen model runs beside the policy (with LoRA, the same one). `recompute`: logits are computed a
    second time in the backward pass, as in RL. `optimizers`: how many of them have moments of their own.
    `encoded_tokens`: how many tokens of data the process holds. `generation` and `rollouts`: what samples, and the
    responses it draws at once, prompts included.
    """
    states = state_parts(shape, engine, ranks=ranks, on_gpu=on_gpu, lora=lora, optimizers=optimizers)
    parts = [*states, *pass_parts(shape, engine, micro_batch, on_gpu=on_gpu, lora=lora, recompute=recompute)]
    parts += load_parts(shape, engine, on_gpu=on_gpu, reference=reference and lora is None)
    if reference:
        if lora is None:  # split before the policy goes to the GPU, but while the whole policy is on a CPU
            parts.append(Part("reference", frozen_bytes(shape, engine, ranks), at_load=on_gpu))
        if not recompute:
            parts.append(Part("reference's logits", tile_bytes(shape, micro_batch.tokens, on_gpu), ("forward",)))
    if generation is not None and rollouts is not None:
        parts += rollout_parts(shape, engine, generation, rollouts, on_gpu=on_gpu)
    parts.append(Part("encoded data", encoded_tokens * TOKEN_BYTES, on_host=True, at_load=True))
    if not on_gpu:
        pieces = {"activations": 1, "reduced gradients": 2}
        freed = sum(part.size * pieces.get(part.name, 0) for part in parts)
        parts.append(Part("kept by malloc", KEPT_BY_MALLOC * freed))
        parts.append(Part("process", PROCESS_BYTES + (ZERO_BYTES if engine.zero_stage else 0), at_load=True))
    return Prediction([part for part in parts if part.size], on_gpu)


def width(engine: Engine) -> int:
    """Bytes of a weight in the model."""
    return 2 if engine.dtype == "bfloat16" else FLOAT32


def frozen_bytes(shape: Shape, engine: Engine, ranks: int) -> float:
    """A frozen model beside the policy; at stage 3 its decoder is split among the ranks, its head whole on each."""
    if engine.zero_stage < 3:
        return width(engine) * shape.parameters
    head = shape.vocab * shape.hidden
    decoder = shape.parameters if shape.tied else shape.parameters - head
    return width(engine) * (decoder / ranks + head)


def load_parts(shape: Shape, engine: Engine, *, on_gpu: bool, reference: bool) -> list[Part]:
    """Whole models, where that is not how they stay: on a GPU's host until moved, and where ZeRO 3 is to split them.

    The policy is loaded first, the `reference` split first; a GPU never holds both whole.
    """
    policy = width(engine) * shape.parameters
    base = policy if reference else 0
    parts = []
    if engine.zero_stage == 3:
        copied = width(engine) * shape.vocab * shape.hidden if reference else 0  # the head, beside the model's own
        parts.append(Part("whole parameters", policy, ("load",)))
        parts.append(Part("whole reference", 0 if on_gpu else base + copied, ("load",)))
    if on_gpu:
        parts.append(Part("parameters as loaded", policy, ("load",), on_host=True))
        parts.append(Part("reference as loaded", base, ("load",), on_host=True))
    return parts


def state_parts(
    shape: Shape, engine: Engine, *, ranks: int, on_gpu: bool, lora: LoRA | None, optimizers: int
) -> list[Part]:
    """Weights, gradients and the optimizer's state, with what reducing gradients and stepping need for a moment."""
    stage, trained = engine.zero_stage, shape.trained(lora)
    pure = engine.master_dtype == "bfloat16"  # gradients, masters and moments are bf16 as well
    precise = 2 if pure else FLOAT32
    own = trained / ranks if stage else trained  # what this rank's optimizer steps on
    weights_apart = stage > 0 or (engine.dtype == "bfloat16" and not pure)
    gradients = precise * {0: trained, 1: trained, 2: own, 3: 2 * own}[stage]
    on_host, all_on_host = engine.offload != "none", engine.offload == "all"
    parameters = width(engine) * shape.parameters / (ranks if stage == 3 else 1)
    # AdamW makes two temporaries of one parameter, of all (CUDA's foreach) or of a flat partition; ZeRO 3 one more.
    stepped = min(shape.largest, trained) if stage == 0 and not on_gpu else own
    temporaries = 3 * precise * min(stepped, SUB_GROUP) if stage == 3 else 2 * precise * stepped
    parts = [
        Part("parameters", parameters, on_host=all_on_host),
        Part("gradients", gradients, on_host=on_host and stage > 1),
        Part("masters", precise * own if weights_apart else 0, on_host=on_host),
        Part("moments", 2 * precise * own * optimizers, on_host=on_host),
        Part("AdamW's temporaries", 0 if on_host else temporaries, ("step",)),
    ]
    if stage:
        # A GPU's bucket is allocated whole as the backward pass begins; pages of the host's that are not used are not.
        bucket = precise * (REDUCE_BUCKET if on_gpu else min(trained, REDUCE_BUCKET))
        parts.append(Part("reduce bucket", bucket, ("backward", "reduce") if on_gpu else ("reduce",)))
        parts.append(Part("reduced gradients", precise * own, ("reduce",)))
    if stage == 3:
        parts.append(Part("gathered layers", gathered_bytes(shape, engine), ("forward", "backward")))
    return parts


def gathered_bytes(shape: Shape, engine: Engine) -> float:
    """What ZeRO 3 holds of other ranks' weights at once: the embedding or head, and two layers."""
    embeddings = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    layer = (shape.parameters - embeddings) / shape.layers
    return width(engine) * (shape.vocab * shape.hidden + 2 * layer)


def pass_parts(
    shape: Shape, engine: Engine, micro_batch: MicroBatch, *, on_gpu: bool, lora: LoRA | None, recompute: bool
) -> list[Part]:
    """What a forward and backward pass of one micro-batch takes. The LM head is trained unless there are adapters."""
    tokens, element = micro_batch.tokens, width(engine)
    layer = layer_bytes(shape, engine, micro_batch)
    stream = element * shape.hidden * tokens
    layers = shape.layers * stream + layer if engine.gradient_checkpointing else shape.layers * layer
    states = 3 * stream + FLOAT32 * shape.hidden * tokens  # final norm, states at labels, and their gradient in fp32
    head: float = FLOAT32 * shape.vocab * shape.hidden if lora is None else 0
    if element < FLOAT32:
        head += head * element / FLOAT32  # rounded once it is complete
    cast = FLOAT32 * shape.vocab * shape.hidden if element < FLOAT32 and not on_gpu else 0
    tiles = tile_bytes(shape, tokens, on_gpu)
    half = 0 if element == FLOAT32 or not on_gpu else tiles / 2 + min(PRODUCT_BYTES, head)  # dz, and a product to add
    in_layer = element * (3 * shape.intermediate + 2 * shape.hidden) * tokens  # gradients inside the last layer
    logits = tiles * (2 if recompute else 1) + half + cast
    return [
        Part("activations", layers + states, ("forward", "backward")),
        Part("gradient of the head", head, ("backward",) if recompute else ("forward", "backward")),
        Part("logits", logits, ("backward",) if recompute else ("forward",)),
        Part("gradients in a layer", in_layer, ("backward",)),
        # A tied head's gradient waits for the embedding's, which is dense as well.
        Part("gradient of the embedding", 2 * head if shape.tied else head, ("embedding",)),
    ]


def rollout_parts(
    shape: Shape, engine: Engine, generation: Generation, rollouts: MicroBatch, *, on_gpu: bool
) -> list[Part]:
    """What sampling takes: a whole model at ZeRO stage 3, keys and values, and what the engine has of its own."""
    element = width(engine)
    whole = Part("gathered model", element * shape.parameters if engine.zero_stage == 3 else 0, ("rollout",))
    if generation.engine == "server":
        return [whole, Part("weights to hand over", element * shape.parameters, ("rollout",), on_host=True)]
    cache = generation.cache_gb * 1e9
    if generation.engine == "vllm":
        when: tuple[Phase, ...] = ("rollout",) if on_gpu and generation.sleep else ()
        weights = element * shape.parameters / generation.tensor_parallel
        return [whole, Part("vLLM's weights", weights, when), Part("vLLM's keys and values", cache, when)]
    row = 2 * element * shape.layers * shape.keys * rollouts.length
    rows = min(rollouts.rows, generation.max_rows, max(1, int(cache / row)))
    return [
        whole,
        Part("keys and values", rows * row, ("rollout",)),
        Part("logits of sampling", SAMPLED_BYTES * min(shape.vocab * rows, LOGITS), ("rollout",)),
    ]


def layer_bytes(shape: Shape, engine: Engine, micro_batch: MicroBatch) -> float:
    """What a decoder layer keeps for its backward pass, of one micro-batch.

    Per token, in elements: input, normalised input and output of both norms, 6 H; queries, keys, values (repeated for
    every query head) and output of attention, 4 A; gate, its activation, up and their product, 4 I. The
    norms keep their input in fp32, whatever the rest is in. The attention mask is dense, length x length of every row,
    but for flash attention, which has none.
    """
    element = width(engine)
    norms = 2 * (FLOAT32 + 2 * element) * shape.hidden
    rest = 4 * element * (shape.attention + shape.intermediate)
    masked = engine.attention != "flash_attention_2"
    mask = element * micro_batch.rows * micro_batch.length**2 if masked else 0
    return micro_batch.tokens * (norms + rest) + mask


def tile_bytes(shape: Shape, tokens: int, on_gpu: bool) -> float:
    """The fp32 logits that `gift.vocab.vocab_loss` holds of one model."""
    row = FLOAT32 * shape.vocab
    rows = min(tokens, MOST_TOKENS, max(1, CHUNK_BYTES["cuda" if on_gpu else "cpu"] // row))
    return row * rows
