"""The main job as its user runs it: from nothing to a report, killed at every stage, and given bad input."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gift import steps, train
from gift.cli import UserError
from gift.job import Job
from gift.recipe import load_recipe
from gift.records import RunDir, read_json, read_jsonl, read_table, write_json

ROOT = Path(__file__).parents[2]
TINY = """
base:
  model: nano
  pretrain: {documents: 960, hidden: 16, layers: 1, heads: 2, vocab: 320}
data: {source: nano, sft: 32, rl: 16, validation: 8, max_length: 256}
engine: {zero_stage: 0, dtype: float32}
reference: {mode: cached}
methods:
  sft: {objective: sft, label: SFT}
  gift: {objective: gift, label: GIFT, options: {beta: 4.0}}
  relift: {label: ReLIFT, data: joint, rl: {algorithm: relift, clip: false, relift: {buffer: 4, optimizer: {lr: 1e-3}}}}
init: {epochs: 2, batch_size: 8, optimizer: {lr: 1e-3}, save_every: 3}
rl:
  {batch_size: 4, group_size: 4, max_tokens: 24, optimizer: {lr: 1e-3}, validate_every: 2, validation_items: 4,
   save_every: 1}
eval: {suites: [nano], limit: 3}
drift: {batch_size: 4}
"""


class Command:
    """`python -m gift.train` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(TINY)
        self.run = folder / "runs" / "tiny"
        self.cache = folder / "cache"

    def start(self, *overrides: str, file_limit: int | None = None, ranks: int = 0) -> subprocess.Popen[str]:
        environment = {**os.environ, "GIFT_CACHE": str(self.cache), "OMP_NUM_THREADS": "1"}

        def limit() -> None:
            if file_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks else []
        arguments = [str(self.recipe), "--runs", str(self.folder / "runs"), *overrides]
        return subprocess.Popen(
            [sys.executable, "-m", *launcher, "gift.train", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limit,
        )

    def finish(self, *overrides: str, **options: int) -> tuple[int, str, str]:
        process = self.start(*overrides, **options)
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err

    def kill_when(self, reached, how: signal.Signals) -> str:
        """Starts the job, sends the signal once `reached()` holds, and returns what it printed on stderr."""
        process = self.start()
        deadline = time.monotonic() + 120
        while not reached():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "the job did not get there"
            time.sleep(0.005)
        process.send_signal(how)
        return process.communicate(timeout=60)[1]

    def numbers(self) -> dict[str, object]:
        """All that must not depend on interruptions: every record and every weight, without times."""
        timed = {"seconds", "tokens_per_s"}
        logs = [self.run / "metrics.jsonl", *sorted(self.run.glob("rollouts/*/*.jsonl"))]
        manifest = read_json(self.run / "manifest.json")
        return {
            "weights": [(node["id"], node["weights_sha256"]) for node in manifest["lineage"]],
            "items": read_table(self.run / "items.parquet"),
            "drift": {file.name: read_table(file) for file in sorted(self.run.glob("drift/*.parquet"))},
            "samples": {
                str(file.relative_to(self.run)): file.read_text()
                for what in ("samples", "verdicts")
                for file in sorted(self.run.glob(f"{what}/*/*.jsonl"))
            },
            "data": {file.name: file.read_text() for file in sorted(self.run.glob("data/*.jsonl"))},
            **{
                str(log.relative_to(self.run)): [
                    {name: value for name, value in row.items() if name not in timed} for row in read_jsonl(log)
                ]
                for log in logs
            },
        }


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Command:
    job = Command(tmp_path_factory.mktemp("whole"))
    code, out, err = job.finish()
    assert code == 0, err
    job.output = out
    return job


@pytest.mark.slow
def test_from_nothing_to_a_report(finished: Command):
    manifest = read_json(finished.run / "manifest.json")
    assert manifest["status"] == "complete"
    assert [(node["id"], node["parent"]) for node in manifest["lineage"]] == [
        ("base", None),
        ("sft", "base"),
        ("gift", "base"),
        ("sft-rl", "sft"),
        ("gift-rl", "gift"),
        ("relift-rl", "base"),
    ]
    assert (finished.run / "report.html").stat().st_size > 10_000
    assert str(finished.run / "report.html") in finished.output
    for policy in ("Base", "SFT", "GIFT", "SFT + RL", "GIFT + RL", "ReLIFT"):
        assert policy in finished.output
    assert len({node["weights_sha256"] for node in manifest["lineage"]}) >= 4, "training changed nothing"
    assert manifest["reference"]["gift"]["max_error"] <= 1.001e-3
    assert not list(finished.run.rglob("*.tmp")), "half-written files were left behind"
    assert not list(finished.run.rglob("*resume*")), "the state to resume from is no longer needed"


@pytest.mark.slow
def test_a_finished_run_is_not_done_again(finished: Command):
    before = finished.numbers()
    code, out, _ = finished.finish()
    assert code == 0
    assert out.count("done before") == len(read_json(finished.run / "manifest.json")["steps"])
    assert finished.numbers() == before


@pytest.mark.slow
def test_killed_at_every_stage_it_ends_with_the_same_numbers(finished: Command, tmp_path: Path):
    job = Command(tmp_path)

    def lines(pattern: str, count: int):
        return lambda: sum(file.read_bytes().count(b"\n") for file in job.folder.glob(pattern)) >= count

    def running(step: str):
        manifest = job.run / "manifest.json"
        return lambda: manifest.exists() and json.loads(manifest.read_text())["steps"].get(step, {}).get("status")

    stages = [
        (lines("cache/*/metrics.jsonl", 7), signal.SIGKILL),
        (lines("runs/tiny/metrics.jsonl", 5), signal.SIGINT),
        (running("init gift"), signal.SIGKILL),
        (lines("runs/tiny/rollouts/sft-rl/*.jsonl", 16), signal.SIGKILL),
        (lines("runs/tiny/rollouts/gift-rl/*.jsonl", 40), signal.SIGKILL),
        (lines("runs/tiny/rollouts/relift-rl/*.jsonl", 80), signal.SIGKILL),
        (lines("runs/tiny/samples/gift/chain.jsonl", 1), signal.SIGKILL),
        (running("drift"), signal.SIGKILL),
        (running("report"), signal.SIGKILL),
    ]
    for reached, how in stages:
        err = job.kill_when(reached, how)
        assert "Traceback" not in err
        assert how is signal.SIGKILL or "run the same command again" in err
    code, _, err = job.finish()
    assert code == 0, err
    assert job.numbers() == finished.numbers()


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(finished: Command, tmp_path: Path):
    job = Command(tmp_path)
    job.cache = finished.cache
    code, _, err = job.finish(file_limit=12_000)  # less than any checkpoint
    assert code == 2
    (line,) = [line for line in err.splitlines() if line]
    assert line.startswith("error: ")
    assert not list(job.run.rglob("*.safetensors"))
    code, _, err = job.finish()
    assert code == 0, err
    assert job.numbers() == finished.numbers()


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{"zero_stage": 3, "dtype": "float32"}, {"zero_stage": 2, "dtype": "bfloat16"}])
def test_two_ranks_train_as_one_does(finished: Command, tmp_path: Path, engine: dict[str, object]):
    job = Command(tmp_path)
    job.recipe.write_text(TINY.replace("{zero_stage: 0, dtype: float32}", json.dumps(engine)))
    code, _, err = job.finish(ranks=2)
    assert code == 0, err
    tolerance = 1e-5 if engine["dtype"] == "float32" else 5e-3

    def losses(one: Command) -> list[float]:
        rows = read_jsonl(one.run / "metrics.jsonl")
        return [row["nll"] for row in rows if row["stage"] == "init" and row["event"] == "train"]

    assert losses(job) == pytest.approx(losses(finished), abs=tolerance, rel=0)
    first, *_, last = losses(finished)
    assert first - last > 20 * tolerance, "what is learnt is so little that a run without updates would pass"


@pytest.mark.slow
def test_every_row_of_the_tables_runs_from_the_committed_recipe(tmp_path: Path):
    job = Command(tmp_path)
    job.recipe = Path("nano-all")
    code, out, err = job.finish(
        *("base.pretrain.documents=960", "base.pretrain.hidden=16", "base.pretrain.layers=1", "base.pretrain.heads=2"),
        *("base.pretrain.vocab=320", "data.sft=32", "data.rl=32", "data.validation=8", "init.epochs=1", "eval.limit=2"),
        *("rl.group_size=4", "rl.max_tokens=8", "rl.validation_items=2"),
    )
    assert code == 0, err
    rows = load_recipe("nano-all").methods
    lineage = read_json(tmp_path / "runs" / "nano-all" / "manifest.json")["lineage"]
    assert len(rows) == 12
    assert {node["method"] for node in lineage} == {None, *rows}
    assert all(f"\n{method.label} " in out for method in rows.values())


def bad(tmp_path: Path, recipe: str, *overrides: str) -> str:
    """What the job says of a recipe it cannot run: one line, exit code 2, no run left half-made."""
    job = Command(tmp_path)
    job.recipe.write_text(recipe)
    code, _, err = job.finish(*overrides)
    assert code == 2, err
    (line,) = [line for line in err.splitlines() if line]
    assert not list((tmp_path / "runs").rglob("*.safetensors"))
    return line


@pytest.mark.slow
def test_bad_input_is_one_line_that_says_what_to_do(tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 + 1 =", "response": "2", "answer": "2"}\n{"prompt": "1 + 2 =", "response"\n')
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    (hollow / "config.json").write_text("{}")

    assert "did you mean 'epochs'" in bad(tmp_path / "a", TINY, "init.epoch=3")
    local = TINY.replace("model: nano", f"model: {hollow}").replace("source: nano", f"source: {rows}")
    assert f"{hollow}: no *.safetensors" in bad(tmp_path / "b", local)


def in_process(tmp_path: Path, *arguments: str) -> str:
    with pytest.raises(UserError) as error:
        train.main([*arguments, "--runs", str(tmp_path / "runs")])
    return str(error.value)


def test_unknown_recipe_and_suite_name_the_nearest(tmp_path: Path):
    assert "did you mean 'nano'" in in_process(tmp_path, "nani")
    assert "did you mean 'nano'" in in_process(tmp_path, "nano", "eval.suites=[nanp]")
    assert not (tmp_path / "runs").exists()


def test_missing_data_is_said_before_any_work(tmp_path: Path):
    local = ["nano", f"base.model={tmp_path / 'model'}", f"data.source={tmp_path / 'gone.jsonl'}"]
    assert "gone.jsonl: no such data file" in in_process(tmp_path, *local)
    assert "nowhere: no such folder" in in_process(tmp_path, "nano", "eval.data_dir=nowhere")
    assert not (tmp_path / "runs").exists()


def test_another_recipe_under_the_same_name_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(steps.Steps, "execute", lambda self: True)
    monkeypatch.setattr(train, "summary_table", lambda path: "")
    assert train.main(["nano", "--runs", str(tmp_path)]) == 0
    with pytest.raises(UserError, match=r"differs in: seed\)"):
        train.main(["nano", "seed=4", "--runs", str(tmp_path)])


def test_settings_that_decide_no_number_may_change(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(steps.Steps, "execute", lambda self: True)
    monkeypatch.setattr(train, "summary_table", lambda path: "")
    nano = ["nano", "--runs", str(tmp_path)]
    assert train.main(nano) == 0
    manifest = tmp_path / "nano" / "manifest.json"
    done = {name: {"status": "done"} for name in ("base", "init sft", "eval", "drift", "report")}
    write_json(manifest, {**read_json(manifest), "steps": done})
    changed = [*nano, "engine.micro_tokens=256", "engine.gradient_checkpointing=true"]
    assert train.main(changed) == 0
    assert "another engine.gradient_checkpointing, engine.micro_tokens" in capsys.readouterr().out
    assert read_json(manifest)["steps"] == done
    assert read_json(manifest)["recipe"]["engine"]["micro_tokens"] == 256
    for decisive in ("init.epochs=1", "engine.zero_stage=1"):
        with pytest.raises(UserError, match=rf"differs in: .*{decisive.partition('=')[0]}"):
            train.main([*changed, decisive])
    assert train.main([*changed, "eval.limit=3"]) == 0
    assert set(read_json(manifest)["steps"]) == {"base", "init sft", "drift"}
    assert len(read_json(manifest)["sessions"]) == 3


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ('{"prompt": "q", "response"', "rows.jsonl:2: malformed row"),
        ('{"prompt": "q", "answer": "1"}', "rows.jsonl:2: no column 'response'"),
        ('{"prompt": "q", "response": 3, "answer": "1"}', "rows.jsonl:2: column 'response' is not text"),
    ],
)
def test_malformed_data_names_file_and_row(tmp_path: Path, row: str, complaint: str):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 + 1 =", "response": "2", "answer": "2"}\n' + row + "\n")
    recipe = load_recipe("nano", [f"data.source={rows}", "base.model=./somewhere"])
    run = RunDir.create(tmp_path / "run", kind="train", recipe={})
    with pytest.raises(UserError, match=complaint):
        Job(recipe, run).data()
    assert not (run.path / "data").exists()
