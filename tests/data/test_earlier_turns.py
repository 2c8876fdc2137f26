"""A problem of several turns: training, held-out answers, probes, evaluation and sampling show them all."""

import json

import pytest

from configs import evaluate as evaluate_config
from configs import opd
from opd_jax.data import Tokenizer
from opd_jax.evaluation import run as runner
from opd_jax.evaluation.subject import open_subject
from opd_jax.tools.cold_start import run as sample
from opd_jax.tools.probe import workload, writing
from opd_jax.training.make_setup import make_setup

TURNS = (("user", "Start with 1."), ("assistant", "1"), ("user", "Now add 2."))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Rows of several turns, and a template that makes them look otherwise than the models' own."""
    folder = tmp_path_factory.mktemp("turns")
    prompt = [{"role": role, "content": text} for role, text in TURNS]
    row = {"prompt": prompt, "response": "so \\boxed{3}", "answer": "3"}
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    (folder / "alike.jinja").write_text(
        "{% for m in messages %}{% if loop.last or m.role == 'system' %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% else %}({{ m.content }}){% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return folder


def small(folders):
    config = opd.get_config()
    config.data.train = config.eval.data = str(folders / "rows.jsonl")
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 120, 40
    config.rollout.prompts_per_step = config.probe.problems = 2
    return config


def shown(tokenizer: Tokenizer, prompts: list[list[int]]) -> bool:
    """Whether every prompt shows every turn, in order."""
    texts = [tokenizer.hf.decode(ids) for ids in prompts]
    places = [[text.find(said) for _, said in TURNS] for text in texts]
    return bool(texts) and all(min(p) >= 0 and p == sorted(p) for p in places)


def test_training_and_held_out_answers(folders):
    setup = make_setup(small(folders))
    assert not setup.separate_prompts
    assert setup.train[0].history == TURNS[:2]
    assert shown(setup.tokenizer, setup.read(setup.train[:2]).prompts)
    assert shown(setup.tokenizer, setup.prompts)
    assert shown(setup.teacher_tokenizer, setup.teacher_prompts)
    assert any("4 problems of 4 rows" in n and "4 with earlier turns" in n for n in setup.notes)


def test_templates_that_differ_in_earlier_turns_alone_make_two_prompts(folders):
    config = small(folders)
    config.teacher.chat_template = str(folders / "alike.jinja")
    setup = make_setup(config)
    assert setup.separate_prompts
    batch = setup.read(setup.train[:2])
    assert batch.teacher_prompts is not None
    assert batch.teacher_prompts != batch.prompts
    assert shown(setup.teacher_tokenizer, batch.teacher_prompts)


def test_probes(folders):
    made = workload.make_plan(small(folders))
    student = writing.student_writer(made)
    teacher = writing.teacher_writer(made.setups[0], made.problems)
    assert shown(student.tokenizer, student.prompts)
    assert shown(teacher.tokenizer, teacher.prompts)


def test_evaluation(folders):
    config = evaluate_config.get_config()
    config.eval.benchmarks = f"mine={folders / 'rows.jsonl'}"
    subject = open_subject(small(folders).student.path, config, step=None)
    (task,) = runner.make_tasks(config, subject)
    assert shown(subject.tokenizer, task.prompts)
    assert all(said in task.texts[0] for _, said in TURNS)
    assert task.columns.endswith("4 with earlier turns")


def test_sampling(folders):
    config = small(folders)
    made = sample.make_plan(config)
    assert shown(made.tokenizer, made.style.prompts(made.problems[:2], made.tokenizer))
    (folders / "other.jsonl").write_text(
        (folders / "rows.jsonl").read_text().replace("with 1.", "with 7.")
    )
    config.data.train = str(folders / "other.jsonl")
    assert sample.make_plan(config).sha256 != made.sha256  # another run
