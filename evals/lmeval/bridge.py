"""The suite's tasks as lm-eval sees them: what the files in `evals/lmeval/tasks` refer to.

Math, choice and generated problems are here. Code is not: lm-eval grades document by document in its own process, and
model code belongs in the sandbox. MT-Bench is not: its second turn depends on the answer to the first, and lm-eval asks
everything beforehand.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.lmeval import DATA_DIR
from evals.stats import pass_at_k
from evals.tasks import Item, Task, choice, math, nano, single_turn
from gift.cli import UserError

OFFERED: dict[str, Task] = {**math.TASKS, **choice.TASKS, **nano.TASKS}


def dataset(gift_task: str, **_: Any) -> dict[str, Any]:
    """A task's items as the split 'test' of a dataset: task, id, prompt and gold, in file order.

    lm-eval also passes the task's metadata. Raises UserError where they cannot be had.
    """
    import datasets

    rows = [
        {"task": gift_task, "id": item.id, "prompt": item.prompt, "gold": item.gold}
        for item in items(gift_task, data_dir()).values()
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def process_results(doc: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """pass@1 and, of n > 1 responses, pass@n, by the grader that the suite reports."""
    task = OFFERED[doc["task"]]
    item = items(task.name, data_dir())[doc["id"]]
    (responses,) = results
    reported = next(iter(task.graders))
    verdicts = dict(task.grade([single_turn(item, response) for response in responses]))
    n = len(responses)
    correct = sum(verdicts[index][reported].status == "correct" for index in range(n))
    return {f"pass@{k}": pass_at_k(n, correct, k) for k in (1, n)}


def data_dir() -> Path | None:
    """The folder of benchmark files, None for the Hub."""
    folder = os.environ.get(DATA_DIR)
    return Path(folder) if folder else None


@functools.cache
def items(task: str, folder: Path | None) -> dict[str, Item]:
    """A task's items by id. Raises UserError as Task.load does, with how lm-eval is told of a folder."""
    try:
        data = OFFERED[task].load(folder)
    except UserError as error:
        raise UserError(f"{error}; in lm-eval, {DATA_DIR} in the environment names the folder") from error
    return {item.id: item for item in data.items}
