"""Stage 1 against a hand-written loop, its independence of micro-batches, and its exact continuation after a kill."""

from __future__ import annotations

import copy
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from transformers import PreTrainedModel

from gift import nano, sft
from gift.batches import IGNORED, Encoded, collate, epoch_order
from gift.cli import UserError
from gift.engine import TrainingEngine
from gift.objectives import OBJECTIVES, label_weight, resolve
from gift.recipe import Engine, Init, Optimizer
from gift.records import JsonlLog, read_json, read_jsonl, write_json
from gift.reference import OnlineReference
from gift.reference.cache import Demand
from gift.reference.scoring import score

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


OPTIMIZER = Optimizer(lr=1e-2, warmup_steps=2, max_grad_norm=0.5)


def run(
    model,
    tokenizer,
    folder: Path,
    *,
    data=None,
    objective="sft",
    stop_at=None,
    engine=None,
    checkpoint=lambda engine, step: None,
    init=None,
    reference=None,
    **options,
) -> list[dict]:
    """Trains on 12 examples in batches of 4; `stop_at` raises after that step, like a kill. Returns the log."""
    settings = Init(**{"epochs": 2, "batch_size": 4, "save_every": 2, "optimizer": OPTIMIZER, **(init or {})})
    registered = OBJECTIVES[objective]
    loss = sft.Loss(
        resolve(objective, options),
        reference or (OnlineReference(copy.deepcopy(model)) if registered.needs_reference else None),
        registered.needs_old_policy,
        partial(label_weight, **options) if objective == "gift" else None,
    )
    log = JsonlLog(folder / "metrics.jsonl", KEY)
    if stop_at is not None:
        log.append = stop_after(log.append, stop_at)
    with log:
        sft.Trainer(
            sft.Stage("p", "init", data or examples(12), examples(3, seed=1), seed=5),
            model,
            tokenizer,
            loss,
            settings=settings,
            engine_settings=Engine(**{"zero_stage": 0, "dtype": "float32", "micro_tokens": 10_000, **(engine or {})}),
            resume_dir=folder / "resume",
            log=log,
        ).train(checkpoint)
    return read_jsonl(folder / "metrics.jsonl")


class KilledError(Exception):
    pass


def stop_after(append, step: int):
    def appended(rows):
        rows = list(rows)
        append(rows)
        if rows[0]["event"] == "train" and rows[0]["step"] == step:
            raise KilledError

    return appended


def batches(data: list[Encoded], epochs: int):
    """The batches of 4 that training makes of the data, in order."""
    for epoch in range(epochs):
        order = epoch_order(len(data), 5, epoch)
        for start in range(0, len(data), 4):
            yield [data[index] for index in order[start : start + 4]]


def log_probs(model, batch: list[Encoded]) -> list[torch.Tensor]:
    """log pi over the vocabulary at every response position, [response tokens, V] an example."""
    found = []
    for example in batch:
        ids = torch.tensor([example.ids])
        logits = model(input_ids=ids).logits[0, example.prompt_length - 1 : -1]
        found.append(torch.log_softmax(logits.double(), -1))
    return found


def labels_of(batch: list[Encoded]) -> list[torch.Tensor]:
    return [torch.tensor(example.ids[example.prompt_length :])[:, None] for example in batch]


def naive_update(model, optimizer, loss, step: int) -> None:
    """One clipped AdamW step at the warmed-up learning rate."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 2)
    optimizer.step()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01)


def assert_same_weights(ours, theirs) -> None:
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=2e-5)


def naive_training(model, data: list[Encoded], epochs: int) -> list[float]:
    """The same training with materialised logits and torch's own loss, clipping and AdamW."""
    optimizer, losses = adamw(model), []
    for step, batch in enumerate(batches(data, epochs)):
        tensors = collate(batch, 0)
        logits = model(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tensors["labels"].flatten(), ignore_index=IGNORED
        )
        naive_update(model, optimizer, loss, step)
        losses.append(loss.item())
    return losses


def test_sft_equals_a_hand_written_loop(tmp_path: Path, tokenizer):
    ours, naive = student(), student()
    rows = [row for row in run(ours, tokenizer, tmp_path) if row["event"] == "train"]
    assert [row["nll"] for row in rows] == pytest.approx(naive_training(naive, examples(12), epochs=2), rel=1e-5)
    assert_same_weights(ours, naive)


def test_psft_equals_a_hand_written_loop(tmp_path: Path, tokenizer):
    """Two updates a batch: the second one's ratios are to the policy from before the first."""
    ours, naive = student(), student()
    rows = run(ours, tokenizer, tmp_path, objective="psft", clip_high=0.05, init={"updates_per_batch": 2})
    optimizer, clipped = adamw(naive), 0
    for step, batch in enumerate(batches(examples(12), 2)):
        with torch.no_grad():
            old = [logp.gather(1, y) for logp, y in zip(log_probs(naive, batch), labels_of(batch), strict=True)]
        for part in (slice(0, 2), slice(2, 4)):
            new = zip(log_probs(naive, batch[part]), labels_of(batch[part]), old[part], strict=True)
            ratios = torch.cat([(logp.gather(1, y) - before).exp() for logp, y, before in new])
            clipped += int((ratios > 1.05).sum())
            naive_update(naive, optimizer, -ratios.clamp(max=1.05).mean(), step)
    assert clipped > 0
    assert_same_weights(ours, naive)
    assert sum(row["event"] == "train" for row in rows) == 6


def test_gift_equals_a_hand_written_loop(tmp_path: Path, tokenizer):
    """With the paper's own reduction, Eq. 8: tokens summed, sequences averaged."""
    base = student()
    ours, naive = student(), student()
    rows = run(ours, tokenizer, tmp_path, objective="gift", beta=2.0, init={"reduction": "seq_sum"})
    optimizer, soft, surprisal = adamw(naive), [], []
    for step, batch in enumerate(batches(examples(12), 2)):
        loss = torch.zeros((), dtype=torch.float64)
        for logp, ref, y in zip(log_probs(naive, batch), log_probs(base, batch), labels_of(batch), strict=True):
            bonus = torch.zeros_like(ref).scatter(1, y, 2.0)
            target = torch.softmax(ref.detach() + bonus, -1)
            loss = loss - (target * logp).sum()
            odds = ((2.0 + ref.gather(1, y)).exp() - ref.gather(1, y).exp()).detach()  # (e^beta - 1) p(y)
            soft.append((odds / (1 + odds) < 0.99).double())
            surprisal.append(-ref.gather(1, y).detach())
        naive_update(naive, optimizer, loss / 4, step)
    assert_same_weights(ours, naive)
    trained = [row for row in rows if row["event"] == "train"]
    tokens = [sum(row["surprisal"]["counts"]) for row in trained]
    assert sum(tokens) == len(torch.cat(surprisal))
    share = sum(row["soft_share"] * count for row, count in zip(trained, tokens, strict=True)) / sum(tokens)
    assert share == pytest.approx(torch.cat(soft).mean().item())
    below_five = sum(sum(row["surprisal"]["counts"][:5]) for row in trained)
    assert trained[0]["surprisal"]["edges"][4] == 5
    assert below_five == int((torch.cat(surprisal) < 5).sum())


@pytest.mark.parametrize("tolerance", [0.1, 1e-2, 1e-6])
def test_a_cached_reference_keeps_the_loss_within_its_bound(tmp_path: Path, tokenizer, tolerance: float):
    """A target that is off by e in total variation changes a token's loss by at most e times the spread of log pi."""

    def base() -> PreTrainedModel:
        torch.manual_seed(1)
        model = student()
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(20)  # sharper predictions: a tail that need not be stored
        return model

    demand = Demand((("gift", {"beta": 2.0}),), tolerance)
    cache = score(
        base, examples(12), demand, key={"made": "here"}, budget_bytes=1e9, micro_tokens=100, root=tmp_path / "cache"
    )
    assert cache is not None
    with torch.no_grad():
        spread = max(float((logp.amax(-1) - logp.amin(-1)).max()) for logp in log_probs(base(), examples(12)))
    slow = {"optimizer": Optimizer(lr=1e-4)}
    online, cached = (
        list(run(base(), tokenizer, tmp_path / name, objective="gift", beta=2.0, init=slow, reference=source))
        for name, source in (("online", None), ("cached", cache))
    )
    losses = [[row["loss"] for row in rows if row["event"] == "train"] for rows in (online, cached)]
    gaps = [abs(a - b) for a, b in zip(*losses, strict=True)]
    assert max(gaps) <= 1.1 * tolerance * spread + 1e-5
    assert tolerance < 0.1 or cache.info.max_error > 0.01
    shares = [[row["soft_share"] for row in rows if row["event"] == "train"] for rows in (online, cached)]
    assert shares[0] == shares[1]


OPTIONS = {"gift": {"beta": 2.0}, "psft": {"clip_high": 0.05}}


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("cut", [{"micro_tokens": 20}, {"packing": True}, {"packing": True, "micro_tokens": 40}])
def test_cutting_a_batch_differently_changes_nothing(tmp_path: Path, tokenizer, objective: str, cut: dict):
    options = {**OPTIONS.get(objective, {}), "init": {"updates_per_batch": 2}, "objective": objective}
    whole, pieces = student(), student()
    run(whole, tokenizer, tmp_path / "a", **options)
    run(pieces, tokenizer, tmp_path / "b", engine=cut, **options)
    assert_same_weights(whole, pieces)


def test_no_batch_at_all_is_an_error(tmp_path: Path, tokenizer):
    with pytest.raises(UserError, match=r"p: 3 examples .* make no batch of 4"):
        run(student(), tokenizer, tmp_path, data=examples(3))


def test_the_selected_epoch_is_taken_and_later_ones_only_logged(tmp_path: Path, tokenizer):
    taken: dict[int, dict[str, torch.Tensor]] = {}

    def take(engine: TrainingEngine, step: int) -> None:
        taken[step] = copy.deepcopy(engine.model.state_dict())

    whole, short = student(), student()
    rows = run(whole, tokenizer, tmp_path / "a", checkpoint=take, init={"epochs": 3, "select_epoch": 2})
    run(short, tokenizer, tmp_path / "b")
    assert list(taken) == [6]
    for name, value in short.state_dict().items():
        assert torch.equal(taken[6][name], value)
    assert [row["epoch"] for row in rows if row["event"] == "validation"] == [0, 1, 2, 3]


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
    log = run(model, tokenizer, tmp_path, objective="gift", beta=2.0)
    rows = [row for row in log if row["event"] == "validation"]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    batch = collate(examples(3, seed=1), 0)
    for weights, row in ((student(), rows[0]), (model, rows[-1])):
        logits = weights(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)
        assert row["val_nll"] == pytest.approx(nll.item(), rel=1e-5)
        assert row["val_tokens"] == int((batch["labels"] != IGNORED).sum())


def test_resuming_with_other_ranks_is_refused(tmp_path: Path, tokenizer):

    with pytest.raises(KilledError):
        run(student(), tokenizer, tmp_path, stop_at=3)
    (state,) = (tmp_path / "resume").glob("step-*")
    write_json(state / "progress.json", {**read_json(state / "progress.json"), "world_size": 2})
    with pytest.raises(UserError, match="saved by 2 ranks"):
        run(student(), tokenizer, tmp_path)
