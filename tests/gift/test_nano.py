"""The embedded default's problems, text and tokenizer: right answers, and nothing evaluated that was trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, Qwen2Config

from gift import nano
from gift.data import encode_prompt, normalize
from gift.recipe import load_recipe
from gift.rewards import grade_math

TEXT = 6000  # documents: enough that a shared stream would show


@pytest.fixture(scope="module")
def text() -> list[tuple[str, str]]:
    return nano.pretraining_text(TEXT, seed=0)


def test_worked_solutions_are_right():
    for problem in nano.training_problems(200, seed=1):
        *lines, last = problem.response.split("\n")
        for line in lines:
            left, right = line.split("=")
            assert eval(left) == int(right)
        assert last == f"\\boxed{{{problem.answer}}}"
        expression = problem.prompt.removesuffix(" =").rpartition(":")[2]
        assert eval(expression) == int(problem.answer)


@pytest.mark.parametrize("name", nano.EVAL_SETS)
def test_evaluation_sets_are_fixed_distinct_and_solvable(name: str):
    one = nano.EVAL_SETS[name]
    problems = one.problems(one.items)
    assert len({normalize(problem.prompt) for problem in problems}) == len({p.id for p in problems}) == one.items
    assert one.problems(7) == problems[:7]
    verdicts = grade_math([p.response for p in problems], [p.answer for p in problems])
    assert all(verdict.status == "correct" for verdict in verdicts)


def test_nothing_evaluated_was_trained_on(text: list[tuple[str, str]]):
    evaluated = {normalize(p.prompt) for one in nano.EVAL_SETS.values() for p in one.problems(one.items)}
    assert not evaluated & {normalize(prompt) for prompt, _ in text}
    for seed in (0, 1):
        assert not evaluated & {normalize(problem.prompt) for problem in nano.training_problems(2000, seed)}


def test_no_seed_shares_its_stream_with_the_pretraining_text(text: list[tuple[str, str]]):
    known = {normalize(prompt) for prompt, _ in text}
    shares = [
        sum(normalize(problem.prompt) in known for problem in nano.training_problems(1000, seed)) / 1000
        for seed in range(4)
    ]
    assert max(shares) - min(shares) < 0.06, shares


def test_the_text_is_a_mixture_of_styles_with_slips(text: list[tuple[str, str]]):
    worked = [(prompt, response) for prompt, response in text if "=" in response and "\n" in response]
    assert 0.08 < len(worked) / len(text) < 0.3
    slipped = [response for _, response in worked if any(wrong(line) for line in response.split("\n")[:-1])]
    assert 0.1 < len(slipped) / len(worked) < 0.5


def wrong(line: str) -> bool:
    left, right = line.split("=")
    return eval(left) != int(right)


def test_the_tokenizer_survives_auto_tokenizer(tmp_path: Path, text: list[tuple[str, str]]):
    tokenizer = nano.train_tokenizer([f"{prompt}\n{response}" for prompt, response in text[:500]], 400)
    tokenizer.save_pretrained(tmp_path)
    Qwen2Config(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(reloaded) == len(tokenizer)
    for prompt, response in [*text[:300], ("Ünïcode ∑\n\n  x", "\\frac{1}{2}")]:
        assert reloaded.encode(response) == tokenizer.encode(response)
        assert reloaded.decode(reloaded.encode(response)) == response
        assert encode_prompt(reloaded, prompt) == encode_prompt(tokenizer, prompt)


def test_the_base_is_named_by_what_made_it():
    one, other = load_recipe("nano"), load_recipe("nano", ["base.pretrain.optimizer.lr=1e-3"])
    same = load_recipe("nano", ["seed=5", "rl.batch_size=64"])
    home = nano.base_home(one.base.pretrain, one.engine)
    assert nano.base_home(other.base.pretrain, other.engine) != home
    assert nano.base_home(same.base.pretrain, same.engine) == home
