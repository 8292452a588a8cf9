import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
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
REQUESTS = [Request((1, 2 + number // 4), number, key=("task", str(number), 0, 0)) for number in range(40)]


@pytest.fixture
def start():
    """Starts a WorkerEngine; ends what the test started."""
    engines = []

    def build(factory, checkpoint=Path("nowhere"), count=2, max_rows=512):
        settings = Generation(data_parallel=count, max_rows=max_rows)
        engines.append(WorkerEngine(settings, checkpoint, dtype="float32", build=factory))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def engine():
    """Two workers for the tests that leave them alive: starting some takes seconds."""
    engine = WorkerEngine(TWO, Path("nowhere"), dtype="float32", build=worker_engines.slow)
    yield engine
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


def test_every_request_is_answered_once_and_both_workers_take_part(engine):
    assert engine.max_model_len == 64
    found = list(engine.stream(REQUESTS, PARAMS))
    numbers = [number for number, _ in found]
    assert sorted(numbers) == list(range(40))
    for number, sample in found:
        assert sample.token_ids == [*REQUESTS[number].prompt_ids, number]
    known = [json.loads(sample.text) for _, sample in found]
    assert {process.pid for process in processes(engine)} == {entry["pid"] for entry in known}
    assert {(entry["data_parallel"], entry["dtype"], entry["folder"]) for entry in known} == {(1, "float32", "nowhere")}
    assert {entry["OMP_NUM_THREADS"] for entry in known} == {"1"}
    hands = {entry["pid"]: [] for entry in known}
    for number, entry in zip(numbers, known, strict=True):
        hands[entry["pid"]].append(number)
    # Samples of one prompt stay together, every other prompt goes to the same worker; these engines begin at the end.
    assert sorted(hands.values()) == [[n for n in range(39, -1, -1) if n // 4 % 2 == hand] for hand in (0, 1)]
    assert [sample.token_ids[-1] for sample in engine.generate(REQUESTS[:3], PARAMS)] == [0, 1, 2]
    assert list(engine.stream([], PARAMS)) == []


def test_scores_come_in_order(engine):
    sequences = [(1, number, number + 1) for number in range(25)]
    assert engine.score(sequences) == [[float(n), n + 1.0] for n in range(25)]


def test_an_unfit_request_is_refused_before_the_first_sample(engine):
    with pytest.raises(UserError, match=r"request 3 \(task, long, 0, 0\): a prompt of 64 tokens"):
        next(engine.stream([*REQUESTS[:3], Request((1,) * 64, 0, key=("task", "long", 0, 0))], PARAMS))


def test_a_stream_can_be_left_and_the_engine_used_again(engine):
    for taken in range(3):
        stream = engine.stream([Request((9,), 1000 + number) for number in range(400)], PARAMS)
        for _ in range(taken + 1):
            next(stream)
        stream.close()
        began = time.monotonic()
        assert [sample.token_ids[-1] for sample in engine.generate(REQUESTS[:4], PARAMS)] == [0, 1, 2, 3]
        assert time.monotonic() - began < 2, "400 samples take 6 s: what nobody wants is not sampled"


def test_of_two_streams_at_once_the_later_one_counts(engine):
    first = engine.stream(REQUESTS, PARAMS)
    next(first)
    assert len(engine.generate(REQUESTS[:2], PARAMS)) == 2
    with pytest.raises(GenerationError, match="given other work"):
        list(first)


def test_weights_cannot_be_updated(engine):
    with pytest.raises(UserError, match="cannot be updated"):
        engine.update_weights(tiny_model(8))


@pytest.mark.parametrize(
    ("seed", "kind", "message"),
    [(10_001, UserError, "seed 10001 is not to be had"), (10_002, GenerationError, "out of memory")],
)
def test_an_engines_error_is_passed_on_and_the_workers_live(engine, seed, kind, message):
    with pytest.raises(kind, match=f"^{message}$") as error:
        engine.generate([*REQUESTS[:20], Request((1,), seed), *REQUESTS[20:]], PARAMS)
    assert type(error.value) is kind
    assert len(engine.generate(REQUESTS, PARAMS)) == 40


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_workers_sample_what_one_engine_does(tiny_workers, tiny_checkpoint, temperature):
    params = SamplingParams(12, temperature, top_p=0.9)
    prompts = [(5, 6, 7), (8, 9), (10, 11, 12, 13)]
    requests = [Request(prompts[number % 3], 100 + number) for number in range(24)]
    alone = build_engine(Generation(), tiny_checkpoint, dtype="float32")
    assert tiny_workers.max_model_len == alone.max_model_len == 256
    found, expected = tiny_workers.generate(requests, params), alone.generate(requests, params)
    assert [sample.token_ids for sample in found] == [sample.token_ids for sample in expected]
    assert [sample.finish_reason for sample in found] == [sample.finish_reason for sample in expected]
    for ours, theirs in zip(tiny_workers.score(prompts), alone.score(prompts), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.fixture(scope="module")
def tiny_workers(tiny_checkpoint):
    """Two workers with the tiny checkpoint."""
    engine = build_engine(TWO, tiny_checkpoint, dtype="float32")
    assert isinstance(engine, WorkerEngine)
    yield engine
    engine.close()


@pytest.mark.slow
def test_messages_larger_than_a_sockets_buffer_do_not_block(start):
    requests = [Request(tuple(range(63)), number) for number in range(5_000)]
    samples = start(worker_engines.fast, count=1).generate(requests, PARAMS)
    assert [sample.token_ids[-1] for sample in samples] == list(range(5_000))


@pytest.mark.slow
def test_more_than_two_rounds_of_rows_go_out_in_batches_to_whoever_is_free(start, tmp_path):
    engine = start(worker_engines.uneven, tmp_path, max_rows=4)
    requests = [Request((1,), number) for number in range(120)]
    found = list(engine.stream(requests, PARAMS))
    assert sorted(number for number, _ in found) == list(range(120))
    shares = Counter(json.loads(sample.text)["pid"] for _, sample in found)
    assert len(shares) == 2
    assert max(shares.values()) > 1.5 * min(shares.values()), "one worker is five times as fast"


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_a_killed_worker_is_one_line_what_came_before_is_whole_and_nothing_is_left_running(start, tmp_path):
    engine = start(worker_engines.with_child, tmp_path)
    children = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert len(children) == 2
    assert all(map(is_running, children))
    workers = processes(engine)
    stream = engine.stream(REQUESTS, PARAMS)
    found = [next(stream) for _ in range(5)]
    workers[1].kill()
    killed = time.monotonic()
    cause = rf"^generation worker 2 of 2 \(process {workers[1].pid}\) was killed by SIGKILL, as .* memory runs out$"
    with pytest.raises(GenerationError, match=cause):
        found.extend(stream)
    assert time.monotonic() - killed < 5
    assert all(sample.token_ids[-1] == number for number, sample in found)
    assert all(worker.returncode is not None for worker in workers)
    assert all(map(ends, children)), "nor are processes left that the workers started"
    with pytest.raises(GenerationError, match="this engine is closed"):
        engine.generate(REQUESTS, PARAMS)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "code"), [(10_003, 1), (10_004, 3)])
def test_a_worker_that_ends_is_named_with_its_exit_code(start, capfd, seed, code):
    engine = start(worker_engines.fast)
    cause = rf"^generation worker [12] of 2 \(process \d+\) ended with exit code {code}; its own output says why$"
    with pytest.raises(GenerationError, match=cause):
        engine.generate([*REQUESTS, Request((1,), seed)], PARAMS)
    assert ("RuntimeError: a bug" in capfd.readouterr().err) == (code == 1)


def test_an_engine_that_cannot_be_built_is_the_same_error_as_without_workers(start, capfd):
    with pytest.raises(UserError, match=r"^nowhere: no such checkpoint folder$"):
        start(worker_engines.unbuildable)
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_worker_that_dies_as_it_starts_is_named(start):
    with pytest.raises(GenerationError, match=r"generation worker 1 of 1 .* ended with exit code 4"):
        start(worker_engines.exiting, count=1)


@pytest.mark.slow
def test_close_lets_idle_engines_close_and_may_be_called_again(start, tmp_path):
    engine = start(worker_engines.fast, tmp_path)
    engine.generate(REQUESTS, PARAMS)
    pids = {process.pid for process in processes(engine)}
    engine.close()
    assert {int(path.name) for path in tmp_path.iterdir()} == pids
    assert not any(map(is_running, pids))
    engine.close()


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_workers_at_work(start):
    engine = start(worker_engines.stuck)
    stream = engine.stream(REQUESTS, PARAMS)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    pids = [process.pid for process in processes(engine)]
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 2
    assert not any(map(is_running, pids))


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


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["stuck", "fast"])
def test_workers_end_with_a_parent_that_was_killed_or_forgot_to_close(factory):
    command = [sys.executable, "-c", SCRIPT, factory]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as parent:
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
