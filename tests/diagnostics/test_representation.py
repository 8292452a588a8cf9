import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cosine, euclidean

from diagnostics import representation
from diagnostics.representation import compare
from gift.cli import UserError

seeds = st.integers(0, 2**32)


def states(seed, tokens=7, width=16, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, tokens, width, generator=generator) * scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_agrees_with_scipy(scale, dtype):
    a, b = states(0, scale=scale, dtype=dtype)
    measured = compare(a, b)
    rows = list(zip(a.double().numpy(), b.double().numpy(), strict=True))
    np.testing.assert_allclose(measured["cos"], [1 - cosine(x, y) for x, y in rows], rtol=1e-12)
    np.testing.assert_allclose(measured["l2"], [euclidean(x, y) for x, y in rows], rtol=1e-12)
    np.testing.assert_allclose(measured["l2_rel"], [euclidean(x, y) / np.linalg.norm(x) for x, y in rows], rtol=1e-12)


def test_small_angles_are_resolved():
    """Float32 arithmetic would round this cosine to 1."""
    angle = 1e-5
    a, b = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[np.cos(angle), np.sin(angle)]])
    assert 1 - compare(a, b)["cos"].item() == pytest.approx(angle**2 / 2, rel=1e-5)


@given(seeds, st.integers(1, 300), st.sampled_from([1e-12, 1.0, 1e12]))
@settings(max_examples=60, deadline=None)
def test_equal_states_are_exactly_equal(seed, width, scale):
    a, _ = states(seed, width=width, scale=scale)
    measured = compare(a, a.clone())
    assert (measured["cos"] == 1).all()
    assert (measured["l2"] == 0).all()
    assert (measured["l2_rel"] == 0).all()


@given(seeds, st.integers(1, 20), st.sampled_from([1e-6, 1.0, 1e6]))
@settings(max_examples=60, deadline=None)
def test_cosine_and_l2_are_symmetric_and_bounded(seed, width, scale):
    a, b = states(seed, width=width, scale=scale)
    forward, backward = compare(a, b), compare(b, a)
    assert torch.equal(forward["cos"], backward["cos"])
    assert torch.equal(forward["l2"], backward["l2"])
    assert (forward["cos"].abs() <= 1).all()


def test_zero_states_give_numbers():
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    assert [compare(zero, zero)[name].item() for name in ("cos", "l2", "l2_rel")] == [1, 0, 0]
    assert [compare(one, zero)[name].item() for name in ("cos", "l2", "l2_rel")] == [0, 2, 1]
    assert compare(zero, one)["l2_rel"].item() == float("inf")


def test_chunks_are_put_together_in_order(monkeypatch):
    a, b = states(1, tokens=11)
    whole = compare(a, b)
    monkeypatch.setattr(representation, "CHUNK_TOKENS", 4)
    assert all(torch.equal(values, whole[name]) for name, values in compare(a, b).items())


@pytest.mark.parametrize(
    ("shape", "message"), [((3, 5), r"widths: 4 \(a\) and 5 \(b\)"), ((2, 4), r"tokens: 3 \(a\) and 2 \(b\)")]
)
def test_shapes_must_agree(shape, message):
    with pytest.raises(UserError, match=message):
        compare(torch.zeros(3, 4), torch.zeros(shape))
