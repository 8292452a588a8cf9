"""Whether an output of untrusted code is the expected one, by the rules of evalplus (github.com/evalplus/evalplus).

Outputs arrive as bytes of `marshal` version 2 (evals/code_worker.py). Equal bytes are equal values, which settles
nearly every comparison. The rest is decoded here, into built-in types only: `marshal.loads` makes code objects too,
and hostile bytes can crash or stall it.

Departures from evalplus 0.3.1: `find_zero` (HumanEval/32) can pass; a special oracle sees the arguments as they were
before the call; an output with nan equals one that has nan in the same place; of an output longer than INLINE_BYTES
of evals/code_worker.py only the digest is compared, so that there 1 is not 1.0: the five longest of Mbpp/255.
"""

from __future__ import annotations

import functools
import hashlib
import marshal
import re
import struct
import zlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from evals.sandbox import Reply
from gift.cli import UserError

Dataset = Literal["humaneval", "mbpp"]

MAX_DEPTH = 100  # of containers; the benchmarks' outputs have 10
MAX_COLLISIONS = 1000  # members of a set with one hash: more would take time that grows with their square
MAX_GROWTH = 16  # an equal value's encoding is at most 9 times as long: 1.0 and True
PACK_BYTES = 1 << 16  # longer outputs are kept compressed


class NotDataError(Exception):
    """Bytes that are no encoded value, or one made to be costly."""


# ---------------------------------------------------------------------------------------------------------------------
# Decoding

_NUMBERS = rb"(?s:(?:[NTF]|i.{4}|g.{8}|y.{16}){%d}+)"
_FIXED = {b"i": struct.Struct("<i"), b"g": struct.Struct("<d"), b"y": struct.Struct("<dd")}
_CONSTANTS = {b"N": None, b"T": True, b"F": False}


def decode(data: bytes) -> Any:
    """The value. Raises NotDataError."""
    decoder = _Decoder(data)
    try:
        value = decoder.value(0)
    except (struct.error, UnicodeDecodeError, TypeError) as error:  # TypeError: an unhashable member
        raise NotDataError from error
    if decoder.at != len(data):
        raise NotDataError
    return value


class _Decoder:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def value(self, depth: int) -> Any:
        tag = self._take(1)
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if tag in _FIXED:
            layout = _FIXED[tag]
            numbers = layout.unpack(self._take(layout.size))
            return complex(*numbers) if tag == b"y" else numbers[0]
        if tag == b"u":
            return self._take(self._count()).decode("utf-8", "surrogatepass")
        if tag == b"s":
            return self._take(self._count())
        if tag == b"l":
            return self._long()
        if depth == MAX_DEPTH:
            raise NotDataError
        if tag in (b"(", b"["):
            members = self._members(self._count(), depth + 1)
            return tuple(members) if tag == b"(" else members
        if tag in (b"<", b">"):
            members = self._members(self._count(), depth + 1)
            _check_collisions(members)
            return set(members) if tag == b"<" else frozenset(members)
        if tag == b"{":
            return self._dict(depth + 1)
        raise NotDataError

    def _take(self, size: int) -> bytes:
        taken = self.data[self.at : self.at + size]
        if len(taken) != size:
            raise NotDataError
        self.at += size
        return taken

    def _signed(self) -> int:
        return int.from_bytes(self._take(4), "little", signed=True)

    def _count(self) -> int:
        count = self._signed()
        if not 0 <= count <= len(self.data) - self.at:  # every member takes a byte
            raise NotDataError
        return count

    def _long(self) -> int:
        """An integer in digits of 15 bits, their number negative if it is. In time linear in its length."""
        count = self._signed()
        digits = struct.unpack(f"<{abs(count)}H", self._take(2 * abs(count)))
        if max(digits, default=0) >= 1 << 15:
            raise NotDataError
        value = int("".join(f"{digit:015b}" for digit in reversed(digits)) or "0", 2)
        return -value if count < 0 else value

    def _members(self, count: int, depth: int) -> list[Any]:
        # A million plain numbers take seconds one by one. `marshal` may have them: nothing else can be among them.
        if count > 100 and (match := re.compile(_NUMBERS % count).match(self.data, self.at)):
            self.at = match.end()
            return marshal.loads(b"[" + struct.pack("<i", count) + match[0])
        return [self.value(depth) for _ in range(count)]

    def _dict(self, depth: int) -> dict[Any, Any]:
        pairs = []
        while self.data[self.at : self.at + 1] != b"0":
            pairs.append((self.value(depth), self.value(depth)))
        self.at += 1
        _check_collisions([key for key, _ in pairs])
        return dict(pairs)


def _check_collisions(members: Sequence[Hashable]) -> None:
    if len(members) > MAX_COLLISIONS and max(Counter(map(hash, members)).values()) > MAX_COLLISIONS:
        raise NotDataError


# ---------------------------------------------------------------------------------------------------------------------
# Expected outputs


@dataclass(frozen=True)
class Expected:
    """An output of the canonical program and how long it took (seconds).

    `held` is its encoding; compressed, with the SHA-256 of the original in `digest`, if it is long; empty if all that
    is known is the digest. `kind` is as in Reply.
    """

    kind: str
    held: bytes
    digest: bytes
    seconds: float
    floats: bool

    @classmethod
    def of(cls, reply: Reply) -> Expected:
        """What the canonical program replied."""
        payload, floats = reply.payload, reply.kind == "value" and _is_floats(reply.payload)
        if reply.kind == "digest":
            return cls(reply.kind, b"", payload, reply.seconds, floats)
        if len(payload) > PACK_BYTES:
            packed = zlib.compress(payload, 1)
            return cls(reply.kind, packed, hashlib.sha256(payload).digest(), reply.seconds, floats)
        return cls(reply.kind, payload, b"", reply.seconds, floats)

    def is_exactly(self, reply: Reply) -> bool:
        """Whether the reply is this output to the byte."""
        if reply.kind == "digest" or not self.digest:
            return (reply.kind, reply.payload) == (self.kind, self.digest or self.held)
        return reply.kind == self.kind and hashlib.sha256(reply.payload).digest() == self.digest

    def payload(self) -> bytes:
        """The encoded output; empty where only its digest is known."""
        return zlib.decompress(self.held) if self.digest and self.held else self.held


def _is_floats(payload: bytes) -> bool:
    """evalplus' `is_floats` of an encoded output: a float, or a list or tuple of nothing but floats."""
    if payload[:1] == b"g":
        return True
    count = int.from_bytes(payload[1:5], "little")
    return (
        payload[:1] in (b"[", b"(")
        and count > 0
        and len(payload) == 5 + 9 * count
        and payload[5::9].count(b"g") == count
    )


def tolerances(expected: Sequence[Expected], atol: float) -> list[float]:
    """The absolute tolerance at each of a group's inputs: `atol`, or 1e-6 from the first output of floats onwards."""
    found, current = [], atol
    for each in expected:
        current = 1e-6 if current == 0 and each.floats else current
        found.append(current)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The rules


@functools.cache
def _evalplus() -> Any:
    """evalplus' special cases. Raises UserError if it is not installed."""
    try:
        from evalplus.eval import _special_oracle
    except ImportError:
        raise UserError("HumanEval+ and MBPP+ are graded by evalplus' rules: pip install evalplus") from None
    return _special_oracle


def accepts(
    dataset: Dataset, entry_point: str, arguments: Sequence[Any], expected: Expected, reply: Reply, atol: float
) -> bool:
    """Whether a reply is right by evalplus' rules. `atol` is the tolerance at this input."""
    if reply.kind == "raised":
        return False
    special = _evalplus()
    if dataset == "mbpp" and entry_point in special.MBPP_OUTPUT_NOT_NONE_TASKS:
        wanted = expected.kind != "value" or expected.payload() != b"N"
        if reply.kind == "value" and reply.payload in (b"T", b"F"):
            return wanted == (reply.payload == b"T")
        return wanted == (reply.kind != "value" or reply.payload != b"N")
    is_root = dataset == "humaneval" and entry_point == "find_zero"
    if not is_root and reply.kind != "other" and expected.is_exactly(reply):
        return True
    known = expected.payload()
    if reply.kind != "value" or not known or len(reply.payload) > MAX_GROWTH * len(known) + PACK_BYTES:
        return False
    try:
        with np.errstate(all="ignore"):
            output, wanted = decode(reply.payload), decode(known)
            if is_root:
                return bool(abs(special._poly(*arguments, output)) <= atol)
            return _equals(dataset, entry_point, arguments, output, wanted, atol)
    except Exception:  # whatever the comparison makes of an output of another type
        return False


def _equals(
    dataset: Dataset, entry_point: str, arguments: Sequence[Any], output: Any, wanted: Any, atol: float
) -> bool:
    special = _evalplus()
    equal = output == wanted
    if dataset == "mbpp":
        if entry_point == "surface_Area":
            equal = equal or abs(output - special._surface_Area(*arguments)) <= atol
        elif entry_point == "digit_distance_nums":
            equal = equal or output == special._digit_distance_nums(*arguments)
        elif entry_point in special.MBPP_OUTPUT_SET_EQ_TASKS:
            known = set(wanted)  # once all are known, a set of them cannot be costly
            equal = all(member in known for member in output) and len(set(output)) == len(known)
    if equal or atol == 0:
        return bool(equal)
    if type(output) is not type(wanted) or (isinstance(wanted, list | tuple) and len(output) != len(wanted)):
        return False
    return bool(np.allclose(output, wanted, rtol=1e-07, atol=atol))
