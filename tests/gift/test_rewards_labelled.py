"""The grader against labels that others gave: agreement, and that docs/grading.md explains every disagreement."""

import re

import pytest
from math_grading import ROOT, boxed, need

from gift.rewards import grade_math_modes

INTEGER = re.compile(r"[ $]*-?[0-9][0-9,]*[ $]*")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return need("grading_pairs.jsonl")


@pytest.fixture(scope="module")
def graded(rows) -> list[dict]:
    """The file pairs answers rather than responses: one that is not in a box is put into one."""
    responses = [row["pred"] if "boxed{" in row["pred"] else boxed(row["pred"]) for row in rows]
    return grade_math_modes(responses, [row["gold"] for row in rows], timeout_s=30)


def tabulated(heading: str) -> dict[int, tuple[str, str]]:
    """Line of the file -> label and verdict, from the table under a heading of docs/grading.md."""
    section = (ROOT / "docs" / "grading.md").read_text().split(f"### {heading}\n")[1].split("\n#")[0]
    found = re.findall(r"^\| (\d+) \|.*\| (right|wrong) \| (right|wrong) \|[^|]+\|$", section, flags=re.MULTILINE)
    return {int(line): (label, verdict) for line, label, verdict in found}


@pytest.mark.parametrize(("mode", "heading"), [("strict", "Strict"), ("paper", "Paper")])
def test_every_disagreement_is_explained(rows, graded, mode, heading):
    words = {True: "right", False: "wrong"}
    found = {
        line: (words[row["correct"]], words[verdicts[mode].score == 1.0])
        for line, (row, verdicts) in enumerate(zip(rows, graded, strict=True), 1)
        if row["correct"] != (verdicts[mode].score == 1.0)
    }
    assert found == tabulated(heading)
    assert 1 - len(found) / len(rows) >= 0.93


def test_no_integer_labelled_wrong_is_accepted(rows, graded):
    wrong = [
        verdicts["strict"].status
        for row, verdicts in zip(rows, graded, strict=True)
        if INTEGER.fullmatch(row["gold"]) and not row["correct"]
    ]
    assert wrong
    assert "correct" not in wrong
