"""The plan: the numbers of steps are the paper's, and what is printed is what the recipe says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import tiny_model
from torch import nn
from transformers import LlamaConfig, Qwen2Config

import gift.models
from gift import plan as plans
from gift.cli import UserError
from gift.engine import TrainingEngine
from gift.models import load_config
from gift.plan import memory_of, plan, readable, stages, state_bytes
from gift.recipe import Recipe as RecipeType
from gift.recipe import as_tree, build, load_recipe

CONFIGS = {  # config.json of the Hub's repositories
    "Qwen/Qwen2.5-7B": Qwen2Config(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        max_position_embeddings=131_072,
    ),
    "meta-llama/Llama-3.1-8B": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        max_position_embeddings=131_072,
    ),
}


@pytest.fixture
def hub(monkeypatch):
    """The two backbones' configs, without a network."""
    monkeypatch.setattr(plans, "load_config", lambda name, revision: CONFIGS[name])


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def test_the_papers_numbers_of_steps():
    """10,000 // 128 = 78 an epoch (the released script saves every 78 steps), 6 epochs, 2 updates per rollout batch."""
    found = {stage.policy: stage for stage in stages(load_recipe("qwen2.5-7b+all-rows"))}
    assert (found["gift"].batches, found["gift"].updates) == (6 * 78, 468)
    assert (found["gift-rl"].batches, found["gift-rl"].updates) == (78, 156)
    assert found["gift"].tokens_per_update == 128 * 8192
    assert found["gift-rl"].tokens_per_update == 64 * 8 * (8192 + 8192)
    assert (found["direct_sft"].batches, found["direct_sft"].problems) == (6 * 156, 20_000)
    assert (found["psft"].batches, found["psft"].updates, found["psft"].sequences) == (468, 8 * 468, 16)
    assert (found["luffy-rl"].batches, found["direct_rl-rl"].batches) == (156, 78)


def test_a_sequence_of_rl_is_a_prompt_and_a_response_within_the_models_window():
    recipe = load_recipe("nano", ["data.max_length=200", "rl.max_tokens=96"])
    for window, length in [(None, 296), (4096, 296), (296, 296), (295, 295), (100, 100)]:
        found = {stage.policy: stage.max_length for stage in stages(recipe, window)}
        assert (found["gift"], found["gift-rl"]) == (200, length)
    assert {stage.max_length for stage in plan(load_recipe("nano", ["rl.max_tokens=5000"]), 1).stages} == {256, 4096}


def test_every_method_has_the_stages_it_says():
    found = [stage.policy for stage in stages(load_recipe("nano-all"))]
    inits = ["direct_sft", "sft", "entropy", "label_smoothing", "kd", "dft", "asft", "psft", "gift"]
    rls = ["direct_rl", "luffy", "relift", *inits[1:]]
    assert found == [*inits, *(f"{name}-rl" for name in rls)]
    assert [stage.policy for stage in stages(load_recipe("nano", ["rl=null"]))] == ["sft", "gift"]


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def peak(recipe: str, policy: str, *overrides: str, ranks: int = 8) -> int:
    """Bytes of a GPU."""
    loaded = load_recipe(recipe, overrides)
    (stage,) = [stage for stage in stages(loaded) if stage.policy == policy]
    return memory_of(loaded, stage, plans.Shape.of(plans.base_config(loaded)), ranks=ranks, on_gpu=True).peak


def test_settings_that_save_memory_do(hub):
    online = peak("qwen2.5-7b+gift", "gift")
    sft = peak("qwen2.5-7b+sft", "sft")
    assert online > sft
    assert peak("qwen2.5-7b+gift", "gift", "reference.mode=cached") == sft
    assert peak("qwen2.5-7b+sft", "sft", "engine.zero_stage=2") > sft
    assert peak("qwen2.5-7b+sft", "sft", "engine.gradient_checkpointing=false") > sft
    assert peak("qwen2.5-7b+sft", "sft", ranks=16) < sft
    assert peak("qwen2.5-7b+sft", "sft", "engine.offload=optimizer") < sft
    assert peak("qwen2.5-7b+gift", "gift-rl", "rl.kl_coef=0.1") > peak("qwen2.5-7b+gift", "gift-rl")
    assert peak("qwen2.5-7b+relift", "relift-rl") > peak("qwen2.5-7b+gift", "gift-rl")


@pytest.mark.parametrize("backbone", ["qwen2.5-7b", "llama-3.1-8b"])
def test_the_papers_recipes_fit_on_eight_gpus_of_80_gb(hub, backbone):
    assert peak(f"{backbone}+gift", "gift") < 80e9
    assert peak(f"{backbone}+gift", "gift-rl") < 80e9


# ---------------------------------------------------------------------------------------------------------------------
# Disk


class SquaredWeights(nn.Module):
    """A loss that gives every weight of a model a gradient."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self):
        return sum(weight.float().square().sum() for weight in self.model.parameters())


@pytest.mark.parametrize(
    ("row", "policy", "engine"),
    [
        ("gift", "gift", "{zero_stage: 0, dtype: float32}"),
        ("gift", "gift-rl", "{zero_stage: 2, dtype: bfloat16}"),
        ("relift", "relift-rl", "{zero_stage: 0, dtype: float32}"),
        ("relift", "relift-rl", "{zero_stage: 2, dtype: bfloat16}"),
        ("relift", "relift-rl", "{zero_stage: 0, dtype: bfloat16, master_dtype: bfloat16}"),
    ],
)
def test_a_state_takes_what_the_plan_says(tmp_path: Path, row, policy, engine):
    """Against the folder that the training engine writes after a step of each optimizer."""
    recipe = load_recipe(f"nano+{row}", [f"engine={engine}"])
    model = tiny_model(64, max_position_embeddings=64).to(torch.bfloat16 if "dtype: b" in engine else torch.float32)
    settings = recipe.rl_of(row) if policy.endswith("-rl") else recipe.init_of(row)
    training = TrainingEngine(SquaredWeights(model), model, recipe.engine, settings.optimizer)
    training.backward(training(), 1.0)
    training.step(1e-3)
    if row == "relift":
        with training.optimizer_state("sft", settings.relift.optimizer):
            training.backward(training(), 1.0)
            training.step(1e-3)
    training.save(tmp_path, {"step": 1})
    training.close()
    (stage,) = [stage for stage in stages(recipe) if stage.policy == policy]
    (state,) = tmp_path.glob("step-*/rank-0.safetensors")
    predicted = state_bytes(recipe, stage, plans.Shape.of(model.config), ranks=1)
    assert state.stat().st_size == pytest.approx(predicted, rel=0.1)  # names and step counts come on top
    assert state.stat().st_size >= predicted


def test_without_zero_every_rank_saves_the_whole_state():
    recipe = load_recipe("nano")
    shape, stage = plans.Shape.of(plans.base_config(recipe)), stages(recipe)[0]
    one = state_bytes(recipe, stage, shape, ranks=1)
    assert state_bytes(recipe, stage, shape, ranks=4) == 4 * one
    sharded = load_recipe("nano", ["engine.zero_stage=1"])
    assert state_bytes(sharded, stage, shape, ranks=4) == one


def test_the_largest_state_is_what_the_disk_must_hold(hub):
    text = sections(str(plan(load_recipe("qwen2.5-7b+gift+relift"), 8)))
    assert "at most 3 x 152.31 GB" in text["disk"]  # fp32 masters and four moments


# ---------------------------------------------------------------------------------------------------------------------
# Text


def test_the_device_is_that_of_the_recipe_unless_it_is_said(hub, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    nano, paper = load_recipe("nano"), load_recipe("qwen2.5-7b+gift")
    assert [plan(recipe, 1).on_gpu for recipe in (nano, paper)] == [False, True]
    assert [plan(paper, 1, on_gpu=said).on_gpu for said in (False, True)] == [False, True]
    assert "memory on a CPU" in sections(str(plan(nano, 1)))
    assert "memory on a GPU" in sections(str(plan(nano, 1, on_gpu=True)))
    assert "memory of each of 8 ranks on a CPU" in sections(str(plan(paper, 8, on_gpu=False)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert plan(nano, 1).on_gpu


def test_the_memory_of_rl_names_what_sampling_takes():
    text = sections(str(plan(load_recipe("nano"), 1, on_gpu=False)))["memory on a CPU"]
    peaks = [line for line in text.splitlines() if ": at most" in line]
    assert [line.partition(":")[0] for line in peaks] == ["sft", "gift", "sft-rl, gift-rl"]
    assert text.count("keys and values") == 1
    text = sections(str(plan(load_recipe("nano", ["generation.engine=vllm"]), 1, on_gpu=False)))["memory on a CPU"]
    assert text.count("vLLM's keys and values") == 1


def test_what_methods_change_is_printed_as_overrides_have_it(hub):
    text = sections(str(plan(load_recipe("qwen2.5-7b+luffy+psft+sft", ["methods.sft.rl=null"]), 1)))["steps"]
    assert [line for line in text.splitlines() if " changes: " in line] == [
        "luffy changes: rl.algorithm=luffy rl.clip=false rl.aggregation=seq_sum_norm rl.entropy_coef=0.001"
        " rl.optimizer.max_grad_norm=0.0156",
        "psft changes: init.updates_per_batch=8",
        "sft changes: rl=null",
    ]


def test_warnings_are_printed(hub):
    overrides = [
        "rl.entropy_coef=0.01",
        "rl.norm_length=9",
        "methods.luffy.rl.clip=true",
        "methods.gift.options.smooth=0.1",
    ]
    text = sections(str(plan(load_recipe("qwen2.5-7b+gift+sft+luffy", overrides), 1, overrides=overrides)))["steps"]
    warnings = [line for line in text.splitlines() if line.startswith("warning: ")]
    starts = [
        "warning: rl.entropy_coef=0.01 does not reach luffy",
        "warning: gift: gift ignores smooth in mode 'exact'",
        "warning: gift-rl, sft-rl: rl.norm_length has no effect",
        "warning: luffy-rl: rl.clip is true",
    ]
    assert [warning[: len(start)] for warning, start in zip(warnings, starts, strict=True)] == starts


def test_what_is_not_there_is_not_said_to_be_on_this_machine(tmp_path: Path, tiny_checkpoint):
    (tmp_path / "data.jsonl").touch()
    here = [f"base.model={tiny_checkpoint}", f"data.source={tmp_path}/data.jsonl"]
    gone = [f"base.model={tmp_path}/gone", f"data.source={tmp_path}/gone.jsonl"]
    text = sections(str(plan(load_recipe("qwen2.5-7b+gift", here), 1)))
    assert text["downloads"].count("on this machine") == 2
    assert "predicted for" in text["memory on a GPU"]
    text = sections(str(plan(load_recipe("qwen2.5-7b+gift", gone), 1)))
    assert text["downloads"].splitlines() == [
        f"model {tmp_path}/gone: no such checkpoint folder",
        f"data {tmp_path}/gone.jsonl: no such file or folder",
    ]
    assert text["memory on a GPU"] == f"not known: {tmp_path}/gone: no such checkpoint folder"
    with pytest.raises(UserError, match="gone: no such checkpoint folder"):
        load_config(tmp_path / "gone")


def test_the_config_is_that_of_the_recipes_revision(monkeypatch):
    asked = []

    def from_pretrained(name, *, revision, **_):
        asked.append((name, revision))
        return CONFIGS[name]

    monkeypatch.setattr(gift.models.AutoConfig, "from_pretrained", from_pretrained)
    assert plan(load_recipe("qwen2.5-7b+gift", ["base.revision=abc"]), 1).shape is not None
    assert asked == [("Qwen/Qwen2.5-7B", "abc")]


def test_sizes_are_readable():
    sizes = [0, 512, 99_900, 100_000, 1e9, 15_231_000_000]
    assert [readable(size) for size in sizes] == ["0.0 kB", "0.5 kB", "99.9 kB", "0.1 MB", "1.00 GB", "15.23 GB"]


def sections(text: str) -> dict[str, str]:
    """The printed plan by title."""
    parts = re.split(r"^# (.*)$", text, flags=re.MULTILINE)
    return {title: body.strip() for title, body in zip(parts[1::2], parts[2::2], strict=True)}


def test_the_printed_recipe_is_the_recipe():
    recipe = load_recipe("nano")
    tree = yaml.safe_load(sections(str(plan(recipe, 1)))["recipe"])
    assert tree == as_tree(recipe)
    assert build(RecipeType, tree) == recipe


def test_what_is_printed_of_a_run_from_the_hub(hub):
    text = sections(str(plan(load_recipe("qwen2.5-7b+gift+psft+epoch-6", ["methods.psft.init={}"]), 8)))
    assert list(text) == ["recipe", "steps", "downloads", "memory of each of 8 ranks on a GPU", "disk"]
    row = next(line.split() for line in text["steps"].splitlines() if line.startswith("gift "))
    assert row == ["gift", "init", "10,000", "10", "780", "780", "<=", "1,048,576"]
    assert "policies: base, gift, psft, gift-rl, psft-rl" in text["steps"]
    assert "gift: taken after epoch 6 of 10" in text["steps"]
    assert "warning: psft: " in text["steps"]
    assert "model Qwen/Qwen2.5-7B, revision newest, about 15.23 GB in 16 bits" in text["downloads"]
    assert "data zwhe99/DeepMath-103K, split train" in text["downloads"]
    memory = text["memory of each of 8 ranks on a GPU"]
    assert "predicted for 7,615,616,512 parameters" in memory  # the Hub's own count
    assert "gift-rl, psft-rl: at most " in memory  # alike, so shown once
    assert "checkpoints: 4 x 15.23 GB" in text["disk"]
    assert "3 x 91.39 GB" in text["disk"]  # fp32 masters and two moments


def test_nano_needs_no_download():
    text = sections(str(plan(load_recipe("nano"), 1, on_gpu=False)))
    assert text["downloads"].startswith("none: base and data are made here")
    assert text["memory on a CPU"].startswith("predicted for ")


def test_where_the_config_cannot_be_had_the_rest_is_printed(monkeypatch):
    def offline(name, revision):
        raise UserError(f"{name}: cannot read this model's config: offline")

    monkeypatch.setattr(plans, "load_config", offline)
    text = sections(str(plan(load_recipe("qwen2.5-7b+gift"), 1)))
    assert text["memory on a GPU"] == "not known: Qwen/Qwen2.5-7B: cannot read this model's config: offline"
    assert text["disk"] == text["memory on a GPU"]
    assert "468" in text["steps"]
    assert "about" not in text["downloads"]
