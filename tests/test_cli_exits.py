"""Entry points in this process: what they call, their exit statuses, and the one line of an error.

Flags, hooks and environment are put back after each test; tests/test_cli.py starts real processes.
"""

import pathlib
import sys
import warnings
from types import SimpleNamespace

import jax
import pytest
from absl import flags, logging
from absl.testing import flagsaver

from opd_jax import cli, hardware, host_memory
from opd_jax.config.trees import EVALUATION, PROBING, TRAINING
from opd_jax.errors import ConfigError, Interrupted, ProcessError
from opd_jax.sharding import multihost
from opd_jax.workdir import stop
from tests.support.paths import ROOT

FILE = str(ROOT / "configs/opd.py")
CONFIG = f"--config={FILE}"
OWN = ("config", "fields", "coordinator", "num_processes", "process_id")  # flags defined by cli


@pytest.fixture(autouse=True)
def isolated(monkeypatch):
    """No flag, hook, verbosity, path or variable outlives a test."""
    parsed, verbosity = flags.FLAGS.is_parsed(), logging.get_verbosity()
    for module, name in ((sys, "unraisablehook"), (warnings, "showwarning")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in multihost._LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(host_memory.VARIABLE, "system")  # the allocator of the tests stays as it is
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    # absl's own also redirects logging and names the process.
    monkeypatch.setattr(cli.app, "run", lambda main, flags_parser: main(flags_parser(sys.argv)))
    others = {name: flags.FLAGS[name] for name in OWN if name in flags.FLAGS}  # of launch/plan.py
    for name in others:
        delattr(flags.FLAGS, name)
    with flagsaver.flagsaver():
        yield
    for name, flag in others.items():
        flags.FLAGS[name] = flag
    logging.set_verbosity(verbosity)
    if not parsed:
        flags.FLAGS.unparse_flags()


@pytest.fixture
def start(monkeypatch):
    """Run an entry point with a command line; a test's `run` takes the place of the work."""

    def begin(*arguments, run=lambda *_: None, config=None, processes=False, **settings):
        monkeypatch.setattr(sys, "argv", ["launch/x.py", *arguments])
        if config is not None:
            cli.define_config(config, tree=settings.get("tree", TRAINING))
        if processes:
            cli.define_processes()
        cli.main(run, **settings)

    return begin


@pytest.fixture
def failed(start, capsys):
    """The exit status of a command that fails, and its one line on stderr."""

    def fail(*arguments, **settings):
        with pytest.raises(SystemExit) as end:
            start(*arguments, **settings)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return end.value.code, line.removeprefix("error: ")

    return fail


def raising(error: Exception):
    def run(*_):
        raise error

    return run


# Calls.


def test_run_is_called_with_what_the_command_line_names(start):
    calls = []
    start(run=lambda *given: calls.append(given))
    start("pair", run=lambda *given: calls.append(given), names=("pair", "continuation"))
    start("a", "b", run=lambda *given: calls.append(given), folders=True)
    assert calls == [(), ("pair",), ("a", "b")]


def test_a_run_that_can_be_stopped_gets_its_stop(start, monkeypatch):
    wanted, calls = stop.Stop(), []
    monkeypatch.setattr(stop, "listen", lambda: wanted)
    start(run=lambda **given: calls.append(given), stops=True)
    assert calls == [{"stop": wanted}]


def test_fields_of_the_config_are_set_by_flags(start):
    start(CONFIG, "--config.steps=7", config=FILE)
    assert flags.FLAGS.config.steps == 7


def test_orbax_is_silent_and_the_share_of_a_gpu_is_set_before_the_run(start, monkeypatch):
    logging.set_verbosity(logging.INFO)
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    seen = []
    start(run=lambda: seen.extend([logging.get_verbosity(), hardware.memory_fraction()]))
    assert seen == [logging.FATAL, hardware.MEMORY_FRACTION]


def test_a_share_of_a_gpu_that_the_user_has_set_stays(start):
    seen = []
    start(run=lambda: seen.append(hardware.memory_fraction()))
    assert seen == [0.5]


def test_the_folder_of_configs_is_found_once():
    root = str(pathlib.Path(cli.__file__).parents[1])
    sys.path[:] = [path for path in sys.path if path != root]
    cli.find_configs()
    cli.find_configs()
    assert sys.path[0] == root
    assert sys.path.count(root) == 1


def test_help_of_an_entry_point_lists_the_flags_of_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch/of_processes.py"])
    cli.define_processes()
    listed = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])}
    assert listed >= {"coordinator", "num_processes", "process_id"}


# Mistakes on the command line: status 2, or 1 where they concern the config.


@pytest.mark.parametrize(
    ("arguments", "settings", "line"),
    [
        ((), {"names": ("a", "b")}, "a name is missing, wanted a or b, then flags; see --help"),
        (("contination",), {"names": ("pair", "continuation")},
         "'contination' is not known; did you mean 'continuation'?; see --help"),
        (("zzz",), {"names": ("a", "b")}, "'zzz' is not known; known: a, b; see --help"),
        (("a", "more"), {"names": ("a", "b")}, "got 'more', wanted flags only; see --help"),
        (("more",), {}, "got 'more', wanted flags only; see --help"),
        ((), {"folders": True}, "a workdir is missing, wanted one or more, then flags; see --help"),
        (("--num_processes=0",), {"processes": True},
         "flag --num_processes=0: 0 is not a positive integer; see --help"),
    ],
)  # fmt: skip
def test_wrong_arguments(failed, arguments, settings, line):
    assert failed(*arguments, **settings) == (2, line)


@pytest.mark.parametrize("argument", ["--zzqq=3", "--lr=1"])
def test_an_unknown_flag_without_a_config_names_itself_alone(failed, argument):
    status, line = failed(argument)
    assert status == 2
    assert line == f"Unknown command line flag '{argument[2:].partition('=')[0]}'; see --help"


@pytest.mark.parametrize(
    ("argument", "status", "says"),
    [
        ("--lr=1", 2, "--config.FIELD=VALUE: did you mean 'optim.learning_rate'?"),
        ("--samples-per-prompt=1", 2, "did you mean 'rollout.samples_per_prompt'?"),
        ("--zzqq=3", 2, "Unknown command line flag 'zzqq'; see --help"),
        ("--config.rollout.temprature=1", 1, "did you mean 'rollout.temperature'?"),
        ("--config.rollout.temperature=hot", 1, "rollout.temperature"),
        ("--config=nowhere.py", 1, "--config=nowhere.py does not exist"),
    ],
)
def test_a_mistake_in_the_config(failed, argument, status, says):
    before = [] if argument.startswith("--config=") else [CONFIG]
    got, line = failed(*before, argument, config=FILE)
    assert got == status
    assert says in line


def test_a_mistake_about_the_default_config(failed):
    """Without --config=FILE, absl reads the default file and its overrides as the flag is defined."""
    status, line = failed("--config.rollout.temprature=1", config=FILE)
    assert status == 1
    assert line == "config.rollout.temprature is not a field; did you mean 'rollout.temperature'?"


def test_a_field_that_the_entry_point_does_not_read(failed):
    """An experiment file has the fields of several entry points; each refuses those of the others."""
    status, line = failed(
        CONFIG,
        "--config.optim.learning_rate=1e-5",
        config=FILE,
        tree=PROBING,
    )
    assert status == 1
    assert "optim.learning_rate" in line


@pytest.mark.parametrize("argument", ["--fields", "-fields"])
def test_the_fields_of_the_entry_point_are_printed(start, capsys, argument):
    with pytest.raises(SystemExit) as end:
        start(argument, config=FILE, tree=EVALUATION, run=raising(OSError()))
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(field in text for field in EVALUATION.fields)
    assert "optim.learning_rate" not in text


# How runs end.


def test_an_error_of_the_user_is_one_line_and_status_1(failed):
    assert failed(run=raising(ConfigError("steps=0, wanted more"))) == (1, "steps=0, wanted more")


def test_an_interrupted_run_has_the_status_of_a_command_to_repeat(start, capsys):
    with pytest.raises(SystemExit) as end:
        start(run=raising(Interrupted("SIGTERM: step 3 is saved")))
    assert end.value.code == 75
    out, err = capsys.readouterr()
    assert (out, err) == ("SIGTERM: step 3 is saved\n", "")


def test_an_error_of_the_program_keeps_its_traceback(start):
    with pytest.raises(ZeroDivisionError, match="by hand"):
        start(run=raising(ZeroDivisionError("by hand")))


def test_errors_of_writes_that_go_on_after_a_failed_one_are_not_shown(start, monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "__unraisablehook__", shown.append)
    start()
    for text in ("Event loop is closed", "something else"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))
    assert [str(one.exc_value) for one in shown] == ["something else"]


# Several processes.


def test_a_command_of_one_process_refuses_several_tasks(failed, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    status, line = failed(run=raising(OSError()))
    assert status == 1
    assert line.startswith("SLURM_STEP_NUM_TASKS=2: the launcher has started this command 2 times")


def test_a_command_without_the_flags_of_several_processes_is_alone(start):
    calls = []
    start(processes=True, run=lambda: calls.append(multihost.several()))
    assert calls == [False]


def test_flags_of_several_processes_are_all_or_none(failed):
    status, line = failed("--process_id=0", processes=True, run=raising(OSError()))
    assert status == 1
    assert line.startswith("--coordinator and --num_processes missing")


@pytest.fixture
def one_of_two(start, monkeypatch):
    """Start the second of two processes that are connected at once; `leave` ends a process."""

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(multihost, "leave", leave)

    def begin(run, connect=lambda *_, **__: None):
        monkeypatch.setattr(multihost, "start", connect)
        flags_ = ("--coordinator=a:1", "--num_processes=2", "--process_id=1")
        start(CONFIG, *flags_, config=FILE, processes=True, run=run)

    return begin


def test_a_process_of_several_works_in_a_child_that_is_watched(one_of_two, monkeypatch):
    monkeypatch.setattr(multihost, "supervise", lambda: 75)
    with pytest.raises(SystemExit) as end:
        one_of_two(raising(OSError()))
    assert end.value.code == 75


def test_the_child_connects_as_its_flags_say(one_of_two, monkeypatch):
    monkeypatch.setenv(multihost._SUPERVISED, "1")
    calls = []
    one_of_two(lambda: calls.append("run"), connect=lambda *given, **_: calls.append(given))
    assert calls == [("a:1", 2, 1), "run"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ConfigError("steps=0"), "steps=0"),
        (ProcessError("process 1 differs"), "process 1 differs"),
        (jax.errors.JaxRuntimeError("INTERNAL: connection reset"), multihost.LOST),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 3 GiB"), "JaxRuntimeError, see above"),
        (ValueError("a bug"), "ValueError, see above"),
    ],
)
def test_a_process_of_several_tells_the_others_why_it_leaves(
    one_of_two, monkeypatch, capsys, error, says
):
    monkeypatch.setenv(multihost._SUPERVISED, "1")
    with pytest.raises(SystemExit) as end:
        one_of_two(raising(error))
    assert end.value.code == 1
    *above, line = capsys.readouterr().err.splitlines()
    assert line == f"error: {says}"
    assert bool(above) == ("steps" not in says and "differs" not in says)  # its own traceback
