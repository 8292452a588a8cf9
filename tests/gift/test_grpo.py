"""GRPO's update against a naive re-statement, what is drawn for it, and its exact continuation after a kill."""

from __future__ import annotations

import math
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from naive_rl import (
    PROBLEMS,
    SETTINGS,
    assert_resumable,
    assert_same_weights,
    fresh_policy,
    keep_nothing,
    make_tokenizer,
    naive_update,
    scored_batch,
    trainer,
    verdicts_by_parity,
)
from safetensors.torch import load_file, save_file

from gift import rollouts
from gift.cli import UserError
from gift.data import Example, encode_prompt
from gift.generation import Sample
from gift.grpo import Scored, policy_metrics
from gift.lora import add_adapters
from gift.policy_module import PolicyModule
from gift.recipe import LoRA, Relift
from gift.records import JsonlLog, read_jsonl
from gift.rewards import Verdict


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def by_parity(monkeypatch):
    monkeypatch.setattr(rollouts, "grade_math", verdicts_by_parity)


def moved_apart(scored: list[Scored]) -> list[Scored]:
    """The rollouts with old, reference and generating policies far enough away that every branch of the loss is taken.

    Every other response of a group counts as cut off.
    """
    torch.manual_seed(0)

    def moved(logp: torch.Tensor, by: float) -> torch.Tensor:
        return logp + by * torch.randn_like(logp)

    apart = []
    for number, each in enumerate(scored):
        sample = each.rollout.sample
        reason = "length" if number % 2 else "stop"
        old_logp = moved(each.old_logp, 0.7)
        sample = Sample(sample.token_ids, reason, moved(old_logp, 0.3).tolist())
        ref_logp = None if each.ref_logp is None else moved(each.ref_logp, 0.7)
        apart.append(Scored(replace(each.rollout, sample=sample), old_logp, 0.0, ref_logp))
    return apart


OPTIONS = {
    "default": {},
    "no clip": {"clip": False},
    "clip higher": {"clip_high": 0.5, "dual_clip": 0.0},
    "original": {"aggregation": "seq_mean_token_mean", "normalize_std": True, "kl_coef": 0.3},
    "sums": {"aggregation": "seq_mean_token_sum", "optimizer": replace(SETTINGS.optimizer, max_grad_norm=0.1)},
    "dr. grpo": {"aggregation": "seq_sum_norm", "norm_length": 4},
    "k1": {"kl_coef": 0.3, "kl_estimator": "k1"},
    "k2": {"kl_coef": 0.3, "kl_estimator": "k2", "temperature": 0.8},
    "entropy": {"entropy_coef": 0.1},
    "overlong masking": {"mask_truncated": True, "aggregation": "seq_mean_token_mean"},
    "truncated importance": {"importance_cap": 1.1},
}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_update_equals_the_naive_step(tmp_path: Path, tokenizer, by_parity, name: str, packing: bool):
    settings = replace(SETTINGS, **OPTIONS[name])
    model = fresh_policy(tokenizer)
    ours = trainer(model, tokenizer, tmp_path, settings, packing=packing)
    scored = moved_apart(scored_batch(ours))
    advantages = [each.rollout.advantage for each in scored]
    assert min(advantages) < 0 < max(advantages)
    assert 0 in advantages, "no group to skip: the test would not cover skipping"
    naive = naive_update(model, scored, settings)
    logged = ours.update(scored, step=0, total=10)
    assert 0 < logged["clip_share"] < 1 or not settings.clip
    assert_same_weights(model, naive)


@pytest.mark.parametrize("name", ["default", "original", "dr. grpo", "entropy", "overlong masking"])
def test_cutting_an_update_differently_changes_nothing(tmp_path: Path, tokenizer, by_parity, name: str):
    updated = []
    for micro_tokens in (10_000, 20):
        model = fresh_policy(tokenizer)
        ours = trainer(
            model,
            tokenizer,
            tmp_path / f"{micro_tokens}",
            replace(SETTINGS, **OPTIONS[name]),
            micro_tokens=micro_tokens,
        )
        ours.update(moved_apart(scored_batch(ours)), step=0, total=10)
        updated.append(model)
    assert_same_weights(*updated)


@pytest.mark.parametrize("name", ["default", "original", "entropy", "overlong masking"])
def test_equal_rewards_leave_what_the_other_terms_say(tmp_path: Path, tokenizer, monkeypatch, name: str):
    settings = replace(SETTINGS, **OPTIONS[name])
    verdict = Verdict(1.0, "correct", None, None)
    monkeypatch.setattr(rollouts, "grade_math", lambda texts, golds: [verdict] * len(texts))
    model = fresh_policy(tokenizer)
    ours = trainer(model, tokenizer, tmp_path, settings)
    scored = moved_apart(scored_batch(ours))
    assert not any(each.rollout.advantage for each in scored)
    naive = naive_update(model, scored, settings)
    logged = ours.update(scored, step=0, total=10)
    assert (logged["grad_norm"] > 0) == bool(settings.kl_coef or settings.entropy_coef)
    assert_same_weights(model, naive)


def test_an_update_of_nothing_but_cut_off_responses_has_no_gradient(tmp_path: Path, tokenizer, by_parity):
    ours = trainer(fresh_policy(tokenizer), tokenizer, tmp_path, replace(SETTINGS, mask_truncated=True))
    scored = [
        replace(each, rollout=replace(each.rollout, sample=replace(each.rollout.sample, finish_reason="length")))
        for each in scored_batch(ours)
    ]
    logged = ours.update(scored, step=0, total=10)
    assert logged["grad_norm"] == logged["clip_share"] == logged["kl_old"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# What rollouts are scored with


def test_old_log_probabilities_are_those_of_the_sampler(tmp_path: Path, tokenizer):
    ours = trainer(fresh_policy(tokenizer), tokenizer, tmp_path, replace(SETTINGS, temperature=0.8))
    for each in scored_batch(ours, PROBLEMS):
        encoded, sample = each.rollout.encoded, each.rollout.sample
        assert each.old_logp.tolist() == pytest.approx(sample.logps, abs=1e-4)
        problem = next(problem for problem in PROBLEMS if problem.id == encoded.id)
        assert encoded.ids == (*encode_prompt(tokenizer, problem), *sample.token_ids)


def test_importance_needs_the_generators_log_probabilities(tmp_path: Path, tokenizer, by_parity):
    ours = trainer(fresh_policy(tokenizer), tokenizer, tmp_path, replace(SETTINGS, importance_cap=2.0))
    scored = [
        replace(each, rollout=replace(each.rollout, sample=replace(each.rollout.sample, logps=[])))
        for each in scored_batch(ours)
    ]
    with pytest.raises(UserError, match="importance_cap"):
        ours.update(scored, step=0, total=10)


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_stays_the_policy_that_rl_began_with(tmp_path: Path, tokenizer, by_parity, lora: bool):
    model, settings = fresh_policy(tokenizer), replace(SETTINGS, kl_coef=0.1)
    if lora:  # adapters begin as zero and are slow to start
        settings = replace(settings, optimizer=replace(settings.optimizer, lr=0.05))
        add_adapters(model, LoRA(rank=2, alpha=8.0, targets=("q_proj", "down_proj")), seed=0)
    ours = trainer(model, tokenizer, tmp_path, settings)
    scored = scored_batch(ours)
    first, second = (ours.update(scored, step, total=10) for step in (0, 1))
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert second["kl"] > 1e-6
    initial = PolicyModule(fresh_policy(tokenizer), settings)
    rolled_out = [each.rollout for each in scored]
    expected = [logp for logp, _ in ours._per_token(initial, rolled_out)]
    for each, logp in zip(ours.score(rolled_out), expected, strict=True):
        torch.testing.assert_close(each.ref_logp, logp)
        assert not torch.equal(each.old_logp, logp)


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn


def only_these_differ(monkeypatch, numbers: set[int]) -> None:
    """Rewards that differ within the groups of these problems, and are all 1 in the others."""

    def grade(texts, golds):
        good = [int(gold) - 1 not in numbers or index % 2 == 0 for index, gold in enumerate(golds)]
        return [Verdict(float(is_good), "correct" if is_good else "wrong", None, None) for is_good in good]

    monkeypatch.setattr(rollouts, "grade_math", grade)


def draw(tokenizer, folder: Path, step: int = 0, **options) -> tuple[rollouts.Draw, list[str]]:
    """What the first four problems draw, and the ids of the prompts in the order of their positions."""
    ours = trainer(fresh_policy(tokenizer), tokenizer, folder, replace(SETTINGS, max_tokens=2, **options))
    found = ours.sampler.draw(PROBLEMS[:4], PROBLEMS, step)
    return found, [found.groups[position][0].encoded.id for position in sorted(found.groups)]


def test_dynamic_sampling_replaces_groups_of_equal_rewards(tmp_path: Path, tokenizer, monkeypatch):
    only_these_differ(monkeypatch, {1, 4, 5, 6, 7})
    found, ids = draw(tokenizer, tmp_path, dynamic_sampling=3)
    assert ids[:4] == ["p0", "p1", "p2", "p3"]
    assert sorted(ids) == [problem.id for problem in PROBLEMS]  # one more round was enough, and drew the other four
    assert found.live == [name in {"p1", "p4", "p5", "p6", "p7"} for name in ids]
    assert found.kept == [1, 4, 5, 6]  # as many as a batch has, the first that were drawn
    assert draw(tokenizer, tmp_path, dynamic_sampling=3)[1] == ids  # a function of seed and step
    assert any(draw(tokenizer, tmp_path, step, dynamic_sampling=3)[1] != ids for step in (1, 2, 3))


def test_dynamic_sampling_stops_when_nothing_is_lacking_or_left(tmp_path: Path, tokenizer, monkeypatch):
    only_these_differ(monkeypatch, {0, 1, 2, 3})
    found, _ = draw(tokenizer, tmp_path, dynamic_sampling=3)
    assert len(found.live) == 4
    only_these_differ(monkeypatch, {2})
    found, _ = draw(tokenizer, tmp_path, dynamic_sampling=3)
    assert len(found.live) == 8
    assert found.kept == [0, 1, 2, 3]  # the live one, and others to fill the batch
    assert len(draw(tokenizer, tmp_path)[0].live) == 4


def test_a_step_learns_from_what_was_kept_and_logs_what_was_drawn(tmp_path: Path, tokenizer, monkeypatch):
    only_these_differ(monkeypatch, {1, 4, 5, 6, 7})
    ours = trainer(fresh_policy(tokenizer), tokenizer, tmp_path, replace(SETTINGS, dynamic_sampling=1))
    updates = []
    update = ours.update

    def spy(scored, step, total):
        updates.append([each.rollout.encoded.id for each in scored])
        return update(scored, step, total)

    monkeypatch.setattr(ours, "update", spy)
    row = ours.train_step(PROBLEMS[:4], PROBLEMS, step=0, total=4)
    rows = read_jsonl(tmp_path / "rollouts.jsonl")
    kept = list(dict.fromkeys(each["item"] for each in rows if each["kept"]))
    assert [list(dict.fromkeys(ids)) for ids in updates] == [kept[:2], kept[2:]]
    assert len(rows) == 8 * SETTINGS.group_size
    assert row["drawn"] == 8
    assert row["live_share"] == 5 / 8
    assert row["reward_mean"] == pytest.approx(sum(each["score"] for each in rows) / len(rows))
    assert row["response_tokens"] == pytest.approx(sum(each["tokens"] for each in rows) / len(rows))
    assert {each["source"] for each in rows} == {"policy"}
    assert 0 <= row["generator_gap"] < 1e-4
    assert row["entropy"] == pytest.approx(torch.tensor(float(len(tokenizer))).log().item(), rel=0.1)  # untrained


@pytest.mark.parametrize(("dtype", "asked", "cap"), [("float32", None, 0), ("bfloat16", None, 2), ("bfloat16", 0.0, 0)])
def test_importance_is_truncated_where_numbers_are_rough(tokenizer, tmp_path, dtype, asked, cap):
    model = fresh_policy(tokenizer).to(getattr(torch, dtype))
    ours = trainer(model, tokenizer, tmp_path, replace(SETTINGS, importance_cap=asked), dtype=dtype)
    assert ours.settings.importance_cap == cap


def test_what_is_logged_of_generator_against_trainer(tokenizer, tmp_path, by_parity):
    ours = trainer(fresh_policy(tokenizer), tokenizer, tmp_path)
    scored = moved_apart(scored_batch(ours))
    ratios = [
        math.exp(old - drawn)
        for each in scored
        for old, drawn in zip(each.old_logp.tolist(), each.rollout.sample.logps, strict=True)
    ]
    row = policy_metrics(scored, 1.2)
    assert row["generator_gap"] == pytest.approx(sum(abs(math.log(ratio)) for ratio in ratios) / len(ratios), rel=1e-5)
    assert row["generator_ratio"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    assert row["capped_share"] == sum(ratio > 1.2 for ratio in ratios) / len(ratios) > 0
    assert "capped_share" not in policy_metrics(scored, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming, ranks


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_a_killed_run_ends_with_the_same_weights_and_records(tmp_path: Path, tokenizer, by_parity, stop_at: int):
    assert_resumable(tokenizer, tmp_path, SETTINGS, stop_at)


def test_a_killed_run_with_every_option_ends_the_same(tmp_path: Path, tokenizer, by_parity):
    settings = replace(
        SETTINGS, dynamic_sampling=1, kl_coef=0.1, entropy_coef=0.01, importance_cap=2.0, normalize_std=True
    )
    rows = assert_resumable(tokenizer, tmp_path, settings, stop_at=2)
    assert any(row["drawn"] > SETTINGS.batch_size for row in rows)
    assert rows[-1]["kl"] > 0


ALGORITHMS = {
    "grpo": replace(SETTINGS, dynamic_sampling=1, kl_coef=0.1),
    "luffy": replace(SETTINGS, algorithm="luffy", clip=False, aggregation="seq_sum_norm"),
    "relift": replace(SETTINGS, algorithm="relift", relift=Relift(buffer=1), group_size=2),  # small: it fails often
}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_train_alike(tmp_path: Path, tokenizer, by_parity, stage: int):
    settings = replace(ALGORITHMS["relift"], kl_coef=0.1)
    states = []
    for zero_stage in (0, stage):
        ours = trainer(fresh_policy(tokenizer), tokenizer, tmp_path / f"{zero_stage}", settings, zero_stage=zero_stage)
        ours.train(PROBLEMS, PROBLEMS[:3], lambda engine, step: states.append(engine.full_state_dict()))
    rows = [read_jsonl(tmp_path / folder / "metrics.jsonl") for folder in ("0", str(stage))]
    assert any("relift_nll" in row for row in rows[0])
    assert [row.get("reward_mean") for row in rows[0]] == [row.get("reward_mean") for row in rows[1]]
    for name, weight in states[0].items():
        torch.testing.assert_close(states[1][name], weight, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("where", ["problems", "validation"])
def test_a_prompt_without_room_for_its_responses_is_named_before_any_work(tmp_path: Path, tokenizer, where: str):
    long = Example("far", "1 + " * 70 + "1 =", "so", "71")
    tokens = len(encode_prompt(tokenizer, long))
    room = fresh_policy(tokenizer).config.max_position_embeddings - tokens
    assert room > 0
    problems, validation = ([*PROBLEMS, long], PROBLEMS[:3]) if where == "problems" else (PROBLEMS, [long])
    ours = trainer(fresh_policy(tokenizer), tokenizer, tmp_path, replace(SETTINGS, max_tokens=room + 1))
    with pytest.raises(UserError, match=f"^far: its prompt of {tokens} tokens and .* rl.max_tokens={room + 1} exceed"):
        ours.train(problems, validation, keep_nothing)
    assert not (tmp_path / "metrics.jsonl").exists() or not read_jsonl(tmp_path / "metrics.jsonl")
    fits = trainer(fresh_policy(tokenizer), tokenizer, tmp_path, replace(SETTINGS, max_tokens=room))
    fits.sampler.check_room([*problems, *validation])


def train_as_rank(rank: int, ranks: int, port: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_PORT=str(port))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    rollouts.grade_math = verdicts_by_parity
    tokenizer = make_tokenizer()
    for name, settings in ALGORITHMS.items():
        ours = trainer(fresh_policy(tokenizer), tokenizer, folder / name, settings, zero_stage=3)
        ours.rollout_log = JsonlLog(folder / name / f"rollouts-{rank}.jsonl", ours.rollout_log.key)
        ours.train(PROBLEMS, PROBLEMS[:3], lambda engine, step, at=folder / name: save_weights(engine, at))


def save_weights(engine, folder: Path) -> None:
    if state := engine.full_state_dict():  # empty but on the first rank
        save_file({name: weight.clone() for name, weight in state.items()}, folder / "weights.safetensors")


@pytest.mark.slow
def test_two_ranks_of_zero_3_train_as_one_rank_does(tmp_path: Path, tokenizer, by_parity):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(train_as_rank, (2, port, tmp_path), nprocs=2)

    def numbers(row: dict) -> dict:
        return {name: value for name, value in row.items() if isinstance(value, int | float)}

    def identity(row: dict) -> tuple:
        return row["step"], row["item"], row["sample"], row["completion"], row["kept"]

    assert any("relift_nll" in row for row in read_jsonl(tmp_path / "relift" / "metrics.jsonl"))
    for name, settings in ALGORITHMS.items():
        folder, alone = tmp_path / name, fresh_policy(tokenizer)
        trainer(alone, tokenizer, folder / "alone", settings).train(PROBLEMS, PROBLEMS[:3], keep_nothing)
        weights = load_file(folder / "weights.safetensors")
        for key, weight in alone.state_dict().items():
            torch.testing.assert_close(weights[key], weight, rtol=1e-4, atol=2e-5)
        pairs = zip(read_jsonl(folder / "metrics.jsonl"), read_jsonl(folder / "alone" / "metrics.jsonl"), strict=True)
        for together, one in pairs:
            assert numbers(together) == pytest.approx(numbers(one), rel=1e-3, abs=1e-6)
        drawn = [row for rank in range(2) for row in read_jsonl(folder / f"rollouts-{rank}.jsonl")]
        assert sorted(map(identity, drawn)) == sorted(map(identity, read_jsonl(folder / "alone" / "rollouts.jsonl")))
