"""From settings to an engine."""

from __future__ import annotations

from pathlib import Path

from gift.generation import Engine
from gift.recipe import Generation


def build_engine(settings: Generation, checkpoint: Path, *, dtype: str = "auto") -> Engine:
    """The engine of `settings` over a checkpoint folder, for evaluation: on the accelerators if there are any.

    Raises UserError for an unusable checkpoint, or where what the engine needs is not installed.
    """
    if settings.data_parallel > 1:
        from gift.generation.workers import WorkerEngine

        return WorkerEngine(settings, checkpoint, dtype=dtype)
    if settings.engine == "server":
        from gift.generation.server import ServerEngine

        return ServerEngine(settings, checkpoint)
    if settings.engine == "vllm":
        from gift.generation.vllm import VLLMEngine

        return VLLMEngine(checkpoint, settings, dtype=dtype)
    from gift.generation.hf import HFEngine
    from gift.models import device, load_model, load_tokenizer

    model = load_model(checkpoint, dtype=dtype).to(device())
    return HFEngine(model, load_tokenizer(checkpoint), cache_gb=settings.cache_gb, max_rows=settings.max_rows)
