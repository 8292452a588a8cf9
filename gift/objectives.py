"""The objectives of stage 1: plain functions of a few numbers per token (`gift.vocab.VocabStats`), by name.

An objective is a function of the statistics that returns the loss of every token [N] in nats; its options are
keyword-only numbers or words with defaults. `@objective(name)` enters it in OBJECTIVES, and recipes can name it from
then on. Formulas, gradients, sources and what each test checks: docs/objectives.md.

Notation: pi is the policy being trained, p the frozen base model, y the label, sg a factor held constant. All KL
divergences are KL(p || pi), over the whole vocabulary. Defaults are those of arXiv 2601.09233, Appendix E, where it
has them, else those of the method's authors; docstrings say what the paper leaves open.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from gift.cli import UserError, nearest
from gift.vocab import VocabStats

T = TypeVar("T")
FLOOR = 1e-10  # what the authors' released GIFT adds to every probability of the base model
LOG_RATIO_LIMIT = 20.0  # of PSFT, as in verl: keeps the ratio finite


@dataclass(frozen=True)
class Allowed:
    """Annotates an option with the numbers it may be; NaN must fail `holds`."""

    description: str
    holds: Callable[[float], bool]


Weight = Annotated[float, Allowed("a finite number >= 0", lambda value: 0 <= value < math.inf)]
Fraction = Annotated[float, Allowed("a number from 0 to 1", lambda value: 0 <= value <= 1)]
FractionBelowOne = Annotated[float, Allowed("a number >= 0 and < 1", lambda value: 0 <= value < 1)]
InverseTemperature = Annotated[float, Allowed("a number >= 0 (.inf is SFT)", lambda value: value >= 0)]


@dataclass(frozen=True)
class Objective:
    """A registered objective; call it as the function it wraps: `OBJECTIVES["gift"](stats, beta=20.0)` -> [N]."""

    name: str
    function: Callable[..., Tensor]
    needs_reference: bool
    """Whether it reads the base model's statistics: ref_ce, ref_logp, ref_entropy."""
    needs_old_policy: bool
    """Whether it reads old_logp."""

    def __call__(self, stats: VocabStats, **options: float | str) -> Tensor:
        self.check(options)
        return self.function(stats, **options)

    @property
    def options(self) -> dict[str, Any]:
        """The options' names and defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def reference_share(self, ref_logp: Tensor, *, vocab_size: int | None = None, **options: float | str) -> Tensor:
        """The factor c of the base model in the gradient: d loss / d logits = ... - c p, for every token.

        An error of p that is e in total variation moves the gradient by 2 c e in the L1 norm. It is the derivative of
        the loss with respect to ref_ce, taken where all other statistics are 0; so an objective whose factor depends
        on the policy as well (none here) has no business with a cached reference.

        ref_logp: log p(y), any shape, nats; `vocab_size` is needed by GIFT's mode 'floor'. Returns the same shape;
        zeros for an objective without reference.
        """
        self.check(options)
        with torch.inference_mode(False), torch.enable_grad():
            zero = torch.zeros_like(ref_logp)
            student, ref_ce = zero.clone().requires_grad_(), zero.clone().requires_grad_()
            stats = VocabStats(student, student, student, ref_ce, ref_logp.clone(), zero, zero, vocab_size)
            (share,) = torch.autograd.grad(self.function(stats, **options).sum(), ref_ce, allow_unused=True)
        return zero if share is None else share

    def check(self, options: Mapping[str, float | str]) -> None:
        """Raises UserError for an option that is not one, naming the nearest, and for a value it cannot have."""
        for option, value in options.items():
            if option not in self.options:
                known = ", ".join(self.options) or "none"
                guess = nearest(option, self.options)
                raise UserError(f"objective {self.name!r} has no option {option!r}{guess}; it has: {known}")
            hint, what = self._hints.get(option, float), f"option {option!r} of objective {self.name!r}"
            if get_origin(hint) is Literal:
                if value not in get_args(hint):
                    guess = nearest(str(value), get_args(hint))
                    raise UserError(f"{what} must be one of {', '.join(get_args(hint))}, got {value!r}{guess}")
            elif isinstance(value, bool) or not isinstance(value, (int, float)):
                raise UserError(f"{what} must be a number, got {value!r}")
            for allowed in getattr(hint, "__metadata__", ()):
                if not allowed.holds(value):
                    raise UserError(f"{what} must be {allowed.description}, got {value!r}")

    @functools.cached_property
    def _hints(self) -> dict[str, Any]:
        return get_type_hints(self.function, include_extras=True)


OBJECTIVES: dict[str, Objective] = {}


def objective(
    name: str, *, needs_reference: bool = False, needs_old_policy: bool = False
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Enters the decorated function in OBJECTIVES, and says which statistics it reads besides the policy's own.

    Options are annotated as one of the ranges above or a Literal of words; any other annotation allows any number.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        OBJECTIVES[name] = Objective(name, function, needs_reference, needs_old_policy)
        return function

    return register


# ---------------------------------------------------------------------------------------------------------------------
# The objectives


@objective("sft")
def sft(stats: VocabStats) -> Tensor:
    """Cross-entropy with the demonstration: -log pi(y)."""
    return -stats.logp


@objective("entropy")
def entropy(stats: VocabStats, *, coef: Weight = 0.01) -> Tensor:
    """SFT with an entropy bonus: -log pi(y) - coef H(pi). Default: paper, Appendix E.1 (its lambda)."""
    return -stats.logp - coef * stats.entropy


@objective("label_smoothing")
def label_smoothing(stats: VocabStats, *, epsilon: Fraction = 0.01) -> Tensor:
    """Cross-entropy with (1 - epsilon) onehot(y) + epsilon/V, torch's definition. Default: paper, Appendix E.1."""
    return _scaled(1 - epsilon, -stats.logp) - epsilon * stats.mean_logp


@objective("kd", needs_reference=True)
def kd(stats: VocabStats, *, alpha: Fraction = 0.1, mix: Literal["convex", "additive"] = "convex") -> Tensor:
    """SFT with distillation of the base model: k (-log pi(y)) + alpha KL(p || pi). alpha: paper, Appendix E.1.

    The paper states neither the KL's direction nor k. Forward KL is that of the authors' GIFT code and of ASFT. With
    mix 'convex' k = 1 - alpha (torchtune's convention), with 'additive' k = 1 (ASFT's mode sft+kl).
    """
    label_share = 1 - alpha if mix == "convex" else 1.0
    return _scaled(label_share, -stats.logp) + _scaled(alpha, _kl_from_base(stats))


@objective("dft")
def dft(stats: VocabStats) -> Tensor:
    """Dynamic fine-tuning: sg(pi(y)) (-log pi(y)). yongliang-wu/DFT, verl/verl/trainer/fsdp_dft_trainer.py."""
    return _scaled(stats.logp.detach().exp(), -stats.logp)


@objective("asft", needs_reference=True)
def asft(stats: VocabStats, *, kl_weight: Weight = 0.05) -> Tensor:
    """Anchored SFT: DFT + kl_weight KL(p || pi). zhuchichi56/ASFT, train_v2.py.

    The default is that of the command its README recommends; its code and LLaMA-Factory default to 0.1.
    """
    return dft(stats) + _scaled(kl_weight, _kl_from_base(stats))


@objective("psft", needs_old_policy=True)
def psft(stats: VocabStats, *, clip_high: Weight = 0.28) -> Tensor:
    """Proximal SFT: -min(r, 1 + clip_high), r = pi(y) / pi_old(y), which is PPO with every advantage 1.

    zwhong714/PSFT, recipe/psft and verl's core_algos.py: the log-ratio is clamped to [-20, 20]; the lower clip of PPO
    and its dual clip never bite where the advantage is positive. pi_old is the policy at the beginning of a batch that
    several updates share; with one update r is 1 and the gradient SFT's.
    """
    log_ratio = stats.logp - _given(stats.old_logp, "the old policy's old_logp")
    return -log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().clamp(max=1 + clip_high)


@objective("gift", needs_reference=True)
def gift(
    stats: VocabStats,
    *,
    beta: InverseTemperature = 20.0,
    mode: Literal["exact", "floor"] = "exact",
    smooth: FractionBelowOne = 0.0,
) -> Tensor:
    """Cross-entropy with the target softmax(log p + beta onehot(y)), arXiv 2601.09233, Algorithm 1, lines 8-10.

    The target is (1 - w) p + w onehot(y) with w = `gift_weight`. The inverse temperature beta (default: the paper's
    for Qwen; 10 for Llama) goes from distillation of the base model, exactly CE(p, pi) at 0, to exactly SFT at
    infinity. Mode 'exact' is the paper's formula. 'floor' is the authors' released code, which mixes p with `smooth`
    of the uniform distribution (their smooth_lambda) and adds 1e-10 to every p(v) (`floored_logp`).
    """
    base_logp, base_ce = _given(stats.ref_logp), _given(stats.ref_ce)
    if mode == "floor":
        base_logp, base_ce = _floored(base_logp, base_ce, stats, smooth)
    log_odds = gift_log_odds(base_logp, beta)
    return _scaled(torch.sigmoid(-log_odds), base_ce) + _scaled(torch.sigmoid(log_odds), -stats.logp)


def gift_weight(ref_logp: Tensor, beta: float) -> Tensor:
    """w in [0, 1]: how much of GIFT's target lies on the demonstration itself rather than on the base model.

    ref_logp: log p(y), any shape, nats; for mode 'floor', that of `floored_logp`. w is 1/2 where p(y) is about
    e^-beta. Raises UserError for beta < 0 or NaN.
    """
    return torch.sigmoid(gift_log_odds(ref_logp, beta))


def label_weight(stats: VocabStats, *, beta: float = 20.0, mode: str = "exact", smooth: float = 0.0) -> Tensor:
    """`gift_weight` of each token [N] under these options of the objective `gift`."""
    base_logp = _given(stats.ref_logp)
    if mode == "floor":
        base_logp = floored_logp(base_logp, _given(stats.vocab_size, "vocab_size for mode 'floor'"), smooth)
    return gift_weight(base_logp, beta)


def gift_log_odds(ref_logp: Tensor, beta: float) -> Tensor:
    """log(w / (1 - w)) = log((e^beta - 1) p(y)), without overflow. Take 1 - w as the sigmoid of its negative."""
    if not beta >= 0:
        raise UserError(f"beta must be a number >= 0 (.inf for SFT), got {beta}")
    if beta in (0, math.inf):
        return torch.full_like(ref_logp, math.inf if beta else -math.inf)
    return ref_logp + (beta + math.log(-math.expm1(-beta)))


def floored_logp(ref_logp: Tensor, vocab_size: int, smooth: float = 0.0) -> Tensor:
    """log p'(y) of the base model that mode 'floor' sees, p' = ((1 - smooth) p + smooth/V + FLOOR) / (1 + V FLOOR).

    ref_logp: log p(y), any shape, nats. zzy1127/GIFT, verl/verl/trainer/fsdp_gift_trainer.py.
    """
    added = torch.full_like(ref_logp, math.log(smooth / vocab_size + FLOOR))
    return torch.logaddexp(ref_logp + math.log1p(-smooth), added) - math.log1p(vocab_size * FLOOR)


def _floored(ref_logp: Tensor, ref_ce: Tensor, stats: VocabStats, smooth: float) -> tuple[Tensor, Tensor]:
    """log p'(y) and CE(p', pi) of `floored_logp`'s p'."""
    size = _given(stats.vocab_size, "vocab_size for mode 'floor'")
    ce = ((1 - smooth) * ref_ce - (smooth + size * FLOOR) * stats.mean_logp) / (1 + size * FLOOR)
    return floored_logp(ref_logp, size, smooth), ce


def _kl_from_base(stats: VocabStats) -> Tensor:
    """KL(p || pi)."""
    return _given(stats.ref_ce) - _given(stats.ref_entropy)


def _scaled(factor: Tensor | float, value: Tensor) -> Tensor:
    """factor * value, and 0 where the factor is 0 even if the value is infinite; the same for the gradient."""
    factor = torch.zeros_like(value) + factor
    return torch.where(factor > 0, factor * value, 0.0)


def _given(value: T | None, what: str = "the reference model") -> T:
    if value is None:
        raise ValueError(f"this objective needs {what}, and the statistics have none")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Recipes name objectives


def needs_reference(name: str) -> bool:
    """Whether the objective `name` needs the base model during training. Raises UserError for an unknown name."""
    return _lookup(name).needs_reference


def resolve(name: str, options: Mapping[str, float | str]) -> Callable[[VocabStats], Tensor]:
    """The objective `name` with its options set: a function from statistics to losses [N].

    Raises UserError for an unknown name, option or word, naming the nearest known one, and for a value out of range.
    """
    found = _lookup(name)
    found.check(options)
    return functools.partial(found.function, **options)


def warnings_for(name: str, options: Mapping[str, float | str], *, updates_per_batch: int = 1) -> list[str]:
    """What to tell a user whose settings turn the objective into another one: one line each, none for sound settings.

    Raises UserError where `resolve` does.
    """
    resolve(name, options)
    settings = {**OBJECTIVES[name].options, **options}
    same = None
    match name, settings:
        case (
            ("entropy", {"coef": 0})
            | ("label_smoothing", {"epsilon": 0})
            | ("kd", {"alpha": 0})
            | ("gift", {"beta": math.inf})
        ):
            same = "plain SFT"
        case "asft", {"kl_weight": 0}:
            same = "DFT"
        case ("kd", {"alpha": 1, "mix": "convex"}) | ("gift", {"beta": 0}):
            same = "distillation of the base model, blind to the demonstrations"
    found = []
    if same:
        given = ", ".join(f"{option}={value}" for option, value in settings.items())
        found.append(f"{name} with {given} is {same}")
    if OBJECTIVES[name].needs_old_policy and updates_per_batch == 1:
        found.append(
            f"{name} with one update per batch has the gradient of plain SFT: set updates_per_batch (its authors: 8)"
        )
    if name == "gift" and settings["mode"] == "exact" and settings["smooth"]:
        found.append("gift ignores smooth in mode 'exact': set mode to 'floor' to reproduce the authors' code")
    return found


def _lookup(name: str) -> Objective:
    if name not in OBJECTIVES:
        raise UserError(f"unknown objective {name!r}{nearest(name, OBJECTIVES)}; objectives: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
