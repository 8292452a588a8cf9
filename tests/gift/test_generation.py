"""The protocol of the generation engines: what is refused, where texts end, seeds, engines from settings."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gift.cli import UserError
from gift.generation import (
    RepetitionGuard,
    Request,
    Sample,
    SamplingParams,
    check_request,
    completion_text,
    sample_seed,
)
from gift.generation.build import build_engine
from gift.models import load_tokenizer
from gift.recipe import Generation


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"stop": ("a", "")},
    ],
)
def test_meaningless_parameters_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        SamplingParams(**{"max_tokens": 1, **settings})


@pytest.mark.parametrize(("max_pattern", "count"), [(0, 8), (4, 1)])
def test_a_meaningless_guard_is_refused(max_pattern, count):
    with pytest.raises(UserError, match="repetition guard"):
        RepetitionGuard(max_pattern, count)


@given(st.lists(st.integers(0, 2), max_size=24), st.integers(1, 4), st.integers(2, 4))
def test_the_guard_fires_where_the_last_tokens_are_copies_of_a_short_pattern(ids, max_pattern, count):
    patterns = [ids[-size:] for size in range(1, max_pattern + 1) if len(ids) >= size]
    expected = any(ids[-len(pattern) * count :] == pattern * count for pattern in patterns)
    assert RepetitionGuard(max_pattern, count).fires(ids) == expected


def test_a_response_may_be_as_long_as_request_parameters_and_window_allow():
    params = SamplingParams(20)
    for prompt, asked, expected in ((4, None, 20), (4, 7, 7), (4, 99, 20), (25, None, 7), (31, 3, 1)):
        assert check_request(0, Request((1,) * prompt, 0, asked), params, window=32) == expected


@pytest.mark.parametrize(
    ("prompt", "asked", "message"),
    [
        (0, None, r"request 3 \(chain, 7\): a prompt of 0 tokens"),
        (32, None, r"request 3 \(chain, 7\): a prompt of 32 tokens.*window of 32"),
        (2, 0, r"request 3 \(chain, 7\): max_tokens is 0"),
    ],
)
def test_a_request_that_cannot_be_served_is_named(prompt, asked, message):
    with pytest.raises(UserError, match=message):
        check_request(3, Request((1,) * prompt, 0, asked, ("chain", 7)), SamplingParams(20), window=32)


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


def test_a_text_ends_before_what_ended_it(tiny_checkpoint):
    tokenizer = load_tokenizer(tiny_checkpoint)
    text = "3 + 4 , 7 ."
    ids = tokenizer.encode(text)
    assert completion_text(tokenizer, Sample(ids, "length", [])) == text
    assert completion_text(tokenizer, Sample([*ids, tokenizer.eos_token_id], "stop", [])) == text
    assert completion_text(tokenizer, Sample([*ids, ids[0]], "stop", [], stop_reason=ids[0])) == text
    assert completion_text(tokenizer, Sample(ids, "stop", [], stop_reason=" , 7")) == "3 + 4"
    assert completion_text(tokenizer, Sample([], "stop", [], text="as it came")) == "as it came"


def test_an_engine_computes_on_the_accelerator(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("gift.generation.build.device", lambda: torch.device("meta"))  # stands in for a GPU
    assert build_engine(Generation(), tiny_checkpoint).model.device.type == "meta"


def test_the_hf_engine_is_built_as_the_settings_say(tiny_checkpoint):
    engine = build_engine(Generation(cache_gb=0.5, max_rows=7), tiny_checkpoint)
    assert (engine.cache_gb, engine.max_rows) == (0.5, 7)
    (sample,) = engine.generate([Request((5, 6), 0)], SamplingParams(3, stop=("\n",)))
    assert 1 <= len(sample.token_ids) <= 3
