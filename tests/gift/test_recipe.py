"""Recipes: every mistake is named, overrides do what they say, and a resolved recipe is itself a recipe."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gift import recipe as recipes
from gift.cli import UserError
from gift.recipe import Engine, Init, Optimizer, Recipe, as_tree, build, load_recipe
from gift.records import sha256_json

BASE = """
base: {model: ./base}
data: {source: data.jsonl, sft: 256}
methods:
  sft: {objective: sft, label: SFT}
  gift: {objective: gift, label: GIFT, options: {beta: 20.0}}
init: {optimizer: {lr: 1e-5}}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(BASE)
    return path


def error_of(path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_recipe(str(path), overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def test_the_embedded_recipe_loads():
    recipe = load_recipe("nano")
    assert (recipe.name, recipe.base.model, recipe.data.source) == ("nano", "nano", "nano")
    assert set(recipe.methods) == {"sft", "gift"}


def test_defaults_are_the_papers(file):
    recipe = load_recipe(str(file))
    assert recipe.name == "mine"
    assert recipe.init == Init(epochs=6, batch_size=128, optimizer=Optimizer(lr=1e-5))
    assert recipe.rl is not None
    assert (recipe.rl.group_size, recipe.rl.batch_size, recipe.rl.optimizer.lr) == (8, 128, 1e-6)


def test_numbers_that_yaml_takes_for_text(file):
    recipe = load_recipe(str(file), ["init.optimizer.lr=3e-6", "methods.gift.options.beta=inf", "rl.temperature=1"])
    assert recipe.init.optimizer.lr == 3e-6
    assert recipe.methods["gift"].options["beta"] == math.inf
    assert load_recipe(str(file), ["methods.gift.options.beta=.inf"]).methods["gift"].options["beta"] == math.inf
    assert recipe.rl is not None
    assert type(recipe.rl.temperature) is float


def test_overrides(file):
    recipe = load_recipe(
        str(file),
        ["rl=null", "name=other", "seed=3", "eval.suites=[math, nano]", "init.optimizer.betas=[0.9, 0.99]",
         "methods.kd={objective: sft, label: KD}", "base.revision=main"],
    )  # fmt: skip
    assert (recipe.rl, recipe.name, recipe.seed, recipe.base.revision) == (None, "other", 3, "main")
    assert recipe.eval.suites == ("math", "nano")
    assert recipe.init.optimizer.betas == (0.9, 0.99)
    assert recipe.methods["kd"].label == "KD"
    assert recipe.methods["sft"].label == "SFT"


def test_the_last_of_two_overrides_holds(file):
    assert load_recipe(str(file), ["seed=1", "seed=2"]).seed == 2


def test_an_override_changes_one_place_of_a_yaml_alias(file):
    file.write_text(BASE.replace("{lr: 1e-5}", "&adam {lr: 1e-5}") + "rl: {optimizer: *adam}\n")
    recipe = load_recipe(str(file), ["rl.optimizer.lr=1e-6"])
    assert recipe.rl is not None
    assert (recipe.init.optimizer.lr, recipe.rl.optimizer.lr) == (1e-5, 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def parts_of(kind, key=""):
    """Every dataclass of a recipe with the dotted key at which it stands."""
    yield key, kind
    for name, hint in recipes.typing.get_type_hints(kind).items():
        for option in (hint, *recipes.typing.get_args(hint)):
            if dataclasses.is_dataclass(option) and recipes.typing.get_origin(hint) is not dict:
                yield from parts_of(option, f"{key}.{name}".lstrip("."))


SECTIONS = [*dict(parts_of(Recipe)), "methods.gift"]


@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_key_is_named_in_every_section(file, section):
    key = f"{section}.zzz".lstrip(".")
    assert error_of(file, f"{key}=1") == f"{file}: unknown key '{key}'"


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("sed", "seed"),
        ("rl.group_sizes", "group_size"),
        ("init.optimizer.learning_rte", None),
        ("data.maxlength", "max_length"),
    ],
)
def test_the_nearest_key_is_named(file, key, known):
    hint = f" (did you mean '{known}'?)" if known else ""
    assert error_of(file, f"{key}=1") == f"{file}: unknown key '{key}'{hint}"


def test_a_key_that_is_no_text_is_named(file):
    file.write_text(BASE + "3: 4\n")
    assert error_of(file) == f"{file}: unknown key '3'"


@pytest.mark.parametrize(
    "key",
    [
        "base",
        "data",
        "methods",
        "base.model",
        "data.source",
        "methods.sft.objective",
        "methods.sft.label",
        "init.optimizer.lr",
    ],
)
def test_a_missing_key_is_named(file, key):
    tree = yaml.safe_load(BASE)
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        node = node[parent]
    del node[last]
    file.write_text(yaml.safe_dump(tree))
    assert error_of(file) == f"{file}: missing key '{key}'"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1.0", "seed must be int, got 1.0"),
        ("seed=true", "seed must be int, got True"),
        ("seed=null", "seed must be int, got None"),
        ("seed=", "seed must be int, got None"),
        ("name=3", "name must be str, got 3"),
        ("init.optimizer.lr=fast", "init.optimizer.lr must be float, got 'fast'"),
        ("init.optimizer.lr=true", "init.optimizer.lr must be float, got True"),
        ("init.optimizer.lr=nan", "init.optimizer.lr must be float, got 'nan'"),
        ("rl.temperature=[1]", "rl.temperature must be float, got [1]"),
        ("methods.gift.options.beta=x", "methods.gift.options.beta must be float, got 'x'"),
        ("methods.gift.options=20", "methods.gift.options must be a mapping of keys to values, got 20"),
        ("methods=[sft]", "methods must be a mapping of keys to values, got ['sft']"),
        ("methods.sft=sft", "methods.sft must be a mapping of keys to values, got 'sft'"),
        ("data=nano", "data must be a mapping of keys to values, got 'nano'"),
        ("init.optimizer.betas=[0.9]", "init.optimizer.betas must be a list of 2, got [0.9]"),
        ("init.optimizer.betas=[0.9, x]", "init.optimizer.betas[1] must be float, got 'x'"),
        ("eval.suites=math", "eval.suites must be a list, got 'math'"),
        ("eval.suites=[1]", "eval.suites[0] must be str, got 1"),
        ("eval.limit=all", "eval.limit must be int, got 'all'"),
        ("engine.zero_stage=4", "engine.zero_stage is 4; options: 0, 1, 2"),
        ("engine.zero_stage=true", "engine.zero_stage is True; options: 0, 1, 2"),
        ("engine.zero_stage=1.0", "engine.zero_stage is 1.0 (did you mean '1'?); options: 0, 1, 2"),
        ("engine.dtype=bf16", "engine.dtype is 'bf16' (did you mean 'bfloat16'?); options: bfloat16, float32"),
        ("engine.dtype=float3", "engine.dtype is 'float3' (did you mean 'float32'?); options: bfloat16, float32"),
    ],
)
def test_a_wrong_type_names_file_key_and_value(file, override, message):
    assert error_of(file, override) == f"{file}: {message}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("methods={}", "methods is empty"),
        ("methods.base={objective: sft, label: x}", "methods.base: a method's name"),
        ("methods.a-b={objective: sft, label: x}", "methods.a-b: a method's name"),
        ("methods.sft.objective=gft", "methods.sft: unknown objective 'gft' (did you mean 'gift'?)"),
        ("methods.gift.options.bta=1", "methods.gift: objective 'gift' has no option 'bta' (did you mean 'beta'?)"),
        ("methods.gift.options.beta=-1", "methods.gift: beta must be"),
        ("name=a/b", "name 'a/b' must be usable as a folder's name"),
        ("name=..", "name '..' must be usable as a folder's name"),
        ("name=''", "name '' must be usable as a folder's name"),
        ("data.sft=100", "data.sft is smaller than init.batch_size"),
        ("data.rl=100", "data.rl is smaller than rl.batch_size"),
        ("data.source=nano", "data.source and base.model: both nano or neither"),
        ("rl.group_size=1", "rl.group_size must be at least 2"),
        ("rl.updates_per_batch=3", "rl.batch_size must be a multiple of rl.updates_per_batch"),
        ("rl.dual_clip=0.5", "rl.dual_clip must be above 1, or 0"),
        ("rl.clip_low=1.5", "rl.clip_low must lie in [0, 1]"),
    ],
)
def test_values_that_make_no_sense_together(file, override, message):
    assert error_of(file, override).startswith(f"{file}: {message}")


@pytest.mark.parametrize("key", recipes.POSITIVE)
def test_sizes_and_rates_are_positive(file, key):
    for value in ("0", "-1"):
        assert error_of(file, f"{key}={value}") == f"{file}: {key} must be positive, got {value}" + ".0" * (
            key.endswith(("lr", "temperature"))
        )


def test_an_infinite_rate_is_refused(file):
    assert error_of(file, "rl.optimizer.lr=inf") == f"{file}: rl.optimizer.lr must be positive, got inf"


@pytest.mark.parametrize("settings", [["heads=3"], ["heads=4", "hidden=36"], ["documents=5"]])
def test_a_base_that_cannot_be_made_is_refused(settings):
    assert "base.pretrain." in error_of("nano", *(f"base.pretrain.{setting}" for setting in settings))


@pytest.mark.parametrize("override", ["seed", "=1", "seed=[1", "base.model.x=1"])
def test_a_malformed_override_is_named(file, override):
    assert error_of(file, override).startswith(repr(override))


def test_files_that_are_no_recipes(tmp_path):
    assert error_of("nan") == "no recipe 'nan' (did you mean 'nano'?); give a YAML file or one of: " + ", ".join(
        sorted(path.stem for path in recipes.RECIPES.glob("*.yaml"))
    )
    assert error_of(tmp_path / "absent.yaml") == f"{tmp_path}/absent.yaml: no such recipe file"
    for name, content, message in [
        ("list.yaml", "- a", "a recipe is a mapping of keys to values, this is list"),
        ("empty.yaml", "", "a recipe is a mapping of keys to values, this is NoneType"),
        ("broken.yaml", "a: [1\nb: 2", "not valid YAML: "),
        ("tagged.yaml", "a: !!python/object:os.system {}", "not valid YAML: "),
    ]:
        (tmp_path / name).write_text(content)
        assert error_of(tmp_path / name).startswith(f"{tmp_path / name}: {message}")


# ---------------------------------------------------------------------------------------------------------------------
# A resolved recipe is itself a recipe

FLOATS = st.floats(allow_nan=False) | st.sampled_from([1e-5, math.inf, -math.inf, 1e300, 5e-324])
OPTIMIZERS = st.builds(
    Optimizer, lr=FLOATS, schedule=st.sampled_from(["constant", "cosine"]), betas=st.tuples(FLOATS, FLOATS)
)
RECIPES = st.builds(
    Recipe,
    name=st.text(),
    base=st.builds(recipes.Base, model=st.text(), revision=st.none() | st.text()),
    data=st.builds(recipes.Data, source=st.text(), sft=st.integers()),
    methods=st.dictionaries(
        st.text(),
        st.builds(
            recipes.Method, objective=st.text(), label=st.text(), options=st.dictionaries(st.text(), FLOATS, max_size=2)
        ),
        max_size=3,
    ),
    seed=st.integers(),
    engine=st.builds(Engine, zero_stage=st.sampled_from([0, 1, 2])),
    init=st.builds(Init, optimizer=OPTIMIZERS),
    rl=st.none() | st.builds(recipes.RL, optimizer=OPTIMIZERS, temperature=FLOATS),
    eval=st.builds(recipes.Eval, suites=st.lists(st.text(), max_size=2).map(tuple), limit=st.none() | st.integers()),
)


@given(RECIPES)
def test_a_resolved_recipe_survives_yaml_and_json(recipe):
    tree = as_tree(recipe)
    for copy in (yaml.safe_load(yaml.safe_dump(tree)), json.loads(json.dumps(tree, allow_nan=False))):
        again = build(Recipe, copy, "copy.yaml", "")
        assert again == recipe
        assert as_tree(again) == tree
        assert sha256_json(as_tree(again)) == sha256_json(tree)


def test_the_resolved_embedded_recipe_loads_as_a_file(tmp_path):
    recipe = load_recipe("nano", ["methods.gift.options.beta=inf"])
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(as_tree(recipe)))
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe
