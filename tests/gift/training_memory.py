"""Two steps of stage 1 on a random model, in a process of its own: prints its peak memory in bytes.

python training_memory.py SETTINGS (JSON: shape, engine, sequences, length) FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import gift.train  # noqa: F401  # what a run imports
from gift.batches import Encoded
from gift.distributed import quiet_libraries
from gift.objectives import resolve
from gift.recipe import Engine, Init, Optimizer
from gift.records import JsonlLog
from gift.sft import Loss, Stage, Trainer


def main(settings: dict[str, Any], folder: Path) -> None:
    """Trains on sequences of random tokens, all of one length, each a prompt of one token and its response."""
    quiet_libraries()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**settings["shape"]))
    size = (2 * settings["sequences"], settings["length"])
    rows = torch.randint(0, model.config.vocab_size, size).tolist()
    known: dict[int, int] = {}  # one object per token id, as gift.data.encode_all makes them
    rows = [[known.setdefault(token, token) for token in row] for row in rows]
    examples = [Encoded(str(number), tuple(row), 1) for number, row in enumerate(rows)]
    with JsonlLog(folder / "metrics.jsonl", key=("policy", "stage", "event", "step")) as log:
        Trainer(
            Stage("model", "init", examples, [], seed=0),
            model,
            cast(Any, SimpleNamespace(pad_token_id=0)),
            Loss(resolve("sft", {})),
            settings=Init(epochs=1, batch_size=settings["sequences"], optimizer=Optimizer(lr=1e-4)),
            engine_settings=Engine(**settings["engine"]),
            resume_dir=folder / "resume",
            log=log,
        ).train(lambda engine, step: None)
    # Not getrusage's ru_maxrss, which begins at the size of the process that started this one.
    (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    print(1024 * int(peak.split()[1]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
