"""gift.vocab.vocab_loss against materialized logits and autograd in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_vocab import PARAMETERS, double, naive, random_inputs
from torch import Tensor

from gift.vocab import DenseReference, SparseReference, VocabStats, vocab_loss
from gift.vocab import loss as vocab_loss_module

FIELDS = ("logp", "entropy", "mean_logp", "ref_ce", "ref_logp", "ref_entropy")
Objective = Callable[[Any], Tensor]


def mixture(seed: int, fields: tuple[str, ...]) -> Objective:
    """A loss per token that is not linear in the statistics, with a coefficient of its own for every field."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(len(fields), generator=generator, dtype=torch.float64).tolist()

    def objective(stats: Any) -> Tensor:
        found = stats if isinstance(stats, dict) else vars(stats)
        terms = [factor * found[name] for name, factor in zip(fields, factors, strict=True)]
        return torch.stack(terms).sum(0) + 0.1 * found["logp"].exp() * found[fields[-1]]

    return objective


def call(inputs: dict[str, Tensor], objective: Objective, **options: Any) -> tuple[Tensor, VocabStats]:
    """vocab_loss on inputs named as vocab_stats names them."""
    reference = None
    if "ref_hidden" in inputs:
        reference = DenseReference(inputs["ref_hidden"], inputs["ref_weight"], inputs.get("ref_bias"))
    own = {name: value for name, value in inputs.items() if not name.startswith("ref_")}
    return vocab_loss(**own, objective=objective, reference=reference, **options)


def assert_matches(
    inputs: dict[str, Tensor], objective: Objective, tolerance: float, logit_map: dict[str, Any], **options: Any
) -> None:
    """Loss, statistics and gradients equal those of the definitions."""
    inputs = {name: value.detach().requires_grad_(name in PARAMETERS) for name, value in inputs.items()}
    loss, stats = call(inputs, objective, **logit_map, **options)
    exact_inputs = double(inputs)
    exact = naive(exact_inputs, **logit_map)
    expected = objective(exact).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    for name, value in exact.items():
        torch.testing.assert_close(getattr(stats, name).double(), value, rtol=tolerance, atol=tolerance)
    wanted = [name for name in PARAMETERS if name in inputs]
    truth = torch.autograd.grad(3 * expected, [exact_inputs[name] for name in wanted])
    (3 * loss).backward()
    for name, value in zip(wanted, truth, strict=True):
        gradient = inputs[name].grad
        assert gradient is not None
        assert gradient.dtype == inputs[name].dtype
        torch.testing.assert_close(gradient.double(), value, rtol=tolerance, atol=tolerance)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_loss_and_gradients_are_those_of_the_definitions(data: st.DataObject, dtype: torch.dtype) -> None:
    draw = data.draw
    tokens, vocab, width = draw(st.integers(1, 9)), draw(st.integers(2, 40)), draw(st.integers(1, 8))
    inputs = random_inputs(draw(st.integers(0, 999)), tokens, vocab, width, dtype=dtype, scale=draw(st.floats(0.1, 2)))
    for name in ("bias", "ref_bias"):
        if draw(st.booleans()):
            del inputs[name]
    known = FIELDS
    if draw(st.booleans()):
        inputs = {name: value for name, value in inputs.items() if not name.startswith("ref_")}
        known = FIELDS[:3]
    fields = tuple(draw(st.lists(st.sampled_from(known), min_size=1, unique=True)))
    logit_map = {
        "temperature": draw(st.sampled_from([1.0, 0.7])),
        "scale": draw(st.sampled_from([1.0, 0.3])),
        "softcap": draw(st.sampled_from([None, 2.0, 30.0])),
    }
    chunk = draw(st.one_of(st.none(), st.integers(1, 12)))
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vocab_loss_module.BLOCK_BYTES, "cpu", draw(st.sampled_from([1, 4 * vocab * 2, 2**20])))
        assert_matches(inputs, mixture(draw(st.integers(0, 99)), fields), tolerance, logit_map, chunk_tokens=chunk)


@pytest.mark.parametrize("masked", [("bias",), ("ref_bias",), ("bias", "ref_bias")], ids="+".join)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_masked_entries_cause_no_nan(masked: tuple[str, ...], softcap: float | None) -> None:
    inputs = random_inputs(4, 5, 12, 3)
    for name in masked:
        inputs[name][[0, 1, 2, 7]] = -math.inf
    inputs["labels"] = torch.tensor([3, 4, 5, 6, 11])
    fields = FIELDS[:3] if masked == ("bias",) else FIELDS  # CE to a reference that masks less is infinite
    assert_matches(inputs, mixture(0, fields), 1e-9, {"softcap": softcap}, chunk_tokens=2)


def sparse(inputs: dict[str, Tensor], keep: int) -> tuple[SparseReference, Tensor]:
    """The reference's `keep` largest probabilities besides the label's, and the distribution [N, V] it stands for."""
    exact = double(inputs)
    logits = exact["ref_hidden"] @ exact["ref_weight"].T + exact["ref_bias"]
    p, labels = logits.softmax(-1), inputs["labels"][:, None]
    columns = p.scatter(1, labels, -1.0).topk(keep).indices
    rows = torch.arange(len(p)).repeat_interleave(keep)
    stood_for = torch.zeros_like(p).scatter(1, columns, p.gather(1, columns))
    stood_for.scatter_(1, labels, 1 - stood_for.sum(-1, keepdim=True))
    given = SparseReference(
        p.gather(1, labels)[:, 0].log(), -(p * p.log()).sum(-1), rows, columns.flatten(), p.gather(1, columns).flatten()
    )
    return given, stood_for


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 999), keep=st.integers(0, 12), chunk=st.integers(1, 9), block=st.sampled_from([1, 200, 2**20])
)
def test_a_sparse_reference_counts_what_is_not_stored_as_the_labels(
    seed: int, keep: int, chunk: int, block: int
) -> None:
    inputs = random_inputs(seed, 7, 13, 4)
    reference, stood_for = sparse(inputs, keep)
    objective = mixture(seed, ("ref_ce", "logp"))
    exact = {name: inputs[name].clone().requires_grad_() for name in PARAMETERS}
    log_pi = torch.log_softmax(exact["hidden"] @ exact["weight"].T + exact["bias"], -1)
    expected = objective(
        {"ref_ce": -(stood_for * log_pi).sum(-1), "logp": log_pi.gather(1, inputs["labels"][:, None])[:, 0]}
    ).sum()
    parameters = {name: inputs[name].clone().requires_grad_() for name in PARAMETERS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vocab_loss_module.BLOCK_BYTES, "cpu", block)
        loss, stats = vocab_loss(
            **parameters, labels=inputs["labels"], objective=objective, reference=reference, chunk_tokens=chunk
        )
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(stats.ref_logp, reference.logp)
    assert torch.equal(stats.ref_entropy, reference.entropy)
    loss.backward()
    expected.backward()
    for name in PARAMETERS:
        torch.testing.assert_close(parameters[name].grad, exact[name].grad, rtol=1e-9, atol=1e-10)


def test_old_log_probabilities_and_the_vocabulary_reach_the_objective() -> None:
    inputs = random_inputs(3, 6, 10, 4)
    inputs["bias"][4] = -math.inf
    inputs["labels"].clamp_(max=3)
    old = torch.linspace(-3, -1, 6, dtype=torch.float64)

    def objective(stats: Any) -> Tensor:
        return (stats.logp - stats.old_logp).exp() * stats.vocab_size

    loss, stats = call(inputs, objective, old_logp=old, chunk_tokens=4)
    expected = 9 * (naive(double(inputs))["logp"] - old).exp().sum()
    torch.testing.assert_close(loss, expected.detach())
    assert stats.vocab_size == 9


def test_bfloat16_gradients_are_rounded_only_once() -> None:
    """Half an ulp of bfloat16 is 2^-9 of a value; gradients summed in bfloat16 over 256 tokens would miss it."""
    inputs = random_inputs(3, 256, 50, 16, dtype=torch.bfloat16, scale=0.5)
    inputs = {name: value.requires_grad_(name in PARAMETERS) for name, value in inputs.items()}
    loss, _ = call(inputs, lambda stats: stats.ref_ce - 0.5 * stats.logp, chunk_tokens=1)
    loss.backward()
    exact_inputs = double(inputs)
    exact = naive(exact_inputs)
    (exact["ref_ce"] - 0.5 * exact["logp"]).sum().backward()
    for name in PARAMETERS:
        assert inputs[name].grad.dtype == torch.bfloat16
        torch.testing.assert_close(inputs[name].grad.double(), exact_inputs[name].grad, rtol=2**-8, atol=1e-5)


def test_a_weight_tied_to_the_hidden_states_collects_both_gradients() -> None:
    inputs = random_inputs(2, 6, 13, 4)

    def gradient(loss_of: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        weight = inputs["weight"].clone().requires_grad_()
        loss_of({**inputs, "weight": weight, "hidden": torch.tanh(weight[torch.arange(6)] * 3)}).backward()
        assert weight.grad is not None
        return weight.grad

    objective = mixture(5, FIELDS)
    fused = gradient(lambda values: call(values, objective, chunk_tokens=4)[0])
    torch.testing.assert_close(fused, gradient(lambda values: objective(naive(values)).sum()), rtol=1e-9, atol=1e-10)


def test_no_tokens_give_zero_gradients_and_not_none() -> None:
    inputs = random_inputs(7, 0, 6, 3, dtype=torch.bfloat16)
    inputs = {name: value.requires_grad_(name in PARAMETERS) for name, value in inputs.items()}
    loss, stats = call(inputs, lambda stats: stats.ref_ce)
    assert loss.item() == 0
    assert all(getattr(stats, name).shape == (0,) for name in FIELDS)
    loss.backward()
    for name in PARAMETERS:
        assert torch.equal(inputs[name].grad, torch.zeros_like(inputs[name]))


def test_without_gradients_wanted_none_is_made() -> None:
    inputs = random_inputs(8, 4, 6, 3)
    with torch.no_grad():
        loss, _ = call({**inputs, "hidden": inputs["hidden"].requires_grad_()}, lambda stats: -stats.logp)
    assert not loss.requires_grad
    inputs["weight"].requires_grad_()
    loss, stats = call({**inputs, "hidden": inputs["hidden"].detach()}, lambda stats: -stats.logp)
    loss.backward()
    assert [name for name in inputs if inputs[name].grad is not None] == ["weight"]
    assert not stats.logp.requires_grad
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": torch.tensor([1, 0])}, ValueError, "rows must be ascending"),
        ({"rows": torch.tensor([0, 2])}, IndexError, r"rows must lie in \[0, 2\)"),
        ({"columns": torch.tensor([0, 6])}, IndexError, r"columns must lie in \[0, 6\)"),
        ({"probs": torch.zeros(3)}, ValueError, "equally long"),
        ({"logp": torch.zeros(3)}, ValueError, r"must be \[2\]"),
    ],
)
def test_entries_that_do_not_fit_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = {name: value for name, value in random_inputs(11, 2, 6, 3).items() if not name.startswith("ref_")}
    entries = {
        "logp": torch.zeros(2),
        "entropy": torch.zeros(2),
        "rows": torch.tensor([0, 1]),
        "columns": torch.tensor([0, 1]),
        "probs": torch.zeros(2),
    }
    with pytest.raises(error, match=message):
        vocab_loss(**inputs, objective=lambda stats: stats.ref_ce, reference=SparseReference(**{**entries, **change}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_matches_the_definitions(dtype: torch.dtype) -> None:
    """bfloat16: dz is rounded to bfloat16 before the matrix products of the backward pass."""
    inputs = {name: value.cuda() for name, value in random_inputs(12, 300, 1000, 64, dtype=dtype, scale=0.2).items()}
    inputs = {name: value.requires_grad_(name in PARAMETERS) for name, value in inputs.items()}
    objective = mixture(1, FIELDS)
    loss, _ = call(inputs, objective, chunk_tokens=128)
    exact_inputs = double(inputs)
    expected = objective(naive(exact_inputs)).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-2)
    truth = torch.autograd.grad(expected, [exact_inputs[name] for name in PARAMETERS])
    loss.backward()
    for name, value in zip(PARAMETERS, truth, strict=True):
        error = (inputs[name].grad.double() - value).norm() / value.norm()
        assert error < (1e-4 if dtype == torch.float32 else 1e-2)
