"""Packed rows: nothing lost, and every sequence trained as if it were alone."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import SHAPE, tiny_model
from transformers import AttentionInterface, Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gift.batches import IGNORED, Encoded, check_packing, collate, pack, pieces
from gift.cli import UserError
from gift.models import states_at

VOCAB = 64
OTHERS = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "gemma3": (  # one layer of two slides over a window of 4 tokens
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}
KINDS = ["qwen2", "llama", *OTHERS]


@functools.cache
def model_of(kind: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa"):
    if kind in OTHERS:
        config, model, settings = OTHERS[kind]
        torch.manual_seed(0)
        made = model(config(vocab_size=VOCAB, **{**SHAPE, **settings})).eval()
    else:
        made = tiny_model(VOCAB, kind)
    made.set_attn_implementation(attention)
    return made.to(dtype)


def encoded(lengths, seed=0) -> list[Encoded]:
    """Random sequences of these (prompt, response) lengths."""
    draw = torch.Generator().manual_seed(seed)
    return [
        Encoded(f"e{n}", tuple(torch.randint(VOCAB, (prompt + response,), generator=draw).tolist()), prompt)
        for n, (prompt, response) in enumerate(lengths)
    ]


LENGTHS = [(3, 9), (1, 1), (5, 0), (2, 6), (1, 14), (1, 0), (4, 4)]


def everywhere(model, batch) -> torch.Tensor:
    """States [T, H] at all positions of a collated batch."""
    selected = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    return states_at(model, batch["input_ids"], mask, selected, position_ids=positions)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 40))
def test_rows_hold_everything_once_within_the_limit(lengths, limit):
    rows = pack(range(len(lengths)), lambda index: lengths[index], limit)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    for row in rows:
        assert row
        assert len(row) == 1 or sum(lengths[index] for index in row) <= limit
        assert row == sorted(row, key=lambda index: (-lengths[index], index))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 40))
def test_rows_are_those_of_a_plain_best_fit_search(lengths, limit):
    naive: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        rooms = [limit - sum(lengths[other] for other in row) for row in naive]
        fitting = [room for room in rooms if room >= lengths[index]]
        if fitting:
            naive[rooms.index(min(fitting))].append(index)
        else:
            naive.append([index])
    assert pack(range(len(lengths)), lambda index: lengths[index], limit) == naive


def test_a_perfect_packing_is_found():
    rows = pack([2, 5, 8, 3, 7, 5], lambda size: size, 10)
    assert sorted(map(sorted, rows)) == [[2, 8], [3, 7], [5, 5]]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 60), st.booleans())
def test_pieces_of_both_kinds_fit_into_memory(lengths, limit, packing):
    found = pieces(range(len(lengths)), lambda index: lengths[index], micro_tokens=limit, packing=packing)
    batch = encoded([(length, 0) for length in lengths])
    for piece in found:
        assert collate([batch[i] for i in piece], 0, packing=packing)["input_ids"].numel() <= limit or len(piece) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=6))
def test_a_packed_row_is_the_sequences_one_after_another(lengths):
    batch = encoded(lengths)
    tensors = collate(batch, 0, packing=True)
    assert tensors.keys() == {"input_ids", "position_ids", "labels"}
    expected = []
    for example in batch:
        for position, token in enumerate(example.ids):
            following = example.ids[position + 1] if position + 1 < len(example.ids) else IGNORED
            expected.append((token, position, following if position + 1 >= example.prompt_length else IGNORED))
    columns = [tensors[name][0].tolist() for name in ("input_ids", "position_ids", "labels")]
    assert list(zip(*columns, strict=True)) == expected


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=6))
def test_labels_come_example_after_example_both_ways(lengths):
    batch = encoded(lengths)
    expected = [token for example in batch for token in example.ids[example.prompt_length :]]
    for packing in (False, True):
        labels = collate(batch, 0, packing=packing)["labels"]
        assert labels.dtype == torch.int64
        assert labels[labels != IGNORED].tolist() == expected


# ---------------------------------------------------------------------------------------------------------------------
# Through a model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_packed_states_are_those_of_each_sequence_alone(kind, attention, training):
    model, batch = model_of(kind, attention=attention), encoded(LENGTHS)
    model.train(training)
    packed = everywhere(model, collate(batch, 0, packing=True))
    alone = [model.get_decoder()(torch.tensor([example.ids])).last_hidden_state[0] for example in batch]
    model.eval()
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_do_not_depend_on_packing(kind, checkpointing):
    model, batch = model_of(kind, torch.float64), encoded(LENGTHS)
    parameters = list(model.parameters())
    # The oracle runs each sequence alone through transformers' own forward, with labels of its own.
    expected = torch.zeros((), dtype=torch.float64)
    for example in batch:
        logits = model(torch.tensor([example.ids])).logits[0]
        for position in range(example.prompt_length, len(example.ids)):
            expected = expected - logits[position - 1].log_softmax(-1)[example.ids[position]]
    wanted = torch.autograd.grad(expected, parameters)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for packing in (False, True):
        tensors = collate(batch, 0, packing=packing)
        selected = tensors["labels"] != IGNORED
        mask, positions = tensors.get("attention_mask"), tensors.get("position_ids")
        hidden = states_at(model, tensors["input_ids"], mask, selected, position_ids=positions)
        logits = model.get_output_embeddings()(hidden)
        loss = torch.nn.functional.cross_entropy(logits, tensors["labels"][selected], reduction="sum")
        found = torch.autograd.grad(loss, parameters)
        torch.testing.assert_close(loss, expected.detach(), atol=0, rtol=1e-12)
        # Gemma's norms compute in float32 whatever the model does.
        torch.testing.assert_close(found, wanted, atol=1e-6 if kind == "gemma3" else 1e-12, rtol=1e-10)
    model.gradient_checkpointing_disable()
    model.eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_sequence_knows_nothing_of_its_neighbours(kind, attention):
    model, batch = model_of(kind, attention=attention), encoded(LENGTHS)
    before = everywhere(model, collate(batch, 0, packing=True)).split([len(example.ids) for example in batch])
    for changed, example in enumerate(batch):
        other = dataclasses.replace(example, ids=tuple((token + 1) % VOCAB for token in example.ids))
        mixed = collate([*batch[:changed], other, *batch[changed + 1 :]], 0, packing=True)
        after = everywhere(model, mixed).split([len(example.ids) for example in batch])
        for number in range(len(batch)):
            assert torch.equal(before[number], after[number]) == (number != changed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_models_that_keep_sequences_apart_may_pack(kind, attention):
    check_packing(model_of(kind, attention=attention))


def test_attention_that_mixes_sequences_is_refused():
    AttentionInterface.register("maskless", sdpa_attention_forward)  # has no function that makes masks for it
    model = tiny_model(VOCAB)
    model.set_attn_implementation("maskless")
    with pytest.raises(UserError, match=r"Qwen2ForCausalLM with maskless attention mixes .* set engine.packing=false"):
        check_packing(model)
