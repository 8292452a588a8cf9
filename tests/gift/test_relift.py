"""ReLIFT: what waits in the buffer, and the supervised step with its own AdamW, against torch's."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_rl import (
    PROBLEMS,
    SETTINGS,
    assert_resumable,
    assert_same_weights,
    fresh_policy,
    make_tokenizer,
    trainer,
    verdicts_by_parity,
)

from gift import rollouts
from gift.recipe import Optimizer, Relift
from gift.relift import FailedPrompts, supervised_step
from gift.rewards import Verdict

RELIFT = replace(
    SETTINGS,
    algorithm="relift",
    clip=False,
    aggregation="seq_sum_norm",
    entropy_coef=0.001,
    temperature=0.7,  # of the rollouts; a supervised step is at 1
    relift=Relift(buffer=2, entropy_coef=0.1, optimizer=Optimizer(lr=3e-4, betas=(0.8, 0.9), max_grad_norm=0.2)),
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=6), st.integers(1, 5))
def test_the_newest_leave_the_buffer_first(steps, size):
    """Against a stack, one prompt at a time."""
    buffer, stack = FailedPrompts(size), []
    for failed in steps:
        buffer.push(failed)
        for name in reversed(failed):  # in a step's own order the first is on top
            stack.append(name)
        expected = [stack.pop() for _ in range(size)] if len(stack) >= size else []
        assert buffer.pop() == expected
        assert buffer.ids == stack[::-1]


def naive_steps(model, batches, options: Relift):
    """The model after AdamW steps on the NLL minus the entropy bonus of whole logits, in fp64, and the last NLL."""
    model = copy.deepcopy(model).double()
    adam = options.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=adam.lr, betas=adam.betas, weight_decay=adam.weight_decay)
    for batch in batches:
        nll, entropy, tokens = torch.zeros(()), torch.zeros(()), 0
        for example in batch:
            logits = model(input_ids=torch.tensor([example.ids])).logits[0]
            for t in range(example.prompt_length, len(example.ids)):
                logp = logits[t - 1].log_softmax(-1)
                nll = nll - logp[example.ids[t]]
                entropy = entropy - (logp.exp() * logp).sum()
                tokens += 1
        optimizer.zero_grad()
        ((nll - options.entropy_coef * entropy) / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), adam.max_grad_norm)
        optimizer.step()
    return model, nll.item() / tokens


@pytest.mark.parametrize("micro_tokens", [10_000, 20])
def test_supervised_steps_equal_torchs_adamw(tmp_path: Path, tokenizer, micro_tokens: int):
    model = fresh_policy(tokenizer)
    ours = trainer(model, tokenizer, tmp_path, RELIFT, micro_tokens=micro_tokens)
    encoded = [ours.sampler.encode(problem, ours.sampler.demonstration(problem)) for problem in PROBLEMS]
    batches = [encoded[:3], encoded[3:]]
    naive, nll = naive_steps(model, batches, RELIFT.relift)
    for step, batch in enumerate(batches):  # the second step shows whether moments and their count were kept
        row = supervised_step(ours.engine, batch, RELIFT.relift, tokenizer.pad_token_id, step, 10)
    assert row["relift_nll"] == pytest.approx(nll, rel=1e-4)
    assert_same_weights(model, naive)


def test_prompts_that_nobody_solved_gather_until_they_make_a_step(tmp_path: Path, tokenizer, monkeypatch):
    unsolved = {0, 2, 3, 5}

    def grade(texts, golds):
        scores = [float(int(gold) - 1 not in unsolved and index % 2 == 0) for index, gold in enumerate(golds)]
        return [Verdict(score, "correct" if score else "wrong", None, None) for score in scores]

    monkeypatch.setattr(rollouts, "grade_math", grade)
    options = replace(RELIFT, relift=replace(RELIFT.relift, buffer=3))
    ours = trainer(fresh_policy(tokenizer), tokenizer, tmp_path, options)
    taught = []
    monkeypatch.setattr(
        ours.sampler,
        "demonstration",
        lambda problem, make=ours.sampler.demonstration: taught.append(problem.id) or make(problem),
    )
    row = ours.train_step(PROBLEMS[4:8], PROBLEMS, step=0, total=4)
    assert row["buffer"] == 1
    assert "relift_nll" not in row
    row = ours.train_step(PROBLEMS[:4], PROBLEMS, step=1, total=4)
    assert taught == ["p0", "p2", "p3"]  # p5, the oldest, waits on
    assert row["buffer"] == 1
    assert ours.failed.ids == ["p5"]
    assert row["relift_nll"] > 0


def test_rl_and_supervised_steps_keep_their_moments_apart(tmp_path: Path, tokenizer, monkeypatch):
    """Three RL updates make the same weights with a supervised step of learning rate 0 in between as without."""
    monkeypatch.setattr(rollouts, "grade_math", verdicts_by_parity)
    still = replace(RELIFT.relift, optimizer=replace(RELIFT.relift.optimizer, lr=0.0))
    models = []
    for lifts in (False, True):
        model = fresh_policy(tokenizer)
        ours = trainer(model, tokenizer, tmp_path / str(lifts), RELIFT)
        scored = ours.score(ours.sampler.draw(PROBLEMS[:4], PROBLEMS, step=0).rollouts)
        for step in range(3):
            ours.update(scored, step, total=10)
            if lifts:
                encoded = [ours.sampler.encode(p, ours.sampler.demonstration(p)) for p in PROBLEMS[:2]]
                supervised_step(ours.engine, encoded, still, tokenizer.pad_token_id, step, 10)
        models.append(model)
    assert_same_weights(*models, exactly=True)


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_a_killed_run_resumes_with_its_buffer_and_moments(tmp_path: Path, tokenizer, monkeypatch, stop_at: int):
    def grade(texts, golds):
        scores = [float(len(text) % 4 == 0) for text in texts]
        return [Verdict(score, "correct" if score else "wrong", None, None) for score in scores]

    monkeypatch.setattr(rollouts, "grade_math", grade)
    options = replace(RELIFT, relift=replace(RELIFT.relift, buffer=2))
    rows = assert_resumable(tokenizer, tmp_path, options, stop_at)
    assert any(row["buffer"] for row in rows[:-1])
    assert sum("relift_nll" in row for row in rows) > 1
