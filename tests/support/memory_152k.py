"""Peak memory of scoring and of the update at a vocabulary of 152,000, a token, beside naive ones.

    python -m tests.support.memory_152k            # what the compiler reserves, at three numbers of tokens
    python -m tests.support.memory_152k --run      # and what a process grew by, one process a case

"Beyond activations" is less the same thing with a vocabulary of 256.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import scoring
from opd_jax.models import decoder
from opd_jax.models.end_tokens import Events
from opd_jax.training import objective
from opd_jax.training.span_objective import SpanTerm
from opd_jax.training.terms import ON_ROLLOUTS, default_terms
from opd_jax.training.update import make_add
from opd_jax.types import Frozen, RolloutRows, SpanAnchors, Support
from tests.conftest import tiny_config

VOCABULARY, SMALL, WIDTH, CHUNK = 152_000, 256, 256, 256
TOKENS = (1024, 2048, 4096)
Case = tuple[Callable, tuple]  # a jitted function and the shapes of its arguments


def model(vocabulary: int):
    return tiny_config(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_layers=2, head_dim=16
    )


def shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def rows(tokens: int) -> RolloutRows:
    array_BT = shape(tokens // WIDTH, WIDTH)
    return RolloutRows(
        tokens_BT=shape(*array_BT.shape, dtype=jnp.int32),
        length_B=shape(tokens // WIDTH, dtype=jnp.int32),
        weight_BT=array_BT, advantage_BT=array_BT, sampler_logprob_BT=array_BT,
    )  # fmt: skip


def score(vocabulary: int, tokens: int) -> Case:
    """Student and teacher, everything that the objective and the metrics need."""
    config = model(vocabulary)
    params, given = decoder.abstract_params(config), rows(tokens)
    one, spec = decoder.Model(config, params), scoring.ScoreSpec(16, CHUNK, Events(vocabulary))
    step = jax.jit(lambda models, tokens_BT, length_B: scoring.score_part(
        models, tokens_BT, length_B, jnp.ones_like(length_B), None, spec
    ))  # fmt: skip
    return step, (scoring.Models(one, one), given.tokens_BT, given.length_B)


def score_with_reference(vocabulary: int, tokens: int) -> Case:
    """The same with the log-prob of a third model, from which an advantage is extrapolated."""
    step, (pair, *arrays) = score(vocabulary, tokens)
    return step, (pair.replace(reference=pair.student), *arrays)


def naive_score(vocabulary: int, tokens: int) -> Case:
    """The same statistics but the overlap, from whole arrays of log-probs."""
    config = model(vocabulary)
    params, given = decoder.abstract_params(config), rows(tokens)

    @jax.jit
    def one(student, teacher, tokens_BT, length_B):
        p, q = (
            jax.nn.log_softmax(decoder.forward(m, config, tokens_BT, length_B), axis=-1)
            for m in (student, teacher)
        )
        taken = [jnp.take_along_axis(x, tokens_BT[..., None], axis=-1) for x in (p, q)]
        entropies = [-jnp.sum(jnp.exp(x) * x, axis=-1) for x in (p, q)]
        return taken, entropies, jnp.sum(jnp.exp(p) * (p - q), axis=-1), jax.lax.top_k(p, 16)

    return one, (params, params, given.tokens_BT, given.length_B)


def update(vocabulary: int, tokens: int) -> Case:
    """A micro-batch's loss and gradient, added to the sum."""
    config = model(vocabulary)
    loss = objective.make_rollout_loss(
        default_terms(pg_weight=1.0), config,
        token_chunk=CHUNK, remat="none", events=Events(vocabulary),
    )  # fmt: skip
    params, weights = decoder.abstract_params(config), {n: shape() for n in ON_ROLLOUTS}
    return make_add(loss, jnp.float32), (params, Frozen(), rows(tokens), weights, params)


def update_of(numbers: dict, vocabulary: int, tokens: int) -> Case:
    """The same with a divergence, over a support of the teacher's top 16 or over the vocabulary."""
    config, terms = (
        model(vocabulary),
        default_terms(pg_weight=1.0, divergence_weight=1.0, **numbers),
    )
    loss = objective.make_rollout_loss(
        terms, config, token_chunk=CHUNK, remat="none", events=Events(vocabulary)
    )
    given, frozen = rows(tokens), Frozen()
    array_BT, params = given.weight_BT, decoder.abstract_params(config)
    if terms.over_vocabulary:
        frozen = Frozen(teacher=decoder.head_alone(params))
        hidden_BTD = shape(*array_BT.shape, config.hidden_size)
        given = given.replace(teacher_hidden_BTD=hidden_BTD)
    else:
        ids, logs = (shape(*array_BT.shape, 16, dtype=dtype) for dtype in (jnp.int32, jnp.float32))
        given = given.replace(support=Support(ids, logs, logs, array_BT))
    if terms.gated:
        given = given.replace(divergence_gate_BT=array_BT)
    weights = {n: shape() for n in ON_ROLLOUTS}
    return make_add(loss, jnp.float32), (params, frozen, given, weights, params)


FORWARD = {"direction": "forward", "support": "teacher"}
update_eopd = partial(update_of, FORWARD | {"form": "teacher_renormalised", "gate": "entropy"})
update_tropd = partial(update_of, FORWARD | {"gate": "acceptance"})
update_reverse = partial(update_of, {"direction": "reverse"})
update_mixture = partial(update_of, {"direction": "mixture", "reverse_share": 0.25})


def update_by_spans(compared: str, vocabulary: int, tokens: int) -> Case:
    """The same with a divergence by spans alone, of a teacher with a third of the ids, all of them shared."""
    config, others = model(vocabulary), vocabulary // 3
    terms = default_terms(pg_weight=0.0, divergence_weight=1.0, span_events=compared)
    ids = np.arange(others, dtype=np.int32)
    term = SpanTerm(compared, terms.on_rollouts, np.stack([ids, ids]), Events(others), others + 1)
    loss = objective.make_rollout_loss(
        terms, config, token_chunk=CHUNK, remat="none", events=Events(vocabulary), span_term=term
    )
    given = rows(tokens)
    whole_BT, array_BT = given.tokens_BT, given.weight_BT
    bool_BT = shape(*array_BT.shape, dtype=jnp.bool_)
    given = given.replace(
        teacher_hidden_BTD=shape(*array_BT.shape, config.hidden_size),
        spans=SpanAnchors(whole_BT, bool_BT, array_BT, whole_BT, array_BT, array_BT),
    )
    frozen = Frozen(teacher=decoder.head_alone(decoder.abstract_params(model(others))))
    params, weights = decoder.abstract_params(config), {n: shape() for n in ON_ROLLOUTS}
    return make_add(loss, jnp.float32), (params, frozen, given, weights, params)


def naive_update(vocabulary: int, tokens: int) -> Case:
    """The same through whole arrays of logits."""
    config = model(vocabulary)

    def loss(params, frozen, given, weights, sums):
        hidden = decoder.hidden_states(params, config, given.tokens_BT, given.length_B, sums=sums)
        logits = decoder.logits(decoder.head(params), hidden)
        logprob = jax.nn.log_softmax(logits, axis=-1)
        taken = jnp.take_along_axis(logprob, given.tokens_BT[..., None], axis=-1)[..., 0]
        ratio = jnp.exp(taken - given.sampler_logprob_BT)
        opd = -jnp.sum(given.weight_BT * ratio * given.advantage_BT)
        return weights["opd"] * opd, {"opd": opd}

    params, weights = decoder.abstract_params(config), {"opd": shape()}
    return make_add(loss, jnp.float32), (params, Frozen(), rows(tokens), weights, params)


CASES = {
    "score": score, "score with a reference": score_with_reference, "naive score": naive_score,
    "update": update, "update, EOPD": update_eopd, "update, TrOPD": update_tropd,
    "update, full reverse": update_reverse, "update, full mixture": update_mixture,
    "update, SimCT": partial(update_by_spans, "candidates"),
    "update, ULD": partial(update_by_spans, "sorted"),
    "update, GOLD": partial(update_by_spans, "matched"),
    "naive update": naive_update,
}  # fmt: skip


def reserved(case: str, vocabulary: int, tokens: int) -> int:
    """Bytes of temporaries and results that take no argument's place, says the compiler."""
    fn, arguments = CASES[case](vocabulary, tokens)
    memory = fn.lower(*arguments).compile().memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + results


def filled(x: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of small numbers. Rows have their full length: of a shorter one nothing is scored."""
    is_length = x.dtype == jnp.int32 and len(x.shape) == 1
    return jnp.full(x.shape, WIDTH if is_length else 1e-3, x.dtype)


def grown(case: str, vocabulary: int, tokens: int) -> int:
    """Bytes by which this process's peak grew while it ran the case once."""
    fn, arguments = CASES[case](vocabulary, tokens)
    compiled = fn.lower(*arguments).compile()
    arguments = jax.tree.map(filled, arguments)
    jax.block_until_ready(arguments)
    with open("/proc/self/status") as status:
        before = next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) * 1024
    jax.block_until_ready(compiled(*arguments))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        case, vocabulary, tokens = json.loads(sys.argv[2])
        print(grown(case, vocabulary, tokens))
        return

    def in_process(case: str, vocabulary: int, tokens: int) -> int:
        command = [sys.executable, "-m", "tests.support.memory_152k", "--one"]
        out = subprocess.check_output([*command, json.dumps([case, vocabulary, tokens])], text=True)
        return int(out)

    measure = in_process if "--run" in sys.argv else reserved
    for case in CASES:
        counts = TOKENS[:1] + TOKENS[-1:] if measure is in_process else TOKENS
        if "naive" in case:
            counts = counts[:2] if measure is reserved else (512, 1024)
        large = [measure(case, VOCABULARY, n) for n in counts]
        small = [measure(case, SMALL, n) for n in counts]
        beyond = [(a - b) for a, b in zip(large, small, strict=True)]
        slope = (beyond[-1] - beyond[0]) / (counts[-1] - counts[0])
        cells = ", ".join(f"{n}: {b / 2**20:.0f} MiB" for n, b in zip(counts, large, strict=True))
        print(f"{case:22s} {cells}; a token beyond activations {slope / 1e3:.2f} kB", flush=True)


if __name__ == "__main__":
    main()
