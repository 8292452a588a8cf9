"""A stub of vLLM's server, in this process: replies are functions of the request, and what was asked is kept."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gift.generation import Request, Sample, SamplingParams
from gift.generation.server import ServerEngine
from gift.recipe import Generation

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


def settings(url: str, **more: Any) -> Generation:
    return Generation(engine="server", url=url, **more)


def one_sample(stub: Stub, params: SamplingParams | None = None) -> Sample:
    engine = ServerEngine(settings(stub.url), None)
    return engine.generate([Request((5, 6), 3)], params or SamplingParams(8))[0]


def line_of(error: pytest.ExceptionInfo[BaseException], url: str) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert url in text
    return text
