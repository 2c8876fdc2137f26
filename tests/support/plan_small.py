"""A workload small enough to count by hand."""

from typing import Any

from configs import stable_opd
from opd_jax.memory_plan.layout import Layout
from opd_jax.memory_plan.workload import Workload
from opd_jax.training.optimizer import make_optimizer
from tests.conftest import tiny_config

# D=4, F=6, L=2, N=2, K=1, H=2, V=10, tied: 316 parameters, 280 in matrices (240 layers, 40 head);
# keys and values of a position: 2 L K H = 8 numbers. (tests/models/test_flops.py)
MODEL = tiny_config(
    vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=2,
)  # fmt: skip
OPTIMIZER = make_optimizer(stable_opd.get_config("tiny").optim, 10)


def workload(**changes: Any) -> Workload:
    """OPD with a teacher like the student: 4 rollouts of 3 + 5 tokens, in 16 bits, one device."""
    fields: dict[str, Any] = {
        "student": MODEL, "teacher": MODEL, "reference": None, "itemsize": 2,
        "teacher_itemsize": 2, "reference_itemsize": 2, "fused": True, "own_copy": True,
        "teacher_follows": "frozen", "same_reference": False, "renumbered": False,
        "vocabulary": 10, "batch": 4, "golden": 0, "updates": 1, "prompt": 3, "response": 5,
        "teacher_width": 0, "slots": 4, "microbatch_tokens": 16, "token_chunk": 8,
        "score_chunk": 8, "remat": "attention", "over_vocabulary": False, "terms": ("opd",),
        "term_gradients": False,
        "rollouts": True, "evaluated": 0, "steps": 10, "layout": Layout(), "optimizer": OPTIMIZER,
    }  # fmt: skip
    return Workload(**(fields | changes))
