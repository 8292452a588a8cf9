"""Verdicts of the mode 'strict' on written-out cases; what holds for every integer and fraction."""

import itertools
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from math_grading import boxed, grade

from gift import math_strict
from gift.math_strict import canonical, clean, find_answer, plain_number
from gift.rewards import Verdict, grade_math

# ---------------------------------------------------------------------------------------------------------------------
# Finding the answer


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{18}.", "18"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{[0, 1)} \cup \}", "[0, 1)"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{3}, no: \boxed{4", "3"),
        (r"{ \boxed{3}", "3"),
        (r"} \boxed{3}", "3"),
        (r"\boxed{185\}", "185\\"),
        (r"\boxed{3} \boxed{185\}", "3"),
        (r"\\boxed{004}", "004"),
        (r"\boxed{}", ""),
        (r"\boxed{4", None),
        (r"\fbox{4} \boxed 4", None),
        ("", None),
    ],
)
def test_the_last_complete_box_is_the_answer(text, content):
    assert find_answer(text) == (("", None) if content is None else (content, "boxed"))


@pytest.mark.parametrize(
    ("response", "extracted", "where"),
    [
        ("5 + 13 = 18\n#### 18", "18", "stated"),
        ("So the answer is 18. I hope it is correct.", "18", "stated"),
        ("The answer is 3.5, as asked", "3.5, as asked", "stated"),
        ("**Answer:** 18", "18", "stated"),
        ("**Final Answer**: $18$", "$18$", "stated"),
        ("Final Answer:\n\\[ 18 \\]", "18", "stated"),
        ("Answer: 3. No, the answer is 4.", "4", "stated"),
        ("The answer is 3, I think, \\boxed{4}", "4", "boxed"),
        ("\\boxed{4}, so the answer is 3", "4", "boxed"),
        (r"$\boxed{k = 45} \quad \text{and} \quad \boxed{n = 2}$", "k = 45, n = 2", "boxed"),
        (r"\boxed{1} pen, and it is \boxed{2}", "2", "boxed"),
        (r"\boxed{5}, \boxed{5}", "5", "boxed"),
        (r"first \boxed{3}. Then \boxed{4}", "4", "boxed"),
        (r"<think>\boxed{3}</think> The answer is 4.", "4", "stated"),
        (r"<think>\boxed{3}</think> So that is it.", "3", "boxed"),
        (r"<think>The answer is 4.</think>\boxed{3}", "3", "boxed"),
    ],
)
def test_where_the_answer_stands(response, extracted, where):
    verdict = grade(response, "7")
    assert verdict.extracted == extracted
    assert verdict.method.startswith(where + ":")


@pytest.mark.parametrize(
    "response",
    [
        "",
        "   \n",
        "We compute 12 + 7 = 19, then we need to",
        "12 + 7 = 19",
        "19",
        "The answer to this question follows from 12 + 7 = 19",
        "The answer is",
        r"so we get \boxed{19",
        r"\boxed{}",
        r"\boxed{$ $}",
        "##### 19",
        "nineteen",
    ],
)
def test_a_response_that_states_no_answer_has_none(response):
    assert grade(response, "19") == Verdict(0.0, "no_answer", None, None)


@pytest.mark.parametrize(
    "response",
    [
        "#### 19. Add the numbers\nWe compute",
        "the answer is obtained by adding 12 and 7, which makes 19 in all",
        "the answer is not 19",
        r"\boxed{19} or \boxed{20}",
        r"\boxed{18, 19}",
    ],
)
def test_an_answer_that_only_mentions_the_gold_is_wrong(response):
    assert grade(response, "19").status == "wrong"


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "\\{", "\\}", "x", " "]), max_size=12).map("".join))
def test_boxes_agree_with_counting_from_each_box(text):
    def content(start: int, escapes: bool) -> str | None:
        depth = 1
        for index in range(start, len(text)):
            if text[index] in "{}" and not (escapes and text[index - 1] == "\\"):
                depth += 1 if text[index] == "{" else -1
            if depth == 0:
                return text[start:index].strip()
        return None

    starts = [index + 7 for index in range(len(text)) if text.startswith("\\boxed{", index)]
    for escapes in True, False:
        complete = [found for start in starts if (found := content(start, escapes)) is not None]
        if complete:
            break
    assert find_answer(text) == ((complete[-1], "boxed") if complete else ("", None))


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


@pytest.mark.parametrize(
    ("answer", "gold", "how"),
    [
        ("18", "18", "string"),
        ("$18$.", "18", "string"),
        (r"\text{Evelyn}", "Evelyn", "string"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\dfrac{\pi}{2})", "string"),
        ("073", "73", "number"),
        ("+5", "5", "number"),
        ("\u22125", "-5", "string"),
        ("5.0", "5", "number"),
        (".5", r"\frac{1}{2}", "number"),
        ("1/2", r"\dfrac12", "number"),
        ("2/4", "0.5", "number"),
        (r"7\frac{3}{4}", "7.75", "number"),
        ("7 3/4", "31/4", "number"),
        ("1,000", "1000", "number"),
        ("1{,}000", "1000", "number"),
        (r"\$15,\!000", "15000", "number"),
        (r"12\,000", "12,000", "number"),
        ("5 million", "5000000", "number"),
        ("1,000", r"\boxed{1000}", "number"),
        ("0.083333333333", r"\frac{1}{12}", "math_verify"),
        (r"2\sqrt{3}", r"\sqrt{12}", "math_verify"),
        ("sqrt(3) - 1", r"-1 + \sqrt{3}", "math_verify"),
        ("x = 5", "5", "math_verify"),
        (r"10\text{ cm}", "10", "math_verify"),
        ("x^2 + 2x + 1", "(x+1)^2", "math_verify"),
        (r"\begin{pmatrix} \frac{3}{5} \\ 1 \end{pmatrix}", r"\begin{pmatrix}3/5\\1\end{pmatrix}", "math_verify"),
        (r"\text{(C)}", "C", "string"),
        (r"\textbf{(019)}", "19", "number"),
        ("185\\", "185", "string"),
        (r"28\%", "28", "math_verify"),
        ("0.333333", "1/3", "math_verify"),
        ("The roots are at $x = 5$.", "5", "math_verify"),
    ],
)
def test_right_answers(answer, gold, how):
    verdict = grade(boxed(answer), gold)
    assert verdict == Verdict(1.0, "correct", answer, f"boxed:{how}")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("5000", "50"),
        ("0.5", "50"),
        ("120006", "120000"),
        ("5.001", "5"),
        ("34", "3 4"),
        (r"5\text{ million}", "5"),
        ("0.33", "1/3"),
        ("1/0", "1"),
        ("-18", "18"),
        ("18a", "18"),
        (r"\sqrt{2}", r"\sqrt{3}"),
        ("(1, 2)", "[1, 2]"),
        ("x + 1", "x - 1"),
        (r"1, 3, 5, \ldots, 2n-1", "2"),
        (r"all even integers $n$", r"all odd integers $n$"),
        (r"\frac{1}{2006!}", r"\frac{1}{2004!}"),
        (r"(\frac{1}{2006!}, 1)", r"(\frac{1}{2004!}, 1)"),
        ("0.0000003", r"\frac{1}{7000000}"),
        (r"0.5\%", "50"),
        ("½", "1/3"),
        ("٣", "4"),
        ("\ud800", "4"),
    ],
)
def test_wrong_answers(answer, gold):
    verdict = grade(boxed(answer), gold)
    assert (verdict.score, verdict.status) == (0.0, "wrong")


INTEGERS = st.integers(-(10**40), 10**40)


@given(INTEGERS, st.sampled_from(["{}", "{:,}", "+{}", "0{}", "{}.", "{}.0", "${:,}$", r"\text{{{}}}", " {} "]))
def test_an_integer_however_written_equals_itself_and_not_its_successor(n, form):
    written = form.format(n)
    if n < 0:
        written = written.replace("+-", "-").replace("0-", "-0", 1)
    golds = [str(n), f"{n:,}", str(n + 1), f"{n + 1:,}"]
    verdicts = grade_math([f"so it is {boxed(written)}"] * 4, golds)
    assert [verdict.status for verdict in verdicts] == ["correct", "correct", "wrong", "wrong"]
    assert "boxed:math_verify" not in {verdict.method for verdict in verdicts}


@given(
    st.integers(-999, 999), st.integers(1, 999), st.sampled_from(["{}/{}", r"\frac{{{}}}{{{}}}", r"\dfrac{{{}}}{{{}}}"])
)
def test_plain_number_reads_fractions(a, b, form):
    assert plain_number(canonical(form.format(a, b))) == (Fraction(a, b), False)


@given(st.decimals(-(10**9), 10**9, places=4))
def test_plain_number_reads_decimals(value):
    assert plain_number(f"{value:,f}") == (Fraction(value), True)


@given(
    st.lists(INTEGERS, min_size=2, max_size=2, unique=True),
    st.sampled_from(["{}", "{:,}", "{}.0", "$ {} $", "+ {}", r"{}\text{{ cm}}", r"{}\%", "x = {}", r"\text{{({})}}"]),
)
def test_no_other_integer_is_accepted_for_an_integer_in_whatever_words(numbers, form):
    given_number, gold = numbers
    answer = form.format(given_number)
    # Units and words leave it to math-verify: the test below asks that for some.
    assert math_strict.settle(clean(answer), str(gold)) in (None, ("wrong", "number"))


def test_no_near_integer_is_accepted_in_whatever_words():
    forms = [r"{}\text{{ cm}}", r"{}\%", "x = {}", r"\frac{{{}}}{{1}}", r"\boxed{{{}}} pencils", "{}^1", "({}, 0)"]
    pairs = [(form.format(n + step), str(n)) for form in forms for n in (0, 7, 90071992) for step in (1, -1, 10**9)]
    verdicts = grade_math([boxed(answer) for answer, _ in pairs], [gold for _, gold in pairs])
    assert {verdict.status for verdict in verdicts} == {"wrong"}


def test_of_several_numbers_none_is_the_answer():
    several = [
        r"8 \text{ feet } 18 \text{ inches}",
        r"18 \text{ hours } 30 \text{ minutes}",
        r"7 \text{ boys, } 18 \text{ girls}",
        "18 or 19",
    ]
    single = [
        r"18 \text{ cm}^2",
        r"\text{Ann has 18 dollars}",
        r"3 \text{ pm} = 18 \text{ units}",
        r"18.0 \text{ m}",
    ]
    assert {verdict.status for verdict in grade_math([boxed(answer) for answer in several], ["18"] * 4)} == {"wrong"}
    assert {verdict.status for verdict in grade_math([boxed(answer) for answer in single], ["18"] * 4)} == {"correct"}


FRACTION_FORMS = [
    r"\frac{{{}}}{{{}}}",
    r"\dfrac{{{}}}{{{}}}",
    r"\tfrac {{{}}} {{{}}}",
    r"$\frac{{ {} }}{{ {} }}$",
    "{}/{}",
]


@given(st.integers(1, 999), st.integers(1, 999), st.sampled_from(FRACTION_FORMS), st.sampled_from(FRACTION_FORMS))
def test_how_a_fraction_is_set_plays_no_part(a, b, written, gold):
    verdicts = grade_math([boxed(written.format(a, b))] * 2, [gold.format(a, b), gold.format(a + 1, b)])
    assert [verdict.status for verdict in verdicts] == ["correct", "wrong"]


@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=4), st.lists(st.sampled_from(["", " ", r"\,", r"\!", "  "]))
)
def test_spacing_plays_no_part(numbers, gaps):
    plain = "(" + ",".join(map(str, numbers)) + ")"
    spaced = "".join(mark + gap for mark, gap in itertools.zip_longest(re.findall(r"\d+|.", plain), gaps, fillvalue=""))
    assert canonical(clean(spaced)) == canonical(clean(plain))


def test_equality_goes_both_ways():
    pairs = [
        (r"2\sqrt{3}", r"\sqrt{12}"),
        ("x^2 + 2x + 1", "(x+1)^2"),
        (r"x \in [-2, 7)", "[-2,7)"),
        (r"\{1, 2\}", "2, 1"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2/2 \\ 2 \end{pmatrix}"),
        ("0.333333", "1/3"),
        (r"\sqrt{2}", r"\sqrt{3}"),
        (r"\frac{1}{8!}", r"\frac{1}{9!}"),
        ("(1, 2)", "[1, 2]"),
        (r"\text{odd}", r"\text{even}"),
    ]
    both = [*pairs, *((gold, answer) for answer, gold in pairs)]
    statuses = [v.status for v in grade_math([boxed(answer) for answer, _ in both], [gold for _, gold in both])]
    assert statuses == 2 * (6 * ["correct"] + 4 * ["wrong"])


def test_a_gold_answer_without_content_is_an_error():
    for mode in "strict", "paper":
        verdict = grade(boxed("5"), " $ $ ", mode=mode)
        assert (verdict.status, verdict.score, verdict.note) == ("error", 0.0, "there is no gold answer")


def test_lists_of_different_lengths_and_bad_limits_are_refused():
    with pytest.raises(ValueError, match="2 responses but 1 gold"):
        grade_math(["1", "2"], ["1"])
    with pytest.raises(ValueError, match="positive"):
        grade_math([], [], timeout_s=0)
    with pytest.raises(ValueError, match="positive"):
        grade_math([], [], workers=0)
    with pytest.raises(ValueError, match="unknown mode loose; known: strict, paper"):
        grade_math([], [], mode="loose")
    assert grade_math([], []) == []


@pytest.mark.parametrize("unit", ["dollars", "miles per hour", "months", "apples each week"])
@pytest.mark.parametrize("form", ["\\boxed{{{}}}", "\\boxed{{\\text{{{}}}}}", "The answer is {}.", "#### {}"])
def test_a_unit_after_a_number_does_not_count(form, unit):
    right, wrong = (grade_math([form.format(f"{number} {unit}")], ["18"])[0] for number in ("18", "19"))
    assert (right.status, wrong.status) == ("correct", "wrong")


@pytest.mark.parametrize("word", ["dozen", "hundred", "fourths", "pairs", "squared", "percent off"])
def test_a_word_that_makes_another_number_of_it_is_no_unit(word):
    assert grade_math([f"The answer is 18 {word}."], ["18"])[0].status == "wrong"
