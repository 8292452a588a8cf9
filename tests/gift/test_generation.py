"""The sampling loop against transformers' own `generate`, full forward passes and the distributions it should draw."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from tiny_models import KINDS, tiny_model

from gift.cli import UserError
from gift.generation import Request, Sample, SamplingParams, build_engine, completion_text, sample_seed
from gift.generation.hf import HFEngine, draw, nucleus
from gift.models import load_tokenizer

VOCAB, END, WINDOW = 61, 60, 128


def make_model(kind: str, seed: int = 0, **settings):
    settings = {"max_position_embeddings": WINDOW, "initializer_range": 0.3, "eos_token_id": END, **settings}
    return tiny_model(VOCAB, kind, seed, **settings)


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return make_model(request.param)


def prompts(lengths=(5, 1, 17, 5, 9), seed=0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(END, (length,), generator=generator).tolist()) for length in lengths]


@torch.no_grad()
def naive_logps(model, prompt, completion, temperature) -> list[float]:
    """Log-probabilities of a completion by one unpadded forward pass over the whole sequence."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0].double()
    logps = (logits / temperature).log_softmax(-1)
    return [logps[len(prompt) - 1 + step, token].item() for step, token in enumerate(completion)]


# ---------------------------------------------------------------------------------------------------------------------
# Against transformers


def test_greedy_is_token_for_token_that_of_transformers(model):
    for seed in range(3):
        asked = prompts(seed=seed)
        found = HFEngine(model).generate([Request(prompt, 0) for prompt in asked], SamplingParams(70, 0.0))
        for prompt, sample in zip(asked, found, strict=True):
            ids = torch.tensor([prompt])
            expected = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=70, pad_token_id=END
            )[0, len(prompt) :].tolist()
            assert sample.token_ids == expected
            assert sample.finish_reason == ("stop" if expected[-1] == END else "length")
            assert sample.logps == pytest.approx(naive_logps(model, prompt, expected, 1.0), abs=1e-4)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logps_are_those_of_a_full_forward_pass(model, temperature):
    requests = [Request(prompt, seed) for seed in range(4) for prompt in prompts()]
    for request, sample in zip(
        requests, HFEngine(model).generate(requests, SamplingParams(40, temperature)), strict=True
    ):
        expected = naive_logps(model, request.prompt_ids, sample.token_ids, temperature)
        assert sample.logps == pytest.approx(expected, abs=1e-4)


def test_a_sample_depends_on_its_request_alone(model):
    requests = [Request(prompt, seed, limit) for prompt in prompts() for seed, limit in ((1, None), (2, None), (3, 7))]
    params = SamplingParams(75, 0.8, 0.95)  # more steps than uniforms are drawn at a time
    expected = HFEngine(model).generate(requests, params)
    assert len({tuple(sample.token_ids) for sample in expected}) == len({(r.prompt_ids, r.seed) for r in requests})
    for rows, order in ((1, 1), (4, -1), (512, -1)):
        found = HFEngine(model, max_rows=rows).generate(requests[::order], params)[::order]
        assert [sample.token_ids for sample in found] == [sample.token_ids for sample in expected]
        assert [sample.finish_reason for sample in found] == [sample.finish_reason for sample in expected]


def test_no_requests_no_samples(model):
    assert HFEngine(model).generate([], SamplingParams(5)) == []


def test_sampling_leaves_the_model_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    try:
        HFEngine(model).generate([Request((1,), 0)], SamplingParams(3))
        assert model.training
    finally:
        model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_new_weights_are_sampled_from_next():
    old, new = make_model("qwen2", 0), make_model("qwen2", 1)
    requests, params = [Request(prompt, 0) for prompt in prompts()], SamplingParams(20)
    expected = HFEngine(new).generate(requests, params)
    engine = HFEngine(old)
    assert engine.generate(requests, params) != expected
    engine.update_weights(new)
    assert engine.generate(requests, params) == expected


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
        assert len(sample.logps) == len(sample.token_ids) <= limit
        if sample.finish_reason == "stop":
            assert sample.token_ids[-1] == END
        else:
            assert len(sample.token_ids) == limit
            assert sample.token_ids[-1] != END
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("kind", KINDS)
def test_any_of_several_end_tokens_ends(kind):
    request, params = Request((1, 2), seed=5), SamplingParams(30, 2.0)
    (free,) = HFEngine(make_model(kind, eos_token_id=None)).generate([request], params)
    assert (len(free.token_ids), free.finish_reason) == (30, "length")
    ends = [free.token_ids[9], free.token_ids[6]]
    first = min(free.token_ids.index(end) for end in ends)
    (sample,) = HFEngine(make_model(kind, eos_token_id=ends)).generate([request], params)
    assert (sample.token_ids, sample.finish_reason) == (free.token_ids[: first + 1], "stop")


def test_the_window_is_a_limit(model):
    full, nearly, short = prompts((WINDOW, WINDOW - 3, 2))
    samples = HFEngine(model).generate([Request(nearly, 1), Request(short, 2)], SamplingParams(1000, 0.3))
    for prompt, sample in zip((nearly, short), samples, strict=True):
        assert sample.finish_reason == "stop" or len(prompt) + len(sample.token_ids) == WINDOW
        assert sample.logps == pytest.approx(naive_logps(model, prompt, sample.token_ids, 0.3), abs=1e-3)
    for prompt in (full, ()):
        with pytest.raises(UserError, match=f"request 1: a prompt of {len(prompt)} tokens.*window of {WINDOW}"):
            HFEngine(model).generate([Request((1,), 0), Request(prompt, 0)], SamplingParams(5))


@pytest.mark.parametrize(
    "settings", [{"max_tokens": 0}, {"temperature": -0.1}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_meaningless_parameters_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        SamplingParams(**{"max_tokens": 1, **settings})


def test_a_request_for_no_token_is_refused(model):
    with pytest.raises(UserError, match="request 0: max_tokens is 0"):
        HFEngine(model).generate([Request((1,), 0, 0)], SamplingParams(5))


def test_attention_it_would_get_wrong_is_refused():
    with pytest.raises(UserError, match="qwen2: the hf engine handles full attention only"):
        HFEngine(make_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0))
    with pytest.raises(UserError, match="needs attention 'sdpa'"):
        HFEngine(make_model("llama", attn_implementation="eager"))


# ---------------------------------------------------------------------------------------------------------------------
# The distribution drawn from


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.8)])
def test_frequencies_fit_the_distribution(temperature, top_p):
    count, generator = 40_000, torch.Generator().manual_seed(3)
    logits = 1.5 * torch.randn(12, generator=generator)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    tokens, logps = draw(logits.expand(count, -1), uniform, SamplingParams(1, temperature, top_p))
    p = (logits.double() / temperature).softmax(-1).tolist()
    kept = naive_nucleus(p, top_p)
    p = [value * (token in kept) / sum(p[other] for other in kept) for token, value in enumerate(p)]
    observed = torch.bincount(tokens, minlength=12).tolist()
    assert all(observed[token] == 0 for token in range(12) if token not in kept)
    assert chisquare([observed[token] for token in kept], [count * p[token] for token in kept]).pvalue > 0.01
    assert logps.tolist() == pytest.approx([math.log(p[token]) for token in tokens.tolist()], abs=1e-5)


def test_the_ends_of_the_unit_interval_draw_possible_tokens():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(3, -1)
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    tokens, logps = draw(logits, uniform, SamplingParams(1))
    assert tokens.tolist() == [1, 3, 3]
    assert logps.tolist() == pytest.approx([-math.log(2)] * 3)


def naive_nucleus(p: list[float], top_p: float) -> set[int]:
    """The most probable tokens, taken one by one until their mass reaches top_p."""
    kept, mass = set(), 0.0
    for token in sorted(range(len(p)), key=lambda token: -p[token]):
        if mass >= top_p:
            break
        kept.add(token)
        mass += p[token]
    return kept


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=12, unique=True), st.integers(1, 99))
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(weights, percent):
    p = [weight / sum(weights) for weight in weights]
    top_p = percent / 100 + 1e-5  # no sum of such shares falls on it
    kept = naive_nucleus(p, top_p)
    found = nucleus(torch.tensor([p]).log(), top_p)[0].exp().tolist()
    mass = sum(p[token] for token in kept)
    assert found == pytest.approx([p[token] / mass if token in kept else 0.0 for token in range(len(p))], abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Seeds, texts, engines


def test_seeds_tell_every_sample_apart():
    seeds = {
        sample_seed(seed, task, item, run, sample)
        for seed in range(4)
        for task in ("a", "ab")
        for item in ("1", "11", "b1")
        for run in range(12)
        for sample in range(12)
    }
    assert len(seeds) == 4 * 2 * 3 * 12 * 12
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed("a", "bc") != sample_seed("ab", "c")
    assert sample_seed(1, 2) == sample_seed("1", 2)


def test_a_text_ends_before_the_end_token(tiny_checkpoint):
    tokenizer = load_tokenizer(tiny_checkpoint)
    ids = tokenizer.encode("3 + 4 , 7 .")
    stopped = Sample([*ids, tokenizer.eos_token_id], "stop", [])
    assert completion_text(tokenizer, stopped) == completion_text(tokenizer, Sample(ids, "length", [])) == "3 + 4 , 7 ."


def test_an_engine_computes_on_the_accelerator(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("gift.models.device", lambda: torch.device("meta"))  # stands in for a GPU
    assert build_engine("hf", tiny_checkpoint).model.device.type == "meta"


def test_engines_by_name(tiny_checkpoint):
    engine = build_engine("hf", tiny_checkpoint)
    (sample,) = engine.generate([Request((5, 6), 0)], SamplingParams(3))
    assert 1 <= len(sample.token_ids) <= 3
    with pytest.raises(UserError, match=r"unknown generation engine 'hv' \(did you mean 'hf'\?\); engines: hf"):
        build_engine("hv", tiny_checkpoint)
