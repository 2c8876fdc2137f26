"""Errors that are part of the interface: one line with the problem, the value, the allowed values, the fix.

Every error that a user can cause is an `OpdError`; `launch/` prints its text and exits with status 1,
without a traceback. Each child also inherits the built-in error it stands for, so that callers
can catch it without knowing this module.
"""

AGAIN = 75  # exit status EX_TEMPFAIL (sysexits.h): the same command resumes where this one ended


class OpdError(Exception):
    """Base of every error that input from outside can cause.

    Its text is one line whatever value it quotes: line breaks, escape sequences of a terminal and halves of
    characters are written as in a Python string.
    """

    def __str__(self) -> str:
        text = super().__str__().strip()
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class ConfigError(OpdError, ValueError):
    """A config field is unknown, has an impossible value, or contradicts another field."""


class ModelError(OpdError, ValueError):
    """A model folder is missing, broken, or describes an architecture that is not supported."""


class DataError(OpdError, ValueError):
    """A problem, solution or prompt cannot be used."""


class PlanError(OpdError, MemoryError):
    """A run does not fit into the memory of its devices."""


class WorkdirError(OpdError, OSError):
    """A workdir cannot be written, or belongs to another run."""


class GradingError(OpdError, RuntimeError):
    """The processes that grade answers cannot be started."""


class RewardError(OpdError, RuntimeError):
    """A reward function cannot be called, or returned something that is not a reward."""


class ProcessError(OpdError, ConnectionError):
    """The processes of a run cannot connect to each other, or differ in their settings."""


class NonFiniteError(OpdError, FloatingPointError):
    """A loss or a gradient is not a finite number."""


class CopiesError(OpdError, ArithmeticError):
    """Copies of the same weights on several devices are not equal."""


class SelfTestError(OpdError, ArithmeticError):
    """Sampler and scorer disagree about the same tokens by more than rounding explains."""


class BenchError(OpdError, RuntimeError):
    """A benchmark's check failed, or one of its cases raised; all rows are written."""


class Interrupted(OpdError, InterruptedError):
    """A run was asked to end and saved its state: the same command resumes where it ended."""


class ShapeError(OpdError, TypeError):
    """Arrays that are used together disagree about a dimension."""
