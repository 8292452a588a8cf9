"""The transformers engine: a compact sampling loop over any decoder with full attention; needs nothing beside torch.

Against `generate`: a prompt is prefilled once for all its samples and nothing is padded on the left; rows that end
leave the batch and waiting ones enter; keys and values are written in place and never repeated for the query heads
that share them; and each sample draws from its own stream, so that neither batch size nor order changes what is sampled
(up to rounding in the matrix products).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift.cli import UserError
from gift.generation import Engine, GenerationError, Request, Sample, SamplingParams, check_request
from gift.generation.loop import Loop, Row
from gift.generation.store import prompt_batches, right_padded
from gift.lora import merged_state
from gift.models import first_line, lm_head, logit_map, states_at
from gift.vocab import vocab_stats

SCORE_TOKENS = 8192  # of a batch of scoring, padding included
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory")  # what torch says of a CPU's


class HFEngine(Engine):
    """Samples from a transformers model in this process.

    The model is used as it is, not copied: a trainer's module that changes in place needs no `update_weights`. The
    tokenizer is for stop strings alone. `cache_gb`, in 1e9 bytes, bounds the keys and values of all rows in progress
    at their limits, `max_rows` their number; a single row may exceed it. Batches follow from the requests and these
    settings alone.

    Raises UserError for an architecture whose attention this engine would get wrong.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        cache_gb: float = 4.0,
        max_rows: int = 512,
    ) -> None:
        check_attention(model)
        self.model = model
        self.tokenizer = tokenizer
        self.cache_gb = cache_gb
        self.max_rows = max_rows
        self.max_model_len = model.config.max_position_embeddings

    def stream(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[tuple[int, Sample]]:
        if params.stop and self.tokenizer is None:
            raise UserError("stop strings need the model's tokenizer, and this engine was given none")
        limits = [check_request(number, asked, params, self.max_model_len) for number, asked in enumerate(requests)]
        rows = [Row(number, asked, limit) for number, (asked, limit) in enumerate(zip(requests, limits, strict=True))]
        with self._model():
            loop = Loop(
                self.model,
                rows,
                params,
                tokenizer=self.tokenizer,
                cache_bytes=1e9 * self.cache_gb,
                max_rows=self.max_rows,
            )
        while loop.unfinished:
            # The model is given back before each sample: its owner may use it then, and may never ask for the next.
            with self._model():
                ended = loop.step()
            yield from ended

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        for number, sequence in enumerate(sequences):
            if not 1 <= len(sequence) <= self.max_model_len:
                raise UserError(
                    f"sequence {number} has {len(sequence)} tokens; the model's window is {self.max_model_len}"
                )
        found: dict[tuple[int, ...], list[float]] = {}
        for batch in prompt_batches(sorted(set(sequences), key=len), SCORE_TOKENS, padding=SCORE_TOKENS):
            with self._model():
                found.update(zip(batch, self._score(batch), strict=True))
        return [found[sequence] for sequence in sequences]

    def update_weights(self, model: PreTrainedModel) -> None:
        """Copies the weights of `model`, adapters merged, unless it is the very model this engine samples from.

        Raises UserError where they do not fit.
        """
        if model is self.model:
            return
        try:
            self.model.load_state_dict(merged_state(model, model.state_dict()))
        except RuntimeError as error:
            raise UserError(f"these weights do not fit the engine's model: {first_line(error)}") from error

    def close(self) -> None:
        """Nothing to free: the model belongs to the caller."""

    # -----------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _model(self) -> Iterator[None]:
        """Inside, the model evaluates; afterwards it is as it was. Raises GenerationError where memory runs out."""
        was_training = self.model.training
        try:
            if was_training:
                self.model.eval()
            with torch.inference_mode():
                yield
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in OUT_OF_MEMORY):
                raise GenerationError(
                    "out of memory while generating: lower generation.cache_gb or generation.max_rows"
                ) from error
            raise
        finally:
            if was_training:
                self.model.train()

    def _score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """The scores of a batch."""
        ids = right_padded(sequences, self.model.device)
        counts = [len(sequence) - 1 for sequence in sequences]
        known = torch.arange(ids.shape[1], device=ids.device) < torch.tensor(counts, device=ids.device)[:, None]
        states = states_at(self.model, ids, None, known)  # where the next token is given
        weight, bias = lm_head(self.model)
        stats = vocab_stats(states, weight, ids[:, 1:][known[:, :-1]], bias=bias, **logit_map(self.model))
        return [logps.tolist() for logps in stats.logp.split(counts)]


def check_attention(model: PreTrainedModel) -> None:
    """Raises UserError unless every layer attends to all earlier positions, through torch's own kernels.

    The engine's masks know no sliding windows, and padding without a mask takes causal kernels.
    """
    config = model.config
    window = getattr(config, "sliding_window", None) or math.inf
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"} or window < config.max_position_embeddings:
        raise UserError(
            f"{config.model_type}: the hf engine handles full attention only, not sliding windows or states"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    short = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if rope.get("rope_type") == "longrope" and short < config.max_position_embeddings:
        raise UserError(
            f"{config.model_type}: the hf engine cannot serve LongRoPE, whose rotations change for a whole batch"
            f" once one of its sequences has more than {short} tokens"
        )
    if config._attn_implementation != "sdpa":
        raise UserError(
            f"the hf engine needs attention 'sdpa', this model is loaded with {config._attn_implementation!r}"
        )
