"""What every command shares: one-line errors, exit codes and a progress bar. Imports neither torch nor transformers."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

from tqdm import tqdm

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class UserError(Exception):
    """Something the user can mend: the message is one line that names the file, row or key and says what to do."""


def positive(text: str) -> int:
    """An integer of at least 1, as an argparse type."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the known name closest to `name`, or '' when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def run_command(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs `main(argv)` and exits with its code.

    A UserError, a full disk and a file that cannot be opened become one line on stderr; GIFT_TRACEBACK=1 shows their
    traceback.
    """
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to continue from the last finished step", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except UserError as error:
        if os.environ.get("GIFT_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USER_ERROR
    except OSError as error:
        mendable = error.errno in DISK_FULL or (error.errno is not None and error.filename is not None)
        if os.environ.get("GIFT_TRACEBACK") or not mendable:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror}{where}: finished steps are intact; mend this and run again", file=sys.stderr)
        code = EXIT_USER_ERROR
    sys.stdout.flush()
    sys.exit(code)


def progress(total: int, description: str, *, unit: str = "it", initial: int = 0) -> tqdm:
    """A progress bar with an estimate of what remains on stderr; silent where stderr is not a terminal."""
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
        leave=False,
        smoothing=0.1,
    )


def say(message: str) -> None:
    """One line of progress on stdout that does not tear a running bar."""
    with tqdm.external_write_mode(file=sys.stdout):
        print(message, flush=True)
