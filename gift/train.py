"""The main job: recipe -> base -> initial policies -> RL -> evaluation -> drift -> report, in one run directory.

    python -m gift.train RECIPE [key=value ...]

A step is finished once, recorded in the run's manifest, and skipped from then on: the same command started again after
Ctrl-C or a kill continues from the last finished step, inside a training stage from its last saved state, and ends with
the numbers of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from evals.suites import SUITES, find
from gift.cli import UserError, positive, run_command, say
from gift.distributed import barrier, init_distributed, quiet_libraries, rank, world_size
from gift.generation.build import check_installed
from gift.job import Job
from gift.models import check_checkpoint, is_local
from gift.plan import plan
from gift.provenance import code_version, hardware, package_versions
from gift.recipe import Generation, Recipe, as_tree, load_recipe, recipes, shadowed
from gift.records import RunDir, sha256_json, utc_now
from gift.steps import clock
from reports.build import summary_table

# What may change from one start of a run to the next: it decides how numbers are computed, but for rounding not which.
ADJUSTABLE = {
    *(f"engine.{name}" for name in ("micro_tokens", "packing", "gradient_checkpointing", "attention", "offload")),
    *("engine.keep_states", "engine.threads", "init.save_every", "rl.save_every", "reference.budget_gb"),
    *(f"generation.{entry.name}" for entry in dataclasses.fields(Generation) if entry.name != "engine"),
}
REMEASURED = {"eval.": ("eval", "report"), "drift.": ("drift", "report")}  # settings, and the steps done again for them


@contextmanager
def opened(recipe: Recipe, runs: Path, overrides: list[str]) -> Iterator[RunDir]:
    """Yields the recipe's run directory, new or the one to continue, held for this job.

    Raises UserError, naming the keys that differ, if a run of this name was made by another recipe, but for the
    settings in ADJUSTABLE and REMEASURED.
    """
    path, tree = runs / recipe.name, as_tree(recipe)
    path.mkdir(parents=True, exist_ok=True)
    run = RunDir(path, {})
    run.writable = rank() == 0
    with run.lock():
        if run.writable and not run.manifest:
            run.manifest = RunDir.create(path, kind="train", recipe=tree, overrides=overrides).manifest
            run.update(seeds={"run": recipe.seed, "base": recipe.base.pretrain.seed}, sessions=[])
        elif run.writable:
            adjust(run, tree)
        barrier()
        run.manifest = RunDir.open(path).manifest
        if run.manifest["recipe_sha256"] != sha256_json(tree):
            keys = ", ".join(differing(run.manifest["recipe"], tree))
            raise UserError(
                f"{path}: this run was started with another recipe (differs in: {keys}); add name=ANOTHER to start"
                " a new run beside it, or remove the folder"
            )
        session = {"started": utc_now(), "ranks": world_size(), "code": code_version()}
        session |= {"packages": package_versions(), "hardware": hardware()}
        run.update(sessions=[*run.manifest.get("sessions", []), session])
        yield run


def adjust(run: RunDir, tree: dict[str, Any]) -> None:
    """Takes over settings that may change from one start to the next; leaves the run as it is if others differ too."""
    keys = differing(run.manifest["recipe"], tree)
    remeasured = {key: steps for key in keys for prefix, steps in REMEASURED.items() if key.startswith(prefix)}
    if not keys or any(key not in ADJUSTABLE and key not in remeasured for key in keys):
        return
    say(f"{run.path}: goes on with another {', '.join(keys)}; what was done with the old is kept")
    redone = {step for steps in remeasured.values() for step in steps}
    steps = {name: step for name, step in run.manifest["steps"].items() if name not in redone}
    run.update(recipe=tree, recipe_sha256=sha256_json(tree), steps=steps)


def differing(old: Any, new: Any, key: str = "") -> list[str]:
    """The dotted keys at which two trees of JSON values differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [*old, *(name for name in new if name not in old)]
        return [
            found
            for name in names
            for found in differing(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
        ]
    return [] if old == new else [key]


def check_paths(recipe: Recipe) -> None:
    """Raises UserError for a file or folder of the recipe that is not there, before any work is done."""
    source = Path(recipe.data.source).expanduser()
    if recipe.data.source != "nano" and is_local(recipe.data.source) and not source.exists():
        raise UserError(f"{source}: no such data file or folder (data.source)")
    if recipe.eval.data_dir is not None and not Path(recipe.eval.data_dir).is_dir():
        raise UserError(f"{recipe.eval.data_dir}: no such folder (eval.data_dir)")
    if recipe.base.model != "nano" and is_local(recipe.base.model):
        check_checkpoint(Path(recipe.base.model).expanduser())


def check_engines(recipe: Recipe, ranks: int) -> None:
    """Raises UserError where rollouts or evaluation could not be sampled here: now, and not after stage 1."""
    check_installed(recipe.generation)
    is_server, folder = recipe.generation.engine == "server", recipe.generation.shared_folder
    if is_server and (folder is None or not Path(folder).is_dir()):
        raise UserError(
            f"generation.shared_folder is {folder}: give a folder that this job and the server both see; every policy's"
            " weights are handed over there"
        )
    learns = any(recipe.rl_of(name) is not None for name in recipe.methods)
    if learns and ranks % recipe.generation.tensor_parallel:
        raise UserError(
            f"generation.tensor_parallel is {recipe.generation.tensor_parallel}: {ranks} ranks cannot be divided into"
            " groups of that size"
        )


def warn_of_missing_tasks(recipe: Recipe) -> None:
    """Says now, and not after training, which benchmarks cannot be had."""
    settings = recipe.eval
    for suite in settings.suites:
        for task in SUITES[suite].select(()):
            try:
                task.load(Path(settings.data_dir) if settings.data_dir else None)
            except UserError as error:
                say(f"warning: {task.name} cannot be evaluated as it is: {error}")


def check_ranks(recipe: Recipe, ranks: int) -> None:
    """Raises UserError where batches cannot be shared evenly among the ranks."""
    if recipe.data.validation < ranks:
        raise UserError(f"data.validation is {recipe.data.validation}, fewer than the {ranks} ranks that share it")
    for name in recipe.methods:
        init, rl = recipe.init_of(name), recipe.rl_of(name)
        if init is not None and init.batch_size // init.updates_per_batch < ranks:
            raise UserError(f"init.batch_size / init.updates_per_batch of {name} is fewer than the {ranks} ranks")
        if rl is not None and rl.batch_size % (rl.updates_per_batch * ranks):
            raise UserError(f"rl.batch_size of {name} must be a multiple of rl.updates_per_batch x {ranks} ranks")


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gift.train",
        description="Train initial policies, run RL from each, evaluate and measure them, and write a report.",
        epilog="recipes:\n"
        + "\n".join(f"  {name:<18}{about}" for name, about in recipes().items())
        + "\n\nexample: python -m gift.train nano seed=1 name=nano-seed1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a recipe's name or a YAML file, or several joined by + (qwen2.5-7b+gift)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipe, e.g. rl.optimizer.lr=2e-5"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs are kept (default: runs)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe, its steps and the memory needed; do nothing"
    )
    parser.add_argument(
        "--ranks", type=positive, default=1, metavar="N", help="of a dry run: how many processes would share the work"
    )
    parser.add_argument(
        "--device", choices=["cpu", "gpu"], help="of a dry run: predict memory for it (default: by the recipe's dtype)"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # what DeepSpeed's launcher adds
    arguments = parser.parse_intermixed_args(argv)

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    for suite in (*recipe.eval.suites, *(recipe.eval.every_suites or ())):
        find(SUITES, suite, "suite")
    quiet_libraries()
    check_paths(recipe)
    if arguments.dry_run:
        check_ranks(recipe, arguments.ranks)
        on_gpu = {"cpu": False, "gpu": True}.get(arguments.device)
        say(str(plan(recipe, arguments.ranks, on_gpu, overrides=arguments.overrides)))
        return 0
    if recipe.engine.threads is not None:
        torch.set_num_threads(recipe.engine.threads)
    init_distributed()
    check_engines(recipe, world_size())
    check_ranks(recipe, world_size())
    started = time.perf_counter()
    with opened(recipe, arguments.runs, arguments.overrides) as run:
        if rank() == 0:
            for warning in shadowed(recipe, arguments.overrides):
                say(f"warning: {warning}")
        if rank() == 0 and run.manifest["steps"].get("eval", {}).get("status") != "done":
            warn_of_missing_tasks(recipe)
        complete = Job(recipe, run).steps.execute()
    if rank() == 0:
        say(f"\n{summary_table(run.path)}\n")
        say(f"report: {run.path / 'report.html'} (after {clock(time.perf_counter() - started)})")
    return 0 if complete else 1


if __name__ == "__main__":
    run_command(main)
