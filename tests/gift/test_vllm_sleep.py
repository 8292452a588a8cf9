"""What vLLM is told to do around a sleep, which it has on a GPU alone: here to a stand-in that writes it down."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import tiny_model

from gift.generation import GenerationError, Request, SamplingParams
from gift.generation.vllm import VLLMEngine
from gift.recipe import Generation


class Recorder:
    """Stands in for vllm.LLM."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.names: list[str] = []

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(("wake_up", *tags))

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append((method,))
        self.names = [name for name, _ in kwargs["weights_iterator"]]

    def reset_prefix_cache(self) -> None:
        self.calls.append(("reset_prefix_cache",))


def engine_with(recorder: Recorder, *, sleeps: bool) -> VLLMEngine:
    engine = object.__new__(VLLMEngine)
    engine._llm, engine._settings, engine._eager, engine._on_gpu = recorder, Generation(engine="vllm"), True, False
    engine._sleeps, engine._asleep = sleeps, False
    engine.max_model_len = engine._model_window = 64
    engine._core = recorder
    return engine


def test_a_sleeping_engine_wakes_for_new_weights_before_it_makes_room_for_the_cache():
    recorder = Recorder()
    engine = engine_with(recorder, sleeps=True)
    assert engine.sleep()
    assert engine.sleep()  # once is enough
    assert recorder.calls == [("sleep", 2)]
    with pytest.raises(GenerationError, match="needs update_weights"):
        engine.generate([Request((1, 2), 0)], SamplingParams(3))
    model = tiny_model(64, tie_word_embeddings=True)
    engine.update_weights(model)
    assert recorder.calls[1:] == [
        ("wake_up", "weights"),
        ("reload_weights",),
        ("wake_up", "kv_cache"),
        ("reset_prefix_cache",),
    ]
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(recorder.names)  # a tied head is sent, too


def test_an_engine_that_does_not_sleep_just_takes_the_weights():
    recorder = Recorder()
    engine = engine_with(recorder, sleeps=False)
    assert not engine.sleep()
    engine.update_weights(tiny_model(64))
    assert recorder.calls == [("reload_weights",), ("reset_prefix_cache",)]
