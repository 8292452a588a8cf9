"""Where generated code runs: a fresh, slim process for every program, that can reach nothing of the machine.

By bubblewrap or, without it, in user, mount, network, pid, ipc and uts namespaces: no network; none of the machine's
processes; of its files the Python installation and the system's libraries, read-only; a private /tmp; no environment.
Within, the kernel refuses new processes and caps memory, files and CPU time (evals/code_worker.py). The parent keeps
the time, so nothing that a program does to its clocks or signals buys it any.

A program is sent the inputs and sends back outputs; the expected ones stay here. It may forge whatever it likes: to
pass, it would have to forge the right answers.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.util
import json
import marshal
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from evals import code_worker
from gift.cli import UserError

Isolation = Literal["bubblewrap", "namespaces", "none"]

WORKER = Path(code_worker.__file__)
JAIL = WORKER.with_name("code_jail.py")
PACKAGES = ("numpy",)  # what programs may import besides the standard library, where it is installed
FOR_PACKAGES = "/packages"  # where they are found inside
ENVIRONMENT = {
    "HOME": "/tmp",
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # an output that depends on the order of a set is the same each time it is graded
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
HEADER = struct.Struct("<BQ")
NOTE_BYTES = 100  # an exception's name


@dataclass(frozen=True)
class Limits:
    """What one program gets. Bytes: of address space, of a file, of all of /tmp, of its stack, of its replies.

    Seconds: to start Python on a busy machine, to load a group, and for all of it together.
    """

    memory_bytes: int = 4 << 30
    file_bytes: int = 16 << 20
    tmp_bytes: int = 64 << 20
    stack_bytes: int = 1 << 30
    reply_bytes: int = 1 << 30
    start_s: float = 60.0
    load_s: float = 10.0
    total_s: float = 60.0


@dataclass(frozen=True)
class Program:
    """Sources run in turn in one namespace, and the function of theirs that is called.

    `groups` are lists of argument lists: each group starts from a fresh namespace, each call from fresh arguments.
    `seconds`, in the same shape, is how long each call may take (None: no limit but that on everything).
    """

    sources: Sequence[str]
    entry_point: str
    groups: Sequence[Sequence[Sequence[Any]]]
    seconds: Sequence[Sequence[float]] | None = None


class Reply(NamedTuple):
    """What became of one call, and how long it took (seconds, with the sending of the output).

    'value': payload is the marshalled output; 'digest': the SHA-256 of one too long to send; 'other': an output that
    is not data; 'raised': the name of an exception.
    """

    kind: Literal["value", "digest", "other", "raised"]
    payload: bytes
    seconds: float


KINDS: dict[int, Literal["value", "digest", "other", "raised"]] = {
    code_worker.VALUE: "value",
    code_worker.DIGEST: "digest",
    code_worker.OTHER: "other",
    code_worker.RAISED: "raised",
}


class StoppedError(Exception):
    """A program that was ended before it had answered every call.

    `reason` is for people. `status` is 'error' if that was no fault of the program.
    """

    def __init__(self, reason: str, status: Literal["wrong", "timeout", "error"] = "wrong") -> None:
        super().__init__(reason)
        self.status = status


class Sandbox:
    """Runs programs, several at once if called from several threads. `sandbox` finds the isolation there is."""

    def __init__(self, isolation: Isolation, limits: Limits | None = None) -> None:
        self.isolation, self.limits = isolation, limits or Limits()
        self._live: set[subprocess.Popen[bytes]] = set()
        self._closed = False

    def close(self) -> None:
        """Ends what is running, and what is started from now on."""
        self._closed = True
        for process in list(self._live):
            process.kill()

    def run(self, program: Program, total_s: float | None = None) -> Generator[Reply, None, None]:
        """One reply per call of every group, in order; the process is dead when this ends or is closed.

        `total_s` replaces the limit on everything. Raises StoppedError if a call, the loading or the whole takes too
        long, or the program dies, cannot be loaded or sends what is not a reply.
        """
        total_s = total_s or self.limits.total_s
        request: dict[str, Any] = {
            "sources": list(program.sources),
            "entry_point": program.entry_point,
            "groups": [[marshal.dumps(list(call)) for call in group] for group in program.groups],
            "path": _import_path(self.isolation),
            "limits": {
                "memory": self.limits.memory_bytes,
                "file": self.limits.file_bytes,
                "files": 64,
                "processes": 64,
                "stack": self.limits.stack_bytes,
                "cpu": int(total_s) + 60,  # should this process be stopped
            },
        }
        with self._started(marshal.dumps(request)) as stream:
            replies = _Channel(stream, self.limits.reply_bytes)
            try:
                replies.expect(code_worker.READY, self.limits.start_s, "start")
            except StoppedError as stopped:
                raise StoppedError(str(stopped), "error") from stopped
            replies.end = time.monotonic() + total_s
            for number, group in enumerate(program.groups):
                replies.expect(code_worker.LOADED, self.limits.load_s, "load")
                for call in range(len(group)):
                    allowed = total_s if program.seconds is None else program.seconds[number][call]
                    tag, payload, seconds = replies.receive(allowed, "answer")
                    if tag not in KINDS:
                        raise StoppedError("sent what is not a reply")
                    yield Reply(KINDS[tag], payload, seconds)

    @contextlib.contextmanager
    def _started(self, request: bytes) -> Iterator[int]:
        """The reading end of a process's replies; the process ends with the context."""
        with contextlib.ExitStack() as stack:
            stdin = os.memfd_create("request", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
            stack.callback(os.close, stdin)
            with open(stdin, "wb", closefd=False) as file:
                file.write(request)
            fcntl.fcntl(stdin, fcntl.F_ADD_SEALS, SEALS)
            os.lseek(stdin, 0, os.SEEK_SET)
            reading, writing = os.pipe()
            stack.callback(os.close, reading)
            try:
                folder = "/"
                if self.isolation != "bubblewrap":
                    folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
                process = subprocess.Popen(
                    [*_command(self.isolation, self.limits.tmp_bytes, folder), str(writing)],
                    stdin=stdin,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[writing],
                    env=ENVIRONMENT,
                    cwd=folder,
                    process_group=0,
                )
            except OSError as error:
                raise StoppedError(f"did not start: {error.strerror}", "error") from error
            finally:
                os.close(writing)
            stack.callback(self._end, process)
            self._live.add(process)
            if self._closed:
                raise StoppedError("was not started: the sandbox is closed", "error")
            yield reading

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with it goes its pid namespace, and all that lives there
        process.wait()
        self._live.discard(process)


class _Channel:
    """The replies of a process, read against the clock; `end` is when there is no more time for anything."""

    def __init__(self, stream: int, most_bytes: int) -> None:
        self.stream, self.left = stream, most_bytes
        self.buffer = bytearray()
        self.last = time.monotonic()
        self.end = float("inf")
        self.poll = select.poll()
        self.poll.register(stream, select.POLLIN)

    def expect(self, tag: int, seconds: float, doing: str) -> None:
        """Receives a reply that must be of this kind."""
        got, payload, _ = self.receive(seconds, doing)
        if got == code_worker.RAISED:
            raise StoppedError(f"cannot {doing}: {payload[:NOTE_BYTES].decode(errors='replace')}")
        if got != tag:
            raise StoppedError("sent what is not a reply")

    def receive(self, seconds: float, doing: str) -> tuple[int, bytes, float]:
        """The next reply's tag and payload, and the time since the one before. Raises StoppedError."""
        deadline = min(time.monotonic() + seconds, self.end)
        tag, size = HEADER.unpack(self._read(HEADER.size, deadline, doing))
        self.left -= size
        if self.left < 0 or size > code_worker.INLINE_BYTES:
            raise StoppedError("sent too much")
        payload = self._read(size, deadline, doing)
        before, self.last = self.last, time.monotonic()
        return tag, payload, self.last - before

    def _read(self, size: int, deadline: float, doing: str) -> bytes:
        while len(self.buffer) < size:
            left = deadline - time.monotonic()  # of a reply that comes byte by byte, too
            if left <= 0 or not self.poll.poll(left * 1000):
                raise StoppedError(f"took too long to {doing}", "timeout")
            part = os.read(self.stream, 1 << 20)
            if not part:
                raise StoppedError(f"died before it could {doing}")
            self.buffer += part
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        return taken


# ---------------------------------------------------------------------------------------------------------------------
# The command line of a process


def _command(isolation: Isolation, tmp_bytes: int, folder: str) -> list[str]:
    """What runs the worker in isolation. `folder` is an empty one."""
    python = [os.path.realpath(sys.executable), "-P", "-s", "-S", "-B"]
    if isolation == "none":
        return [*python, str(WORKER)]
    mounts = [*_system(), *_packages(), (str(WORKER), "/worker.py")]
    inside = [*python, "/worker.py"]
    if isolation == "namespaces":
        flags = "--user --map-root-user --mount --net --pid --ipc --uts --fork --kill-child"
        jail = [*python, str(JAIL), folder, str(tmp_bytes), json.dumps([*mounts, ("/dev/null", "/dev/null")])]
        return [shutil.which("unshare") or "unshare", *flags.split(), *jail, *inside]
    flags = "--unshare-user --unshare-pid --unshare-net --unshare-ipc --unshare-uts --unshare-cgroup-try"
    command = [shutil.which("bwrap") or "bwrap", *flags.split(), "--die-with-parent", "--new-session"]
    command += ["--size", str(tmp_bytes), "--tmpfs", "/tmp"]  # first, lest it hide what is mounted below it
    for source, target in mounts:
        link = source.startswith("->")
        command += ["--symlink", source[2:], target] if link else ["--ro-bind", source, target]
    command += ["--dev-bind", "/dev/null", "/dev/null", "--remount-ro", "/", "--chdir", "/tmp"]
    return [*command, *inside]


@functools.cache
def _system() -> tuple[tuple[str, str], ...]:
    """What Python needs, as (source, target): its own installation and the system's libraries."""
    folders = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/nix/store"]
    own = {sys.base_prefix, sys.base_exec_prefix, str(Path(os.path.realpath(sys.executable)).parent)}
    folders += sorted(folder for folder in own if not f"{folder}/".startswith("/usr/"))
    present = [Path(folder) for folder in dict.fromkeys(folders) if Path(folder).exists()]
    return tuple((f"->{path.readlink()}" if path.is_symlink() else str(path), str(path)) for path in present)


@functools.cache
def _packages() -> tuple[tuple[str, str], ...]:
    """The folders of PACKAGES, and of the libraries that came with them, as (source, target)."""
    found = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        for folder in (spec and spec.submodule_search_locations) or ():
            beside = [Path(folder), Path(f"{folder}.libs")]
            found += [(str(path), f"{FOR_PACKAGES}/{path.name}") for path in beside if path.is_dir()]
    return tuple(found)


def _import_path(isolation: Isolation) -> list[str]:
    """Where a program finds PACKAGES."""
    if isolation != "none":
        return [FOR_PACKAGES]
    return list(dict.fromkeys(str(Path(source).parent) for source, _ in _packages()))


# ---------------------------------------------------------------------------------------------------------------------
# Which isolation there is


def works(sandbox: Sandbox) -> bool:
    """Whether a program runs there."""
    program = Program(["def double(x): return 2 * x"], "double", [[[21]]])
    try:
        return [reply.payload for reply in sandbox.run(program)] == [marshal.dumps(42, 2)]
    except (StoppedError, OSError):
        return False


@functools.cache
def _isolation() -> Isolation | None:
    """The strongest that works on this machine."""
    needs: tuple[tuple[Isolation, str], ...] = (("bubblewrap", "bwrap"), ("namespaces", "unshare"))
    for isolation, tool in needs:
        if sys.platform == "linux" and shutil.which(tool) and works(Sandbox(isolation)):
            return isolation
    return None


def sandbox(*, unsafe: bool = False, limits: Limits | None = None) -> Sandbox:
    """The sandbox that this machine offers. `unsafe` does without isolation where there is none.

    Raises UserError where there is none and `unsafe` is not set, saying what to install.
    """
    isolation = _isolation()
    if isolation is None and not unsafe:
        raise UserError(
            "generated code has no sandbox to run in: install bubblewrap (apt-get install bubblewrap) on a Linux that"
            " allows user namespaces (in Docker: --security-opt seccomp=unconfined), or give --unsafe-code to run it"
            " with no isolation but limits on memory and time"
        )
    return Sandbox(isolation or "none", limits)
