"""Hub names: local folders first, then the cache, then the network, then one line."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest

from opd_jax.errors import ModelError
from opd_jax.models import hub as hub_module
from opd_jax.models import locate
from opd_jax.models.hub import _complete as complete

pytestmark = pytest.mark.short


@pytest.fixture
def hub(monkeypatch):
    """A hub whose cache and network hold what a test puts there; records what it was asked.

    A name's folder is complete unless its path says "part".
    """
    monkeypatch.setattr(hub_module, "_complete", lambda folder: "part" not in str(folder))
    asked, cache, network = [], {}, {}

    def snapshot_download(name, *, allow_patterns, local_files_only=False):
        asked.append((name, local_files_only))
        assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in allow_patterns)
        source = cache if local_files_only else cache | network
        if name not in source:
            raise OSError(f"{name} cannot be reached\nwith details")
        return source[name]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked, cache, network


def test_a_folder_is_never_asked_for(hub, tmp_path, monkeypatch):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in ("owner/model", str(tmp_path), "./owner/nosuch", "/no/where", "name", "a/b/c"):
        assert locate(path) == path
    assert hub[0] == []


def test_the_cache_comes_before_the_network(hub):
    asked, cache, network = hub
    cache["o/cached"], network["o/new"] = "/cache/1", "/cache/2"
    assert locate("o/cached") == "/cache/1"
    assert locate("o/new") == "/cache/2"
    assert asked == [("o/cached", True), ("o/new", True), ("o/new", False)]


def test_a_cache_that_holds_a_part_is_not_enough(hub):
    asked, cache, network = hub
    cache["o/some"], network["o/some"] = "/cache/part", "/cache/whole"
    assert locate("o/some") == "/cache/whole"
    assert [local for _, local in asked] == [True, False]


def test_a_complete_folder_has_settings_tokenizer_and_every_shard(tmp_path):
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    for name in ("config.json", "tokenizer.json", "1.safetensors", "2.safetensors"):
        assert not complete(tmp_path)
        (tmp_path / name).write_text("{}")
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert complete(tmp_path)
    (tmp_path / "2.safetensors").unlink()
    assert not complete(tmp_path)
    (tmp_path / "model.safetensors").write_text("")
    assert complete(tmp_path)


def test_a_name_that_is_nowhere_is_one_line(hub):
    with pytest.raises(
        ModelError, match=r"'o/typo' is neither a folder nor .*reached\); give"
    ) as e:
        locate("o/typo")
    assert "\n" not in str(e.value)


def test_of_two_that_need_a_model_at_the_same_time_one_downloads_it(hub, tmp_path, monkeypatch):
    asked, cache, network = hub
    network["o/large"] = "/cache/large"
    monkeypatch.setattr(hub_module.tempfile, "gettempdir", lambda: str(tmp_path))
    download, begun, go_on = hub_module._download, threading.Event(), threading.Event()

    def slow(path):
        begun.set()
        assert go_on.wait(10)
        found = download(path)
        cache[path] = found
        return found

    monkeypatch.setattr(hub_module, "_download", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(locate, "o/large")
        assert begun.wait(10)
        second = pool.submit(locate, "o/large")
        while ("o/large", True) not in asked[1:]:  # it has looked into the cache and found nothing
            time.sleep(0.01)
        go_on.set()
        assert (first.result(10), second.result(10)) == ("/cache/large", "/cache/large")
    assert asked.count(("o/large", False)) == 1
    assert [file.name for file in tmp_path.iterdir()] == [f"opd_jax-{os.getuid()}-o--large.lock"]


def test_without_a_place_for_the_lock_the_model_is_fetched_all_the_same(hub, tmp_path, monkeypatch):
    hub[2]["o/model"] = "/cache/1"
    monkeypatch.setattr(hub_module.tempfile, "gettempdir", lambda: str(tmp_path / "missing"))
    assert locate("o/model") == "/cache/1"
