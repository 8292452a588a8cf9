"""Protocols of one's own, and which suites, tasks and protocols a command line asks for."""

import re
from dataclasses import replace

import pytest

from evals.options import PREFIX, check, chosen, lm_eval_tasks, parse
from evals.suites import PROTOCOLS, SUITES, plan, read_protocol
from evals.tasks import Item
from gift.cli import UserError

OWN = """
base: greedy
max_tokens: 100
system: Be brief.
temperatures: {writing: 0.7}
prompts:
  math: "Solve {problem}"
  gsm8k: "Sum {problem}"
  choice: "{question} {options}"
"""


def written(folder, text):
    path = folder / "own.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_protocol_of_ones_own_differs_from_its_base_where_it_says_so(tmp_path):
    own = read_protocol(written(tmp_path, OWN))
    assert (own.name, own.max_tokens, own.system) == ("own", 100, "Be brief.")
    assert (own.temperature, own.runs, own.samples_per_run) == (0, 1, 1)
    assert [own.temperature_of(Item("1", "", "", category)) for category in ("writing", "math", "")] == [0.7, 0, 0]
    prompts = {
        task.name: task.prompt for name in ("math", "passk", "ood", "code") for task in plan(SUITES[name], own).tasks
    }
    assert prompts["gsm8k"] == prompts["gsm8k@passk"] == "Sum {problem}", "the task goes before its group"
    assert prompts["math500"] == prompts["aime24@passk"] == "Solve {problem}"
    assert prompts["arc_challenge"] == "{question} {options}"
    assert prompts["mbpp_plus"] == SUITES["code"].tasks["mbpp_plus"].prompt
    assert read_protocol(written(tmp_path, "runs: 2")).temperature == PROTOCOLS["paper"].temperature


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_token: 5", "max_token"),
        ("max_tokens: many", "max_tokens"),
        ("temperatures: {writing: hot}", "writing"),
        ("prompts: [a]", "prompts"),
        ("base: papers", r"'papers' \(did you mean 'paper'\?\)"),
        ("prompts: {maths: '{problem}'}", r"'maths' \(did you mean 'math'\?\)"),
        ("- runs", "a protocol is a mapping"),
        ("", "a protocol is a mapping"),
        ("runs: [", "not a readable YAML file"),
        ("prompts: {gsm8k: 'Solve it'}", r"prompts\.gsm8k: the template lacks \{problem\}; GSM8K"),
        ("prompts: {math: '{question}'}", r"prompts\.math: the template lacks \{problem\}"),
        ("prompts: {choice: '{question}'}", r"prompts\.choice: the template lacks \{options\}"),
        ("prompts: {choice: 'which?'}", r"prompts\.choice: the template lacks \{question\} and \{options\}"),
        ("prompts: {code: '{problem}'}", r"prompts\.code: the template lacks \{prompt\}"),
        ("prompts: {mt_bench: 'hello'}", r"prompts\.mt_bench: the template lacks \{question\}"),
    ],
)
def test_what_is_wrong_with_a_protocol_is_one_line_that_names_the_file(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        read_protocol(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_bytes(b"\xff")])
def test_a_protocol_that_cannot_be_read_is_named(tmp_path, make):
    path = tmp_path / "own.yml"
    make(path)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: not a readable YAML file"):
        read_protocol(path)


def test_a_task_with_a_template_that_asks_nothing_is_refused_wherever_the_template_is_from():
    with pytest.raises(UserError, match=r"lacks \{prompt\}; HumanEval\+ needs it"):
        plan(SUITES["code"], replace(PROTOCOLS["paper"], prompts={"code": "write a program"}))


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def asked(*argv: str) -> dict[str, list[str]]:
    return {choice.suite.name: choice.tasks for choice in chosen(parse([*argv, "--model", "m"]))}


def test_suites_and_tasks_are_those_named():
    assert asked() == {"nano": []}
    assert asked("--suite", "ood") == {"ood": []}
    assert list(asked("--suite", "all")) == list(SUITES)
    assert asked("--task", "gsm8k") == {"math": ["gsm8k"]}, "not passk's, which comes later and has another name"
    assert asked("--task", "gsm8k@passk") == {"passk": ["gsm8k@passk"]}
    assert asked("--task", "arc_challenge", "--task", "gsm8k", "--task", "aime24") == {
        "ood": ["arc_challenge"],
        "math": ["gsm8k", "aime24"],
    }
    assert asked("--suite", "math", "--task", "aime24") == {"math": ["aime24"]}
    assert list(asked("report")) == list(SUITES), "a report is of all that is there"
    assert asked("report", "--task", "chain") == {"nano": ["chain"]}


def test_tasks_of_lm_eval_go_alone_or_with_others():
    args = parse(["--model", "m", "--task", f"{PREFIX}hellaswag"])
    assert (chosen(args), lm_eval_tasks(args)) == ([], ["hellaswag"])
    assert asked("--task", f"{PREFIX}hellaswag", "--task", "gcd") == {"nano": ["gcd"]}
    assert asked("--suite", "math", "--task", f"{PREFIX}hellaswag") == {}
    for verb in ("generate", "grade", "report"):
        with pytest.raises(UserError, match=f"leave out '{verb}'"):
            check(parse([verb, "--model", "m", "--task", f"{PREFIX}hellaswag"]))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--suite", "maths"], r"unknown suite 'maths' \(did you mean 'math'\?\)"),
        (["--suite", "maths", "--task", f"{PREFIX}x"], r"unknown suite 'maths'"),
        (["--task", "gsm8"], r"unknown task 'gsm8' \(did you mean 'gsm8k'\?\)"),
        (["--task", "gsm8k", "--task", "none-such"], "unknown task 'none-such'"),
        (["--suite", "math", "--task", "arc_challenge"], "unknown task of suite 'math' 'arc_challenge'"),
        (["--suite", "math", "--protocol", "grady"], "unknown protocol 'grady'"),
    ],
)
def test_unknown_names_are_refused(argv, message):
    with pytest.raises(UserError, match=message):
        asked(*argv)


def test_the_command_line_changes_a_protocol_of_ones_own(tmp_path):
    path = str(written(tmp_path, OWN))
    (choice,) = chosen(parse(["--model", "m", "--suite", "math", "--protocol", path, "--max-tokens", "7"]))
    assert (choice.protocol.name, choice.protocol.max_tokens, choice.protocol.system) == ("own", 7, "Be brief.")


def test_a_temperature_of_the_command_line_holds_for_every_category():
    argv = ["--suite", "mtbench", "--model", "x", "--protocol", "fastchat"]
    (own,) = chosen(parse(argv))
    assert own.protocol.temperatures["writing"] == 0.7
    (other,) = chosen(parse([*argv, "--temperature", "0.3"]))
    assert (other.protocol.temperature, other.protocol.temperatures) == (0.3, {})
