"""MT-Bench: fschat's files become items, answers become the judge's prompts, ratings become Table 5."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fschat_source
import numpy as np
import pytest
from judge_server import JudgeServer, asked_text, completion, own_rating, rated
from scipy import stats

from evals.judge import Budget
from evals.ratings import category_ratings
from evals.tasks import Answer
from evals.tasks.chat import DISPUTED, PLACES, PROMPT_NAMES, REVISION, TASKS, TEMPERATURES, WITH_REFERENCE, judge_prompt
from gift.cli import UserError

DATA = Path(__file__).parents[3] / "shared" / "data"
real_data = pytest.mark.skipif(not (DATA / "mt_bench").is_dir(), reason=f"MT-Bench's files are not at {DATA}")
TASK = TASKS["mt_bench"]
FILES = ("question.jsonl", "judge_prompts.jsonl", "reference_answer/gpt-4.jsonl")


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    server = JudgeServer()
    yield server
    server.close()


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(folder, question_rows, references, prompts):
    for name, rows in zip(FILES, (question_rows, prompts, references), strict=True):
        path = folder / "mt_bench" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def small():
    """Two questions, one with a reference, and four prompts: each row can be broken by itself."""
    question_rows = [
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Again, with {answer}."]},
        {"question_id": 104, "category": "reasoning", "turns": ["Why?", "And how?"]},
    ]
    references = [{"question_id": 104, "choices": [{"index": 0, "turns": ["Because {question}.", "Thus."]}]}]
    prompts = [
        {"name": name, "system_prompt": f"system of {name}", "prompt_template": template(turn, reference)}
        for (turn, reference), name in PROMPT_NAMES.items()
    ]
    return question_rows, references, prompts


def template(turn, reference):
    places = [*PLACES[turn][0], *PLACES[turn][1], *(PLACES[turn][2] if reference else ())]
    return "\n".join(f"<{place}>{{{place}}}</{place}>" for place in places)


def answers_to(items, text="my answer to {id}"):
    """An answer to every item, in conversations as the sampler makes them."""
    said = {item.id: text.replace("{id}", item.id) for item in items}
    prompts = {item.id: item.prompt for item in items}
    found = []
    for item in items:
        before = []
        if item.after:
            before = [
                {"role": "user", "content": prompts[item.after]},
                {"role": "assistant", "content": said[item.after]},
            ]
        system = {"role": "system", "content": "You are terse."}
        found.append(Answer(item, (system, *before, {"role": "user", "content": item.prompt}), said[item.id]))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The real files


@real_data
def test_every_question_becomes_two_items():
    data = TASK.load(DATA)
    rows = read(DATA / "mt_bench" / FILES[0])
    assert [item.id for item in data.items] == [f"{row['question_id']}-{turn}" for row in rows for turn in (1, 2)]
    assert [item.prompt for item in data.items] == [turn for row in rows for turn in row["turns"]]
    assert [item.after for item in data.items] == [after for row in rows for after in (None, f"{row['question_id']}-1")]
    assert Counter(item.category for item in data.items) == dict.fromkeys(TEMPERATURES, 20)
    assert data.source["rows"] == len(rows) == 80
    assert data.source["revision"] == f"lm-sys/FastChat@{REVISION}"  # the files are those of that commit
    golds = {
        f"{row['question_id']}-{turn}": text
        for row in read(DATA / "mt_bench" / FILES[2])
        for turn, text in enumerate(row["choices"][0]["turns"], start=1)
    }
    assert {item.id: item.gold for item in data.items if item.gold} == golds
    assert {item.question for item in data.items if item.disputed} == DISPUTED
    assert len(DISPUTED) == 13


@real_data
def test_prompts_are_filled_in_as_fschat_does():
    templates = {row["name"]: row for row in read(DATA / "mt_bench" / FILES[1])}
    references = {row["question_id"]: row["choices"][0]["turns"] for row in read(DATA / "mt_bench" / FILES[2])}
    items = TASK.load(DATA).items
    by_id = {item.id: item for item in items}
    names = Counter()
    for answer in answers_to(items, "an {answer_1} in \\1 {{braces}} to {id}"):
        item, prompt = answer.item, judge_prompt(answer)
        known = references[item.question] if item.category in ("math", "reasoning", "coding") else []
        own = {f"ref_answer_{turn}": text for turn, text in enumerate(known, start=1)}
        said = "an {answer_1} in \\1 {{braces}} to "
        first, second = by_id[f"{item.question}-1"], by_id[f"{item.question}-2"]
        if item.turn == 1:
            name = "single-math-v1" if known else "single-v1"
            own |= {"question": first.prompt, "answer": said + first.id}
        else:
            name = "single-math-v1-multi-turn" if known else "single-v1-multi-turn"
            own |= {"question_1": first.prompt, "question_2": second.prompt}
            own |= {"answer_1": said + first.id, "answer_2": said + second.id}
        assert prompt.name == name
        assert prompt.system == templates[name]["system_prompt"]
        assert prompt.user == templates[name]["prompt_template"].format(**own)
        names[name] += 1
    assert names == {"single-v1": 50, "single-math-v1": 30, "single-v1-multi-turn": 50, "single-math-v1-multi-turn": 30}


@real_data
def test_another_content_has_another_hash_and_no_revision(tmp_path):
    shutil.copytree(DATA / "mt_bench", tmp_path / "mt_bench")
    file = tmp_path / "mt_bench" / FILES[2]
    file.chmod(0o644)
    file.parent.chmod(0o755)
    file.write_text(file.read_text().replace("second place", "2nd place", 1))
    source = TASK.load(tmp_path).source
    assert source["revision"] is None
    assert source["sha256"] != TASK.load(DATA).source["sha256"]


@real_data
def test_the_whole_benchmark_rated_and_resumed(server):
    answers = answers_to(TASK.load(DATA).items)
    found, commands = {}, 0
    while len(found) < len(answers):
        commands += 1
        task = replace(TASK, judge=server.judge(budget=Budget(max_requests=70)))
        left = [number for number in range(len(answers)) if number not in found]
        with contextlib.suppress(UserError):  # the budget is spent
            for index, grades in task.grade([answers[number] for number in left]):
                found[left[index]] = grades["judge"]
    assert commands == 3
    assert {number: verdict.score for number, verdict in found.items()} == {
        number: own_rating(judge_prompt(answer).user) for number, answer in enumerate(answers)
    }
    rows = [
        {"item": answers[number].item.id, "category": answers[number].item.category, **vars(verdict)}
        for number, verdict in found.items()
    ]
    ratings = category_ratings(rows)
    scores = [verdict.score for verdict in found.values()]
    assert (ratings.rated, ratings.errors, ratings.disputed) == (160, 0, tuple(sorted(DISPUTED)))
    assert ratings.total.estimate == pytest.approx(np.mean(scores))  # the categories are of one size
    assert (ratings.turns[1].estimate + ratings.turns[2].estimate) / 2 == pytest.approx(np.mean(scores))


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_constants_are_fschats():
    others = "arena-hard-200"  # another benchmark's
    temperatures = fschat_source.constant("temperature_config")
    assert {category: value for category, value in temperatures.items() if category != others} == TEMPERATURES
    assert [category for category in fschat_source.constant("NEED_REF_CATS") if category != others] == list(
        WITH_REFERENCE
    )


def test_prompt_names_are_fschats():
    """As its command picks them: read in the source of `make_judge_single`."""
    [function] = [
        node for node in fschat_source.module("gen_judgment") if getattr(node, "name", "") == "make_judge_single"
    ]
    names = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Judge":
            flags = {keyword.arg: keyword.value.value for keyword in node.keywords}
            names[2 if flags.get("multi_turn") else 1, flags.get("ref_based", False)] = node.args[1].slice.value
    assert names == PROMPT_NAMES


# ---------------------------------------------------------------------------------------------------------------------
# Files with a fault


def test_places_in_the_texts_are_left_alone(tmp_path):
    write(tmp_path, *small())
    items = TASK.load(tmp_path).items
    second = judge_prompt(answers_to(items)[1])
    assert second.user == (
        "<question_1>Write.</question_1>\n<question_2>Again, with {answer}.</question_2>\n"
        "<answer_1>my answer to 81-1</answer_1>\n<answer_2>my answer to 81-2</answer_2>"
    )
    third = judge_prompt(answers_to(items)[2])
    assert "<ref_answer_1>Because {question}.</ref_answer_1>" in third.user
    assert "Thus." not in third.user  # the reference of the second turn is not shown with the first


def test_a_protocols_own_prompt_is_the_models_and_not_the_judges(tmp_path):
    write(tmp_path, *small())
    items = replace(TASK, prompt="{question} Think first.").load(tmp_path).items
    assert items[0].prompt == "Write. Think first."
    assert "<question>Write.</question>" in judge_prompt(answers_to(items)[0]).user


def broken(which, number, **change):
    parts = small()
    row = parts[which][number]
    row.update({key: value for key, value in change.items() if value is not None})
    for key in [key for key, value in change.items() if value is None]:
        del row[key]
    return parts


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (broken(0, 1, turns=["one"]), "question.jsonl:2: 'turns' must be a list of two texts, got ['one']"),
        (broken(0, 1, turns=None), "question.jsonl:2: 'turns' must be a list of two texts, got None"),
        (broken(0, 1, turns=["a", 3]), "question.jsonl:2: 'turns' must be a list of two texts"),
        (broken(0, 1, question_id="x"), "question.jsonl:2: 'question_id' is no whole number: 'x'"),
        (broken(0, 1, question_id=True), "question.jsonl:2: 'question_id' is no whole number: True"),
        (broken(0, 1, category=None), "question.jsonl:2: no column 'category'"),
        (broken(0, 1, question_id=81, category="stem"), "question.jsonl:2: id '81-1' is already that of"),
        (broken(0, 0, category="math"), "question.jsonl:1: question 81 is of math, and reference_answer/gpt-4.jsonl"),
        (broken(1, 0, choices=[]), "gpt-4.jsonl:1: 'turns' of the first of 'choices' must be a list of two texts"),
        (broken(1, 0, choices=[{"turns": ["a"]}]), "gpt-4.jsonl:1: 'turns' of the first of 'choices'"),
        (broken(2, 0, name="single-v2"), "judge_prompts.jsonl: no prompt 'single-v1'; get the file again"),
        (broken(2, 3, prompt_template="{answer_1}"), "prompt 'single-math-v1-multi-turn' must hold answer_1, answer_2"),
        (broken(2, 0, prompt_template="{question} {answer} {key}"), "prompt 'single-v1' must hold answer, question in"),
        (broken(2, 0, system_prompt=None), "judge_prompts.jsonl:1: no column 'system_prompt'"),
        (([], *small()[1:]), "question.jsonl: no rows"),
    ],
)
def test_a_fault_is_named(tmp_path, parts, message):
    write(tmp_path, *parts)
    with pytest.raises(UserError) as caught:
        TASK.load(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named_with_where_to_get_them(tmp_path):
    write(tmp_path, *small())
    (tmp_path / "mt_bench" / FILES[1]).unlink()
    for folder, missing in ((tmp_path, str(tmp_path / "mt_bench" / FILES[1])), (None, "not on the Hub")):
        with pytest.raises(UserError) as caught:
            TASK.load(folder)
        assert missing in str(caught.value)
        assert all(name in str(caught.value) for name in (*FILES, "lm-sys/FastChat", REVISION[:7], "--data-dir"))


# ---------------------------------------------------------------------------------------------------------------------
# Grading


def test_without_a_judge_only_grading_fails(tmp_path, monkeypatch):
    write(tmp_path, *small())
    for name in ("GIFT_JUDGE_URL", "GIFT_JUDGE_MODEL"):
        monkeypatch.delenv(name, raising=False)
    assert TASK.graders == {"judge": "no judge, fschat single-answer, evals.judge 1"}
    answers = answers_to(TASK.load(tmp_path).items)
    with pytest.raises(UserError, match="no judge: set GIFT_JUDGE_URL"):
        next(TASK.grade(answers))


def test_the_judge_of_the_environment(tmp_path, monkeypatch, server):
    write(tmp_path, *small())
    monkeypatch.setenv("GIFT_JUDGE_URL", server.url)
    monkeypatch.setenv("GIFT_JUDGE_MODEL", "some-model")
    assert TASK.graders == {"judge": "some-model, fschat single-answer, evals.judge 1"}
    answers = answers_to(TASK.load(tmp_path).items)
    server.reply = lambda body, _: completion("no idea") if "81-2" in asked_text(body) else rated(body)
    found = {number: grades["judge"] for number, grades in TASK.grade(answers)}
    assert {number: (verdict.status, verdict.method) for number, verdict in found.items()} == {
        0: ("rated", "single-v1"),
        1: ("error", "single-v1-multi-turn"),
        2: ("rated", "single-math-v1"),
        3: ("rated", "single-math-v1-multi-turn"),
    }
    assert TASK.checks(TASK.load(tmp_path).items) == ()


# ---------------------------------------------------------------------------------------------------------------------
# Ratings


def row(question, turn, category, score, run=0):
    status = "error" if score is None else "rated"
    return {"item": f"{question}-{turn}", "run": run, "category": category, "status": status, "score": score or 0.0}


def test_ratings_by_hand():
    ratings = category_ratings(
        [
            row(81, 1, "writing", 8),
            row(81, 2, "writing", 6),
            row(82, 1, "writing", 5),
            row(82, 2, "writing", None),
            row(111, 1, "math", 2),  # disputed
            row(111, 2, "math", 2),
            row(112, 1, "math", 4),
            row(112, 2, "math", 6),
        ]
    )
    assert {name: value.estimate for name, value in ratings.categories.items()} == {
        "writing": pytest.approx(19 / 3),
        "math": 3.5,
    }
    assert ratings.total.estimate == pytest.approx((19 / 3 + 3.5) / 2)
    assert ratings.turns[1].estimate == 19 / 4
    assert ratings.turns[2].estimate == pytest.approx(14 / 3)
    assert ratings.undisputed.estimate == pytest.approx((19 / 3 + 5) / 2)
    assert (ratings.rated, ratings.errors, ratings.disputed) == (7, 1, (111,))
    # Writing: questions of 2 and 1 turns with residuals 14 - 2 * 19/3 and 5 - 19/3; SE^2 = G/(G-1) sum r^2 / n^2.
    error = math.sqrt(2 * ((4 / 3) ** 2 + (4 / 3) ** 2)) / 3
    assert ratings.categories["writing"].high - 19 / 3 == pytest.approx(stats.t.ppf(0.975, 1) * error)


def test_the_total_has_the_stratified_interval():
    draw = np.random.default_rng(0)
    scores = {name: draw.integers(1, 11, size=(10, 2)) for name in TEMPERATURES}
    rows = [
        row(200 + 10 * index + question, turn + 1, name, float(scores[name][question, turn]))
        for index, name in enumerate(scores)
        for question in range(10)
        for turn in (0, 1)
    ]
    random.Random(1).shuffle(rows)
    total = category_ratings(rows).total
    means = [table.mean(axis=1) for table in scores.values()]  # of questions
    v = np.array([values.var(ddof=1) / 10 for values in means])
    freedom = v.sum() ** 2 / (v**2 / 9).sum()
    margin = stats.t.ppf(0.975, freedom) * math.sqrt(v.sum()) / 8
    estimate = np.mean([values.mean() for values in means])
    assert (total.low, total.estimate, total.high) == pytest.approx((estimate - margin, estimate, estimate + margin))


def test_more_runs_of_the_same_answers_are_no_more_evidence():
    one = [row(81 + q, turn, "writing", float(1 + (q * turn) % 9)) for q in range(10) for turn in (1, 2)]
    four = [{**each, "run": run} for each in one for run in range(4)]
    assert category_ratings(four).categories["writing"].high == pytest.approx(
        category_ratings(one).categories["writing"].high
    )
    assert category_ratings(four).rated == 80


def test_a_category_without_a_rating_leaves_no_total():
    ratings = category_ratings([row(81, 1, "writing", 5), row(82, 1, "writing", 5), row(104, 1, "reasoning", None)])
    assert ratings.total is None
    assert set(ratings.categories) == {"writing"}
    assert ratings.errors == 1
    ratings = category_ratings([row(81, 1, "writing", 5), row(82, 1, "writing", 5), row(104, 1, "reasoning", 3)])
    assert (ratings.total.estimate, ratings.total.high) == (4, math.inf)  # a single question of reasoning
    assert ratings.undisputed is None
    empty = category_ratings([])
    assert (empty.total, empty.categories, empty.turns, empty.rated, empty.errors) == (None, {}, {}, 0, 0)
