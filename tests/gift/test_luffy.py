"""LUFFY: the expert's solution as a member of every group, with a loss of its own."""

from __future__ import annotations

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
    make_tokenizer,
    naive_update,
    scored_batch,
    trainer,
    verdicts_by_parity,
)

from gift import rollouts
from gift.data import encode
from gift.recipe import Luffy
from gift.records import read_jsonl

LUFFY = replace(SETTINGS, algorithm="luffy", clip=False, aggregation="seq_sum_norm", entropy_coef=0.001, max_tokens=16)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def by_parity(monkeypatch):
    monkeypatch.setattr(rollouts, "grade_math", verdicts_by_parity)


@pytest.mark.parametrize("demonstrations", [1, 2])
def test_a_group_has_the_experts_solution_among_its_samples(tmp_path: Path, tokenizer, demonstrations: int):
    settings = replace(LUFFY, luffy=Luffy(demonstrations=demonstrations), max_tokens=64)
    ours = trainer(fresh_policy(tokenizer), tokenizer, tmp_path, settings)
    found = ours.sampler.draw(PROBLEMS[:4], PROBLEMS, step=0)  # graded by the real grader
    assert found.live == [True] * 4  # an untrained policy is wrong, the expert is right
    for problem, group in zip(PROBLEMS, found.groups.values(), strict=False):
        assert [rollout.source for rollout in group] == ["policy"] * (4 - demonstrations) + [
            "demonstration"
        ] * demonstrations
        assert group[-1].encoded == encode(tokenizer, problem, 256)
        assert group[-1].verdict.status == "correct"
        share = demonstrations / 4  # of the group, the expert's included, that is right
        assert [rollout.advantage for rollout in group] == [-share] * (4 - demonstrations) + [
            1 - share
        ] * demonstrations


def test_a_demonstration_is_never_cut_from_its_beginning(tmp_path: Path, tokenizer):
    """Where the prompt alone fills the window, which `train` refuses, it is still the solution's first tokens."""
    problem = replace(PROBLEMS[2], prompt="1 + " * 200)
    ours = trainer(fresh_policy(tokenizer), tokenizer, tmp_path, replace(LUFFY, max_tokens=4))
    assert len(ours.sampler.prompt(problem)) > ours.sampler.generator.max_model_len
    assert ours.sampler.demonstration(problem) == ours.sampler.demonstration(PROBLEMS[2])


def test_a_long_demonstration_is_cut_and_graded_as_cut(tmp_path: Path, tokenizer):
    ours = trainer(fresh_policy(tokenizer), tokenizer, tmp_path, replace(LUFFY, max_tokens=4))
    sample = ours.sampler.demonstration(PROBLEMS[2])
    assert len(sample.token_ids) == 4
    assert sample.finish_reason == "length"
    ((verdict,),) = ours.sampler.grade(PROBLEMS[2:3], [[sample]])
    assert verdict.score == 0  # its answer went with its end


@pytest.mark.parametrize("options", [{}, {"clip": True, "aggregation": "token_mean"}, {"kl_coef": 0.2}])
def test_update_equals_the_naive_step(tmp_path: Path, tokenizer, by_parity, options: dict):
    settings = replace(LUFFY, **options)
    model = fresh_policy(tokenizer)
    ours = trainer(model, tokenizer, tmp_path, settings)
    torch.manual_seed(0)
    scored = [
        replace(each, old_logp=each.old_logp + 0.7 * torch.randn_like(each.old_logp))
        if each.rollout.source == "policy"
        else each
        for each in scored_batch(ours)
    ]
    assert any(each.rollout.advantage and each.rollout.source == "demonstration" for each in scored)
    naive = naive_update(model, scored, settings)
    ours.update(scored, step=0, total=10)
    assert_same_weights(model, naive)


def test_a_step_logs_and_saves_demonstrations_apart(tmp_path: Path, tokenizer, by_parity):
    ours = trainer(fresh_policy(tokenizer), tokenizer, tmp_path, LUFFY)
    row = ours.train_step(PROBLEMS[:4], PROBLEMS, step=0, total=4)
    rows = read_jsonl(tmp_path / "rollouts.jsonl")
    drawn, shown = ([each for each in rows if each["source"] == source] for source in ("policy", "demonstration"))
    assert len(drawn) == 12
    assert [each["item"] for each in shown] == [problem.id for problem in PROBLEMS[:4]]
    assert [each["completion"] for each in shown] == [problem.response for problem in PROBLEMS[:4]]
    assert row["reward_mean"] == pytest.approx(sum(each["score"] for each in drawn) / 12)
    assert row["demonstration_reward"] == pytest.approx(sum(each["score"] for each in shown) / 4)
    assert row["response_tokens"] == pytest.approx(sum(each["tokens"] for each in drawn) / 12)
    assert row["generator_gap"] < 1e-4  # of sampled tokens alone


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_killed_run_ends_with_the_same_weights_and_records(tmp_path: Path, tokenizer, by_parity, stop_at: int):
    assert_resumable(tokenizer, tmp_path, LUFFY, stop_at)
