"""Random models of two layers: the stand-in for a checkpoint all over the tests."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

KINDS = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "pad_token_id": None,
    "eos_token_id": None,
}


def tiny_model(vocab: int, kind: str = "qwen2", seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A model over `vocab` tokens with weights drawn from `seed`; `settings` replace SHAPE's or add to it."""
    config, model = KINDS[kind]
    torch.manual_seed(seed)
    return model(config(vocab_size=vocab, **{**SHAPE, **settings})).eval()
