import gzip
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from other_programs import PROGRAMS

from evals import sandbox as sandboxes
from evals.ground_truth import Truths
from evals.sandbox import Limits, Sandbox, works
from evals.tasks import code as code_tasks
from evals.tasks import single_turn
from evals.tasks.code import TASKS
from gift.cli import UserError

pytest.importorskip("evalplus")

DATA = Path(__file__).parents[3] / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the benchmark files are not at {DATA}")
isolated = pytest.mark.skipif(
    not (works(Sandbox("bubblewrap")) or works(Sandbox("namespaces"))), reason="no sandbox here"
)
ROWS = {"humaneval_plus": 164, "mbpp_plus": 378}
# Special oracles, helpers in the prompt, tolerances, odd outputs, and two of those that evalplus times out on.
TELLING = {
    "humaneval_plus": ["HumanEval/0", "HumanEval/2", "HumanEval/32", "HumanEval/38", "HumanEval/50"],
    "mbpp_plus": [
        "Mbpp/2", "Mbpp/84", "Mbpp/88", "Mbpp/124", "Mbpp/558", "Mbpp/581", "Mbpp/590", "Mbpp/630",
        "Mbpp/737", "Mbpp/793",
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GIFT_CACHE", str(tmp_path / "cache"))


def fence(code: str) -> str:
    return f"Here it is.\n\n```python\n{code}\n```\n"


# ---------------------------------------------------------------------------------------------------------------------
# The real files


@real_data
@pytest.mark.parametrize("name", ROWS)
def test_every_row_becomes_an_item_of_its_own(name):
    data = TASKS[name].load(DATA)
    assert len(data.items) == len({item.id for item in data.items}) == data.source["rows"] == ROWS[name]
    assert data.source["revision"] == {"humaneval_plus": "v0.1.10", "mbpp_plus": "v0.2.0"}[name]
    with gzip.open(DATA / TASKS[name].release.file, "rt") as file:
        rows = [json.loads(line) for line in file]
    for item, row in zip(data.items, rows, strict=True):
        assert row["prompt"].strip() in item.prompt
        assert row["canonical_solution"].strip() in item.gold
        assert [len(group) for group in item.problem.groups] == [len(row["base_input"]), len(row["plus_input"])]


@real_data
def test_inputs_are_restored_to_what_json_cannot_hold():
    items = {item.id: item for item in TASKS["mbpp_plus"].load(DATA).items}
    assert items["Mbpp/2"].problem.groups[0][0] == [(3, 4, 5, 6), (5, 7, 4, 10)]
    assert items["Mbpp/124"].problem.groups[0][0] == (0.0, 1j)
    helpers = {item.id: item.problem.preamble for item in TASKS["humaneval_plus"].load(DATA).items}
    for number, name in ((32, "poly"), (38, "encode_cyclic"), (50, "encode_shift")):
        assert f"def {name}(" in helpers[f"HumanEval/{number}"]
    assert helpers["HumanEval/0"] == "from typing import List"


@real_data
@isolated
@pytest.mark.parametrize("name", ROWS)
def test_canonical_programs_pass_and_corrupted_ones_fail(name):
    task = TASKS[name]
    items = [item for item in task.load(DATA).items if item.id in TELLING[name]]
    check_all(task.checks(items), task)


@real_data
@isolated
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ROWS)
def test_all_canonical_programs_pass_and_some_corrupted_ones_fail(name):
    task = TASKS[name]
    items = task.load(DATA).items
    corrupted = {item.id for item in items[::8]}
    checks = [check for check in task.checks(items) if check.correct or check.answer.item.id in corrupted]
    assert sum(check.correct for check in checks) == ROWS[name]
    check_all(checks, task)


def check_all(checks, task) -> None:
    assert {check.correct for check in checks} == {True, False}
    grades = dict(task.grade([check.answer for check in checks]))
    assert sorted(grades) == list(range(len(checks)))
    for index, check in enumerate(checks):
        expected = "correct" if check.correct else "wrong"
        assert {grade.status for grade in grades[index].values()} == {expected}, (check.answer.item.id, grades[index])


@real_data
@isolated
def test_verdicts_are_those_of_evalplus(tmp_path):
    items = {item.id: item for task in TASKS.values() for item in task.load(DATA).items if item.id in PROGRAMS}
    script = Path(__file__).with_name("evalplus_verdicts.py")
    solutions = [(id_, code) for id_, listed in PROGRAMS.items() for code in [items[id_].gold, *listed]]
    for name in ("HumanEval", "Mbpp"):
        release = TASKS["humaneval_plus" if name == "HumanEval" else "mbpp_plus"].release
        (tmp_path / f"{name}.jsonl").write_bytes(gzip.decompress((DATA / release.file).read_bytes()))
    ran = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps(solutions),
        capture_output=True,
        text=True,
        check=True,
        env={
            **os.environ,
            "XDG_CACHE_HOME": str(tmp_path / "evalplus"),
            "HUMANEVAL_OVERRIDE_PATH": str(tmp_path / "HumanEval.jsonl"),
            "MBPP_OVERRIDE_PATH": str(tmp_path / "Mbpp.jsonl"),
        },
    )
    theirs = json.loads(ran.stdout.splitlines()[-1])
    ours = {}
    for task in TASKS.values():
        picked = [n for n, (id_, _) in enumerate(solutions) if items[id_].problem.dataset == task.dataset]
        answers = [single_turn(items[solutions[n][0]], fence(solutions[n][1])) for n in picked]
        for index, grades in task.grade(answers):
            ours[picked[index]] = [grades["base"].status == "correct", grades["plus"].status == "correct"]
    # A program that does not parse never leaves the response; evalplus' fails when it runs.
    assert [ours[n] for n in range(len(solutions))] == theirs
    assert {tuple(each) for each in theirs} == {(True, True), (True, False), (False, False)}


# ---------------------------------------------------------------------------------------------------------------------
# A small release of our own


def row(number: int, body: str, base: list, plus: list, **more) -> dict:
    prompt = f'def f{number}(x):\n    """Something."""\n'
    return {"task_id": f"HumanEval/{number}", "prompt": prompt, "entry_point": f"f{number}", "atol": 0,
            "canonical_solution": f"    {body}\n", "base_input": base, "plus_input": plus, **more}  # fmt: skip


@pytest.fixture
def small(tmp_path):
    """A task of two problems and the folder of its data."""

    def make(*rows: dict | str) -> Path:
        path = tmp_path / "data" / "humanevalplus" / "HumanEvalPlus.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in rows)
        path.write_bytes(gzip.compress(text.encode()))
        return tmp_path / "data"

    return make


DOUBLE = row(1, "return 2 * x", [[1], [2]], [[3], [-4]])
LIMITS = Limits(load_s=2, total_s=5)


def grade(folder: Path, *responses: str, **options) -> list[dict]:
    task = replace(TASKS["humaneval_plus"], limits=LIMITS, **options)
    item = task.load(folder).items[0]
    found = dict(task.grade([single_turn(item, response) for response in responses]))
    return [found[index] for index in range(len(responses))]


@isolated
def test_both_verdicts_say_which_inputs_a_program_fails(small):
    folder = small(DOUBLE)
    right, plus, base, raised, none = grade(
        folder,
        fence("def f1(x): return x + x"),
        fence("def f1(x): return abs(2 * x)"),
        fence("def f1(x): return 0"),
        fence("def f1(x): return {}[x]"),
        "I cannot.",
    )
    assert [verdict.score for verdict in right.values()] == [1.0, 1.0]
    assert (plus["base"].status, plus["plus"].status) == ("correct", "wrong")
    assert plus["plus"].note == "plus input 1: wrong output"
    assert (base["base"].status, base["plus"].status) == ("wrong", "wrong")
    assert raised["base"].note == "base input 0: raised KeyError"
    assert {verdict.status for verdict in none.values()} == {"no_answer"}
    assert right["plus"].extracted == "def f1(x): return x + x"
    assert right["plus"].method == "fenced"
    assert list(right) == list(TASKS["humaneval_plus"].graders) == ["plus", "base"]


@isolated
def test_the_first_group_passes_though_the_second_times_out(small):
    [grades] = grade(small(DOUBLE), fence("def f1(x):\n    while x < 0: pass\n    return 2 * x"))
    assert (grades["base"].status, grades["plus"].status) == ("correct", "timeout")
    assert grades["plus"].note == "plus input 1: took too long to answer"


@isolated
def test_a_program_that_ran_out_of_time_is_tried_again_alone(small, monkeypatch):
    running, alone, attempts, lock = set(), [], [], threading.Lock()
    original = Sandbox.run

    def run(self, program, total_s=None):
        slow = "slow" in program.sources[-1]
        with lock:
            running.add(id(program))
            if slow:
                attempts.append(program)
                alone.append(len(running) == 1)
        try:
            if slow and len(attempts) == 1:
                raise sandboxes.StoppedError("took too long to answer", "timeout")
            yield from original(self, program, total_s)
        finally:
            running.discard(id(program))

    monkeypatch.setattr(Sandbox, "run", run)
    slow = fence("def f1(x): return 2 * x  # slow")
    others = [fence(f"def f1(x): return 2 * x + {n}") for n in range(1, 9)]
    grades = grade(small(DOUBLE), slow, *others, workers=3)
    assert [each["plus"].status for each in grades] == ["correct"] + ["wrong"] * 8
    assert len(attempts) == 2
    assert alone[-1]


@isolated
def test_equal_programs_run_once_and_verdicts_come_as_they_are_found(small, monkeypatch):
    ran = []
    original = code_tasks._grade
    monkeypatch.setattr(code_tasks, "_grade", lambda *given: ran.append(given[3].code) or original(*given))
    task, folder = replace(TASKS["humaneval_plus"], workers=1), small(DOUBLE)
    item = task.load(folder).items[0]
    codes = ["def f1(x): return 2 * x", "def f1(x): return 2 * x", "def f1(x): return 3 * x"]
    verdicts = task.grade([single_turn(item, fence(code)) for code in codes])
    assert {next(verdicts)[0], next(verdicts)[0]} == {0, 1}
    verdicts.close()
    assert set(ran) <= set(codes)
    assert dict(task.grade([single_turn(item, fence(code)) for code in codes])).keys() == {0, 1, 2}


@isolated
def test_what_the_canonical_programs_return_is_kept_and_a_damaged_file_made_again(small, monkeypatch):
    task, folder = TASKS["humaneval_plus"], small(DOUBLE)
    item = task.load(folder).items[0]
    truths = Truths(sandboxes.sandbox())
    truth, path = truths.of(item.problem), truths.path(item.problem)
    assert [[each.held for each in group] for group in truth.expected] == [
        [b"i\x02\0\0\0", b"i\x04\0\0\0"],
        [b"i\x06\0\0\0", b"i\xf8\xff\xff\xff"],
    ]
    assert truth.limits == [[1.0, 1.0], [1.0, 1.0]]
    with monkeypatch.context() as patch:
        patch.setattr(Sandbox, "run", lambda *_: pytest.fail("the cached file was not used"))
        assert Truths(sandboxes.sandbox()).of(item.problem) == truth
    path.write_bytes(path.read_bytes()[:-3])
    assert [len(group) for group in Truths(sandboxes.sandbox()).of(item.problem).expected] == [2, 2]
    other = task.load(small(row(1, "return 3 * x", [[1], [2]], [[3], [-4]]))).items[0]
    assert truths.path(other.problem) != path


@isolated
def test_a_canonical_program_that_fails_is_an_error_of_the_sample(small):
    [grades] = grade(small(row(1, "return 1 // x", [[0]], [])), fence("def f1(x): return 0"))
    assert grades["plus"].status == "error"
    assert grades["plus"].note == "HumanEval/1: the canonical program raised ZeroDivisionError"


def test_without_isolation_nothing_runs(small, monkeypatch):
    monkeypatch.setattr(sandboxes, "_isolation", lambda: None)
    folder = small(DOUBLE)
    with pytest.raises(UserError, match="--unsafe-code"):
        grade(folder, fence("def f1(x): return 2 * x"))
    [grades] = grade(folder, fence("def f1(x): return 2 * x"), unsafe=True)
    assert grades["plus"].status == "correct"


# ---------------------------------------------------------------------------------------------------------------------
# Files with a fault


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], r"gz:1: not JSON; get https://github\.com/evalplus/humanevalplus_release/.* again"),
        ([], "no rows"),
        ([{**DOUBLE, "prompt": ""}], "gz:1: column 'prompt'"),
        ([{key: DOUBLE[key] for key in DOUBLE if key != "entry_point"}], "gz:1: no column 'entry_point'"),
        ([{**DOUBLE, "plus_input": None}], "gz:1: column 'plus_input' is not a list of argument lists"),
        ([{**DOUBLE, "base_input": [1]}], "gz:1: column 'base_input' is not a list of argument lists"),
        ([DOUBLE, DOUBLE], "gz:2: id 'HumanEval/1' is already that of"),
        (["[1]"], "gz:1: not an object"),
    ],
)
def test_a_faulty_file_is_named_with_the_row(small, rows, message):
    with pytest.raises(UserError, match=message) as error:
        TASKS["humaneval_plus"].load(small(*rows))
    assert "\n" not in str(error.value)


def test_a_missing_or_broken_file_says_where_to_get_it(small, tmp_path):
    with pytest.raises(UserError, match=r"HumanEvalPlus\.jsonl\.gz: no such file; put https://github\.com/evalplus"):
        TASKS["humaneval_plus"].load(tmp_path)
    folder = small(DOUBLE)
    path = folder / TASKS["humaneval_plus"].release.file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="not readable"):
        TASKS["humaneval_plus"].load(folder)


def test_offline_it_says_where_to_put_the_file(monkeypatch, tmp_path):
    from evalplus.data import utils

    def offline(url, path):
        raise OSError("no route to host")

    monkeypatch.setattr(utils, "make_cache", offline)
    with pytest.raises(
        UserError, match=r"MBPP\+: cannot download it .*no route to host.*put https://.* and give --data-dir"
    ):
        TASKS["mbpp_plus"].load(None)


def test_another_release_is_told_apart(small):
    source = TASKS["humaneval_plus"].load(small(DOUBLE)).source
    assert source["revision"] is None
    assert source["rows"] == 1
