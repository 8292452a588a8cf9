import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import worker_engines
from tiny_models import tiny_model

from gift.cli import UserError
from gift.generation import GenerationError, Request, SamplingParams
from gift.generation.build import build_engine
from gift.generation.workers import WorkerEngine, environments
from gift.recipe import Generation

TWO = Generation(data_parallel=2)
PARAMS = SamplingParams(8)
REQUESTS = [Request((1, 2 + number % 3), number, key=("task", str(number), 0, 0)) for number in range(40)]


@pytest.fixture
def start():
    """Starts a WorkerEngine; ends what the test started."""
    engines = []

    def build(factory, checkpoint=Path("nowhere"), settings=TWO):
        engines.append(WorkerEngine(settings, checkpoint, dtype="float32", build=factory))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


def processes(engine: WorkerEngine) -> list[subprocess.Popen]:
    return [worker.process for worker in engine.workers]


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ends(pid: int, seconds: float = 10) -> bool:
    """Whether the process is gone within so many seconds."""
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


# ---------------------------------------------------------------------------------------------------------------------
# Sharing the work


def test_every_request_is_answered_once_and_both_workers_take_part(start):
    engine = start(worker_engines.slow)
    assert engine.max_model_len == 64
    found = list(engine.stream(REQUESTS, PARAMS))
    assert sorted(number for number, _ in found) == list(range(40))
    for number, sample in found:
        assert sample.token_ids == [*REQUESTS[number].prompt_ids, number]
    known = [json.loads(sample.text) for _, sample in found]
    assert {process.pid for process in processes(engine)} == {entry["pid"] for entry in known}
    assert {(entry["data_parallel"], entry["dtype"], entry["folder"]) for entry in known} == {(1, "float32", "nowhere")}
    assert {entry["OMP_NUM_THREADS"] for entry in known} == {"1"}
    numbers = [number for number, _ in found]
    assert numbers.index(39) < numbers.index(0), "samples come as they finish: these engines begin with the last"
    assert [sample.token_ids[-1] for sample in engine.generate(REQUESTS[:3], PARAMS)] == [0, 1, 2]
    assert list(engine.stream([], PARAMS)) == []


def test_scores_come_in_order(start):
    sequences = [(1, number, number + 1) for number in range(25)]
    assert start(worker_engines.echo).score(sequences) == [[float(n), n + 1.0] for n in range(25)]


def test_messages_larger_than_a_sockets_buffer_do_not_block(start):
    engine = start(worker_engines.echo)
    requests = [Request(tuple(range(63)), number) for number in range(20_000)]
    samples = engine.generate(requests, PARAMS)
    assert [sample.token_ids[-1] for sample in samples] == list(range(20_000))


def test_an_unfit_request_is_refused_before_the_first_sample(start):
    engine = start(worker_engines.echo)
    with pytest.raises(UserError, match=r"request 3 \(task, long, 0, 0\): a prompt of 64 tokens"):
        next(engine.stream([*REQUESTS[:3], Request((1,) * 64, 0, key=("task", "long", 0, 0))], PARAMS))


def test_a_stream_can_be_left_and_the_engine_used_again(start):
    engine = start(worker_engines.slow)
    for taken in range(3):
        stream = engine.stream([Request((9,), 1000 + number) for number in range(200)], PARAMS)
        for _ in range(taken + 1):
            next(stream)
        stream.close()
        began = time.monotonic()
        assert [sample.token_ids[-1] for sample in engine.generate(REQUESTS[:4], PARAMS)] == [0, 1, 2, 3]
        assert time.monotonic() - began < 2, "200 samples take 5 s: what nobody wants is not sampled"


def test_two_streams_at_once_are_refused(start):
    engine = start(worker_engines.slow)
    first = engine.stream(REQUESTS, PARAMS)
    next(first)
    assert len(engine.generate(REQUESTS[:2], PARAMS)) == 2
    with pytest.raises(GenerationError, match="given other work"):
        list(first)


def test_weights_cannot_be_updated(start):
    with pytest.raises(UserError, match="cannot be updated"):
        start(worker_engines.echo).update_weights(tiny_model(8))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_workers_sample_what_one_engine_does(tiny_checkpoint, temperature):
    params = SamplingParams(12, temperature, top_p=0.9)
    prompts = [(5, 6, 7), (8, 9), (10, 11, 12, 13)]
    requests = [Request(prompts[number % 3], 100 + number) for number in range(24)]
    alone = build_engine(Generation(), tiny_checkpoint, dtype="float32")
    both = build_engine(TWO, tiny_checkpoint, dtype="float32")
    assert isinstance(both, WorkerEngine)
    try:
        assert both.max_model_len == alone.max_model_len == 256
        found, expected = both.generate(requests, params), alone.generate(requests, params)
        assert [sample.token_ids for sample in found] == [sample.token_ids for sample in expected]
        assert [sample.finish_reason for sample in found] == [sample.finish_reason for sample in expected]
        scores, reference = both.score(prompts), alone.score(prompts)
        for ours, theirs in zip(scores, reference, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
    finally:
        both.close()


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize(("name", "kind"), [("user", UserError), ("memory", GenerationError)])
def test_an_engines_error_is_passed_on_and_the_workers_live(start, name, kind):
    engine = start(worker_engines.of_seed, Path(name))
    with pytest.raises(UserError, match={"user": "seed 7 is not to be had", "memory": "out of memory"}[name]) as error:
        engine.generate(REQUESTS, PARAMS)
    assert type(error.value) is kind
    assert len(engine.generate(REQUESTS[8:], PARAMS)) == 32


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("exit", "ended with exit code 3; its own output says why"),
        ("kill", "was killed by SIGKILL, as happens where memory runs out"),
        ("bug", "ended with exit code 1; its own output says why"),
    ],
)
def test_a_dead_worker_is_one_line_that_names_it_and_the_others_are_stopped(start, capfd, name, how):
    engine = start(worker_engines.of_seed, Path(name))
    workers = processes(engine)
    with pytest.raises(GenerationError, match=rf"^generation worker [12] of 2 \(process \d+\) {how}$"):
        engine.generate(REQUESTS, PARAMS)
    assert all(process.returncode is not None for process in workers)
    assert ("RuntimeError: a bug" in capfd.readouterr().err) == (name == "bug")
    with pytest.raises(GenerationError, match="this engine is closed"):
        engine.generate(REQUESTS, PARAMS)


def test_what_came_before_a_death_is_whole(start):
    engine = start(worker_engines.slow)
    first, second = processes(engine)
    found = []
    with pytest.raises(GenerationError, match=rf"worker 2 of 2 \(process {second.pid}\) was killed by SIGKILL"):
        for number, sample in engine.stream(REQUESTS, PARAMS):
            found.append((number, sample.token_ids[-1]))
            if len(found) == 5:
                second.kill()
                killed = time.monotonic()
    assert time.monotonic() - killed < 5
    assert len(found) >= 5
    assert all(number == seed for number, seed in found)
    assert first.returncode is not None


def test_an_engine_that_cannot_be_built_is_the_same_error_as_without_workers(start, capfd):
    with pytest.raises(UserError, match=r"^nowhere: no such checkpoint folder$"):
        start(worker_engines.unbuildable)
    assert capfd.readouterr().err == ""


def test_a_worker_that_dies_as_it_starts_is_named(start):
    with pytest.raises(GenerationError, match=r"generation worker [12] of 2 .* ended with exit code 4"):
        start(worker_engines.exiting)


def test_close_lets_idle_engines_close_and_may_be_called_again(start, tmp_path):
    engine = start(worker_engines.echo, tmp_path)
    engine.generate(REQUESTS, PARAMS)
    pids = {process.pid for process in processes(engine)}
    engine.close()
    assert {int(path.name) for path in tmp_path.iterdir()} == pids
    assert not any(map(is_running, pids))
    engine.close()


def test_close_does_not_wait_for_workers_at_work(start):
    engine = start(worker_engines.stuck)
    stream = engine.stream(REQUESTS, PARAMS)
    interrupt_after(1.0)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    pids = [process.pid for process in processes(engine)]
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 2
    assert not any(map(is_running, pids))


def interrupt_after(seconds: float) -> None:
    """Ctrl-C, as the terminal sends it to this process alone, after a while."""
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, seconds)


def test_a_workers_own_children_end_with_it(start, tmp_path):
    engine = start(worker_engines.with_child, tmp_path)
    children = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert len(children) == 2
    assert all(map(is_running, children))
    processes(engine)[0].kill()
    with pytest.raises(GenerationError, match="worker 1 of 2 .* was killed by SIGKILL"):
        engine.generate(REQUESTS, PARAMS)
    assert all(map(ends, children))


SCRIPT = """
import sys
from pathlib import Path
import worker_engines
from gift.generation import Request, SamplingParams
from gift.generation.workers import WorkerEngine
from gift.recipe import Generation

engine = WorkerEngine(Generation(data_parallel=2), Path("nowhere"), build=getattr(worker_engines, sys.argv[1]))
print(*(worker.process.pid for worker in engine.workers), flush=True)
stream = engine.stream([Request((1,), number) for number in range(100)], SamplingParams(8))
if sys.argv[1] == "stuck":
    next(stream)
"""


@pytest.mark.parametrize("factory", ["stuck", "echo"])
def test_workers_end_with_a_parent_that_was_killed_or_forgot_to_close(factory):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, factory], stdout=subprocess.PIPE, text=True, env=env
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        if factory == "stuck":
            time.sleep(0.5)
            parent.kill()
        assert parent.wait(20) == (-signal.SIGKILL if factory == "stuck" else 0)
    assert len(pids) == 2
    assert all(map(ends, pids))


# ---------------------------------------------------------------------------------------------------------------------
# Devices


def test_gpus_are_dealt_out_in_order(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environments(2, 2) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-ab,7,1,0")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in environments(3, 1)] == ["4", "GPU-ab", "7"]
    with pytest.raises(UserError, match="data_parallel 3 with tensor_parallel 2 needs 6 GPUs, but 5 are visible"):
        environments(3, 2)


def test_threads_are_shared_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert environments(3, 1) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert environments(16, 1) == [{"OMP_NUM_THREADS": "1"}] * 16
