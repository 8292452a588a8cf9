"""What a run was made with, as tables: recipe, data, evaluation protocol, checkpoints, steps, software, hardware."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reports.rundata import RunData
from reports.tables import Cell, Column, Row, Table, duration


def text_table(id: str, title: str, caption: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table of texts; the first entry of each row is its label."""
    columns = [Column(str(index), label, kind="text") for index, label in enumerate(header[1:])]
    return Table(
        id=id,
        title=title,
        caption=caption,
        corner=header[0],
        columns=columns,
        rows=[
            Row(
                str(index),
                str(row[0]),
                {column.key: Cell(text=show(value)) for column, value in zip(columns, row[1:], strict=True)},
            )
            for index, row in enumerate(rows)
        ],
    )


def show(value: Any) -> str:
    """A manifest's value as text: strings as they are, everything else as JSON, '–' where there is none."""
    if value is None or value == "":
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A nested mapping as (dotted key, value), in its own order."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def settings_tables(run: RunData) -> list[Table]:
    """Every setting that the manifest records; what it does not record has no table."""
    manifest = run.manifest
    tables = [
        recipe_table(manifest),
        data_table(manifest),
        *protocol_tables(manifest),
        lineage_table(manifest),
        steps_table(run),
        software_table(manifest),
    ]
    return [table for table in tables if table.rows]


def recipe_table(manifest: Mapping[str, Any]) -> Table:
    """The resolved recipe by dotted key, the way the command line takes it; overridden keys are said to be."""
    overridden = {str(override).partition("=")[0] for override in manifest["overrides"]}
    rows = [
        (key, value, "override" if any(key == name or key.startswith(f"{name}.") for name in overridden) else "recipe")
        for key, value in flatten(manifest["recipe"])
    ]
    caption = f"Resolved recipe, {len(overridden)} overrides; sha256 {manifest.get('recipe_sha256') or 'not recorded'}."
    return text_table("recipe", "Recipe", caption, ("Key", "Value", "Set by"), rows)


def data_table(manifest: Mapping[str, Any]) -> Table:
    """The data subsets with their size, revision and hash."""
    rows = [
        (subset, about.get("name"), about.get("rows"), about.get("revision"), about.get("sha256"))
        for subset, about in manifest["data"].items()
    ]
    return text_table("data", "Data", "Disjoint subsets.", ("Subset", "Source", "Rows", "Revision", "sha256"), rows)


def protocol_tables(manifest: Mapping[str, Any]) -> Iterator[Table]:
    """Each suite's protocol, and its tasks with source and grader."""
    for suite, about in manifest["eval"].items():
        caption = f"How suite {suite} was sampled."
        yield text_table(
            f"protocol-{suite}", "Protocol", caption, ("Setting", "Value"), list(flatten(about["protocol"]))
        )
        rows = []
        for task, entry in about["tasks"].items():
            source, graders = entry.get("source") or {}, entry.get("graders") or {}
            graded = ", ".join(f"{name}: {version}" for name, version in graders.items())
            names = (entry.get("label"), entry.get("group"), entry.get("items"))
            rows.append((task, *names, source.get("name"), source.get("revision"), source.get("sha256"), graded))
        header = ("Task", "Label", "Group", "Items", "Source", "Revision", "sha256", "Grader")
        yield text_table(f"tasks-{suite}", "Tasks", f"What suite {suite} asks and who grades it.", header, rows)


def lineage_table(manifest: Mapping[str, Any]) -> Table:
    """The checkpoints and which came from which."""
    keys = ("id", "label", "parent", "stage", "method", "checkpoint", "weights_sha256")
    rows = [[entry.get(key) for key in keys] for entry in manifest["lineage"]]
    header = ("Policy", "Label", "From", "Stage", "Method", "Checkpoint", "Weights sha256")
    return text_table("lineage", "Checkpoints", "Lineage.", header, rows)


def steps_table(run: RunData) -> Table:
    """The run's steps and how long each took."""
    rows = [
        (name, step.get("status"), step.get("started"), duration(step["seconds"]) if step.get("seconds") else None)
        for name, step in run.steps.items()
    ]
    return text_table("steps", "Steps", "Each step of the run.", ("Step", "Status", "Started (UTC)", "Took"), rows)


def software_table(manifest: Mapping[str, Any]) -> Table:
    """Command, seeds, code, packages and hardware."""
    code, hardware = manifest["code"], manifest["hardware"]
    changed = None if code.get("dirty") is None else "yes" if code["dirty"] else "no"
    gigabytes = f"{hardware['memory'] / 2**30:.1f} GiB" if hardware.get("memory") else None
    rows = [
        ("command", shlex.join(map(str, manifest["command"]))),
        ("overrides", " ".join(map(str, manifest["overrides"])) or "none"),
        *((f"seed: {name}", seed) for name, seed in manifest["seeds"].items()),
        ("code commit", code.get("commit")),
        ("uncommitted changes", changed),
        *manifest["packages"].items(),
        ("processor", hardware.get("processor")),
        ("cores", hardware.get("cores")),
        ("memory", gigabytes),
        ("GPUs", ", ".join(hardware.get("gpus") or []) or "none"),
    ]
    return text_table("software", "Software and hardware", "What the run ran on.", ("What", "Value"), rows)
