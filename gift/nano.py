"""The embedded default: problems, a tokenizer and a small base model, all made on this machine in minutes.

The target task is reasoning-gym's `chain_sum` with worked steps. The base is pretrained on a broad, noisy mixture, the
target task among other things, in several styles of which most do not reason and some are wrong: it can do the task,
but seldom does. That leaves initialization something to teach and RL something to find.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from gift.caches import cache_root, only_one
from gift.data import Example, encode, normalize
from gift.distributed import barrier, init_distributed, rank
from gift.generation import sample_seed
from gift.provenance import package_versions
from gift.recipe import Engine, Init, Pretrain
from gift.records import JsonlLog, remove, sha256_json, write_json
from gift.sft import Loss, Stage, Trainer, nll

EVAL_VERSION = "1"
PAD, END, ROLES = "<|pad|>", "<|end|>", ("<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WINDOW = 4096
# Modules whose code decides the base.
MADE_BY = ("nano", "sft", "engine", "masters", "vocab/head", "vocab/loss", "batches", "data", "models")
PACKAGES = ("torch", "transformers", "tokenizers", "deepspeed", "reasoning-gym")


# ---------------------------------------------------------------------------------------------------------------------
# Problems


def generate(task: str, count: int, seed: int, **settings: Any) -> list[dict[str, Any]]:
    """`count` entries of a reasoning-gym task: question, answer, metadata.

    reasoning-gym seeds item i with seed + i, so that neighbouring seeds share items; the seed is hashed to keep streams
    apart.
    """
    dataset = reasoning_gym.create_dataset(task, size=count, seed=sample_seed("nano", task, seed) % 2**48, **settings)
    return [dataset[index] for index in range(count)]


def steps(expression: str, slip: Callable[[], int] = lambda: 0) -> list[tuple[int, str, int, int]]:
    """A chain 'a + b - c' as its left-to-right steps (left, operator, right, result); each result is off by `slip()`,
    and what follows goes on from there."""
    first, *rest = expression.split()
    left = int(first)
    worked = []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        result = (left + int(term) if operator == "+" else left - int(term)) + slip()
        worked.append((left, operator, int(term), result))
        left = result
    return worked


def boxed(answer: object) -> str:
    """The final answer as every solution states it."""
    return f"\\boxed{{{answer}}}"


def worked_solution(worked: Sequence[tuple[int, str, int, int]]) -> str:
    """The expert's style: one line a step, then the boxed result."""
    lines = [f"{left}{operator}{right}={result}" for left, operator, right, result in worked]
    return "\n".join([*lines, boxed(worked[-1][-1])])


def chains(count: int, seed: int, *, terms: tuple[int, int], digits: tuple[int, int]) -> list[dict[str, Any]]:
    """`count` chain-sum entries with so many terms of so many digits."""
    (min_terms, max_terms), (min_digits, max_digits) = terms, digits
    return generate(
        "chain_sum",
        count,
        seed,
        min_terms=min_terms,
        max_terms=max_terms,
        min_digits=min_digits,
        max_digits=max_digits,
    )


def chain_problems(count: int, seed: int, *, prefix: str, **settings: Any) -> list[Example]:
    """`count` distinct chain-sum problems with worked solutions; ids start with `prefix`."""
    distinct: dict[str, Example] = {}
    wave = 0
    while len(distinct) < count:
        wave += 1
        for entry in chains(count, sample_seed(prefix, seed, wave), **settings):
            solution = worked_solution(steps(entry["metadata"]["expression"]))
            example = Example(f"{prefix}-{len(distinct)}", entry["question"], solution, entry["answer"])
            distinct.setdefault(normalize(example.prompt), example)
    return list(distinct.values())[:count]


def plain_problems(task: str, count: int, seed: int, **settings: Any) -> list[Example]:
    """`count` distinct problems of another reasoning-gym task; the solution is the boxed answer alone."""
    distinct: dict[str, Example] = {}
    for entry in generate(task, 4 * count, seed, **settings):
        example = Example(f"{task}-{len(distinct)}", entry["question"], boxed(entry["answer"]), entry["answer"])
        distinct.setdefault(normalize(example.prompt), example)
    return list(distinct.values())[:count]


TARGET: dict[str, Any] = {"terms": (3, 6), "digits": (1, 1)}
LONGER: dict[str, Any] = {"terms": (7, 8), "digits": (1, 1)}
OTHER_TASKS: dict[str, dict[str, Any]] = {
    "gcd": {"max_value": 30},
    "products": {"max_digits": 1},
    "simple_equations": {"max_terms": 2, "max_value": 20},
}
EVAL_SEED = 20260109


@dataclass(frozen=True)
class EvalSet:
    """A set of evaluation problems: a fixed list of `items`, made on demand by `make(count)`."""

    label: str
    group: str
    items: int
    make: Callable[[int], list[Example]]

    def problems(self, count: int) -> list[Example]:
        """The first `count` of the list."""
        return self.make(max(count, self.items))[:count]


EVAL_SETS: dict[str, EvalSet] = {
    "chain": EvalSet(
        "Chains", "in-distribution", 200, lambda n: chain_problems(n, EVAL_SEED, prefix="chain", **TARGET)
    ),
    "chain-long": EvalSet(
        "Longer chains", "harder", 100, lambda n: chain_problems(n, EVAL_SEED, prefix="chain-long", **LONGER)
    ),
    "gcd": EvalSet(
        "GCD", "out-of-distribution", 100, lambda n: plain_problems("gcd", n, EVAL_SEED, **OTHER_TASKS["gcd"])
    ),
    "equations": EvalSet(
        "Equations",
        "out-of-distribution",
        100,
        lambda n: plain_problems("simple_equations", n, EVAL_SEED, **OTHER_TASKS["simple_equations"]),
    ),
}


def training_problems(count: int, seed: int) -> list[Example]:
    """`count` distinct target problems, none of which is in an evaluation set."""
    held_out = {normalize(problem.prompt) for problem in EVAL_SETS["chain"].problems(EVAL_SETS["chain"].items)}
    pool = chain_problems(count + len(held_out), seed, **TARGET, prefix="train")
    return [problem for problem in pool if normalize(problem.prompt) not in held_out][:count]


# ---------------------------------------------------------------------------------------------------------------------
# The base's pretraining text


STYLES = {"worked": 0.18, "running": 0.16, "words": 0.12, "direct": 0.38, "bare": 0.16}
SLIP = 0.1  # share of steps whose result is wrong
CHAIN_MIX = [(0.40, (2, 3), (1, 1)), (0.40, (3, 8), (1, 1)), (0.05, (2, 3), (1, 2))]  # share, terms, digits
OTHER_SHARE = 0.05  # of each of OTHER_TASKS


def in_style(expression: str, style: str, rng: random.Random) -> str:
    """A solution of a chain in one of STYLES, in which a step now and then slips and the error carries on."""
    worked = steps(expression, lambda: rng.choice([-10, -2, -1, 1, 2, 10]) if rng.random() < SLIP else 0)
    answer = worked[-1][-1]
    if style == "worked":
        return worked_solution(worked)
    if style == "running":
        return f"{worked[0][0]}" + "".join(f"{op}{right}->{result};" for _, op, right, result in worked) + boxed(answer)
    if style == "words":
        spoken = [
            f"{left} {'plus' if op == '+' else 'minus'} {right} is {result}." for left, op, right, result in worked
        ]
        return f"First {' Then '.join(spoken)} The answer is {boxed(answer)}"
    return boxed(answer) if style == "direct" else str(answer)


def pretraining_text(count: int, seed: int) -> list[tuple[str, str]]:
    """(prompt, response) documents: mostly chains, of several lengths and in several styles, and other tasks.

    No prompt of an evaluation set is among them. Problems this small do recur in the subsets of a run, though.
    """
    rng = random.Random(seed)
    documents = []
    for number, (share, terms, digits) in enumerate(CHAIN_MIX):
        for entry in chains(int(share * count), sample_seed("pretrain", seed, number), terms=terms, digits=digits):
            style = rng.choices(list(STYLES), list(STYLES.values()))[0]
            documents.append((entry["question"], in_style(entry["metadata"]["expression"], style, rng)))
    for task, settings in OTHER_TASKS.items():
        for entry in generate(task, int(OTHER_SHARE * count), sample_seed("pretrain", seed), **settings):
            documents.append((entry["question"], boxed(entry["answer"]) if rng.random() < 0.8 else entry["answer"]))
    rng.shuffle(documents)
    held_out = {normalize(problem.prompt) for one in EVAL_SETS.values() for problem in one.problems(one.items)}
    return [document for document in documents if normalize(document[0]) not in held_out]


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and base


def train_tokenizer(texts: Sequence[str], vocab: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer in Qwen2's manner: every digit is a token of its own, and any text can be spelled.

    It must be of Qwen2's class: AutoTokenizer goes by the model's architecture, whatever class the folder names.
    """
    tokenizer: PreTrainedTokenizerBase = Qwen2Tokenizer().train_new_from_iterator(
        texts, vocab, new_special_tokens=[PAD, END, *ROLES], show_progress=False
    )
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token = PAD, END, PAD
    tokenizer.model_max_length = WINDOW
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def base_key(settings: Pretrain, engine: Engine) -> dict[str, Any]:
    """What the base depends on; its hash names it in the cache."""
    versions = package_versions()
    sources = {name: (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8") for name in MADE_BY}
    return {
        "pretrain": asdict(settings),
        "engine": asdict(engine),
        "source": {name: sha256_json(ast.dump(ast.parse(source))) for name, source in sources.items()},
        "packages": {name: versions[name] for name in PACKAGES},
    }


def base_home(settings: Pretrain, engine: Engine) -> Path:
    """The base's folder in the cache."""
    return cache_root() / f"nano-{sha256_json(base_key(settings, engine))[:12]}"


def pretraining_cost(settings: Pretrain, engine: Engine) -> int:
    """Roughly how many tokens making the base passes through the model (backward counts twice); 0 if it is cached."""
    return 0 if (base_home(settings, engine) / "model").exists() else 3 * 40 * settings.documents


def prepare_base(settings: Pretrain, engine: Engine) -> Path:
    """The checkpoint folder of the base: from the cache, or pretrained (continuing where a killed run stopped)."""
    init_distributed()
    home = base_home(settings, engine)
    checkpoint = home / "model"
    with only_one(home):
        if not checkpoint.exists():
            if rank() == 0:
                write_json(home / "made-from.json", base_key(settings, engine))
            pretrain(settings, engine, home, checkpoint)
    return checkpoint


def base_config(settings: Pretrain, vocab: int) -> Qwen2Config:
    """The base's architecture; which tokens end and pad a text is its tokenizer's business."""
    return Qwen2Config(
        vocab_size=vocab,
        hidden_size=settings.hidden,
        intermediate_size=3 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads // 2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=None,
        initializer_range=0.04,
    )


def pretrain(settings: Pretrain, engine: Engine, home: Path, checkpoint: Path) -> None:
    """Trains the base from scratch on the plain NLL of the mixture's responses and writes its checkpoint."""
    documents = pretraining_text(settings.documents, settings.seed)
    tokenizer = train_tokenizer([f"{prompt}\n{response}" for prompt, response in documents[:5000]], settings.vocab)
    torch.manual_seed(settings.seed)
    config = base_config(settings, len(tokenizer))
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = Qwen2ForCausalLM(config)
    encoded = [
        encode(tokenizer, Example(str(number), prompt, response, response), WINDOW)
        for number, (prompt, response) in enumerate(documents)
    ]
    with JsonlLog(home / "metrics.jsonl", key=("policy", "stage", "event", "step")) as log:
        trainer = Trainer(
            Stage("base", "base", encoded, [], settings.seed),
            model,
            tokenizer,
            Loss(nll),
            settings=Init(epochs=1, batch_size=settings.batch_size, optimizer=settings.optimizer, save_every=200),
            engine_settings=engine,
            resume_dir=home / "resume",
            log=log,
        )
        trainer.train(lambda engine, _: engine.export(tokenizer, checkpoint))
    if rank() == 0:
        remove(home / "resume")
    barrier()
