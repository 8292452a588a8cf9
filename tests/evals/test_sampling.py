import random
from pathlib import Path

import pytest
from toy_suite import PROTOCOL, MadeUpEngine, Sums, tiny_tokenizer
from tqdm import tqdm

from evals.sampling import Sampler, pending_chunks
from evals.tasks import Item
from gift.generation import Sample
from gift.records import read_jsonl

TASK = Sums("sums", "Sums", "easy", count=5)
ITEMS = TASK.load(None).items
BATCH_SIZE = 2 * PROTOCOL.samples


def sample(path: Path, engine=None, *, items=ITEMS, seed=0, protocol=PROTOCOL):
    """Samples what the log lacks and returns its rows."""
    tokenizer = tiny_tokenizer() if engine is None else engine.tokenizer
    sampler = Sampler("sft", engine or MadeUpEngine(tokenizer), tokenizer, protocol, seed)
    sampler.run(TASK, pending_chunks(path, items, protocol, BATCH_SIZE), path, tqdm(disable=True))
    return read_jsonl(path)


def test_every_sample_has_one_record_in_the_order_item_run_sample(tmp_path):
    rows = sample(tmp_path / "log.jsonl")
    keys = [(row["item"], row["run"], row["sample"]) for row in rows]
    assert keys == [(item.id, run, number) for item in ITEMS for run in range(4) for number in range(2)]
    expected = (
        "task item policy run sample seed prompt completion tokens finish_reason max_tokens gold extracted status"
    )
    assert " ".join(rows[0]) == expected + " score method"
    assert {(row["item"], row["prompt"], row["gold"]) for row in rows} == {(i.id, i.prompt, i.gold) for i in ITEMS}


def test_verdicts_match_the_completions(tmp_path):
    rows = sample(tmp_path / "log.jsonl")
    assert {row["status"] for row in rows} == {"correct", "wrong", "no_answer"}
    for row in rows:
        if row["finish_reason"] == "length":
            assert row["status"] == "no_answer"
            assert row["extracted"] is None
            assert row["completion"] == ("well " * 40)[: row["tokens"]]
        else:
            digit = row["completion"].removeprefix("\\boxed{").removesuffix("}")
            assert row["extracted"] == digit
            assert row["status"] == ("correct" if digit == row["gold"] else "wrong")
            assert row["tokens"] == len(row["completion"]) + 1, "the end token counts, but is not in the text"
        assert row["score"] == float(row["status"] == "correct")


def test_a_log_cut_off_anywhere_is_completed_to_the_same_bytes(tmp_path):
    path = tmp_path / "log.jsonl"
    sample(path)
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    cuts = {0, *ends, *(end - 1 for end in ends), *(end + 40 for end in ends[:-1])}
    cuts.update(random.Random(0).sample(range(len(whole)), 20))
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        sample(path)
        assert path.read_bytes() == whole, f"cut at byte {cut}"


def test_ctrl_c_in_any_batch_loses_that_batch_only(tmp_path):
    whole = sample(tmp_path / "whole.jsonl")
    for batch in range(3):
        path = tmp_path / f"{batch}.jsonl"
        with pytest.raises(KeyboardInterrupt):
            sample(path, MadeUpEngine(tiny_tokenizer(), interrupt_at=batch))
        assert read_jsonl(path) == whole[: batch * BATCH_SIZE]
        assert sample(path) == whole


def test_nothing_is_sampled_twice(tmp_path):
    path = tmp_path / "log.jsonl"
    sample(path)
    again = MadeUpEngine(tiny_tokenizer())
    sample(path, again)
    assert again.batches == []


def test_batches_hold_whole_items(tmp_path):
    assert [len(chunk) for chunk in pending_chunks(tmp_path / "none", ITEMS, PROTOCOL, BATCH_SIZE)] == [2, 2, 1]
    assert [len(chunk) for chunk in pending_chunks(tmp_path / "none", ITEMS, PROTOCOL, 23)] == [2, 2, 1]
    assert [len(chunk) for chunk in pending_chunks(tmp_path / "none", ITEMS, PROTOCOL, 1)] == [1] * 5


def test_seeds_are_distinct_and_depend_on_nothing_but_what_they_name(tmp_path):
    full = {(row["item"], row["run"], row["sample"]): row["seed"] for row in sample(tmp_path / "full.jsonl")}
    assert len(set(full.values())) == len(full) == 5 * 8
    few = sample(tmp_path / "few.jsonl", items=ITEMS[:2])
    assert [full[row["item"], row["run"], row["sample"]] for row in few] == [row["seed"] for row in few]
    other = sample(tmp_path / "other.jsonl", seed=1)
    assert {row["seed"] for row in other}.isdisjoint(full.values())


def test_a_response_gets_the_room_that_the_window_leaves(tmp_path):
    tokenizer = tiny_tokenizer()
    prompts = {"short": "7", "long": "7" * 30, "full": "7" * 38, "beyond": "7" * 50}
    items = [Item(name, prompt, "0") for name, prompt in prompts.items()]
    engine = MadeUpEngine(tokenizer, max_model_len=40)  # of which the template takes 2
    rows = sample(tmp_path / "log.jsonl", engine, items=items)
    assert {row["item"]: row["max_tokens"] for row in rows} == {"short": 24, "long": 8, "full": 0, "beyond": 0}
    for row in rows:
        assert row["tokens"] <= row["max_tokens"]
        if not row["max_tokens"]:
            assert (row["completion"], row["finish_reason"], row["status"]) == ("", "length", "no_answer")
    assert all(1 <= request.max_tokens <= 24 for batch in engine.batches for request in batch)
    assert sum(map(len, engine.batches)) == 2 * PROTOCOL.samples


def test_special_tokens_stay_in_the_text(tmp_path):
    class Imitator(MadeUpEngine):
        """Goes on with a user turn of its own."""

        def generate(self, requests, params):
            return [Sample(self.tokenizer.encode("4<user>5<end>"), "stop", [0.0] * 4) for _ in requests]

    rows = sample(tmp_path / "log.jsonl", Imitator(tiny_tokenizer()))
    assert {row["completion"] for row in rows} == {"4<user>5"}
