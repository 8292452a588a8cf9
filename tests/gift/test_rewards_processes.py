"""Hostile answers, in both modes, and the life of the grading processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from math_grading import ROOT, boxed, grade

from gift import math_pool, math_strict, rewards
from gift.cli import UserError
from gift.rewards import MAX_ANSWER_CHARS, Verdict, grade_math, grade_math_modes

# ---------------------------------------------------------------------------------------------------------------------
# Answers that explode

EXPLODERS = [
    r"9^{9^{9^9}}",
    r"10^{7}!",
    r"\binom{10000000}{5000000}",
    r"2^{1000000000}",
    r"(x+y+z+w)^{200}",
    r"\sum_{n=1}^{10000000} \sin(n)",
    "1+" * 900 + "1",
]


@pytest.mark.parametrize("mode", ["strict", "paper"])
def test_exploding_answers_end_by_the_deadline_and_harm_no_other(mode):
    grade(boxed("x+1"), "1+x")  # starting the processes is not what is timed here
    for answer in EXPLODERS:
        started = time.monotonic()
        verdict = grade(boxed(answer), "3", timeout_s=0.5, mode=mode)
        assert verdict.status in {"timeout", "wrong"}
        assert verdict.score == 0.0
        assert time.monotonic() - started < 1.5
    assert grade(boxed("x+1"), "1+x", mode=mode).status == "correct"


@pytest.mark.parametrize("mode", ["strict", "paper"])
def test_a_timeout_is_called_one(mode):
    answer = r"9^{9^{9^9}}"
    assert grade(boxed(answer), "3", timeout_s=0.3, mode=mode) == Verdict(0.0, "timeout", answer, "boxed:math_verify")


def in_worker(code: str) -> list[str]:
    """Lines printed by code that has the names of the worker's script."""
    script = "import sys; sys.path.insert(0, sys.argv[1]); from gift.math_worker import *\n" + code
    done = subprocess.run([sys.executable, "-c", script, str(ROOT)], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_a_memory_bomb_stays_within_its_limit():
    """The cap itself: a comparison that asks for 8 GiB fails alone, and the process goes on."""
    bomb, calm = in_worker(
        "print(compare_in_child(lambda: len(bytearray(8 << 30)), [], 20.0))\n"
        "print(compare_in_child(lambda: {'status': 'correct'}, [], 20.0))"
    )
    assert bomb == "{'status': 'error', 'note': 'MemoryError: '}"
    assert calm == "{'status': 'correct'}"


def test_what_ends_a_comparison_is_told():
    raised, died, stuck, long = in_worker(
        "def fail(): raise KeyError('x')\n"
        "def loop():\n    while True: pass\n"
        "for compare in fail, lambda: os.abort(), loop, lambda: {'status': 'wrong', 'extracted': 'x' * 10**7}:\n"
        "    print(str(compare_in_child(compare, [], 0.5))[:60])"
    )
    assert raised == """{'status': 'error', 'note': "KeyError: 'x'"}"""
    assert died == "{'status': 'error', 'note': 'the comparison ended with code -6'}"[:60]
    assert stuck == "{'status': 'timeout'}"
    assert long.startswith("{'status': 'wrong', 'extracted': 'xxxx")


def test_an_exception_stays_with_the_answer_that_causes_it(monkeypatch):
    def read(response, gold):
        if "curse" in response:
            raise RecursionError("too deep")
        return math_strict.read(response, gold)

    monkeypatch.setitem(rewards._READERS, "strict", read)
    fine, cursed, also = grade_math([boxed("3"), boxed("curse"), boxed("x+3")], ["3", "3", "3+x"])
    assert (fine.status, also.status) == ("correct", "correct")
    assert cursed == Verdict(0.0, "error", None, None, "RecursionError: too deep")


def test_very_long_text_is_quick():
    started = time.monotonic()
    n = 40_000
    responses = ["x" * n, "{" * n, "\\" * n, "\\boxed{" * n, "answer is " * n, boxed("." * n), boxed("7" * n)]
    statuses = [verdict.status for verdict in grade_math(responses, ["3"] * len(responses))]
    assert statuses == ["no_answer"] * 4 + ["wrong", "no_answer", "wrong"]
    assert grade(boxed("7" * n), "7" * n).status == "correct"
    verdict = grade(boxed("x+" * n + "x"), "x")
    assert verdict.method == "boxed:too_long"
    assert len(verdict.extracted) == MAX_ANSWER_CHARS
    assert time.monotonic() - started < 5


def test_very_long_text_is_quick_in_the_mode_of_the_paper():
    n = 40_000
    responses = [boxed("x" * n), "\\boxed{" * n, boxed("7" * n), boxed(" " * n + "3"), boxed("(1," * n), boxed("(" * n)]
    started = time.monotonic()
    verdicts = grade_math(responses, ["(1,2)"] * len(responses), mode="paper", timeout_s=2)
    assert {verdict.score for verdict in verdicts} == {0.0}
    assert time.monotonic() - started < 15


def test_model_text_is_never_run(tmp_path):
    canary = tmp_path / "canary"
    attacks = [
        f"open('{canary}','w').close()",
        f"__import__('os').system('touch {canary}')",
        rf"\text{{open('{canary}','w').close()}}",
        f"the value is open('{canary}','w').close() + 1, in short open('{canary}','w')",
        f"exec(\"open('{canary}','w')\")",
        f"1, open('{canary}','w').close()",
        f"(open('{canary}','w').close(), 2)",
        f"Matrix([[open('{canary}','w')]])",
        f"Interval(0, open('{canary}','w'))",
        rf"\mathrm{{__import__}}('os').system('touch {canary}')",
    ]
    golds = ["3", "3", "3", "3", "3", "1, 2", "(1, 2)", r"\begin{pmatrix} 1 \end{pmatrix}", "[0, 1]", "3"]
    forms = ["\\boxed{{{}}}", "The answer is {}", "${}$"]
    pairs = [(form.format(attack), gold) for attack, gold in zip(attacks, golds, strict=True) for form in forms]
    graded = grade_math_modes([response for response, _ in pairs], [gold for _, gold in pairs])
    assert {verdict.status for verdicts in graded for verdict in verdicts.values()} <= {"wrong", "no_answer"}
    assert not canary.exists()


def test_the_worker_leaves_sympy_no_eval(tmp_path):
    """sympy makes a number of a text by running it as Python, and math-verify has it do so for every number."""
    canary = tmp_path / "canary"
    attack = f"open({str(canary)!r}, 'w').close()"
    lines = in_worker(
        "import pathlib, sympy\n"
        f"text, canary = {attack!r}, pathlib.Path({str(canary)!r})\n"
        "try: sympy.Number(text)\n"
        "except Exception: print('run', canary.exists()); canary.unlink()\n"
        "close_eval()\n"
        "from sympy.parsing.sympy_parser import eval_expr\n"
        "for run in sympy.sympify, sympy.Number, lambda text: eval_expr(text, {}, {}):\n"
        "    try: run(text)\n"
        "    except (sympy.SympifyError, SyntaxError): print('refused')\n"
        "print(sympy.Number('007'), sympy.Number('.50') + sympy.Number('2.'), sympy.sympify('-3'))"
    )
    assert lines == ["run True", "refused", "refused", "refused", "7 2.50000000000000 -3"]
    assert not canary.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Processes

SYMBOLIC = [(rf"{a}x + \sqrt{{{a * a * 3}}}", rf"{a}(x + \sqrt{{3}})" if a % 2 else rf"{a}x") for a in range(2, 10)]


def test_verdicts_do_not_depend_on_the_number_of_processes():
    responses, golds = [boxed(answer) for answer, _ in SYMBOLIC], [gold for _, gold in SYMBOLIC]
    alone = grade_math_modes(responses, golds, workers=1)
    assert alone == grade_math_modes(responses, golds, workers=2) == grade_math_modes(responses, golds)
    assert [verdicts["strict"].status for verdicts in alone] == ["wrong", "correct"] * 4
    for mode in "strict", "paper":
        assert [verdicts[mode] for verdicts in alone] == grade_math(responses, golds, mode=mode)


def test_processes_stay_between_calls_start_anew_after_close_and_survive_a_kill():
    grade(boxed("x+1"), "1+x")
    (first, *_) = [worker.process for worker in math_pool._pool.workers]
    grade(boxed("x+2"), "2+x")
    assert math_pool._pool.workers[0].process is first
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert grade(boxed("x+3"), "3+x").status == "correct"
    rewards.close()
    assert math_pool._pool.workers == []
    assert grade(boxed("x+4"), "4+x").status == "correct"


def test_other_threads_may_grade():
    verdicts: list[Verdict] = []
    threads = [threading.Thread(target=lambda: verdicts.append(grade(boxed("x+1"), "1+x"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [verdict.status for verdict in verdicts] == ["correct"] * 3


def test_a_process_that_cannot_start_says_why(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken on purpose')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rewards.close()
    with pytest.raises(UserError, match="ImportError: broken on purpose"):
        grade(boxed("x+1"), "1+x")
    assert math_pool._pool.workers == []


def test_importing_is_light_and_numbers_need_no_process():
    script = (
        "import sys; from gift import math_pool, rewards\n"
        "verdicts = rewards.grade_math(['\\\\boxed{1,000}', 'answer: 1/2', 'none'], ['1000', '0.5', '3'])\n"
        "assert [v.status for v in verdicts] == ['correct', 'correct', 'no_answer'], verdicts\n"
        "assert not math_pool._pool.workers\n"
        "assert not {'torch', 'math_verify', 'sympy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)


def test_an_interrupt_ends_all_processes_without_noise():
    script = (
        "from gift.math_pool import _pool\n"
        "from gift.rewards import grade_math\n"
        "grade_math(['\\\\boxed{x+1}'], ['1+x'], workers=1)\n"
        "print(_pool.workers[0].process.pid, flush=True)\n"
        "try:\n    grade_math(['\\\\boxed{9^{9^{9^9}}}'], ['3'], timeout_s=60)\n"
        "except KeyboardInterrupt:\n    print('interrupted', len(_pool.workers), flush=True)\n"
        "grade_math(['\\\\boxed{x+1}'], ['1+x'], workers=1)\n"
        "print(_pool.workers[0].process.pid, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        first = int(process.stdout.readline())
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    message, second = out.splitlines()
    assert message == "interrupted 0"
    for pid in first, int(second):
        assert not Path(f"/proc/{pid}").exists()
