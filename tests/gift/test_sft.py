"""Stage 1 against a hand-written loop, its independence of micro-batches, and its exact continuation after a kill."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from transformers import PreTrainedModel

from gift import nano, sft
from gift.data import IGNORED, Encoded, collate, epoch_order
from gift.engine import TrainingEngine
from gift.objectives import resolve
from gift.recipe import Engine, Init, Optimizer
from gift.records import JsonlLog, read_jsonl
from gift.reference import Reference

VOCAB = 50
KEY = ("policy", "stage", "event", "step")


@pytest.fixture(scope="module")
def tokenizer():
    return nano.train_tokenizer(["1 + 2 = 3"], 300)


def student() -> PreTrainedModel:
    return tiny_model(VOCAB, hidden_size=16, tie_word_embeddings=True, eos_token_id=1, pad_token_id=0)


def examples(count: int, seed: int = 0) -> list[Encoded]:
    rng = random.Random(seed)
    made = []
    for number in range(count):
        prompt, response = rng.randint(1, 6), rng.randint(1, 12)
        made.append(Encoded(str(number), tuple(rng.randrange(2, VOCAB) for _ in range(prompt + response)), prompt))
    return made


def run(
    model,
    tokenizer,
    folder: Path,
    *,
    data=None,
    micro_tokens=10_000,
    epochs=2,
    objective="sft",
    stop_at=None,
    **options,
):
    """Trains on 12 examples in batches of 4; `stop_at` raises after that step, like a kill."""
    settings = Init(
        epochs=epochs, batch_size=4, save_every=2, optimizer=Optimizer(lr=1e-2, warmup_steps=2, max_grad_norm=0.5)
    )
    reference = Reference(copy.deepcopy(model)) if objective == "gift" else None
    log = JsonlLog(folder / "metrics.jsonl", KEY)
    if stop_at is not None:
        log.append = stop_after(log.append, stop_at)
    with log:
        return sft.train(
            sft.Stage("p", "init", data or examples(12), examples(3, seed=1), seed=5),
            model,
            tokenizer,
            resolve(objective, options),
            settings=settings,
            engine_settings=Engine(zero_stage=0, dtype="float32", micro_tokens=micro_tokens),
            resume_dir=folder / "resume",
            log=log,
            reference=reference,
            beta=options.get("beta"),
        )


class KilledError(Exception):
    pass


def stop_after(append, step: int):
    def appended(rows):
        rows = list(rows)
        append(rows)
        if rows[0]["event"] == "train" and rows[0]["step"] == step:
            raise KilledError

    return appended


def naive_training(model, data: list[Encoded], epochs: int) -> list[float]:
    """The same training with materialised logits and torch's own loss, clipping and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01)
    losses, step = [], 0
    for epoch in range(epochs):
        order = epoch_order(len(data), 5, epoch)
        for start in range(0, len(data), 4):
            batch = collate([data[i] for i in order[start : start + 4]], 0)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 2)
            optimizer.step()
            losses.append(loss.item())
            step += 1
    return losses


def test_sft_equals_a_hand_written_loop(tmp_path: Path, tokenizer):
    ours, naive = student(), student()
    assert run(ours, tokenizer, tmp_path) == 6
    expected = naive_training(naive, examples(12), epochs=2)
    rows = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if row["event"] == "train"]
    assert [row["nll"] for row in rows] == pytest.approx(expected, rel=1e-5)
    for mine, theirs in zip(ours.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", ["sft", "gift"])
def test_cutting_a_batch_differently_changes_nothing(tmp_path: Path, tokenizer, objective: str):
    options = {"beta": 2.0} if objective == "gift" else {}
    whole, cut = student(), student()
    run(whole, tokenizer, tmp_path / "a", objective=objective, **options)
    run(cut, tokenizer, tmp_path / "b", objective=objective, micro_tokens=20, **options)
    for mine, theirs in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 5])
def test_a_killed_run_ends_with_the_same_weights_and_log(tmp_path: Path, tokenizer, stop_at: int):
    whole = student()
    run(whole, tokenizer, tmp_path / "whole", objective="gift", beta=2.0)
    killed = student()
    with pytest.raises(KilledError):
        run(killed, tokenizer, tmp_path / "killed", objective="gift", beta=2.0, stop_at=stop_at)
    continued = student()
    run(continued, tokenizer, tmp_path / "killed", objective="gift", beta=2.0)
    for mine, theirs in zip(whole.parameters(), continued.parameters(), strict=True):
        assert torch.equal(mine, theirs)

    def numbers(folder: str):
        return [
            {k: v for k, v in row.items() if k != "tokens_per_s"}
            for row in read_jsonl(tmp_path / folder / "metrics.jsonl")
        ]

    assert numbers("killed") == numbers("whole")


def test_validation_is_plain_nll_whatever_the_objective(tmp_path: Path, tokenizer):
    model = student()
    run(model, tokenizer, tmp_path, objective="gift", beta=2.0)
    rows = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if row["event"] == "validation"]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    batch = collate(examples(3, seed=1), 0)
    for weights, row in ((student(), rows[0]), (model, rows[-1])):
        logits = weights(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)
        assert row["val_nll"] == pytest.approx(nll.item(), rel=1e-5)
        assert row["val_tokens"] == int((batch["labels"] != IGNORED).sum())


def test_resuming_with_other_ranks_is_refused(tmp_path: Path, tokenizer):
    from gift.cli import UserError
    from gift.records import read_json, write_json

    with pytest.raises(KilledError):
        run(student(), tokenizer, tmp_path, stop_at=3)
    (state,) = (tmp_path / "resume").glob("step-*")
    write_json(state / "progress.json", {**read_json(state / "progress.json"), "world_size": 2})
    with pytest.raises(UserError, match="saved by 2 ranks"):
        run(student(), tokenizer, tmp_path)


def test_clipping_off_leaves_gradients_alone():
    model = student()
    engine = TrainingEngine(
        sft.LossModule(model, resolve("sft", {}), None, None),
        model,
        Engine(zero_stage=0, dtype="float32"),
        Optimizer(lr=0.0, max_grad_norm=0.0, weight_decay=0.0),
    )
    batch = collate(examples(4), 0)
    tokens = int((batch["labels"] != IGNORED).sum())
    twin = student()
    logits = twin(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED).backward()
    expected = torch.cat([p.grad.flatten() for p in twin.parameters()]).norm().item()
    loss, _ = engine(**batch)
    engine.backward(loss, tokens)
    assert engine.step(lr=0.0) == pytest.approx(expected, rel=1e-5)
