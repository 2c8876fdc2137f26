"""The matrix products of a step of `tiny` alone: a floor for its scoring and its update on this machine.

    python -m tests.support.products [ROWS WIDTH]...      # 32 100 and 16 200, the micro-batches of tiny

The products of a layer are timed together, the least of seven calls (opd_jax/tools/bench/floors.py).
"""

import sys

from configs import stable_opd
from opd_jax import host_memory
from opd_jax.tools.bench.floors import Floors
from opd_jax.training.make_setup import make_setup


def main(shapes: list[tuple[int, int]]) -> None:
    """Print seconds of the products of scoring and of a gradient, for each shape of micro-batch."""
    spec = make_setup(stable_opd.get_config("tiny")).spec
    assert spec.teacher is not None
    floors = Floors()
    for rows, width in shapes:
        sizes = {"logits": width, "most_tokens": rows * width}
        student = floors.forward(spec.student, rows, width, **sizes)
        score = student + floors.forward(spec.teacher, rows, width, **sizes)
        gradient = 2 * student + floors.backward(
            spec.student, rows, width, **sizes
        )  # and a reference
        print(f"{rows} x {width}: score {1e3 * score:.1f} ms, gradient {1e3 * gradient:.1f} ms")


if __name__ == "__main__":
    host_memory.keep_freed()
    host_memory.configure_jax()
    numbers = [int(text) for text in sys.argv[1:]] or [32, 100, 16, 200]
    main(list(zip(numbers[::2], numbers[1::2], strict=True)))
