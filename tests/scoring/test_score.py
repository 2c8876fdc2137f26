"""The chunked scorer against direct numpy computations over the full vocabulary."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from opd_jax import scoring
from opd_jax.errors import ShapeError
from opd_jax.models import decoder
from opd_jax.models.end_tokens import Events
from opd_jax.types import TeacherRows
from tests.conftest import noisy_params, random_rows, tiny_config
from tests.support import calls
from tests.support.lanes import slow

pytestmark = pytest.mark.short

STUDENT = tiny_config(num_layers=1)
TEACHER = tiny_config(
    model_type="qwen3", num_layers=1, qkv_bias=False, qk_norm=True, hidden_size=24, vocab_size=104
)
VOCAB = 90  # what both "tokenizers" share; both models have more rows
ROWS, WIDTH = 5, 15  # 75 tokens: 7 and 64 do not divide them
TOKENS, LENGTH = random_rows(tiny_config(vocab_size=VOCAB), ROWS, WIDTH)
REAL = np.arange(WIDTH)[None] < np.asarray(LENGTH)[:, None]
SCORED = REAL & (np.arange(WIDTH) > 0)  # nothing predicts the first token


@pytest.fixture(scope="module")
def student() -> decoder.Params:
    return noisy_params(STUDENT)


@pytest.fixture(scope="module")
def teacher() -> decoder.Params:
    return noisy_params(TEACHER, seed=1)


def full_logprob(params, config, vocabulary=None) -> np.ndarray:
    """log p(. | tokens[b, :t]) in float64 [B, T, V]; row t = 0, which nothing predicts, is uniform."""
    logits = np.asarray(calls.forward(params, config, TOKENS, LENGTH), np.float64)
    before = np.concatenate([np.zeros_like(logits[:, :1]), logits[:, :-1]], axis=1)
    return scipy.special.log_softmax(before[..., :vocabulary], axis=-1)


def of_tokens(logprob_BTV: np.ndarray) -> np.ndarray:
    return np.take_along_axis(logprob_BTV, np.asarray(TOKENS)[..., None], axis=-1)[..., 0]


def scores(student, teacher, *, teacher_config=TEACHER, **changes):
    settings = {"vocabulary": VOCAB, "top_k": 8, "token_chunk": 16, "microbatch_tokens": 30}
    return calls.score(
        student, STUDENT, teacher, teacher_config, TOKENS, LENGTH, **settings | changes
    )


@pytest.mark.parametrize("token_chunk", [7, 100, *slow(1, 25)])
def test_token_logprob_equals_a_full_log_softmax(student, token_chunk):
    got = scoring.token_logprob(student, STUDENT, TOKENS, LENGTH, token_chunk=token_chunk)
    want = of_tokens(full_logprob(student, STUDENT))
    np.testing.assert_allclose(np.asarray(got)[SCORED], want[SCORED], atol=2e-6)
    assert not np.asarray(got)[~SCORED].any()


def test_token_logprob_of_a_cut_vocabulary(student):
    got = scoring.token_logprob(student, STUDENT, TOKENS, LENGTH, vocabulary=VOCAB)
    want = of_tokens(full_logprob(student, STUDENT, VOCAB))
    np.testing.assert_allclose(np.asarray(got)[SCORED], want[SCORED], atol=2e-6)


def test_lengths_of_another_batch_are_refused(student):
    with pytest.raises(ShapeError, match="B=3"):
        scoring.token_logprob(student, STUDENT, TOKENS, LENGTH[:3])


@pytest.mark.parametrize(("token_chunk", "rows"), [(7, 6), (30, 18)])  # even shares of 18 tokens
def test_map_tokens_aligns_tokens_models_and_extras(token_chunk, rows):
    """One-hot "hidden states" make the logits of token t row tokens[t-1] of the head: by hand."""
    generator = np.random.default_rng(0)
    heads = [generator.standard_normal((11, 11)).astype(np.float32) for _ in range(2)]
    tokens = generator.integers(0, 11, (3, 6))
    extra = generator.standard_normal((3, 6)).astype(np.float32)
    hidden = jnp.eye(11)[tokens]

    def fn(p_CV, q_CV, *, token_C, extra):
        assert p_CV.shape == q_CV.shape == (rows, 11)
        return {"a": scoring.take(p_CV, token_C) * extra, "b": scoring.take(q_CV, token_C)}

    out = scoring.map_tokens(
        fn,
        [scoring.Readout(jnp.asarray(head), hidden) for head in heads],
        jnp.asarray(tokens),
        {"extra": jnp.asarray(extra)},
        token_chunk=token_chunk,
    )
    p, q = (scipy.special.log_softmax(head.T.astype(np.float64), axis=-1) for head in heads)
    for b in range(3):
        assert out["a"][b, 0] == out["b"][b, 0] == 0.0
        for t in range(1, 6):
            before, token = tokens[b, t - 1], tokens[b, t]
            np.testing.assert_allclose(out["a"][b, t], p[before, token] * extra[b, t], atol=1e-6)
            np.testing.assert_allclose(out["b"][b, t], q[before, token], atol=1e-6)


@pytest.mark.slow
def test_gradient_through_map_tokens_equals_the_direct_one(student):
    weight = jnp.asarray(np.random.default_rng(2).standard_normal((ROWS, WIDTH)), jnp.float32)
    weight = jnp.where(SCORED, weight, 0.0)

    def chunked(params):
        logprob = scoring.token_logprob(params, STUDENT, TOKENS, LENGTH, token_chunk=7)
        return jnp.sum(weight * logprob)

    def direct(params):
        logprob = jax.nn.log_softmax(decoder.forward(params, STUDENT, TOKENS, LENGTH), axis=-1)
        taken = jnp.take_along_axis(logprob[:, :-1], TOKENS[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(weight[:, 1:] * taken)

    got, want = jax.jit(jax.grad(chunked))(student), jax.jit(jax.grad(direct))(student)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_scores_equal_direct_sums_over_the_vocabulary(student, teacher):
    top_k, got = 8, scores(student, teacher, top_k=8)
    log_p = full_logprob(student, STUDENT, VOCAB)
    log_q = full_logprob(teacher, TEACHER, VOCAB)
    p, q = np.exp(log_p), np.exp(log_q)
    want = {
        "student_logprob_BT": of_tokens(log_p),
        "teacher_logprob_BT": of_tokens(log_q),
        "student_entropy_BT": -(p * log_p).sum(-1),
        "teacher_entropy_BT": -(q * log_q).sum(-1),
        "reverse_kl_BT": (p * (log_p - log_q)).sum(-1),
    }
    names = ("overlap_ratio", "overlap_advantage", "student_overlap_mass", "teacher_overlap_mass")
    want |= {f"{name}_BT": np.zeros((ROWS, WIDTH)) for name in names}
    empty = 0
    for b, t in np.ndindex(ROWS, WIDTH):
        top_p, top_q = (set(np.argsort(-x[b, t])[:top_k].tolist()) for x in (p, q))
        shared = sorted(top_p & top_q)
        empty += not shared
        p_mass, q_mass = p[b, t, shared].sum(), q[b, t, shared].sum()
        gain = sum(
            p[b, t, v] / p_mass * np.log((q[b, t, v] / q_mass) / (p[b, t, v] / p_mass))
            for v in shared
        )
        want["overlap_ratio_BT"][b, t] = len(shared) / top_k
        want["overlap_advantage_BT"][b, t] = gain / max(len(shared), 1)
        want["student_overlap_mass_BT"][b, t] = p_mass
        want["teacher_overlap_mass_BT"][b, t] = q_mass
    assert empty > 3  # the case without a shared id occurs,
    assert want["overlap_ratio_BT"][:, 1:].max() >= 2 / top_k  # and so does the other
    for name, values in want.items():
        array = np.asarray(getattr(got, name))
        assert not array[:, 0].any()
        np.testing.assert_allclose(array[SCORED], values[SCORED], atol=5e-6, err_msg=name)


@pytest.mark.slow
def test_a_teacher_that_is_the_student_has_nothing_to_say(student):
    got = scores(student, student, teacher_config=STUDENT)
    assert not np.asarray(got.reverse_kl_BT).any()
    np.testing.assert_array_equal(got.student_logprob_BT, got.teacher_logprob_BT)
    np.testing.assert_array_equal(got.student_entropy_BT, got.teacher_entropy_BT)
    np.testing.assert_array_equal(got.overlap_ratio_BT[SCORED], 1.0)
    np.testing.assert_allclose(got.overlap_advantage_BT, 0.0, atol=1e-7)


def test_ids_beyond_the_vocabulary_carry_no_mass(student, teacher):
    """The teacher loves an id that the student's tokenizer lacks: cut away, nothing changes."""
    loud = teacher | {"embed": {"embedding": teacher["embed"]["embedding"].at[VOCAB:].mul(100.0)}}
    got, want = scores(student, loud), scores(student, teacher)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    uncut = scoring.token_logprob(loud, TEACHER, TOKENS, LENGTH)
    assert np.abs(np.asarray(uncut - got.teacher_logprob_BT))[SCORED].max() > 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("microbatch_tokens", "token_chunk"), [(1, 16), (45, 7), (1000, 64)])
def test_micro_batches_and_chunks_change_nothing(student, teacher, microbatch_tokens, token_chunk):
    got = scores(student, teacher, microbatch_tokens=microbatch_tokens, token_chunk=token_chunk)
    want = scores(student, teacher)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[SCORED], b[SCORED], atol=2e-6), got, want
    )


@pytest.mark.slow
def test_ids_that_are_not_scored_carry_no_mass(student, teacher):
    """Holes in the shared ids equal a vocabulary from which those ids are struck out."""
    scored_V = np.ones(VOCAB, bool)
    scored_V[[3, 40, 89]] = False
    got = scores(student, teacher, events=Events(scored_V=scored_V))
    cut = {}
    for name, params, config in (("p", student, STUDENT), ("q", teacher, TEACHER)):
        logprob = full_logprob(params, config, VOCAB)[..., scored_V]
        cut[name] = scipy.special.log_softmax(logprob, axis=-1)
    p = np.exp(cut["p"])
    column = np.cumsum(scored_V)[np.asarray(TOKENS)] - 1
    fine = SCORED & scored_V[np.asarray(TOKENS)]
    assert 0 < fine.sum() < SCORED.sum()  # a token that is not scored occurs
    for name, want in {
        "student_logprob_BT": np.take_along_axis(cut["p"], column[..., None], -1)[..., 0],
        "teacher_logprob_BT": np.take_along_axis(cut["q"], column[..., None], -1)[..., 0],
        "reverse_kl_BT": (p * (cut["p"] - cut["q"])).sum(-1),
        "student_entropy_BT": -(p * cut["p"]).sum(-1),
    }.items():
        np.testing.assert_allclose(getattr(got, name)[fine], want[fine], atol=5e-6, err_msg=name)


def test_the_teacher_reads_the_response_behind_a_prompt_of_its_own(student, teacher):
    """Rows of 2 prompt tokens for the student; the teacher's prompts are longer, equal, shorter."""
    prompts = [[7, 8, 9, 10], [11, 12], [13], [14, 15, 16], [17, 18]]
    tokens, length = np.asarray(TOKENS), np.asarray(LENGTH)
    other = np.zeros((ROWS, WIDTH + 3), np.int32)
    for b, prompt in enumerate(prompts):
        row = [*prompt, *tokens[b, 2 : length[b]]]
        other[b, : len(row)] = row
    offset = np.array([len(prompt) - 2 for prompt in prompts], np.int32)
    rows = TeacherRows(tokens_BT=other, length_B=length + offset, offset_B=offset)
    got = scores(student, teacher, teacher_rows=rows)
    want = np.asarray(
        scoring.token_logprob(teacher, TEACHER, other, length + offset, vocabulary=VOCAB)
    )
    for b, prompt in enumerate(prompts):
        np.testing.assert_allclose(
            got.teacher_logprob_BT[b, 2 : length[b]],
            want[b, len(prompt) : length[b] + offset[b]],
            atol=2e-6,
        )
    alone = scores(student, teacher)
    np.testing.assert_allclose(
        got.student_logprob_BT[SCORED], alone.student_logprob_BT[SCORED], atol=2e-6
    )
    response = SCORED & (np.arange(WIDTH) >= 2)
    change = np.abs(got.teacher_logprob_BT - alone.teacher_logprob_BT)[response]
    assert change.max() > 0.01  # the prompt matters


def test_a_renumbered_teacher_speaks_the_students_ids(student, teacher):
    """The student's id 35 is the teacher's 95."""
    ids = np.arange(VOCAB)
    ids[35] = 95
    renumbered = decoder.with_head_rows(teacher, jnp.asarray(ids))
    got = scores(student, renumbered)
    logits = np.asarray(calls.forward(teacher, TEACHER, TOKENS, LENGTH), np.float64)[..., ids]
    want = of_tokens(
        np.concatenate([logits[:, :1] * 0, scipy.special.log_softmax(logits, -1)[:, :-1]], axis=1)
    )
    np.testing.assert_allclose(got.teacher_logprob_BT[SCORED], want[SCORED], atol=5e-6)
    assert 35 in np.asarray(TOKENS)[SCORED]


def sizes(jaxpr) -> Iterator[int]:
    """Elements of every array in a jaxpr and in the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in (*equation.invars, *equation.outvars) if v.aval.shape)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def test_no_array_of_batch_time_vocabulary(student):
    config = tiny_config(num_layers=1, vocab_size=1000)
    params = decoder.abstract_params(config)
    full = ROWS * WIDTH * 1000

    def total(params):
        return scoring.token_logprob(params, config, TOKENS, LENGTH, token_chunk=8).sum()

    def pair(params):
        model, spec = decoder.Model(config, params), scoring.ScoreSpec(4, 8)
        return scoring.score_part(scoring.Models(model, model), TOKENS, LENGTH, LENGTH, None, spec)

    def everything(params):
        return decoder.forward(params, config, TOKENS, LENGTH)

    for fn in (total, jax.grad(total), pair):
        largest = max(sizes(jax.make_jaxpr(fn)(params).jaxpr))
        assert 8 * 1000 <= largest < full  # sees the chunk's logits, and nothing larger than that
    assert max(sizes(jax.make_jaxpr(everything)(params).jaxpr)) == full  # the walk would notice


def test_the_reference_scores_the_sampled_token_and_changes_nothing_else(student, teacher):
    plain = scores(student, teacher)
    assert plain.reference_logprob_BT is None
    reference = noisy_params(STUDENT, seed=2)
    got = scores(student, teacher, reference=decoder.Model(STUDENT, reference))
    want = of_tokens(full_logprob(reference, STUDENT, VOCAB))
    np.testing.assert_allclose(got.reference_logprob_BT[SCORED], want[SCORED], atol=2e-6)
    for name in ("student_logprob_BT", "teacher_logprob_BT", "reverse_kl_BT"):
        np.testing.assert_array_equal(getattr(got, name), getattr(plain, name))


@pytest.mark.parametrize("k", [5, *slow(1, 20)])
def test_statistics_of_token_weights(student, teacher, k):
    """The teacher's mass on the student's top k, and whether it accepts the student's likeliest id."""
    p, q = full_logprob(student, STUDENT, VOCAB), full_logprob(teacher, TEACHER, VOCAB)
    own = np.argsort(-p, axis=-1)[..., :k]
    mass = np.take_along_axis(np.exp(q), own, axis=-1).sum(axis=-1)
    theirs = np.argsort(-q, axis=-1)[..., :k]
    accepted = np.any(theirs == own[..., :1], axis=-1)
    got = scores(student, teacher, statistic=("teacher_mass", k)).statistic_BT
    np.testing.assert_allclose(got[SCORED], mass[SCORED], atol=2e-6)
    got = scores(student, teacher, statistic=("student_accepted", k)).statistic_BT
    np.testing.assert_array_equal(got[SCORED], accepted[SCORED])
    assert scores(student, teacher).statistic_BT is None
