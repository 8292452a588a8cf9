"""JSON over HTTP for the server engine: calls that can be cut off, and every failure as one line naming the url."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from gift.cli import UserError
from gift.generation import GenerationError

CONNECT_S = 10.0
REPLY_S = 3600.0  # for a long response on a busy server; that the other machine is gone, the kernel's probes tell
PROBES = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}  # seconds of silence, between probes; how many


class CutConnectionError(GenerationError):
    """The server, or something between, cut the connection before its reply was whole."""


class RefusedRequestError(GenerationError):
    """The server answered with an HTTP error."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Calls:
    """Calls under way that belong together: when their `with` is left, they are cut off, and no new one begins."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.over.set()
            for connected in self._sockets:
                with contextlib.suppress(OSError):  # already closed from the other side
                    connected.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def using(self, connected: socket.socket) -> Iterator[None]:
        """Inside, the socket is one of those to cut off. Raises ConnectionAbortedError where it is too late."""
        with self._lock:
            if self.over.is_set():
                raise ConnectionAbortedError("given up")
            self._sockets.add(connected)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(connected)


class Client:
    """JSON over HTTP to one server, every call on a connection of its own. Raises UserError for an unusable url."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            parts = urlsplit(self.url)
            self._host, self._port, self._path = parts.hostname or "", parts.port, parts.path
        except ValueError:  # a port that is no number
            self._host = ""
        if not self._host or parts.scheme not in ("http", "https"):
            raise UserError(f"generation.url: {url!r} is not an address such as http://10.0.0.2:8000")
        self._connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection

    def call(self, path: str, body: dict[str, Any] | None = None, calls: Calls | None = None) -> dict[str, Any]:
        """The reply to a GET, or to a POST of `body`. Raises GenerationError, naming the url, where none comes."""
        connection = self._connection(self._host, self._port, timeout=CONNECT_S)
        try:
            connection.connect()
        except OSError as error:
            raise GenerationError(f"{self.url}: no server answers there ({one_line(error)}); is it running?") from None
        try:
            connected = connection.sock
            connected.settimeout(REPLY_S)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option in PROBES.keys() & vars(socket).keys():
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), PROBES[option])
            with (calls or Calls()).using(connected):
                data = None if body is None else json.dumps(body).encode()
                connection.request(
                    "GET" if data is None else "POST", self._path + path, data, {"Content-Type": "application/json"}
                )
                response = connection.getresponse()
                text = response.read()
        except TimeoutError as error:
            raise GenerationError(
                f"{self.url}: no reply ({one_line(error)}); is the server stuck, or its machine gone?"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise CutConnectionError(
                f"{self.url}: the server broke off its reply ({one_line(error)}); see its log, and run again"
            ) from None
        finally:
            connection.close()
        try:
            reply = json.loads(text)
        except (ValueError, RecursionError):  # nested a thousand times, it is no reply either
            reply = None
        if response.status >= HTTPStatus.BAD_REQUEST:
            said = reply.get("error", reply) if isinstance(reply, dict) else text.decode(errors="replace")
            said = said.get("message", said) if isinstance(said, dict) else said
            raise RefusedRequestError(
                f"{self.url}: HTTP {response.status} from {path}: {one_line(said)}", response.status
            )
        if not isinstance(reply, dict):
            raise GenerationError(f"{self.url}: the answer to {path} is no JSON object: {one_line(text)}")
        return reply


def one_line(message: object, limit: int = 300) -> str:
    """What a server or an exception said, for a one-line message."""
    text = message.decode(errors="replace") if isinstance(message, bytes) else str(message)
    return " ".join(text.split())[:limit] or type(message).__name__
