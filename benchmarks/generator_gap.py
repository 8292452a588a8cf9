"""How far a generation engine's log-probabilities are from the trainer's, and what handing over weights takes.

    python -m benchmarks.generator_gap CHECKPOINT [CHECKPOINT ...]        (from the root of the repository)

Every engine that is installed draws the same number of responses at temperature 1 from each checkpoint, in float32 and
in bfloat16; stage 2's own forward pass (padded micro-batches, log-probabilities in fp32) then scores them, as it does
before an update. Of d = log pi_trainer - log pi_engine over all tokens: the mean of |d|, its 99.9th percentile and its
largest value, in nats; the mean of exp(d), 1 in expectation; and the share of tokens at which exp(d) exceeds 2, where
truncated importance sampling with a cap of 2 would intervene. `random` in place of a checkpoint is a model of 100M
random parameters.

For vLLM also: start-up seconds, imports included; seconds to hand over all weights, median of 5; and to score a probe.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.generation import random_model
from gift import nano
from gift.batches import Encoded, micro_batches
from gift.cli import progress
from gift.data import encode_prompt
from gift.distributed import init_distributed, quiet_libraries
from gift.generation import Engine, Request, Sample, SamplingParams, sample_seed
from gift.generation.hf import HFEngine
from gift.generation.probe import PROBE_LENGTH, PROBE_SEQUENCES
from gift.models import load_model, load_tokenizer, on_device
from gift.policy_module import PolicyModule
from gift.provenance import hardware
from gift.recipe import RL, Generation
from gift.recipe import Engine as EngineSettings

PROMPTS, SAMPLES, TOKENS = 32, 8, 96
TRANSFERS = 5


@torch.no_grad()
def trainer_logps(model: PreTrainedModel, requests: Sequence[Request], samples: Sequence[Sample]) -> list[float]:
    """What stage 2 computes for the tokens of these samples, one after the other."""
    encoded = [
        Encoded(str(number), (*request.prompt_ids, *sample.token_ids), len(request.prompt_ids))
        for number, (request, sample) in enumerate(zip(requests, samples, strict=True))
    ]
    module, settings = PolicyModule(model, RL()), EngineSettings(dtype="float32", micro_tokens=2048)
    found: dict[int, list[float]] = {}
    for piece, batch in micro_batches(encoded, settings, 0):
        logp, _ = module(**on_device(batch, model), temperature=1.0)
        lengths = [len(samples[index].token_ids) for index in piece]
        found.update(zip(piece, (part.tolist() for part in logp.split(lengths)), strict=True))
    return [value for number in range(len(samples)) for value in found[number]]


def requests_of(checkpoint: Path) -> list[Request]:
    """The requests of a step's rollouts, of problems of recipe nano."""
    tokenizer = load_tokenizer(checkpoint)
    prompts = [tuple(encode_prompt(tokenizer, problem)) for problem in nano.training_problems(PROMPTS, seed=1)]
    return [
        Request(prompt, sample_seed("gap", number, sample))
        for number, prompt in enumerate(prompts)
        for sample in range(SAMPLES)
    ]


def compared(engine: Engine, model: PreTrainedModel, requests: Sequence[Request]) -> str:
    """A row of the table."""
    samples = engine.generate(requests, SamplingParams(TOKENS, logps=True))
    drawn = torch.tensor([logp for sample in samples for logp in sample.logps], dtype=torch.float64)
    d = torch.tensor(trainer_logps(model, requests, samples), dtype=torch.float64) - drawn
    numbers = (float(d.abs().mean()), float(d.abs().quantile(0.999)), float(d.abs().max()))
    ratio = d.exp()
    shown = "".join(f"{value:11.1e}" for value in numbers)
    return f"{len(d):9,}{shown}{float(ratio.mean()):11.5f}{float((ratio > 2).double().mean()):11.1e}"


def transfers(engine: Engine, model: PreTrainedModel, requests: Sequence[Request]) -> str:
    """Medians of seconds."""
    probe = [request.prompt_ids[:PROBE_LENGTH] for request in requests[:: PROMPTS * SAMPLES // PROBE_SEQUENCES]]
    engine.score(probe)
    handing, scoring = [], []
    for _ in range(TRANSFERS):
        started = time.perf_counter()
        engine.update_weights(model)
        handed = time.perf_counter()
        engine.score(probe)
        handing.append(handed - started)
        scoring.append(time.perf_counter() - handed)
    return f"weights {1000 * statistics.median(handing):.0f} ms, probe {1000 * statistics.median(scoring):.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generator_gap",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="a checkpoint folder, or 'random'")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    init_distributed()
    quiet_libraries()
    engines = ["hf", "vllm"] if importlib.util.find_spec("vllm") else ["hf"]
    rows, costs = [], []
    with tempfile.TemporaryDirectory() as folder:
        bar = progress(2 * len(engines) * len(arguments.checkpoints), "comparing", unit="engine")
        for name in arguments.checkpoints:
            checkpoint = random_model(Path(folder) / name) if name == "random" else Path(name)
            requests = requests_of(checkpoint)
            for dtype in ("float32", "bfloat16"):
                model = load_model(checkpoint, dtype=dtype)
                for kind in engines:
                    started = time.perf_counter()
                    engine: Engine = HFEngine(model)
                    if kind == "vllm":
                        from gift.generation.vllm import VLLMEngine

                        engine = VLLMEngine(checkpoint, Generation(engine="vllm"), dtype=dtype, in_training=True)
                    ready = time.perf_counter() - started
                    rows.append(f"{name[-28:]:30}{dtype:10}{kind:6}{compared(engine, model, requests)}")
                    if kind == "vllm":
                        costs.append(
                            f"{name[-28:]}, {dtype}: start {ready:.1f} s, {transfers(engine, model, requests)}"
                        )
                    engine.close()
                    bar.update()
        bar.close()
    machine = hardware()
    print(f"{machine['processor']}, {machine['cores']} cores, 1 thread\n")
    print(f"{'checkpoint':30}{'dtype':10}{'':6}{'tokens':>9}{'mean |d|':>11}{'99.9 %':>11}{'max':>11}", end="")
    print(f"{'mean e^d':>11}{'e^d > 2':>11}")
    print("\n".join([*rows, "", *costs]))


if __name__ == "__main__":
    main()
