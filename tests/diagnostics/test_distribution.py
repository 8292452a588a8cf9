import contextlib
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from diagnostics import distribution
from diagnostics.distribution import compare
from gift.cli import UserError

DISTANCES = ("kl_new_old", "kl_old_new", "js", "tv")


def inputs(seed, tokens=9, vocabulary=40, width_a=6, width_b=6, scale=1.0, dtype=torch.float64):
    """Two unrelated checkpoints' arguments of compare(), in its order."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    return (
        normal(tokens, width_a),
        normal(vocabulary, width_a),
        normal(tokens, width_b),
        normal(vocabulary, width_b),
        torch.randint(vocabulary, (tokens,), generator=generator),
    )


def swap(arguments):
    hidden_a, weight_a, hidden_b, weight_b, labels = arguments
    return hidden_b, weight_b, hidden_a, weight_a, labels


def oracle(hidden_a, weight_a, hidden_b, weight_b, labels, bias_a=0.0, bias_b=0.0, top_k=(1, 5, 10, 20)):
    """The same metrics by scipy, in float64, from whole [N, V] arrays."""
    logits_a = hidden_a.double().numpy() @ weight_a.double().numpy().T + bias_a
    logits_b = hidden_b.double().numpy() @ weight_b.double().numpy().T + bias_b
    p_a, p_b = scipy.special.softmax(logits_a, -1), scipy.special.softmax(logits_b, -1)
    rows = np.arange(len(labels))
    order_a, order_b = (np.argsort(-logits, axis=-1, kind="stable") for logits in (logits_a, logits_b))
    return {
        # kl_div is rel_entr(p, q) - p + q: the same sum over a simplex, exact where p and q are all but equal
        "kl_new_old": scipy.special.kl_div(p_b, p_a).sum(-1),
        "kl_old_new": scipy.special.kl_div(p_a, p_b).sum(-1),
        "js": jensenshannon(p_a, p_b, axis=-1) ** 2,
        "tv": np.abs(p_a - p_b).sum(-1) / 2,
        "nll_a": -scipy.special.log_softmax(logits_a, -1)[rows, labels.numpy()],
        "nll_b": -scipy.special.log_softmax(logits_b, -1)[rows, labels.numpy()],
        "entropy_a": scipy.stats.entropy(p_a, axis=-1),
        "entropy_b": scipy.stats.entropy(p_b, axis=-1),
        **{
            f"topk_overlap_{k}": np.array(
                [len({*a} & {*b}) / k for a, b in zip(order_a[:, :k], order_b[:, :k], strict=True)]
            )
            for k in top_k
        },
    }


def assert_matches(measured, expected, **tolerance):
    assert measured.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(measured[name].numpy(), values, err_msg=name, **tolerance)


@pytest.mark.parametrize("width_b", [6, 11])
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_agrees_with_scipy(scale, width_b):
    arguments = inputs(0, scale=scale, width_b=width_b)
    assert_matches(compare(*arguments), oracle(*arguments), rtol=1e-10, atol=1e-12)


def test_kl_is_the_entropy_relative_to_the_other_distribution():
    arguments = inputs(1)
    hidden_a, weight_a, hidden_b, weight_b, _ = arguments
    p_a, p_b = (hidden_a @ weight_a.T).softmax(-1).numpy(), (hidden_b @ weight_b.T).softmax(-1).numpy()
    measured = compare(*arguments)
    np.testing.assert_allclose(measured["kl_new_old"], scipy.special.rel_entr(p_b, p_a).sum(-1), rtol=1e-10)
    np.testing.assert_allclose(measured["kl_old_new"], scipy.stats.entropy(p_a, p_b, axis=-1), rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_inputs_are_compared_as_float32(dtype):
    arguments = inputs(2, dtype=dtype)
    assert_matches(compare(*arguments), oracle(*arguments), rtol=1e-4, atol=1e-6)


def test_biases_are_added():
    arguments, biases = inputs(3), torch.randn(2, 40, dtype=torch.float64)
    measured = compare(*arguments, bias_a=biases[0], bias_b=biases[1])
    assert_matches(measured, oracle(*arguments, biases[0].numpy(), biases[1].numpy()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("size", "rtol"), [(6e-6, 1e-2), (6e-5, 1e-3), (6e-4, 1e-4), (6e-3, 1e-5)])
def test_tiny_drift_is_measured_in_float32(size, rtol):
    """Perturbations that put the KL between 1e-9 and 1e-3 nats: what is left is the rounding of the float32 logits."""
    hidden, weight, noise, _, labels = inputs(4, tokens=32, vocabulary=4000, width_a=32, width_b=32, scale=0.7)
    arguments = [hidden, weight, hidden + 3 * noise * size, weight, labels]
    arguments[:4] = [tensor.float() for tensor in arguments[:4]]
    measured, expected = compare(*arguments), oracle(*arguments)
    assert 1e-9 < expected["kl_new_old"].mean() < 2e-3
    for name in ("kl_new_old", "kl_old_new", "js"):
        np.testing.assert_allclose(measured[name].mean(), expected[name].mean(), rtol=rtol, err_msg=name)


checkpoints = st.builds(
    inputs,
    seed=st.integers(0, 2**32),
    tokens=st.integers(1, 12),
    vocabulary=st.integers(2, 60),
    width_a=st.integers(1, 5),
    width_b=st.integers(1, 5),
    scale=st.sampled_from([1e-4, 0.1, 1.0, 5.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)


@given(checkpoints)
@settings(max_examples=80, deadline=None)
def test_ranges_and_inequalities(arguments):
    measured = compare(*arguments)
    for name, values in measured.items():
        assert values.isfinite().all(), name
        assert (values >= 0).all(), name
    assert (measured["js"] <= math.log(2)).all()
    assert (measured["tv"] <= 1).all()
    for name in ("kl_new_old", "kl_old_new"):  # Pinsker
        assert (2 * measured["tv"] ** 2 <= measured[name] * (1 + 1e-9) + 1e-15).all()
    assert (measured["js"] <= math.log(2) * measured["tv"] * (1 + 1e-9) + 1e-15).all()
    for side in "ab":
        assert (measured[f"entropy_{side}"] <= math.log(len(arguments[1])) + 1e-12).all()
    for k in distribution.TOP_K:
        assert (f"topk_overlap_{k}" in measured) == (k <= len(arguments[1]))


@given(checkpoints)
@settings(max_examples=40, deadline=None)
def test_swapping_the_sides_swaps_what_is_directed_and_nothing_else(arguments):
    forward, backward = compare(*arguments), compare(*swap(arguments))
    directed = {"kl_new_old": "kl_old_new", "nll_a": "nll_b", "entropy_a": "entropy_b"}
    directed |= {b: a for a, b in directed.items()}
    for name, values in forward.items():
        assert torch.equal(values, backward[directed.get(name, name)]), name


@given(checkpoints)
@settings(max_examples=40, deadline=None)
def test_a_checkpoint_is_exactly_zero_from_itself(arguments):
    hidden, weight, _, _, labels = arguments
    measured = compare(hidden, weight, hidden.clone(), weight.clone(), labels)
    for name in DISTANCES:
        assert (measured[name] == 0).all(), name
    assert all((values == 1).all() for name, values in measured.items() if name.startswith("topk_overlap"))
    assert torch.equal(measured["nll_a"], measured["nll_b"])


@given(checkpoints, st.data())
@settings(max_examples=40, deadline=None)
def test_one_flipped_weight_is_found(arguments, data):
    hidden, weight, _, _, labels = arguments
    scaled = hidden.double() / hidden.double().norm(dim=-1, keepdim=True)  # states of norm 1, so no head is saturated
    weight = weight.double() / weight.double().norm() + 0.5
    flipped = weight.clone()
    row, column = data.draw(st.integers(0, len(weight) - 1)), data.draw(st.integers(0, weight.shape[1] - 1))
    flipped[row, column] = -flipped[row, column] - 1e-3
    measured = compare(scaled, weight, scaled, flipped, labels)
    changed = scaled[:, column].abs() > 1e-3
    for name in DISTANCES:
        assert (measured[name][changed] > 0).all(), name


@given(checkpoints, st.integers(1, 13))
@settings(max_examples=40, deadline=None)
def test_chunking_changes_nothing(arguments, chunk_tokens):
    arguments = [tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments]
    whole, chunked = compare(*arguments), compare(*arguments, chunk_tokens=chunk_tokens)
    assert whole.keys() == chunked.keys()
    for name, values in whole.items():
        torch.testing.assert_close(chunked[name], values, rtol=1e-9, atol=1e-12, msg=name)


@given(
    st.integers(1, 8).flatmap(
        lambda size: st.lists(st.lists(st.integers(0, 3), min_size=size, max_size=size), min_size=2, max_size=6)
    ),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_ties_go_to_the_lower_index(rows, data):
    logits = torch.tensor(rows, dtype=torch.float32)
    k = data.draw(st.integers(1, logits.shape[1]))
    expected = np.argsort(-logits.numpy(), axis=-1, kind="stable")
    assert distribution.top_tokens(logits, k).tolist() == expected[:, :k].tolist()
    overlap = distribution.top_overlap(logits[:1], logits[1:2], [k])[f"topk_overlap_{k}"].item()
    assert overlap == len({*expected[0, :k]} & {*expected[1, :k]}) / k


def test_logits_too_far_apart_for_exp_stay_finite():
    hidden = torch.ones(1, 1)
    weight = torch.tensor([[2000.0], [-2000.0], [0.0]])
    measured = compare(hidden, weight, hidden, -weight, torch.tensor([0]))
    assert measured["kl_new_old"].item() == measured["kl_old_new"].item() == 4000
    assert measured["js"].item() == pytest.approx(math.log(2))
    assert measured["tv"].item() == 1
    assert measured["nll_b"].item() == 4000


def test_never_holds_more_logits_than_its_budget(monkeypatch):
    seen = []

    def recorded(hidden, weight, bias):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        seen.append(logits.shape)
        return logits

    monkeypatch.setattr(distribution, "linear", recorded)
    monkeypatch.setattr(distribution, "CHUNK_LOGITS", 1000)
    assert len(compare(*inputs(5, tokens=300))["js"]) == 300
    assert max(shape.numel() for shape in seen) == 1000
    seen.clear()
    compare(*inputs(5, tokens=300), chunk_tokens=7)
    assert max(shape[0] for shape in seen) == 7


def matmul_precision():
    return [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]


@contextlib.contextmanager
def matmul_precision_set(cuda, mkldnn):
    before = matmul_precision()
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = cuda, mkldnn
    yield
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before


def test_reduced_precision_is_off_during_the_products_and_then_as_before(monkeypatch):
    arguments = inputs(6, dtype=torch.float32)
    expected = compare(*arguments)
    during = []

    def recorded(hidden, weight, bias):
        during.extend(matmul_precision())
        return torch.nn.functional.linear(hidden, weight, bias)

    monkeypatch.setattr(distribution, "linear", recorded)
    reduced = torch.autocast("cpu", dtype=torch.bfloat16)
    with matmul_precision_set("tf32", "bf16"), reduced:
        measured = compare(*arguments)
        assert torch.is_autocast_enabled("cpu")
        assert matmul_precision() == ["tf32", "bf16"]
    assert during == ["ieee"] * 4
    assert all(torch.equal(measured[name], values) for name, values in expected.items())


def test_no_tokens_give_empty_results():
    measured = compare(*inputs(7, tokens=0))
    assert {tuple(values.shape) for values in measured.values()} == {(0,)}
    assert "topk_overlap_20" in measured


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: torch.zeros(41, 6)}, r"40 rows \(a\) and 41 rows \(b\)"),
        ({2: torch.zeros(8, 6)}, "9, 8 and 9 tokens"),
        ({0: torch.zeros(9, 5)}, "hidden_a has width 5, but weight_a has 6"),
        ({4: torch.full((9,), -100)}, "labels range from -100 to -100"),
        ({4: torch.full((9,), 40)}, "outside the vocabulary of 40"),
    ],
)
def test_bad_inputs_are_named(change, message):
    arguments = [change.get(position, value) for position, value in enumerate(inputs(8, dtype=torch.float32))]
    with pytest.raises(UserError, match=message):
        compare(*arguments)


@pytest.mark.parametrize(("options", "message"), [({"top_k": (5, 0)}, "top_k"), ({"chunk_tokens": 0}, "chunk_tokens")])
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        compare(*inputs(9), **options)
