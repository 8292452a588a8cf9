"""What a generation engine is compared with: transformers' own `generate`, and plain forward passes in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel


def greedy(model: PreTrainedModel, prompt: Sequence[int], tokens: int) -> list[int]:
    """What `generate` makes of one prompt."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    found = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    return found[0, len(prompt) :].tolist()


@torch.no_grad()
def naive_logps(
    model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int], temperature: float = 1.0
) -> list[float]:
    """Log-probabilities of a completion by one unpadded forward pass over the whole sequence."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0].double()
    logps = (logits / temperature).log_softmax(-1)
    return [logps[len(prompt) - 1 + step, token].item() for step, token in enumerate(completion)]
