"""Evaluates checkpoints: every sample kept, mean accuracy of the runs, and pass@k from the same samples.

    python -m evals.run --suite nano --model CKPT
    python -m evals.run --suite math --data-dir DATA --model CKPT --limit 20
    python -m evals.run --suite math --model runs/mine --policy sft --policy gift

Samples go to `samples/<policy>/<task>.jsonl` of a run directory as they are made; `items.parquet` is derived from them.
Running the same command again continues where it stopped, and only prints the table where nothing is left to do.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from evals.results import Evaluation, log_path, print_results, summarize, write_items
from evals.sampling import Sampler, Throughput, pending_chunks
from evals.suites import PROTOCOLS, SUITES, Protocol, Suite, find
from evals.tasks import Task, TaskData
from gift.cli import UserError, positive, progress, run_command, say
from gift.generation import Engine, build_engine
from gift.models import check_checkpoint, download, is_local, load_tokenizer, quiet_transformers
from gift.records import RunDir, sha256_json, sha256_weights, utc_now

ELSEWHERE = "repeat those settings, or evaluate the checkpoint apart with --model CHECKPOINT --out DIR"


def evaluate(
    run: RunDir,
    policies: Sequence[str],
    suite: Suite,
    protocol: Protocol,
    *,
    engine_for: Callable[[str], Engine],
    engine_name: str = "hf",
    dtype: str = "auto",
    seed: int = 0,
    batch_size: int | None = None,
    tasks: Sequence[str] = (),
    data_dir: Path | None = None,
    limit: int | None = None,
) -> Evaluation:
    """Samples and grades the suite's tasks (all, or `tasks`) for these policies of a run, and records it there.

    `engine_for(policy)` builds an engine when something is left to sample; it is closed here. `batch_size` is in
    samples (default: the suite's), `limit` takes the first items of each task. A task whose data cannot be had is
    reported in the result and the others run. Raises UserError where the run holds samples made under other settings,
    from other data or by other weights, and whatever the engine raises.
    """
    protocol.check()
    settings = {
        **{name: value for name, value in asdict(protocol).items() if name != "name"},
        "seed": seed,
        "prompt": suite.prompt,
        "engine": engine_name,
        "dtype": dtype,
        "batch_size": batch_size or suite.batch_size,
    }
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
            task: chunks
            for task in loaded
            if (chunks := pending_chunks(log_path(run, policy, task), items[task], protocol, settings["batch_size"]))
        }
        spent: dict[Task, Throughput] = {}
        if work:
            tokenizer = load_tokenizer(run.checkpoint(policy))
            engine = engine_for(policy)
            try:
                template = sha256_json(tokenizer.chat_template)
                register(run, suite, settings, {task: loaded[task] for task in work}, policy, template, limit)
                sampler = Sampler(policy, engine, tokenizer, protocol, seed)
                for task, chunks in work.items():
                    total = len(items[task]) * protocol.samples
                    left = sum(map(len, chunks)) * protocol.samples
                    with progress(total, f"{policy}: {task.label}", unit="sample", initial=total - left) as bar:
                        spent[task] = sampler.run(task, chunks, log_path(run, policy, task), bar)
                    say(f"{policy}: {task.label}: {total} samples, {left} of them new")
            finally:
                engine.close()
        for task in loaded:
            results.append(summarize(run, policy, task, items[task], protocol, spent.get(task, Throughput())))
    write_items(run)
    return Evaluation(results, missing)


# ---------------------------------------------------------------------------------------------------------------------
# What the manifest says of the samples


def check_unchanged(
    run: RunDir, suite: Suite, settings: Mapping[str, Any], loaded: Mapping[Task, TaskData], policy: str
) -> None:
    """Raises UserError unless the samples of this policy in the run, if any, were made as they would be made now."""
    node = run.node(policy)
    entry = run.manifest["eval"].get(suite.name)
    if entry is None:
        return
    refuse_changes(run, f"suite {suite.name!r}", entry["protocol"], settings)
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
    template_sha256: str,
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
def opened(
    model: str, *, out: Path | None, policy_name: str | None, policies: Sequence[str]
) -> Iterator[tuple[RunDir, list[str]]]:
    """Yields the run to record in, held for this process, and which of its policies to evaluate.

    `model` is a run directory, or a checkpoint: that becomes a policy of an evaluation run of its own, at `out`.
    """
    path = Path(model)
    if (path / "manifest.json").is_file():
        if out is not None or policy_name is not None:
            raise UserError(f"{model} is a run directory: --out and --policy-name are for a checkpoint on its own")
        with RunDir.open(path).lock():
            run = RunDir.open(path)
            chosen = [run.node(policy)["id"] for policy in policies] or [node["id"] for node in run.manifest["lineage"]]
            if not chosen:
                raise UserError(f"{model}: this run has no checkpoints yet")
            yield run, list(dict.fromkeys(chosen))
        return
    if policies:
        raise UserError(f"{model} is not a run directory: --policy chooses among the checkpoints of one")
    checkpoint = (path if is_local(model) else download(model)).resolve()
    check_checkpoint(checkpoint)
    weights = sha256_weights(checkpoint)
    folder = path.resolve().name
    policy = policy_name or folder
    if not re.fullmatch(r"\w[\w.+-]*", policy):
        raise UserError(f"{policy!r} cannot name a policy; give --policy-name letters, digits, '.', '_', '+' and '-'")
    home = out or Path("runs") / f"eval-{folder}-{weights[:8]}"
    home.mkdir(parents=True, exist_ok=True)
    with RunDir(home, {}).lock():
        run = eval_run(home, model)
        for node in run.manifest["lineage"]:
            if node["id"] == policy and node["weights_sha256"] != weights:
                raise UserError(f"{home}: its policy {policy!r} has other weights; give another --policy-name or --out")
        run.add_node(
            {
                "id": policy,
                "label": policy,
                "parent": None,
                "stage": "base",
                "method": None,
                "checkpoint": str(checkpoint),
                "weights_sha256": weights,
            }
        )
        yield run, [policy]


def eval_run(path: Path, model: str) -> RunDir:
    """The evaluation run at `path`, made unless it is there. Raises UserError if that folder is another kind of run."""
    if not (path / "manifest.json").exists():
        return RunDir.create(path, kind="eval", recipe={"model": model})
    run = RunDir.open(path)
    if run.manifest["kind"] != "eval":
        raise UserError(f"{path}: a run of kind {run.manifest['kind']!r}; give --out a folder of its own")
    return run


def engine_factory(run: RunDir, engine: str, dtype: str) -> Callable[[str], Engine]:
    """Builds the engine of a policy from its checkpoint, after a check that these are the weights the run recorded."""

    def engine_for(policy: str) -> Engine:
        checkpoint = run.checkpoint(policy)
        check_checkpoint(checkpoint)
        if sha256_weights(checkpoint) != run.node(policy)["weights_sha256"]:
            raise UserError(f"{checkpoint}: not the weights that {run.path}/manifest.json records for {policy!r}")
        return build_engine(engine, checkpoint, dtype=dtype)

    return engine_for


def recorded(run: RunDir, suite: Suite) -> dict[str, Any]:
    """`evaluate`'s seed, data_dir and limit where the command line has none: the run's own, so that samples agree."""
    recipe = run.manifest["recipe"]
    settings = recipe.get("eval", {}) if run.manifest["kind"] == "train" else {}
    seed = recipe.get("seed", 0)
    if (entry := run.manifest["eval"].get(suite.name)) is not None:
        seed = entry["protocol"]["seed"]
    data_dir = settings.get("data_dir")
    return {"seed": seed, "data_dir": Path(data_dir) if data_dir else None, "limit": settings.get("limit")}


def print_suites() -> None:
    """What there is to evaluate and how."""
    for suite in SUITES.values():
        print(f"suite {suite.name} (protocol {suite.protocol.name}, prompt {suite.prompt!r})")
        for task in suite.tasks.values():
            print(f"  {task.name:<12} {task.label} ({task.group}): {task.origin}")
    for protocol in PROTOCOLS.values():
        print(
            f"protocol {protocol.name}: {protocol.runs} runs x {protocol.samples_per_run} samples, temperature"
            f" {protocol.temperature:g}, top-p {protocol.top_p:g}, at most {protocol.max_tokens} tokens"
        )


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Exits with a message for an option that does not exist."""
    parser = argparse.ArgumentParser(
        prog="python -m evals.run",
        description="Evaluate a checkpoint, or every checkpoint of a run. The same command continues what was stopped.",
    )
    add = parser.add_argument
    add("--list", action="store_true", help="show suites, tasks and protocols, and stop")
    add("--suite", default="nano", help="what to evaluate: a suite's name, or 'all' (default: %(default)s)")
    add("--model", help="a checkpoint folder, a Hub id, or a run directory (then every checkpoint of it)")
    add("--policy", action="append", default=[], help="of a run directory, evaluate only this policy (repeatable)")
    add("--task", action="append", default=[], help="of the suite, only this task (repeatable)")
    add("--limit", type=positive, help="only the first LIMIT items of each task (default: as the run's recipe says)")
    add(
        "--data-dir",
        type=Path,
        help="folder of benchmark files, e.g. DATA_DIR/gsm8k/test.jsonl"
        " (default: as the run's recipe says, else the Hub)",
    )
    add("--out", type=Path, help="run directory for a checkpoint on its own (default: runs/eval-NAME-HASH)")
    add("--policy-name", help="what to call a checkpoint on its own (default: its folder's name)")
    add("--seed", type=int, help="seed of all samples (default: that of the run's samples, else of its recipe, else 0)")
    protocol = parser.add_argument_group("protocol (default: the suite's)")
    protocol.add_argument("--protocol", help=f"one of: {', '.join(PROTOCOLS)}")
    protocol.add_argument("--runs", type=positive, help="runs whose mean accuracy is reported")
    protocol.add_argument("--samples-per-run", type=positive, help="samples of each item in a run")
    protocol.add_argument("--temperature", type=float, help="0 is greedy")
    protocol.add_argument("--top-p", type=float, help="share of probability mass to sample from")
    protocol.add_argument("--max-tokens", type=positive, help="longest response in tokens")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--engine", default="hf", choices=("hf",), help="generation engine (default: %(default)s)")
    engine.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the weights")
    engine.add_argument("--batch-size", type=positive, help="samples generated together (default: the suite's)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """The command. Returns 0 if every task asked for was evaluated, 1 if the data of one could not be had."""
    args = parse(argv)
    if args.list:
        print_suites()
        return 0
    if args.model is None:
        raise UserError("nothing to evaluate: give --model a checkpoint folder, a Hub id or a run directory")
    if args.data_dir is not None and not args.data_dir.is_dir():
        raise UserError(f"{args.data_dir}: no such folder; --data-dir holds e.g. gsm8k/test.jsonl")
    if args.suite == "all" and args.task:
        raise UserError("--task names a task of one suite; name that suite instead of 'all'")
    quiet_transformers()
    overrides = ("runs", "samples_per_run", "temperature", "top_p", "max_tokens")
    changes = {name: getattr(args, name) for name in overrides if getattr(args, name) is not None}
    suites = list(SUITES.values()) if args.suite == "all" else [find(SUITES, args.suite, "suite")]
    plans = []
    for suite in suites:
        suite.select(args.task)
        protocol = find(PROTOCOLS, args.protocol, "protocol") if args.protocol else suite.protocol
        protocol = replace(protocol, **changes)
        protocol.check()
        plans.append((suite, protocol))
    given = {name: getattr(args, name) for name in ("seed", "data_dir", "limit") if getattr(args, name) is not None}
    with opened(args.model, out=args.out, policy_name=args.policy_name, policies=args.policy) as (run, policies):
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
                    engine_for=engine_factory(run, args.engine, args.dtype),
                    engine_name=args.engine,
                    dtype=args.dtype,
                    batch_size=args.batch_size,
                    tasks=args.task,
                    **{**recorded(run, suite), **given},
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
        print_results(run, suite, protocol, evaluation)
    return int(missing)


if __name__ == "__main__":
    run_command(main)
