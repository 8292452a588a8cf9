"""The server engine: a client of a vLLM server, on this machine or another.

    vllm serve CHECKPOINT --logprobs-mode processed_logprobs

One HTTP request is one sample, with its own seed and with token ids both ways, which OpenAI's protocol lacks and vLLM's
`return_token_ids` adds. RL hands its weights over as a safetensors file in a folder that both machines see, through
vLLM's development endpoints (VLLM_SERVER_DEV_MODE=1 in the server's environment). With each goes a version, by which
weights that are not the last ones sent are noticed: the server was restarted, or another run has used it. On a CPU the
server also needs --no-enable-chunked-prefill: a seed and a prompt computed in pieces make vLLM 0.32 end there.
"""

from __future__ import annotations

import re
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from gift.cli import UserError
from gift.generation import Engine, GenerationError, Request, Sample, SamplingParams, StaleWeightsError, check_request
from gift.generation.client import Calls, Client, CutConnectionError, RefusedRequestError, in_parallel, one_line
from gift.generation.vllm_fields import guard_fields, sampling_fields
from gift.lora import merged_state
from gift.models import load_config
from gift.recipe import Generation
from gift.records import atomic_path, remove
from gift.states import disk_errors

TRIES = 3
PAUSE_S = 0.5  # before the second try; twice that before the third
LARGEST = sys.float_info.max
START_VERSION = "default"  # vLLM's, of the weights it was started with
NEUTRAL = {  # what vLLM would otherwise take from the model's generation_config.json
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class ServerEngine(Engine):
    """The vLLM server at `settings.url`.

    With a `checkpoint`, it must be that one which the server serves: under its path, or under its folder's name as
    --served-model-name. `version` names the weights it is to sample from; after rank 0's `update_weights`, the engines
    of other ranks take over rank 0's. Raises UserError for a server with another model, GenerationError for none.
    """

    def __init__(self, settings: Generation, checkpoint: Path | None = None) -> None:
        self._client = Client(settings.url or "")
        self._url = self._client.url
        self._settings = settings
        self._model, self.max_model_len = self._served(checkpoint)
        config = None if checkpoint is None else load_config(checkpoint)
        self._model_window: int = getattr(config, "max_position_embeddings", self.max_model_len)
        self._logps_checked = False
        self._handed_over: Path | None = None
        self.version = START_VERSION

    @property
    def model_window(self) -> int:
        """The window that the checkpoint's config names; the server's where there is no checkpoint."""
        return self._model_window

    def stream(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[tuple[int, Sample]]:
        """The requests' numbers and samples, as they finish. Abandoning it half-way ends what is under way."""
        jobs = [(request, self._limit(number, request, params)) for number, request in enumerate(requests)]
        if not jobs:
            return
        self._check_version()
        if params.logps:
            self._check_logps()
        yield from in_parallel(lambda job, calls: self._sample(*job, params, calls), jobs, self._settings.max_rows)

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """Log-probabilities of each sequence's tokens but the first. Raises UserError for one beyond the window."""
        for number, sequence in enumerate(sequences):
            if len(sequence) > self.max_model_len:
                raise UserError(
                    f"sequence {number}: {len(sequence)} tokens do not fit the server's window of {self.max_model_len}"
                )
        if sequences:
            self._check_version()
            self._check_logps()
        found = dict(in_parallel(self._score, sequences, self._settings.max_rows))
        return [found[number] for number in range(len(sequences))]

    def update_weights(self, model: PreTrainedModel) -> None:
        """Writes the weights into `settings.shared_folder` and has the server load them and drop its prefix cache.

        Only the last weights are kept there. One rank calls this. Raises UserError where the folder is missing or full
        or the server lacks the endpoints, GenerationError where it did not load them.
        """
        if self._settings.shared_folder is None or not Path(self._settings.shared_folder).is_dir():
            raise UserError(
                "generation.shared_folder: the server takes new weights from a folder that this machine and its own"
                f" see under one path; {self._settings.shared_folder or 'none'} is not such a folder"
            )
        shared = Path(self._settings.shared_folder).resolve()
        prefix = "weights-" + re.sub(r"\W+", "-", self._url)
        self.version = uuid.uuid4().hex  # before the server has it: should anything fail, its weights count as stale
        folder = shared / f"{prefix}-{self.version}"  # a new name each time: network disks may remember an old file
        with disk_errors(folder), atomic_path(folder) as scratch:
            scratch.mkdir()
            save_file(whole_state(model), scratch / "model.safetensors", metadata={"format": "pt"})
        try:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._expect("/collective_rpc", reload, lambda reply: set(reply["results"]) == {None})
            self._expect("/reset_prefix_cache?reset_running_requests=true", {}, lambda reply: reply["success"] is True)
            self._expect(
                "/update_weight_version", {"new_version": self.version}, lambda reply: reply["success"] is True
            )
        except BaseException:
            remove(folder)
            raise
        self._handed_over = folder
        for earlier in shared.glob(f"{prefix}-*"):
            if earlier != folder:
                remove(earlier)

    def close(self) -> None:
        """Removes the weights that were handed over; the server goes on with its copy."""
        if self._handed_over is not None:
            remove(self._handed_over)
            self._handed_over = None

    # -----------------------------------------------------------------------------------------------------------------

    def _served(self, checkpoint: Path | None) -> tuple[str, int]:
        """The name of the model to ask for, and the server's window."""
        reply = self._client.call("/v1/models")
        try:
            bases = {str(entry["id"]): entry for entry in reply["data"] if entry["parent"] is None}
            windows = {name: entry["max_model_len"] for name, entry in bases.items()}
            if not windows or not all(type(window) is int and window > 0 for window in windows.values()):
                raise ValueError
            wanted = {} if checkpoint is None else {str(checkpoint), checkpoint.name}
            same = [
                name
                for name, entry in bases.items()
                if checkpoint is None or name in wanted or Path(entry["root"]).resolve() == checkpoint.resolve()
            ]
        except (KeyError, TypeError, ValueError):
            raise GenerationError(f"{self._url}: no vLLM server: /v1/models names no max_model_len") from None
        if not same:
            assert checkpoint is not None
            raise UserError(
                f"{self._url}: serves {', '.join(bases)}, not {checkpoint}; start `vllm serve {checkpoint}`, with"
                f" --served-model-name {checkpoint.name} where it sees that folder under another path"
            )
        return same[0], windows[same[0]]

    def _limit(self, number: int, request: Request, params: SamplingParams) -> int:
        remedy = f"start the server at {self._url} with a larger --max-model-len"
        return check_request(number, request, params, self.max_model_len, model_window=self.model_window, remedy=remedy)

    def _check_version(self) -> None:
        """Raises StaleWeightsError where the server samples from other weights than `version`."""
        try:
            served = self._client.call("/weight_info").get("weight_version")
        except RefusedRequestError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            served = START_VERSION  # not in development mode: nobody can have changed its weights
        if served != self.version:
            since = "its start" if self.version == START_VERSION else "this run's last update"
            raise StaleWeightsError(
                f"{self._url}: the server's weights are not those of {since}; restart it, and run again"
            )

    def _check_logps(self) -> None:
        """Raises UserError unless log-probabilities are of the distribution sampled from: 0 where one token is left."""
        if self._logps_checked:
            return
        limits = {"max_tokens": 1, "temperature": 1.0, "top_k": 1, "logprobs": 0}
        with Calls() as calls:
            choice = self._complete({"prompt": [0], **limits}, calls)
        if self._numbers(choice, ["logprobs", "token_logprobs"]) != [0.0]:
            raise UserError(
                f"{self._url}: log-probabilities are not those of the distribution sampled from; start the server"
                " with --logprobs-mode processed_logprobs"
            )
        self._logps_checked = True

    def _sample(self, request: Request, limit: int, params: SamplingParams, calls: Calls) -> Sample:
        prompt = {"prompt": list(request.prompt_ids), "return_token_ids": True}
        body = {**prompt, **sampling_fields(request, limit, params)}
        if (guard := guard_fields(params)) is not None:
            body["repetition_detection"] = guard
        if params.logps:
            body["logprobs"] = 0
        choice = self._complete(body, calls)
        ids = choice.get("token_ids")
        if not isinstance(ids, list) or not 0 < len(ids) <= limit or not all(is_token(token) for token in ids):
            raise self._unusable("the token ids of a completion")
        finish = choice.get("finish_reason")
        if finish not in ("stop", "length", "repetition"):
            raise GenerationError(f"{self._url}: the server ended a sample because of {finish!r}; run it again")
        logps = self._numbers(choice, ["logprobs", "token_logprobs"]) if params.logps else []
        if params.logps and len(logps) != len(ids):
            raise self._unusable("one log-probability per token")
        reason = choice.get("stop_reason")
        if finish != "stop" or reason not in (*params.stop, *params.stop_ids):
            reason = None  # vLLM also names the second of several end tokens, and says 'repetition_detected'
        return Sample(ids, finish, logps, reason)

    def _score(self, sequence: tuple[int, ...], calls: Calls) -> list[float]:
        """The last token is asked for as a continuation, because vLLM takes no prompt that fills its window."""
        if len(sequence) < 2:
            return []
        *prompt, last = sequence
        body = {
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
            "logprobs": 1,
            "logprob_token_ids": [last],
            "return_tokens_as_token_ids": True,
        }
        choice = self._complete(body, calls)
        try:
            steps = zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)
            rest = [step[str(token)]["logprob"] for token, step in steps]
            rest.append(choice["logprobs"]["top_logprobs"][0][f"token_id:{last}"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise self._unusable("one log-probability per token") from None
        return self._numbers({"all": rest}, ["all"])

    def _complete(self, body: dict[str, Any], calls: Calls) -> dict[str, Any]:
        """The choice of one completion; asked for again, with the same seed, where the connection was cut."""
        body = {"model": self._model, **NEUTRAL, **body}
        for attempt in range(1, TRIES + 1):
            try:
                reply = self._client.call("/v1/completions", body, calls)
                break
            except CutConnectionError:
                if attempt == TRIES or calls.over.wait(PAUSE_S * attempt):
                    raise
                self._check_version()  # what cut it may have been a restart
        choices = reply.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self._unusable("a completion")
        choice: dict[str, Any] = choices[0]
        return choice

    def _expect(self, path: str, body: dict[str, Any], good: Callable[[Any], bool]) -> None:
        """Posts to a development endpoint. Raises GenerationError unless the reply is `good`."""
        try:
            reply = self._client.call(path, body)
        except RefusedRequestError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            raise UserError(
                f"{self._url}: the server has no {path.partition('?')[0]}; start it with VLLM_SERVER_DEV_MODE=1 in its"
                " environment, so that RL can change its weights"
            ) from None
        try:
            done = good(reply)
        except (KeyError, TypeError):
            done = False
        if not done:
            raise GenerationError(f"{self._url}: {path.partition('?')[0]} did not succeed: {one_line(reply)}")

    def _numbers(self, choice: dict[str, Any], path: Sequence[str]) -> list[float]:
        """The finite numbers at `path`. Raises GenerationError for anything else."""
        found: Any = choice
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        if not isinstance(found, list) or not all(type(x) in (int, float) and abs(x) < LARGEST for x in found):
            raise self._unusable("log-probabilities")
        return [float(x) for x in found]

    def _unusable(self, what: str) -> GenerationError:
        return GenerationError(f"{self._url}: the server's answer lacks {what}; vLLM 0.32 gives them")


def is_token(value: object) -> bool:
    """Whether a server's value can be a token id: others would break the tokenizer that decodes it."""
    return type(value) is int and 0 <= value < 2**31


def whole_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's state with adapters merged, each tensor in memory of its own.

    A tied head is part of it: without it vLLM loads the rest, reports success and generates garbage.
    """
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in merged_state(model, model.state_dict()).items():
        state[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    return state
