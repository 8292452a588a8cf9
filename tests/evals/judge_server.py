"""A stub of an OpenAI-compatible chat endpoint on loopback: replies are functions of the request."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from evals.judge import Judge, JudgePrompt, Key

SECRET = "sk-loopback-0123456789abcdef"


@dataclass(frozen=True)
class Reply:
    """An HTTP reply; a `body` that is no bytes is sent as JSON."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def completion(text: Any, **more: Any) -> Reply:
    """A chat completion of this text."""
    return Reply(
        {"object": "chat.completion", "choices": [{"message": {"role": "assistant", "content": text}}], **more}
    )


def asked_text(body: Any) -> str:
    """The user's message of a request."""
    return str(body["messages"][-1]["content"])


def is_trial(body: Any) -> bool:
    """Whether this is the request by which a judge is tried out."""
    return len(body["messages"]) == 1


def own_rating(text: str) -> int:
    """The rating, 1 to 10, that `JudgeServer` gives a text unless told otherwise."""
    return hashlib.sha256(text.encode()).digest()[0] % 10 + 1


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are what is tested here."""


class JudgeServer:
    """Answers with `reply(body, nth)`, `nth` being how often the same messages were sent before; None cuts."""

    def __init__(self) -> None:
        self.reply: Callable[[Any, int], Reply | None] = lambda body, _: rated(body)
        self.asked: list[Any] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = QuietServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def judge(self, **settings: Any) -> Judge:
        """A judge that asks this server, with pauses too short to wait for."""
        return Judge(self.url, "stub", Key(SECRET), **{"pause_s": 0.004, "timeout_s": 10.0, **settings})

    def ratings_asked(self) -> list[Any]:
        """The requests but for trials."""
        return [body for body in self.asked if not is_trial(body)]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    same = json.dumps(body["messages"])
                    nth = server._seen[same]
                    server._seen[same] += 1
                    server.asked.append(body)
                    server.paths.append(self.path)
                    server.headers.append(dict(self.headers))
                    server._at_once += 1
                    server.most_at_once = max(server.most_at_once, server._at_once)
                try:
                    reply = server.reply(body, nth)
                finally:
                    with server._lock:
                        server._at_once -= 1
                if reply is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                text = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(text)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def rated(body: Any) -> Reply:
    """A completion with the text's own rating."""
    return completion(f"Good enough. Rating: [[{own_rating(asked_text(body))}]]", usage={"total_tokens": 100})


def prompts(count: int) -> list[JudgePrompt]:
    """Prompts of different texts."""
    return [JudgePrompt("single-v1", "Judge.", f"answer {number}") for number in range(count)]
