"""Time and memory of GIFT's loss without [tokens, vocab] matrices against materialized logits, in one run.

    python -m benchmarks.vocab_loss --help        (from the root of the repository)

Five cases, each a forward and a backward pass through an LM head in float32 on the CPU, with gradients for hidden
states and head:

    gift            gift.vocab.vocab_loss and the gift objective: what stage 1 runs
    gift, composed  the same from gift.vocab.vocab_stats, which computes logits a second time in the backward pass
    gift, naive     the same loss with a soft target over whole [tokens, vocab] matrices. It holds what the authors'
                    trainer holds (both models' logits, six float32 intermediates), without that trainer's copies of
                    the logits and without padding
    sft             vocab_loss and the sft objective
    cross-entropy   torch's cross_entropy on whole logits

Times are medians over repetitions in which the cases take turns, after one round of warming up; on a machine that does
other work as well, compare CPU seconds (all threads together). Memory is the growth of a fresh process's resident set
at its peak, less the gradients themselves.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from gift.cli import progress
from gift.objectives import OBJECTIVES
from gift.provenance import hardware
from gift.vocab import DenseReference, VocabStats, vocab_loss, vocab_stats

BETA = 20.0
FLOOR = 1e-10  # the authors' code adds it to every reference probability
MEBI = 2**20


@dataclass(frozen=True)
class Inputs:
    """hidden, ref_hidden [N, H]; weight, ref_weight [V, H]; labels [N]. All are independent noise."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor

    @staticmethod
    def random(vocab: int, width: int, tokens: int) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def normal(rows: int, scale: float) -> Tensor:
            return torch.randn(rows, width, generator=generator).mul_(scale)

        labels = torch.randint(vocab, (tokens,), generator=generator)
        hidden, weight = normal(tokens, 1.0).requires_grad_(), normal(vocab, 0.02).requires_grad_()
        return Inputs(hidden, weight, labels, normal(tokens, 1.0), normal(vocab, 0.02))

    def gradient_bytes(self) -> int:
        return self.hidden.nbytes + self.weight.nbytes


def gift_objective(stats: VocabStats) -> Tensor:
    return OBJECTIVES["gift"](stats, beta=BETA)


def gift(inputs: Inputs) -> None:
    reference = DenseReference(inputs.ref_hidden, inputs.ref_weight)
    loss, _ = vocab_loss(inputs.hidden, inputs.weight, inputs.labels, gift_objective, reference=reference)
    (loss / len(inputs.labels)).backward()


def gift_composed(inputs: Inputs) -> None:
    gift_objective(vocab_stats(**vars(inputs))).mean().backward()


def gift_naive(inputs: Inputs) -> None:
    logits = inputs.hidden @ inputs.weight.T
    with torch.no_grad():
        ref_logits = inputs.ref_hidden @ inputs.ref_weight.T
        ref_probs = torch.softmax(ref_logits, -1)
        mixed = 1.0 * ref_probs + 0.0 / len(inputs.weight)  # label smoothing of the reference, switched off
        ref_logp = torch.log(mixed + FLOOR)
        target_logits = ref_logp.clone()
        target_logits.scatter_add_(
            1, inputs.labels[:, None], torch.full_like(inputs.labels[:, None], BETA, dtype=torch.float32)
        )
        target = torch.softmax(target_logits, -1)
    logp = torch.log_softmax(logits, -1)
    (-(target * logp).sum(-1)).mean().backward()


def sft(inputs: Inputs) -> None:
    loss, _ = vocab_loss(inputs.hidden, inputs.weight, inputs.labels, OBJECTIVES["sft"])
    (loss / len(inputs.labels)).backward()


def cross_entropy(inputs: Inputs) -> None:
    functional.cross_entropy(inputs.hidden @ inputs.weight.T, inputs.labels).backward()


CASES: dict[str, Callable[[Inputs], None]] = {
    "gift": gift,
    "gift, composed": gift_composed,
    "gift, naive": gift_naive,
    "sft": sft,
    "cross-entropy": cross_entropy,
}


RATIOS = (
    ("gift", "gift, naive"),
    ("gift", "cross-entropy"),
    ("gift, composed", "gift, naive"),
    ("sft", "cross-entropy"),
)


@dataclass
class Times:
    """Seconds of every timed pass of a case: on the clock, and on all threads together."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def measure_times(inputs: Inputs, repetitions: int) -> dict[str, Times]:
    """Times of every case; the order of the cases is reversed in every other repetition."""
    times = {name: Times() for name in CASES}
    bar = progress((repetitions + 1) * len(CASES), "timing", unit="pass")
    for repetition in range(repetitions + 1):
        for name in list(CASES)[:: 1 if repetition % 2 else -1]:
            inputs.hidden.grad = inputs.weight.grad = None
            wall, cpu = time.perf_counter(), time.process_time()
            CASES[name](inputs)
            if repetition > 0:
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(time.process_time() - cpu)
            bar.update()
    bar.close()
    return times


def measure_memory(name: str, shape: tuple[int, int, int], threads: int) -> int:
    """Bytes by which one pass raises this process's peak resident set, beyond its inputs and their gradients."""
    torch.set_num_threads(threads)
    CASES[name](Inputs.random(vocab=64, width=64, tokens=64))  # loads what is loaded on first use
    inputs = Inputs.random(*shape)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    CASES[name](inputs)
    return resident("VmHWM") - before - inputs.gradient_bytes()


def resident(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vocab_loss",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--vocab", type=int, default=151_936, help="vocabulary size V (default: Qwen2.5's 151936)")
    parser.add_argument("--width", type=int, default=896, help="hidden size H (default: 896, Qwen2.5-0.5B)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens N (default: 1024)")
    parser.add_argument("--repetitions", type=int, default=5, help="timed passes per case (default: 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all cores)")
    arguments = parser.parse_args()
    shape = (arguments.vocab, arguments.width, arguments.tokens)

    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        jobs = {name: pool.apply_async(measure_memory, (name, shape, arguments.threads)) for name in CASES}
        memory = {name: job.get() for name, job in jobs.items()}
    torch.set_num_threads(arguments.threads)
    times = measure_times(Inputs.random(*shape), arguments.repetitions)
    wall = {name: statistics.median(case.wall) for name, case in times.items()}
    cpu = {name: statistics.median(case.cpu) for name, case in times.items()}

    machine = hardware()
    print(f"V = {arguments.vocab}, H = {arguments.width}, N = {arguments.tokens}, float32, beta = {BETA:g}")
    print(f"{machine['processor']}, {machine['cores']} cores, {arguments.threads} threads, torch {torch.__version__}\n")
    print(f"{'':30}{'median s':>10}{'min s':>9}{'max s':>9}{'CPU s':>9}{'memory MiB':>13}")
    for name, case in times.items():
        seconds = f"{wall[name]:10.3f}{min(case.wall):9.3f}{max(case.wall):9.3f}{cpu[name]:9.3f}"
        print(f"{name:30}{seconds}{memory[name] / MEBI:13.1f}")
    print()
    for ours, theirs in RATIOS:
        ratios = f"{wall[ours] / wall[theirs]:10.2f}{cpu[ours] / cpu[theirs]:27.2f}"
        print(f"{f'{ours} / {theirs}':30}{ratios}{memory[ours] / memory[theirs]:13.4f}")


if __name__ == "__main__":
    main()
