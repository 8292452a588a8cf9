"""Verdicts on written-out cases, on labelled pairs and on GSM8K; answers that explode; the life of the processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gift import rewards
from gift.cli import UserError
from gift.rewards import MAX_ANSWER_CHARS, Verdict, canonical, find_answer, grade_math, plain_number

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


def boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


def grade(response: str, gold: str, **options: float) -> Verdict:
    return grade_math([response], [gold], **options)[0]


def need(name: str) -> list[dict]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Finding the answer


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{18}.", "18"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{[0, 1)} \cup \}", "[0, 1)"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{3}, no: \boxed{4", "3"),
        (r"{ \boxed{3}", "3"),
        (r"} \boxed{3}", "3"),
        (r"\\boxed{004}", "004"),
        (r"\boxed{}", ""),
        (r"\boxed{4", None),
        (r"\fbox{4} \boxed 4", None),
        ("", None),
    ],
)
def test_the_last_complete_box_is_the_answer(text, content):
    assert find_answer(text) == (("", None) if content is None else (content, "boxed"))


@pytest.mark.parametrize(
    ("response", "extracted", "where"),
    [
        ("5 + 13 = 18\n#### 18", "18", "stated"),
        ("So the answer is 18. I hope it is correct.", "18", "stated"),
        ("The answer is 3.5, as asked", "3.5, as asked", "stated"),
        ("**Answer:** 18", "18", "stated"),
        ("**Final Answer**: $18$", "$18$", "stated"),
        ("Final Answer:\n\\[ 18 \\]", "18", "stated"),
        ("Answer: 3. No, the answer is 4.", "4", "stated"),
        ("The answer is 3, I think, \\boxed{4}", "4", "boxed"),
        ("\\boxed{4}, so the answer is 3", "4", "boxed"),
        (r"$\boxed{k = 45} \quad \text{and} \quad \boxed{n = 2}$", "k = 45, n = 2", "boxed"),
        (r"\boxed{1} pen, and it is \boxed{2}", "2", "boxed"),
        (r"\boxed{5}, \boxed{5}", "5", "boxed"),
        (r"first \boxed{3}. Then \boxed{4}", "4", "boxed"),
    ],
)
def test_where_the_answer_stands(response, extracted, where):
    verdict = grade(response, "7")
    assert verdict.extracted == extracted
    assert verdict.method.startswith(where + ":")


@pytest.mark.parametrize(
    "response",
    [
        "",
        "   \n",
        "We compute 12 + 7 = 19, then we need to",
        "12 + 7 = 19",
        "19",
        "The answer to this question follows from 12 + 7 = 19",
        "The answer is",
        r"so we get \boxed{19",
        r"\boxed{}",
        r"\boxed{$ $}",
        "##### 19",
        "nineteen",
    ],
)
def test_a_response_that_states_no_answer_has_none(response):
    assert grade(response, "19") == Verdict(0.0, "no_answer", None, None)


@pytest.mark.parametrize(
    "response",
    [
        "#### 19. Add the numbers\nWe compute",
        "the answer is obtained by adding 12 and 7, which makes 19 in all",
        "the answer is not 19",
        r"\boxed{19} or \boxed{20}",
        r"\boxed{18, 19}",
    ],
)
def test_an_answer_that_only_mentions_the_gold_is_wrong(response):
    assert grade(response, "19").status == "wrong"


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "\\{", "\\}", "x", " "]), max_size=12).map("".join))
def test_boxes_agree_with_counting_from_each_box(text):
    def content(start: int) -> str | None:
        depth = 1
        for index in range(start, len(text)):
            if text[index] in "{}" and text[index - 1] != "\\":
                depth += 1 if text[index] == "{" else -1
            if depth == 0:
                return text[start:index].strip()
        return None

    starts = [index + 7 for index in range(len(text)) if text.startswith("\\boxed{", index)]
    complete = [found for start in starts if (found := content(start)) is not None]
    assert find_answer(text) == ((complete[-1], "boxed") if complete else ("", None))


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


@pytest.mark.parametrize(
    ("answer", "gold", "how"),
    [
        ("18", "18", "string"),
        ("$18$.", "18", "string"),
        (r"\text{Evelyn}", "Evelyn", "string"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\dfrac{\pi}{2})", "string"),
        ("073", "73", "number"),
        ("+5", "5", "number"),
        ("\u22125", "-5", "string"),
        ("5.0", "5", "number"),
        (".5", r"\frac{1}{2}", "number"),
        ("1/2", r"\dfrac12", "number"),
        ("2/4", "0.5", "number"),
        (r"7\frac{3}{4}", "7.75", "number"),
        ("7 3/4", "31/4", "number"),
        ("1,000", "1000", "number"),
        ("1{,}000", "1000", "number"),
        (r"\$15,\!000", "15000", "number"),
        (r"12\,000", "12,000", "number"),
        ("5 million", "5000000", "number"),
        ("1,000", r"\boxed{1000}", "number"),
        ("0.083333333333", r"\frac{1}{12}", "math_verify"),
        (r"2\sqrt{3}", r"\sqrt{12}", "math_verify"),
        ("sqrt(3) - 1", r"-1 + \sqrt{3}", "math_verify"),
        ("x = 5", "5", "math_verify"),
        (r"10\text{ cm}", "10", "math_verify"),
        ("x^2 + 2x + 1", "(x+1)^2", "math_verify"),
        (r"\begin{pmatrix} \frac{3}{5} \\ 1 \end{pmatrix}", r"\begin{pmatrix}3/5\\1\end{pmatrix}", "math_verify"),
        (r"\text{(C)}", "C", "math_verify"),
        ("The roots are at $x = 5$.", "5", "math_verify"),
    ],
)
def test_right_answers(answer, gold, how):
    verdict = grade(boxed(answer), gold)
    assert verdict == Verdict(1.0, "correct", answer, f"boxed:{how}")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("5000", "50"),
        ("0.5", "50"),
        ("120006", "120000"),
        ("5.001", "5"),
        ("34", "3 4"),
        (r"5\text{ million}", "5"),
        ("0.33", "1/3"),
        ("1/0", "1"),
        ("-18", "18"),
        ("18a", "18"),
        (r"\sqrt{2}", r"\sqrt{3}"),
        ("(1, 2)", "[1, 2]"),
        ("x + 1", "x - 1"),
        (r"1, 3, 5, \ldots, 2n-1", "2"),
        (r"all even integers $n$", r"all odd integers $n$"),
        ("½", "1/3"),
        ("٣", "4"),
        ("\ud800", "4"),
    ],
)
def test_wrong_answers(answer, gold):
    verdict = grade(boxed(answer), gold)
    assert (verdict.score, verdict.status) == (0.0, "wrong")


INTEGERS = st.integers(-(10**40), 10**40)


@given(INTEGERS, st.sampled_from(["{}", "{:,}", "+{}", "0{}", "{}.", "{}.0", "${:,}$", r"\text{{{}}}", " {} "]))
def test_an_integer_however_written_equals_itself_and_not_its_successor(n, form):
    written = form.format(n)
    if n < 0:
        written = written.replace("+-", "-").replace("0-", "-0", 1)
    golds = [str(n), f"{n:,}", str(n + 1), f"{n + 1:,}"]
    verdicts = grade_math([f"so it is {boxed(written)}"] * 4, golds)
    assert [verdict.status for verdict in verdicts] == ["correct", "correct", "wrong", "wrong"]
    assert "boxed:math_verify" not in {verdict.method for verdict in verdicts}


@given(
    st.integers(-999, 999), st.integers(1, 999), st.sampled_from(["{}/{}", r"\frac{{{}}}{{{}}}", r"\dfrac{{{}}}{{{}}}"])
)
def test_plain_number_reads_fractions(a, b, form):
    assert plain_number(canonical(form.format(a, b))) == (Fraction(a, b), False)


@given(st.decimals(-(10**9), 10**9, places=4))
def test_plain_number_reads_decimals(value):
    assert plain_number(f"{value:,f}") == (Fraction(value), True)


def test_a_gold_answer_without_content_is_an_error():
    assert grade(boxed("5"), " $ $ ").status == "error"


def test_lists_of_different_lengths_and_bad_limits_are_refused():
    with pytest.raises(ValueError, match="2 responses but 1 gold"):
        grade_math(["1", "2"], ["1"])
    with pytest.raises(ValueError, match="positive"):
        grade_math([], [], timeout_s=0)
    with pytest.raises(ValueError, match="positive"):
        grade_math([], [], workers=0)
    assert grade_math([], []) == []


# ---------------------------------------------------------------------------------------------------------------------
# Labelled data


def test_agreement_with_labelled_pairs():
    """The file pairs answers rather than responses: one that is not in a box is put into one."""
    rows = need("grading_pairs.jsonl")
    verdicts = grade_math(
        [row["pred"] if "boxed{" in row["pred"] else boxed(row["pred"]) for row in rows],
        [row["gold"] for row in rows],
        timeout_s=30,
    )
    agreed = [(verdict.score == 1.0) == row["correct"] for verdict, row in zip(verdicts, rows, strict=True)]
    assert sum(agreed) / len(rows) >= 0.93
    integers = [
        (row["pred"], row["gold"])
        for row, verdict in zip(rows, verdicts, strict=True)
        if verdict.score == 1.0 and not row["correct"] and row["gold"].strip(" $").lstrip("-").isdigit()
    ]
    assert integers == []


def test_gsm8k_solutions_are_right_and_off_by_one_is_wrong():
    solutions = [row["answer"] for row in need("gsm8k/test.jsonl")]
    golds = [solution.rpartition("#### ")[2] for solution in solutions]
    assert len(golds) == 1319
    off = [str(int(gold.replace(",", "")) + 1) for gold in golds]
    cut = [solution.rpartition("####")[0] for solution in solutions]
    assert {verdict.status for verdict in grade_math(solutions, golds)} == {"correct"}
    assert {verdict.status for verdict in grade_math([boxed(gold) for gold in golds], golds)} == {"correct"}
    assert {verdict.status for verdict in grade_math([boxed(answer) for answer in off], golds)} == {"wrong"}
    assert {verdict.status for verdict in grade_math(cut, golds)} == {"no_answer"}


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


def test_exploding_answers_end_by_the_deadline_and_harm_no_other():
    grade(boxed("x+1"), "1+x")  # starting the processes is not what is timed here
    for answer in EXPLODERS:
        started = time.monotonic()
        verdict = grade(boxed(answer), "3", timeout_s=0.5)
        assert verdict.status in {"timeout", "wrong"}
        assert verdict.score == 0.0
        assert time.monotonic() - started < 1.5
    assert grade(boxed("x+1"), "1+x").status == "correct"


def test_a_timeout_is_called_one():
    assert grade(boxed(r"9^{9^{9^9}}"), "3", timeout_s=0.3) == Verdict(
        0.0, "timeout", r"9^{9^{9^9}}", "boxed:math_verify"
    )


def test_a_memory_bomb_stays_within_its_limit(tmp_path):
    """The cap itself: a comparison that asks for 8 GiB fails alone, and the process goes on."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from gift.math_worker import compare_in_child as compare\n"
        "print(compare(lambda a, g, s: len(bytearray(8 << 30)) > 0, '', '', False, 20.0))\n"
        "print(compare(lambda a, g, s: True, '', '', False, 20.0))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(ROOT)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["error", "correct"]


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


def test_model_text_is_never_run(tmp_path):
    canary = tmp_path / "canary"
    attacks = [
        f"open('{canary}','w').close()",
        f"__import__('os').system('touch {canary}')",
        rf"\text{{open('{canary}','w').close()}}",
        f"the value is open('{canary}','w').close() + 1, in short open('{canary}','w')",
        f"exec(\"open('{canary}','w')\")",
    ]
    responses = [form.format(attack) for attack in attacks for form in ("\\boxed{{{}}}", "The answer is {}")]
    verdicts = grade_math(responses, ["3"] * len(responses))
    assert {verdict.status for verdict in verdicts} == {"wrong"}
    assert not canary.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Processes

SYMBOLIC = [(rf"{a}x + \sqrt{{{a * a * 3}}}", rf"{a}(x + \sqrt{{3}})" if a % 2 else rf"{a}x") for a in range(2, 10)]


def test_verdicts_do_not_depend_on_the_number_of_processes():
    responses, golds = [boxed(answer) for answer, _ in SYMBOLIC], [gold for _, gold in SYMBOLIC]
    alone = grade_math(responses, golds, workers=1)
    assert alone == grade_math(responses, golds, workers=2) == grade_math(responses, golds)
    assert [verdict.status for verdict in alone] == ["wrong", "correct"] * 4


def test_processes_stay_between_calls_start_anew_after_close_and_survive_a_kill():
    grade(boxed("x+1"), "1+x")
    (first, *_) = [worker.process for worker in rewards._pool.workers]
    grade(boxed("x+2"), "2+x")
    assert rewards._pool.workers[0].process is first
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert grade(boxed("x+3"), "3+x").status == "correct"
    rewards.close()
    assert rewards._pool.workers == []
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
    assert rewards._pool.workers == []


def test_importing_is_light_and_numbers_need_no_process():
    script = (
        "import sys; from gift import rewards\n"
        "verdicts = rewards.grade_math(['\\\\boxed{1,000}', 'answer: 1/2', 'none'], ['1000', '0.5', '3'])\n"
        "assert [v.status for v in verdicts] == ['correct', 'correct', 'no_answer'], verdicts\n"
        "assert not rewards._pool.workers and not {'torch', 'math_verify', 'sympy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)


def test_an_interrupt_ends_all_processes_without_noise():
    script = (
        "from gift.rewards import grade_math, _pool\n"
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
