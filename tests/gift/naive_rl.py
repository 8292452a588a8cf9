"""Stage 2 said naively: losses in loops over sequences and tokens, on whole logits; and what its tests train on."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from gift import nano
from gift.data import Example
from gift.grpo import GRPOTrainer, Scored
from gift.recipe import RL, Engine, Optimizer
from gift.records import JsonlLog, read_jsonl
from gift.rewards import Verdict

# Solutions of different lengths; some longer than max_tokens.
PROBLEMS = [Example(f"p{n}", f"{n} + 1 =", f"{'so ' * (n % 3)}\\boxed{{{n + 1}}}", str(n + 1)) for n in range(8)]
SETTINGS = RL(
    batch_size=4,
    updates_per_batch=2,
    group_size=4,
    max_tokens=6,
    validate_every=2,
    validation_items=3,
    save_every=1,
    epochs=2,
    optimizer=Optimizer(lr=1e-3, betas=(0.9, 0.999)),
)


# ---------------------------------------------------------------------------------------------------------------------
# The loss of an update


@dataclass
class Response:
    """One response: fp64 logits [n, V] that predict its tokens, and what else its loss depends on."""

    logits: Tensor
    tokens: list[int]
    advantage: float
    old_logp: list[float]
    ref_logp: list[float]
    generator_logp: list[float]
    demonstration: bool = False


def token_loss(response: Response, t: int, settings: RL) -> Tensor:
    """Of the token at t; `settings` as in a recipe."""
    odds = (response.logits[t] / settings.temperature).exp()
    probs = odds / odds.sum()
    prob, advantage = probs[response.tokens[t]], response.advantage
    if response.demonstration:
        gain = advantage * prob / (prob + settings.luffy.gamma)
    else:
        ratio = prob / math.exp(response.old_logp[t])
        gain = advantage * ratio
        if settings.clip:
            inside = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
            gain = torch.minimum(gain, advantage * inside)
            if settings.dual_clip and advantage < 0:
                gain = torch.maximum(gain, torch.tensor(settings.dual_clip * advantage, dtype=torch.float64))
        if settings.importance_cap:
            gain = gain * min(math.exp(response.old_logp[t] - response.generator_logp[t]), settings.importance_cap)
    loss = -gain
    if settings.kl_coef:
        ref_prob = math.exp(response.ref_logp[t])
        log_ratio = (prob / ref_prob).log()
        k3 = ref_prob / prob - 1 + log_ratio
        loss = loss + settings.kl_coef * {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": k3}[settings.kl_estimator]
    if settings.entropy_coef:
        loss = loss + settings.entropy_coef * (probs * probs.log()).sum()
    return loss


def update_loss(responses: Sequence[Response], settings: RL) -> Tensor:
    """Of all responses of an update, in the words of each aggregation's definition."""
    losses = [[token_loss(response, t, settings) for t in range(len(response.tokens))] for response in responses]
    sums = [sum(row[1:], row[0]) for row in losses]
    match settings.aggregation:
        case "token_mean":
            parts, divisor = sums, sum(len(row) for row in losses)
        case "seq_mean_token_mean":
            parts, divisor = [total / len(row) for total, row in zip(sums, losses, strict=True)], len(losses)
        case "seq_mean_token_sum":
            parts, divisor = sums, len(losses)
        case "seq_sum_norm":
            parts, divisor = sums, len(losses) * (settings.norm_length or settings.max_tokens)
    return sum(parts[1:], parts[0]) / divisor


def naive_update(model: PreTrainedModel, scored: Sequence[Scored], settings: RL) -> PreTrainedModel:
    """A copy of the model after one of torch's AdamW steps, all in fp64, one response at a time."""
    model = copy.deepcopy(model).double()
    adam, responses = settings.optimizer, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=adam.lr, betas=adam.betas, weight_decay=adam.weight_decay)
    for each in scored:
        sample, prompt_length = each.rollout.sample, each.rollout.encoded.prompt_length
        if settings.mask_truncated and sample.finish_reason == "length":
            continue
        response = Response(
            model(input_ids=torch.tensor([each.rollout.encoded.ids])).logits[0, prompt_length - 1 : -1],
            sample.token_ids,
            each.rollout.advantage,
            each.old_logp.tolist(),
            [] if each.ref_logp is None else each.ref_logp.tolist(),
            sample.logps,
            each.rollout.source == "demonstration",
        )
        responses.append(response)
    update_loss(responses, settings).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), adam.max_grad_norm)
    optimizer.step()
    return model


# ---------------------------------------------------------------------------------------------------------------------
# A trainer


def make_tokenizer():
    return nano.train_tokenizer(["1 + 2 =\n\\boxed{3}"] * 4, 300)


def verdicts_by_parity(responses, golds, **_):
    """Rewards an untrained policy earns now and then: for an even number of characters."""
    even = [len(text) % 2 == 0 for text in responses]
    return [
        Verdict(float(good), "correct" if good else "wrong", text, None)
        for good, text in zip(even, responses, strict=True)
    ]


def fresh_policy(tokenizer) -> PreTrainedModel:
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return tiny_model(len(tokenizer), hidden_size=16, tie_word_embeddings=True, **ends)


def trainer(model, tokenizer, folder: Path, settings: RL = SETTINGS, **engine) -> GRPOTrainer:
    return GRPOTrainer(
        "p-rl",
        model,
        tokenizer,
        settings=settings,
        engine_settings=Engine(**{"zero_stage": 0, "dtype": "float32", "micro_tokens": 60, **engine}),
        seed=3,
        resume_dir=folder / "resume",
        log=JsonlLog(folder / "metrics.jsonl", ("policy", "stage", "event", "step")),
        rollout_log=JsonlLog(folder / "rollouts.jsonl", ("step", "item", "sample")),
    )


def scored_batch(ours: GRPOTrainer, problems: Sequence[Example] = PROBLEMS[:4]) -> list[Scored]:
    """Rollouts of some problems, in order, as an update takes them."""
    draw = ours.sampler.draw(problems, problems, step=0)
    return ours.score(draw.rollouts)


def assert_same_weights(mine: PreTrainedModel, theirs: PreTrainedModel, *, exactly: bool = False) -> None:
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        if exactly:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=2e-5)


def keep_nothing(engine, step: int) -> None:
    """Where a job writes the checkpoint."""


class KilledError(Exception):
    """Stands for kill -9."""


def assert_resumable(tokenizer, folder: Path, settings: RL, stop_at: int) -> list[dict]:
    """A run that ends right after step `stop_at` was logged, and is started again, ends as an uninterrupted one.

    Returns the uninterrupted run's rows of training.
    """
    whole = fresh_policy(tokenizer)
    finished = []
    trainer(whole, tokenizer, folder / "whole", settings).train(
        PROBLEMS, PROBLEMS[:3], lambda engine, step: finished.append((engine.model, step))
    )
    assert finished == [(whole, 4)]
    killed = trainer(fresh_policy(tokenizer), tokenizer, folder / "killed", settings)
    append = killed.log.append

    def append_then_die(rows):
        append(rows)
        if (rows[0]["event"], rows[0]["step"]) == ("train", stop_at):
            raise KilledError

    killed.log.append = append_then_die
    with pytest.raises(KilledError):
        killed.train(PROBLEMS, PROBLEMS[:3], keep_nothing)
    continued = fresh_policy(tokenizer)
    trainer(continued, tokenizer, folder / "killed", settings).train(PROBLEMS, PROBLEMS[:3], keep_nothing)
    assert_same_weights(whole, continued, exactly=True)

    def numbers(run: str, name: str):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in read_jsonl(folder / run / name)]

    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert numbers("killed", name) == numbers("whole", name)
    return [row for row in numbers("whole", "metrics.jsonl") if row["event"] == "train"]
