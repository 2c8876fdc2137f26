"""Bytes of each program by hand, and against programs that are compiled for this machine."""

import dataclasses
import pathlib
import re

import pytest

from configs import stable_opd
from opd_jax import hardware
from opd_jax.memory_plan import footprint, programs, report, step_time, verify, xla
from opd_jax.memory_plan.layout import Layout
from opd_jax.memory_plan.workload import of_config
from tests.support.plan_small import MODEL, workload

P = 316
# A chunk of the scorer and the update: 16 tokens of 2 rows are two chunks of 8, float32 over 10 ids.
CHUNK = 4 * 8 * 10


@pytest.mark.short
def test_the_token_loop():
    found = footprint.decode(workload(), 4)
    assert found.arguments == {"unstacked": 2 * P, "caches": 4 * 8 * (16 + 8)}
    assert found.temporaries == {"logits": 4 * 10 * 4, "working": 4 * 6 * 2}
    plain = footprint.decode(workload(itemsize=4, fused=False), 4)
    # The MLP, scores of 2 heads against a block, here the whole row of 8, and the rows.
    assert plain.temporaries == {"logits": 160, "working": 4 * 6 * 4 + 4 * 4 * 2 * 8 + 4 * 8 * 8}
    # A nucleus is found among the probabilities.
    assert footprint.decode(workload(nucleus=True), 4).temporaries["logits"] == 2 * 160


@pytest.mark.short
def test_what_several_devices_add():
    four = workload(layout=Layout(data=2, fsdp=2))
    found = footprint.compute_weights(four)
    # The largest cast weight: 2 layers of 4 x 6 are more than the embedding of 10 x 4.
    assert found.arguments == {"master": 4 * (P + 3 * 8) / 4}  # 8 numbers of biases do not divide
    assert found.temporaries == {"weight copies": 48 * 2 / 4}
    assert footprint.gradient_sum(four).arguments == {"gradients": 4 * P}


@pytest.mark.short
def test_a_teacher_with_another_tokenizer_scores_alone():
    """20 ids of its own, one row of 3 + 9 tokens in 16, where the student has two of 8."""
    given = workload(score_chunk=16, teacher_vocabulary=20, teacher_width=12, teacher_response=9)
    student, teacher = map(footprint.score, given.alone)
    assert student.arguments == {"student": 2 * P, "rows": 4 * 16}
    assert student.temporaries["logits"] == 2 * CHUNK
    assert teacher.arguments == {"student": 2 * P, "rows": 4 * 12}
    assert teacher.temporaries["logits"] == 4 * 12 * 20
    assert footprint.score(given) == teacher
    assert given.score_rows == 2
    assert set(report.programs(given)) >= {"score", "teacher: score"}


@pytest.mark.short
def test_scoring_is_busiest_in_its_logits():
    found = footprint.score(workload(score_chunk=16))
    assert found.arguments == {"student": 2 * P, "teacher": 2 * P, "rows": 4 * 16}
    # Logits of each model; both models' states of 16 tokens, 4 numbers of 2 bytes.
    assert found.temporaries == {
        "activations": 2 * 16 * 8,
        "logits": 2 * 2 * CHUNK,
        "weight copies": 0,
    }
    # The mass outside a support is summed with its ids struck out.
    struck = footprint.score(workload(score_chunk=16, support=2))
    assert struck.temporaries["logits"] == 3 * 2 * CHUNK
    cut = footprint.score(workload(score_chunk=16, vocabulary=9, renumbered=True))
    assert cut.temporaries["logits"] == 2 * 16 * 9 * 4
    assert cut.arguments["teacher"] == 2 * P + 9 * 4 * 2
    # The states that the update will want are handed out: no temporary.
    handed = footprint.score(workload(score_chunk=16, over_vocabulary=True))
    assert handed.temporaries["activations"] == 16 * 8


@pytest.mark.short
def test_scoring_may_be_busiest_in_a_layer():
    found = footprint.score(workload(score_chunk=1))
    # The teacher's: one layer's 120 weights, the stream, two MLP widths; the student's states.
    assert found.temporaries == {"activations": 16 * 8,
                                 "working": 2 * 120 + 16 * 8 + 2 * 16 * 12}  # fmt: skip


@pytest.mark.short
def test_a_reference_that_only_scores_is_read_there_and_not_in_the_update():
    given = workload(reference=MODEL, reference_scores=True, reference_in_update=False)
    alone, beside = (footprint.score(one) for one in (workload(), given))
    assert beside.arguments == alone.arguments | {"reference": 2 * P}
    # One more model's states of 16 tokens, and one array of a chunk's logits: at a vocabulary of 152,000
    # XLA plans 893 MiB without a reference and 1,040 with one, whose chunk has 148.
    more = {"activations": 16 * 8, "logits": CHUNK}
    for kind, size in more.items():
        assert beside.temporaries[kind] - alone.temporaries[kind] == size
    assert footprint.gradient(given) == footprint.gradient(workload())


@pytest.mark.short
def test_the_update():
    given = workload(reference=MODEL, token_chunk=16, remat="full")
    found = footprint.gradient(given)
    assert found.arguments == {
        "master": 4 * P, "gradients": 4 * P, "rows": 16 * 16, "reference": 2 * P,
    }  # fmt: skip
    # Loss: 2 layers' inputs; the student's states, as cut into chunks, and their cotangent, and the
    # reference's; three arrays of logits; the embedding in 16 bits and its float32 gradient.
    assert found.temporaries == {
        "activations": 2 * 16 * 8 + 4 * 16 * 8, "logits": 3 * 2 * CHUNK,
        "weight copies": 40 * 2 + 40 * 4,
    }  # fmt: skip
    # Three places a token, of ids and the teacher's log-probs.
    on_ids = footprint.gradient(workload(support=3, support_arrays=2))
    assert on_ids.arguments["rows"] == 16 * 16 + 16 * 3 * 8
    # A gate is one more number a token, of rollouts alone.
    gated = workload(support=3, support_arrays=2, gated=True, golden=2)
    assert footprint.gradient(gated).arguments["rows"] == 16 * 16 + 16 * 3 * 8 + 16 * 4
    golden = footprint.gradient(gated, golden=True).arguments["rows"]
    assert golden == footprint.gradient(workload(golden=2), golden=True).arguments["rows"] > 0
    two = footprint.gradient(
        workload(layout=Layout(data=2), batch=8, student=MODEL, token_chunk=16)
    )
    assert two.arguments["student"] == 2 * P  # compute weights, the masters are elsewhere
    # Whose output matrix is made float32 as well.
    assert two.temporaries["weight copies"] == 40 * 2 + 2 * 40 * 4


@pytest.mark.short
def test_the_update_over_the_vocabulary_has_the_head_and_the_states_of_the_teacher():
    found = footprint.gradient(workload(over_vocabulary=True, token_chunk=16, remat="full"))
    assert found.arguments == {
        "master": 4 * P, "gradients": 4 * P, "rows": 16 * 16 + 16 * 8, "teacher": 40 * 2,
    }  # fmt: skip
    assert found.temporaries["activations"] == 2 * 16 * 8 + 3 * 16 * 8
    assert found.temporaries["logits"] == 3 * 2 * CHUNK
    # 16 tokens as 3 chunks of 6: the teacher's states are padded, which copies them.
    tall = dataclasses.replace(MODEL, vocab_size=90)
    padded = footprint.gradient(
        workload(over_vocabulary=True, student=tall, vocabulary=90, token_chunk=7, remat="full")
    )
    assert padded.temporaries["activations"] == 2 * 16 * 8 + 4 * 16 * 8
    assert padded.temporaries["logits"] == 3 * 4 * 6 * 90
    # Golden solutions ask no teacher. Logits that are cut to the scored ids are there once more.
    golden = workload(over_vocabulary=True, golden=2, student=tall, vocabulary=90, token_chunk=16,
                 remat="full")  # fmt: skip
    assert footprint.gradient(golden, golden=True).temporaries["logits"] == 2 * 4 * 16 * 90
    fewer = workload(student=tall, vocabulary=80, token_chunk=16, remat="full")
    assert footprint.gradient(fewer).temporaries["logits"] == 3 * 4 * 16 * 80


@pytest.mark.short
def test_soft_labels_on_golden_solutions():
    given = workload(
        golden=2, golden_divergence=True, golden_over_vocabulary=True, token_chunk=16, remat="full",
        score_chunk=16, reference=MODEL, reference_scores=True, gated=True, support=3,
    )  # fmt: skip
    # As on rollouts over the vocabulary; arrays of tokens: ids, two kinds of weights.
    found = footprint.gradient(given, golden=True)
    assert found.arguments == {
        "master": 4 * P, "gradients": 4 * P, "rows": 4 * 3 * 16 + 16 * 8, "teacher": 40 * 2,
    }  # fmt: skip
    assert found.temporaries["logits"] == 3 * 2 * CHUNK
    # The supervised term has a log-softmax of its own.
    both = dataclasses.replace(given, terms=("sft", "golden_divergence"))
    tall = dataclasses.replace(MODEL, vocab_size=90)
    wide = [dataclasses.replace(one, student=tall, vocabulary=90) for one in (given, both)]
    logits = [footprint.gradient(one, golden=True).temporaries["logits"] for one in wide]
    assert logits[1] - logits[0] == 4 * 16 * 90
    # Over a set: ids and the teacher's log-probs of its places.
    some = dataclasses.replace(given, golden_over_vocabulary=False, golden_support=5)
    assert footprint.gradient(some, golden=True).arguments["rows"] == 4 * (3 + 2 * 5) * 16
    # They are scored without the reference, whatever rollouts are scored with.
    alone = footprint.score(given.of_golden)
    assert alone.arguments == footprint.score(workload(batch=2)).arguments
    assert alone.temporaries["activations"] == 16 * 8  # the teacher's states are handed out
    assert footprint.score(workload(batch=2)).temporaries["activations"] == 2 * 16 * 8
    assert report.programs(given).keys() >= {"golden score", "gradient on golden", "score"}
    assert "golden score" not in report.programs(workload(golden=2))


@pytest.mark.short
def test_the_optimizer_works_in_place_on_a_gpu():
    found = footprint.optimizer(workload())
    assert found.arguments == {"master": 4 * P, "optimizer": 8 * P, "gradients": 4 * P}
    assert found.temporary_bytes == 0
    assert footprint.optimizer(workload(fused=False)).temporary_bytes == 2 * 4 * P


@pytest.mark.short
@pytest.mark.parametrize(
    ("remat", "kept"),
    [
        # Of a token and layer: input 8; attention 8 + 2 statistics of 4; q, k, v 8 + 4 + 4; output 8;
        # gate and up 2 x 12.
        ("full", 8), ("attention", 24), ("dots", 24 + 16 + 8 + 24), ("none", 8 + 5 * 12 + 160),
    ],
)  # fmt: skip
def test_what_layers_keep(remat, kept):
    assert footprint.kept(workload(remat=remat), 2) == 2 * 16 * kept


@pytest.mark.short
def test_every_number_that_was_read_from_xla_is_used():
    counts = {name for name, value in vars(xla).items() if isinstance(value, xla.Count)}
    source = "".join(pathlib.Path(m.__file__).read_text() for m in (footprint, step_time))
    assert set(re.findall(r"\bxla\.([A-Z_]+)", source)) == counts


def compared(kinds: tuple[str, ...], **optim: int) -> list[tuple[str, float, float]]:
    """Planned over compiled, of arguments and temporaries, of programs of `tiny` on this CPU."""
    config = stable_opd.get_config("tiny")
    config.optim.update(optim)
    given = of_config(config, hardware.find("cpu"), 1)
    planned = {kind: report.programs(given)[kind] for kind in kinds}
    out = []
    for kind, program in verify.widest(programs.programs(config, given), planned).items():
        found = programs.compile_for(program, None).memory_analysis()
        out.append((
            kind, planned[kind].argument_bytes / found.argument_size_in_bytes,
            planned[kind].temporary_bytes / found.temp_size_in_bytes,
        ))  # fmt: skip
    return out


def assert_close(rows: list[tuple[str, float, float]]) -> None:
    for kind, arguments, temporaries in rows:
        assert arguments == pytest.approx(1, abs=0.05), kind
        assert temporaries == pytest.approx(1, abs=0.2), kind


@pytest.mark.slow
def test_planned_bytes_are_those_of_compiled_programs():
    assert_close(compared(("score", "optimizer"), microbatch_tokens=1600))


@pytest.mark.slow
def test_planned_bytes_are_those_of_every_compiled_program():
    kinds = (
        "prefill",
        "decode",
        "score",
        "gradient on rollouts",
        "gradient on golden",
        "optimizer",
    )
    assert_close(compared(kinds))
