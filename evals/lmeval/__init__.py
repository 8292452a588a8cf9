"""lm-eval both ways: its tasks through the suite's engines, and the suite's tasks in lm-eval.

    python -m evals.run --task lm_eval:hellaswag --model CKPT
    lm_eval --model hf --model_args pretrained=CKPT --tasks gift_math500 --apply_chat_template \
        --include_path "$(python -m evals.lmeval)"

Both ways lm-eval builds the prompts, filters the responses and computes the metrics. On the first way every response is
logged in `raw/lm_eval/<policy>/<task>.jsonl` of the run as it comes, so that a killed run goes on where it stopped and
grading again generates nothing; lm-eval's results are in `<task>.json` beside it. On the second way the task files in
`evals/lmeval/tasks` take items and verdicts from `evals.tasks`; the benchmark files are looked for in the folder that
the environment variable GIFT_DATA_DIR names, or on the Hub.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gift.cli import UserError
from gift.generation import Engine, GenerationError
from gift.records import JsonlLog, RunDir, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIX = "lm_eval:"
"""What stands before the name of an lm-eval task where tasks are named."""
TASKS_DIR = Path(__file__).parent / "tasks"
"""The folder of the suite's tasks in lm-eval's format."""
DATA_DIR = "GIFT_DATA_DIR"
"""The environment variable that names the folder of benchmark files for them; the Hub where it is not set."""


@dataclass(frozen=True)
class LmEvalResult:
    """One metric of a task or group of lm-eval's: its value and standard error over so many documents."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    items: int


@dataclass(frozen=True)
class LmEvalEvaluation:
    """Results, and for each name that could not be evaluated, why and what to do."""

    results: list[LmEvalResult] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def evaluate_lm_eval(
    run: RunDir,
    policy: str,
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    engine_for: Callable[[str], Engine],
    settings: Mapping[str, Any],
    seed: int = 0,
    limit: int | None = None,
    num_fewshot: int | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
    apply_chat_template: bool = False,
    include_path: Path | None = None,
    batch_size: int | None = None,
) -> LmEvalEvaluation:
    """Evaluates a policy of the run on tasks, groups or tags of lm-eval, the suite's own and those of `include_path`.

    `names` are without PREFIX. `engine_for(policy)` builds an engine when something is left to ask; it is closed here.
    `settings` is what responses depend on beside weights and seed (engine, dtype), as JSON: those made under others are
    not used. `limit` takes the first documents of each task; `num_fewshot` and `gen_kwargs` replace the tasks' own
    settings as lm-eval's options of these names do. `batch_size`: see evals.lmeval.model.EngineLM. Python's and numpy's
    generators are seeded as lm-eval does.

    A task whose data cannot be had, or that lm-eval or the engine cannot run as it is, is reported in the result and
    the others run. Raises UserError for an unknown name, GenerationError where the engine breaks down; what was
    answered until then is kept.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"{PREFIX} tasks need lm-eval: pip install 'gift-suite[lm-eval]'")
    from evals.lmeval.harness import find, load, muted, reads_is_greedy, run_task, table
    from evals.lmeval.model import KEY, EngineLM

    evaluation = LmEvalEvaluation()
    made_by = {"weights_sha256": run.node(policy)["weights_sha256"], **settings}
    folder = run.path / "raw" / "lm_eval" / policy
    engine = functools.cache(lambda: engine_for(policy))
    manager, terminal = find(names, include_path), sys.stderr
    try:
        for name in names:
            log = JsonlLog(folder / f"{name}.jsonl", KEY)
            with log, muted() as warnings:
                try:
                    loaded = load(manager, name, num_fewshot, gen_kwargs)
                    lm = EngineLM(
                        engine,
                        tokenizer,
                        log,
                        settings=made_by,
                        seed=seed,
                        is_greedy=reads_is_greedy(loaded),
                        batch_size=batch_size,
                        name=f"{policy}: {PREFIX}{name}",
                        terminal=terminal,
                    )
                    found = run_task(lm, loaded, limit, apply_chat_template)
                except GenerationError:
                    raise
                except UserError as error:
                    evaluation.missing[name] = str(error)
                    continue
            asked = {
                "num_fewshot": num_fewshot,
                "gen_kwargs": gen_kwargs,
                "limit": limit,
                "seed": seed,
                "apply_chat_template": apply_chat_template,
                "settings": made_by,
            }
            write_json(folder / f"{name}.json", {"task": name, **asked, **found, "warnings": warnings})
            evaluation.results.extend(table(found))
    finally:
        if engine.cache_info().currsize:
            engine().close()
    return evaluation
