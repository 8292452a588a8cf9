"""The base model, asked online."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gift.lora import adapters_disabled
from gift.models import lm_head, states_at


class OnlineReference:
    """The base model beside the policy: one extra backbone pass per micro-batch, no gradient.

    With `adapted`, `model` is the policy itself, and its low-rank adapters are disabled during the pass.
    """

    def __init__(self, model: PreTrainedModel, *, adapted: bool = False) -> None:
        self.model = model if adapted else model.requires_grad_(False).eval()
        self.adapted = adapted

    @torch.no_grad()
    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        selected: Tensor,
        *,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Post-final-norm states [N, H_ref] at the N positions where `selected` [B, T] is true; see `states_at`."""
        with adapters_disabled(self.model) if self.adapted else contextlib.nullcontext():
            return states_at(self.model, input_ids, attention_mask, selected, position_ids=position_ids)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """The base's LM head: weight [V, H_ref] and bias [V] or None."""
        return lm_head(self.model)
