"""The part of evals.run that evaluates policies on lm-eval's own tasks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.lmeval import DATA_DIR, PREFIX, LmEvalResult, evaluate_lm_eval
from evals.tables import print_table
from gift.cli import UserError
from gift.generation import Engine
from gift.models import load_tokenizer
from gift.recipe import Generation
from gift.records import RunDir

BATCH_SIZE = 64  # samples that the hf engine gets together, unless told otherwise
GEN_KWARGS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "max_tokens": "max_gen_toks",
    "stop": "until",
}
"""What lm-eval calls the sampling settings of evals.run."""


def evaluate_and_print(
    run: RunDir,
    policies: Sequence[str],
    names: Sequence[str],
    *,
    engine_for: Callable[[str], Engine],
    generation: Generation,
    dtype: str,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int | None = None,
    data_dir: Path | None = None,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    **sampling: Any,
) -> dict[str, str]:
    """Evaluates the policies, prints a table, and returns what could not be evaluated, with what to do.

    `data_dir` is where the suite's own tasks among them find their files. `sampling` replaces the tasks' own settings,
    by the names of GEN_KWARGS. Raises UserError for another setting, and as evaluate_lm_eval.
    """
    gen_kwargs = gen_kwargs_of(sampling)
    if data_dir is not None:
        os.environ[DATA_DIR] = str(data_dir)
    in_process = generation.engine == "hf" and generation.data_parallel == 1
    results: list[tuple[str, LmEvalResult]] = []
    missing: dict[str, str] = {}
    for policy in policies:
        found = evaluate_lm_eval(
            run,
            policy,
            names,
            load_tokenizer(run.checkpoint(policy)),
            engine_for=engine_for,
            settings={"engine": generation.engine, "dtype": dtype},
            seed=seed,
            limit=limit,
            num_fewshot=num_fewshot,
            gen_kwargs=gen_kwargs,
            apply_chat_template=apply_chat_template,
            include_path=include_path,
            batch_size=(batch_size or BATCH_SIZE) if in_process else None,
        )
        results += [(policy, result) for result in found.results]
        for name, reason in found.missing.items():
            missing[f"{PREFIX}{name}"] = reason.removeprefix(f"{PREFIX}{name}: ")
    if results:
        print(f"\nlm-eval's tasks, as lm-eval prompts and grades them; in {run.path}/raw/lm_eval")
        header = ["task", "policy", "metric", "filter", "items", "value", "standard error"]
        print_table([header, *(cells_of(policy, result) for policy, result in results)], left=4)
    return missing


def cells_of(policy: str, result: LmEvalResult) -> list[str]:
    """A result as a row of the table."""
    error = "-" if result.stderr is None else f"{result.stderr:.4f}"
    return [result.task, policy, result.metric, result.filter, str(result.items), f"{result.value:.4f}", error]


def gen_kwargs_of(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's generation kwargs for sampling settings of evals.run. Raises UserError for one that it lacks."""
    idle = [f"--{name.replace('_', '-')}" for name in sampling if name not in GEN_KWARGS]
    if idle:
        raise UserError(f"{', '.join(idle)}: not for {PREFIX} tasks, which lm-eval samples; evaluate them on their own")
    given = {GEN_KWARGS[name]: value for name, value in sampling.items()}
    if "until" in given:
        given["until"] = list(given["until"])
    if "temperature" in given:  # alone it would not overrule a task's own do_sample
        given["do_sample"] = given["temperature"] > 0
    return given
