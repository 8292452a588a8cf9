"""The client of a vLLM server, against a stub that misbehaves in known ways; test_server_vllm.py has a real one."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model

from gift.cli import UserError
from gift.generation import (
    GenerationError,
    RepetitionGuard,
    Request,
    Sample,
    SamplingParams,
    StaleWeightsError,
)
from gift.generation.server import ServerEngine
from gift.lora import add_adapters
from gift.recipe import Generation, LoRA

WINDOW = 64
MODELS = {"data": [{"id": "policy", "root": "/models/policy", "parent": None, "max_model_len": WINDOW}]}


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are what is tested here."""


class Stub:
    """An HTTP server whose replies are functions of the request's body; it keeps what it was asked."""

    def __init__(self) -> None:
        self.replies: dict[str, Callable[[Any], Any]] = {
            "/v1/models": lambda _: MODELS,
            "/weight_info": lambda _: (404, {"detail": "Not Found"}),
            "/v1/completions": lambda body: completion([body["prompt"][-1] + 1]),
        }
        self.asked: list[tuple[str, Any]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._server = QuietServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def bodies(self, path: str = "/v1/completions") -> list[Any]:
        return [body for asked, body in self.asked if asked == path]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, body: Any) -> None:
                with stub._lock:
                    stub.asked.append((self.path, body))
                    stub._at_once += 1
                    stub.most_at_once = max(stub.most_at_once, stub._at_once)
                try:
                    reply = stub.replies[self.path](body)
                finally:
                    with stub._lock:
                        stub._at_once -= 1
                if reply is None:  # cut the connection, as a killed server does
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                status, reply = reply if isinstance(reply, tuple) else (200, reply)
                text = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def completion(ids: Any, finish: Any = "length", reason: Any = None, **more: Any) -> dict[str, Any]:
    """A reply of /v1/completions, as vLLM 0.32 writes it."""
    choice = {"index": 0, "text": "", "token_ids": ids, "finish_reason": finish, "stop_reason": reason, **more}
    return {"object": "text_completion", "choices": [choice]}


def logprobs(*values: Any) -> dict[str, Any]:
    return {"logprobs": {"token_logprobs": list(values)}}


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub()
    yield stub
    stub.close()


def settings(url: str, **more: Any) -> Generation:
    return Generation(engine="server", url=url, **more)


def one_sample(stub: Stub, params: SamplingParams | None = None) -> Sample:
    engine = ServerEngine(settings(stub.url), None)
    return engine.generate([Request((5, 6), 3)], params or SamplingParams(8))[0]


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


# ---------------------------------------------------------------------------------------------------------------------
# Failures: one line that names the url; what was yielded before stays


def line_of(error: pytest.ExceptionInfo[BaseException], url: str) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert url in text
    return text


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
        ({"choices": []}, "lacks a completion"),
        ({"choices": [3]}, "lacks a completion"),
        (completion(None), "token ids"),
        (completion([]), "token ids"),
        (completion([1.5]), "token ids"),
        (completion(["1"]), "token ids"),
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


@pytest.mark.parametrize("values", [(-1.0,), (-1.0, None), (-1.0, float("nan")), (-1.0, "x")])
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
    assert "no reply within" in line_of(error, stub.url)


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
    with pytest.raises(UserError, match=f"--max-model-len {WINDOW + 1}"):
        engine.generate([Request((1,), 0)], SamplingParams(WINDOW))


# ---------------------------------------------------------------------------------------------------------------------
# New weights


class WeightServer:
    """What a development-mode server does with weights: reads them from the path, keeps a version."""

    def __init__(self, stub: Stub) -> None:
        self.version = "default"
        self.state: dict[str, torch.Tensor] = {}
        self.folders: list[Path] = []
        self.stub = stub
        stub.replies |= {
            "/weight_info": lambda _: {"weight_version": self.version},
            "/collective_rpc": self.load,
            "/reset_prefix_cache?reset_running_requests=true": lambda _: {"success": True},
            "/update_weight_version": self.set_version,
        }

    def load(self, body: Any) -> Any:
        assert body["method"] == "reload_weights"
        self.folders.append(Path(body["kwargs"]["weights_path"]))
        self.state = {}
        for file in self.folders[-1].glob("*.safetensors"):
            self.state |= load_file(file)
        return {"results": [None]}

    def set_version(self, body: Any) -> Any:
        self.version = body["new_version"]
        return {"success": True}


@pytest.fixture
def weights(stub) -> WeightServer:
    return WeightServer(stub)


@pytest.fixture
def engine(stub, weights, tmp_path) -> ServerEngine:
    return ServerEngine(settings(stub.url, shared_folder=str(tmp_path)), None)


@pytest.mark.parametrize("tied", [True, False])
def test_the_server_is_given_every_weight_a_tied_head_too(engine, weights, tied):
    model = tiny_model(40, tie_word_embeddings=tied)
    engine.update_weights(model)
    assert weights.state.keys() == model.state_dict().keys()
    assert "lm_head.weight" in weights.state
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights.state[name], tensor)
    assert engine.generate([Request((3,), 0)], SamplingParams(4))[0].token_ids == [4]


def test_adapters_go_merged(engine, weights):
    model = tiny_model(40)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_adapters(model, LoRA(rank=2, targets=("q_proj",)), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    engine.update_weights(model)
    assert weights.state.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], weights.state[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}


def test_the_shared_folder_holds_the_last_weights_alone_and_none_in_the_end(engine, weights, tmp_path):
    (tmp_path / "notes.txt").touch()
    for seed in range(3):
        engine.update_weights(tiny_model(40, seed=seed))
        assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "notes.txt", weights.folders[-1]])
    assert len(set(weights.folders)) == 3
    engine.close()
    engine.close()
    assert list(tmp_path.iterdir()) == [tmp_path / "notes.txt"]


def test_a_restarted_server_has_stale_weights(engine, weights):
    engine.update_weights(tiny_model(40))
    weights.version = "default"
    for ask in (lambda: engine.generate([Request((3,), 0)], SamplingParams(4)), lambda: engine.score([(1, 2)])):
        with pytest.raises(StaleWeightsError, match="not those of this run's last update"):
            ask()


def test_a_restart_in_the_middle_is_noticed_when_a_request_is_tried_again(engine, weights, stub):
    engine.update_weights(tiny_model(40))

    def restart(_: Any) -> None:
        weights.version = "default"

    stub.replies["/v1/completions"] = restart
    with pytest.raises(StaleWeightsError):
        engine.generate([Request((3,), 0)], SamplingParams(4))
    assert len(stub.bodies()) == 1


def test_weights_that_another_run_left_are_noticed(stub, weights):
    weights.version = "of another run"
    with pytest.raises(StaleWeightsError, match="it was started"):
        one_sample(stub)


@pytest.mark.parametrize(
    ("path", "reply", "says"),
    [
        ("/collective_rpc", (500, {"error": {"message": "Worker failed"}}), "Worker failed"),
        ("/collective_rpc", {"results": []}, "did not succeed"),
        ("/collective_rpc", {"results": ["no"]}, "did not succeed"),
        ("/reset_prefix_cache?reset_running_requests=true", {"success": False}, "reset_prefix_cache did not succeed"),
        ("/update_weight_version", {}, "did not succeed"),
    ],
)
def test_weights_that_did_not_arrive_are_an_error_and_stale(engine, weights, stub, tmp_path, path, reply, says):
    stub.replies[path] = lambda _: reply
    with pytest.raises(GenerationError, match=says) as error:
        engine.update_weights(tiny_model(40))
    line_of(error, stub.url)
    assert not list(tmp_path.iterdir())
    with pytest.raises(StaleWeightsError):
        engine.generate([Request((3,), 0)], SamplingParams(4))


def test_a_server_without_development_mode(engine, weights, stub):
    stub.replies["/collective_rpc"] = lambda _: (404, {"detail": "Not Found"})
    with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"):
        engine.update_weights(tiny_model(40))


@pytest.mark.parametrize("folder", [None, "/no/such/folder"])
def test_a_shared_folder_that_is_none(stub, folder):
    engine = ServerEngine(settings(stub.url, shared_folder=folder), None)
    with pytest.raises(UserError, match=r"generation\.shared_folder"):
        engine.update_weights(tiny_model(40))
