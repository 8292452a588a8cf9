"""A job's steps are done once, recorded, and tidied up after they are recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from gift.records import RunDir, read_json
from gift.steps import Step, Steps, clock


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "run", kind="train", recipe={})


def status(run: RunDir) -> dict[str, str]:
    return {name: step["status"] for name, step in read_json(run.path / "manifest.json")["steps"].items()}


def test_a_step_is_done_once_unless_what_it_made_is_gone(run: RunDir):
    done: list[str] = []
    there = [True]
    steps = Steps(
        run,
        [
            Step("a", lambda: done.append("a"), still_there=lambda: there[0]),
            Step("b", lambda: done.append("b")),
        ],
    )
    assert steps.execute()
    assert steps.execute()
    assert done == ["a", "b"]
    there[0] = False
    assert not steps.execute()
    assert done == ["a", "b", "a"]


def test_what_could_not_be_done_is_tried_again(run: RunDir):
    lacking = ["no data"]
    steps = Steps(run, [Step("a", lambda: lacking.pop() if lacking else None)])
    assert not steps.execute()
    assert status(run) == {"a": "incomplete"}
    assert steps.execute()
    assert status(run) == {"a": "done"}


def test_an_error_is_recorded_and_passed_on(run: RunDir):
    def fail() -> None:
        raise ValueError("first line\nsecond line")

    with pytest.raises(ValueError, match="first line"):
        Steps(run, [Step("a", fail)]).execute()
    assert status(run) == {"a": "failed"}
    assert run.manifest["steps"]["a"]["reason"] == "first line"
    assert run.manifest["status"] == "failed"


def test_state_is_removed_once_the_step_is_recorded(run: RunDir):
    """Killed in between, the next start removes it."""
    seen: list[str] = []

    def killed() -> None:
        seen.append(status(run)["a"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Steps(run, [Step("a", lambda: None, tidy=killed)]).execute()
    assert seen == ["done"]
    assert Steps(run, [Step("a", killed, tidy=lambda: seen.append("tidied"))]).execute()
    assert seen == ["done", "tidied"]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m 00s"), (125, "2m 05s")])
def test_clock(seconds: float, text: str):
    assert clock(seconds) == text
