"""The check that a generation engine has the trainer's weights: both score the same few sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from gift.generation import StaleWeightsError

PROBE_SEQUENCES, PROBE_LENGTH = 4, 64  # how many sequences a probe has, and their tokens at most
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


class Probe:
    """A few sequences of token ids, and what the trainer thought of them last.

    `tolerance`: the largest mean difference, in nats per token, between engine and trainer that kernels can explain.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], tolerance: float) -> None:
        self.sequences = [tuple(sequence[:PROBE_LENGTH]) for sequence in sequences[:PROBE_SEQUENCES]]
        self.tolerance = tolerance
        self._before: list[list[float]] | None = None
        self._noise = 0.0

    def check(self, found: Sequence[Sequence[float]], expected: list[list[float]]) -> float:
        """The mean difference in nats between the engine's log-probabilities, `found`, and the trainer's.

        Raises StaleWeightsError if it exceeds the tolerance, or, however small it is, if the engine is closer to what
        the trainer thought before its last steps, and these moved it further than the engine was off at first.
        """
        gap = distance(found, expected)
        if not gap <= self.tolerance:  # also where it is not a number
            raise StaleWeightsError(
                f"after new weights, engine and trainer differ by {gap:.2g} nats per token on a fixed probe, more than"
                f" {self.tolerance:g}: the engine does not have the trainer's weights, or computes otherwise; if it is"
                " the latter, set generation.probe_tolerance"
            )
        if self._before is None:
            self._noise = gap
        else:
            moved, old_gap = distance(expected, self._before), distance(found, self._before)
            if old_gap < gap and moved > 2 * self._noise:
                raise StaleWeightsError(
                    f"after new weights, the engine is closer to the trainer's old ones on a fixed probe ({old_gap:.2g}"
                    f" nats per token) than to the new ({gap:.2g}): it did not take them over"
                )
        self._before = expected
        return gap


def distance(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> float:
    """The mean absolute difference of two sets of numbers of one shape."""
    gaps = [abs(a - b) for ours, theirs in zip(left, right, strict=True) for a, b in zip(ours, theirs, strict=True)]
    return sum(gaps) / len(gaps)


@torch.no_grad()
def model_logps(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probabilities, in nats, of each sequence's tokens from the second on: one forward pass each."""
    found = []
    was_training = model.training
    model.eval()
    for sequence in sequences:
        ids = torch.tensor([sequence], device=model.device)
        logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        found.append(logps.gather(-1, ids[0, 1:, None])[:, 0].tolist())
    model.train(was_training)
    return found
