"""Tokens per second of the generation engines on the same requests, side by side in one run.

    python -m benchmarks.generation --help        (from the root of the repository)

    generate   transformers' `generate` on one batch of all requests, each prompt once with `num_return_sequences`, its
               default cache: what was fastest of its settings
    hf         gift.generation.hf, as recipes and evaluation use it
    vllm       gift.generation.vllm, if vLLM is installed

All are float32 and sample at the workload's temperature. Tokens are those of the responses, their end tokens included;
what `generate` computes for rows that have ended counts as nothing. "full length" ignores end tokens, so that every
engine makes the same number of tokens; otherwise that differs by the luck of sampling. Seconds are medians over
repetitions in which the engines take turns, the order reversed every other time, after one round of warming up.
Start-up is the time from a checkpoint folder to the end of the first tokens, imports of engines included.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from gift import nano
from gift.cli import positive, progress
from gift.data import Example, encode_prompt
from gift.generation import Engine, Request, SamplingParams, sample_seed
from gift.generation.build import build_engine
from gift.models import end_ids, load_model, load_tokenizer, quiet_transformers
from gift.provenance import hardware
from gift.recipe import Generation, load_recipe

RANDOM_MODEL = Qwen2Config(  # 100M parameters
    vocab_size=32_000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    bos_token_id=None,
)

Count = Callable[["Workload"], int]  # generates a workload's samples and returns how many tokens that were


@dataclass(frozen=True)
class Workload:
    """Requests, equal prompts beside each other and equally many of each, and how to sample them."""

    name: str
    requests: list[Request]
    params: SamplingParams

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """The distinct prompts."""
        return [prompt for prompt, _ in groupby(request.prompt_ids for request in self.requests)]


def workload(name: str, prompts: Sequence[tuple[int, ...]], samples: int, params: SamplingParams) -> Workload:
    requests = [
        Request(prompt, sample_seed(name, number, sample))
        for number, prompt in enumerate(prompts)
        for sample in range(samples)
    ]
    return Workload(name, requests, params)


# ---------------------------------------------------------------------------------------------------------------------
# Models and what is asked of them


def base_of(name: str) -> Path:
    """The base of a recipe of the nano family; made, in minutes, unless an earlier run left it in the cache."""
    recipe = load_recipe(name)
    return nano.prepare_base(recipe.base.pretrain, recipe.engine)


def nano_workloads(checkpoint: Path) -> list[Workload]:
    """A step's rollouts of recipe nano, and a batch of its evaluation."""
    tokenizer = load_tokenizer(checkpoint)

    def encoded(problems: Sequence[Example]) -> list[tuple[int, ...]]:
        return [tuple(encode_prompt(tokenizer, problem)) for problem in problems]

    rollouts = encoded(nano.training_problems(32, seed=0))
    evaluation = encoded(nano.EVAL_SETS["chain"].problems(64))
    params = SamplingParams(max_tokens=96)
    return [
        workload("rollouts 32 x 8", rollouts, 8, params),
        workload("rollouts 32 x 8, full length", rollouts, 8, replace(params, ignore_end=True)),
        workload("evaluation 64 x 8", evaluation, 8, SamplingParams(max_tokens=128, temperature=0.6)),
    ]


def random_model(folder: Path) -> Path:
    """A checkpoint with random weights and nano's tokenizer, whose ids are among the model's."""
    tokenizer = nano.train_tokenizer([f"{a}\n{b}" for a, b in nano.pretraining_text(60, seed=0)], 320)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(RANDOM_MODEL)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_workloads(checkpoint: Path) -> list[Workload]:
    """16 random prompts of 32 to 92 tokens."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        tuple(torch.randint(RANDOM_MODEL.vocab_size, (32 + 4 * number,), generator=generator).tolist())
        for number in range(16)
    ]
    return [workload("16 x 4, full length", prompts, 4, SamplingParams(max_tokens=64, ignore_end=True))]


MODELS = {
    "nano": (lambda folder: base_of("nano"), nano_workloads),
    "nano-vllm": (lambda folder: base_of("nano-vllm"), nano_workloads),  # vLLM has no CPU kernel for nano's heads
    "100m": (random_model, random_workloads),
}

# ---------------------------------------------------------------------------------------------------------------------
# Engines


def transformers_generate(checkpoint: Path) -> Count:
    """`generate`, on one left-padded batch."""
    model = load_model(checkpoint)
    return lambda asked: generated_tokens(model, asked)


def generated_tokens(model: PreTrainedModel, asked: Workload) -> int:
    prompts, params = asked.prompts, asked.params
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    ends = end_ids(model)
    config = GenerationConfig(
        do_sample=True,
        temperature=params.temperature,
        top_k=0,
        max_new_tokens=params.max_tokens,
        min_new_tokens=params.max_tokens if params.ignore_end else None,  # an empty list of ends would not do
        num_return_sequences=len(asked.requests) // len(prompts),
        eos_token_id=ends,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    responses = model.generate(ids, attention_mask=mask, generation_config=config)[:, width:]
    ended = torch.isin(responses, torch.tensor(ends, dtype=torch.long)).cumsum(1)
    return int((ended.cumsum(1) <= 1).sum())  # up to the first end token, and with it


def gift_engine(name: str) -> Callable[[Path], Count]:
    """One of GIFT's engines, at its default settings."""

    def start(checkpoint: Path) -> Count:
        engine: Engine = build_engine(Generation(engine=name), checkpoint, dtype="float32")  # type: ignore[arg-type]
        return lambda asked: sum(len(sample.token_ids) for sample in engine.generate(asked.requests, asked.params))

    return start


ENGINES = {"generate": transformers_generate, "hf": gift_engine("hf"), "vllm": gift_engine("vllm")}


@dataclass
class Measured:
    """Seconds and tokens of an engine's passes over a workload."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """The median of tokens per second."""
        return statistics.median(tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True))


def measure(
    engines: dict[str, Count], workloads: Sequence[Workload], repetitions: int
) -> dict[tuple[str, str], Measured]:
    """Passes of every engine over every workload, by (workload, engine)."""
    found = {(asked.name, name): Measured() for asked in workloads for name in engines}
    bar = progress((repetitions + 1) * len(found), "timing", unit="pass")
    for asked in workloads:
        for repetition in range(repetitions + 1):
            for name in list(engines)[:: 1 if repetition % 2 else -1]:
                started = time.perf_counter()
                tokens = engines[name](asked)
                if repetition > 0:
                    found[asked.name, name].seconds.append(time.perf_counter() - started)
                    found[asked.name, name].tokens.append(tokens)
                bar.update()
    bar.close()
    return found


def available(names: str) -> list[str]:
    """Engines by their names, separated by commas, as an argparse type; without vllm where it is not installed."""
    chosen = names.split(",")
    if unknown := set(chosen) - ENGINES.keys():
        raise argparse.ArgumentTypeError(f"unknown engine {min(unknown)!r}; there are {', '.join(ENGINES)}")
    return [name for name in chosen if name != "vllm" or importlib.util.find_spec("vllm")]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", choices=MODELS, default="nano", help="the base of that recipe, or 100M random parameters"
    )
    parser.add_argument("--engines", type=available, default="generate,hf,vllm", help="default: all that are installed")
    parser.add_argument("--repeat", type=positive, default=5, help="timed passes of each engine (default: 5)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: 1, as recipe nano)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quiet_transformers()
    make, ask = MODELS[arguments.model]

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make(Path(folder))
        workloads = ask(checkpoint)
        first = workloads[0]
        engines, startup = {}, {}
        for name in arguments.engines:
            started = time.perf_counter()
            engines[name] = ENGINES[name](checkpoint)
            engines[name](replace(first, requests=first.requests[:1], params=SamplingParams(max_tokens=2)))
            startup[name] = time.perf_counter() - started
        found = measure(engines, workloads, arguments.repeat)

    machine = hardware()
    print(
        f"{arguments.model}, float32, {machine['processor']}, {machine['cores']} cores, {arguments.threads} threads\n"
    )
    base = arguments.engines[0]
    print(f"{'workload':32}{'engine':10}{'tokens/s':>10}{'min':>9}{'max':>9}{'tokens':>9}{f'x {base}':>13}")
    for (asked, name), passes in found.items():
        speeds = [tokens / seconds for tokens, seconds in zip(passes.tokens, passes.seconds, strict=True)]
        extremes = f"{min(speeds):9.0f}{max(speeds):9.0f}{statistics.median(passes.tokens):9.0f}"
        print(f"{asked:32}{name:10}{passes.speed:10.0f}{extremes}{passes.speed / found[asked, base].speed:13.2f}")
    print(f"\nstart-up: {', '.join(f'{name} {seconds:.2f} s' for name, seconds in startup.items())}")


if __name__ == "__main__":
    main()
