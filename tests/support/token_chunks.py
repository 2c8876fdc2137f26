"""Time and peak memory of scoring by `scoring.token_chunk`, on this machine.

    python -m tests.support.token_chunks [MODEL_FOLDER] [CHUNK]...     # random weights; 128 512 2048

Student and teacher have SmolLM2-135M's shapes, or the model of the folder; 8 full rows of 256 tokens. Each
size has a process of its own, for its peak; the processes run in turn, twice over.
"""

import statistics
import subprocess
import sys

ROUNDS, REPEATS = 2, 3


def one(chunk: int, folder: str) -> None:
    """Print the peak in GiB and the seconds of each repeat."""
    import jax.numpy as jnp

    from opd_jax import host_memory
    from opd_jax.models import catalog
    from opd_jax.tools.bench import workloads
    from opd_jax.tools.bench.measure import time_call, watch_memory

    host_memory.configure_jax()
    if folder:
        subject = workloads.loaded_subject(folder, jnp.float32)
    else:
        published = catalog.find("HuggingFaceTB/SmolLM2-135M-Instruct")
        assert published is not None
        subject = workloads.random_subject(published.model, jnp.float32)
    rows = workloads.random_rows(subject.config, 8, 256)
    sizes = {"microbatch_tokens": 2048, "token_chunk": chunk}
    with watch_memory() as peak:
        timing = time_call(
            lambda: workloads.score(subject, subject, rows.tokens_BT, rows.length_B, **sizes),
            repeats=REPEATS,
        )
    print(peak().gib, *timing.seconds)


def main(chunks: list[int], folder: str) -> None:
    """Run one process for each size and round, and print a line for each."""
    for _ in range(ROUNDS):
        for chunk in chunks:
            command = [sys.executable, "-m", "tests.support.token_chunks", f"--one={chunk}", folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peak, *times = map(float, done.stdout.split())
            middle, least = statistics.median(times), min(times)
            print(
                f"chunk {chunk}: {middle:.2f} s (least {least:.2f}), peak {peak:.2f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    first, *rest = [*sys.argv[1:], ""]
    if first.startswith("--one="):
        from opd_jax import host_memory

        host_memory.keep_freed()
        one(int(first.removeprefix("--one=")), rest[0])
    else:
        texts = [text for text in (first, *rest) if text]
        numbers = [int(text) for text in texts if text.isdigit()]
        main(numbers or [128, 512, 2048], "".join(text for text in texts if not text.isdigit()))
