"""The part of evals.run that evaluates policies on lm-eval's own tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evals.lmeval import PREFIX, LmEvalResult, evaluate_lm_eval
from evals.tables import print_table
from gift.generation import Engine
from gift.models import load_tokenizer
from gift.recipe import Generation
from gift.records import RunDir

BATCH_SIZE = 64  # samples that the hf engine gets together, unless told otherwise


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
) -> dict[str, str]:
    """Evaluates the policies, prints a table, and returns what could not be evaluated, with what to do."""
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
            batch_size=(batch_size or BATCH_SIZE) if in_process else None,
        )
        results += [(policy, result) for result in found.results]
        missing.update({f"{PREFIX}{name}": reason for name, reason in found.missing.items()})
    if results:
        print(f"\nlm-eval's tasks, as lm-eval prompts and grades them; in {run.path}/raw/lm_eval")
        header = ["task", "policy", "metric", "filter", "items", "value", "standard error"]
        print_table([header, *(cells_of(policy, result) for policy, result in results)], left=4)
    return missing


def cells_of(policy: str, result: LmEvalResult) -> list[str]:
    """A result as a row of the table."""
    error = "-" if result.stderr is None else f"{result.stderr:.4f}"
    return [result.task, policy, result.metric, result.filter, str(result.items), f"{result.value:.4f}", error]
