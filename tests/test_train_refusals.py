"""Input that a run refuses, before anything is written, or leaves out and counts."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd_jax import data, train
from opd_jax.errors import ConfigError, DataError, ModelError, WorkdirError
from opd_jax.evaluation.subject import open_subject
from opd_jax.tools.bench.run import Options, run_cases
from opd_jax.tools.cold_start import run as sample
from opd_jax.training.make_setup import make_setup
from tests.support.small_run import questions, small


@pytest.mark.slow
def test_rows_that_do_not_fit_are_skipped_and_counted_where_the_config_says_so(
    folders, tmp_path, capsys
):
    file = pathlib.Path(questions(tmp_path, solution="1+2=3.\n\\boxed{3}"))
    bad = [
        {"problem": "Add 1. " * 40, "solution": "x"},
        {"problem": "Add 1.", "solution": "7" * 200},
    ]
    with file.open("a") as out:
        out.write("".join(json.dumps(row) + "\n" for row in bad) + "{broken\n")
    config = small(folders, "sft")
    config.data.train, config.eval.data, config.steps = str(file), "", 1
    with pytest.raises(DataError, match=r"questions\.jsonl, line 15, .*bad_rows=skip"):
        train.run(config, str(tmp_path / "run"), command=[])
    config.data.bad_rows = "skip"
    train.run(config, str(tmp_path / "run"), command=[])
    said = capsys.readouterr().out
    assert "12 problems of 15 rows" in said
    for reason in ("prompt too long 1", "golden solution too long 1"):
        assert reason in said
    config.data.bad_rows = "refuse"
    file.write_text(file.read_text().replace("{broken\n", ""))
    with pytest.raises(DataError, match=r"problem questions-13: its prompt has \d+ tokens, wanted"):
        train.run(config, str(tmp_path / "other"), command=[])


def test_turns_that_a_template_refuses_are_left_out_or_named(folders, tmp_path):
    file = pathlib.Path(questions(tmp_path, solution="1+2=3.\n\\boxed{3}"))
    row = {"problem": "Add 1.", "solution": "2", "id": "x"}
    row["history"] = [{"role": "user", "content": "Hi."}]
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")
    config = small(folders, "sft")
    config.data.train, config.eval.data = str(file), ""
    template = tmp_path / "one_turn.jinja"
    own = data.Tokenizer(str(folders / "student")).hf.chat_template
    refuse = (
        "{% if messages|length > 1 and messages[1].role == 'user' %}{{ raise_exception('one') }}"
    )
    template.write_text(refuse + "{% endif %}" + own)
    config.student.chat_template = config.teacher.chat_template = str(template)
    with pytest.raises(DataError, match=r"problem x: .* and earlier turns \(one\).*bad_rows=skip"):
        make_setup(config)
    config.data.bad_rows = "skip"
    notes = "".join(make_setup(config).notes)
    assert "12 problems of 13 rows" in notes
    assert "template refuses the turns 1" in notes


def test_every_generated_solution_is_looked_at(folders):
    """Prompts of generated problems are all alike, but not how long their solutions are."""
    config = small(folders, "sft")
    config.data.size, config.data.bad_rows = 6_000, "skip"
    config.rollout.max_response_tokens = 124 - 1
    setup = make_setup(config)
    asked = data.open_problems("tiny:train", field="data.train", size=6_000)[:]
    batch = setup.read(asked)
    sizes = [len(x) + len(y) for x, y in zip(batch.prompts, batch.golden, strict=True)]
    wrong = [i for i, size in enumerate(sizes) if size > 159]
    assert wrong
    assert max(wrong) > 2048
    assert f"golden solution too long {len(wrong)}" in "".join(setup.notes)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"rollout.max_prompt_tokens": 8}, DataError, "max_prompt_tokens=2"),
        ({"rollout.max_response_tokens": 1000}, ConfigError, "160 positions"),
        ({"scoring.overlap_top_k": 5000}, ConfigError, "overlap_top_k"),
        ({"student.path": "nowhere"}, ModelError, "nowhere"),
        ({"teacher.path": "nowhere"}, ModelError, "nowhere"),
        ({"data.train": "tiny:trian"}, ConfigError, "tiny:train"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(folders, tmp_path, change, error, says):
    config = small(folders)
    config.optim.microbatch_tokens = 2000
    for field, value in change.items():
        section, name = field.split(".")
        config[section][name] = value
    with pytest.raises(error, match=says) as raised:
        train.run(config, str(tmp_path / "run"), command=[])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def broken(folders, tmp_path, kind: str) -> str:
    """A student folder in which one thing is wrong."""
    folder = tmp_path / "student"
    shutil.copytree(folders / "student", folder)
    weights = folder / "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "nan":
        tensors = {name: np.array(x) for name, x in load_file(weights).items()}
        tensors["model.norm.weight"][3] = np.nan
        save_file(tensors, weights)
    elif kind == "shard":
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "end":  # nor does a chat template say how a turn ends
        (folder / "chat_template.jinja").unlink()
        for name in ("config.json", "generation_config.json"):
            fields = json.loads((folder / name).read_text())
            fields["eos_token_id"] = None
            (folder / name).write_text(json.dumps(fields))
    elif kind == "architecture":
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | {"model_type": "mamba"}))
    elif kind == "template":
        (folder / "chat_template.jinja").unlink()
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("truncated", r"model\.safetensors: not a readable safetensors file"),
        ("nan", r"model\.safetensors: model\.norm\.weight holds NaN or infinity"),
        ("shard", r"shard 'model-00001-of-00002\.safetensors' is not in the folder"),
        ("end", r"no eos_token_id in config\.json or generation_config\.json"),
        ("architecture", r"config\.json: model_type is 'mamba'"),
        ("template", r"no chat template, wanted one for the system prompt"),
    ],
)
def test_a_broken_model_folder_is_named_before_anything_is_written(folders, tmp_path, kind, says):
    config = small(folders, "sft")
    config.student.path = broken(folders, tmp_path, kind)
    config.data.system_prompt = "Add." if kind == "template" else ""
    with pytest.raises(ModelError, match=says) as raised:
        train.run(config, str(tmp_path / "run"), command=[])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_workdirs_that_cannot_be_used(folders, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(WorkdirError, match="not a folder"):
        train.run(small(folders), str(file / "run"), command=[])
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(WorkdirError, match="not empty"):
        train.run(small(folders), str(other), command=[])
    assert [f.name for f in other.iterdir()] == ["thesis.tex"]


def extra_tensor(folders, tmp_path, name, tensor):
    """A config whose student's folder holds one more tensor."""
    shutil.copytree(folders / "student", tmp_path / "student")
    weights = tmp_path / "student" / "model.safetensors"
    save_file(load_file(weights) | {name: tensor}, weights)
    config = small(folders)
    config.student.path = str(tmp_path / "student")
    return config


def test_weights_that_nothing_reads_are_named_at_the_start(folders, tmp_path):
    config = extra_tensor(folders, tmp_path, "v_head.weight", np.ones(3, np.float32))
    assert "student: not read: v_head.weight (outside the decoder)" in make_setup(config).notes


def test_weights_that_would_change_the_logits_are_refused_before_anything_is_written(
    folders, tmp_path
):
    config = extra_tensor(folders, tmp_path, "lm_head.bias", np.ones(3, np.float32))
    with pytest.raises(ModelError, match=r"holds lm_head\.bias"):
        train.run(config, str(tmp_path / "run"), command=[])
    assert not (tmp_path / "run").exists()


def test_a_head_that_config_json_calls_tied_is_trained_as_a_head(folders, tmp_path):
    embedding = load_file(folders / "student" / "model.safetensors")["model.embed_tokens.weight"]
    config = extra_tensor(folders, tmp_path, "lm_head.weight", embedding + 1)
    setup = make_setup(config)
    assert not setup.student.tie_embeddings
    assert any("lm_head.weight differs" in note for note in setup.notes)


@pytest.mark.parametrize(
    "start",
    [
        lambda config, folder: train.run(config, str(folder), command=[]),
        lambda config, folder: sample.make_plan(config),
        lambda config, folder: open_subject(config.student.path, config, step=None),
        lambda config, folder: run_cases("cpu", [], Options(out=folder)),
    ],
    ids=["train", "sample", "evaluate", "bench"],
)
def test_a_tpu_is_refused_in_one_line_by_whatever_computes(start, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(ConfigError, match="tpus are not supported") as raised:
        start(small(folders), tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()
