"""Hub names: local folders first, then the cache, then the network, then one line."""

import huggingface_hub
import pytest

from opd_jax.errors import ModelError
from opd_jax.models import locate

pytestmark = pytest.mark.short


@pytest.fixture
def hub(monkeypatch):
    """A hub whose cache and network hold what a test puts there; records what it was asked."""
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


def test_a_name_that_is_nowhere_is_one_line(hub):
    with pytest.raises(
        ModelError, match=r"'o/typo' is neither a folder nor .*reached\); give"
    ) as e:
        locate("o/typo")
    assert "\n" not in str(e.value)
