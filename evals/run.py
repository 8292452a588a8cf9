"""Evaluates checkpoints: every sample kept, mean accuracy of the runs, and pass@k from the same samples.

    python -m evals.run --suite nano --model CKPT
    python -m evals.run --suite math --data-dir DATA --model CKPT --limit 20
    python -m evals.run --suite math --model runs/mine --policy sft --policy gift
    python -m evals.run --suite math --data-dir DATA --generations answers.jsonl

Samples go to `samples/<policy>/<task>.jsonl` of a run directory as they are made; `items.parquet` is derived from them.
Running the same command again continues where it stopped, and only prints the table where nothing is left to do.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from evals.options import HF, check, generation_of, given, named_as_options, parse, plans_of
from evals.results import Evaluation, log_path, print_results, summarize, write_items
from evals.sampling import Batch, Sampler, Throughput, check_stored, pending_batches
from evals.suites import PROTOCOLS, SUITES, UNRECORDED, Protocol, Suite
from evals.tasks import Task, TaskData
from gift.cli import UserError, progress, run_command, say
from gift.generation import Engine, GenerationError
from gift.generation.build import build_engine
from gift.generation.replay import ReplayEngine
from gift.models import check_checkpoint, download, is_local, load_tokenizer, quiet_transformers
from gift.recipe import Generation
from gift.records import RunDir, sha256_file, sha256_json, sha256_weights, utc_now

ELSEWHERE = "repeat those settings, or evaluate the checkpoint apart with --model CHECKPOINT --out DIR"


def evaluate(
    run: RunDir,
    policies: Sequence[str],
    suite: Suite,
    protocol: Protocol,
    *,
    engine_for: Callable[[str], Engine],
    generation: Generation | None = HF,
    dtype: str = "auto",
    seed: int = 0,
    batch_size: int | None = None,
    tasks: Sequence[str] = (),
    data_dir: Path | None = None,
    limit: int | None = None,
) -> Evaluation:
    """Samples and grades the suite's tasks (all, or `tasks`) for these policies of a run, and records it there.

    `engine_for(policy)` builds an engine when something is left to sample; it is closed here. `generation` and `dtype`
    say what it builds: None is a ReplayEngine, whose completions are graded. `batch_size` is in samples, for hf
    (default: the suite's), `limit` takes the first items of each task. A task whose data cannot be had is reported in
    the result and the others run. Raises UserError where the run holds samples made under other settings, from other
    data or by other weights, and whatever the engine raises; what was sampled until then is recorded.
    """
    protocol.check()
    settings = recorded_settings(suite, protocol, generation, dtype, seed, batch_size)
    together = unit_size(suite, generation, batch_size)
    loaded: dict[Task, TaskData] = {}
    missing = {}
    for task in suite.select(tasks):
        try:
            loaded[task] = task.load(data_dir)
        except UserError as error:
            missing[task.name] = str(error)
    items = {task: data.items[:limit] for task, data in loaded.items()}
    for policy in policies:
        check_unchanged(run, suite, settings, loaded, policy)

    results = []
    for policy in policies:
        work = {
            task: batches
            for task in loaded
            if (batches := pending_batches(log_path(run, policy, task), items[task], protocol, together))
        }
        spent: dict[Task, Throughput] = {}
        if work:
            tokenizer = None if generation is None else load_tokenizer(run.checkpoint(policy))
            engine = engine_for(policy)
            try:
                if isinstance(engine, ReplayEngine):
                    for task in work:
                        check_stored(engine, task, items[task], protocol)
                template = None if tokenizer is None else sha256_json(tokenizer.chat_template)
                register(run, suite, settings, {task: loaded[task] for task in work}, policy, template, limit)
                sampler = Sampler(policy, engine, tokenizer, protocol, seed)
                for task, batches in work.items():
                    spent[task] = sample_task(run, sampler, task, len(items[task]), batches)
            except GenerationError as error:
                advice = f"what is complete is in {run.path}/samples: the same command goes on from there"
                raise GenerationError(f"{error}; {advice}") from error
            finally:
                engine.close()
        for task in loaded:
            results.append(summarize(run, policy, task, items[task], protocol, spent.get(task, Throughput())))
    write_items(run)
    return Evaluation(results, missing)


def sample_task(run: RunDir, sampler: Sampler, task: Task, items: int, batches: Sequence[Batch]) -> Throughput:
    """Samples these batches, of a task of so many items, under a progress bar."""
    samples = sampler.protocol.samples
    left = sum(len(unit) for batch in batches for unit in batch) * samples
    total, name = items * samples, f"{sampler.policy}: {task.label}"
    with progress(total, name, unit="sample", initial=total - left) as bar:
        spent = sampler.run(task, batches, log_path(run, sampler.policy, task), bar)
    say(f"{name}: {total} samples, {left} of them new")
    return spent


def unit_size(suite: Suite, generation: Generation | None, batch_size: int | None) -> int | None:
    """How many samples are recorded together; None: an item's, as soon as it has them all (see evals.sampling)."""
    in_process = generation is None or (generation.engine == "hf" and generation.data_parallel == 1)
    return (batch_size or suite.batch_size) if in_process else None


# ---------------------------------------------------------------------------------------------------------------------
# What the manifest says of the samples


def recorded_settings(
    suite: Suite, protocol: Protocol, generation: Generation | None, dtype: str, seed: int, batch_size: int | None
) -> dict[str, Any]:
    """What a policy's samples depend on, and another call must repeat to add to them.

    Where they are made (memory, devices, copies) is not among it. How stored generations were sampled is not known.
    """
    if generation is None:
        names = ("runs", "samples_per_run")
        return {name: getattr(protocol, name) for name in names} | {"prompt": suite.prompt, "engine": "replay"}
    settings = {**protocol.recorded(), "seed": seed, "prompt": suite.prompt, "engine": generation.engine}
    if generation.engine != "server":  # which has been told already
        settings["dtype"] = dtype
    if generation.engine == "hf":
        settings["batch_size"] = batch_size or suite.batch_size
    return settings


def check_unchanged(
    run: RunDir, suite: Suite, settings: Mapping[str, Any], loaded: Mapping[Task, TaskData], policy: str
) -> None:
    """Raises UserError unless the samples of this policy in the run, if any, were made as they would be made now."""
    node = run.node(policy)
    entry = run.manifest["eval"].get(suite.name)
    if entry is None:
        return
    refuse_changes(run, f"suite {suite.name!r}", {**UNRECORDED, **entry["protocol"]}, settings)
    for task, data in loaded.items():
        if before := entry["tasks"].get(task.name):
            was = {"data sha256": before["source"]["sha256"], "grader": before["grader"]}
            refuse_changes(run, task.name, was, {"data sha256": data.source["sha256"], "grader": task.grader})
            if made := before["policies"].get(policy):
                weights = {"weights_sha256": node["weights_sha256"]}
                refuse_changes(run, f"{task.name} by {policy!r}", made, weights)


def refuse_changes(run: RunDir, what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError that names every entry of `now` in which `before` differs."""
    changed = [f"{key} was {before.get(key)!r}, is now {now[key]!r}" for key in now if before.get(key) != now[key]]
    if changed:
        raise UserError(f"{run.path}: its samples of {what} were made otherwise ({'; '.join(changed)}); {ELSEWHERE}")


def register(
    run: RunDir,
    suite: Suite,
    settings: Mapping[str, Any],
    loaded: Mapping[Task, TaskData],
    policy: str,
    template_sha256: str | None,
    limit: int | None,
) -> None:
    """Writes down, before the first sample, how these tasks are sampled by this policy."""
    entry = run.manifest["eval"].setdefault(suite.name, {"protocol": dict(settings), "tasks": {}})
    for task, data in loaded.items():
        policies = entry["tasks"].get(task.name, {}).get("policies", {})
        if made := policies.get(policy):
            refuse_changes(run, f"{task.name} by {policy!r}", made, {"chat_template_sha256": template_sha256})
        policies[policy] = {
            "weights_sha256": run.node(policy)["weights_sha256"],
            "chat_template_sha256": template_sha256,
            "items": len(data.items[:limit]),
        }
        entry["tasks"][task.name] = {
            "label": task.label,
            "group": task.group,
            "items": max(made["items"] for made in policies.values()),
            "source": data.source,
            "grader": task.grader,
            "policies": policies,
        }
    run.save()


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[tuple[RunDir, list[str]]]:
    """Yields the run to record in, held for this process, and which of its policies to evaluate.

    --model is a run directory, or a checkpoint: that becomes a policy of an evaluation run of its own, at --out. So
    does a file of --generations.
    """
    if args.generations is None and (Path(args.model) / "manifest.json").is_file():
        path = Path(args.model)
        if args.out is not None or args.policy_name is not None:
            raise UserError(f"{path} is a run directory: --out and --policy-name are for a checkpoint on its own")
        with RunDir.open(path).lock():
            run = RunDir.open(path)
            chosen = [run.node(policy)["id"] for policy in args.policy] or [
                node["id"] for node in run.manifest["lineage"]
            ]
            if not chosen:
                raise UserError(f"{path}: this run has no checkpoints yet")
            yield run, list(dict.fromkeys(chosen))
        return
    if args.policy:
        raise UserError(f"{args.generations or args.model} is not a run directory: --policy chooses among its policies")
    name, source, weights, recipe = subject(args)
    policy = args.policy_name or name
    if not re.fullmatch(r"\w[\w.+-]*", policy):
        raise UserError(f"{policy!r} cannot name a policy; give --policy-name letters, digits, '.', '_', '+' and '-'")
    home = args.out or Path("runs") / f"eval-{name}-{weights[:8]}"
    home.mkdir(parents=True, exist_ok=True)
    with RunDir(home, {}).lock():
        run = eval_run(home, recipe)
        for node in run.manifest["lineage"]:
            sampled = (home / "samples" / policy).is_dir()
            if sampled and node["id"] == policy and node["weights_sha256"] != weights:
                raise UserError(f"{home}: its policy {policy!r} has other weights; give another --policy-name or --out")
        run.add_node(
            {
                "id": policy,
                "label": policy,
                "parent": None,
                "stage": "base",
                "method": None,
                "checkpoint": str(source),
                "weights_sha256": weights,
            }
        )
        yield run, [policy]


def subject(args: argparse.Namespace) -> tuple[str, Path, str, dict[str, str]]:
    """Name, place and hash of what is evaluated on its own, and the recipe of such a run.

    Raises UserError where there is no such checkpoint or file of generations.
    """
    if args.generations is not None:
        if not args.generations.is_file():
            raise UserError(f"{args.generations}: no such file of generations")
        source = args.generations.resolve()
        return source.stem, source, sha256_file(source), {"generations": str(args.generations)}
    source = (Path(args.model) if is_local(args.model) else download(args.model)).resolve()
    check_checkpoint(source)
    return Path(args.model).resolve().name, source, sha256_weights(source), {"model": args.model}


def eval_run(path: Path, recipe: Mapping[str, str]) -> RunDir:
    """The evaluation run at `path`, made unless it is there. Raises UserError if that folder is another kind of run."""
    if not (path / "manifest.json").exists():
        return RunDir.create(path, kind="eval", recipe=recipe)
    run = RunDir.open(path)
    if run.manifest["kind"] != "eval":
        raise UserError(f"{path}: a run of kind {run.manifest['kind']!r}; give --out a folder of its own")
    return run


def engine_factory(run: RunDir, generation: Generation | None, dtype: str) -> Callable[[str], Engine]:
    """Builds the engine of a policy from its checkpoint, after a check that these are the weights the run recorded.

    Where `generation` is None, the checkpoint is a file of generations.
    """

    def engine_for(policy: str) -> Engine:
        source, expected = run.checkpoint(policy), run.node(policy)["weights_sha256"]
        if generation is None:
            engine = ReplayEngine(source)
            if sha256_file(source) != expected:
                raise UserError(f"{source}: not the file that {run.path}/manifest.json records for {policy!r}")
            return engine
        check_checkpoint(source)
        if sha256_weights(source) != expected:
            raise UserError(f"{source}: not the weights that {run.path}/manifest.json records for {policy!r}")
        return build_engine(generation, source, dtype=dtype)

    return engine_for


def recorded(run: RunDir, suite: Suite) -> dict[str, Any]:
    """`evaluate`'s seed, data_dir and limit where the command line has none: the run's own, so that samples agree."""
    recipe = run.manifest["recipe"]
    settings = recipe.get("eval", {}) if run.manifest["kind"] == "train" else {}
    seed = recipe.get("seed", 0)
    if (entry := run.manifest["eval"].get(suite.name)) is not None:
        seed = entry["protocol"].get("seed", seed)
    data_dir = settings.get("data_dir")
    return {"seed": seed, "data_dir": Path(data_dir) if data_dir else None, "limit": settings.get("limit")}


def print_suites() -> None:
    """What there is to evaluate and how."""
    for suite in SUITES.values():
        print(f"suite {suite.name} (protocol {suite.protocol.name}, prompt {suite.prompt!r})")
        for task in suite.tasks.values():
            print(f"  {task.name:<12} {task.label} ({task.group}): {task.origin}")
    for protocol in PROTOCOLS.values():
        counts = f"{protocol.runs} runs x {protocol.samples_per_run} samples"
        print(f"protocol {protocol.name}: {counts}, {protocol.described()}")


@named_as_options()
def main(argv: list[str]) -> int:
    """The command. Returns 0 if every task asked for was evaluated, 1 if the data of one could not be had."""
    args = parse(argv)
    if args.list:
        print_suites()
        return 0
    check(args)
    quiet_transformers()
    plans = plans_of(args)
    generation, dtype = None if args.generations else generation_of(args), args.dtype or "auto"
    with opened(args) as (run, policies):
        standalone = run.manifest["kind"] == "eval"
        if standalone:
            run.update(status="running", finished=None)
        try:
            evaluations = [
                evaluate(
                    run,
                    policies,
                    suite,
                    protocol,
                    engine_for=engine_factory(run, generation, dtype),
                    generation=generation,
                    dtype=dtype,
                    batch_size=args.batch_size,
                    tasks=args.task,
                    **{**recorded(run, suite), **given(args, ("seed", "data_dir", "limit"))},
                )
                for suite, protocol in plans
            ]
        except Exception:
            if standalone:
                with suppress(OSError):  # a full disk is what may have stopped the evaluation
                    run.update(status="failed", finished=utc_now())
            raise
        missing = any(evaluation.missing for evaluation in evaluations)
        if standalone:
            run.update(status="failed" if missing else "complete", finished=utc_now())
    for (suite, protocol), evaluation in zip(plans, evaluations, strict=True):
        origin = f"from {args.generations}" if args.generations else protocol.described()
        print_results(run, suite, protocol, origin, evaluation)
    return int(missing)


if __name__ == "__main__":
    run_command(main)
