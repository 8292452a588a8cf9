"""A job's steps: each is finished once, recorded in the run's manifest, and skipped from then on."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from gift.cli import say
from gift.distributed import rank
from gift.models import first_line
from gift.records import RunDir, utc_now


@dataclass(frozen=True)
class Step:
    """One step of a job: its name, its work, and roughly how many tokens it passes through a model.

    `work` returns None when all was done, or what could not be. `still_there`, if given, says whether what an earlier
    start made is still where it was. `tidy`, if given, removes what the step no longer needs once it is recorded as
    done; it may be called again.
    """

    name: str
    work: Callable[[], str | None]
    cost: float = 0.0
    still_there: Callable[[], bool] | None = None
    tidy: Callable[[], None] | None = None


class Steps:
    """The steps of a job that works on one run."""

    def __init__(self, run: RunDir, steps: Sequence[Step]) -> None:
        self.run = run
        self.steps = list(steps)

    def execute(self) -> bool:
        """Does every step that is not done yet, each announced with an estimate of what remains.

        Returns whether all of them are done; a step that is not is tried again by the next start.
        """
        remaining = sum(step.cost for step in self.steps if not self.done(step))
        if not self.all_done():
            self.run.update(status="running", finished=None)
        spent, seconds = 0.0, 0.0
        for number, step in enumerate(self.steps, start=1):
            title = f"[{number}/{len(self.steps)}] {step.name}"
            if self.done(step):
                announce(f"{title}: done before")
                self._tidy(step)
                continue
            announce(f"{title} ..." + (f" (about {clock(remaining * seconds / spent)} left)" if spent else ""))
            took = self._execute(step)
            remaining, spent, seconds = remaining - step.cost, spent + step.cost, seconds + took
            announce(f"{title}: {clock(took)}")
        return self.all_done()

    def all_done(self, *, but: str = "") -> bool:
        """Whether every step is done, not counting the one named."""
        return all(self.done(step) for step in self.steps if step.name != but)

    def done(self, step: Step) -> bool:
        """Whether a step was finished, by this start or an earlier one, and what it made is still there."""
        finished = self.run.manifest["steps"].get(step.name, {}).get("status") == "done"
        return finished and (step.still_there is None or step.still_there())

    def _execute(self, step: Step) -> float:
        started = time.perf_counter()
        self._mark(step.name, status="running", started=utc_now())
        try:
            lacking = step.work()
        except Exception as error:
            with suppress(OSError):  # a full disk is what may have stopped the step
                self._mark(step.name, status="failed", reason=first_line(error), finished=utc_now())
                self.run.update(status="failed")
            raise
        gc.collect()
        seconds = time.perf_counter() - started
        self._mark(
            step.name,
            status="done" if lacking is None else "incomplete",
            reason=lacking,
            finished=utc_now(),
            seconds=round(seconds, 1),
            # Of the process since it started: a step that needed less than one before it shows that one's.
            peak_memory=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        )
        if lacking is not None:
            announce(f"  {step.name}: incomplete: {lacking}")
        else:
            self._tidy(step)
        return seconds

    def _tidy(self, step: Step) -> None:
        if step.tidy is not None and rank() == 0:
            step.tidy()

    def _mark(self, name: str, **entries: Any) -> None:
        steps = self.run.manifest["steps"]
        self.run.update(steps={**steps, name: {**steps.get(name, {}), **entries}})


def announce(message: str) -> None:
    """One line of progress, on the first rank alone."""
    if rank() == 0:
        say(message)


def clock(seconds: float) -> str:
    """'1m 20s', to the second."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"
