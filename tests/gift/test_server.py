"""The client of a vLLM server, against a stub that misbehaves in known ways; test_server_vllm.py has a real one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from stub_server import MODELS, WINDOW, Stub, completion, line_of, logprobs, one_sample, settings

from gift.cli import UserError
from gift.generation import GenerationError, RepetitionGuard, Request, SamplingParams
from gift.generation.server import ServerEngine


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub()
    yield stub
    stub.close()


def test_a_request_carries_every_parameter_and_leaves_nothing_to_the_server(stub):
    stub.replies["/v1/completions"] = lambda body: completion(
        [4] * body["max_tokens"], **logprobs(*[0.0] * body["max_tokens"])
    )
    guard = RepetitionGuard(max_pattern=5, count=4)
    params = SamplingParams(9, 0.7, 0.9, 11, 0.05, ("Q:",), (8,), True, guard, True)
    ServerEngine(settings(stub.url), None).generate([Request((5, 6), 2**62, max_tokens=4)], params)
    assert stub.bodies()[-1] == {
        "model": "policy",
        "prompt": [5, 6],
        "seed": 2**62,
        "max_tokens": 4,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 11,
        "min_p": 0.05,
        "stop": ["Q:"],
        "stop_token_ids": [8],
        "ignore_eos": True,
        "repetition_detection": {"max_pattern_size": 5, "min_count": 4},
        "logprobs": 0,
        "return_token_ids": True,
        "skip_special_tokens": False,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


@pytest.mark.parametrize(
    ("finish", "reason", "expected"),
    [
        ("length", None, ("length", None)),
        ("stop", None, ("stop", None)),
        ("stop", "Q:", ("stop", "Q:")),
        ("stop", 8, ("stop", 8)),
        ("stop", 2, ("stop", None)),  # the second of a model's end tokens
        ("repetition", "repetition_detected", ("repetition", None)),
    ],
)
def test_reasons_are_ours(stub, finish, reason, expected):
    stub.replies["/v1/completions"] = lambda _: completion([7, 8], finish, reason)
    sample = one_sample(stub, SamplingParams(8, stop=("Q:",), stop_ids=(8,)))
    assert (sample.finish_reason, sample.stop_reason) == expected
    assert sample.token_ids == [7, 8]


def test_samples_come_as_they_finish_and_no_more_than_max_rows_are_under_way(stub):
    first_may_go = threading.Event()

    def reply(body: Any) -> Any:
        if body["prompt"] == [0]:
            assert first_may_go.wait(20)
        return completion([body["prompt"][0] + 1])

    stub.replies["/v1/completions"] = reply
    engine = ServerEngine(settings(stub.url, max_rows=3), None)
    order = []
    for number, sample in engine.stream([Request((n,), n) for n in range(12)], SamplingParams(4)):
        order.append(number)
        assert sample.token_ids == [number + 1]
        if len(order) == 11:
            first_may_go.set()
    assert sorted(order) == list(range(12))
    assert order[-1] == 0
    assert 1 < stub.most_at_once <= 3


def test_an_abandoned_stream_ends_what_is_under_way(stub):
    release = threading.Event()

    def reply(body: Any) -> Any:
        if body["prompt"] != [0]:
            release.wait(20)
        return completion([1])

    stub.replies["/v1/completions"] = reply
    engine = ServerEngine(settings(stub.url, max_rows=4), None)
    stream = engine.stream([Request((n,), n) for n in range(50)], SamplingParams(4))
    assert next(stream)[0] == 0
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 5
    assert len(stub.bodies()) < 10
    release.set()


def test_all_requests_are_checked_before_the_first_is_sent(stub):
    engine = ServerEngine(settings(stub.url), None)
    requests = [Request((1,), 0), Request((1,) * WINDOW, 0, key=("gsm8k", 7))]
    with pytest.raises(UserError, match=r"request 1 \(gsm8k, 7\).*64"):
        engine.generate(requests, SamplingParams(4))
    assert not stub.bodies()


def test_no_requests_no_samples(stub):
    engine = ServerEngine(settings(stub.url), None)
    assert engine.generate([], SamplingParams(4)) == []
    assert engine.score([]) == []


def test_a_score_is_a_prompts_log_probabilities_and_that_of_its_continuation(stub):
    def reply(body: Any) -> Any:
        if "prompt_logprobs" not in body:
            return completion([3], **logprobs(0.0))
        steps = [None, *({str(token): {"logprob": -token / 8}} for token in body["prompt"][1:])]
        last = body["logprob_token_ids"][0]
        top = {"top_logprobs": [{"token_id:1": -0.5, f"token_id:{last}": -last / 8}], "token_logprobs": [-0.5]}
        return completion([1], prompt_logprobs=steps, logprobs=top)

    stub.replies["/v1/completions"] = reply
    engine = ServerEngine(settings(stub.url), None)
    assert engine.score([(5, 2, 4), (7,), (5, 9)]) == [[-0.25, -0.5], [], [-1.125]]
    assert len(engine.score([tuple(range(WINDOW))])[0]) == WINDOW - 1  # more than a prompt may have
    with pytest.raises(UserError, match=f"sequence 0: {WINDOW + 1} tokens"):
        engine.score([tuple(range(WINDOW + 1))])
    stub.replies["/v1/completions"] = lambda _: completion([1], **logprobs(0.0))
    with pytest.raises(GenerationError, match="log-probability per token"):
        engine.score([(5, 2, 4)])


# ---------------------------------------------------------------------------------------------------------------------
# Failures: one line that names the url; what was yielded before stays


def test_nothing_listens(stub):
    stub.close()
    with pytest.raises(GenerationError) as error:
        ServerEngine(settings(stub.url), None)
    assert "no server answers" in line_of(error, stub.url)


@pytest.mark.parametrize("url", ["10.0.0.2:8000", "http://", "http://host:port", "ftp://host:21"])
def test_an_address_that_is_none(url):
    with pytest.raises(UserError, match=r"generation\.url"):
        ServerEngine(settings(url), None)


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ((400, {"error": {"message": "Token id 400 is\nout of vocabulary", "code": 400}}), "400 is out of vocabulary"),
        ((500, {"error": {"message": "EngineDeadError"}}), "EngineDeadError"),
        ((502, b"<html>Bad Gateway</html>"), "502.*Bad Gateway"),
        (b"<html>", "no JSON object"),
        (b"[1, 2]", "no JSON object"),
        (b"[" * 100_000, "no JSON object"),
        ({"choices": []}, "lacks a completion"),
        ({"choices": [3]}, "lacks a completion"),
        (completion(None), "token ids"),
        (completion([]), "token ids"),
        (completion([1.5]), "token ids"),
        (completion(["1"]), "token ids"),
        (completion([-1]), "token ids"),
        (completion([2**31]), "token ids"),
        (completion([1] * 9), "token ids"),  # more than were asked for
        (completion([1], "abort"), "ended a sample because of 'abort'"),
        (completion([1], None), "ended a sample"),
    ],
)
def test_an_answer_that_is_no_completion(stub, reply, says):
    stub.replies["/v1/completions"] = lambda _: reply
    with pytest.raises(GenerationError, match=says) as error:
        one_sample(stub)
    line_of(error, stub.url)
    assert len(stub.bodies()) == 1  # not asked again


@pytest.mark.parametrize("values", [(), (-1.0,), (-1.0, None), (-1.0, float("nan")), (-1.0, "x"), (-1.0, -(10**400))])
def test_logps_that_are_none(stub, values):
    stub.replies["/v1/completions"] = lambda body: (
        completion([1], **logprobs(0.0)) if body["max_tokens"] == 1 else completion([1, 2], **logprobs(*values))
    )
    with pytest.raises(GenerationError, match="log-probabilit"):
        one_sample(stub, SamplingParams(8, logps=True))


def test_a_server_that_reports_raw_log_probabilities_is_found_out(stub):
    stub.replies["/v1/completions"] = lambda _: completion([1], **logprobs(-0.5))
    with pytest.raises(UserError, match="--logprobs-mode processed_logprobs"):
        one_sample(stub, SamplingParams(8, logps=True))


def test_a_cut_connection_is_tried_again_with_the_same_request(stub):
    replies = iter([None, None])
    stub.replies["/v1/completions"] = lambda body: next(replies, completion([9]))
    assert one_sample(stub).token_ids == [9]
    assert len(stub.bodies()) == 3
    assert stub.bodies()[0] == stub.bodies()[1] == stub.bodies()[2]


def test_a_connection_cut_for_good_is_an_error_and_what_was_yielded_stays(stub):
    stub.replies["/v1/completions"] = lambda body: completion([9]) if body["prompt"] == [0] else None
    engine = ServerEngine(settings(stub.url, max_rows=1), None)
    stream = engine.stream([Request((n,), n) for n in range(9)], SamplingParams(4))
    assert next(stream)[0] == 0
    with pytest.raises(GenerationError) as error:
        next(stream)
    assert "broke off" in line_of(error, stub.url)


def test_a_reply_that_takes_too_long(stub, monkeypatch):
    monkeypatch.setattr("gift.generation.client.REPLY_S", 0.2)
    stub.replies["/v1/completions"] = lambda _: time.sleep(1)
    with pytest.raises(GenerationError) as error:
        one_sample(stub)
    assert "no reply (timed out)" in line_of(error, stub.url)


@pytest.mark.parametrize("models", [{}, {"data": []}, {"data": [{"id": "gpt", "parent": None}]}, {"data": "x"}])
def test_a_server_that_is_not_vllms(stub, models):
    stub.replies["/v1/models"] = lambda _: models
    with pytest.raises(GenerationError, match="no vLLM server"):
        ServerEngine(settings(stub.url), None)


def test_the_server_must_serve_this_checkpoint(stub, tiny_checkpoint):
    with pytest.raises(UserError, match=f"serves policy, not {tiny_checkpoint}.*--served-model-name"):
        ServerEngine(settings(stub.url), tiny_checkpoint)
    for served in ({"root": str(tiny_checkpoint)}, {"id": tiny_checkpoint.name}):
        entry = {**MODELS["data"][0], **served}
        stub.replies["/v1/models"] = lambda _, entry=entry: {"data": [entry]}
        assert ServerEngine(settings(stub.url), tiny_checkpoint).max_model_len == WINDOW


def test_a_window_smaller_than_the_models_may_not_cut_a_response(stub, tiny_checkpoint):
    entry = {**MODELS["data"][0], "root": str(tiny_checkpoint)}
    stub.replies["/v1/models"] = lambda _: {"data": [entry]}
    engine = ServerEngine(settings(stub.url), tiny_checkpoint)
    engine.generate([Request((1,), 0)], SamplingParams(WINDOW - 1))
    with pytest.raises(
        UserError, match=rf"cut the response at {WINDOW - 1} tokens.* {stub.url} with a larger --max-model-len"
    ):
        engine.generate([Request((1,), 0)], SamplingParams(WINDOW))
