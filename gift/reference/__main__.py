"""Scoring a recipe's data with its base model, ahead of training.

    python -m gift.reference score RECIPE [key=value ...]

Training with reference.mode=cached scores by itself what is not there yet; this command is for scoring on another
machine, with a smaller beta than the recipe's (one cache then serves a whole sweep), or to see what a tolerance costs.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from gift.cli import UserError, run_command
from gift.distributed import init_distributed, quiet_libraries
from gift.materials import base_folder, subsets_of, tokens_of
from gift.models import device, load_model, load_tokenizer
from gift.recipe import Recipe, load_recipe
from gift.records import sha256_weights
from gift.reference.cache import Demand, demands_of, key_of, scored_subsets
from gift.reference.scoring import cache_home, score
from gift.steps import announce
from gift.templates import apply_template


def score_recipe(recipe: Recipe, demands: Mapping[str, Demand], root: Path) -> bool:
    """Scores what stage 1 of the recipe trains on, once for each objective; whether the budget sufficed for all."""
    base = base_folder(recipe)
    tokenizer = load_tokenizer(base)
    if recipe.data.template is not None:
        apply_template(tokenizer, recipe.data.template)
    names, (subsets, _) = scored_subsets(recipe), subsets_of(recipe)
    encoded = [one for name in names for one in tokens_of(name, subsets[name], tokenizer, recipe.data.max_length)]
    examples = [example for name in names for example in subsets[name]]
    key = key_of(recipe, tokenizer, examples, encoded, sha256_weights(base))
    complete = True
    for objective, demand in demands.items():
        cache = score(
            lambda: load_model(base, dtype=recipe.engine.dtype).to(device()),
            encoded,
            demand,
            key=key,
            budget_bytes=recipe.reference.budget_gb * 1e9,
            micro_tokens=recipe.engine.micro_tokens,
            root=root,
        )
        complete = complete and cache is not None
        if cache is not None:
            announce(f"\n{objective}: {cache.info.summary()}\ncache: {cache.folder}")
    return complete


def positive_number(text: str) -> float:
    """A finite number above 0, as an argparse type."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gift.reference",
        description=(
            "Store what the base model says about every response token of a recipe's stage-1 data, for all methods of"
            " the recipe that need the base (gift, kd, asft). Training with reference.mode=cached then loads no base."
        ),
        epilog="Example: python -m gift.reference score nano --beta 1",
    )
    parser.add_argument("command", choices=["score"], help="score the data with the base model, once")
    parser.add_argument("recipe", help="a recipe's name (nano) or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, e.g. data.sft=256")
    parser.add_argument(
        "--beta", type=float, metavar="SMALLEST", help="also serve GIFT at this beta, and so at every larger one"
    )
    parser.add_argument(
        "--tolerance",
        type=positive_number,
        metavar="T",
        help="largest total-variation error of a token's target (default: the recipe's reference.tolerance)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where caches are kept, each in a folder named by its content (default: where training looks for them)",
    )
    arguments = parser.parse_intermixed_args(argv)

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    demands = demands_of(recipe, beta=arguments.beta, tolerance=arguments.tolerance)
    if not demands:
        raise UserError(f"{arguments.recipe}: none of its methods needs the base model; give --beta to score for GIFT")
    quiet_libraries()
    if recipe.engine.threads is not None:
        torch.set_num_threads(recipe.engine.threads)
    init_distributed()
    return 0 if score_recipe(recipe, demands, arguments.out or cache_home()) else 1


if __name__ == "__main__":
    run_command(main)
