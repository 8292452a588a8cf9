"""Two ranks that train a tiny policy and sample from it through vLLM: `torchrun vllm_worker.py CHECKPOINT FOLDER`.

For every case, and after every step, each rank writes what vLLM sampled for its own requests, and what the policy's own
module gives for them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from engine_worker import SHARD_ALL, Nll

import gift.engine
from gift.distributed import init_distributed, quiet_libraries, rank
from gift.engine import TrainingEngine
from gift.generation import Request, SamplingParams
from gift.generation.follower import follow
from gift.generation.hf import HFEngine
from gift.models import load_model, load_tokenizer
from gift.recipe import Engine, Generation, Optimizer

STEPS = 3
CASES: dict[str, dict[str, Any]] = {
    "stage 0": {"zero_stage": 0},
    "stage 1": {"zero_stage": 1},
    "stage 2": {"zero_stage": 2, "dtype": "bfloat16"},
    "stage 3": {"zero_stage": 3},
    "stage 3, tensor parallel": {"zero_stage": 3, "tensor_parallel": 2},
}
PROMPTS = [tuple(range(5 + start, 12 + 3 * start)) for start in range(6)]
GREEDY = SamplingParams(24, 0.0, ignore_end=True, logps=True)
SAMPLED = SamplingParams(24, 1.0, ignore_end=True, logps=True)


def train_step(engine: TrainingEngine, step: int) -> None:
    """A step on a sequence of this rank's own."""
    generator = torch.Generator().manual_seed(10 * step + rank())
    ids = torch.randint(5, 300, (1, 20), generator=generator)
    engine.backward(engine(ids[:, :-1], ids[:, 1:]), 38)
    engine.step(lr=2e-2)


def run(case: dict[str, Any], checkpoint: Path) -> list[dict[str, Any]]:
    """Greedy and drawn samples of both engines at the beginning and after every step."""
    names = {"tensor_parallel"} & case.keys()
    settings = Engine(**{"dtype": "float32", **{name: case[name] for name in case if name not in names}})
    generation = Generation(engine="vllm", cache_gb=0.05, max_rows=16, **{name: case[name] for name in names})
    model, tokenizer = load_model(checkpoint, dtype=settings.dtype), load_tokenizer(checkpoint)
    engine = TrainingEngine(Nll(model), model, settings, Optimizer(lr=1e-2))
    ours = follow(engine, tokenizer, generation, checkpoint, PROMPTS)
    mine = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS[rank() :: 2])][: 3 - rank()]
    rows = []
    for step in range(STEPS):
        if step:
            train_step(engine, step)
        greedy, drawn = ours.generate(mine, GREEDY), ours.generate(mine, SAMPLED)
        with engine.gathered():
            own = HFEngine(model)
            expected = own.generate(mine, GREEDY)
            scores = own.score([(*asked.prompt_ids, *each.token_ids) for asked, each in zip(mine, drawn, strict=True)])
        rows.append(
            {
                "greedy": [asdict(sample) for sample in greedy],
                "expected": [asdict(sample) for sample in expected],
                "drawn": [sample.logps for sample in drawn],
                "scored": [logps[-24:] for logps in scores],
                "probe_gap": ours.probe_gap,
            }
        )
    ours.close()
    engine.close()
    return rows


def main(checkpoint: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    gift.engine.STAGE_3.update(SHARD_ALL)
    init_distributed()
    quiet_libraries()
    for name, case in CASES.items():
        (folder / f"{name}, rank {rank()}.json").write_text(json.dumps(run(case, checkpoint)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
