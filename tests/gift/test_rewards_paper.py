"""Mode 'paper': each rule of the cascade on a written-out case, and each of its leniencies."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from math_grading import boxed, grade, need

from gift.math_paper import FALSE, TRUE, equality, last_box, normalize
from gift.rewards import grade_math, grade_math_modes


@pytest.mark.parametrize(
    ("response", "content"),
    [
        (r"so \boxed{18}.", "18"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{185\}", "185\\"),
        (r"\boxed{1}, then \boxed{2", None),
        (r"\boxed 5", None),
        (r"\boxed {5}", None),
        (r"\fbox{5}", None),
        ("", None),
    ],
)
def test_the_last_box_is_the_answer(response, content):
    assert last_box(response) == content


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("$5", "5"),
        ("12%", "12"),
        (r"12\%", "12"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"1 \text{ or } 2", "1,2"),
        ("1 and 2", "1,2"),
        (r"10\text{ cm}", "10"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"(\text{C})", "(C)"),
        (r"15\mbox{ cm}^2", "15"),
        (r"x \in [1, 2]", "[1,2]"),
        (r"\mathrm{east}", "east"),
        (r"90^{\circ}", "90"),
        (r"10,\!080", "10,080"),
        ("3 million", "3*10^6"),
        ("45 minutes", "45"),
        ("6 inches^2", "6"),
        ("Tuesday in 3 days", "Tuesdayin3days"),
        ("{7}", "7"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"\frac12", r"\frac{1}{2}"),
        ("7 3/4", "7+3/4"),
        (r"7\frac{3}{4}", r"7+\frac{3}{4}"),
        ("x - 1", "x-1"),
        ("5.0", "5"),
        ("2516_8", "25168"),
    ],
)
def test_what_normalizing_leaves(answer, form):
    assert normalize(answer) == form


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("EVEN", r"\text{even}"),
        ("1,000", "1000"),
        ("5000", "50"),
        ("0.5", "50"),
        ("120006", "120000"),
        ("[1, 2]", "1, 2"),
        ("Point(1, 2)", "(1, 2)"),
        ("Interval.open(0, 1)", "(0, 1)"),
        ("Matrix([[1, 2], [3, 4]])", r"\begin{pmatrix} 1 & 2 \\ 3 & 4.0001 \end{pmatrix}"),
        ("(1.00001, 200)", "(1, 2)"),
        ("x, 200", "x, 2"),
        ("1,2", "12"),
    ],
)
def test_what_strings_and_numbers_settle(answer, gold):
    assert equality(answer, gold) == TRUE


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("7", "8"), ("120013", "120000"), ("", "8"), ("9" * 400, "8" * 400)],
)
def test_what_they_refuse(answer, gold):
    assert equality(answer, gold) in (FALSE, (((answer, gold),),))


@pytest.mark.parametrize(("answer", "gold"), [("(1, 2)", "[1, 2]"), ("(1, 2]", "(1, 2)"), ("(1, 3)", "(1, 2)")])
def test_brackets_of_another_kind_and_other_elements_are_wrong(answer, gold):
    assert equality(answer, gold) != TRUE
    assert grade(boxed(answer), gold, mode="paper").status == "wrong"


@pytest.mark.parametrize(
    ("response", "gold", "method"),
    [
        (boxed("18"), "18", "boxed:string"),
        (boxed("1800"), "18", "boxed:number"),
        (boxed(r"\dfrac{2}{4}"), r"\frac{1}{2}", "response:math_verify"),
        (boxed(r"2\sqrt{3}"), r"\sqrt{12}", "response:math_verify"),
        (boxed("113.1"), r"36\pi", "boxed:openmath"),
        (boxed("sqrt(3) - 1"), r"-1 + \sqrt{3}", "response:math_verify"),
        (boxed("(3.14159, 200)"), r"(\pi, 2)", "boxed:openmath"),
        ("The final answer is $18$. I hope it is correct.", "18", "response:math_verify"),
        ("12 + 7 = 19, so we need to", "19", "response:math_verify"),
        ("The probability is 38/2.", "19", "response:math_verify"),
        (boxed("17") + " Final answer: the final answer is $18$.", "18", "response:math_verify"),
        (boxed("17") + " or rather " + boxed("18") + ".", "18", "boxed:string"),
        (boxed("[1, 2]"), "1, 2", "boxed:openmath"),
    ],
)
def test_right_answers(response, gold, method):
    verdict = grade(response, gold, mode="paper")
    assert (verdict.status, verdict.score, verdict.method) == ("correct", 1.0, method)


@pytest.mark.parametrize(
    ("response", "status"),
    [
        (boxed("17"), "wrong"),
        (boxed("17.1"), "wrong"),
        (boxed(r"\sqrt{19}"), "wrong"),
        ("It follows that 17.", "wrong"),
        ("I cannot say.", "no_answer"),
        ("", "no_answer"),
    ],
)
def test_wrong_answers(response, status):
    verdict = grade(response, "18", mode="paper")
    assert (verdict.status, verdict.score) == (status, 0.0)
    assert (verdict.method is None) == (status == "no_answer")


@given(st.integers(0, 10**12), st.integers(0, 10**12))
def test_boxed_integers_are_settled_in_process_by_the_percent_rule_and_the_tolerance(given_number, gold):
    """The oracle is the rule of OpenMathInstruct as the notes on the paper's code state it."""
    verdict = grade(f"So it is $\\boxed{{{given_number}}}$.", str(gold), mode="paper")
    accepted = any(math.isclose(given_number, gold * factor, rel_tol=1e-4) for factor in (0.01, 1, 100))
    assert verdict.status == ("correct" if accepted else "wrong")
    assert verdict.method in ("boxed:string", "boxed:number")


def test_the_short_cut_for_integers_says_what_math_verify_would(monkeypatch):
    values = ["5", "-5", "1,000", "1000", "007", "+12", "2,345", "10"]
    golds = ["5", "1000", "7", "12", "345", "2345", "1"]
    responses = [form.format(value) for value in values for form in (r"so $x = \boxed{{{}}}$.", r"\boxed{{{}}}\%")]
    pairs = [(response, gold) for response in responses for gold in golds]
    short = grade_math([response for response, _ in pairs], [gold for _, gold in pairs], mode="paper")
    monkeypatch.setattr("gift.math_paper._plainly_wrong", lambda *_: False)
    full = grade_math([response for response, _ in pairs], [gold for _, gold in pairs], mode="paper")
    assert [verdict.status for verdict in short] == [verdict.status for verdict in full]
    assert "boxed:math_verify" not in {verdict.method for verdict in short}
    assert "boxed:math_verify" in {verdict.method for verdict in full}


def test_wrong_values_that_the_percent_rule_accepts():
    """Results of intermediate steps of GSM8K's own solutions, as wrong answers: docs/grading.md has the figures."""
    responses, golds = [], []
    for row in need("gsm8k/test.jsonl"):
        steps, _, gold = row["answer"].replace(",", "").rpartition("#### ")
        values = dict.fromkeys(part.partition(">>")[0].rpartition("=")[2] for part in steps.split("<<")[1:])
        wrong = [value for value in values if value.replace(".", "", 1).isdigit() and float(value) != float(gold)]
        responses += map(boxed, wrong)
        golds += [gold] * len(wrong)
    graded = grade_math_modes(responses, golds)
    assert {verdicts["strict"].status for verdicts in graded} == {"wrong"}
    accepted = [index for index, verdicts in enumerate(graded) if verdicts["paper"].score]
    by_rule = [
        index
        for index, (response, gold) in enumerate(zip(responses, golds, strict=True))
        if any(math.isclose(float(response[7:-1]), float(gold) * factor, rel_tol=1e-4) for factor in (0.01, 1, 100))
    ]
    assert accepted == by_rule
    assert (len(responses), len(accepted)) == (2934, 12)
