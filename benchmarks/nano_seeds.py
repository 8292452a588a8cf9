"""The embedded default over several seeds: does GRPO raise held-out pass@1, and does GIFT's start differ from SFT's?

    python -m benchmarks.nano_seeds --seeds 5 --out docs/results.md

Runs `gift.train nano` once per seed (finished runs are reused), reads the records and writes the table as Markdown. All
seeds share one base; a seed changes the data, the order and every sample.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats as scipy_stats

from evals.stats import PairedResult, paired_difference, pass_at_k
from gift.cli import run_command, say
from gift.records import RunDir, read_table, write_text

Counts = dict[str, tuple[int, int]]  # item -> (samples, correct), all runs together
TASK = "chain"
ROWS = [("SFT", "sft", "sft-rl"), ("GIFT", "gift", "gift-rl")]


@dataclass(frozen=True)
class Outcome:
    """One seed's counts per policy on the in-distribution set, and how long its run took in seconds."""

    seed: int
    counts: dict[str, Counts]
    seconds: float

    def pass_at(self, policy: str, k: int) -> float:
        """Mean pass@k in percent."""
        return 100 * float(np.mean([pass_at_k(n, c, k) for n, c in self.counts[policy].values()]))

    def difference(self, a: str, b: str) -> PairedResult:
        """pass@1 of policy `a` minus that of `b`, paired by item."""
        items = sorted(self.counts[a])
        return paired_difference([self.counts[a][i] for i in items], [self.counts[b][i] for i in items])


def train(seed: int, runs: Path, overrides: Sequence[str]) -> RunDir:
    """Runs one seed, or finds it done."""
    name = f"nano-seed{seed}"
    command = [
        sys.executable,
        "-m",
        "gift.train",
        "nano",
        f"seed={seed}",
        f"name={name}",
        *overrides,
        "--runs",
        str(runs),
    ]
    say(f"seed {seed}: {' '.join(command[1:])}")
    subprocess.run(command, check=True)
    return RunDir.open(runs / name)


def outcome(seed: int, run: RunDir) -> Outcome:
    """The run's counts on the target task."""
    table = read_table(run.path / "items.parquet")
    counts: dict[str, Counts] = {}
    for task, item, policy, n, correct in zip(
        table["task"], table["item"], table["policy"], table["n"], table["correct"], strict=True
    ):
        if task == TASK:
            before = counts.setdefault(policy, {}).get(item, (0, 0))
            counts[policy][item] = (before[0] + n, before[1] + correct)
    return Outcome(seed, counts, sum(step.get("seconds", 0) for step in run.manifest["steps"].values()))


def lines(outcomes: Sequence[Outcome], run: RunDir, command: str) -> Iterator[str]:
    """The page."""
    hardware, packages = run.manifest["hardware"], run.manifest["packages"]
    first = outcomes[0]
    items = len(first.counts["base"])
    samples = next(iter(first.counts["base"].values()))[0]
    yield "# What the embedded default gives"
    yield ""
    yield f"Made by `{command}` on {hardware['processor']}, {hardware['cores']} cores, torch {packages['torch']}."
    yield f"pass@1 in percent on {items} held-out chains, at temperature 0.6 with {samples} samples an item (4 runs)."
    yield "Differences are in points, paired by item, with 95 % intervals over items; p from a sign-flip permutation."
    yield ""
    base = [first.pass_at("base", k) for k in (1, 8)]
    yield f"The base, the same for all seeds: pass@1 {base[0]:.1f}, pass@8 {base[1]:.1f} (samples of seed 0)."
    for label, init, rl in ROWS:
        yield ""
        yield f"## GRPO from {label}"
        yield ""
        yield f"| seed | {label} | {label} + RL | difference | p | pass@8 before | after |"
        yield "|---|---|---|---|---|---|---|"
        for one in outcomes:
            gain = one.difference(rl, init)
            cells = [one.pass_at(init, 1), one.pass_at(rl, 1)]
            yield (
                f"| {one.seed} | {cells[0]:.1f} | {cells[1]:.1f} | {interval(gain)} | {p_text(gain)} |"
                f" {one.pass_at(init, 8):.1f} | {one.pass_at(rl, 8):.1f} |"
            )
        raised = sum(one.difference(rl, init).difference > 0 for one in outcomes)
        yield ""
        yield f"GRPO raised pass@1 on {raised} of {len(outcomes)} seeds."
    yield ""
    yield "## GIFT against SFT"
    yield ""
    yield "| seed | after initialization | p | after RL | p |"
    yield "|---|---|---|---|---|"
    for one in outcomes:
        init, rl = one.difference("gift", "sft"), one.difference("gift-rl", "sft-rl")
        yield f"| {one.seed} | {interval(init)} | {p_text(init)} | {interval(rl)} | {p_text(rl)} |"
    yield ""
    for when, a, b in (("after initialization", "gift", "sft"), ("after RL", "gift-rl", "sft-rl")):
        yield f"Mean over seeds {when}, with a t-interval over seeds: {over_seeds(outcomes, a, b)}."
    yield ""
    times = [one.seconds for one in outcomes]
    yield f"A run took {min(times):.0f} to {max(times):.0f} s; those that found the base in the cache did not make it."


def interval(result: PairedResult) -> str:
    """'+1.2 [-0.3, 2.7]' in points."""
    return f"{100 * result.difference:+.1f} [{100 * result.low:.1f}, {100 * result.high:.1f}]"


def p_text(result: PairedResult) -> str:
    """The p-value to three decimals, or that it is below what they can show."""
    return "< 0.001" if result.p_value < 0.001 else f"{result.p_value:.3f}"


def over_seeds(outcomes: Sequence[Outcome], a: str, b: str) -> str:
    """The mean of the seeds' differences in points, with a 95 % t-interval over seeds."""
    gaps = np.array([100 * one.difference(a, b).difference for one in outcomes])
    if len(gaps) < 2:
        return f"{gaps.mean():+.1f} (one seed, no interval)"
    half = scipy_stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps))
    return f"{gaps.mean():+.1f} [{gaps.mean() - half:.1f}, {gaps.mean() + half:.1f}]"


def main(argv: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nano_seeds", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, from 0 (default: 5)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept (default: runs)")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="the page to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    arguments = parser.parse_intermixed_args(argv)
    outcomes = []
    for seed in range(arguments.seeds):
        run = train(seed, arguments.runs, arguments.overrides)
        outcomes.append(outcome(seed, run))
    command = " ".join(["python -m benchmarks.nano_seeds --seeds", str(arguments.seeds), *arguments.overrides])
    write_text(arguments.out, "\n".join(lines(outcomes, run, command)) + "\n")
    say(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    run_command(main)
