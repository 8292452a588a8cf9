"""gift.objectives against soft-target cross-entropy with materialized distributions in float64."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gift.cli import UserError
from gift.objectives import OBJECTIVES, gift_log_odds, gift_weight, needs_reference, resolve
from gift.vocab import VocabStats, vocab_stats

BETAS = [0.0, 0.01, 1.0, 4.0, 10.0, 20.0, 100.0, 1000.0, math.inf]


def stats_of_logits(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> VocabStats:
    """Statistics under an LM head that is the identity: hidden states are logits."""
    identity = torch.eye(logits.shape[1], dtype=logits.dtype)
    return vocab_stats(logits, identity, labels, ref_hidden=ref_logits, ref_weight=identity)


def target(ref_logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    """softmax(log p + beta onehot(y)) in float64, and its limit for beta = inf."""
    onehot = torch.nn.functional.one_hot(labels, ref_logits.shape[1]).double()
    if beta == math.inf:
        return onehot
    return torch.softmax(torch.log_softmax(ref_logits.double(), -1) + beta * onehot, -1)


def logits_with_label_logp(seed: int, logp: list[float], vocab: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 student logits, reference logits whose label has about these log-probabilities, and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(len(logp), vocab, generator=generator)
    labels = torch.randint(vocab, (len(logp),), generator=generator)
    ref_logits = torch.randn(len(logp), vocab, generator=generator)
    rest = ref_logits.scatter(1, labels[:, None], -math.inf).logsumexp(-1)
    wanted = torch.tensor(logp).clamp(max=-1e-3)
    ref_logits.scatter_(1, labels[:, None], (rest + wanted - torch.log(-torch.expm1(wanted)))[:, None])
    return logits, ref_logits, labels


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 999),
    beta=st.one_of(st.sampled_from(BETAS), st.floats(0, 50)),
    logp=st.lists(st.floats(-40, 0), min_size=1, max_size=6),
)
def test_gift_is_cross_entropy_with_the_tempered_target(seed: int, beta: float, logp: list[float]) -> None:
    logits, ref_logits, labels = logits_with_label_logp(seed, logp)
    logits.requires_grad_()
    loss = OBJECTIVES["gift"](stats_of_logits(logits, ref_logits, labels), beta=beta)
    assert loss.shape == labels.shape
    assert loss.dtype == torch.float32
    wanted = target(ref_logits, labels, beta)
    exact = -(wanted * torch.log_softmax(logits.double(), -1)).sum(-1)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    pi = torch.softmax(logits.detach().double(), -1)
    torch.testing.assert_close(gradient.double(), pi - wanted, rtol=0, atol=5e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_gift_stays_finite_and_right_for_labels_the_base_model_rules_out(beta: float) -> None:
    """log p(y) down to -1200; a float32 logit of that size is good to 1e-4, and so is the loss."""
    logits, ref_logits, labels = logits_with_label_logp(
        0, [-1200.0, -1000.0, -999.0, -300.0, -104.0, -90.0, -20.0, 0.0]
    )
    logits.requires_grad_()
    loss = OBJECTIVES["gift"](stats_of_logits(logits, ref_logits, labels), beta=beta)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    wanted = target(ref_logits, labels, beta)
    exact = -(wanted * torch.log_softmax(logits.detach().double(), -1)).sum(-1)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        gradient.double(), torch.softmax(logits.detach().double(), -1) - wanted, rtol=0, atol=1e-4
    )


def test_gift_matches_the_definition_to_float64_precision() -> None:
    logits, ref_logits, labels = (
        part.double() if part.is_floating_point() else part for part in logits_with_label_logp(1, [-9.0, -2.0, -1e-3])
    )
    for beta in BETAS[:-2]:
        loss = OBJECTIVES["gift"](stats_of_logits(logits, ref_logits, labels), beta=beta)
        exact = -(target(ref_logits, labels, beta) * torch.log_softmax(logits, -1)).sum(-1)
        torch.testing.assert_close(loss, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("beta", "limit"), [(0.0, "distillation"), (math.inf, "sft")])
def test_gift_ends_exactly_in_distillation_and_sft(beta: float, limit: str) -> None:
    logits, ref_logits, labels = logits_with_label_logp(2, [-50.0, -7.0, -0.1])
    stats = stats_of_logits(logits.requires_grad_(), ref_logits, labels)
    expected = stats.ref_ce if limit == "distillation" else OBJECTIVES["sft"](stats)
    loss = OBJECTIVES["gift"](stats, beta=beta)
    assert torch.equal(loss, expected)
    gradients = [torch.autograd.grad(part.sum(), logits, retain_graph=True)[0] for part in (loss, expected)]
    assert torch.equal(*gradients)


def test_sft_is_cross_entropy() -> None:
    logits, ref_logits, labels = logits_with_label_logp(3, [-1.0, -2.0])
    loss = OBJECTIVES["sft"](stats_of_logits(logits, ref_logits, labels))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))


@pytest.mark.parametrize("beta", [20.0, 1000.0, math.inf])
def test_an_infinite_term_with_no_weight_is_no_nan(beta: float) -> None:
    """The student masks a token that the base model allows, and the target puts all its mass on the label."""
    identity = torch.eye(3)
    hidden = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    mask = torch.tensor([0.0, 0.0, -math.inf])
    ref_hidden = torch.tensor([[200.0, 0.0, 0.0]])
    stats = vocab_stats(hidden, identity, torch.tensor([0]), bias=mask, ref_hidden=ref_hidden, ref_weight=identity)
    assert stats.ref_ce.isinf().all()
    loss = OBJECTIVES["gift"](stats, beta=beta)
    loss.sum().backward()
    assert loss.isfinite().all() == (beta > 104)  # 1 - w = e^-beta underflows there
    assert hidden.grad.isfinite().all()


@given(logp=st.floats(-80, -1e-6), beta=st.floats(1e-4, 60))
def test_gift_weight_is_the_share_of_the_onehot_part(logp: float, beta: float) -> None:
    mass = math.expm1(beta) * math.exp(logp)
    weight = gift_weight(torch.tensor([logp], dtype=torch.float64), beta)
    assert weight.item() == pytest.approx(mass / (1 + mass), rel=1e-10)
    complement = torch.sigmoid(-gift_log_odds(torch.tensor([logp], dtype=torch.float64), beta))
    assert complement.item() == pytest.approx(1 / (1 + mass), rel=1e-10)


def test_gift_weight_has_its_limits_even_for_impossible_labels() -> None:
    logp = torch.tensor([-math.inf, -5.0, 0.0])
    assert gift_weight(logp, 0.0).tolist() == [0, 0, 0]
    assert gift_weight(logp, math.inf).tolist() == [1, 1, 1]
    assert gift_weight(logp, 3.0).isfinite().all()


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.count["mm"] + self.count["addmm_"]


def test_tokens_that_do_not_surprise_the_base_model_cost_what_sft_costs() -> None:
    """At beta = 20, 1 - w is below the rounding error of w where p(y) > 0.035: backward leaves the reference alone."""

    def products(logp: list[float], name: str, **options: float) -> int:
        logits, ref_logits, labels = logits_with_label_logp(4, logp)
        loss = OBJECTIVES[name](stats_of_logits(logits.requires_grad_(), ref_logits, labels), **options)
        with Products() as products:
            loss.sum().backward()
        return products.total

    assert products([-1.0, -3.0], "gift", beta=20.0) == products([-1.0, -3.0], "sft")
    assert products([-1.0, -9.0], "gift", beta=20.0) == products([-1.0, -9.0], "sft") + 1


@pytest.mark.parametrize("beta", [-1.0, -math.inf, math.nan])
def test_a_meaningless_beta_is_refused(beta: float) -> None:
    with pytest.raises(UserError, match="beta must be a number >= 0"):
        resolve("gift", {"beta": beta})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gfit", {}, r"unknown objective 'gfit' \(did you mean 'gift'\?\); objectives: sft, gift"),
        ("gift", {"bta": 1.0}, r"objective 'gift' has no option 'bta' \(did you mean 'beta'\?\); it has: beta"),
        ("sft", {"beta": 1.0}, "objective 'sft' has no option 'beta'; it has: none"),
        ("gift", {"beta": "20"}, "option 'beta' of objective 'gift' must be a number, got '20'"),
        ("gift", {"beta": True}, "must be a number, got True"),
    ],
)
def test_a_misspelt_objective_or_option_is_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(name, options)


def test_resolve_sets_the_options() -> None:
    stats = stats_of_logits(*logits_with_label_logp(5, [-30.0, -8.0]))
    assert torch.equal(resolve("gift", {"beta": 9})(stats), OBJECTIVES["gift"](stats, beta=9.0))
    assert torch.equal(resolve("gift", {})(stats), OBJECTIVES["gift"](stats, beta=20.0))
    assert OBJECTIVES["gift"].options == {"beta": 20.0}


def test_who_needs_the_base_model() -> None:
    assert needs_reference("gift")
    assert not needs_reference("sft")
    with pytest.raises(UserError, match="unknown objective"):
        needs_reference("nothing")
    without = vocab_stats(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1]))
    assert OBJECTIVES["sft"](without).tolist() == pytest.approx([math.log(4)] * 2)
    with pytest.raises(ValueError, match="needs the reference model"):
        OBJECTIVES["gift"](without)
