"""Runs whose student and teacher end a response by different tokens."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import scipy.special

from configs import grpo
from opd_jax import config as configuration
from opd_jax import data, models, train
from opd_jax.data import PromptStyle
from opd_jax.errors import ModelError
from opd_jax.models import decoder
from opd_jax.training.make_setup import make_setup
from tests.support.families import FAMILIES
from tests.support.small_run import lines, small

TINY = pathlib.Path(models.__file__).parents[1] / "tiny"
SECOND = {"<|im_end|>": "<|endoftext|>", "<|endoftext|>": "<|im_end|>"}


def with_another_end(folder: pathlib.Path) -> str:
    """The embedded teacher with the meanings of ids 0 and 2 exchanged: it ends with <|endoftext|> what
    it ended with <|im_end|>, in its prompts too, and is otherwise the same function."""
    source = TINY / "teacher"
    model, params = models.load(str(source))
    order = np.arange(model.vocab_size)
    order[[0, 2]] = order[[2, 0]]
    for name, leaf in (("embed", "embedding"), ("head", "kernel")):
        if name in params:
            params[name] = {leaf: np.asarray(params[name][leaf])[order]}
    models.save(str(folder), model, params, source=str(source))
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(fields | {"eos_token_id": 0}))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("<|im_end|>", "<|endoftext|>"))
    return str(folder)


def opd(teacher: str, steps: int):
    config = configuration.default()
    config.student.path, config.teacher.path = str(TINY / "student"), teacher
    config.steps = steps
    config.rollout.prompts_per_step, config.rollout.samples_per_prompt = 4, 4
    config.optim.learning_rate = 1e-3
    config.eval.data = ""
    config.log.rollouts = 16
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[pathlib.Path]:
    """OPD with the embedded teacher, and with the one that ends a response by another token."""
    root = tmp_path_factory.mktemp("ends")
    other = with_another_end(root / "teacher")
    for name, teacher in (("same", str(TINY / "teacher")), ("other", other)):
        train.run(opd(teacher, 4), str(root / name), command=[])
    return [root / "same", root / "other"]


@pytest.mark.slow
def test_a_teacher_with_another_end_token_teaches_the_same(runs):
    """Base student, instruct teacher of one vocabulary: no token by token comparison of the ends.

    Compared by tokens, the advantage of the student's end was -16 and the reverse KL at the first step
    0.345 in place of 0.145.
    """
    same, other = (
        [row for row in lines(run, "metrics.jsonl") if "loss/opd" in row] for run in runs
    )
    assert len(same) == 4
    for one, two in zip(same, other, strict=True):
        for key in ("rollout/length_mean", "score/advantage_mean", "loss/opd", "optim/grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=2e-3, abs=2e-5), key


@pytest.mark.slow
def test_the_advantage_of_the_end_is_that_of_the_event(runs):
    same, other = ([r for r in lines(run, "rollouts.jsonl") if r["step"] == 1] for run in runs)
    ended = [i for i, row in enumerate(same) if row["outcome"] == "eos"]
    assert ended
    for i in ended:
        assert other[i]["response_ids"] == same[i]["response_ids"]
        assert other[i]["advantage"][-1] == pytest.approx(same[i]["advantage"][-1], abs=1e-3)
        assert other[i]["teacher_logprob"][-1] > -5


@pytest.fixture(scope="module")
def qwen_and_r1(tmp_path_factory) -> pathlib.Path:
    """The paper's own pair in small: end tokens (151643, 151645) and 151643, <think> opened by one."""
    root = tmp_path_factory.mktemp("pair")
    for family, name in ((FAMILIES[0], "student"), (FAMILIES[1], "teacher")):
        shutil.move(family.folder(root), root / name)
    config = small(root, "stable_opd")
    config.steps, config.checkpoint.every = 1, 0
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 160, 200
    config.rollout.prompts_per_step = 8
    config.optim.microbatch_tokens = 2000
    config.eval.data, config.log.rollouts = "", 16
    train.run(config, str(root / "run"), command=[])
    return root


@pytest.mark.slow
def test_the_end_is_scored_on_the_papers_own_pair(qwen_and_r1):
    """Log-probs and advantage of the last token of rollouts, against whole logits in float64."""
    config = small(qwen_and_r1)
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 160, 200
    found = make_setup(config)
    assert set(found.alignment.stop_ids) == {256, 258}
    pair = {name: models.load(str(qwen_and_r1 / name)) for name in ("student", "teacher")}
    scored = np.flatnonzero(found.alignment.scored)
    assert not {256, 257, 259, 260, 261, 262} & set(scored.tolist())  # 258 stands for the end

    def end_logprob(name: str, ids: list[int], ends: list[int]) -> float:
        model, params = pair[name]
        logits = decoder.forward(params, model, np.array([ids]), np.array([len(ids)]))
        last = np.asarray(logits, np.float64)[0, -1]
        others = last[[i for i in scored if i != 258]]
        end = scipy.special.logsumexp(last[ends])
        return end - scipy.special.logsumexp([*others, end])

    rows = [row for row in lines(qwen_and_r1 / "run", "rollouts.jsonl") if row["outcome"] == "eos"]
    assert {row["response_ids"][-1] for row in rows} <= {256, 258}
    assert len(rows) >= 3
    style = PromptStyle(config.data.prompt_template, config.data.system_prompt)
    for row in rows[:6]:
        ids = row["prompt_ids"] + row["response_ids"][:-1]
        student = end_logprob("student", ids, [256, 258])
        question = row["prompt"].rpartition("user\n")[2].removesuffix("\nassistant\n")
        problem = data.Problem("", question, "", "")
        [prompt] = style.prompts([problem], found.teacher_tokenizer)
        teacher = end_logprob("teacher", [*prompt, *row["response_ids"][:-1]], [256])
        assert row["sampler_logprob"][-1] == pytest.approx(student, abs=1e-4)
        assert row["student_logprob"][-1] == pytest.approx(student, abs=1e-4)
        assert row["teacher_logprob"][-1] == pytest.approx(teacher, abs=1e-4)
        assert row["advantage"][-1] == pytest.approx(teacher - student, abs=1e-4)


def test_a_run_without_a_teacher_says_what_ends_a_response(tmp_path):
    config = grpo.get_config()
    folder = FAMILIES[0].folder(tmp_path)
    config.student.path, config.eval.data = folder, ""
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 160, 200
    config.optim.microbatch_tokens = 2000
    notes = "\n".join(make_setup(config).notes)
    assert (
        "a response ends at <|endoftext|> (256) or <|im_end|> (258): scored as one event" in notes
    )


def reference_with(tmp_path, **fields: object):
    """A config whose reference is a copy of the embedded student with other end tokens."""
    config = grpo.get_config()
    config.eval.data, config.loss.beta_kl = "", 0.1
    config.reference.path = str(tmp_path / "reference")
    shutil.copytree(TINY / "student", config.reference.path)
    for name in ("config.json", "generation_config.json"):
        file = tmp_path / "reference" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return config


def test_a_reference_has_end_tokens_of_its_own(tmp_path):
    notes = "\n".join(make_setup(reference_with(tmp_path, eos_token_id=0)).notes)
    assert "<|endoftext|> (0) or <|im_end|> (2) for the reference: scored as one event" in notes
    assert "<|endoftext|> (0) ends it for another model alone: never drawn" in notes


def test_an_ordinary_end_token_of_a_reference_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"\(5\) ends a response .* ordinary token to the student"):
        make_setup(reference_with(tmp_path, eos_token_id=5))


def test_a_reference_with_another_tokenizer_is_refused(tmp_path):
    config = reference_with(tmp_path, eos_token_id=2)
    file = tmp_path / "reference/tokenizer.json"
    file.write_text(file.read_text().replace("<|im_start|>", "<|turn|>"))
    with pytest.raises(ModelError, match=r"id 1 is '<\|turn\|>' to the reference"):
        make_setup(config)
