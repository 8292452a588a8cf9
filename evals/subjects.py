"""What is evaluated: policies of a run, or a checkpoint or a file of generations in an evaluation run of its own."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gift.cli import UserError
from gift.generation import Engine
from gift.generation.build import build_engine
from gift.generation.replay import ReplayEngine
from gift.models import check_checkpoint, download, is_local
from gift.recipe import Generation
from gift.records import RunDir, sha256_file, sha256_weights, utc_now


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


@dataclass
class Outcome:
    """Whether all that was asked for was done."""

    complete: bool = False


@contextmanager
def standalone_status(run: RunDir) -> Iterator[Outcome]:
    """An evaluation run's manifest says that the body evaluates, and then how that ended; other runs' say nothing."""
    outcome = Outcome()
    if run.manifest["kind"] != "eval":
        yield outcome
        return
    run.update(status="running", finished=None)
    try:
        yield outcome
    except Exception:
        with suppress(OSError):  # a full disk is what may have stopped the evaluation
            run.update(status="failed", finished=utc_now())
        raise
    run.update(status="complete" if outcome.complete else "failed", finished=utc_now())
