"""Evaluates checkpoints: every sample and every verdict kept, mean accuracy of the runs, pass@k from the same samples.

    python -m evals.run --suite nano --model CKPT
    python -m evals.run --suite all --data-dir DATA --model CKPT --limit 20
    python -m evals.run --suite math --model runs/mine --policy sft --policy gift
    python -m evals.run --suite math --data-dir DATA --generations answers.jsonl
    python -m evals.run grade --suite math --data-dir DATA --model CKPT
    python -m evals.run --compare sft gift --model runs/mine

Three verbs, of which a call without one does all: `generate` appends samples to the run directory, `grade` what graders
say of those that have no verdict yet, `report` prints what is there. Each can be stopped at any time: the same command
goes on from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from evals.compare import compare_command
from evals.evaluation import evaluate
from evals.lmeval import PREFIX
from evals.lmeval.command import evaluate_and_print
from evals.manifest import policies_of
from evals.options import (
    LM_EVAL,
    SAMPLING,
    VERBS,
    Choice,
    check,
    chosen,
    equipped,
    generation_of,
    given,
    lm_eval_tasks,
    named_as_options,
    parse,
)
from evals.results import Evaluation, TaskResult, print_disagreements, print_results, summarize
from evals.subjects import engine_factory, opened, standalone_status
from evals.suites import PROTOCOLS, SUITES, Plan, plan
from gift.cli import UserError, run_command
from gift.models import quiet_transformers
from gift.records import RunDir


def plans_of(args: argparse.Namespace, run: RunDir, choices: Sequence[Choice]) -> list[Plan]:
    """The plans for what was chosen. What the command line does not say is as the run has it, so that samples agree."""
    recipe = run.manifest["recipe"]
    settings = recipe.get("eval", {}) if run.manifest["kind"] == "train" else {}
    data_dir = Path(settings["data_dir"]) if settings.get("data_dir") else None
    plans = []
    for suite, tasks, protocol in choices:
        about = run.manifest["eval"].get(suite.name)
        seed = recipe.get("seed", 0) if about is None else about["protocol"].get("seed", recipe.get("seed", 0))
        defaults = {"seed": seed, "data_dir": data_dir, "limit": settings.get("limit")}
        own = {**defaults, **given(args, ("seed", "data_dir", "limit"))}
        plans.append(plan(suite, protocol, tasks=tasks, **own))
    return plans


def report(run: RunDir, policies: Sequence[str], plans: Sequence[Plan]) -> list[TaskResult]:
    """The results of everything that the run holds of these plans' tasks, from its records alone."""
    return [
        summarize(run, each.suite.name, task.name, policy)
        for each in plans
        for task in each.tasks
        for policy in policies
        if policy in policies_of(run, each.suite.name, task)
    ]


def print_suites() -> None:
    """What there is to evaluate and how."""
    for suite in SUITES.values():
        print(f"suite {suite.name} (protocol {suite.protocol.name})")
        for task in suite.tasks.values():
            print(f"  {task.name:<16} {task.label} ({task.group}): {task.origin}")
    print(f"task {PREFIX}NAME: any task of lm-eval, under its own protocol")
    for protocol in PROTOCOLS.values():
        counts = f"{protocol.runs} runs x {protocol.samples_per_run} samples"
        print(f"protocol {protocol.name}: {counts}, {protocol.described()}")


@named_as_options()
def main(argv: list[str]) -> int:
    """The command. Returns 0 if everything asked for was done, 1 if the data or the grader of a task was not there."""
    args = parse(argv)
    if args.list:
        print_suites()
        return 0
    if args.compare is not None:
        a, b = args.compare
        return compare_command(a, b, None if args.model is None else Path(args.model))
    check(args)
    quiet_transformers()
    choices, others = chosen(args), lm_eval_tasks(args)
    generation, dtype = None if args.generations else generation_of(args), args.dtype or "auto"
    with opened(args) as (run, policies):
        plans = [equipped(each, unsafe_code=args.unsafe_code) for each in plans_of(args, run, choices)]
        if args.verb == "report":
            evaluation = Evaluation(report(run, policies, plans), {})
            if not evaluation.results:
                raise UserError(f"{run.path}: nothing is recorded there of what is asked for; generate it first")
            show(run, plans, evaluation, disagreements=args.disagreements)
            return 0
        engine_for = engine_factory(run, generation, dtype)
        with standalone_status(run) as outcome:
            evaluation = evaluate(
                run,
                policies,
                plans,
                engine_for=engine_for,
                generation=generation,
                dtype=dtype,
                batch_size=args.batch_size,
                verbs=[args.verb] if args.verb else VERBS,
            )
            show(run, plans, evaluation, disagreements=args.disagreements)
            missing = evaluation.missing
            if others and generation is not None:
                own = given(args, ("seed", "limit", "batch_size", "data_dir", *LM_EVAL, *SAMPLING))
                lm_eval = {"engine_for": engine_for, "generation": generation, "dtype": dtype, **own}
                missing |= evaluate_and_print(run, policies, others, **lm_eval)
            outcome.complete = not missing
    for task, reason in missing.items():
        print(f"not evaluated: {task}: {reason}")
    return int(bool(missing))


def show(run: RunDir, plans: Sequence[Plan], evaluation: Evaluation, *, disagreements: bool) -> None:
    """The summary of an evaluation."""
    for each in plans:
        name = each.suite.name
        order = [task.name for task in each.tasks]
        results = [result for result in evaluation.results if result.suite == name]
        results.sort(key=lambda result: order.index(result.task))
        if results:
            print_results(run, name, results)
        if disagreements:
            print_disagreements(run, name, results)
    if evaluation.results:
        print(f"in {run.path}: samples/ and verdicts/ (<policy>/<task>.jsonl), items.parquet, manifest.json")


if __name__ == "__main__":
    run_command(main)
