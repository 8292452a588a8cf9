import contextlib
import hashlib
import marshal
import os
import shutil
import socket
import threading
import time
import uuid
from pathlib import Path

import pytest
from hostile_programs import PROGRAMS

from evals import sandbox as sandboxes
from evals.oracles import Expected, accepts
from evals.sandbox import Limits, Program, Reply, Sandbox, StoppedError, works
from gift.cli import UserError

SHORT = Limits(memory_bytes=1 << 29, load_s=3, total_s=6)  # for those that never end
PATIENT = Limits(memory_bytes=1 << 29, load_s=60, total_s=120)  # for those that end, on a busy machine
SECRET = "hunter2-hunter2"
TOOLS = {"bubblewrap": "bwrap", "namespaces": "unshare", "none": "true"}


@pytest.fixture(params=TOOLS)
def box(request):
    """A sandbox of every kind that this machine offers."""
    found = Sandbox(request.param, PATIENT)
    if not shutil.which(TOOLS[request.param]) or not works(found):
        pytest.skip(f"no {request.param} here")
    return found


@pytest.fixture
def isolated():
    """The sandbox that this machine offers."""
    try:
        return sandboxes.sandbox(limits=SHORT)
    except UserError as error:
        pytest.skip(str(error))


def run(box: Sandbox, source: str, *calls, seconds: float | None = None) -> list:
    """The outputs of `answer` on these arguments, as Python sees them."""
    limits = None if seconds is None else [[seconds] * len(calls)]
    replies = list(box.run(Program([source], "answer", [[[call] for call in calls]], limits)))
    return [marshal.loads(reply.payload) if reply.kind == "value" else (reply.kind, reply.payload) for reply in replies]


# ---------------------------------------------------------------------------------------------------------------------
# Honest programs


def test_outputs_of_every_kind_come_back_as_they_were(box):
    values = [
        None, True, False, 0, -1, 2**31, -(2**200), 0.5, float("inf"), -0.0, 1 + 2j, "", "é\ud800", b"\x00",
        [1, [2]], (1, (2,)), {1, "a"}, frozenset({(1, 2)}), {"a": 1, (1, 2): None}, list(range(10_000)),
    ]  # fmt: skip
    outputs = run(box, "def answer(x): return x", *values)
    assert [(type(each), each) for each in outputs] == [(type(each), each) for each in values]


def test_subclasses_count_as_what_they_hold_and_other_objects_as_no_data(box):
    source = """
import collections, decimal, enum, fractions
class Colour(enum.IntEnum): RED = 3
class Loud(str):
    def __str__(self): return 'no'
def answer(n):
    return [
        collections.Counter('aab'), collections.OrderedDict(a=1), collections.namedtuple('P', 'x y')(1, 2), Colour.RED,
        [Loud('yes')], decimal.Decimal('0.5'), fractions.Fraction(4, 2), fractions.Fraction(1, 3), object(), range(3),
        iter([]), answer, decimal.Decimal('0.1'),
    ][n]
"""
    other = ("other", b"")
    expected = [{"a": 2, "b": 1}, {"a": 1}, (1, 2), 3, ["yes"], 0.5, 2, *[other] * 6]
    assert run(box, source, *range(13)) == expected


def test_numpy_is_there_and_its_scalars_are_numbers(box):
    source = "import numpy\ndef answer(x): return [numpy.int64(x), numpy.float64(0.5), numpy.bool_(1)]"
    assert [[type(each) for each in output] for output in run(box, source, 7)] == [[int, float, bool]]


def test_an_output_too_long_to_send_is_known_by_its_digest(box):
    source = "def answer(x): return [str(i) * 1000 for i in range(x)]"
    expected = marshal.dumps([str(i) * 1000 for i in range(6000)], 2)
    assert run(box, source, 6000) == [("digest", hashlib.sha256(expected).digest())]
    assert run(box, "def answer(x): return 'a' * x", 1 << 24) == [
        ("digest", hashlib.sha256(marshal.dumps("a" * (1 << 24), 2)).digest())
    ]


def test_calls_see_fresh_arguments_and_groups_a_fresh_module(box):
    source = "seen = []\ndef answer(xs):\n    seen.append(len(xs))\n    xs.append(0)\n    return list(seen)"
    argument = [1]
    program = Program([source], "answer", [[[argument], [argument]], [[argument]]])
    assert [marshal.loads(reply.payload) for reply in box.run(program)] == [[1], [1, 1], [1]]
    assert argument == [1]


def test_what_a_program_does_once_it_is_defined_may_fail(box):
    for rest in ("answer(input())", "raise SystemExit(1)", "assert answer(1) == 5", "print(answer(1))\nundefined"):
        assert run(box, f"def answer(x): return 2 * x\n{rest}", 21) == [42]
    assert run(box, "def answer(x): return __name__\nif __name__ == '__main__': answer = None", 0) == ["solution"]


def test_an_exception_is_a_reply_and_the_next_call_goes_on(box):
    assert run(box, "def answer(x): return 1 // x", 0, 1) == [("raised", b"ZeroDivisionError"), 1]


def test_a_call_past_its_limit_stops_the_program(box):
    begin = time.monotonic()
    with pytest.raises(StoppedError, match="took too long to answer") as stopped:
        run(box, "import time\ndef answer(x): time.sleep(x)", 0, 60, seconds=0.5)
    assert stopped.value.status == "timeout"
    assert time.monotonic() - begin < 40


def test_threads_and_temporary_files_work(box):
    source = """
import concurrent.futures, tempfile
def answer(x):
    with tempfile.TemporaryFile() as file, concurrent.futures.ThreadPoolExecutor(4) as pool:
        return file.write(b'x' * x) + sum(pool.map(int, '12'))
"""
    assert run(box, source, 39) == [42]


def test_closing_the_sandbox_ends_what_runs(box):
    threading.Timer(0.7, box.close).start()
    with pytest.raises(StoppedError):
        run(box, "import time\ndef answer(x): time.sleep(60)", 0)
    with pytest.raises(StoppedError, match="closed"):
        run(box, "def answer(x): return x", 0)


def test_a_sandbox_that_does_not_start_is_no_fault_of_the_program(monkeypatch):
    monkeypatch.setattr(sandboxes, "_command", lambda *_: ["/bin/false"])
    with pytest.raises(StoppedError, match="died before it could start") as stopped:
        run(Sandbox("bubblewrap"), "def answer(x): return x", 0)
    assert stopped.value.status == "error"


def test_a_sandbox_that_is_gone_is_no_fault_of_the_program(monkeypatch):
    monkeypatch.setattr(sandboxes, "_command", lambda *_: ["/no/such/tool"])
    with pytest.raises(StoppedError, match="did not start: No such file") as stopped:
        run(Sandbox("bubblewrap"), "def answer(x): return x", 0)
    assert stopped.value.status == "error"


def test_without_isolation_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(sandboxes, "_isolation", lambda: None)
    with pytest.raises(UserError, match=r"install bubblewrap .* or give --unsafe-code"):
        sandboxes.sandbox()
    assert sandboxes.sandbox(unsafe=True).isolation == "none"


def test_tools_that_do_not_work_are_not_taken_for_isolation(monkeypatch, tmp_path):
    for tool in ("bwrap", "unshare"):
        (tmp_path / tool).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    sandboxes._isolation.cache_clear()
    try:
        with pytest.raises(UserError, match="install bubblewrap"):
            sandboxes.sandbox()
    finally:
        sandboxes._isolation.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# Hostile programs


@pytest.fixture
def host(tmp_path, monkeypatch):
    """What the programs are after: a folder with a secret, a server, an abstract socket; and what they filled in."""
    (tmp_path / "secret").write_text(SECRET)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    abstract = f"host-{os.getpid()}"
    token = f"hostile-{uuid.uuid4().hex}-"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        local = stack.enter_context(socket.socket(socket.AF_UNIX))
        local.bind(f"\0{abstract}")
        local.listen()
        for each in (server, local):
            each.setblocking(False)
        yield (
            {
                "folder": str(tmp_path),
                "pid": os.getpid(),
                "secret": SECRET,
                "repository": str(Path(__file__).parents[2]),
                "port": server.getsockname()[1],
                "abstract": abstract,
                "token": token,
            },
            (server, local),
        )


def filled(source: str, values: dict) -> str:
    """A hostile program with the host's particulars."""
    for name, value in values.items():
        source = source.replace("{" + name + "}", str(value))
    return source


def verdict(box: Sandbox, source: str, seconds: float = 1.0) -> bool:
    """Whether the program passes as one that doubles."""
    expected = Expected.of(Reply("value", marshal.dumps(42, 2), 0.0))
    program = Program([source], "answer", [[[21], [21], [21]]], [[seconds] * 3])
    try:
        replies = list(box.run(program))
    except StoppedError:
        return False
    assert len(replies) == 3
    return all(accepts("humaneval", "answer", [21], expected, reply, 0.0) for reply in replies)


def test_hostile_programs_are_contained_and_fail(isolated, host):
    values, servers = host
    folder = Path(values["folder"])
    assert verdict(isolated, "def answer(x): return 2 * x", seconds=60.0)
    passed, slow = [], {}
    for name, source in PROGRAMS.items():
        begin = time.monotonic()
        if verdict(isolated, filled(source, values)):
            passed.append(name)
        slow[name] = time.monotonic() - begin
        assert [path.name for path in folder.iterdir()] == ["secret"], name
    assert passed == []
    assert {name: seconds for name, seconds in slow.items() if seconds > 60} == {}
    assert (folder / "secret").read_text() == SECRET
    for server in servers:
        with pytest.raises(BlockingIOError):
            server.accept()
    assert verdict(isolated, "def answer(x): return 2 * x", seconds=60.0)
    assert not list(Path("/tmp").glob(f"{values['token']}*"))


def test_nothing_of_the_host_can_be_seen(box):
    if box.isolation == "none":
        pytest.skip("nothing is hidden without isolation")
    source = """
import os, socket
def answer(x):
    return [
        sorted(os.environ), os.path.exists('/home'), os.path.exists('/proc/1'), os.path.exists('/sys'),
        socket.if_nameindex(), [d for d in range(64) if os.path.exists(f'/dev/fd/{d}')], os.listdir('/tmp'),
    ]
"""
    [(environment, *seen)] = run(box, source, 0)
    assert set(environment) <= {*sandboxes.ENVIRONMENT, "PWD", "LC_CTYPE"}
    assert seen == [False, False, False, [(1, "lo")], [], []]


@pytest.mark.parametrize(
    "name",
    [
        "reading a file",
        "reading through a link",
        "reading the repository",
        "home",
        "parent's environment",
        "any process's environment",
    ],
)
def test_the_attacks_would_work_without_isolation(name, host, monkeypatch):
    values, _ = host
    monkeypatch.setitem(sandboxes.ENVIRONMENT, "HOME", str(values["folder"]))
    try:
        assert verdict(Sandbox("none", PATIENT), filled(PROGRAMS[name], values), seconds=60.0)
    finally:
        Path("/tmp", values["token"]).unlink(missing_ok=True)


def descendants() -> set[str]:
    """The processes below this one."""
    parents = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            parents[pid] = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[1]
    found, size = {str(os.getpid())}, 0
    while len(found) > size:
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found - {str(os.getpid())}


def test_no_process_is_left_when_the_verdict_is_known(box):
    before, during = descendants(), set()
    watch = threading.Timer(1.0, lambda: during.update(descendants() - before))
    watch.start()
    with pytest.raises(StoppedError):
        run(box, "import time\ndef answer(x): time.sleep(60)", 0, seconds=2.5)
    watch.join()
    assert during
    deadline = time.monotonic() + 30
    while any(Path("/proc", pid).exists() for pid in during) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path("/proc", pid).exists() for pid in during)
