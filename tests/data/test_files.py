"""Rows of files: the three formats say the same, by stream and by index, and every break is named."""

import concurrent.futures
import gzip
import json
import os
import pathlib
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd_jax.data import files, parquet
from opd_jax.errors import DataError

ROWS = [{"n": i, "text": f"row {i} \u2028 é", "deep": {"a": [{"b": i}]}} for i in range(700)]


def write(path: pathlib.Path, rows: list) -> str:
    if path.name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=300)
    elif path.name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=1))
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.name.endswith(".gz") else text)
    return str(path)


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_stream_gives_every_row_in_order(tmp_path, kind):
    path = write(tmp_path / f"rows{kind}", ROWS)
    assert list(files.stream(path)) == list(enumerate(ROWS, start=1))


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet"])
def test_rows_by_index(tmp_path, kind):
    rows = files.open_rows(write(tmp_path / f"rows{kind}", ROWS))
    assert len(rows) == len(ROWS)
    order = list(range(len(ROWS)))
    random.Random(0).shuffle(order)
    assert [rows[i] for i in order] == [ROWS[i] for i in order]
    assert rows.number(0) == 1
    with pytest.raises(IndexError):
        rows[len(ROWS)]


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_rows_are_shared_by_threads(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(parquet, "_CACHE_BYTES", 1)  # row groups are evicted all the time
    rows = files.open_rows(write(tmp_path / f"rows{kind}", ROWS))
    order = [random.Random(1).randrange(len(ROWS)) for _ in range(400)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(rows.__getitem__, order)) == [ROWS[i] for i in order]


def test_blank_lines_do_not_count_as_rows_but_as_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}\n\n{"a": 3}')
    assert list(files.stream(str(path))) == [(1, {"a": 1}), (4, {"a": 2}), (6, {"a": 3})]
    rows = files.open_rows(str(path))
    assert [rows[i] for i in range(3)] == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert [rows.number(i) for i in range(3)] == [1, 4, 6]


@pytest.mark.parametrize(
    ("line", "says", "reason"),
    [
        (b'{"a": 1', "not JSON (Expecting", "not JSON"),
        (b"[1, 2]", 'got list, wanted an object such as {"problem"', "not an object"),
        (b'"text"', "got str, wanted an object", "not an object"),
        (b'{"a": "\xff"}', "byte 8 is not UTF-8; save the file as UTF-8", "not UTF-8"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply", "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON (Exceeds the limit", "not JSON"),
    ],
)
def test_a_broken_line_is_named_and_can_be_skipped(tmp_path, line, says, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    first, (number, error), last = files.stream(str(path))
    assert (first, number, last) == ((1, {"a": 1}), 3, (4, {"a": 2}))
    assert isinstance(error, files.RowError)
    assert str(error).startswith(f"{path}, line 3")
    assert says in str(error)
    assert "\n" not in str(error)
    assert error.reason == reason
    rows = files.open_rows(str(path))
    assert rows[2] == {"a": 2}
    with pytest.raises(files.RowError) as raised:
        rows[1]
    assert str(raised.value) == str(error)


def refused(path: pathlib.Path | str) -> str:
    """What both ways of reading say about a file that cannot be read."""
    texts = []
    for read in (lambda: list(files.stream(str(path))), lambda: files.open_rows(str(path))[0]):
        with pytest.raises(DataError) as error:
            read()
        texts.append(str(error.value))
    assert texts[0] == texts[1]
    assert "\n" not in texts[0]
    assert str(path) in texts[0]
    return texts[0]


def test_names_that_cannot_be_read(tmp_path):
    assert "does not exist" in refused(tmp_path / "none.jsonl")
    (tmp_path / "rows.csv").write_text("a,b")
    assert "'.csv', wanted one of .jsonl, .jsonl.gz, .json, .parquet" in refused(
        tmp_path / "rows.csv"
    )
    (tmp_path / "folder.json").mkdir()
    assert "is not a file" in refused(tmp_path / "folder.json")


def test_a_file_without_permission(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}")
    monkeypatch.setattr(os, "access", lambda *_: False)  # not chmod: root reads everything
    assert "chmod +r" in refused(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("b.jsonl", b"\n \n"),
        ("c.json", b"[]"),
    ],
)
def test_files_without_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert "holds no rows" in refused(tmp_path / name)


def test_a_parquet_file_without_rows(tmp_path):
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), tmp_path / "rows.parquet")
    assert "holds no rows" in refused(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "line 1, column 1: not JSON"),
        (b'{"a": 1}\n{"a": 2}\n', "line 2, column 1: not JSON (Extra data); a file of one object a "
         "line is named .jsonl"),
        (b'{"data": []}', "got dict, wanted a list of objects"),
        (b'["\xff"]', "byte 3 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "Exceeds the limit"),
    ],
)  # fmt: skip
def test_broken_json(tmp_path, content, says):
    (tmp_path / "rows.json").write_bytes(content)
    assert says in refused(tmp_path / "rows.json")


def test_a_json_list_named_jsonl_is_told_so(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS, indent=1))
    (_, error), *_ = files.stream(str(tmp_path / "rows.jsonl"))
    assert "a JSON list belongs in a file named .json" in str(error)


def test_items_of_a_json_list_that_are_no_objects(tmp_path):
    (tmp_path / "rows.json").write_text('[{"a": 1}, 7]')
    (_, _), (number, error) = files.stream(str(tmp_path / "rows.json"))
    assert number == 2
    assert str(error).startswith(f"{tmp_path}/rows.json, row 2: got int, wanted an object")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_parquet(tmp_path, share):
    whole = pathlib.Path(write(tmp_path / "whole.parquet", ROWS)).read_bytes()
    path = tmp_path / "rows.parquet"
    path.write_bytes(whole[: int(share * len(whole))])
    assert "is broken or not Parquet" in refused(path)


def test_parquet_text_that_is_not_utf8_is_one_bad_row(tmp_path):
    texts = pa.array([b"good", b"\xff\xfe", b"too"]).view(pa.string())
    pq.write_table(pa.table({"a": texts}), tmp_path / "rows.parquet")
    items = list(files.stream(str(tmp_path / "rows.parquet")))
    assert [items[0], items[2]] == [(1, {"a": "good"}), (3, {"a": "too"})]
    assert items[1][0] == 2
    assert str(items[1][1]).startswith(f"{tmp_path}/rows.parquet, row 2: not UTF-8")


def test_truncated_gzip(tmp_path):
    path = pathlib.Path(write(tmp_path / "rows.jsonl.gz", ROWS))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz is broken"):
        list(files.stream(str(path)))
    path.write_bytes(b"{}\n")
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz is broken"):
        list(files.stream(str(path)))
    with pytest.raises(DataError, match="unpack it: gunzip"):
        files.open_rows(str(path))


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_a_file_that_changes_is_noticed(tmp_path, kind):
    path = tmp_path / f"rows{kind}"
    rows = files.open_rows(write(path, ROWS))
    write(path, ROWS[1:])
    with pytest.raises(DataError, match="has changed since it was opened"):
        rows[5]


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_whatever_the_bytes_only_data_errors_come_out(tmp_path, kind):
    """Random bytes, and the right bytes cut, doubled or changed: rows, or a DataError of one line."""
    draw = random.Random(7)
    whole = pathlib.Path(write(tmp_path / f"whole{kind}", ROWS[:40])).read_bytes()
    path = tmp_path / f"rows{kind}"
    for trial in range(150):
        damaged = bytearray(whole if trial % 3 else draw.randbytes(draw.randrange(300)))
        for _ in range(draw.randrange(1, 6) if trial % 3 == 1 else 0):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        cut = draw.randrange(len(damaged) + 1) if trial % 3 == 2 else len(damaged)
        path.write_bytes(damaged[:cut])
        said = ""
        try:
            for _, row in files.stream(str(path)):
                assert isinstance(row, dict | files.RowError)
                said += str(row) if isinstance(row, files.RowError) else ""
        except DataError as error:
            said += str(error)
        assert "\n" not in said
