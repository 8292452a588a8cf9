"""What the frozen base model contributes to an objective: its states at the positions being trained on."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gift.models import lm_head, states_at


class Reference:
    """The base model, asked online: one extra backbone pass per micro-batch, no gradient."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def hidden(self, input_ids: Tensor, attention_mask: Tensor, selected: Tensor) -> Tensor:
        """Post-final-norm states [N, H_ref] at the N positions where `selected` [B, T] is true."""
        return states_at(self.model, input_ids, attention_mask, selected)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """The base's LM head: weight [V, H_ref] and bias [V] or None."""
        return lm_head(self.model)
