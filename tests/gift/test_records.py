"""Files that outlive their writer: kills, full disks, torn lines, rival processes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gift import records
from gift.cli import UserError
from gift.records import (
    JsonlLog,
    RunDir,
    atomic_path,
    read_json,
    read_jsonl,
    read_table,
    sha256_file,
    sha256_json,
    sha256_weights,
    write_json,
    write_table,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def python(code, *arguments, **options):
    """A subprocess that runs `code` with this repository's packages and announces itself by a line on stdout."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Whole files


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failed_write_leaves_the_old_content(tmp_path, kind):
    target = tmp_path / "target"

    def write(text, fail=False):
        with atomic_path(target) as scratch:
            if kind == "folder":
                scratch.mkdir()
            (scratch / "a" if kind == "folder" else scratch).write_text(text)
            if fail:
                raise RuntimeError

    def content():
        return (target / "a" if kind == "folder" else target).read_text()

    write("old")
    with pytest.raises(RuntimeError):
        write("new", fail=True)
    assert content() == "old"
    write("new")
    assert content() == "new"
    assert names(tmp_path) == ["target"]


def test_a_replaced_folder_holds_nothing_of_the_old_one(tmp_path):
    for name in ("one", "two"):
        with atomic_path(tmp_path / "model") as scratch:
            (scratch / "nested").mkdir(parents=True)
            (scratch / "nested" / name).touch()
    assert names(tmp_path / "model" / "nested") == ["two"]


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_kept(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead, living, other = (f".model.{ended.pid}.tmp", f".model.{os.getppid()}.tmp", f".model-2.{ended.pid}.tmp")
    for name in (dead, living, other):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
    write_json(tmp_path / "model", 1)
    assert names(tmp_path) == sorted([living, other, "model"])


@pytest.mark.parametrize(("write", "value"), [(write_json, "x" * 100_000), (write_table, {"a": range(50_000)})])
def test_a_full_disk_leaves_the_old_content(tmp_path, write, value):
    path = tmp_path / "file"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(path, value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_not_a_number_is_refused_and_the_old_content_kept(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert read_json(tmp_path / "a.json") == {"x": 1}


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "bad").write_text('{"a": 1,\n}')
    for read in (read_json, read_table):
        with pytest.raises(UserError, match="absent: no such file"):
            read(tmp_path / "absent")
    with pytest.raises(UserError, match=r"bad: not valid JSON: .*line 2"):
        read_json(tmp_path / "bad")
    with pytest.raises(UserError, match="bad: not a readable Parquet file"):
        read_table(tmp_path / "bad")


# ---------------------------------------------------------------------------------------------------------------------
# Logs


def test_a_torn_last_line_is_dropped_by_the_next_writer_alone(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"k": 1}\n{"k": 2, "x": "\xc3')
    assert read_jsonl(path) == [{"k": 1}]
    with JsonlLog(path, ["k"]) as log:
        assert log.rows == [{"k": 1}]
    assert path.read_bytes().endswith(b"\xc3"), "a reader must not cut what another process may be writing"
    with JsonlLog(path, ["k"]) as log:
        log.append([{"k": 2}])
    assert path.read_bytes() == b'{"k": 1}\n{"k": 2}\n'


@pytest.mark.parametrize("line", [b"{torn", b"[1]", b"3", b'{"k": "\xff"}'])
def test_a_malformed_complete_line_names_file_and_line(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"k": 1}\n\n' + line + b'\n{"k": 2}\n')
    with pytest.raises(UserError, match=r"log\.jsonl:3: not a JSON object"):
        JsonlLog(path, ["k"])


def test_a_row_without_the_key_names_file_and_column(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"k": 1}\n')
    with pytest.raises(UserError, match=r"log\.jsonl: a row has no 'step'"):
        JsonlLog(path, ["k", "step"])


def test_a_key_is_written_once(tmp_path):
    path = tmp_path / "log.jsonl"
    for _ in range(2):
        with JsonlLog(path, ["a", "b"]) as log:
            log.append([{"a": 1, "b": 1, "x": "first"}, {"a": 1, "b": 1, "x": "second"}, {"a": 1, "b": 2}])
            log.append([{"a": 1, "b": 2, "x": "third"}])
            assert log.rows == read_jsonl(path) == [{"a": 1, "b": 1, "x": "first"}, {"a": 1, "b": 2}]


def test_a_refused_row_is_not_taken_for_written(tmp_path):
    with JsonlLog(tmp_path / "log.jsonl", ["k"]) as log:
        with pytest.raises(ValueError, match="not JSON compliant"):
            log.append([{"k": 1, "loss": 1.0}, {"k": 2, "loss": float("nan")}])
        assert log.rows == read_jsonl(log.path) == []
        log.append([{"k": 1, "loss": 1.0}, {"k": 2, "loss": 2.0}])
    assert [row["k"] for row in read_jsonl(log.path)] == [1, 2]


def test_a_full_disk_leaves_whole_lines_and_the_row_can_be_written_again(tmp_path):
    with JsonlLog(tmp_path / "log.jsonl", ["k"]) as log:
        log.append([{"k": 1}])
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                log.append([{"k": 2, "x": "y" * 10_000}])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert log.path.read_bytes() == b'{"k": 1}\n'
        log.append([{"k": 2}])
    assert log.path.read_bytes() == b'{"k": 1}\n{"k": 2}\n'


@given(st.lists(st.text() | st.sampled_from(["\ud83d", "a\u2028b", "\x85", "\n", "\r"]), max_size=5))
def test_any_text_is_one_line_of_utf8(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("text") / "log.jsonl"
    rows = [{"k": number, "text": text} for number, text in enumerate(texts)]
    with JsonlLog(path, ["k"]) as log:
        log.append(rows)
    if rows:
        lines = path.read_bytes().decode("utf-8").split("\n")
        assert [json.loads(line) for line in lines if line] == rows
    assert read_jsonl(path) == rows


APPENDING = """
import random, sys
from pathlib import Path
from gift.records import JsonlLog
with JsonlLog(Path(sys.argv[1]), ["step"]) as log:
    print(len(log.rows), flush=True)
    for step in range(100_000):
        rng = random.Random(step)
        log.append([{"step": step, "x": "é" * rng.randrange(200_000)}])
"""


def test_killed_in_the_middle_of_appends_no_row_is_lost_doubled_or_halved(tmp_path):
    path, rng, found = tmp_path / "log.jsonl", random.Random(0), 0
    for _ in range(6):
        with python(APPENDING, path) as process:
            assert int(process.stdout.readline()) >= found
            time.sleep(rng.uniform(0.02, 0.15))
            process.send_signal(signal.SIGKILL)
        rows = read_jsonl(path)
        assert [row["step"] for row in rows] == list(range(len(rows)))
        assert all(row["x"] == "é" * random.Random(row["step"]).randrange(200_000) for row in rows)
        assert len(rows) >= found
        found = len(rows)
    assert found > 6


# ---------------------------------------------------------------------------------------------------------------------
# Hashes


def test_file_hash_is_sha256(tmp_path):
    data = random.Random(0).randbytes(3_000_000)
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


@given(st.dictionaries(st.text(), JSON), st.randoms())
def test_json_hash_ignores_the_order_of_keys_and_survives_a_round_trip(value, rng):
    items = list(value.items())
    rng.shuffle(items)
    assert sha256_json(dict(items)) == sha256_json(value) == sha256_json(json.loads(json.dumps(value)))


@given(JSON, JSON)
def test_json_hash_tells_values_apart(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (sha256_json(one) == sha256_json(other)) == same


def test_weights_hash_sees_names_and_bytes_of_weights_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        sha256_weights(tmp_path)
    digests = []
    for name, data in (("a", b"1"), ("b", b"2"), ("b", b"3")):
        (tmp_path / f"{name}.safetensors").write_bytes(data)
        digests.append(sha256_weights(tmp_path))
    (tmp_path / "config.json").write_text("changed")
    assert sha256_weights(tmp_path) == digests[-1]
    (tmp_path / "b.safetensors").rename(tmp_path / "c.safetensors")
    assert len({*digests, sha256_weights(tmp_path)}) == 4


# ---------------------------------------------------------------------------------------------------------------------
# The run directory


def make_run(path):
    return RunDir.create(path / "run", kind="train", recipe={"seed": 0})


HOLDING = """
import sys, time
from pathlib import Path
from gift.records import RunDir
run = RunDir.open(Path(sys.argv[1]))
with run.lock():
    run.update(status="held")
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_the_next_holder_sees_what_the_first_wrote(tmp_path):
    run = make_run(tmp_path)
    with python(HOLDING, run.path, stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process is working on this run"), run.lock():
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert run.manifest["status"] == "running"
        with run.lock():
            assert run.manifest["status"] == "held"


def test_a_rank_that_follows_writes_nothing_and_takes_no_lock(tmp_path):
    run, follower = make_run(tmp_path), RunDir.open(tmp_path / "run")
    follower.writable = False
    with run.lock(), follower.lock():
        follower.update(status="complete")
    assert RunDir.open(run.path).manifest["status"] == "running"


def test_a_newer_schema_is_refused(tmp_path):
    run = make_run(tmp_path)
    run.update(schema_version=records.SCHEMA_VERSION + 1)
    with pytest.raises(UserError, match=r"manifest\.json: schema version 2 is newer .*update the suite"):
        RunDir.open(run.path)


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"schema_version": "1"}'])
def test_a_foreign_manifest_is_refused(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match="not a manifest of this suite"):
        RunDir.open(tmp_path)


def test_a_damaged_manifest_names_file_and_key(tmp_path):
    run = make_run(tmp_path)
    file, whole = run.path / "manifest.json", run.manifest
    for key in whole.keys() - {"schema_version"}:
        write_json(file, {name: value for name, value in whole.items() if name != key})
        with pytest.raises(UserError, match=rf"manifest\.json: no '{key}'; restore"):
            RunDir.open(run.path)
        write_json(file, {**whole, key: 1})
        with pytest.raises(UserError, match=rf"manifest\.json: '{key}' is not (text|text or null|a list|a mapping); "):
            RunDir.open(run.path)
    write_json(file, whole)
    assert RunDir.open(run.path).manifest == whole


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"not a run directory \(it has no manifest\.json\)"):
        RunDir.open(tmp_path)


def test_lineage(tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(UserError, match=r"no policy 'sft' in this run \(it has: none yet\)"):
        run.node("sft")
    run.add_node({"id": "base", "checkpoint": "/elsewhere/base"})
    run.add_node({"id": "sft", "checkpoint": "old"})
    run.add_node({"id": "sft", "checkpoint": "checkpoints/sft/init-000001"})
    again = RunDir.open(run.path)
    assert [node["id"] for node in again.manifest["lineage"]] == ["base", "sft"]
    assert str(again.checkpoint("base")) == "/elsewhere/base"
    assert again.checkpoint("sft") == run.path / "checkpoints/sft/init-000001"
    with pytest.raises(UserError, match=r"no policy 'gift' in this run \(it has: base, sft\)"):
        run.checkpoint("gift")


def test_a_manifest_says_what_ran(tmp_path):
    manifest = RunDir.open(make_run(tmp_path).path).manifest
    assert manifest["recipe_sha256"] == sha256_json({"seed": 0})
    assert manifest["packages"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert manifest["hardware"]["cores"] == os.cpu_count()
    assert set(manifest["code"]) == {"commit", "dirty"}
