from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_run import write_run

from gift.cli import UserError
from gift.records import read_json, read_table, write_json, write_table
from reports.build import build_report
from reports.rundata import load_run


def edit_items(path: Path, edit: Callable[[dict[str, list]], None]) -> None:
    table = read_table(path / "items.parquet")
    edit(table)
    write_table(path / "items.parquet", table)


def gift_on_chain(path: Path) -> list[dict[str, object]]:
    run = load_run(path)
    (task,) = [task for suite in run.suites for task in suite.tasks if task.name == "chain"]
    return run.samples("gift", task)


def test_counts_add_up_over_runs(tmp_path: Path) -> None:
    truth = write_run(tmp_path / "run", items=6, runs=3, samples=2)
    counts = load_run(truth.path).counts
    assert counts["gift-rl", "chain"] == {
        f"chain-{i}": count for i, count in enumerate(truth.counts("gift-rl", "chain"))
    }


def test_policies_come_in_the_order_of_training(tmp_path: Path) -> None:
    truth = write_run(tmp_path / "run", items=4)
    manifest = read_json(truth.path / "manifest.json")
    manifest["lineage"].reverse()
    write_json(truth.path / "manifest.json", manifest)
    assert [policy.stage for policy in load_run(truth.path).policies] == ["base", "init", "init", "rl", "rl"]


def test_a_run_whose_report_is_being_made_is_complete(tmp_path: Path) -> None:
    truth = write_run(tmp_path / "run", items=4, status="running")
    manifest = read_json(truth.path / "manifest.json")
    manifest["steps"]["report"] = {"status": "running"}
    write_json(truth.path / "manifest.json", manifest)
    assert load_run(truth.path).status == "complete"
    manifest["steps"]["drift"] = {"status": "incomplete", "reason": "one checkpoint is not there"}
    write_json(truth.path / "manifest.json", manifest)
    assert load_run(truth.path).status == "incomplete"
    del manifest["steps"]["report"]
    write_json(truth.path / "manifest.json", manifest)
    assert load_run(truth.path).status == "running"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("manifest.json", b"{"),
        ("manifest.json", b'{"schema_version": 1}'),
        ("items.parquet", b"PAR1 not really"),
        ("metrics.jsonl", b'{"policy": "sft"}\nnot json\n'),
        ("samples/gift/chain.jsonl", b"[]\n"),
        ("samples/gift/chain.jsonl", b'{"item": "chain-0"}\n'),
        ("drift/base..gift.parquet", b""),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: bytes) -> None:
    truth = write_run(tmp_path / "run", items=4)
    (truth.path / file).write_bytes(content)
    with pytest.raises(UserError, match=file.split("/")[-1].replace(".", r"\.")) as raised:
        build_report([truth.path], tmp_path / "report.html")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"lineage": {"gift": 1}}, "'lineage' is not a list"),
        ({"lineage": ["gift"]}, "an entry of 'lineage' has no id"),
        ({"lineage": [{"id": "x", "stage": "warmup"}]}, "policy 'x' of 'lineage' has stage 'warmup'"),
        ({"recipe": "nano"}, "'recipe' is not a mapping"),
        ({"steps": {"eval": "done"}}, "'eval' of 'steps' is not a mapping"),
        ({"eval": {"nano": {"tasks": {}}}}, "suite 'nano' of 'eval' is incomplete"),
    ],
)
def test_a_damaged_entry_of_the_manifest_is_named(tmp_path: Path, entries: dict[str, object], said: str) -> None:
    file = write_run(tmp_path / "run", items=4).path / "manifest.json"
    write_json(file, {**read_json(file), **entries})
    with pytest.raises(UserError, match=rf"manifest\.json: {said}"):
        load_run(file.parent)


def test_impossible_and_repeated_counts_are_errors(tmp_path: Path) -> None:
    truth = write_run(tmp_path / "run", items=4)
    edit_items(truth.path, lambda table: table["correct"].__setitem__(3, 99))
    with pytest.raises(UserError, match=r"items\.parquet: row 3 has correct = 99"):
        load_run(truth.path)
    truth = write_run(tmp_path / "run", items=4)
    edit_items(truth.path, lambda table: [column.append(column[0]) for column in table.values()] and None)
    with pytest.raises(UserError, match=r"items\.parquet: row \d+ repeats task 'chain', item 'chain-0', policy 'base'"):
        load_run(truth.path)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    truth = write_run(tmp_path / "run", items=4)
    edit_items(truth.path, lambda table: table.pop("run") and None)
    with pytest.raises(UserError, match=r"items\.parquet: no column 'run'"):
        load_run(truth.path)


@pytest.mark.parametrize("value", [None, float("nan"), "many"])
def test_drift_that_is_no_number_is_an_error(tmp_path: Path, value: object) -> None:
    truth = write_run(tmp_path / "run", items=4)
    file = truth.path / "drift" / "base..sft.parquet"
    columns = {"metric": ["cos", "kl_new_old"], "sequence": ["a", "b"], "n": [4, 4]}
    sums = ["1.0", value] if isinstance(value, str) else [1.0, value]
    write_table(file, {**columns, "sum": sums})
    with pytest.raises(UserError, match=r"base\.\.sft\.parquet: metric '(cos|kl_new_old)'"):
        load_run(truth.path)


def test_a_sample_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    truth = write_run(tmp_path / "run", items=4)
    file = truth.path / "samples" / "gift" / "chain.jsonl"
    whole = len(gift_on_chain(truth.path))
    with file.open("a") as log:
        log.write(json.dumps({"item": "chain-9"})[:9])
    assert len(gift_on_chain(truth.path)) == whole
