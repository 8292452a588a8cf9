"""Engines that follow a policy in training, and the probe that tells stale weights; vLLM has tests of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from naive_rl import fresh_policy, make_tokenizer
from tiny_models import tiny_model

from gift.engine import TrainingEngine
from gift.generation import Engine, Request, SamplingParams, StaleWeightsError
from gift.generation.follower import Follower, follow_in_place
from gift.generation.hf import HFEngine
from gift.generation.probe import PROBE_LENGTH, Probe, model_logps
from gift.policy_module import PolicyModule
from gift.recipe import RL, Generation, Optimizer
from gift.recipe import Engine as EngineSettings

SEQUENCES = [(3, 5, 8, 13, 21), (2, 4, 8), (7, 7, 7, 7)]


class Copied(Engine):
    """An engine with weights of its own, which it takes over or, if it is broken, does not."""

    def __init__(self, model, *, broken: bool = False) -> None:
        self.inner = HFEngine(copy.deepcopy(model))
        self.broken = broken
        self.updates = 0
        self.max_model_len = self.inner.max_model_len

    def stream(self, requests, params):
        yield from self.inner.stream(requests, params)

    def score(self, sequences):
        return self.inner.score(sequences)

    def update_weights(self, model) -> None:
        self.updates += 1
        if not self.broken:
            self.inner.update_weights(model)

    def close(self) -> None: ...


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def training(tokenizer):
    model = fresh_policy(tokenizer)
    settings = EngineSettings(zero_stage=0, dtype="float32")
    engine = TrainingEngine(PolicyModule(model, RL()), model, settings, Optimizer(lr=1e-3))
    yield engine
    engine.close()


def step(training: TrainingEngine, by: float = 1e-2) -> None:
    """An optimizer step that moves every weight by about `by`."""
    for weight in training.model.parameters():
        weight.grad = torch.ones_like(weight)
    training.step(lr=by)


def follower(training: TrainingEngine, engine: Engine) -> Follower:
    return Follower(training, engine, Generation(), Probe(SEQUENCES, tolerance=1e-3))


ASKED = [Request((4, 9, 3), seed) for seed in range(3)]
PARAMS = SamplingParams(12, logps=True)


def test_scores_of_the_probe_are_log_probabilities(training):
    found = model_logps(training.model, SEQUENCES)
    for sequence, logps in zip(SEQUENCES, found, strict=True):
        with torch.no_grad():
            logits = training.model(torch.tensor([sequence])).logits[0].double()
        expected = [logits.log_softmax(-1)[i, token].item() for i, token in enumerate(sequence[1:])]
        assert logps == pytest.approx(expected, abs=1e-5)
    assert [len(part) for part in Probe([range(1000)] * 9, 1e-3).sequences] == [PROBE_LENGTH] * 4


def test_a_follower_samples_from_the_newest_weights(training):
    engine = Copied(training.model)
    ours = follower(training, engine)
    for updates in (1, 2):
        expected = HFEngine(training.model).generate(ASKED, PARAMS)
        assert ours.generate(ASKED, PARAMS) == expected
        assert ours.generate(ASKED, PARAMS) == expected  # no weight has changed: no update
        assert engine.updates == updates
        assert 0 <= ours.probe_gap < 1e-6
        step(training)
    assert ours.sync_seconds > 0


def test_in_place_there_is_nothing_to_follow(training, tokenizer):
    ours = follow_in_place(training, tokenizer)
    before = ours.generate(ASKED, PARAMS)
    step(training, by=0.1)
    assert ours.generate(ASKED, PARAMS) == HFEngine(training.model).generate(ASKED, PARAMS) != before
    assert ours.probe_gap is None


def test_an_engine_that_sleeps_is_given_its_weights_again(training):
    engine = Copied(training.model)
    engine.sleep = lambda: True
    ours = follower(training, engine)
    ours.generate(ASKED, PARAMS)
    ours.generate(ASKED, PARAMS)
    assert engine.updates == 2


@pytest.mark.parametrize("by", [1e-2, 1e-5])
def test_stale_weights_are_an_error_however_small_the_step(training, by):
    ours = follower(training, Copied(training.model, broken=True))
    ours.generate(ASKED, PARAMS)
    step(training, by)
    with pytest.raises(StaleWeightsError, match="probe"):
        ours.generate(ASKED, PARAMS)


def test_wrong_weights_are_an_error_at_once(training):
    other = copy.deepcopy(training.model)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    ours = follower(training, Copied(other, broken=True))
    with pytest.raises(StaleWeightsError, match=r"differ by .* more than 0\.001.*generation\.probe_tolerance"):
        ours.generate(ASKED, PARAMS)


def test_a_probe_remembers_the_last_weights_not_the_first():
    first, second, third = [[-3.0, -3.0]], [[-1.0, -1.0]], [[-1.1, -1.1]]
    probe = Probe([(1, 2, 3)], tolerance=0.2)
    probe.check(first, first)
    probe.check(second, second)
    with pytest.raises(StaleWeightsError, match="closer to the trainer's old ones"):
        probe.check(second, third)


def test_the_probe_is_scored_without_dropout():
    model = tiny_model(40, attention_dropout=0.5)
    expected = model_logps(model, SEQUENCES)
    model.train()
    assert model_logps(model, SEQUENCES) == expected
    assert model.training


def test_a_probe_takes_the_kernels_noise_for_noise():
    probe = Probe([(1, 2, 3)], tolerance=0.1)
    assert probe.check([[-1.01, -2.0]], [[-1.0, -2.0]]) == pytest.approx(0.005)
    assert probe.check([[-1.0, -2.01]], [[-1.0, -2.0001]]) == pytest.approx(0.00495)  # moved less than the noise
    assert probe.check([[-1.0, -2.0]], [[-1.0, -2.006]]) == pytest.approx(0.003)  # nearer the old, within the noise
    with pytest.raises(StaleWeightsError, match="closer to the trainer's old ones"):
        probe.check([[-1.0, -2.01]], [[-1.0, -2.08]])
    with pytest.raises(StaleWeightsError, match="nan"):
        probe.check([[float("nan"), -2.0]], [[-1.0, -2.0]])
