"""vLLM inside this process against transformers on the same weights."""

from __future__ import annotations

from dataclasses import replace

import psutil
import pytest
import torch
from naive_generation import greedy, naive_logps
from vllm_server import servable_checkpoint

pytest.importorskip("vllm")

from gift.cli import UserError
from gift.generation import GenerationError, RepetitionGuard, Request, SamplingParams
from gift.generation.vllm import VLLMEngine
from gift.models import load_model, load_tokenizer
from gift.recipe import Generation, LoRA

pytestmark = pytest.mark.vllm

SETTINGS = Generation(engine="vllm", cache_gb=0.05, max_rows=16)
WINDOW = 160


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return load_tokenizer(tiny_checkpoint)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    return servable_checkpoint(tmp_path_factory.mktemp("vllm") / "tied", tokenizer, max_position_embeddings=WINDOW)


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def opened():
    """The engine that tests share, if one is open: a process has one at a time."""
    engines: list[VLLMEngine] = []
    yield engines
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(opened, checkpoint):
    if not opened:
        opened.append(VLLMEngine(checkpoint, SETTINGS, dtype="float32"))
    return opened[0]


@pytest.fixture
def alone(opened):
    """For tests that open engines of their own."""
    while opened:
        opened.pop().close()


def prompts(tokenizer, count: int = 6) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [3 + 5 * number for number in range(count)]
    return [tuple(torch.randint(5, len(tokenizer), (length,), generator=generator).tolist()) for length in lengths]


def assert_greedy_agrees(engine, model, asked) -> None:
    samples = engine.generate([Request(prompt, 0) for prompt in asked], SamplingParams(40, 0.0, logps=True))
    for prompt, sample in zip(asked, samples, strict=True):
        assert sample.token_ids == greedy(model, prompt, 40)
        assert sample.logps == pytest.approx(naive_logps(model, prompt, sample.token_ids), abs=1e-4)


def test_greedy_is_token_for_token_that_of_transformers(engine, model, tokenizer):
    assert_greedy_agrees(engine, model, prompts(tokenizer))


def test_logps_are_those_of_the_tempered_distribution(engine, model, tokenizer):
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts(tokenizer))]
    for request, sample in zip(requests, engine.generate(requests, SamplingParams(30, 0.7, logps=True)), strict=True):
        expected = naive_logps(model, request.prompt_ids, sample.token_ids, 0.7)
        assert sample.logps == pytest.approx(expected, abs=1e-4)


def test_logps_are_those_of_the_truncated_distribution(engine, model, tokenizer):
    (prompt, *_) = prompts(tokenizer)
    (sample,) = engine.generate([Request(prompt, 5)], SamplingParams(1, 1.0, top_k=3, logps=True))
    with torch.no_grad():
        logps = model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
    kept, tokens = logps.topk(3)
    place = tokens.tolist().index(sample.token_ids[0])
    assert sample.logps[0] == pytest.approx((kept[place] - kept.logsumexp(0)).item(), abs=1e-4)


def test_a_sample_depends_on_its_request_alone(engine, tokenizer):
    requests = [Request(prompt, 2**62 + seed) for prompt in prompts(tokenizer) for seed in range(3)]
    params = SamplingParams(25, 1.0, top_p=0.95)
    together = engine.generate(requests, params)
    assert len({tuple(sample.token_ids) for sample in together}) == len(requests)
    reordered = engine.generate(requests[::-1], params)[::-1]
    alone = [engine.generate([request], params)[0] for request in requests[:4]]
    assert [sample.token_ids for sample in reordered] == [sample.token_ids for sample in together]
    assert [sample.token_ids for sample in alone] == [sample.token_ids for sample in together[:4]]


def test_scores_are_those_of_a_forward_pass(engine, model, tokenizer):
    sequences = prompts(tokenizer)
    for sequence, found in zip(sequences, engine.score(sequences), strict=True):
        assert found == pytest.approx(naive_logps(model, sequence[:1], sequence[1:]), abs=1e-4)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda engine: engine.score([(5, 6), (5,) * engine.max_model_len]), "sequence 1 has .* tokens"),
        (lambda engine: engine.score([(5, 6), ()]), "sequence 1 has 0 tokens"),
        (lambda engine: engine.score([(5, 6), (5, 10**6)]), "1000000 is out of vocabulary"),
        (
            lambda engine: engine.generate([Request((5,), 0), Request((10**6,), 0)], SamplingParams(4)),
            "1000000 is out of vocabulary",
        ),
        (lambda engine: engine.generate([Request((5,), 0)], SamplingParams(4, 2.5)), "temperature must be in"),
    ],
)
def test_what_vllm_refuses_is_one_line_and_leaves_nothing_behind(engine, ask, message):
    with pytest.raises(UserError, match=message) as error:
        ask(engine)
    assert "\n" not in str(error.value)
    assert len(engine.generate([Request((5, 6), 0)], SamplingParams(4))) == 1


def test_torchs_random_state_is_left_alone(engine, tokenizer):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    engine.generate([Request(prompts(tokenizer)[0], 9)], SamplingParams(5))
    assert torch.equal(torch.rand(2), expected)


def test_samples_come_as_they_finish_and_the_rest_can_be_dropped(engine, tokenizer):
    (prompt, *_) = prompts(tokenizer)
    params = SamplingParams(100, 0.0, ignore_end=True)
    stream = engine.stream([Request(prompt, 0), Request(prompt, 0, max_tokens=2)], params)
    number, sample = next(stream)
    assert (number, len(sample.token_ids), sample.finish_reason) == (1, 2, "length")
    stream.close()
    assert len(engine.generate([Request(prompt, 0, max_tokens=3)], params)[0].token_ids) == 3


def test_where_samples_end(engine, model, tokenizer):
    (prompt, *_) = prompts(tokenizer)
    free = engine.generate([Request(prompt, 4)], SamplingParams(60, 1.3, ignore_end=True))[0]
    stop = free.token_ids[7]
    first = free.token_ids.index(stop)
    params = SamplingParams(60, 1.3, ignore_end=True, stop_ids=(stop,))
    (sample,) = engine.generate([Request(prompt, 4)], params)
    assert (sample.token_ids, sample.finish_reason, sample.stop_reason) == (free.token_ids[: first + 1], "stop", stop)

    text = tokenizer.decode(free.token_ids)
    word = text[len(text) // 2 :][:3]
    (sample,) = engine.generate([Request(prompt, 4)], SamplingParams(60, 1.3, ignore_end=True, stop=(word,)))
    assert (sample.finish_reason, sample.stop_reason) == ("stop", word)
    assert sample.token_ids == free.token_ids[: len(sample.token_ids)]
    assert word in tokenizer.decode(sample.token_ids)
    assert word not in tokenizer.decode(sample.token_ids[:-1])


def test_the_models_end_token_ends_a_sample_without_a_reason(engine, tokenizer):
    requests = [Request(prompt, seed) for prompt in prompts(tokenizer) for seed in range(20)]
    samples = engine.generate(requests, SamplingParams(60, 2.0))
    ended = [sample for sample in samples if sample.finish_reason == "stop"]
    assert ended
    assert all(sample.token_ids[-1] == tokenizer.eos_token_id for sample in ended)
    assert all(sample.stop_reason is None for sample in samples)


def test_repetition_ends_a_sample(engine, tokenizer):
    guard = RepetitionGuard(max_pattern=2, count=2)
    params = SamplingParams(100, 1.0, top_k=2, ignore_end=True)
    requests = [Request(prompt, seed) for prompt in prompts(tokenizer) for seed in range(4)]
    guarded = engine.generate(requests, replace(params, repetition_guard=guard))
    fired = 0
    for free, sample in zip(engine.generate(requests, params), guarded, strict=True):
        lengths = [length for length in range(1, 100) if guard.fires(free.token_ids[:length])]
        fired += bool(lengths)
        end = lengths[0] if lengths else 100
        assert (sample.token_ids, sample.finish_reason) == (free.token_ids[:end], "repetition" if lengths else "length")
    assert fired


def test_the_window_is_a_limit(engine, tokenizer):
    assert engine.max_model_len == WINDOW
    nearly = tuple([7] * (WINDOW - 3))
    (sample,) = engine.generate([Request(nearly, 1)], SamplingParams(50, 0.5, ignore_end=True))
    assert (len(sample.token_ids), sample.finish_reason) == (3, "length")
    with pytest.raises(UserError, match=rf"request 1 \(math, 7\): a prompt of {WINDOW} tokens.*window of {WINDOW}"):
        engine.generate([Request((1,), 0), Request((7,) * WINDOW, 0, key=("math", 7))], SamplingParams(5))


def test_adapters_are_merged_into_what_it_samples_from(engine, checkpoint, model, tokenizer):
    from gift.lora import add_adapters, merged_state

    adapted = load_model(checkpoint)
    add_adapters(adapted, LoRA(rank=4, alpha=8.0), seed=0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    merged = load_model(checkpoint)
    merged.load_state_dict(merged_state(adapted, adapted.state_dict()))
    try:
        engine.update_weights(adapted)
        assert_greedy_agrees(engine, merged, prompts(tokenizer))
    finally:
        engine.update_weights(model)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_new_weights_are_sampled_from_next(tmp_path, tokenizer, kind, tied):
    old = servable_checkpoint(tmp_path / "old", tokenizer, kind=kind, tied=tied)
    engine = VLLMEngine(old, SETTINGS, dtype="float32")
    try:
        asked = prompts(tokenizer)
        assert_greedy_agrees(engine, load_model(old), asked)
        for seed in (1, 2):
            new = load_model(servable_checkpoint(tmp_path / str(seed), tokenizer, seed=seed, kind=kind, tied=tied))
            engine.update_weights(new)
            assert_greedy_agrees(engine, new, asked)
    finally:
        engine.close()


@pytest.mark.usefixtures("alone")
def test_the_checkpoints_own_precision_is_kept(checkpoint, model, tokenizer):
    sequence = prompts(tokenizer)[-1]
    engine = VLLMEngine(checkpoint, SETTINGS)
    try:
        (found,) = engine.score([sequence])
    finally:
        engine.close()
    assert found == pytest.approx(naive_logps(model, sequence[:1], sequence[1:]), abs=1e-4)


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_that_cannot_be_served(tmp_path, checkpoint, tokenizer):
    with pytest.raises(UserError, match="no such checkpoint folder"):
        VLLMEngine(tmp_path / "none", SETTINGS)
    strange = servable_checkpoint(tmp_path / "strange", tokenizer)
    config = strange / "config.json"
    config.write_text(
        config.read_text().replace("Qwen2ForCausalLM", "NobodyForCausalLM").replace('"qwen2"', '"nobody"')
    )
    with pytest.raises(UserError, match=r"strange: .*nobody"):
        VLLMEngine(strange, SETTINGS)


@pytest.mark.usefixtures("alone")
def test_heads_that_vllm_has_no_kernel_for(tmp_path, tokenizer):
    narrow = servable_checkpoint(tmp_path / "narrow", tokenizer, hidden_size=96)
    with pytest.raises(UserError, match=r"narrow: vLLM cannot serve this checkpoint: .*head_dim=24"):
        VLLMEngine(narrow, SETTINGS)


@pytest.mark.usefixtures("alone")
def test_a_cache_without_room_for_a_sample(tmp_path, checkpoint):
    with pytest.raises(GenerationError, match=r"not enough .* memory.*; raise generation.cache_gb \(now 1e-06\)"):
        VLLMEngine(checkpoint, Generation(engine="vllm", cache_gb=1e-6), dtype="float32")


@pytest.mark.usefixtures("alone")
@pytest.mark.slow
def test_a_model_split_between_processes_and_one_that_dies(checkpoint, model, tokenizer):
    asked = prompts(tokenizer)
    others = set(psutil.Process().children(recursive=True))  # a server that other tests share, for one
    engine = VLLMEngine(checkpoint, replace(SETTINGS, tensor_parallel=2), dtype="float32")
    try:
        assert_greedy_agrees(engine, model, asked)
        stream = engine.stream([Request(prompt, 0) for prompt in asked], SamplingParams(100, 0.0, ignore_end=True))
        children = set(psutil.Process().children(recursive=True)) - others
        workers = [child for child in children if "Worker" in child.name()]
        assert len(workers) == 2
        workers[1].kill()
        with pytest.raises(GenerationError, match="vLLM stopped in the middle of its work"):
            list(stream)
    finally:
        engine.close()


@pytest.mark.usefixtures("alone")
def test_prompts_beyond_a_step_and_a_cache_beyond_its_room_change_no_sample(tmp_path, tokenizer):
    """6,000 tokens of prompts exceed what vLLM prefills at once, and their cache what it has: samples are preempted."""
    large = servable_checkpoint(tmp_path / "large", tokenizer, max_position_embeddings=1024)
    prompt = prompts(tokenizer)[0] * 100
    requests = [Request(prompt[seed : seed + 300], seed) for seed in range(20)]
    params = SamplingParams(200, 1.0, ignore_end=True)
    found = []
    for cache_gb in (0.05, 0.004):
        engine = VLLMEngine(large, replace(SETTINGS, cache_gb=cache_gb, max_rows=20), dtype="float32")
        try:
            found.append([sample.token_ids for sample in engine.generate(requests, params)])
        finally:
            engine.close()
    assert found[0] == found[1]


@pytest.mark.usefixtures("alone")
def test_chunked_prefill_is_refused_on_a_cpu(checkpoint):
    with pytest.raises(UserError, match=r"generation\.chunked_prefill: .* on a CPU"):
        VLLMEngine(checkpoint, replace(SETTINGS, chunked_prefill=True))


@pytest.mark.usefixtures("alone")
def test_a_smaller_cache_makes_a_smaller_window(tmp_path, tokenizer):
    large = servable_checkpoint(tmp_path / "large", tokenizer, max_position_embeddings=1024)
    per_token = 2 * 2 * 2 * 32 * 4  # keys and values, layers, heads, width, bytes
    engine = VLLMEngine(large, Generation(engine="vllm", cache_gb=600 * per_token / 1e9), dtype="float32")
    try:
        assert 256 <= engine.max_model_len <= 600
        assert engine.model_window == 1024
        (sample,) = engine.generate([Request((5, 6), 0)], SamplingParams(engine.max_model_len - 2, ignore_end=True))
        assert len(sample.token_ids) == engine.max_model_len - 2
        with pytest.raises(UserError, match=r"request 0: .* would cut the response .* raise generation\.cache_gb"):
            engine.generate([Request((5, 6), 0)], SamplingParams(900))
    finally:
        engine.close()


def test_one_engine_at_a_time(engine, checkpoint, tokenizer):
    with pytest.raises(UserError, match="one engine at a time in a process"):
        VLLMEngine(checkpoint, SETTINGS)
    assert engine.generate([Request(prompts(tokenizer)[0], 0)], SamplingParams(2))


@pytest.mark.usefixtures("alone")
def test_a_closed_engine_says_so(checkpoint):
    engine = VLLMEngine(checkpoint, SETTINGS)
    engine.close()
    engine.close()
    with pytest.raises(GenerationError, match="closed"):
        engine.generate([Request((5,), 0)], SamplingParams(2))
