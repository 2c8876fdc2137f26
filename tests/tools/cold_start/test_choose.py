"""Which of several solutions becomes golden data."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from opd_jax import data, models, scoring
from opd_jax.errors import ConfigError
from opd_jax.tools.cold_start import choose as choosing
from opd_jax.tools.cold_start import run as sample
from opd_jax.tools.cold_start import sample_file
from opd_jax.tools.cold_start.choose import choose, overlap_score
from tests.tools.cold_start.test_run import rows, sample_rollout, small

HINT = "{problem} It is {answer}."


@pytest.mark.short
def test_overlap_by_hand():
    """Tokens (a, b, c) against {a, x}, {y, z}, {c, b}: two of three, though b is in another set."""
    a, b, c, x, y, z = range(6)
    assert overlap_score([a, b, c], [(a, x), (y, z), (c, b)]) == pytest.approx(2 / 3)


@pytest.mark.short
def test_positions_that_only_one_text_has_are_left_out():
    assert overlap_score([1, 2, 3, 4], [{1}, {9}]) == 0.5
    assert overlap_score([1], [{1}, {2}, {3}]) == 1.0
    assert overlap_score([], [{1}]) == overlap_score([1], []) == 0.0


@pytest.mark.short
def test_a_correct_solution_comes_before_a_nearer_one():
    assert choose([False, True, True], [0.9, 0.2, 0.3]) == 2
    assert choose([False, True, False], [0.9, 0.2, 0.3]) == 1
    assert choose([True, True], [0.5, 0.5]) == 0  # the first of equal ones


@pytest.mark.short
def test_without_a_correct_solution_the_nearest_is_chosen():
    assert choose([False, False, False], [-2.0, -0.5, -1.0]) == 1
    with pytest.raises(ValueError, match="empty"):
        choose([], [])


def test_tiers(tmp_path):
    """Two solutions to each of five problems; the scores are given, and so is what the teacher writes."""
    answer = data.problem("train", 0).answer
    source = tmp_path / "problems.jsonl"
    prompt = data.problem("train", 0).prompt
    lines = [
        {"id": f"p{i}", "problem": prompt, "answer": given}
        for i, given in enumerate([answer, answer, answer, answer, ""])
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = small(
        data__train=str(source), sample__problems=0, sample__batch=5, sample__samples=2,
        sample__choose="overlap", sample__choose_top_k=4, sample__hint=HINT,
    )  # fmt: skip
    config.rollout.max_prompt_tokens = 100
    config.sample.max_response_tokens = 40
    good, bad = f"so \\boxed{{{answer}}}", "so \\boxed{x}"
    also = f"so, \\boxed{{{answer}}}"
    solutions = [good, also, bad, good, bad, bad, bad, bad, bad, good]
    hinted = [also, bad]  # to p2 and p3, in this order
    plan = sample.make_plan(config)
    asked = []

    def written(model, prompts, sampling, **_):
        texts = [plan.tokenizer.decode(list(ids)) for ids in prompts]
        asked.append(texts)
        answers = hinted if "It is" in texts[0] else solutions
        made = [
            [*ids, *plan.tokenizer.encode(text), plan.stop_ids[0]]
            for ids, text in zip(prompts, answers, strict=True)
        ]
        lengths = np.array([len(ids) for ids in made])
        return sample_rollout(
            made, lengths, np.array([len(ids) for ids in prompts]), max(lengths) + 1
        )

    def scores(student, params, problems, solutions, **_):
        assert [text for texts in solutions for text in texts if not text] == (
            [""] * (5 - 5 * config.sample.keep_wrong)
        )
        return [[0.1, 0.2], [0.9, 0.1], [0.1, 0.2], [0.3, 0.2], [0.4, 0.3]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "sample_responses", written)
        patch.setattr(choosing, "overlaps", scores)
        report = sample.run(config, str(tmp_path / "a.jsonl"), command=[])
        config.sample.keep_wrong = True
        more = sample.run(config, str(tmp_path / "b.jsonl"), command=[])
    assert len(asked[1]) == 2
    assert all(f"It is {answer}." in text for text in asked[1])
    got = [(row["id"], row["solution"], row["tier"]) for row in rows(tmp_path / "a.jsonl")]
    shown = "correct after the answer was shown"
    expected = [
        ("p0", also, "correct"), ("p1", good, "correct"), ("p2", also, shown),
        ("p4", bad, "ungraded"),
    ]  # fmt: skip
    assert got == expected
    assert {row["problem"] for row in rows(tmp_path / "a.jsonl")} == {prompt}  # without the hint
    got = [(row["id"], row["solution"], row["tier"]) for row in rows(tmp_path / "b.jsonl")]
    assert got == [*expected[:3], ("p3", bad, "wrong"), expected[3]]
    assert report["chosen"] == {"correct": 2, shown: 1, "wrong": 0, "ungraded": 1}
    assert more["chosen"]["wrong"] == 1
    assert (report["problems_with_a_solution"], report["fates"]["kept"]) == (4, 3)
    assert report["fates"]["not chosen"] == 2
    assert "chosen: 2 correct, 1 correct after the answer was shown, 1 ungraded" in (
        sample.table(report)
    )


def tiny_student() -> tuple[choosing.Student, models.Params]:
    config = small(sample__choose="likelihood", sample__samples=2)
    plan = sample.make_plan(config)
    assert plan.student is not None
    return plan.student, models.load(config.student.path)[1]


@pytest.mark.slow
def test_likelihood_is_the_mean_log_prob_of_a_token():
    student, params = tiny_student()
    problems = [data.problem("train", i) for i in range(2)]
    texts = [[problem.solution, "no"] for problem in problems]
    got = choosing.likelihoods(student, params, problems, texts)
    prompts = student.style.prompts(problems, student.tokenizer)
    for problem, prompt, ours, scores in zip(problems, prompts, texts, got, strict=True):
        for text, score in zip(ours, scores, strict=True):
            again = dataclasses.replace(problem, solution=text)
            ids = [*student.style.golden([again], student.tokenizer)[0], student.end]
            row = np.array([prompt + ids])
            logprob = scoring.token_logprob(params, student.config, row, np.array([row.shape[1]]))
            assert score == pytest.approx(float(logprob[0, len(prompt) :].mean()), abs=1e-5)
        assert scores[0] > scores[1]  # the solution is likelier than nonsense


@pytest.mark.slow
def test_overlap_with_the_students_own_response():
    """A greedy student's own words are in its top 1 at every position; those of no one else are."""
    student, params = tiny_student()
    problems = [data.problem("train", i) for i in range(2)]
    settings = {"key": jax.random.key(3), "top_k": 4, "budget": 60}
    sampled = []
    real = choosing.sample_responses

    def remember(*args, **kwargs):
        sampled.append(real(*args, **kwargs))
        return sampled[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "sample_responses", remember)
        choosing.overlaps(student, params, problems, [["x"], ["x"]], **settings)
    own = [student.tokenizer.decode(ids) for ids in sampled[0].responses()]
    got = choosing.overlaps(
        student, params, problems, [[own[0], "zzz"], [own[1], "zzz"]], **settings
    )
    assert min(got[0][0], got[1][0]) > 0.9  # of 308 ids the likeliest 4 hold nearly all of the mass
    assert max(got[0][1], got[1][1]) < 0.5


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(tmp_path, monkeypatch):
    settings = {
        "sample__samples": 2, "sample__choose": "overlap", "sample__choose_top_k": 4,
        "sample__hint": HINT, "sample__problems": 6,
    }  # fmt: skip
    straight, file = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    report = sample.run(small(**settings), str(straight), command=[])
    assert (
        sum(report["chosen"].values())
        == len(rows(straight))
        == len({row["id"] for row in rows(straight)})
    )
    real = sample.sample_batch

    def dies(plan, number, params, grader):
        if number:
            raise KeyboardInterrupt
        return real(plan, number, params, grader)

    with monkeypatch.context() as patch:
        patch.setattr(sample, "sample_batch", dies)
        with pytest.raises(KeyboardInterrupt):
            sample.run(small(**settings), str(file), command=[])
    assert sample_file.partial_path(file).exists()
    sample.run(small(**settings), str(file), command=[])
    assert file.read_bytes() == straight.read_bytes()


@pytest.mark.short
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sample__hint": HINT}, "sample.hint={problem} It is {answer}. has no effect"),
        ({"sample__choose_top_k": 3}, "sample.choose_top_k=3 has no effect: sample.choose=all"),
        ({"sample__choose": "overlap"}, "nothing to choose from"),
        ({"sample__choose": "overlap", "sample__samples": 2, "sample__hint": "x"}, "with {answer}"),
        ({"sample__choose": "overlap", "sample__samples": 2, "sample__choose_top_k": 999},
         "the student's 308 ids"),
        ({"sample__choose": "likelihood", "sample__samples": 2, "sample__choose_top_k": 3},
         "sample.choose=likelihood; leave"),
        ({"sample__choose": "nearest"}, "one of all, overlap, likelihood"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_is_one_line(changes, says):
    with pytest.raises(ConfigError) as error:
        sample.make_plan(small(**changes))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.short
def test_the_student_matters_only_where_it_is_asked(tmp_path: pathlib.Path):
    """Files of other students can be resumed, unless solutions are chosen for the student."""
    header = {"config": {"student": {"path": "a"}, "sample": {}}, "sha256": "x"}
    other = {"config": {"student": {"path": "b"}, "sample": {}}, "sha256": "x"}
    assert sample_file._identity(header) == sample_file._identity(other)
    header["config"]["sample"] = other["config"]["sample"] = {"choose": "overlap"}
    assert sample_file._identity(header) != sample_file._identity(other)
