"""Common parts of every entry point in launch/: flags, exit statuses, one-line errors."""

import functools
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from opd_jax import hardware, host_memory
from opd_jax.config import aliases, page
from opd_jax.config.fields import FIELDS
from opd_jax.config.schema import check_value, explain, flatten, near, not_a_field, suggest
from opd_jax.config.trees import TRAINING, Tree
from opd_jax.errors import AGAIN, Interrupted, OpdError

FLAGS = flags.FLAGS
EXIT_USER, EXIT_FLAGS = 1, 2


def define_config(default: str, *, tree: Tree = TRAINING) -> None:
    """The `--config=FILE.py[:RECIPE]` flag; every field of `tree` can be set (`--config.steps=10`).

    `--fields` lists them. `main` takes the same `tree`.
    """
    find_configs()  # they import configs.recipes
    try:
        config_flags.DEFINE_config_file(
            "config",
            default,
            "experiment file, with :RECIPE after it; --config.FIELD=VALUE sets a field",
        )
    except Exception as error:  # overrides of the default file are applied here already
        _fail(str(explain(error, sys.argv[1:], tree)), EXIT_USER)
    flags.DEFINE_bool(
        "fields", False, "print every field: what it means, its default, which values it may have"
    )
    show("config", "fields")


def find_configs() -> None:
    """Let `import configs` find the folder beside launch/, from whichever folder a command is started."""
    root = str(pathlib.Path(__file__).parents[1])
    if root not in sys.path:
        sys.path.insert(0, root)


def show(*names: str) -> None:
    """List flags that are defined elsewhere in --help of the entry point."""
    for name in names:
        FLAGS.register_key_flag_for_module(sys.argv[0], FLAGS[name])


def define_processes() -> None:
    """Define the flags of an entry point that may run as several processes (docs/multi_gpu.md)."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no launcher sets it")
    flags.DEFINE_integer("num_processes", None, "number of processes of the run", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "index of this process, from 0", lower_bound=0)
    show("coordinator", "num_processes", "process_id")


def main(
    run: Callable[..., None],
    *,
    tree: Tree = TRAINING,
    names: Sequence[str] = (),
    folders: bool = False,
    stops: bool = False,
) -> None:
    """Parse the command line and call `run`; exit with 0, 1 (an OpdError, one line), 2 (wrong flags) or 75.

    `tree` is that of `define_config`. With `names`, the first argument must be one of them, and `run` is
    called with it; with `folders`, it is called with all arguments, of which there must be one. With
    `stops`, `run` is called with what says whether it is to end, `stop`.
    """
    host_memory.keep_freed()
    app.run(
        lambda rest: _guarded(functools.partial(run, *rest[1:]), stops=stops),
        flags_parser=functools.partial(_parse, tree=tree, names=names, folders=folders),
    )


def _parse(
    arguments: list[str],
    *,
    tree: Tree,
    names: Sequence[str],
    folders: bool = False,
) -> list[str]:
    if "config" in FLAGS and {"--fields", "-fields"} & {*arguments}:
        print(page.as_text(tree), flush=True)
        sys.exit(0)
    try:
        rest = FLAGS(arguments)
        if "config" in FLAGS:
            _ = FLAGS.config.seed  # a file that is missing is reported at first use
            _check_overrides(tree)
    except Exception as error:  # absl's own, or whatever a config file or an override raises
        if isinstance(error, flags.Error) and "--config" not in str(error):
            _fail(f"{error}{_meant(error, tree)}; see --help", EXIT_FLAGS)
        _fail(str(explain(error, arguments, tree)), EXIT_USER)
    if names and len(rest) == 1:
        _fail(f"a name is missing, wanted {' or '.join(names)}, then flags; see --help", EXIT_FLAGS)
    if names and rest[1] not in names:
        _fail(f"{rest[1]!r} is not known; {near(rest[1], list(names))}; see --help", EXIT_FLAGS)
    if folders and len(rest) == 1:
        _fail("a workdir is missing, wanted one or more, then flags; see --help", EXIT_FLAGS)
    if len(rest) > 1 + bool(names) and not folders:
        _fail(f"got {rest[-1]!r}, wanted flags only; see --help", EXIT_FLAGS)
    return rest


def _check_overrides(tree: Tree) -> None:
    """Refuse `--config.FIELD=` of a field that the experiment file has and the entry point does not read."""
    flag: Any = FLAGS["config"]
    for name in flag.override_values:
        if (field := name.partition("[")[0]) not in tree.fields:
            _fail(str(not_a_field(field, tree)), EXIT_USER)


def _meant(error: flags.Error, tree: Tree) -> str:
    """Of a flag that is not known: the config field that it is, or that others call so."""
    known = list(tree.fields)
    name = getattr(error, "flagname", "").replace("-", "_")
    if "config" not in FLAGS or name not in {*aliases.FIELDS, *(f.split(".")[-1] for f in known)}:
        return ""
    return f"; fields are set by --config.FIELD=VALUE: {suggest(name, tree)}"


def _guarded(run: Callable[..., None], *, stops: bool) -> None:
    # Orbax logs every file at INFO, and the errors that it raises, with traceback, at ERROR.
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = _unraisable
    hardware.set_memory_fraction()
    try:
        if "config" in FLAGS and "allocator" in FLAGS.config.get("mesh", {}):
            hardware.set_allocator(_early("mesh.allocator"))
    except OpdError as error:
        _fail(str(error), EXIT_USER)
    several = False
    if stops:
        from opd_jax.workdir import stop  # imported late because it imports JAX

        run = functools.partial(run, stop=stop.listen())
    try:
        several = _one_of_several()
        if several:
            _connect()
        from opd_jax import aot  # imports JAX: only after the flags have been checked

        host_memory.configure_jax()
        aot.cache_programs()
        if several:
            _share_programs()
        run()
    except Interrupted as error:
        print(error, flush=True)
        sys.exit(AGAIN)
    except OpdError as error:
        if several:
            _leave(str(error))
        _fail(str(error), EXIT_USER)
    except Exception as error:
        if several:
            traceback.print_exc()
            _leave(_fate(error))
        raise


def _unraisable(unraisable: Any) -> None:
    """Call Python's hook, except for TensorStore's errors about writes that continue after a failed one."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _one_of_several() -> bool:
    from opd_jax.sharding import multihost

    if "coordinator" not in FLAGS:
        multihost.require_alone()
        return False
    return multihost.requested(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)


def _connect() -> None:
    from opd_jax.sharding import multihost

    connect_s, heartbeat_s = (
        _early("processes.connect_seconds"),
        _early("processes.heartbeat_seconds"),
    )
    if not multihost.supervised():
        sys.exit(multihost.supervise())
    multihost.start(
        FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id,
        connect_s=connect_s, heartbeat_s=heartbeat_s,
    )  # fmt: skip


def _share_programs() -> None:
    from opd_jax.sharding import multihost, shared_programs

    note = shared_programs.use_one_cache_or_none(share=_early("processes.share_programs"))
    if note is not None and multihost.first():
        print(note, flush=True)


def _early(name: str) -> Any:
    """Return a field that is read before the rest of the config is checked. Raises ConfigError."""
    value = flatten(FLAGS.config.to_dict())[name]
    check_value(name, value, FIELDS[name])
    return value


def _leave(text: str) -> None:
    from opd_jax.sharding import multihost

    print(f"error: {text}", file=sys.stderr, flush=True)
    multihost.leave(EXIT_USER)


def _fate(error: Exception) -> str:
    """Return the message for an error in one of several processes: the loss of another, or its own."""
    import jax

    from opd_jax.sharding import multihost

    lost = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
    return multihost.LOST if lost else f"{type(error).__name__}, see above"


def _fail(text: str, status: int) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)
    sys.exit(status)
