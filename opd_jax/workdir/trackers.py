"""metrics.jsonl as it grows, for TensorBoard and Weights & Biases too: the same keys, at the same steps.

Both are optional extras and are imported only where a config asks for them. docs/report.md.
"""

import hashlib
import importlib.util
import os
import pathlib
from typing import Any, Protocol

from ml_collections import ConfigDict

from opd_jax import workdir
from opd_jax.errors import ConfigError, WorkdirError

# Field of config section `log` -> the package it needs; the extra has the field's name.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Mirror(Protocol):
    """Something that is told every line of metrics.jsonl."""

    def write(self, step: int, row: dict[str, float]) -> None:
        """A line without its `step`."""

    def go_back(self, step: int) -> None:
        """Lines of steps after `step` no longer count."""

    def close(self) -> None:
        """No more lines follow."""


class Log(workdir.Lines):
    """metrics.jsonl, and what the config section `log` wants to be told of it."""

    def __init__(self, path: pathlib.Path, *, resume_step: int, config: ConfigDict):
        """Open for appending, as `workdir.Lines` does; the mirrors forget later steps as well."""
        super().__init__(path, resume_step=resume_step)
        self._mirrors: list[Mirror] = []
        if config.log.tensorboard:
            self._mirrors.append(TensorBoard(path.parent / "tensorboard", resume_step))
        if config.log.wandb:
            self._mirrors.append(WeightsAndBiases(path.parent, config))

    def write(self, row: dict[str, Any]) -> None:
        """Append one object, and tell it."""
        super().write(row)
        numbers = {key: value for key, value in row.items() if key != "step"}
        for mirror in self._mirrors:
            mirror.write(row["step"], numbers)

    def go_back(self, step: int) -> None:
        """See `workdir.Lines.go_back`."""
        super().go_back(step)
        for mirror in self._mirrors:
            mirror.go_back(step)

    def close(self) -> None:
        """Close the file and the mirrors."""
        super().close()
        for mirror in self._mirrors:
            mirror.close()


class TensorBoard:
    """Event files in a folder. Steps that a resumed run writes again replace those from before."""

    def __init__(self, folder: pathlib.Path, resume_step: int):
        """Begin a file after those that are there; `resume_step` is the last step that counts of these."""
        from tensorboardX import SummaryWriter  # an optional extra

        try:
            again = folder.exists() and any(folder.iterdir())
            self._writer = SummaryWriter(str(folder), filename_suffix=f".{resume_step + 1}")
            if again:
                self.go_back(resume_step)
        except OSError as error:
            raise WorkdirError(
                f"{folder} cannot be written ({error.strerror or error}); mend that, or set "
                "--config.log.tensorboard=False"
            ) from None

    def write(self, step: int, row: dict[str, float]) -> None:
        """One scalar a key, on disk when this returns: a run may be killed at any time."""
        for key, value in row.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def go_back(self, step: int) -> None:
        """An event that makes TensorBoard drop what it has of later steps."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        begin = step + 1
        writer = self._writer.file_writer
        writer.add_event(Event(step=begin, file_version="brain.Event:2"))
        writer.add_event(Event(step=begin, session_log=SessionLog(status=SessionLog.START)))

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases in the workdir's wandb/, offline unless WANDB_MODE says otherwise.

    A workdir has one run: resuming goes on with it. Steps it has already are dropped by wandb, so
    those that are done again after a kill, or after a rollback, stay as they were first.
    """

    def __init__(self, folder: pathlib.Path, config: ConfigDict):
        """Begin or go on. Keys for the service come from its own login, never from the config."""
        import wandb  # an optional extra

        where = str(folder.resolve())
        mode: Any = os.environ.get("WANDB_MODE") or "offline"
        self._next = 0
        try:
            self._run = wandb.init(
                project=config.log.wandb,
                dir=where,
                id=hashlib.sha256(where.encode()).hexdigest()[:16],
                name=folder.resolve().name,
                config=config.to_dict(),
                mode=mode,
                resume=None if mode == "offline" else "allow",
                # No command line, no git remote, no environment: these may hold secrets.
                settings=wandb.Settings(
                    console="off",
                    save_code=False,
                    disable_git=True,
                    x_disable_meta=True,
                    silent=True,
                ),
            )
        except (wandb.errors.Error, ValueError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"log.wandb={config.log.wandb!r} cannot be logged to ({said}); run `wandb login`, set "
                "WANDB_MODE=offline, or set --config.log.wandb="
            ) from None

    def write(self, step: int, row: dict[str, float]) -> None:
        """One line, unless there is one of its step or a later one."""
        if step >= self._next:
            self._run.log(row, step=step)
            self._next = step + 1

    def go_back(self, step: int) -> None:
        """Nothing: wandb's history only grows."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def require(config: ConfigDict) -> None:
    """Refuse a config section `log` that wants a package which is not there. Raises ConfigError."""
    for field, package in PACKAGES.items():
        if not config[field]:
            continue
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:  # a folder wandb/ is not the package
            none = "False" if field == "tensorboard" else ""
            raise ConfigError(
                f"log.{field}={config[field]} needs {package}, which is not installed; pip install "
                f"-c tests/constraints.txt -e '.[{field}]', or set --config.log.{field}={none}"
            )
