"""What an optimizer step changes: the master weights, and Adam's moments beside them, under every ZeRO stage.

DeepSpeed 0.19 keeps them under another name in each of its optimizer wrappers. A rank's masters are whole parameters at
stage 0 and flat partitions of all parameters at stages 1 to 3; a partition is padded at its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# The attribute of each wrapper that lists its partitions.
PARTITIONS = (
    "single_partition_of_fp32_groups",  # zero/stage_1_and_2.py
    "fp32_groups_flat_partition",  # bf16_optimizer.py: stage 1, bf16 weights, gradients added up in fp32
    "fp32_partitioned_groups_flat",  # zero/stage3.py
)


class MasterAdamW(torch.optim.AdamW):
    """AdamW on fp32 copies of bf16 weights, whose gradients torch adds up in fp32: mixed precision without ZeRO.

    DeepSpeed's own wrapper for this (fp16/unfused_optimizer.py) adds gradients up in bf16, and takes an AdamW step on
    zero gradients when it is built, which decays the weights and leaves the bias correction one step ahead.
    """

    def __init__(self, weights: Iterable[nn.Parameter], **options: Any) -> None:
        self.weights = list(weights)
        for weight in self.weights:
            weight.grad_dtype = torch.float32
        super().__init__([weight.detach().float().requires_grad_() for weight in self.weights], **options)

    @property
    def masters(self) -> list[Tensor]:
        """The fp32 copies, in the order of the weights."""
        return [master for group in self.param_groups for master in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step on the masters, which the weights then follow."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = weight.grad
        super().step(closure)
        for master in self.masters:
            master.grad = None
        self.update_weights()

    @torch.no_grad()
    def update_weights(self) -> None:
        """Rounds the masters into the weights."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            weight.copy_(master)


def masters_of(optimizer: Any) -> list[Tensor]:
    """This rank's master weights under a DeepSpeed engine's optimizer, in an order that never changes."""
    for name in PARTITIONS:
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def adam_of(optimizer: Any) -> dict[Tensor, dict[str, Any]]:
    """Adam's step, exp_avg and exp_avg_sq by master weight; empty before the first step."""
    state: dict[Tensor, dict[str, Any]] = getattr(optimizer, "optimizer", optimizer).state
    return state


def update_weights(optimizer: Any) -> None:
    """Copies changed masters into the model's own weights, where those are apart. All ranks call this."""
    if isinstance(optimizer, MasterAdamW):
        optimizer.update_weights()
    elif hasattr(optimizer, "update_lp_params"):  # stages 1 and 2
        optimizer.update_lp_params()
    elif hasattr(optimizer, "persistent_parameters"):  # stage 3
        optimizer.parameter_offload.partition_all_parameters()
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if whole := optimizer.persistent_parameters:
            whole[0].all_gather(whole)
