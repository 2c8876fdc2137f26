"""Errors that are part of the interface: one line that says what, got, wanted, and the fix.

Every error a user can cause is an `OpdError`; `launch/` prints its text and exits with status 1,
without a traceback. Each child also inherits the built-in error it stands for, so that callers
who know only Python can catch it.
"""

AGAIN = 75  # exit status EX_TEMPFAIL (sysexits.h): the same command goes on where this one ended


class OpdError(Exception):
    """Base of every error that input from outside can cause."""


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


class ProcessError(OpdError, ConnectionError):
    """The processes of a run do not find each other, or are not alike."""


class NonFiniteError(OpdError, FloatingPointError):
    """A loss or a gradient is not a finite number."""


class CopiesError(OpdError, ArithmeticError):
    """Copies of the same weights on several devices are not equal."""


class Interrupted(OpdError, InterruptedError):
    """A run was asked to end, and did so in good order: the same command goes on where it ended."""


class ShapeError(OpdError, TypeError):
    """Arrays that meet in one function disagree about a dimension."""
