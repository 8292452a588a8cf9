"""Settings from plain values and back: dataclasses are built key by key, and what does not fit is named."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, Union

from gift.cli import UserError, nearest

T = TypeVar("T")
PLAIN_NAMES = {float: "a number", str: "a name", tuple: "a list"}  # of types that are one choice among several


def build(kind: type[T], tree: Any, source: str = "", key: str = "") -> T:
    """The dataclass `kind` from a mapping. `key` is where in `source`, a file, the mapping lies, for messages.

    Raises UserError for an unknown key (with the nearest known one), a missing key and a value of the wrong type.
    """
    built: T = _Builder(source).dataclass(kind, tree, key)
    return built


def check_part(kind: type, tree: Any, source: str) -> None:
    """Raises UserError as `build` does, except that keys may be missing: `tree` is only part of a `kind`."""
    _Builder(source, partial=True).dataclass(kind, tree, "")


def changed(settings: T, changes: Mapping[str, Any], key: str) -> T:
    """The dataclass `settings` with a tree of changes in it; `key` names the changes in messages."""
    return build(type(settings), merge(dataclasses.asdict(settings), changes), key=key)  # type: ignore[call-overload]


def merge(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A new tree in which what `changes` says replaces what `tree` says, mapping by mapping."""
    merged = dict(tree)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def as_tree(settings: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values, from which `build` makes it again; an infinite number is the text 'inf'."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(part) for part in value]
        return str(value) if isinstance(value, float) and math.isinf(value) else value

    tree: dict[str, Any] = plain(dataclasses.asdict(settings))
    return tree


def completed(entry: dataclasses.Field[Any], value: Any) -> Any:
    """`value` with what it leaves out of a field's default, so that giving one key of it does not reset the others."""
    default = None if entry.default_factory is dataclasses.MISSING else entry.default_factory()
    if isinstance(value, Mapping) and dataclasses.is_dataclass(default) and not isinstance(default, type):
        return merge(dataclasses.asdict(default), value)
    return value


def leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """What a tree of mappings holds that is no mapping itself, each with its dotted key."""
    if not isinstance(tree, Mapping):
        yield key, tree
        return
    for name, part in tree.items():
        yield from leaves(part, dotted(key, name))


def dotted(key: str, name: object) -> str:
    """The path of `name` below `key`."""
    return f"{key}.{name}" if key else str(name)


class _Builder:
    """Converts plain values to annotated types. Where it is `partial`, dataclasses are checked and not made."""

    def __init__(self, source: str, *, partial: bool = False) -> None:
        self.source = source
        self.partial = partial

    def error(self, message: str) -> UserError:
        return UserError(f"{self.source}: {message}" if self.source else message)

    def dataclass(self, kind: Any, tree: Any, key: str) -> Any:
        if not isinstance(tree, Mapping):
            raise self.error(f"{key or 'a recipe'} must be a mapping of keys to values, got {tree!r:.60}")
        hints = typing.get_type_hints(kind)
        known = {entry.name: entry for entry in dataclasses.fields(kind)}
        for name in tree:
            if name not in known:
                raise self.error(f"unknown key {dotted(key, name)!r}{nearest(str(name), known)}")
        for name, entry in known.items():
            required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
            if required and name not in tree and not self.partial:
                raise self.error(f"missing key {dotted(key, name)!r}")
        values = {}
        for name, value in tree.items():
            whole = completed(known[name], value)
            values[name] = self.convert(hints[name], whole, dotted(key, name))
        return None if self.partial else kind(**values)

    def convert(self, kind: Any, value: Any, key: str) -> Any:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is Any:
            return value
        if dataclasses.is_dataclass(kind):
            return self.dataclass(kind, value, key)
        if origin in (Union, types.UnionType):
            return self.union(arguments, value, key)
        if origin is Literal:
            return self.literal(arguments, value, key)
        if origin is tuple:
            return self.sequence(arguments, value, key)
        if origin is dict:
            if not isinstance(value, Mapping):
                raise self.error(f"{key} must be a mapping of keys to values, got {value!r:.60}")
            return {str(name): self.convert(arguments[1], part, dotted(key, name)) for name, part in value.items()}
        return self.scalar(kind, value, key)

    def union(self, kinds: tuple[Any, ...], value: Any, key: str) -> Any:
        if value is None and type(None) in kinds:
            return None
        *others, last = [kind for kind in kinds if kind is not type(None)]
        if not others:
            return self.convert(last, value, key)
        for kind in (*others, last):
            with contextlib.suppress(UserError):
                return self.convert(kind, value, key)
        names = " or ".join(PLAIN_NAMES[typing.get_origin(kind) or kind] for kind in (*others, last))
        raise self.error(f"{key} must be {names}, got {value!r:.60}")

    def literal(self, options: tuple[Any, ...], value: Any, key: str) -> Any:
        if not any(type(value) is type(option) and value == option for option in options):
            known = [str(option) for option in options]
            raise self.error(f"{key} is {value!r}{nearest(str(value), known)}; options: {', '.join(known)}")
        return value

    def sequence(self, kinds: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
        is_list = isinstance(value, (list, tuple))
        if kinds[-1] is Ellipsis and is_list:
            kinds = kinds[:1] * len(value)
        if not is_list or len(value) != len(kinds):
            size = "" if Ellipsis in kinds else f" of {len(kinds)}"
            raise self.error(f"{key} must be a list{size}, got {value!r:.60}")
        parts = enumerate(zip(kinds, value, strict=True))
        return tuple(self.convert(kind, part, f"{key}[{i}]") for i, (kind, part) in parts)

    def scalar(self, kind: type, value: Any, key: str) -> Any:
        """A bool, int, float or str; '1e-5', which YAML 1.1 reads as text, and inf are floats, nan is not."""
        if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            with contextlib.suppress(ValueError, OverflowError):
                if not math.isnan(number := float(value)):
                    return number
        elif type(value) is kind:
            return value
        is_word = kind is str and isinstance(value, bool)
        hint = "; quote it: YAML takes on, off, yes and no for truth values" if is_word else ""
        raise self.error(f"{key} must be {kind.__name__}, got {value!r:.60}{hint}")
