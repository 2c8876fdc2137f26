"""Small files appear complete or not at all."""

import errno

import pytest

from opd_jax.errors import WorkdirError
from opd_jax.workdir import atomic

pytestmark = pytest.mark.short


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "x.json"
    atomic.write_json(path, {"a": 1})
    assert path.read_text() == '{"a": 1}\n'

    def dies():
        with atomic.replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dies()
    assert path.read_text() == '{"a": 1}\n'
    atomic.write_text(path, "\u00e9\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_what_the_operating_system_refuses_is_one_line():
    with (
        pytest.raises(WorkdirError, match=r"^x cannot be written \(No space left\); make room$"),
        atomic.reported("x", "make room"),
    ):
        raise OSError(errno.ENOSPC, "No space left")
    with pytest.raises(WorkdirError, match=r"^as it is$"), atomic.reported("x", "make room"):
        raise WorkdirError("as it is")
