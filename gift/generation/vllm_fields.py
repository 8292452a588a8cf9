"""What vLLM calls things, the same in its Python interface and in its server's requests and replies."""

from __future__ import annotations

from typing import Any

from gift.generation import Request, SamplingParams


def sampling_fields(request: Request, limit: int, params: SamplingParams) -> dict[str, Any]:
    """A request's sampling parameters under vLLM's names; guard and log-probabilities differ between the interfaces."""
    return {
        "seed": request.seed,
        "max_tokens": limit,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "stop": list(params.stop),
        "stop_token_ids": list(params.stop_ids),
        "ignore_eos": params.ignore_end,
        "skip_special_tokens": False,  # in the text that is searched for stop strings
    }


def guard_fields(params: SamplingParams) -> dict[str, int] | None:
    """The repetition guard under vLLM's names."""
    guard = params.repetition_guard
    return None if guard is None else {"max_pattern_size": guard.max_pattern, "min_count": guard.count}
