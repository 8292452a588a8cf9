"""Every ZeRO stage on two ranks against torch's own AdamW on one: losses, norms, weights, resuming, exporting."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_worker import CASES, OPTIMIZER, STEPS, base_for, batch, by_hand, model_for
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gift.cli import UserError
from gift.states import read_newest

TESTS = Path(__file__).parents[1]
EXACT = [name for name in CASES if "bfloat16" not in name]
SHARDED = [name for name in CASES if "stage 3" in name]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """What two ranks wrote of every case; one launch for all, because DeepSpeed takes long to import."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = [str(Path(__file__).with_name("engine_worker.py")), str(folder)]
    done = subprocess.run([*launch, *worker], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def oracle():
    """Rows and final weights of the hand-written loop, by whether the head is tied and whether there is a base."""
    found = {}
    for tied, base in itertools.product((False, True), repeat=2):
        case = {"tied": tied, "base": base}
        model = model_for(case)
        found[tied, base] = by_hand(model, base=base_for(case)), model.state_dict()
    return found


def rows_of(folder: Path, name: str, way: str = "whole") -> list[dict[str, float]]:
    return json.loads((folder / name / "rows.json").read_text())[way]


def exported(folder: Path, name: str, way: str = "whole") -> dict[str, torch.Tensor]:
    return load_file(folder / name / way / "model.safetensors")


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_train_as_torch_does_on_one(two_ranks: Path, oracle, name: str):
    rows, weights = oracle[CASES[name].get("tied", False), CASES[name].get("base", False)]
    ours = rows_of(two_ranks, name)
    assert len(ours) == STEPS
    for row, (loss, norm) in zip(ours, rows, strict=True):
        assert row["loss"] == pytest.approx(loss, rel=2e-6)
        assert row["norm"] == pytest.approx(norm, rel=2e-5)
        assert norm > OPTIMIZER.max_grad_norm, "nothing was clipped, so this test would not see how"
    for key, weight in exported(two_ranks, name).items():
        # Adam divides a gradient by its size: where it is almost 0, its last bit decides over an update of up to 1e-2.
        torch.testing.assert_close(weight, weights[key], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", [name for name in CASES if name not in EXACT])
def test_bfloat16_follows_float32(two_ranks: Path, oracle, name: str):
    for row, (loss, norm) in zip(rows_of(two_ranks, name), oracle[False, False][0], strict=True):
        assert row["loss"] == pytest.approx(loss, abs=5e-3)
        assert row["norm"] == pytest.approx(norm, rel=2e-2)
    assert {weight.dtype for weight in exported(two_ranks, name).values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_ends_with_the_same_bits(two_ranks: Path, name: str):
    assert rows_of(two_ranks, name, "resumed") == rows_of(two_ranks, name)[STEPS // 2 :]
    whole, resumed = exported(two_ranks, name), exported(two_ranks, name, "resumed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("name", CASES)
def test_the_exported_folder_is_the_model_that_was_trained(two_ranks: Path, name: str):
    names = {key for key in model_for(CASES[name]).state_dict() if key != "lm_head.weight" or "tied" not in name}
    assert exported(two_ranks, name).keys() == names
    model = AutoModelForCausalLM.from_pretrained(two_ranks / name / "whole", dtype="auto")
    with torch.no_grad():
        logits = model(input_ids=batch(0)[0][0]).logits
    trained = load_file(two_ranks / name / "whole" / "logits.bin")["logits"]
    torch.testing.assert_close(logits, trained, atol=1e-5 if name in EXACT else 5e-2, rtol=0)


@pytest.mark.parametrize("name", SHARDED)
def test_stage_3_leaves_no_parameter_whole(two_ranks: Path, name: str):
    assert {row["at_rest"] for row in rows_of(two_ranks, name)} == {0}


def test_another_number_of_ranks_is_refused(two_ranks: Path):
    with pytest.raises(UserError, match=r"step-000002: saved by 2 ranks, cannot be continued by 1; start as many"):
        read_newest(two_ranks / "stage 2" / "states")
