"""Stage 2: RL from any initialization. One loop; GRPO, LUFFY and ReLIFT are settings of it.

Each step: sample a group of responses per prompt, grade them with evaluation's own grader, take the reward minus the
group's mean as advantage, and make a few updates. The defaults are the paper's (Appendix E; verl 0.4 where it is
silent): PPO's clipped surrogate, averaged over all response tokens of an update on all ranks, no KL term, no division
by the standard deviation. verl averages each micro-batch over its own tokens instead, and so depends on the cut.

LUFFY (`algorithm: luffy`) puts the expert's solution into each group, with a loss of its own (`gift.policy`). ReLIFT
(`relift`) adds supervised steps on what was not solved (`gift.relift`). Both authors' code does not clip ratios, and
divides the sum of a rank's token losses by 8192 alone. Of the same update on 8 GPUs, 512 sequences, `aggregation:
seq_sum_norm` makes 1/64 of that gradient. Adam cancels the factor, clipping does not: `max_grad_norm: M` there is M/64
here. Their entropy bonus is a mean over the tokens of each micro-batch instead, of up to 32,768: against the policy
term, their coefficient of 0.001 weighs about as much as 0.00025 to 0.0005 here.

A response without advantage has no policy gradient: it counts in the denominators, and is not computed unless a KL or
entropy term needs it.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift.batches import epoch_order, micro_batches
from gift.cli import UserError, progress
from gift.data import Example
from gift.distributed import rank, total_over_ranks
from gift.engine import FrozenEngine, TrainingEngine, check_finite, learning_rate
from gift.generation.follower import Follower, follow_in_place
from gift.lora import adapted_layers, adapters_disabled
from gift.models import on_device
from gift.policy import token_weight, truncated_importance
from gift.policy_module import PolicyModule
from gift.recipe import RL, Engine
from gift.records import JsonlLog
from gift.relift import FailedPrompts, supervised_step
from gift.rollouts import Rollout, Sampler, rollout_metrics, rollout_rows

IMPORTANCE_CAPS = {"float32": 0.0, "bfloat16": 2.0}
Forward = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Scored:
    """A rollout, and what fixed policies say about its tokens: log-probabilities [tokens] in nats, on the CPU.

    The old policy is the one that drew it. It has nothing to say about a demonstration, whose behaviour's probability
    LUFFY takes to be 1: `old_logp` and `old_entropy` (nats, summed) are 0.
    """

    rollout: Rollout
    old_logp: Tensor
    old_entropy: float
    ref_logp: Tensor | None = None

    @property
    def generator_logp(self) -> Tensor | None:
        """The generator's log-probabilities [tokens], or None where it gave none; those of `old_logp` for an expert."""
        if self.rollout.source == "demonstration":
            return self.old_logp
        return torch.tensor(self.rollout.sample.logps) if self.rollout.sample.logps else None


class Watch(NamedTuple):
    """Evaluation during training: `evaluate` samples by the follower and returns what the first rank logs of a step."""

    every: int
    evaluate: Callable[[Follower, int], dict[str, Any]]


class GRPOTrainer:
    """RL on one policy. The model is trained in place; `policy` names it in logs, `seed` decides every sample.

    `follow` makes what is sampled from: by default the hf engine, computing with the policy's own module. `watch`
    evaluates the policy on the way.
    """

    def __init__(
        self,
        policy: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        settings: RL,
        engine_settings: Engine,
        seed: int,
        resume_dir: Path,
        log: JsonlLog,
        rollout_log: JsonlLog,
        follow: Callable[[TrainingEngine, PreTrainedTokenizerBase], Follower] = follow_in_place,
        watch: Watch | None = None,
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        if settings.importance_cap is None:
            settings = replace(settings, importance_cap=IMPORTANCE_CAPS[engine_settings.dtype])
        self.settings = settings
        self.seed = seed
        self.resume_dir = resume_dir
        self.log = log
        self.rollout_log = rollout_log
        self.frozen: FrozenEngine | None = None
        if settings.kl_coef and not adapted_layers(model):
            self.frozen = FrozenEngine(copy.deepcopy(model), engine_settings)
        self.engine = TrainingEngine(PolicyModule(model, settings), model, engine_settings, settings.optimizer)
        self.reference: Forward | None = None
        if settings.kl_coef:
            self.reference = PolicyModule(self.frozen.model, settings) if self.frozen else self._without_adapters
        self.generator = follow(self.engine, tokenizer)
        self.sampler = Sampler(policy, tokenizer, self.generator, settings, seed)
        self.failed = FailedPrompts(settings.relift.buffer)
        self.watch = watch

    def train(
        self,
        problems: Sequence[Example],
        validation: Sequence[Example],
        checkpoint: Callable[[TrainingEngine, int], None],
    ) -> None:
        """Passes over the problems in whole batches; the rest of an epoch that makes none is dropped.

        Continues from the newest state in the resume folder. At the end `checkpoint` is called with the engine and the
        number of rollout batches. Logs under (policy, stage, event, step), a step being a rollout batch. Raises
        UserError before any work if a prompt leaves no room for `max_tokens` in the model's window.
        """
        settings = self.settings
        self.sampler.check_room([*problems, *validation[: settings.validation_items]])
        per_epoch = len(problems) // settings.batch_size
        total = per_epoch * settings.epochs
        state = self.engine.resume(self.resume_dir) or {"step": 0, "failed": []}
        self.failed.ids = state["failed"]
        bar = progress(total, f"{self.policy}: rl", unit="step", initial=state["step"])
        with contextlib.closing(self.generator):  # a server's copy of the weights is not left behind
            for step in range(state["step"], total):
                if step == 0:
                    self.validate(validation, step=0)
                    self.evaluate(0, total)
                epoch, position = divmod(step, per_epoch)
                order = epoch_order(len(problems), self.seed, epoch)
                start = position * settings.batch_size
                batch = [problems[i] for i in order[start : start + settings.batch_size]]
                row = self.train_step(batch, problems, step, total)
                done = step + 1
                self._record("train", done, row)
                if settings.validate_every and (done % settings.validate_every == 0 or done == total):
                    self.validate(validation, step=done)
                self.evaluate(done, total)
                if done % settings.save_every == 0 and done < total:
                    self.engine.save(self.resume_dir, {"step": done, "failed": self.failed.ids})
                bar.set_postfix_str(f"reward {row['reward_mean']:.2f}", refresh=False)
                bar.update()
        bar.close()
        checkpoint(self.engine, total)
        self.engine.close()
        if self.frozen is not None:
            self.frozen.close()

    def train_step(
        self, batch: Sequence[Example], problems: Sequence[Example], step: int, total: int
    ) -> dict[str, Any]:
        """Rolls out, grades and updates on one batch of the problems; returns what is logged (of the last update)."""
        draw = self.sampler.draw(batch, problems, step)
        self.rollout_log.append(rollout_rows(draw, step + 1, self.tokenizer))
        started = time.perf_counter()
        mine = [position for position in draw.kept if position in draw.groups]
        scored = iter(self.score([rollout for position in mine for rollout in draw.groups[position]]))
        groups = {position: list(itertools.islice(scored, len(draw.groups[position]))) for position in mine}
        learnt_from = [each for group in groups.values() for each in group]
        row = {**rollout_metrics(draw), **policy_metrics(learnt_from, self.settings.importance_cap)}
        if self.generator.probe_gap is not None:
            row["probe_gap"] = self.generator.probe_gap
            draw.seconds["sync"], self.generator.sync_seconds = self.generator.sync_seconds, 0.0
        if self.settings.dynamic_sampling:
            row["drawn"] = len(draw.live)
        size = len(batch) // self.settings.updates_per_batch
        for start in range(0, size * self.settings.updates_per_batch, size):
            part = [groups[position] for position in draw.kept[start : start + size] if position in groups]
            update = self.update([each for group in part for each in group], step, total)
        row |= update
        if self.settings.algorithm == "relift":
            row |= self.lift(draw.failed, {problem.id: problem for problem in problems}, step, total)
        seconds = {**draw.seconds, "update": time.perf_counter() - started}
        return {**row, "seconds": {name: round(value, 3) for name, value in seconds.items()}}

    def score(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        """The rollouts with the old policy's and the reference's log-probabilities, both computed by the trainer."""
        numbers = self._per_token(self.engine, [rollout for rollout in rollouts if rollout.source == "policy"])
        old = iter((logp, float(entropy.double().sum())) for logp, entropy in numbers)
        reference: list[tuple[Tensor, Tensor]] | None = None
        if self.reference is not None:
            reference = self._per_token(self.reference, rollouts)
        return [
            Scored(
                rollout,
                *(next(old) if rollout.source == "policy" else (torch.zeros(rollout.tokens), 0.0)),
                None if reference is None else reference[index][0],
            )
            for index, rollout in enumerate(rollouts)
        ]

    def update(self, scored: Sequence[Scored], step: int, total: int) -> dict[str, float]:
        """One optimizer step; returns what is logged, means per token that was drawn from the policy and computed."""
        settings = self.settings
        counted = [each for each in scored if not (settings.mask_truncated and each.rollout.truncated)]
        sequences, tokens = total_over_ranks([float(len(counted)), float(sum(each.rollout.tokens for each in counted))])
        needs_all = settings.kl_coef or settings.entropy_coef
        live = [each for each in counted if needs_all or each.rollout.advantage]
        logged = torch.zeros(4, dtype=torch.float64)
        for piece, batch in micro_batches([each.rollout.encoded for each in live], self.engine.settings, self._pad):
            inputs = token_inputs([live[index] for index in piece], sequences, tokens, settings)
            tensors = on_device({**batch, **inputs}, self.engine.model)
            loss, sums = self.engine(**tensors, temperature=settings.temperature)
            self.engine.backward(loss, 1.0)  # the weights have divided it already
            logged += sums.cpu()
        lr = learning_rate(settings.optimizer, step, total)
        grad_norm = self.engine.step(lr)
        computed, *sums_of = total_over_ranks(logged.tolist())
        clip_share, kl_old, kl = (value / max(computed, 1) for value in sums_of)
        row = {"clip_share": clip_share, "kl_old": kl_old, "grad_norm": grad_norm, "lr": lr}
        return {**row, "kl": kl} if settings.kl_coef else row

    def lift(self, failed: Sequence[str], problems: dict[str, Example], step: int, total: int) -> dict[str, float]:
        """ReLIFT's part of a step: notes what failed, and takes a supervised step once enough has."""
        self.failed.push(failed)
        taken = [problems[name] for name in self.failed.pop()]
        row: dict[str, float] = {"buffer": len(self.failed.ids)}
        if taken:
            demonstrations = [self.sampler.encode(problem, self.sampler.demonstration(problem)) for problem in taken]
            row |= supervised_step(self.engine, demonstrations, self.settings.relift, self._pad, step, total)
        return row

    def validate(self, validation: Sequence[Example], *, step: int) -> None:
        """Logs greedy accuracy on the first `validation_items` held-out problems."""
        items = validation[: self.settings.validation_items]
        row = {"val_accuracy": self.sampler.accuracy(items), "val_items": len(items), "val_samples": 1}
        self._record("validation", step, row)

    def evaluate(self, step: int, total: int) -> None:
        """Logs what `watch` finds, where it is due at this step."""
        if self.watch is not None and (step % self.watch.every == 0 or step == total):
            row = self.watch.evaluate(self.generator, step)
            if rank() == 0:
                self._record("evaluation", step, row)

    # -----------------------------------------------------------------------------------------------------------------

    @property
    def _pad(self) -> int:
        pad: int = self.tokenizer.pad_token_id
        return pad

    def _without_adapters(self, **batch: Any) -> tuple[Tensor, Tensor]:
        """The forward pass of the policy that RL began with, where what is trained are adapters: they began as zero."""
        with adapters_disabled(self.engine.model):
            numbers: tuple[Tensor, Tensor] = self.engine(**batch)
        return numbers

    @torch.no_grad()
    def _per_token(self, forward: Forward, rollouts: Sequence[Rollout]) -> list[tuple[Tensor, Tensor]]:
        """Log-probability and entropy of each rollout's tokens, each [tokens], on the CPU."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        encoded = [rollout.encoded for rollout in rollouts]
        for piece, batch in micro_batches(encoded, self.engine.settings, self._pad):
            numbers = forward(**on_device(batch, self.engine.model), temperature=self.settings.temperature)
            lengths = [rollouts[index].tokens for index in piece]
            logp, entropy = (number.cpu().split(lengths) for number in numbers)
            found.update(zip(piece, zip(logp, entropy, strict=True), strict=True))
        return [found[index] for index in range(len(rollouts))]

    def _record(self, event: str, step: int, row: dict[str, Any]) -> None:
        check_finite(row, f"{self.policy}, step {step}")
        if rank() == 0:
            self.log.append([{"policy": self.policy, "stage": "rl", "event": event, "step": step, **row}])


def token_inputs(scored: Sequence[Scored], sequences: float, tokens: float, settings: RL) -> dict[str, Tensor]:
    """The fields of TokenInputs for some rollouts of an update that has so many sequences and tokens in all.

    Raises UserError where `importance_cap` needs log-probabilities that the generator did not give.
    """
    lengths = torch.tensor([each.rollout.tokens for each in scored], dtype=torch.int64)
    norm_length = settings.norm_length or settings.max_tokens
    weights = [
        token_weight(settings.aggregation, length, tokens=tokens, sequences=sequences, norm_length=norm_length)
        for length in lengths.tolist()
    ]

    def spread(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(lengths)

    def joined(parts: Iterable[Tensor]) -> Tensor:
        return torch.cat([torch.zeros(0), *parts])

    inputs = {
        "old_logp": joined(each.old_logp for each in scored),
        "advantages": spread([each.rollout.advantage for each in scored]),
        "weights": spread(weights),
        "demonstration": spread([each.rollout.source == "demonstration" for each in scored], torch.bool),
    }
    if settings.kl_coef:
        inputs["ref_logp"] = joined(each.ref_logp for each in scored if each.ref_logp is not None)
    if settings.importance_cap:
        generator_logp = [each.generator_logp for each in scored]
        known = [logp for logp in generator_logp if logp is not None]
        if len(known) < len(scored):
            raise UserError("rl.importance_cap: this generation engine gives no log-probabilities; set it to 0")
        inputs["importance"] = truncated_importance(inputs["old_logp"], joined(known), settings.importance_cap)
    return inputs


def policy_metrics(scored: Sequence[Scored], importance_cap: float | None) -> dict[str, float]:
    """Means over the tokens drawn from the policy and learnt from.

    `entropy`: the old policy's, in nats. Where the generator gives log-probabilities, `generator_gap`: how far they are
    from the trainer's, in nats; `generator_ratio`: the trainer's probability over the generator's, 1 in expectation
    where they draw alike; with a cap, `capped_share`: the share of ratios above it.
    """
    drawn = [each for each in scored if each.rollout.source == "policy"]
    compared = [(each.old_logp, each.generator_logp) for each in drawn]
    gaps = torch.cat([torch.zeros(0), *(old_logp - logp for old_logp, logp in compared if logp is not None)]).double()
    tokens, entropy, known, gap, ratio, capped = total_over_ranks(
        [
            float(sum(each.rollout.tokens for each in drawn)),
            sum(each.old_entropy for each in drawn),
            float(len(gaps)),
            float(gaps.abs().sum()),
            float(gaps.exp().sum()),
            float((gaps.exp() > (importance_cap or math.inf)).sum()),
        ]
    )
    row = {"entropy": entropy / tokens}
    if known:
        row |= {"generator_gap": gap / known, "generator_ratio": ratio / known}
    return {**row, "capped_share": capped / known} if known and importance_cap else row
