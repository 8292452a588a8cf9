import json
from pathlib import Path

import pytest
from tiny_models import tiny_model

from gift.cli import UserError
from gift.generation import Request, SamplingParams, completion_text
from gift.generation.replay import ReplayEngine
from gift.models import load_tokenizer
from gift.records import write_table

PARAMS = SamplingParams(16)
ROWS = [
    {"task": "sums", "item": "a", "run": 0, "sample": 0, "completion": "five", "finish_reason": "length", "tokens": 7},
    {"task": "sums", "item": "a", "run": 0, "sample": 1, "completion": ""},
    {"task": "sums", "item": "a", "run": 1, "sample": 0, "completion": "six\n", "stop_reason": "Q:"},
    {"task": "sums", "item": "b", "run": 0, "sample": 0, "completion": "é\u2028x", "finish_reason": "repetition"},
    {"task": "more", "item": "a", "run": 0, "sample": 0, "completion": "nine", "score": 1.0, "anything": [1, 2]},
]


def request(*key) -> Request:
    return Request((), 0, key=key)


def asked(engine: ReplayEngine, *keys):
    return engine.generate([request(*key) for key in keys], PARAMS)


def write(path: Path, *lines) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# What is found


@pytest.mark.parametrize("kind", ["rows", "jsonl", "parquet"])
def test_samples_are_found_by_task_item_run_and_sample(tmp_path, kind):
    if kind == "jsonl":
        source = write(tmp_path / "answers.jsonl", *ROWS)
    elif kind == "parquet":
        source = tmp_path / "answers.parquet"
        names = ("task", "item", "run", "sample", "completion", "finish_reason", "stop_reason", "tokens")
        write_table(source, {name: [row.get(name) for row in ROWS] for name in names})
    else:
        source = iter(ROWS)
    engine = ReplayEngine(source)
    keys = [(row["task"], row["item"], row["run"], row["sample"]) for row in ROWS]
    backwards = asked(engine, *keys[::-1])
    assert [sample.text for sample in backwards] == [row["completion"] for row in ROWS[::-1]]
    samples = backwards[::-1]
    assert [sample.finish_reason for sample in samples] == ["length", "stop", "stop", "repetition", "stop"]
    assert [sample.stop_reason for sample in samples] == [None, None, "Q:", None, None]
    assert [sample.tokens for sample in samples] == [7, None, None, None, None]
    assert all(sample.token_ids == sample.logps == [] for sample in samples)
    assert all(key in engine for key in keys)
    assert ("sums", "b", 1, 0) not in engine
    assert ("none", "b", 0, 0) not in engine


def test_a_file_needs_no_more_than_items_and_completions(tmp_path):
    rows = [{"item": item, "completion": f"{item} {number}"} for number in range(3) for item in ("x", 7)]
    engine = ReplayEngine(write(tmp_path / "answers.jsonl", *rows))
    keys = [("any", item, 0, sample) for item in ("x", "7") for sample in range(3)]
    assert [sample.text for sample in asked(engine, *keys)] == ["x 0", "x 1", "x 2", "7 0", "7 1", "7 2"]
    assert ("another", "x", 0, 2) in engine
    assert ("any", "x", 0, 3) not in engine
    assert ("any", "x", 1, 0) not in engine


def test_samples_are_counted_up_in_each_run_and_task():
    rows = [{"task": task, "item": "x", "run": run, "completion": f"{task}{run}"} for run in (0, 1, 0) for task in "ab"]
    engine = ReplayEngine(rows)
    found = [(task, run, n) for task in "ab" for run in range(3) for n in range(3) if (task, "x", run, n) in engine]
    assert found == [(task, run, n) for task in "ab" for run, n in ((0, 0), (0, 1), (1, 0))]


def test_a_row_of_the_very_task_goes_before_one_of_any():
    rows = [{"item": "x", "completion": "any"}, {"item": "x", "task": "sums", "completion": "sums"}]
    first, second = asked(ReplayEngine(rows), ("sums", "x", 0, 0), ("more", "x", 0, 0))
    assert (first.text, second.text) == ("sums", "any")


def test_tokens_are_a_tokenizers_where_there_is_one(tiny_checkpoint):
    tokenizer = load_tokenizer(tiny_checkpoint)
    rows = [{"item": "x", "completion": "State the answer 12"}, {"item": "x", "completion": "12", "tokens": 40}]
    first, second = asked(ReplayEngine(rows, tokenizer), ("t", "x", 0, 0), ("t", "x", 0, 1))
    assert tokenizer.decode(first.token_ids) == completion_text(tokenizer, first) == "State the answer 12"
    assert first.tokens == len(first.token_ids)
    assert second.token_ids == tokenizer("12", add_special_tokens=False).input_ids
    assert second.tokens == 40, "what the one who sampled it counted, end token and all"


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{'item': 1}", "malformed row"),
        ("[1]", "expected a JSON object, got list"),
        ({"completion": "c"}, "no 'item'; its columns: completion"),
        ({"items": "x", "completion": "c"}, r"no 'item' \(did you mean 'items'\?\); its columns: items, completion"),
        ({"item": "x", "completions": ["c"]}, r"no 'completion' \(did you mean 'completions'\?\)"),
        ({"item": "x", "completion": None}, "no 'completion'"),
        ({"item": "x", "completion": ["c"]}, r"column 'completion' is not text: \['c'\]"),
        ({"item": 1.5, "completion": "c"}, "column 'item' is neither text nor a whole number: 1.5"),
        ({"item": True, "completion": "c"}, "column 'item' is neither"),
        ({"item": "x", "completion": "c", "task": 3}, "column 'task' is not text: 3"),
        ({"item": "x", "completion": "c", "run": -1}, "column 'run' is not a whole number from 0 on: -1"),
        ({"item": "x", "completion": "c", "sample": "0"}, "column 'sample' is not a whole number from 0 on: '0'"),
        ({"item": "x", "completion": "c", "tokens": 2.5}, "column 'tokens' is not a whole number"),
        (
            {"item": "x", "completion": "c", "finish_reason": "eos"},
            "'eos'; it must be one of: stop, length, repetition",
        ),
        ({"item": "x", "completion": "c", "stop_reason": {}}, "column 'stop_reason' is neither"),
        ({"item": "a", "completion": "c", "sample": 0}, "item 'a', run 0, sample 0 is that of row 1 already"),
        ({"item": "a", "completion": "c"}, "of item 'a' some rows have a 'sample' and some do not"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, row, message):
    path = write(tmp_path / "answers.jsonl", {"item": "a", "sample": 0, "completion": "c"}, row)
    with pytest.raises(UserError, match=rf"^{path}:2: .*{message}") as error:
        ReplayEngine(path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_empty_or_no_table_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: no such file of generations"):
        ReplayEngine(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"empty\.jsonl: no rows; a row has an item and a completion"):
        ReplayEngine(write(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match=r"bad\.parquet: not a readable Parquet file"):
        ReplayEngine(write(tmp_path / "bad.parquet", *ROWS))


def test_missing_samples_are_counted_and_some_of_them_named():
    engine = ReplayEngine(ROWS)
    keys = [("sums", item, run, 0) for item in "abcd" for run in range(3)]
    stream = engine.stream([request(*key) for key in keys], PARAMS)
    message = r"no completion for 9 of 12 samples .*: sums, a, 2, 0; sums, b, 1, 0; sums, b, 2, 0, \.\.\.$"
    with pytest.raises(UserError, match=message):
        next(stream)
    with pytest.raises(UserError, match=r"1 of 1 samples .*: a request without a key$"):
        engine.generate([Request((1,), 0)], PARAMS)


def test_there_is_no_model():
    engine = ReplayEngine(ROWS)
    with pytest.raises(UserError, match="no model to score"):
        engine.score([(1, 2)])
    with pytest.raises(UserError, match="no model whose weights"):
        engine.update_weights(tiny_model(8))
    with pytest.raises(UserError, match="no log-probabilities"):
        engine.generate([request("sums", "a", 0, 0)], SamplingParams(4, logps=True))
    engine.close()
    engine.close()
