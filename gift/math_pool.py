"""The grading processes of `gift.rewards`, as their caller sees them: gift/math_worker.py is what they run."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gift.cli import UserError

MAX_WORKERS = 8  # unless the caller asks for more
START_SECONDS = 120.0  # to import math-verify, also on a busy machine
GRACE_SECONDS = 5.0  # after a deadline, by which the kernel should have ended the child: then its worker is killed

Status = Literal["correct", "wrong", "no_answer", "timeout", "error", "rated"]


class Job(NamedTuple):
    """A comparison for a worker: one of its `kind`s and the arguments of that, of JSON types; hashable."""

    kind: str
    arguments: tuple[Any, ...]


class Result(NamedTuple):
    """What a comparison says; None where it has nothing to add to the `Reading` it belongs to."""

    status: Status
    extracted: str | None = None
    method: str | None = None
    note: str | None = None


class Reading(NamedTuple):
    """What a mode makes of a response in process: the answer, its method, and the result or the job that finds it."""

    outcome: Result | Job
    extracted: str | None = None
    method: str | None = None


class _Worker:
    """A grading process: starting up, idle, or busy with job number `task` until `deadline`."""

    def __init__(self) -> None:
        # In a process group of its own, Ctrl-C at the terminal does not reach it and killing it takes its child along.
        # -P keeps the script's folder, which has a data.py and a models.py, off its import path.
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout
        self.ready = False
        self.task: int | None = None
        self.deadline = time.monotonic() + START_SECONDS

    def send(self, task: int, job: Job, timeout_s: float) -> None:
        self.task, self.deadline = task, time.monotonic() + timeout_s + GRACE_SECONDS
        with contextlib.suppress(BrokenPipeError):  # it died while idle, which reads as the end of its replies
            self.requests.write(json.dumps([*job, timeout_s]).encode() + b"\n")
            self.requests.flush()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.replies.close()
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()


class _Pool:
    """Grading processes that stay from one call to the next."""

    def __init__(self) -> None:
        self.workers: list[_Worker] = []

    def run(self, jobs: Sequence[Job], timeout_s: float, size: int) -> list[Result]:
        """The result of each job, by at most `size` processes; all end if this is interrupted."""
        results: dict[int, Result] = {}
        tasks = iter(range(len(jobs)))
        for worker in [worker for worker in self.workers if worker.process.poll() is not None]:
            self._dismiss(worker)  # killed from outside since the last call
        try:
            while len(results) < len(jobs):
                while len(self.workers) < min(size, len(jobs) - len(results)):
                    self.workers.append(_Worker())
                crew = self.workers[:size]
                for worker in crew:
                    if worker.ready and worker.task is None and (task := next(tasks, None)) is not None:
                        worker.send(task, jobs[task], timeout_s)
                self._collect([worker for worker in crew if worker.task is not None or not worker.ready], results)
        except BaseException:
            self.close()
            raise
        return [results[task] for task in range(len(jobs))]

    def _collect(self, awaited: list[_Worker], results: dict[int, Result]) -> None:
        """Waits until a worker speaks, dies or is overdue; notes its result and dismisses it if it cannot go on."""
        patience = min(worker.deadline for worker in awaited) - time.monotonic()
        readable = wait([worker.replies.fileno() for worker in awaited], timeout=max(patience, 0))
        for worker in awaited:
            overdue = worker.replies.fileno() not in readable
            if overdue and time.monotonic() < worker.deadline:
                continue
            reply: Any = None if overdue else json.loads(worker.replies.readline() or "null")
            if worker.task is None:
                worker.ready = reply == "ready"
                if not worker.ready:
                    raise UserError(f"the math grader cannot start ({reply or 'it died'}): install math-verify")
                continue
            if reply is not None:
                results[worker.task] = Result(**reply)
            else:
                died = Result("error", note="the grading process died")
                results[worker.task] = Result("timeout") if overdue else died
                self._dismiss(worker)
            worker.task = None

    def _dismiss(self, worker: _Worker) -> None:
        worker.kill()
        self.workers.remove(worker)

    def close(self) -> None:
        for worker in list(self.workers):
            self._dismiss(worker)


_pool = _Pool()
_lock = threading.Lock()


def run(jobs: Sequence[Job], timeout_s: float, workers: int | None) -> list[Result]:
    """The result of each job, each in `timeout_s` seconds, by `workers` processes (None: one per core, MAX_WORKERS).

    Any thread may call this, one call runs at a time. Raises UserError if the processes cannot start.
    """
    with _lock:
        return _pool.run(jobs, timeout_s, workers or min(MAX_WORKERS, len(os.sched_getaffinity(0))))


def close() -> None:
    """Ends the grading processes. The next call of `run` starts new ones; at exit this happens by itself."""
    with _lock:
        _pool.close()


def _disown() -> None:
    """In a forked child: the processes, and a lock that another thread may hold, are the parent's."""
    global _pool, _lock
    _pool, _lock = _Pool(), threading.Lock()


atexit.register(close)
os.register_at_fork(after_in_child=_disown)
