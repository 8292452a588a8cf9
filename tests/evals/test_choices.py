import hashlib
import json
import math
import random
import time
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from evals.choices import LETTERS, find_choice, option_lines, shuffled
from evals.tasks.choice import LABELLED

CITIES = ("Paris", "London", "Rome", "Berlin")
ROWS = [json.loads(line) for line in Path(LABELLED).read_text(encoding="utf-8").splitlines()]

STATEMENTS = [
    "{}",
    "\\boxed{{{}}}",
    "The answer is {}",
    "The answer is {}.",
    "Answer: {}",
    "So the correct option is: {}",
    "Therefore, option {}.",
    "I choose {}.",
    "Let us see.\n\n{}",
    "Let us see.\n\nFinal answer:\n\n{}\n",
    "<answer>{}</answer>",
]
DECORATIONS = [
    "{}",
    "({})",
    "**{}**",
    "*{}*",
    "`{}`",
    "${}$",
    "\\({}\\)",
    "\\text{{{}}}",
    "\\textbf{{{}}}",
    "\\mathrm{{{}}}",
    "__{}__",
    "<b>{}</b>",
]


# ---------------------------------------------------------------------------------------------------------------------
# The labelled phrasings


def test_the_labelled_phrasings_are_many_distinct_and_sound():
    assert len({row["response"] for row in ROWS}) >= 150
    assert len({(row["response"], *row["options"]) for row in ROWS}) == len(ROWS)
    assert sum(row["expected"] is None for row in ROWS) >= 50
    assert sum(row["expected"] not in (None, row["gold"]) for row in ROWS) >= 20
    for row in ROWS:
        letters = LETTERS[: len(row["options"])]
        assert len(letters) >= 2
        assert row["gold"] in letters
        assert row["expected"] is None or row["expected"] in letters


@pytest.mark.parametrize("row", ROWS, ids=[str(number) for number in range(1, len(ROWS) + 1)])
def test_a_phrasing_commits_to_what_a_reader_takes_it_to(row):
    letter, method = find_choice(row["response"], row["options"])
    assert letter == row["expected"], method


@pytest.mark.parametrize(
    ("response", "method"),
    [
        ("\\boxed{B}", "boxed:letter"),
        ("\\boxed{London}", "boxed:text"),
        ("The answer is (B).", "stated:letter"),
        ("The answer is London.", "stated:text"),
        ("B", "line:letter"),
        ("London", "line:text"),
        ("\\boxed{A}, \\boxed{B}", "boxed:none"),
        ("The answer is B or C.", "stated:none"),
        ("The answer is E.", "stated:none"),
        ("A, C", "line:none"),
        ("I do not know.", None),
    ],
)
def test_the_method_says_where_and_how(response, method):
    assert find_choice(response, CITIES)[1] == method


# ---------------------------------------------------------------------------------------------------------------------
# Properties


@given(
    st.integers(2, 10).flatmap(lambda count: st.tuples(st.just(count), st.integers(0, count - 1))),
    st.lists(st.sampled_from(DECORATIONS), max_size=2, unique=True),
    st.sampled_from(STATEMENTS),
)
def test_decoration_never_changes_the_letter(chosen, decorations, statement):
    count, index = chosen
    words = LETTERS[index]
    for decoration in decorations:
        words = decoration.format(words)
    assert find_choice(statement.format(words), [f"the {n}th" for n in range(count)])[0] == LETTERS[index]


@given(st.integers(1, 9), st.integers(0, 8), st.sampled_from(DECORATIONS), st.sampled_from(STATEMENTS))
def test_a_letter_outside_the_range_is_never_accepted(count, beyond, decoration, statement):
    letter = LETTERS[min(count + beyond, 9)]
    response = statement.format(decoration.format(letter))
    assert find_choice(response, [f"the {n}th" for n in range(count)])[0] is None
    assert find_choice(f"\\boxed{{A}}\n\nWait. {response}", [f"the {n}th" for n in range(count)])[0] in (None, "A")


PIECES = st.sampled_from(
    ["answer", " is ", "the ", "A", "B", "E", "I", "option ", "(", ")", ".", ",", "\n", "{", "}", "\\boxed", "\\text",
     "$", "*", "</think>", "<answer>", "</answer>", "not ", "or ", "so ", ": ", "?", "Paris", "wait ", "\\", "_", " "]
)  # fmt: skip


@given(st.lists(PIECES | st.text(max_size=3), max_size=40).map("".join), st.integers(1, 4))
@example("\\boxed{" + "answer " * 4000 + "}", 4)
@example("\\boxed{" * 500 + "B" + "}" * 500, 4)
def test_any_text_has_a_letter_of_the_row_or_none(response, count):
    letter, method = find_choice(response, CITIES[:count])
    assert letter is None or letter in LETTERS[:count]
    assert (letter is None) <= (method is None or method.endswith(":none"))


OPTION = st.text(st.characters(codec="ascii", categories=["Ll", "Nd"]), min_size=2, max_size=12).map("the {}".format)


@given(st.lists(OPTION, min_size=2, max_size=10, unique=True), st.data())
def test_the_text_of_an_option_stands_for_its_letter(options, data):
    index = data.draw(st.integers(0, len(options) - 1))
    for form in ("\\boxed{{{}}}", "\\boxed{{\\text{{{}}}}}", "The answer is {}.", "Answer: **{}**", "{}"):
        assert find_choice(form.format(options[index]), options)[0] == LETTERS[index]


@given(st.sampled_from([row for row in ROWS if "think>" not in row["response"]]), st.sampled_from("ABCD"))
def test_reasoning_counts_only_where_nothing_after_it_commits(row, letter):
    response = f"<think>So the answer is \\boxed{{{letter}}}.</think>\n\n{row['response']}"
    after = find_choice(row["response"], row["options"])
    before = letter if letter in LETTERS[: len(row["options"])] else None
    assert find_choice(response, row["options"])[0] == (before if after == (None, None) else after[0])


# ---------------------------------------------------------------------------------------------------------------------
# Options that look alike


def test_a_text_that_two_options_share_decides_nothing():
    options = ["0.16 N", "0.16 N", "0.32 N", "0.36 N"]
    for response in ("\\boxed{0.16 N}", "The answer is 0.16 N.", "0.16 N"):
        assert find_choice(response, options) == (None, None)
    assert find_choice("\\boxed{0.16 N}. The answer is B.", options) == ("B", "stated:letter")


def test_case_tells_options_apart_that_differ_in_nothing_else():
    options = ["BB", "Bb", "bb"]
    assert [find_choice(f"\\boxed{{{text}}}", options)[0] for text in [*options, "bB"]] == ["A", "B", "C", None]


def test_too_many_options_are_refused():
    with pytest.raises(ValueError, match="11 options; a question has 1 to 10"):
        find_choice("A", ["x"] * 11)


@pytest.mark.parametrize(
    "piece",
    ["the answer is ", "\\boxed{", "\\boxed{A ", "<answer>", "{", "*", "A, ", "option A is the ", "that is, option ",
     "\\boxed{A}, ", "Paris\n", "the answer is A, ", "Answer: x y z. ", 'the answer is "', "\\text{", "_ "],
)  # fmt: skip
def test_a_response_that_repeats_itself_takes_no_longer(piece):
    start = time.process_time()
    find_choice(piece * (30_000 // len(piece)), CITIES)
    assert time.process_time() - start < 10  # a quadratic search would need minutes


# ---------------------------------------------------------------------------------------------------------------------
# Order


def test_options_are_lettered_in_their_order():
    assert option_lines(CITIES) == "A) Paris\nB) London\nC) Rome\nD) Berlin"


@given(st.integers(0, 10), st.text())
def test_an_order_is_a_permutation_by_hash_alone(count, key):
    random.seed(0)
    order = shuffled(count, key)
    random.seed(1)
    assert order == shuffled(count, key)
    digests = [hashlib.sha256(key.encode() + b"\n" + str(index).encode()).hexdigest() for index in order]
    assert sorted(order) == list(range(count))
    assert digests == sorted(digests)


def test_every_order_is_equally_likely():
    keys = 4800
    counts = Counter(tuple(shuffled(4, f"rec{number}")) for number in range(keys))
    expected = keys / math.factorial(4)
    assert counts.keys() == set(permutations(range(4)))
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 49.7  # the 99.9% point with 23 degrees of freedom
