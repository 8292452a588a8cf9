"""The plan: the numbers of steps are the paper's, and what is printed is what the recipe says."""

from __future__ import annotations

import re

import pytest
import yaml
from transformers import LlamaConfig, Qwen2Config

from gift import plan as plans
from gift.cli import UserError
from gift.plan import memory_of, plan, stages
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
    ),
    "meta-llama/Llama-3.1-8B": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
}


@pytest.fixture
def hub(monkeypatch):
    """The two backbones' configs, without a network."""
    monkeypatch.setattr(plans, "load_config", CONFIGS.__getitem__)


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def test_the_papers_numbers_of_steps():
    """10,000 // 128 = 78 an epoch (the released script saves every 78 steps), 6 epochs, 2 updates per rollout batch."""
    found = {stage.policy: stage for stage in stages(load_recipe("qwen2.5-7b+all-rows"))}
    assert (found["gift"].batches, found["gift"].updates) == (6 * 78, 468)
    assert (found["gift-rl"].batches, found["gift-rl"].updates) == (78, 156)
    assert found["gift"].tokens_per_update == 128 * 8192
    assert found["gift-rl"].tokens_per_update == 64 * 8 * 8192
    assert (found["direct_sft"].batches, found["direct_sft"].problems) == (6 * 156, 20_000)
    assert (found["psft"].batches, found["psft"].updates, found["psft"].sequences) == (468, 8 * 468, 16)
    assert (found["luffy-rl"].batches, found["direct_rl-rl"].batches) == (156, 78)


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
    return memory_of(loaded, stage, plans.base_shape(loaded), ranks=ranks, on_gpu=True).peak


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
# Text


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
    assert list(text) == ["recipe", "steps", "downloads", "memory of each of 8 ranks", "disk"]
    row = next(line.split() for line in text["steps"].splitlines() if line.startswith("gift "))
    assert row == ["gift", "init", "10,000", "10", "780", "780", "<=", "1,048,576"]
    assert "policies: base, gift, psft, gift-rl, psft-rl" in text["steps"]
    assert "gift: taken after epoch 6 of 10" in text["steps"]
    assert "warning: psft: " in text["steps"]
    assert "model Qwen/Qwen2.5-7B, revision newest, about 15.23 GB in 16 bits" in text["downloads"]
    assert "data zwhe99/DeepMath-103K, split train" in text["downloads"]
    assert "predicted for 7,615,616,512 parameters" in text["memory of each of 8 ranks"]  # the Hub's own count
    assert "gift-rl, psft-rl: at most " in text["memory of each of 8 ranks"]  # alike, so shown once
    assert "checkpoints: 4 x 15.23 GB" in text["disk"]
    assert "3 x 91.39 GB" in text["disk"]  # fp32 masters and two moments


def test_nano_needs_no_download():
    text = sections(str(plan(load_recipe("nano"), 1)))
    assert text["downloads"].startswith("none: base and data are made here")
    assert text["memory"].startswith("predicted for ")


def test_where_the_config_cannot_be_had_the_rest_is_printed(monkeypatch):
    def offline(name):
        raise UserError(f"{name}: cannot read this model's config: offline")

    monkeypatch.setattr(plans, "load_config", offline)
    text = sections(str(plan(load_recipe("qwen2.5-7b+gift"), 1)))
    assert text["memory"] == "not known: Qwen/Qwen2.5-7B: cannot read this model's config: offline"
    assert text["disk"] == text["memory"]
    assert "468" in text["steps"]
    assert "about" not in text["downloads"]
