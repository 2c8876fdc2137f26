"""Names that other programs use lead to the fields of the entry point that is started."""

import re

import pytest

from opd_jax import config as configuration
from opd_jax.config import aliases, fields
from opd_jax.config.trees import EVALUATION, MODEL, PROBING, SAMPLING, TRAINING, TREES

pytestmark = pytest.mark.short

# What people write who come from TRL, verl, OpenRLHF, NeMo-RL, ms-swift or tinker.
USUAL = {
    "optim.lr": "'optim.learning_rate'",
    "lr": "'optim.learning_rate'",
    "learning-rate": "'optim.learning_rate'",
    "batch_size": "'rollout.prompts_per_step'",
    "per_device_train_batch_size": "'rollout.prompts_per_step' or 'optim.microbatch_tokens'",
    "gradient_accumulation_steps": "'rollout.prompts_per_step' or 'optim.microbatch_tokens'",
    "rollout.max_new_tokens": "'rollout.max_response_tokens'",
    "max_completion_length": "'rollout.max_response_tokens'",
    "kl_coef": "'loss.beta_kl'",
    "kl_beta": "'loss.beta_kl'",
    "kl_penalty_coef": "'loss.beta_kl' or 'loss.teacher_coef'",
    "num_generations": "'rollout.samples_per_prompt'",
    "actor_rollout_ref.rollout.n": "'rollout.samples_per_prompt'",
    "epochs": "'data.epochs'",
    "num_train_epochs": "'data.epochs'",
    "max_steps": "'steps'",
    "model": "'student.path'",
    "student_model": "'student.path'",
    "teacher": "'teacher.path'",
    "teacher_model": "'teacher.path'",
    "model.lr_scheduler_type": "'optim.schedule'",
    "output_dir": "--workdir=DIR",
    "optim.optimizer": "the optimizer is AdamW; its fields are optim.beta1, ",
    "optim.name": "the optimizer is AdamW",
    "adam_epsilon": "the optimizer is AdamW",
    "optim.learning-rate": "'optim.learning_rate'",
    "optim.weight-decay": "'optim.weight_decay'",
    "model.name": "'student.path'",
    "train_path": "'data.train'",
    "dp": "'mesh.data'",
    "tensor_parallel": "'mesh.tensor'",
    "grad_accum_steps": "'rollout.prompts_per_step' or 'optim.microbatch_tokens'",
    "seq_len": "'rollout.max_prompt_tokens' or 'rollout.max_response_tokens'",
    "lora_rank": "'lora.rank'",
    "use_rslora": "'lora.power'",
    "num_experts": "known: checkpoint.*, data.*, ",
    "optim.temperature": "'eval.temperature' or 'rollout.temperature'",
    "rollout.temprature": "'rollout.temperature'",
}


@pytest.mark.parametrize("name", USUAL)
def test_usual_names_lead_to_the_field(name):
    error = configuration.explain(ValueError("?"), [f"--config.{name}=1"])
    assert f"{name} is not a field" in str(error)
    assert USUAL[name] in str(error)
    assert USUAL[name] in configuration.suggest(name)


FIELDS = list(configuration.flatten(configuration.default().to_dict()))


def test_aliases_lead_to_fields_and_are_none():
    known = {*FIELDS, aliases.WORKDIR, aliases.OPTIMIZER}
    assert all(field in known for fields in aliases.FIELDS.values() for field in fields)
    assert not set(FIELDS) & aliases.FIELDS.keys()
    assert sum(len(line.split()) for line in aliases._NAMES.values()) == len(aliases.FIELDS)


@pytest.mark.parametrize(
    ("tree", "name", "says"),
    [
        (SAMPLING, "n", "did you mean 'sample.samples'?"),
        (SAMPLING, "model", "did you mean 'teacher.path'?"),
        (SAMPLING, "batch_size", "did you mean 'sample.batch'?"),
        (SAMPLING, "max_new_tokens", "did you mean 'sample.max_response_tokens'?"),
        (SAMPLING, "rollout.temprature", "did you mean 'sample.temperature'?"),
        (SAMPLING, "optimizer", "known: data.*, grading.*, metrics.*, rollout.*, sample.*, seed, "
         "student.*, teacher.*"),
        (EVALUATION, "batch_size", "did you mean 'eval.batch'?"),
        (EVALUATION, "n", "did you mean 'eval.samples'?"),
        (EVALUATION, "model", "the model is given by the flag --model=DIR"),
        (EVALUATION, "dataset", "did you mean 'eval.benchmarks'?"),
        (EVALUATION, "output_dir",
         "a folder for results is given by the flag --workdir=DIR, or --out"),
    ],
)  # fmt: skip
def test_an_entry_point_names_fields_that_it_reads(tree, name, says):
    error = configuration.explain(ValueError("?"), [f"--config.{name}=1"], tree)
    assert str(error) == f"config.{name} is not a field; {says}"


@pytest.mark.parametrize(
    ("tree", "name", "says"),
    [
        (SAMPLING, "rollout.temperature", "did you mean 'sample.temperature'?"),
        (SAMPLING, "loss.top_k", "known: data.*, grading.*, "),
        (EVALUATION, "eval.data", "did you mean 'eval.benchmarks'?"),
        (EVALUATION, "eval.match", "known: data.*, eval.*, "),
        (PROBING, "loss.beta_kl", "known: data.*, "),
        (TRAINING, "sample.temperature", "known: checkpoint.*, "),
        (TRAINING, "eval.benchmarks", "known: checkpoint.*, "),
    ],
)
def test_a_field_of_another_entry_point_is_refused_with_its_name(tree, name, says):
    error = configuration.explain(ValueError("?"), [f"--config.{name}=1"], tree)
    said, _, hint = str(error).partition("; ")
    assert said.startswith(f"config.{name} is not a field that {tree.program} reads, launch/")
    assert hint.startswith(says)


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.program)
def test_no_name_leads_to_a_field_of_another_entry_point(tree):
    assert set(tree.instead) <= set(fields.FIELDS)
    assert set(tree.instead.values()) <= {*tree.fields, MODEL}
    for name in {*aliases.FIELDS, *fields.FIELDS, *(f.rpartition(".")[2] for f in fields.FIELDS)}:
        told = configuration.suggest(name, tree)
        assert set(re.findall(r"'([\w.]+)'", told)) <= set(tree.fields)


def test_entry_points_read_every_field_of_the_table():
    assert set().union(*(tree.fields for tree in TREES)) == set(fields.FIELDS)
