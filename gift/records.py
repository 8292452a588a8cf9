"""The run directory: plain, append-only files that outlive the process that wrote them.

Layout (`runs/<name>/`):

    manifest.json                        what ran, on what, with what: recipe, lineage, data, seeds, packages, status
    metrics.jsonl                        one object per logged training step, key (policy, stage, event, step)
    checkpoints/<policy>/<stage>-<step>/ Hugging Face folders
    samples/<policy>/<task>.jsonl        every prompt and completion, key (item, run, sample)
    verdicts/<policy>/<task>.jsonl       what graders said of them (see gift/samples.py)
    items.parquet                        task, item, policy, run, n, correct: what paired tests and pass@k join on
    drift/<a>..<b>.parquet               per sequence: metric, sequence, n, sum, sum_sq

Whole files are written beside their final name and renamed; logs grow by whole lines, and a line cut short by a kill
is dropped when the log is next opened. Nothing half-written is ever read. This module imports no torch: reports use it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import glob
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gift.cli import UserError
from gift.provenance import code_version, hardware, package_versions

SCHEMA_VERSION = 1
# What every manifest holds, by the JSON type of its value; `finished` is a time or null.
MANIFEST_KEYS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("kind", "name", "status", "created", "recipe_sha256"), (str,)),
    "finished": (str, type(None)),
    **dict.fromkeys(("command", "overrides", "lineage"), (list,)),
    **dict.fromkeys(("recipe", "seeds", "data", "steps", "eval", "drift", "code", "packages", "hardware"), (dict,)),
}
MEND = "restore the manifest or make the run again"
TYPE_NAMES = {str: "text", list: "a list", dict: "a mapping", type(None): "null"}


def utc_now() -> str:
    """The time now as ISO 8601 in UTC, to the second."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


# ---------------------------------------------------------------------------------------------------------------------
# Hashes


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form: equal values hash equally whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_weights(checkpoint: Path) -> str:
    """Hex SHA-256 over the names and bytes of a checkpoint folder's `*.safetensors`, in name order.

    Raises UserError if the folder has none.
    """
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise UserError(f"{checkpoint}: no *.safetensors in this folder; give a Hugging Face checkpoint with weights")
    return sha256_json([[file.name, sha256_file(file)] for file in files])


# ---------------------------------------------------------------------------------------------------------------------
# Atomic writes


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path`; renames it to `path` on success, removes it on failure.

    The body may write a file or make a folder at the yielded path. An existing folder at `path` is replaced. What a
    killed process left of the same path is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    try:
        yield scratch
        sync(scratch)
        if path.is_dir():  # cannot be renamed over; removing it in place could leave half of it
            os.replace(path, replaced)
        os.replace(scratch, path)
        flush(path.parent)
    finally:
        remove(scratch)
        remove(replaced)


def remove_abandoned(path: Path) -> None:
    """Removes the scratch files of `path` whose process is gone, or is this one."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        owner = left.name.removeprefix(f".{path.name}.").partition(".")[0]
        if owner.isdigit() and not is_another_process(int(owner)):
            remove(left)


def is_another_process(pid: int) -> bool:
    """Whether `pid` is a running process other than this one."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # running, as another user
        return True
    return pid != os.getpid()


def remove(path: Path) -> None:
    """Removes a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flushes a file, or a folder and all that is in it, to disk."""
    for entry in [path, *path.rglob("*")]:
        flush(entry)


def flush(path: Path) -> None:
    """Flushes one file, or one folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file atomically, as UTF-8."""
    with atomic_path(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically; NaN is refused, because other readers cannot parse it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises UserError naming the file, and the line where parsing failed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes equally long columns as a Parquet file, atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with atomic_path(path) as scratch:
        pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), scratch)


def read_table(path: Path) -> dict[str, list[Any]]:
    """Reads a Parquet file as columns. Raises UserError naming the file when it is missing or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None
    columns: dict[str, list[Any]] = table.to_pydict()
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# Logs


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every complete line of a JSONL log, in order; a last line without a newline was cut by a kill and is left out.

    Raises UserError naming the file and line where a complete line is not a JSON object.
    """
    if not path.exists():
        return []
    rows = []
    with path.open("rb") as file:  # line by line: a log of long completions is gigabytes
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") or line == b"\n":
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: not a JSON object; remove this line to go on without it")
            rows.append(row)
    return rows


class JsonlLog:
    """An append-only JSONL file in which `key` identifies a row: a row whose key is already there is not written again.

    That makes replay after a kill harmless: deterministic work repeated from the last checkpoint adds only what is new.
    """

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        self.path = path
        self.key = tuple(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = read_jsonl(path)
        for row in self.rows:
            if missing := [name for name in self.key if name not in row]:
                raise UserError(f"{path}: a row has no {missing[0]!r}; move the file away to start it anew")
        self._seen = {self.key_of(row) for row in self.rows}
        self._file: io.FileIO | None = None

    def key_of(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        """The row's identity in this log."""
        return tuple(row[name] for name in self.key)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends those rows whose key is new; they are on disk when this returns, and none is if it raises.

        Raises ValueError for a value that is not finite.
        """
        fresh: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in rows:
            key = self.key_of(row)
            if key not in self._seen:
                fresh.setdefault(key, dict(row))
        if not fresh:
            return
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in fresh.values())
        # A lone surrogate, which UTF-8 cannot hold, becomes its JSON escape.
        self._write(lines.encode("utf-8", errors="backslashreplace"))
        self._seen.update(fresh)
        self.rows.extend(fresh.values())

    def _write(self, data: bytes) -> None:
        file = self._opened()
        size = os.fstat(file.fileno()).st_size
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except BaseException:  # a full disk or Ctrl-C: leave none of it behind
            file.truncate(size)
            raise

    def _opened(self) -> io.FileIO:
        """The file, opened by the first write, so that ranks which only read never cut what another is writing."""
        if self._file is None:
            self._file = self.path.open("ab", buffering=0)
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole != len(data):
                self._file.truncate(whole)
        return self._file

    def close(self) -> None:
        """Closes the file; rows read or written so far stay available in `rows`."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> JsonlLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---------------------------------------------------------------------------------------------------------------------
# The run directory


class RunDir:
    """A run directory and its manifest; every change of the manifest is on disk when the call returns.

    Of several ranks working on one run, all but the first set `writable` to False: they follow, and write nothing.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.writable = True

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """Opens an existing run.

        Raises UserError if there is none, if a newer version of this suite wrote it, or if its manifest is damaged.
        """
        file = path / "manifest.json"
        if not file.exists():
            raise UserError(f"{path}: not a run directory (it has no manifest.json)")
        manifest = read_json(file)
        if not isinstance(manifest, dict) or not isinstance(manifest.get("schema_version"), int):
            raise UserError(f"{file}: not a manifest of this suite (no schema_version)")
        if manifest["schema_version"] > SCHEMA_VERSION:
            raise UserError(
                f"{file}: schema version {manifest['schema_version']} is newer than this suite reads"
                f" ({SCHEMA_VERSION}); update the suite"
            )
        for key, types in MANIFEST_KEYS.items():
            if key not in manifest:
                raise UserError(f"{file}: no {key!r}; {MEND}")
            if not isinstance(manifest[key], types):
                expected = " or ".join(TYPE_NAMES[kind] for kind in types)
                raise UserError(f"{file}: {key!r} is not {expected}; {MEND}")
        return cls(path, manifest)

    @classmethod
    def create(cls, path: Path, *, kind: str, recipe: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunDir:
        """Makes a run of `kind` 'train', 'eval' or 'drift' with status 'running' and an empty lineage."""
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "kind": kind,
            "name": path.name,
            "status": "running",
            "created": utc_now(),
            "finished": None,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "recipe": dict(recipe),
            "recipe_sha256": sha256_json(recipe),
            "overrides": list(overrides),
            "seeds": {},
            "data": {},
            "lineage": [],
            "steps": {},
            "eval": {},
            "drift": {},
            "code": code_version(),
            "packages": package_versions(),
            "hardware": hardware(),
        }
        run = cls(path, manifest)
        run.save()
        return run

    def save(self) -> None:
        """Writes the manifest."""
        if self.writable:
            write_json(self.path / "manifest.json", self.manifest)

    def update(self, **entries: Any) -> None:
        """Sets top-level entries of the manifest and writes it."""
        self.manifest.update(entries)
        self.save()

    def node(self, policy: str) -> dict[str, Any]:
        """The lineage entry of a policy. Raises UserError naming the ones there are."""
        for node in self.manifest["lineage"]:
            if node["id"] == policy:
                found: dict[str, Any] = node
                return found
        known = ", ".join(node["id"] for node in self.manifest["lineage"]) or "none yet"
        raise UserError(f"{self.path}: no policy {policy!r} in this run (it has: {known})")

    def add_node(self, node: Mapping[str, Any]) -> None:
        """Adds or replaces a policy: id, label, parent (id or None), stage ('base' | 'init' | 'rl'), method,
        checkpoint (path relative to the run, or absolute), weights_sha256."""
        lineage = [entry for entry in self.manifest["lineage"] if entry["id"] != node["id"]]
        self.update(lineage=[*lineage, dict(node)])

    def checkpoint(self, policy: str) -> Path:
        """The folder of a policy's weights."""
        return self.path / self.node(policy)["checkpoint"]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for this process, and reads its manifest anew: another process may have just let it go.

        Raises UserError if another process is working on it.
        """
        if not self.writable:
            yield
            return
        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self.path}: another process is working on this run; wait for it or stop it"
                ) from None
            if (self.path / "manifest.json").exists():
                self.manifest = RunDir.open(self.path).manifest
            yield
