"""Recipe files: where they are, how several make one recipe, and `key=value` changes from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from gift.cli import UserError, nearest
from gift.objectives import resolve
from gift.recipe.rules import check, in_context
from gift.recipe.schema import Recipe, RecipeFile
from gift.recipe.strict import build, check_part, merge

RECIPES = Path(__file__).parents[1] / "recipes"
NEEDED = ("base", "data", "methods")


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a name, a YAML file or several of either joined by `+` stand for, with `key=value` overrides.

    Files are merged mapping by mapping, each over those it extends and those named before it; one that comes up twice
    counts once, where it came up first. Overrides have dotted keys and YAML values, and replace.

    Raises UserError naming file and key for an unknown key (with the nearest known one), a missing key, a key given
    twice, a value of the wrong type, values that make no sense together, and a file that is missing or not YAML.
    """
    named = [find_recipe(part) for part in parts_of(name)]
    source = str(named[0]) if len(named) == 1 else name
    tree: dict[str, Any] = {}
    for layer in layers(named).values():
        tree = merge(tree, layer)
    tree.setdefault("name", "+".join(path.stem for path in named))
    for override in overrides:
        apply_override(tree, override)
    check_part(RecipeFile, tree, source)
    if lacking := [key for key in NEEDED if key not in tree]:
        keys = f"key{'s' * (len(lacking) > 1)} {', '.join(map(repr, lacking))}"
        raise UserError(f"{source}: missing {keys}; add what is missing, or join recipes with a +, such as nano+gift")
    with in_context(source):
        set_options(tree)
    recipe = build(Recipe, tree, source)
    check(recipe, source)
    return recipe


# ---------------------------------------------------------------------------------------------------------------------
# Finding


def recipes() -> dict[str, str]:
    """The names of the recipes that come with the suite, in order, with the first line of their comment."""
    return {name: path.read_text(encoding="utf-8").partition("\n")[0].strip("# ") for name, path in known().items()}


def known() -> dict[str, Path]:
    """The files of the recipes that come with the suite, by name: a file's name without its folder."""
    return {path.stem: path for path in sorted(RECIPES.rglob("*.yaml"))}


def parts_of(name: str) -> list[str]:
    """The recipes that a command's argument names: parts joined by `+`, unless it is a file with a + in its name."""
    return [name] if Path(name).is_file() else name.split("+")


def find_recipe(name: str, folder: Path = Path()) -> Path:
    """The file of a recipe given by its path, relative to `folder`, or by its name.

    Raises UserError naming the nearest recipe.
    """
    if Path(name).suffix in {".yaml", ".yml"}:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such recipe file")
        return folder / name
    if name not in known():
        raise UserError(f"no recipe {name!r}{nearest(name, known())}; give a YAML file or one of: {', '.join(known())}")
    return known()[name]


# ---------------------------------------------------------------------------------------------------------------------
# Reading and composing


class StrictLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice in one mapping is an error; PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node. Raises ConstructorError naming key and line."""
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in lines:
                problem = f"key {key!r} in line {line} stands in line {lines[key]} already"
                raise yaml.constructor.ConstructorError(None, None, problem, None)
            lines[key] = line
        return super().construct_mapping(node, deep)


def read_layer(path: Path) -> dict[str, Any]:
    """What a recipe file says, not yet joined with what it extends. Raises UserError as `load_recipe` does."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    check_part(RecipeFile, tree, str(path))
    layer: dict[str, Any] = tree
    return layer


def layers(named: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """The trees of these files and all they extend, in the order in which they are merged.

    Raises UserError where files extend each other in a circle.
    """
    done: dict[Path, dict[str, Any]] = {}

    def add(path: Path, above: tuple[Path, ...]) -> None:
        if path.resolve() in [other.resolve() for other in above]:
            raise UserError(f"{path}: extends itself ({' -> '.join(other.stem for other in (*above, path))})")
        if path.resolve() in done:
            return
        tree = read_layer(path)
        extended = tree.pop("extends", ())
        for name in [extended] if isinstance(extended, str) else extended:
            with in_context(f"{path}: extends"):
                parent = find_recipe(name, path.parent)
            add(parent, (*above, path))
        done[path.resolve()] = tree

    for path in named:
        add(path, ())
    return done


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets the dotted key of `key=value` in the tree. Raises UserError for anything else."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r}: an override is key=value, such as init.optimizer.lr=1e-5")
    try:
        value = yaml.load(text, StrictLoader)
    except yaml.YAMLError:
        raise UserError(f"{override!r}: {text!r} is not a YAML value; quote it") from None
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"{override!r}: {parent!r} has no keys below it")
        node[parent] = dict(child)  # a YAML alias is one mapping in two places: change it in this one alone
        node = node[parent]
    node[last] = value


def set_options(tree: dict[str, Any]) -> None:
    """Gives every method the options that `objectives` has for its objective and the method does not set itself.

    Raises UserError for an unknown objective and for options it does not have.
    """
    defaults = tree.pop("objectives", {})
    for objective, options in defaults.items():
        with in_context(f"objectives.{objective}"):
            resolve(objective, options)
    tree["methods"] = {
        name: {**method, "options": {**defaults.get(method.get("objective"), {}), **method.get("options", {})}}
        for name, method in tree["methods"].items()
    }
