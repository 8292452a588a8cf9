"""Low-rank adapters: what trains, what the base is without them, and the merged checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_worker import IGNORED, OPTIMIZER, SHARD_ALL, Nll, batch, model_for, settings_for, train_step
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Tokenizer

import gift.engine
from gift.cli import UserError
from gift.engine import TrainingEngine
from gift.lora import adapters_disabled, add_adapters, merged_state
from gift.models import backbone
from gift.recipe import LoRA

SETTINGS = LoRA(rank=3, alpha=7.0, targets=("q_proj", "v_proj", "down_proj"))
IDS = batch(0)[1][0]


class WithBase(Nll):
    """The NLL, plus how far the model's states are from the base's: the base is the model without its adapters."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), adapters_disabled(self.student):
            base = backbone(self.student)(input_ids=input_ids).last_hidden_state
        states = backbone(self.student)(input_ids=input_ids).last_hidden_state
        selected = labels != IGNORED
        return super().forward(input_ids, labels) + (states - base)[selected].square().sum()


@pytest.fixture(autouse=True)
def _shard_tiny_models(monkeypatch):
    monkeypatch.setattr(gift.engine, "STAGE_3", SHARD_ALL)


def adapted(seed: int = 0, **case) -> PreTrainedModel:
    model = model_for(case)
    add_adapters(model, SETTINGS, seed=seed)
    return model


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def with_large_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, its adapters no longer zero."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = torch.randn(weight.shape, generator=generator).to(weight.dtype) / 4
    return model


def test_fresh_adapters_change_nothing_and_are_a_function_of_the_seed():
    model = model_for({})
    before = torch.random.get_rng_state()
    add_adapters(model, SETTINGS, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(logits_of(model), logits_of(model_for({})))
    drawn = {seed: adapted(seed=seed).state_dict() for seed in (1, 2)}
    for name, weight in model.named_parameters():
        assert weight.requires_grad == ("lora_" in name)
        assert torch.equal(weight, drawn[1][name])
    down = "model.layers.0.mlp.down_proj.lora_A.default.weight"
    assert not torch.equal(drawn[1][down], drawn[2][down])


def test_disabled_adapters_give_the_base():
    model, base = with_large_adapters(adapted()), logits_of(model_for({}))
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
    with_adapters = logits_of(model)
    assert (with_adapters - base).abs().max() > 0.1
    with adapters_disabled(model):
        assert torch.equal(logits_of(model), base)
    assert torch.equal(logits_of(model), with_adapters)
    assert [name for name, weight in model.named_parameters() if weight.requires_grad] == trainable


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_the_merged_weights_compute_the_same_under_the_names_of_the_base(kind: str):
    model, merged = with_large_adapters(adapted(tied=kind == "tied")), model_for({"tied": kind == "tied"})
    state = merged_state(model, model.state_dict())
    assert state.keys() == merged.state_dict().keys()
    merged.load_state_dict(state, strict=True)
    torch.testing.assert_close(logits_of(merged), logits_of(model), atol=1e-5, rtol=1e-5)


def test_a_missing_target_is_named():
    with pytest.raises(
        UserError, match=r"no linear layer to adapt is named wq, qproj.*model has: down_proj, gate_proj"
    ):
        add_adapters(model_for({}), LoRA(targets=("q_proj", "wq", "qproj")), seed=0)
    with pytest.raises(UserError, match="no linear layer to adapt is named lm_head"):  # losses read its weight alone
        add_adapters(model_for({}), LoRA(targets=("q_proj", "lm_head")), seed=0)


@pytest.mark.parametrize(
    "case",
    [
        {"zero_stage": 0},
        {"zero_stage": 2, "gradient_checkpointing": True},
        {"zero_stage": 3, "tied": True},
        {"zero_stage": 0, "dtype": "bfloat16"},
        {"zero_stage": 1, "dtype": "bfloat16"},
        {"zero_stage": 3, "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_only_adapters_train_and_the_run_resumes_and_exports(tmp_path: Path, case: dict):
    def engine() -> TrainingEngine:
        model = adapted(**{name: value for name, value in case.items() if name in ("tied", "dtype")})
        return TrainingEngine(WithBase(model), model, settings_for(case), OPTIMIZER)

    def frozen(one: TrainingEngine) -> dict[str, Tensor]:
        with one.gathered():
            return {name: w.detach().clone() for name, w in one.model.named_parameters() if not w.requires_grad}

    whole = engine()
    before = frozen(whole)
    for step in range(3):
        train_step(whole, step)
        if step == 0:
            whole.save(tmp_path / "states", {"step": 1})
    assert all(torch.equal(weight, before[name]) for name, weight in frozen(whole).items())
    with whole.gathered():
        logits = logits_of(whole.model)
        with adapters_disabled(whole.model):
            base = logits_of(whole.model)
    whole.export(Qwen2Tokenizer(), tmp_path / "whole")
    whole.close()

    resumed = engine()
    resumed.resume(tmp_path / "states")
    for step in range(1, 3):
        train_step(resumed, step)
    resumed.export(Qwen2Tokenizer(), tmp_path / "resumed")
    resumed.close()

    weights = {way: (tmp_path / way / "model.safetensors").read_bytes() for way in ("whole", "resumed")}
    assert weights["whole"] == weights["resumed"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype="auto")
    assert (logits - base).abs().max() > 0.03, "the adapters learned nothing"
    tolerance = 0.01 if case.get("dtype") == "bfloat16" else 1e-5
    torch.testing.assert_close(logits_of(exported), logits, atol=tolerance, rtol=0)
