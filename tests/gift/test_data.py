"""Rows in, token batches out: what is refused, what is disjoint, and which token every label is."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from datasets.exceptions import DatasetNotFoundError
from hypothesis import given
from hypothesis import strategies as st

from gift.batches import IGNORED, Encoded, by_length, collate, epoch_order
from gift.cli import UserError
from gift.data import (
    Example,
    Loaded,
    Truncation,
    encode,
    encode_all,
    encode_prompt,
    fingerprint,
    load_examples,
    normalize,
    read_examples,
    split,
    write_examples,
)
from gift.models import load_tokenizer
from gift.recipe import Data
from gift.records import sha256_json, write_table

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
    source = str(write_rows(tmp_path / f"data{suffix}", rows))
    found = load_examples(Data(source=source, prompt="question", response="solution", answer="gold")).examples
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
        ('{"prompt": "a", "response": "b"}', "no column 'answer'; it has: prompt, response; without answers set data."),
        (json.dumps({**ROW, "answer": 2}), "column 'answer' is not text: 2"),
        (json.dumps({**ROW, "prompt": "\ud83d"}), "column 'prompt' has half of a surrogate pair"),
        ('{"prompt": ', "malformed row: "),
        ("[" * 100_000, "malformed row: "),
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
    wanted = [*examples(3), Example("u", "a\u2028b", "\x85\r\n\t\0", "π"), Example("none", "a", "b", "")]
    write_examples(tmp_path / "d.jsonl", wanted)
    assert read_examples(tmp_path / "d.jsonl") == wanted


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_data_without_answers(tmp_path, hub, suffix):
    rows = [{"prompt": "q", "response": "r"}, {"prompt": "p", "response": "s", "id": "own"}]
    rows = [{"id": None, **row} for row in rows]
    path = write_rows(tmp_path / f"d{suffix}", rows)
    wanted = [Example("d-1", "q", "r", ""), Example("own", "p", "s", "")]
    assert load_examples(Data(source=str(path), answer=None)).examples == wanted
    hub.table = datasets.Dataset.from_list(rows)
    assert load_examples(Data(source="who/d", answer=None)).examples == wanted
    for source in (str(path), "who/d"):
        with pytest.raises(UserError, match=r"no column 'answer'; it has: .*; without answers set data\.answer=null"):
            load_examples(Data(source=source))


def test_an_empty_answer_in_a_source_with_answers_is_named(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [ROW, {**ROW, "answer": ""}])
    with pytest.raises(UserError, match=r"d\.jsonl:2: column 'answer' is not text: ''"):
        load_examples(Data(source=str(path)))


# ---------------------------------------------------------------------------------------------------------------------
# Sources

DEEPMATH = {  # the columns of zwhe99/DeepMath-103K
    "question": ["1 + 1?", "2 + 2?"],
    "final_answer": ["2", "4"],
    "difficulty": [4.5, 6.0],
    "topic": ["a", "b"],
    "r1_solution_1": ["It is 2.", "It is 4."],
    "r1_solution_2": ["Two.", "Four."],
    "r1_solution_3": ["II", "IV"],
}
DEEPMATH_NAME = "zwhe99/DeepMath-103K"


def deepmath(source, **changes) -> Data:
    named = {"prompt": "question", "response": "r1_solution_1", "answer": "final_answer"}
    return Data(**{"source": str(source), **named, **changes})


def deepmath_examples(name) -> list[Example]:
    return [Example(f"{name}-1", "1 + 1?", "It is 2.", "2"), Example(f"{name}-2", "2 + 2?", "It is 4.", "4")]


@pytest.fixture
def hub(monkeypatch):
    """Replaces the Hub: sets what it holds, or the error it answers with, and notes what was asked of it."""
    found = SimpleNamespace(table=datasets.Dataset.from_dict(DEEPMATH), error=None, asked=[], commit="a" * 40)

    def load_dataset(path, name=None, *, split, revision):
        found.asked.append((path, name, split, revision))
        if found.error:
            raise found.error
        return found.table

    def dataset_info(self, name, *, revision, timeout):
        if found.commit is None:
            raise ConnectionError("no network")
        return SimpleNamespace(sha=found.commit)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    return found


def test_a_data_set_of_the_hub_is_read_at_the_commit_that_is_recorded(hub):
    loaded = load_examples(deepmath(DEEPMATH_NAME, split="train", revision="main"))
    assert hub.asked == [(DEEPMATH_NAME, None, "train", "a" * 40)]
    assert loaded == Loaded(deepmath_examples("DeepMath-103K"), "a" * 40, 0)


def test_a_configuration_of_a_data_set_can_be_chosen(hub):
    load_examples(deepmath(DEEPMATH_NAME, config="main", split="test"))
    assert hub.asked == [(DEEPMATH_NAME, "main", "test", "a" * 40)]


def test_a_missing_configuration_is_named_with_those_there_are(tmp_path, monkeypatch):
    """By the library itself, from a folder whose card has two."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    for name in ("main", "socratic"):
        write_rows(folder / f"{name}.jsonl", [{**ROW, "prompt": name}])
    files = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("main", "socratic"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    source = str(folder)
    assert [e.prompt for e in load_examples(Data(source=source, config="socratic")).examples] == ["socratic"]
    with pytest.raises(UserError, match=r"set data\.config to one of \['main', 'socratic'\]$"):
        load_examples(Data(source=source))
    with pytest.raises(UserError, match=r"\['main', 'socratic'\]; check data\.source, data\.config, data\.split and"):
        load_examples(Data(source=source, config="mian"))


def test_another_solution_column_can_be_chosen(hub):
    loaded = load_examples(deepmath(DEEPMATH_NAME, response="r1_solution_3"))
    assert [example.response for example in loaded.examples] == ["II", "IV"]


def test_without_a_network_the_copy_on_this_machine_serves(hub):
    hub.commit = None
    loaded = load_examples(deepmath(DEEPMATH_NAME))
    assert hub.asked == [(DEEPMATH_NAME, None, "train", None)]
    assert loaded == Loaded(deepmath_examples("DeepMath-103K"), None, 0)


@pytest.mark.parametrize("layout", ["data/train-00000-of-00001.parquet", "train.jsonl"])
def test_a_folder_is_a_data_set_too(tmp_path, layout, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "deepmath" / layout
    file.parent.mkdir(parents=True)
    rows = [dict(zip(DEEPMATH, values, strict=True)) for values in zip(*DEEPMATH.values(), strict=True)]
    write_rows(file, rows)
    assert load_examples(deepmath(tmp_path / "deepmath")) == Loaded(deepmath_examples("deepmath"), None, 0)
    with pytest.raises(UserError, match=r'Unknown split "test".*; check data.source, data.config, data.split and'):
        load_examples(deepmath(tmp_path / "deepmath", split="test"))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_file_is_a_source_with_its_columns_named(tmp_path, suffix):
    rows = [dict(zip(DEEPMATH, values, strict=True)) for values in zip(*DEEPMATH.values(), strict=True)]
    path = write_rows(tmp_path / f"d{suffix}", rows)
    assert load_examples(deepmath(path)) == Loaded(deepmath_examples("d"), None, 0)
    with pytest.raises(UserError, match=r"no column 'solution' \(did you mean 'r1_solution_\d'\?\); it has: "):
        load_examples(deepmath(path, response="solution"))


@pytest.mark.parametrize("kind", ["Hub", "folder"])
def test_a_column_a_data_set_lacks_is_named_with_the_nearest(tmp_path, hub, kind):
    source = DEEPMATH_NAME if kind == "Hub" else tmp_path
    message = r"no column 'answer' \(did you mean 'final_answer'\?\); it has: question, final_answer, "
    with pytest.raises(UserError, match=message):
        load_examples(deepmath(source, answer="answer"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            DatasetNotFoundError("Dataset 'x' doesn't exist on the Hub."),
            "on the Hub; check data.source, data.config, data.split and",
        ),
        (DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub."), "log in with `hf auth login`"),
        (ConnectionError("Couldn't reach 'x' on the Hub"), "give its folder or a .parquet file as data.source"),
        (ValueError("Bad split: test. Available splits: ['train']\nmore"), r"\['train'\]; check data.source"),
    ],
)
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(hub, error, message):
    hub.error = error
    with pytest.raises(UserError, match=f"^{DEEPMATH_NAME}: cannot load this data set: .*{message}") as raised:
        load_examples(deepmath(DEEPMATH_NAME))
    assert "\n" not in str(raised.value)


def test_a_missing_datasets_package_is_named(monkeypatch, hub):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the datasets package; pip install 'gift-suite\[hub\]'"):
        load_examples(deepmath(DEEPMATH_NAME))


def test_sources_that_are_not_there(tmp_path):
    for source, message in [("absent", "no such data folder"), ("a.parquet", "no such data file")]:
        with pytest.raises(UserError, match=f"{source}: {message}"):
            load_examples(deepmath(tmp_path / source))
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"table\.csv: unknown kind of data file"):
        load_examples(deepmath(tmp_path / "table.csv"))


@pytest.mark.parametrize(("rows", "bad", "refused"), [(200, 2, False), (200, 3, True)])
def test_a_few_unusable_rows_of_a_data_set_are_left_out_and_counted(hub, rows, bad, refused):
    columns = {"question": [f"{n}?" for n in range(rows)], "final_answer": ["1"] * rows, "r1_solution_1": ["x"] * rows}
    for row, (column, value) in enumerate([("final_answer", ""), ("question", None), ("r1_solution_1", " ")][:bad]):
        columns[column][10 * row] = value
    hub.table = datasets.Dataset.from_dict(columns)
    if refused:
        message = f"^{DEEPMATH_NAME}:1: column 'final_answer' is not text: '' \\(and 2 more of 200 rows are of no use"
        with pytest.raises(UserError, match=message):
            load_examples(deepmath(DEEPMATH_NAME))
    else:
        loaded = load_examples(deepmath(DEEPMATH_NAME))
        assert loaded.unusable == bad
        assert [e.id for e in loaded.examples] == [f"DeepMath-103K-{n + 1}" for n in range(rows) if n not in (0, 10)]


# ---------------------------------------------------------------------------------------------------------------------
# Conversations


def message(role, content) -> dict[str, str]:
    return {"role": role, "content": content}


DIALOGUE = [message("system", "Be brief."), message("user", "1?"), message("assistant", "1."), message("user", "2?")]
TURNS = tuple((turn["role"], turn["content"]) for turn in DIALOGUE)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", "Hub"])
def test_the_last_message_is_the_response_and_those_before_it_the_prompt(tmp_path, hub, suffix):
    rows = [
        {"chat": [message("user", "1 + 1?"), message("assistant", "It is 2.")], "answer": "2"},
        {"chat": [*DIALOGUE, message("assistant", "2.")], "answer": "2"},
    ]
    if suffix == "Hub":
        hub.table = datasets.Dataset.from_list(rows)
        source = "some/d"
    else:
        source = str(write_rows(tmp_path / f"d{suffix}", rows))
    single, several = load_examples(Data(source=source, messages="chat")).examples
    assert single == Example("d-1", "1 + 1?", "It is 2.", "2")  # as if it came from a prompt and a response column
    text = "system: Be brief.\n\nuser: 1?\n\nassistant: 1.\n\nuser: 2?"
    assert several == Example("d-2", text, "2.", "2", TURNS)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("hello", " is not a list of messages: 'hello'"),
        ([], ": its last two messages must be the user's and then the assistant's"),
        ([message("assistant", "2")], ": its last two messages must be the user's and then the assistant's"),
        ([message("assistant", "2"), message("user", "1")], ": its last two messages must be"),
        ([message("system", "2"), message("assistant", "1")], ": its last two messages must be"),
        ([{"from": "human", "value": "2"}], ": message 1 is not an object with role and content: {'from'"),
        ([message("user", "1"), "2"], ": message 2 is not an object with role and content: '2'"),
        ([message("human", "1")], ": message 1: the role 'human' is not one of system, user, assistant"),
        ([message("user", ["1"])], ": message 1: its content is not text: ['1']"),
        ([message("user", "1"), message("assistant", "\ud83d")], ": message 2: its content has half of a surrogate"),
    ],
)
def test_malformed_messages_name_file_row_and_problem(tmp_path, value, problem):
    good = [message("user", "1"), message("assistant", "2")]
    rows = [{"chat": good, "answer": "2"}, {"chat": value, "answer": "2"}]
    path = write_rows(tmp_path / "d.jsonl", rows)
    with pytest.raises(UserError) as error:
        load_examples(Data(source=str(path), messages="chat"))
    assert str(error.value).startswith(f"{path}:2: column 'chat'{problem}")
    assert "\n" not in str(error.value)


def test_conversations_survive_a_round_trip(tmp_path):
    wanted = [Example("a", "text", "r", "1", TURNS), Example("b", "text", "r", "1")]
    write_examples(tmp_path / "d.jsonl", wanted)
    assert read_examples(tmp_path / "d.jsonl") == wanted


def test_fingerprints_tell_conversations_apart_and_leave_bare_prompts_as_they_were():
    bare, turned = Example("a", "p", "r", "1"), Example("a", "p", "r", "1", TURNS)
    other = dataclasses.replace(turned, turns=(("system", "Be long."), *TURNS[1:]))
    assert fingerprint([bare]) == sha256_json([{"id": "a", "prompt": "p", "response": "r", "answer": "1"}])
    assert len({fingerprint([example]) for example in (bare, turned, other)}) == 3


def test_conversations_with_the_same_last_turn_are_different_problems(tmp_path):
    chats = [[message("system", system), message("user", "2?"), message("assistant", "2.")] for system in "abb"]
    path = write_rows(tmp_path / "d.jsonl", [{"chat": chat, "answer": "2"} for chat in chats])
    loaded = load_examples(Data(source=str(path), messages="chat")).examples
    assert {example.id for example in split(loaded, {"sft": 2}, 0)["sft"]} == {"d-1", "d-2"}
    with pytest.raises(UserError, match="the data has 2 distinct prompts"):
        split(loaded, {"sft": 3}, 0)


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


CHATML = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def chat(tokenizer):
    """Sets the tokenizer's chat template, for one test."""
    before = tokenizer.chat_template
    yield lambda template: setattr(tokenizer, "chat_template", template)
    tokenizer.chat_template = before


def test_a_conversation_goes_through_the_chat_template_whole(tokenizer, chat):
    example = Example("e", "not this text", "r", "1", TURNS)
    chat(CHATML)
    expected = tokenizer.apply_chat_template(DIALOGUE, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(tokenizer, example) == expected
    assert encode_prompt(tokenizer, Example("e", "hello", "r", "1")) == encode_prompt(tokenizer, "hello")
    chat(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% endfor %}"
    )
    with pytest.raises(UserError, match=r"^e: the chat template refuses this prompt: no system role"):
        encode_prompt(tokenizer, example)
    chat(None)
    with pytest.raises(UserError, match=r"^e: a conversation, but the tokenizer has no chat template; set"):
        encode_prompt(tokenizer, example)


def test_templates_that_print_todays_date_print_the_same_one_every_day(tokenizer, chat):
    # As in Llama 3.2's: the clock is asked only where no date is given.
    chat(
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }}"
    )
    assert tokenizer.decode(encode_prompt(tokenizer, "hello")) == "26 Jul 2024"


TEXTS = ["What is 3 + 4?", " é\n\n  π ", "<|end|> 12*7", "7", "a" * 300]


@pytest.mark.parametrize("template", [CHATML, None])
@pytest.mark.parametrize("max_length", [9, 40, 1000])
def test_many_examples_are_encoded_as_each_alone(tokenizer, chat, template, max_length, monkeypatch):
    monkeypatch.setattr("gift.data.CHUNK", 7)
    monkeypatch.setattr("gift.data.DROPPED", 1.0)
    chat(template)
    pool = [Example(f"{p}-{r}", TEXTS[p], TEXTS[r], "1") for p, r in itertools.product(range(5), repeat=2)]
    found, taken = encode_all(tokenizer, pool, max_length)
    whole = {}
    for example in pool:  # by the tokenizer alone
        text = example.prompt if template is None else f"<|user|>{example.prompt}<|assistant|>"
        prompt = tokenizer(text)["input_ids"]
        response = tokenizer(example.response, add_special_tokens=False)["input_ids"]
        whole[example.id] = (prompt, [*prompt, *response, tokenizer.eos_token_id])
    kept = [example for example in pool if len(whole[example.id][0]) < max_length]
    assert [(e.id, list(e.ids), e.prompt_length) for e in found] == [
        (e.id, whole[e.id][1][:max_length], len(whole[e.id][0])) for e in kept
    ]
    assert found == [encode(tokenizer, example, max_length) for example in kept]
    excess = [len(whole[e.id][1]) - max_length for e in kept]
    lost = [tokens for tokens in excess if tokens > 0]
    assert taken == Truncation(max_length, len(pool), len(lost), sum(lost), len(pool) - len(kept))


def test_a_cut_response_does_not_end(tokenizer):
    example = Example("e", "2?", "a long response", "7")
    whole = encode(tokenizer, example, 1000)
    (cut,), taken = encode_all(tokenizer, [example], len(whole.ids) - 1)
    assert whole.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in cut.ids
    assert (taken.cut, taken.tokens_lost) == (1, 1)
    assert str(taken) == (
        f"1 of 1 examples cut at {len(cut.ids)} tokens (1 tokens lost), 0 left out for their long prompts"
    )


@pytest.mark.parametrize(("long", "refused"), [(2, False), (3, True)])
def test_a_few_long_prompts_are_left_out(tokenizer, long, refused):
    pool = [Example(f"e{n}", "2 + " * (60 if n < long else 1), "2", "2") for n in range(20)]
    if refused:
        with pytest.raises(
            UserError, match=r"^data.max_length: 3 of 20 prompts have 40 tokens or more.*; raise it, or "
        ):
            encode_all(tokenizer, pool, 40)
    else:
        found, taken = encode_all(tokenizer, pool, 40)
        assert [example.id for example in found] == [f"e{n}" for n in range(2, 20)]
        assert taken.dropped == 2


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
