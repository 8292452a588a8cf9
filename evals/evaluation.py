"""Sampling and grading policies of a run by plans: what is left to do is done, and recorded as it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from evals.grading import grade_samples, self_check, ungraded
from evals.manifest import check_source, check_unchanged, policies_of, recorded_settings, register, unit_size
from evals.options import HF, VERBS
from evals.results import Evaluation, summarize, write_items
from evals.sampling import Batch, Sampler, Throughput, check_stored, pending_batches
from evals.suites import Loaded, Plan
from evals.tasks import Item, Task
from gift.cli import UserError, progress, say
from gift.generation import Engine, GenerationError
from gift.generation.replay import ReplayEngine
from gift.models import load_tokenizer
from gift.recipe import Generation
from gift.records import RunDir, sha256_json
from gift.samples import sample_path


@dataclass(frozen=True)
class Making:
    """How samples are made: what builds a policy's engine, and the settings it does so by (see `evaluate`)."""

    engine_for: Callable[[str], Engine]
    generation: Generation | None
    dtype: str
    batch_size: int | None

    def recorded(self, plan: Plan) -> dict[str, Any]:
        """What the samples of a plan depend on, as a manifest holds it."""
        return recorded_settings(plan, self.generation, self.dtype, self.batch_size)


def evaluate(
    run: RunDir,
    policies: Sequence[str],
    plans: Sequence[Plan],
    *,
    engine_for: Callable[[str], Engine],
    generation: Generation | None = HF,
    dtype: str = "auto",
    batch_size: int | None = None,
    verbs: Sequence[str] = VERBS,
) -> Evaluation:
    """Samples and grades the tasks of these plans for these policies of a run, and records it there.

    `engine_for(policy)` builds an engine when something is left to sample; it is closed here. `generation` and `dtype`
    say what it builds: None is a ReplayEngine, whose completions are graded. `batch_size` is in samples, for hf
    (default: the suite's). `verbs` are those of 'generate' and 'grade' to do. A task whose data or grader cannot be had
    is reported in the result and the others run. Raises UserError where the run holds samples made under other
    settings, from other data or by other weights, and whatever the engine raises; what was sampled until then is
    recorded.
    """
    everything = [each.load() for each in plans]
    missing = {task: reason for work in everything for task, reason in work.missing.items()}
    throughput: dict[tuple[str, str], Throughput] = {}
    if "generate" in verbs:
        making = Making(engine_for, generation, dtype, batch_size)
        for policy in policies:
            for work in everything:
                check_unchanged(run, work, making.recorded(work.plan), policy)
        for policy in policies:
            spent, unfit = generate(run, policy, everything, making)
            throughput.update(spent)
            missing.update(unfit)
    if "grade" in verbs:
        for policy in policies:
            for work in everything:
                missing = {**grade(run, policy, work), **missing}
    write_items(run)
    results = [
        summarize(
            run, suite, task.name, policy, {item.id for item in work.items(task)}, throughput.get((policy, task.name))
        )
        for policy in policies
        for work in everything
        for suite in [work.plan.suite.name]
        for task in work.tasks
        if policy in policies_of(run, suite, task)
    ]
    return Evaluation(results, missing)


# ---------------------------------------------------------------------------------------------------------------------
# Generate


def generate(
    run: RunDir, policy: str, everything: Sequence[Loaded], making: Making
) -> tuple[dict[tuple[str, str], Throughput], dict[str, str]]:
    """Samples what the run lacks of a policy, with one engine for all suites.

    Returns the throughput by (policy, task), and the tasks that this policy's tokenizer cannot ask, with the reason.
    """
    tokenizer = None if making.generation is None else load_tokenizer(run.checkpoint(policy))
    spent: dict[tuple[str, str], Throughput] = {}
    unfit: dict[str, str] = {}
    pending: list[tuple[Loaded, Task, list[Batch]]] = []
    for work in everything:
        size = unit_size(work.plan.suite, making.generation, making.batch_size)
        for task in work.tasks:
            if needs_template(tokenizer, work, task):
                unfit[task.name] = (
                    f"{policy}: a conversation of several turns needs a chat template, which the tokenizer of"
                    f" {run.checkpoint(policy)} has not; save one with it"
                )
            elif batches := pending_batches(log_path(run, policy, task), work.items(task), work.plan.protocol, size):
                pending.append((work, task, batches))
    if not pending:
        return spent, unfit
    engine = making.engine_for(policy)
    try:
        if isinstance(engine, ReplayEngine):
            for work, task, _ in pending:
                check_stored(engine, task, work.items(task), work.plan.protocol)
        template = None if tokenizer is None else sha256_json(tokenizer.chat_template)
        for work, task, batches in pending:
            register(run, work, task, making.recorded(work.plan), policy, template)
            sampler = Sampler(policy, engine, tokenizer, work.plan.protocol, work.plan.seed)
            spent[policy, task.name] = sample_task(run, sampler, task, work.items(task), batches)
    except GenerationError as error:
        advice = f"what is complete is in {run.path}/samples: the same command goes on from there"
        raise GenerationError(f"{error}; {advice}") from error
    finally:
        engine.close()
    return spent, unfit


def needs_template(tokenizer: PreTrainedTokenizerBase | None, work: Loaded, task: Task) -> bool:
    """Whether a task has conversations that a tokenizer has no chat template for."""
    if tokenizer is None or tokenizer.chat_template is not None:
        return False
    return work.plan.protocol.system is not None or any(item.after is not None for item in work.items(task))


def log_path(run: RunDir, policy: str, task: Task) -> Path:
    """The log of a policy's samples on a task."""
    return sample_path(run.path, policy, task.name)


def sample_task(
    run: RunDir, sampler: Sampler, task: Task, items: Sequence[Item], batches: Sequence[Batch]
) -> Throughput:
    """Samples these batches of a task's items under a progress bar."""
    samples = sampler.protocol.samples
    left = sum(len(batch.items) for batch in batches) * samples
    total, name = len(items) * samples, f"{sampler.policy}: {task.label}"
    with progress(total, name, unit="sample", initial=total - left) as bar:
        spent = sampler.run(task, items, batches, log_path(run, sampler.policy, task), bar)
    say(f"{name}: {total} samples, {left} of them new")
    return spent


# ---------------------------------------------------------------------------------------------------------------------
# Grade


def grade(run: RunDir, policy: str, work: Loaded) -> dict[str, str]:
    """Grades what no grader of a plan's tasks has spoken of yet; for each task that cannot be graded, what to do."""
    failed = {}
    for task in work.tasks:
        if policy not in policies_of(run, work.plan.suite.name, task):
            failed[task.name] = f"nothing is sampled of it by {policy} yet"
            continue
        about = run.manifest["eval"][work.plan.suite.name]
        check_source(run, about, work, task)
        entry = about["tasks"][task.name]
        rows, before = ungraded(run.path, policy, task, work.items(task)), entry.get("graders", {})
        entry.update(graders=dict(task.graders), metric=task.metric)
        run.save()
        try:
            if is_unchecked(entry, work, task):
                entry["self_check"] = self_check(task, work.items(task))
                run.save()
            if rows:
                name = f"{policy}: grading {task.label}"
                with progress(len(rows), name, unit="sample") as bar:
                    grade_samples(run.path, policy, task, work.items(task), rows, about["protocol"].get("system"), bar)
                say(f"{name}: {len(rows)} samples")
        except UserError as error:
            failed[task.name] = f"its samples are there, but not all are graded: {error}"
            # What graded them before, stands, unless the newer grader has spoken of some.
            if rows and len(ungraded(run.path, policy, task, work.items(task))) == len(rows):
                entry["graders"] = before
                run.save()
    return failed


def is_unchecked(entry: Mapping[str, Any], work: Loaded, task: Task) -> bool:
    """Whether the grader as it is now has not been checked on as many of the task's items."""
    done = entry.get("self_check")
    reported = dict([next(iter(task.graders.items()))])
    return done is None or done["grader"] != reported or done["items"] < len(work.items(task))
