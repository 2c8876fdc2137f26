"""Recorded rollouts: the files, what is refused, and that training from them is the live training."""

import dataclasses
import json
import logging
import pathlib
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from configs import opd
from launch.make_tiny import make_tokenizer
from opd_jax import data, hardware, models, train
from opd_jax.config.validate import validate
from opd_jax.errors import ConfigError, DataError, Interrupted, WorkdirError
from opd_jax.grading.grader import Grade
from opd_jax.memory_plan import memory
from opd_jax.memory_plan.step_time import step_time
from opd_jax.memory_plan.workload import of_config
from opd_jax.models.fingerprint import fingerprint
from opd_jax.tools import record
from opd_jax.training import model_limits, precompile, recording, replay, selftest
from opd_jax.training.make_setup import make_setup
from opd_jax.training.rewards import Rewards
from opd_jax.training.terms import make_terms
from opd_jax.types import Outcome, Rollout, Scores, Support
from opd_jax.workdir import atomic
from opd_jax.workdir.stop import Stop
from tests.conftest import distance, tiny_config
from tests.support.plan_small import workload
from tests.support.small_run import lines, small, without_times
from tests.training.test_precompile import misses, own_cache  # noqa: F401 (a fixture)

WIDTH = 7


def rollout() -> Rollout:
    """Two rows: 2 + 3 tokens, and 3 + 4, which fills the row."""
    return Rollout(
        tokens_BT=np.array([[5, 6, 7, 8, 9, 0, 0], [5, 6, 7, 1, 2, 3, 4]], np.int32),
        length_B=np.array([5, 7], np.int32),
        prompt_length_B=np.array([2, 3], np.int32),
        sampler_logprob_BT=-np.array(
            [[0, 0, 0.1, 0.2, 0.3, 0, 0], [0, 0, 0, 0.4, 0.5, 0.6, 0.7]], np.float32
        ),
        outcome_B=np.array([Outcome.EOS, Outcome.BUDGET], np.int32),
    )


def scores(places: int = 2) -> Scores:
    draw = np.random.default_rng(0)
    shape = (2, WIDTH)

    def numbers(*more: int) -> np.ndarray:
        return -draw.uniform(size=(*shape, *more)).astype(np.float32)

    support = Support(
        draw.integers(0, 9, (*shape, places)).astype(np.int32), numbers(places), numbers(places),
        numbers(),
    )  # fmt: skip
    return Scores(
        student_logprob_BT=numbers(), student_entropy_BT=numbers(), teacher_logprob_BT=numbers(),
        teacher_entropy_BT=numbers(), reverse_kl_BT=numbers(), support=support,
    )  # fmt: skip


def test_what_is_packed_is_unpacked():
    own, grades = scores(), [Grade.CORRECT, None]
    rewards = Rewards(np.array([0.5, 0.0], np.float32), np.array([True, False]))
    arrays = recording.pack(rollout(), own, grades=grades, rewards=rewards, places=2)
    assert arrays["tokens"].tolist() == [5, 6, 7, 8, 9, 5, 6, 7, 1, 2, 3, 4]
    assert arrays["teacher_logprob"].shape == (7,)  # 3 + 4 response tokens
    assert arrays["support_ids"].shape == (7, 2)
    got = recording.unpack(arrays, width=WIDTH)
    jax.tree.map(np.testing.assert_array_equal, got.rollout, rollout())
    mask = rollout().response_mask_BT
    for name in ("teacher_logprob_BT", "teacher_entropy_BT"):
        np.testing.assert_array_equal(getattr(got, name), np.where(mask, getattr(own, name), 0))
    assert got.support is not None
    np.testing.assert_array_equal(got.support.ids_BTX[mask], own.support.ids_BTX[mask])
    np.testing.assert_array_equal(got.support.teacher_BTX[mask], own.support.teacher_BTX[mask])
    np.testing.assert_array_equal(
        got.support.teacher_rest_BT[mask], own.support.teacher_rest_BT[mask]
    )
    assert got.grades == grades
    assert got.rewards is not None
    assert got.rewards.reward_B.tolist() == [0.5, 0.0]
    assert got.rewards.known_B.tolist() == [True, False]
    merged = got.scores(own)
    assert merged.student_logprob_BT is own.student_logprob_BT
    assert merged.teacher_logprob_BT is got.teacher_logprob_BT


@pytest.mark.parametrize(("places", "teacher"), [(0, True), (2, True), (0, False)])
def test_the_bytes_of_a_token(places, teacher):
    """The arrays with a number for each token, counted: what is announced is what is written."""
    own = scores()
    if not teacher:
        own = Scores(own.student_logprob_BT, own.student_entropy_BT)
    arrays = recording.pack(rollout(), own, grades=[None, None], places=places)
    per_row = {"prompt_length", "length", "outcome", "grade"}
    written = sum(x.nbytes for name, x in arrays.items() if name not in per_row)
    assert written == 7 * recording.bytes_per_token(places, teacher=teacher) + 5 * 4


def test_drift_by_hand():
    """Means over the scored tokens alone: (.1 + .3) / 2 of log p_recorded - log p."""
    own = scores().replace(student_logprob_BT=rollout().sampler_logprob_BT - 0.1)
    own.student_logprob_BT[0, 3] -= 0.2
    mask = np.zeros((2, WIDTH), bool)
    mask[0, 2:4] = True
    assert recording.drift(rollout(), own, mask)["replay/drift"] == pytest.approx(0.2, abs=1e-6)
    assert recording.drift(rollout(), own, mask & False) == {}


def test_a_fingerprint_is_of_the_tensors_and_not_of_the_files(tmp_path):
    config = tiny_config(num_layers=1)
    params = models.decoder.init(jax.random.key(0), config)
    tokenizer = make_tokenizer()
    for name in ("a", "b"):
        models.save(str(tmp_path / name), config, params, tokenizer)
    file = tmp_path / "b" / "model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    parts = {"one.safetensors": names[:2], "two.safetensors": names[2:]}
    file.unlink()
    for part, members in parts.items():
        save_file({name: tensors[name] for name in members}, tmp_path / "b" / part)
    index = {name: part for part, members in parts.items() for name in members}
    (tmp_path / "b" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    first = fingerprint(str(tmp_path / "a"))
    assert fingerprint(str(tmp_path / "b")) == first
    changed = {name: x.copy() for name, x in tensors.items()}
    changed[names[0]].flat[-1] += 1
    save_file(changed, tmp_path / "a" / "model.safetensors")
    assert fingerprint(str(tmp_path / "a")) != first


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loss.divergence_weight": 1.0}, "loss.support=full, and has the teacher's own top-k ids"),
        ({"loss.advantage": "support", "loss.support": "teacher"}, "loss.advantage=support, which"),
        ({"loss.advantage_shape": "baseline"}, "set --config.loss.advantage_shape=log_ratio"),
        ({"loss.extrapolation": 1.5}, "set --config.loss.extrapolation=1"),
        ({"loss.token_weight": "tip"}, "loss.token_weight=tip, which needs both"),
        ({"loss.pg_weight": 0.0, "loss.lambda_gold": 1.0}, "a loss without rollouts"),
        ({"teacher.path": "student", "teacher.follow": "live"}, "a teacher that changes"),
        ({"guard.action": "warn"}, "which watches rollouts of the current student"),
        ({"log.variants": 1}, "set --config.log.variants=0"),
        (
            {"loss.golden_divergence": 1.0},
            "loss.golden_divergence=1, which scores golden solutions",
        ),
        ({"loss.low_kl_window": 8}, "set --config.loss.low_kl_window=0"),
        ({"rollout.horizon": (8, 16)}, "rollout.horizon=(8, 16), which bounds responses while"),
        ({"jump.problems": 4}, "set --config.jump.problems=0"),
        ({"guard.self_test": "always"}, "guard.self_test=always, which compares the sampler"),
        ({"replay.path": "", "replay.other_student": True}, "replay.other_student=True has no"),
    ],
)
def test_what_a_recording_does_not_have_is_refused_in_one_line(changes, says):
    config = opd.get_config()
    config.replay.path = "somewhere"
    validate(config)
    for field, value in changes.items():
        section, name = field.split(".")
        config[section][name] = value
    with pytest.raises(ConfigError) as error:
        validate(config)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_teacher_with_another_tokenizer_is_refused_in_one_line():
    config = opd.get_config()
    model_limits.check_spans(config, make_terms(config))
    config.replay.path = "somewhere"
    with pytest.raises(
        ConfigError, match=r"^replay.path=somewhere, .*; set --config.replay.path=$"
    ):
        model_limits.check_spans(config, make_terms(config))


def test_a_recording_without_rewards_is_refused_where_the_loss_needs_them(tmp_path):
    def written(name: str, **found) -> replay.Replay:
        writer = replay.Writer(tmp_path / name, {"format": 1})
        writer.add(recording.pack(rollout(), scores(), **found), [(0, "a"), (1, "b")])
        return replay.Replay(tmp_path / name, {}, writer.shards, WIDTH)

    known = Rewards(np.array([0.5, 0.0], np.float32), np.array([True, False]))
    replay.check_rewards(written("graded", grades=[None, Grade.WRONG]))
    replay.check_rewards(written("rewarded", grades=[None, None], rewards=known))
    with pytest.raises(ConfigError, match="needs the reward of each rollout; record again"):
        replay.check_rewards(written("neither", grades=[None, None]))


def test_the_plan_has_no_rollout_and_no_teacher():
    live = workload()
    replayed = dataclasses.replace(live, replayed=True, teacher=None)
    stages = {stage.name: stage for stage in memory.stages(replayed)}
    assert "rollout" in {stage.name for stage in memory.stages(live)}
    assert "rollout" not in stages
    assert all("teacher" not in stage.held for stage in stages.values())


def test_the_plan_of_a_config_that_replays():
    config, device = opd.get_config(), hardware.find("cpu")
    live = of_config(config, device, 1)
    config.replay.path = "somewhere"
    replayed = of_config(config, device, 1)
    assert live.teacher is not None
    assert live.samples
    assert replayed.teacher is None
    assert not replayed.samples
    assert [stage.name for stage in step_time(replayed, device).stages] == ["score", "update"]


# Runs. The recording is made once.


def recording_config(folders, method: str = "opd") -> ConfigDict:
    config = small(folders, method)
    config.steps, config.eval.data = 2, ""
    return config


def test_spans_of_text_are_not_recorded_and_not_replayed(folders, tmp_path):
    config = recording_config(folders)
    config.scoring.compare, config.scoring.span_room = "spans", 1.0
    with pytest.raises(ConfigError, match=r"spans of text .*set --config") as error:
        record.run(config, str(tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"^replay.path=.*set --config.replay.path=$"):
        make_setup(replayed(config, tmp_path / "out"))


@pytest.fixture(scope="module")
def recorded(folders, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("recordings") / "plain"
    return record.run(recording_config(folders), str(folder))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def replayed(config: ConfigDict, folder: pathlib.Path) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.replay.path = str(folder)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("loss", [{}, {"outcome": "route", "outcome_value": 1.0}])
def test_the_first_step_of_a_replay_is_the_live_one(folders, recorded, tmp_path, loss):
    config = recording_config(folders, "stable_opd")
    config.steps = 1
    config.loss.update({"importance_cap": 2.0} | loss)
    live = train.run(config, str(tmp_path / "live"), command=[])
    again = train.run(replayed(config, recorded), str(tmp_path / "replay"), command=[])
    assert distance(again.state.params, live.state.params) < 1e-6
    one, other = (lines(tmp_path / name, "metrics.jsonl")[1] for name in ("live", "replay"))
    for key in ("loss/total", "optim/grad_norm", "score/advantage_mean", "rollout/length_mean",
                "rollout/accuracy"):  # fmt: skip
        assert other[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6), key
    assert other["replay/age"] == 0.0
    assert abs(other["replay/drift"]) < 1e-5
    assert "time/rollout_s" not in other
    texts = [
        [x["response"] for x in lines(tmp_path / name, "rollouts.jsonl")]
        for name in ("live", "replay")
    ]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_divergence_over_the_teachers_ids_is_replayed(folders, tmp_path):
    config = recording_config(folders)
    config.steps = 1
    config.loss.update({"pg_weight": 0.0, "divergence_weight": 1.0, "support": "teacher",
                        "top_k": 4, "form": "tail", "direction": "forward"})  # fmt: skip
    folder = record.run(config, str(tmp_path / "recording"))
    live = train.run(config, str(tmp_path / "live"), command=[])
    again = train.run(replayed(config, folder), str(tmp_path / "replay"), command=[])
    assert distance(again.state.params, live.state.params) < 1e-6
    config.loss.top_k = 5
    with pytest.raises(ConfigError, match=r"set --config.loss.top_k=4"):
        make_setup(replayed(config, folder))


@pytest.mark.slow
def test_a_resumed_replay_is_the_uninterrupted_one(folders, recorded, tmp_path):
    """Four steps from a recording of two: it begins again, and the student has moved since."""
    config = replayed(recording_config(folders, "stable_opd"), recorded)
    config.steps, config.checkpoint.every = 4, 1
    whole = train.run(config, str(tmp_path / "whole"), command=[])
    config.steps = 3
    train.run(config, str(tmp_path / "run"), command=[])
    config.steps = 4
    resumed = train.run(config, str(tmp_path / "run"), command=[])
    jax.tree.map(np.testing.assert_array_equal, resumed.state.params, whole.state.params)
    rows = [without_times(lines(tmp_path / name, "metrics.jsonl")) for name in ("whole", "run")]
    assert rows[0] == rows[1]
    assert [row["replay/age"] for row in rows[0][1:]] == [0.0, 1.0, 2.0, 3.0]
    assert abs(rows[0][4]["replay/drift"]) > 1e-4
    ids = [x["id"] for x in lines(tmp_path / "whole", "rollouts.jsonl")]
    assert ids[:2] == ids[2:]


@pytest.mark.slow
def test_a_recording_that_was_interrupted_ends_with_the_same_bytes(
    folders, recorded, tmp_path, monkeypatch
):
    """Once while a file is being written, once between its end and the manifest, once on request."""
    config, out = recording_config(folders), tmp_path / "again"
    replacing, written = atomic.replacing, []

    def killed(path):
        written.append(path.name)
        if len(written) == 3:  # the file of step 2: a part of it is on the disk
            path.with_name(path.name + ".tmp").write_bytes(b"part")
            raise KeyboardInterrupt
        return replacing(path)

    monkeypatch.setattr(atomic, "replacing", killed)
    with pytest.raises(KeyboardInterrupt):
        record.run(config, str(out))
    assert written[::2] == ["step-000001.safetensors", "step-000002.safetensors"]
    with pytest.raises(Interrupted, match="1 steps are recorded"):
        record.run(config, str(out), stop=Stop(reason="SIGTERM"))
    written[:] = ["", "", "", ""]
    monkeypatch.setattr(atomic, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        record.run(config, str(out))
    monkeypatch.undo()
    record.run(config, str(out))
    assert contents(out) == contents(recorded)
    record.run(config, str(out))  # complete already
    assert contents(out) == contents(recorded)
    config.seed = 1
    with pytest.raises(WorkdirError, match="recording of something else"):
        record.run(config, str(out))


@pytest.mark.slow
def test_another_student_tokenizer_or_file_is_refused_before_anything_is_written(
    folders, recorded, tmp_path
):
    config = replayed(recording_config(folders), recorded)
    other = tmp_path / "student"
    shutil.copytree(folders / "student", other)
    file = other / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, file, metadata={"format": "pt"})
    config.student.path = str(other)
    with pytest.raises(ConfigError, match=r"is not the student that .* was recorded with; set"):
        train.run(config, str(tmp_path / "run"), command=[])
    assert not (tmp_path / "run").exists()
    config.replay.other_student, config.steps = True, 1
    train.run(config, str(tmp_path / "run"), command=[])
    assert lines(tmp_path / "run", "metrics.jsonl")[1]["replay/drift"] != 0.0


@pytest.mark.slow
def test_damaged_recordings_are_refused_in_one_line(folders, recorded, tmp_path):
    def says(change) -> str:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(recorded, folder)
        config = recording_config(folders)
        change(folder, config)
        with pytest.raises((DataError, ConfigError)) as error:
            make_setup(replayed(config, folder))
        assert "\n" not in str(error.value)
        return str(error.value)

    first = "step-000001.safetensors"
    whole = (recorded / first).read_bytes()
    manifest = json.loads((recorded / "manifest.json").read_text())

    def with_manifest(**changes):
        return lambda folder, _: (folder / "manifest.json").write_text(
            json.dumps(manifest | changes)
        )

    assert "was cut short or changed" in says(
        lambda folder, _: (folder / first).write_bytes(whole[:-1])
    )
    assert "has other contents" in says(
        lambda folder, _: (folder / first).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    )
    assert "cannot be read (No such file" in says(lambda folder, _: (folder / first).unlink())
    assert "is no recording" in says(lambda folder, _: (folder / "manifest.json").unlink())
    assert "cannot be read (" in says(
        lambda folder, _: (folder / "manifest.json").write_text('{"format"')
    )
    assert "format 2, wanted 1" in says(with_manifest(format=2))
    assert "no step is recorded yet" in says(with_manifest(shards=[]))
    hashes = manifest["sha256"] | {"tokenizer": "other"}
    assert "recorded with another tokenizer" in says(with_manifest(sha256=hashes))
    hashes = manifest["sha256"] | {"teacher_tokenizer": "other"}
    assert "--config.teacher.path to the teacher" in says(with_manifest(sha256=hashes))
    shards = [shard | {"ids": ["x"] * len(shard["ids"])} for shard in manifest["shards"]]
    assert "was recorded with x there" in says(with_manifest(shards=shards))

    def longer(_, config):
        config.rollout.samples_per_prompt = 3

    assert "set --config.rollout.samples_per_prompt=2" in says(longer)


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("divergence", [0.0, 1.0])
def test_a_replay_meets_no_program_that_was_not_compiled_ahead(
    folders, recorded, tmp_path, monkeypatch, caplog, divergence
):
    config, folder = recording_config(folders, "stable_opd"), recorded
    if divergence:
        config.loss.update({"divergence_weight": 1.0, "support": "teacher", "top_k": 4})
        folder = record.run(config, str(tmp_path / "recording"))
        jax.clear_caches()
    caplog.set_level(logging.DEBUG, logger="jax._src.compiler")
    compiled, really = [], precompile.compile_all

    def compile_all(programs):
        caplog.clear()
        seconds = really(programs)
        compiled.extend(misses(caplog))
        caplog.clear()
        return seconds

    monkeypatch.setattr(
        selftest, "wanted", lambda *_: True
    )  # it samples, so a replay leaves it out
    monkeypatch.setattr(precompile, "worthwhile", lambda: True)
    monkeypatch.setattr(precompile, "compile_all", compile_all)
    config.log.gradients = 1
    train.run(replayed(config, folder), str(tmp_path / "run"), command=[])
    assert {"score_part", "add_gradient", "apply"} <= set(compiled)
    assert not {"decode_chunk", "prefill"} & set(compiled)
    assert misses(caplog) == []


def test_batches_in_a_given_order():
    batches = data.make_batches(range(10), batch=2, seed=0, shuffle=True, order=[4, 1, 9, 0])
    assert [next(batches) for _ in range(3)] == [[4, 1], [9, 0], [4, 1]]
