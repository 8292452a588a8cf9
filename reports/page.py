"""A run as the page shows it: sections of tables, figures and examples, and their rendering as one HTML file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gift.records import sha256_json
from reports import accuracy, comparisons, drift, figures, overview, settings
from reports.commands import own_command, report_command
from reports.comparisons import Comparison
from reports.examples import Example, example_gaps, examples
from reports.figures import Figure
from reports.overview import Headline
from reports.rundata import RunData, Suite
from reports.style import Look, looks
from reports.tables import Missing, Table, by_command, slug, visible

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Piece:
    """A table, a table behind a click, or a figure."""

    kind: Literal["table", "folded", "figure"]
    content: Table | Figure


@dataclass(frozen=True)
class Section:
    """A part of the page with what it could not show."""

    id: str
    title: str
    lead: str = ""
    pieces: Sequence[Piece] = ()
    missing: Sequence[Missing] = ()
    examples: Sequence[Example] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show and nothing to miss."""
        return not (self.pieces or self.missing or self.examples)


@dataclass(frozen=True)
class RunView:
    """Everything the template shows of one run."""

    data: RunData
    prefix: str
    """Begins every id of this run, so that ids are unique where a page shows several runs."""
    looks: Mapping[str, Look]
    headlines: Sequence[Headline]
    facts: Sequence[tuple[str, str]]
    summary: Table
    missing: Sequence[Missing]
    sections: Sequence[Section]

    @property
    def files(self) -> Mapping[str, str]:
        """SHA-256 of every file read, by relative name."""
        return self.data.files

    @property
    def rebuild(self) -> str:
        """The command that makes this page again."""
        return report_command(self.data)

    @property
    def contents(self) -> list[tuple[str, str]]:
        """The sections' anchors and titles."""
        return [(section.id, section.title) for section in self.sections]


def view(run: RunData, prefix: str) -> RunView:
    """Computes everything the page shows of a run."""
    compared = {suite.name: comparisons.comparisons(run, suite) for suite in run.suites}
    pass1 = {suite.name: accuracy.pass_at_1_table(run, suite) for suite in run.suites if evaluated(run, suite)}
    first = next(iter(compared.values()), [])
    sections = [
        accuracy_section(run, pass1, compared),
        pass_at_k_section(run),
        training_section(run),
        drift_section(run),
        examples_section(run),
    ]
    missing = list(dict.fromkeys([*overview.gaps(run), *sections[-1].missing]))
    return RunView(
        data=run,
        prefix=prefix,
        looks=looks(run.policies),
        headlines=overview.headlines(run, list(pass1.values()), first),
        facts=overview.facts(run),
        summary=overview.summary(run),
        missing=missing,
        sections=[section for section in [*sections, settings_section(run)] if not section.empty],
    )


def evaluated(run: RunData, suite: Suite) -> bool:
    """Whether any policy has results on any task of a suite."""
    names = {task.name for task in suite.tasks}
    return any(task in names for _, task in run.counts)


def accuracy_section(run: RunData, pass1: Mapping[str, Table], compared: Mapping[str, Sequence[Comparison]]) -> Section:
    """Table 1 and the paired differences of each suite."""
    pieces = []
    for suite in run.suites:
        if suite.name in pass1:
            pieces.append(Piece("table", pass1[suite.name]))
        if compared[suite.name]:
            pieces.append(Piece("table", comparisons.comparison_table(run, suite, compared[suite.name])))
    missing = accuracy.evaluation_gaps(run) if run.kind in {"train", "eval"} else []
    return Section("accuracy", "Accuracy", "What each policy solves with one sample.", pieces, missing)


def pass_at_k_section(run: RunData) -> Section:
    """Table 3 and the pass@k curves of each suite."""
    pieces = []
    for suite in run.suites:
        if evaluated(run, suite) and suite.samples > 1:
            cells = accuracy.pass_at_k_cells(run, suite)
            pieces.append(Piece("table", accuracy.pass_at_k_table(run, suite, cells)))
            drawn = figures.pass_at_k_figure(run, suite, cells)
            pieces += [Piece("figure", drawn)] if drawn else []
    lead = "Whether k samples contain a correct one: what RL can still find in an initialization."
    return Section("pass-at-k", "pass@k", lead, pieces)


def training_section(run: RunData) -> Section:
    """The learning curves of both stages."""
    drawn = [figures.validation_loss(run), figures.rl_curves(run)]
    expected = run.kind == "train"
    return Section(
        "training",
        "Training",
        "How initialization and RL went.",
        [Piece("figure", one) for one in drawn if one],
        figures.training_gaps(run, own_command(run)) if expected else [],
    )


def drift_section(run: RunData) -> Section:
    """Table 4, the overlap figure and all metrics."""
    pieces = []
    if run.drift:
        pieces.append(Piece("table", drift.drift_table(run)))
        overlap = figures.overlap_figure(run)
        pieces += [Piece("figure", overlap)] if overlap else []
        pieces.append(Piece("folded", drift.all_metrics_table(run)))
    missing = drift.drift_gaps(run) if run.kind in {"train", "drift"} else []
    lead = "How far the policies moved, with the same held-out expert solutions read by every checkpoint."
    return Section("drift", "Drift", lead, pieces, missing)


def examples_section(run: RunData) -> Section:
    """The same prompts answered by every policy."""
    found, missing = [], []
    for suite in run.suites:
        shown = examples(run, suite)
        found += shown
        missing += example_gaps(run, suite, shown)
    lead = "Items chosen by the hash of their id, not by outcome; each policy's first sample."
    return Section("examples", "Examples", lead, (), missing, found)


def settings_section(run: RunData) -> Section:
    """Every recorded setting and every input file."""
    tables = settings.settings_tables(run)
    inputs = settings.text_table(
        "inputs", "Input files", "Every file this page was made from.", ("File", "sha256"), sorted(run.files.items())
    )
    lead = "What the run was made with, as its manifest records it."
    return Section("settings", "Settings", lead, [Piece("folded", table) for table in [*tables, inputs]])


# ---------------------------------------------------------------------------------------------------------------------
# HTML


def shown(value: Any) -> Any:
    """What the template prints for a value: markup as it is, text with its invisible characters made visible."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def content_policy(script: str) -> str:
    """The page's Content-Security-Policy: inline styles and this one script, nothing else, nothing from a network."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def render(views: Sequence[RunView]) -> str:
    """The page as HTML text: a function of the views alone."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"slug": slug, "by_command": by_command}
    script = (TEMPLATES / "script.js").read_text(encoding="utf-8")
    files = [sorted(view.files.items()) for view in views]
    return environment.get_template("report.html").render(
        runs=views,
        title=" · ".join(view.data.name for view in views),
        policy=content_policy(script),
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        inputs=sum(len(view.files) for view in views),
        inputs_sha256=sha256_json(files),
    )
