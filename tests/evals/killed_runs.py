"""Evaluates in forked children that are killed, each in a folder of its own, and continued: a program for test_verbs.

    python killed_runs.py FOLDER KILLS ARGUMENT...

FOLDER/whole holds an evaluation that nothing stopped, FOLDER/<n> one that SIGKILL ended at a random moment of the time
that the whole one took, and that the same command continued.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

import gift.generation.build
import gift.generation.hf  # noqa: F401  (what a child would import anew)
from evals.run import main


def start(argv: list[str]) -> int:
    """A child, leader of a group of its own, that runs the command and shows nothing."""
    if child := os.fork():
        return child
    os.setpgrp()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os._exit(main(argv))


def finish(argv: list[str]) -> float:
    """Runs the command in a child to its end; the seconds that took."""
    began = time.monotonic()
    _, status = os.waitpid(start(argv), 0)
    assert status == 0, f"exit status {status}"
    return time.monotonic() - began


def kill(argv: list[str], delay: float) -> bool:
    """Whether SIGKILL met a child that runs the command before its end."""
    child = start(argv)
    time.sleep(delay)
    ended, _ = os.waitpid(child, os.WNOHANG)
    if ended:
        return False
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, kills, command = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    finish([*command, "--out", str(folder / "warm")])
    seconds = finish([*command, "--out", str(folder / "whole")])
    rng = random.Random(0)
    for number in range(kills):
        argv = [*command, "--out", str(folder / str(number))]
        while not kill(argv, delay := rng.uniform(0.05, 1) * seconds):
            shutil.rmtree(folder / str(number))
            seconds = delay  # it takes no longer than that
        finish(argv)
