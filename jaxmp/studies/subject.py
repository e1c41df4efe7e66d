"""What an instrument takes beside an experiment or a run: a function, with arguments that fit it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmp.errors import InputError, nearest

OF_FUNCTION = "only of a function; an experiment has its own"
"""why an experiment is given nothing beside it"""


def require_call(
    instrument: str, takes: str, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], own: Sequence[str] = ()
) -> Callable[..., Any]:
    """Returns `function`, if it is one that takes these arguments.

    Args:
      instrument: its public name, which messages begin with.
      takes: what it takes beside a function: "an Experiment".
      function: what the user gave as the subject.
      args: the positional arguments that the function will be called with.
      kwargs: and those by keyword, among them what may be a misspelled option of the instrument.
      own: the options of the instrument.

    Raises: InputError with what was expected, and the nearest option.
    """
    if not callable(function):
        is_path = isinstance(function, str | os.PathLike)
        run = f"; a run is read from its folder by jaxmp.Run({os.fspath(function)!r})" if is_path else ""
        kind = type(function).__name__
        raise InputError(
            f"{instrument}: {function!r:.60} is a {kind}: expected {takes}, or a function and its arguments{run}"
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # one without a signature, of C, say
        return function
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        unknown = next((name for name in kwargs if name not in signature.parameters), None)
        hint = "" if unknown is None else nearest(unknown, own)
        name = getattr(function, "__name__", type(function).__name__)
        bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
        signature = signature.replace(parameters=bare, return_annotation=signature.empty)
        raise InputError(f"{instrument}: {name}{signature} does not take these arguments: {error}{hint}") from None
    return function


def require_none(instrument: str, given: Mapping[str, Any], why: str) -> None:
    """Raises InputError with `why` for what was given, by name: all that is not None."""
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise InputError(f"{instrument}: {', '.join(names)}: {why}")
