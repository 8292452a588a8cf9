"""Training runs of a tiny model that tests of the engine compare: under DeepSpeed, and by hand with torch alone.

As a script (`torchrun engine_worker.py FOLDER`) it trains every case of CASES on the ranks there are, then again from
the state saved half-way, and writes for both the numbers of each step, the exported model and what it computes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2Tokenizer

import gift.engine
from gift.distributed import init_distributed, quiet_libraries, rank, share_of_rank, total_over_ranks
from gift.engine import FrozenEngine, TrainingEngine
from gift.models import backbone, lm_head
from gift.recipe import Engine, Optimizer
from gift.vocab import vocab_stats

VOCAB = 64
LENGTHS = (5, 12, 9, 7)
OPTIMIZER = Optimizer(lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1, max_grad_norm=0.7)
STEPS = 4
IGNORED = -100
SHARD_ALL = dict.fromkeys(gift.engine.STAGE_3, 0)  # ZeRO 3 would leave a model this small whole

CASES: dict[str, dict[str, Any]] = {
    **{f"stage {stage}": {"zero_stage": stage} for stage in range(4)},
    **{f"stage {stage}, tied": {"zero_stage": stage, "tied": True} for stage in range(4)},
    **{f"stage {stage}, optimizer offloaded": {"zero_stage": stage, "offload": "optimizer"} for stage in (2, 3)},
    "stage 3, all offloaded": {"zero_stage": 3, "offload": "all"},
    **{f"stage {stage}, frozen base": {"zero_stage": stage, "base": True} for stage in (2, 3)},
    "stage 3, tied frozen base": {"zero_stage": 3, "tied": True, "base": True},
    "stage 3, checkpointing": {"zero_stage": 3, "gradient_checkpointing": True},
    **{f"stage {stage}, bfloat16": {"zero_stage": stage, "dtype": "bfloat16"} for stage in range(4)},
    **{
        f"stage {stage}, pure bfloat16": {"zero_stage": stage, "dtype": "bfloat16", "master_dtype": "bfloat16"}
        for stage in (0, 2, 3)
    },
}


class Nll(nn.Module):
    """A student and its summed NLL, plus the CE to a frozen base if it has one, through the LM-head statistics."""

    def __init__(self, student: PreTrainedModel, base: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.student = student
        self._base = [base]  # in a list, so that it is no submodule

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        selected, base = labels != IGNORED, self._base[0]
        reference: dict[str, Tensor | None] = {}
        if base is not None:
            with torch.no_grad():
                reference["ref_hidden"] = backbone(base)(input_ids=input_ids).last_hidden_state[selected]
            reference["ref_weight"], reference["ref_bias"] = lm_head(base)
        hidden = backbone(self.student)(input_ids=input_ids).last_hidden_state[selected]
        weight, bias = lm_head(self.student)
        stats = vocab_stats(hidden, weight, labels[selected], bias=bias, **reference)
        loss = -stats.logp if stats.ref_ce is None else stats.ref_ce - stats.logp
        return loss.sum()


def model_for(case: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """The random model that a case trains."""
    dtype = getattr(torch, case.get("dtype", "float32"))
    return tiny_model(VOCAB, seed=seed, tie_word_embeddings=case.get("tied", False)).to(dtype)


def base_for(case: dict[str, Any]) -> PreTrainedModel | None:
    """The other random model that a case takes as its frozen base, if it has one."""
    return model_for(case, seed=1) if case.get("base") else None


def settings_for(case: dict[str, Any]) -> Engine:
    """The engine settings of a case; float32 unless it says otherwise."""
    return Engine(
        **{"dtype": "float32", **{name: value for name, value in case.items() if name not in ("tied", "base")}}
    )


def batch(step: int) -> list[tuple[Tensor, Tensor]]:
    """Four sequences of unequal length: ids [1, T] and labels [1, T], the next token after a prompt of two."""
    generator = torch.Generator().manual_seed(step)
    pieces = []
    for length in LENGTHS:
        ids = torch.randint(VOCAB, (1, length + 1), generator=generator)
        labels = ids[:, 1:].clone()
        labels[:, :2] = IGNORED
        pieces.append((ids[:, :-1], labels))
    return pieces


def tokens_of(pieces: list[tuple[Tensor, Tensor]]) -> int:
    return sum(int((labels != IGNORED).sum()) for _, labels in pieces)


def learning_rate(step: int) -> float:
    return 1e-2 / (step + 1)


def train_step(engine: TrainingEngine, step: int) -> tuple[float, float]:
    """A step on this rank's share of a batch, one sequence a micro-batch: mean loss over all ranks, gradient norm."""
    pieces = batch(step)
    loss_sum = 0.0
    for ids, labels in share_of_rank(pieces):
        loss = engine(ids, labels)
        engine.backward(loss, tokens_of(pieces))
        loss_sum += loss.item()
    norm = engine.step(learning_rate(step))
    return total_over_ranks([loss_sum])[0] / tokens_of(pieces), norm


def by_hand(
    model: PreTrainedModel,
    steps: int = STEPS,
    optimizer: Optimizer = OPTIMIZER,
    base: PreTrainedModel | None = None,
) -> list[tuple[float, float]]:
    """The same training with whole batches, materialised logits and torch's own loss, clipping and AdamW."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    adamw = torch.optim.AdamW(weights, betas=optimizer.betas, weight_decay=optimizer.weight_decay)
    return [step_by_hand(model, adamw, step, optimizer.max_grad_norm, base) for step in range(steps)]


def step_by_hand(
    model: PreTrainedModel,
    adamw: torch.optim.Optimizer,
    step: int,
    max_grad_norm: float,
    base: PreTrainedModel | None = None,
) -> tuple[float, float]:
    pieces = batch(step)
    labels = torch.cat([labels[0] for _, labels in pieces])
    logits = torch.cat([model(input_ids=ids).logits[0] for ids, _ in pieces])[labels != IGNORED]
    target = nn.functional.one_hot(labels[labels != IGNORED], VOCAB).float()
    if base is not None:
        with torch.no_grad():
            target += torch.cat([base(input_ids=ids).logits[0] for ids, _ in pieces])[labels != IGNORED].softmax(-1)
    loss = nn.functional.cross_entropy(logits, target)
    adamw.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
    for group in adamw.param_groups:
        group["lr"] = learning_rate(step)
    adamw.step()
    return loss.item(), float(norm)


def run(case: dict[str, Any], states: Path, exported: Path) -> list[dict[str, float]]:
    """Trains a case from its newest state in `states`, saves one half-way, and exports what it ends with."""
    model, base = model_for(case), base_for(case)
    frozen = None if base is None else FrozenEngine(base, settings_for(case))
    engine = TrainingEngine(Nll(model, base), model, settings_for(case), OPTIMIZER)
    start = (engine.resume(states) or {"step": 0})["step"]
    rows = []
    for step in range(start, STEPS):
        loss, norm = train_step(engine, step)
        with torch.no_grad():
            before = engine(*batch(0)[0]).item()
        decoders = [model] if base is None else [model, backbone(base)]
        at_rest = sum(weight.numel() for one in decoders for weight in one.parameters())
        with engine.gathered(), torch.no_grad():  # as a generator calls it, outside the engine
            logits = model(input_ids=batch(0)[0][0]).logits
        rows.append({"loss": loss, "norm": norm, "validation": before, "at_rest": at_rest})
        if step == STEPS // 2 - 1:
            engine.save(states, {"step": step + 1})
    engine.export(Qwen2Tokenizer(), exported)
    if rank() == 0:
        save_file({"logits": logits}, exported / "logits.bin")
    engine.close()
    if frozen is not None:
        frozen.close()
    return rows


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    gift.engine.STAGE_3.update(SHARD_ALL)
    init_distributed()
    quiet_libraries()
    for name, case in CASES.items():
        rows = {way: run(case, folder / name / "states", folder / name / way) for way in ("whole", "resumed")}
        if rank() == 0:
            (folder / name / "rows.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
