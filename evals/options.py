"""The command line of evals.run: its options, and the suites, protocols and engine settings they stand for."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from evals.judge import judge_from_environment
from evals.lmeval import PREFIX
from evals.suites import PROTOCOLS, SUITES, Plan, Protocol, Suite, find, plan, read_protocol
from evals.tasks import Task
from evals.tasks.chat import ChatTask
from evals.tasks.code import CodeTask
from gift.cli import UserError, positive
from gift.generation import RepetitionGuard
from gift.recipe import Generation, build
from gift.recipe.rules import check_generation, check_numbers
from gift.records import RunDir

HF = Generation()
VERBS = ("generate", "grade")
GUARD = RepetitionGuard()
# Settings by the names of their options, which are None where the command line does not say.
COUNTS = ("runs", "samples_per_run")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "stop", "repetition_guard")
LM_EVAL = ("include_path", "num_fewshot", "apply_chat_template")
ENGINE = ("engine", "cache_gb", "max_rows", "data_parallel", "tensor_parallel", "url")


class Choice(NamedTuple):
    """A suite, the tasks of it that are named ([]: all of them), and how to sample them."""

    suite: Suite
    tasks: list[str]
    protocol: Protocol


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Exits with a message for an option that does not exist."""
    parser = argparse.ArgumentParser(
        prog="python -m evals.run",
        description="Evaluate a checkpoint, or every checkpoint of a run. The same command continues what was stopped.",
    )
    add = parser.add_argument
    verbs = "do only this: sample, grade what was sampled, or print what is recorded (default: all three)"
    add("verb", nargs="?", choices=(*VERBS, "report"), help=verbs)
    add("--list", action="store_true", help="show suites, tasks and protocols, and stop")
    add("--suite", help="what to evaluate: a suite's name, or 'all' (default: that of --task, else nano)")
    add("--model", help="a checkpoint folder, a Hub id, or a run directory (then every checkpoint of it)")
    add("--generations", type=Path, help="in place of a model: a .jsonl or .parquet file of completions to grade")
    add("--policy", action="append", default=[], help="of a run directory, evaluate only this policy (repeatable)")
    task = f"only this task of the suite, or {PREFIX}NAME for one of lm-eval's own (repeatable)"
    add("--task", action="append", default=[], help=task)
    add("--limit", type=positive, help="only the first LIMIT items of each task (default: as the run's recipe says)")
    add(
        "--data-dir",
        type=Path,
        help="folder of benchmark files, e.g. DATA_DIR/gsm8k/test.jsonl"
        " (default: as the run's recipe says, else the Hub)",
    )
    add("--out", type=Path, help="run directory for a checkpoint on its own (default: runs/eval-NAME-HASH)")
    pair = "print paired differences between two evaluated policies of --model RUN, or of runs: RUN or RUN:POLICY"
    add("--compare", nargs=2, metavar=("A", "B"), help=pair)
    add("--disagreements", action="store_true", help="list the samples on which a task's graders differ")
    add("--unsafe-code", action="store_true", help="run generated programs also where they cannot be isolated")
    add("--policy-name", help="what to call a checkpoint on its own (default: its folder's name)")
    add("--seed", type=int, help="seed of all samples (default: that of the run's samples, else of its recipe, else 0)")
    protocol = parser.add_argument_group("protocol (default: the suite's)")
    protocol.add_argument("--protocol", help=f"one of: {', '.join(PROTOCOLS)}; or a .yaml file of your own")
    protocol.add_argument("--runs", type=positive, help="runs whose mean accuracy is reported")
    protocol.add_argument("--samples-per-run", type=positive, help="samples of each item in a run")
    protocol.add_argument("--temperature", type=float, help="0 is greedy")
    protocol.add_argument("--top-p", type=float, help="share of probability mass to sample from")
    protocol.add_argument("--top-k", type=int, help="how many of the most probable tokens to sample from; 0: all")
    protocol.add_argument("--min-p", type=float, help="drop tokens less probable than that share of the most probable")
    protocol.add_argument("--max-tokens", type=positive, help="longest response in tokens")
    protocol.add_argument("--stop", action="append", help="end a response at this text (repeatable)")
    guard = f"end a response whose last tokens are {GUARD.count} copies of at most {GUARD.max_pattern} tokens"
    protocol.add_argument("--repetition-guard", action="store_const", const=GUARD, help=guard)
    engine = parser.add_argument_group("engine (default: as the run's recipe says, else hf)")
    engine.add_argument("--engine", choices=("hf", "vllm", "server"), help="transformers, vLLM, or a vLLM server")
    engine.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), help="of the weights (default: auto)")
    engine.add_argument("--batch-size", type=positive, help="hf: samples generated together (default: the suite's)")
    cache = f"memory for keys and values of a copy of the model, in 1e9 bytes (default: {HF.cache_gb:g})"
    engine.add_argument("--cache-gb", type=float, help=cache)
    engine.add_argument("--max-rows", type=positive, help=f"samples in progress at once (default: {HF.max_rows})")
    engine.add_argument("--data-parallel", type=positive, help="copies of the model, each in its process (default: 1)")
    engine.add_argument("--tensor-parallel", type=positive, help="vllm: devices that share a copy (default: 1)")
    engine.add_argument("--url", help="server: where it listens, such as http://10.0.0.2:8000")
    lm_eval = parser.add_argument_group(f"{PREFIX} tasks, as lm-eval's options of these names")
    lm_eval.add_argument("--include-path", type=Path, help="folder of lm-eval task files of your own")
    lm_eval.add_argument("--num-fewshot", type=int, help="examples in the prompt, where the task does not forbid them")
    lm_eval.add_argument("--apply-chat-template", action="store_const", const=True, help="prompts as a conversation")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together."""
    if args.model is None and args.generations is None:
        raise UserError(
            "nothing to evaluate: give --model a checkpoint folder, a Hub id or a run directory, or --generations FILE"
        )
    if args.data_dir is not None and not args.data_dir.is_dir():
        raise UserError(f"{args.data_dir}: no such folder; --data-dir holds e.g. gsm8k/test.jsonl")
    if args.suite == "all" and args.task:
        raise UserError("--task names a task of one suite; leave out --suite, or name that suite instead of 'all'")
    if not lm_eval_tasks(args) and (idle := given(args, LM_EVAL)):
        raise UserError(f"{', '.join(map(option, idle))}: for tasks of lm-eval; give --task {PREFIX}NAME")
    if args.generations is not None and lm_eval_tasks(args):
        raise UserError(f"{PREFIX} tasks need a model: lm-eval makes their prompts as it goes")
    if args.verb is not None and lm_eval_tasks(args):
        raise UserError(f"{PREFIX} tasks are sampled and graded in one go: leave out {args.verb!r}")
    if args.generations is not None:
        idle = given(args, ("model", "policy", *SAMPLING, *ENGINE, "seed", "dtype", "batch_size"))
        if idle:
            raise UserError(f"{', '.join(map(option, idle))}: for sampling a model, not for --generations of a file")


def chosen(args: argparse.Namespace) -> list[Choice]:
    """The suites to evaluate, with their tasks and protocols. Raises UserError for a name or value that makes no sense.

    A task without a suite is that of the first suite that has it. A report without either is of all suites.
    """
    tasks = [name for name in args.task if not name.startswith(PREFIX)]
    if args.suite == "all" or (args.verb == "report" and args.suite is None and not args.task):
        names: dict[str, list[str]] = {name: [] for name in SUITES}
    elif args.suite is not None or not args.task:
        suite = find(SUITES, args.suite or "nano", "suite")
        names = {suite.name: tasks} if tasks or not args.task else {}
    else:
        homes = {
            known: name
            for name, suite in reversed(SUITES.items())
            for key, task in suite.tasks.items()
            for known in (key, task.name)
        }
        names = {}
        for task in tasks:
            names.setdefault(find(homes, task, "task"), []).append(task)
    choices = []
    for name, wanted in names.items():
        suite = SUITES[name]
        protocol = protocol_of(args, suite)
        plan(suite, protocol, tasks=wanted)  # which raises for what makes no sense
        choices.append(Choice(suite, wanted, protocol))
    return choices


def lm_eval_tasks(args: argparse.Namespace) -> list[str]:
    """The names of lm-eval's own tasks that are asked for."""
    return [name.removeprefix(PREFIX) for name in args.task if name.startswith(PREFIX)]


def equipped(plan: Plan, *, unsafe_code: bool) -> Plan:
    """The plan with tasks that know how their grader is run; one judge, with one budget, for all of the command."""

    def ready(task: Task) -> Task:
        if isinstance(task, CodeTask):
            return replace(task, unsafe=unsafe_code)
        if isinstance(task, ChatTask):
            with suppress(UserError):  # without a judge the samples are made, and grading says what to set
                return replace(task, judge=judge_from_environment())
        return task

    return replace(plan, tasks=tuple(map(ready, plan.tasks)))


def protocol_of(args: argparse.Namespace, suite: Suite) -> Protocol:
    """A suite's protocol with what the command line changes. Raises UserError for a name that it does not know."""
    changes = given(args, (*COUNTS, *SAMPLING))
    if "stop" in changes:
        changes["stop"] = tuple(changes["stop"])
    if "temperature" in changes:  # of all items
        changes["temperatures"] = {}
    if args.protocol is None:
        protocol = suite.protocol
    elif args.protocol.endswith((".yaml", ".yml")):
        protocol = read_protocol(Path(args.protocol))
    else:
        protocol = find(PROTOCOLS, args.protocol, "protocol")
    return replace(protocol, **changes)


def generation_of(args: argparse.Namespace) -> Generation:
    """The engine's settings: what the command line says, and for the rest a training run's own if --model is one.

    Raises UserError naming an option that does not belong to the engine.
    """
    generation = HF
    file = Path(args.model) / "manifest.json"
    if file.is_file():
        own = RunDir.open(Path(args.model)).manifest["recipe"].get("generation", {})
        generation = build(Generation, own, str(file), "recipe.generation")
    changes = given(args, ENGINE)
    if changes.get("engine", generation.engine) != generation.engine:
        generation = HF
    generation = replace(generation, **changes)
    check_numbers(generation, "generation.{}".format)
    check_generation(generation)
    if generation.engine != "hf" and args.batch_size is not None:
        raise UserError(f"--batch-size is for hf: {generation.engine} fills its batches by itself (--max-rows)")
    if generation.data_parallel > 1 and args.batch_size is not None:
        raise UserError("--batch-size is for hf in one process: several fill their batches by themselves (--max-rows)")
    if generation.engine == "server" and args.dtype is not None:
        raise UserError("--dtype is decided where the server is started")
    return generation


def given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those of these options that the command line has."""
    return {name: value for name in names if (value := getattr(args, name)) not in (None, [])}


@contextmanager
def named_as_options() -> Iterator[None]:
    """Inside, a UserError calls a setting of the engine what it is called on the command line."""
    try:
        yield
    except UserError as error:
        settings = rf"\bgeneration\.({'|'.join(ENGINE)})\b"
        error.args = (re.sub(settings, lambda match: option(match[1]), str(error)),)
        raise


def option(name: str) -> str:
    """How a setting is called on the command line."""
    return f"--{name.replace('_', '-')}"
