"""Data parallelism for evaluation: copies of an engine, each in a process and on devices of its own.

A worker is started as a command of its own rather than by `multiprocessing`, whose children run the caller's main
module again, share its process group (so that Ctrl-C reaches them) and, as daemons, may not have the child processes
that vLLM needs. What passes between parent and worker is pickled, over a socket that no third process can open.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from gift.cli import UserError
from gift.generation import Engine, GenerationError, Request, Sample, SamplingParams, check_request
from gift.generation.build import build_engine
from gift.models import quiet_transformers
from gift.recipe import Generation

POLL_SECONDS = 1.0  # how often a worker's process is looked at where its socket is silent
HEAR_SECONDS = 0.2  # how long a worker that is about to be killed may still say that its work is done
CLOSE_SECONDS = 10.0  # what an idle worker may take to close its engine
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a training run's rank has
SERVE = "from gift.generation.workers import serve; serve()"


class WorkerEngine(Engine):
    """`settings.data_parallel` copies of the engine that `build` makes, which share the requests of a call.

    Prompts are dealt out in turn, so that hard ones which stand together do not go to one worker. Batches are handed
    to whoever is free, the largest first, and a worker has its next one before it ends the present one; but none is
    small, because rows stand empty while a batch's longest responses are finished. What a copy can sample in about two
    rounds of its rows is therefore one batch.

    A stream may be left before its end: the workers drop what remains of it, and the engine can be used again. So can
    it after an error that a worker's engine raised, which is raised here; a worker that dies ends the engine.

    Raises UserError where there are too few GPUs, and what `build` raises.
    """

    def __init__(
        self,
        settings: Generation,
        checkpoint: Path,
        *,
        dtype: str = "auto",
        build: Callable[..., Engine] = build_engine,
    ) -> None:
        self.workers: list[Worker] = []
        self._call = 0
        self._max_rows = settings.max_rows
        count = settings.data_parallel
        job = build, replace(settings, data_parallel=1), checkpoint, dtype
        places = environments(count, settings.tensor_parallel)
        try:
            for number, place in enumerate(places, start=1):
                self.workers.append(Worker(f"generation worker {number} of {count}", place, job))
            windows: list[tuple[int, int]] = []
            while len(windows) < count:
                for kind, _, content in self._messages():
                    if kind == "error":
                        raise content
                    windows.append(content)
        except BaseException:
            self.close()
            raise
        self.max_model_len = min(window for window, _ in windows)
        self._model_window = min(window for _, window in windows)

    @property
    def model_window(self) -> int:
        """As the workers' engines say."""
        return self._model_window

    def stream(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[tuple[int, Sample]]:
        """As Engine.stream; a worker's death is a GenerationError that names it and how it ended."""
        for number, request in enumerate(requests):
            check_request(number, request, params, self.model_window)  # the rest is for the workers to say
        yield from self._share(requests, params)

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """As Engine.score."""
        found = dict(self._share(sequences, None))
        return [found[number] for number in range(len(sequences))]

    def update_weights(self, model: PreTrainedModel) -> NoReturn:
        """Raises UserError: evaluation measures a checkpoint as it is."""
        raise UserError("an engine with data_parallel workers samples from a checkpoint: its weights cannot be updated")

    def close(self) -> None:
        """Ends the workers: idle ones close their engines, those at work are killed."""
        workers, self.workers = self.workers, []
        for worker in workers:
            worker.dismiss()
        for worker in workers:
            worker.end()

    def _share(self, work: Sequence[Any], params: SamplingParams | None) -> Iterator[tuple[int, Any]]:
        """Numbers and results of the pieces of work, as they come: samples, or scores where there are no params."""
        if not self.workers:
            raise GenerationError("this engine is closed: its workers have ended")
        self._call += 1
        call, given, missing = self._call, 0, len(work)
        order = dealt(work, len(self.workers))
        smallest = min(2 * self._max_rows, math.ceil(len(work) / len(self.workers)))
        try:
            while missing:
                if call != self._call or not self.workers:
                    raise GenerationError("this stream has ended: its engine was closed, or given other work")
                # A first batch for everyone, then a second that waits.
                for depth, worker in itertools.product((1, 2), self.workers):
                    if worker.busy < depth and given < len(work):
                        size = max(smallest, math.ceil((len(work) - given) / (2 * len(self.workers))))
                        numbers = order[given : given + size]
                        worker.give(("work", call, numbers, [work[number] for number in numbers], params))
                        given += size
                for kind, of, content in self._messages():
                    if kind == "error" and of == call:
                        raise content
                    if kind == "result" and of == call:
                        missing -= 1
                        yield content
        finally:
            if missing and call == self._call:
                for worker in self.workers:
                    worker.tell(("drop", call))

    def _messages(self) -> list[tuple[str, int, Any]]:
        """What the workers have to say, once one has, as (kind, call, content). A death is an error of this call."""
        spoken = wait([worker.connection for worker in self.workers], timeout=POLL_SECONDS)
        heard = []
        for worker in self.workers:
            if worker.connection in spoken or worker.process.poll() is not None:
                try:
                    heard.append(worker.hear())
                except (EOFError, OSError):
                    heard.append(("error", self._call, GenerationError(worker.cause_of_death())))
                    self.close()
                    break
        return heard


class Worker:
    """A worker's process as its parent sees it. `busy` counts what it was given and is not done with."""

    def __init__(self, name: str, place: dict[str, str], job: Any) -> None:
        self.name = name
        self.connection, theirs = Pipe()
        own = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
        # In a process group of its own, Ctrl-C at the terminal does not reach it and its children end with it.
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(theirs.fileno())],
            env={**own, **place, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            process_group=0,
        )
        theirs.close()
        self.busy = 0
        self.give(job)

    def give(self, job: Any) -> None:
        """Something to do, which the worker says 'ready' or 'done' to in the end."""
        self.busy += 1
        self.tell(job)

    def tell(self, message: Any) -> None:
        """A message; a dead worker's silence says more than an error here would."""
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def hear(self) -> tuple[str, int, Any]:
        """Its next message. Raises EOFError or OSError where it died and left none."""
        if self.process.poll() is not None and not self.connection.poll():
            raise EOFError
        message: tuple[str, int, Any] = self.connection.recv()
        self.busy -= message[0] in ("ready", "done")
        return message

    def cause_of_death(self) -> str:
        """One line that names the worker and how it ended."""
        try:
            code = self.process.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            return f"{self.name} (process {self.process.pid}) fell silent"
        how = f"ended with exit code {code}; its own output says why"
        if code < 0:
            name = signal.Signals(-code).name
            how = f"was killed by {name}" + (", as happens where memory runs out" if name == "SIGKILL" else "")
        return f"{self.name} (process {self.process.pid}) {how}"

    def dismiss(self) -> None:
        """Asks it to close its engine; one at work has no time for that and is killed."""
        deadline = time.monotonic() + HEAR_SECONDS
        with contextlib.suppress(EOFError, OSError):  # that it is done may not have been heard yet
            while self.busy and self.connection.poll(max(0.0, deadline - time.monotonic())):
                self.hear()
        if self.busy:
            self._kill()
        else:
            self.tell(None)

    def end(self) -> None:
        """Waits for its end, and makes sure of it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(CLOSE_SECONDS)
        self._kill()
        self.process.wait()
        self.connection.close()

    def _kill(self) -> None:
        """Kills the process with all its children, also those it left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def dealt(work: Sequence[Any], count: int) -> list[int]:
    """The numbers of the pieces of work, dealt to `count` hands in turn; requests of one prompt stay together."""

    def prompt_of(number: int) -> Any:
        piece = work[number]
        return piece.prompt_ids if isinstance(piece, Request) else number

    groups = [list(numbers) for _, numbers in itertools.groupby(range(len(work)), key=prompt_of)]
    return [number for hand in range(count) for group in groups[hand::count] for number in group]


def environments(count: int, tensor_parallel: int) -> list[dict[str, str]]:
    """What each of `count` workers has in its environment: its own GPUs, or on a CPU its share of the threads.

    Raises UserError where there are fewer GPUs than the workers need.
    """
    if not torch.cuda.is_available():
        return [{"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))}] * count
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    devices = visible.split(",")[: torch.cuda.device_count()]
    if len(devices) < count * tensor_parallel:
        raise UserError(
            f"data_parallel {count} with tensor_parallel {tensor_parallel} needs {count * tensor_parallel} GPUs, but"
            f" {len(devices)} are visible: lower one of them"
        )
    starts = range(0, count * tensor_parallel, tensor_parallel)
    return [{"CUDA_VISIBLE_DEVICES": ",".join(devices[start : start + tensor_parallel])} for start in starts]


# ---------------------------------------------------------------------------------------------------------------------
# In the worker's process


def serve() -> None:
    """A worker: builds its engine, does the work it is given, and ends with its parent."""
    parent = Connection(int(sys.argv[1]))
    build, settings, checkpoint, dtype = parent.recv()
    inbox = Inbox(parent)
    quiet_transformers()
    try:
        engine: Engine = build(settings, checkpoint, dtype=dtype)
    except UserError as error:
        parent.send(("error", 0, error))
        return
    parent.send(("ready", 0, (engine.max_model_len, engine.model_window)))
    for call, numbers, work, params in inbox:
        try:
            results = perform(engine, work, params) if call > inbox.dropped else iter(())
            for place, result in results:
                if call <= inbox.dropped:
                    break
                parent.send(("result", call, (numbers[place], result)))
        except UserError as error:
            parent.send(("error", call, error))
        parent.send(("done", call, None))
    engine.close()


def perform(engine: Engine, work: Sequence[Any], params: SamplingParams | None) -> Iterator[tuple[int, Any]]:
    """The places and results of what a batch asks for: samples, or scores where there are no params."""
    return iter(enumerate(engine.score(work))) if params is None else engine.stream(work, params)


class Inbox:
    """What the parent sends, read by a thread: neither side's sending ever waits for the other to end its work.

    Iterating gives the batches of calls that are not dropped, until the parent closes the engine.
    """

    def __init__(self, parent: Connection) -> None:
        self.dropped = 0
        """The last call whose results nobody wants any more, nor those of calls before it."""
        self._batches: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._parent = parent
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while (message := self._parent.recv()) is not None:
                kind, *content = message
                if kind == "drop":
                    (self.dropped,) = content
                else:
                    self._batches.put(content)
            self._batches.put(None)
            time.sleep(CLOSE_SECONDS)
        os.killpg(0, signal.SIGKILL)  # the parent died: nobody is left to end this process and its children

    def __iter__(self) -> Iterator[Any]:
        while (batch := self._batches.get()) is not None:
            yield batch
