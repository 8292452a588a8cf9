"""DeepSpeed behind five verbs: build, backward, step, save and resume, export.

Losses arrive as sums over tokens. `backward` divides by the number of tokens of the whole step, over all ranks and all
micro-batches, so that the gradient does not depend on how a batch is cut. State to resume from is kept as safetensors
and JSON, one file per rank: no pickle is read or written.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift.cli import UserError
from gift.models import quiet_transformers
from gift.recipe import Engine as EngineSettings
from gift.recipe import Optimizer
from gift.records import atomic_path, read_json, remove, sync, write_json

T = TypeVar("T")


def import_deepspeed() -> Any:
    """DeepSpeed, told which accelerator to use before it looks (and warns) for itself."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    return deepspeed


def init_distributed() -> None:
    """Joins the ranks a launcher started, or makes this process the only rank. Idempotent."""
    deepspeed = import_deepspeed()
    if dist.is_initialized():
        return
    # DeepSpeed would compile a shared-memory all-reduce here, for half a minute; gloo serves a CPU run well enough.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" not in os.environ:  # nobody launched ranks: a store in this process needs neither port nor environment
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on this one
    deepspeed.init_distributed(
        dist_backend=backend,
        auto_mpi_discovery=False,
        timeout=dt.timedelta(days=1),  # other ranks wait while the first evaluates
        verbose=False,
    )


def rank() -> int:
    """This process's rank; 0 where nothing is distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks; 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total_over_ranks(values: Sequence[float]) -> list[float]:
    """Each value summed over all ranks, in float64."""
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(tensor)
    summed: list[float] = tensor.tolist()
    return summed


def lockstep(pieces: Sequence[T], idle: Callable[[T], T]) -> list[T]:
    """This rank's pieces, with `idle(piece)` appended until every rank has as many: ZeRO needs equal calls.

    Every rank must have at least one piece.
    """
    longest = len(pieces)
    if world_size() > 1:
        counts = torch.zeros(world_size(), device="cuda" if dist.get_backend() == "nccl" else "cpu")
        counts[rank()] = len(pieces)
        dist.all_reduce(counts)
        longest = int(counts.max())
    return [*pieces, *[idle(pieces[-1])] * (longest - len(pieces))]


def share_of_rank(items: Sequence[Any]) -> list[Any]:
    """The items this rank works on: every world-size-th one."""
    return list(items[rank() :: world_size()])


class TrainingEngine:
    """A module under DeepSpeed; the loss it returns is a sum over tokens. `model` is the HF model in it."""

    def __init__(
        self, module: nn.Module, model: PreTrainedModel, settings: EngineSettings, optimizer: Optimizer
    ) -> None:
        deepspeed = import_deepspeed()
        init_distributed()
        self.model = model
        self.settings = settings
        self.optimizer = optimizer
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "managed_gradient_accumulation": False,
            # DeepSpeed clips at 1.0 unless told otherwise; an infinite limit measures the norm and changes nothing.
            "gradient_clipping": optimizer.max_grad_norm or math.inf,
            "zero_optimization": {"stage": settings.zero_stage, "overlap_comm": False},
            "bf16": {"enabled": settings.dtype == "bfloat16"},
            "optimizer": {
                "type": "AdamW",
                "params": {
                    "lr": optimizer.lr,
                    "betas": list(optimizer.betas),
                    "weight_decay": optimizer.weight_decay,
                    "torch_adam": True,
                },
            },
            "steps_per_print": 2**31,
            "zero_allow_untested_optimizer": True,
        }
        self.deepspeed, *_ = deepspeed.initialize(model=module, config=config)
        self._fp32_grad_norm: float | None = None
        # Without ZeRO in fp32, DeepSpeed clips after reducing over ranks but keeps the norm to itself.
        self.deepspeed.clip_fp32_gradients = self._clip_fp32_gradients

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's forward under DeepSpeed (fused losses must run here: ZeRO-3 gathers weights in it)."""
        return self.deepspeed(*args, **kwargs)

    def backward(self, loss_sum: Tensor, tokens_in_step: float) -> None:
        """Accumulates the gradient of this micro-batch's share of the step's mean over `tokens_in_step` tokens."""
        self.deepspeed.backward(loss_sum * (world_size() / tokens_in_step))

    def step(self, lr: float) -> float:
        """Takes an optimizer step at this learning rate; returns the gradient's L2 norm before clipping."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.step()
        norm = self._fp32_grad_norm if self._fp32_grad_norm is not None else self.deepspeed.get_global_grad_norm()
        return float(norm or 0.0)

    def _clip_fp32_gradients(self) -> None:
        limit = self.deepspeed.gradient_clipping()
        self._fp32_grad_norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))

    # -----------------------------------------------------------------------------------------------------------------
    # State

    def _partitions(self) -> list[Tensor]:
        """This rank's fp32 master weights, in the optimizer's order: whole parameters, or ZeRO's flat partitions."""
        optimizer = self.deepspeed.optimizer
        if hasattr(optimizer, "single_partition_of_fp32_groups"):
            return list(optimizer.single_partition_of_fp32_groups)
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def _adam_state(self) -> dict[Tensor, dict[str, Any]]:
        optimizer = self.deepspeed.optimizer
        state: dict[Tensor, dict[str, Any]] = getattr(optimizer, "optimizer", optimizer).state
        return state

    def save(self, folder: Path, progress: dict[str, Any]) -> None:
        """Saves what an exact continuation needs beside `progress`, then drops the state saved before it."""
        target = folder / f"step-{progress['step']:06d}"
        state = {}
        for number, master in enumerate(self._partitions()):
            state[f"{number}.master"] = master.detach().cpu().clone()
            for name, value in self._adam_state().get(master, {}).items():
                state[f"{number}.{name}"] = torch.as_tensor(value).detach().cpu().clone()
        scratch = folder / f".{target.name}.tmp"
        if rank() == 0:
            remove(scratch)
            scratch.mkdir(parents=True)
        barrier()
        with disk_errors(target):
            save_file(state, scratch / f"rank-{rank()}.safetensors")
        barrier()
        if rank() == 0:
            write_json(scratch / "progress.json", {**progress, "world_size": world_size()})
            sync(scratch)
            remove(target)
            os.replace(scratch, target)
            for old in folder.glob("step-*"):
                if old != target:
                    remove(old)
        barrier()

    def resume(self, folder: Path) -> dict[str, Any] | None:
        """Restores the newest saved state and returns its progress; None where there is none.

        Raises UserError where it was saved by another number of ranks.
        """
        saved = sorted(folder.glob("step-*"))
        if not saved:
            return None
        progress: dict[str, Any] = read_json(saved[-1] / "progress.json")
        if progress["world_size"] != world_size():
            raise UserError(
                f"{saved[-1]}: saved by {progress['world_size']} ranks, cannot be continued by {world_size()};"
                " start as many, or remove this folder to train this stage again"
            )
        state = load_file(saved[-1] / f"rank-{rank()}.safetensors", device="cpu")
        adam = self._adam_state()
        with torch.no_grad():
            for number, master in enumerate(self._partitions()):
                master.copy_(state[f"{number}.master"])
                prefix = f"{number}."
                entries = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                del entries["master"]
                # Adam keeps its step counter on the CPU and its moments beside the weights.
                adam[master] = {
                    name: value if name == "step" else value.to(master.device) for name, value in entries.items()
                }
        self._refresh_weights()
        return progress

    def _refresh_weights(self) -> None:
        """Copies the restored masters into the model's own weights, where those are apart (ZeRO keeps them so)."""
        optimizer = self.deepspeed.optimizer
        if hasattr(optimizer, "single_partition_of_fp32_groups"):
            optimizer.update_lp_params()

    def close(self) -> None:
        """Frees DeepSpeed's buffers and hooks; the model stays usable."""
        self.deepspeed.destroy()


def export_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes model and tokenizer as a Hugging Face folder, atomically."""
    with disk_errors(folder), atomic_path(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns safetensors' own error for a disk that is full or read-only into a UserError naming `path`."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written: {error}; mend this and run again") from None


def check_finite(row: Mapping[str, Any], where: str) -> None:
    """Raises UserError, naming the number and `where`, where training has diverged; what was saved before is intact."""
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: {name} is {value}: training has diverged; lower the learning rate in a new run")


def barrier() -> None:
    """Waits for all ranks."""
    if world_size() > 1:
        dist.barrier()


def quiet_libraries() -> None:
    """Keeps transformers' and DeepSpeed's chatter out of a command's output; their errors pass."""
    quiet_transformers()
    import_deepspeed().utils.logger.setLevel(logging.ERROR)


def learning_rate(optimizer: Optimizer, step: int, total_steps: int) -> float:
    """The learning rate of step `step` (from 0): linear warm-up, then constant, or a cosine down to a tenth."""
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    past = (step - optimizer.warmup_steps) / max(1, total_steps - optimizer.warmup_steps)
    return optimizer.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * past)))
