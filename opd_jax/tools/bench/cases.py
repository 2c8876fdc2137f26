"""Cases shared by suites: each function measures a workload and returns its rows."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from opd_jax.models import Model, ModelConfig, flops
from opd_jax.models.flops import Work
from opd_jax.rollout import decode_state
from opd_jax.tools.bench import floors, workloads
from opd_jax.tools.bench.ceilings import Ceilings
from opd_jax.tools.bench.floors import Floors
from opd_jax.tools.bench.measure import (
    Peak,
    Row,
    Timing,
    difference,
    make_row,
    time_call,
    watch_memory,
)
from opd_jax.tools.bench.workloads import Subject

_SHORT = 8  # tokens of the shorter of two runs whose difference is the time of decoding


@dataclasses.dataclass
class Bench:
    """State shared by the cases of a suite: settings, the measured limits and floors, and rows by name."""

    repeats: int
    most_s: float  # no further repeat of a case starts after this many seconds
    microbatch_tokens: int
    token_chunk: int
    ceilings: Ceilings | None = None
    floors: Floors | None = None  # None: no row is compared with its own products
    kept: dict[str, Row] = dataclasses.field(default_factory=dict)

    def time(self, fn: Any, *, warm: bool = False) -> Timing:
        """Call `time_call` with this suite's settings."""
        return time_call(fn, repeats=self.repeats, most_s=self.most_s, warm=warm)

    def row(
        self,
        name: str,
        shape: str,
        timing: Timing,
        *,
        tokens: float,
        works: Sequence[Work],
        peak: Peak,
        note: str = "",
        floor_s: float | None = None,
    ) -> list[Row]:
        """Return the row, compared with the measured limits and its floor; `kept` has it by name."""
        limits = self.ceilings.limits() if self.ceilings else {}
        row = make_row(
            name, shape, timing,
            tokens=tokens, works=works if self.ceilings else (), peak=peak, **limits,
        )  # fmt: skip
        self.kept[name] = dataclasses.replace(row, note=note, floor_s=floor_s)
        return [self.kept[name]]


def generation(
    bench: Bench, subject: Subject, *, batch: int, prompt: int, new: int, warm: bool = False
) -> list[Row]:
    """Measure rollouts from the prompt to the last token of the budget: prefill and decoding.

    `warm`: the first of `repeats` calls counts too, including compilation.
    """
    prompts = workloads.prompts_at_random(subject.config, batch, prompt)
    with watch_memory() as peak:
        timing = bench.time(lambda: workloads.decode(subject, prompts, new).length_B, warm=warm)
    lengths = [prompt] * batch
    works = flops.prefill(subject.config, lengths, itemsize=subject.itemsize)
    works += flops.decode(subject.config, lengths, [new] * batch, itemsize=subject.itemsize)
    return bench.row(
        f"generate, batch {batch}", f"{prompt}+{new}", timing,
        tokens=batch * new, works=works, peak=peak(),
        floor_s=_rollout_floor(bench, subject, batch=batch, prompt=prompt, new=new),
    )  # fmt: skip


def refill(
    bench: Bench, config: ModelConfig, dtype: Any, *, slots: int, prompt: int, budget: int
) -> list[Row]:
    """Measure 4 times as many sequences as slots, in batches and with refilled slots.

    Lengths are spread evenly up to the budget.
    """
    count = 4 * slots
    lengths = np.ceil(np.arange(1, count + 1) * budget / count).astype(int)
    lengths = np.random.default_rng(0).permutation(lengths)
    subject = workloads.counting_subject(config, dtype)
    prompts, stop = workloads.counting_prompts(config, lengths.tolist(), prompt)

    def refilled() -> np.ndarray:
        return workloads.decode(
            subject, prompts, budget, slots=slots, stop_ids=(stop,)
        ).response_length_B

    def waiting() -> np.ndarray:
        parts = [prompts[i : i + slots] for i in range(0, count, slots)]
        rollouts = [workloads.decode(subject, part, budget, stop_ids=(stop,)) for part in parts]
        return np.concatenate([rollout.response_length_B for rollout in rollouts])

    works = flops.prefill(config, [prompt] * count, itemsize=subject.itemsize)
    works += _full_slots(config, lengths, slots=slots, prompt=prompt, itemsize=subject.itemsize)
    rows: list[Row] = []
    for name, fn in (("batches", waiting), ("refill", refilled)):
        _require_lengths(fn(), lengths)
        with watch_memory() as peak:
            timing = bench.time(fn)
        rows += bench.row(
            f"slots: {name}", f"{count} in {slots}, {prompt}+{budget}", timing,
            tokens=int(lengths.sum()), works=works, peak=peak(),
        )  # fmt: skip
    ratio = (rows[1].median_s or 0.0) / (rows[0].median_s or 1.0)
    return [rows[0], dataclasses.replace(rows[1], note=f"{ratio:.2f} of the time of batches")]


def decoding(
    bench: Bench,
    name: str,
    config: ModelConfig,
    dtype: Any,
    *,
    slots: int,
    prompt: int,
    total: int,
    steps: int,
) -> list[Row]:
    """Measure decode steps as the difference of a long and a short run; caches are `total` tokens long."""
    subject = workloads.counting_subject(config, dtype)

    def run(length: int) -> np.ndarray:
        prompts, stop = workloads.counting_prompts(config, [length] * slots, prompt)
        rollout = workloads.decode(subject, prompts, total - prompt, stop_ids=(stop,))
        _require_lengths(rollout.response_length_B, np.full(slots, length))
        return rollout.length_B

    with watch_memory() as peak:
        long = bench.time(lambda: run(_SHORT + steps))
        short = bench.time(lambda: run(_SHORT), warm=True)
    works = flops.decode(
        config, [prompt + _SHORT] * slots, [steps] * slots, itemsize=subject.itemsize
    )
    timing = difference(long, short)
    return bench.row(
        name, f"{slots} x {total}, {prompt} full", timing,
        tokens=slots * steps, works=works, peak=peak(),
        note=f"{timing.median_s / steps * 1e3:.2f} ms per step",
    )  # fmt: skip


def scoring(
    bench: Bench, name: str, student: Subject, teacher: Subject, *, rows: int, width: int
) -> list[Row]:
    """Measure scoring of full rows, with everything that a run's objective and metrics need."""
    batch_rows = workloads.random_rows(student.config, rows, width)
    with watch_memory() as peak:
        timing = bench.time(
            lambda: workloads.score(
                student,
                teacher,
                batch_rows.tokens_BT,
                batch_rows.length_B,
                microbatch_tokens=bench.microbatch_tokens,
                token_chunk=bench.token_chunk,
            )
        )
    works = [
        flops.forward(m.config, batch_rows.length_B, itemsize=m.itemsize)
        for m in (student, teacher)
    ]
    floor_s = None
    if bench.floors:
        floor_s = sum(
            bench.floors.forward(
                m.config, rows, width, logits=width, most_tokens=bench.microbatch_tokens
            )
            for m in (student, teacher)
        )
    return bench.row(
        name, f"{rows} x {width}", timing,
        tokens=rows * width, works=works, peak=peak(), floor_s=floor_s,
    )  # fmt: skip


def updating(
    bench: Bench, name: str, config: ModelConfig, dtype: Any, *, rows: int, width: int, remat: str
) -> list[Row]:
    """Measure forward, backward and AdamW on full rows."""
    batch_rows = workloads.random_rows(config, rows, width)
    with watch_memory() as peak:
        learner = workloads.Learner(
            config, None, dtype, remat=remat,
            microbatch_tokens=bench.microbatch_tokens, token_chunk=bench.token_chunk,
        )  # fmt: skip

        def run() -> Any:
            return learner.update(batch_rows), learner.state.params

        timing = bench.time(run)
    works = flops.update(config, batch_rows.length_B, itemsize=np.dtype(dtype).itemsize)
    floor_s = None
    if bench.floors:
        sizes = {"logits": width, "most_tokens": bench.microbatch_tokens}
        floor_s = bench.floors.forward(config, rows, width, **sizes)
        floor_s += bench.floors.backward(config, rows, width, **sizes)
    return bench.row(
        name, f"{rows} x {width}, remat {remat}", timing,
        tokens=rows * width, works=works, peak=peak(), floor_s=floor_s,
    )  # fmt: skip


def whole_step(
    bench: Bench,
    name: str,
    config: ModelConfig,
    teacher: Subject,
    *,
    batch: int,
    prompt: int,
    new: int,
    remat: str,
) -> list[Row]:
    """Measure roll out, score and update in the teacher's dtype; every response has the full budget."""
    dtype = teacher.dtype
    prompts = workloads.prompts_at_random(config, batch, prompt)
    with watch_memory() as peak:
        learner = workloads.Learner(
            config, teacher.config, dtype, remat=remat, prompt=prompt, new=new,
            microbatch_tokens=bench.microbatch_tokens, token_chunk=bench.token_chunk,
        )  # fmt: skip

        def run() -> Any:
            return learner.step(teacher.params, prompts), learner.state.params

        timing = bench.time(run)
    itemsize, lengths = np.dtype(dtype).itemsize, [prompt] * batch
    full = [prompt + new] * batch
    works = [
        *flops.prefill(config, lengths, itemsize=itemsize),
        *flops.decode(config, lengths, [new] * batch, itemsize=itemsize),
        flops.forward(config, full, itemsize=itemsize),
        flops.forward(teacher.config, full, itemsize=teacher.itemsize),
        *flops.update(config, full, itemsize=itemsize),
    ]
    floor_s = _rollout_floor(bench, teacher, batch=batch, prompt=prompt, new=new)
    if bench.floors and floor_s:
        sizes = {"logits": new, "most_tokens": bench.microbatch_tokens}
        floor_s += bench.floors.forward(teacher.config, batch, prompt + new, **sizes)
        # The student scores its rollouts, and computes them again in the update.
        floor_s += 2 * bench.floors.forward(config, batch, prompt + new, **sizes)
        floor_s += bench.floors.backward(config, batch, prompt + new, **sizes)
    return bench.row(
        name, f"{batch} x {prompt}+{new}", timing,
        tokens=batch * new, works=works, peak=peak(), floor_s=floor_s,
    )  # fmt: skip


def _rollout_floor(
    bench: Bench, subject: Subject, *, batch: int, prompt: int, new: int
) -> float | None:
    """Return the seconds of the products of prefill and of `new` decode steps; None without floors.

    A decode step is measured once, at the mean of the positions that the steps read.
    """
    if bench.floors is None:
        return None
    prefill = bench.floors.forward(
        subject.config, batch, prompt, logits=0, most_tokens=batch * prompt
    )
    model = decode_state.unstack(Model(subject.config, subject.params))
    step = floors.decode_step(model, batch, prompt + new, prompt + -(-new // 2))
    return prefill + new * floors.least(step)


def decode_seconds(
    near: tuple[float, float], far: tuple[float, float], *, first: int, steps: int
) -> float:
    """Return the seconds of `steps` decode steps from `first` positions on.

    `near`, `far`: two measured points (positions, seconds per step). The time of a step is assumed to be
    linear in the number of positions that it reads.
    """
    (near_at, near_s), (far_at, far_s) = near, far
    middle = first + (steps - 1) / 2
    return steps * (near_s + (far_s - near_s) * (middle - near_at) / (far_at - near_at))


def decode_point(row: Row, *, prompt: int, steps: int) -> tuple[float, float]:
    """Return (mean positions per sequence, seconds) of one step of a `decoding` row."""
    return prompt + _SHORT + (steps - 1) / 2, (row.median_s or 0.0) / steps


def _full_slots(
    config: ModelConfig, lengths: np.ndarray, *, slots: int, prompt: int, itemsize: int
) -> list[Work]:
    """Return the minimum work for decoding these lengths: all slots are full in every step."""
    steps = int(np.ceil(lengths.sum() / slots))
    positions = sum(prompt * int(n) + int(n) * (int(n) - 1) / 2 for n in lengths) / steps
    step = flops.decode_step(
        config, rows=round(lengths.sum() / steps), positions=positions, itemsize=itemsize
    )
    return [step] * steps


def _require_lengths(actual: np.ndarray, expected: np.ndarray) -> None:
    if not np.array_equal(np.asarray(actual), expected):
        raise RuntimeError(
            f"responses of a counting model have {np.asarray(actual).tolist()[:8]} tokens instead of "
            f"{expected.tolist()[:8]}: the model is too small to count over its vocabulary"
        )
