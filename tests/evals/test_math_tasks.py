"""The math benchmarks end to end on their real files: gold solutions are right, corrupted ones wrong; the checks."""

import json
import math as maths
import re
from pathlib import Path

import pytest

from evals.tasks import Answer, Item, math, single_turn
from gift.math_strict import find_answer
from gift.rewards import GRADER_VERSION

DATA = Path(__file__).parents[3] / "shared" / "data"
NAMES = ["gsm8k", "math500", "aime24", "aime25"]
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the benchmark files are not at {DATA}")


def solutions(name: str) -> list[str]:
    """The benchmark's own solutions, '' where it has none that ends in an answer."""
    rows = [json.loads(line) for line in (DATA / name / "test.jsonl").read_text().splitlines()]
    texts = [row[{"gsm8k": "answer", "math500": "solution"}.get(name, "reference_solution")] or "" for row in rows]
    return [text if find_answer(text)[1] else "" for text in texts]


def graded(task: math.BoxedTask, answers: list[Answer]) -> list[dict]:
    found = dict(task.grade(answers))
    assert sorted(found) == list(range(len(answers)))
    return [found[index] for index in range(len(answers))]


@real_data
@pytest.mark.parametrize("name", NAMES)
def test_gold_solutions_are_right(name):
    task = math.TASKS[name]
    items, texts = task.load(DATA).items, solutions(name)
    assert texts.count("") == {"aime24": 1, "aime25": 2}.get(name, 0)
    if name == "gsm8k":  # has no boxes: math-verify reads the whole solution, which takes half a minute for all
        items, texts = items[::20], texts[::20]
    answers = [single_turn(item, text or math.in_box(item.gold)) for item, text in zip(items, texts, strict=True)]
    for verdicts in graded(task, answers):
        assert [verdicts[mode].status for mode in task.graders] == ["correct", "correct"]


@real_data
def test_all_gold_solutions_of_gsm8k_are_right():
    task = math.TASKS["gsm8k"]
    verdicts = math.grade_math_modes(solutions("gsm8k"), [item.gold for item in task.load(DATA).items], ("strict",))
    assert len(verdicts) == 1319
    assert {each["strict"].status for each in verdicts} == {"correct"}


def replaced(text: str, gold: str) -> str:
    """A solution whose final answer is another value."""
    wrong = math.another_value(gold)
    if "####" in text:
        return text.rpartition("####")[0] + f"#### {wrong}"
    return text.rpartition("\\boxed")[0] + f"\\boxed{{{wrong}}}$" if text else math.in_box(wrong)


@real_data
@pytest.mark.parametrize("name", NAMES)
def test_corrupted_solutions_are_wrong(name):
    task = math.TASKS[name]
    items = task.load(DATA).items
    golds = [item.gold for item in items]
    responses = [replaced(text, gold) for text, gold in zip(solutions(name), golds, strict=True)]
    verdicts = math.grade_math_modes(responses, golds, ("strict",))
    assert [(gold, each) for gold, each in zip(golds, verdicts, strict=True) if each["strict"].status != "wrong"] == []


@real_data
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_self_check_finds_no_fault_in_strict_and_the_known_ones_in_paper(name):
    task = math.TASKS[name]
    items = task.load(DATA).items
    checks = [check for check in task.checks(items) if check.kind != "labelled"]
    verdicts = graded(task, [check.answer for check in checks])
    assert len(checks) == 2 * len(items)
    assert [each["strict"].score for each in verdicts] == [float(check.correct) for check in checks]
    fooled = [
        check.answer.item.gold
        for check, each in zip(checks, verdicts, strict=True)
        if each["paper"].score != check.correct
    ]
    within_tolerance = [
        item.gold
        for item in items
        if (digits := re.fullmatch(r"[\\$]*([0-9,.\\!]+)", item.gold))
        and maths.isclose(*(number(text) for text in (digits[1], math.another_value(digits[1]))), rel_tol=1e-4)
    ]
    assert sorted(fooled) == sorted([*within_tolerance, *([r"\frac{20000}{\pi}"] if name == "math500" else [])])


def number(text: str) -> float:
    return float(re.sub(r"[,\\!]", "", text))


def test_labelled_checks_and_what_is_known_to_fail():
    task = math.TASKS["aime24"]
    checks = task.checks([])
    assert {check.kind for check in checks} == {"labelled"}
    assert len(checks) >= 60
    assert len({check.answer.item.id for check in checks}) == len(checks)
    wrong = [
        check.answer.item.category
        for check, each in zip(checks, graded(task, [check.answer for check in checks]), strict=True)
        if each["strict"].score != check.correct
    ]
    assert wrong == ["decimal comma", "late correction", "ordered list"]


@pytest.mark.parametrize(
    ("gold", "other"),
    [
        ("18", "19"),
        ("-1", "-0"),
        ("-50", "-49"),
        ("2,125", "2126"),
        (r"10,\!080", "10081"),
        ("1,-2", "2,-2"),
        (r"\frac{14}{3}", r"\frac{15}{3}"),
        (r"(-2,1)", r"(-3,1)"),
        (r"x^5 - x^4", r"x^6 - x^4"),
        (r"\text{Evelyn}", "-97"),
        (r"\pi", "-97"),
    ],
)
def test_another_value(gold, other):
    assert math.another_value(gold) == other


def test_verdicts_come_in_chunks_of_both_modes(monkeypatch):
    calls = []

    def grade(responses, golds, modes):
        calls.append(len(responses))
        return [dict.fromkeys(modes, response) for response in responses]

    monkeypatch.setattr(math, "grade_math_modes", grade)
    task = math.TASKS["gsm8k"]
    answers = [single_turn(Item(str(n), "q", "1"), str(n)) for n in range(math.CHUNK + 3)]
    stream = task.grade(answers)
    assert next(stream) == (0, {"strict": "0", "paper": "0"})
    assert calls == [math.CHUNK]
    assert [index for index, _ in stream] == list(range(1, math.CHUNK + 3))
    assert calls == [math.CHUNK, 3]
    assert list(task.graders) == ["strict", "paper"]
    assert set(task.graders.values()) == {f"gift.rewards {GRADER_VERSION}"}
