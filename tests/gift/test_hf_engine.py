"""The sampling loop against transformers' own `generate`, full forward passes and naive searches for ends."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_generation import greedy, naive_logps
from tiny_models import KINDS, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM

from gift.cli import UserError
from gift.generation import GenerationError, RepetitionGuard, Request, SamplingParams, completion_text
from gift.generation import loop as loop_module
from gift.generation.ends import Repetitions, StopStrings
from gift.generation.hf import HFEngine
from gift.generation.loop import Loop
from gift.generation.store import prompt_batches
from gift.lora import add_adapters
from gift.models import load_model, load_tokenizer
from gift.recipe import LoRA

VOCAB, END, WINDOW = 61, 60, 128
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4  # keys and values, layers, key/value heads, width, float32


def make_model(kind: str, seed: int = 0, **settings):
    settings = {"max_position_embeddings": WINDOW, "initializer_range": 0.3, "eos_token_id": END, **settings}
    return tiny_model(VOCAB, kind, seed, **settings)


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return make_model(request.param)


def prompts(lengths=(5, 1, 17, 5, 9), seed=0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(END, (length,), generator=generator).tolist()) for length in lengths]


# ---------------------------------------------------------------------------------------------------------------------
# Against transformers


@pytest.mark.parametrize(
    "options", [{}, {"max_rows": 1}, {"max_rows": 3}, {"cache_gb": 200 * TOKEN_BYTES / 1e9}, {"cache_gb": 1e-9}]
)
def test_greedy_is_token_for_token_that_of_transformers(model, options):
    for seed in range(2):
        asked = [*prompts(seed=seed), *prompts((2, 30, 11), seed=seed + 9)]
        requests = [
            Request(prompt, 0, limit) for prompt, limit in zip(asked, (70, 3, 70, 40, 20, 70, 1, 60), strict=True)
        ]
        found = HFEngine(model, **options).generate(requests, SamplingParams(70, 0.0, logps=True))
        for request, sample in zip(requests, found, strict=True):
            expected = greedy(model, request.prompt_ids, request.max_tokens)
            assert sample.token_ids == expected
            assert sample.finish_reason == ("stop" if expected[-1] == END else "length")
            assert sample.logps == pytest.approx(naive_logps(model, request.prompt_ids, expected), abs=1e-4)


@pytest.mark.parametrize(
    "other",
    [
        GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=END)),
        GraniteForCausalLM(
            GraniteConfig(
                vocab_size=VOCAB,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=1,
                attention_multiplier=0.3,
                logits_scaling=0.1,
                eos_token_id=END,
            )
        ),
    ],
    ids=["learned positions, no groups", "scaled attention and logits"],
)
def test_other_architectures_agree_too(other):
    other = other.eval()
    requests = [Request(prompt, 0) for prompt in prompts()]
    for request, sample in zip(requests, HFEngine(other).generate(requests, SamplingParams(30, 0.0)), strict=True):
        assert sample.token_ids == greedy(other, request.prompt_ids, 30)
    scores = HFEngine(other).score(prompts())
    assert scores[2] == pytest.approx(naive_logps(other, prompts()[2][:1], prompts()[2][1:]), abs=1e-4)


def test_a_model_that_does_not_let_its_attention_be_chosen_is_served_by_its_own(monkeypatch):
    model = make_model("llama")
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    monkeypatch.setattr("gift.generation.store.GROUPED", "not to be chosen")
    for prompt, sample in zip(
        prompts(), HFEngine(model).generate([Request(p, 0) for p in prompts()], SamplingParams(20, 0.0)), strict=True
    ):
        assert sample.token_ids == greedy(model, prompt, 20)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logps_are_those_of_a_full_forward_pass(model, temperature):
    requests = [Request(prompt, seed) for seed in range(4) for prompt in prompts()]
    params = SamplingParams(40, temperature, logps=True)
    for request, sample in zip(requests, HFEngine(model).generate(requests, params), strict=True):
        expected = naive_logps(model, request.prompt_ids, sample.token_ids, temperature)
        assert sample.logps == pytest.approx(expected, abs=1e-4)


def test_logps_come_only_where_they_are_asked_for(model):
    (sample,) = HFEngine(model).generate([Request((1, 2), 0)], SamplingParams(5))
    assert sample.token_ids
    assert sample.logps == []


def test_scores_are_those_of_full_forward_passes(model, monkeypatch):
    monkeypatch.setattr("gift.generation.hf.SCORE_TOKENS", 40)  # several batches
    sequences = [*prompts((17, 1, 40, 2, WINDOW, 40)), prompts((17,))[0]]
    scores = HFEngine(model).score(sequences)
    for sequence, found in zip(sequences, scores, strict=True):
        assert found == pytest.approx(naive_logps(model, sequence[:1], sequence[1:]), abs=1e-4)
    for wrong in ((), (1,) * (WINDOW + 1)):
        with pytest.raises(UserError, match=f"sequence 1 has {len(wrong)} tokens; the model's window is {WINDOW}"):
            HFEngine(model).score([(1, 2), wrong])


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def test_a_sample_depends_on_its_request_alone(model):
    requests = [Request(prompt, seed, limit) for prompt in prompts() for seed, limit in ((1, None), (2, None), (3, 7))]
    params = SamplingParams(75, 0.8, 0.95)  # more steps than uniforms are drawn at a time
    expected = HFEngine(model).generate(requests, params)
    assert len({tuple(sample.token_ids) for sample in expected}) == len({(r.prompt_ids, r.seed) for r in requests})
    for options, order in (({"max_rows": 1}, 1), ({"max_rows": 4}, -1), ({}, -1), ({"cache_gb": 1e-4}, 1)):
        found = HFEngine(model, **options).generate(requests[::order], params)[::order]
        assert [sample.token_ids for sample in found] == [sample.token_ids for sample in expected]
        assert [sample.finish_reason for sample in found] == [sample.finish_reason for sample in expected]


def test_the_same_call_gives_the_same_bits(model):
    requests, params = [Request(p, seed) for p in prompts() for seed in range(5)], SamplingParams(40, logps=True)
    engine = HFEngine(model, max_rows=6)
    assert list(engine.stream(requests, params)) == list(engine.stream(requests, params))


def test_no_requests_no_samples(model):
    assert HFEngine(model).generate([], SamplingParams(5)) == []
    assert HFEngine(model).score([]) == []


def test_samples_come_as_they_end(model):
    requests = [Request(prompt, 0, limit) for prompt, limit in zip(prompts(), (40, 3, 20, 1, 3), strict=True)]
    params = SamplingParams(50, ignore_end=True)
    assert [number for number, _ in HFEngine(model).stream(requests, params)] == [3, 1, 4, 2, 0]


@pytest.fixture
def watched(monkeypatch):
    """What every step of a loop has in its batch and store, and every prompt that is prefilled."""
    steps, prefilled = [], []
    step, prefill = Loop.step, loop_module.prefill

    def watched_step(self):
        found = step(self)
        stored = sum(slab.nbytes for layer in self.store.slabs for slab in layer)
        steps.append((len(self.live) + len(found), stored))
        return found

    def watched_prefill(model, asked):
        prefilled.extend(asked)
        return prefill(model, asked)

    monkeypatch.setattr(Loop, "step", watched_step)
    monkeypatch.setattr(loop_module, "prefill", watched_prefill)
    return steps, prefilled


@pytest.mark.parametrize("rows", [1, 3, 512])
def test_a_prompt_is_prefilled_once_for_all_its_samples(watched, rows):
    distinct = prompts((5, 5, 9, 30))
    requests = [Request(prompt, seed) for seed in range(7) for prompt in distinct]
    HFEngine(make_model("qwen2"), max_rows=rows).generate(requests, SamplingParams(9))
    _, prefilled = watched
    assert sorted(prefilled) == sorted([(0,), *distinct])  # the first measures what a token takes


def test_rows_and_memory_stay_within_their_bounds(watched):
    steps, _ = watched
    requests = [Request(p, seed, 10 + 5 * seed) for p in prompts((3, 60, 8, 20)) for seed in range(12)]
    params = SamplingParams(99, ignore_end=True)
    tokens = 1500
    engine = HFEngine(make_model("qwen2"), cache_gb=tokens * TOKEN_BYTES / 1e9, max_rows=16)
    samples = engine.generate(requests, params)
    assert [len(sample.token_ids) for sample in samples] == [request.max_tokens for request in requests]
    assert max(rows for rows, _ in steps) == 16
    assert max(stored for _, stored in steps) <= tokens * TOKEN_BYTES
    assert sum(rows for rows, _ in steps) / len(steps) > 6  # rows that leave make room for others


def test_a_sample_too_large_for_the_memory_allowed_runs_alone(watched):
    steps, _ = watched
    engine = HFEngine(make_model("qwen2"), cache_gb=1e-9)
    engine.generate([Request(prompt, 0) for prompt in prompts()], SamplingParams(5, ignore_end=True))
    assert {rows for rows, _ in steps} == {1}


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100), st.integers(0, 30))
def test_batches_of_prompts_are_bounded(lengths, tokens, padding):
    asked = [(0,) * length for length in sorted(lengths)]
    batches = list(prompt_batches(asked, tokens, padding))
    assert [prompt for batch in batches for prompt in batch] == asked
    for batch in batches:
        whole = len(batch) * max(map(len, batch))
        assert len(batch) == 1 or (whole <= tokens and whole - sum(map(len, batch)) <= padding)


# ---------------------------------------------------------------------------------------------------------------------
# The model it works with


def state_of(model) -> tuple[bool, str, bool]:
    return model.training, model.config._attn_implementation, torch.is_inference_mode_enabled()


def test_the_model_is_as_it_was_whenever_the_caller_has_a_sample():
    model = make_model("qwen2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    requests = [Request(prompt, 0) for prompt in prompts()]
    stream = HFEngine(model).stream(requests, SamplingParams(30))
    for _ in range(2):
        next(stream)
        assert state_of(model) == (True, "sdpa", False)
        model(torch.tensor([[1, 2, 3]])).logits.sum().backward()  # the owner trains on
    stream.close()
    assert state_of(model) == (True, "sdpa", False)
    list(HFEngine(model).stream(requests, SamplingParams(3)))
    assert state_of(model) == (True, "sdpa", False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_memory_that_runs_out_is_one_line(error, monkeypatch):
    model = make_model("qwen2").train()
    requests = [Request((1, 2), 0, 2), Request((3,), 0, 20)]
    stream = HFEngine(model).stream(requests, SamplingParams(20, ignore_end=True))
    assert next(stream)[0] == 0

    def fail(*_):
        raise error

    monkeypatch.setattr(loop_module, "draw", fail)
    with pytest.raises(GenerationError, match=r"^out of memory.*generation\.cache_gb or generation\.max_rows$"):
        next(stream)
    assert state_of(model) == (True, "sdpa", False)
    with pytest.raises(GenerationError, match=r"^out of memory"):
        HFEngine(model).generate(requests, SamplingParams(2))


def test_other_errors_pass(monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(loop_module, "draw", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        HFEngine(make_model("qwen2")).generate([Request((1,), 0)], SamplingParams(2))


def test_damaged_weights_are_an_error():
    model = make_model("qwen2")
    model.get_output_embeddings().weight.data[3] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(GenerationError, match="logits are not finite"):
            HFEngine(model).generate([Request((1, 2), 0)], SamplingParams(3, temperature))


def test_new_weights_are_sampled_from_next():
    old, new = make_model("qwen2", 0), make_model("qwen2", 1)
    requests, params = [Request(prompt, 0) for prompt in prompts()], SamplingParams(20)
    expected = HFEngine(new).generate(requests, params)
    engine = HFEngine(old)
    assert engine.generate(requests, params) != expected
    engine.update_weights(new)
    assert engine.generate(requests, params) == expected


def test_a_model_that_changes_in_place_needs_no_update():
    model = make_model("qwen2", 0)
    engine = HFEngine(model)
    model.load_state_dict(make_model("qwen2", 1).state_dict())
    engine.update_weights(model)
    assert engine.generate([Request((1, 2), 0)], SamplingParams(20, 0.0))[0].token_ids == greedy(model, (1, 2), 20)


def test_adapters_of_new_weights_are_merged():
    plain = make_model("qwen2")
    adapted = copy.deepcopy(plain)
    add_adapters(adapted, LoRA(rank=4), seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    engine = HFEngine(plain)
    engine.update_weights(adapted)
    for prompt in prompts():
        (sample,) = engine.generate([Request(prompt, 0)], SamplingParams(20, 0.0))
        assert sample.token_ids == greedy(adapted, prompt, 20)


def test_weights_of_another_shape_are_refused():
    with pytest.raises(UserError, match="do not fit the engine's model"):
        HFEngine(make_model("qwen2")).update_weights(make_model("qwen2", intermediate_size=32))


def test_attention_it_would_get_wrong_is_refused():
    with pytest.raises(UserError, match="qwen2: the hf engine handles full attention only"):
        HFEngine(make_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0))
    with pytest.raises(UserError, match="needs attention 'sdpa'"):
        HFEngine(make_model("llama", attn_implementation="eager"))


def test_rotations_that_depend_on_the_batch_are_refused():
    factors = {"short_factor": [1.0] * 4, "long_factor": [6.0] * 4, "original_max_position_embeddings": 16}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    with pytest.raises(UserError, match=r"qwen2: the hf engine cannot serve LongRoPE, .* more than 16 tokens"):
        HFEngine(make_model("qwen2", rope_parameters=rope))
    HFEngine(make_model("qwen2", rope_parameters=rope, max_position_embeddings=16))


# ---------------------------------------------------------------------------------------------------------------------
# Where samples end


def test_a_sample_ends_at_its_first_end_token_or_its_limit(model):
    requests = [Request(prompt, seed, limit) for prompt in prompts() for seed, limit in enumerate((None, 1, 3, 999))]
    samples = HFEngine(model).generate(requests, SamplingParams(30, 1.5))
    reasons = set()
    for request, sample in zip(requests, samples, strict=True):
        limit = min(request.max_tokens or 30, 30)
        reasons.add(sample.finish_reason)
        assert END not in sample.token_ids[:-1]
        assert len(sample.token_ids) <= limit
        if sample.finish_reason == "stop":
            assert sample.token_ids[-1] == END
        else:
            assert len(sample.token_ids) == limit
            assert sample.token_ids[-1] != END
        assert sample.stop_reason is None
    assert reasons == {"stop", "length"}


def free_run(model, tokens=60, **settings) -> tuple[Request, SamplingParams, list[int]]:
    """A request, its parameters, and the tokens of its response if nothing ends it."""
    request, params = Request((1, 2), seed=5), SamplingParams(tokens, 2.0, ignore_end=True, **settings)
    (sample,) = HFEngine(model).generate([request], params)
    assert len(sample.token_ids) == tokens
    return request, params, sample.token_ids


@pytest.mark.parametrize("kind", KINDS)
def test_any_of_several_end_tokens_ends(kind):
    request, params, free = free_run(make_model(kind))
    ends = [free[9], free[6]]
    first = min(free.index(end) for end in ends)
    engine = HFEngine(make_model(kind, eos_token_id=ends))
    (sample,) = engine.generate([request], replace(params, ignore_end=False))
    assert (sample.token_ids, sample.finish_reason, sample.stop_reason) == (free[: first + 1], "stop", None)
    (sample,) = engine.generate([request], params)
    assert (sample.token_ids, sample.finish_reason) == (free, "length")


def test_a_stop_token_is_the_reason_and_part_of_the_response(model):
    request, params, free = free_run(model)
    stop = free[7]
    end = free.index(stop) + 1
    (sample,) = HFEngine(model).generate([request], replace(params, stop_ids=(free[30], stop)))
    assert end <= 8
    assert (sample.token_ids, sample.finish_reason, sample.stop_reason) == (free[:end], "stop", stop)


def test_the_window_is_a_limit(model):
    full, nearly, short = prompts((WINDOW, WINDOW - 3, 2))
    params = SamplingParams(1000, 0.3, logps=True)
    samples = HFEngine(model).generate([Request(nearly, 1), Request(short, 2)], params)
    for prompt, sample in zip((nearly, short), samples, strict=True):
        assert sample.finish_reason == "stop" or len(prompt) + len(sample.token_ids) == WINDOW
        assert sample.logps == pytest.approx(naive_logps(model, prompt, sample.token_ids, 0.3), abs=1e-3)
    for prompt in (full, ()):
        with pytest.raises(UserError, match=f"request 1: a prompt of {len(prompt)} tokens.*window of {WINDOW}"):
            HFEngine(model).generate([Request((1,), 0), Request(prompt, 0)], SamplingParams(5))


@pytest.fixture(scope="module")
def speaker(tiny_checkpoint):
    """A model, and a tokenizer of its vocabulary."""
    return load_model(tiny_checkpoint), load_tokenizer(tiny_checkpoint)


def naive_stop(tokenizer, ids: list[int], strings) -> tuple[int, str] | None:
    """How many tokens it takes until the text contains one of the strings, and which one ends first in it."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if found := [string for string in strings if string in text]:
            return count, min(found, key=lambda string: text.index(string) + len(string))
    return None


def test_stop_strings_end_a_response_wherever_tokens_divide_them(speaker):
    model, tokenizer = speaker
    engine, params = HFEngine(model, tokenizer), SamplingParams(40, 1.0, ignore_end=True)
    requests = [Request(prompt, seed) for seed in range(3) for prompt in prompts()]
    free = [sample.token_ids for sample in engine.generate(requests, params)]
    parts = [tokenizer.decode(ids[start : start + 3]) for ids in free for start in range(5, 30)]
    parts = [part for part in parts if "\ufffd" not in part and len(part) > 4]
    divided = 0
    for part in parts[:: len(parts) // 10]:
        strings = (part[1:-1], "no such text", part[2:])
        for ids, sample in zip(free, engine.generate(requests, replace(params, stop=strings)), strict=True):
            expected = naive_stop(tokenizer, ids, strings)
            if expected is None:
                assert (sample.token_ids, sample.finish_reason, sample.stop_reason) == (ids, "length", None)
                continue
            count, string = expected
            assert (sample.token_ids, sample.finish_reason) == (ids[:count], "stop")
            assert sample.stop_reason == string
            assert string not in completion_text(tokenizer, sample)
            divided += string not in tokenizer.decode(ids[count - 1 : count])
    assert divided >= 10


def test_stop_strings_need_a_tokenizer(speaker):
    with pytest.raises(UserError, match="stop strings need the model's tokenizer"):
        HFEngine(speaker[0]).generate([Request((1,), 0)], SamplingParams(3, stop=("\n",)))


@settings(max_examples=50)
@given(text=st.text(min_size=1, max_size=40), at=st.integers(0, 39), size=st.integers(1, 8))
def test_a_string_is_found_with_the_token_that_completes_it(speaker, text, at, size):
    _, tokenizer = speaker
    string = text[at % len(text) :][:size]
    ids = tokenizer.encode(text, add_special_tokens=False)
    stops = StopStrings(tokenizer, [string])
    expected = naive_stop(tokenizer, ids, [string])
    found = next((count for count in range(1, len(ids) + 1) if stops.find([ids[:count]]) == [string]), None)
    assert found == (expected and expected[0])


@given(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), max_size=40), st.integers(1, 4), st.integers(2, 4))
def test_rows_are_guarded_as_each_would_be_alone(steps, max_pattern, count):
    guard = RepetitionGuard(max_pattern, count)
    batch = Repetitions(guard)
    batch.add(1)
    batch.add(2)
    for step, tokens in enumerate(steps, 1):
        assert batch.step(0, tokens) == [guard.fires([row[number] for row in steps[:step]]) for number in range(3)]


def test_a_response_that_repeats_itself_ends():
    model = make_model("qwen2")
    guard = RepetitionGuard(max_pattern=8, count=3)
    requests = [Request(prompt, 0) for prompt in [*prompts(), *prompts(seed=3), *prompts(seed=4)]]
    params = SamplingParams(100, 0.0, ignore_end=True)
    free = [sample.token_ids for sample in HFEngine(model).generate(requests, params)]
    cut = [next((n for n in range(1, 101) if guard.fires(ids[:n])), None) for ids in free]
    assert sum(n is not None for n in cut) >= 3
    for rows in (2, 512):
        samples = HFEngine(model, max_rows=rows).generate(requests, replace(params, repetition_guard=guard))
        for ids, n, sample in zip(free, cut, samples, strict=True):
            assert sample.token_ids == ids[:n]
            assert sample.finish_reason == ("length" if n in (None, 100) else "repetition")
            assert sample.stop_reason is None


def test_which_reason_goes_first(speaker):
    model, tokenizer = speaker
    request, params = Request((5, 6), 0), SamplingParams(9, 1.0, ignore_end=True)
    (free,) = HFEngine(model, tokenizer).generate([request], params)
    first = free.token_ids[0]
    text = tokenizer.decode([first])
    assert text
    assert "\ufffd" not in text
    guard = RepetitionGuard(1, 2)
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = [first]
    engine = HFEngine(model, tokenizer)
    everything = SamplingParams(1, 1.0, stop_ids=(first,), stop=(text,), repetition_guard=guard)
    for params, expected in (
        (everything, ("stop", None)),
        (replace(everything, ignore_end=True), ("stop", first)),
        (replace(everything, ignore_end=True, stop_ids=()), ("stop", text)),
        (replace(everything, ignore_end=True, stop_ids=(), stop=()), ("length", None)),
    ):
        (sample,) = engine.generate([request], params)
        assert (sample.token_ids, sample.finish_reason, sample.stop_reason) == ([first], *expected)
