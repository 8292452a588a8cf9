"""What the evaluation tests share: a tiny checkpoint folder, an engine that makes answers up, and a suite of sums."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from evals.suites import Protocol, Suite
from evals.tasks import Item, Task, TaskData
from evals.tasks.math import BoxedTask
from gift.generation import Engine, Request, Sample, SamplingParams
from gift.records import RunDir, sha256_json, sha256_weights

TEMPLATE = (
    "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROTOCOL = Protocol("toy", temperature=0.6, top_p=1.0, max_tokens=24, runs=4, samples_per_run=2)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, three special tokens, a chat template."""
    special = ["<end>", "<user>", "<assistant>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.chat_template = TEMPLATE
    return fast


def write_checkpoint(folder: Path, *, fill: float = 0.0) -> Path:
    """A folder with a tokenizer and a weights file that no model could be loaded from."""
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    save_file({"weight": np.full(3, fill, dtype=np.float32)}, folder / "model.safetensors")
    return folder


class MadeUpEngine(Engine):
    """Boxes a number between 0 and 9, or rambles until it is cut off.

    A sample depends on the whole batch: records can only be equal where the batches were. Samples come last one first.
    `interrupt_at` is the number of the call that Ctrl-C hits.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_model_len: int = 512, interrupt_at: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.interrupt_at = interrupt_at
        self.batches: list[list[Request]] = []
        self.closed = False

    def stream(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[tuple[int, Sample]]:
        if len(self.batches) == self.interrupt_at:
            raise KeyboardInterrupt
        self.batches.append(list(requests))
        batch = sha256_json([request.seed for request in requests])
        for number, request in reversed(list(enumerate(requests))):
            rng = random.Random(f"{request.seed} {batch}")
            text = f"\\boxed{{{rng.randrange(10)}}}<end>" if rng.random() < 0.8 else "well " * 40
            ids = self.tokenizer.encode(text, add_special_tokens=False)[: request.max_tokens]
            ended = ids[-1] == self.tokenizer.eos_token_id
            yield number, Sample(ids, "stop" if ended else "length", [0.0] * len(ids))

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        raise AssertionError("evaluation scores nothing")

    def update_weights(self, model: PreTrainedModel) -> None:
        raise AssertionError("evaluation must not change the weights it measures")

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class Sums(BoxedTask):
    """`count` sums of two digits below ten."""

    prompt: str = "{problem}"
    count: int = 5
    start: int = 0

    @property
    def origin(self) -> str:
        return "made up"

    def load(self, data_dir: Path | None) -> TaskData:
        pairs = [(index % 5, (index * 3 + self.start) % 5) for index in range(self.count)]
        items = tuple(Item(f"{self.name}-{n}", f"{a} + {b} = ?", str(a + b)) for n, (a, b) in enumerate(pairs))
        source = {"name": "sums", "revision": "1", "sha256": sha256_json([*pairs]), "rows": len(items)}
        return TaskData(items, source)


def toy_suite(*tasks: Task, batch_size: int = 20) -> Suite:
    """A suite of these tasks, by default one with 7 items and one with 3; a batch holds two items' 16 samples."""
    chosen = tasks or (
        Sums("small", "Small sums", "easy", count=7),
        Sums("more", "More sums", "easy", count=3, start=1),
    )
    return Suite("toy", {task.name: task for task in chosen}, PROTOCOL, batch_size)


def toy_run(path: Path, *policies: str) -> RunDir:
    """A training run that holds a checkpoint for each of these policies."""
    run = RunDir.create(path, kind="train", recipe={})
    for number, policy in enumerate(policies):
        checkpoint = write_checkpoint(path / "checkpoints" / policy / "init-000001", fill=float(number))
        run.add_node(
            {
                "id": policy,
                "label": policy.upper(),
                "parent": None,
                "stage": "init",
                "method": policy,
                "checkpoint": str(checkpoint.relative_to(path)),
                "weights_sha256": sha256_weights(checkpoint),
            }
        )
    return run
