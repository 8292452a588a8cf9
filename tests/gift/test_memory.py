"""Memory: predictions against processes that really train, and formulas against models that really exist."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from gift import nano
from gift.batches import pieces
from gift.data import Example, encode_all
from gift.lora import add_adapters
from gift.memory import (
    PROCESS_BYTES,
    TOKEN_BYTES,
    ZERO_BYTES,
    MicroBatch,
    Part,
    Prediction,
    Shape,
    layer_bytes,
    predict,
)
from gift.models import load_tokenizer
from gift.recipe import Engine, Generation, LoRA, Pretrain

MID = Qwen2Config(
    vocab_size=32_000,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
SEVEN_B = Shape(
    parameters=7_615_616_512,
    largest=544_997_376,
    vocab=152_064,
    hidden=3584,
    intermediate=18_944,
    layers=28,
    attention=3584,
    keys=512,
    tied=False,
    linear={},
)


# ---------------------------------------------------------------------------------------------------------------------
# Against measurement


# transformers imports scikit-learn where it is installed, as the tests' environment has it: 90 MB that no run needs.
WITHOUT_SKLEARN = """
import runpy, sys
sys.modules["sklearn"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def measured(config: Qwen2Config, engine: Engine, sequences: int, length: int, folder: Path) -> int:
    """Peak resident bytes of a fresh process that trains two steps of `sequences` sequences."""
    settings = {
        "shape": config.to_dict(),
        "engine": dataclasses.asdict(engine),
        "sequences": sequences,
        "length": length,
    }
    script = Path(__file__).with_name("training_memory.py")
    command = [sys.executable, "-c", WITHOUT_SKLEARN, str(script), json.dumps(settings), str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    return int(process.stdout.split()[-1])


def predicted(config: Qwen2Config, engine: Engine, sequences: int, length: int) -> int:
    micro_batch = MicroBatch.largest(engine, sequences=sequences, max_length=length)
    assert sequences * length >= 2 * micro_batch.tokens  # gradients of one pass are there during the next
    tokens = 2 * sequences * length
    return predict(Shape.of(config), engine, micro_batch, ranks=1, on_gpu=False, encoded_tokens=tokens).peak


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_the_prediction_for_the_nano_model_holds(tmp_path, zero_stage):
    config = nano.base_config(Pretrain(), 512)
    engine = Engine(zero_stage=zero_stage, dtype="float32", micro_tokens=512)
    assert predicted(config, engine, 8, 128) == pytest.approx(measured(config, engine, 8, 128, tmp_path), rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 0},
        {"zero_stage": 2},
        {"zero_stage": 1},
        {"zero_stage": 3},
        {"zero_stage": 2, "gradient_checkpointing": True},
        {"zero_stage": 0, "dtype": "bfloat16"},
        {"zero_stage": 2, "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_the_prediction_for_a_mid_size_model_holds(tmp_path, settings):
    """58 million parameters, 1 GB of them with their optimizer."""
    engine = Engine(**{"dtype": "float32", **settings}, micro_tokens=1024)
    assert predicted(MID, engine, 8, 256) == pytest.approx(measured(MID, engine, 8, 256, tmp_path), rel=0.15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_keeps_what_the_formula_says(dtype):
    """What autograd saves in the middle one of three layers, counted by storage; with a padding mask."""
    rows, length, shape = 3, 48, {"hidden_size": 64, "intermediate_size": 160, "num_key_value_heads": 4}
    model = tiny_model(128, num_hidden_layers=3, **shape).to(getattr(torch, dtype))
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved: list[dict[int, int]] = [{}]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[-1][storage.data_ptr()] = storage.nbytes()
        return tensor

    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: saved.append({}))
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, -5:] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model(torch.randint(0, 128, (rows, length)), attention_mask=mask)
    before = set(saved[0]) | set(saved[1])
    found = sum(size for pointer, size in saved[2].items() if pointer not in before)
    assert output is not None  # its graph keeps the tensors alive, or storages would be reused
    engine = Engine(dtype=dtype, zero_stage=0)  # type: ignore[arg-type]
    assert layer_bytes(Shape.of(model.config), engine, MicroBatch(rows, length)) == pytest.approx(found, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


@pytest.mark.parametrize("tied", [True, False])
def test_a_shape_counts_what_the_model_has(tied):
    model = tiny_model(300, tie_word_embeddings=tied)
    shape = Shape.of(model.config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.vocab, shape.hidden, shape.layers, shape.attention, shape.tied) == (300, 32, 2, 32, tied)
    assert shape.largest == 300 * 32


def test_a_shape_counts_adapters_as_peft_makes_them():
    model, lora = tiny_model(300), LoRA(rank=4, targets=("q_proj", "down_proj"))
    shape = Shape.of(model.config)
    add_adapters(model, lora, seed=0)
    made = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert shape.trained(lora) == made
    assert shape.trained(None) == shape.parameters


@pytest.mark.parametrize(
    ("settings", "sequences", "rows", "length"),
    [
        ({"micro_tokens": 512}, 32, 2, 256),
        ({"micro_tokens": 700}, 32, 2, 256),
        ({"micro_tokens": 100}, 32, 1, 256),  # a longer sequence passes alone
        ({"micro_tokens": 512}, 1, 1, 256),
        ({"micro_tokens": 512, "packing": True}, 32, 1, 512),
    ],
)
def test_the_largest_micro_batch(settings, sequences, rows, length):
    engine = Engine(**settings)
    found = MicroBatch.largest(engine, sequences=sequences, max_length=256)
    assert found == MicroBatch(rows, length)
    made = pieces([256] * sequences, int, micro_tokens=engine.micro_tokens, packing=engine.packing)
    assert max(sum(piece) for piece in made) == found.tokens


# ---------------------------------------------------------------------------------------------------------------------
# The parts


def test_the_peak_is_what_is_always_there_and_the_largest_phase():
    parts = [
        Part("always", 5),
        Part("both", 3, ("forward", "backward")),
        Part("forward", 1, ("forward",)),
        Part("backward", 4, ("backward",)),
        Part("step", 6, ("step",)),
        Part("host", 100, on_host=True),
    ]
    assert (Prediction(parts, on_gpu=True).peak, Prediction(parts, on_gpu=True).host) == (12, 100)
    assert (Prediction(parts, on_gpu=False).peak, Prediction(parts, on_gpu=False).host) == (112, 0)


def test_loading_comes_before_what_training_alone_has():
    parts = [
        Part("process", 1, at_load=True),
        Part("moments", 7),
        Part("whole", 9, ("load",)),
        Part("forward", 1, ("forward",)),
    ]
    assert Prediction(parts, on_gpu=False).peak == 10
    assert Prediction([*parts, Part("step", 3, ("step",))], on_gpu=False).peak == 11


@pytest.mark.parametrize("on_gpu", [True, False])
def test_every_rank_holds_the_whole_model_before_zero_3_splits_it(on_gpu):
    """Of so many ranks that a rank's own part is next to nothing."""
    engine = Engine(zero_stage=3, micro_tokens=1, gradient_checkpointing=True)
    whole, head = 2 * SEVEN_B.parameters, 2 * SEVEN_B.vocab * SEVEN_B.hidden

    def found(reference: bool) -> Prediction:
        return predict(SEVEN_B, engine, MicroBatch(1, 1), ranks=10_000, on_gpu=on_gpu, reference=reference)

    process = 0 if on_gpu else PROCESS_BYTES + ZERO_BYTES
    assert found(False).peak == pytest.approx(whole + process, rel=1e-6)
    # On a GPU the reference is split, but for its head, before the policy comes; on a CPU both are whole at once.
    assert found(True).peak == pytest.approx(whole + head + (0 if on_gpu else whole) + process, rel=1e-3)
    assert found(True).host == (2 * whole if on_gpu else 0)


def test_an_encoded_token_takes_what_the_formula_says(tiny_checkpoint):
    tokenizer, rng = load_tokenizer(tiny_checkpoint), random.Random(0)
    text = [" ".join(str(rng.randrange(1000)) for _ in range(500)) for _ in range(50)]
    examples = [Example(str(number), "q", response, "1") for number, response in enumerate(text)]
    tracemalloc.start()
    encoded, _ = encode_all(tokenizer, examples, 100_000)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tokens = sum(len(example.ids) for example in encoded)
    assert tokens > 50_000
    assert taken == pytest.approx(TOKEN_BYTES * tokens, rel=0.15)


def sizes(ranks: int = 8, lora: LoRA | None = None, **settings) -> dict[str, float]:
    """Bytes of each part of a 7B model on GPUs."""
    prediction = predict(
        SEVEN_B, Engine(**settings), MicroBatch(2, 8192), ranks=ranks, on_gpu=True, lora=lora, reference=True
    )
    return {part.name: part.size for part in prediction.parts}


def with_rollouts(shape: Shape, rollouts: MicroBatch, generation: Generation, **settings) -> Prediction:
    engine = Engine(**settings)
    return predict(shape, engine, MicroBatch(8, 8192), ranks=8, on_gpu=True, generation=generation, rollouts=rollouts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_and_values_take_what_transformers_keeps(dtype):
    model = Qwen2ForCausalLM(MID).to(getattr(torch, dtype))
    kept = model(torch.zeros(3, 7, dtype=torch.int64), use_cache=True).past_key_values
    expected = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)

    def predicted(**settings) -> float:
        found = with_rollouts(Shape.of(MID), MicroBatch(3, 7), Generation(**settings), dtype=dtype)
        return {part.name: part.size for part in found.parts}["keys and values"]

    assert predicted() == expected
    assert predicted(max_rows=1) == expected / 3
    assert predicted(cache_gb=2.5 * expected / 3 / 1e9) == 2 * expected / 3


def test_vllm_has_weights_and_a_cache_of_its_own_while_it_is_awake():
    def predicted(**settings) -> Prediction:
        generation = Generation(**{"engine": "vllm", "cache_gb": 10, **settings})
        return with_rollouts(SEVEN_B, MicroBatch(64, 4096), generation, zero_stage=3)

    sizes = {part.name: part.size for part in predicted().parts}
    weights = 2 * SEVEN_B.parameters
    assert sizes["vLLM's weights"] == sizes["gathered model"] == weights
    assert sizes["vLLM's keys and values"] == 10e9
    assert {part.name: part.size for part in predicted(tensor_parallel=2).parts}["vLLM's weights"] == weights / 2
    asleep, awake = predicted().peak, predicted(sleep=False).peak
    assert awake - asleep == pytest.approx(weights + 10e9)  # the update is what takes most here
    assert predicted(engine="server").peak == asleep


def test_zero_shards_what_its_stages_say():
    """ZeRO (Rajbhandari et al., 2020), Figure 1: optimizer states from stage 1, gradients from 2, parameters at 3."""
    count = SEVEN_B.parameters
    for stage, (parameters, gradients, states) in {0: (1, 1, 1), 1: (1, 1, 8), 2: (1, 8, 8), 3: (8, 4, 8)}.items():
        found = sizes(zero_stage=stage)
        assert found["parameters"] == 2 * count / parameters
        assert found["gradients"] == 4 * count / gradients  # stage 3 holds its eighth twice
        assert found["masters"] == 4 * count / states
        assert found["moments"] == 8 * count / states
        head = SEVEN_B.vocab * SEVEN_B.hidden  # whole on every rank, the decoder split at stage 3
        assert found["reference"] == 2 * (count if stage < 3 else (count - head) / 8 + head)


def test_pure_bf16_halves_the_optimizers_state():
    mixed, pure = sizes(zero_stage=2), sizes(zero_stage=2, master_dtype="bfloat16")
    assert all(pure[name] == mixed[name] / 2 for name in ("masters", "moments", "gradients"))
    assert "masters" not in sizes(zero_stage=0, master_dtype="bfloat16")
    assert "masters" not in sizes(zero_stage=0, dtype="float32")


def test_offload_moves_to_the_host():
    def host(offload: str) -> set[str]:
        engine = Engine(zero_stage=3, offload=offload)  # type: ignore[arg-type]
        found = predict(SEVEN_B, engine, MicroBatch(1, 8192), ranks=8, on_gpu=True, encoded_tokens=1)
        return {part.name for part in found.parts if part.on_host and part.phases != ("load",)}

    assert host("none") == {"encoded data"}
    assert host("optimizer") == {"encoded data", "masters", "moments", "gradients"}
    assert host("all") == host("optimizer") | {"parameters"}


def test_checkpointing_keeps_one_layer_and_the_inputs_of_the_others():
    whole, checkpointed = sizes(zero_stage=3), sizes(zero_stage=3, gradient_checkpointing=True)
    stream = 2 * SEVEN_B.hidden * 16_384
    layer = layer_bytes(SEVEN_B, Engine(), MicroBatch(2, 8192))
    assert whole["activations"] - checkpointed["activations"] == pytest.approx(27 * layer - 28 * stream)


def test_flash_attention_has_no_mask():
    batch, length = MicroBatch(2, 8192), 8192
    dense, flash = (layer_bytes(SEVEN_B, Engine(attention=name), batch) for name in ("sdpa", "flash_attention_2"))
    assert dense - flash == 2 * 2 * length**2


def test_adapters_need_neither_a_second_model_nor_a_gradient_of_the_head():
    model = tiny_model(300)
    linear = sum(isinstance(layer, nn.Linear) for layer in model.modules())
    assert linear == 15  # seven per layer and the head
    found = predict(
        Shape.of(model.config), Engine(), MicroBatch(1, 64), ranks=1, on_gpu=True, lora=LoRA(rank=2), reference=True
    )
    names = {part.name for part in found.parts}
    assert not names & {"reference", "gradient of the head", "gradient of the embedding"}
    assert "reference's logits" in names
