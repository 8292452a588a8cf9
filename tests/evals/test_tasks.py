import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from evals.suites import PROTOCOLS, SUITES, find
from evals.tasks import math, nano, single_turn
from gift.cli import UserError

DATA = Path(__file__).parents[3] / "shared" / "data"
ROWS = {"gsm8k": 1319, "math500": 500, "aime24": 30, "aime25": 30}
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the benchmark files are not at {DATA}")


# ---------------------------------------------------------------------------------------------------------------------
# The real files


@real_data
@pytest.mark.parametrize("name", ROWS)
def test_every_row_becomes_an_item_of_its_own(name):
    data = math.TASKS[name].load(DATA)
    rows = [json.loads(line) for line in (DATA / name / "test.jsonl").read_text().splitlines()]
    assert len(data.items) == len(rows) == data.source["rows"] == ROWS[name]
    assert len({item.id for item in data.items}) == ROWS[name]
    for item, row in zip(data.items, rows, strict=True):
        assert item.prompt.startswith(row["question" if name == "gsm8k" else "problem"] + "\n\nPlease reason")
        assert item.prompt.endswith("put your final answer within \\boxed{}.")


@real_data
def test_gsm8k_golds_are_what_follows_the_hashes():
    rows = [json.loads(line) for line in (DATA / "gsm8k" / "test.jsonl").read_text().splitlines()]
    golds = [item.gold for item in math.TASKS["gsm8k"].load(DATA).items]
    assert golds == [re.search(r"\n#### (-?[\d,]+)$", row["answer"])[1] for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Files with a fault


def write(folder: Path, name: str, *rows) -> Path:
    """A benchmark file with these rows; a str is written as it is."""
    path = folder / name / "test.jsonl"
    path.parent.mkdir()
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gsm8k", {"question": "q"}, "no column 'answer'; the row has: question"),
        ("gsm8k", {"question": "q", "answer": "it is 5"}, "no final answer in column 'answer'"),
        ("gsm8k", {"question": "q", "answer": "it is\n#### "}, "no final answer in column 'answer'"),
        ("gsm8k", {"question": " ", "answer": "#### 5"}, "column 'question' is neither text nor a whole number: ' '"),
        ("gsm8k", '{"question": "q", "answ', "malformed row"),
        ("gsm8k", "[1, 2]", "expected a JSON object, got list"),
        ("aime24", {"id": "a", "problem": "p", "expected_answer": None}, "column 'expected_answer' is neither"),
        ("aime24", {"id": "a", "problem": "p", "solution": "s"}, "no column 'expected_answer' or 'answer' or 'Answer'"),
        ("math500", {"problem": "p", "answer": 0.5, "unique_id": "b"}, "column 'answer' is neither"),
        ("math500", {"problem": "p", "answer": "5", "unique_id": "a"}, "id 'a' is already that of "),
    ],
)
def test_a_malformed_row_is_named(tmp_path, name, row, message):
    good = {"question": "q", "problem": "p", "answer": "#### 5", "expected_answer": "5", "unique_id": "a"}
    path = write(tmp_path, name, good, row)
    with pytest.raises(UserError, match=re.escape(f"{path}:2: ") + ".*" + re.escape(message)):
        math.TASKS[name].load(tmp_path)


def test_a_missing_or_empty_file_says_where_to_put_it(tmp_path):
    task = math.TASKS["aime25"]
    with pytest.raises(UserError, match=r"aime25/test\.jsonl: no such file; put .* there \(Hub: math-ai/aime25\)"):
        task.load(tmp_path)
    write(tmp_path, "aime25")
    with pytest.raises(UserError, match=r"aime25/test\.jsonl: no rows"):
        task.load(tmp_path)


def test_the_source_is_the_file_and_changes_with_it(tmp_path):
    path = write(tmp_path, "aime25", {"id": "a", "problem": "p", "expected_answer": 5})
    task = math.TASKS["aime25"]
    before = task.load(tmp_path)
    assert before.items[0].gold == "5"
    path.write_text(path.read_text().replace("5", "6"))
    after = task.load(tmp_path).source
    assert after["sha256"] != before.source["sha256"]
    assert {**after, "sha256": None} == {"name": "aime25/test.jsonl", "revision": None, "sha256": None, "rows": 1}


# ---------------------------------------------------------------------------------------------------------------------
# The Hub, never asked here: only what its datasets look like


HUB_ROWS = {
    "gsm8k": {"question": "1+1?", "answer": "one and one\n#### 2"},
    "math500": {"problem": "1+1?", "answer": "2", "unique_id": "test/algebra/1.json", "level": 1},
    "aime24": {"ID": "2024-I-1", "Problem": "1+1?", "Solution": "...", "Answer": 2},
    "aime25": {"problem": "1+1?", "answer": "2", "id": "0"},
}


def stand_in(monkeypatch, load_dataset) -> None:
    """Makes `import datasets` give a module with this `load_dataset`."""
    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.parametrize("name", HUB_ROWS)
def test_hub_datasets_are_asked_for_by_name_and_read_by_their_own_columns(monkeypatch, name):
    asked = []

    class Dataset(list):
        info = SimpleNamespace(download_checksums={f"hf://datasets/some/name@{'0a' * 20}/test.parquet": {}})

    def load_dataset(repository, config, *, split, revision):
        assert revision is None
        asked.append((repository, config, split))
        return Dataset([HUB_ROWS[name]])

    stand_in(monkeypatch, load_dataset)
    data = math.TASKS[name].load(None)
    assert asked == [
        {
            "gsm8k": ("openai/gsm8k", "main", "test"),
            "math500": ("HuggingFaceH4/MATH-500", None, "test"),
            "aime24": ("Maxwell-Jia/AIME_2024", None, "train"),
            "aime25": ("math-ai/aime25", None, "test"),
        }[name]
    ]
    (item,) = data.items
    assert (item.prompt.partition("\n")[0], item.gold) == ("1+1?", "2")
    assert item.id == {"gsm8k": "gsm8k-0", "math500": "test/algebra/1.json", "aime24": "2024-I-1", "aime25": "0"}[name]
    assert (data.source["name"], data.source["revision"]) == (asked[0][0], "0a" * 20)


def test_without_the_datasets_package_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"gift-suite\[hub\]'.*DIR/gsm8k/test\.jsonl and give --data-dir DIR"):
        math.TASKS["gsm8k"].load(None)


def test_an_unreachable_hub_is_one_line_that_says_what_to_do(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nand a long trace")

    stand_in(monkeypatch, load_dataset)
    with pytest.raises(UserError, match=r"openai/gsm8k from the Hub \(Couldn't reach the Hub\); put its .*--data-dir"):
        math.TASKS["gsm8k"].load(None)


# ---------------------------------------------------------------------------------------------------------------------
# The embedded suite


@pytest.mark.parametrize("name", nano.TASKS)
def test_nano_problems_are_distinct_the_same_every_time_and_gradable(name):
    task = nano.TASKS[name]
    data = task.load(None)
    assert data == task.load(None)
    assert len({item.id for item in data.items}) == len({item.prompt for item in data.items}) == data.source["rows"]
    answers = [single_turn(item, f"\\boxed{{{item.gold}}}") for item in data.items]
    assert {grades["strict"].status for _, grades in task.grade(answers)} == {"correct"}
    assert task.group in {"in-distribution", "harder", "out-of-distribution"}


# ---------------------------------------------------------------------------------------------------------------------
# Suites and protocols


def test_no_two_suites_share_a_task_because_samples_are_filed_by_task():
    names = [task.name for suite in SUITES.values() for task in suite.tasks.values()]
    assert len(names) == len(set(names))
    assert set(SUITES["math"].tasks) == set(ROWS)


def test_items_have_the_same_ids_in_both_suites_of_a_benchmark(tmp_path):
    write(tmp_path, "gsm8k", {"question": "q", "answer": "#### 5"})
    plain, repeated = (SUITES[suite].tasks["gsm8k"] for suite in ("math", "passk"))
    assert repeated.name == "gsm8k@passk"
    assert [item.id for item in repeated.load(tmp_path).items] == [item.id for item in plain.load(tmp_path).items]


def test_the_paper_protocol_is_the_papers():
    paper = SUITES["math"].protocol
    assert (paper.temperature, paper.max_tokens, paper.runs, paper.samples_per_run) == (0.6, 8192, 4, 1)
    embedded = SUITES["nano"].protocol
    assert (embedded.temperature, embedded.runs, embedded.samples) == (0.6, 4, 8)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=str)
def test_every_named_protocol_makes_sense(protocol):
    protocol.check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 0.0}, "same completion 4 times"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"runs": 0}, "runs is 0"),
        ({"samples_per_run": -1}, "samples_per_run is -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_a_protocol_without_sense_is_refused(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        replace(PROTOCOLS["paper"], **change).check()


def test_tasks_are_selected_in_the_suites_order_and_a_typo_names_the_nearest():
    suite = SUITES["math"]
    assert [task.name for task in suite.select(["aime25", "gsm8k"])] == ["gsm8k", "aime25"]
    assert [task.name for task in suite.select([])] == list(ROWS)
    with pytest.raises(UserError, match=r"unknown task of suite 'math' 'math50' \(did you mean 'math500'\?\)"):
        suite.select(["gsm8k", "math50"])
    with pytest.raises(UserError, match=r"unknown suite 'nanno' \(did you mean 'nano'\?\); there are: nano, math"):
        find(SUITES, "nanno", "suite")
