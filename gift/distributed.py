"""The ranks of a job: who this process is among them, what they add up and where they wait for each other."""

from __future__ import annotations

import datetime as dt
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gift.cli import UserError
from gift.models import quiet_transformers

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
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    deepspeed.init_distributed(
        dist_backend=backend,
        auto_mpi_discovery=False,
        timeout=dt.timedelta(days=1),  # other ranks wait while the first evaluates
        verbose=False,
    )


def quiet_libraries() -> None:
    """Keeps transformers' and DeepSpeed's chatter out of a command's output; their errors pass."""
    quiet_transformers()
    import_deepspeed().utils.logger.setLevel(logging.ERROR)
    # DeepSpeed's ZeRO 3 calls collectives by names that torch is about to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def rank() -> int:
    """This process's rank; 0 where nothing is distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks; 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits for all ranks."""
    if world_size() > 1:
        dist.barrier()


def total_over_ranks(values: Sequence[float]) -> list[float]:
    """Each value summed over all ranks, in float64."""
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(tensor)
    summed: list[float] = tensor.tolist()
    return summed


def gathered_from_ranks(value: T) -> list[T]:
    """Every rank's value, by rank."""
    values: list[Any] = [None] * world_size()
    if world_size() == 1:
        return [value]
    dist.all_gather_object(values, value)
    return values


def lockstep(pieces: Sequence[T], idle: Callable[[T], T]) -> list[T]:
    """This rank's pieces, with `idle(piece)` appended until every rank has as many: ZeRO needs equal calls.

    Raises UserError where a rank has no piece at all.
    """
    counts = [0.0] * world_size()
    counts[rank()] = len(pieces)
    counts = total_over_ranks(counts)
    if not min(counts):
        raise UserError(f"{world_size()} ranks share fewer examples than that; add data, or start fewer ranks")
    longest = int(max(counts))
    return [*pieces, *[idle(pieces[-1])] * (longest - len(pieces))]


def share_of_rank(items: Sequence[Any]) -> list[Any]:
    """The items this rank works on: every world-size-th one."""
    return list(items[rank() :: world_size()])
