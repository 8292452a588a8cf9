import random
from dataclasses import replace
from pathlib import Path

import pytest
from toy_suite import PROTOCOL, MadeUpEngine, Sums, tiny_tokenizer
from tqdm import tqdm

from evals.sampling import Batch, Sampler, check_stored, pending_batches
from evals.tasks import Item
from gift.cli import UserError
from gift.generation import GenerationError, RepetitionGuard, Sample, SamplingParams
from gift.generation.replay import ReplayEngine
from gift.records import read_jsonl

TASK = Sums("sums", "Sums", "easy", count=5)
ITEMS = TASK.load(None).items
BATCH_SIZE = 2 * PROTOCOL.samples


def sample(path: Path, engine=None, *, items=ITEMS, seed=0, protocol=PROTOCOL, batch_size=BATCH_SIZE):
    """Samples what the log lacks and returns its rows."""
    tokenizer = tiny_tokenizer() if engine is None else engine.tokenizer
    sampler = Sampler("sft", engine or MadeUpEngine(tokenizer), tokenizer, protocol, seed)
    batches = pending_batches(path, items, protocol, batch_size)
    sampler.run(TASK, items, batches, path, tqdm(disable=True))
    return read_jsonl(path)


def test_every_sample_has_one_record_in_the_order_item_run_sample(tmp_path):
    rows = sample(tmp_path / "log.jsonl")
    keys = [(row["item"], row["run"], row["sample"]) for row in rows]
    assert keys == [(item.id, run, number) for item in ITEMS for run in range(4) for number in range(2)]
    expected = "task item policy run sample seed prompt completion tokens finish_reason stop_reason max_tokens gold"
    assert " ".join(rows[0]) == expected + " category"
    assert {(row["item"], row["prompt"], row["gold"]) for row in rows} == {(i.id, i.prompt, i.gold) for i in ITEMS}


def test_records_say_what_was_generated(tmp_path):
    for row in sample(tmp_path / "log.jsonl"):
        if row["finish_reason"] == "length":
            assert row["completion"] == ("well " * 40)[: row["tokens"]]
        else:
            assert row["tokens"] == len(row["completion"]) + 1, "the end token counts, but is not in the text"


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
    for size, lengths in {BATCH_SIZE: [2, 2, 1], 23: [2, 2, 1], 1: [1] * 5}.items():
        batches = pending_batches(tmp_path / "none", ITEMS, PROTOCOL, size)
        assert [[len(unit) for unit in batch.units] for batch in batches] == [[length] for length in lengths]


def test_without_a_batch_size_all_that_is_missing_is_one_batch_of_items(tmp_path):
    path = tmp_path / "log.jsonl"
    assert pending_batches(path, ITEMS, PROTOCOL, None) == [Batch([[item] for item in ITEMS], 0.6)]
    sample(path, items=ITEMS[1:2])
    others = [[item] for item in ITEMS if item is not ITEMS[1]]
    assert pending_batches(path, ITEMS, PROTOCOL, None) == [Batch(others, 0.6)]
    sample(path, batch_size=None)
    assert pending_batches(path, ITEMS, PROTOCOL, None) == []


class Breaking(MadeUpEngine):
    """Answers some requests of each call and then breaks down; forgets what batch it is in."""

    def __init__(self, *, after: int | None, error: type[BaseException] = GenerationError) -> None:
        super().__init__(tiny_tokenizer())
        self.after = after
        self.error = error

    def stream(self, requests, params):
        for count, (number, request) in enumerate(random.Random(0).sample(list(enumerate(requests)), len(requests))):
            if count == self.after:
                raise self.error("worker 1 died")
            ((_, sample),) = super().stream([request], params)
            yield number, sample


@pytest.mark.parametrize("error", [GenerationError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [0, 1, 21, 39])
def test_a_breakdown_loses_only_items_that_were_not_complete(tmp_path, error, after):
    whole = sample(tmp_path / "whole.jsonl", Breaking(after=None), batch_size=None)
    assert len(whole) == len(ITEMS) * PROTOCOL.samples
    path = tmp_path / "log.jsonl"
    with pytest.raises(error):
        sample(path, Breaking(after=after, error=error), batch_size=None)
    rows = read_jsonl(path)
    order = random.Random(0).sample(range(40), 40)[:after]
    complete = {item.id for n, item in enumerate(ITEMS) if set(range(8 * n, 8 * n + 8)) <= set(order)}
    assert {row["item"] for row in rows} == complete
    assert len(rows) == len(complete) * PROTOCOL.samples
    again = Breaking(after=None)
    finished = sample(path, again, batch_size=None)
    asked = [request.key for batch in again.batches for request in batch]
    assert sorted(asked) == sorted(
        (TASK.name, i.id, r, s) for i in ITEMS if i.id not in complete for r in range(4) for s in range(2)
    )
    by_key = lambda row: (row["item"], row["run"], row["sample"])  # noqa: E731
    assert sorted(finished, key=by_key) == sorted(whole, key=by_key)


def test_progress_moves_with_every_sample_and_a_unit_is_written_once_it_is_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    seen = []

    class Bar:
        def update(self, samples: int = 1) -> None:
            seen.append((samples, len(read_jsonl(path))))

    engine = MadeUpEngine(tiny_tokenizer())
    batches = [Batch([ITEMS[:2]], 0.6), Batch([ITEMS[2:3]], 0.6)]
    Sampler("sft", engine, engine.tokenizer, PROTOCOL, 0).run(TASK, ITEMS, batches, path, Bar())
    counted = [entry for entry in seen if entry[0]]
    assert counted == [(1, 0)] * 16 + [(1, 16)] * 8


def test_requests_say_which_sample_they_are(tmp_path):
    engine = MadeUpEngine(tiny_tokenizer())
    rows = sample(tmp_path / "log.jsonl", engine)
    keys = [request.key for batch in engine.batches for request in batch]
    assert keys == [(row["task"], row["item"], row["run"], row["sample"]) for row in rows]
    assert [request.seed for batch in engine.batches for request in batch] == [row["seed"] for row in rows]


def test_the_engine_gets_the_whole_protocol(tmp_path):
    class Noting(MadeUpEngine):
        def stream(self, requests, params):
            self.params = params
            return super().stream(requests, params)

    engine = Noting(tiny_tokenizer())
    guard = RepetitionGuard(4, 3)
    protocol = replace(PROTOCOL, top_k=5, min_p=0.1, stop=("x", "y"), repetition_guard=guard)
    sample(tmp_path / "log.jsonl", engine, protocol=protocol)
    assert engine.params == SamplingParams(24, 0.6, 1.0, 5, 0.1, ("x", "y"), (), False, guard, False)


def test_how_a_response_ended_is_recorded(tmp_path):
    endings = [("stop", "####"), ("stop", 7), ("stop", None), ("repetition", None)]

    class Ending(MadeUpEngine):
        def stream(self, requests, params):
            ids = self.tokenizer.encode("5####")
            for number, _ in enumerate(requests):
                reason, stop = endings[number % 4]
                yield number, Sample(ids, reason, [], stop)

    rows = sample(tmp_path / "log.jsonl", Ending(tiny_tokenizer()))
    assert [(row["finish_reason"], row["stop_reason"]) for row in rows] == endings * 10
    assert [row["completion"] for row in rows[:4]] == ["5", "5###", "5###", "5####"]


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
            assert (row["completion"], row["finish_reason"]) == ("", "length")
    assert all(1 <= request.max_tokens <= 24 for batch in engine.batches for request in batch)
    assert sum(map(len, engine.batches)) == 2 * PROTOCOL.samples


def test_special_tokens_stay_in_the_text(tmp_path):
    class Imitator(MadeUpEngine):
        """Goes on with a user turn of its own."""

        def stream(self, requests, params):
            yield from enumerate(Sample(self.tokenizer.encode("4<user>5<end>"), "stop", []) for _ in requests)

    rows = sample(tmp_path / "log.jsonl", Imitator(tiny_tokenizer()))
    assert {row["completion"] for row in rows} == {"4<user>5"}


# ---------------------------------------------------------------------------------------------------------------------
# Conversations, and temperatures of their own

TURNS = [
    Item("81-1", "1 + 1?", "", "math"),
    Item("81-2", "and 2 more?", "", "math", after="81-1"),
    Item("82-1", "write", "", "writing"),
    Item("82-2", "go on", "", "writing", after="82-1"),
]


def conversation(*turns: str) -> str:
    """What the toy template makes of turns, the user's first."""
    roles = ("<user>{}", "{}")
    return "".join(roles[n % 2].format(turn) for n, turn in enumerate(turns)) + "<assistant>"


class Saying(MadeUpEngine):
    """Says what it is asked, in brackets, and notes the temperature of each call."""

    def __init__(self) -> None:
        super().__init__(tiny_tokenizer())
        turn = "{{ '<user>' if m['role'] == 'user' else '' }}{{ m['content'] }}"
        self.tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}<assistant>"
        self.temperatures = []

    def stream(self, requests, params):
        self.batches.append(list(requests))
        self.temperatures.append(params.temperature)
        for number, request in enumerate(requests):
            said = self.tokenizer.decode(request.prompt_ids)[-12:-11]
            yield number, Sample(self.tokenizer.encode(f"[{said}{request.seed % 10}]<end>"), "stop", [])


@pytest.mark.parametrize("batch_size", [1, 16, None])
def test_a_later_turn_sees_what_the_same_sample_said_before(tmp_path, batch_size):
    engine = Saying()
    rows = sample(tmp_path / "log.jsonl", engine, items=TURNS, batch_size=batch_size)
    said = {(row["item"], row["run"], row["sample"]): row["completion"] for row in rows}
    assert len(said) == 4 * PROTOCOL.samples
    asked = {request.key[1:]: engine.tokenizer.decode(request.prompt_ids) for b in engine.batches for request in b}
    for item, run, number in said:
        first = f"{item[:2]}-1"
        prompts = {turn.id: turn.prompt for turn in TURNS}
        turns = [prompts[first]] if item == first else [prompts[first], said[first, run, number], prompts[item]]
        assert asked[item, run, number] == conversation(*turns)


def test_a_conversation_cut_off_anywhere_is_completed_to_the_same_bytes(tmp_path):
    path = tmp_path / "log.jsonl"
    sample(path, Saying(), items=TURNS, batch_size=8)
    whole = path.read_bytes()
    for end in [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]:
        path.write_bytes(whole[:end])
        sample(path, Saying(), items=TURNS, batch_size=8)
        assert path.read_bytes() == whole


def test_a_category_may_have_a_temperature_of_its_own(tmp_path):
    engine = Saying()
    protocol = replace(PROTOCOL, temperatures={"math": 0.1})
    sample(tmp_path / "log.jsonl", engine, items=TURNS, protocol=protocol, batch_size=None)
    asked = [
        ({key[1] for key in (r.key for r in batch)}, t)
        for batch, t in zip(engine.batches, engine.temperatures, strict=True)
    ]
    assert asked == [({"81-1"}, 0.1), ({"82-1"}, 0.6), ({"81-2"}, 0.1), ({"82-2"}, 0.6)]


def test_a_system_prompt_comes_first(tmp_path):
    engine = Saying()
    sample(tmp_path / "log.jsonl", engine, items=TURNS[:1], protocol=replace(PROTOCOL, system="Be brief."))
    (prompt,) = {engine.tokenizer.decode(request.prompt_ids) for request in engine.batches[0]}
    assert prompt == "Be brief.<user>1 + 1?<assistant>"


# ---------------------------------------------------------------------------------------------------------------------
# Stored generations


def rows_of(items, samples: int, *, runs: int = 1):
    """Rows of a file in which every item has `samples` completions in each of `runs` runs."""
    return [{"item": i.id, "run": r, "completion": "5"} for i in items for r in range(runs) for _ in range(samples)]


@pytest.mark.parametrize(
    ("rows", "advice"),
    [
        (rows_of(ITEMS, 1), "no completion for 35 of 40 samples of sums, .* 'sums-0', run 0, sample 1; give --runs 1"),
        (rows_of(ITEMS, 1), "give --runs 1 --samples-per-run 1$"),
        (rows_of(ITEMS, 8), "item 'sums-0', run 1, sample 0; give --runs 1 --samples-per-run 8$"),
        (rows_of(ITEMS, 1, runs=4), "give --runs 4 --samples-per-run 1$"),
        (
            rows_of(ITEMS, 2, runs=4)[:-1],
            "for 1 of 40 .* 'sums-4', run 3, sample 1; .*--runs 4 --samples-per-run 1$",
        ),
        (rows_of(ITEMS[:3], 2, runs=4), "16 of 40 .* 'sums-3', run 0, sample 0; give --limit 3, or complete it"),
        (rows_of(ITEMS[1:], 2, runs=4), "8 of 40 .*; complete it, or leave this task out: --task names"),
    ],
)
def test_a_file_that_lacks_samples_says_what_it_could_be_used_for(rows, advice):
    with pytest.raises(UserError, match=advice):
        check_stored(ReplayEngine(rows), TASK, ITEMS, PROTOCOL)


def test_the_advice_can_be_followed():
    engine = ReplayEngine(rows_of(ITEMS, 3))
    check_stored(engine, TASK, ITEMS, replace(PROTOCOL, runs=1, samples_per_run=3))
    engine = ReplayEngine(rows_of(ITEMS[:3], 2, runs=4))
    check_stored(engine, TASK, ITEMS[:3], PROTOCOL)


def test_stored_completions_are_recorded_as_they_are_and_nothing_is_made_up_of_them(tmp_path):
    rows = [
        {"item": item.id, "run": run, "sample": n, "completion": f"\\boxed{{{n + run}}}", "finish_reason": "length"}
        for item in ITEMS
        for run in range(4)
        for n in range(2)
    ]
    rows[3]["tokens"] = 9
    path = tmp_path / "log.jsonl"
    sampler = Sampler("api", ReplayEngine(rows), None, PROTOCOL, 0)
    spent = sampler.run(TASK, ITEMS, pending_batches(path, ITEMS, PROTOCOL, 16), path, tqdm(disable=True))
    found = read_jsonl(path)
    assert [row["completion"] for row in found] == [row["completion"] for row in rows]
    assert [row["tokens"] for row in found] == [None] * 3 + [9] + [None] * 36
    assert {(row["seed"], row["max_tokens"], row["finish_reason"]) for row in found} == {(None, None, "length")}
    assert spent.tokens_per_second is None
