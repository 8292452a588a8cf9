"""ReLIFT (TheRoadQaQ/ReLIFT): RL, and an SFT step on the expert's solutions of what RL cannot solve.

A prompt none of whose samples earned anything enters a buffer. Once the buffer holds enough of them, the newest leave
it after the RL update, and the policy takes one supervised step on their demonstrations with a second AdamW of its own.
The loss of that step is the mean NLL of the demonstrations' tokens minus `entropy_coef` times the mean entropy, at
temperature 1. The authors' code divides that step's gradient by the number of ranks (it forgets them when it counts
micro-batches); here it is the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gift.batches import Encoded, micro_batches, response_tokens
from gift.distributed import share_of_rank, total_over_ranks
from gift.engine import TrainingEngine, learning_rate
from gift.models import on_device
from gift.recipe import Relift


@dataclass
class FailedPrompts:
    """Ids of the prompts that wait for a supervised step, newest first; the same on all ranks.

    A prompt that fails again is in it twice, as in the authors' code.
    """

    size: int
    ids: list[str] = field(default_factory=list)

    def push(self, failed: Sequence[str]) -> None:
        """Puts the prompts that failed at this step in front."""
        self.ids[:0] = failed

    def pop(self) -> list[str]:
        """Takes the newest `size` prompts out; none while there are fewer."""
        if len(self.ids) < self.size:
            return []
        taken, self.ids[: self.size] = self.ids[: self.size], []
        return taken


def supervised_step(
    engine: TrainingEngine, demonstrations: Sequence[Encoded], settings: Relift, pad: int, step: int, total: int
) -> dict[str, float]:
    """One step on demonstrations, shared among the ranks; returns their mean NLL and entropy (nats per token).

    The engine's module returns log-probability and entropy of the response tokens, each [N]. `step` of `total` RL
    steps is what the learning rate's schedule goes by.
    """
    tokens = response_tokens(demonstrations)
    logged = torch.zeros(2, dtype=torch.float64)
    with engine.optimizer_state("sft", settings.optimizer):
        for _, batch in micro_batches(share_of_rank(demonstrations), engine.settings, pad):
            logp, entropy = engine(**on_device(batch, engine.model), temperature=1.0)
            engine.backward(supervised_loss(logp, entropy, settings.entropy_coef), tokens)
            logged += torch.stack([-logp.detach().double().sum(), entropy.detach().double().sum()]).cpu()
        engine.step(learning_rate(settings.optimizer, step, total))
    nll, entropy = (value / tokens for value in total_over_ranks(logged.tolist()))
    return {"relift_nll": nll, "relift_entropy": entropy}


def supervised_loss(logp: Tensor, entropy: Tensor, entropy_coef: float) -> Tensor:
    """NLL minus `entropy_coef` times entropy, each [N], summed over tokens."""
    return -(logp + entropy_coef * entropy).sum()
