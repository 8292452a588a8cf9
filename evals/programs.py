"""The program in a model's response: the last code block that defines the entry point, or else code without a fence."""

from __future__ import annotations

import ast
import builtins
import itertools
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

MAX_CHARS = 100_000  # of a program; no benchmark's solution comes near

_FENCE = re.compile(r"[ \t>]*(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>[^`\n]*)")
_WORD = re.compile(r"\w+")
_CODE_LINE = re.compile(r"(?:(?:async )?def|class|import|from|@)\b|@", re.MULTILINE)


class Extracted(NamedTuple):
    """A program and where it stood.

    'fenced': in one block; 'joined': in one block that needs earlier ones; 'bare': unfenced; 'completion': as the body
    that continues the prompt.
    """

    code: str
    method: Literal["fenced", "joined", "bare", "completion"]


def extract_code(response: str, entry_point: str, stub: str = "") -> Extracted | None:
    """The program that a response commits to; None if it has none. Time is linear in the response.

    `stub` is the signature and docstring that the prompt ended with, for responses that go on from there. What
    precedes a closing `</think>` is not the response.
    """
    text = response.rpartition("</think>")[2]
    raw = list(fenced_blocks(text))
    blocks = [_dedent(lines) for lines in raw]
    trees = [_parse(block) if entry_point in block else None for block in blocks]
    # A block that only imports it tests the program of another block, unless there is no other.
    for imported, index in itertools.product((False, True), reversed(range(len(blocks)))):
        tree = trees[index]
        if tree is not None and entry_point in _defined(tree, imported=imported):
            needed = _needed(blocks[:index], tree)
            return Extracted("\n\n".join([*needed, blocks[index]]), "joined" if needed else "fenced")
    if start := _CODE_LINE.search(text):
        code = text[start.start() :]
        tree = _parse(code) if not blocks else None
        if tree is not None and entry_point in _defined(tree):
            return Extracted(code, "bare")
    for lines in reversed(raw or [text.split("\n")]):
        if (completed := _continued(stub, lines, entry_point)) is not None:
            return Extracted(completed, "completion")
    return None


def fenced_blocks(text: str) -> Iterator[list[str]]:
    """The lines of Markdown's code blocks, in order; a last one that is never closed ends with the text."""
    opening: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.split("\n"):
        match = _FENCE.match(line)
        if opening is None:
            opening, lines = match, []
        elif match and match["fence"].startswith(opening["fence"]) and not match["info"].strip():
            yield lines
            opening = None
        else:
            lines.append(line)
    if opening is not None:
        yield lines


def _dedent(lines: Sequence[str]) -> str:
    """The lines without the indentation that a list item gives to a whole block."""
    first = next((line for line in lines if line.strip()), "")
    margin = first[: len(first) - len(first.lstrip())]
    if margin and any(line.strip() and not line.startswith(margin) for line in lines):
        margin = ""
    return "\n".join(line.removeprefix(margin) for line in lines)


def preamble(prompt: str, entry_point: str) -> str:
    """The imports and helpers before the entry point in a prompt that is code, such as `poly` in HumanEval/32."""
    tree = _parse(prompt)
    if tree is None:
        return ""
    before = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name == entry_point)]
    return "\n\n".join(ast.unparse(node) for node in before if not isinstance(node, ast.Expr))


def _parse(code: str) -> ast.Module | None:
    if len(code) > MAX_CHARS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _defined(tree: ast.Module, *, imported: bool = True) -> set[str]:
    """The names that a module's own statements bind, also under `if` and `try`; by imports only if `imported`."""
    names: set[str] = set()
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif imported and isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            inside = [each for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
            names.update(each.id for each in inside if isinstance(each.ctx, ast.Store))  # not f of `f.cache = {}`
        elif isinstance(node, ast.If | ast.Try):
            pending += node.body + node.orelse
    return names


def _needed(earlier: Sequence[str], tree: ast.Module) -> list[str]:
    """The earlier blocks that define, last, a name which the program uses and nowhere binds."""
    bound = _defined(tree) | set(dir(builtins))
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    missing = used - bound
    found = []
    for block in reversed(earlier):
        if missing.isdisjoint(_WORD.findall(block)):
            continue
        other = _parse(block)
        if other is not None and (given := _defined(other) & missing):
            missing -= given
            found.append(block)
    return found[::-1]


def _continued(stub: str, lines: Sequence[str], entry_point: str) -> str | None:
    """The stub with its body: the first lines that are indented. None if that makes no function."""
    taken = next((n for n, line in enumerate(lines) if line.strip() and line[0] not in " \t"), len(lines))
    if not stub or not any(line.strip() for line in lines[:taken]):
        return None
    code = stub.rstrip() + "\n" + "\n".join(lines[:taken]) + "\n"
    tree = _parse(code)
    return code if tree is not None and entry_point in _defined(tree) else None
