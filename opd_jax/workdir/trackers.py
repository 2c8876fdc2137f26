"""metrics.jsonl, copied to TensorBoard and Weights & Biases with the same keys at the same steps.

Both are optional extras, imported only where the config enables them. See docs/report.md.
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
    """An experiment tracker that receives every line of metrics.jsonl."""

    def write(self, step: int, row: dict[str, float]) -> None:
        """Log the values of a line; `row` has no key `step`."""

    def go_back(self, step: int) -> None:
        """Discard the lines of steps after `step`."""

    def close(self) -> None:
        """Finish; no more lines follow."""


class Log(workdir.Lines):
    """metrics.jsonl, and the trackers that the config section `log` enables."""

    def __init__(self, path: pathlib.Path, *, resume_step: int, config: ConfigDict):
        """Open for appending, as `workdir.Lines` does; the trackers discard later steps too."""
        super().__init__(path, resume_step=resume_step)
        self._mirrors: list[Mirror] = []
        if config.log.tensorboard:
            self._mirrors.append(TensorBoard(path.parent / "tensorboard", resume_step))
        if config.log.wandb:
            self._mirrors.append(WeightsAndBiases(path.parent, config))

    def write(self, row: dict[str, Any]) -> None:
        """Append one object, and log it to the trackers."""
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
        """Close the file and the trackers."""
        super().close()
        for mirror in self._mirrors:
            mirror.close()


class TensorBoard:
    """Event files in a folder. Steps that a resumed run repeats replace the earlier ones."""

    def __init__(self, folder: pathlib.Path, resume_step: int):
        """Begin a new event file; steps after `resume_step` in the existing files are discarded."""
        from tensorboardX import SummaryWriter  # an optional extra

        try:
            resumed = folder.exists() and any(folder.iterdir())
            self._writer = SummaryWriter(str(folder), filename_suffix=f".{resume_step + 1}")
            if resumed:
                self.go_back(resume_step)
        except OSError as error:
            raise WorkdirError(
                f"{folder} cannot be written ({error.strerror or error}); make it writable, or set "
                "--config.log.tensorboard=False"
            ) from None

    def write(self, step: int, row: dict[str, float]) -> None:
        """Write one scalar per key and flush, because a run may be killed at any time."""
        for key, value in row.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def go_back(self, step: int) -> None:
        """Write an event that makes TensorBoard discard later steps."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        begin = step + 1
        writer = self._writer.file_writer
        writer.add_event(Event(step=begin, file_version="brain.Event:2"))
        writer.add_event(Event(step=begin, session_log=SessionLog(status=SessionLog.START)))

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases in WORKDIR/wandb/, offline unless WANDB_MODE is set.

    A workdir has one run, which a resumed run continues. wandb ignores steps that it already has, so
    steps that are repeated after a kill or a rollback keep their first values.
    """

    def __init__(self, folder: pathlib.Path, config: ConfigDict):
        """Start or continue the run. API keys come from `wandb login`, never from the config."""
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
                # No command line, git remote or environment: they may contain secrets.
                settings=wandb.Settings(
                    console="off",
                    save_code=False,
                    disable_git=True,
                    x_disable_meta=True,
                    silent=True,
                ),
            )
        except (wandb.errors.Error, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"log.wandb={config.log.wandb!r} cannot be logged to ({reason}); run `wandb login`, set "
                "WANDB_MODE=offline, or set --config.log.wandb="
            ) from None

    def write(self, step: int, row: dict[str, float]) -> None:
        """Log one line, unless the run already has this or a later step."""
        if step >= self._next:
            self._run.log(row, step=step)
            self._next = step + 1

    def go_back(self, step: int) -> None:
        """Do nothing: the history of a wandb run is append-only."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def require(config: ConfigDict) -> None:
    """Raise ConfigError where the config section `log` enables a package that is not installed."""
    for field, package in PACKAGES.items():
        if not config[field]:
            continue
        spec = importlib.util.find_spec(package)
        if (
            spec is None or spec.origin is None
        ):  # a folder wandb/ in the working directory has no origin
            none = "False" if field == "tensorboard" else ""
            raise ConfigError(
                f"log.{field}={config[field]} needs {package}, which is not installed; pip install "
                f"-c tests/constraints.txt -e '.[{field}]', or set --config.log.{field}={none}"
            )
