"""gift.vocab against materialized logits, log_softmax and autograd in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_vocab import PARAMETERS, double, naive, random_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gift.vocab import VocabStats, vocab_stats

DIFFERENTIABLE = ("logp", "entropy", "mean_logp", "ref_ce")
CONSTANT = ("ref_logp", "ref_entropy")
LOGIT_MAP = ("temperature", "scale", "softcap")


def gradients(
    stats: dict[str, Tensor] | VocabStats, inputs: dict[str, Tensor], upstream: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Gradients of sum_n upstream[name][n] * stats[name][n] with respect to the parameters."""
    fields = stats if isinstance(stats, dict) else vars(stats)
    total = torch.stack(
        [(factor.to(fields[name].dtype) * fields[name]).sum() for name, factor in upstream.items()]
    ).sum()
    wanted = [name for name in PARAMETERS if name in inputs]
    found = torch.autograd.grad(total, [inputs[name] for name in wanted], retain_graph=True)
    return dict(zip(wanted, found, strict=True))


def assert_matches(
    inputs: dict[str, Tensor], outputs: tuple[str, ...], tolerance: float, seed: int = 0, **options: Any
) -> None:
    """Values, and gradients of a random combination of `outputs`, equal those of the definitions."""
    inputs = {name: value.detach().requires_grad_(name in PARAMETERS) for name, value in inputs.items()}
    stats = vocab_stats(**inputs, **options)
    exact_inputs = double(inputs)
    exact = naive(exact_inputs, **{name: options[name] for name in LOGIT_MAP if name in options})
    for name, value in exact.items():
        actual = getattr(stats, name)
        assert actual.dtype == (torch.float64 if inputs["hidden"].dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(actual.double(), value, rtol=tolerance, atol=tolerance)
    generator = torch.Generator().manual_seed(seed)
    upstream = {name: torch.randn(len(inputs["labels"]), generator=generator, dtype=torch.float64) for name in outputs}
    expected = gradients(exact, exact_inputs, upstream)
    for name, value in gradients(stats, inputs, upstream).items():
        assert value.dtype == inputs[name].dtype
        torch.testing.assert_close(value.double(), expected[name], rtol=tolerance, atol=tolerance)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_values_and_gradients_are_those_of_the_definitions(data: st.DataObject, dtype: torch.dtype) -> None:
    draw = data.draw
    tokens, vocab, width = draw(st.integers(1, 9)), draw(st.integers(2, 40)), draw(st.integers(1, 8))
    inputs = random_inputs(draw(st.integers(0, 999)), tokens, vocab, width, dtype=dtype, scale=draw(st.floats(0.1, 2)))
    if draw(st.booleans()):
        del inputs["bias"]
    if draw(st.booleans()):
        del inputs["ref_bias"]
    known: tuple[str, ...] = DIFFERENTIABLE
    if draw(st.booleans()):
        inputs = {name: value for name, value in inputs.items() if not name.startswith("ref_")}
        known = DIFFERENTIABLE[:3]
    outputs = draw(st.lists(st.sampled_from(known), min_size=1, unique=True))
    assert_matches(
        inputs,
        tuple(outputs),
        1e-10 if dtype == torch.float64 else 5e-5,
        temperature=draw(st.sampled_from([1.0, 0.7])),
        scale=draw(st.sampled_from([1.0, 0.3])),
        softcap=draw(st.sampled_from([None, 2.0, 30.0])),
        chunk_tokens=draw(st.one_of(st.none(), st.integers(1, 12))),
        chunk_vocab=draw(st.one_of(st.none(), st.integers(1, 50))),
    )


def test_gradcheck_of_every_differentiable_output() -> None:
    inputs = random_inputs(1, 4, 7, 3)
    parameters = [inputs.pop(name).requires_grad_() for name in PARAMETERS]

    def outputs(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        stats = vocab_stats(hidden, weight, bias=bias, chunk_tokens=3, chunk_vocab=4, temperature=1.3, **inputs)
        return tuple(getattr(stats, name) for name in DIFFERENTIABLE)

    assert torch.autograd.gradcheck(outputs, parameters)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), chunk_tokens=st.integers(1, 20), chunk_vocab=st.integers(1, 40))
def test_chunking_does_not_change_the_result(seed: int, chunk_tokens: int, chunk_vocab: int) -> None:
    inputs = random_inputs(seed, 11, 31, 4)
    inputs = {name: value.requires_grad_(name in PARAMETERS) for name, value in inputs.items()}
    whole = vocab_stats(**inputs)
    tiled = vocab_stats(**inputs, chunk_tokens=chunk_tokens, chunk_vocab=chunk_vocab)
    upstream = {name: torch.linspace(-1, 1, 11) for name in DIFFERENTIABLE}
    expected = gradients(whole, inputs, upstream)
    for name in DIFFERENTIABLE + CONSTANT:
        torch.testing.assert_close(getattr(tiled, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    for name, value in gradients(tiled, inputs, upstream).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def test_a_weight_tied_to_the_hidden_states_collects_both_gradients() -> None:
    inputs = random_inputs(2, 6, 13, 4)
    tokens = torch.arange(6)

    def gradient(stats_of: Any) -> Tensor:
        weight = inputs["weight"].clone().requires_grad_()
        stats = stats_of({**inputs, "weight": weight, "hidden": torch.tanh(weight[tokens] * 3)})
        fields = stats if isinstance(stats, dict) else vars(stats)
        (found,) = torch.autograd.grad((fields["ref_ce"] - 0.3 * fields["logp"]).sum(), weight)
        return found

    tiled = gradient(lambda values: vocab_stats(**values, chunk_tokens=4, chunk_vocab=5))
    torch.testing.assert_close(tiled, gradient(naive), rtol=1e-10, atol=1e-10)


def test_bfloat16_inputs_are_rounded_only_once() -> None:
    """Half an ulp of bfloat16 is 2^-9 of a value; gradients summed in bfloat16 over 256 tokens would miss it."""
    inputs = random_inputs(3, 256, 50, 16, dtype=torch.bfloat16, scale=0.5)
    inputs = {name: value.requires_grad_(name in PARAMETERS) for name, value in inputs.items()}
    stats = vocab_stats(**inputs, chunk_tokens=1, chunk_vocab=20)
    exact_inputs = double(inputs)
    exact = naive(exact_inputs)
    for name in DIFFERENTIABLE + CONSTANT:
        torch.testing.assert_close(getattr(stats, name).double(), exact[name], rtol=1e-5, atol=1e-5)
    upstream = {name: torch.linspace(0.1, 1, 256, dtype=torch.float64) for name in ("logp", "ref_ce")}
    expected = gradients(exact, exact_inputs, upstream)
    for name, value in gradients(stats, inputs, upstream).items():
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.double(), expected[name], rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("masked", [("bias",), ("ref_bias",), ("bias", "ref_bias")], ids="+".join)
@pytest.mark.parametrize("chunk_vocab", [None, 3])
def test_masked_entries_cause_no_nan(masked: tuple[str, ...], chunk_vocab: int | None) -> None:
    inputs = random_inputs(4, 5, 12, 3)
    for name in masked:
        inputs[name][[0, 1, 2, 7]] = -math.inf
    inputs["labels"] = torch.tensor([3, 4, 5, 6, 11])
    assert_matches(inputs, DIFFERENTIABLE, 1e-10, chunk_tokens=2, chunk_vocab=chunk_vocab)
    assert_matches(inputs, DIFFERENTIABLE, 1e-10, chunk_vocab=chunk_vocab, softcap=1.5)
    assert vocab_stats(**inputs).ref_ce.isinf().all() == (masked == ("bias",))


def test_a_masked_label_has_probability_zero() -> None:
    inputs = random_inputs(5, 3, 8, 3)
    inputs["bias"][2] = inputs["ref_bias"][2] = -math.inf
    inputs["labels"] = torch.tensor([2, 3, 2])
    assert_matches(inputs, DIFFERENTIABLE, 1e-10)
    stats = vocab_stats(**inputs)
    for logp in (stats.logp, stats.ref_logp):
        assert logp.isneginf().tolist() == [True, False, True]


def test_logits_far_beyond_the_range_of_exp_stay_exact() -> None:
    inputs = random_inputs(6, 4, 9, 2)
    inputs["bias"], inputs["ref_bias"] = 1e3 * inputs["bias"], 1e3 * inputs["ref_bias"]
    assert_matches(inputs, DIFFERENTIABLE, 1e-9, chunk_vocab=2)


def test_no_tokens_give_zero_gradients_and_not_none() -> None:
    inputs = random_inputs(7, 0, 6, 3, dtype=torch.bfloat16)
    inputs = {name: value.requires_grad_(name in PARAMETERS) for name, value in inputs.items()}
    stats = vocab_stats(**inputs)
    assert all(getattr(stats, name).shape == (0,) for name in DIFFERENTIABLE + CONSTANT)
    (stats.logp.sum() + stats.ref_ce.sum()).backward()
    for name in PARAMETERS:
        assert torch.equal(inputs[name].grad, torch.zeros_like(inputs[name]))


@pytest.mark.parametrize("trained", PARAMETERS)
def test_frozen_inputs_get_no_gradient(trained: str) -> None:
    inputs = random_inputs(8, 4, 6, 3)
    inputs[trained].requires_grad_()
    vocab_stats(**inputs).ref_ce.sum().backward()
    assert [name for name in inputs if inputs[name].grad is not None] == [trained]
    inputs["ref_weight"].requires_grad_()
    stats = vocab_stats(**inputs)
    assert not stats.ref_logp.requires_grad
    assert not stats.ref_entropy.requires_grad


def test_autocast_does_not_lower_the_precision() -> None:
    inputs = random_inputs(9, 4, 6, 3, dtype=torch.float32)
    inputs = {name: value.requires_grad_(name in PARAMETERS) for name, value in inputs.items()}
    upstream = {name: torch.ones(4) for name in DIFFERENTIABLE}
    plain = gradients(vocab_stats(**inputs), inputs, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        stats = vocab_stats(**inputs)
        for name, value in gradients(stats, inputs, upstream).items():
            assert torch.equal(value, plain[name])


class Watch(TorchDispatchMode):
    """Counts operations and notes the number of elements of the largest tensor that any of them returns."""

    operations = 0
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_matrix_of_tokens_by_vocabulary_is_made() -> None:
    inputs = random_inputs(10, 60, 70, 3)
    inputs = {name: value.requires_grad_(name in PARAMETERS) for name, value in inputs.items()}
    with Watch() as watch:
        stats = vocab_stats(**inputs, chunk_tokens=10, chunk_vocab=30)
        gradients(stats, inputs, {name: torch.ones(60) for name in DIFFERENTIABLE})
    assert watch.elements == 10 * 30


def test_backward_does_only_what_is_asked_for() -> None:
    inputs = random_inputs(11, 5, 9, 3)
    inputs = {name: value.requires_grad_(name in PARAMETERS) for name, value in inputs.items()}

    def operations(inputs: dict[str, Tensor], *outputs: str) -> int:
        loss = sum(getattr(vocab_stats(**inputs), name).sum() for name in outputs)
        with Watch() as watch:
            loss.backward()
        return watch.operations

    alone = {name: value for name, value in inputs.items() if not name.startswith("ref_")}
    assert operations(inputs, "logp") == operations(alone, "logp")
    for other in DIFFERENTIABLE[1:]:
        assert operations(inputs, "logp", other) > operations(inputs, "logp") + 5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.tensor([0, 6])}, IndexError, r"\[0, 6\), got 0 to 6"),
        ({"labels": torch.tensor([-100, 1])}, IndexError, "got -100 to 1: leave ignored tokens out"),
        ({"labels": torch.tensor([0, 1, 2])}, ValueError, r"labels must be \[2\] int64"),
        ({"labels": torch.tensor([0.0, 1.0])}, ValueError, "float32"),
        ({"hidden": torch.zeros(2, 4)}, ValueError, r"\[2, 4\] and \[6, 3\]"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must be \[6\]"),
        ({"bias": torch.full((6,), -math.inf)}, ValueError, "masks the whole vocabulary"),
        ({"ref_weight": None}, ValueError, "both ref_hidden and ref_weight"),
        ({"ref_weight": torch.zeros(7, 4), "ref_bias": None}, ValueError, "vocabularies of 6 and 7"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens must be at least 1"),
        ({"chunk_vocab": -1}, ValueError, "chunk_vocab must be at least 1"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs: dict[str, Any] = random_inputs(11, 2, 6, 3)
    with pytest.raises(error, match=message):
        vocab_stats(**{**inputs, **change})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_matches_the_definitions(dtype: torch.dtype) -> None:
    """bfloat16: dz is rounded to bfloat16 before the matrix products of the backward pass."""
    inputs = {name: value.cuda() for name, value in random_inputs(12, 300, 1000, 64, dtype=dtype, scale=0.2).items()}
    inputs = {name: value.requires_grad_(name in PARAMETERS) for name, value in inputs.items()}
    stats = vocab_stats(**inputs, chunk_tokens=128, chunk_vocab=300)
    exact_inputs = double(inputs)
    exact = naive(exact_inputs)
    for name in DIFFERENTIABLE + CONSTANT:
        torch.testing.assert_close(getattr(stats, name).double(), exact[name], rtol=1e-4, atol=1e-4)
    upstream = {name: torch.ones(300, device="cuda") for name in DIFFERENTIABLE}
    expected = gradients(exact, exact_inputs, upstream)
    for name, value in gradients(stats, inputs, upstream).items():
        error = (value.double() - expected[name]).norm() / expected[name].norm()
        assert error < (1e-4 if dtype == torch.float32 else 1e-2)
