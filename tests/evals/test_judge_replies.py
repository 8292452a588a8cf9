"""The rating that a judge's reply settles on: phrasings, fschat's own regexes, and replies that mean harm."""

from __future__ import annotations

import ast
import re
import time

import fschat_source
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.judge import find_rating


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Rating: [[5]]", 5),
        ("Rating: [[8.5]]", 8.5),
        ("[[10]]", 10),
        ("[[1]]", 1),
        ("[[ 8 ]]", 8),
        ("[[8/10]]", 8),
        ("[[8]]/10", 8),
        ("[[8]] out of 10", 8),
        ("[[8]] out of [[10]]", 8),
        ("[[8]]/[[10]]", 8),
        ("[[7 out of 10]]", 7),
        ("[[Rating: 9]]", 9),
        ("[[rating 9]]", 9),
        ("[[**8**]]", 8),
        ("**[[8]]**", 8),
        ("[ [8] ]", 8),
        ("[[8.]]", 8),
        ("Between [[3]] and [[5]], I settle on [[4]].", 4),
        ("For example [[5]].\nRating: [[2]]\n", 2),
        ("Rating: 3. On second thought: [[6]] as x[7] shows", 6),
        ("**Rating: 9**", 9),
        ("**Rating:** 9", 9),
        ("**Rating**: 9/10", 9),
        ("Rating: 9 out of 10.", 9),
        ("Rating: [8]", 8),
        ("Final rating = 7.", 7),
        ("rating: `6`", 6),
        ("First rating: 3\nFinal rating: 4", 4),
        ("All in all,\n[8]", 8),
        ("All in all [8]\n\n", 8),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[85]]", None),
        ("[[0.5]]", None),
        ("[[10.5]]", None),
        ("[[-3]]", None),
        ("[[4/5]]", None),
        ("[[4]]/5", None),
        ("[[4]]/[[5]]", None),
        ("[[7]], or rather [[12]]", None),
        ("[[eight]]", None),
        ("[[rating]]", None),
        ("[[A]]", None),
        ("[[8,9]]", None),
        ("Rating: 85", None),
        ("Rating: 80%", None),
        ("Rating: 7-8", None),
        ("Rating: 7 - 8", None),
        ("Rating: 1 to 10", None),
        ("Rating: 4/5", None),
        ("Rating: 4 out of 5", None),
        ("Rating: ten", None),
        ("The answer x[8] is right", None),
        ("See [8](http://a)", None),
        ("Step [3] is wrong.\nSo it is bad.", None),
        ("8", None),
        ("I give it an 8", None),
        ("$ERROR$", None),
        ("", None),
        ("[[٨]]", None),
    ],
)
def test_ratings(reply, rating):
    found = find_rating(reply)
    assert (found[0] if found else None) == rating
    assert found is None or found[1] in reply


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_one_well_formed_rating_reads_as_in_fschat():
    first, second = (re.compile(fschat_source.constant(f"one_score_pattern{tail}")) for tail in ("", "_backup"))
    numbers = [str(tenths / 10).removesuffix(".0") for tenths in range(10, 101)]
    for number in numbers:
        for form in ("Fine.\n\nRating: [[{}]]", "[[{}]] it is, since a is 3", "Rating: [{}]", "Good.\n[{}]"):
            reply = form.format(number)
            theirs = (first.search(reply) or second.search(reply))[1]
            assert find_rating(reply)[0] == float(ast.literal_eval(theirs))


@given(st.text(), st.text(), st.integers(10, 100))
def test_the_last_rating_counts_whatever_stands_around_it(before, after, tenths):
    after = re.sub(r"[\[\]/]|out of", "", after)
    assert find_rating(f"{before} [[{tenths / 10}]]. {after}")[0] == tenths / 10


@given(st.text(alphabet="[]*_` /.:=ratingRo utf0189-%\n", max_size=60))
def test_no_reply_reads_as_a_rating_out_of_range(reply):
    found = find_rating(reply)
    assert found is None or (1 <= found[0] <= 10 and re.search("[0-9]", found[1]))


@pytest.mark.parametrize("unit", ["[[", "[ ", "[[8", "rating:", "rating ", "rating: 1", "*", "[[ rating : ", "\n["])
def test_hostile_replies_are_read_in_no_time(unit):
    started = time.process_time()
    find_rating(unit * (1_000_000 // len(unit)))
    assert time.process_time() - started < 5
