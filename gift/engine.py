"""DeepSpeed behind five verbs: build, backward, step, save and resume, export.

Losses arrive as sums over tokens. `backward` divides by the number of tokens of the whole step, over all ranks and all
micro-batches, so that the gradient does not depend on how a batch is cut. With bf16 weights, gradients are reduced and
added up in fp32, and AdamW steps on fp32 masters, unless `master_dtype` says bfloat16: then weights, gradients and
moments are all bf16. torch's AdamW serves every stage, offloaded or not, so that none needs a compiler.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift.cli import UserError
from gift.distributed import (
    barrier,
    import_deepspeed,
    init_distributed,
    rank,
    world_size,
)
from gift.lora import merged_state
from gift.masters import MasterAdamW, adam_of, masters_of, update_weights
from gift.models import backbone, device
from gift.recipe import Engine as EngineSettings
from gift.recipe import Optimizer
from gift.records import atomic_path
from gift.states import disk_errors, read_newest, write_state

MAIN = "main"  # the optimizer that steps outside of `TrainingEngine.optimizer_state`
# In elements, and DeepSpeed's defaults: the parameters that ZeRO 3 leaves whole, or keeps whole for a while after use.
STAGE_3 = {
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
}
TORCH_LINEAR = nn.functional.linear  # ZeRO 3 puts its own in place of it, for the whole process


class TrainingEngine:
    """A module under DeepSpeed; the loss it returns is a sum over tokens. `model` is the HF model in it.

    Raises UserError for gradient checkpointing of a model with dropout.
    """

    def __init__(
        self, module: nn.Module, model: PreTrainedModel, settings: EngineSettings, optimizer: Optimizer
    ) -> None:
        init_distributed()
        self.model = model
        self.settings = settings
        if settings.gradient_checkpointing:
            checkpoint_activations(model)
        self._parked: dict[str, dict[int, dict[str, Any]]] = {}
        self._stepping = MAIN
        self._grad_norm = math.nan
        self.version = 0
        """Goes up whenever the weights change."""
        with contextlib.redirect_stdout(io.StringIO()):  # its BF16 optimizer prints how much memory is in use
            self.deepspeed, *_ = import_deepspeed().initialize(
                model=module, optimizer=adamw(module, settings), config=deepspeed_config(settings)
            )
        self._use(optimizer)
        if settings.zero_stage == 0:  # DeepSpeed clips after reducing over ranks, but keeps the norm to itself
            self.deepspeed.clip_fp32_gradients = self._clip_gradients

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's forward under DeepSpeed (fused losses must run here: ZeRO-3 gathers weights in it)."""
        return self.deepspeed(*args, **kwargs)

    def backward(self, loss_sum: Tensor, tokens_in_step: float) -> None:
        """Accumulates the gradient of this micro-batch's share of the step's mean over `tokens_in_step` tokens."""
        self.deepspeed.backward(loss_sum * (world_size() / tokens_in_step))

    def step(self, lr: float) -> float:
        """Takes an optimizer step at this learning rate; returns the gradient's L2 norm before clipping.

        The norm is not finite where a gradient is not; no weight has changed then at stages 1 to 3.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        if self.settings.zero_stage == 0:
            for weight in self.model.parameters():
                if weight.requires_grad and weight.grad is None:  # DeepSpeed would give it one of the weight's own type
                    weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)
        self.deepspeed.step()
        self.version += 1
        return self._grad_norm if self.settings.zero_stage == 0 else float(self.deepspeed.get_global_grad_norm())

    @contextlib.contextmanager
    def optimizer_state(self, name: str, optimizer: Optimizer) -> Iterator[None]:
        """Steps taken inside are those of another AdamW on the same weights.

        It has its own moments and step count, which begin at zero and are saved and resumed under `name`, and its own
        betas, weight decay and clipping. Its moments stay in memory beside the first optimizer's.
        """
        before = self._optimizer
        self._exchange(name)
        self._use(optimizer)
        try:
            yield
        finally:
            self._exchange(MAIN)
            self._use(before)

    def _use(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        for group in self.deepspeed.optimizer.param_groups:
            group.update(lr=optimizer.lr, betas=optimizer.betas, weight_decay=optimizer.weight_decay)
        self.deepspeed.optimizer.clip_grad = self._max_grad_norm

    def _exchange(self, name: str) -> None:
        """Puts away the moments in use and takes up those of optimizer `name`."""
        adam, masters = adam_of(self.deepspeed.optimizer), masters_of(self.deepspeed.optimizer)
        self._parked[self._stepping] = {
            number: adam.pop(master) for number, master in enumerate(masters) if master in adam
        }
        adam.update({masters[number]: state for number, state in self._parked.pop(name, {}).items()})
        self._stepping = name

    @property
    def _max_grad_norm(self) -> float:
        """DeepSpeed measures no norm without a limit; an infinite one changes nothing."""
        return self._optimizer.max_grad_norm or math.inf

    def _clip_gradients(self) -> None:
        weights = [weight for weight in self.model.parameters() if weight.grad is not None]
        norms = [torch.linalg.vector_norm(weight.grad, dtype=torch.float32) for weight in weights]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        nn.utils.clip_grads_with_norm_(weights, self._max_grad_norm, norm)
        self._grad_norm = float(norm)

    # -----------------------------------------------------------------------------------------------------------------
    # State

    def save(self, folder: Path, progress: dict[str, Any]) -> None:
        """Saves what an exact continuation needs beside `progress`; the newest `keep_states` states are kept."""
        adam, masters = adam_of(self.deepspeed.optimizer), masters_of(self.deepspeed.optimizer)
        moments = {**self._parked, MAIN: {number: adam.get(master, {}) for number, master in enumerate(masters)}}
        tensors = {f"master/{number}": master for number, master in enumerate(masters)}
        for name, states in moments.items():
            for number, state in states.items():
                tensors.update({f"{name}/{number}/{entry}": torch.as_tensor(value) for entry, value in state.items()})
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_state(folder, on_cpu, progress, keep=self.settings.keep_states)

    def resume(self, folder: Path) -> dict[str, Any] | None:
        """Restores the newest saved state and returns its progress; None where there is none.

        A damaged state is reported, and the one before it used. Raises UserError where none can be used, and where
        another number of ranks saved it.
        """
        if (found := read_newest(folder)) is None:
            return None
        progress, tensors = found
        masters = masters_of(self.deepspeed.optimizer)
        self._parked = {}
        for name, tensor in tensors.items():
            owner, number, *entry = name.split("/")
            master = masters[int(number)]
            if owner == "master":
                with torch.no_grad():
                    master.copy_(tensor)
            else:  # Adam keeps its step counter on the CPU and its moments beside the weights
                value = tensor if entry == ["step"] else tensor.to(master.device)
                self._parked.setdefault(owner, {}).setdefault(int(number), {})["/".join(entry)] = value
        adam = adam_of(self.deepspeed.optimizer)
        adam.clear()
        adam.update({masters[number]: state for number, state in self._parked.pop(MAIN, {}).items()})
        update_weights(self.deepspeed.optimizer)
        self.version += 1
        return progress

    # -----------------------------------------------------------------------------------------------------------------
    # Whole parameters

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, the model is whole on every rank and can be called without this engine, as a generator does.

        Below ZeRO stage 3 it always is. All ranks call this together.
        """
        if self.settings.zero_stage < 3:
            yield
            return
        sharding = self.deepspeed.optimizer.parameter_offload
        with import_deepspeed().zero.GatheredParameters(list(sharding.module.parameters())):
            # Its hooks would split each layer's parameters again as soon as the layer has run.
            for hook in (*sharding.forward_hooks, *sharding.backward_hooks):
                hook.remove()
            sharding.forward_hooks, sharding.backward_hooks = [], []
            try:
                yield
            finally:
                sharding._register_deepspeed_module(sharding.module)

    def full_state_dict(self) -> dict[str, Tensor]:
        """The model's whole tensors under the names of its checkpoint, adapters merged; {} on all but the first rank.

        All ranks call this. At ZeRO stage 3 the tensors are gathered one by one into the first rank's host memory.
        """
        state = self.model.state_dict(keep_vars=True)
        if self.settings.zero_stage == 3:
            copies: dict[Tensor, Tensor] = {}  # a tied head shares its copy, as it shares its parameter
            for tensor in state.values():
                if tensor not in copies:
                    with import_deepspeed().zero.GatheredParameters([tensor]):
                        copies[tensor] = tensor.detach().cpu().clone() if rank() == 0 else tensor
            state = {name: copies[tensor] for name, tensor in state.items()}
        return merged_state(self.model, state) if rank() == 0 else {}

    def export(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Writes the trained model as a Hugging Face folder, atomically. All ranks call this, before `close`."""
        state = self.full_state_dict()
        if rank() == 0:
            export_checkpoint(self.model, tokenizer, folder, state)
        barrier()

    def close(self) -> None:
        """Frees DeepSpeed's buffers and hooks; the model stays usable, unless ZeRO stage 3 has sharded it."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.deepspeed.destroy()
        nn.functional.linear = TORCH_LINEAR
        if self.settings.gradient_checkpointing:
            self.model.gradient_checkpointing_disable()
            self.model.eval()


class FrozenEngine:
    """A frozen `model` beside the one that is trained: at ZeRO stage 3 its decoder is split among the ranks as well.

    It is called as any model is, by all ranks together, also inside the forward of a TrainingEngine's module. Its LM
    head is left whole, a tied one as a copy, so that losses can read it at any time.
    """

    def __init__(self, model: PreTrainedModel, settings: EngineSettings) -> None:
        init_distributed()
        self.model = model.requires_grad_(False).eval().to(device())
        self._sharded: Any = None
        if settings.zero_stage == 3:
            head = model.get_output_embeddings()
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
            config = deepspeed_config(settings)
            config["zero_optimization"].pop("offload_optimizer", None)
            self._sharded, *_ = import_deepspeed().initialize(model=backbone(model), config=config)

    def close(self) -> None:
        """Removes DeepSpeed's hooks; a model that was split is of no use afterwards."""
        if self._sharded is not None:
            self._sharded.destroy()


def adamw(module: nn.Module, settings: EngineSettings) -> torch.optim.AdamW:
    """AdamW on the module's trainable parameters, in the precision that `settings` asks for."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    if settings.zero_stage == 0 and settings.dtype == "bfloat16":
        module.to(device())
        for weight in module.parameters():
            weight.data = weight.data.bfloat16()
        if settings.master_dtype == "float32":
            return MasterAdamW(weights)
    # Offloaded masters are stepped on the host, where torch's fused step reads and writes them once.
    return torch.optim.AdamW(weights, fused=True if settings.offload != "none" else None)


def deepspeed_config(settings: EngineSettings) -> dict[str, Any]:
    """DeepSpeed's configuration without an optimizer."""
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero: dict[str, Any] = {"stage": settings.zero_stage, "overlap_comm": False, **STAGE_3}
    if settings.offload != "none":
        zero["offload_optimizer"] = host
    if settings.offload == "all":
        zero["offload_param"] = host
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": math.inf,  # DeepSpeed clips at 1.0 unless told otherwise; each step's limit is set later
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would be compiled first
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    # At stage 0 DeepSpeed leaves the weights and their optimizer as they are: see MasterAdamW.
    if settings.zero_stage > 0 and settings.dtype == "bfloat16":
        pure = settings.master_dtype == "bfloat16"
        config["bf16"] = {"enabled": True, "bf16_master_weights_and_grads": pure, "bf16_optimizer_states": pure}
        config["data_types"] = {"grad_accum_dtype": "bf16" if pure else "fp32"}
        config["communication_data_type"] = "bf16" if pure else "fp32"
    return config


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Makes the model compute activations again in the backward pass. Raises UserError where it has dropout.

    transformers does so in training mode alone, in which dropout would be on.
    """
    for name, value in model.config.to_dict().items():
        if "drop" in name and isinstance(value, float | int) and value > 0:
            raise UserError(
                f"engine.gradient_checkpointing: this model's config has {name} {value}, which it would turn on;"
                f" set {name} to 0 in the config.json, or gradient_checkpointing=false"
            )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()


def export_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a model and its tokenizer as a Hugging Face folder, atomically; `state` replaces its own tensors."""
    with disk_errors(folder), atomic_path(folder) as scratch:
        model.save_pretrained(scratch, state_dict=None if state is None else dict(state))
        tokenizer.save_pretrained(scratch)


def check_finite(row: Mapping[str, Any], where: str) -> None:
    """Raises UserError, naming the number and `where`, where training has diverged; what was saved before is intact."""
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: {name} is {value}: training has diverged; lower the learning rate in a new run")


def learning_rate(optimizer: Optimizer, step: int, total_steps: int) -> float:
    """The learning rate of step `step` (from 0): linear warm-up, then constant, or a cosine down to a tenth."""
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    past = (step - optimizer.warmup_steps) / max(1, total_steps - optimizer.warmup_steps)
    return optimizer.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * past)))
