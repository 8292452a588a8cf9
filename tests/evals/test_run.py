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

import evals.evaluation
import evals.subjects
from evals.run import main
from evals.suites import SUITES, plan
from gift.cli import UserError
from gift.generation import GenerationError, RepetitionGuard
from gift.recipe import Generation, as_tree
from gift.records import RunDir, read_jsonl, read_table, sha256_file, sha256_weights

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


def graded(run: RunDir, policy: str, task: str = "small") -> list[dict]:
    """The samples of a policy on a task, each with the score that its text deserves."""
    rows = read_jsonl(run.path / "samples" / policy / f"{task}.jsonl")
    return [{**row, "score": float(row["completion"] == f"\\boxed{{{row['gold']}}}")} for row in rows]


def evaluate(run, policies, suite, protocol, *, tasks=(), seed=0, data_dir=None, limit=None, **rest):
    """`evals.evaluation.evaluate` of a plan of one suite."""
    asked = plan(suite, protocol, tasks=tasks, seed=seed, data_dir=data_dir, limit=limit)
    return evals.evaluation.evaluate(run, policies, [asked], **rest)


def records(run: RunDir) -> dict[str, bytes]:
    """Every file of samples and verdicts, and the derived table, byte by byte."""
    logs = [path for name in ("samples", "verdicts") for path in (run.path / name).rglob("*.jsonl")]
    files = [*logs, run.path / "items.parquet"]
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
    rows = graded(run, "sft")
    by_item = [[row["score"] for row in group] for _, group in itertools.groupby(rows, key=lambda row: row["item"])]
    run_means = [sum(row["score"] for row in rows if row["run"] == run) / 14 for run in range(4)]
    assert small.score.estimate == pytest.approx(sum(run_means) / 4)
    assert 0 <= small.score.low < small.score.estimate < small.score.high <= 1
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
        "engine": "hf",
        "dtype": "float32",
        "batch_size": 20,
        "top_k": 0,
        "min_p": 0.0,
        "stop": [],
        "repetition_guard": None,
        "temperatures": {},
        "system": None,
    }
    small = entry["tasks"]["small"]
    assert (small["label"], small["group"], small["items"]) == ("Small sums", "easy", 2)
    assert small["source"]["rows"] == 7
    assert small["prompt"] == "{problem}"
    assert next(iter(small["graders"])) == "strict"
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
    assert [result.score for result in again.results] == [result.score for result in few.results]
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
    "engine": ({"generation": Generation(engine="vllm")}, "engine was 'hf', is now 'vllm'"),
    "top-k": ({"protocol": replace(PROTOCOL, top_k=5)}, "top_k was 0, is now 5"),
    "stop": ({"protocol": replace(PROTOCOL, stop=("x",))}, r"stop was \[\], is now \['x'\]"),
    "guard": ({"protocol": replace(PROTOCOL, repetition_guard=RepetitionGuard(4, 3))}, "repetition_guard was None, is"),
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


def test_how_the_engine_is_run_may_change_between_samples(tmp_path):
    run = toy_run(tmp_path / "run", "sft")
    evaluate(run, ["sft"], toy_suite(), PROTOCOL, engine_for=Engines(), limit=3)
    rows = read_jsonl(run.path / "samples" / "sft" / "small.jsonl")
    others = [Generation(cache_gb=1, max_rows=7), Generation(data_parallel=2), Generation()]
    for limit, generation in zip((4, 6, 7), others, strict=True):
        engines = Engines()
        evaluate(
            RunDir.open(run.path),
            ["sft"],
            toy_suite(),
            PROTOCOL,
            engine_for=engines,
            generation=generation,
            limit=limit,
            tasks=["small"],
        )
        (engine,) = engines.built.values()
        asked = {request.key[1] for batch in engine.batches for request in batch}
        # What was written stays; hf alone in its process samples its last batch of two items again as a whole.
        assert asked == {f"small-{n}" for n in {4: (2, 3), 6: (4, 5), 7: (6,)}[limit]}
        before, rows = rows, read_jsonl(run.path / "samples" / "sft" / "small.jsonl")
        assert rows[: len(before)] == before
        assert len(rows) == 8 * limit


def test_a_manifest_from_before_a_setting_existed_means_its_default(tmp_path):
    run = toy_run(tmp_path / "run", "sft")
    evaluate(run, ["sft"], toy_suite(), PROTOCOL, engine_for=Engines(), limit=2)
    protocol = run.manifest["eval"]["toy"]["protocol"]
    for name in ("top_k", "min_p", "stop", "repetition_guard"):
        del protocol[name]
    run.save()
    evaluate(RunDir.open(run.path), ["sft"], toy_suite(), PROTOCOL, engine_for=Engines(), limit=4)
    with pytest.raises(UserError, match=r"min_p was 0\.0, is now 0\.1"):
        evaluate(run, ["sft"], toy_suite(), replace(PROTOCOL, min_p=0.1), engine_for=Engines())


@pytest.mark.parametrize("generation", [Generation(engine="vllm"), Generation(data_parallel=2)], ids=str)
def test_engines_that_fill_their_rows_themselves_get_all_that_is_missing_at_once(tmp_path, generation):
    run = toy_run(tmp_path / "run", "sft")
    engines = Engines()
    evaluate(run, ["sft"], toy_suite(), PROTOCOL, engine_for=engines, generation=generation)
    assert [len(batch) for batch in engines.built["sft"].batches] == [7 * 8, 3 * 8]
    assert ("batch_size" in run.manifest["eval"]["toy"]["protocol"]) == (generation.engine == "hf")


def test_a_breakdown_says_where_the_samples_are_and_how_to_go_on(tmp_path):
    class Dying(MadeUpEngine):
        def stream(self, requests, params):
            for count, found in enumerate(super().stream(requests, params)):
                if count == 20:
                    raise GenerationError("generation worker 1 of 2 was killed by SIGKILL")
                yield found

    run = toy_run(tmp_path / "run", "sft")
    dying, parallel = Dying(TOKENIZER), Generation(data_parallel=2)
    message = rf"^generation worker 1 of 2 was killed .*; what is complete is in {run.path}/samples: the same command"
    with pytest.raises(GenerationError, match=message):
        evaluate(run, ["sft"], toy_suite(), PROTOCOL, engine_for=lambda _: dying, generation=parallel)
    assert dying.closed
    log = run.path / "samples" / "sft" / "small.jsonl"
    before = read_jsonl(log)
    assert [row["item"] for row in before] == ["small-6"] * 8 + ["small-5"] * 8
    evaluate(RunDir.open(run.path), ["sft"], toy_suite(), PROTOCOL, engine_for=Engines(), generation=parallel)
    assert read_jsonl(log)[:16] == before
    assert len(read_jsonl(log)) == 7 * 8


def test_samples_of_other_weights_or_template_are_never_mixed(tmp_path):
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
    monkeypatch.setattr(evals.subjects, "build_engine", lambda settings, checkpoint, *, dtype: MadeUpEngine(TOKENIZER))
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
        r"^small +step-7 +7 +(\d+\.\d) \[\d+\.\d, \d+\.\d\] +\d+\.\d +\d+( +\d+\.\d){3} ( +\d+\.\d%){2} +\d+ ",
        shown,
        re.M,
    )
    rows = graded(run, "step-7")
    assert float(table[1]) == pytest.approx(100 * sum(row["score"] for row in rows) / len(rows), abs=0.05)
    for part in ("4 x 2 samples", "pass@2", "pass@4", "pass@8", "gift.rewards", f"in {run.path}: samples/"):
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
    monkeypatch.setattr(evals.subjects, "build_engine", lambda *_, **__: engine)
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
        (["--model", "model", "--engine", "server"], "--url belongs to --engine server, and to it alone"),
        (["--model", "model", "--url", "http://x"], "--url belongs to --engine server"),
        (["--model", "model", "--tensor-parallel", "2"], "--tensor-parallel is a setting of vllm alone"),
        (["--model", "model", "--cache-gb", "0"], r"--cache-gb must be positive, got 0\.0"),
        (["--model", "model", "--engine", "vllm", "--batch-size", "8"], "--batch-size is for hf: vllm fills"),
        (["--model", "model", "--data-parallel", "2", "--batch-size", "8"], "--batch-size is for hf in one process"),
        (["--model", "model", "--engine", "server", "--url", "http://x", "--dtype", "float32"], "--dtype is decided"),
        (["--model", "model", "--suite", "toy", "--top-k", "-1"], "top_k is -1"),
        (["--model", "model", "--suite", "toy", "--stop", ""], "stop holds an empty string"),
        (["--generations", "none.jsonl", "--suite", "toy"], r"none\.jsonl: no such file of generations"),
        (["--generations", "a.jsonl", "--model", "model"], "--model: for sampling a model, not for --generations"),
        (
            ["--generations", "a.jsonl", "--top-p", "1", "--seed", "0", "--stop", "x"],
            "--top-p, --stop, --seed: for samp",
        ),
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


def test_a_training_run_is_evaluated_by_its_recipes_engine_unless_told_otherwise(command, monkeypatch):
    asked = []

    def build_engine(settings, checkpoint, *, dtype):
        asked.append((settings, dtype))
        return MadeUpEngine(TOKENIZER)

    monkeypatch.setattr(evals.subjects, "build_engine", build_engine)
    own = Generation(engine="vllm", tensor_parallel=2, max_rows=9)
    for number, (options, expected) in enumerate(
        [
            ([], (own, "auto")),
            (["--data-parallel", "3", "--dtype", "float32"], (replace(own, data_parallel=3), "float32")),
            (["--engine", "hf", "--cache-gb", "0.5"], (Generation(cache_gb=0.5), "auto")),
        ]
    ):
        run = toy_run(Path(f"runs/{number}"), "sft")
        run.update(recipe={"seed": 0, "generation": as_tree(own)})
        assert command(["--suite", "toy", "--task", "more", "--model", str(run.path), *options]) == 0
        assert asked.pop() == expected


# ---------------------------------------------------------------------------------------------------------------------
# Generations of one's own


def answers(path: Path, *, runs: int = 4, samples: int = 2, items: int = 7) -> Path:
    """A file with completions of the first items of the toy suite's two tasks, some of them right."""
    rows = [
        {"task": task, "item": f"{task}-{n}", "run": run, "sample": s, "completion": f"\\boxed{{{(n + run + s) % 9}}}"}
        for task, count in (("small", 7), ("more", 3))
        for n in range(min(count, items))
        for run in range(runs)
        for s in range(samples)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_generations_are_a_policy_of_a_run_of_their_own(command, capsys):
    file = answers(Path("gpt-x.jsonl"))
    assert command(["--suite", "toy", "--generations", str(file)]) == 0
    digest = sha256_file(file)
    run = RunDir.open(Path("runs") / f"eval-gpt-x-{digest[:8]}")
    assert (run.manifest["kind"], run.manifest["status"]) == ("eval", "complete")
    assert run.manifest["recipe"] == {"generations": "gpt-x.jsonl"}
    (node,) = run.manifest["lineage"]
    assert (node["id"], node["weights_sha256"], node["checkpoint"]) == ("gpt-x", digest, str(file.resolve()))
    protocol = run.manifest["eval"]["toy"]["protocol"]
    assert protocol == {"runs": 4, "samples_per_run": 2, "engine": "replay"}
    assert run.manifest["eval"]["toy"]["tasks"]["small"]["policies"]["gpt-x"]["chat_template_sha256"] is None
    rows = [row for log in sorted((run.path / "samples").rglob("*.jsonl")) for row in read_jsonl(log)]
    stored = {(row["item"], row["run"], row["sample"]): row["completion"] for row in read_jsonl(file)}
    assert {(row["item"], row["run"], row["sample"]): row["completion"] for row in rows} == stored
    verdicts = [row for log in sorted((run.path / "verdicts").rglob("*.jsonl")) for row in read_jsonl(log)]
    strict = {(row["item"], row["run"], row["sample"]): row for row in verdicts if row["grader"] == "strict"}
    assert len(strict) == len(rows)
    for row in rows:
        right = row["completion"] == f"\\boxed{{{row['gold']}}}"
        assert strict[row["item"], row["run"], row["sample"]]["score"] == float(right)
    assert 0 < sum(row["score"] for row in strict.values()) < len(rows)
    shown = capsys.readouterr().out
    assert "toy: 4 x 2 samples an item, from gpt-x.jsonl\n" in shown
    assert re.search(r"^small +gpt-x +7 .* 0\.0% +0\.0% +- +-$", shown, re.M), "neither tokens nor tokens/s are known"
    before = records(run)
    assert command(["--suite", "toy", "--generations", str(file)]) == 0
    assert records(run) == before


def test_a_runs_own_log_is_graded_again_with_equal_scores(command):
    write_checkpoint(Path("model"))
    assert command(["--suite", "toy", "--model", "model", "--out", "first", "--task", "small"]) == 0
    log = Path("first/samples/model/small.jsonl")
    argv = ["--suite", "toy", "--task", "small", "--generations", str(log), "--policy-name", "model", "--out", "again"]
    assert command(argv) == 0
    unknown = {"seed": None, "max_tokens": None}
    assert read_jsonl(Path("again/samples/model/small.jsonl")) == [{**row, **unknown} for row in read_jsonl(log)]
    assert read_table(Path("again/items.parquet")) == read_table(Path("first/items.parquet"))


def test_generations_that_do_not_suffice_say_what_they_suffice_for_and_can_be_completed(command):
    argv = ["--suite", "toy", "--generations", "a.jsonl", "--out", "out"]
    answers(Path("a.jsonl"), runs=1, samples=3)
    with pytest.raises(UserError, match=r"a\.jsonl: no completion for 42 of 56 .*give --runs 1 --samples-per-run 3$"):
        command(argv)
    assert RunDir.open(Path("out")).manifest["status"] == "failed"
    assert not Path("out/samples").exists()
    answers(Path("a.jsonl"), items=3)
    with pytest.raises(UserError, match="give --limit 3, or complete it"):
        command(argv)
    answers(Path("a.jsonl"))
    assert command(argv) == 0
    answers(Path("a.jsonl"), items=5)
    with pytest.raises(UserError, match="out: its policy 'a' has other weights"):
        command(argv)
    assert command([*argv[:-1], "short", "--limit", "5", "--policy-name", "b"]) == 0


def test_generations_and_samples_of_a_model_do_not_share_a_suite(command):
    write_checkpoint(Path("model"))
    assert command(["--suite", "toy", "--model", "model", "--out", "out"]) == 0
    argv = ["--suite", "toy", "--generations", str(answers(Path("a.jsonl"))), "--out", "out"]
    with pytest.raises(UserError, match="engine was 'hf', is now 'replay'"):
        command(argv)


@pytest.mark.parametrize("error", [UserError("no room"), RuntimeError("out of memory")])
def test_an_evaluation_that_fails_is_not_left_running(command, monkeypatch, error):
    def broken(*_, **__):
        raise error

    write_checkpoint(Path("model"))
    argv = ["--suite", "toy", "--model", "model", "--out", "out"]
    with monkeypatch.context() as patch:
        patch.setattr(evals.subjects, "build_engine", broken)
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
