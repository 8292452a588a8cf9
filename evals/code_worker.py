"""What runs inside the sandbox of evals/sandbox.py: a program of unknown intent, on given inputs.

It needs the standard library only.

The parent believes nothing of what this process says but the outputs themselves, and those only as data: it never
sends the expected ones here, keeps the time itself, and reads replies with a decoder of its own (evals/oracles.py).

Protocol: the request is a marshalled dict on stdin: `sources`, run in turn in one namespace; `entry_point`, the
function's name there; `groups`, each a list of marshalled argument lists, with a fresh namespace; `path`, folders to
import from; `limits`, see `confine`. Replies go to the file descriptor in argv: a tag, the length of the payload
(8 bytes, little endian) and the payload. `READY` comes first, then `LOADED` at the start of every group and one of the
others for each input; a group that cannot be loaded ends the conversation with `RAISED`.

An output travels in the format of `marshal`, version 2, which is a function of the value alone: equal bytes are equal
values of equal types. So the parent settles nearly every comparison without decoding.
"""

import ctypes
import marshal
import os
import resource
import struct
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

READY, LOADED, VALUE, DIGEST, OTHER, RAISED = b"ylvdoe"  # the tags
INLINE_BYTES = 16 << 20  # a longer encoding is sent as its SHA-256
CHUNK = 4096  # members of a long sequence that are encoded at a time: the longest output takes 1.2 GB at once

# ---------------------------------------------------------------------------------------------------------------------
# Limits

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
EPERM, EAGAIN, ENOSYS = 1, 11, 38
CLONE_THREAD = 0x10000

# Audit architecture, clone, and what a program has no use for that would get round a limit: new processes and
# namespaces, memory outside the address space, other processes' memory. From the kernel's syscall tables.
SYSCALLS = {
    "x86_64": (
        0xC000003E,
        56,
        (57, 58, 29, 64, 68, 101, 155, 161, 165, 240, 248, 249, 250, 272, 298, 308, 310, 311, 319, 321, 323),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        (180, 186, 190, 194, 117, 41, 51, 40, 217, 218, 219, 97, 241, 268, 270, 271, 279, 280, 282),
    ),
}
COMMON_SYSCALLS = (425, 428, 429, 430, 432, 438, 442, 447)  # the same number everywhere: io_uring, mounts, pidfds
CLONE3 = 435


def forbid_processes() -> bool:
    """Has the kernel refuse, from here on, the system calls above; threads remain. False where it cannot.

    RLIMIT_NPROC does not stop root, and one process under RLIMIT_AS is all the memory that a program gets.
    """
    machine = os.uname().machine
    if machine not in SYSCALLS or sys.maxsize < 2**32:
        return False
    architecture, clone, forbidden = SYSCALLS[machine]
    load, equal, above, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF: A = word; A == k; A >= k; A & k; return k
    allow, refuse = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (give, 0, 0, refuse | EPERM),
        (load, 0, 0, 0),
        (above, 0, 1, 0x40000000),  # x86-64's second table of calls
        (give, 0, 0, refuse | EPERM),
        (equal, 0, 1, CLONE3),
        (give, 0, 0, refuse | ENOSYS),  # its flags lie in memory: glibc goes on to clone
    ]
    for number in (*forbidden, *COMMON_SYSCALLS):
        program += [(equal, 0, 1, number), (give, 0, 0, refuse | EPERM)]
    program += [
        (equal, 0, 3, clone),
        (load, 0, 0, 16),
        (bits, 1, 0, CLONE_THREAD),
        (give, 0, 0, refuse | EAGAIN),
        (give, 0, 0, allow),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None).prctl
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(header), 0, 0) == 0


def confine(limits: dict[str, int]) -> None:
    """Sets `memory` (bytes of address space), `file` (bytes), `files` (open ones), `stack` (bytes) and `cpu` (s)."""
    wanted = {
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_FSIZE: limits["file"],
        resource.RLIMIT_NOFILE: limits["files"],
        resource.RLIMIT_STACK: limits["stack"],
        resource.RLIMIT_CPU: limits["cpu"],
        resource.RLIMIT_CORE: 0,
    }
    if not forbid_processes():
        wanted[resource.RLIMIT_NPROC] = limits["processes"]
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


# ---------------------------------------------------------------------------------------------------------------------
# Outputs


class NotDataError(Exception):
    """A value that no benchmark expects, such as a generator."""


def plain(value: Any) -> Any:
    """The value as built-in types alone, by what it holds: no method that a subclass may have overridden is asked."""
    if value is None or value is True or value is False:
        return value
    exact_forms: tuple[tuple[type, Callable[[Any], Any]], ...] = (
        (int, int.__index__),
        (float, float.__float__),
        (complex, complex.__complex__),
        (str, str.__str__),
        (bytes, lambda held: bytes.__getitem__(held, slice(None))),
        (list, lambda held: [plain(each) for each in list.__iter__(held)]),
        (tuple, lambda held: tuple([plain(each) for each in tuple.__iter__(held)])),
        (set, lambda held: {plain(each) for each in set.__iter__(held)}),
        (frozenset, lambda held: frozenset([plain(each) for each in frozenset.__iter__(held)])),
        (dict, lambda held: {plain(key): plain(each) for key, each in dict.items(held)}),
    )
    for kind, exact in exact_forms:
        if isinstance(value, kind):
            return exact(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return plain(numpy.generic.item(value))
    if type(value).__module__ in ("decimal", "fractions"):  # equal to an int or a float, or to no output at all
        for kind in (int, float):
            if kind(value) == value:
                return kind(value)
    raise NotDataError


def encode(value: Any) -> bytes:
    """The marshalled value. Raises NotDataError, or whatever a hostile object provokes."""
    if "numpy" not in sys.modules:  # whose scalars marshal takes for bytes
        try:
            return marshal.dumps(value, 2)
        except ValueError:
            pass
    return marshal.dumps(plain(value), 2)


def pieces(value: Any) -> Iterator[bytes]:
    """The encoding of a value, a long list or tuple in several pieces."""
    if type(value) not in (list, tuple) or len(value) <= CHUNK:
        yield encode(value)
        return
    head = encode(value[:1])[:1]
    yield head + struct.pack("<i", len(value))
    for start in range(0, len(value), CHUNK):
        yield encode(value[start : start + CHUNK])[5:]


def describe(value: Any) -> tuple[int, bytes]:
    """Tag and payload of the reply for an output."""
    try:
        held, size, digest = [], 0, None
        for piece in pieces(value):
            held.append(piece)
            size += len(piece)
            if size > INLINE_BYTES:
                if digest is None:
                    import hashlib  # rarely needed, and slow to import

                    digest = hashlib.sha256()
                for each in held:
                    digest.update(each)
                held.clear()
    except BaseException:
        return OTHER, b""
    return (VALUE, b"".join(held)) if digest is None else (DIGEST, digest.digest())


# ---------------------------------------------------------------------------------------------------------------------
# The conversation


def load(sources: list[str], entry_point: str) -> Callable[..., Any]:
    """The entry point, from sources run in a module of their own that is not `__main__`.

    What a program does after it has defined its entry point, such as to test itself or to ask for input, may fail.
    """
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    for source in sources:
        try:
            exec(compile(source, "solution.py", "exec"), module.__dict__)
        except BaseException:
            if entry_point not in module.__dict__:
                raise
    return module.__dict__[entry_point]


def main() -> None:
    """Serves the request on stdin, then ends at once: nothing that the program left behind is run."""
    request = marshal.loads(sys.stdin.buffer.read())
    stream = int(sys.argv[1])
    for descriptor in 0, 1, 2:
        os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    os.closerange(3, stream)
    os.closerange(stream + 1, 256)
    sys.stdin = open(0)  # noqa: SIM115
    sys.path += request["path"]
    confine(request["limits"])
    # Bound here, so that a program that replaces the originals for its own ends does not lose its replies.
    write, pack, leave = os.write, struct.Struct("<BQ").pack, os._exit

    def reply(tag: int, payload: bytes = b"") -> None:
        message = memoryview(pack(tag, len(payload)) + payload)
        while message:
            message = message[write(stream, message) :]

    reply(READY)
    for group in request["groups"]:
        try:
            function = load(request["sources"], request["entry_point"])
        except BaseException as error:
            reply(RAISED, type(error).__name__.encode(errors="replace")[:100])
            break
        reply(LOADED)
        for arguments in group:
            try:
                output = function(*marshal.loads(arguments))
            except BaseException as error:
                reply(RAISED, type(error).__name__.encode(errors="replace")[:100])
            else:
                reply(*describe(output))
                del output
    leave(0)


if __name__ == "__main__":
    main()
