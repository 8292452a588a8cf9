"""The commands a report names: what makes, evaluates and measures a run, and what makes the report again."""

from __future__ import annotations

import shlex

from reports.rundata import RunData

MODULES = {"train": "gift.train", "eval": "evals.run", "drift": "diagnostics.run"}


def own_command(run: RunData) -> str:
    """The command that made the run; started again, it does what is left."""
    return shlex.join(["python", "-m", MODULES.get(run.kind, "gift.train"), *map(str, run.manifest["command"][1:])])


def evaluate_command(run: RunData, suite: str = "all") -> str:
    """The command that evaluates a run's policies."""
    return f"python -m evals.run --suite {shlex.quote(suite)} --model {place(run)}"


def drift_command(run: RunData) -> str:
    """The command that measures a run's drift."""
    return f"python -m diagnostics.run --run {place(run)}"


def report_command(run: RunData) -> str:
    """The command that makes the report of a run."""
    return f"python -m reports.build {place(run)}"


def place(run: RunData) -> str:
    """The run directory where runs lie by default: where this one lies now is not part of its report."""
    return shlex.quote(f"runs/{run.name}")
