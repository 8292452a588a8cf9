"""Recipe files: where they are, how several make one recipe, and `key=value` changes from the command line."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from gift.cli import UserError, nearest
from gift.objectives import resolve
from gift.recipe.rules import check, in_context
from gift.recipe.schema import Recipe, RecipeFile
from gift.recipe.strict import build, check_part, leaves, merge

RECIPES = Path(__file__).parents[1] / "recipes"
NEEDED = ("base", "data", "methods")
TAG = "tag:yaml.org,2002:"


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a name, a YAML file or several of either joined by `+` stand for, with `key=value` overrides.

    Files are merged mapping by mapping, each over those it extends and those named before it; one that comes up twice
    counts once, where it came up first. Overrides have dotted keys and YAML values, and replace. A method that is null
    in the end is none.

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
        tree["methods"] = {name: method for name, method in tree["methods"].items() if method is not None}
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
    """YAML in which some traps of YAML 1.1 are errors.

    A key that stands twice in one mapping (PyYAML would take the last), a key such as `on` or `yes`, which means true,
    and an integer such as 0100, which is octal.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node. Raises ConstructorError naming the key, with its line."""
        marks: dict[str, yaml.Mark] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            key, mark = key_node.value, key_node.start_mark
            if key_node.tag == f"{TAG}bool":
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is a truth value: quote it", mark)
            if key in marks:
                raise yaml.constructor.ConstructorError(None, marks[key], f"key {key!r} stands twice", mark)
            marks[key] = mark
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        """The integer of a node. Raises ConstructorError where it is octal, which nobody means."""
        text = node.value.lstrip("+-").replace("_", "")
        if text.startswith("0") and text[1:].isdigit():
            problem = f"{node.value} is octal: leave out the leading 0, or quote it if it is a name"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return self.construct_yaml_int(node)


StrictLoader.add_constructor(f"{TAG}int", StrictLoader.construct_integer)


def fault(error: yaml.YAMLError | ValueError) -> str:
    """What is wrong with a file, and in which lines."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    lines = sorted({mark.line + 1 for mark in (error.context_mark, error.problem_mark) if mark is not None})
    where = f"line{'s' * (len(lines) > 1)} {' and '.join(map(str, lines))}"
    return f"{' '.join(filter(None, (error.context, error.problem)))} ({where})"


def read_layer(path: Path) -> dict[str, Any]:
    """What a recipe file says, not yet joined with what it extends. Raises UserError as `load_recipe` does."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except (yaml.YAMLError, ValueError) as error:  # the latter of a date or of bytes that are none
        raise UserError(f"{path}: not valid YAML: {fault(error)}") from None
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


def parse_override(override: str) -> tuple[str, Any]:
    """The dotted key and the value of `key=value`. Raises UserError for anything else."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r}: an override is key=value, such as init.optimizer.lr=1e-5")
    try:
        return key, yaml.load(text, StrictLoader)
    except yaml.constructor.ConstructorError as error:
        raise UserError(f"{override!r}: {error.problem}") from None
    except (yaml.YAMLError, ValueError):
        raise UserError(f"{override!r}: {text!r} is not a YAML value; quote it") from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets the dotted key of `key=value` in the tree. Raises UserError for anything else."""
    key, value = parse_override(override)
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"{override!r}: {parent!r} has no keys below it")
        node[parent] = dict(child)  # a YAML alias is one mapping in two places: change it in this one alone
        node = node[parent]
    if parents == ["methods"] and value is None and last not in node:
        raise UserError(f"{override!r}: there is no method {last!r} to take away{nearest(last, node)}")
    node[last] = value


def shadowed(recipe: Recipe, overrides: Sequence[str]) -> list[str]:
    """What to tell a user of overrides of `init` and `rl` where some method has a value of its own: a line each.

    `overrides` are those that the recipe was loaded with.
    """
    given = dict(map(parse_override, overrides))
    found = []
    for key in (key for override, value in given.items() for key, _ in leaves(value, override)):
        stage, _, setting = key.partition(".")
        shared = {"init": recipe.init, "rl": recipe.rl}.get(stage)
        if shared is None or not setting:
            continue
        value_of = functools.partial(functools.reduce, getattr, setting.split("."))
        for name in recipe.methods:
            own = recipe.init_of(name) if stage == "init" else recipe.rl_of(name)
            place = f"methods.{name}.{key}"
            meant = any(f"{place}.".startswith(f"{override}.") for override in given)
            if own is not None and value_of(own) != value_of(shared) and not meant:
                values = inline(value_of(shared)), inline(value_of(own))
                found.append(f"{key}={values[0]} does not reach {name}, which has {values[1]}: set {place} as well")
    return found


def inline(value: Any) -> str:
    """A value as an override has it: YAML in one line."""
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=math.inf)
    return text.strip().removesuffix("\n...")


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
