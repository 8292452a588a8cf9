import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import tiny_model
from toy_suite import PROTOCOL, MadeUpEngine, Sums, tiny_tokenizer, toy_run, toy_suite, write_checkpoint
from transformers.utils import logging

import evals.run
from evals.run import evaluate, main
from evals.suites import SUITES
from gift.cli import UserError
from gift.records import RunDir, read_jsonl, read_table, sha256_weights

TOKENIZER = tiny_tokenizer()


class Engines:
    """Builds made-up engines and remembers them. `interrupt_at` counts batches over all of them."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.interrupt_at = interrupt_at
        self.built: dict[str, MadeUpEngine] = {}

    def __call__(self, policy: str) -> MadeUpEngine:
        done = sum(len(engine.batches) for engine in self.built.values())
        left = None if self.interrupt_at is None else self.interrupt_at - done
        self.built[policy] = MadeUpEngine(TOKENIZER, interrupt_at=left)
        return self.built[policy]


def records(run: RunDir) -> dict[str, bytes]:
    """Every file of samples and the derived table, byte by byte."""
    files = [*(run.path / "samples").rglob("*.jsonl"), run.path / "items.parquet"]
    return {str(file.relative_to(run.path)): file.read_bytes() for file in files}


# ---------------------------------------------------------------------------------------------------------------------
# evaluate


def test_items_count_what_the_logs_hold(tmp_path):
    run = toy_run(tmp_path / "run", "sft", "gift")
    evaluate(run, ["sft", "gift"], toy_suite(), PROTOCOL, engine_for=Engines())
    columns = read_table(run.path / "items.parquet")
    assert list(columns) == ["task", "item", "policy", "run", "n", "correct"]
    rows = list(zip(*columns.values(), strict=True))
    keys = [row[:4] for row in rows]
    assert keys == sorted(keys)
    assert Counter(key[:1] + key[2:3] for key in keys) == {
        ("small", "sft"): 28,
        ("small", "gift"): 28,
        ("more", "sft"): 12,
        ("more", "gift"): 12,
    }
    samples = [row for file in (run.path / "samples").rglob("*.jsonl") for row in read_jsonl(file)]
    correct = Counter(
        (row["task"], row["item"], row["policy"], row["run"])
        for row in samples
        if row["completion"] == f"\\boxed{{{row['gold']}}}"
    )
    assert {row[:4]: row[5] for row in rows if row[5]} == correct
    assert {row[4] for row in rows} == {PROTOCOL.samples_per_run}


def test_results_are_those_of_the_definitions(tmp_path):
    run = toy_run(tmp_path / "run", "sft")
    (small, _) = evaluate(run, ["sft"], toy_suite(), PROTOCOL, engine_for=Engines()).results
    rows = read_jsonl(run.path / "samples" / "sft" / "small.jsonl")
    by_item = [[row["score"] for row in group] for _, group in itertools.groupby(rows, key=lambda row: row["item"])]
    run_means = [sum(row["score"] for row in rows if row["run"] == run) / 14 for run in range(4)]
    assert small.accuracy.estimate == pytest.approx(sum(run_means) / 4)
    assert 0 <= small.accuracy.low < small.accuracy.estimate < small.accuracy.high <= 1
    for k, value in small.pass_at.items():
        of_every_subset = [max(subset) for scores in by_item for subset in itertools.combinations(scores, k)]
        assert value == pytest.approx(sum(of_every_subset) / len(of_every_subset))
    assert list(small.pass_at) == [1, 2, 4, 8]
    assert small.items == 7
    assert small.truncated == pytest.approx(sum("well" in row["completion"] for row in rows) / 56)
    assert small.no_answer == pytest.approx(sum("boxed" not in row["completion"] for row in rows) / 56)
    assert small.tokens == pytest.approx(sum(row["tokens"] for row in rows) / 56)
    assert (small.no_room, small.less_room, small.ungraded) == (0, 0, 0)


def test_the_manifest_says_how_the_samples_were_made(tmp_path):
    run = toy_run(tmp_path / "run", "sft")
    evaluate(run, ["sft"], toy_suite(), PROTOCOL, engine_for=Engines(), seed=3, dtype="float32", limit=2)
    entry = RunDir.open(run.path).manifest["eval"]["toy"]
    assert entry["protocol"] == {
        "temperature": 0.6,
        "top_p": 1.0,
        "max_tokens": 24,
        "runs": 4,
        "samples_per_run": 2,
        "seed": 3,
        "prompt": "{problem}",
        "engine": "hf",
        "dtype": "float32",
        "batch_size": 20,
        "top_k": 0,
        "min_p": 0.0,
        "stop": [],
        "repetition_guard": None,
    }
    small = entry["tasks"]["small"]
    assert (small["label"], small["group"], small["items"]) == ("Small sums", "easy", 2)
    assert small["source"]["rows"] == 7
    assert set(small["grader"]) == {"name", "version"}
    assert small["policies"]["sft"]["weights_sha256"] == sha256_weights(run.checkpoint("sft"))


def test_an_interrupted_evaluation_ends_with_the_same_records(tmp_path):
    policies = ["sft", "gift"]
    whole = toy_run(tmp_path / "whole", *policies)
    engines = Engines()
    evaluate(whole, policies, toy_suite(), PROTOCOL, engine_for=engines)
    batches = sum(len(engine.batches) for engine in engines.built.values())
    assert batches == 2 * (4 + 2)
    run = toy_run(tmp_path / "run", *policies)
    for stop in range(batches - 1):
        engines = Engines(interrupt_at=1)
        with pytest.raises(KeyboardInterrupt):
            evaluate(RunDir.open(run.path), policies, toy_suite(), PROTOCOL, engine_for=engines)
        assert all(engine.closed for engine in engines.built.values()), f"stop {stop}"
    evaluate(RunDir.open(run.path), policies, toy_suite(), PROTOCOL, engine_for=Engines())
    assert records(run) == records(whole)


def test_a_finished_evaluation_builds_no_engine(tmp_path):
    run = toy_run(tmp_path / "run", "sft")
    first = evaluate(run, ["sft"], toy_suite(), PROTOCOL, engine_for=Engines())
    before = records(run)
    engines = Engines()
    again = evaluate(RunDir.open(run.path), ["sft"], toy_suite(), PROTOCOL, engine_for=engines)
    assert engines.built == {}
    assert records(run) == before
    assert [replace(result, tokens_per_second=None) for result in first.results] == again.results


def test_a_limit_takes_the_first_items_and_can_be_raised(tmp_path):
    run = toy_run(tmp_path / "run", "sft")
    log = run.path / "samples" / "sft" / "small.jsonl"
    few = evaluate(run, ["sft"], toy_suite(), PROTOCOL, engine_for=Engines(), limit=4)
    assert [result.items for result in few.results] == [4, 3]
    before = read_jsonl(log)
    assert {row["item"] for row in before} == {f"small-{n}" for n in range(4)}
    evaluate(run, ["sft"], toy_suite(), PROTOCOL, engine_for=Engines())
    assert read_jsonl(log)[: len(before)] == before
    assert len(read_jsonl(log)) == 7 * 8
    assert run.manifest["eval"]["toy"]["tasks"]["small"]["items"] == 7
    again = evaluate(run, ["sft"], toy_suite(), PROTOCOL, engine_for=Engines(), limit=4)
    assert [result.accuracy for result in again.results] == [result.accuracy for result in few.results]
    assert run.manifest["eval"]["toy"]["tasks"]["small"]["items"] == 7


def test_other_tasks_and_policies_join_what_is_there(tmp_path):
    run = toy_run(tmp_path / "run", "sft", "gift")
    evaluate(run, ["sft"], toy_suite(), PROTOCOL, engine_for=Engines(), tasks=["more"])
    evaluate(run, ["gift"], toy_suite(), PROTOCOL, engine_for=Engines())
    columns = read_table(run.path / "items.parquet")
    assert set(zip(columns["task"], columns["policy"], strict=True)) == {
        ("more", "sft"),
        ("small", "gift"),
        ("more", "gift"),
    }


CHANGES = {
    "temperature": ({"protocol": replace(PROTOCOL, temperature=1.0)}, "temperature was 0.6, is now 1.0"),
    "runs": ({"protocol": replace(PROTOCOL, runs=2)}, "runs was 4, is now 2"),
    "seed": ({"seed": 1}, "seed was 0, is now 1"),
    "dtype": ({"dtype": "float32"}, "dtype was 'auto', is now 'float32'"),
    "batch size": ({"batch_size": 8}, "batch_size was 20, is now 8"),
    "data": ({"suite": toy_suite(Sums("small", "Small sums", "easy", count=6))}, "small .*data sha256 was"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_samples_made_otherwise_are_never_mixed(tmp_path, change):
    arguments, message = CHANGES[change]
    run = toy_run(tmp_path / "run", "sft")
    evaluate(run, ["sft"], toy_suite(), PROTOCOL, engine_for=Engines())
    before = records(run)
    engines = Engines()
    with pytest.raises(UserError, match=message):
        evaluate(run, ["sft"], **{"suite": toy_suite(), "protocol": PROTOCOL, "engine_for": engines, **arguments})
    assert engines.built == {}
    assert records(run) == before


def test_samples_of_other_weights_template_or_grader_are_never_mixed(tmp_path, monkeypatch):
    run = toy_run(tmp_path / "run", "sft")

    def go_on():
        return evaluate(RunDir.open(run.path), ["sft"], toy_suite(), PROTOCOL, engine_for=Engines())

    evaluate(run, ["sft"], toy_suite(), PROTOCOL, engine_for=Engines(), limit=2)
    node = run.node("sft")
    run.add_node({**node, "weights_sha256": "other"})
    with pytest.raises(UserError, match=r"small by 'sft' .*weights_sha256 was .*, is now 'other'"):
        go_on()
    run.add_node(node)
    template = run.checkpoint("sft") / "chat_template.jinja"
    right = template.read_text()
    template.write_text("{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match=r"small by 'sft' .*chat_template_sha256 was"):
        go_on()
    template.write_text(right)
    with monkeypatch.context() as patched:
        patched.setattr(Sums, "grader", {"name": "gift.rewards", "version": "next"})
        with pytest.raises(UserError, match=r"grader was .*'next'"):
            go_on()
    assert [result.items for result in go_on().results] == [7, 3]


def test_an_unknown_policy_is_refused_before_anything_is_sampled(tmp_path):
    run = toy_run(tmp_path / "run", "sft")
    engines = Engines()
    with pytest.raises(UserError, match=r"no policy 'rl' in this run \(it has: sft\)"):
        evaluate(run, ["sft", "rl"], toy_suite(), PROTOCOL, engine_for=engines)
    assert engines.built == {}


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`main` in an empty folder, with the toy suite beside the real ones and engines that make answers up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(SUITES, "toy", toy_suite())
    monkeypatch.setattr(evals.run, "build_engine", lambda settings, checkpoint, *, dtype: MadeUpEngine(TOKENIZER))
    return main


def write_gsm8k(folder: Path, count: int = 3) -> Path:
    """A data folder that holds GSM8K and no other benchmark."""
    file = folder / "gsm8k" / "test.jsonl"
    file.parent.mkdir(parents=True)
    rows = [{"question": f"{n} + 1?", "answer": f"count\n#### {n + 1}"} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_checkpoint_gets_a_run_of_its_own(command, capsys):
    checkpoint = write_checkpoint(Path("models/step-7"))
    assert command(["--suite", "toy", "--model", "models/step-7"]) == 0
    weights = sha256_weights(checkpoint)
    run = RunDir.open(Path("runs") / f"eval-step-7-{weights[:8]}")
    assert (run.manifest["kind"], run.manifest["status"]) == ("eval", "complete")
    assert run.manifest["finished"] is not None
    (node,) = run.manifest["lineage"]
    assert (node["id"], node["weights_sha256"]) == ("step-7", weights)
    assert run.checkpoint("step-7") == checkpoint.resolve()
    shown = capsys.readouterr().out
    table = re.search(
        r"^small +step-7 +7 +(\d+\.\d) \[\d+\.\d, \d+\.\d\]( +\d+\.\d){3} ( +\d+\.\d%){2} +\d+ ", shown, re.M
    )
    rows = read_jsonl(run.path / "samples" / "step-7" / "small.jsonl")
    assert float(table[1]) == pytest.approx(100 * sum(row["score"] for row in rows) / len(rows), abs=0.05)
    for part in ("4 x 2 samples", "pass@2", "pass@4", "pass@8", "gift.rewards", f"{run.path}/items.parquet"):
        assert part in shown


def test_checkpoints_can_share_a_run_under_names_of_their_own(command):
    for number, name in enumerate(["sft", "gift"]):
        checkpoint = write_checkpoint(Path(f"models/{name}"), fill=number)
        argv = ["--suite", "toy", "--model", str(checkpoint), "--out", "both", "--policy-name", f"my-{name}"]
        assert command(argv) == 0
    assert set(read_table(Path("both/items.parquet"))["policy"]) == {"my-sft", "my-gift"}
    with pytest.raises(UserError, match="'my-sft' has other weights"):
        command(["--suite", "toy", "--model", "models/gift", "--out", "both", "--policy-name", "my-sft"])
    assert command(["--suite", "toy", "--model", "both", "--policy", "my-gift"]) == 0


def test_every_checkpoint_of_a_run_is_evaluated_into_that_run(command, capsys):
    toy_run(Path("runs/mine"), "sft", "gift")
    assert command(["--suite", "toy", "--model", "runs/mine", "--task", "more"]) == 0
    columns = read_table(Path("runs/mine/items.parquet"))
    assert set(zip(columns["task"], columns["policy"], strict=True)) == {("more", "sft"), ("more", "gift")}
    assert [path.name for path in Path("runs").iterdir()] == ["mine"]
    manifest = RunDir.open(Path("runs/mine")).manifest
    assert (manifest["kind"], manifest["status"]) == ("train", "running"), (
        "training decides when a training run is done"
    )
    shown = capsys.readouterr().out
    assert re.search("^more +sft ", shown, re.M)
    assert re.search("^more +gift ", shown, re.M)


def test_weights_that_are_not_the_recorded_ones_are_refused(command):
    run = toy_run(Path("runs/mine"), "sft")
    write_checkpoint(run.checkpoint("sft"), fill=9.0)
    with pytest.raises(
        UserError, match=r"init-000001: not the weights that runs/mine/manifest\.json records for 'sft'"
    ):
        command(["--suite", "toy", "--model", "runs/mine"])


def test_a_benchmark_that_cannot_be_had_stops_no_other(command, capsys):
    write_checkpoint(Path("model"))
    data = write_gsm8k(Path("data"))
    argv = ["--suite", "math", "--model", "model", "--data-dir", str(data), "--out", "out", "--batch-size", "4"]
    assert command(argv) == 1
    shown = capsys.readouterr().out
    for name in ("math500", "aime24", "aime25"):
        assert f"not evaluated: {name}: data/{name}/test.jsonl: no such file; put" in shown
    assert re.search(r"^gsm8k +model +3 ", shown, re.M)
    assert set(read_table(Path("out/items.parquet"))["task"]) == {"gsm8k"}
    assert RunDir.open(Path("out")).manifest["status"] == "failed"
    assert command([*argv, "--task", "gsm8k"]) == 0
    assert RunDir.open(Path("out")).manifest["status"] == "complete"


def test_the_protocol_can_be_overridden(command, capsys):
    write_checkpoint(Path("model"))
    changes = ["--runs", "3", "--samples-per-run", "1", "--temperature", "1", "--top-p", "0.5", "--max-tokens", "9"]
    assert command(["--suite", "toy", "--model", "model", "--out", "out", *changes, "--limit", "1"]) == 0
    protocol = RunDir.open(Path("out")).manifest["eval"]["toy"]["protocol"]
    assert [protocol[name] for name in ("runs", "samples_per_run", "temperature", "top_p", "max_tokens")] == [
        3,
        1,
        1.0,
        0.5,
        9,
    ]
    assert "pass@4" not in capsys.readouterr().out, "3 samples say nothing of pass@4"
    assert command(["--suite", "toy", "--model", "model", "--out", "greedy", "--protocol", "greedy"]) == 0
    assert RunDir.open(Path("greedy")).manifest["eval"]["toy"]["protocol"]["temperature"] == 0


def test_prompts_that_do_not_fit_are_told(command, capsys, monkeypatch):
    engine = MadeUpEngine(TOKENIZER, max_model_len=20)  # a prompt has 11 tokens
    monkeypatch.setattr(evals.run, "build_engine", lambda *_, **__: engine)
    write_checkpoint(Path("model"))
    assert command(["--suite", "toy", "--model", "model", "--task", "more"]) == 0
    assert "more, model: 3 prompts leave the model's window less room than 24 tokens" in capsys.readouterr().out
    engine.max_model_len = 11
    assert command(["--suite", "toy", "--model", "model", "--task", "more", "--out", "other"]) == 0
    shown = capsys.readouterr().out
    assert "more, model: 3 prompts fill the model's window; they count as not answered" in shown
    assert re.search(r"^more .* 0\.0 \[.* 100\.0% +100\.0% ", shown, re.M)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nothing to evaluate: give --model"),
        (["--model", "model", "--suite", "maths"], r"unknown suite 'maths' \(did you mean 'math'\?\)"),
        (["--model", "model", "--suite", "math", "--task", "gsm8"], r"'gsm8' \(did you mean 'gsm8k'\?\)"),
        (["--model", "model", "--protocol", "papers"], r"unknown protocol 'papers' \(did you mean 'paper'\?\)"),
        (["--model", "model", "--suite", "all", "--task", "gsm8k"], "--task names a task of one suite"),
        (["--model", "model", "--suite", "toy", "--temperature", "0"], "greedy decoding gives the same completion 8"),
        (["--model", "model", "--suite", "math", "--data-dir", "nowhere"], "nowhere: no such folder; --data-dir"),
        (["--model", "model", "--policy", "sft"], "model is not a run directory: --policy"),
        (["--model", "model", "--policy-name", "a/b"], "'a/b' cannot name a policy"),
        (["--model", "model", "--out", "runs/mine"], "runs/mine: a run of kind 'train'"),
        (["--model", "runs/mine", "--out", "elsewhere"], "runs/mine is a run directory: --out"),
        (["--model", "runs/mine", "--policy", "rl"], r"no policy 'rl' in this run \(it has: sft\)"),
        (["--model", "runs/none"], "runs/none: this run has no checkpoints yet"),
        (["--model", "./nowhere"], "nowhere: no such checkpoint folder"),
        (["--model", "hollow"], r"hollow: no \*\.safetensors in this folder"),
        (["--model", "not-to/be-had"], r"not-to/be-had: no such folder, and not to be had from the Hub \(.*\)"),
    ],
)
def test_what_cannot_be_done_is_one_line_that_says_why(command, argv, message):
    write_checkpoint(Path("model"))
    write_checkpoint(Path("hollow"))
    Path("hollow/model.safetensors").unlink()
    toy_run(Path("runs/mine"), "sft")
    toy_run(Path("runs/none"))
    with pytest.raises(UserError, match=message) as error:
        command(argv)
    assert "\n" not in str(error.value)
    assert {path.name for path in Path("runs").iterdir()} == {"mine", "none"}, "nothing was made"


def test_two_processes_do_not_write_to_one_run(command):
    run = toy_run(Path("runs/mine"), "sft")
    with run.lock(), pytest.raises(UserError, match="another process is working on this run"):
        command(["--suite", "toy", "--model", "runs/mine"])


def test_the_list_names_every_suite_task_and_protocol(command, capsys):
    assert command(["--list"]) == 0
    shown = capsys.readouterr().out
    for suite in SUITES.values():
        assert f"suite {suite.name} " in shown
        for task in suite.tasks.values():
            assert re.search(rf"^  {task.name} +{re.escape(task.label)} ", shown, re.M)
    assert "protocol paper: 4 runs x 1 samples, temperature 0.6, top-p 1, at most 8192 tokens" in shown


def test_a_training_run_is_evaluated_as_its_recipe_says_unless_told_otherwise(command):
    data = write_gsm8k(Path("data"))
    run = toy_run(Path("runs/mine"), "sft")
    run.update(recipe={"seed": 3, "eval": {"suites": ["toy"], "data_dir": str(data), "limit": 2}})
    assert command(["--suite", "toy", "--model", "runs/mine"]) == 0
    assert command(["--suite", "math", "--task", "gsm8k", "--model", "runs/mine", "--seed", "4", "--limit", "1"]) == 0
    manifest = RunDir.open(run.path).manifest["eval"]
    assert [manifest[suite]["protocol"]["seed"] for suite in ("toy", "math")] == [3, 4]
    assert [manifest["toy"]["tasks"][task]["items"] for task in ("small", "more")] == [2, 2]
    assert manifest["math"]["tasks"]["gsm8k"]["items"] == 1
    # What the samples were made with goes before the recipe, so that this continues them.
    assert command(["--suite", "math", "--task", "gsm8k", "--model", "runs/mine"]) == 0
    assert RunDir.open(run.path).manifest["eval"]["math"]["tasks"]["gsm8k"]["items"] == 2


@pytest.mark.parametrize("error", [UserError("no room"), RuntimeError("out of memory")])
def test_an_evaluation_that_fails_is_not_left_running(command, monkeypatch, error):
    def broken(*_, **__):
        raise error

    write_checkpoint(Path("model"))
    argv = ["--suite", "toy", "--model", "model", "--out", "out"]
    with monkeypatch.context() as patch:
        patch.setattr(evals.run, "build_engine", broken)
        with pytest.raises(type(error), match=str(error)):
            command(argv)
    assert RunDir.open(Path("out")).manifest["status"] == "failed"
    assert command(argv) == 0
    assert RunDir.open(Path("out")).manifest["status"] == "complete"


def test_an_unknown_engine_is_a_usage_error(command, capsys):
    with pytest.raises(SystemExit) as ended:
        command(["--model", "model", "--engine", "vlm"])
    assert ended.value.code == 2
    assert "argument --engine: invalid choice: 'vlm'" in capsys.readouterr().err


def test_a_real_model_is_evaluated(tmp_path, monkeypatch, capfd):
    logging.enable_progress_bar()
    monkeypatch.chdir(tmp_path)
    tiny_model(len(TOKENIZER), eos_token_id=TOKENIZER.eos_token_id).save_pretrained("model")
    TOKENIZER.save_pretrained("model")
    write_gsm8k(Path("data"))
    argv = ["--suite", "math", "--task", "gsm8k", "--data-dir", "data", "--model", "model", "--max-tokens", "6"]
    capfd.readouterr()
    assert main([*argv, "--limit", "2", "--out", "a"]) == 0
    assert capfd.readouterr().err == "", "transformers shows no bar of its own"
    rows = read_jsonl(Path("a/samples/model/gsm8k.jsonl"))
    assert [(row["item"], row["run"]) for row in rows] == [(f"gsm8k-{n}", run) for n in range(2) for run in range(4)]
    assert all(1 <= row["tokens"] <= 6 for row in rows)
    assert len({row["completion"] for row in rows}) > 1
    assert main([*argv, "--limit", "2", "--out", "b"]) == 0
    assert read_jsonl(Path("b/samples/model/gsm8k.jsonl")) == rows
