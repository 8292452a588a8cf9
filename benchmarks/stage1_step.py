"""A training step of stage 1: GIFT with the base beside the policy, GIFT with the base's scores cached, and plain SFT.

    python -m benchmarks.stage1_step --help        (from the root of the repository)

The model is random, of Qwen2's architecture, with logits scaled up until it is as sure of itself as a language model;
the data are sequences of random lengths whose response tokens are the model's likeliest, and in part random ones, which
surprise it. A base without any preference (--sharpness 1) is the worst case: every token's whole distribution is kept.
Times are medians over steps in which the three cases take turns in reversing order, after one round of warming up.
Memory is the peak resident set of a fresh process that makes two steps of one case. The cache is scored before, by
another process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from gift.batches import Encoded
from gift.cli import progress
from gift.distributed import quiet_libraries
from gift.nano import train_tokenizer
from gift.objectives import resolve
from gift.provenance import hardware
from gift.recipe import Engine, Init, Optimizer
from gift.records import JsonlLog
from gift.reference import CachedReference, OnlineReference
from gift.reference.cache import Demand
from gift.reference.scoring import score
from gift.sft import Loss, Stage, Trainer, nll

CASES = ("sft", "gift, cached", "gift, online")
KEY = {"benchmark": "stage1_step"}


@dataclass(frozen=True)
class Setting:
    """Shape of the model and the data, and GIFT's beta and tolerance."""

    hidden: int
    layers: int
    vocab: int
    sequences: int
    length: int
    surprising: float
    sharpness: float
    beta: float
    tolerance: float
    threads: int

    def model(self) -> Qwen2ForCausalLM:
        """The base, the same in every process."""
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.hidden // 64,
            tie_word_embeddings=True,
            initializer_range=0.05,
        )
        model = Qwen2ForCausalLM(config).eval()
        with torch.no_grad():
            model.model.norm.weight.mul_(self.sharpness)
        return model

    @torch.no_grad()
    def data(self) -> list[Encoded]:
        """Sequences of half to the whole length, a quarter of each the prompt."""
        model, rng = self.model(), random.Random(0)
        found = []
        for number in range(self.sequences):
            length = rng.randint(self.length // 2, self.length)
            ids = torch.randint(self.vocab, (1, length), generator=torch.Generator().manual_seed(number))
            likely = model(input_ids=ids).logits.argmax(-1)[0]
            for position in range(length // 4, length):
                if rng.random() > self.surprising:
                    ids[0, position] = likely[position - 1]
            found.append(Encoded(str(number), tuple(ids[0].tolist()), length // 4))
        return found

    def demand(self) -> Demand:
        """What GIFT asks of the cache."""
        return Demand((("gift", {"beta": self.beta}),), self.tolerance)


def score_data(setting: Setting, data: list[Encoded], folder: Path) -> str:
    """Makes the cache; returns what is said of it."""
    torch.set_num_threads(setting.threads)
    quiet_libraries()
    cache = score(setting.model, data, setting.demand(), key=KEY, budget_bytes=1e12, micro_tokens=4096, root=folder)
    assert cache is not None
    return cache.info.summary()


def trainer(case: str, setting: Setting, data: list[Encoded], folder: Path) -> Trainer:
    """A trainer of one case."""
    torch.set_num_threads(setting.threads)
    quiet_libraries()
    loss = Loss(nll)
    if case != "sft":
        reference: Any = OnlineReference(setting.model())
        if case == "gift, cached":
            (cache,) = (path.parent for path in folder.rglob("meta.json"))
            reference = CachedReference(cache, KEY)
        loss = Loss(resolve("gift", {"beta": setting.beta}), reference)
    return Trainer(
        Stage(case, "init", data, [], 0),
        setting.model(),
        train_tokenizer(["a b"], 300),
        loss,
        settings=Init(epochs=1, batch_size=len(data), optimizer=Optimizer(lr=1e-5)),
        engine_settings=Engine(zero_stage=0, dtype="float32", micro_tokens=2048),
        resume_dir=folder / "none",
        log=JsonlLog(folder / f"{case}.jsonl", ("step",)),
    )


def peak_memory(case: str, setting: Setting, data: list[Encoded], folder: Path) -> int:
    """Peak resident bytes of two steps of one case in this process."""
    one = trainer(case, setting, data, folder)
    for _ in range(2):
        one.train_step(data, 1e-5)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def step_times(setting: Setting, data: list[Encoded], folder: Path, repetitions: int) -> dict[str, list[float]]:
    """Seconds of every timed step, by case."""
    trainers = {case: trainer(case, setting, data, folder) for case in CASES}
    times: dict[str, list[float]] = {case: [] for case in CASES}
    with progress((repetitions + 1) * len(CASES), "timing", unit="step") as bar:
        for repetition in range(repetitions + 1):
            for case in CASES[:: 1 if repetition % 2 else -1]:
                started = time.perf_counter()
                trainers[case].train_step(data, 1e-5)
                if repetition > 0:
                    times[case].append(time.perf_counter() - started)
                bar.update()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stage1_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (default: 256)")
    parser.add_argument("--layers", type=int, default=4, help="layers (default: 4)")
    parser.add_argument("--vocab", type=int, default=32_000, help="vocabulary size (default: 32000)")
    parser.add_argument("--sequences", type=int, default=16, help="sequences of a batch (default: 16)")
    parser.add_argument("--length", type=int, default=256, help="tokens of the longest sequence (default: 256)")
    parser.add_argument("--surprising", type=float, default=0.1, help="share of tokens drawn at random (default: 0.1)")
    parser.add_argument(
        "--sharpness",
        type=float,
        default=12.0,
        help="of the base's predictions: the factor of its logits (default: 12)",
    )
    parser.add_argument("--beta", type=float, default=20.0, help="GIFT's beta (default: 20)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of the cache (default: 0.001)")
    parser.add_argument("--repetitions", type=int, default=7, help="timed steps per case (default: 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all cores)")
    arguments = vars(parser.parse_args())
    repetitions = arguments.pop("repetitions")
    setting = Setting(**arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder, data = Path(scratch), setting.data()
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            summary = pool.apply(score_data, (setting, data, folder))
            memory = {case: pool.apply(peak_memory, (case, setting, data, folder)) for case in CASES}
        times = step_times(setting, data, folder, repetitions)
    machine = hardware()
    tokens = sum(len(example.ids) for example in data)
    print(f"{setting}\n{tokens} tokens a step, float32, ZeRO 0")
    print(f"{machine['processor']}, {machine['cores']} cores, torch {torch.__version__}\n\n{summary}\n")
    print(f"{'':16}{'median s':>10}{'min s':>9}{'max s':>9}{'of sft':>9}{'peak MiB':>11}{'of sft':>9}")
    plain = statistics.median(times["sft"])
    for case, seconds in times.items():
        median, peak = statistics.median(seconds), memory[case] / 2**20
        print(
            f"{case:16}{median:10.3f}{min(seconds):9.3f}{max(seconds):9.3f}{median / plain:9.3f}"
            f"{peak:11.1f}{memory[case] / memory['sft']:9.3f}"
        )


if __name__ == "__main__":
    main()
