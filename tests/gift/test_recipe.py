"""Recipes: every mistake is named, overrides do what they say, and a resolved recipe is itself a recipe."""

from __future__ import annotations

import dataclasses
import json
import math
import typing

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gift import recipe as schema
from gift.cli import UserError
from gift.recipe import RECIPES, Engine, Init, Optimizer, Recipe, as_tree, build, find_recipe, load_recipe, recipes
from gift.recipe.rules import NOT_NEGATIVE, POSITIVE
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
    """Appendix E; KL, dual clip and aggregation: verl 0.4."""
    recipe = load_recipe(str(file))
    assert recipe.name == "mine"
    assert recipe.init == Init(epochs=6, batch_size=128, optimizer=Optimizer(lr=1e-5))
    assert recipe.rl is not None
    assert (recipe.rl.group_size, recipe.rl.batch_size, recipe.rl.optimizer.lr) == (8, 128, 1e-6)
    assert (recipe.rl.kl_coef, recipe.rl.dual_clip, recipe.rl.aggregation) == (0, 3, "token_mean")


def test_one_key_of_a_part_leaves_its_other_defaults(file):
    recipe = load_recipe(str(file), ["rl.optimizer.lr=2e-6", "rl.relift.optimizer.max_grad_norm=0.5", "lora.rank=8"])
    assert recipe.rl is not None
    assert recipe.rl.optimizer == Optimizer(lr=2e-6, betas=(0.9, 0.999))
    assert recipe.rl.relift.optimizer == Optimizer(lr=1e-6, betas=(0.9, 0.999), max_grad_norm=0.5)
    assert recipe.lora == schema.LoRA(rank=8)


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
    for name, hint in typing.get_type_hints(kind).items():
        for option in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(option) and typing.get_origin(hint) is not dict:
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
        "methods.sft.label",
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
    hint = "; add what is missing, or join recipes with a +, such as nano+gift" if key == last else ""
    assert error_of(file) == f"{file}: missing key '{key}'{hint}"


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
        ("methods.gift.options.beta=[1]", "methods.gift.options.beta must be a number or a name, got [1]"),
        ("methods.gift.options.beta=null", "methods.gift.options.beta must be a number or a name, got None"),
        (
            "methods.sft.label=off",
            "methods.sft.label must be str, got False; quote it: YAML takes on, off, yes and no for truth values",
        ),
        ("methods.gift.options=20", "methods.gift.options must be a mapping of keys to values, got 20"),
        ("methods=[sft]", "methods must be a mapping of keys to values, got ['sft']"),
        ("methods.sft=sft", "methods.sft must be a mapping of keys to values, got 'sft'"),
        ("data=nano", "data must be a mapping of keys to values, got 'nano'"),
        ("init.optimizer.betas=[0.9]", "init.optimizer.betas must be a list of 2, got [0.9]"),
        ("init.optimizer.betas=[0.9, x]", "init.optimizer.betas[1] must be float, got 'x'"),
        ("eval.suites=math", "eval.suites must be a list, got 'math'"),
        ("eval.suites=[1]", "eval.suites[0] must be str, got 1"),
        ("eval.limit=all", "eval.limit must be int, got 'all'"),
        ("engine.zero_stage=4", "engine.zero_stage is 4; options: 0, 1, 2, 3"),
        ("engine.zero_stage=true", "engine.zero_stage is True; options: 0, 1, 2, 3"),
        ("engine.zero_stage=1.0", "engine.zero_stage is 1.0 (did you mean '1'?); options: 0, 1, 2, 3"),
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
        ("methods.gift.options.beta=-1", "methods.gift: option 'beta' of objective 'gift' must be"),
        ("methods.gift.options.beta=x", "methods.gift: option 'beta' of objective 'gift' must be a number, got 'x'"),
        ("methods.gift.options.beta=nan", "methods.gift: option 'beta' of objective 'gift' must be a number"),
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
        ("rl.importance_cap=0.5", "rl.importance_cap must be at least 1, or 0 to turn it off"),
        ("rl.luffy.demonstrations=8", "rl.luffy.demonstrations must be below rl.group_size"),
        ("methods.sft.label=''", "methods.sft.label is empty"),
        ("methods.sft.label=' '", "methods.sft.label is empty"),
        ("methods.gift.label=SFT", "methods.gift.label 'SFT' is that of methods.sft already"),
        ("methods.gift.label='SFT '", "methods.gift.label 'SFT' is that of methods.sft already"),
        ("init.select_epoch=7", "init.select_epoch is 7, but init.epochs is 6"),
        ("init.updates_per_batch=3", "init.batch_size must be a multiple of init.updates_per_batch"),
        ("init.optimizer.betas=[0.9, 1.0]", "init.optimizer.betas must lie in [0, 1)"),
        ("engine={zero_stage: 2, offload: all}", "engine.offload all needs zero_stage 3, not 2"),
        ("engine={zero_stage: 0, offload: optimizer}", "engine.offload needs zero_stage 1, 2 or 3"),
        ("engine={dtype: float32, master_dtype: bfloat16}", "engine.master_dtype bfloat16 needs dtype bfloat16"),
        ("engine={dtype: float32, attention: flash_attention_2}", "engine.attention flash_attention_2 needs dtype"),
        ("data.answer=null", "data.answer is null, but RL rewards answers: set methods.sft.rl to null"),
        ("reference.tolerance=1", "reference.tolerance must lie between 0 and 1"),
        ("lora={targets: []}", "lora.targets is empty"),
        ("methods.sft={label: SFT, rl: null}", "methods.sft: neither an objective nor RL"),
        ("methods.sft={label: SFT, options: {beta: 1}}", "methods.sft.options: there is no objective"),
        ("methods.sft={label: SFT, init: {epochs: 1}}", "methods.sft.init: there is no objective"),
    ],
)
def test_values_that_make_no_sense_together(file, override, message):
    assert error_of(file, override).startswith(f"{file}: {message}")


def keys_in(ranges):
    return [f"{key}.{name}" for key, kind in parts_of(Recipe) for name in ranges.get(kind, ())]


@pytest.mark.parametrize("key", keys_in(POSITIVE))
def test_sizes_and_rates_are_positive(file, key):
    for value in ("0", "-1"):
        message = error_of(file, f"{key}={value}")
        assert message in (f"{file}: {key} must be positive, got {number}" for number in (value, f"{value}.0"))


@pytest.mark.parametrize("key", keys_in(NOT_NEGATIVE))
def test_weights_are_not_negative(file, key):
    assert error_of(file, f"{key}=-1").startswith(f"{file}: {key} must not be negative, got -1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("init={epoch: 1}", "unknown key 'methods.gift.init.epoch' (did you mean 'epochs'?)"),
        ("init={epochs: 1.5}", "methods.gift.init.epochs must be int, got 1.5"),
        ("init={epochs: 0}", "methods.gift.init.epochs must be positive, got 0"),
        ("init={optimizer: {lr: -1}}", "methods.gift.init.optimizer.lr must be positive, got -1.0"),
        ("init={select_epoch: 9}", "methods.gift.init.select_epoch is 9, but init.epochs is 6"),
        ("init={updates_per_batch: 5}", "init.batch_size must be a multiple of methods.gift.init.updates_per_batch"),
        ("rl={optimizer: {betas: [0.9, 1]}}", "methods.gift.rl.optimizer.betas must lie in [0, 1)"),
        ("rl={luffy: {demonstrations: 9}}", "methods.gift.rl.luffy.demonstrations must be below rl.group_size"),
        ("init={batch_size: 512}", "data.sft is smaller than methods.gift.init.batch_size"),
        ("rl={algorithm: ppo}", "methods.gift.rl.algorithm is 'ppo'"),
        ("rl={group_size: 1}", "methods.gift.rl.group_size must be at least 2"),
        ("rl={batch_size: 20000}", "data.rl is smaller than methods.gift.rl.batch_size"),
        ("rl=0", "methods.gift.rl must be a mapping of keys to values, got 0"),
    ],
)
def test_what_a_method_changes_is_checked_at_load(file, change, message):
    assert error_of(file, f"methods.gift.{change}").startswith(f"{file}: {message}")


@pytest.mark.parametrize(
    ("stage", "change"), [("init", "{epochs: 1}"), ("init", "{optimizer: {lr: 1e-6}}"), ("rl", "{epochs: 2}")]
)
def test_a_shared_setting_is_not_blamed_on_the_method_that_changes_others(file, stage, change):
    subset = "sft" if stage == "init" else "rl"
    message = error_of(file, f"methods.gift.{stage}={change}", f"{stage}.batch_size=20000")
    assert message.startswith(f"{file}: data.{subset} is smaller than {stage}.batch_size")


def test_data_without_answers_serve_methods_without_rl(file):
    assert load_recipe(str(file), ["data.answer=null", "rl=null"]).data.answer is None
    no_rl = [f"methods.{name}.rl=null" for name in load_recipe(str(file)).methods]
    assert load_recipe(str(file), ["data.answer=null", *no_rl]).data.answer is None
    message = error_of(file, "data.answer=null", *no_rl[1:])
    assert message.startswith(f"{file}: data.answer is null, but RL rewards answers")


def test_what_a_method_changes_holds_for_it_alone(file):
    recipe = load_recipe(str(file), ["methods.gift.init.optimizer.lr=2e-5", "methods.sft.rl=null"])
    changed, same = recipe.init_of("gift"), recipe.init_of("sft")
    assert same == recipe.init
    assert changed == dataclasses.replace(recipe.init, optimizer=Optimizer(lr=2e-5))
    assert (recipe.rl_of("gift"), recipe.rl_of("sft")) == (recipe.rl, None)


def test_joint_data_counts_both_subsets(file):
    recipe = load_recipe(str(file), ["methods.gift.data=joint"])
    assert [recipe.problems_of("gift", stage) for stage in ("init", "rl")] == [10_256, 10_256]
    assert [recipe.problems_of("sft", stage) for stage in ("init", "rl")] == [256, 10_000]
    assert load_recipe(str(file), ["methods.gift.data=joint", "methods.gift.init.batch_size=512"])


def test_an_infinite_rate_is_refused(file):
    assert error_of(file, "rl.optimizer.lr=inf") == f"{file}: rl.optimizer.lr must be positive, got inf"


@pytest.mark.parametrize("settings", [["heads=3"], ["heads=4", "hidden=36"], ["documents=5"]])
def test_a_base_that_cannot_be_made_is_refused(settings):
    assert "base.pretrain." in error_of("nano", *(f"base.pretrain.{setting}" for setting in settings))


@pytest.mark.parametrize("override", ["seed", "=1", "seed=[1", "base.model.x=1", "name=2026-13-45"])
def test_a_malformed_override_is_named(file, override):
    assert error_of(file, override).startswith(repr(override))


def test_files_that_are_no_recipes(tmp_path):
    assert (
        error_of("nan") == f"no recipe 'nan' (did you mean 'nano'?); give a YAML file or one of: {', '.join(recipes())}"
    )
    assert error_of("nano+").startswith("no recipe ''")
    assert error_of(tmp_path / "absent.yaml") == f"{tmp_path}/absent.yaml: no such recipe file"
    for name, content, message in [
        ("list.yaml", "- a", "a recipe must be a mapping of keys to values, got ['a']"),
        ("empty.yaml", "", "a recipe must be a mapping of keys to values, got None"),
        ("broken.yaml", "a: [1\nb: 2", "not valid YAML: "),
        ("tagged.yaml", "a: !!python/object:os.system {}", "not valid YAML: "),
        ("day.yaml", "name: 2026-13-45", "not valid YAML: month must be in 1..12"),
    ]:
        (tmp_path / name).write_text(content)
        assert error_of(tmp_path / name).startswith(f"{tmp_path / name}: {message}")


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        (BASE + "seed: 1\nseed: 2\n", "seed", "lines 8 and 9"),
        (BASE.replace("{lr: 1e-5}", "{lr: 1e-5, lr: 2e-5}"), "lr", "line 7"),
        (BASE.replace("  gift:", "  sft:"), "sft", "lines 5 and 6"),
    ],
)
def test_a_key_that_stands_twice_is_named_with_its_lines(file, text, key, lines):
    file.write_text(text)
    assert error_of(file) == f"{file}: not valid YAML: key {key!r} stands twice ({lines})"


def test_a_key_that_stands_twice_in_an_override(file):
    assert error_of(file, "rl={epochs: 1, epochs: 2}") == "'rl={epochs: 1, epochs: 2}': key 'epochs' stands twice"


@pytest.mark.parametrize("word", ["on", "off", "yes", "No"])
def test_a_name_that_yaml_takes_for_a_truth_value_is_to_be_quoted(file, word):
    method = "{objective: sft, label: L}"
    file.write_text(BASE.replace("  gift:", f"  {word}: {method}\n  gift:"))
    assert error_of(file) == f"{file}: not valid YAML: key {word!r} is a truth value: quote it (line 6)"
    message = error_of("nano", f"methods={{{word}: {method}}}")
    assert message == f"'methods={{{word}: {method}}}': key {word!r} is a truth value: quote it"
    file.write_text(BASE.replace("  gift:", f"  '{word}': {method}\n  gift:"))
    assert word in load_recipe(str(file), [f"methods.{word}.rl=null"]).methods


@pytest.mark.parametrize("number", ["0100", "00", "-010", "0_1"])
def test_an_octal_integer_is_refused(file, number):
    hint = f"{number} is octal: leave out the leading 0, or quote it if it is a name"
    assert error_of(file, f"seed={number}") == f"'seed={number}': {hint}"
    file.write_text(f"{BASE}seed: {number}\n")
    assert error_of(file) == f"{file}: not valid YAML: {hint} (line 8)"


def test_integers_that_are_not_octal(file):
    for text, value in [("0", 0), ("-5", -5), ("10_000", 10_000), ("0x10", 16), ("08", None)]:
        if value is None:
            assert error_of(file, f"seed={text}") == f"{file}: seed must be int, got '08'"
        else:
            assert load_recipe(str(file), [f"seed={text}"]).seed == value
    assert load_recipe(str(file), ["base.revision='0100'"]).base.revision == "0100"


# ---------------------------------------------------------------------------------------------------------------------
# Composition


def write(folder, **files: str):
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(content)


def test_a_file_builds_upon_those_it_extends(file):
    folder = file.parent
    write(folder, quick="init: {epochs: 1, batch_size: 64}", small="init: {batch_size: 32}\nseed: 7")
    write(folder, top="extends: [mine.yaml, quick.yaml, small.yaml]\nmethods: {gift: {options: {beta: 5}}}")
    recipe = load_recipe(str(folder / "top.yaml"))
    assert (recipe.name, recipe.seed) == ("top", 7)
    assert recipe.init == Init(epochs=1, batch_size=32, optimizer=Optimizer(lr=1e-5))
    assert list(recipe.methods) == ["sft", "gift"]
    assert recipe.methods["gift"].options == {"beta": 5.0}
    assert recipe.methods["gift"].label == "GIFT"


def test_a_plus_joins_recipes_and_the_later_wins(file):
    folder = file.parent
    write(folder, a="seed: 1\nrl: {group_size: 4}", b="seed: 2\nrl: {epochs: 2}")
    recipe = load_recipe(f"{file}+{folder}/a.yaml+{folder}/b.yaml", ["rl.epochs=3"])
    assert (recipe.name, recipe.seed) == ("mine+a+b", 2)
    assert recipe.rl is not None
    assert (recipe.rl.group_size, recipe.rl.epochs) == (4, 3)
    assert load_recipe(f"{file}+{folder}/b.yaml+{folder}/a.yaml").seed == 1


def test_what_comes_up_twice_counts_once(file):
    """Or joining a recipe with one that extends the same protocol would undo what the first changed in it."""
    folder = file.parent
    write(folder, first="extends: mine.yaml\nseed: 1", second="extends: mine.yaml\ninit: {epochs: 2}")
    file.write_text(BASE + "seed: 9\n")
    assert load_recipe(f"{folder}/first.yaml+{folder}/second.yaml").seed == 1


def test_a_file_with_a_plus_in_its_name_is_one_recipe(file):
    path = file.rename(file.parent / "a+b.yaml")
    assert load_recipe(str(path)).name == "a+b"


def test_a_shipped_recipe_can_be_extended(tmp_path):
    write(tmp_path, longer="extends: nano\ninit: {epochs: 5}")
    nano, longer = load_recipe("nano"), load_recipe(str(tmp_path / "longer.yaml"))
    assert longer == dataclasses.replace(nano, name="longer", init=dataclasses.replace(nano.init, epochs=5))


def test_mistakes_in_what_is_extended(file):
    folder = file.parent
    for text, message in [
        ("extends: nan", "extends: no recipe 'nan' (did you mean 'nano'?)"),
        ("extends: gone.yaml", f"extends: {folder}/gone.yaml: no such recipe file"),
        ("extends: 3", "extends must be a name or a list, got 3"),
        ("extends: top.yaml", "extends itself (top -> top)"),
        ("extends: round.yaml", "extends itself (top -> round -> top)"),
    ]:
        write(folder, top=text, round="extends: top.yaml")
        assert error_of(folder / "top.yaml").startswith(f"{folder}/top.yaml: {message}")


def test_a_mistake_is_named_with_the_file_it_is_in(file):
    folder = file.parent
    for text, message in [
        ("sed: 1", "unknown key 'sed' (did you mean 'seed'?)"),
        ("init: {epochs: x}", "init.epochs must be int, got 'x'"),
        ("seed: 1\nseed: 1", "not valid YAML: key 'seed' stands twice (lines 1 and 2)"),
    ]:
        write(folder, part=text, top="extends: [mine.yaml, part.yaml]")
        assert error_of(folder / "top.yaml") == f"{folder}/part.yaml: {message}"
    assert error_of(f"{file}+{folder}/part.yaml+nan").startswith("no recipe 'nan'")


def test_null_takes_a_method_away(file):
    assert list(load_recipe(str(file), ["methods.sft=null"]).methods) == ["gift"]
    assert list(load_recipe("nano-all", ["methods.relift=null", "methods.luffy=null"]).methods) == [
        row for row in LABELS if row not in ("relift", "luffy")
    ]
    write(
        file.parent,
        less="extends: mine.yaml\nmethods: {gift: null}",
        back="methods: {gift: {label: G, objective: dft}}",
    )
    assert list(load_recipe(f"{file.parent}/less.yaml").methods) == ["sft"]
    assert load_recipe(f"{file.parent}/less.yaml+{file.parent}/back.yaml").methods["gift"].label == "G"
    assert error_of(file, "methods.sft=null", "methods.gift=null").startswith(f"{file}: methods is empty")
    message = error_of(file, "methods.gif=null")
    assert message == "'methods.gif=null': there is no method 'gif' to take away (did you mean 'gift'?)"


def test_extends_belongs_into_files(file):
    assert error_of(file, "extends=nano").startswith(f"{file}: unknown key 'extends'")


# ---------------------------------------------------------------------------------------------------------------------
# Options by objective


def test_options_of_an_objective_are_those_of_its_methods(file):
    file.write_text(BASE + "objectives: {gift: {beta: 7}, kd: {mix: additive}}\n")
    overrides = [
        "methods.plain={objective: gift, label: P}",
        "methods.kd={objective: kd, label: K, options: {alpha: 1}}",
    ]
    methods = load_recipe(str(file), overrides).methods
    assert methods["plain"].options == {"beta": 7.0}
    assert methods["gift"].options == {"beta": 20.0}
    assert methods["kd"].options == {"mix": "additive", "alpha": 1.0}
    assert methods["sft"].options == {}
    assert load_recipe(str(file), [*overrides, "objectives.gift.beta=8"]).methods["plain"].options == {"beta": 8.0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objectives.gft.beta=1", "objectives.gft: unknown objective 'gft' (did you mean 'gift'?)"),
        ("objectives.gift.bta=1", "objectives.gift: objective 'gift' has no option 'bta' (did you mean 'beta'?)"),
        ("objectives.gift=20", "objectives.gift must be a mapping of keys to values, got 20"),
    ],
)
def test_mistakes_in_the_options_of_an_objective(file, override, message):
    assert error_of(file, override).startswith(f"{file}: {message}")


# ---------------------------------------------------------------------------------------------------------------------
# Warnings


@pytest.mark.parametrize(
    ("changes", "warnings"),
    [
        ({}, []),
        ({"clip_high": 0.28, "kl_coef": 0.1, "kl_estimator": "k1", "dual_clip": 0.0}, []),
        ({"aggregation": "seq_sum_norm", "norm_length": 100}, []),
        ({"norm_length": 100}, ["rl.norm_length has no effect while rl.aggregation is token_mean"]),
        ({"kl_estimator": "k1"}, ["rl.kl_estimator has no effect while rl.kl_coef is 0"]),
        (
            {"clip": False, "clip_low": 0.1, "clip_high": 0.3, "dual_clip": 0.0},
            [f"rl.{name} has no effect while rl.clip is false" for name in ("clip_low", "clip_high", "dual_clip")],
        ),
        ({"algorithm": "luffy", "clip": False, "aggregation": "seq_sum_norm"}, []),
        (
            {"algorithm": "relift"},
            [
                "rl.clip is true, but ReLIFT's authors do not clip the ratio: set rl.clip to false",
                "rl.aggregation is token_mean, but ReLIFT's authors divide token losses by a constant: set"
                " rl.aggregation to seq_sum_norm",
            ],
        ),
    ],
)
def test_settings_without_effect_and_strategies_that_are_not_their_authors_are_told(changes, warnings):
    assert schema.rl_warnings(schema.RL(**changes)) == warnings


def test_no_recipe_of_the_suite_gives_a_warning():
    for name in ("qwen2.5-7b+all-rows", "llama-3.1-8b+all-rows", "nano-all"):
        recipe = load_recipe(name)
        assert [warning for row in LABELS if (rl := recipe.rl_of(row)) for warning in schema.rl_warnings(rl)] == []


@pytest.mark.parametrize(
    ("overrides", "warnings"),
    [
        (["rl.entropy_coef=0.01"], ["rl.entropy_coef=0.01 does not reach luffy, which has 0.001"]),
        (["rl={entropy_coef: 0.01, epochs: 2}"], ["rl.entropy_coef=0.01 does not reach luffy, which has 0.001"]),
        (["rl.optimizer.max_grad_norm=2"], ["rl.optimizer.max_grad_norm=2.0 does not reach luffy, which has 0.0156"]),
        (["rl.clip=true"], ["rl.clip=true does not reach luffy, which has false"]),
        (["init.updates_per_batch=2"], ["init.updates_per_batch=2 does not reach psft, which has 8"]),
        (["rl.entropy_coef=0.001"], []),
        (["rl.entropy_coef=0.01", "rl.entropy_coef=0.001"], []),
        (["rl.entropy_coef=0.01", "methods.luffy.rl.entropy_coef=0.1"], []),
        (["rl.entropy_coef=0.01", "methods.luffy.rl={algorithm: luffy, entropy_coef: 0.1}"], []),
        (["rl.entropy_coef=0.01", "methods.luffy=null"], []),
        (["rl.temperature=0.5", "rl.optimizer.betas=[0.9, 0.99]", "seed=1"], []),
        (["rl=null", "methods.luffy=null"], []),
    ],
)
def test_an_override_that_does_not_reach_a_method_is_told(overrides, warnings):
    found = schema.shadowed(load_recipe("qwen2.5-7b+luffy+psft", overrides), overrides)
    assert [text.partition(":")[0] for text in found] == warnings
    assert all(f": set methods.{text.partition(' reach ')[2].partition(',')[0]}." in text for text in found)


# ---------------------------------------------------------------------------------------------------------------------
# The recipes that come with the suite

LABELS = {  # Tables 1 and 2 of the paper, in their order
    "direct_sft": "Direct SFT",
    "direct_rl": "Direct RL",
    "luffy": "LUFFY",
    "relift": "ReLIFT",
    "sft": "SFT",
    "entropy": "SFT + Entropy",
    "label_smoothing": "SFT + Label Smoothing",
    "kd": "SFT + KD",
    "dft": "DFT",
    "asft": "ASFT",
    "psft": "PSFT",
    "gift": "GIFT",
}
BACKBONES = {"qwen2.5-7b": ("Qwen/Qwen2.5-7B", 20.0), "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", 10.0)}


def test_names_of_recipes_are_unambiguous_and_say_what_they_are():
    files = list(RECIPES.rglob("*.yaml"))
    assert len(recipes()) == len(files)
    assert {find_recipe(name) for name in recipes()} == set(files)
    assert all(summary.endswith((".", "+beta-sweep", "+gift")) for summary in recipes().values())


def test_every_file_is_part_of_a_recipe_that_loads():
    for name in recipes():
        joined = {"paper": "paper+nano", "epoch-6": "nano+epoch-6"}.get(name, name)
        backbone = "" if "nano" in joined else "qwen2.5-7b+"
        row = "+gift" if name in BACKBONES else ""
        assert load_recipe(f"{backbone}{joined}{row}").methods


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("row", LABELS)
def test_every_row_has_a_recipe_for_both_backbones(backbone, row):
    recipe = load_recipe(f"{backbone}+{row.replace('_', '-')}")
    model, beta = BACKBONES[backbone]
    assert {name: method.label for name, method in recipe.methods.items()} == {row: LABELS[row]}
    assert (recipe.base.model, recipe.data.source, recipe.data.prompt) == (model, "zwhe99/DeepMath-103K", "question")
    assert (recipe.data.response, recipe.data.answer) == ("r1_solution_1", "final_answer")
    assert (recipe.data.sft, recipe.data.rl, recipe.data.validation) == (10_000, 10_000, 1_000)
    assert recipe.methods[row].options == ({"beta": beta} if row == "gift" else {})
    init, rl = recipe.init_of(row), recipe.rl_of(row)
    assert (init is None) == (row in ("direct_rl", "luffy", "relift"))
    assert (rl is None) == (row == "direct_sft")
    if init:
        assert (init.epochs, init.batch_size, init.updates_per_batch) == (6, 128, 8 if row == "psft" else 1)
        assert init.optimizer == Optimizer(lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01, max_grad_norm=1.0)
    if rl:
        assert (rl.batch_size, rl.updates_per_batch, rl.group_size, rl.max_tokens) == (128, 2, 8, 8192)
        assert (rl.algorithm, rl.clip) == ((row, False) if row in ("luffy", "relift") else ("grpo", True))
        authors = {"luffy": 1.0, "relift": 0.7}.get(row)  # of gradients 64 times as large
        assert rl.optimizer.max_grad_norm == (1.0 if authors is None else pytest.approx(authors / 64, abs=5e-5))
        assert rl.relift.optimizer == Optimizer(lr=1e-6, betas=(0.9, 0.999), weight_decay=0.01, max_grad_norm=1.0)
        assert (rl.optimizer.lr, rl.temperature, rl.normalize_std, rl.kl_coef) == (1e-6, 1.0, False, 0.0)


def test_all_rows_stand_in_the_order_of_the_tables():
    for name in ("qwen2.5-7b+all-rows", "nano-all"):
        assert {row: method.label for row, method in load_recipe(name).methods.items()} == LABELS
        assert list(load_recipe(name).methods) == list(LABELS)


def test_the_nano_versions_of_the_rows_differ_from_the_papers_where_they_say_so():
    paper, nano = load_recipe("qwen2.5-7b+all-rows"), load_recipe("nano-all")
    differing = {row for row in LABELS if paper.methods[row] != nano.methods[row]}
    assert differing == {"psft", "relift", "gift"}
    assert dataclasses.replace(load_recipe("nano"), name="nano-all", methods=nano.methods) == nano


def test_figure_1():
    sweep = load_recipe("qwen2.5-7b+beta-sweep+epoch-6")
    betas = [method.options["beta"] for method in sweep.methods.values() if method.objective == "gift"]
    assert betas == sorted(set(betas))
    assert {10.0, 20.0} <= set(betas)
    assert "sft" in sweep.methods
    assert (sweep.init.epochs, sweep.init.select_epoch) == (10, 6)


# ---------------------------------------------------------------------------------------------------------------------
# A resolved recipe is itself a recipe

FLOATS = st.floats(allow_nan=False) | st.sampled_from([1e-5, math.inf, -math.inf, 1e300, 5e-324])
OPTIMIZERS = st.builds(
    Optimizer, lr=FLOATS, schedule=st.sampled_from(["constant", "cosine"]), betas=st.tuples(FLOATS, FLOATS)
)
RESOLVED = st.builds(
    Recipe,
    name=st.text(),
    base=st.builds(schema.Base, model=st.text(), revision=st.none() | st.text()),
    data=st.builds(schema.Data, source=st.text(), sft=st.integers()),
    methods=st.dictionaries(
        st.text(),
        st.builds(
            schema.Method, objective=st.text(), label=st.text(), options=st.dictionaries(st.text(), FLOATS, max_size=2)
        ),
        max_size=3,
    ),
    seed=st.integers(),
    engine=st.builds(Engine, zero_stage=st.sampled_from([0, 1, 2])),
    init=st.builds(Init, optimizer=OPTIMIZERS),
    rl=st.none() | st.builds(schema.RL, optimizer=OPTIMIZERS, temperature=FLOATS),
    eval=st.builds(schema.Eval, suites=st.lists(st.text(), max_size=2).map(tuple), limit=st.none() | st.integers()),
)


@given(RESOLVED)
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
