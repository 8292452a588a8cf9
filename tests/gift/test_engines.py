"""From settings to an engine, and what is refused before a run begins."""

from __future__ import annotations

import importlib.util

import pytest

from gift.cli import UserError
from gift.generation.build import check_installed
from gift.recipe import Generation, load_recipe
from gift.train import check_engines


@pytest.fixture
def without_vllm(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find_spec(name, *rest)
    )


def test_a_run_with_vllm_is_refused_before_it_begins_where_there_is_none(without_vllm):
    with pytest.raises(UserError, match=r"vllm is not installed here; .*generation\.engine=hf"):
        check_engines(load_recipe("nano-vllm"), 1)
    check_engines(load_recipe("nano"), 1)
    check_installed(Generation(engine="server", url="http://127.0.0.1:1"))


def test_ranks_come_in_groups_that_share_a_model(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: name)
    recipe = load_recipe("nano-vllm", ["generation.tensor_parallel=2"])
    check_engines(recipe, 4)
    with pytest.raises(UserError, match=r"generation\.tensor_parallel is 2: 3 ranks"):
        check_engines(recipe, 3)
    check_engines(load_recipe("nano-vllm", ["generation.tensor_parallel=2", "rl=null"]), 1)


def test_a_run_with_a_server_needs_a_folder_to_hand_weights_over(tmp_path):
    server = ["generation.engine=server", "generation.url=http://127.0.0.1:1"]
    for folder in ([], [f"generation.shared_folder={tmp_path / 'nothing'}"]):
        with pytest.raises(UserError, match=r"generation\.shared_folder is .*give a folder"):
            check_engines(load_recipe("nano", [*server, *folder]), 1)
    check_engines(load_recipe("nano", [*server, f"generation.shared_folder={tmp_path}"]), 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["generation.tensor_parallel=2"], "tensor_parallel"),
        (["generation.url=http://localhost"], "url"),
        (["generation.engine=server"], "url"),
        (
            ["generation.engine=server", "generation.url=http://localhost", "generation.data_parallel=2"],
            "data_parallel",
        ),
        (["generation.cache_gb=0"], "cache_gb must be positive"),
        (["generation.engine=vlm"], "engine"),
    ],
)
def test_settings_that_no_engine_has_are_refused(overrides, message):
    with pytest.raises(UserError, match=f"generation.{message}"):
        load_recipe("nano", overrides)
