"""`override`: an experiment with fields changed by command-line arguments, read by tyro. JAX is not imported here."""

from __future__ import annotations

import collections.abc
import dataclasses
import re
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from jaxmp.errors import InputError

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    from jaxmp.experiment.experiment import Experiment


def override(experiment: Any, arguments: Sequence[str], *, prog: str = "jaxmp", description: str = "") -> Any:
    """Changes fields of an experiment by arguments such as `--optimizer.learning-rate 3e-4`.

    Args:
      experiment: an Experiment, or any other dataclass.
      arguments: names of fields with their values; or `--help`, which prints all fields and exits.
      prog: the words before the arguments, for help and messages.
      description: text at the top of the help.

    Returns:
      The changed experiment. Every part that no argument names is the same object as before.

    Raises:
      InputError: a dataclass refuses a value.
      SystemExit: 2 after a message about an argument that cannot be read, 0 after `--help`.
    """
    if not arguments:
        return experiment
    import tyro

    try:
        with warnings.catch_warnings():
            # That a value is a number of NumPy or JAX, and so not of the field's type.
            warnings.filterwarnings("ignore", module=r"tyro\.")
            return tyro.cli(
                type(experiment),
                default=experiment,
                args=arguments,
                prog=prog,
                description=description,
                registry=_registry(),
            )
    except _Refused as refused:
        raise refused.error from None


def field_path(text: str) -> str:
    """The path of the field that the beginning of an argument or of a line of `--space` names.

    >>> field_path("--optimizer.learning-rate=0.1")
    'optimizer.learning_rate'
    """
    return text.partition("=")[0].removeprefix("--").replace("-", "_")


def named_fields(arguments: Iterable[str]) -> set[str]:
    """The paths of the fields that arguments name; of `--optimizer.no-nesterov`, also `optimizer.nesterov`.

    Arguments that do not begin with `--` are values.
    """
    named = {field_path(argument) for argument in arguments if argument.startswith("--")}
    return named | {re.sub(r"(^|\.)no_([^.]*)$", r"\1\2", path) for path in named}


def refuse_without_effect(experiment: Experiment, arguments: Iterable[str], *, varied: Collection[str] = ()) -> None:
    """Raises InputError if one of the arguments that changed `experiment` has no effect beside its other fields.

    A field that the config file sets is not checked: the file may serve another command line.

    Args:
      experiment: with the arguments.
      arguments: the names of fields, with their values.
      varied: paths of fields that the command itself gives other values; what depends on one of them is not refused.
    """
    from jaxmp.scaling.scalers import NoScaler, Scaling, StaticScaler

    names = named_fields(arguments)
    loop, scaler = experiment.loop, experiment.scaler
    if loop.steps is not None and "loop.epochs" in names:
        raise InputError(
            f"--loop.epochs: without effect beside loop.steps = {loop.steps}; expected one of the two, or "
            "--loop.steps None"
        )
    in_one_part = loop.accumulate_overflow == "microbatch" and loop.accumulate_steps == 1
    if in_one_part and "loop.accumulate_overflow" in names and "loop.accumulate_steps" not in varied:
        raise InputError(
            "--loop.accumulate-overflow microbatch: without effect where loop.accumulate_steps = 1; expected "
            "--loop.accumulate-steps 2 or more beside it"
        )
    if not isinstance(scaler, Scaling):
        return
    kind: str = scaler.kind
    shown = kind
    if kind == "auto" and "precision" not in varied:
        made = [*experiment.make_scalers().values()] or [experiment.make_scaler()]
        kind = {NoScaler: "none", StaticScaler: "static"}.get(type(made[0]), "dynamic")
        shown = f"auto, which is {kind} with precision {experiment.precision}"
    takes = {"static": {"scaler.kind", "scaler.init_scale"}, "none": {"scaler.kind"}}
    idle = {name for name in names if name.startswith("scaler.")} - takes.get(kind, names)
    if idle:
        those = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(idle))
        raise InputError(f"{those}: without effect where scaler.kind = {shown}; expected dynamic")


class _Refused(Exception):
    """Carries an InputError past tyro, which makes its own message of every ValueError."""

    def __init__(self, error: InputError):
        self.error = error


def _registry() -> ConstructorRegistry:
    """The rules by which tyro changes a dataclass that has values, and shows functions."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, StructConstructorSpec, StructTypeInfo

    registry = ConstructorRegistry()
    asking = False

    @registry.struct_rule
    def replace_what_changed(info: StructTypeInfo) -> StructConstructorSpec | None:
        # tyro would call the class with the fields it knows: a Linen module would lose its name, and an untouched
        # subtree would be built anew.
        nonlocal asking
        default = info.default
        if asking or isinstance(default, type) or not dataclasses.is_dataclass(default):
            return None
        asking = True
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            asking = False

        def replace(**fields: Any) -> Any:
            changed = {name: value for name, value in fields.items() if value is not getattr(default, name)}
            for name, value in changed.items():  # tyro makes a list of what is annotated as a Sequence
                if isinstance(value, list) and isinstance(getattr(default, name), tuple):
                    changed[name] = tuple(value)
            try:
                return dataclasses.replace(info.default, **changed) if changed else default
            except InputError as error:
                raise _Refused(error) from error

        replace.__doc__ = type(default).__doc__
        return dataclasses.replace(spec, instantiate=replace) if isinstance(spec, StructConstructorSpec) else None

    @registry.primitive_rule
    def show_functions_by_name(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if not _holds_functions(info):
            return None

        def refuse(arguments: list[str]) -> Any:
            raise ValueError(f"{arguments[0]!r} given, but a function or class is set in the config file")

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="{set in the file}",
            instance_from_str=refuse,
            is_instance=callable,
            str_from_instance=lambda function: [_plain_name(function)],
        )

    return registry


def _holds_functions(info: PrimitiveTypeInfo) -> bool:
    """Whether values of the type are functions, classes or dtypes, which the command line shows but cannot set."""
    kind = info.type_origin or info.type
    if kind is collections.abc.Callable or kind is type:
        return True
    if not isinstance(kind, type) or dataclasses.is_dataclass(kind):
        return False
    return any("__call__" in vars(base) for base in kind.__mro__)


def _plain_name(function: Any) -> str:
    while not hasattr(function, "__name__"):
        inner = getattr(function, "__wrapped__", getattr(function, "func", None))  # jax.jit, functools.partial
        if inner is None:
            return type(function).__name__
        function = inner
    return getattr(function, "__qualname__", None) or function.__name__
