"""Stage 1: supervised training with any objective of gift.objectives. It also pretrains the embedded base.

A step's loss is the sum over all labelled tokens of the batch divided by their number, on all ranks and over all
micro-batches. The paper's Eq. 8 sums over tokens and averages over sequences: that is the option `seq_sum`. The
authors' code averages each micro-batch over its own tokens, which makes the gradient depend on how a batch is cut.
Plain NLL is logged beside every objective, or methods could not be compared.
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

from gift.batches import IGNORED, Encoded, epoch_order, micro_batches, response_tokens
from gift.cli import UserError, progress
from gift.distributed import rank, share_of_rank, total_over_ranks
from gift.engine import TrainingEngine, check_finite, learning_rate
from gift.models import lm_head, logit_map, on_device, states_at
from gift.recipe import Engine, Init
from gift.records import JsonlLog
from gift.reference import CachedReference, OnlineReference
from gift.vocab import DenseReference, SparseReference, VocabStats, vocab_loss

Reference = OnlineReference | CachedReference
SOFT = 0.99  # a token counts as softened by GIFT where its target puts less than this on the label
SURPRISAL_EDGES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0, 22.0, 25.0, 30.0)  # nats


@dataclass(frozen=True)
class Loss:
    """An objective as stage 1 uses it.

    `function` maps statistics of tokens to their losses; `label_weight`, for GIFT alone, to w, so that it is logged how
    many tokens are softened.
    """

    function: Callable[[VocabStats], Tensor]
    reference: Reference | None = None
    needs_old_policy: bool = False
    label_weight: Callable[[VocabStats], Tensor] | None = None


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

    def __init__(self, student: PreTrainedModel, loss: Loss) -> None:
        super().__init__()
        self.student = student
        self.loss = loss  # a plain object: the reference in it is no submodule and stays out of the optimizer

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cached: SparseReference | None = None,
        old_logp: Tensor | None = None,
        plain: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The objective summed over labelled tokens, sums to be logged, and log-probabilities of the labels [N].

        input_ids, labels, attention_mask, position_ids: [B, T] int64, as `gift.batches.collate` makes them; of the N
        labelled positions, `cached` is what the base says and `old_logp` [N] what the old policy said. The sums are
        loss, NLL, entropy and, for GIFT, softened tokens and the histogram of the base's surprisal, float64. `plain`
        replaces the objective by the NLL.
        """
        selected = labels != IGNORED
        hidden = states_at(self.student, input_ids, attention_mask, selected, position_ids=position_ids)
        weight, bias = lm_head(self.student)
        reference: DenseReference | SparseReference | None = cached
        if isinstance(self.loss.reference, OnlineReference) and not plain:
            states = self.loss.reference.hidden(input_ids, attention_mask, selected, position_ids=position_ids)
            reference = DenseReference(states, *self.loss.reference.head())
        total, stats = vocab_loss(
            hidden,
            weight,
            labels[selected],
            nll if plain else self.loss.function,
            bias=bias,
            reference=reference,
            old_logp=old_logp,
            **logit_map(self.student),
        )
        sums = [total.detach(), -stats.logp.sum(), stats.entropy.sum(), *self._surprise(stats)]
        return total, torch.stack([part.double() for part in sums]), stats.logp

    def _surprise(self, stats: VocabStats) -> list[Tensor]:
        """How many tokens GIFT softens, and how many lie in each bin of the base's surprisal, -log p(y)."""
        if self.loss.label_weight is None or stats.ref_logp is None:
            return []  # not GIFT, or plain
        edges = torch.tensor(SURPRISAL_EDGES, device=stats.ref_logp.device)
        bins = torch.bincount(torch.bucketize(-stats.ref_logp.float(), edges), minlength=len(edges) + 1)
        return [(self.loss.label_weight(stats) < SOFT).sum(), *bins]


class Trainer:
    """Stage 1 on one model, which is trained in place."""

    def __init__(
        self,
        stage: Stage,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        loss: Loss,
        *,
        settings: Init,
        engine_settings: Engine,
        resume_dir: Path,
        log: JsonlLog,
    ) -> None:
        self.stage = stage
        self.loss = loss
        self.settings = settings
        self.resume_dir = resume_dir
        self.log = log
        self.pad: int = tokenizer.pad_token_id
        self.engine = TrainingEngine(LossModule(model, loss), model, engine_settings, settings.optimizer)

    def train(self, checkpoint: Callable[[TrainingEngine, int], None]) -> None:
        """Passes over the data in whole batches; the rest of an epoch that makes none is dropped.

        Continues from the newest state in the resume folder. Batches are a function of seed and epoch alone. After the
        epoch that the settings select, `checkpoint` is called with the engine and the number of batches so far. Logs
        under (policy, stage, event, step), a step being a batch.
        """
        settings, stage = self.settings, self.stage
        per_epoch = len(stage.train) // settings.batch_size
        if per_epoch == 0:
            raise UserError(
                f"{stage.policy}: {len(stage.train)} examples (prompts that fill data.max_length are left out) make no"
                f" batch of {settings.batch_size}; raise data.max_length, or add data"
            )
        total = per_epoch * settings.epochs
        selected = per_epoch * (settings.select_epoch or settings.epochs)
        state = self.engine.resume(self.resume_dir) or {"step": 0}
        bar = progress(total, f"{stage.policy}: {stage.name}", unit="step", initial=state["step"])
        for step in range(state["step"], total):
            if step == 0:
                self.validate(epoch=0, step=0)
            epoch, position = divmod(step, per_epoch)
            order = epoch_order(len(stage.train), stage.seed, epoch)
            start = position * settings.batch_size
            batch = [stage.train[index] for index in order[start : start + settings.batch_size]]
            row = self.train_step(batch, learning_rate(settings.optimizer, step, total))
            done = step + 1
            stage.record(self.log, "train", done, {"epoch": done / per_epoch, **row})
            if done % per_epoch == 0:
                self.validate(epoch=done // per_epoch, step=done)
            if done == selected:
                checkpoint(self.engine, done)
            if done % settings.save_every == 0 and done < total:
                self.engine.save(self.resume_dir, {"step": done})
            bar.set_postfix_str(f"nll {row['nll']:.3f}", refresh=False)
            bar.update()
        bar.close()
        self.engine.close()

    def train_step(self, batch: Sequence[Encoded], lr: float) -> dict[str, Any]:
        """The optimizer steps on one batch shared among the ranks; returns means per token over the whole batch.

        The gradient norm is that of the last update.
        """
        started = time.perf_counter()
        size = len(batch) // self.settings.updates_per_batch
        parts = [batch[start : start + size] for start in range(0, size * self.settings.updates_per_batch, size)]
        prepared = [self.micro_batches(part) for part in parts]
        if self.loss.needs_old_policy:
            for micro_batches in prepared:
                self.add_old_policy(micro_batches)
        logged: Tensor | float = 0.0
        for part, micro_batches in zip(parts, prepared, strict=True):
            denominator = response_tokens(part) if self.settings.reduction == "token_mean" else len(part)
            for micro_batch in micro_batches:
                loss, sums, _ = self.engine(**on_device(micro_batch, self.engine.model))
                self.engine.backward(loss, denominator)
                logged = logged + sums.cpu()
            grad_norm = self.engine.step(lr)
        assert isinstance(logged, Tensor)
        loss_sum, *sums = total_over_ranks(logged.tolist())
        tokens = sum(map(response_tokens, parts))
        row: dict[str, Any] = {
            "loss": loss_sum / (tokens if self.settings.reduction == "token_mean" else size * len(parts)),
            "nll": sums[0] / tokens,
            "entropy": sums[1] / tokens,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens_per_s": round(tokens / (time.perf_counter() - started), 1),
        }
        if len(sums) > 2:
            histogram = {"edges": list(SURPRISAL_EDGES), "counts": [int(count) for count in sums[3:]]}
            row |= {"soft_share": sums[2] / tokens, "surprisal": histogram}
        return row

    @torch.no_grad()
    def add_old_policy(self, micro_batches: Sequence[dict[str, Any]]) -> None:
        """Adds `old_logp`: what the policy as it is says about the labels, before any update on the batch."""
        for micro_batch in micro_batches:
            _, _, logp = self.engine(**on_device(micro_batch, self.engine.model), plain=True)
            micro_batch["old_logp"] = logp

    @torch.no_grad()
    def validate(self, *, epoch: int, step: int) -> None:
        """Logs the validation set's plain NLL in nats per response token, whatever the objective is."""
        if not self.stage.validation:
            return
        total = 0.0
        for micro_batch in self.micro_batches(self.stage.validation, cached=False):
            loss, _, _ = self.engine(**on_device(micro_batch, self.engine.model), plain=True)
            total += float(loss)
        (total,) = total_over_ranks([total])
        tokens = response_tokens(self.stage.validation)
        row = {"epoch": epoch, "val_nll": total / tokens, "val_tokens": tokens}
        self.stage.record(self.log, "validation", step, row)

    def micro_batches(self, batch: Sequence[Encoded], *, cached: bool = True) -> list[dict[str, Any]]:
        """This rank's share of a batch in collated pieces; every rank gets as many, the last ones without labels."""
        mine, found = share_of_rank(batch), []
        for indices, tensors in micro_batches(mine, self.engine.settings, self.pad):
            piece: dict[str, Any] = tensors
            if cached and isinstance(self.loss.reference, CachedReference):
                piece = {**tensors, "cached": self.loss.reference.batch([mine[index] for index in indices])}
            found.append(piece)
        return found


def nll(stats: VocabStats) -> Tensor:
    """What is reported of every objective: -log pi(y)."""
    return -stats.logp
