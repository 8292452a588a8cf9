"""Rollouts: groups of responses to the same prompt, sampled (or taken from the expert), graded, and ranked by reward.

Seed and step decide which prompts are drawn and every sample, whatever the number of ranks. Each rank samples and
grades its own prompts; what all must agree on, the ranks tell each other: which groups are live, and which failed
altogether. A group is live if its rewards differ; the others have no advantage, hence no policy gradient.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from gift.batches import Encoded
from gift.cli import UserError
from gift.data import Example, encode_prompt
from gift.distributed import share_of_rank, total_over_ranks
from gift.generation import Request, Sample, SamplingParams, completion_text, sample_seed
from gift.generation.follower import Follower
from gift.policy import group_advantages
from gift.recipe import RL
from gift.rewards import Verdict, grade_math

Source = Literal["policy", "demonstration"]


@dataclass(frozen=True)
class Rollout:
    """One graded response, and what it earned above its group's mean. Demonstrations have no log-probabilities."""

    encoded: Encoded
    sample: Sample
    verdict: Verdict
    advantage: float
    source: Source = "policy"

    @property
    def tokens(self) -> int:
        """Length of the response, the end token included."""
        return len(self.sample.token_ids)

    @property
    def truncated(self) -> bool:
        """Whether the response was cut off before its end token."""
        return self.sample.finish_reason == "length"


@dataclass
class Draw:
    """What a step has drawn. Positions number its prompts, over all ranks, in the order in which they were drawn."""

    groups: dict[int, list[Rollout]] = field(default_factory=dict)  # this rank's, by position
    live: list[bool] = field(default_factory=list)  # of each position: whether rewards differ
    failed: list[str] = field(default_factory=list)  # ids of the prompts none of whose responses earned anything
    kept: list[int] = field(default_factory=list)  # positions to learn from, ascending: a whole rollout batch
    seconds: dict[str, float] = field(default_factory=lambda: {"rollout": 0.0, "grade": 0.0})

    @property
    def rollouts(self) -> list[Rollout]:
        """All of this rank's rollouts."""
        return [rollout for group in self.groups.values() for rollout in group]

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the time that the body takes to `seconds`."""
        started = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - started


class Sampler:
    """Draws groups of rollouts; `policy` and `seed` enter every sample's own seed."""

    def __init__(
        self,
        policy: str,
        tokenizer: PreTrainedTokenizerBase,
        generator: Follower,
        settings: RL,
        seed: int,
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.generator = generator
        self.settings = settings
        self.seed = seed

    def check_room(self, problems: Sequence[Example]) -> None:
        """Raises UserError, naming the longest prompt, if that and `max_tokens` exceed the generator's window."""
        tokens, problem = max(((len(self.prompt(problem)), problem) for problem in problems), key=lambda pair: pair[0])
        limit, window = self.settings.max_tokens, self.generator.max_model_len
        if tokens + limit > window:
            raise UserError(
                f"{problem.id}: its prompt of {tokens} tokens and a response of rl.max_tokens={limit} exceed the"
                f" model's window of {window}; lower rl.max_tokens, leave the longest prompts out of the data, or,"
                " where vLLM's cache is what cuts the window, raise generation.cache_gb"
            )

    def draw(self, batch: Sequence[Example], problems: Sequence[Example], step: int) -> Draw:
        """Rollouts of a batch of problems.

        Under dynamic sampling (DAPO, arXiv 2503.14476) further batches, of other `problems`, are drawn until as many
        groups are live as a batch has, or until `dynamic_sampling` of them were drawn; groups that are not live fill
        the places left. Every rank takes part in every round.
        """
        draw = Draw()
        pool = [*batch, *self._spare(batch, problems, step)]
        for start in range(0, len(pool), len(batch)):
            self._draw(pool[start : start + len(batch)], step, draw)
            if sum(draw.live) >= len(batch):
                break
        live_first = sorted(range(len(draw.live)), key=lambda position: not draw.live[position])
        draw.kept = sorted(live_first[: len(batch)])
        return draw

    def accuracy(self, problems: Sequence[Example]) -> float:
        """The share of these problems, over all ranks, that greedy decoding solves."""
        mine = share_of_rank(problems)
        samples = self._generate([Request(self.prompt(problem), seed=0) for problem in mine], temperature=0)
        verdicts = self.grade(mine, [[sample] for sample in samples])
        (correct,) = total_over_ranks([sum(verdict.score for (verdict,) in verdicts)])
        return correct / len(problems)

    def grade(self, problems: Sequence[Example], groups: Sequence[Sequence[Sample]]) -> list[list[Verdict]]:
        """A verdict for every sample of every problem's group."""
        texts = [completion_text(self.tokenizer, sample) for group in groups for sample in group]
        answers = [problem.answer for problem, group in zip(problems, groups, strict=True) for _ in group]
        verdicts = iter(grade_math(texts, answers))
        return [list(itertools.islice(verdicts, len(group))) for group in groups]

    def prompt(self, problem: Example) -> tuple[int, ...]:
        """Token ids of a problem's prompt."""
        return tuple(encode_prompt(self.tokenizer, problem))

    def demonstration(self, problem: Example) -> Sample:
        """The expert's solution and the end token as if they had been sampled: cut at `max_tokens`, no logps.

        They fit into the model's window with their prompt: see `check_room`.
        """
        ids = [*self.tokenizer.encode(problem.response, add_special_tokens=False), self.tokenizer.eos_token_id]
        limit = self.settings.max_tokens
        return Sample(ids[:limit], "stop" if len(ids) <= limit else "length", [])

    def encode(self, problem: Example, sample: Sample) -> Encoded:
        """A problem's prompt and a response to it."""
        prompt = self.prompt(problem)
        return Encoded(problem.id, (*prompt, *sample.token_ids), len(prompt), sample.finish_reason == "length")

    # -----------------------------------------------------------------------------------------------------------------

    def _spare(self, batch: Sequence[Example], problems: Sequence[Example], step: int) -> list[Example]:
        """What dynamic sampling may draw at this step, in order: a function of seed and step, the batch left out."""
        if not self.settings.dynamic_sampling:
            return []
        taken = {problem.id for problem in batch}
        others = [problem for problem in problems if problem.id not in taken]
        random.Random(f"{self.seed}/spare/{step}").shuffle(others)
        return others[: self.settings.dynamic_sampling * len(batch)]

    def _draw(self, problems: Sequence[Example], step: int, draw: Draw) -> None:
        """One round: adds the groups of this rank's share of the problems, and what all ranks must know of theirs."""
        first = len(draw.live)
        mine = share_of_rank(problems)
        positions = share_of_rank(range(first, first + len(problems)))
        flags = [[0.0, 0.0] for _ in problems]
        for position, group in zip(positions, self._groups(mine, step, draw), strict=True):
            draw.groups[position] = group
            rewards = {rollout.verdict.score for rollout in group}
            flags[position - first] = [float(len(rewards) > 1), float(rewards == {0.0})]
        summed = total_over_ranks([flag for pair in flags for flag in pair])
        draw.live += [flag > 0 for flag in summed[::2]]
        draw.failed += [problem.id for problem, flag in zip(problems, summed[1::2], strict=True) if flag > 0]

    def _groups(self, problems: Sequence[Example], step: int, draw: Draw) -> list[list[Rollout]]:
        """A graded group per problem: `group_size` responses, under LUFFY the last of them the expert's."""
        settings = self.settings
        experts = settings.luffy.demonstrations if settings.algorithm == "luffy" else 0
        size = settings.group_size - experts
        sources: list[Source] = [*["policy"] * size, *["demonstration"] * experts]  # type: ignore[list-item]
        with draw.timed("rollout"):
            drawn = iter(self._generate(self._requests(problems, size, step), temperature=settings.temperature))
        samples = [
            [*itertools.islice(drawn, size), *(self.demonstration(problem) for _ in range(experts))]
            for problem in problems
        ]
        with draw.timed("grade"):
            verdicts = self.grade(problems, samples)
        rewards = [[verdict.score for verdict in group] for group in verdicts]
        table = torch.tensor(rewards, dtype=torch.float64).view(len(problems), settings.group_size)
        advantages = group_advantages(table, normalize_std=settings.normalize_std).tolist()
        return [
            [
                Rollout(self.encode(problem, sample), sample, verdict, advantage, source)
                for sample, verdict, advantage, source in zip(*columns, sources, strict=True)
            ]
            for problem, *columns in zip(problems, samples, verdicts, advantages, strict=True)
        ]

    def _requests(self, problems: Sequence[Example], size: int, step: int) -> list[Request]:
        """`size` requests per problem, group after group, each with its own seed."""
        return [
            Request(self.prompt(problem), sample_seed(self.seed, self.policy, "rollout", step, problem.id, number))
            for problem in problems
            for number in range(size)
        ]

    def _generate(self, requests: Sequence[Request], *, temperature: float) -> list[Sample]:
        params = SamplingParams(max_tokens=self.settings.max_tokens, temperature=temperature, logps=temperature > 0)
        return self.generator.generate(requests, params)


def rollout_rows(draw: Draw, step: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """This rank's rollouts as records like evaluation's; `kept` tells which of them were learnt from."""
    kept = set(draw.kept)
    for position, group in draw.groups.items():
        for number, rollout in enumerate(group):
            yield {
                "step": step,
                "item": rollout.encoded.id,
                "sample": number,
                "source": rollout.source,
                "completion": completion_text(tokenizer, rollout.sample),
                "tokens": rollout.tokens,
                "finish_reason": rollout.sample.finish_reason,
                "extracted": rollout.verdict.extracted,
                "status": rollout.verdict.status,
                "score": rollout.verdict.score,
                "advantage": rollout.advantage,
                "kept": position in kept,
            }


def rollout_metrics(draw: Draw) -> dict[str, float]:
    """Means over all that was drawn, on all ranks, whether kept or not; of demonstrations, the reward alone."""
    drawn = [rollout for rollout in draw.rollouts if rollout.source == "policy"]
    shown = [rollout for rollout in draw.rollouts if rollout.source == "demonstration"]
    count, reward, reward_sq, tokens, truncated, demonstrations, demonstration_reward = total_over_ranks(
        [
            float(len(drawn)),
            sum(rollout.verdict.score for rollout in drawn),
            sum(rollout.verdict.score**2 for rollout in drawn),
            float(sum(rollout.tokens for rollout in drawn)),
            float(sum(rollout.truncated for rollout in drawn)),
            float(len(shown)),
            sum(rollout.verdict.score for rollout in shown),
        ]
    )
    mean = reward / count
    row = {
        "reward_mean": mean,
        "reward_std": max(reward_sq / count - mean**2, 0.0) ** 0.5,
        "response_tokens": tokens / count,
        "truncated_share": truncated / count,
        "live_share": sum(draw.live) / len(draw.live),
    }
    if demonstrations:
        row["demonstration_reward"] = demonstration_reward / demonstrations
    return row
