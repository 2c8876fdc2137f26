"""A run's checkpoint as a Hugging Face folder, and every reason for which there is none."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import opd_jax
from opd_jax import checkpoint, data, models, workdir
from opd_jax import config as configuration
from opd_jax.checkpoint.export import export
from opd_jax.errors import ConfigError, ModelError, OpdError, WorkdirError
from opd_jax.types import TrainState
from tests.models.test_hf_load import assert_same_trees
from tests.support.lanes import slow
from tests.support.paths import ROOT

STUDENT = pathlib.Path(opd_jax.__file__).parent / "tiny" / "student"


def write_run(folder: pathlib.Path, steps: tuple[int, ...], model: pathlib.Path = STUDENT) -> None:
    """A workdir as a run leaves it; at step n every weight is n more than at the start."""
    config = configuration.default()
    config.student.path = str(model)
    workdir.create(folder, config, [])
    _, params = models.load(str(model))
    problems = data.open_problems("tiny:train", field="data.train", size=9)
    batches = data.make_batches(problems, batch=2, seed=0, shuffle=True)
    with checkpoint.Checkpoints(folder, keep=9) as saved:
        for step in steps:
            moved = jax.tree.map(lambda w, step=step: w + step, params)
            state = TrainState(
                step=np.int32(step), params=moved, opt_state=optax.adam(1).init(moved)
            )
            saved.save(step, state, batches, guard="")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A workdir with the steps 2 and 10."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_run(folder, (2, 10))
    return folder


def listing(folder: pathlib.Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*")}


@pytest.mark.short
@pytest.mark.parametrize(("step", "taken"), [(None, 10), (2, 2), (10, 10)])
def test_the_newest_or_the_named_step(run, tmp_path, step, taken):
    before = listing(run)
    assert export(str(run), str(tmp_path / "out"), step=step) == taken
    assert listing(run) == before  # only read
    config, params = models.load(str(tmp_path / "out"))
    start_config, start = models.load(str(STUDENT))
    assert config == start_config
    assert_same_trees(params, jax.tree.map(lambda w: w + taken, start))


def test_the_chat_template_of_the_run_goes_with_the_model(run, tmp_path):
    from transformers import AutoTokenizer

    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["student"]["chat_template"] = str(template)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    turn = [{"role": "user", "content": "1 + 1"}]
    for tokenizer in (
        AutoTokenizer.from_pretrained(tmp_path / "out"),
        data.Tokenizer(str(tmp_path / "out")).hf,
    ):
        assert tokenizer.apply_chat_template(turn, tokenize=False) == "[1 + 1]"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_transformers_reads_config_and_tokenizer(run, tmp_path, dtype):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    export(str(run), str(tmp_path / "out"), dtype=dtype)
    assert AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == 2
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2]
    turn = [{"role": "user", "content": "1 + 1"}]
    texts = [
        AutoTokenizer.from_pretrained(f).apply_chat_template(turn, add_generation_prompt=True)
        for f in (tmp_path / "out", STUDENT)
    ]
    assert texts[0] == texts[1]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.slow
@pytest.mark.torch
def test_transformers_gives_our_logits(run, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    small = tmp_path / "run"
    write_run(small, (0,))
    export(str(small), str(tmp_path / "out"))
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    config, params = models.load(str(STUDENT))
    tokens = np.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        want = model.eval()(torch.tensor(tokens)).logits.numpy()
    got = models.forward(params, config, tokens, np.full(2, 20))
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_overrides_of_the_run_are_carried(run, tmp_path):
    changed = tmp_path / "run"
    shutil.copytree(run, changed)
    config = json.loads((changed / "config.json").read_text())
    config["student"] |= {"rope_theta": 4e4, "max_position": 1024}
    (changed / "config.json").write_text(json.dumps(config))
    export(str(changed), str(tmp_path / "out"))
    exported = models.load_config(str(tmp_path / "out"))
    assert (exported.rope_theta, exported.max_position) == (4e4, 1024)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["rope_parameters"]["rope_theta"] == stored["rope_theta"] == 4e4


def refusal(kind: type[OpdError], tmp_path: pathlib.Path, folder: pathlib.Path, **named) -> str:
    """The one line of a refused export; nothing was written."""
    out = tmp_path / "refused"
    with pytest.raises(kind) as error:
        export(str(folder), str(out), **named)
    assert not out.exists()
    assert not [file for file in tmp_path.iterdir() if file.name.endswith(".partial")]
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_finished_run(run, tmp_path):
    assert "'/no/run' does not exist" in refusal(WorkdirError, tmp_path, pathlib.Path("/no/run"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in refusal(WorkdirError, tmp_path, empty)
    shutil.copy(run / "config.json", empty)
    assert "has no checkpoints/" in refusal(WorkdirError, tmp_path, empty)
    (empty / "checkpoints").mkdir()
    assert "has no complete checkpoint" in refusal(WorkdirError, tmp_path, empty)
    for text in ("{", "[]", "{}", '{"student": 3}', '{"student": {"path": 3}}'):
        (empty / "config.json").write_text(text)
        message = refusal(WorkdirError, tmp_path, empty)
        assert f"{empty / 'config.json'} cannot be read" in message


def test_a_step_that_is_not_there(run, tmp_path):
    message = refusal(WorkdirError, tmp_path, run, step=7)
    assert "no checkpoint of step 7; it has those of 2, 10" in message


def test_a_dtype_that_is_no_float(run, tmp_path):
    assert "dtype='int8'" in refusal(ConfigError, tmp_path, run, dtype="int8")


def test_an_out_folder_that_holds_something(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").write_text("a")
    with pytest.raises(ModelError, match="is not empty"):
        export(str(run), str(tmp_path / "mine"))
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["a"]


def test_a_source_that_is_gone_or_another_model(run, tmp_path):
    changed = tmp_path / "run"
    shutil.copytree(run, changed)
    config = json.loads((changed / "config.json").read_text())
    config["student"]["path"] = "/no/model"
    (changed / "config.json").write_text(json.dumps(config))
    assert "'/no/model' does not exist" in refusal(ModelError, tmp_path, changed)
    config["student"]["path"] = str(STUDENT.parent / "teacher")
    (changed / "config.json").write_text(json.dumps(config))
    message = refusal(WorkdirError, tmp_path, changed)
    assert str(changed / "checkpoints" / "10") in message


def test_a_damaged_checkpoint(run, tmp_path):
    changed = tmp_path / "run"
    shutil.copytree(run, changed)
    for file in (changed / "checkpoints" / "10" / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 10_000:
            file.write_bytes(file.read_bytes()[:100])
    assert str(changed / "checkpoints" / "10") in refusal(WorkdirError, tmp_path, changed)
    assert export(str(changed), str(tmp_path / "out"), step=2) == 2


def launch(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "export.py"), *arguments],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_command(run, tmp_path):
    done = launch(f"--workdir={run}", f"--out={tmp_path / 'out'}", "--step=2", "--dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"step 2 of {run} -> {tmp_path / 'out'}\n"
    assert models.load(str(tmp_path / "out"))[1]["norm"]["scale"].dtype == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--workdir=/no/run", "--out=OUT"], 1, "'/no/run' does not exist"),
        (["--workdir=RUN", "--out=OUT", "--step=3"], 1, "it has those of 2, 10"),
        *slow(
            (["--workdir=RUN"], 2, "--out"),
            (["--workdir=RUN", "--out=OUT", "--dtype=int8"], 2, "dtype"),
            (["--workdir=RUN", "--out=OUT", "--step=-1"], 2, "step"),
        ),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, arguments, status, says):
    places = {"RUN": str(run), "OUT": str(tmp_path / "out")}
    for short, path in places.items():
        arguments = [argument.replace(short, path) for argument in arguments]
    done = launch(*arguments)
    assert done.returncode == status
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert not (tmp_path / "out").exists()
