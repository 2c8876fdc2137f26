"""What XLA makes of a program: all that the plan models of the compiler by hand, in one table.

A program's source does not say how many of these arrays exist at its busiest moment. The numbers were read
from the buffer assignment of compiled programs. `launch/plan.py --verify` and
tests/memory_plan/test_footprint.py hold what follows from them against programs that are compiled again
(docs/memory.md). A new version of JAX may change any of them.
"""

import dataclasses

_CPU = "JAX 0.10.2, CPU, float32"
_GPU = "JAX 0.11.2, H200, bfloat16"
_BOTH = f"{_CPU}; {_GPU}"


@dataclasses.dataclass(frozen=True)
class Count:
    """How many arrays of a kind exist together (or kernels run), and what the number was read from."""

    count: float
    kind: str
    read_from: str


MLP_DECODE = Count(1.0, "MLP activations of a decode step", _BOTH)
MLP_FORWARD = Count(2.0, "MLP activations of a layer, forward", _BOTH)
MLP_BACKWARD = Count(4.0, "MLP activations of a layer, backward", _BOTH)
STREAM_FORWARD = Count(1.0, "residual stream of a layer, forward", _GPU)
STREAM_FORWARD_PLAIN = Count(2.0, "residual stream of a layer, forward", _CPU)
STREAM_BACKWARD = Count(5.0, "residual stream of a layer, backward", _BOTH)
LAYER_BACKWARD = Count(2.0, "a layer's matrices, backward: the weights and their gradients", _BOTH)
SCORES_FORWARD = Count(
    4.0, "scores of a block of plain attention, forward, where XLA runs blocks side by side", _CPU
)
SCORES_BACKWARD = Count(
    8.5, "scores and their cotangents of a block of plain attention, backward", _CPU
)
SCORES_DECODE = Count(1.0, "scores of plain attention against one block of the cache", _CPU)
ROWS_DECODE = Count(1.0, "ids and log-probs of the slots that are not updated in place", _CPU)
LOGITS_DECODE = Count(1.0, "logits of a decode step", _BOTH)
LOGITS_NUCLEUS = Count(1.0, "more of these where rollout.top_p < 1: the probabilities", _BOTH)
LOGITS_SCORE = Count(1.0, "chunks of logits in scoring, for each model", _GPU)
LOGITS_SUPPORT = Count(1.0, "more of these with a support: its ids struck out", _GPU)
LOGITS_SCORE_PLAIN = Count(3.0, "chunks of logits in scoring, for each model, with log-probs", _CPU)
LOGITS_UPDATE = Count(1.0, "chunks of logits in the update beside one for each model", _GPU)
LOGITS_CUT = Count(1.0, "least of these for a student whose logits are cut to the scored ids", _GPU)
LOGITS_UPDATE_PLAIN = Count(2.0, "chunks of logits in the update, for each model", _CPU)
LOGITS_CANDIDATES = Count(
    4.0, "chunks of the larger vocabulary's logits in an update by span_events=candidates", _CPU
)
LOGITS_SORTED = Count(8.5, "the same by span_events=sorted, which sorts both distributions", _CPU)
LOGITS_MATCHED = Count(10.0, "the same by span_events=matched", _CPU)
HIDDEN_UPDATE = Count(3.0, "final hidden states: as made, cut into chunks, their cotangent", _BOTH)
STATISTICS_KEPT = Count(1.0, "float32 numbers a head and token that fused attention keeps", _GPU)
MLP_KEPT_DOTS = Count(2.0, "MLP activations that remat=dots keeps of a layer: gate and up", _BOTH)
MLP_KEPT = Count(5.0, "MLP activations that remat=none keeps of a layer", _BOTH)
STREAM_KEPT = Count(10.0, "residual stream in float32 that remat=none keeps of a layer", _BOTH)
ADAMW = Count(0.0, "copies of the master weights: AdamW works in place", _GPU)
ADAMW_PLAIN = Count(2.0, "copies of the master weights that AdamW makes", _CPU)
KERNELS_DECODE = Count(14.0, "kernels that a layer runs in one decode step", _GPU)
