"""The command line: a user's mistake costs one line, status 1, and nothing on disk."""

import ctypes
import os
import pathlib
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import jax
import pytest

from opd_jax import aot, host_memory
from tests.support.lanes import slow
from tests.support.paths import ROOT


def train(*arguments: str, cwd: pathlib.Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), *arguments],
        capture_output=True, text=True, timeout=120, cwd=cwd,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--config.rollout.temprature=1"], 1, "did you mean 'rollout.temperature'"),
        (["--config.student.path=/nowhere"], 1, "model folder '/nowhere' does not exist"),
        (["--config.steps=1", "--config=configs/opd.py"], 1, "put --config=FILE first"),
        (["--lr=1"], 2, "--config.FIELD=VALUE: did you mean 'optim.learning_rate'"),
        *slow(
            (["--config.rollout.temperature=hot"], 1, "type float"),
            (["--config=configs/stable_opd.py:tyni"], 1, "did you mean 'tiny'"),
            (["--config=configs/nothing.py"], 1, "configs/nothing.py"),
            (["--config.optim.updates_per_rollout=3"], 1, "--config.rollout.prompts_per_step=18"),
            (["--config.rollout.max_prompt_tokens=5"], 1, "--config.rollout.max_prompt_tokens="),
            (["--config.optim.lr=1"], 1, "did you mean 'optim.learning_rate'"),
            (["--wrkdir=x"], 2, "wrkdir"),
            (["extra"], 2, "extra"),
        ),
    ],
)
def test_mistakes_are_one_line(arguments, status, says, tmp_path):
    workdir = tmp_path / "run"
    config = [] if "--config=" in " ".join(arguments) else ["--config=configs/stable_opd.py"]
    done = train(*config, *arguments, f"--workdir={workdir}")
    assert done.returncode == status, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert not workdir.exists()


@pytest.mark.slow
def test_help_and_another_working_directory(tmp_path):
    """Entry points run from anywhere: the config path is relative to where one stands."""
    done = train(
        f"--config={ROOT}/configs/opd.py", "--config.steps=0", f"--workdir={tmp_path}/run",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "steps=0" in done.stderr


@pytest.mark.slow
def test_a_wrong_field_of_the_default_config_is_one_line():
    """absl applies overrides of a default file when the flag is defined, before any parsing."""
    done = train("--config.rollout.temprature=1")
    assert done.returncode == 1
    assert done.stderr == (
        "error: config.rollout.temprature is not a field; did you mean 'rollout.temperature'?\n"
    )


PROGRAM = (
    "from opd_jax import aot; aot.cache_programs(); import jax; import jax.numpy as jnp; "
    "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0); "
    "print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((64, 64))).sum() > 0)"
)


def compiled(
    cache: pathlib.Path, *, before: Callable[[], None] | None = None, **variables: str
) -> subprocess.CompletedProcess:
    """A process that compiles a few programs, with its cache in this folder; `before` runs in it first."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"XDG_CACHE_HOME": str(cache)} | variables
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT, env=env, timeout=120, capture_output=True, text=True, preexec_fn=before,
    )  # fmt: skip


@pytest.mark.parametrize("told", [None, *slow("elsewhere")])
def test_compiled_programs_are_kept_between_runs(told, tmp_path):
    """In the user's cache folder, or where JAX's own variable says."""
    variables = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / told)} if told else {}
    assert compiled(tmp_path, **variables).stdout == "True\n"
    folder = tmp_path / (told or "opd_jax/programs")
    assert any(folder.iterdir())
    assert [x.name for x in tmp_path.iterdir()] == [told or "opd_jax"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["damaged", "a file in its place"])
def test_a_broken_cache_of_programs_costs_one_line(fault, tmp_path):
    """Of several programs, none of which can be read or written."""
    cache = tmp_path / "cache"
    if fault == "damaged":
        compiled(cache)
        entries = list((cache / "opd_jax" / "programs").glob("*-cache"))
        assert len(entries) > 1
        for entry in entries:
            entry.write_bytes(entry.read_bytes()[:40])
    else:
        cache.write_text("")
    assert_one_line(compiled(cache), cache)


def assert_one_line(done: subprocess.CompletedProcess, cache: pathlib.Path) -> None:
    """The process computed its result, and said once that its cache does not work."""
    assert done.stdout == "True\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("note: cannot read or write the cache of compiled programs in ")
    assert str(cache / "opd_jax" / "programs") in line


@pytest.mark.slow
def test_a_full_disk_costs_one_line_then_and_later(tmp_path):
    """A limit on the size of files stands for the disk: every entry breaks off after 512 bytes."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))

    # Without bytecode, which the limit would cut off as well.
    done = compiled(tmp_path, before=limit, PYTHONDONTWRITEBYTECODE="1")
    assert_one_line(done, tmp_path)
    entries = list((tmp_path / "opd_jax" / "programs").glob("*-cache"))
    assert entries
    assert all(entry.stat().st_size <= 512 for entry in entries)
    assert_one_line(compiled(tmp_path), tmp_path)  # the disk has space again


@pytest.mark.slow
@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
def test_a_cache_that_its_user_may_not_write_to_costs_one_line_at_most(filled, tmp_path):
    """Root, whom permissions do not stop, is here without that privilege."""
    programs = tmp_path / "opd_jax" / "programs"
    programs.mkdir(parents=True)
    if filled:
        assert compiled(tmp_path).stderr == ""
    kept = sorted(entry.name for entry in programs.iterdir())
    assert bool(kept) == filled
    for path in (*programs.iterdir(), programs):
        path.chmod(0o555 if path == programs else 0o444)
    try:
        done = compiled(tmp_path, before=obey_permissions)
    finally:
        programs.chmod(0o755)
    if filled:  # everything is there: nothing is written
        assert (done.stdout, done.stderr) == ("True\n", "")
    else:
        assert_one_line(done, tmp_path)
    assert sorted(entry.name for entry in programs.iterdir()) == kept


def obey_permissions() -> None:
    """Give up what lets root write where it may not (capabilities(7)); others do not have it."""
    drop, override, search = 24, 1, 2  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    for capability in (override, search):
        ctypes.CDLL(None).prctl(drop, capability, 0, 0, 0)


def test_the_first_warning_about_the_cache_is_one_line_and_others_are_shown(capsys):
    shown: list[str] = []
    show = aot._one_line_of_cache("a/cache", lambda message, *_: shown.append(str(message)))
    for text in (
        "Error writing persistent compilation cache entry for 'jit_f': OSError: no\nspace",
        "Error writing persistent compilation cache entry for 'jit_g': OSError: no space",
        "something else",
    ):
        show(text, UserWarning, "file.py", 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "note: cannot read or write the cache of compiled programs in 'a/cache' (OSError: no space); "
        "programs are compiled again; delete the folder, or set JAX_COMPILATION_CACHE_DIR to another one"
    )
    assert shown == ["something else"]


@pytest.mark.parametrize("chosen", [None, "elsewhere"])
def test_the_folder_of_programs_is_the_users_cache_or_the_one_that_is_set(
    chosen, tmp_path, monkeypatch
):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    try:
        jax.config.update("jax_compilation_cache_dir", chosen)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 3.0)
        aot.cache_programs({"XDG_CACHE_HOME": str(tmp_path)})
        found = [jax.config.values[name] for name in names]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert found == ([chosen, 3.0] if chosen else [f"{tmp_path}/opd_jax/programs", 0.0])


@pytest.mark.parametrize(("kept", "wanted"), [("keep", [False]), ("system", []), (None, [])])
def test_jax_computes_in_the_calling_thread_where_memory_is_kept(kept, wanted, monkeypatch):
    updates = []
    monkeypatch.setattr(aot.jax.config, "update", lambda name, value: updates.append((name, value)))
    host_memory.configure_jax({"OPD_JAX_MALLOC": kept} if kept else {})
    assert updates == [("jax_cpu_enable_async_dispatch", value) for value in wanted]


THREADS = """
import threading
import numpy as np
from opd_jax import host_memory
host_memory.keep_freed({"OPD_JAX_MALLOC": "keep"})
host_memory.configure_jax({"OPD_JAX_MALLOC": "keep"})
import jax
from opd_jax.sharding.mesh import ONE

def here(x):
    print(threading.current_thread() is threading.main_thread())
    return x

call = jax.jit(lambda x: jax.pure_callback(here, jax.ShapeDtypeStruct((), np.float32), x[0]))
bytes_ = np.zeros(4 * 25_000_000 + 4, np.uint8)
rows = bytes_[4:].view(np.float32)  # not aligned, so JAX has to copy it
for _ in range(3):
    call(ONE.rows(rows)).block_until_ready()
"""


def test_a_micro_batch_from_the_host_is_computed_in_the_calling_thread():
    """While its input is copied, JAX leaves a program to another thread, whose memory is not kept."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=120,
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.stdout.split() == ["True"] * 3, done.stderr


ENTRY = """
import os, sys
from opd_jax import cli

def faults():
    return int(open("/proc/self/stat").read().rpartition(")")[2].split()[7])

def run():
    import jax
    jax.config.update("jax_platforms", "cpu")
    double = jax.jit(lambda x: x + x)
    x = double(jax.numpy.ones(25_000_000))
    counts = []
    for _ in range(12):  # a round takes what an earlier one gave back, if no small block is in its midst
        before = faults()
        double(x).block_until_ready()
        counts.append(faults() - before)
    kept = min(counts) < 1000  # a result has 24,414 pages of 4 KiB
    print(os.environ["OPD_JAX_MALLOC"], kept, os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:])

cli.main(run)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "keep True None"),
        ({"OPD_JAX_MALLOC": "system"}, "system False None"),
        *slow(
            ({"GLIBC_TUNABLES": "glibc.malloc.check=0"}, "system False glibc.malloc.check=0"),
            ({"JAX_PLATFORMS": "cuda"}, "system False None"),
            ({"JAX_PLATFORMS": "cuda", "OPD_JAX_MALLOC": "keep"}, "keep True None"),
        ),
    ],
)
def test_freed_memory_is_kept_on_a_cpu_in_the_one_process(given, says, tmp_path):
    """No second start: what runs before `cli.main` runs once, as debuggers and profilers expect."""
    script = tmp_path / "entry.py"
    script.write_text("print('once')\n" + ENTRY)
    ours = ("GLIBC_TUNABLES", "OPD_JAX_MALLOC", "JAX_PLATFORMS")
    env = {k: v for k, v in os.environ.items() if k not in ours} | {"PYTHONPATH": str(ROOT)} | given
    done = subprocess.run(
        [sys.executable, str(script), "--stderrthreshold=info"],
        capture_output=True, text=True, timeout=120, env=env,
    )  # fmt: skip
    assert done.stdout == f"once\n{says} --stderrthreshold=info\n", done.stderr


@pytest.mark.parametrize(
    ("environment", "files", "plugin", "wanted"),
    [
        ({}, [], False, True),
        ({}, ["/dev/nvidiactl"], True, False),
        ({}, ["/dev/kfd"], True, False),
        ({}, ["/dev/nvidiactl"], False, True),  # a GPU, and JAX for CPUs
        ({}, [], True, True),  # JAX for GPUs, and none
        ({"CUDA_VISIBLE_DEVICES": ""}, ["/dev/nvidiactl"], True, True),
        ({"CUDA_VISIBLE_DEVICES": "0"}, ["/dev/nvidiactl"], True, False),
        ({"JAX_PLATFORMS": "cpu"}, ["/dev/nvidiactl"], True, True),
        ({"JAX_PLATFORMS": "cuda,cpu"}, [], False, False),
        ({"OPD_JAX_MALLOC": "keep"}, ["/dev/nvidiactl"], True, True),
        ({"OPD_JAX_MALLOC": "system"}, [], False, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, [], False, False),
        ({"GLIBC_TUNABLES": "glibc.cpu.x86_ibt=on"}, [], False, True),
    ],
)
def test_a_cpu_is_known_before_jax_starts(environment, files, plugin, wanted, monkeypatch):
    monkeypatch.setattr(host_memory.pathlib.Path, "exists", lambda path: str(path) in files)
    monkeypatch.setattr(host_memory.importlib.util, "find_spec", lambda name: plugin or None)
    assert host_memory.is_wanted(environment) == wanted


def test_plug_ins_that_cannot_be_looked_for_are_none(monkeypatch):
    def broken(name):
        raise ValueError(f"{name}.__spec__ is None")

    monkeypatch.setattr(host_memory.pathlib.Path, "exists", lambda path: True)
    monkeypatch.setattr(host_memory.importlib.util, "find_spec", broken)
    assert host_memory.is_wanted({})


@pytest.mark.parametrize(
    ("platform", "options", "done"),
    [
        ("linux", {-4: 1, -1: 1}, "keep"),
        ("linux", {-4: 1, -1: 0}, "system"),  # glibc refuses one
        ("linux", None, "system"),  # another C library has no mallopt
        ("darwin", {-4: 1, -1: 1}, "system"),
    ],
)
def test_the_environment_records_whether_the_allocator_was_changed(
    platform, options, done, monkeypatch
):
    calls = []

    def mallopt(option, value):
        calls.append((option, value))
        return options[option]

    library = SimpleNamespace() if options is None else SimpleNamespace(mallopt=mallopt)
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(host_memory.sys, "platform", platform)
    environment = {"OPD_JAX_MALLOC": "keep"}
    host_memory.keep_freed(environment)
    assert environment == {"OPD_JAX_MALLOC": done}
    assert calls == ([(-4, 0), (-1, -1)] if options and platform == "linux" else [])


def test_it_is_said_in_one_line_where_it_is_done():
    assert host_memory.lines({}) == host_memory.lines({"OPD_JAX_MALLOC": "system"}) == []
    (line,) = host_memory.lines({"OPD_JAX_MALLOC": "keep"})
    assert "OPD_JAX_MALLOC=system switches that off" in line


def test_the_command_line_is_read_before_jax_is_imported():
    code = "import sys, opd_jax.cli; assert not {'jax', 'flax', 'grain'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
