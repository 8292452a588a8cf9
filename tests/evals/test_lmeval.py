"""lm-eval's tasks through the suite's engines, against lm-eval's own `hf` model over the same checkpoint."""

import io
import json
import math
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing

from evals.lmeval import command, evaluate_lm_eval, harness
from evals.lmeval.model import KEY, EngineLM, sampling_params
from gift.cli import UserError
from gift.generation import GenerationError, Sample, SamplingParams
from gift.generation.hf import HFEngine
from gift.models import load_model, load_tokenizer
from gift.recipe import Generation
from gift.records import JsonlLog, RunDir, read_json, read_jsonl

WINDOW = 256  # of the tiny checkpoint
STORY = "Tom has 3 apples and gives 2 to Ann. " * 30  # longer than the window


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_model(tiny_checkpoint, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return load_tokenizer(tiny_checkpoint)


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    return HFEngine(model, tokenizer)


@pytest.fixture(scope="module")
def hf_scoring(model, tokenizer):
    """lm-eval's own model at the window that EngineLM scores in."""
    return HFLM(model, tokenizer=tokenizer, batch_size=3, max_length=WINDOW - 2, device="cpu")


@pytest.fixture(scope="module")
def hf(model, tokenizer):
    return HFLM(model, tokenizer=tokenizer, batch_size=3, device="cpu")


@pytest.fixture
def make_lm(engine, tokenizer, tmp_path):
    def make(engine=engine, file="log.jsonl", **options):
        log = JsonlLog(tmp_path / file, KEY)
        return EngineLM(lambda: engine, tokenizer, log, settings={}, **options)

    return make


def asked(kind, *arguments, repeats=1):
    """lm-eval's requests with these arguments, clones adjacent as its evaluator has them."""
    instances = [
        Instance(kind, {}, args, 0, metadata=("toy", number, repeats)) for number, args in enumerate(arguments)
    ]
    return [instance for instance in instances for _ in range(repeats)]


class Failing(HFEngine):
    """Breaks down once it has given so many samples and scores."""

    left = 0

    def stream(self, requests, params):
        for found in super().stream(requests, params):
            self.spend(1)
            yield found

    def score(self, sequences):
        self.spend(len(sequences))
        return super().score(sequences)

    def spend(self, count):
        self.left -= count
        if self.left < 0:
            raise GenerationError("the engine died")


# ---------------------------------------------------------------------------------------------------------------------
# Log-likelihoods

PAIRS = [
    ("What is 3 + 4?", " 7"),
    ("What is 3 + 4?", " The answer is seven."),
    ("What is 3 + 4?", " 7"),
    ("What is 3 + 4? ", "7"),
    ("Two lines\n\n", "  and spaces"),
    ("", "No context at all"),
    ("x", "\\boxed{½ 漢字 🙂}"),
    (STORY, " How many are left?"),
    (STORY[:700], STORY[:60]),
]


def test_log_likelihoods_are_those_of_lm_evals_own_model(make_lm, hf_scoring):
    ours = make_lm().loglikelihood(asked("loglikelihood", *PAIRS))
    theirs = hf_scoring.loglikelihood(asked("loglikelihood", *PAIRS))
    assert [logp for logp, _ in ours] == pytest.approx([logp for logp, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_what_greedy_decoding_says_is_known_as_such(make_lm, hf_scoring, model, tokenizer):
    """Continuations that transformers itself decodes greedily, whole, cut, prolonged, and with one token changed."""
    requests = []
    for context in ("What is 3 + 4?", "Tom has", "x"):
        ids = tokenizer.encode(context)
        out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
        said = out[0, len(ids) :].tolist()
        changed = [*said[:5], (said[5] + 1) % len(tokenizer), *said[6:]]
        requests += [(("", ""), ids, rest) for rest in (said, said[:1], said[:7], changed, [*said[1:], said[0] + 1])]
    ours = make_lm()._loglikelihood_tokens(requests)
    theirs = hf_scoring._loglikelihood_tokens(requests)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [greedy for _, greedy in ours].count(True) >= 9
    assert [logp for logp, _ in ours] == pytest.approx([logp for logp, _ in theirs], abs=1e-4)


def test_a_certain_continuation_takes_no_decoding(make_lm, tokenizer):
    """More than half the probability for each token is enough; less is not."""

    class Sure(HFEngine):
        def __init__(self):
            self.max_model_len = WINDOW
            self.calls = 0

        def score(self, sequences):
            return [[math.log(0.51 if sequence[-1] % 2 else 0.4)] * (len(sequence) - 1) for sequence in sequences]

        def generate(self, requests, params):
            self.calls += len(requests)
            assert params.temperature == 0
            assert params.ignore_end
            return [Sample([4, 6, 8][: request.max_tokens], "length", []) for request in requests]

    engine = Sure()
    requests = [(("", ""), [1, 2], [3, 5]), (("", ""), [1, 2], [4, 6]), (("", ""), [1, 2], [4, 8])]
    found = make_lm(engine)._loglikelihood_tokens(requests)
    assert [greedy for _, greedy in found] == [True, True, False]
    assert engine.calls == 1  # one context, decoded once for all its continuations


def test_rolling_log_likelihoods_are_those_of_lm_evals_own_model(make_lm, hf_scoring):
    texts = [("A short text.",), (STORY,), (STORY[:500] + "end",), ("",)]
    ours = make_lm().loglikelihood_rolling(asked("loglikelihood_rolling", *texts))
    theirs = hf_scoring.loglikelihood_rolling(asked("loglikelihood_rolling", *texts))
    assert ours == pytest.approx(theirs, abs=2e-3)  # sums of up to 900 tokens
    assert ours[3] == 0


def test_a_continuation_beyond_the_window_is_refused(make_lm):
    with pytest.raises(UserError, match=r"'Tom has 3.*has \d+ tokens; the model's window has room for 254"):
        make_lm().loglikelihood(asked("loglikelihood", ("x", STORY)))


# ---------------------------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize(
    "gen_kwargs",
    [
        {"until": [], "max_gen_toks": 24, "do_sample": False},
        {"until": ["final", "\n"], "max_gen_toks": 40},
        {"until": "1", "max_gen_toks": 40, "temperature": 0.0},
        {"until": ["never said"], "max_new_tokens": 16, "do_sample": False, "temperature": 0.7, "num_beams": 1},
    ],
    ids=["no stop", "stops", "one stop", "aliases"],
)
def test_greedy_generations_are_those_of_lm_evals_own_model(make_lm, hf, gen_kwargs):
    contexts = ["What is 3 + 4?", "Two lines\n\n", "x", "漢字 🙂", STORY]
    requests = asked("generate_until", *((context, gen_kwargs) for context in contexts))
    ours = make_lm(batch_size=2).generate_until(requests)
    assert ours == hf.generate_until(requests)
    assert any(ours)


def test_what_is_dropped_of_a_long_context_is_on_record(make_lm, tokenizer):
    lm = make_lm()
    gen_kwargs = {"until": [], "max_gen_toks": 20}
    lm.generate_until(asked("generate_until", (STORY, gen_kwargs), ("x", gen_kwargs)))
    cut = {row["doc"]: row["context_tokens_cut"] for row in lm.log.rows}
    assert cut == {0: len(tokenizer.encode(STORY)) - (WINDOW - 20), 1: 0}
    with pytest.raises(UserError, match=r"lm_eval:toy, document 0: asks for responses of 256 tokens.*--max-tokens"):
        lm.generate_until(asked("generate_until", ("x", {"until": [], "max_gen_toks": 256})))


def test_every_copy_of_a_sampled_request_draws_its_own(make_lm):
    gen_kwargs = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 0.8}
    requests = asked("generate_until", ("x", gen_kwargs), ("y", gen_kwargs), ("x", gen_kwargs), repeats=4)
    found = make_lm().generate_until(requests)
    assert len({*found[:4], *found[8:]}) == 8  # the same prompt twice in a task is no reason to answer it alike
    assert len(set(found[4:8])) == 4
    assert make_lm(file="again.jsonl", batch_size=5).generate_until(requests) == found
    assert make_lm(file="other.jsonl", seed=1).generate_until(requests) != found


@pytest.mark.parametrize(
    ("gen_kwargs", "expected"),
    [
        ({"until": ["\n\n"]}, SamplingParams(256, temperature=0, stop=("\n\n",))),
        ({"until": "a", "max_gen_toks": 5, "do_sample": False, "temperature": 1.0}, SamplingParams(5, 0, stop=("a",))),
        ({"until": ["", "a"], "max_tokens": 5, "temperature": 0.6}, SamplingParams(5, 0.6, stop=("a",))),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}, SamplingParams(256, 0.6, 0.95, 20)),
        ({"do_sample": True, "top_k": -1, "min_p": 0.1}, SamplingParams(256, 1.0, min_p=0.1)),
        ({"do_sample": True, "temperature": 0.0}, SamplingParams(256, 0.0)),
        ({"max_gen_toks": 8, "max_tokens": 9, "num_beams": 1}, SamplingParams(8, 0.0)),
    ],
)
def test_generation_kwargs_become_sampling_params(gen_kwargs, expected):
    assert sampling_params(gen_kwargs, "here") == expected


@pytest.mark.parametrize("refused", [{"num_beams": 10}, {"seed": 3}, {"repetition_penalty": 1.2}])
def test_a_setting_that_no_engine_has_is_refused(refused):
    with pytest.raises(UserError, match=f"^here: .*{next(iter(refused))}"):
        sampling_params({"until": [], **refused}, "here")


def test_begin_tokens_are_those_of_lm_evals_own_model(engine, model, tiny_checkpoint, tmp_path):
    """A tokenizer that adds one, as Llama's: once, also where the chat template has written it already."""
    tokenizer = load_tokenizer(tiny_checkpoint)
    tokenizer.bos_token = "<|user|>"
    number = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", number)]
    )
    with JsonlLog(tmp_path / "log.jsonl", KEY) as log:
        ours = EngineLM(lambda: engine, tokenizer, log, settings={})
        theirs = HFLM(model, tokenizer=tokenizer, batch_size=1, max_length=WINDOW - 2, device="cpu")
        for text in ("plain", "<|user|>written already", "", " "):
            assert ours.tok_encode(text) == theirs.tok_encode(text)
            assert ours.tok_encode(text).count(number) == 1
        pairs = asked("loglikelihood", ("plain", " text"), ("<|user|>written", " text"), ("", "text"))
        for found, expected in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
            assert found == pytest.approx(expected, abs=1e-4)
        texts = asked("loglikelihood_rolling", ("plain",), ("<|user|>written",))
        assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=1e-4)


def test_chat_templates(make_lm, hf):
    chat = [{"role": "user", "content": "What is 3 + 4?"}]
    prefilled = [*chat, {"role": "assistant", "content": "The answer is"}]
    lm = make_lm()
    assert lm.apply_chat_template(chat) == hf.apply_chat_template(chat)
    assert lm.apply_chat_template(prefilled, False) == hf.apply_chat_template(prefilled, False)
    assert lm.tokenizer_name == hf.tokenizer_name
    lm.tokenizer = load_tokenizer(lm.tokenizer.name_or_path)
    lm.tokenizer.chat_template = "{{ raise_exception('no system prompts') }}"
    with pytest.raises(UserError, match=r"the chat template refuses user: .*no system prompts"):
        lm.apply_chat_template(chat)


# ---------------------------------------------------------------------------------------------------------------------
# Whole tasks

BASE = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
num_fewshot: 0
"""
CHOICE = """
task: toy_choice
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: "{{options}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: exact_match}]
"""
WORD = """
task: toy_word
output_type: loglikelihood
doc_to_text: question
doc_to_target: " {{options[0]}}"
metric_list: [{metric: acc}, {metric: perplexity}]
"""
TEXT = """
task: toy_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
ANSWER = """
task: toy_answer
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{said}}"
num_fewshot: null
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
SAMPLED = """
task: toy_sampled
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{said}}"
repeats: 3
generation_kwargs: {until: [], max_gen_toks: 12, do_sample: true, temperature: 0.8}
metric_list: [{metric: exact_match}]
"""
TASKS = {"choice": CHOICE, "word": WORD, "text": TEXT, "answer": ANSWER, "sampled": SAMPLED}
NAMES = [f"toy_{name}" for name in TASKS]


@pytest.fixture(scope="module")
def toy_tasks(tmp_path_factory, hf):
    """A folder of lm-eval tasks over local questions; of every other one the model's own answer is the right one."""
    folder = tmp_path_factory.mktemp("toy_tasks")
    questions = [f"Tom has {n} apples and eats {m}. How many are left?" for n, m in ((9, 2), (7, 3), (12, 5), (4, 1))]
    said = hf.generate_until(
        asked("generate_until", *((question, {"until": ["\n"], "max_gen_toks": 12}) for question in questions))
    )
    rows = [
        {
            "question": question,
            "options": [*["seven", "four of them", "3", "zero"][number:], "none"],
            "answer": number % 2,
            "said": said[number] if number % 2 else "7",
        }
        for number, question in enumerate(questions)
    ]
    file = folder / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(BASE.format(file=file) + text)
    (folder / "gone.yaml").write_text(BASE.format(file=folder / "gone.jsonl") + CHOICE.replace("choice", "gone", 1))
    unsafe = "unsafe_code: true\n" + CHOICE.replace("choice", "unsafe", 1)
    (folder / "unsafe.yaml").write_text(BASE.format(file=file) + unsafe)
    beams = ANSWER.replace("answer", "beams", 1).replace("do_sample: false", "num_beams: 4")
    (folder / "beams.yaml").write_text(BASE.format(file=file) + beams)
    broken = "process_results: !function broken.grade\n" + ANSWER.replace("answer", "broken", 1)
    (folder / "broken.yaml").write_text(BASE.format(file=file) + broken)
    (folder / "broken.py").write_text("def grade(doc, results):\n    raise KeyError('missing')\n")
    (folder / "group.yaml").write_text(
        "group: toy_group\ntask: [toy_choice, toy_word]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return folder


@pytest.fixture
def run(tmp_path, tiny_checkpoint):
    run = RunDir.create(tmp_path / "run", kind="eval", recipe={})
    node = {"id": "gift", "label": "GIFT", "parent": None, "stage": "init", "method": "gift"}
    run.add_node({**node, "checkpoint": str(tiny_checkpoint), "weights_sha256": "0" * 64})
    return run


@pytest.fixture
def evaluated(run, tokenizer, engine, toy_tasks):
    def evaluate(names, engine_for=lambda policy: engine, settings=(), **options):
        options = {"include_path": toy_tasks, "batch_size": 2, **options}
        return evaluate_lm_eval(
            run, "gift", names, tokenizer, engine_for=engine_for, settings=dict(settings), **options
        )

    return evaluate


def log_of(run, name):
    return read_jsonl(run.path / "raw" / "lm_eval" / "gift" / f"{name}.jsonl")


def never(policy):
    raise AssertionError("nothing is left to ask")


def test_metrics_are_those_of_lm_evals_own_model(evaluated, run, hf, toy_tasks, capsys):
    names = [name for name in NAMES if name != "toy_sampled"]
    found = evaluated(names)
    assert found.missing == {}
    assert capsys.readouterr() == ("", "")
    manager = TaskManager(include_path=str(toy_tasks), include_defaults=False)
    theirs = simple_evaluate(hf, tasks=names, task_manager=manager, bootstrap_iters=10)
    seen = set()
    for result in found.results:
        metrics = theirs["results"][result.task]
        assert result.value == pytest.approx(metrics[f"{result.metric},{result.filter}"], rel=1e-4)
        assert result.items == 4
        if result.metric in ("acc", "acc_norm", "exact_match"):
            assert result.stderr == pytest.approx(metrics[f"{result.metric}_stderr,{result.filter}"], rel=1e-6)
        seen.add((result.task, result.metric))
    assert len(seen) == len(found.results) == 3 + 2 + 2 + 1
    (answers,) = (result for result in found.results if result.task == "toy_answer")
    assert answers.value == 0.5

    written = read_json(run.path / "raw" / "lm_eval" / "gift" / "toy_choice.json")
    assert written["results"]["toy_choice"]["acc,none"] == theirs["results"]["toy_choice"]["acc,none"]
    assert (written["task"], written["limit"], written["n-shot"]) == ("toy_choice", None, {"toy_choice": 0})
    assert written["lm_eval"].startswith("0.4.")


def test_progress_is_shown_on_a_terminal_and_nothing_of_lm_evals(evaluated, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    evaluated(["toy_answer"], limit=2)
    shown = [line for line in terminal.getvalue().split("\r") if line.strip()]
    assert shown
    assert all(line.startswith("gift: lm_eval:toy_answer: ") and "/2 [" in line for line in shown)


def test_limit_gen_kwargs_shots_and_groups(evaluated, run):
    found = evaluated(["toy_answer"], limit=3, num_fewshot=1, gen_kwargs={"max_gen_toks": 5})
    assert [result.items for result in found.results] == [3]
    rows = log_of(run, "toy_answer")
    assert [row["tokens"] <= 5 for row in rows] == [True] * 3
    assert all(row["context"].count("How many are left?") == 2 for row in rows)  # one of them the shot
    found = evaluated(["toy_group"], limit=2)
    assert [(result.task, result.metric, result.items) for result in found.results][-1] == ("toy_group", "acc", 4)
    by_task = {(result.task, result.metric): result.value for result in found.results}
    assert by_task["toy_group", "acc"] == (by_task["toy_choice", "acc"] + by_task["toy_word", "acc"]) / 2


def test_the_chat_template_is_applied_where_asked_for(evaluated, run, tokenizer):
    evaluated(["toy_answer"], limit=1, apply_chat_template=True)
    (row,) = log_of(run, "toy_answer")
    question = "Tom has 9 apples and eats 2. How many are left?"
    assert row["context"] == tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )


def test_a_run_that_breaks_down_anywhere_goes_on_and_ends_the_same(evaluated, run, model, tokenizer, tmp_path):
    names = ["toy_word", "toy_answer", "toy_sampled"]
    whole = evaluated(names)
    files = {name: log_of(run, name) for name in names}
    for left in (0, 3, 5, 9, 13, 19):
        (run.path / "raw").rename(tmp_path / f"before-{left}")
        engine = Failing(model, tokenizer)
        engine.left = left
        with pytest.raises(GenerationError, match="the engine died"):
            evaluated(names, lambda policy, engine=engine: engine)
        assert evaluated(names) == whole
        assert {name: log_of(run, name) for name in names} == files
    assert evaluated(names, never) == whole


def test_answers_made_otherwise_are_not_used(evaluated, run):
    evaluated(["toy_sampled"])
    first = log_of(run, "toy_sampled")
    evaluated(["toy_sampled"], never)
    with pytest.raises(AssertionError, match="nothing is left"):
        evaluated(["toy_sampled"], never, {"dtype": "bfloat16"})
    evaluated(["toy_sampled"], seed=1)
    rows = log_of(run, "toy_sampled")
    assert rows[: len(first)] == first
    assert [row["response"] for row in rows[len(first) :]] != [row["response"] for row in first]


def test_an_engine_that_cannot_be_built_ends_it(evaluated):
    def build(policy):
        raise UserError(f"no memory for {policy}")

    with pytest.raises(GenerationError, match="no memory for gift"):
        evaluated(["toy_answer", "toy_choice"], build)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gone", r"^lm_eval:toy_gone: cannot be loaded \(FileNotFoundError: .*gone.jsonl.*local files"),
        ("unsafe", "unconfined; take the suite's code tasks"),
        ("beams", r"^lm_eval:toy_beams.*num_beams=4"),
        ("broken", r"stopped with KeyError: .*missing.*; the responses so far are in .*toy_broken.jsonl"),
    ],
)
def test_a_task_that_cannot_be_run_is_reported_and_the_others_run(evaluated, run, name, reason):
    found = evaluated([f"toy_{name}", "toy_choice"])
    assert {result.task for result in found.results} == {"toy_choice"}
    assert list(found.missing) == [f"toy_{name}"]
    assert "\n" not in found.missing[f"toy_{name}"]
    with pytest.raises(UserError, match=reason):
        raise UserError(found.missing[f"toy_{name}"])
    assert len(log_of(run, "toy_broken")) == (4 if name == "broken" else 0)


def test_warnings_of_lm_eval_are_kept(evaluated, run, toy_tasks, tmp_path):
    """A task without `until` stops at the first blank line, which lm-eval says once and in passing."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    text = ANSWER.replace("answer", "cut", 1).replace('until: ["\\n"], ', "")
    (folder / "cut.yaml").write_text(BASE.format(file=toy_tasks / "test.jsonl") + text)
    evaluated(["toy_cut"], include_path=folder)
    written = read_json(run.path / "raw" / "lm_eval" / "gift" / "toy_cut.json")
    assert any("No `until` specified" in warning for warning in written["warnings"])
    assert {tuple(row["gen_kwargs"]["until"]) for row in log_of(run, "toy_cut")} == {("\n\n",)}


def test_numbers_that_are_not_finite_are_null():
    value = {"a": [math.nan, -math.inf, 1.5, 2], 3: (None, True, torch.float32), "b": {"c": "text"}}
    assert harness.as_json(value) == {"a": [None, None, 1.5, 2], "3": [None, True, "torch.float32"], "b": {"c": "text"}}


def test_a_metric_that_is_not_finite_is_in_the_table():
    found = {"results": {"a": {"alias": "a", "ppl,none": None, "ppl_stderr,none": "N/A", "sample_len": 2}}}
    (result,) = harness.table(found)
    assert math.isnan(result.value)
    assert (result.metric, result.filter, result.stderr, result.items) == ("ppl", "none", None, 2)


# ---------------------------------------------------------------------------------------------------------------------
# As evals.run has it


def test_the_command_passes_its_options_on_and_prints_a_table(run, engine, toy_tasks, capsys):
    options = {
        "generation": Generation(),
        "dtype": "float32",
        "include_path": toy_tasks,
        "apply_chat_template": True,
        "temperature": 0.5,
        "max_tokens": 6,
        "stop": ("never",),
    }
    names = ["toy_answer", "toy_gone"]
    missing = command.evaluate_and_print(run, ["gift"], names, engine_for=lambda policy: engine, **options)
    assert list(missing) == ["lm_eval:toy_gone"]
    assert missing["lm_eval:toy_gone"].startswith("cannot be loaded (FileNotFoundError")
    for row in log_of(run, "toy_answer"):
        expected = {"until": ["never"], "max_gen_toks": 6, "do_sample": True, "temperature": 0.5}
        assert row["gen_kwargs"] == expected
        assert row["tokens"] <= 6
        assert row["context"].startswith("<|")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("toy_"))
    assert line.split()[:5] == ["toy_answer", "gift", "exact_match", "none", "4"]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.0, "top_k": 5}, {"temperature": 0.0, "do_sample": False, "top_k": 5}),
        ({"min_p": 0.1, "top_p": 0.9, "max_tokens": 3}, {"min_p": 0.1, "top_p": 0.9, "max_gen_toks": 3}),
    ],
)
def test_sampling_options_become_generation_kwargs(sampling, expected):
    assert command.gen_kwargs_of(sampling) == expected


def test_an_option_that_lm_eval_lacks_is_refused():
    with pytest.raises(UserError, match=r"^--repetition-guard: not for lm_eval: tasks"):
        command.gen_kwargs_of({"repetition_guard": object(), "top_p": 0.9})


def test_without_lm_eval_one_is_told_what_to_install(evaluated, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'gift-suite\[lm-eval\]'"):
        evaluated(["toy_answer"])


@pytest.mark.slow
def test_lm_evals_own_tasks_are_found_and_a_misspelt_name_is_told():
    assert "hellaswag" in harness.find(["hellaswag"], None).all_tasks
    with pytest.raises(UserError, match=r"unknown task 'lm_eval:hellaswagg' .did you mean 'hellaswag'"):
        harness.find(["hellaswagg"], None)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such folder of lm-eval tasks"):
        harness.find(["gift_chain"], tmp_path / "none")
