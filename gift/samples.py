"""A run's samples and what graders said of them: two append-only logs a policy and task, joined when they are read.

    samples/<policy>/<task>.jsonl     every prompt and completion, key (item, run, sample)
    verdicts/<policy>/<task>.jsonl    every verdict, key (grader, version, item, run, sample, of)

`of` is the digest of the completion that a verdict speaks of: one that was sampled again counts as not graded. Grading
again with a newer grader adds verdicts and changes nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gift.cli import UserError
from gift.records import read_jsonl

SAMPLE_KEY = ("item", "run", "sample")
SAMPLE_FIELDS = (*SAMPLE_KEY, "completion", "tokens", "finish_reason", "max_tokens")  # of what else a row says
VERDICT_KEY = ("grader", "version", *SAMPLE_KEY, "of")
VERDICT_FIELDS = ("status", "score", "extracted", "method", "note")

Row = Mapping[str, Any]


def sample_path(run: Path, policy: str, task: str) -> Path:
    """The log of a policy's samples on a task."""
    return run / "samples" / policy / f"{task}.jsonl"


def verdict_path(run: Path, policy: str, task: str) -> Path:
    """The log of what graders said of a policy's samples on a task."""
    return run / "verdicts" / policy / f"{task}.jsonl"


def digest(completion: str) -> str:
    """What identifies a completion in a verdict: 16 hex digits of its SHA-256."""
    return hashlib.sha256(completion.encode(errors="surrogatepass")).hexdigest()[:16]


def read_rows(path: Path, fields: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of a log, [] where there is none. Raises UserError naming a row that lacks one of these fields."""
    rows = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        if lacking := [name for name in fields if name not in row]:
            raise UserError(
                f"{path}: row {number} has no {lacking[0]!r}; remove it, and the same command makes it anew"
            )
    return rows


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The rows of a log of samples, [] where there is none. Raises UserError naming a row that is damaged."""
    return read_rows(path, SAMPLE_FIELDS)


def verdicts_by_sample(rows: Iterable[Row], graders: Mapping[str, str]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Verdicts of these graders in these versions: (item, run, sample, of) -> grader -> the verdict's fields."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if graders.get(row["grader"]) == row["version"]:
            key = (*(row[name] for name in SAMPLE_KEY), row["of"])
            found.setdefault(key, {})[row["grader"]] = {name: row[name] for name in VERDICT_FIELDS}
    return found


def graded_samples(run: Path, policy: str, task: str, graders: Mapping[str, str]) -> list[dict[str, Any]]:
    """The samples in the log's order, each with `verdicts`: what each of these graders said of it, as far as known.

    `graders` is name to version. Raises UserError naming a row of the logs that is damaged.
    """
    logged = read_rows(verdict_path(run, policy, task), (*VERDICT_KEY, *VERDICT_FIELDS))
    verdicts = verdicts_by_sample(logged, graders)
    rows = read_samples(sample_path(run, policy, task))
    for row in rows:
        row["verdicts"] = verdicts.get((*(row[name] for name in SAMPLE_KEY), digest(row["completion"])), {})
    return rows
