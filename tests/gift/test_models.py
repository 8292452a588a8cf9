"""Checkpoints that are whole load; those that are not are refused by name, never filled in."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
)
from transformers.utils import is_flash_attn_2_available

from gift.cli import UserError
from gift.generation import Request, SamplingParams
from gift.generation.hf import HFEngine
from gift.models import (
    check_checkpoint,
    is_local,
    lm_head,
    load_config,
    load_model,
    load_tokenizer,
    logit_map,
    states_at,
)
from gift.vocab import vocab_stats

FALCON_H1 = {
    "lm_head_multiplier": 0.1,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
}


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    """A copy to break."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


def test_a_whole_checkpoint_loads_as_saved(tiny_checkpoint):
    model = load_model(tiny_checkpoint)
    saved = load_file(tiny_checkpoint / "model.safetensors")
    assert not model.training
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == dict.fromkeys(saved, torch.float32)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert load_model(tiny_checkpoint, dtype="bfloat16").dtype == torch.bfloat16
    assert load_config(tiny_checkpoint).num_hidden_layers == 2


def test_an_implementation_of_attention_can_be_chosen(tiny_checkpoint):
    ids = torch.arange(12).view(2, 6)
    logits = []
    for attention in ("sdpa", "eager"):
        model = load_model(tiny_checkpoint, attention=attention)
        assert model.config._attn_implementation == attention
        logits.append(model(input_ids=ids).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
    assert load_model(tiny_checkpoint).config._attn_implementation == "sdpa"


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed")
def test_attention_whose_package_is_missing_is_one_line(tiny_checkpoint):
    message = r"checkpoint: cannot load this model: .*FlashAttention2.*installed"
    with pytest.raises(UserError, match=message) as error:
        load_model(tiny_checkpoint, attention="flash_attention_2")
    assert "\n" not in str(error.value)


def test_no_folder(tmp_path):
    for load in (load_model, load_tokenizer, check_checkpoint):
        with pytest.raises(UserError, match="absent: no such checkpoint folder"):
            load(tmp_path / "absent")


def test_no_config(checkpoint):
    (checkpoint / "config.json").unlink()
    for load in (load_model, check_checkpoint):
        with pytest.raises(UserError, match=r"model: no config\.json in this folder"):
            load(checkpoint)


def test_a_damaged_config_is_one_line(checkpoint):
    (checkpoint / "config.json").write_text("{")
    for load in (load_model, load_config):
        with pytest.raises(UserError, match=r"model: cannot .*config") as error:
            load(checkpoint)
        assert "\n" not in str(error.value)


def test_no_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \*\.safetensors in this folder"):
        load_model(checkpoint)


def test_pickled_weights_are_not_read(checkpoint):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \*\.safetensors in this folder"):
        load_model(checkpoint)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_missing_weight_is_named(checkpoint, name):
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"1 weights are missing from this checkpoint, among them {name}"):
        load_model(checkpoint)


def test_cut_off_weights_are_refused(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="model: cannot load this model: "):
        load_model(checkpoint)


def test_weights_of_another_shape_are_refused(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(UserError, match="model: cannot load this model: "):
        load_model(checkpoint)


@pytest.mark.parametrize(
    ("config", "model", "settings"),
    [
        (
            Gemma2Config,
            Gemma2ForCausalLM,
            {"final_logit_softcapping": 2.0, "head_dim": 8, "layer_types": ["full_attention"] * 2},
        ),
        (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 4.0}),
        (CohereConfig, CohereForCausalLM, {"logit_scale": 0.25}),
    ],
)
def test_logits_changed_after_the_head_are_those_of_the_model(config, model, settings):
    torch.manual_seed(0)
    made = model(config(**{**SHAPE, **settings}, vocab_size=40, initializer_range=0.5)).eval()
    ids = torch.randint(40, (1, 9))
    selected = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        expected = torch.log_softmax(made(input_ids=ids).logits[0].double(), -1)
        weight, bias = lm_head(made)
        hidden = states_at(made, ids, torch.ones_like(ids), selected)
        stats = vocab_stats(hidden, weight, ids[0], bias=bias, **logit_map(made))
    assert logit_map(made)
    torch.testing.assert_close(stats.logp.double(), expected.gather(1, ids[0][:, None])[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stats.entropy.double(), -(expected.exp() * expected).sum(-1), rtol=1e-4, atol=1e-4)
    (sample,) = HFEngine(made).generate([Request(tuple(ids[0].tolist()), 3)], SamplingParams(max_tokens=1, logps=True))
    assert sample.logps[0] == pytest.approx(expected[-1, sample.token_ids[0]].item(), abs=1e-4)


@pytest.mark.parametrize(
    ("config", "model", "settings"),
    [
        (HyperCLOVAXConfig, HyperCLOVAXForCausalLM, {"logits_scaling": 0.25}),  # multiplies where Granite divides
        (FalconH1Config, FalconH1ForCausalLM, FALCON_H1),  # lm_head_multiplier
    ],
)
def test_a_model_with_logits_of_its_own_is_refused(config, model, settings, tmp_path):
    torch.manual_seed(0)
    model(config(**{**SHAPE, **settings}, vocab_size=40, initializer_range=0.5)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{model.__name__} does something to its logits"):
        load_model(tmp_path)


def test_no_tokenizer(checkpoint):
    for file in checkpoint.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match=r"model: this checkpoint has no tokenizer; add its tokenizer\.json"):
        load_tokenizer(checkpoint)


def test_a_tokenizer_pads_with_its_end_token_if_it_must_and_cannot_do_without_one(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|end|>")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(checkpoint)
    assert load_tokenizer(checkpoint).pad_token == "<|end|>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(UserError, match="no end token"):
        load_tokenizer(checkpoint)


@pytest.mark.parametrize("bias", [False, True])
def test_states_times_head_are_the_models_logits(tiny_checkpoint, bias):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.vocab_size))
    input_ids = torch.randint(model.config.vocab_size, (3, 7), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 4:] = 0
    selected = (torch.arange(21).view(3, 7) % 2 == 0) & attention_mask.bool()
    with torch.no_grad():
        states = states_at(model, input_ids, attention_mask, selected)
        weight, found_bias = lm_head(model)
        expected = model(input_ids, attention_mask=attention_mask).logits[selected]
    logits = states @ weight.T + (0 if found_bias is None else found_bias)
    assert (found_bias is not None) == bias
    torch.testing.assert_close(logits, expected)


def test_names_of_folders_and_of_hub_repositories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert all(is_local(name) for name in ("here", "./there", "/a/b", "a/b/c", tmp_path / "x"))
    assert not any(is_local(name) for name in ("Qwen/Qwen2.5-0.5B", "gpt2"))
