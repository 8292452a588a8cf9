"""A run's recipe: typed, strict, made of YAML files and `key=value` overrides."""

from gift.recipe.files import RECIPES, find_recipe, inline, load_recipe, recipes, shadowed
from gift.recipe.rules import check, rl_warnings
from gift.recipe.schema import (
    RL,
    Base,
    Data,
    Drift,
    Engine,
    Eval,
    Generation,
    Init,
    LoRA,
    Luffy,
    Method,
    Optimizer,
    Pretrain,
    Recipe,
    Reference,
    Relift,
)
from gift.recipe.strict import as_tree, build, leaves

__all__ = [
    "RECIPES",
    "RL",
    "Base",
    "Data",
    "Drift",
    "Engine",
    "Eval",
    "Generation",
    "Init",
    "LoRA",
    "Luffy",
    "Method",
    "Optimizer",
    "Pretrain",
    "Recipe",
    "Reference",
    "Relift",
    "as_tree",
    "build",
    "check",
    "find_recipe",
    "inline",
    "leaves",
    "load_recipe",
    "recipes",
    "rl_warnings",
    "shadowed",
]
