"""The objectives of stage 1: plain functions of a few numbers per token (`gift.vocab.VocabStats`), by name.

An objective is a function of the statistics that returns the loss of every token [N] in nats; its options are
keyword-only numbers with defaults. `@objective(name, needs_reference=...)` enters it in OBJECTIVES, and recipes can
name it from then on. Notation: pi is the policy being trained, p the frozen base model, y the label.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gift.cli import UserError, nearest
from gift.vocab import VocabStats


@dataclass(frozen=True)
class Objective:
    """A registered objective; call it as the function it wraps: `OBJECTIVES["gift"](stats, beta=20.0)` -> [N]."""

    name: str
    function: Callable[..., Tensor]
    needs_reference: bool

    def __call__(self, stats: VocabStats, **options: float) -> Tensor:
        return self.function(stats, **options)

    @property
    def options(self) -> dict[str, Any]:
        """The options' names and defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


OBJECTIVES: dict[str, Objective] = {}


def objective(name: str, *, needs_reference: bool = False) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Enters the decorated function in OBJECTIVES; `needs_reference` if it reads the statistics of the base model."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        OBJECTIVES[name] = Objective(name, function, needs_reference)
        return function

    return register


# ---------------------------------------------------------------------------------------------------------------------
# The objectives


@objective("sft")
def sft(stats: VocabStats) -> Tensor:
    """Cross-entropy with the demonstration: -log pi(y)."""
    return -stats.logp


@objective("gift", needs_reference=True)
def gift(stats: VocabStats, *, beta: float = 20.0) -> Tensor:
    """Cross-entropy with the target softmax(log p + beta onehot(y)), arXiv 2601.09233, Algorithm 1, lines 8-10.

    The target is (1 - w) p + w onehot(y) with w = `gift_weight`. The inverse temperature beta >= 0 (default: the
    paper's for Qwen) goes from distillation of the base model, exactly CE(p, pi) at 0, to exactly SFT at infinity.
    The authors' code adds 1e-10 to every p(v), which the paper does not have; neither has this.
    """
    log_odds = gift_log_odds(_given(stats.ref_logp), beta)
    return _scaled(torch.sigmoid(-log_odds), _given(stats.ref_ce)) - _scaled(torch.sigmoid(log_odds), stats.logp)


def gift_weight(ref_logp: Tensor, beta: float) -> Tensor:
    """w in [0, 1]: how much of GIFT's target lies on the demonstration itself rather than on the base model.

    ref_logp: log p(y), any shape, nats. w is 1/2 where p(y) is about e^-beta. Raises UserError for beta < 0 or NaN.
    """
    return torch.sigmoid(gift_log_odds(ref_logp, beta))


def gift_log_odds(ref_logp: Tensor, beta: float) -> Tensor:
    """log(w / (1 - w)) = log((e^beta - 1) p(y)), without overflow. Take 1 - w as the sigmoid of its negative."""
    if not beta >= 0:
        raise UserError(f"beta must be a number >= 0 (.inf for SFT), got {beta}")
    if beta in (0, math.inf):
        return torch.full_like(ref_logp, math.inf if beta else -math.inf)
    return ref_logp + (beta + math.log(-math.expm1(-beta)))


def _scaled(factor: Tensor, value: Tensor) -> Tensor:
    """factor * value, and 0 where the factor is 0 even if the value is infinite; the same for the gradient."""
    return torch.where(factor > 0, factor * value, 0.0)


def _given(statistic: Tensor | None) -> Tensor:
    if statistic is None:
        raise ValueError("this objective needs the reference model: give ref_hidden and ref_weight to vocab_stats")
    return statistic


# ---------------------------------------------------------------------------------------------------------------------
# Recipes name objectives


def needs_reference(name: str) -> bool:
    """Whether the objective `name` needs the base model during training. Raises UserError for an unknown name."""
    return _lookup(name).needs_reference


def resolve(name: str, options: Mapping[str, float]) -> Callable[[VocabStats], Tensor]:
    """The objective `name` with its options set: a function from statistics to losses [N].

    Raises UserError for an unknown name or option, naming the nearest known one, and for a value out of range.
    """
    found = _lookup(name)
    for option, value in options.items():
        if option not in found.options:
            known = ", ".join(found.options) or "none"
            raise UserError(
                f"objective {name!r} has no option {option!r}{nearest(option, found.options)}; it has: {known}"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"option {option!r} of objective {name!r} must be a number, got {value!r}")
    function = functools.partial(found.function, **options)
    function(VocabStats(*torch.zeros(6, 0)))  # no tokens: brings to light values that are out of range
    return function


def _lookup(name: str) -> Objective:
    if name not in OBJECTIVES:
        raise UserError(f"unknown objective {name!r}{nearest(name, OBJECTIVES)}; objectives: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
