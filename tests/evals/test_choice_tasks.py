import csv
import io
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from evals.choices import LETTERS
from evals.tasks import choice, single_turn
from gift.cli import UserError

DATA = Path(__file__).parents[3] / "shared" / "data"
ROWS = {"mmlu_pro": 12032, "mmlu_redux": 3000, "mmlu_redux2": 5700, "arc_challenge": 1172}
BOX = " within \\boxed{}."
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the benchmark files are not at {DATA}")


@pytest.fixture(scope="module")
def loaded():
    """The tasks' data from the real files, read once."""
    return {name: choice.TASKS[name].load(DATA) for name in ROWS}


def statuses(name, items, responses):
    """How often each status is the verdict."""
    answers = [single_turn(item, response) for item, response in zip(items, responses, strict=True)]
    verdicts = dict(choice.TASKS[name].grade(answers))
    assert list(verdicts) == list(range(len(answers)))
    return Counter(verdict["choice"].status for verdict in verdicts.values())


def gold_text(item):
    """The text of the right option."""
    return item.options[LETTERS.index(item.gold)]


# ---------------------------------------------------------------------------------------------------------------------
# The real files


@real_data
@pytest.mark.parametrize("name", ROWS)
def test_every_row_becomes_an_item_whose_prompt_has_question_and_options(loaded, name):
    data = loaded[name]
    assert len(data.items) == data.source["rows"] == len({item.id for item in data.items}) == ROWS[name]
    for item in data.items:
        lines = "\n".join(f"{letter}) {text}" for letter, text in zip(LETTERS, item.options, strict=False))
        assert item.prompt.endswith(
            f"{lines}\n\nPlease reason step by step, and put the letter of your final answer" + BOX
        )


@real_data
@pytest.mark.parametrize("name", ROWS)
def test_reference_letters_are_right_and_others_wrong(loaded, name):
    items = loaded[name].items
    for form in ("so it is $\\boxed{{{}}}$.", "The answer is ({}).", "**Answer: {}**"):
        assert statuses(name, items, [form.format(item.gold) for item in items]) == {"correct": len(items)}
    several = [item for item in items if len(item.options) > 1]
    for shift in range(1, min(len(item.options) for item in several)):
        wrong = [LETTERS[(LETTERS.index(item.gold) + shift) % len(item.options)] for item in several]
        assert statuses(name, several, [f"\\boxed{{{letter}}}" for letter in wrong]) == {"wrong": len(several)}
    assert statuses(name, items, ["I cannot say."] * len(items)) == {"no_answer": len(items)}


AMBIGUOUS = {
    "293",  # "Option B" is the text of option D
    "8057",  # "E" is the text of option B
    "college_physics-73",  # "B", boron, is the text of option D
    "10443",  # 1 and '1' are options
    "11573",  # braces that do not match
    "high_school_computer_science-78",  # ** is an option, and Markdown
}


@real_data
@pytest.mark.parametrize("name", ["mmlu_pro", "mmlu_redux2", "arc_challenge"])
def test_reference_texts_are_right_where_they_are_an_option_of_their_own(loaded, name):
    distinct = [
        item
        for item in loaded[name].items
        if len({" ".join(option.split()).rstrip(".").casefold() for option in item.options}) == len(item.options)
    ]
    assert len(distinct) > 0.998 * ROWS[name]
    items = [item for item in distinct if item.id not in AMBIGUOUS]
    assert statuses(name, items, [f"\\boxed{{{gold_text(item)}}}" for item in items]) == {"correct": len(items)}


@real_data
def test_mmlu_pro_is_what_its_file_says(loaded):
    rows = [json.loads(line) for line in (DATA / "mmlu_pro" / "test.jsonl").read_text().split("\n")[:-1]]
    for row, item in zip(rows, loaded["mmlu_pro"].items, strict=True):
        assert (item.id, item.category, item.options) == (
            str(row["question_id"]),
            row["category"],
            tuple(option.strip() for option in row["options"]),
        )
        assert gold_text(item) == row["options"][row["answer_index"]].strip()
    assert len({item.category for item in loaded["mmlu_pro"].items}) == 14
    assert sum(len(item.options) == 1 for item in loaded["mmlu_pro"].items) == 5


@real_data
def test_arc_is_what_its_file_says(loaded):
    rows = [json.loads(line) for line in (DATA / "arc_challenge" / "test.jsonl").read_text().split("\n")[:-1]]
    for row, item in zip(rows, loaded["arc_challenge"].items, strict=True):
        texts = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
        assert (item.id, gold_text(item)) == (row["id"], texts[row["answerKey"]])


def redux_tables():
    """Subject to rows, read by pandas."""
    pandas = pytest.importorskip("pandas")
    tables = {}
    for path in sorted((DATA / "mmlu_redux").glob("*.csv")):
        semicolons = path.read_bytes().startswith(b"question;")
        encoding = "mac_roman" if "moral_scenarios" in path.name else "utf-8"
        table = pandas.read_csv(path, sep=";" if semicolons else ",", encoding=encoding, dtype=str)
        tables[path.stem.removeprefix("mmlu_")] = table.fillna("").to_dict("records")
    return tables


@real_data
def test_mmlu_redux_is_what_its_files_say(loaded):
    tables = redux_tables()
    assert len(tables) == 57
    rows = {f"{subject}-{n}": row for subject, table in tables.items() for n, row in enumerate(table, start=1)}
    for name, subjects in (("mmlu_redux", 30), ("mmlu_redux2", 57)):
        items = loaded[name].items
        assert Counter(Counter(item.category for item in items).values()) == {100: subjects}
        for item in items:
            row = rows[item.id]
            assert item.prompt.startswith(row["question"].strip() + "\n\nA) ")
            assert LETTERS.index(item.gold) == int(row["answer"])
    assert any("my sister’s head" in item.prompt for item in loaded["mmlu_redux2"].items)
    assert "version 2.0" in loaded["mmlu_redux"].source["note"]
    assert "note" not in loaded["mmlu_redux2"].source


@real_data
def test_annotations_of_mmlu_redux_are_ignored_filtered_by_or_followed(loaded):
    rows = [row for table in redux_tables().values() for row in table]
    kinds = Counter(row["error_type"].strip().lower().replace(" ", "_") for row in rows)
    ok = choice.TASKS["mmlu_redux2_ok"].load(DATA)
    assert len(ok.items) == kinds["ok"] == 5330 == ok.source["rows"]
    corrected = choice.TASKS["mmlu_redux2_corrected"].load(DATA)
    changed = [
        (before, after)
        for before, after in zip(loaded["mmlu_redux2"].items, corrected.items, strict=True)
        if before != after
    ]
    named = [row["correct_answer"].strip() for row in rows if "groundtruth" in row["error_type"].lower()]
    assert (len(named), len([name for name in named if re.fullmatch("[0-3A-D]", name)])) == (107, 102)
    assert len(changed) == 101  # one of them names MMLU's own answer
    assert all(before.prompt == after.prompt and before.gold != after.gold for before, after in changed)
    assert len(choice.TASKS["mmlu_redux_ok"].load(DATA).items) == 2724


# ---------------------------------------------------------------------------------------------------------------------
# GPQA, made up: its authors ask not to show its questions

GPQA = [
    {
        "Record ID": f"rec{number}",
        "Question": f"What is {number} + {number}?",
        "Correct Answer": f" {2 * number}\n",
        **{f"Incorrect Answer {wrong}": str(2 * number + wrong) for wrong in (1, 2, 3)},
        "High-level domain": "Physics",
    }
    for number in range(40)
]


def write_gpqa(folder, suffix):
    """The made-up rows as gpqa_diamond/test.<suffix>."""
    path = folder / "gpqa_diamond" / f"test{suffix}"
    path.parent.mkdir(parents=True)
    if suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, GPQA[0])
        writer.writeheader()
        writer.writerows(GPQA)
        path.write_text(text.getvalue())
    elif suffix == ".parquet":
        pytest.importorskip("pandas").DataFrame(GPQA).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in GPQA))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_gpqa_options_are_in_an_order_of_each_questions_own(tmp_path, suffix):
    write_gpqa(tmp_path, suffix)
    items = choice.TASKS["gpqa_diamond"].load(tmp_path).items
    for number, item in enumerate(items):
        assert (item.id, item.category, gold_text(item)) == (f"rec{number}", "Physics", str(2 * number))
        assert sorted(item.options) == sorted(str(2 * number + step) for step in range(4))
        assert f"{item.gold}) {2 * number}\n" in item.prompt
    assert {item.gold for item in items} == set("ABCD")
    assert items == choice.TASKS["gpqa_diamond"].load(tmp_path).items


def test_gpqa_says_how_to_be_let_in(tmp_path):
    for subset in ("diamond", "main", "extended"):
        with pytest.raises(
            UserError, match=rf"gpqa_{subset}/test\.jsonl: no such file; .*accept their terms.*HF_TOKEN"
        ):
            choice.TASKS[f"gpqa_{subset}"].load(tmp_path)


def test_a_gpqa_file_without_a_column_is_named(tmp_path):
    path = write_gpqa(tmp_path, ".csv")
    path.write_text(path.read_text().replace("Incorrect Answer 2", "Incorrect Answer Two", 1))
    with pytest.raises(UserError, match=re.escape(f"{path}, row 1: no column 'Incorrect Answer 2'")):
        choice.TASKS["gpqa_diamond"].load(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Files with a fault

PRO = {"question_id": 1, "question": "q?", "options": ["x", "y", "z"], "answer": "B", "category": "law"}
ARC = {"id": "a", "question": "q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}


def write(folder, name, *rows):
    """A JSONL benchmark file with these rows."""
    path = folder / name / "test.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("mmlu_pro", {**PRO, "answer": "D"}, "the answer 'D' is none of the options: A, B, C"),
        ("mmlu_pro", {**PRO, "answer": "BC"}, "the answer 'BC' is none of the options: A, B, C"),
        ("mmlu_pro", {**PRO, "options": []}, "0 options; a question has 1 to 10"),
        ("mmlu_pro", {**PRO, "options": list("abcdefghijk")}, "11 options; a question has 1 to 10"),
        ("mmlu_pro", {**PRO, "options": ["x", " "]}, "column 'options' is not a list of texts: ['x', ' ']"),
        ("mmlu_pro", {**PRO, "options": "x, y"}, "column 'options' is not a list of texts: 'x, y'"),
        ("mmlu_pro", {"question_id": 2, "options": ["x", "y"], "answer": "A"}, "no column 'question'"),
        ("mmlu_pro", PRO, "id '1' is already that of"),
        ("arc_challenge", {**ARC, "answerKey": "A"}, "the answer 'A' is none of the options: 1, 2"),
        ("arc_challenge", {**ARC, "choices": ["x", "y"]}, "column 'choices' has no lists of 'text' and 'label'"),
        ("arc_challenge", {**ARC, "choices": {"text": ["x"], "label": ["1", "2"]}}, "1 options, but 2 labels"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, name, row, message):
    path = write(tmp_path, name, PRO if name == "mmlu_pro" else ARC, row)
    with pytest.raises(UserError, match=re.escape(f"{path}:2: ") + ".*" + re.escape(message)):
        choice.TASKS[name].load(tmp_path)


def test_labels_may_be_numbers(tmp_path):
    write(tmp_path, "arc_challenge", ARC)
    (item,) = choice.TASKS["arc_challenge"].load(tmp_path).items
    assert (item.gold, gold_text(item)) == ("B", "y")
    assert statuses("arc_challenge", [item] * 2, ["\\boxed{B}", "\\boxed{y}"]) == {"correct": 2}


REDUX_HEADER = "question,choices,answer,error_type,source,correct_answer,potential_reason\n"
REDUX_ROW = "q?,\"['x', 'y']\",1,ok,,,\n"


def write_redux(folder, text=REDUX_HEADER + REDUX_ROW, subject="anatomy"):
    """A folder with every subject of version 1, this one with `text`."""
    (folder / "mmlu_redux").mkdir()
    for name in choice.REDUX_SUBJECTS.split():
        (folder / "mmlu_redux" / f"mmlu_{name}.csv").write_text(REDUX_HEADER + REDUX_ROW)
    path = folder / "mmlu_redux" / f"mmlu_{subject}.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (REDUX_ROW.replace(",1,ok", ",2,ok"), "row 2: the answer '2' is none of the options: 0, 1"),
        (REDUX_ROW.replace("'y']", "'y'"), "row 2: column 'choices' is not a list of texts"),
        (REDUX_ROW.replace("'y'", "open('y')"), "row 2: column 'choices' is not a list of texts"),
        (REDUX_ROW.replace("'y'", "7"), "row 2: column 'choices' is not a list of texts"),
        ("q?,1,ok\n", "row 2: 3 cells, but the header has 7"),
        ('"q?,1,ok\n', "row 2: malformed: unexpected end of data"),
        (REDUX_ROW.replace("q?", ""), "row 2: column 'question' is neither text nor a whole number"),
    ],
)
def test_a_malformed_row_of_a_csv_file_is_named(tmp_path, row, message):
    path = write_redux(tmp_path, REDUX_HEADER + REDUX_ROW + row)
    with pytest.raises(UserError, match=re.escape(f"{path}, {message}")):
        choice.TASKS["mmlu_redux"].load(tmp_path)


def test_a_missing_subject_is_named(tmp_path):
    path = write_redux(tmp_path, subject="virology")
    assert len(choice.TASKS["mmlu_redux"].load(tmp_path).items) == 30
    with pytest.raises(UserError, match=r"mmlu_abstract_algebra\.csv: no such file; .*edinburgh-dawg/mmlu-redux-2\.0"):
        choice.TASKS["mmlu_redux2"].load(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=re.escape(f"{path}: no such file; put the MMLU-Redux test set there")):
        choice.TASKS["mmlu_redux"].load(tmp_path)


@pytest.mark.parametrize(
    ("named", "gold"), [("A", "A"), ("0", "A"), (" a thing ", "A"), ("", "B"), ("0 or 1", "B"), ("C", "B"), ("2", "B")]
)
def test_a_correction_may_be_a_letter_an_index_or_a_text(tmp_path, named, gold):
    row = f"q?,\"['a thing', 'y']\",1,Wrong Groundtruth ,,{named},\n"
    write_redux(tmp_path, REDUX_HEADER + row)
    golds = {
        name: [item.gold for item in choice.TASKS[name].load(tmp_path).items if item.id == "anatomy-1"]
        for name in ("mmlu_redux", "mmlu_redux_ok", "mmlu_redux_corrected")
    }
    assert golds == {"mmlu_redux": ["B"], "mmlu_redux_ok": [], "mmlu_redux_corrected": [gold]}


def test_the_source_changes_with_any_subjects_file(tmp_path):
    path = write_redux(tmp_path)
    before = choice.TASKS["mmlu_redux"].load(tmp_path).source
    path.write_text(path.read_text().replace("'x'", "'w'"))
    after = choice.TASKS["mmlu_redux"].load(tmp_path).source
    assert before["sha256"] != after["sha256"]
    assert {**before, "sha256": None} == {**after, "sha256": None}
    assert (before["rows"], before["annotations"]) == (30, "ignored")


# ---------------------------------------------------------------------------------------------------------------------
# The Hub, never asked here: only what its datasets look like

HUB_ROWS = {
    "gpqa_diamond": GPQA[0],
    "mmlu_pro": PRO,
    "mmlu_redux": {"question": "q?", "choices": ["x", "y"], "answer": 1, "error_type": "ok", "correct_answer": None},
    "arc_challenge": {**ARC, "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_hub_datasets_are_asked_for_by_name(monkeypatch, name):
    asked = []

    class Dataset(list):
        info = SimpleNamespace(download_checksums={f"hf://datasets/some/name@{'0a' * 20}/test.parquet": {}})

    def load_dataset(repository, config, *, split, revision):
        asked.append((repository, config, split, revision))
        return Dataset([HUB_ROWS[name]])

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    data = choice.TASKS[name].load(None)
    assert (
        asked[0]
        == {
            "gpqa_diamond": ("Idavidrein/gpqa", "gpqa_diamond", "train", None),
            "mmlu_pro": ("TIGER-Lab/MMLU-Pro", None, "test", None),
            "mmlu_redux": ("edinburgh-dawg/mmlu-redux", "anatomy", "test", None),
            "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", None),
        }[name]
    )
    assert len(asked) == len(data.items) == (30 if name == "mmlu_redux" else 1)
    assert data.source["revision"] == "0a" * 20
    assert "note" not in data.source
    assert gold_text(data.items[0]) == ("0" if name == "gpqa_diamond" else "y")


def test_a_malformed_row_of_the_hub_is_named(monkeypatch):
    module = ModuleType("datasets")
    module.load_dataset = lambda repository, config, **_: DatasetOf({**HUB_ROWS["mmlu_redux"], "answer": 7})
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(UserError, match=r"edinburgh-dawg/mmlu-redux \(anatomy\), row 1: the answer '7' is none of"):
        choice.TASKS["mmlu_redux"].load(None)


class DatasetOf(list):
    """A dataset with one row."""

    info = SimpleNamespace(download_checksums=None)

    def __init__(self, row):
        super().__init__([row])


# ---------------------------------------------------------------------------------------------------------------------
# Prompts, verdicts, checks


def test_a_prompt_of_ones_own_shows_question_and_options_once(tmp_path):
    write(tmp_path, "mmlu_pro", {**PRO, "question": "What is {options}?", "options": ["{question}", "y"]})
    task = replace(choice.TASKS["mmlu_pro"], prompt="{options}\n{question} Letter:")
    assert task.load(tmp_path).items[0].prompt == "A) {question}\nB) y\nWhat is {options}? Letter:"


def test_a_verdict_has_the_letter_and_where_it_stood(tmp_path):
    write(tmp_path, "mmlu_pro", PRO)
    task = choice.TASKS["mmlu_pro"]
    (item,) = task.load(tmp_path).items
    responses = ["\\boxed{B}", "The answer is x.", "hm", "\\boxed{A} or \\boxed{B}", "\\boxed{D}"]
    verdicts = [grades["choice"] for _, grades in task.grade([single_turn(item, response) for response in responses])]
    fields = [(v.score, v.status, v.extracted, v.method, v.note) for v in verdicts]
    neither = "boxed, but no single option of the question"
    assert fields == [
        (1.0, "correct", "B", "boxed:letter", None),
        (0.0, "wrong", "A", "stated:text", None),
        (0.0, "no_answer", None, None, None),
        (0.0, "no_answer", None, None, neither),
        (0.0, "no_answer", None, None, neither),
    ]
    assert task.graders == {"choice": "evals.choices 1"}


def test_the_grader_agrees_with_every_check(tmp_path):
    write(tmp_path, "mmlu_pro", PRO, {**PRO, "question_id": 2, "options": ["x"], "answer": "A"})
    task = choice.TASKS["mmlu_pro"]
    checks = task.checks(task.load(tmp_path).items)
    kinds = Counter((check.kind, check.correct) for check in checks)
    assert (kinds["gold", True], kinds["corrupted", False]) == (2, 2)
    assert kinds["labelled", True] >= 150
    assert kinds["labelled", False] >= 70
    for index, grades in task.grade([check.answer for check in checks]):
        assert (grades["choice"].status == "correct") == checks[index].correct, checks[index].answer.response


def test_mmlu_redux_versions_are_subjects_of_one_another():
    first, second = choice.REDUX_SUBJECTS.split(), choice.REDUX2_SUBJECTS.split()
    assert (len(set(first)), len(set(second)), len(set(first) & set(second))) == (30, 27, 0)
