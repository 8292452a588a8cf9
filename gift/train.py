"""The main job: recipe -> base -> initial policies -> RL -> evaluation -> drift -> report, in one run directory.

    python -m gift.train RECIPE [key=value ...]

A step is finished once, recorded in the run's manifest, and skipped from then on: the same command started again after
Ctrl-C or a kill continues from the last finished step, inside a training stage from its last saved state, and ends with
the numbers of an uninterrupted run. This is the only module of `gift` that knows the other packages.
"""

from __future__ import annotations

import argparse
import gc
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diagnostics.run import measure_run
from evals.run import engine_factory, evaluate
from evals.suites import SUITES, find
from gift import nano
from gift.cli import UserError, run_command, say
from gift.data import Encoded, Example, encode, fingerprint, read_examples, split, write_examples
from gift.engine import barrier, export_checkpoint, init_distributed, quiet_libraries, rank, world_size
from gift.grpo import GRPOTrainer
from gift.models import check_checkpoint, device, download, end_ids, first_line, is_local, load_model, load_tokenizer
from gift.objectives import needs_reference, resolve
from gift.recipe import Recipe, as_tree, load_recipe
from gift.records import JsonlLog, RunDir, remove, sha256_json, sha256_weights, utc_now
from gift.reference import Reference
from gift.sft import Stage, train
from reports.build import build_report, summary_table

METRICS_KEY = ("policy", "stage", "event", "step")
SUBSETS = ("sft", "rl", "validation")


@dataclass(frozen=True)
class Step:
    """One step of the job: its name, its work, and roughly how many tokens it passes through a model.

    `work` returns None when all was done, or what could not be.
    """

    name: str
    work: Callable[[], str | None]
    cost: float = 0.0


class Job:
    """The steps of one run."""

    def __init__(self, recipe: Recipe, run: RunDir) -> None:
        self.recipe = recipe
        self.run = run

    def steps(self) -> list[Step]:
        """All steps in order. Costs only weigh the estimate of what remains; a backward pass counts as two forward."""
        recipe, methods = self.recipe, self.recipe.methods
        embedded = recipe.base.model == "nano"
        length = recipe.data.max_length / 4
        policies = 1 + len(methods) * (1 if recipe.rl is None else 2)
        init = recipe.data.sft * recipe.init.epochs * length
        steps = [
            Step("base", self.base, nano.pretraining_cost(recipe.base.pretrain, recipe.engine) if embedded else 0),
            Step("data", self.data),
            *(Step(f"init {m}", partial(self.init, m), init * (4 if self._needs_reference(m) else 3)) for m in methods),
        ]
        if recipe.rl is not None:
            rollouts = recipe.data.rl * recipe.rl.epochs * recipe.rl.group_size
            steps += [Step(f"rl {m}", partial(self.rl, m), rollouts * length * 4) for m in methods]
        return [
            *steps,
            Step("eval", self.evaluate, policies * 4000 * length),
            Step("drift", self.drift, policies * recipe.data.validation * length * 4),
            Step("report", self.report),
        ]

    def execute(self) -> bool:
        """Runs every step that is not done yet, each announced with an estimate of what remains.

        Returns whether all of them are done; a step that is not is tried again by the next start.
        """
        steps = self.steps()
        remaining = sum(step.cost for step in steps if not self._done(step.name))
        if not all(self._done(step.name) for step in steps):
            self.run.update(status="running", finished=None)
        spent, seconds = 0.0, 0.0
        for number, step in enumerate(steps, start=1):
            title = f"[{number}/{len(steps)}] {step.name}"
            if self._done(step.name):
                self._say(f"{title}: done before")
                continue
            self._say(f"{title} ..." + (f" (about {clock(remaining * seconds / spent)} left)" if spent else ""))
            took = self._execute(step)
            remaining, spent, seconds = remaining - step.cost, spent + step.cost, seconds + took
            self._say(f"{title}: {clock(took)}")
        return all(self._done(step.name) for step in steps)

    def _execute(self, step: Step) -> float:
        started = time.perf_counter()
        self._mark(step.name, status="running", started=utc_now())
        try:
            lacking = step.work()
        except Exception as error:
            with suppress(OSError):  # a full disk is what may have stopped the step
                self._mark(step.name, status="failed", reason=first_line(error), finished=utc_now())
                self.run.update(status="failed")
            raise
        gc.collect()
        seconds = time.perf_counter() - started
        status = "done" if lacking is None else "incomplete"
        self._mark(
            step.name,
            status=status,
            reason=lacking,
            finished=utc_now(),
            seconds=round(seconds, 1),
            peak_memory=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        )
        if lacking is not None:
            self._say(f"  {step.name}: incomplete: {lacking}")
        return seconds

    # -----------------------------------------------------------------------------------------------------------------
    # Steps

    def base(self) -> None:
        """Makes or finds the base model: the root of the lineage."""
        base = self.recipe.base
        if base.model == "nano":
            checkpoint = nano.prepare_base(base.pretrain, self.recipe.engine)
        elif is_local(base.model):
            checkpoint = Path(base.model).expanduser().resolve()
        else:
            checkpoint = download(base.model, base.revision)
        check_checkpoint(checkpoint)
        end, ends = load_tokenizer(checkpoint).eos_token_id, end_ids(load_model(checkpoint, dtype="auto"))
        if end not in ends:
            raise UserError(
                f"{checkpoint}: responses are trained to end with token {end} (the tokenizer's eos_token), but"
                f" generation ends at {ends}; make eos_token_id in generation_config.json and the tokenizer agree"
            )
        self._add_node("base", "Base", None, "base", None, checkpoint)

    def data(self) -> None:
        """Writes the three disjoint subsets into the run."""
        data = self.recipe.data
        sizes = {name: getattr(data, name) for name in SUBSETS}
        if self.recipe.rl is None:
            sizes["rl"] = 0
        if data.source == "nano":
            examples = nano.training_problems(sum(sizes.values()), self.recipe.seed)
        else:
            examples = read_examples(Path(data.source), prompt=data.prompt, response=data.response, answer=data.answer)
        subsets = split(examples, sizes, self.recipe.seed)
        if rank() == 0:
            for name, subset in subsets.items():
                write_examples(self._subset_file(name), subset)
        barrier()
        self.run.update(
            data={
                name: {"name": data.source, "revision": None, "sha256": fingerprint(subset), "rows": len(subset)}
                for name, subset in subsets.items()
            }
        )

    def init(self, name: str) -> None:
        """Stage 1: one initialization from the base."""
        recipe, method = self.recipe, self.recipe.methods[name]
        base = self.run.checkpoint("base")
        model, tokenizer = load_model(base, dtype=recipe.engine.dtype), load_tokenizer(base)
        reference = None
        if self._needs_reference(name):
            reference = Reference(load_model(base, dtype=recipe.engine.dtype).to(device()))
        with self._metrics() as log:
            steps = train(
                Stage(
                    name, "init", self._encoded("sft", tokenizer), self._encoded("validation", tokenizer), recipe.seed
                ),
                model,
                tokenizer,
                resolve(method.objective, method.options),
                settings=recipe.init,
                engine_settings=recipe.engine,
                resume_dir=self._resume_dir(name, "init"),
                log=log,
                reference=reference,
                beta=method.options.get("beta"),
            )
        self._finish(name, method.label, "base", "init", name, steps, model, tokenizer)

    def rl(self, name: str) -> None:
        """Stage 2: GRPO from one initialization."""
        recipe = self.recipe
        assert recipe.rl is not None
        start = self.run.checkpoint(name)
        model, tokenizer = load_model(start, dtype=recipe.engine.dtype), load_tokenizer(start)
        policy = f"{name}-rl"
        rollouts = self.run.path / "rollouts" / policy / f"rank-{rank()}.jsonl"
        with self._metrics() as log, JsonlLog(rollouts, key=("step", "item", "sample")) as rollout_log:
            trainer = GRPOTrainer(
                policy,
                model,
                tokenizer,
                settings=recipe.rl,
                engine_settings=recipe.engine,
                seed=recipe.seed,
                resume_dir=self._resume_dir(policy, "rl"),
                log=log,
                rollout_log=rollout_log,
            )
            steps = trainer.train(self._examples("rl"), self._examples("validation"))
        label = f"{recipe.methods[name].label} + RL"
        self._finish(policy, label, name, "rl", name, steps, model, tokenizer)

    def evaluate(self) -> str | None:
        """Evaluates every checkpoint of the run on the recipe's suites, on the first rank; says what was not had."""
        settings = self.recipe.eval
        missing: dict[str, str] = {}
        if rank() == 0:
            for name in settings.suites:
                evaluation = evaluate(
                    self.run,
                    [node["id"] for node in self.run.manifest["lineage"]],
                    SUITES[name],
                    SUITES[name].protocol,
                    engine_for=engine_factory(self.run, "hf", "auto"),
                    seed=self.recipe.seed,
                    data_dir=Path(settings.data_dir) if settings.data_dir else None,
                    limit=settings.limit,
                )
                missing.update(evaluation.missing)
        barrier()
        return "; ".join(missing.values()) or None

    def drift(self) -> None:
        """Measures the drift of every pair of the lineage on the held-out expert solutions, on the first rank."""
        if rank() == 0:
            settings = self.recipe.drift
            measure_run(
                self.run,
                sequences=settings.sequences,
                batch_size=settings.batch_size,
                max_length=self.recipe.data.max_length,
            )
        barrier()

    def report(self) -> None:
        """Builds the report, on the first rank, once the manifest says how the run ended."""
        complete = all(self._done(step.name) for step in self.steps() if step.name != "report")
        self.run.update(status="complete" if complete else "failed", finished=utc_now())
        if rank() == 0:
            try:
                build_report([self.run.path], self.run.path / "report.html")
            except BaseException:
                self.run.update(status="failed")
                raise
        barrier()

    # -----------------------------------------------------------------------------------------------------------------

    def _finish(
        self,
        policy: str,
        label: str,
        parent: str,
        stage: str,
        method: str,
        steps: int,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Writes a trained policy's checkpoint, records it, and drops the state it could have been resumed from."""
        folder = Path("checkpoints") / policy / f"{stage}-{steps:06d}"
        if rank() == 0:
            export_checkpoint(model, tokenizer, self.run.path / folder)
        barrier()
        self._add_node(policy, label, parent, stage, method, folder)
        if rank() == 0:
            remove(self._resume_dir(policy, stage))

    def _add_node(
        self, policy: str, label: str, parent: str | None, stage: str, method: str | None, checkpoint: Path
    ) -> None:
        node = {"id": policy, "label": label, "parent": parent, "stage": stage, "method": method}
        digest = sha256_weights(self.run.path / checkpoint)
        for known in self.run.manifest["lineage"]:
            if known["id"] == policy and known["weights_sha256"] != digest:
                raise UserError(
                    f"{checkpoint}: not the {policy} this run began with (other weights), so what was trained from it"
                    " cannot be compared; put the old one back, or start a new run with name=ANOTHER"
                )
        self.run.add_node({**node, "checkpoint": str(checkpoint), "weights_sha256": digest})

    def _needs_reference(self, name: str) -> bool:
        return needs_reference(self.recipe.methods[name].objective)

    def _metrics(self) -> JsonlLog:
        return JsonlLog(self.run.path / "metrics.jsonl", key=METRICS_KEY)

    def _resume_dir(self, policy: str, stage: str) -> Path:
        return self.run.path / "checkpoints" / policy / f"{stage}-resume"

    def _subset_file(self, name: str) -> Path:
        return self.run.path / "data" / f"{name}.jsonl"

    def _examples(self, subset: str) -> list[Example]:
        return read_examples(self._subset_file(subset))

    def _encoded(self, subset: str, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
        encoded = [encode(tokenizer, example, self.recipe.data.max_length) for example in self._examples(subset)]
        cut = sum(example.truncated for example in encoded)
        if cut:
            self._say(f"  {subset}: {cut} of {len(encoded)} examples cut at {self.recipe.data.max_length} tokens")
        return encoded

    def _done(self, step: str) -> bool:
        if step == "base" and not any(
            (self.run.path / node["checkpoint"]).is_dir()
            for node in self.run.manifest["lineage"]
            if node["id"] == "base"
        ):
            return False  # the cache it lay in was cleared
        return bool(self.run.manifest["steps"].get(step, {}).get("status") == "done")

    def _mark(self, step: str, **entries: Any) -> None:
        steps = self.run.manifest["steps"]
        self.run.update(steps={**steps, step: {**steps.get(step, {}), **entries}})

    def _say(self, message: str) -> None:
        if rank() == 0:
            say(message)


def clock(seconds: float) -> str:
    """'1m 20s', to the second."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


@contextmanager
def opened(recipe: Recipe, runs: Path, overrides: list[str]) -> Iterator[RunDir]:
    """Yields the recipe's run directory, new or the one to continue, held for this job.

    Raises UserError, naming the keys that differ, if a run of this name was made by another recipe.
    """
    path, tree = runs / recipe.name, as_tree(recipe)
    path.mkdir(parents=True, exist_ok=True)
    run = RunDir(path, {})
    run.writable = rank() == 0
    with run.lock():
        if run.writable and not run.manifest:
            run.manifest = RunDir.create(path, kind="train", recipe=tree, overrides=overrides).manifest
            run.update(seeds={"run": recipe.seed, "base": recipe.base.pretrain.seed})
        barrier()
        run.manifest = RunDir.open(path).manifest
        if run.manifest["recipe_sha256"] != sha256_json(tree):
            keys = ", ".join(differing(run.manifest["recipe"], tree))
            raise UserError(
                f"{path}: this run was started with another recipe (differs in: {keys}); add name=ANOTHER to start"
                " a new run beside it, or remove the folder"
            )
        yield run


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
    if recipe.data.source != "nano" and not Path(recipe.data.source).is_file():
        raise UserError(f"{recipe.data.source}: no such data file (data.source)")
    if recipe.eval.data_dir is not None and not Path(recipe.eval.data_dir).is_dir():
        raise UserError(f"{recipe.eval.data_dir}: no such folder (eval.data_dir)")
    if recipe.base.model != "nano" and is_local(recipe.base.model):
        check_checkpoint(Path(recipe.base.model).expanduser())


def check_ranks(recipe: Recipe) -> None:
    """Raises UserError where batches cannot be shared evenly among the ranks."""
    ranks = world_size()
    if recipe.rl is not None and recipe.rl.batch_size % (recipe.rl.updates_per_batch * ranks):
        raise UserError(f"rl.batch_size must be a multiple of rl.updates_per_batch x {ranks} ranks")
    for key, size in (("init.batch_size", recipe.init.batch_size), ("data.validation", recipe.data.validation)):
        if size < ranks:
            raise UserError(f"{key} is {size}, fewer than the {ranks} ranks that share it")


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gift.train",
        description="Train initial policies, run RL from each, evaluate and measure them, and write a report.",
        epilog="Example: python -m gift.train nano seed=1 name=nano-seed1",
    )
    parser.add_argument("recipe", help="a recipe's name (nano) or a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipe, e.g. rl.optimizer.lr=2e-5"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs are kept (default: runs)"
    )
    arguments = parser.parse_intermixed_args(argv)

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    for suite in recipe.eval.suites:
        find(SUITES, suite, "suite")
    quiet_libraries()
    if recipe.engine.threads is not None:
        torch.set_num_threads(recipe.engine.threads)
    init_distributed()
    check_ranks(recipe)
    check_paths(recipe)
    started = time.perf_counter()
    with opened(recipe, arguments.runs, arguments.overrides) as run:
        complete = Job(recipe, run).execute()
    if rank() == 0:
        say(f"\n{summary_table(run.path)}\n")
        say(f"report: {run.path / 'report.html'} (after {clock(time.perf_counter() - started)})")
    return 0 if complete else 1


if __name__ == "__main__":
    run_command(main)
