"""Synthetic runs for the collapse guard: what healthy and collapsing runs may look like.

`python -m tests.support.guard_traces [SEEDS]` prints the table of docs/measurements/guard.md;
`python -m tests.support.guard_traces WORKDIR...` says what the guard would have said of runs that were made.

A run is a mean per step of three shares, from which rollouts are drawn: prompts differ (a beta
distribution whose intraclass correlation is 0.3), the samples of a prompt are alike, and only a
truncated rollout can be flagged repetitive.
"""

import json
import pathlib
import sys
from collections.abc import Callable

import numpy as np

from opd_jax import config as configuration
from opd_jax.training import collapse_detector, collapse_guard

MEASURED = pathlib.Path(__file__).parent / "guard_runs"
STEPS = 300
STEP = np.arange(1, STEPS + 1)
CORRELATION = 0.3  # of the samples of one prompt
BATCHES = ((4, 4), (16, 1), (16, 4), (64, 1), (64, 4))  # prompts, samples of each
Means = tuple[np.ndarray, np.ndarray, np.ndarray]  # truncated, repetitive, repeated tokens


def rise(start: float, steps: float) -> np.ndarray:
    """From 0 at `start` to 1, linear in `steps` steps."""
    return np.clip((STEP - start) / steps, 0, 1)


def surge(start: float, steps: float) -> np.ndarray:
    """From 1% at `start` to 99%, logistic, in `steps` steps."""
    return 1 / (1 + np.exp(-9.2 * ((STEP - start) / steps - 0.5)))


def flat(truncated: float, repetitive: float) -> Means:
    zero = np.zeros(STEPS)
    return zero + truncated, zero + repetitive, zero + 0.3


HEALTHY: dict[str, Means] = {
    "nothing is truncated": flat(0.0, 0.0),
    "truncation 0.02": flat(0.02, 0.005),
    "truncation 0.23": flat(0.23, 0.01),
    "truncation 0.5": flat(0.5, 0.01),
    "truncation 0.8": flat(0.8, 0.02),
    "truncation 0.3, repetition 0.05": flat(0.3, 0.05),
    "a budget too short for the style": (0.9 + 0.1 * rise(5, 15), np.zeros(STEPS), np.full(STEPS, 0.3)),
    "length grows, as in RL": (
        0.02 + 0.35 * STEP / STEPS, 0.005 + 0.01 * STEP / STEPS, 0.3 + 0.1 * STEP / STEPS,
    ),
    "length grows in 60 steps": (
        0.05 + 0.35 * rise(20, 60), np.full(STEPS, 0.005), 0.3 + 0.1 * rise(20, 60),
    ),
    "truncation falls": (
        0.5 - 0.45 * rise(5, 60), 0.06 - 0.05 * rise(5, 60), 0.4 - 0.1 * rise(5, 60),
    ),
    "warm-up, then a longer style": (
        0.1 + 0.2 * rise(10, 30), np.full(STEPS, 0.01), 0.3 + 0.05 * rise(10, 30),
    ),
    "a hard batch every 50 steps": (
        0.1 + 0.35 * (STEP % 50 == 0), 0.005 + 0.05 * (STEP % 50 == 0), 0.3 + 0.05 * (STEP % 50 == 0),
    ),
    "the data's difficulty comes in waves": (
        0.25 + 0.08 * np.sin(STEP / 6.4), 0.01 + 0.005 * np.sin(STEP / 6.4), 0.3 + 0.03 * np.sin(STEP / 6.4),
    ),
}  # fmt: skip


def collapse(base: float, up: np.ndarray, loops: float, later: np.ndarray) -> Means:
    """Truncation from `base` to 0.97 as `up` says, repetition to `loops` and tokens as `later` says."""
    return base + (0.97 - base) * up, 0.003 + loops * later, 0.3 + 0.3 * later


def prototype(start: int) -> Means:
    """As measured once: TruncRate 0 at the start, 0.34 at 10, 0.91 at 30, 0.95 at 50; RepRate to 0.27."""
    points = [0, 10, 30, 50]
    truncated = np.interp(STEP - start, points, [0, 0.34, 0.91, 0.95])
    repetitive = np.interp(STEP - start, [0, 50], [0, 0.27])
    return truncated, repetitive, 0.3 + repetitive


COLLAPSES: dict[str, Callable[[int], Means]] = {
    "measured once, from step 0 on": lambda start: prototype(0),
    "the same, later": prototype,
    "0 -> 0.97 in 30 steps": lambda t: collapse(0, rise(t, 30), 0.45, rise(t, 30)),
    "0 -> 0.97 in 30 steps, loops 5 later": lambda t: collapse(0, rise(t, 30), 0.3, rise(t + 5, 30)),
    "0.23 -> 0.97 in 30 steps": lambda t: collapse(0.23, rise(t, 30), 0.45, rise(t, 30)),
    "0.23 -> 0.97 in 30 steps, loops 5 later": lambda t: collapse(0.23, rise(t, 30), 0.3, rise(t + 5, 30)),
    "0.5 -> 0.97 in 30 steps": lambda t: collapse(0.5, rise(t, 30), 0.45, rise(t, 30)),
    "0.5 -> 0.97 in 30 steps, loops 5 later": lambda t: collapse(0.5, rise(t, 30), 0.3, rise(t + 5, 30)),
    "0.23 -> 0.97 in 100 steps": lambda t: collapse(0.23, rise(t, 100), 0.3, rise(t, 100)),
    "0.5 -> 0.97 in 100 steps": lambda t: collapse(0.5, rise(t, 100), 0.3, rise(t, 100)),
    "0 -> 0.97, logistic in 30 steps": lambda t: collapse(0, surge(t, 30), 0.45, surge(t, 30)),
    "0.23 -> 0.97, logistic in 30 steps": lambda t: collapse(0.23, surge(t, 30), 0.45, surge(t, 30)),
    "0.5 -> 0.97, logistic in 30 steps": lambda t: collapse(0.5, surge(t, 30), 0.45, surge(t, 30)),
    "0.23 -> 0.97 in 30 steps, nothing flagged": lambda t: collapse(0.23, rise(t, 30), 0.0, rise(t, 30)),
    "0.23 -> 0.97 in 30 steps, truncation only": lambda t: collapse(0.23, rise(t, 30), 0.0, rise(t, 30) * 0),
}  # fmt: skip


def rows(means: Means, prompts: int, samples: int, seed: int) -> list[dict[str, float]]:
    """Metrics of a run that is drawn from the means."""
    draw = np.random.default_rng(seed)
    truncated, repetitive, repeated = means
    spread = (1 - CORRELATION) / CORRELATION
    inside = np.clip(truncated, 1e-6, 1 - 1e-6)[:, None]
    shares = draw.beta(inside * spread, (1 - inside) * spread, (STEPS, prompts))
    shares = np.where(truncated[:, None] <= 0, 0.0, shares)
    count = draw.binomial(samples, shares).sum(axis=1)
    flagged = draw.binomial(count, np.minimum(repetitive / np.maximum(truncated, 1e-9), 1))
    tokens = np.clip(repeated + draw.normal(0, 0.1 / np.sqrt(prompts), STEPS), 0, 1)
    n = prompts * samples
    return [
        {
            "rollout/truncation_rate": float(count[i] / n),
            "rollout/repetition_rate": float(flagged[i] / n),
            "score/repeated_token_fraction": float(tokens[i]),
        }
        for i in range(STEPS)
    ]


def measured(name: str) -> list[dict[str, float]]:
    """Return the metrics of a real run of the embedded models with 64 rollouts per step, from step 1 on."""
    stored = json.loads((MEASURED / f"{name}.json").read_text())
    return [dict(zip(stored["columns"], values, strict=True)) for values in stored["rows"]]


def rules(prompts: int = 16, samples: int = 4, **changes: object) -> collapse_guard.Rules:
    """The rules of the default config at a batch size."""
    config = configuration.default()
    config.rollout.prompts_per_step, config.rollout.samples_per_prompt = prompts, samples
    config.guard.update(changes)
    return collapse_guard.make_rules(config)


def first_alarm(
    run: list[dict[str, float]], settings: collapse_guard.Rules
) -> collapse_detector.Alarm | None:
    """The first alarm of a run."""
    state = collapse_guard.State()
    for step, row in enumerate(run, start=1):
        state, alarm = collapse_detector.observe(state, step, row, settings)
        if alarm is not None:
            return alarm
    return None


def false_alarms(means: Means, prompts: int, samples: int, seeds: int) -> int:
    """Healthy runs, of so many, with an alarm."""
    settings = rules(prompts, samples)
    found = (first_alarm(rows(means, prompts, samples, seed), settings) for seed in range(seeds))
    return sum(alarm is not None for alarm in found)


def detections(name: str, prompts: int, samples: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """(lead, lag) of the alarms of collapsing runs: steps from the alarm to the first mean TruncRate
    above 0.9, -inf where there was none; and from the estimated onset to the true one."""
    leads, errors = [], []
    settings = rules(prompts, samples)
    for seed in range(seeds):
        start = 20 + seed * 13 % 150
        means = COLLAPSES[name](start)
        start = 0 if "from step 0" in name else start
        crossed = int(np.argmax(means[0] > 0.9)) + 1
        alarm = first_alarm(rows(means, prompts, samples, seed), settings)
        leads.append(-np.inf if alarm is None else crossed - alarm.step)
        if alarm is not None:
            errors.append(alarm.onset - start)
    return np.array(leads), np.array(errors)


def main(seeds: int) -> None:
    """Print both tables."""
    heads = "".join(f"{f'{p}x{s}':>16}" for p, s in BATCHES)
    print(f"{f'healthy runs with an alarm, of {seeds}':46}{heads}")
    for name, means in HEALTHY.items():
        counts = [false_alarms(means, *batch, seeds) for batch in BATCHES]
        print(f"{name:46}" + "".join(f"{count:>16}" for count in counts))
    found = {name: [detections(name, *batch, seeds) for batch in BATCHES] for name in COLLAPSES}
    print(f"\n{'lead: median (5%, worst)':46}{heads}")
    for name, results in found.items():
        cells = [
            f"{np.median(x):.0f} ({np.percentile(x, 5):.0f}, {x.min():.0f})" for x, _ in results
        ]
        print(f"{name:46}" + "".join(f"{cell:>16}" for cell in cells))
    print(f"\n{'onset found - true one: 5%, median, 95%':46}{heads}")
    for name, results in found.items():
        cells = [" ".join(f"{x:.0f}" for x in np.percentile(e, [5, 50, 95])) for _, e in results]
        print(f"{name:46}" + "".join(f"{cell:>16}" for cell in cells))


def replay(workdir: pathlib.Path) -> None:
    """Print what the guard finds in the metrics.jsonl of a run."""
    rollout = json.loads((workdir / "config.json").read_text())["rollout"]
    settings = rules(rollout["prompts_per_step"], rollout["samples_per_prompt"], action="warn")
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    state, steps, said = collapse_guard.State(), 0, []
    for line in lines:
        state, alarm = collapse_detector.observe(state, line["step"], line, settings)
        state, response = collapse_guard.respond(state, line["step"], alarm, settings, [])
        said += response.lines
        steps += "rollout/truncation_rate" in line
    print(f"{workdir}: {steps} steps", *(said or ["no alarm"]), sep="\n  ")


if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].isdigit():
        for argument in sys.argv[1:]:
            replay(pathlib.Path(argument))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)


def row(truncated: float, repetitive: float = 0.0, **more: float) -> dict[str, float]:
    return {
        "rollout/truncation_rate": truncated,
        "rollout/repetition_rate": repetitive,
        **more,
    }


def observed(
    run: list[dict[str, float]],
    settings: collapse_guard.Rules,
    state: collapse_guard.State | None = None,
):
    """State after the rows, and all alarms."""
    state, alarms = state or collapse_guard.State(), []
    for step, metrics in enumerate(run, start=1):
        state, alarm = collapse_detector.observe(state, step, metrics, settings)
        alarms += [alarm] if alarm else []
    return state, alarms
