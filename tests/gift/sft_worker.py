"""Runs of stage 1 on a tiny model, through gift.sft.Trainer as the job does them, for tests that compare ranks.

As a script (`torchrun sft_worker.py FOLDER`) it trains every case of CASES on the ranks there are, and writes of each
the rows it logged, and how many micro-batches each rank had nothing to do in.
"""

from __future__ import annotations

import functools
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from tiny_models import tiny_model
from transformers import PreTrainedModel

import gift.engine
from gift import sft
from gift.batches import IGNORED, Encoded
from gift.distributed import init_distributed, quiet_libraries, rank, total_over_ranks, world_size
from gift.engine import FrozenEngine
from gift.lora import add_adapters
from gift.objectives import label_weight, resolve
from gift.recipe import Engine, Init, LoRA, Optimizer
from gift.records import JsonlLog, read_jsonl
from gift.reference import OnlineReference
from gift.reference.cache import Demand
from gift.reference.scoring import score

VOCAB = 64
LR = 5e-3
SHARD_ALL = dict.fromkeys(gift.engine.STAGE_3, 0)  # ZeRO 3 would leave a model this small whole
OPTIONS: dict[str, dict[str, float | str]] = {"gift": {"beta": 3.0}, "kd": {}, "psft": {}}
OWN = {"objective": "gift", "cached": False, "tied": False, "lora": False, "updates": 1}
"""What a case may say beside the engine's settings."""

CASES: dict[str, dict[str, Any]] = {
    **{f"stage {stage}": {"zero_stage": stage} for stage in range(4)},
    **{f"stage {stage}, tied": {"zero_stage": stage, "tied": True} for stage in (2, 3)},
    "stage 0, cached": {"zero_stage": 0, "cached": True},
    "stage 3, cached, packing": {"zero_stage": 3, "cached": True, "packing": True},
    "stage 3, packing, checkpointing": {"zero_stage": 3, "packing": True, "gradient_checkpointing": True},
    "stage 2, adapters, checkpointing": {"zero_stage": 2, "lora": True, "gradient_checkpointing": True},
    "stage 3, adapters": {"zero_stage": 3, "lora": True},
    **{f"stage {stage}, psft": {"zero_stage": stage, "objective": "psft", "updates": 2} for stage in (0, 3)},
    "stage 3, kd, all offloaded": {"zero_stage": 3, "objective": "kd", "offload": "all"},
    **{f"stage {stage}, bfloat16": {"zero_stage": stage, "dtype": "bfloat16"} for stage in (0, 2, 3)},
}


def examples() -> list[Encoded]:
    """Sequences so unequal in length that ranks which share them get different numbers of micro-batches."""
    rng = random.Random(3)
    return [
        Encoded(str(number), tuple(rng.randrange(VOCAB) for _ in range(35 if number % 3 == 0 else 4)), 2)
        for number in range(24)
    ]


def fresh(case: dict[str, Any]) -> PreTrainedModel:
    """The random model that a case begins with."""
    model = tiny_model(VOCAB, tie_word_embeddings=case["tied"])
    return model.to(getattr(torch, case.get("dtype", "float32")))


def train(case: dict[str, Any], folder: Path, *, lr: float = LR) -> list[dict[str, Any]]:
    """The rows that a case logs: two epochs of three batches, with validation before, between and after."""
    case = {**OWN, **case}
    settings = Engine(
        **{"dtype": "float32", "micro_tokens": 40, **{name: case[name] for name in case if name not in OWN}}
    )
    name, options, data = case["objective"], OPTIONS[case["objective"]], examples()
    model, frozen, reference = fresh(case), None, None
    if case["lora"]:
        add_adapters(model, LoRA(rank=4, alpha=8.0), seed=0)
        reference = OnlineReference(model, adapted=True)
    elif case["cached"]:
        demand = Demand(((name, options),), tolerance=1e-6)
        reference = score(
            lambda: fresh(case), data, demand, key={}, budget_bytes=1e9, micro_tokens=100, root=folder / "cache"
        )
    elif name != "psft":
        frozen = FrozenEngine(fresh(case), settings)
        reference = OnlineReference(frozen.model)
    weight = functools.partial(label_weight, **options) if name == "gift" else None
    with JsonlLog(folder / "metrics.jsonl", key=("policy", "stage", "event", "step")) as log:
        sft.Trainer(
            sft.Stage("p", "init", data, data[:3], seed=0),
            model,
            cast(Any, SimpleNamespace(pad_token_id=0)),
            sft.Loss(resolve(name, options), reference, name == "psft", weight),
            settings=Init(epochs=2, batch_size=8, updates_per_batch=case["updates"], optimizer=Optimizer(lr=lr)),
            engine_settings=settings,
            resume_dir=folder / "resume",
            log=log,
        ).train(lambda engine, step: None)
    if frozen is not None:
        frozen.close()
    return read_jsonl(folder / "metrics.jsonl") if rank() == 0 else []


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    gift.engine.STAGE_3.update(SHARD_ALL)
    init_distributed()
    quiet_libraries()
    idle = [0.0] * world_size()
    made = sft.Trainer.micro_batches

    def counted(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        found = made(*arguments, **options)
        idle[rank()] += sum(bool((micro_batch["labels"] == IGNORED).all()) for micro_batch in found)
        return found

    sft.Trainer.micro_batches = counted  # type: ignore[method-assign]
    found = {}
    for name, case in CASES.items():
        idle[:] = [0.0] * world_size()
        rows = train(case, folder / name)
        found[name] = {"rows": rows, "idle": total_over_ranks(idle)}
    if rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
