"""GRPO's update against a naive re-statement, and its exact continuation after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from transformers import PreTrainedModel

from gift import grpo, nano
from gift.data import Example, encode_prompt
from gift.generation import Sample
from gift.recipe import RL, Engine, Optimizer
from gift.records import JsonlLog, read_jsonl
from gift.rewards import Verdict

PROBLEMS = [Example(f"p{n}", f"{n} + 1 =", f"\\boxed{{{n + 1}}}", str(n + 1)) for n in range(8)]
SETTINGS = RL(
    batch_size=4,
    updates_per_batch=2,
    group_size=4,
    max_tokens=6,
    validate_every=1,
    validation_items=3,
    save_every=1,
    epochs=2,
    optimizer=Optimizer(lr=1e-3, betas=(0.9, 0.999)),
)


@pytest.fixture(scope="module")
def tokenizer():
    return nano.train_tokenizer(["1 + 2 =\n\\boxed{3}"] * 4, 300)


def fresh_policy(tokenizer) -> PreTrainedModel:
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return tiny_model(len(tokenizer), hidden_size=16, tie_word_embeddings=True, **ends)


def trainer(model, tokenizer, folder: Path, settings: RL = SETTINGS) -> grpo.GRPOTrainer:
    return grpo.GRPOTrainer(
        "p-rl",
        model,
        tokenizer,
        settings=settings,
        engine_settings=Engine(zero_stage=0, dtype="float32", micro_tokens=60),
        seed=3,
        resume_dir=folder / "resume",
        log=JsonlLog(folder / "metrics.jsonl", ("policy", "stage", "event", "step")),
        rollout_log=JsonlLog(folder / "rollouts.jsonl", ("step", "item", "sample")),
    )


def verdicts_by_parity(responses, golds, **_):
    """A reward the untrained model earns now and then: an even number of characters."""
    return [
        Verdict(float(len(text) % 2 == 0), "correct" if len(text) % 2 == 0 else "wrong", text, None)
        for text in responses
    ]


def naive_update(model, rollouts: list[grpo.Rollout], settings: RL) -> None:
    """One AdamW step on the clipped surrogate, one response at a time, in the words of verl's definition."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)
    tokens = sum(len(rollout.sample.token_ids) for rollout in rollouts)
    total = torch.zeros(())
    for rollout in rollouts:
        ids = torch.tensor([rollout.encoded.ids])
        logp = (model(input_ids=ids).logits[0] / settings.temperature).log_softmax(-1)
        for t in range(rollout.encoded.prompt_length, ids.shape[1]):
            position = t - rollout.encoded.prompt_length
            ratio = (logp[t - 1, ids[0, t]] - rollout.old_logp[position]).exp()
            advantage = rollout.advantage
            surrogate = torch.min(
                ratio * advantage, ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high) * advantage
            )
            if advantage < 0:
                surrogate = torch.max(surrogate, torch.tensor(settings.dual_clip * advantage))
            total = total - surrogate / tokens
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def test_update_equals_the_naive_loss(tmp_path: Path, tokenizer, monkeypatch):
    monkeypatch.setattr(grpo, "grade_math", verdicts_by_parity)
    model = fresh_policy(tokenizer)
    ours = trainer(model, tokenizer, tmp_path)
    samples = ours.sample(PROBLEMS[:4], step=0)
    groups = ours.score(PROBLEMS[:4], samples, ours.grade(PROBLEMS[:4], samples))
    rollouts = [rollout for group in groups for rollout in group]
    assert any(rollout.advantage < 0 for rollout in rollouts)
    assert any(rollout.advantage == 0 for rollout in rollouts), "no group to skip: the test would not cover skipping"
    # An old policy further away than the clip range, so that every branch of the loss is taken.
    moved = [
        grpo.Rollout(r.encoded, r.sample, r.verdict, r.advantage, r.old_logp + 0.7 * torch.randn_like(r.old_logp), 0.0)
        for r in rollouts
    ]
    naive = fresh_policy(tokenizer)
    naive_update(naive, moved, SETTINGS)
    logged = ours.update(moved, step=0, total=10)
    assert 0 < logged["clip_share"] < 1
    for mine, theirs in zip(model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


def test_old_log_probabilities_are_those_of_the_sampler(tmp_path: Path, tokenizer):
    ours = trainer(fresh_policy(tokenizer), tokenizer, tmp_path)
    samples = ours.sample(PROBLEMS, step=0)
    groups = ours.score(PROBLEMS, samples, ours.grade(PROBLEMS, samples))
    for rollout in (rollout for group in groups for rollout in group):
        assert rollout.old_logp.tolist() == pytest.approx(rollout.sample.logps, abs=1e-4)
        assert rollout.encoded.ids[: rollout.encoded.prompt_length] == tuple(
            encode_prompt(tokenizer, next(p.prompt for p in PROBLEMS if p.id == rollout.encoded.id))
        )


def test_advantages_are_rewards_minus_the_group_mean(tmp_path: Path, tokenizer):
    ours = trainer(fresh_policy(tokenizer), tokenizer, tmp_path)
    samples = [Sample([5, tokenizer.eos_token_id], "stop", [0.0, 0.0])] * 8
    scores = [1, 0, 0, 0, 1, 1, 1, 1]
    groups = ours.score(
        PROBLEMS[:2], samples, [Verdict(float(s), "correct" if s else "wrong", None, None) for s in scores]
    )
    assert [[rollout.advantage for rollout in group] for group in groups] == [[0.75, -0.25, -0.25, -0.25], [0.0] * 4]


class KilledError(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_a_killed_run_ends_with_the_same_weights_and_records(tmp_path: Path, tokenizer, monkeypatch, stop_at: int):
    monkeypatch.setattr(grpo, "grade_math", verdicts_by_parity)
    whole = fresh_policy(tokenizer)
    assert trainer(whole, tokenizer, tmp_path / "whole").train(PROBLEMS, PROBLEMS[:3]) == 4

    killed = trainer(fresh_policy(tokenizer), tokenizer, tmp_path / "killed")
    record = killed._record

    def record_then_die(event, step, row):
        record(event, step, row)
        if (event, step) == ("train", stop_at):
            raise KilledError

    killed._record = record_then_die
    with pytest.raises(KilledError):
        killed.train(PROBLEMS, PROBLEMS[:3])
    continued = fresh_policy(tokenizer)
    trainer(continued, tokenizer, tmp_path / "killed").train(PROBLEMS, PROBLEMS[:3])
    for mine, theirs in zip(whole.parameters(), continued.parameters(), strict=True):
        assert torch.equal(mine, theirs)

    def numbers(folder: str, name: str):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in read_jsonl(tmp_path / folder / name)]

    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert numbers("killed", name) == numbers("whole", name)
