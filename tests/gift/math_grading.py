"""What the tests of the math grader share."""

import json
from pathlib import Path

import pytest

from gift.rewards import Mode, Verdict, grade_math

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


def boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


def grade(response: str, gold: str, *, mode: Mode = "strict", **options: float) -> Verdict:
    return grade_math([response], [gold], mode=mode, **options)[0]


def need(name: str) -> list[dict]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return [json.loads(line) for line in path.read_text().splitlines()]
