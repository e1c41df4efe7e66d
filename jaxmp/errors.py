"""The two ways in which a command ends other than well, each with its exit code."""

from __future__ import annotations

import difflib
import math
import numbers
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
    >>> nearest("amp", ["mxfp8"])
    ''
    """
    # Half of the letters in common are chance, but for the shortest names, in which one wrong letter is half of all.
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5 if len(name) < 3 else 0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def install(extra: str) -> str:
    """How the packages of an extra of jaxmp are installed. Ends an error message.

    >>> install("tune")
    "`uv sync --extra tune`, or `pip install 'jaxmp[tune]'`"
    """
    return f"`uv sync --extra {extra}`, or `pip install 'jaxmp[{extra}]'`"


def require(owner: object, field: str, valid: bool, expected: str) -> None:
    """Raises an InputError that names `owner.field`, its value and what was expected, unless `valid`."""
    if not valid:
        raise InputError(f"{type(owner).__name__}.{field} = {getattr(owner, field)!r}: expected {expected}")


def whole_number(where: str, value: Any, least: int) -> int:
    """Returns `value` as an int. Takes integers of NumPy and whole floats too: `np.int64(3)`, `64 / 4`.

    Raises: InputError with `where`, the value and the least allowed if it is a bool, not whole, or below `least`.

    >>> whole_number("data.batch_size", 64 / 4, 1)
    16
    """
    is_number = isinstance(value, numbers.Real) and not _is_bool(value)
    if not (is_number and math.isfinite(value) and value == int(value) and value >= least):
        raise InputError(f"{where} = {value!r:.60}: expected a whole number of at least {least}")
    return int(value)


def number(where: str, value: Any) -> float:
    """Returns `value` as it is if it is a real, finite number (of NumPy too), else raises InputError with `where`."""
    if not isinstance(value, numbers.Real) or _is_bool(value) or not math.isfinite(value):
        raise InputError(f"{where} = {value!r:.60}: expected a number")
    return value  # type: ignore[return-value]


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")


def local_path(where: str, path: str | os.PathLike[str]) -> Path:
    """Returns a path on this machine, with a leading `~` expanded.

    Raises: InputError with `where` if the path is empty, a URL (`s3://...`), or cannot be a path here.
    """
    text = os.fspath(path)
    if not text.strip():
        raise InputError(f"{where} {text!r}: expected a path, which is empty here; the current folder is .")
    if "\0" in text:
        raise InputError(f"{where} {text!r:.200}: expected a path; this one has a null character in it")
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text):  # pathlib makes s3:/ of s3://
        raise InputError(
            f"{where} {text!r:.200}: jaxmp writes and reads folders of this machine, not {scheme[1]}:// URLs; expected "
            "a path, of a mounted bucket for example"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        why = str(error).rstrip(".")
        raise InputError(
            f"{where} {text!r:.200}: {why}; expected a path without ~, or HOME in the environment"
        ) from None
