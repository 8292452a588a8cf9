"""How commands end: exit codes, one line on stderr, no traceback for what the user can mend."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from gift.cli import nearest, positive

COMMAND = """
import errno, sys
from gift.cli import UserError, run_command
def main(argv):
    {body}
run_command(main)
"""


def run(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = COMMAND.format(body=body)
    return subprocess.run(
        [sys.executable, "-c", code, "argument"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("return len(argv)", 1, ""),
        ("raise UserError('a.jsonl:3: no answer')", 2, "error: a.jsonl:3: no answer\n"),
        ("raise KeyboardInterrupt", 130, "\ninterrupted: run the same command again"),
        ("raise OSError(errno.ENOSPC, 'No space left on device')", 2, "error: No space left on device: finished"),
        ("raise OSError(errno.EDQUOT, 'Disk quota exceeded')", 2, "error: Disk quota exceeded: finished"),
        ("open('/absent/file')", 2, "error: No such file or directory (/absent/file): finished"),
    ],
)
def test_what_the_user_can_mend_is_one_line(body, code, message):
    done = run(body)
    assert done.returncode == code
    assert done.stderr.startswith(message)
    assert len(done.stderr.strip().splitlines()) == bool(message)


@pytest.mark.parametrize("body", ["1 / 0", "raise OSError('a bug')", "raise OSError(errno.EBADF, 'a bug')"])
def test_a_bug_keeps_its_traceback(body):
    done = run(body)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_the_traceback_can_be_had():
    assert "Traceback" in run("raise UserError('x')", GIFT_TRACEBACK="1").stderr


def test_nearest_names_only_what_is_near():
    assert nearest("gft", ["sft", "gift"]) == " (did you mean 'gift'?)"
    assert nearest("zzz", ["sft", "gift"]) == ""


def test_positive_is_an_integer_from_1():
    assert positive("12") == 12
    for text, error in (("0", argparse.ArgumentTypeError), ("-1", argparse.ArgumentTypeError), ("two", ValueError)):
        with pytest.raises(error):
            positive(text)
