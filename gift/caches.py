"""Where things are kept that several runs share: the embedded base, reference scores."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gift.distributed import barrier, rank


def cache_root() -> Path:
    """The folder of it all: GIFT_CACHE, or ~/.cache/gift."""
    return Path(os.environ.get("GIFT_CACHE") or Path.home() / ".cache" / "gift")


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds `folder` for this job: a second job that wants the same thing waits and then finds it made."""
    if rank() != 0:
        barrier()
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        barrier()
        yield
