"""From settings to an engine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gift.cli import UserError
from gift.distributed import world_size
from gift.generation import Engine
from gift.models import device, load_model, load_tokenizer
from gift.recipe import Generation


def check_installed(settings: Generation) -> None:
    """Raises UserError where the engine of `settings` needs vLLM in this environment and there is none."""
    if settings.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "generation.engine vllm: the module vllm is not installed here; install it (docs/generation.md), or take"
            " generation.engine=hf"
        )


def build_engine(settings: Generation, checkpoint: Path, *, dtype: str = "auto") -> Engine:
    """The engine of `settings` over a checkpoint folder, for evaluation: on the accelerators if there are any.

    A server must serve this very checkpoint, or is given its weights where there is a `shared_folder`.
    Raises UserError for an unusable checkpoint, or where what the engine needs is not installed.
    """
    check_installed(settings)
    # vLLM in this process would take the ranks of a training run for its own.
    if settings.data_parallel > 1 or (settings.engine == "vllm" and world_size() > 1):
        from gift.generation.workers import WorkerEngine

        return WorkerEngine(settings, checkpoint, dtype=dtype)
    if settings.engine == "server":
        from gift.generation.server import ServerEngine

        if settings.shared_folder is None:
            return ServerEngine(settings, checkpoint)
        server = ServerEngine(settings)
        server.update_weights(load_model(checkpoint, dtype=dtype))
        return server
    if settings.engine == "vllm":
        from gift.generation.vllm import VLLMEngine

        return VLLMEngine(checkpoint, settings, dtype=dtype)
    from gift.generation.hf import HFEngine

    model = load_model(checkpoint, dtype=dtype).to(device())
    return HFEngine(model, load_tokenizer(checkpoint), cache_gb=settings.cache_gb, max_rows=settings.max_rows)
