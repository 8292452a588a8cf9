"""The client of a vLLM server against vLLM itself: the same samples and scores as transformers on the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from vllm_server import SHAPE, servable_checkpoint, vllm_server

from gift.cli import UserError
from gift.generation import GenerationError, RepetitionGuard, Request, SamplingParams, completion_text
from gift.generation.server import ServerEngine
from gift.models import load_model, load_tokenizer
from gift.recipe import Generation

pytestmark = pytest.mark.vllm

REQUESTS = [Request((5 + number, *range(40 + number, 43 + 2 * number)), 2**40 + number) for number in range(6)]


@pytest.fixture(scope="module")
def checkpoint(shared_vllm_server) -> Path:
    return Path(shared_vllm_server.model)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def engine(shared_vllm_server, checkpoint, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("shared"))
    engine = ServerEngine(Generation(engine="server", url=shared_vllm_server.url, shared_folder=folder), checkpoint)
    yield engine
    engine.close()


@pytest.fixture
def model(engine, checkpoint):
    """The checkpoint's model, which the server samples from as well."""
    model = load_model(checkpoint)
    engine.update_weights(model)
    return model


def other_model(model, seed: int):
    config = model.config
    ends = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    return tiny_model(config.vocab_size, seed=seed, tie_word_embeddings=config.tie_word_embeddings, **SHAPE, **ends)


@torch.no_grad()
def next_logits(model, prompt, completion) -> torch.Tensor:
    """fp64 logits [len(completion), V] from which transformers would draw each token of the completion."""
    return model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].double()


def chosen(logp: torch.Tensor, tokens: list[int]) -> list[float]:
    return [row[token].item() for row, token in zip(logp, tokens, strict=True)]


def assert_greedy_agrees(engine: ServerEngine, model) -> None:
    samples = engine.generate(REQUESTS, SamplingParams(24, 0.0, logps=True))
    for request, sample in zip(REQUESTS, samples, strict=True):
        ids = torch.tensor([request.prompt_ids])
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        assert sample.token_ids == found[0, len(request.prompt_ids) :].tolist()
        logp = next_logits(model, request.prompt_ids, sample.token_ids).log_softmax(-1)
        assert sample.logps == pytest.approx(chosen(logp, sample.token_ids), abs=1e-4)


def test_greedy_is_transformers_before_and_after_an_update(engine, checkpoint, tmp_path):
    model = load_model(checkpoint)
    assert_greedy_agrees(engine, model)
    before = engine.generate(REQUESTS, SamplingParams(24, 0.0))
    other = other_model(model, seed=1)
    engine.update_weights(other)
    assert engine.generate(REQUESTS, SamplingParams(24, 0.0)) != before
    assert_greedy_agrees(engine, other)


@pytest.mark.parametrize("settings", [{}, {"min_p": 0.1}, {"top_k": 7, "top_p": 0.8}, {"min_p": 0.05, "top_p": 0.6}])
def test_logps_are_those_of_the_distribution_sampled_from(engine, model, settings):
    params = SamplingParams(16, 0.7, logps=True, **settings)
    warpers: list[Any] = [TemperatureLogitsWarper(0.7)]
    warpers += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    for request, sample in zip(REQUESTS, engine.generate(REQUESTS, params), strict=True):
        logits = next_logits(model, request.prompt_ids, sample.token_ids)
        logp = LogitsProcessorList(warpers)(None, logits).log_softmax(-1)
        assert sample.logps == pytest.approx(chosen(logp, sample.token_ids), abs=1e-4)


def test_a_sample_depends_on_its_seed_and_on_nothing_else(engine, model):
    params = SamplingParams(20, 1.0, top_p=0.95, logps=True)
    samples = engine.generate(REQUESTS, params)
    assert engine.generate(REQUESTS[::-1], params)[::-1] == samples
    assert [engine.generate([request], params)[0] for request in REQUESTS] == samples
    twins = engine.generate([replace(REQUESTS[0], seed=seed) for seed in range(8)], params)
    assert len({tuple(sample.token_ids) for sample in twins}) == 8


def test_a_response_ends_at_stop_tokens_and_strings(engine, model, tokenizer):
    free = engine.generate(REQUESTS, SamplingParams(24, 0.0))
    for request, sample in zip(REQUESTS, free, strict=True):
        token = sample.token_ids[9]
        cut = sample.token_ids.index(token) + 1
        stopped = engine.generate([request], SamplingParams(24, 0.0, stop_ids=(token,)))[0]
        assert (stopped.token_ids, stopped.finish_reason) == (sample.token_ids[:cut], "stop")
        assert stopped.stop_reason == token

        text = completion_text(tokenizer, sample)
        string = text[len(text) // 2 :][:2]
        stopped = engine.generate([request], SamplingParams(24, 0.0, stop=(string,)))[0]
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", string)
        assert stopped.token_ids == sample.token_ids[: len(stopped.token_ids)]
        assert completion_text(tokenizer, stopped) == text.partition(string)[0]


def test_a_response_ends_at_the_models_end_token_unless_told_otherwise(engine, model, tokenizer):
    requests = [Request((9,), seed) for seed in range(24)]
    params = SamplingParams(200, 2.0)
    samples = engine.generate(requests, params)
    on = engine.generate(requests, replace(params, ignore_end=True))
    end = tokenizer.eos_token_id
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for sample, longer in zip(samples, on, strict=True):
        assert sample.stop_reason is None
        assert (sample.finish_reason == "stop") == (end in sample.token_ids)
        assert sample.token_ids.index(end) == len(sample.token_ids) - 1 if end in sample.token_ids else True
        assert longer.token_ids[: len(sample.token_ids)] == sample.token_ids
        assert (len(longer.token_ids), longer.finish_reason) == (200, "length")


def test_the_repetition_guard_fires_where_ours_would(engine, model):
    guard = RepetitionGuard(max_pattern=3, count=2)
    params = SamplingParams(200, ignore_end=True)
    requests = [Request((9,), seed) for seed in range(24)]
    free = engine.generate(requests, params)
    guarded = engine.generate(requests, replace(params, repetition_guard=guard))
    assert {sample.finish_reason for sample in guarded} == {"repetition", "length"}
    for sample, whole in zip(guarded, free, strict=True):
        ids = whole.token_ids
        first = next((n for n in range(1, len(ids) + 1) if guard.fires(ids[:n])), None)
        assert sample.token_ids == ids[:first]
        assert (sample.finish_reason == "repetition") == (first is not None)
        assert sample.stop_reason is None


@torch.no_grad()
def test_scores_are_transformers(engine, model):
    window = engine.max_model_len
    generator = torch.Generator().manual_seed(0)
    sequences = [
        tuple(torch.randint(0, model.config.vocab_size, (length,), generator=generator).tolist())
        for length in (1, 2, 3, 40, 40, 300, window)
    ]
    for sequence, logps in zip(sequences, engine.score(sequences), strict=True):
        logp = model(torch.tensor([sequence])).logits[0, :-1].double().log_softmax(-1)
        assert logps == pytest.approx(chosen(logp, list(sequence[1:])), abs=1e-4)
    with pytest.raises(UserError, match=f"sequence 1: {window + 1} tokens"):
        engine.score([(1, 2), (1,) * (window + 1)])


def test_a_response_fills_the_window_and_no_more(engine, model):
    window = engine.max_model_len
    sample = engine.generate([Request((7,) * (window - 3), 0)], SamplingParams(50, ignore_end=True))[0]
    assert (len(sample.token_ids), sample.finish_reason) == (3, "length")
    with pytest.raises(UserError, match=f"request 1.*window of {window}"):
        engine.generate([REQUESTS[0], Request((7,) * window, 0)], SamplingParams(4))


def test_what_vllm_refuses_is_told_in_its_words(engine, model):
    with pytest.raises(GenerationError, match=r"HTTP 400 from /v1/completions: .*out of vocabulary"):
        engine.generate([Request((10_000,), 0)], SamplingParams(4))
    assert engine.generate(REQUESTS[:1], SamplingParams(4, 0.0))  # it goes on


def test_weights_that_cannot_be_read_are_an_error_and_the_server_goes_on(engine, model, monkeypatch):
    monkeypatch.setattr("gift.generation.server.save_file", lambda state, path, **_: path.write_bytes(b"x" * 64))
    with pytest.raises(GenerationError, match="HTTP 500 from /collective_rpc"):
        engine.update_weights(model)
    monkeypatch.undo()
    engine.update_weights(model)
    assert_greedy_agrees(engine, model)


def test_it_is_an_openai_server(shared_vllm_server):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{shared_vllm_server.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list().data] == [shared_vllm_server.model]
        messages = [{"role": "system", "content": "Rate the answer."}, {"role": "user", "content": "3 + 4 = 7"}]
        ask = {"model": shared_vllm_server.model, "messages": messages, "max_tokens": 8, "temperature": 0.0, "seed": 1}
        replies = [client.chat.completions.create(**ask) for _ in range(2)]
        assert replies[0].choices[0].message.content == replies[1].choices[0].message.content
        assert replies[0].choices[0].message.role == "assistant"
        assert replies[0].usage.completion_tokens <= 8
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.chat.completions.create(**{**ask, "model": "another"})


def test_an_untied_head_is_updated_and_a_killed_server_is_one_clear_line(shared_vllm_server, tiny_checkpoint, tmp_path):
    checkpoint = servable_checkpoint(tmp_path / "untied", load_tokenizer(tiny_checkpoint), tied=False)
    (tmp_path / "shared").mkdir()
    with vllm_server(checkpoint, log=tmp_path / "server.log") as server:
        settings = Generation(engine="server", url=server.url, shared_folder=str(tmp_path / "shared"), max_rows=2)
        engine = ServerEngine(settings, checkpoint)
        model = load_model(checkpoint)
        assert_greedy_agrees(engine, model)
        other = other_model(model, seed=1)
        engine.update_weights(other)
        assert_greedy_agrees(engine, other)

        stream = engine.stream([Request((9,), n) for n in range(64)], SamplingParams(400, ignore_end=True))
        _, sample = next(stream)
        assert len(sample.token_ids) == 400
        server.kill()
        with pytest.raises(GenerationError) as error:
            list(stream)
        assert server.url in str(error.value)
        assert "\n" not in str(error.value)
        with pytest.raises(GenerationError, match="no server answers there"):
            engine.generate(REQUESTS, SamplingParams(4))
