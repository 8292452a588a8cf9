"""Low-rank adapters (Hu et al., arXiv 2106.09685) through peft, in place: the model stays the transformers model it is.

With the adapters disabled, the same model is the frozen base: a reference costs no second model in memory. Checkpoints
are written merged, under the names of the base's checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gift.cli import UserError, nearest
from gift.recipe import LoRA

ADAPTER = "default"


def add_adapters(model: PreTrainedModel, settings: LoRA, *, seed: int) -> None:
    """Freezes the model and puts adapters, drawn from `seed`, beside its `settings.targets` layers.

    An adapter begins as zero: the model's output is unchanged. Raises UserError naming the targets that the model has
    no linear layer for.
    """
    from peft import LoraConfig, inject_adapter_in_model

    head = model.get_output_embeddings()  # read as a weight by every loss, which would never see its adapter
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head
    }
    linear = {name.rpartition(".")[2] for name in layers}
    if missing := [target for target in settings.targets if target not in linear]:
        raise UserError(
            f"lora.targets: no linear layer to adapt is named {', '.join(missing)}{nearest(missing[0], linear)};"
            f" this model has: {', '.join(sorted(linear))}"
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # declared int, but only ever divided by the rank
        target_modules=list(settings.targets),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, ADAPTER)


def adapted_layers(model: PreTrainedModel) -> dict[str, Any]:
    """The layers that have an adapter, by their names in the model."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


@contextlib.contextmanager
def adapters_disabled(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is the base it was before its adapters."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def merged_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's state dict with each adapter added to its layer, W + (alpha / rank) B A, under the base's names.

    `state` holds whole tensors under the names of the adapted model. The sum is made in fp32 and rounded to the
    layer's type. Without adapters this is the state as it is.
    """
    merged = {name: tensor.detach() for name, tensor in state.items()}
    for name, layer in adapted_layers(model).items():
        down = merged.pop(f"{name}.lora_A.{ADAPTER}.weight")
        up = merged.pop(f"{name}.lora_B.{ADAPTER}.weight")
        weight = merged.pop(f"{name}.base_layer.weight")
        total = weight.float() + layer.scaling[ADAPTER] * (up.float() @ down.float())
        merged[f"{name}.weight"] = total.to(weight.dtype)
        if (bias := merged.pop(f"{name}.base_layer.bias", None)) is not None:
            merged[f"{name}.bias"] = bias
    return merged
