"""Evaluation of a policy while RL trains it, by the engine that RL samples from: accuracy over RL steps (Figure 3).

Samples and verdicts of a step lie in `during/<policy>/step-<N>/` of the run, in the same logs as those of the final
evaluation, and its accuracies in `metrics.jsonl`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from evals.conversations import Conversations
from evals.grading import grade_samples, ungraded
from evals.results import counts_of
from evals.sampling import EMPTY, Sampler
from evals.stats import accuracy_interval
from evals.suites import Loaded, Plan
from evals.tasks import Item, Task
from gift.cli import UserError, say
from gift.distributed import gathered_from_ranks, rank, share_of_rank
from gift.generation.follower import Follower
from gift.records import JsonlLog
from gift.samples import SAMPLE_KEY, graded_samples, sample_path


@dataclass(frozen=True)
class Periodic:
    """Evaluates `policy` on these plans of one-turn tasks. All ranks call it; each samples its share of the items."""

    run: Path
    policy: str
    plans: Sequence[Loaded]
    tokenizer: PreTrainedTokenizerBase

    def __call__(self, follower: Follower, step: int) -> dict[str, Any]:
        """Per task, accuracy with the ends of its interval and the number of items; on the first rank, else {}."""
        found: dict[str, Any] = {}
        home = self.run / "during" / self.policy / f"step-{step:06d}"
        for work in self.plans:
            for task in work.tasks:
                items = work.items(task)
                mine = self.sample(work.plan, task, share_of_rank(items), follower)
                rows = [row for part in gathered_from_ranks(mine) for row in part]
                if rank() == 0:
                    try:
                        found[task.name] = self.record(home, work.plan, task, items, rows)
                    except UserError as error:  # training goes on; the samples are there to be graded
                        say(f"{self.policy}, step {step}: {task.name} could not be graded: {error}")
        return found

    def sample(self, plan: Plan, task: Task, items: Sequence[Item], follower: Follower) -> list[dict[str, Any]]:
        """The log's lines for all samples of these items."""
        sampler = Sampler(self.policy, follower, self.tokenizer, plan.protocol, plan.seed)
        conversations = Conversations(items, plan.protocol.system, ())
        slots = [slot for item in items for slot in sampler.slots(task, item, conversations)]
        # Every rank calls this, also one that has nothing to ask: handing over the weights takes all of them.
        drawn = iter(follower.generate([slot.request for slot in slots if slot.has_room], plan.protocol.sampling))
        return [sampler.record(task, slot, next(drawn) if slot.has_room else EMPTY) for slot in slots]

    def record(
        self, home: Path, plan: Plan, task: Task, items: Sequence[Item], rows: Sequence[Mapping[str, Any]]
    ) -> dict[str, float]:
        """Writes the samples down, grades them and returns what is logged."""
        with JsonlLog(sample_path(home, self.policy, task.name), SAMPLE_KEY) as log:
            log.append(rows)
        pending = ungraded(home, self.policy, task, items)
        grade_samples(home, self.policy, task, items, pending, plan.protocol.system, tqdm(disable=True))
        counts = counts_of(graded_samples(home, self.policy, task.name, task.graders), next(iter(task.graders)))
        accuracy = accuracy_interval(counts)
        return {
            "accuracy": accuracy.estimate,
            "low": accuracy.low,
            "high": accuracy.high,
            "items": len(counts),
            "samples": sum(n for n, _ in counts),
        }
