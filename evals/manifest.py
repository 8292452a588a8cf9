"""What a run's manifest says of its samples, and the refusal to add any that were made otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evals.suites import UNRECORDED, Loaded, Plan, Suite
from evals.tasks import Task
from gift.cli import UserError
from gift.recipe import Generation
from gift.records import RunDir
from gift.samples import sample_path

ELSEWHERE = "repeat those settings, or evaluate the checkpoint apart with --model CHECKPOINT --out DIR"


def recorded_settings(plan: Plan, generation: Generation | None, dtype: str, batch_size: int | None) -> dict[str, Any]:
    """What a policy's samples depend on, and another call must repeat to add to them.

    Where they are made (memory, devices, copies) is not among it. How stored generations were sampled is not known.
    """
    protocol = plan.protocol
    if generation is None:
        return {"runs": protocol.runs, "samples_per_run": protocol.samples_per_run, "engine": "replay"}
    settings = {**protocol.recorded(), "seed": plan.seed, "engine": generation.engine}
    if generation.engine != "server":  # which has been told already
        settings["dtype"] = dtype
    if generation.engine == "hf":
        settings["batch_size"] = batch_size or plan.suite.batch_size
    return settings


def check_unchanged(run: RunDir, work: Loaded, settings: Mapping[str, Any], policy: str) -> None:
    """Raises UserError unless the samples of this policy in the run, if any, were made as they would be made now."""
    node = run.node(policy)
    suite = work.plan.suite.name
    about = run.manifest["eval"].get(suite)
    if about is None or not has_samples(run, about):
        return
    refuse_changes(run, f"suite {suite!r}", {**UNRECORDED, **about["protocol"]}, settings)
    for task in work.tasks:
        if task.name in about["tasks"]:
            check_source(run, about, work, task)
            if made := policies_of(run, suite, task).get(policy):
                weights = {"weights_sha256": node["weights_sha256"]}
                refuse_changes(run, f"{task.name} by {policy!r}", made, weights)


def check_source(run: RunDir, about: Mapping[str, Any], work: Loaded, task: Task) -> None:
    """Raises UserError where a task's samples in the run answer other data, or another prompt."""
    entry = about["tasks"][task.name]
    was = {"data sha256": entry["source"]["sha256"], "prompt": entry.get("prompt", about["protocol"].get("prompt"))}
    now = {"data sha256": work.data[task.name].source["sha256"], "prompt": task.prompt}
    refuse_changes(run, task.name, was, now)


def refuse_changes(run: RunDir, what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError that names every entry of `now` in which `before` differs."""
    changed = [f"{key} was {before.get(key)!r}, is now {now[key]!r}" for key in now if before.get(key) != now[key]]
    if changed:
        raise UserError(f"{run.path}: its samples of {what} were made otherwise ({'; '.join(changed)}); {ELSEWHERE}")


def register(
    run: RunDir, work: Loaded, task: Task, settings: Mapping[str, Any], policy: str, template_sha256: str | None
) -> None:
    """Writes down, before the first sample, how a task is sampled by this policy."""
    suite = work.plan.suite.name
    about = run.manifest["eval"].get(suite)
    if about is None or not has_samples(run, about):
        run.manifest["eval"][suite] = about = {"protocol": dict(settings), "tasks": {}}
    entry = about["tasks"].get(task.name, {})
    policies = entry.get("policies", {})
    if made := policies.get(policy):
        refuse_changes(run, f"{task.name} by {policy!r}", made, {"chat_template_sha256": template_sha256})
    policies[policy] = {
        "weights_sha256": run.node(policy)["weights_sha256"],
        "chat_template_sha256": template_sha256,
        "items": len(work.items(task)),
    }
    about["tasks"][task.name] = {
        "graders": {},
        **entry,
        "label": task.label,
        "group": task.group,
        "metric": task.metric,
        "prompt": task.prompt,
        "items": max(made["items"] for made in policies.values()),
        "source": work.data[task.name].source,
        "policies": policies,
    }
    run.save()


def has_samples(run: RunDir, about: Mapping[str, Any]) -> bool:
    """Whether a suite was sampled at all: what failed before its first sample may be tried with other settings."""
    return any(
        sample_path(run.path, policy, task).exists()
        for task, entry in about["tasks"].items()
        for policy in entry["policies"]
    )


def policies_of(run: RunDir, suite: str, task: Task) -> Mapping[str, Any]:
    """The policies that have samples of a task, as the manifest has them."""
    policies: Mapping[str, Any] = (
        run.manifest["eval"].get(suite, {}).get("tasks", {}).get(task.name, {}).get("policies", {})
    )
    return policies


def unit_size(suite: Suite, generation: Generation | None, batch_size: int | None) -> int | None:
    """How many samples are recorded together; None: an item's, as soon as it has them all (see evals.sampling)."""
    in_process = generation is None or (generation.engine == "hf" and generation.data_parallel == 1)
    return (batch_size or suite.batch_size) if in_process else None
