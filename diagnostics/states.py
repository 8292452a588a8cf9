"""The states every drift metric starts from: one backbone pass per checkpoint, no logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diagnostics.distribution import full_precision
from gift.batches import IGNORED, Encoded, collate
from gift.cli import UserError, progress
from gift.data import Example, encode_all
from gift.models import backbone, load_tokenizer


@dataclass(frozen=True)
class States:
    """Teacher-forced states of one checkpoint at the N response tokens of a held-out set, sequence after sequence.

    hidden [N, H], post-final-norm, in the model's dtype, on the CPU: row i is the state that predicts labels[i];
    labels [N] int64; sequence [N] int64, the index into `ids` of the sequence that token i belongs to.
    """

    hidden: Tensor
    labels: Tensor
    sequence: Tensor
    ids: list[str]


@torch.no_grad()
def collect(model: PreTrainedModel, encoded: Sequence[Encoded], *, batch_size: int) -> States:
    """States of `model`, which must be in evaluation mode, at every response token (end token included) of `encoded`.

    What a row holds does not depend on `batch_size` beyond float rounding: batches group sequences of like length, but
    the result keeps the order of `encoded`. Raises UserError naming the sequence at which a state is not finite.
    """
    if batch_size < 1:
        raise UserError(f"the batch size is {batch_size}; give at least 1")
    decoder, device = backbone(model), model.device
    counts = torch.tensor([len(example.ids) - example.prompt_length for example in encoded])
    ends = counts.cumsum(0).tolist()
    hidden = torch.empty(sum(counts.tolist()), model.config.hidden_size, dtype=model.dtype)
    labels = torch.empty(len(hidden), dtype=torch.int64)
    longest_first = sorted(range(len(encoded)), key=lambda index: -len(encoded[index].ids))
    with progress(len(encoded), "states", unit="seq") as bar, full_precision(device.type):
        for start in range(0, len(encoded), batch_size):
            members = longest_first[start : start + batch_size]
            batch = collate([encoded[index] for index in members], pad_id=0)
            output = decoder(
                input_ids=batch["input_ids"].to(device),
                attention_mask=batch["attention_mask"].to(device),
                use_cache=False,
            )
            for index, state, label in zip(members, output.last_hidden_state, batch["labels"], strict=True):
                response = label != IGNORED
                rows = slice(ends[index] - int(counts[index]), ends[index])
                hidden[rows] = state[response.to(device)].to(hidden)
                labels[rows] = label[response]
                if not hidden[rows].isfinite().all():
                    raise UserError(f"{encoded[index].id}: the model's states are not finite; its weights are damaged")
            bar.update(len(members))
    sequence = torch.arange(len(encoded)).repeat_interleave(counts)
    return States(hidden, labels, sequence, [example.id for example in encoded])


def encode_alike(checkpoints: Mapping[str, Path], examples: Sequence[Example], max_length: int) -> list[Encoded]:
    """The examples' tokens, which must be the same by every checkpoint's own tokenizer and chat template.

    Raises UserError naming two checkpoints and what differs.
    """
    (first, first_path), *others = checkpoints.items()
    tokenizer = load_tokenizer(first_path)
    encoded, _ = encode_all(tokenizer, examples, max_length)
    for policy, path in others:
        other = load_tokenizer(path)
        difference = tokenizer_difference(tokenizer, other)
        if difference is None:
            pairs = zip(encoded, encode_all(other, examples, max_length)[0], strict=False)
            clash = next((ours.id for ours, theirs in pairs if ours != theirs), None)
            difference = f"they split example {clash!r} into different tokens" if clash else None
        if difference:
            raise UserError(
                f"{path}: the tokenizer of {policy} differs from that of {first} ({first_path}): {difference};"
                " only checkpoints that share one can be compared"
            )
    return encoded


def tokenizer_difference(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    """What differs between two tokenizers: a token's id, the chat template or the end token; None if nothing does."""
    vocabulary_a, vocabulary_b = a.get_vocab(), b.get_vocab()
    if vocabulary_a != vocabulary_b:
        odd = sorted(set(vocabulary_a.items()) ^ set(vocabulary_b.items()), key=lambda item: (item[1], item[0]))
        token = odd[0][0]
        return f"token {token!r} has id {vocabulary_b.get(token)} instead of {vocabulary_a.get(token)}"
    if a.chat_template != b.chat_template:
        return "the chat templates are not the same text"
    if a.eos_token_id != b.eos_token_id:
        return f"the end token is {b.eos_token!r} instead of {a.eos_token!r}"
    return None
