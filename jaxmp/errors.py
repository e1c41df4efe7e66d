"""The two ways in which a command ends other than well, each with its exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

DONE, FAILED, BAD_INPUT, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130
"""Exit codes: done; the run failed; bad input; stopped by a signal after saving; interrupted with nothing to save."""


class InputError(ValueError):
    """What the user gave cannot be used; nothing was written or lost. Exit code 2, shown without a traceback.

    The message says the value, where it stands, what was expected, and the nearest valid name.
    """


class RunFailed(RuntimeError):
    """A run that cannot go on (diverged, out of memory, too many skips in a row). Exit code 1.

    The message says what happened, at which step, and the command that looks into it.
    """


def nearest(name: str, names: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest of `names`, or `""` where none is close. Ends an error message.

    >>> nearest("mixed_flaot16", ["float32", "mixed_float16"])
    "; did you mean 'mixed_float16'?"
    """
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def require(owner: object, field: str, valid: bool, expected: str) -> None:
    """Raises an InputError that names `owner.field`, its value and what was expected, unless `valid`."""
    if not valid:
        raise InputError(f"{type(owner).__name__}.{field} = {getattr(owner, field)!r}: expected {expected}")
