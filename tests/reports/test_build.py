from __future__ import annotations

import itertools
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from page_reader import Page
from scipy import stats
from synthetic_run import ABILITY, PAIRS, TASKS, TOP_K, Truth, write_run

from gift.cli import UserError
from gift.records import read_json, sha256_file, write_json
from reports.build import build_report, main, summary_table

POLICIES = tuple(ABILITY)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return write_run(tmp_path_factory.mktemp("runs") / "nano", items=40, runs=2, samples=4)


@pytest.fixture(scope="module")
def page(truth: Truth) -> Page:
    return Page(build_report([truth.path], truth.path / "report.html"))


def edit_manifest(path: Path, **entries: object) -> None:
    write_json(path / "manifest.json", {**read_json(path / "manifest.json"), **entries})


# ---------------------------------------------------------------------------------------------------------------------
# The numbers, computed again from the raw outcomes


def wilson_by_item(outcome: np.ndarray) -> tuple[float, float, float]:
    """Wilson's interval at the effective number of samples, clustered by item, in percent."""
    rates = outcome.mean(axis=(1, 2))
    p, items = rates.mean(), len(rates)
    n = np.clip(p * (1 - p) / (rates.var(ddof=1) / items), items / 2, outcome.size)
    z = stats.norm.ppf(0.975)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return 100 * p, 100 * (centre - half), 100 * (centre + half)


@pytest.mark.parametrize("policy", POLICIES)
def test_table_1_has_means_and_intervals(truth: Truth, page: Page, policy: str) -> None:
    for task, outcome in truth.correct[policy].items():
        assert page.cells[f"table-1-nano.{policy}.{task}"].numbers == pytest.approx(wilson_by_item(outcome), abs=0.051)


@pytest.mark.parametrize("policy", POLICIES)
def test_table_1_averages_over_tasks(truth: Truth, page: Page, policy: str) -> None:
    value, low, high = page.cells[f"table-1-nano.{policy}.average"].numbers
    outcomes = list(truth.correct[policy].values())
    assert value == pytest.approx(100 * np.mean([outcome.mean() for outcome in outcomes]), abs=0.051)
    # The stratified standard error is another way to the same width.
    error = math.sqrt(sum(o.mean(axis=(1, 2)).var(ddof=1) / len(o) for o in outcomes)) / len(outcomes)
    assert (high - low) / 2 == pytest.approx(100 * 1.96 * error, rel=0.05)


def rate_differences(truth: Truth, a: str, b: str, tasks: list[str]) -> tuple[np.ndarray, float]:
    """Per-item differences weighted so that tasks count the same, and their mean over tasks."""
    by_task = [truth.correct[a][t].mean(axis=(1, 2)) - truth.correct[b][t].mean(axis=(1, 2)) for t in tasks]
    items = sum(map(len, by_task))
    weighted = np.concatenate([d * items / (len(tasks) * len(d)) for d in by_task])
    return weighted, float(np.mean([d.mean() for d in by_task]))


def sign_flip_p(differences: np.ndarray) -> float:
    signs = np.random.default_rng(99).choice([-1, 1], (40_000, len(differences)))
    return float((np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9).mean())


def test_table_1_marks(truth: Truth, page: Page) -> None:
    seen = set()
    for column in (*TASKS, "average"):
        tasks = list(TASKS) if column == "average" else [column]
        means = {p: float(np.mean([truth.correct[p][t].mean() for t in tasks])) for p in POLICIES}
        printed = {p: round(100 * mean, 1) for p, mean in means.items()}
        first, second, *_ = sorted(set(printed.values()), reverse=True)
        best = max(means, key=means.__getitem__)
        p_values = {p: sign_flip_p(rate_differences(truth, best, p, tasks)[0]) for p in POLICIES if p != best}
        adjusted, worst = {}, 0.0
        for rank, policy in enumerate(sorted(p_values, key=p_values.__getitem__)):
            worst = max(worst, p_values[policy] * (len(p_values) - rank))
            adjusted[policy] = worst
        assert not [p for p in adjusted.values() if 0.04 < p < 0.06], "a borderline p-value: choose another seed"
        for policy in POLICIES:
            cell = page.cells[f"table-1-nano.{policy}.{column}"]
            assert ("strong" in cell.tags) == (printed[policy] == first), (policy, column)
            assert ("u" in cell.tags) == (printed[policy] == second), (policy, column)
            assert ("†" in cell.text) == (adjusted.get(policy, 0) >= 0.05 and printed[policy] != first), (
                policy,
                column,
            )
            seen |= cell.tags
    assert {"strong", "u", "sup"} <= seen


@pytest.mark.parametrize(
    ("scope", "tasks"),
    [("all-tasks", list(TASKS)), ("harder", ["long_chain", "big_digits"]), ("in-distribution", ["chain"])],
)
def test_paired_differences(truth: Truth, page: Page, scope: str, tasks: list[str]) -> None:
    weighted, mean = rate_differences(truth, "gift-rl", "sft-rl", tasks)
    half = stats.t.ppf(0.975, len(weighted) - 1) * weighted.std(ddof=1) / math.sqrt(len(weighted))
    row = f"paired-nano.gift-rl-sft-rl-{scope}"
    expected = [100 * mean, 100 * (mean - half), 100 * (mean + half)]
    assert page.cells[f"{row}.difference"].numbers == pytest.approx(expected, abs=0.051)
    shown = page.cells[f"{row}.p"].text
    exact = sign_flip_p(weighted)
    assert shown == "p < 0.001" if exact < 0.0005 else float(shown[4:]) == pytest.approx(exact, abs=0.015)
    better = page.cells[f"{row}.verdict"].text == "GIFT + RL better"
    assert better == (exact < 0.05 and mean > 0)
    detectable = 100 * (1.959964 + 0.841621) * weighted.std(ddof=1) / math.sqrt(len(weighted))
    assert page.cells[f"{row}.detectable"].numbers == pytest.approx([detectable], abs=0.051)
    assert page.cells[f"{row}.items"].numbers == [len(weighted)]


@pytest.mark.parametrize("policy", POLICIES)
def test_table_3_enumerates_subsets(truth: Truth, page: Page, policy: str) -> None:
    for task, outcome in truth.correct[policy].items():
        flat = outcome.reshape(len(outcome), -1)
        for k in (1, 2, 4, 8):
            subsets = list(itertools.combinations(range(flat.shape[1]), k))
            expected = 100 * np.mean([[item[list(subset)].any() for subset in subsets] for item in flat])
            value, low, high = page.cells[f"table-3-nano.{policy}-{task}.{k}"].numbers
            assert value == pytest.approx(expected, abs=0.051)
            assert low <= value <= high


@pytest.mark.parametrize("pair", PAIRS)
def test_drift_tables(truth: Truth, page: Page, pair: tuple[str, str]) -> None:
    row = pair[1].removesuffix("-rl")
    span = "init-RL" if pair[0] != "base" else "Base-RL" if pair[1].endswith("-rl") else "Base-init"
    for metric, (n, total) in truth.drift[pair].items():
        mean = total.sum() / n.sum()
        error = math.sqrt(40 / 39 * ((total - mean * n) ** 2).sum()) / n.sum()
        half = stats.t.ppf(0.975, 39) * error
        expected = [mean, mean - half, mean + half]
        if metric in ("cos", "l2", "kl_new_old"):
            cell = page.cells[f"table-4.{row}.{span}-{metric}"]
            assert cell.numbers == pytest.approx(expected, abs=0.0051 if metric == "l2" else 0.00051)
        if metric.startswith("topk"):
            number = {"Base-init": 0, "init-RL": 1, "Base-RL": 2}[span]
            cell = page.cells[f"figure-2-data.{number}-{pair[1]}.{metric.rpartition('_')[2]}"]
            assert cell.numbers == pytest.approx([100 * x for x in expected], abs=0.0051)
        else:
            cell = page.cells[f"table-4-all.{metric}.{pair[0]}..{pair[1]}"]
            assert cell.numbers == pytest.approx(expected, abs=0.000051)


def test_table_4_marks_the_smaller_drift(truth: Truth, page: Page) -> None:
    def mean(pair: tuple[str, str], metric: str) -> float:
        n, total = truth.drift[pair][metric]
        return float(total.sum() / n.sum())

    for metric, sign in (("cos", -1), ("l2", 1), ("kl_new_old", 1)):
        closest = min(("sft", "gift"), key=lambda method: sign * mean(("base", method), metric))
        for method in ("sft", "gift"):
            assert ("strong" in page.cells[f"table-4.{method}.Base-init-{metric}"].tags) == (method == closest)


def test_the_figures_data_are_the_log(truth: Truth, page: Page) -> None:
    assert page.cells["figure-1-data.3.GIFT"].numbers == pytest.approx([0.4 + 0.8 * 0.45**3], abs=5e-5)
    assert len({cell for cell in page.cells if cell.startswith("figure-3-data.")}) == 60 * 4
    assert len({cell for cell in page.cells if cell.startswith("figure-2-data.")}) == 6 * len(TOP_K)


def test_the_landing_block_names_the_findings(truth: Truth, page: Page) -> None:
    averages = {p: np.mean([o.mean() for o in truth.correct[p].values()]) for p in POLICIES}
    best = max(averages, key=averages.__getitem__)
    assert best == "gift-rl"
    assert f"GIFT + RL {100 * averages[best]:.1f} %" in page.text
    _, mean = rate_differences(truth, "gift-rl", "sft-rl", list(TASKS))
    assert f"+{100 * mean:.1f} points" in page.text
    assert "Nothing is missing" in page.text
    assert "15 min" not in page.text
    assert "13 min 20 s in 8 steps" in page.text  # the report's own step is not part of the work


# ---------------------------------------------------------------------------------------------------------------------
# The file


def test_the_same_files_give_the_same_bytes(truth: Truth, page: Page, tmp_path: Path) -> None:
    again = build_report([truth.path], tmp_path / "again.html")
    copy = shutil.copytree(truth.path, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("report.html"))
    moved = build_report([copy], tmp_path / "moved.html")
    assert again.read_bytes() == (truth.path / "report.html").read_bytes() == moved.read_bytes()


def test_the_page_reaches_no_network(page: Page) -> None:
    assert not re.search(r"@import|url\((?!#)", page.source)
    assert "http" not in page.source.replace("http-equiv", "")
    loading = [entry for entry in page.attributes if entry[1] in ("src", "srcset", "data", "action", "xlink:href")]
    assert loading == []
    assert {value[0] for _, name, value in page.attributes if name == "href"} == {"#"}
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-")


def test_ids_are_unique_and_every_reference_has_one(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    targets = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page.source)
    labels = [id for _, name, value in page.attributes if name == "aria-labelledby" for id in value.split()]
    wanted = {first or second for first, second in targets} | set(labels)
    assert len(wanted) > 20
    assert wanted <= set(page.ids)


def test_inputs_are_listed_with_their_hashes(truth: Truth, page: Page) -> None:
    for file in ("items.parquet", "metrics.jsonl", "drift/base..gift.parquet", "samples/gift/chain.jsonl"):
        assert sha256_file(truth.path / file) in page.text
    assert "python -m evals.run --suite nano --model runs/nano" in page.text


def test_settings_show_recipe_and_overrides(page: Page) -> None:
    rows = {page.cells[f"recipe.{index}.0"].text: page.cells[f"recipe.{index}.1"].text for index in range(17)}
    assert rows["3"] == "override"
    assert rows["[0.9, 0.95]"] == "recipe"
    assert "1234567890abcdef1234567890abcdef12345678" in page.text


def test_an_infinite_option_is_shown(tmp_path: Path) -> None:
    truth = write_run(tmp_path / "run", items=4)
    recipe = read_json(truth.path / "manifest.json")["recipe"]
    recipe["methods"]["gift"]["options"]["beta"] = "inf"  # as JSON has it
    edit_manifest(truth.path, recipe=recipe)
    assert "GIFT (beta = inf)" in Page(build_report([truth.path], tmp_path / "report.html")).text


def test_several_runs_on_one_page(truth: Truth, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", items=10, seed=8)
    page = Page(build_report([truth.path, other.path], tmp_path / "both.html"))
    assert len(page.ids) == len(set(page.ids))
    for prefix, run in (("r1-", truth), ("r2-", other)):
        value = page.cells[f"{prefix}table-1-nano.gift.chain"].numbers[0]
        assert value == pytest.approx(100 * run.correct["gift"]["chain"].mean(), abs=0.051)
    with pytest.raises(UserError, match="given twice"):
        build_report([truth.path, truth.path / ".." / "nano"], tmp_path / "twice.html")


# ---------------------------------------------------------------------------------------------------------------------
# What is missing


def drop(*names: str) -> Callable[[Path], None]:
    def remove(path: Path) -> None:
        for name in names:
            target = path / name
            shutil.rmtree(target) if target.is_dir() else target.unlink()

    return remove


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (drop("items.parquet"), ["items.parquet is not there", "python -m evals.run --suite nano --model runs/run"]),
        (drop("drift"), ["Drift: not measured", "python -m diagnostics.run --run runs/run"]),
        (drop("drift/base..gift.parquet"), ["Drift Base → GIFT: not measured"]),
        (drop("metrics.jsonl"), ["Validation loss of SFT: metrics.jsonl has none", "RL curve of GIFT + RL"]),
        (drop("samples"), ["Examples: no samples"]),
        (drop("samples/sft"), ["Examples of SFT: no samples"]),
        (drop("items.parquet", "drift", "metrics.jsonl", "samples"), ["Drift: not measured", "items.parquet is not"]),
        (lambda path: edit_manifest(path, eval={}), ["Evaluation: no policy has been evaluated"]),
        (
            lambda path: edit_manifest(path, status="running", steps={"rl gift": {"status": "running"}}),
            ["The rest of the run: still at work, or interrupted", "Step rl gift: running"],
        ),
        (
            lambda path: edit_manifest(
                path, status="failed", steps={"drift": {"status": "failed", "error": "no memory"}}
            ),
            ["status 'failed'", "Step drift: failed: no memory", "python -m gift.train nano seed=3"],
        ),
        (
            lambda path: edit_manifest(path, lineage=[]),
            ["Base: the lineage has no base", "GIFT + RL: RL has not been run"],
        ),
        (lambda path: edit_manifest(path, recipe={}, seeds={}, data={}, hardware={}, packages={}), []),
    ],
)
def test_missing_parts_are_said_and_never_crash(
    tmp_path: Path, damage: Callable[[Path], None], said: list[str]
) -> None:
    truth = write_run(tmp_path / "run", items=6)
    damage(truth.path)
    page = Page(build_report([truth.path], tmp_path / "report.html"))
    assert [text for text in said if text not in page.text] == []
    assert ("Nothing is missing" in page.text) == (not said)
    assert len(page.ids) == len(set(page.ids))
    summary_table(truth.path)


def test_before_rl(tmp_path: Path) -> None:
    truth = write_run(tmp_path / "run", items=12, policies=("base", "sft", "gift"), status="running")
    page = Page(build_report([truth.path], tmp_path / "report.html"))
    assert "SFT + RL: RL has not been run" in page.text
    assert "To make these: python -m gift.train nano seed=3" in page.text
    assert "GIFT vs SFT, all tasks" in page.text
    assert "figure-3" not in page.ids


def test_partial_cells_are_shown_but_neither_ranked_nor_averaged(tmp_path: Path) -> None:
    truth = write_run(tmp_path / "run", items=12)
    manifest = read_json(truth.path / "manifest.json")
    manifest["eval"]["nano"]["tasks"]["chain"]["items"] = 13
    write_json(truth.path / "manifest.json", manifest)
    page = Page(build_report([truth.path], tmp_path / "report.html"))
    cell = page.cells["table-1-nano.gift-rl.chain"]
    assert "partial: 12 of 13 items" in cell.text
    assert not cell.tags & {"strong", "u", "sup"}
    assert "no average" in page.cells["table-1-nano.gift-rl.average"].text
    assert page.cells["table-1-nano.gift-rl.average"].numbers == []


def test_an_evaluation_or_drift_run_alone(tmp_path: Path) -> None:
    truth = write_run(tmp_path / "run", items=6, policies=("base",))
    shutil.rmtree(truth.path / "drift", ignore_errors=True)
    (truth.path / "metrics.jsonl").unlink()
    edit_manifest(truth.path, kind="eval", recipe={"model": "some/model"}, drift={}, steps={})
    page = Page(build_report([truth.path], tmp_path / "report.html"))
    assert "Nothing is missing" in page.text
    assert "some/model" in page.text
    assert not [id for id in page.ids if id.startswith(("table-4", "figure-1"))]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_writes_into_the_run_and_prints_a_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = write_run(tmp_path / "run", items=6)
    assert main([str(truth.path)]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {truth.path / 'report.html'}" in printed
    assert summary_table(truth.path) in printed
    first = truth.correct["gift-rl"]["chain"].mean()
    line = next(line for line in printed.splitlines() if line.startswith("GIFT + RL"))
    assert f"{100 * first:.1f}" in line


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    truth = write_run(tmp_path / "run", items=6)
    with pytest.raises(UserError, match="not a run directory"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="--out"):
        main([str(truth.path), str(truth.path)])
    with pytest.raises(UserError, match="names a folder"):
        main([str(truth.path), "--out", str(tmp_path)])
