"""The suite `h200`: one NVIDIA H200, first correctness, then speed by importance, in calls of 8 minutes."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp

from opd_jax.errors import ConfigError
from opd_jax.memory_plan.step_time import EFFICIENCY
from opd_jax.models import ModelConfig
from opd_jax.models.remat import POLICIES
from opd_jax.tools.bench import cases, ceilings, choices, correctness, real_shapes, workloads
from opd_jax.tools.bench.cases import Bench
from opd_jax.tools.bench.measure import Row, Timing, make_row
from opd_jax.tools.bench.run import Case, Options, on_gpu, run_cases
from opd_jax.workdir import atomic

QWEN_1_5B = ModelConfig(
    model_type="qwen2", vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_layers=28,
    num_heads=12, num_kv_heads=2, head_dim=128, rope_theta=1e6, rms_norm_eps=1e-6,
    max_position=32_768, tie_embeddings=True, qkv_bias=True, qk_norm=False, eos_token_ids=(),
)  # fmt: skip
QWEN_7B = dataclasses.replace(
    QWEN_1_5B, vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_heads=28,
    num_kv_heads=4, tie_embeddings=False,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements; `TOY` has small ones for dry runs."""

    student: ModelConfig = QWEN_1_5B
    teacher: ModelConfig = QWEN_7B
    slots: tuple[int, int] = (256, 64)
    live: int = 8  # slots of a rollout's end
    teacher_slots: tuple[int, int] = (
        64,
        128,
    )  # caches for 256 do not fit together with the weights
    cache: int = 8192
    prompt: int = 192
    far: int = 2048  # a second prompt length, far from the first
    steps: int = 128
    row: int = 8192
    microbatch_tokens: int = 16_384
    token_chunk: int = 2048
    response: int = 7168  # response tokens of the paper's rollouts
    shortened: int = 320  # response tokens of the step that is run completely
    rollouts: int = 256
    square: int = 8192
    copy_gib: float = 4.0
    widths: tuple[int, int] = (2304, 9216)  # of rows: a quarter, and all of the paper's
    checked: int = 2048  # response tokens whose log-probs are compared


_TOY = dataclasses.replace(
    correctness.CONFIG, vocab_size=128, hidden_size=64, intermediate_size=64, num_heads=2,
    num_kv_heads=1, head_dim=32,
)  # fmt: skip
TOY = Sizes(
    student=_TOY, teacher=dataclasses.replace(_TOY, vocab_size=130, tie_embeddings=False),
    slots=(3, 2), live=1, teacher_slots=(1, 2), cache=40, prompt=4, far=8, steps=4, row=16,
    microbatch_tokens=32, token_chunk=16, response=24, shortened=4, rollouts=2, square=64,
    copy_gib=0.001, widths=(66, 130), checked=12,
)  # fmt: skip


def run(options: Options) -> list[Row]:
    """Run all cases within the budget; write the target description next to the JSON file.

    Raises ConfigError where there is no GPU and the run is not a dry one.
    """
    if not on_gpu() and not options.dry:
        raise ConfigError(
            f"suite h200: JAX sees no GPU (backend {jax.default_backend()!r}); run it on a machine with a "
            "GPU and jax[cuda13], or use --suite=cpu, or --dry for toy shapes"
        )
    sizes = TOY if options.dry else Sizes()
    bench = Bench(
        repeats=options.repeats, most_s=10.0,
        microbatch_tokens=sizes.microbatch_tokens, token_chunk=sizes.token_chunk,
    )  # fmt: skip
    listed = [
        *_checks(options),
        *_real_shapes(sizes),
        *_speed(bench, sizes),
        *_paper(bench, sizes),
        *_choices(bench, sizes),
    ]

    def keep(row: Row) -> None:
        bench.kept[row.name] = row

    return run_cases("h200", listed, options, keep=keep)


def _checks(options: Options) -> list[Case]:
    """Return cases for the target description, and for the device's results against float64."""
    target = (options.out or pathlib.Path("runs/bench")).with_suffix(".target_config.txt")
    listed = [Case("target config", "", functools.partial(_write_target, target))]
    for dtype in ("float32", "bfloat16"):
        for check in (correctness.logprobs, correctness.decoding, correctness.gradients):
            name = f"check: {check.__name__}"
            listed.append(Case(name, dtype, functools.partial(check, dtype)))
    return listed


def _real_shapes(sizes: Sizes) -> list[Case]:
    """Return cases for attention, a repeated gradient and long responses at the shapes of real models."""
    listed = []
    for config, label in ((sizes.student, "1.5B"), (sizes.teacher, "7B")):
        for width, most in zip(sizes.widths, (12, 4), strict=True):
            fn = functools.partial(real_shapes.causal, config, width=width, most_rows=most)
            listed.append(Case(f"check: attention {label}, {width}", "", fn))
        for live in (sizes.slots[1], sizes.live):
            fn = functools.partial(
                real_shapes.cached, config, rows=sizes.slots[1], cache=sizes.cache, live=live
            )
            listed.append(Case(f"check: decode attention {label}, {live} live", "", fn))
    twice = functools.partial(
        real_shapes.repeated, sizes.student, rows=2, width=sizes.widths[0],
        microbatch_tokens=sizes.microbatch_tokens, token_chunk=sizes.token_chunk,
    )  # fmt: skip
    gap = functools.partial(
        real_shapes.sampled, sizes.student, rows=8, prompt=sizes.prompt, new=sizes.checked
    )
    return [
        *listed,
        Case("check: sampler to scorer", "", gap),
        Case("check: one gradient twice", "", twice),
    ]


def _speed(bench: Bench, sizes: Sizes) -> list[Case]:
    """Return cases for limits, decoding, scoring, updates with each remat policy, and a shortened step."""
    student, teacher, dtype = sizes.student, sizes.teacher, jnp.bfloat16

    def machine() -> list[Row]:
        bench.ceilings, rows = ceilings.measure(
            [(sizes.square,) * 3, *ceilings.products_of(student, sizes.row)],
            dtype=dtype, copy_gib=sizes.copy_gib, repeats=bench.repeats,
        )  # fmt: skip
        return rows

    def decoding(config: ModelConfig, label: str, slots: int, prompt: int) -> Case:
        name = f"decode {label}, {slots} at {prompt}"
        fn = functools.partial(
            cases.decoding, bench, name, config, dtype,
            slots=slots, prompt=prompt, total=sizes.cache, steps=sizes.steps,
        )  # fmt: skip
        return Case(name, f"{slots} x {sizes.cache}", fn)

    def updating(remat: str) -> Case:
        name = f"update 1.5B, {remat}"
        fn = functools.partial(
            cases.updating, bench, name, student, dtype, rows=2, width=sizes.row, remat=remat
        )
        return Case(name, f"2 x {sizes.row}", fn)

    def scoring() -> list[Row]:
        pair = [workloads.random_subject(config, dtype) for config in (student, teacher)]
        return cases.scoring(bench, "score 1.5B + 7B", *pair, rows=4, width=sizes.row)

    def step() -> list[Row]:
        judge = workloads.random_subject(teacher, dtype)
        rows = cases.whole_step(
            dataclasses.replace(bench, repeats=1), "OPD step, shortened", student, judge,
            batch=sizes.rollouts, prompt=sizes.prompt, new=sizes.shortened, remat="full",
        )  # fmt: skip
        return [dataclasses.replace(rows[0], note="1.5B and 7B; remat full")]

    many, few = sizes.slots
    policies = sorted(POLICIES, key=lambda name: name == "none")  # largest last
    return [
        Case("ceilings", "", machine, always=True),
        Case("OPD step, shortened", f"{sizes.rollouts} x {sizes.shortened}", step),
        decoding(student, "1.5B", many, sizes.prompt),
        decoding(student, "1.5B", many, sizes.far),
        Case("score 1.5B + 7B", f"4 x {sizes.row}", scoring),
        *(updating(remat) for remat in policies),
        Case("plan's efficiencies", "", lambda: _efficiencies(bench)),
        Case("OPD step, extrapolated", "", lambda: _extrapolated(bench, sizes)),
        decoding(student, "1.5B", few, sizes.prompt),
        decoding(student, "1.5B", sizes.live, sizes.prompt),
        *(decoding(teacher, "7B", slots, sizes.prompt) for slots in sizes.teacher_slots),
    ]


def _choices(bench: Bench, sizes: Sizes) -> list[Case]:
    """Return cases for A/B measurements of open design choices."""
    few = sizes.slots[1]
    listed = []
    for name in choices.ATTENTIONS:
        fn = functools.partial(
            choices.attention, bench, name, sizes.student, rows=few, cache=sizes.cache
        )
        listed.append(Case(f"A/B attention: {name}", f"{few} x {sizes.cache}", fn))
    for name in ("default", "WHILE"):
        fn = functools.partial(
            choices.graphs, bench, name, sizes.student, jnp.bfloat16,
            rows=few, cache=sizes.cache, steps=sizes.steps,
        )  # fmt: skip
        listed.append(Case(f"A/B command buffers: {name}", f"{few} x {sizes.cache}", fn))
    return listed


def _paper(bench: Bench, sizes: Sizes) -> list[Case]:
    """Return a case for the paper's complete rollouts, which runs only if the remaining time is enough."""

    def rollouts() -> list[Row]:
        subject = workloads.random_subject(sizes.student, jnp.bfloat16)
        once = dataclasses.replace(bench, repeats=1)
        return cases.generation(
            once, subject, batch=sizes.rollouts, prompt=sizes.prompt, new=sizes.response, warm=True
        )

    def needs_s() -> float:
        return 1.2 * _generation_s(bench, sizes) + 20

    shape = f"{sizes.prompt}+{sizes.response}"
    return [Case(f"generate, batch {sizes.rollouts}", shape, rollouts, needs_s)]


def _generation_s(bench: Bench, sizes: Sizes) -> float:
    """Return the seconds for decoding the paper's rollouts, from two rows at other lengths."""
    names = [f"decode 1.5B, {sizes.slots[0]} at {prompt}" for prompt in (sizes.prompt, sizes.far)]
    if not all(name in bench.kept for name in names):
        raise RuntimeError("a decode row that this estimate needs is missing")
    near, far = (
        cases.decode_point(bench.kept[name], prompt=prompt, steps=sizes.steps)
        for name, prompt in zip(names, (sizes.prompt, sizes.far), strict=True)
    )
    return cases.decode_seconds(near, far, first=sizes.prompt, steps=sizes.response)


def _efficiencies(bench: Bench) -> list[Row]:
    """Say which share of this machine's measured limits each stage reached, beside what a plan assumes."""
    stages = {"rollout": "decode 1.5B", "score": "score", "update": "update 1.5B"}
    rows = []
    for stage, start in stages.items():
        measured = [row for name, row in bench.kept.items() if name.startswith(start)]
        if not measured:
            raise RuntimeError(f"no row of {start!r} is there to compare with the plan")
        shares = [row.fraction or 0.0 for row in measured]
        note = (
            f"a plan assumes {EFFICIENCY[stage]:.0%} of the limits (memory_plan/step_time.py); measured "
            + ", ".join(f"{share:.0%} ({row.name})" for share, row in zip(shares, measured, strict=True))
        )  # fmt: skip
        rows.append(Row(f"plan's efficiency: {stage}", fraction=max(shares), note=note))
    return rows


def _extrapolated(bench: Bench, sizes: Sizes) -> list[Row]:
    """Estimate a complete step at the paper's shapes with responses of maximum length, without running it."""
    updates = [row for name, row in bench.kept.items() if name.startswith("update 1.5B")]
    scored = bench.kept.get("score 1.5B + 7B")
    if not updates or scored is None:
        raise RuntimeError("a scoring or update row that this estimate needs is missing")
    generate_s = _generation_s(bench, sizes)
    tokens = sizes.rollouts * (sizes.prompt + sizes.response)
    score_s = tokens / (scored.tokens_per_s or 1.0)
    update_s = tokens / max(row.tokens_per_s or 0.0 for row in updates)
    total_s = generate_s + score_s + update_s
    row = make_row(
        "OPD step, extrapolated", f"{sizes.rollouts} x {sizes.prompt}+{sizes.response}",
        Timing(0.0, (total_s,)), tokens=sizes.rollouts * sizes.response,
    )  # fmt: skip
    note = (
        f"ESTIMATED, not run. Decoding {generate_s:.1f} s, by linear extrapolation from two lengths; "
        f"scoring {score_s:.1f} s and update {update_s:.1f} s, from their tokens/s above"
    )
    return [dataclasses.replace(row, first_s=None, min_s=None, max_s=None, repeats=None, note=note)]


def _write_target(path: pathlib.Path) -> list[Row]:
    """Write the target description, with which another machine can compile for this one."""
    try:
        from jax._src.lib import xla_client  # there is no public API yet

        target = xla_client.get_topology_for_devices(jax.devices()).target_config
    except (ImportError, AttributeError) as error:
        return [
            Row(
                "target config",
                note=f"not written: jax {jax.__version__} has no such call ({error})",
            )
        ]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, str(target))
    return [Row("target config", note=f"written to {path}")]
