"""The main job with vLLM against the same job with the hf engine: RL's rewards and evaluation's verdicts are alike."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from gift.records import read_json, read_jsonl

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, BATCH, GROUP = 6, 16, 8
OVERRIDES = [
    *("base.pretrain.documents=24000", "base.pretrain.hidden=64", "base.pretrain.layers=4", "base.pretrain.heads=2"),
    *("methods.gift=null", "data.sft=1024", "data.validation=40", f"data.rl={STEPS * BATCH}"),
    *(f"rl.batch_size={BATCH}", f"rl.group_size={GROUP}", "rl.validate_every=0", "eval.limit=60"),
    *("generation.cache_gb=0.5", "drift.sequences=20"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The same recipe with either engine, from one base and one SFT checkpoint's worth of training."""
    folder = tmp_path_factory.mktemp("vllm-job")
    environment = {**os.environ, "GIFT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    for engine in ("hf", "vllm"):
        command = [sys.executable, "-m", "gift.train", "nano-vllm", *OVERRIDES, "--runs", str(folder)]
        command += [f"name={engine}", f"generation.engine={engine}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stderr[-4000:]
    return {engine: folder / engine for engine in ("hf", "vllm")}


def rl_rows(run: Path) -> list[dict]:
    rows = read_jsonl(run / "metrics.jsonl")
    return [row for row in rows if row["stage"] == "rl" and row["event"] == "train"]


def test_both_start_from_the_same_policy(runs):
    first, second = (
        {node["id"]: node["weights_sha256"] for node in read_json(run / "manifest.json")["lineage"]}
        for run in runs.values()
    )
    assert first["sft"] == second["sft"]
    assert first["sft-rl"] != second["sft-rl"]  # other samples, other updates


def test_the_curves_of_rewards_are_compatible(runs):
    """The mean rewards of a step differ by no more than 4 standard errors, a prompt's samples taken as one cluster."""
    curves = [[row["reward_mean"] for row in rl_rows(run)] for run in runs.values()]
    assert [len(curve) for curve in curves] == [STEPS, STEPS]
    spread = math.sqrt(0.25 / BATCH)  # of a step's mean, were the samples of a prompt all alike: the widest it can be
    for hf, vllm in zip(*curves, strict=True):
        assert abs(hf - vllm) < 4 * math.sqrt(2) * spread
    pooled = [sum(curve) / STEPS for curve in curves]
    assert abs(pooled[0] - pooled[1]) < 4 * math.sqrt(2 / STEPS) * spread
    assert min(pooled) > 0.05  # there was something to compare


def test_engine_and_trainer_agree_at_every_step(runs):
    for row in rl_rows(runs["vllm"]):
        assert row["generator_gap"] < 1e-5
        assert row["generator_ratio"] == pytest.approx(1, abs=1e-4)
        assert row["probe_gap"] < 1e-5
        assert row["seconds"]["sync"] > 0


def test_evaluation_gives_compatible_accuracies(runs):
    """Of the checkpoints that the runs share, on every task of the suite: 60 items x 8 samples each."""
    for task in ("chain", "chain-long"):
        for policy in ("base", "sft"):
            means = []
            for run in runs.values():
                verdicts = read_jsonl(run / "verdicts" / policy / f"{task}.jsonl")
                scores = [verdict["score"] for verdict in verdicts if verdict["grader"] == "strict"]
                assert len(scores) == 60 * 8
                means.append(sum(scores) / len(scores))
            assert abs(means[0] - means[1]) < 4 * math.sqrt(2 * 0.25 / 60)


def test_the_manifest_says_what_sampled(runs):
    for engine, run in runs.items():
        assert read_json(run / "manifest.json")["eval"]["nano"]["protocol"]["engine"] == engine
