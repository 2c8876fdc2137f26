"""The process that runs a user's reward function: one JSON line in, one JSON line out per problem.

The function is arbitrary code of the user: it may hang, print, start programs, or crash. So it runs here.
A watchdog thread of the interpreter ends the process at the time limit, also inside one long operation of
C code; the end of standard input, which a killed parent closes, ends the whole process group. What the
function prints, and where it hung, goes to standard error (WORKDIR/reward.log). Rows of data arrive as JSON
and are never evaluated. This module does not import JAX.
"""

import faulthandler
import importlib
import itertools
import json
import math
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO


class RewardFault(Exception):
    """A result that is not a reward; `sample` is the rollout at fault, counted from 0, or None."""

    def __init__(self, text: str, sample: int | None = None):
        super().__init__(text)
        self.sample = sample


def load(name: str) -> Callable[..., Any]:
    """Return the function that `module:function` names. Raises RewardFault: there is none."""
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # a module may raise anything when it is imported
        raise RewardFault(f"cannot be imported: {described(error)}") from error
    if not callable(found):
        raise RewardFault(f"is {type(found).__name__}, not a function")
    return found


def rewards(result: Any, count: int) -> list[float]:
    """Return `count` finite numbers from 0 to 1 from what a reward function returned.

    Any sequence is accepted whose items `float` accepts, texts excepted: lists, arrays, tensors, booleans.
    Raises RewardFault: the wrong type or length, or an item that is no number from 0 to 1.
    """
    if isinstance(result, (str, bytes, dict)):
        raise RewardFault(f"returned {_shown(result)}, wanted a list of {count} numbers")
    try:
        items = list(itertools.islice(result, count + 1))
    except TypeError:
        raise RewardFault(f"returned {_shown(result)}, wanted a list of {count} numbers") from None
    if len(items) != count:
        some = f"more than {count}" if len(items) > count else len(items)
        raise RewardFault(f"returned {some} rewards for {count} rollouts")
    return [_number(item, sample) for sample, item in enumerate(items)]


def _number(item: Any, sample: int) -> float:
    try:
        value = math.nan if isinstance(item, (str, bytes)) else float(item)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0.0 <= value <= 1.0:  # also false for nan
        raise RewardFault(f"returned {_shown(item)}, wanted a number from 0 to 1", sample)
    return value


def described(error: BaseException) -> str:
    """Return an exception in one line: its type, text, and the last line of code that it came from."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(": ")
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else text


def answer(function: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    """Call the function for one problem; return {"rewards"} or {"fault", "sample"}."""
    texts, rows = request["texts"], request["rows"]
    count = len(texts)
    try:
        return {"rewards": rewards(function(texts, rows), count)}
    except RewardFault as fault:
        return {"fault": str(fault), "sample": fault.sample}
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # of the user's function
        traceback.print_exc()
        return {"fault": f"raised {described(error)}", "sample": None}


def main() -> None:
    """Serve until standard input closes. Arguments: `module:function`, and the seconds of a call."""
    name, seconds = sys.argv[1], float(sys.argv[2])
    # The function's prints, and programs that it starts, must reach neither the requests nor the answers.
    requests_in, answers_out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    for number in (signal.SIGINT, signal.SIGTERM):  # the run handles them and ends this process
        signal.signal(number, signal.SIG_IGN)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests_in, requests), daemon=True).start()

    def reply(message: dict[str, Any]) -> None:
        sys.stdout.flush()
        answers_out.write(json.dumps(message).encode() + b"\n")
        answers_out.flush()

    try:
        function = load(name)
    except RewardFault as fault:
        reply({"fault": str(fault), "sample": None})
        return
    reply({"ready": True})
    while True:
        request = json.loads(requests.get())
        faulthandler.dump_traceback_later(seconds, exit=True)
        message = answer(function, request)
        faulthandler.cancel_dump_traceback_later()
        reply(message)


def _read(source: BinaryIO, requests: queue.SimpleQueue) -> None:
    """Queue the lines of `source`; at its end kill this process and every program that it has started."""
    for line in source:
        requests.put(line)
    if os.getpgrp() == os.getpid():  # started by `rewards.RewardPool`
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(0)


def _shown(value: Any) -> str:
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of a class of the user's
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


if __name__ == "__main__":
    main()
