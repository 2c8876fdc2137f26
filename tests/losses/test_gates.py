"""Gates of tokens and of rollouts: by hand, at their ends, masked."""

import jax
import numpy as np
import pytest

from opd_jax import losses
from opd_jax.losses import gates
from opd_jax.rng import Stream, key_for

pytestmark = pytest.mark.short


def logs(*values: float) -> np.ndarray:
    return np.log(np.array([values], np.float32))


def test_entropy_gate_by_hand():
    """The threshold itself is open."""
    mask = np.array([[1, 1, 1, 0]], bool)
    entropy = np.array([[0.79, 0.8, 2.0, 2.0]])
    got = gates.entropy_gate(teacher_entropy_BT=entropy, mask_BT=mask, threshold=0.8)
    np.testing.assert_array_equal(got, [[0, 1, 1, 0]])
    assert got.dtype == np.float32


@pytest.mark.parametrize(
    ("threshold", "gate"),
    [
        (0.0, (0, 1, 1, 1)),  # q - p = .2, -.2, 0, -1: open where the teacher does not like it more
        (-0.1, (0, 1, 0, 1)),
        (0.3, (1, 1, 1, 1)),
        (-1.0, (0, 0, 0, 0)),  # plain OPD
        (1.0, (1, 1, 1, 1)),  # GKD
    ],
)
def test_advantage_gate_by_hand(threshold, gate):
    got = gates.advantage_gate(
        teacher_logprob_BT=np.append(logs(0.6, 0.3, 0.5), [[-np.inf]], axis=1),
        student_logprob_BT=logs(0.4, 0.5, 0.5, 1.0),
        mask_BT=np.ones((1, 4), bool),
        threshold=threshold,
    )
    np.testing.assert_array_equal(got, [gate])


def test_acceptance_by_hand():
    """p .5, q .2: accepted where u < .4. q >= p and equal models are accepted always, q = 0 never."""
    uniform = np.array([[0.39, 0.41, 0.999, 0.999, 0.0, 0.9]])
    got = gates.acceptance_gate(
        teacher_logprob_BT=np.append(logs(0.2, 0.2, 0.7, 0.5), [[-np.inf, 0.0]], axis=1),
        student_logprob_BT=logs(0.5, 0.5, 0.5, 0.5, 0.5, 1.0),
        mask_BT=np.array([[1, 1, 1, 1, 1, 0]], bool),
        uniform_BT=uniform,
    )
    np.testing.assert_array_equal(got, [[0, 1, 0, 0, 1, 0]])


def test_the_share_of_accepted_tokens_is_the_ratio():
    """4,000 draws at .4: within 4 standard errors, .031."""
    uniform = gates.uniforms(key_for(0, 1, Stream.GATE), rows=40, width=100)
    shape = uniform.shape
    got = gates.acceptance_gate(
        teacher_logprob_BT=np.full(shape, np.log(0.2)),
        student_logprob_BT=np.full(shape, np.log(0.5)),
        mask_BT=np.ones(shape, bool),
        uniform_BT=uniform,
    )
    assert abs(1.0 - got.mean() - 0.4) < 0.031
    assert uniform.min() >= 0.0
    assert uniform.max() < 1.0


def test_draws_follow_from_seed_step_and_row_alone():
    def draws(seed: int = 0, step: int = 1, rows: int = 3) -> np.ndarray:
        return gates.uniforms(key_for(seed, step, Stream.GATE), rows=rows, width=5)

    np.testing.assert_array_equal(draws(), draws())
    np.testing.assert_array_equal(draws(rows=7)[:3], draws())  # more rows change no row
    for other in (draws(seed=1), draws(step=2), draws()[::-1]):
        assert not np.any(np.isclose(other[0], draws()[0], atol=1e-7))
    assert len(np.unique(draws())) == 15
    sampled = jax.random.uniform(key_for(0, 1, Stream.ROLLOUT), (5,))
    assert not np.any(np.isclose(sampled, draws()[0], atol=1e-7))


def test_agreement_gate_by_hand():
    """Distil where a better rollout is likelier to the teacher, or a worse one less likely."""
    teacher = np.array([[-1.0, -1.0], [-3.0, -1.0], [-1.0, -1.0], [-3.0, 9.0], [-2.0, -1.0]])
    student = np.array([[-2.0, -1.0], [-2.0, -1.0], [-2.0, -1.0], [-2.0, -1.0], [-2.0, -1.0]])
    mask = np.array([[1, 1], [1, 1], [1, 1], [1, 0], [1, 1]], bool)
    group = np.array([1.0, 1.0, -1.0, 0.0, 0.0])  # differences 1, -1, 1, -1, 0
    kind = {"teacher_logprob_BT": teacher, "student_logprob_BT": student, "mask_BT": mask}
    got = gates.agreement_gate(**kind, group_B=group, margin=0.0)
    np.testing.assert_array_equal(got, [True, False, False, True, False])
    got = gates.agreement_gate(**kind, group_B=group, margin=1.0)
    np.testing.assert_array_equal(got, False)  # strictly above
    none = gates.agreement_gate(**kind | {"mask_BT": mask & False}, group_B=group, margin=0.0)
    np.testing.assert_array_equal(none, False)


def test_the_published_means_by_hand():
    """Two tokens, one of them open. EOPD: .13101 / 2 = .06551; AOPD without its factor 1/K: .02309 / 2."""
    p, q = np.tile(logs(0.5, 0.4), (1, 2, 1)), np.tile(logs(0.6, 0.3), (1, 2, 1))
    gate = np.array([[0.0, 1.0]])
    for form, mean in (("teacher_renormalised", 0.06551), ("raw", 0.011544)):
        each = losses.divergence(p_logprob_BTV=p, q_logprob_BTV=q, direction="forward", form=form)
        np.testing.assert_allclose(np.mean(gate * each), mean, atol=5e-6)
