"""What a recipe starts from: the base model's folder, the three disjoint subsets of problems, and their tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from gift import nano
from gift.batches import Encoded
from gift.cli import UserError
from gift.data import Example, encode_all, load_examples, split
from gift.models import check_checkpoint, download, is_local, load_config, load_tokenizer, stored_end_ids
from gift.recipe import Recipe
from gift.records import atomic_path
from gift.steps import announce
from gift.templates import apply_template

SUBSETS = ("sft", "rl", "validation")
INDEX = "model.safetensors.index.json"


def base_folder(recipe: Recipe) -> Path:
    """The recipe's base model: a folder on this machine, made or downloaded if it has to be.

    Raises UserError where it is not a checkpoint, where the tokenizer has tokens that the model does not know, or where
    responses would be trained to end with another token than generation stops at.
    """
    base = recipe.base
    if base.model == "nano":
        folder = nano.prepare_base(base.pretrain, recipe.engine)
    elif is_local(base.model):
        folder = Path(base.model).expanduser().resolve()
    else:
        folder = download(base.model, base.revision)
    check_checkpoint(folder)
    tokenizer, ends = load_tokenizer(folder), stored_end_ids(folder)
    largest, rows = max(tokenizer.get_vocab().values()), load_config(folder).get_text_config().vocab_size
    if largest >= rows:
        raise UserError(
            f"{folder}: the tokenizer has a token {largest}, the model embeds {rows} (from 0); resize the model's"
            " embeddings, or remove the tokens that were added"
        )
    end = tokenizer.eos_token_id
    if end not in ends:
        raise UserError(
            f"{folder}: responses are trained to end with token {end} (the tokenizer's eos_token), but"
            f" generation ends at {ends}; make eos_token_id in generation_config.json and the tokenizer agree"
        )
    return folder


def with_template(checkpoint: Path, template: str, folder: Path) -> None:
    """Makes `folder` the same checkpoint, its weights by link, with a named template in its tokenizer."""
    tokenizer = load_tokenizer(checkpoint)
    apply_template(tokenizer, template)
    with atomic_path(folder) as scratch:
        tokenizer.save_pretrained(scratch)
        for file in checkpoint.iterdir():
            if file.suffix == ".safetensors" or file.name in ("config.json", "generation_config.json", INDEX):
                os.symlink(file.resolve(), scratch / file.name)


def subsets_of(recipe: Recipe) -> tuple[dict[str, list[Example]], str | None]:
    """The recipe's disjoint subsets by name ('rl' is empty where no method has a stage 2), and the data's revision."""
    sizes = {name: getattr(recipe.data, name) for name in SUBSETS}
    joint = any(method.data == "joint" for method in recipe.methods.values())
    if not joint and all(recipe.rl_of(name) is None for name in recipe.methods):
        sizes["rl"] = 0
    if recipe.data.source == "nano":
        return split(nano.training_problems(sum(sizes.values()), recipe.seed), sizes, recipe.seed), None
    loaded = load_examples(recipe.data)
    if loaded.unusable:
        announce(f"  {recipe.data.source}: {loaded.unusable} rows without prompt, response or answer left out")
    return split(loaded.examples, sizes, recipe.seed), loaded.revision


def tokens_of(
    name: str, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Encoded]:
    """The examples as tokens; says how many were cut or left out."""
    encoded, taken = encode_all(tokenizer, examples, max_length)
    if taken.cut or taken.dropped:
        announce(f"  {name}: {taken}")
    return encoded
