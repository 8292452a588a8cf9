"""python -m reports.build: one offline HTML file from run directories: tables, figures, examples, settings.

The file is a function of the run directories' files: the same files give the same bytes. It needs no network and no
model, and shows what is missing together with the command that makes it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from gift.cli import UserError, progress, run_command
from gift.records import write_text
from reports import markdown
from reports.overview import summary
from reports.page import RunView, render, view
from reports.rundata import load_run
from reports.tables import by_command, to_text


def build_report(runs: Sequence[Path], out: Path) -> Path:
    """Writes the report of one or several runs to `out` and returns it; several are shown one after another.

    Raises UserError where a path is not a run directory, is given twice, or holds a damaged file (named).
    """
    write_text(out, render(read_views(runs)))
    return out


def read_views(runs: Sequence[Path]) -> list[RunView]:
    """What the report shows of each run."""
    places = [run.resolve() for run in runs]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise UserError(f"{runs[index]}: this run is given twice")
    views = []
    with progress(len(runs), "reading runs", unit="run") as bar:
        for index, run in enumerate(runs):
            views.append(view(load_run(run), f"r{index + 1}-" if len(runs) > 1 else ""))
            bar.update()
    return views


def summary_table(run: Path) -> str:
    """A run's summary as plain text: policies by pass@1, pass@8 on the tasks trained for, cos and KL from the base.

    Raises UserError as build_report does.
    """
    return to_text(summary(load_run(run)))


def main(argv: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m reports.build",
        description="Makes one offline HTML report from run directories: tables with intervals and tests, figures, "
        "example completions, settings. What a run does not have yet is listed with the command that makes it.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory, e.g. runs/nano")
    parser.add_argument(
        "--out", type=Path, help="the file to write (default: RUN/report.html; needed for several runs)"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables as Markdown")
    arguments = parser.parse_args(argv)
    if arguments.out is None and len(arguments.runs) > 1:
        raise UserError("several runs: name the file to write with --out report.html")
    out: Path = arguments.out or arguments.runs[0] / "report.html"
    if out.is_dir():
        raise UserError(f"{out}: --out names a folder; give a file, e.g. {out / 'report.html'}")
    views = read_views(arguments.runs)
    write_text(out, render(views))
    if arguments.markdown is not None:
        write_text(arguments.markdown, "\n".join(map(markdown.page, views)))
    for one in views:
        print(to_text(one.summary))
        for command, gaps in by_command(one.missing).items():
            print("\n".join(f"missing: {gap.what}: {gap.why}" for gap in gaps))
            if command:
                print(f"  to make: {command}")
    print(f"wrote {out} ({out.stat().st_size / 1024:,.0f} KiB)")
    return 0


if __name__ == "__main__":
    run_command(main)
