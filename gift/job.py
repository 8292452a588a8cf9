"""The steps of the main job: base, data, reference, initializations, RL, evaluation, drift, report.

This is the only module of `gift` that knows the other packages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diagnostics.run import measure_run
from evals.evaluation import evaluate
from evals.periodic import Periodic
from evals.subjects import engine_factory
from evals.suites import SUITES, plan
from gift import nano
from gift.batches import Encoded, check_packing
from gift.cli import UserError
from gift.data import Example, fingerprint, read_examples, write_examples
from gift.distributed import barrier, rank
from gift.engine import FrozenEngine, TrainingEngine
from gift.generation.follower import Follower, follow
from gift.generation.probe import PROBE_SEQUENCES
from gift.grpo import GRPOTrainer, Watch
from gift.lora import add_adapters
from gift.materials import base_folder, subsets_of, tokens_of, with_template
from gift.models import device, load_model, load_tokenizer
from gift.objectives import OBJECTIVES, label_weight, needs_reference, resolve, warnings_for
from gift.recipe import Recipe, rl_warnings
from gift.records import JsonlLog, RunDir, remove, sha256_weights, utc_now
from gift.reference import CachedReference, OnlineReference
from gift.reference.cache import demands_of, key_of, scored_subsets
from gift.reference.scoring import cache_home, obtain_most
from gift.sft import Loss, Stage, Trainer
from gift.steps import Step, Steps, announce
from reports.build import build_report

METRICS_KEY = ("policy", "stage", "event", "step")


class Job:
    """The steps of one run."""

    def __init__(self, recipe: Recipe, run: RunDir) -> None:
        self.recipe = recipe
        self.run = run
        self.steps = Steps(run, self._steps())

    def _steps(self) -> list[Step]:
        """All steps in order. Costs only weigh the estimate of what remains; a backward pass counts as two forward."""
        recipe = self.recipe
        embedded = recipe.base.model == "nano"
        length = recipe.data.max_length / 4
        found = [
            Step(
                "base",
                self.base,
                nano.pretraining_cost(recipe.base.pretrain, recipe.engine) if embedded else 0,
                still_there=self._base_is_there,
            ),
            Step("data", self.data),
        ]
        if self._caches_reference():
            found.append(Step("reference", self.reference, recipe.data.sft * length))
        inits, rls, online = [], [], not self._caches_reference()
        for name in recipe.methods:
            if (init := recipe.init_of(name)) is not None:
                passes = 4 if online and self._needs_reference(name) else 3
                cost = recipe.problems_of(name, "init") * init.epochs * length * passes
                tidy = partial(remove, self._resume_dir(name, "init"))
                inits.append(Step(f"init {name}", partial(self.init, name), cost, tidy=tidy))
            if (rl := recipe.rl_of(name)) is not None:
                cost = recipe.problems_of(name, "rl") * rl.epochs * rl.group_size * length * 4
                tidy = partial(remove, self._resume_dir(f"{name}-rl", "rl"))
                rls.append(Step(f"rl {name}", partial(self.rl, name), cost, tidy=tidy))
        policies = 1 + len(inits) + len(rls)
        return [
            *found,
            *inits,
            *rls,
            Step("eval", self.evaluate, policies * 4000 * length),
            Step("drift", self.drift, policies * recipe.data.validation * length * 4),
            Step("report", self.report),
        ]

    # -----------------------------------------------------------------------------------------------------------------
    # Steps

    def base(self) -> None:
        """Makes or finds the base model: the root of the lineage."""
        checkpoint = base_folder(self.recipe)
        if self.recipe.data.template is not None:
            folder = Path("checkpoints") / "base" / "base-000000"
            if rank() == 0:
                with_template(checkpoint, self.recipe.data.template, self.run.path / folder)
            barrier()
            checkpoint = folder
        self._add_node("base", "Base", None, "base", None, checkpoint)

    def data(self) -> None:
        """Writes the three disjoint subsets into the run, on the first rank: the others read them from there."""
        if rank() == 0:
            subsets, revision = subsets_of(self.recipe)
            for name, subset in subsets.items():
                write_examples(self._subset_file(name), subset)
            source = self.recipe.data.source
            self.run.update(
                data={
                    name: {"name": source, "revision": revision, "sha256": fingerprint(subset), "rows": len(subset)}
                    for name, subset in subsets.items()
                }
            )
        barrier()

    def reference(self) -> None:
        """Scores the training data with the base, once for all methods that need it."""
        for name, cache in self._cached_references.items():
            found = "online: the budget does not suffice" if cache is None else cache.info.summary()
            announce("\n".join(f"  {line}" for line in f"{name}: {found}".splitlines()))
        self.run.update(
            reference={
                name: None if cache is None else {"cache": str(cache.folder), **asdict(cache.info)}
                for name, cache in self._cached_references.items()
            }
        )

    def init(self, name: str) -> None:
        """Stage 1: one initialization from the base."""
        recipe, method = self.recipe, self.recipe.methods[name]
        settings = recipe.init_of(name)
        assert settings is not None
        assert method.objective is not None
        objective = OBJECTIVES[method.objective]
        for warning in warnings_for(method.objective, method.options, updates_per_batch=settings.updates_per_batch):
            announce(f"  {name}: {warning}")
        model, tokenizer = self._start("base", recipe.engine.attention)
        options: dict[str, Any] = dict(method.options)
        with self._reference(name, model) as reference, self._metrics() as log:
            loss = Loss(
                resolve(method.objective, options),
                reference,
                objective.needs_old_policy,
                partial(label_weight, **options) if method.objective == "gift" else None,
            )
            trainer = Trainer(
                Stage(name, "init", self._encoded(name), self._tokens("validation"), recipe.seed),
                model,
                tokenizer,
                loss,
                settings=settings,
                engine_settings=recipe.engine,
                resume_dir=self._resume_dir(name, "init"),
                log=log,
            )
            trainer.train(lambda engine, step: self._finish(engine, tokenizer, name, name, "init", step))

    def rl(self, name: str) -> None:
        """Stage 2: RL from one initialization, or from the base where the method has none."""
        recipe = self.recipe
        settings = recipe.rl_of(name)
        assert settings is not None
        for warning in rl_warnings(settings):
            announce(f"  {name}: {warning}")
        model, tokenizer = self._start(self._start_of(name))
        policy = f"{name}-rl"
        rollouts = self.run.path / "rollouts" / policy / f"rank-{rank()}.jsonl"
        with self._metrics() as log, JsonlLog(rollouts, key=("step", "item", "sample")) as rollout_log:
            trainer = GRPOTrainer(
                policy,
                model,
                tokenizer,
                settings=settings,
                engine_settings=recipe.engine,
                seed=recipe.seed,
                resume_dir=self._resume_dir(policy, "rl"),
                log=log,
                rollout_log=rollout_log,
                follow=self._follow(name),
                watch=self._watch(policy, tokenizer),
            )
            trainer.train(
                self._problems(name, "rl"),
                self._examples("validation"),
                lambda engine, step: self._finish(engine, tokenizer, name, policy, "rl", step),
            )

    def evaluate(self) -> str | None:
        """Evaluates every checkpoint of the run on the recipe's suites, on the first rank; says what was not had."""
        settings = self.recipe.eval
        missing: dict[str, str] = {}
        if rank() == 0:
            data_dir = Path(settings.data_dir) if settings.data_dir else None
            missing = evaluate(
                self.run,
                [node["id"] for node in self.run.manifest["lineage"]],
                [
                    plan(SUITES[name], seed=self.recipe.seed, data_dir=data_dir, limit=settings.limit)
                    for name in settings.suites
                ],
                engine_for=engine_factory(self.run, self.recipe.generation, "auto"),
                generation=self.recipe.generation,
            ).missing
        barrier()
        return "; ".join(f"{task}: {reason}" for task, reason in missing.items()) or None

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
        complete = self.steps.all_done(but="report")
        self.run.update(status="complete" if complete else "failed", finished=utc_now())
        if rank() == 0:
            try:
                build_report([self.run.path], self.run.path / "report.html")
            except BaseException:
                self.run.update(status="failed")
                raise
        barrier()

    # -----------------------------------------------------------------------------------------------------------------
    # Models

    def _start_of(self, method: str) -> str:
        """The policy that a method's RL begins with."""
        return "base" if self.recipe.methods[method].objective is None else method

    def _start(self, policy: str, attention: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model a stage begins with, as the lineage knows it, and its tokenizer."""
        recipe, checkpoint = self.recipe, self.run.checkpoint(policy)
        if sha256_weights(checkpoint) != self.run.node(policy)["weights_sha256"]:
            raise UserError(
                f"{checkpoint}: its weights are not those that were recorded when it was made; restore them, or start"
                " a new run with name=ANOTHER"
            )
        model = load_model(checkpoint, dtype=recipe.engine.dtype, attention=attention)
        if recipe.engine.packing:
            check_packing(model)
        if recipe.lora is not None:
            add_adapters(model, recipe.lora, seed=recipe.seed)
        return model, load_tokenizer(checkpoint)

    def _follow(self, name: str) -> Callable[[TrainingEngine, PreTrainedTokenizerBase], Follower]:
        """What a method's RL samples from."""
        start = self.run.checkpoint(self._start_of(name))
        some = self._examples("validation")[:PROBE_SEQUENCES]
        encoded = tokens_of("validation", some, load_tokenizer(start), self.recipe.data.max_length)
        sequences = [example.ids for example in encoded]
        return partial(follow, settings=self.recipe.generation, checkpoint=start, sequences=sequences)

    def _watch(self, policy: str, tokenizer: PreTrainedTokenizerBase) -> Watch | None:
        """Evaluation of a policy while RL trains it, where the recipe asks for it."""
        settings = self.recipe.eval
        if settings.every is None:
            return None
        data_dir = Path(settings.data_dir) if settings.data_dir else None
        plans = []
        for name in settings.suites if settings.every_suites is None else settings.every_suites:
            suite = SUITES[name]
            protocol = replace(suite.protocol, runs=settings.every_runs, samples_per_run=1)
            tasks = [key for key, task in suite.tasks.items() if task.metric == "accuracy"]
            limited = plan(
                suite, protocol, tasks=tasks, seed=self.recipe.seed, data_dir=data_dir, limit=settings.every_limit
            )
            if tasks:
                plans.append(limited.load())
                for task, reason in plans[-1].missing.items():
                    announce(f"  {policy}: not evaluated on the way: {task}: {reason}")
        return Watch(settings.every, Periodic(self.run.path, policy, plans, tokenizer))

    @contextmanager
    def _reference(self, method: str, model: PreTrainedModel) -> Iterator[OnlineReference | CachedReference | None]:
        """What a method needs of the base: nothing, its scores, the policy without adapters, or a second model."""
        needed = self._needs_reference(method)
        cached = self._cached_references[method] if needed and self._caches_reference() else None
        if cached is not None or not needed:
            yield cached
        elif self.recipe.lora is not None:
            yield OnlineReference(model, adapted=True)
        else:
            engine = self.recipe.engine
            base = load_model(self.run.checkpoint("base"), dtype=engine.dtype, attention=engine.attention)
            frozen = FrozenEngine(base, engine)
            try:
                yield OnlineReference(frozen.model)
            finally:
                frozen.close()

    def _needs_reference(self, method: str) -> bool:
        objective = self.recipe.methods[method].objective
        return objective is not None and needs_reference(objective)

    def _caches_reference(self) -> bool:
        return self.recipe.reference.mode == "cached" and bool(demands_of(self.recipe))

    @functools.cached_property
    def _cached_references(self) -> dict[str, CachedReference | None]:
        """By method the cache of what stage 1 trains on, scored now if there is none; None where it must be online."""
        recipe, base = self.recipe, self.run.checkpoint("base")
        names = scored_subsets(recipe)
        encoded = [example for name in names for example in self._tokens(name)]
        examples = [example for name in names for example in self._examples(name)]
        weights_sha256 = self.run.node("base")["weights_sha256"]
        key = key_of(recipe, load_tokenizer(base), examples, encoded, weights_sha256)
        found: dict[str, CachedReference | None] = {}
        for objective, demand in demands_of(recipe).items():
            cache, served = obtain_most(
                lambda: load_model(base, dtype=recipe.engine.dtype).to(device()),
                encoded,
                demand,
                key=key,
                budget_bytes=recipe.reference.budget_gb * 1e9,
                micro_tokens=recipe.engine.micro_tokens,
                root=cache_home(),
            )
            for name, method in recipe.methods.items():
                if method.objective == objective:
                    found[name] = cache if (objective, method.options) in served.objectives else None
        return found

    def _finish(
        self,
        engine: TrainingEngine,
        tokenizer: PreTrainedTokenizerBase,
        method: str,
        policy: str,
        stage: str,
        step: int,
    ) -> None:
        """Writes a trained policy's checkpoint and enters it in the lineage."""
        folder = Path("checkpoints") / policy / f"{stage}-{step:06d}"
        engine.export(tokenizer, self.run.path / folder)
        label, direct = self.recipe.methods[method].label, self.recipe.methods[method].objective is None
        parent = method if stage == "rl" and not direct else "base"
        self._add_node(policy, label if parent == "base" else f"{label} + RL", parent, stage, method, folder)

    def _add_node(
        self, policy: str, label: str, parent: str | None, stage: str, method: str | None, checkpoint: Path
    ) -> None:
        node = {"id": policy, "label": label, "parent": parent, "stage": stage, "method": method}
        digest = sha256_weights(self.run.path / checkpoint)
        lineage = self.run.manifest["lineage"]
        changed = any(known["id"] == policy and known["weights_sha256"] != digest for known in lineage)
        if changed and any(known["parent"] == policy for known in lineage):
            raise UserError(
                f"{checkpoint}: not the {policy} this run began with (other weights), so what was trained from it"
                " cannot be compared; put the old one back, or start a new run with name=ANOTHER"
            )
        self.run.add_node({**node, "checkpoint": str(checkpoint), "weights_sha256": digest})

    def _base_is_there(self) -> bool:
        """Whether the base lies where it lay: the cache it is in may have been cleared."""
        lineage = self.run.manifest["lineage"]
        return any((self.run.path / node["checkpoint"]).is_dir() for node in lineage if node["id"] == "base")

    # -----------------------------------------------------------------------------------------------------------------
    # Data and files

    def _problems(self, method: str, stage: str) -> list[Example]:
        """What a stage of a method passes over."""
        joint = self.recipe.methods[method].data == "joint"
        names = ("sft", "rl") if joint else ("sft" if stage == "init" else "rl",)
        return [example for name in names for example in self._examples(name)]

    def _encoded(self, method: str) -> list[Encoded]:
        names = ("sft", "rl") if self.recipe.methods[method].data == "joint" else ("sft",)
        return [example for name in names for example in self._tokens(name)]

    def _tokens(self, subset: str) -> list[Encoded]:
        tokenizer = load_tokenizer(self.run.checkpoint("base"))
        return tokens_of(subset, self._examples(subset), tokenizer, self.recipe.data.max_length)

    def _examples(self, subset: str) -> list[Example]:
        return read_examples(self._subset_file(subset))

    def _subset_file(self, name: str) -> Path:
        return self.run.path / "data" / f"{name}.jsonl"

    def _metrics(self) -> JsonlLog:
        return JsonlLog(self.run.path / "metrics.jsonl", key=METRICS_KEY)

    def _resume_dir(self, policy: str, stage: str) -> Path:
        return self.run.path / "checkpoints" / policy / f"{stage}-resume"
