"""Trace the steps that `profile.{start_step,steps}` select to WORKDIR/profile, for xprof and Perfetto."""

import contextlib
import json
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

import jax

FOLDER = "profile"
STEP = "step"  # the name of the span of one step
STAGES = ("rollout", "score", "read", "rows", "update")  # the names of the spans of its stages
MEMORY = "memory.jsonl"  # the memory timeline, in the folder of the trace
_EVERY_S = 0.02
_DURING = "stage: "
# The stages that the process is in, outermost first, and when each began; for the watchdog.
_open: list[tuple[str, float]] = []


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Mark a named span in the host's trace, one of `STAGES` or another; almost free when not tracing.

    An error inside the span gets the name as a note, which `stage_of` reads.
    """
    with jax.profiler.TraceAnnotation(name):
        _open.append((name, time.monotonic()))
        try:
            yield
        except Exception as error:
            error.add_note(_DURING + name)
            raise
        finally:
            _open.pop()


def current() -> tuple[str, float] | None:
    """Return the innermost stage that the process is in, and for how many seconds; None outside of stages.

    Stages are opened by one thread; any thread may ask.
    """
    stages = tuple(_open)
    if not stages:
        return None
    name, began = stages[-1]
    return name, time.monotonic() - began


def stage_of(error: BaseException) -> str | None:
    """Return the innermost stage in which an error was raised."""
    notes = (note for note in getattr(error, "__notes__", ()) if note.startswith(_DURING))
    return next((note.removeprefix(_DURING) for note in notes), None)


class Tracer:
    """Trace steps `start_step` to `start_step + steps - 1` to WORKDIR/profile; with 0 steps, none."""

    def __init__(
        self,
        workdir: pathlib.Path,
        section: object,
        *,
        memory: Callable[[], float],
    ):
        self._folder = workdir / FOLDER
        self._first: int = section.start_step  # type: ignore[attr-defined]
        self._last: int = self._first + section.steps - 1  # type: ignore[attr-defined]
        self._timeline = _Timeline(self._folder / MEMORY, memory)
        self._tracing = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Wrap one step of the run; start and stop the trace where due."""
        if self._first <= number <= self._last and not self._tracing:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # events of every Python call would hide the rest
            jax.profiler.start_trace(str(self._folder), profiler_options=options)
            self._timeline.start()
            self._tracing = True
        try:
            with jax.profiler.StepTraceAnnotation(STEP, step_num=number):
                yield
        except BaseException:
            self.stop()
            raise
        if number >= self._last:
            self.stop()

    def stop(self) -> None:
        """End the trace if one is running."""
        if self._tracing:
            self._tracing = False
            self._timeline.stop()
            jax.profiler.stop_trace()


class _Timeline:
    """Memory in use, sampled by a thread every 20 ms, as JSONL of seconds and bytes."""

    def __init__(self, file: pathlib.Path, memory: Callable[[], float]):
        self._file, self._memory = file, memory

    def start(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        began = time.perf_counter()
        with self._file.open("w", encoding="utf-8") as file:
            while not self._done.wait(_EVERY_S):
                seconds = round(time.perf_counter() - began, 3)
                file.write(json.dumps({"s": seconds, "bytes": int(self._memory())}) + "\n")
