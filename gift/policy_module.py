"""The policy as stage 2 runs it: micro-batches in, per-token numbers or the loss of an update out."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from gift.batches import IGNORED
from gift.models import lm_head, logit_map, states_at
from gift.policy import TokenInputs, update_loss
from gift.recipe import RL
from gift.vocab import vocab_stats


class PolicyModule(nn.Module):
    """The policy and its loss as one module: DeepSpeed must see both in one forward."""

    def __init__(self, policy: PreTrainedModel, settings: RL) -> None:
        super().__init__()
        self.policy = policy
        self.settings = settings

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        temperature: float,
        **inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """With `inputs`, the fields of TokenInputs: what `gift.policy.update_loss` makes of the micro-batch.

        Without: log-probability and entropy of the response tokens at `temperature`, each [N], in nats. The N tokens
        are the labelled positions in row-major order; for the other tensors see `gift.batches.collate`.
        """
        selected = labels != IGNORED
        hidden = states_at(self.policy, input_ids, attention_mask, selected, position_ids=position_ids)
        weight, bias = lm_head(self.policy)
        stats = vocab_stats(
            hidden, weight, labels[selected], bias=bias, temperature=temperature, **logit_map(self.policy)
        )
        if not inputs:
            return stats.logp, stats.entropy
        return update_loss(stats.logp, stats.entropy, TokenInputs(**inputs), self.settings)
