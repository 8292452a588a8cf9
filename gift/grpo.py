"""Stage 2: GRPO from any initialization.

Each rollout batch: sample a group of responses per prompt, grade them with evaluation's own grader, take the reward
minus the group's mean as advantage, and make a few clipped updates. The loss is the sum over all response tokens of an
update divided by their number. No KL term, no division by the standard deviation (paper, Appendix E; verl 0.4 where
the paper is silent). A response whose group earned the same reward throughout has advantage zero, hence no gradient:
it counts in the denominator and is not computed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift.cli import progress
from gift.data import IGNORED, Encoded, Example, by_length, collate, encode_prompt, epoch_order
from gift.engine import TrainingEngine, check_finite, learning_rate, lockstep, rank, share_of_rank, total_over_ranks
from gift.generation import Engine as GenerationEngine
from gift.generation import Request, Sample, SamplingParams, completion_text, sample_seed
from gift.generation.hf import HFEngine
from gift.models import lm_head, on_device, states_at
from gift.policy import clipped_policy_loss, group_advantages
from gift.recipe import RL, Engine
from gift.records import JsonlLog
from gift.rewards import Verdict, grade_math
from gift.vocab import vocab_stats


@dataclass(frozen=True)
class Rollout:
    """One sampled response, graded; of the old policy, the log-probabilities [tokens] and the summed entropy (nats)."""

    encoded: Encoded
    sample: Sample
    verdict: Verdict
    advantage: float
    old_logp: Tensor
    old_entropy: float


class PolicyModule(nn.Module):
    """The policy and its loss as one module: DeepSpeed must see both in one forward."""

    def __init__(self, policy: PreTrainedModel, settings: RL) -> None:
        super().__init__()
        self.policy = policy
        self.settings = settings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        old_logp: Tensor | None = None,
        advantages: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The policy loss summed over response tokens, and [2] sums: clipped tokens, old minus new log-probability.

        input_ids, attention_mask, labels: [B, T] int64; old_logp, advantages: [N], in the order of labelled positions.
        Without these two: log-probability and entropy of the response tokens at the sampling temperature, each [N].
        """
        settings = self.settings
        selected = labels != IGNORED
        hidden = states_at(self.policy, input_ids, attention_mask, selected)
        weight, bias = lm_head(self.policy)
        stats = vocab_stats(hidden, weight, labels[selected], bias=bias, temperature=settings.temperature)
        if old_logp is None or advantages is None:
            return stats.logp, stats.entropy
        loss, clipped = clipped_policy_loss(
            stats.logp,
            old_logp,
            advantages,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            dual_clip=settings.dual_clip,
        )
        logged = torch.stack([clipped.double().sum(), (old_logp - stats.logp.detach()).double().sum()])
        return loss.sum(), logged


class GRPOTrainer:
    """GRPO on one policy. The model is trained in place; `policy` names it in logs, `seed` decides every sample."""

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
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.settings = settings
        self.seed = seed
        self.resume_dir = resume_dir
        self.log = log
        self.rollout_log = rollout_log
        self.engine = TrainingEngine(PolicyModule(model, settings), model, engine_settings, settings.optimizer)
        self.generator: GenerationEngine = HFEngine(model)

    def train(self, problems: Sequence[Example], validation: Sequence[Example]) -> int:
        """Passes over the problems in whole batches; returns the number of rollout batches.

        Continues from the newest state in the resume folder.
        """
        settings = self.settings
        per_epoch = len(problems) // settings.batch_size
        total = per_epoch * settings.epochs
        state = self.engine.resume(self.resume_dir) or {"step": 0}
        bar = progress(total, f"{self.policy}: rl", unit="step", initial=state["step"])
        for step in range(state["step"], total):
            if step == 0:
                self.validate(validation, step=0)
            epoch, position = divmod(step, per_epoch)
            order = epoch_order(len(problems), self.seed, epoch)
            start = position * settings.batch_size
            row = self.train_step([problems[i] for i in order[start : start + settings.batch_size]], step, total)
            done = step + 1
            self._record("train", done, row)
            if settings.validate_every and (done % settings.validate_every == 0 or done == total):
                self.validate(validation, step=done)
            if done % settings.save_every == 0 and done < total:
                self.engine.save(self.resume_dir, {"step": done})
            bar.set_postfix_str(f"reward {row['reward_mean']:.2f}", refresh=False)
            bar.update()
        bar.close()
        self.engine.close()
        return total

    def train_step(self, problems: Sequence[Example], step: int, total: int) -> dict[str, Any]:
        """Rolls out, grades and updates on one batch of problems; returns what is logged (of the last update)."""
        started = time.perf_counter()
        mine = share_of_rank(problems)
        samples = self.sample(mine, step)
        sampled = time.perf_counter()
        verdicts = self.grade(mine, samples)
        graded = time.perf_counter()
        groups = self.score(mine, samples, verdicts)
        self._save_rollouts(groups, step)
        row = self._rollout_metrics(groups)
        size = len(mine) // self.settings.updates_per_batch
        updates = [
            self.update([rollout for group in groups[start : start + size] for rollout in group], step, total)
            for start in range(0, size * self.settings.updates_per_batch, size)
        ]
        seconds = {"rollout": sampled - started, "grade": graded - sampled, "update": time.perf_counter() - graded}
        return {
            **row,
            **updates[-1],
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }

    def sample(self, problems: Sequence[Example], step: int) -> list[Sample]:
        """`group_size` samples per problem, group after group, each with its own seed."""
        requests = [
            Request(
                tuple(encode_prompt(self.tokenizer, problem.prompt)), self._seed("rollout", step, problem.id, number)
            )
            for problem in problems
            for number in range(self.settings.group_size)
        ]
        params = SamplingParams(max_tokens=self.settings.max_tokens, temperature=self.settings.temperature)
        return self.generator.generate(requests, params)

    def grade(self, problems: Sequence[Example], samples: Sequence[Sample]) -> list[Verdict]:
        """A verdict per sample; the samples come in equal groups, one group a problem."""
        each = len(samples) // len(problems)
        texts = [completion_text(self.tokenizer, sample) for sample in samples]
        return grade_math(texts, [problem.answer for problem in problems for _ in range(each)])

    def score(
        self, problems: Sequence[Example], samples: Sequence[Sample], verdicts: Sequence[Verdict]
    ) -> list[list[Rollout]]:
        """Groups of rollouts with advantages and the old policy's log-probabilities, recomputed by the trainer."""
        size = self.settings.group_size
        rewards = torch.tensor([verdict.score for verdict in verdicts]).view(-1, size)
        advantages = group_advantages(rewards).flatten().tolist()
        encoded = []
        for number, sample in enumerate(samples):
            problem = problems[number // size]
            prompt = encode_prompt(self.tokenizer, problem.prompt)
            encoded.append(Encoded(problem.id, (*prompt, *sample.token_ids), len(prompt)))
        old = self.old_policy(encoded)
        rollouts = [Rollout(encoded[i], samples[i], verdicts[i], advantages[i], *old[i]) for i in range(len(samples))]
        return [rollouts[start : start + size] for start in range(0, len(rollouts), size)]

    @torch.no_grad()
    def old_policy(self, encoded: Sequence[Encoded]) -> list[tuple[Tensor, float]]:
        """Of each response under the policy as it is: log-probabilities [tokens], and entropies summed over them."""
        found: dict[int, tuple[Tensor, float]] = {}
        pieces = by_length(range(len(encoded)), lambda i: len(encoded[i].ids), self.engine.settings.micro_tokens)
        for number, piece in enumerate(lockstep(pieces, lambda piece: piece)):
            batch = on_device(collate([encoded[i] for i in piece], self._pad), self.engine.model)
            logp, entropy = self.engine(**batch)
            if number < len(pieces):
                lengths = [len(encoded[i].ids) - encoded[i].prompt_length for i in piece]
                sums = [float(part.double().sum()) for part in entropy.split(lengths)]
                found.update(zip(piece, zip(logp.split(lengths), sums, strict=True), strict=True))
        return [found[i] for i in range(len(encoded))]

    def update(self, rollouts: Sequence[Rollout], step: int, total: int) -> dict[str, float]:
        """One optimizer step on these rollouts; returns what is logged, means per token that has a gradient."""
        live = [rollout for rollout in rollouts if rollout.advantage != 0] or list(rollouts[:1])
        tokens, computed = total_over_ranks(
            [float(sum(len(rollout.sample.token_ids) for rollout in part)) for part in (rollouts, live)]
        )
        pieces = by_length(live, lambda rollout: len(rollout.encoded.ids), self.engine.settings.micro_tokens)
        batches = lockstep([self._batch(piece) for piece in pieces], no_labels)
        logged = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            loss, sums = self.engine(**on_device(batch, self.engine.model))
            self.engine.backward(loss, tokens)
            logged += sums.cpu()
        lr = learning_rate(self.settings.optimizer, step, total)
        grad_norm = self.engine.step(lr)
        clipped, kl = total_over_ranks(logged.tolist())
        return {"clip_share": clipped / computed, "kl_old": kl / computed, "grad_norm": grad_norm, "lr": lr}

    def validate(self, validation: Sequence[Example], *, step: int) -> None:
        """Logs greedy accuracy on the first `validation_items` held-out problems."""
        items = validation[: self.settings.validation_items]
        mine = share_of_rank(items)
        requests = [Request(tuple(encode_prompt(self.tokenizer, problem.prompt)), seed=0) for problem in mine]
        params = SamplingParams(max_tokens=self.settings.max_tokens, temperature=0)
        verdicts = self.grade(mine, self.generator.generate(requests, params)) if mine else []
        (correct,) = total_over_ranks([sum(verdict.score for verdict in verdicts)])
        row = {"val_accuracy": correct / len(items), "val_items": len(items), "val_samples": 1}
        self._record("validation", step, row)

    # -----------------------------------------------------------------------------------------------------------------

    @property
    def _pad(self) -> int:
        pad: int = self.tokenizer.pad_token_id
        return pad

    def _seed(self, *parts: str | int) -> int:
        return sample_seed(self.seed, self.policy, *parts)

    def _batch(self, rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
        return {
            **collate([rollout.encoded for rollout in rollouts], self._pad),
            "old_logp": torch.cat([rollout.old_logp for rollout in rollouts]),
            "advantages": torch.cat([torch.full_like(rollout.old_logp, rollout.advantage) for rollout in rollouts]),
        }

    def _record(self, event: str, step: int, row: dict[str, Any]) -> None:
        check_finite(row, f"{self.policy}, step {step}")
        if rank() == 0:
            self.log.append([{"policy": self.policy, "stage": "rl", "event": event, "step": step, **row}])

    def _rollout_metrics(self, groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
        rollouts = [rollout for group in groups for rollout in group]
        rewards = [rollout.verdict.score for rollout in rollouts]
        count, reward, reward_sq, tokens, truncated, entropy = total_over_ranks(
            [
                float(len(rollouts)),
                sum(rewards),
                sum(reward**2 for reward in rewards),
                float(sum(len(rollout.sample.token_ids) for rollout in rollouts)),
                float(sum(rollout.sample.finish_reason == "length" for rollout in rollouts)),
                sum(rollout.old_entropy for rollout in rollouts),
            ]
        )
        mean = reward / count
        return {
            "reward_mean": mean,
            "reward_std": max(reward_sq / count - mean**2, 0.0) ** 0.5,
            "response_tokens": tokens / count,
            "truncated_share": truncated / count,
            "entropy": entropy / tokens,
        }

    def _save_rollouts(self, groups: Sequence[Sequence[Rollout]], step: int) -> None:
        self.rollout_log.append(
            {
                "step": step + 1,
                "item": rollout.encoded.id,
                "sample": number,
                "completion": completion_text(self.tokenizer, rollout.sample),
                "tokens": len(rollout.sample.token_ids),
                "finish_reason": rollout.sample.finish_reason,
                "extracted": rollout.verdict.extracted,
                "status": rollout.verdict.status,
                "score": rollout.verdict.score,
                "advantage": rollout.advantage,
            }
            for group in groups
            for number, rollout in enumerate(group)
        )


def no_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with nothing to learn from: what a rank runs while others still have work."""
    empty = batch["old_logp"][:0]
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORED), "old_logp": empty, "advantages": empty}
