"""A small but complete run directory with known numbers: what the tests of reports recompute tables from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gift.records import write_json, write_table

LINEAGE = (
    ("base", "Base", None, "base", None),
    ("sft", "SFT", "base", "init", "sft"),
    ("gift", "GIFT", "base", "init", "gift"),
    ("sft-rl", "SFT + RL", "sft", "rl", "sft"),
    ("gift-rl", "GIFT + RL", "gift", "rl", "gift"),
)
TASKS = {
    "chain": ("Chain sums", "in-distribution", 0.0),
    "long_chain": ("Longer chains", "harder", -1.2),
    "big_digits": ("Bigger numbers", "harder", -0.6),
    "products": ("Products", "out-of-distribution", -1.6),
}
ABILITY = {"base": -1.6, "sft": 0.0, "gift": 0.1, "sft-rl": 0.7, "gift-rl": 1.1}
PAIRS = (
    ("base", "sft"),
    ("base", "gift"),
    ("sft", "sft-rl"),
    ("gift", "gift-rl"),
    ("base", "sft-rl"),
    ("base", "gift-rl"),
)
LEVELS = {
    "cos": 0.93,
    "l2": 4.2,
    "l2_rel": 0.4,
    "kl_new_old": 0.35,
    "kl_old_new": 0.41,
    "js": 0.08,
    "tv": 0.2,
    "nll_a": 1.1,
    "nll_b": 0.6,
    "entropy_a": 1.2,
    "entropy_b": 0.7,
}
TOP_K = (1, 5, 10, 20, 50, 100)
Outcomes = dict[str, np.ndarray]
STARTED = "2026-01-05T09:00:00+00:00"


@dataclass
class Truth:
    """What was written.

    correct[policy][task] is 0/1 [items, runs, samples]; drift[pair][metric] is (n, sums), each [sequences].
    """

    path: Path
    correct: dict[str, Outcomes]
    drift: dict[tuple[str, str], dict[str, tuple[np.ndarray, np.ndarray]]]

    def counts(self, policy: str, task: str) -> list[tuple[int, int]]:
        """Per item (samples, correct samples)."""
        flat = self.correct[policy][task].reshape(len(self.correct[policy][task]), -1)
        return [(flat.shape[1], int(row.sum())) for row in flat]


def write_run(
    path: Path,
    *,
    items: int = 24,
    runs: int = 2,
    samples: int = 4,
    policies: tuple[str, ...] = tuple(ABILITY),
    status: str = "complete",
    completion: str | None = None,
    seed: int = 7,
) -> Truth:
    """Writes a complete training run of these policies and returns its numbers; `completion` replaces every text."""
    rng = np.random.default_rng(seed)
    correct = {policy: draw_outcomes(rng, ABILITY[policy], items, runs, samples) for policy in ABILITY}
    correct = {policy: correct[policy] for policy in policies}
    drift = {pair: draw_drift(rng, number) for number, pair in enumerate(PAIRS)}
    drift = {pair: sums for pair, sums in drift.items() if set(pair) <= set(policies)}
    write_json(path / "manifest.json", manifest(path.name, policies, items, runs, samples, status))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics(rng, policies)))
    write_items(path / "items.parquet", correct)
    write_samples(path, correct, completion)
    for (a, b), metric_sums in drift.items():
        write_drift(path / "drift" / f"{a}..{b}.parquet", metric_sums)
    return Truth(path, correct, drift)


def draw_outcomes(rng: np.random.Generator, ability: float, items: int, runs: int, samples: int) -> Outcomes:
    """0/1 outcomes by task; item difficulties are shared by all policies, and the last task has half the items."""
    outcomes = {}
    for number, (task, (_, _, ease)) in enumerate(TASKS.items()):
        count = task_items(task, items)
        difficulty = np.random.default_rng(number).normal(0, 1.5, count)
        rates = 1 / (1 + np.exp(difficulty - ability - ease))
        outcomes[task] = (rng.random((count, runs, samples)) < rates[:, None, None]).astype(int)
    return outcomes


def task_items(task: str, items: int) -> int:
    """Items of a task: sizes differ, so that averages over tasks and over items do too."""
    return items // 2 if task == "products" else items


def draw_drift(rng: np.random.Generator, number: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(n, sums) [40 sequences] by metric."""
    n = rng.integers(20, 90, 40)
    levels = {**LEVELS, **{f"topk_overlap_{k}": 0.7 + 0.03 * index for index, k in enumerate(TOP_K)}}
    scale = 1 - 0.06 * number
    return {metric: (n, n * level * scale * rng.normal(1, 0.04, 40)) for metric, level in levels.items()}


def manifest(name: str, policies: tuple[str, ...], items: int, runs: int, samples: int, status: str) -> dict[str, Any]:
    """A training run's manifest."""
    steps = ("base", "data", "init sft", "init gift", "rl sft", "rl gift", "eval", "drift", "report")
    step = {"status": "done", "started": STARTED, "finished": STARTED, "seconds": 100.0}
    subsets = {"sft": 2000, "rl": 1000, "validation": 128}
    keys = ("id", "label", "parent", "stage", "method")
    weights = {"weights_sha256": "c4" * 32}
    return {
        "schema_version": 1,
        "kind": "train",
        "name": name,
        "status": status,
        "created": STARTED,
        "finished": STARTED,
        "command": ["train.py", "nano", "seed=3"],
        "recipe": {
            "name": "nano",
            "base": {"model": "nano", "revision": None},
            "data": {"source": "nano", **subsets},
            "methods": {
                "sft": {"objective": "sft", "label": "SFT", "options": {}},
                "gift": {"objective": "gift", "label": "GIFT", "options": {"beta": 20.0}},
            },
            "seed": 3,
            "init": {"epochs": 6, "optimizer": {"lr": 0.001, "betas": [0.9, 0.95]}},
            "rl": {"group_size": 8, "temperature": 1.0},
        },
        "recipe_sha256": "0f" * 32,
        "overrides": ["seed=3"],
        "seeds": {"run": 3, "base": 1},
        "data": {
            subset: {"name": "nano", "revision": "1", "sha256": "ab" * 32, "rows": rows}
            for subset, rows in subsets.items()
        },
        "lineage": [
            {**dict(zip(keys, entry, strict=True)), "checkpoint": f"checkpoints/{entry[0]}", **weights}
            for entry in LINEAGE
            if entry[0] in policies
        ],
        "steps": dict.fromkeys(steps, step),
        "eval": {"nano": {"protocol": protocol(runs, samples), "tasks": tasks(items)}},
        "drift": {
            "definitions": {
                "cos": "cosine similarity of the two states",
                "l2": "Euclidean distance of the two states",
                "kl_new_old": "KL(later || earlier), nats per token",
                "kl_old_new": "KL(earlier || later), nats per token",
            },
            "sequences": 40,
        },
        "code": {"commit": "1234567890abcdef1234567890abcdef12345678", "dirty": False},
        "packages": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.19.0"},
        "hardware": {"machine": "x86_64", "processor": "Example CPU", "cores": 2, "memory": 8 * 2**30, "gpus": []},
    }


def protocol(runs: int, samples: int) -> dict[str, Any]:
    """The evaluation protocol."""
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 192, "runs": runs, "samples_per_run": samples}
    return {**sampling, "seed": 1, "prompt": "nano-1", "engine": "hf", "dtype": "float32"}


GRADERS = {"strict": "math 1"}


def tasks(items: int) -> dict[str, Any]:
    """The evaluated tasks."""
    source = {"name": "reasoning-gym", "revision": "0.1.25", "sha256": "9b" * 32}
    return {
        task: {
            "label": label,
            "group": group,
            "items": task_items(task, items),
            "source": {**source, "rows": task_items(task, items)},
            "metric": "accuracy",
            "graders": GRADERS,
        }
        for task, (label, group, _) in TASKS.items()
    }


def metrics(rng: np.random.Generator, policies: tuple[str, ...]) -> list[dict[str, Any]]:
    """Learning curves of both stages."""
    rows: list[dict[str, Any]] = []
    for policy, floor, rise in (("sft", 0.42, 0.012), ("gift", 0.4, 0.0)):
        for epoch in range(7):
            loss = floor + 0.8 * 0.45**epoch + rise * epoch**1.5
            row = {"policy": policy, "stage": "init", "event": "validation", "step": 20 * epoch + 1}
            rows.append({**row, "epoch": epoch, "val_nll": loss, "val_tokens": 5210})
    for policy, top in (("sft-rl", 0.62), ("gift-rl", 0.72)):
        for step in range(1, 61):
            row = {"policy": policy, "stage": "rl", "step": step}
            reward = 0.45 + (top - 0.45) * (1 - np.exp(-step / 20)) + rng.normal(0, 0.03)
            rows.append({**row, "event": "train", "reward_mean": float(reward)})
            if step % 10 == 0:
                rows.append({**row, "event": "validation", "val_accuracy": float(reward), "val_items": 128})
    return [row for row in rows if row["policy"] in policies]


def write_items(file: Path, correct: dict[str, Outcomes]) -> None:
    """items.parquet from the outcomes."""
    rows = [
        (task, f"{task}-{item}", policy, run, outcome.shape[2], int(outcome[item, run].sum()))
        for policy, by_task in correct.items()
        for task, outcome in by_task.items()
        for item in range(outcome.shape[0])
        for run in range(outcome.shape[1])
    ]
    names = ("task", "item", "policy", "run", "n", "correct")
    write_table(file, dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))


def write_samples(folder: Path, correct: dict[str, Outcomes], completion: str | None) -> None:
    """samples/<policy>/<task>.jsonl from the outcomes, and verdicts/<policy>/<task>.jsonl."""
    for policy, by_task in correct.items():
        for task, outcome in by_task.items():
            lines, verdicts = [], []
            for (item, run, sample), right in np.ndenumerate(outcome):
                answer = str(40 + item + (0 if right else 3))
                worked = f"13 + {item} = {13 + item}\n{13 + item} + 27 = {answer}\nAnswer: {answer}"
                text = worked if completion is None else completion
                key = {"task": task, "item": f"{task}-{item}", "policy": policy, "run": run, "sample": sample}
                lines.append(
                    {
                        **key,
                        "seed": 11,
                        "prompt": f"What is 13 + {item} + 27?\nShow your steps.",
                        "completion": text,
                        "tokens": 24,
                        "finish_reason": "stop",
                        "max_tokens": 192,
                        "gold": str(40 + item),
                    }
                )
                verdicts.append(
                    {
                        **key,
                        "grader": "strict",
                        "version": GRADERS["strict"],
                        "of": hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16],
                        "extracted": answer if completion is None else completion,
                        "status": "correct" if right else "wrong",
                        "score": float(right),
                        "method": "math",
                        "note": None,
                    }
                )
            for file, rows in (("samples", lines), ("verdicts", verdicts)):
                (folder / file / policy).mkdir(parents=True, exist_ok=True)
                log = folder / file / policy / f"{task}.jsonl"
                log.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_drift(file: Path, sums: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """A pair's drift file."""
    rows = [
        (metric, f"validation-{index}", int(n), float(total), float(total**2 / n))
        for metric, (sizes, totals) in sums.items()
        for index, (n, total) in enumerate(zip(sizes, totals, strict=True))
    ]
    names = ("metric", "sequence", "n", "sum", "sum_sq")
    write_table(file, dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
