"""Stage 1: supervised training with any objective of gift.objectives. It also pretrains the embedded base.

A step's loss is the sum over all labelled tokens of the batch divided by their number, on all ranks and over all
micro-batches. The paper's Algorithm 1 sums over tokens and averages over sequences; the authors' code averages each
micro-batch over its own tokens. Plain NLL is logged beside every objective, or methods could not be compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift.cli import progress
from gift.data import IGNORED, Encoded, by_length, collate, epoch_order
from gift.engine import TrainingEngine, check_finite, learning_rate, lockstep, rank, share_of_rank, total_over_ranks
from gift.models import lm_head, on_device, states_at
from gift.objectives import gift_weight
from gift.recipe import Engine, Init
from gift.records import JsonlLog
from gift.reference import Reference
from gift.vocab import VocabStats, vocab_stats

Loss = Callable[[VocabStats], Tensor]
SOFT = 0.99  # a token counts as softened by GIFT where its target puts less than this on the label


@dataclass
class Stage:
    """What names a stage-1 run in logs, and what it trains on."""

    policy: str
    name: str
    train: Sequence[Encoded]
    validation: Sequence[Encoded]
    seed: int

    def record(self, log: JsonlLog, event: str, step: int, row: dict[str, Any]) -> None:
        """Logs one row, on the first rank alone. Raises UserError where a number in it is not finite."""
        check_finite(row, f"{self.policy}, step {step}")
        if rank() == 0:
            log.append([{"policy": self.policy, "stage": self.name, "event": event, "step": step, **row}])


class LossModule(nn.Module):
    """The student and its objective as one module: DeepSpeed must see both in one forward."""

    def __init__(self, student: PreTrainedModel, loss: Loss, reference: Reference | None, beta: float | None) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.beta = beta
        self._reference = [reference]  # in a list, so that it is not a submodule and stays out of the optimizer

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The objective summed over labelled tokens, and what is logged, summed likewise.

        input_ids, attention_mask, labels: [B, T] int64. Returns a scalar and [4]: loss, NLL, entropy, softened tokens.
        """
        stats = self.statistics(input_ids, attention_mask, labels)
        loss = self.loss(stats)
        soft = torch.zeros_like(stats.logp)
        if self.beta is not None and stats.ref_logp is not None:
            soft = (gift_weight(stats.ref_logp, self.beta) < SOFT).float()
        logged = torch.stack([part.detach().double().sum() for part in (loss, -stats.logp, stats.entropy, soft)])
        return loss.sum(), logged

    def statistics(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> VocabStats:
        """Vocabulary statistics at the labelled positions."""
        selected = labels != IGNORED
        hidden = states_at(self.student, input_ids, attention_mask, selected)
        weight, bias = lm_head(self.student)
        reference = self._reference[0]
        if reference is None:
            return vocab_stats(hidden, weight, labels[selected], bias=bias)
        ref_hidden = reference.hidden(input_ids, attention_mask, selected)
        ref_weight, ref_bias = reference.head()
        return vocab_stats(
            hidden, weight, labels[selected], bias=bias, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias
        )


def micro_batches(batch: Sequence[Encoded], micro_tokens: int, pad: int) -> list[dict[str, Tensor]]:
    """This rank's share of a batch in collated pieces; ranks with fewer pieces than others get some without labels."""
    pieces = by_length(share_of_rank(batch), lambda example: len(example.ids), micro_tokens)
    collated = [collate(piece, pad) for piece in pieces]
    return lockstep(collated, lambda piece: {**piece, "labels": torch.full_like(piece["labels"], IGNORED)})


def train(
    stage: Stage,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loss: Loss,
    *,
    settings: Init,
    engine_settings: Engine,
    resume_dir: Path,
    log: JsonlLog,
    reference: Reference | None = None,
    beta: float | None = None,
) -> int:
    """Trains `model` in place and returns the number of steps taken.

    Continues from the newest state in `resume_dir`; logs to `log` under (policy, stage, event, step). Batches are whole
    (the rest of an epoch is dropped), and their order is a function of seed and epoch alone. `beta` is given for GIFT,
    to log the share of tokens it softens.
    """
    module = LossModule(model, loss, reference, beta)
    engine = TrainingEngine(module, model, engine_settings, settings.optimizer)
    per_epoch = len(stage.train) // settings.batch_size
    total = per_epoch * settings.epochs
    state = engine.resume(resume_dir) or {"step": 0}
    pad = tokenizer.pad_token_id
    order: list[int] | None = None
    bar = progress(total, f"{stage.policy}: {stage.name}", unit="step", initial=state["step"])
    for step in range(state["step"], total):
        epoch, position = divmod(step, per_epoch)
        if step == 0:
            validate(stage, engine, pad, log, epoch=0, step=0)
        if position == 0 or order is None:
            order = epoch_order(len(stage.train), stage.seed, epoch)
        start = position * settings.batch_size
        batch = [stage.train[index] for index in order[start : start + settings.batch_size]]
        row = train_step(engine, batch, pad, learning_rate(settings.optimizer, step, total))
        if beta is None:
            del row["soft_share"]
        done = step + 1
        stage.record(log, "train", done, {"epoch": done / per_epoch, **row})
        if done % per_epoch == 0:
            validate(stage, engine, pad, log, epoch=done // per_epoch, step=done)
        if done % settings.save_every == 0 and done < total:
            engine.save(resume_dir, {"step": done})
        bar.set_postfix_str(f"nll {row['nll']:.3f}", refresh=False)
        bar.update()
    bar.close()
    engine.close()
    return total


def train_step(engine: TrainingEngine, batch: Sequence[Encoded], pad: int, lr: float) -> dict[str, Any]:
    """One optimizer step on a batch shared among the ranks; returns means per token over the whole batch."""
    started = time.perf_counter()
    tokens = sum(len(example.ids) - example.prompt_length for example in batch)
    logged = torch.zeros(4, dtype=torch.float64)
    for piece in micro_batches(batch, engine.settings.micro_tokens, pad):
        loss, sums = engine(**on_device(piece, engine.model))
        engine.backward(loss, tokens)
        logged += sums.cpu()
    grad_norm = engine.step(lr)
    means = [value / tokens for value in total_over_ranks(logged.tolist())]
    return {
        **dict(zip(("loss", "nll", "entropy", "soft_share"), means, strict=True)),
        "grad_norm": grad_norm,
        "lr": lr,
        "tokens_per_s": round(tokens / (time.perf_counter() - started), 1),
    }


@torch.no_grad()
def validate(stage: Stage, engine: TrainingEngine, pad: int, log: JsonlLog, *, epoch: int, step: int) -> None:
    """Logs the validation set's plain NLL in nats per response token, whatever the objective is."""
    if not stage.validation:
        return
    nll = 0.0
    for piece in micro_batches(stage.validation, engine.settings.micro_tokens, pad):
        _, sums = engine(**on_device(piece, engine.model))
        nll += float(sums[1])
    (nll,) = total_over_ranks([nll])
    tokens = sum(len(example.ids) - example.prompt_length for example in stage.validation)
    stage.record(log, "validation", step, {"epoch": epoch, "val_nll": nll / tokens, "val_tokens": tokens})
