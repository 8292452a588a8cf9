"""vLLM beside a policy in training, on two ranks, at every ZeRO stage: after each step it has the trainer's weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_server import servable_checkpoint
from vllm_worker import CASES, STEPS

pytest.importorskip("vllm")

from gift.models import load_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, tiny_checkpoint) -> Path:
    """What two ranks wrote of every case: one launch for all."""
    folder = tmp_path_factory.mktemp("vllm-ranks")
    checkpoint = servable_checkpoint(folder / "policy", load_tokenizer(tiny_checkpoint))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = [str(Path(__file__).with_name("vllm_worker.py")), str(checkpoint), str(folder)]
    done = subprocess.run([*launch, *worker], env=environment, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_every_rank_samples_from_the_policy_as_it_is(two_ranks: Path, name: str, rank: int):
    rows = json.loads((two_ranks / f"{name}, rank {rank}.json").read_text())
    assert len(rows) == STEPS
    exact = "bfloat16" not in CASES[name].values()
    for row in rows:
        assert len(row["greedy"]) == 3 - rank
        assert 0 <= row["probe_gap"] < (1e-5 if exact else 0.05)
        if exact:
            for ours, expected in zip(row["greedy"], row["expected"], strict=True):
                assert ours["token_ids"] == expected["token_ids"]
                assert ours["logps"] == pytest.approx(expected["logps"], abs=1e-4)
        for ours, expected in zip(row["drawn"], row["scored"], strict=True):
            gaps = [abs(a - b) for a, b in zip(ours, expected, strict=True)]
            assert sum(gaps) / len(gaps) < (1e-4 if exact else 0.1)
    greedy = [[sample["token_ids"] for sample in row["greedy"]] for row in rows]
    assert greedy[0] != greedy[1] != greedy[2]  # the steps were large enough to see
