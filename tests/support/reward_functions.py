"""Reward functions of every kind, good and bad, for `reward.function=tests.support.reward_functions:NAME`."""

import decimal
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np

NOT_A_FUNCTION = 3


def half(texts, rows):
    """A constant."""
    return [0.5] * len(texts)


def short(texts, rows):
    """The shorter the better, between 0 and 1."""
    return np.array([1 / (1 + len(text)) for text in texts], np.float32)


def by_column(texts, rows):
    """The column `good` of the problem's row, to the rollouts in turn; it must arrive as a number."""
    assert all(isinstance(row["good"], float) and row["id"] and "problem" in row for row in rows)
    return [row["good"] / (i + 1) for i, row in enumerate(rows)]


def talks(texts, rows):
    """Prints, also through a program of its own, which must not disturb the answers."""
    print("a reward is being worked out")
    subprocess.run([sys.executable, "-c", "print('from a program'); input()"], check=False)
    return [True] * len(texts)


def faulty(texts, rows):
    """Do what the problem's text asks for."""
    done = {
        "raise": lambda: 1 / 0,
        "exit": sys.exit,
        "crash": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "hang": lambda: time.sleep(600),
        "hang_with_program": lambda: subprocess.run(["sleep", "600"], check=False),
        "nan": lambda: [0.5, float("nan")],
        "text": lambda: ["0.5", "1"],
        "few": lambda: [1.0],
        "many": lambda: iter(int, 1),
        "high": lambda: [0.5, 1.5],
        "none": lambda: None,
        "string": lambda: "10",
        "number": lambda: 0.5,
    }
    return done.get(rows[0]["problem"], lambda: [decimal.Decimal("0.25"), 1])()


def hangs_once(texts, rows):
    """Raise for the problem named in the file that the test sets, as long as the file is there."""
    mark = pathlib.Path(os.environ["OPD_JAX_TEST_FAULT"])
    if mark.exists():
        wanted = json.loads(mark.read_text())
        if rows[0]["id"] == wanted:
            raise ValueError(f"no reward for {wanted}")
    return short(texts, rows)


def sleeps(texts, rows):
    """Run the command in the problem's row."""
    subprocess.run(rows[0]["command"].split(), check=False)
    return half(texts, rows)
