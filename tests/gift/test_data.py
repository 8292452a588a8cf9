"""Rows in, token batches out: what is refused, what is disjoint, and which token every label is."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gift.cli import UserError
from gift.data import (
    IGNORED,
    Encoded,
    Example,
    by_length,
    collate,
    encode,
    encode_prompt,
    epoch_order,
    fingerprint,
    normalize,
    read_examples,
    split,
    write_examples,
)
from gift.models import load_tokenizer
from gift.records import write_table

ROW = {"prompt": "1 + 1", "response": "It is 2.", "answer": "2"}


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return load_tokenizer(tiny_checkpoint)


def write_rows(path: Path, rows) -> Path:
    if path.suffix == ".parquet":
        write_table(path, {name: [row[name] for row in rows] for name in rows[0]})
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def examples(count: int, start: int = 0) -> list[Example]:
    return [Example(f"e{n}", f"Problem {n}?", f"Answer {n}", str(n)) for n in range(start, start + count)]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_both_kinds_of_file_give_the_same_examples(tmp_path, suffix):
    rows = [{"question": f"é{n}", "solution": "s\n", "gold": "2", "more": n} for n in range(3)]
    found = read_examples(
        write_rows(tmp_path / f"data{suffix}", rows), prompt="question", response="solution", answer="gold"
    )
    assert found == [Example(f"data-{n + 1}", f"é{n}", "s\n", "2") for n in range(3)]


def test_ids_are_kept_and_a_null_one_is_numbered(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [{**ROW, "id": 7}, {**ROW, "id": None}, {**ROW, "id": "x"}])
    assert [example.id for example in read_examples(path)] == ["7", "d-2", "x"]


def test_ids_do_not_depend_on_the_folder(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "d.jsonl", [ROW])
    monkeypatch.chdir(tmp_path)
    assert fingerprint(read_examples(Path("d.jsonl"))) == fingerprint(read_examples(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "column 'answer' is not text: None"),
        ({"response": "  "}, "column 'response' is not text: '  '"),
    ],
)
def test_a_bad_value_names_file_row_and_column(tmp_path, suffix, change, message):
    path = write_rows(tmp_path / f"data{suffix}", [ROW, {**ROW, **change}])
    with pytest.raises(UserError) as error:
        read_examples(path)
    assert str(error.value) == f"{path}:2: {message}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "response": "b"}', "no column 'answer'; the row has: prompt, response"),
        (json.dumps({**ROW, "answer": 2}), "column 'answer' is not text: 2"),
        (json.dumps({**ROW, "prompt": "\ud83d"}), "column 'prompt' has half of a surrogate pair"),
        ('{"prompt": ', "malformed row: "),
        ('["a"]', "malformed row: expected a JSON object, got list"),
    ],
)
def test_a_bad_line_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{line}\n")
    with pytest.raises(UserError) as error:
        read_examples(path)
    assert str(error.value).startswith(f"{path}:2: {message}")
    assert "\n" not in str(error.value)


def test_unusable_files_are_named(tmp_path):
    for name, content, message in [
        ("absent.jsonl", None, "no such data file"),
        ("table.csv", "a,b", "unknown kind of data file"),
        ("broken.parquet", "PAR1", "not a readable Parquet file"),
    ]:
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=f"{name}: {message}"):
            read_examples(tmp_path / name)


def test_examples_survive_a_round_trip(tmp_path):
    wanted = [*examples(3), Example("u", "a\u2028b", "\x85\r\n\t\0", "π")]
    write_examples(tmp_path / "d.jsonl", wanted)
    assert read_examples(tmp_path / "d.jsonl") == wanted


# ---------------------------------------------------------------------------------------------------------------------
# Subsets


@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 8), st.integers(), st.randoms())
def test_subsets_are_disjoint_and_of_the_sizes_asked_for(sft, rl, validation, seed, rng):
    repeats = [Example(f"r{n}", f"  PROBLEM   {n}? ", "another", "0") for n in range(24)]
    pool = [*examples(24), *repeats]
    rng.shuffle(pool)
    sizes = {"sft": sft, "rl": rl, "validation": validation}
    subsets = split(pool, sizes, seed)
    assert {name: len(subset) for name, subset in subsets.items()} == sizes
    prompts = [normalize(example.prompt) for subset in subsets.values() for example in subset]
    assert len(prompts) == len(set(prompts))
    assert subsets == split(pool, sizes, seed)
    chosen = [example for subset in subsets.values() for example in subset]
    for example in chosen:  # of two with the same prompt, the one that comes first
        assert example is next(other for other in pool if normalize(other.prompt) == normalize(example.prompt))


def test_another_seed_is_another_split():
    assert len({tuple(split(examples(20), {"a": 10}, seed)["a"]) for seed in range(5)}) == 5


def test_too_few_distinct_prompts():
    with pytest.raises(UserError, match="the data has 3 distinct prompts, but 4 are asked for"):
        split([*examples(3), *examples(3)], {"sft": 2, "rl": 2}, 0)


def test_an_id_of_two_prompts_is_named():
    with pytest.raises(UserError, match="two prompts of the data share the id 'x'"):
        split([Example("x", "a", "b", "c"), Example("x", "d", "e", "f")], {"sft": 1}, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens

ENCODED = st.integers(1, 6).flatmap(
    lambda prompt: st.builds(
        lambda ids: Encoded("e", tuple(ids), prompt), st.lists(st.integers(1, 99), min_size=prompt, max_size=12)
    )
)


@given(st.lists(ENCODED, min_size=1, max_size=5))
def test_labels_are_the_next_response_token(batch):
    tensors = collate(batch, pad_id=0)
    width = max(len(example.ids) for example in batch)
    for row, example in enumerate(batch):
        for position in range(width):
            inside = position < len(example.ids)
            predicts_response = example.prompt_length <= position + 1 < len(example.ids)
            assert tensors["input_ids"][row, position] == (example.ids[position] if inside else 0)
            assert tensors["attention_mask"][row, position] == inside
            assert tensors["labels"][row, position] == (example.ids[position + 1] if predicts_response else IGNORED)


def test_an_example_is_prompt_response_and_end(tokenizer):
    example = Example("e", "What is 3 + 4?", "3+4=7\n\\boxed{7}", "7")
    encoded = encode(tokenizer, example, 100)
    assert tokenizer.decode(encoded.ids) == "<|user|>What is 3 + 4?<|assistant|>3+4=7\n\\boxed{7}<|end|>"
    assert tokenizer.decode(encoded.ids[: encoded.prompt_length]) == "<|user|>What is 3 + 4?<|assistant|>"
    assert not encoded.truncated


def test_truncation_cuts_the_right_end_and_says_so(tokenizer):
    example = Example("e", "2?", "a long response", "7")
    whole = encode(tokenizer, example, 1000)
    for length in range(whole.prompt_length + 1, len(whole.ids) + 2):
        cut = encode(tokenizer, example, length)
        assert cut.ids == whole.ids[:length]
        assert cut.truncated == (length < len(whole.ids))
    with pytest.raises(UserError, match=f"e: the prompt has {whole.prompt_length} tokens"):
        encode(tokenizer, example, whole.prompt_length)


def test_a_prompt_follows_the_chat_template_where_there_is_one(tokenizer):
    ids = encode_prompt(tokenizer, "hello")
    assert tokenizer.decode(ids) == "<|user|>hello<|assistant|>"
    tokenizer.chat_template, template = None, tokenizer.chat_template
    try:
        assert tokenizer.decode(encode_prompt(tokenizer, "hello")) == "hello"
    finally:
        tokenizer.chat_template = template


@given(st.lists(st.integers(1, 20)), st.integers(1, 60))
def test_pieces_hold_everything_once_within_the_limit(lengths, limit):
    pieces = by_length(range(len(lengths)), lambda index: lengths[index], limit)
    assert sorted(index for piece in pieces for index in piece) == list(range(len(lengths)))
    for piece in pieces:
        padded = len(piece) * max(lengths[index] for index in piece)
        assert len(piece) == 1 or padded <= limit
    for piece, following in itertools.pairwise(pieces):  # no piece could have taken one more
        assert (len(piece) + 1) * lengths[following[0]] > limit
        assert max(lengths[index] for index in piece) <= lengths[following[0]]


@given(st.integers(0, 50), st.integers(), st.integers(0, 5))
def test_an_epochs_order_is_a_permutation_that_repeats(size, seed, epoch):
    order = epoch_order(size, seed, epoch)
    assert sorted(order) == list(range(size))
    assert order == epoch_order(size, seed, epoch)


def test_epochs_and_seeds_have_orders_of_their_own():
    assert len({tuple(epoch_order(20, seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16
