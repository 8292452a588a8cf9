"""Constants of fschat as an oracle, read in its source: importing it would cost 20 seconds and 650 MB."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest


def module(name: str) -> list[ast.stmt]:
    """The statements of a module of fastchat.llm_judge; skips the test where fschat is not installed."""
    spec = importlib.util.find_spec("fastchat")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs fschat's source")
    return ast.parse(Path(spec.submodule_search_locations[0], "llm_judge", f"{name}.py").read_text()).body


def constant(name: str) -> Any:
    """What a constant of llm_judge.common is set to: a literal, or the pattern of a regex."""
    [value] = [
        node.value for node in module("common") if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    ]
    return ast.literal_eval(value.args[0] if isinstance(value, ast.Call) else value)
