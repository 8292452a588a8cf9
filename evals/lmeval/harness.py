"""lm-eval as a library: finding and loading its tasks, running them quietly, and its results as plain data."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from evals.lmeval import PREFIX, TASKS_DIR, LmEvalResult
from evals.lmeval.model import EngineLM
from gift.cli import UserError, nearest, say
from gift.models import first_line

PYTHON_SEED, SEED = 0, 1234  # lm-eval's defaults: few-shot examples are those of its own command line
BOOTSTRAP = 1000  # resamples for the standard error of a metric that has no formula for it


def find(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """An index with all these names. Raises UserError for an unknown one.

    lm-eval's own tasks, which take it half a minute to index, are only looked at for a name that is not the suite's
    nor in `include_path`.
    """
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"{include_path}: no such folder of lm-eval tasks")
    manager = index(include_path, defaults=False)
    if not set(names).issubset(manager.all_tasks):
        manager = index(include_path, defaults=True)
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(
                f"unknown task '{PREFIX}{name}'{nearest(name, manager.all_tasks)}; `lm_eval ls tasks` lists lm-eval's"
            )
    return manager


@functools.cache
def index(include_path: Path | None, *, defaults: bool) -> TaskManager:
    """The suite's tasks, those of a folder and, with `defaults`, lm-eval's own: looked up once for all policies."""
    if defaults:
        say("indexing lm-eval's tasks ...")
    folders = [str(folder) for folder in (TASKS_DIR, include_path) if folder is not None]
    return TaskManager(include_path=folders, include_defaults=defaults)


def load(manager: TaskManager, name: str, num_fewshot: int | None, gen_kwargs: Mapping[str, Any] | None) -> Any:
    """The tasks of a name and its groups, as lm-eval's evaluate wants them, with their data.

    Raises UserError that says what to do where they cannot be had or should not be run.
    """
    random.seed(PYTHON_SEED)
    np.random.seed(SEED)
    try:
        loaded = manager.load(name)
    except UserError:  # of one of the suite's tasks
        raise
    except Exception as error:  # a task file may run any code, and the Hub's clients raise a dozen unrelated kinds
        advice = "mend that, or leave this task out"
        if isinstance(error, OSError):
            advice = (
                "run it once with the Hub in reach, or point a copy of its YAML at local files (dataset_path: json)"
            )
        raise UserError(
            f"{PREFIX}{name}: cannot be loaded ({type(error).__name__}: {first_line(error)}); {advice}"
        ) from error
    for task_name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"{PREFIX}{task_name}: lm-eval would run the model's programs unconfined; take the suite's code tasks,"
                " which have a sandbox"
            )
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"{PREFIX}{task_name}: has images or sound, which the engines do not take")
        if gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=dict(gen_kwargs), update=True)
        shots = task.get_config("num_fewshot")
        if shots is None or (num_fewshot is not None and shots != 0):  # 0 in a task file is meant so
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=SEED)
    return loaded


def reads_is_greedy(loaded: Any) -> bool:
    """Whether some metric of these tasks may read if a continuation is what greedy decoding says."""

    def reads(task: Any) -> bool:
        if task.OUTPUT_TYPE in ("generate_until", "loglikelihood_rolling"):
            return False
        if task.OUTPUT_TYPE == "multiple_choice" and task.get_config("process_results") is None:
            return "exact_match" in task.aggregation()
        return True

    return any(reads(task) for task in loaded["tasks"].values())


def run_task(lm: EngineLM, loaded: Any, limit: int | None, apply_chat_template: bool) -> dict[str, Any]:
    """lm-eval's results for these tasks and its version, as JSON.

    Raises UserError where the task cannot be run; its responses are in the log by then.
    """
    os.environ["DISABLE_MULTIPROC"] = "1"  # forked bootstrapping is not safe beside an engine's threads
    try:
        found = evaluate(
            lm,
            loaded,
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
        )
    except UserError:
        raise
    except Exception as error:  # a task's metrics may run any code
        if lm.asking or os.environ.get("GIFT_TRACEBACK"):
            raise
        raise UserError(
            f"{lm.name}: stopped with {type(error).__name__}: {first_line(error)}; the responses so far are in"
            f" {lm.log.path}, GIFT_TRACEBACK=1 shows where it happened"
        ) from error
    plain: dict[str, Any] = as_json({"lm_eval": version("lm_eval"), **found})
    return plain


def table(found: Mapping[str, Any]) -> list[LmEvalResult]:
    """Every metric of lm-eval's results as JSON, tasks first, then groups. A null was not finite."""
    rows = []
    for name, metrics in {**found["results"], **found.get("groups", {})}.items():
        for key, value in metrics.items():
            metric, comma, filtered_by = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float | None):
                stderr = metrics.get(f"{metric}_stderr,{filtered_by}")
                error = stderr if isinstance(stderr, int | float) else None
                number = math.nan if value is None else value
                rows.append(LmEvalResult(name, metric, filtered_by, number, error, metrics["sample_len"]))
    return rows


def as_json(value: Any) -> Any:
    """The value with nothing but what JSON has: numbers that are not finite become null, other objects text."""
    if isinstance(value, Mapping):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [as_json(entry) for entry in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


@contextlib.contextmanager
def muted() -> Iterator[list[str]]:
    """Inside, lm-eval prints nothing; the list holds its warnings afterwards, each once."""
    warnings: dict[str, None] = {}
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.update({record.getMessage(): None})  # type: ignore[method-assign]
    logger = logging.getLogger("lm_eval")
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    silence = io.StringIO()
    found: list[str] = []
    try:
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            yield found
    finally:
        found.extend(warnings)
        logger.removeHandler(handler)
        logger.propagate = propagates
