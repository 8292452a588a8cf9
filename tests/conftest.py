"""Shared by all tests: one thread, so that results repeat, and one tiny checkpoint."""

from __future__ import annotations

import os
import signal
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tiny_models import tiny_model
from vllm_server import shared_vllm_server  # noqa: F401  (a fixture)

from gift import nano

torch.set_num_threads(1)
# A shell's background job starts with SIGINT ignored, and the processes that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder: a random 2-layer Qwen2 of width 32 (untied head) and a tokenizer. Copy it to change it."""
    texts = [f"{prompt}\n{response}" for prompt, response in nano.pretraining_text(60, seed=0)]
    tokenizer = nano.train_tokenizer(texts, 320)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_model(len(tokenizer), tie_word_embeddings=False, **ends)
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
