"""The suite's tasks in lm-eval: the same items, prompts, protocols and verdicts as in the suite itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

pytest.importorskip("lm_eval")
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from evals.lmeval import TASKS_DIR, evaluate_lm_eval
from evals.lmeval.bridge import DATA_DIR, OFFERED
from evals.lmeval.model import sampling_params
from evals.suites import PROTOCOLS, SUITES
from evals.tasks import code, nano, single_turn
from gift.cli import UserError
from gift.data import encode_prompt, prompt_text
from gift.generation import Request, completion_text
from gift.generation.hf import HFEngine
from gift.generation.workers import LAUNCHED
from gift.models import load_model, load_tokenizer
from gift.records import RunDir, read_jsonl

DATA = Path(__file__).parents[3] / "shared" / "data"
FEW = 8


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=str(TASKS_DIR), include_defaults=False)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return load_tokenizer(tiny_checkpoint)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_model(tiny_checkpoint, dtype="float32")


class Stored(LM):
    """Says what it was given for each prompt, one response after the other."""

    tokenizer_name = "stored"

    def __init__(self, responses, tokenizer):
        super().__init__()
        self.responses = {prompt: iter(texts) for prompt, texts in responses.items()}
        self.tokenizer = tokenizer

    def generate_until(self, requests):
        return [next(self.responses[request.args[0]]) for request in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )


# ---------------------------------------------------------------------------------------------------------------------
# The task files


def test_every_task_has_its_files_and_every_file_its_task(manager):
    assert set(manager.all_subtasks) == {f"gift_{name}{end}" for name in OFFERED for end in ("", "_greedy")}
    assert set(manager.all_tags) == {f"gift_{of}{end}" for of in ("math", "choice", "nano") for end in ("", "_greedy")}


def test_all_of_the_suites_but_programs_and_conversations_is_offered():
    plain = {name.partition("@")[0] for suite in SUITES.values() for name in suite.tasks if suite.name != "mtbench"}
    assert plain - set(OFFERED) == set(code.TASKS)


@pytest.mark.parametrize("name", OFFERED)
def test_a_task_file_says_what_the_protocol_says(manager, name):
    nano_task = name in nano.TASKS
    sampled = PROTOCOLS["nano" if nano_task else "paper"]
    for ending, protocol in (("", sampled), ("_greedy", PROTOCOLS["greedy"])):
        config = manager.task_index[f"gift_{name}{ending}"].cfg
        samples = protocol.samples
        params = sampling_params(config["generation_kwargs"], name)
        expected = protocol.sampling
        assert (params.temperature, params.top_p, params.top_k, params.min_p, params.stop) == (
            (expected.temperature, expected.top_p, expected.top_k, expected.min_p, expected.stop)
        )
        assert params.max_tokens == (sampled if nano_task else protocol).max_tokens
        assert config["generation_kwargs"]["until"] == []
        assert config["repeats"] == samples
        assert config["filter_list"] == [{"name": "all", "filter": [{"function": "take_first_k", "k": samples}]}]
        assert [entry["metric"] for entry in config["metric_list"]] == [f"pass@{k}" for k in sorted({1, samples})]
        assert config["dataset_kwargs"] == {"gift_task": name}
        assert config["num_fewshot"] == 0


def test_the_command_prints_the_folder():
    printed = subprocess.run([sys.executable, "-m", "evals.lmeval"], capture_output=True, text=True, check=True)
    assert Path(printed.stdout.strip()) == TASKS_DIR
    assert (TASKS_DIR / "gift_gsm8k.yaml").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts


def responses_to(task, items, count):
    """`count` responses to each item: right ones for some, wrong ones, and ones without an answer."""
    checks = [check for check in task.checks(items) if check.kind != "labelled"]
    by_item = {item.id: {} for item in items}
    for check in checks:
        by_item[check.answer.item.id][check.correct] = check.answer.response
    return {
        item.id: [
            by_item[item.id][(number + copy) % 3 == 0] if (number + copy) % 4 else "I cannot say."
            for copy in range(count)
        ]
        for number, item in enumerate(items)
    }


def graded_by_lm_eval(manager, tokenizer, task, items, responses, file_name):
    """lm-eval's metrics and records of these responses, with the chat template."""
    stored = {prompt_text(tokenizer, item.prompt): responses[item.id] for item in items}
    found = simple_evaluate(
        Stored(stored, tokenizer),
        tasks=[file_name],
        limit=len(items),
        apply_chat_template=True,
        task_manager=manager,
        bootstrap_iters=10,
    )
    return found["results"][file_name], found["samples"][file_name]


def verdicts_of(task, items, responses):
    """The suite's own: for each item, which of its responses are right."""
    reported = next(iter(task.graders))
    answers = [single_turn(item, response) for item in items for response in responses[item.id]]
    verdicts = dict(task.grade(answers))
    right = iter([verdicts[index][reported].status == "correct" for index in range(len(answers))])
    return [[next(right) for _ in responses[item.id]] for item in items]


@pytest.mark.parametrize(
    "name",
    [
        "chain",
        "equations",
        *(
            pytest.param(name, marks=pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files at {DATA}"))
            for name in ("gsm8k", "math500", "aime24", "mmlu_pro")
        ),
    ],
)
def test_lm_eval_gives_the_suites_verdicts(manager, tokenizer, monkeypatch, name):
    monkeypatch.setenv(DATA_DIR, str(DATA))
    task = OFFERED[name]
    items = task.load(DATA).items[:FEW]
    samples = PROTOCOLS["nano" if name in nano.TASKS else "paper"].samples

    for file_name, count in ((f"gift_{name}", samples), (f"gift_{name}_greedy", 1)):
        responses = responses_to(task, items, count)
        right = verdicts_of(task, items, responses)
        assert {True, False} == {each for row in right for each in row}
        metrics, records = graded_by_lm_eval(manager, tokenizer, task, items, responses, file_name)
        accuracy = sum(map(sum, right)) / (FEW * count)
        assert metrics["pass@1,all"] == pytest.approx(accuracy)
        assert metrics[f"pass@{count},all"] == pytest.approx(sum(map(any, right)) / FEW)
        assert [record["pass@1"] for record in records] == pytest.approx([sum(row) / count for row in right])
        assert [record["resps"] for record in records] == [[responses[item.id]] for item in items]
        assert [record["target"] for record in records] == [item.gold for item in items]


def test_what_is_missing_is_told_as_the_task_tells_it(manager, tmp_path, monkeypatch):
    monkeypatch.setenv(DATA_DIR, str(tmp_path))
    with pytest.raises(UserError, match=r"gsm8k/test.jsonl: no such file.*; in lm-eval, GIFT_DATA_DIR"):
        manager.load("gift_gsm8k")


# ---------------------------------------------------------------------------------------------------------------------
# The same model both ways


def test_a_checkpoint_says_and_scores_the_same_both_ways(manager, model, tokenizer, tiny_checkpoint, tmp_path):
    """lm-eval with its own model; the suite's engine through lm-eval; the suite's engine asked as its sampler asks."""
    hf = HFLM(model, tokenizer=tokenizer, batch_size=4, device="cpu")
    theirs = simple_evaluate(
        hf,
        tasks=["gift_chain_greedy"],
        limit=FEW,
        apply_chat_template=True,
        task_manager=manager,
        gen_kwargs={"max_gen_toks": 24},
        bootstrap_iters=10,
    )
    records = theirs["samples"]["gift_chain_greedy"]

    run = RunDir.create(tmp_path / "run", kind="eval", recipe={})
    node = {"id": "gift", "label": "GIFT", "parent": None, "stage": "init", "method": "gift"}
    run.add_node({**node, "checkpoint": str(tiny_checkpoint), "weights_sha256": "0" * 64})
    ours = evaluate_lm_eval(
        run,
        "gift",
        ["gift_chain_greedy"],
        tokenizer,
        engine_for=lambda policy: HFEngine(model, tokenizer),
        settings={},
        limit=FEW,
        apply_chat_template=True,
        gen_kwargs={"max_gen_toks": 24},
        batch_size=4,
    )
    assert ours.missing == {}
    (result,) = ours.results
    metrics = theirs["results"]["gift_chain_greedy"]
    assert (result.metric, result.filter, result.items) == ("pass@1", "all", FEW)
    assert (result.value, result.stderr) == (metrics["pass@1,all"], metrics["pass@1_stderr,all"])

    items = nano.TASKS["chain"].load(None).items[:FEW]
    prompts = [tuple(encode_prompt(tokenizer, item.prompt)) for item in items]
    assert [tuple(hf.tok_encode(record["arguments"][0][0])) for record in records] == prompts
    params = sampling_params({"until": [], "max_gen_toks": 24}, "here")
    samples = HFEngine(model, tokenizer).generate([Request(prompt, 0) for prompt in prompts], params)
    direct = [tokenizer.decode(sample.token_ids, skip_special_tokens=True) for sample in samples]
    log = read_jsonl(run.path / "raw" / "lm_eval" / "gift" / "gift_chain_greedy.jsonl")
    assert [row["response"] for row in log] == [record["resps"][0][0] for record in records] == direct
    task = nano.TASKS["chain"]
    responses = {item.id: [completion_text(tokenizer, sample)] for item, sample in zip(items, samples, strict=True)}
    assert sum(map(sum, verdicts_of(task, items, responses))) / FEW == metrics["pass@1,all"]


@pytest.mark.slow
def test_lm_evals_command_line_runs_the_suites_tasks(tiny_checkpoint, tmp_path):
    """As docs/evaluation.md has it; indexing lm-eval's own tasks is what takes long."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={tiny_checkpoint}", "--include_path", str(TASKS_DIR)]
    command += ["--tasks", "gift_chain,gift_gcd_greedy", "--apply_chat_template", "--limit", "2"]
    command += ["--gen_kwargs", "max_gen_toks=16", "--output_path", str(tmp_path), "--device", "cpu"]
    # What a distributed test of this process has left there would make lm-eval wait for other ranks.
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    assert {"pass@1,all", "pass@8,all"} <= set(results["gift_chain"])
    assert {"pass@1,all"} <= set(results["gift_gcd_greedy"])
