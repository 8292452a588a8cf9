"""Stage 1 on two ranks against the same on one, of every ZeRO stage and of all that a batch can be made of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sft_worker import CASES, train

TESTS = Path(__file__).parents[1]
EXACT = [name for name in CASES if "bfloat16" not in name]
ROUNDED = [name for name in CASES if name not in EXACT]
LOGGED = ("loss", "nll", "entropy", "soft_share", "val_nll")  # nats per token, or a share; where a row has them


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, Any]:
    """What two ranks found of every case; one launch for all, because DeepSpeed takes long to import."""
    folder = tmp_path_factory.mktemp("sft")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = [str(Path(__file__).with_name("sft_worker.py")), str(folder)]
    done = subprocess.run([*launch, *worker], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """The rows of a case on one rank at stage 0, without checkpointing and offloading, which change no number."""
    known: dict[str, list[dict[str, Any]]] = {}

    def rows_of(case: dict[str, Any], lr: float | None = None) -> list[dict[str, Any]]:
        plain = {name: value for name, value in case.items() if name not in ("gradient_checkpointing", "offload")}
        key = json.dumps([{**plain, "zero_stage": 0}, lr], sort_keys=True)
        if key not in known:
            options = {} if lr is None else {"lr": lr}
            known[key] = train({**plain, "zero_stage": 0}, tmp_path_factory.mktemp("alone"), **options)
        return known[key]

    return rows_of


def numbers(rows: list[dict[str, Any]]) -> list[float]:
    return [row[name] for row in rows for name in LOGGED if name in row]


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_train_as_one_does(two_ranks, one_rank, name: str):
    ours, alone = two_ranks[name]["rows"], one_rank(CASES[name])
    epoch = ["train"] * 3 + ["validation"]
    assert [row["event"] for row in ours] == ["validation", *epoch, *epoch]
    assert numbers(ours) == pytest.approx(numbers(alone), abs=1e-5, rel=0)
    for row, same in zip(ours, alone, strict=True):
        assert row.get("surprisal") == same.get("surprisal")
        assert row.get("grad_norm", 0) == pytest.approx(same.get("grad_norm", 0), rel=1e-4)


@pytest.mark.parametrize("name", ROUNDED)
def test_in_bfloat16_they_do_up_to_rounding(two_ranks, one_rank, name: str):
    tolerance = {"abs": 2e-3, "rel": 0}
    alone = one_rank(CASES[name])
    assert numbers(two_ranks[name]["rows"]) == pytest.approx(numbers(alone), **tolerance)
    for row, untrained in zip(alone[2:], one_rank(CASES[name], lr=0.0)[2:], strict=True):  # from the first update on
        assert numbers([row]) != pytest.approx(numbers([untrained]), **tolerance)


@pytest.mark.parametrize("name", CASES)
def test_one_of_the_ranks_had_nothing_to_do_in_some_micro_batches(two_ranks, name: str):
    assert max(two_ranks[name]["idle"]) > 0, "these runs would not tell whether idle micro-batches change anything"
