"""The errors a person can cause or meet, each with the exit code of its kind.

A message is one or two lines: what is wrong, where (file and line, key, column), what to do.
The command line prints it without a traceback and exits with ``exit_code``; Python callers
catch ``HastenError`` (a ``ValueError``). Invariants of our own code use ``assert`` instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HastenError(ValueError):
    """Base of every error that is meant to be read by a person."""

    exit_code = 1


class UsageError(HastenError):
    """A wrong option, key or combination of settings."""

    exit_code = 2


class DataError(HastenError):
    """The data cannot be used as it is."""

    exit_code = 3


class DamagedError(HastenError):
    """A checkpoint or a model folder is incomplete or altered."""

    exit_code = 4


class OutOfMemoryError(HastenError):
    """The machine's or the device's memory does not suffice."""

    exit_code = 5


class DivergenceError(HastenError):
    """Loss or gradients stayed non-finite."""

    exit_code = 6


class LostProcessError(HastenError):
    """A process of a run of several was lost."""

    exit_code = 7


class MachineError(HastenError):
    """Disk, permission, lock, or a missing extra."""

    exit_code = 8


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `` Did you mean 'x'?`` for the closest known name, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
