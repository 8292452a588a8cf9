import marshal
import math
import time
from collections import Counter
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.oracles import Expected, NotDataError, accepts, decode, tolerances
from evals.sandbox import Reply

pytest.importorskip("evalplus")

COLLIDING = [n * (2**61 - 1) for n in range(1, 1500)]

numbers = st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers()
hashable = st.recursive(
    numbers | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4).map(tuple) | st.frozensets(inner, max_size=4),
    max_leaves=10,
)
values = st.recursive(
    hashable,
    lambda inner: st.lists(inner) | st.sets(hashable) | st.dictionaries(hashable, inner, max_size=5),
    max_leaves=30,
)


def same(a: object, b: object) -> bool:
    """Equal in type and content all the way down, nan and -0.0 included."""
    return marshal.dumps(a, 2) == marshal.dumps(b, 2)


@given(values)
def test_decoding_undoes_encoding(value):
    decoded = decode(marshal.dumps(value, 2))
    assert type(decoded) is type(value)
    assert same(decoded, value)


@given(st.lists(numbers, min_size=90, max_size=400), st.sampled_from([list, tuple]))
def test_long_sequences_of_numbers_decode_too(members, kind):
    assert same(decode(marshal.dumps(kind(members), 2)), kind(members))


@given(st.text(alphabet=st.characters(codec=None)), st.integers(-(2**300), 2**300))
def test_any_text_and_any_integer(text, number):
    assert decode(marshal.dumps(text, 2)) == text
    assert decode(marshal.dumps(number, 2)) == number


@given(st.binary(max_size=60) | values.map(lambda value: marshal.dumps(value, 2)[:-1]))
@settings(max_examples=200)
def test_bytes_that_are_no_value_are_refused(data):
    try:
        value = decode(data)
    except NotDataError:
        return
    marshal.dumps(value, 2)  # whatever was decoded is plain data


@pytest.mark.parametrize(
    "data",
    [marshal.dumps((lambda: 0).__code__), marshal.dumps(...), marshal.dumps(StopIteration), b"r\0\0\0\0", b"R\0\0\0\0",
     b"[\xff\xff\xff\x7f", b"[\xff\xff\xff\xff", b"<\1\0\0\0[\0\0\0\0", b"{[\0\0\0\0N0", b"{N",
     b"u\4\0\0\0\xff\xff\xff\xff",
     b"l\1\0\0\0\xff\xff", b"(\1\0\0\0" * 101 + b"N", b"NN", b""],
)  # fmt: skip
def test_code_objects_references_and_broken_lengths_are_refused(data):
    with pytest.raises(NotDataError):
        decode(data)


@pytest.mark.parametrize(
    "value",
    [set(COLLIDING), dict.fromkeys(COLLIDING), [{frozenset(COLLIDING)}]],
)
def test_members_that_were_chosen_to_collide_are_refused(value):
    with pytest.raises(NotDataError):
        decode(marshal.dumps(value, 2))


def test_a_long_integer_takes_linear_time():
    number = 3**2_000_000
    begin = time.process_time()
    assert decode(marshal.dumps(number, 2)) == number
    assert time.process_time() - begin < 3


# ---------------------------------------------------------------------------------------------------------------------
# The rules. What each case expects is what evalplus/eval/__init__.py does with these values.


def reply(value: object) -> Reply:
    return Reply("value", marshal.dumps(value, 2), 0.0)


def judge(output: object, wanted: object, *, dataset="mbpp", name="f", arguments=(), atol: float = 0.0) -> bool:
    return accepts(dataset, name, list(arguments), Expected.of(reply(wanted)), reply(output), atol)


@pytest.mark.parametrize(
    ("output", "wanted", "atol", "right"),
    [
        (1, 1, 0, True),
        (1, True, 0, True),
        (1.0, 1, 0, True),
        ([1.0, 2], [1, 2.0], 0, True),
        ((1, 2), [1, 2], 0, False),
        ([1, 2], (1, 2), 1e-4, False),
        ({1, 2}, {2, 1}, 0, True),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, 0, True),
        ({"a": 1}, {"a": 1, "b": 2}, 0, False),
        ("1", 1, 0, False),
        (None, 0, 0, False),
        (None, None, 0, True),
        (0.1 + 0.2, 0.3, 0, False),
        (0.1 + 0.2, 0.3, 1e-6, True),
        (0.301, 0.3, 1e-6, False),
        (0.30001, 0.3, 1e-4, True),
        ([0.1 + 0.2, 1.0], [0.3, 1.0], 1e-6, True),
        ([0.3], [0.3, 0.3], 1e-6, False),
        ([0.3, 0.3], [0.1 + 0.2], 1e-6, False),
        (3, 3.0000001, 1e-6, False),
        ("a", "b", 1e-6, False),
        ({"a": 0.1 + 0.2}, {"a": 0.3}, 1e-6, False),
        (math.inf, math.inf, 1e-6, True),
        (math.inf, 1e308, 1e-6, False),
        (math.nan, 1.0, 1e-6, False),
        (10**400, 10**400, 0, True),
        (10**400, 0.5, 1e-6, False),
        ([[1.0], [2.0, 3.0]], [[1.0], [2.0, 3.5]], 1e-6, False),
        (0.30000001 + 1j, 0.3 + 1j, 1e-6, True),
    ],
)  # fmt: skip
def test_equality_and_tolerance(output, wanted, atol, right):
    assert judge(output, wanted, atol=atol) is right


def test_special_cases():
    assert judge((5, 4), (4, 5), name="similar_elements")
    assert judge([5, 4, 4], (4, 5), name="similar_elements")
    assert judge({5, 4}, (4, 5), name="similar_elements")
    assert not judge((4,), (4, 5), name="similar_elements")
    assert not judge((4, 5, 6), (4, 5), name="similar_elements")
    assert not judge(None, (4, 5), name="similar_elements")
    assert not judge((5, 4), (4, 5), name="f")
    # Mbpp/581: by the slant height as the canonical program has it (33), or by the height.
    assert judge(33, 33, name="surface_Area", arguments=(3, 4))
    assert judge(35, 33, name="surface_Area", arguments=(3, 4))
    assert not judge(34, 33, name="surface_Area", arguments=(3, 4))
    # Mbpp/558: 123 and 56 as 123 and 056, or cut to the shorter.
    assert judge(1 + 3 + 3, 9, name="digit_distance_nums", arguments=(123, 56))
    assert not judge(8, 9, name="digit_distance_nums", arguments=(123, 56))
    # HumanEval/32: any root, and no other number even if the canonical program returns it.
    root = {"dataset": "humaneval", "name": "find_zero", "atol": 1e-4}
    assert judge(2.0, 1.0, arguments=([2, -3, 1],), **root)
    assert judge(1, 2.0, arguments=([2, -3, 1],), **root)
    assert not judge(1.5, 1.0, arguments=([2, -3, 1],), **root)
    assert not judge(1.5, 1.5, arguments=([2, -3, 1],), **root)
    assert not judge(math.nan, 1.0, arguments=([2, -3, 1],), **root)
    assert not judge("1", 1.0, arguments=([2, -3, 1],), **root)


@pytest.mark.parametrize(
    ("output", "found", "right"),
    [(True, True, True), (True, False, False), (False, False, True), (None, False, True), (None, True, False),
     ("Found a match!", True, True), ("Not matched!", False, False)],
)  # fmt: skip
def test_a_match_counts_by_whether_there_is_one(output, found, right):
    expected = Expected.of(Reply("other", b"", 0.0) if found else reply(None))
    assert accepts("mbpp", "check_str", ["x"], expected, reply(output), 0.0) is right
    assert accepts("mbpp", "check_str", ["x"], expected, Reply("other", b"", 0.0), 0.0) is found
    assert not accepts("mbpp", "check_str", ["x"], expected, Reply("raised", b"KeyError", 0.0), 0.0)


def test_what_is_no_data_equals_nothing():
    other = Reply("other", b"", 0.0)
    assert not accepts("mbpp", "f", [], Expected.of(other), other, 0.0)
    assert not accepts("mbpp", "f", [], Expected.of(reply(None)), other, 0.0)


def test_long_outputs_are_compared_as_short_ones_are():
    wanted = [float(n) for n in range(100_000)]
    assert Expected.of(reply(wanted)).payload() == marshal.dumps(wanted, 2)
    assert judge(wanted, wanted)
    assert judge(list(range(100_000)), wanted)
    assert not judge([*wanted[:-1], 0.0], wanted)
    digest = Reply("digest", b"\1" * 32, 0.0)
    assert accepts("mbpp", "f", [], Expected.of(digest), digest, 0.0)
    assert not accepts("mbpp", "f", [], Expected.of(digest), Reply("digest", b"\2" * 32, 0.0), 0.0)
    assert not accepts("mbpp", "f", [], Expected.of(digest), reply(b"\1" * 32), 0.0)
    assert not accepts("mbpp", "f", [], Expected.of(reply(b"\1" * 32)), digest, 0.0)


def test_the_tolerance_starts_with_the_first_output_of_floats():
    outputs = [1, [1, 2.0], [], [0.5, 1.5], 1, (0.5,), [[0.5]], "x"]
    expected = [Expected.of(reply(each)) for each in outputs]
    assert tolerances(expected, 0.0) == [0, 0, 0, 1e-6, 1e-6, 1e-6, 1e-6, 1e-6]
    assert tolerances(expected, 1e-4) == [1e-4] * 8
    assert [each.floats for each in expected] == [False, False, False, True, False, True, False, False]


@given(values, values, st.sampled_from([0.0, 1e-6]))
@settings(max_examples=100)
def test_the_rule_is_evalplus_rule(output, wanted, atol):
    """Against the rule as evalplus has it, on objects. Its nan is equal to itself by identity only."""
    import numpy as np

    def naive() -> bool:
        try:
            if output == wanted:
                return True
            if atol == 0 or type(output) is not type(wanted):
                return False
            if isinstance(wanted, list | tuple) and len(output) != len(wanted):
                return False
            return bool(np.allclose(output, wanted, rtol=1e-7, atol=atol))
        except Exception:
            return False

    assert judge(output, wanted, atol=atol) == (naive() or same(output, wanted))


def test_counters_and_decimals_are_not_known_to_the_decoder():
    for value in (Counter("a"), Decimal(1)):
        with pytest.raises(ValueError, match="unmarshallable"):
            marshal.dumps(value, 2)
