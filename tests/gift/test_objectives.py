"""gift.objectives against torch's own losses and distributions, and materialized targets, in float64."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from gift.cli import UserError
from gift.objectives import (
    OBJECTIVES,
    floored_logp,
    gift_log_odds,
    gift_weight,
    needs_reference,
    resolve,
    warnings_for,
)
from gift.vocab import VocabStats, vocab_stats

BETAS = [0.0, 0.01, 1.0, 4.0, 10.0, 20.0, 100.0, 1000.0, math.inf]
PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


class Case(NamedTuple):
    """Logits [N, V] of the policy, of the base model and of the old policy, and labels [N]."""

    logits: Tensor
    ref_logits: Tensor
    old_logits: Tensor
    labels: Tensor

    @property
    def vocab(self) -> int:
        return self.logits.shape[1]

    def to(self, dtype: torch.dtype) -> Case:
        return Case(*(logits.to(dtype) for logits in self[:3]), self.labels)


def random_case(seed: int, vocab: int = 7, scale: float = 3.0, tokens: int = 6) -> Case:
    """Float64 logits that float32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    logits, ref_logits, step = torch.randn(3, tokens, vocab, generator=generator)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    return Case(scale * logits, scale * ref_logits, scale * logits + 0.3 * step, labels).to(torch.float64)


def case_with_ref_logp(seed: int, logp: list[float]) -> Case:
    """As `random_case`, but the base model gives the labels about these log-probabilities."""
    case = random_case(seed, tokens=len(logp))
    rest = case.ref_logits.scatter(1, case.labels[:, None], -math.inf).logsumexp(-1)
    wanted = torch.tensor(logp, dtype=torch.float64).clamp(max=-1e-3)
    label_logits = (rest + wanted - torch.log(-torch.expm1(wanted))).float().double()
    return case._replace(ref_logits=case.ref_logits.scatter(1, case.labels[:, None], label_logits[:, None]))


def stats_of(case: Case) -> VocabStats:
    """The statistics, by their definitions."""
    log_pi, log_p, log_old = (torch.log_softmax(logits, -1) for logits in case[:3])

    def of_label(logp: Tensor) -> Tensor:
        return logp.gather(1, case.labels[:, None])[:, 0]

    return VocabStats(
        logp=of_label(log_pi),
        entropy=-(log_pi.exp() * log_pi).sum(-1),
        mean_logp=log_pi.mean(-1),
        ref_ce=-(log_p.exp() * log_pi).sum(-1),
        ref_logp=of_label(log_p),
        ref_entropy=-(log_p.exp() * log_p).sum(-1),
        old_logp=of_label(log_old),
        vocab_size=case.vocab,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The same losses over whole distributions, by torch's own functions or line by line as their authors compute them


def nll(case: Case) -> Tensor:
    return F.cross_entropy(case.logits, case.labels, reduction="none")


def kl(case: Case) -> Tensor:
    return kl_divergence(Categorical(logits=case.ref_logits), Categorical(logits=case.logits))


def naive_kd(case: Case, alpha: float = 0.1, mix: str = "convex") -> Tensor:
    return {"convex": 1 - alpha, "additive": 1}[mix] * nll(case) + alpha * kl(case)


def naive_dft(case: Case) -> Tensor:
    return torch.softmax(case.logits, -1).gather(1, case.labels[:, None])[:, 0].detach() * nll(case)


def naive_psft(case: Case, clip_high: float = 0.28) -> Tensor:
    """PPO's clipped surrogate with every advantage 1, both clips and the dual clip in place."""
    old_nll = F.cross_entropy(case.old_logits, case.labels, reduction="none")
    ratio = torch.clamp(old_nll - nll(case), -20, 20).exp()
    advantage = torch.ones_like(ratio)
    loss = torch.max(-ratio * advantage, -ratio.clamp(1 - 0.2, 1 + clip_high) * advantage)
    return torch.where(advantage < 0, torch.min(loss, -10 * advantage), loss)


def gift_target(case: Case, beta: float = 20.0, mode: str = "exact", smooth: float = 0.0) -> Tensor:
    """softmax(log q + beta onehot(y)) and its limit; q is p, or in mode 'floor' smoothed and floored."""
    onehot = F.one_hot(case.labels, case.vocab).to(torch.float64)
    if beta == math.inf:
        return onehot
    log_q = torch.log_softmax(case.ref_logits, -1)
    if mode == "floor":
        log_q = torch.log((1 - smooth) * torch.softmax(case.ref_logits, -1) + smooth / case.vocab + 1e-10)
    return torch.softmax(log_q + beta * onehot, -1)


NAIVE: dict[str, Callable[..., Tensor]] = {
    "sft": nll,
    "entropy": lambda case, coef=0.01: nll(case) - coef * Categorical(logits=case.logits).entropy(),
    "label_smoothing": lambda case, epsilon=0.01: F.cross_entropy(
        case.logits, case.labels, reduction="none", label_smoothing=epsilon
    ),
    "kd": naive_kd,
    "dft": naive_dft,
    "asft": lambda case, kl_weight=0.05: naive_dft(case) + kl_weight * kl(case),
    "psft": naive_psft,
    "gift": lambda case, **options: F.cross_entropy(case.logits, gift_target(case, **options), reduction="none"),
}

OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "sft": {},
    "entropy": {"coef": st.floats(0, 3)},
    "label_smoothing": {"epsilon": st.floats(0, 1)},
    "kd": {"alpha": st.floats(0, 1), "mix": st.sampled_from(["convex", "additive"])},
    "dft": {},
    "asft": {"kl_weight": st.floats(0, 3)},
    "psft": {"clip_high": st.floats(0, 2)},
    "gift": {
        "beta": st.one_of(st.sampled_from(BETAS), st.floats(0, 50)),
        "mode": st.sampled_from(["exact", "floor"]),
        "smooth": st.floats(0, 0.99),
    },
}
NAMES = st.sampled_from(sorted(OPTIONS))


@st.composite
def cases(draw: st.DrawFn, min_vocab: int = 2) -> Case:
    return random_case(draw(st.integers(0, 999)), draw(st.integers(min_vocab, 9)), draw(st.floats(0.1, 12)))


@st.composite
def named_options(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """An objective and some of its options."""
    name = draw(NAMES)
    return name, draw(st.fixed_dictionaries({}, optional=OPTIONS[name]))


def loss_and_gradient(loss: Callable[[Case], Tensor], case: Case) -> tuple[Tensor, Tensor]:
    """Losses [N] and the gradient of their sum with respect to the policy's logits [N, V], in float64."""
    case = case._replace(logits=case.logits.detach().clone().requires_grad_())
    value = loss(case)
    assert value.shape == case.labels.shape
    assert value.dtype == case.logits.dtype
    (gradient,) = torch.autograd.grad(value.sum(), case.logits)
    return value.detach().double(), gradient.double()


def ours(name: str, options: dict[str, Any]) -> Callable[[Case], Tensor]:
    return lambda case: OBJECTIVES[name](stats_of(case), **options)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@settings(max_examples=200, deadline=None)
@given(case=cases(), chosen=named_options())
def test_every_objective_has_the_value_and_gradient_of_its_definition(
    dtype: torch.dtype, tolerance: float, case: Case, chosen: tuple[str, dict[str, Any]]
) -> None:
    name, options = chosen
    found = loss_and_gradient(ours(name, options), case.to(dtype))
    exact = loss_and_gradient(lambda case: NAIVE[name](case, **options), case)
    torch.testing.assert_close(found[0], exact[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[1], exact[1], rtol=tolerance, atol=tolerance / 2)


# The column "gradient" of the page, in terms of distributions [N, V] and of the label's probability [N, 1]
GRADIENTS: dict[str, Callable[..., Tensor]] = {
    "sft": lambda pi, p, y, **_: pi - y,
    "entropy": lambda pi, p, y, coef, **_: pi - y + coef * pi * (pi.log() + Categorical(probs=pi).entropy()[:, None]),
    "label_smoothing": lambda pi, p, y, epsilon, **_: pi - (1 - epsilon) * y - epsilon / pi.shape[1],
    "kd": lambda pi, p, y, alpha, mix, **_: (
        pi - (1 - alpha) * y - alpha * p if mix == "convex" else (1 + alpha) * pi - y - alpha * p
    ),
    "dft": lambda pi, p, y, pi_y, **_: pi_y * (pi - y),
    "asft": lambda pi, p, y, pi_y, kl_weight, **_: pi_y * (pi - y) + kl_weight * (pi - p),
    "psft": lambda pi, p, y, pi_y, old_y, clip_high, **_: pi_y / old_y * (pi_y / old_y <= 1 + clip_high) * (pi - y),
    "gift": lambda pi, p, y, p_y, beta, **_: (
        pi - p / (1 + math.expm1(beta) * p_y) - math.expm1(beta) * p_y / (1 + math.expm1(beta) * p_y) * y
    ),
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in GRADIENTS),
        ("kd", {"mix": "additive"}),
        ("gift", {"beta": 2.0}),
        ("psft", {"clip_high": 0}),
    ],
)
def test_gradients_are_those_of_the_page(name: str, changes: dict[str, Any]) -> None:
    """Not by autograd: which factors carry a gradient, as DFT's and ASFT's pi(y) do not, is written out here."""
    options = OBJECTIVES[name].options | changes
    case = random_case(11, tokens=20)
    pi, p, old = (torch.softmax(logits, -1) for logits in case[:3])
    label_probs = {
        f"{key}_y": part.gather(1, case.labels[:, None]) for key, part in [("pi", pi), ("p", p), ("old", old)]
    }
    exact = GRADIENTS[name](pi, p, F.one_hot(case.labels, case.vocab).double(), **label_probs, **options)
    _, gradient = loss_and_gradient(ours(name, options), case)
    torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# GIFT


@pytest.mark.parametrize("mode", ["exact", "floor"])
@pytest.mark.parametrize("beta", BETAS)
def test_gift_stays_right_for_labels_the_base_model_rules_out(beta: float, mode: str) -> None:
    """log p(y) down to -1200; a float32 logit of that size is good to 1e-4, and so is the loss."""
    case = case_with_ref_logp(0, [-1200.0, -1000.0, -999.0, -300.0, -104.0, -90.0, -25.0, -20.0, 0.0])
    exact = loss_and_gradient(lambda case: NAIVE["gift"](case, beta=beta, mode=mode), case)
    for dtype, tolerance in [(torch.float64, 1e-11), (torch.float32, 1e-4)]:
        found = loss_and_gradient(ours("gift", {"beta": beta, "mode": mode}), case.to(dtype))
        torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["exact", "floor"])
def test_gift_ends_exactly_in_sft_and_distillation(mode: str) -> None:
    case = case_with_ref_logp(2, [-50.0, -7.0, -0.1]).to(torch.float32)
    at_infinity = loss_and_gradient(ours("gift", {"beta": math.inf, "mode": mode, "smooth": 0.1}), case)
    for found, sft in zip(at_infinity, loss_and_gradient(ours("sft", {}), case), strict=True):
        assert torch.equal(found, sft)
    if mode == "exact":
        at_zero = loss_and_gradient(ours("gift", {"beta": 0.0}), case)
        for found, distillation in zip(at_zero, loss_and_gradient(lambda c: stats_of(c).ref_ce, case), strict=True):
            assert torch.equal(found, distillation)


def test_the_released_floor_lifts_improbable_labels_a_hundredfold() -> None:
    """At beta = 20 and p(y) = 1e-12 the authors' code has w = 0.0467 where the paper's formula has 0.0005."""
    logp = torch.tensor([math.log(1e-12)], dtype=torch.float64)
    assert gift_weight(logp, 20.0).item() == pytest.approx(0.0005, abs=5e-5)
    assert gift_weight(floored_logp(logp, 152_064), 20.0).item() == pytest.approx(0.0467, abs=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(logp=st.floats(-1200, 0), smooth=st.floats(0, 0.99), vocab=st.integers(2, 200_000))
def test_the_floored_base_model_in_one_line(dtype: torch.dtype, logp: float, smooth: float, vocab: int) -> None:
    exact = ((1 - smooth) * math.exp(logp) + smooth / vocab + 1e-10) / (1 + vocab * 1e-10)
    found = floored_logp(torch.tensor([logp], dtype=dtype), vocab, smooth)
    assert found.dtype == dtype
    assert found.item() == pytest.approx(
        math.log(exact), rel=8 * torch.finfo(dtype).eps, abs=4 * torch.finfo(dtype).eps
    )


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


@pytest.mark.parametrize("beta", [-1.0, -math.inf, math.nan])
def test_a_meaningless_beta_is_refused(beta: float) -> None:
    for use in (lambda: resolve("gift", {"beta": beta}), lambda: gift_weight(torch.zeros(1), beta)):
        with pytest.raises(UserError, match=r"beta.* must be a number >= 0"):
            use()


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
        case = case_with_ref_logp(4, logp).to(torch.float32)
        identity = torch.eye(case.vocab)
        stats = vocab_stats(
            case.logits.requires_grad_(), identity, case.labels, ref_hidden=case.ref_logits, ref_weight=identity
        )
        loss = OBJECTIVES[name](stats, **options)
        with Products() as products:
            loss.sum().backward()
        return products.total

    assert products([-1.0, -3.0], "gift", beta=20.0) == products([-1.0, -3.0], "sft")
    assert products([-1.0, -9.0], "gift", beta=20.0) == products([-1.0, -9.0], "sft") + 1


# ---------------------------------------------------------------------------------------------------------------------
# PSFT


def test_psft_has_the_gradient_of_sft_at_the_old_policy_and_none_above_the_clip() -> None:
    case = random_case(6)
    at_old = case._replace(old_logits=case.logits)
    loss, gradient = loss_and_gradient(ours("psft", {}), at_old)
    assert loss.tolist() == [-1] * len(loss)
    torch.testing.assert_close(gradient, loss_and_gradient(nll, case)[1], rtol=1e-12, atol=1e-12)
    onehot = F.one_hot(case.labels, case.vocab).double()
    risen = case._replace(logits=case.old_logits + 9 * onehot, old_logits=case.old_logits)
    loss, gradient = loss_and_gradient(ours("psft", {"clip_high": 0.28}), risen)
    clipped = stats_of(risen).logp - stats_of(risen).old_logp > math.log(1.28)
    assert clipped.any()
    assert loss[clipped].tolist() == pytest.approx([-1.28] * int(clipped.sum()))
    assert gradient[clipped].eq(0).all()


def test_psft_stays_finite_however_far_the_policies_are_apart() -> None:
    logp = torch.tensor([-1e4, -1e-9], requires_grad=True)
    stats = VocabStats(logp, logp, logp, old_logp=torch.tensor([-1e-9, -1e4]))
    loss = OBJECTIVES["psft"](stats, clip_high=1e12)
    assert loss.tolist() == pytest.approx([-math.exp(-20), -math.exp(20)])
    loss.sum().backward()
    assert logp.grad.tolist() == [0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# The base model's share of the gradient


@settings(max_examples=150, deadline=None)
@given(case=cases(min_vocab=3), chosen=named_options())
def test_reference_share_is_the_coefficient_of_p_in_the_gradient(
    case: Case, chosen: tuple[str, dict[str, Any]]
) -> None:
    """Measured: two entries of the base model that are not the label swap their probabilities, the gradient moves."""
    name, options = chosen
    entries = (case.labels[:, None] + torch.tensor([[1, 2]])) % case.vocab
    ref_logits = case.ref_logits.scatter(1, entries, torch.tensor([[0.0, 2.0]]).double().expand(len(entries), 2))
    swapped = ref_logits.scatter(1, entries, ref_logits.gather(1, entries.flip(1)))
    before, after = (
        loss_and_gradient(lambda case: NAIVE[name](case, **options), case._replace(ref_logits=logits))[1]
        for logits in (ref_logits, swapped)
    )
    moved = torch.softmax(swapped, -1) - torch.softmax(ref_logits, -1)
    logp = torch.log_softmax(ref_logits, -1).gather(1, case.labels[:, None])[:, 0]
    share = OBJECTIVES[name].reference_share(logp, vocab_size=case.vocab, **options)
    assert share.shape == logp.shape
    torch.testing.assert_close(before - after, share[:, None] * moved, rtol=1e-6, atol=1e-12)


def test_reference_share_in_known_cases_and_where_gradients_are_off() -> None:
    logp = torch.tensor([[-1200.0, -20.0, 0.0]])
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            share = OBJECTIVES["gift"].reference_share(logp.clone())
            assert not share.requires_grad
            assert share.dtype == logp.dtype
            assert share[0].tolist() == pytest.approx([1, 0.5, math.exp(-20)], rel=1e-6)
    assert OBJECTIVES["gift"].reference_share(logp, beta=0.0).tolist() == [[1, 1, 1]]
    assert OBJECTIVES["gift"].reference_share(logp, beta=math.inf).tolist() == [[0, 0, 0]]
    assert OBJECTIVES["asft"].reference_share(logp, kl_weight=0.5).tolist() == [[0.5, 0.5, 0.5]]
    assert OBJECTIVES["kd"].reference_share(logp, alpha=0.25).tolist() == [[0.25, 0.25, 0.25]]
    for name in ("sft", "psft"):
        assert OBJECTIVES[name].reference_share(logp).tolist() == [[0, 0, 0]]


# ---------------------------------------------------------------------------------------------------------------------
# Infinities


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


@pytest.mark.parametrize(
    ("name", "options", "logp", "ref_ce", "expected"),
    [
        ("dft", {}, -math.inf, 1.0, 0.0),
        ("asft", {"kl_weight": 0.0}, -math.inf, math.inf, 0.0),
        ("kd", {"alpha": 0.0}, -2.0, math.inf, 2.0),
        ("kd", {"alpha": 1.0}, -math.inf, 3.0, 2.5),
        ("label_smoothing", {"epsilon": 1.0}, -math.inf, 1.0, 0.75),
        ("gift", {"beta": math.inf, "mode": "floor"}, -2.0, math.inf, 2.0),
        ("kd", {}, -2.0, math.inf, math.inf),
    ],
)
def test_a_term_without_weight_may_be_infinite(
    name: str, options: dict[str, Any], logp: float, ref_ce: float, expected: float
) -> None:
    """A masked label has logp -inf, a base model that allows a masked entry has ref_ce inf."""
    student = [torch.tensor([value], requires_grad=True) for value in (logp, 0.5, -0.75, ref_ce)]
    stats = VocabStats(*student, torch.tensor([-3.0]), torch.tensor([0.5]), vocab_size=5)
    loss = OBJECTIVES[name](stats, **options)
    assert loss.item() == expected
    grads = torch.autograd.grad(loss.sum(), student, allow_unused=True)
    assert all(grad is None or grad.isfinite().all() for grad in grads)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes name objectives


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gfit", {}, r"unknown objective 'gfit' \(did you mean 'gift'\?\); objectives: sft, entropy, .*, gift$"),
        ("gift", {"bta": 1.0}, r"'gift' has no option 'bta' \(did you mean 'beta'\?\); it has: beta, mode, smooth$"),
        ("sft", {"beta": 1.0}, "objective 'sft' has no option 'beta'; it has: none$"),
        ("gift", {"beta": "20"}, "option 'beta' of objective 'gift' must be a number, got '20'"),
        ("gift", {"beta": True}, "must be a number, got True"),
        (
            "gift",
            {"mode": "flor"},
            r"option 'mode' of objective 'gift' must be one of exact, floor, got 'flor' \(did y",
        ),
        ("gift", {"mode": 1.0}, r"must be one of exact, floor, got 1\.0$"),
        ("gift", {"smooth": 1.0}, r"option 'smooth' of objective 'gift' must be a number >= 0 and < 1, got 1\.0"),
        ("kd", {"mix": "additve"}, r"must be one of convex, additive, got 'additve' \(did you mean 'additive'\?\)"),
        ("kd", {"alpha": 1.5}, r"option 'alpha' of objective 'kd' must be a number from 0 to 1, got 1\.5"),
        ("label_smoothing", {"epsilon": -0.1}, "must be a number from 0 to 1, got -0.1"),
        ("entropy", {"coef": math.inf}, "must be a finite number >= 0, got inf"),
        ("asft", {"kl_weight": math.nan}, "must be a finite number >= 0, got nan"),
        ("psft", {"clip_high": -0.2}, "must be a finite number >= 0, got -0.2"),
    ],
)
def test_a_mistaken_objective_or_option_is_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(name, options)
    with pytest.raises(UserError, match=message):
        warnings_for(name, options)


def test_objectives_called_by_name_check_their_options_too() -> None:
    with pytest.raises(UserError, match="one of convex, additive"):
        OBJECTIVES["kd"](stats_of(random_case(0)), mix="sum")
    with pytest.raises(UserError, match="must be a number >= 0"):
        OBJECTIVES["gift"].reference_share(torch.zeros(1), beta=-1.0)


def test_resolve_sets_the_options() -> None:
    case = case_with_ref_logp(5, [-30.0, -8.0])
    for options in ({"beta": 9}, {"beta": 9.0, "mode": "floor"}, {}):
        exact = NAIVE["gift"](case, **options)
        torch.testing.assert_close(resolve("gift", options)(stats_of(case)), exact, rtol=1e-12, atol=1e-12)


def test_what_each_objective_needs() -> None:
    assert list(OBJECTIVES) == ["sft", "entropy", "label_smoothing", "kd", "dft", "asft", "psft", "gift"]
    case = random_case(7)
    stats = stats_of(case)
    without_base = replace(stats, ref_ce=None, ref_logp=None, ref_entropy=None)
    without_old = replace(stats, old_logp=None)
    for name, objective in OBJECTIVES.items():
        assert objective.needs_reference == needs_reference(name) == (name in {"kd", "asft", "gift"})
        assert objective.needs_old_policy == (name == "psft")
        for missing, needed, message in (
            (without_base, objective.needs_reference, "needs the reference model"),
            (without_old, objective.needs_old_policy, "needs the old policy"),
        ):
            if needed:
                with pytest.raises(ValueError, match=message):
                    objective(missing)
            else:
                assert torch.equal(objective(missing), objective(stats))
    with pytest.raises(ValueError, match="needs vocab_size for mode 'floor'"):
        OBJECTIVES["gift"](replace(stats, vocab_size=None), mode="floor")
    with pytest.raises(UserError, match="unknown objective"):
        needs_reference("nothing")


@pytest.mark.parametrize(
    ("name", "options", "warning", "same_as"),
    [
        ("entropy", {"coef": 0}, "plain SFT", nll),
        ("label_smoothing", {"epsilon": 0.0}, "plain SFT", nll),
        ("kd", {"alpha": 0.0}, "plain SFT", nll),
        ("kd", {"alpha": 0.0, "mix": "additive"}, "plain SFT", nll),
        ("kd", {"alpha": 1.0}, "distillation of the base model", kl),
        ("asft", {"kl_weight": 0.0}, "is DFT", naive_dft),
        ("gift", {"beta": math.inf}, "plain SFT", nll),
        ("gift", {"beta": 0.0}, "distillation of the base model", kl),
        ("psft", {}, "one update per batch has the gradient of plain SFT", nll),
    ],
)
def test_settings_that_turn_an_objective_into_another_are_told(
    name: str, options: dict[str, Any], warning: str, same_as: Callable[[Case], Tensor]
) -> None:
    (message,) = warnings_for(name, options, updates_per_batch=1)
    assert re.search(f"^{name} .*{warning}", message)
    case = random_case(8)
    case = case._replace(old_logits=case.logits)  # one update per batch
    _, gradient = loss_and_gradient(ours(name, options), case)
    torch.testing.assert_close(gradient, loss_and_gradient(same_as, case)[1], rtol=1e-12, atol=1e-12)


def test_sound_settings_cause_no_warning() -> None:
    for name in OBJECTIVES:
        assert warnings_for(name, {}, updates_per_batch=8) == []
    assert warnings_for("kd", {"alpha": 1.0, "mix": "additive"}) == []
    assert warnings_for("gift", {"smooth": 0.01, "mode": "floor"}) == []
    (ignored,) = warnings_for("gift", {"smooth": 0.01})
    assert "ignores smooth in mode 'exact'" in ignored


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_the_page_names_every_objective_option_and_default() -> None:
    sections = {part.partition("\n")[0]: part for part in PAGE.read_text(encoding="utf-8").split("\n### ")[1:]}
    for name, objective in OBJECTIVES.items():
        (section,) = (text for title, text in sections.items() if f"`{name}`" in title)
        for option, default in objective.options.items():
            assert f"`{option}={default}`" in section, (name, option)


def test_the_page_shows_the_right_weights() -> None:
    rows = re.findall(r"^\| 1e(-\d+) \|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 10
    for exponent, cells in rows:
        p = 10.0 ** int(exponent)
        odds = [math.expm1(beta) * q for beta in (10, 20) for q in (p, (p + 1e-10) / (1 + 152_064e-10))]
        for shown, odd in zip(cells.split("|"), odds, strict=True):
            assert float(shown) == pytest.approx(odd / (1 + odd), abs=5.1e-5, rel=5e-4)
