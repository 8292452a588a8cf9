"""The three verbs over one log: generate, grade, report; killed and continued; and the real command on every suite."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from toy_suite import PROTOCOL, MadeUpEngine, Sums, tiny_tokenizer, toy_run, toy_suite, write_checkpoint

import evals.evaluation
import evals.subjects
from evals.results import summarize
from evals.run import main
from evals.suites import SUITES, plan
from evals.tasks import Answer, Grades
from gift.cli import UserError
from gift.records import RunDir, read_jsonl, read_table
from gift.samples import graded_samples

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY.parent / "shared" / "data"
TOKENIZER = tiny_tokenizer()


@dataclass(frozen=True)
class Judged(Sums):
    """Graded by a judge of some version, who is away where it is None, and who leaves after `patience` answers."""

    version: str | None = "1"
    patience: int | None = None

    @property
    def graders(self):
        return {"judge": f"judge {self.version}"}

    def grade(self, answers: Sequence[Answer]) -> Iterator[tuple[int, Grades]]:
        for number, (_, grades) in enumerate(super().grade(answers)):
            if self.version is None or number == self.patience:
                raise UserError("no judge: set one")
            yield number, {"judge": grades["strict"]}


def no_engine(*_, **__):
    raise AssertionError("an engine was built")


def evaluate(run, *tasks, verbs=("generate", "grade"), engine_for=lambda policy: MadeUpEngine(TOKENIZER), **rest):
    asked = plan(toy_suite(*tasks), PROTOCOL, **rest)
    return evals.evaluation.evaluate(run, ["sft"], [asked], engine_for=engine_for, verbs=verbs)


def records(folder: Path) -> dict[str, bytes]:
    files = [path for name in ("samples", "verdicts") for path in (folder / name).rglob("*.jsonl")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in [*files, folder / "items.parquet"]}


def unordered(folder: Path, name: str) -> dict[str, list[str]]:
    return {str(path.relative_to(folder)): sorted(path.open()) for path in (folder / name).rglob("*.jsonl")}


def test_the_verbs_one_by_one_give_what_all_at_once_gives(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SUITES, "toy", toy_suite())
    monkeypatch.setattr(evals.subjects, "build_engine", lambda *_, **__: MadeUpEngine(TOKENIZER))
    write_checkpoint(Path("model"))
    argv = ["--suite", "toy", "--model", "model", "--out"]
    assert main([*argv, "whole"]) == 0
    whole = capsys.readouterr().out
    assert main(["generate", *argv, "parts"]) == 0
    assert not Path("parts/verdicts").exists()
    assert "small, model: 56 samples are not graded yet" in capsys.readouterr().out
    monkeypatch.setattr(evals.subjects, "build_engine", no_engine)
    assert main(["grade", *argv, "parts"]) == 0
    assert records(Path("parts")) == records(Path("whole"))
    capsys.readouterr()
    Path("model").rename("gone")
    monkeypatch.setattr(Sums, "load", no_engine)
    assert main(["report", "--model", "parts"]) == 0, "it needs neither data nor model"
    shown = capsys.readouterr().out
    rows = [re.findall(rf"^{task} +model .*%", text, re.M) for task in ("small", "more") for text in (whole, shown)]
    assert rows[0] == rows[1] != []
    assert rows[2] == rows[3] != []
    with pytest.raises(UserError, match="parts: nothing is recorded there of what is asked for"):
        main(["report", "--suite", "math", "--model", "parts"])


def test_grading_before_anything_is_sampled_says_so(tmp_path):
    run = toy_run(tmp_path / "run", "sft")
    found = evaluate(run, verbs=["grade"], engine_for=no_engine)
    assert found.results == []
    assert found.missing == dict.fromkeys(("small", "more"), "nothing is sampled of it by sft yet")


def test_a_newer_grader_grades_again_without_an_engine(tmp_path):
    run = toy_run(tmp_path / "run", "sft")
    task = Judged("sums", "Sums", "easy", count=4)
    (old,) = evaluate(run, task).results
    samples = records(run.path)["samples/sft/sums.jsonl"]
    verdicts = records(run.path)["verdicts/sft/sums.jsonl"]
    (new,) = evaluate(run, replace(task, version="2"), verbs=["grade"], engine_for=no_engine).results
    assert new.score == old.score
    assert records(run.path)["samples/sft/sums.jsonl"] == samples
    assert records(run.path)["verdicts/sft/sums.jsonl"].startswith(verdicts)
    assert len(read_jsonl(run.path / "verdicts/sft/sums.jsonl")) == 2 * 4 * 8
    entry = RunDir.open(run.path).manifest["eval"]["toy"]["tasks"]["sums"]
    assert entry["graders"] == entry["self_check"]["grader"] == {"judge": "judge 2"}


def test_a_grader_that_cannot_go_on_leaves_the_others_graded(tmp_path):
    run = toy_run(tmp_path / "run", "sft")
    judged, small = Judged("judged", "Judged", "easy", version=None), Sums("small", "Small", "easy")
    found = evaluate(run, judged, small)
    assert found.missing == {"judged": "its samples are there, but not all are graded: no judge: set one"}
    assert [(result.task, result.pending, result.score is None) for result in found.results] == [
        ("judged", 40, True),
        ("small", 0, False),
    ]
    assert set(read_table(run.path / "items.parquet")["task"]) == {"small"}


def test_numbers_of_an_older_grader_stay_when_the_newer_one_cannot_be_had(tmp_path):
    run = toy_run(tmp_path / "run", "sft")
    task = Judged("sums", "Sums", "easy", count=4)
    (old,) = evaluate(run, task).results
    before = records(run.path)
    again = evaluate(run, replace(task, version=None), verbs=["grade"], engine_for=no_engine)
    assert [result.score for result in again.results] == [old.score]
    assert list(again.missing) == ["sums"]
    assert records(run.path) == before
    assert RunDir.open(run.path).manifest["eval"]["toy"]["tasks"]["sums"]["graders"] == {"judge": "judge 1"}


def test_numbers_of_a_grader_that_stopped_are_of_what_it_graded(tmp_path):
    run = toy_run(tmp_path / "run", "sft")
    task = Judged("sums", "Sums", "easy", count=4, patience=10)
    (half,) = evaluate(run, task).results
    assert half.pending == 4 * 8 - 10
    (whole,) = evaluate(run, replace(task, patience=None), verbs=["grade"], engine_for=no_engine).results
    assert whole.pending == 0


def test_a_report_says_what_is_missing_of_a_stopped_evaluation(tmp_path):
    class Dies(MadeUpEngine):
        def stream(self, requests, params):
            if self.batches:
                raise KeyboardInterrupt
            yield from super().stream(requests, params)

    run = toy_run(tmp_path / "run", "sft")
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, Sums("sums", "Sums", "easy", count=7), engine_for=lambda policy: Dies(TOKENIZER))
    found = summarize(RunDir.open(run.path), "toy", "sums", "sft")
    assert (found.items, found.missing) == (7, 7 * 8 - 2 * 8)


def test_what_failed_before_its_first_sample_may_be_tried_with_other_settings(tmp_path):
    class NoMemory(MadeUpEngine):
        def stream(self, requests, params):
            raise MemoryError

    run = toy_run(tmp_path / "run", "sft")
    with pytest.raises(MemoryError):
        evaluate(run, engine_for=lambda policy: NoMemory(TOKENIZER), seed=1)
    evaluate(RunDir.open(run.path), seed=2)
    assert RunDir.open(run.path).manifest["eval"]["toy"]["protocol"]["seed"] == 2
    with pytest.raises(UserError, match="seed was 2, is now 1"):
        evaluate(RunDir.open(run.path), seed=1)


@pytest.mark.parametrize(("log", "field"), [("samples", "completion"), ("verdicts", "of"), ("verdicts", "status")])
def test_a_row_that_lacks_a_field_is_named(tmp_path, log, field):
    run = toy_run(tmp_path / "run", "sft")
    task = Sums("sums", "Sums", "easy")
    evaluate(run, task)
    path = run.path / log / "sft" / "sums.jsonl"
    rows = read_jsonl(path)
    del rows[2][field]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=rf"{log}/sft/sums\.jsonl: row 3 has no '{field}'; remove it"):
        graded_samples(run.path, "sft", "sums", task.graders)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if field in row))
    assert evaluate(run, task).results[0].pending == 0


# ---------------------------------------------------------------------------------------------------------------------
# The real command


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIFT_JUDGE")}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the benchmarks' files beside the repository")
def test_every_suite_is_evaluated_by_the_real_command(tmp_path, tiny_checkpoint):
    argv = ["--suite", "all", "--limit", "2", "--max-tokens", "48", "--data-dir", str(DATA)]
    command = [sys.executable, "-m", "evals.run", *argv, "--model", str(tiny_checkpoint), "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 1, done.stderr
    refused = dict(re.findall(r"^not evaluated: (\S+): (.*)$", done.stdout, re.M))
    assert set(refused) == {"gpqa_diamond", "mt_bench"}
    assert re.search(
        r"gpqa_diamond/test\.jsonl: no such file; put .* there .*accept their terms", refused["gpqa_diamond"]
    )
    assert "its samples are there, but not all are graded: no judge: set GIFT_JUDGE_URL" in refused["mt_bench"]
    run = RunDir.open(tmp_path / "out")
    assert run.manifest["status"] == "failed"
    (node,) = run.manifest["lineage"]
    for suite in SUITES.values():
        for task in suite.tasks.values():
            if task.name == "gpqa_diamond":
                continue
            found = summarize(run, suite.name, task.name, node["id"])
            samples = 2 * suite.protocol.samples
            assert (found.items, found.missing, found.ungraded) == (2, 0, 0), task.name
            assert found.pending == (samples if task.name == "mt_bench" else 0), task.name
            rows = read_jsonl(run.path / "samples" / node["id"] / f"{task.name}.jsonl")
            assert len(rows) == samples
            assert all(row["tokens"] <= 48 for row in rows)
            checked = run.manifest["eval"][suite.name]["tasks"][task.name].get("self_check", {}).get("kinds", {})
            if task.name != "mt_bench":
                assert (checked["gold"]["accepted"], checked["corrupted"]["passed"]) == (2, 0), task.name


def choice_row(task: str, number: int) -> dict[str, object]:
    """A row as the benchmark's file has it."""
    texts = ["one", "two", "three"]
    if task == "mmlu_pro":
        more = {"answer": "B", "answer_index": 1, "category": "math"}
        return {"question_id": number, "question": f"{number} + 1?", "options": texts, **more}
    choices = {"text": texts, "label": ["A", "B", "C"]}
    return {"id": f"q{number}", "question": f"{number} + 1?", "choices": choices, "answerKey": "C"}


@pytest.mark.slow
def test_an_evaluation_killed_at_any_moment_and_continued_ends_with_the_same_records(tmp_path, tiny_checkpoint):
    for task in ("mmlu_pro", "arc_challenge"):  # whose grader starts no processes
        file = tmp_path / "data" / task / "test.jsonl"
        file.parent.mkdir(parents=True)
        rows = [choice_row(task, n) for n in range(3)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--task", "mmlu_pro", "--task", "arc_challenge", "--max-tokens", "16", "--batch-size", "4"]
    argv = [*asked, "--data-dir", str(tmp_path / "data"), "--model", str(tiny_checkpoint)]
    program = [sys.executable, str(Path(__file__).with_name("killed_runs.py")), str(tmp_path), "20", *argv]
    done = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    whole = tmp_path / "whole"
    assert sorted(path.stem for path in (whole / "samples").rglob("*.jsonl")) == ["arc_challenge", "mmlu_pro"]
    for number in range(20):
        continued = tmp_path / str(number)
        for path in (whole / "samples").rglob("*.jsonl"):
            assert (continued / path.relative_to(whole)).read_bytes() == path.read_bytes(), number
        assert unordered(continued, "verdicts") == unordered(whole, "verdicts"), number
        assert read_table(continued / "items.parquet") == read_table(whole / "items.parquet"), number
        assert RunDir.open(continued).manifest["status"] == "complete"
