"""JSON over HTTP, for the server engine and for a judge: calls that can be cut off, and every failure as one line."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from gift.cli import UserError
from gift.generation import GenerationError

CONNECT_S = 10.0
MAX_REPLY_BYTES = 1 << 30
REPLY_S = 3600.0  # for a long response on a busy server; that the other machine is gone, the kernel's probes tell
PROBES = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}  # seconds of silence, between probes; how many

Job = TypeVar("Job")
Result = TypeVar("Result")


class CutConnectionError(GenerationError):
    """The server, or something between, cut the connection before its reply was whole."""


class RefusedRequestError(GenerationError):
    """The server answered with an HTTP error, and maybe said after which pause to ask again (the header as it came)."""

    def __init__(self, message: str, status: int, retry_after: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


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
    """JSON over HTTP to one server, every call on a connection of its own. Raises UserError for an unusable url.

    `headers` go with every call. A reply may take `reply_s` seconds (REPLY_S) and have `max_bytes`. Calls to an https
    url go through `proxy`, an http url with user and password where it asks for them. `setting` is where the url came
    from.
    """

    def __init__(
        self,
        url: str,
        *,
        setting: str = "generation.url",
        headers: Mapping[str, str] | None = None,
        reply_s: float | None = None,
        max_bytes: int = MAX_REPLY_BYTES,
        proxy: str | None = None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            parts = urlsplit(self.url)
            self._host, self._port, self._path = parts.hostname or "", parts.port, parts.path
        except ValueError:  # a port that is no number
            self._host = ""
        if not self._host or parts.scheme not in ("http", "https"):
            raise UserError(f"{setting}: {url!r} is not an address such as http://10.0.0.2:8000")
        self._connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._proxy = proxy if parts.scheme == "https" else None
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._reply_s = REPLY_S if reply_s is None else reply_s
        self._max_bytes = max_bytes

    def call(self, path: str, body: dict[str, Any] | None = None, calls: Calls | None = None) -> dict[str, Any]:
        """The reply to a GET, or to a POST of `body`. Raises GenerationError, naming the url, where none comes."""
        connection = self._connect()
        try:
            connected = connection.sock
            connected.settimeout(self._reply_s)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option in PROBES.keys() & vars(socket).keys():
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), PROBES[option])
            with (calls or Calls()).using(connected):
                data = None if body is None else json.dumps(body).encode()
                connection.request("GET" if data is None else "POST", self._path + path, data, self._headers)
                response = connection.getresponse()
                text = self._read(response, time.monotonic() + self._reply_s)
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
                f"{self.url}: HTTP {response.status} from {path}: {one_line(said)}",
                response.status,
                response.headers["Retry-After"],
            )
        if not isinstance(reply, dict):
            raise GenerationError(f"{self.url}: the answer to {path} is no JSON object: {one_line(text)}")
        return reply

    def _connect(self) -> http.client.HTTPConnection:
        """An open connection to the server. Raises GenerationError."""
        if self._proxy is None:
            connection = self._connection(self._host, self._port, timeout=CONNECT_S)
        else:
            proxy = urlsplit(self._proxy if "://" in self._proxy else f"http://{self._proxy}")
            login = f"{unquote(proxy.username or '')}:{unquote(proxy.password or '')}".encode()
            headers = {"Proxy-Authorization": f"Basic {b64encode(login).decode()}"} if proxy.username else {}
            connection = self._connection(proxy.hostname or "", proxy.port, timeout=CONNECT_S)
            connection.set_tunnel(self._host, self._port, headers)
        try:
            connection.connect()
        except OSError as error:
            raise GenerationError(f"{self.url}: no server answers there ({one_line(error)}); is it running?") from None
        return connection

    def _read(self, response: http.client.HTTPResponse, deadline: float) -> bytes:
        """The whole body. Raises TimeoutError past the deadline, HTTPException where it is cut or too long."""
        text = bytearray()
        while part := response.read1(1 << 20):
            text += part
            if len(text) > self._max_bytes:
                raise http.client.HTTPException(f"it is longer than {self._max_bytes} bytes")
            if time.monotonic() > deadline:  # a server that trickles never lets the socket time out
                raise TimeoutError(f"not whole after {self._reply_s:g} s")
        if response.length:  # what `read1` is not bothered by
            raise http.client.IncompleteRead(bytes(text), response.length)
        return bytes(text)


def in_parallel(
    function: Callable[[Job, Calls], Result], jobs: Sequence[Job], workers: int
) -> Generator[tuple[int, Result], None, None]:
    """The jobs' numbers and results as they finish, `workers` at once; the rest is cut off when this is left."""
    pool = ThreadPoolExecutor(max(1, min(len(jobs), workers)), thread_name_prefix="client")
    try:
        with Calls() as calls:
            numbers = {pool.submit(function, job, calls): number for number, job in enumerate(jobs)}
            for future in as_completed(numbers):
                yield numbers.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def one_line(message: object, limit: int = 300) -> str:
    """What a server or an exception said, for a one-line message."""
    text = message.decode(errors="replace") if isinstance(message, bytes) else str(message)
    return " ".join(text.split())[:limit] or type(message).__name__
