"""The checksum of a checkpoint's files: every change is noticed, and the newest intact one is taken."""

import pathlib

import pytest

from opd_jax.checkpoint import manifest


def sealed(folder: pathlib.Path) -> pathlib.Path:
    """A folder as Orbax leaves it, with a manifest."""
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "arrays").write_bytes(bytes(range(256)) * 8)
    (folder / "guard.json").write_text("{}")
    manifest.seal(folder)
    (folder / "_CHECKPOINT_METADATA").write_text("{}")  # Orbax writes it after all else
    return folder


def flip_a_bit(folder: pathlib.Path) -> None:
    file = folder / "state" / "arrays"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "damaged"),
    [
        (flip_a_bit, "state/arrays"),  # of the same size
        (lambda folder: (folder / "state" / "arrays").write_bytes(b"x"), "state/arrays"),
        (lambda folder: (folder / "guard.json").unlink(), "guard.json"),
        (lambda folder: (folder / manifest.MANIFEST).unlink(), manifest.MANIFEST),
        (lambda folder: (folder / manifest.MANIFEST).write_text("[1"), manifest.MANIFEST),
        (lambda folder: (folder / "_CHECKPOINT_METADATA").write_text(""), "_CHECKPOINT_METADATA"),
    ],
    ids=["bit", "size", "missing file", "no manifest", "torn manifest", "torn metadata"],
)
def test_every_change_of_a_sealed_folder_is_noticed(tmp_path, change, damaged):
    folder = sealed(tmp_path / "1")
    assert manifest.damage(folder) is None
    change(folder)
    wrong = manifest.damage(folder)
    assert wrong is not None
    assert damaged in wrong


def test_the_newest_intact_checkpoint_is_taken_and_damaged_ones_are_set_aside(tmp_path):
    for step in (2, 4, 10, 12):
        sealed(tmp_path / "checkpoints" / str(step))
    for step in (2, 12):
        flip_a_bit(tmp_path / "checkpoints" / str(step))
    step, (warning,) = manifest.newest(tmp_path)
    assert step == 10  # 10 comes after 4: steps are compared as numbers
    assert "checkpoint 12 is damaged" in warning
    assert manifest.steps(tmp_path / "checkpoints") == [2, 4, 10]  # older ones are not looked at
    assert (tmp_path / manifest.ASIDE / "checkpoint-12-1" / "state").is_dir()


def test_a_run_without_an_intact_checkpoint_has_none(tmp_path):
    assert manifest.newest(tmp_path) == (None, [])
    flip_a_bit(sealed(tmp_path / "checkpoints" / "3"))
    step, warnings = manifest.newest(tmp_path)
    assert (step, len(warnings)) == (None, 1)
