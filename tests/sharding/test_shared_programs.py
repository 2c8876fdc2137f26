"""Several processes use one cache of compiled programs, or none."""

import os
import subprocess
import sys

import jax
import pytest

from opd_jax.sharding import multihost, shared_programs
from tests.sharding.test_multihost import free_port
from tests.support.paths import ROOT

pytestmark = pytest.mark.short
NAMES = (
    "jax_enable_compilation_cache",
    "jax_share_binary_between_hosts",
    "jax_compilation_cache_dir",
)


@pytest.fixture
def two(monkeypatch, tmp_path):
    """Process 0 of two with a cache of its own; `others` is what process 1 says."""
    before = {name: jax.config.values[name] for name in NAMES}
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    others = {"seen": True}
    monkeypatch.setattr(multihost, "several", lambda: True)
    monkeypatch.setattr(multihost, "first", lambda: True)
    monkeypatch.setattr(multihost, "from_first", lambda make: make())
    monkeypatch.setattr(multihost, "all_gather", lambda facts: [facts, others])
    monkeypatch.setattr(shared_programs, "_VISIBLE_S", 0.2)
    yield others
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(
    ("share", "platform", "shared"),
    [(True, "gpu", True), (False, "gpu", False), (True, "cpu", False)],
)
def test_a_folder_that_all_see_is_used(two, tmp_path, monkeypatch, share, platform, shared):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert shared_programs.use_one_cache_or_none(share=share) is None
    assert jax.config.values["jax_enable_compilation_cache"]
    assert jax.config.values["jax_share_binary_between_hosts"] is shared
    assert not list((tmp_path / "cache").iterdir())  # the mark is gone


def test_a_folder_that_process_1_does_not_see_is_used_by_none(two, tmp_path):
    two["seen"] = False
    note = shared_programs.use_one_cache_or_none(share=True)
    assert note is not None
    assert note.startswith("note: no process uses the cache of compiled programs ")
    assert "because process 1 does not see it; set JAX_COMPILATION_CACHE_DIR to a folder " in note
    assert not jax.config.values["jax_enable_compilation_cache"]
    assert not jax.config.values["jax_share_binary_between_hosts"]  # it needs the cache
    assert not list((tmp_path / "cache").iterdir())


def test_a_folder_that_process_0_cannot_write_is_used_by_none(two, tmp_path):
    (tmp_path / "cache").write_text("a file")
    note = shared_programs.use_one_cache_or_none(share=True)
    assert note is not None
    assert "because process 0 cannot write it" in note
    assert not jax.config.values["jax_enable_compilation_cache"]


def test_one_process_changes_nothing():
    before = {name: jax.config.values[name] for name in NAMES}
    assert shared_programs.use_one_cache_or_none(share=True) is None
    assert {name: jax.config.values[name] for name in NAMES} == before


RUN = """
import sys
from opd_jax.sharding import multihost, shared_programs
multihost.start(sys.argv[1], 2, int(sys.argv[2]), connect_s=60, heartbeat_s=60)
print(shared_programs.use_one_cache_or_none(share=True))
import jax, jax.numpy as jnp
from jax.experimental import multihost_utils
print("sum", multihost_utils.process_allgather(jnp.ones(3)).sum())
print(multihost.exchange_progress({"step": multihost.index()})[multihost.index()])
"""


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_two_processes_find_out_whether_they_share_a_cache(tmp_path, shared):
    port = free_port()
    pair = []
    for i in range(2):
        cache = tmp_path / ("both" if shared else str(i))
        env = {k: v for k, v in os.environ.items() if "_proxy" not in k.lower()}
        env |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
        pair.append(
            subprocess.Popen(
                [sys.executable, "-c", RUN, f"127.0.0.1:{port}", str(i)],
                cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    try:
        said = [one.communicate(timeout=120) for one in pair]
    finally:
        for one in pair:
            one.kill()
    assert [one.returncode for one in pair] == [0, 0], said
    for i, (out, _) in enumerate(said):
        assert out.startswith("None" if shared else "note: no process uses the cache"), said
        assert f"sum 6.0\n{{'step': {i}}}" in out
