"""`--compare` on hand-made runs, against scipy: what it prints, what it refuses, what it says of the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from evals.compare import compare_command
from evals.stats import pass_at_k
from gift.cli import UserError
from gift.records import RunDir, write_table

Counts = Sequence[tuple[int, int]]
PROTOCOL = {"temperature": 0.6, "top_p": 1.0, "max_tokens": 64, "runs": 1, "samples_per_run": 1, "seed": 0}
RNG = np.random.default_rng(0)
EASY_A, EASY_B = ([(1, c) for c in RNG.binomial(1, p, 60).tolist()] for p in (0.85, 0.45))
HARD_A, HARD_B = ([(1, c) for c in RNG.binomial(1, p, 25).tolist()] for p in (0.3, 0.3))
MANY_A, MANY_B = ([(4, c) for c in RNG.binomial(4, p, 10).tolist()] for p in (0.7, 0.4))


def entry(policies: Sequence[str], items: int, **changes: Any) -> dict[str, Any]:
    """A task as a manifest describes it."""
    made = {"weights_sha256": "w", "chat_template_sha256": "t", "items": items}
    return {
        "label": "A task",
        "group": "math",
        "metric": "accuracy",
        "prompt": "{problem}",
        "items": items,
        "source": {"name": "made up", "revision": None, "sha256": "d" * 64, "rows": items},
        "graders": {"strict": "3", "paper": "1"},
        "policies": {policy: dict(made) for policy in policies},
        **changes,
    }


def write_run(
    path: Path,
    scores: Mapping[str, Mapping[str, Mapping[str, Counts]]],
    *,
    protocol: Mapping[str, Any] = PROTOCOL,
    changes: Mapping[str, Any] | None = None,
    idle: Sequence[str] = (),
) -> Path:
    """A run whose policies have these counts: suite -> task -> policy -> (samples, correct) of item 0, 1, ...

    `changes` go into every task's entry of the manifest; `idle` policies were not evaluated.
    """
    run = RunDir.create(path, kind="train", recipe={})
    policies = {policy for tasks in scores.values() for sides in tasks.values() for policy in sides}
    for policy in [*sorted(policies), *idle]:
        run.add_node({"id": policy, "label": policy, "weights_sha256": "w", "checkpoint": "c"})
    rows = []
    for suite, tasks in scores.items():
        about = {
            task: entry(list(sides), len(next(iter(sides.values()))), **(changes or {}))
            for task, sides in tasks.items()
        }
        run.manifest["eval"][suite] = {"protocol": dict(protocol), "tasks": about}
        for task, sides in tasks.items():
            for policy, counts in sides.items():
                for number, (n, correct) in enumerate(counts):
                    rows += [  # a row per run, as evals.results writes them
                        (task, f"{task}-{number}", policy, sample, 1, int(sample < correct)) for sample in range(n)
                    ]
    run.save()
    names = ("task", "item", "policy", "run", "n", "correct")
    write_table(path / "items.parquet", dict(zip(names, zip(*rows, strict=True), strict=True)))
    return path


def write_ratings(path: Path, task: str, scores: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """`ratings.parquet` with these scores: policy -> item -> a score per sample."""
    rows = [
        (task, item, "writing", policy, 0, sample, float(score))
        for policy, items in scores.items()
        for item, marks in items.items()
        for sample, score in enumerate(marks)
    ]
    names = ("task", "item", "category", "policy", "run", "sample", "score")
    write_table(path / "ratings.parquet", dict(zip(names, zip(*rows, strict=True), strict=True)))


def compare(capsys: pytest.CaptureFixture[str], a: str, b: str, run: Path | None = None) -> tuple[int, str]:
    code = compare_command(a, b, run)
    return code, capsys.readouterr().out


def row(printed: str, name: str) -> list[str]:
    """The cells of the line that starts with `name`."""
    [line] = [line for line in printed.splitlines() if line.startswith(f"{name}  ")]
    return re.split(r"\s{2,}", line.replace("* ", "*  "))


def p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def percent(counts: Counts) -> str:
    return f"{100 * np.mean([correct / n for n, correct in counts]):.1f}"


def difference_text(a: Sequence[float], b: Sequence[float], points: float, digits: int) -> str:
    test = scipy.stats.ttest_rel(a, b)
    interval = test.confidence_interval(0.95)
    numbers = (np.mean(a) - np.mean(b), interval.low, interval.high)
    mean, low, high = (f"{points * number:+z.{digits}f}" for number in numbers)
    return f"{mean} [{low}, {high}]"


# ---------------------------------------------------------------------------------------------------------------------
# What it prints


def test_single_samples_are_compared_by_mcnemar_with_holm_and_flips(tmp_path, capsys):
    run = write_run(
        tmp_path / "mine", {"math": {"easy": {"one": EASY_A, "two": EASY_B}, "hard": {"one": HARD_A, "two": HARD_B}}}
    )
    code, printed = compare(capsys, "one", "two", run)
    assert code == 0
    p_values = {}
    for task, a, b in (("easy", EASY_A, EASY_B), ("hard", HARD_A, HARD_B)):
        right, other = (np.array([correct for _, correct in counts]) for counts in (a, b))
        wins, losses = int((right > other).sum()), int((right < other).sum())
        p_values[task] = scipy.stats.binomtest(wins, wins + losses).pvalue
        cells = row(printed, task)
        assert cells[1:6] == [
            str(len(a)),
            percent(a),
            percent(b),
            difference_text(right, other, 100, 1),
            p_text(p_values[task]),
        ]
        assert cells[-2:] == [str(wins), str(losses)]
    assert p_values["easy"] < 0.025 < 0.05 < p_values["hard"]
    assert row(printed, "easy")[6] == f"{p_text(2 * p_values['easy'])}*"
    assert row(printed, "hard")[6] == p_text(p_values["hard"])
    assert "exact McNemar" in printed
    assert printed.startswith(f"A = one of {run}\nB = two of {run}\n")


def test_the_mean_of_a_suite_is_that_of_its_tasks(tmp_path, capsys):
    tasks = {"easy": {"one": EASY_A, "two": EASY_B}, "hard": {"one": HARD_A, "two": HARD_B}}
    run = write_run(tmp_path / "mine", {"math": tasks, "alone": {"only": {"one": HARD_A, "two": HARD_B}}})
    _, printed = compare(capsys, "one", "two", run)
    differences = [
        np.array([x - y for (_, x), (_, y) in zip(a, b, strict=True)]) for a, b in ((EASY_A, EASY_B), (HARD_A, HARD_B))
    ]
    parts = [d.var(ddof=1) / len(d) for d in differences]
    degrees = sum(parts) ** 2 / sum(part**2 / (len(d) - 1) for part, d in zip(parts, differences, strict=True))
    mean = np.mean([d.mean() for d in differences])
    margin = scipy.stats.t.ppf(0.975, degrees) * np.sqrt(sum(parts)) / 2
    cells = row(printed, "math")
    assert cells[1] == "2"
    assert cells[4] == f"{100 * mean:+z.1f} [{100 * (mean - margin):+z.1f}, {100 * (mean + margin):+z.1f}]"
    assert not [line for line in printed.splitlines() if line.startswith("alone ")]  # one task is its own mean


def test_several_samples_are_compared_by_permutation_and_in_pass_at_k(tmp_path, capsys):
    run = write_run(
        tmp_path / "mine", {"math": {"many": {"one": MANY_A, "two": MANY_B}}}, protocol=PROTOCOL | {"runs": 4}
    )
    _, printed = compare(capsys, "one", "two", run)
    [first, *pass_at] = [line for line in printed.splitlines() if line.startswith("many ")]
    rates = [np.array([correct / n for n, correct in counts]) for counts in (MANY_A, MANY_B)]
    p = scipy.stats.permutation_test(
        rates,
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=True,
    ).pvalue
    cells = re.split(r"\s{2,}", first)
    assert cells[1:6] == ["10", percent(MANY_A), percent(MANY_B), difference_text(*rates, 100, 1), p_text(p)]
    assert "McNemar" not in printed
    assert "A only" not in printed
    assert len(pass_at) == 2
    for line, k in zip(pass_at, (2, 4), strict=True):
        means = [np.mean([pass_at_k(n, c, k) for n, c in counts]) for counts in (MANY_A, MANY_B)]
        cells = re.split(r"\s{2,}", line)
        assert cells[1:4] == [str(k), *(f"{100 * mean:.1f}" for mean in means)]
        assert cells[4].startswith(f"{100 * (means[0] - means[1]):+z.1f} [")


def test_ratings_are_compared_by_question(tmp_path, capsys):
    run = write_run(
        tmp_path / "mine", {"mtbench": {"chat": {"one": HARD_A, "two": HARD_B}}}, changes={"metric": "rating"}
    )
    scores = {
        policy: {
            f"{question}-{turn}": RNG.integers(low, 11, 1).tolist() for question in range(81, 91) for turn in (1, 2)
        }
        for policy, low in (("one", 5), ("two", 1))
    }
    scores["two"].pop("90-2")
    scores["one"].pop("90-2")  # neither has a rating of that turn
    write_ratings(run, "chat", scores)
    code, printed = compare(capsys, "one", "two", run)
    means = [
        [np.mean([m for turn in (1, 2) for m in items.get(f"{question}-{turn}", [])]) for question in range(81, 91)]
        for items in scores.values()
    ]
    cells = row(printed, "chat")
    assert code == 0
    assert cells[1:5] == ["10", *(f"{np.mean(m):.2f}" for m in means), difference_text(*means, 1, 2)]
    assert "chat: 6 of 25 answers of A have no rating and do not count" in printed
    assert "pass@" not in printed


def test_policies_of_different_runs_are_compared(tmp_path, capsys):
    one = write_run(tmp_path / "one", {"math": {"easy": {"base": EASY_A}}}, idle=["later"])
    two = write_run(
        tmp_path / "two", {"math": {"easy": {"base": EASY_B, "more": EASY_A}}}, protocol=PROTOCOL | {"seed": 7}
    )
    code, printed = compare(capsys, str(one), f"{two}:base")
    assert code == 0
    assert row(printed, "easy")[2:4] == [percent(EASY_A), percent(EASY_B)]
    assert "note: math: seed is 0 for A, 7 for B" in printed
    assert "template" not in printed
    _, mixed = compare(capsys, "more", str(one), two)
    assert row(mixed, "easy")[2:4] == [percent(EASY_A), percent(EASY_A)]


def test_another_chat_template_is_remarked(tmp_path, capsys):
    run = RunDir.open(write_run(tmp_path / "mine", {"math": {"easy": {"one": EASY_A, "two": EASY_B}}}))
    run.manifest["eval"]["math"]["tasks"]["easy"]["policies"]["two"]["chat_template_sha256"] = "other"
    run.save()
    code, printed = compare(capsys, "one", "two", run.path)
    assert code == 0
    assert "note: math: A and B have different chat templates" in printed


def test_a_manifest_of_before_tasks_had_several_graders_is_understood(tmp_path, capsys):
    new = write_run(tmp_path / "new", {"math": {"easy": {"base": EASY_A}}}, changes={"graders": {"strict": "3"}})
    old = write_run(tmp_path / "old", {"math": {"easy": {"base": EASY_B}}}, protocol=PROTOCOL | {"prompt": "{problem}"})
    run = RunDir.open(old)
    about = run.manifest["eval"]["math"]["tasks"]["easy"]
    del about["graders"], about["prompt"], about["metric"]
    about["grader"] = {"name": "strict", "version": "3"}
    run.save()
    assert compare(capsys, str(new), str(old))[0] == 0
    about["grader"]["version"] = "2"
    run.save()
    code, printed = compare(capsys, str(new), str(old))
    assert code == 1
    assert "grader is 'strict 3' for A, 'strict 2' for B" in printed


def test_stored_generations_are_compared_with_a_remark(tmp_path, capsys):
    one = write_run(tmp_path / "one", {"math": {"easy": {"base": EASY_A}}})
    replayed = {"runs": 1, "samples_per_run": 1, "engine": "replay"}
    two = write_run(tmp_path / "two", {"math": {"easy": {"base": EASY_B}}}, protocol=replayed)
    code, printed = compare(capsys, str(one), str(two))
    assert code == 0
    assert "how the stored generations of B were sampled is not recorded" in printed


# ---------------------------------------------------------------------------------------------------------------------
# What it refuses


@pytest.mark.parametrize(
    ("protocol", "changes", "counts", "reason"),
    [
        (PROTOCOL | {"temperature": 0.0}, {}, EASY_B, "temperature is 0.6 for A, 0.0 for B"),
        (PROTOCOL | {"top_k": 20}, {}, EASY_B, "top_k is 0 for A, 20 for B"),  # unrecorded in A: the default
        (PROTOCOL, {"prompt": "Solve: {problem}"}, EASY_B, "prompt is '{problem}' for A, 'Solve: {problem}' for B"),
        (PROTOCOL, {"graders": {"strict": "4"}}, EASY_B, "grader is 'strict 3' for A, 'strict 4' for B"),
        (PROTOCOL, {"graders": {"paper": "1", "strict": "3"}}, EASY_B, "grader is 'strict 3' for A, 'paper 1' for B"),
        (PROTOCOL, {"source": {"sha256": "e" * 64}}, EASY_B, f"data sha256 is '{'d' * 64}' for A, '{'e' * 64}' for B"),
        (PROTOCOL, {}, EASY_B[:50], "items differ: 10 are only A's, 0 only B's"),
    ],
)
def test_tasks_that_were_asked_otherwise_are_left_out(tmp_path, capsys, protocol, changes, counts, reason):
    one = write_run(tmp_path / "one", {"math": {"easy": {"base": EASY_A}, "hard": {"base": HARD_A}}})
    two = write_run(tmp_path / "two", {"math": {"easy": {"base": counts}}}, protocol=protocol, changes=changes)
    code, printed = compare(capsys, str(one), str(two))
    assert code == 1
    assert f"not compared: easy: {reason}" in printed
    assert "not compared: hard: only A was evaluated on it" in printed


def test_the_rest_is_compared_where_a_task_cannot_be(tmp_path, capsys):
    tasks = {
        "easy": {"one": EASY_A, "two": EASY_B},
        "hard": {"one": HARD_A, "two": HARD_B[:7]},
        "more": {"three": HARD_A},
    }
    run = write_run(tmp_path / "mine", {"math": tasks})
    code, printed = compare(capsys, "one", "two", run)
    assert code == 0
    assert row(printed, "easy")[1] == "60"
    assert "not compared: hard: items differ: 18 are only A's, 0 only B's" in printed
    assert "no mean of suite math: 1 of its 3 tasks are compared by accuracy" in printed
    assert "more:" not in printed  # neither was evaluated on it


def test_unfinished_evaluations_are_left_out(tmp_path, capsys):
    short = [(3, 1), *MANY_B[1:]]
    scores = {"math": {"many": {"one": MANY_A, "two": short}}, "mtbench": {"chat": {"one": MANY_A, "two": MANY_B}}}
    run = write_run(tmp_path / "mine", scores, protocol=PROTOCOL | {"runs": 4})
    manifest = RunDir.open(run)
    manifest.manifest["eval"]["mtbench"]["tasks"]["chat"]["metric"] = "rating"
    manifest.save()
    code, printed = compare(capsys, "one", "two", run)
    assert code == 1
    assert "not compared: many: 1 items of B lack graded samples" in printed
    assert "not compared: chat: A has no graded samples of it" in printed


@pytest.mark.parametrize(
    ("a", "b", "with_run", "message"),
    [
        ("one", "one", True, "same policy"),
        ("one", "{run}:one", True, "same policy"),
        ("one", "tow", True, r"no policy 'tow' \(did you mean 'two'\?\)"),
        ("one", "later", True, "'later' was not evaluated"),
        ("one", "{run}:never", True, "no policy 'never' in this run"),
        ("{run}:one", "{run}", False, "several evaluated policies; give .*:POLICY, of one, two"),
        ("{run}:one", "two", False, "two: not a run directory; give RUN_DIR, RUN_DIR:POLICY"),
        ("{run}:one", "{empty}", False, "nothing was evaluated"),
        ("{run}:one", "{bare}", False, "items.parquet: no such file"),
    ],
)
def test_what_names_no_evaluated_policy_is_refused(tmp_path, a, b, with_run, message):
    run = write_run(tmp_path / "mine", {"math": {"easy": {"one": EASY_A, "two": EASY_B}}}, idle=["later"])
    RunDir.create(tmp_path / "empty", kind="eval", recipe={})
    bare = write_run(tmp_path / "bare", {"math": {"easy": {"base": EASY_A}}})
    (bare / "items.parquet").unlink()
    places = {"run": run, "empty": tmp_path / "empty", "bare": bare}
    with pytest.raises(UserError, match=message) as raised:
        compare_command(a.format(**places), b.format(**places), run if with_run else None)
    assert "\n" not in str(raised.value)


def test_a_table_without_a_column_is_refused(tmp_path):
    run = write_run(tmp_path / "mine", {"math": {"easy": {"one": EASY_A, "two": EASY_B}}})
    write_table(run / "items.parquet", {"task": ["easy"], "policy": ["one"], "item": ["easy-0"], "n": [1]})
    with pytest.raises(UserError, match=r"items\.parquet: no column 'correct'"):
        compare_command("one", "two", run)
