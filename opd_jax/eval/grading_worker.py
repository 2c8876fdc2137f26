"""The process that runs math-verify: one JSON line in ({"text", "gold"}), one grade name out.

Answers come from models and files, and math-verify evaluates what they say: a tower of powers can
take forever or eat the memory. So it runs here, under a memory limit, and the parent
(`grade.Grader`) kills it when an answer takes too long. Kept free of JAX: it starts in a second.
"""

import contextlib
import json
import logging
import resource
import sys
import warnings
from typing import Any

from math_verify import parse, verify

from opd_jax.eval.boxed import boxed_answer

_MEMORY = 4 * 2**30


def grade(text: str, gold: str) -> str:
    """Grade name of an answer: CORRECT, WRONG, or UNPARSED (no box, or nothing math-verify can read)."""
    boxed = boxed_answer(text)
    answer = _parse(boxed) if boxed is not None else []
    if not answer:
        return "UNPARSED"
    # The order matters: verify(gold, answer) is not symmetric.
    return "CORRECT" if verify(_parse(gold), answer, timeout_seconds=None) else "WRONG"


def _parse(expression: str) -> list[Any]:
    return parse(f"\\boxed{{{expression}}}", parsing_timeout=None)


def main() -> None:
    """Serve until standard input closes."""
    with contextlib.suppress(
        ValueError, OSError
    ):  # macOS has no such limit; the time limit remains
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            outcome = grade(request["text"], request["gold"])
        except (Exception, RecursionError, MemoryError):  # whatever sympy makes of a hostile answer
            outcome = "UNPARSED"
        print(outcome, flush=True)


if __name__ == "__main__":
    main()
