"""States to resume training from: `step-<step>/` folders with one safetensors file per rank and `progress.json`.

A state is written beside its final name and renamed, so a folder `step-*` is whole or was damaged later; the SHA-256 of
every file, in `progress.json`, tells. No pickle is read or written. No random-number state is needed: the order of the
data and every sample are functions of a seed and the step, and nothing here trains with dropout.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gift.cli import UserError, say
from gift.distributed import barrier, rank, total_over_ranks, world_size
from gift.records import flush, read_json, remove, sha256_file, sync, write_json

DIGEST_BYTES = 32


class DamagedStateError(Exception):
    """A state that cannot be used: the message names the file and what is wrong with it."""


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns safetensors' own error for a disk that is full or read-only into a UserError naming `path`."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written: {error}; mend this and run again") from None


def write_state(folder: Path, tensors: Mapping[str, Tensor], progress: Mapping[str, Any], *, keep: int) -> None:
    """Saves this rank's tensors, and `progress` (JSON, with 'step'), and keeps the `keep` newest states.

    All ranks call this. Raises UserError where the disk is full.
    """
    target = folder / f"step-{progress['step']:06d}"
    scratch = folder / f".{target.name}.tmp"
    if rank() == 0:
        for abandoned in folder.glob(".step-*.tmp"):
            remove(abandoned)
        scratch.mkdir(parents=True)
    barrier()
    file = scratch / f"rank-{rank()}.safetensors"
    with disk_errors(target):
        save_file(dict(tensors), file)
    digests = of_all_ranks(bytes.fromhex(sha256_file(file)))
    if rank() == 0:
        hashes = {f"rank-{number}.safetensors": digest.hex() for number, digest in enumerate(digests)}
        write_json(scratch / "progress.json", {**progress, "world_size": world_size(), "sha256": hashes})
        sync(scratch)
        remove(target)
        os.replace(scratch, target)
        flush(folder)
        older = sorted(state for state in folder.glob("step-*") if state.name < target.name)
        later = [state for state in folder.glob("step-*") if state.name > target.name]  # damaged, or not resumed from
        for state in [*older[: max(0, len(older) - keep + 1)], *later]:
            remove(state)
    barrier()


def read_newest(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Progress and this rank's tensors of the newest usable state, on the CPU; None where no state was ever saved.

    All ranks call this and get the same state. A damaged one is reported and passed over. Raises UserError where none
    is left, or where the state was saved by another number of ranks.
    """
    states = sorted(folder.glob("step-*"), reverse=True)
    for state in states:
        found = None
        try:
            found = read_state(state)
        except DamagedStateError as error:
            say(f"{error}; looking for an older state")
        (damaged,) = total_over_ranks([float(found is None)])
        if found is not None and not damaged:
            return found
    if states:
        raise UserError(f"{states[0]}: damaged, and there is no older state; remove {folder} to train this stage again")
    return None


def read_state(state: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Progress and this rank's tensors of one state. Raises DamagedStateError, and UserError as `read_newest` does."""
    try:
        progress: dict[str, Any] = read_json(state / "progress.json")
        ranks, hashes = progress["world_size"], progress["sha256"]
    except UserError as error:
        raise DamagedStateError(str(error)) from None
    except (KeyError, TypeError):
        raise DamagedStateError(f"{state / 'progress.json'}: not the record of a saved state") from None
    if ranks != world_size():
        raise UserError(
            f"{state}: saved by {ranks} ranks, cannot be continued by {world_size()};"
            " start as many, or remove this folder to train this stage again"
        )
    file = state / f"rank-{rank()}.safetensors"
    if not file.exists():
        raise DamagedStateError(f"{file}: missing")
    if sha256_file(file) != hashes.get(file.name):
        raise DamagedStateError(f"{file}: damaged (its SHA-256 is not the one recorded when it was saved)")
    return progress, load_file(file)


def of_all_ranks(digest: bytes) -> list[bytes]:
    """The SHA-256 digests of all ranks, in the order of ranks."""
    table = [0.0] * (world_size() * DIGEST_BYTES)
    table[rank() * DIGEST_BYTES : (rank() + 1) * DIGEST_BYTES] = [float(byte) for byte in digest]
    joined = bytes(int(value) for value in total_over_ranks(table))
    return [joined[start : start + DIGEST_BYTES] for start in range(0, len(joined), DIGEST_BYTES)]
