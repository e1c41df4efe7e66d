"""`Command` and `ConfigCommand`: what `jaxmp NAME ...` is, and the one function that reads its arguments.

A command is a frozen dataclass of options and a function that runs with them. Its file imports neither JAX nor tyro at
the top: `jaxmp --help` imports all of them.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from jaxmp.errors import InputError, local_path
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.overrides import named_fields, override, refuse_without_effect
from jaxmp.field_docs import with_fields

if TYPE_CHECKING:
    from jaxmp.experiment.experiment import Experiment

HELP = ("-h", "--help")


@dataclass(frozen=True)
class Command:
    """`jaxmp NAME [OPTIONS]`: called with the arguments after NAME, it returns the exit code."""

    name: str
    """the words that call it: eval, or data list"""
    options: type
    """frozen dataclass of the options, each with its help line as docstring; positional are fields without a default,
    and those whose metadata say so"""
    run: Callable[..., int]
    """called with the options, returns the exit code; its docstring is the command's help"""

    @property
    def description(self) -> str:
        """The docstring of `run`, which `jaxmp NAME --help` shows."""
        return inspect.getdoc(self.run) or ""

    @property
    def summary(self) -> str:
        """The first line of the description, which `jaxmp --help` shows."""
        return self.description.partition("\n")[0]

    def __call__(self, argv: Sequence[str]) -> int:
        """Reads the arguments `argv` and runs the command.

        Raises:
          SystemExit: 0 after `--help`; 2 after a message about an argument.
        """
        return self.run(_read(self.options, argv, prog=f"jaxmp {self.name}", description=self.description))


@dataclass(frozen=True)
class ConfigCommand(Command):
    """`jaxmp NAME CONFIG [OPTIONS] [--FIELD VALUE ...]`: a command that takes any field of CONFIG's experiment, too.

    `run` is called with `(config, options, experiment, overrides)`, see `parse`.
    """

    before_config: Callable[[Any, Sequence[str]], int | None] | None = None
    """called with the options and all arguments before the config file is run; an exit code ends the command"""

    def __call__(self, argv: Sequence[str]) -> int:
        """Reads CONFIG and the arguments after it, and runs the command.

        Raises:
          InputError: `argv` does not begin with a config, or the experiment refuses a value.
          SystemExit: 0 after `--help`; 2 after a message about an argument.
        """
        if not argv or argv[0].startswith("-"):
            self._refuse_without_config(argv)
        config, arguments = ConfigFile.find(argv[0]), argv[1:]
        prog = f"jaxmp {self.name} {config.name}"
        if self.before_config is not None and not _asks_for_help(arguments):
            code = self.before_config(_split(self.options, arguments, prog)[0], argv)
            if code is not None:
                return code
        options, experiment, overrides = parse(config, self.options, arguments, prog=prog)
        return self.run(config, options, experiment, overrides)

    @property
    def usage(self) -> str:
        """The line that shows the command's options with their defaults."""
        options = [f"[{_usage(field)}]" for field in dataclasses.fields(self.options)]
        return " ".join([f"usage: jaxmp {self.name} CONFIG", *options, "[--FIELD VALUE ...]"])

    def _refuse_without_config(self, argv: Sequence[str]) -> None:
        """Shows the help of the options, which needs no config, or raises an InputError."""
        about = (
            "CONFIG is a Python file with `get_config() -> jaxmp.Experiment`, or a name that `jaxmp configs` lists.\n"
            f"`jaxmp {self.name} CONFIG --help` shows every field of that config, with what it means and its value."
        )
        if _asks_for_help(argv):
            prog = f"jaxmp {self.name} CONFIG [--FIELD VALUE ...]"
            _read(self.options, ["--help"], prog=prog, description=f"{self.description}\n\n{about}")
        raise InputError(f"{self.name}: the first argument has to be CONFIG\n{self.usage}\n\n{about}")


def parse(
    config: ConfigFile, options: type, argv: Sequence[str], *, recorded: Sequence[str] = (), prog: str = "jaxmp"
) -> tuple[Any, Experiment, list[str]]:
    """Runs a config file and reads the arguments of a command: each is one of its options or a field of the experiment.

    An option named like a field of the experiment hides that field: `--precision` of `jaxmp compare`.

    Args:
      config: the config file; it is run if the options can be read.
      options: frozen dataclass of the command's options, all of which have defaults.
      argv: the arguments after CONFIG.
      recorded: arguments of an earlier command, which change the experiment first, and may lose their effect.
      prog: the words before `argv`, for messages and help.

    Returns:
      The options; the experiment with its fields changed; and the arguments that changed it, in their order, for the
      run folder to record.

    Raises:
      InputError: the config file fails, or a value is refused or has no effect.
      SystemExit: 0 after `--help`; 2 after a message about an argument.
    """
    values, given = _split(options, argv, prog)
    overrides = [*recorded, *given]
    experiment = config.experiment()
    # One dataclass with the fields of both, so that one help and the nearest name in a message know all of them. The
    # checks of the experiment wait for the experiment: an option may be in the place of one of its fields.
    own = vars(values)
    fields = {field.name: getattr(experiment, field.name) for field in dataclasses.fields(experiment)}
    bases, unchecked = (_spelled(options), type(experiment)), {"__post_init__": lambda self: None}
    both = dataclasses.make_dataclass("Arguments", [], bases=bases, frozen=True, namespace=unchecked)(**fields | own)
    both = override(both, overrides, prog=prog, description=config.docstring.partition("\n")[0])
    changed = {
        name: getattr(both, name)
        for name, value in fields.items()
        if name not in own and getattr(both, name) is not value
    }
    experiment = dataclasses.replace(experiment, **changed) if changed else experiment
    refuse_without_effect(experiment, given, varied=[*own, *getattr(values, "varied", ())])
    return values, experiment, overrides


def options_alone(options: type, argv: Sequence[str], prog: str, description: str) -> Any:
    """Reads the arguments of a command that are all options of its own, as where it is given a run.

    Raises: SystemExit: 0 after `--help`; 2 after a message about an argument.
    """
    return _read(options, argv, prog=prog, description=description)


def require_path(**paths: str | None) -> None:
    """Raises InputError if a path is empty (mostly an unset shell variable), a URL, or begins with `~` of nobody."""
    for name, path in paths.items():
        if path is not None:
            local_path(name, path)


def _split(options: type, argv: Sequence[str], prog: str) -> tuple[Any, list[str]]:
    """The options in `argv`, read; and all other arguments, in their order.

    An argument that begins with `--` names a field, and those up to the next are its values.
    """
    own = {_spelling(field) for field in dataclasses.fields(options)}
    parts: dict[bool, list[str]] = {True: [], False: []}
    is_own = False
    for argument in argv:
        if argument.startswith("--") or argument in HELP:
            is_own = not own.isdisjoint(named_fields([argument]))
        parts[is_own].append(argument)
    return _read(options, parts[True], prog=prog), parts[False]


def _read(options: type, argv: Sequence[str], *, prog: str, description: str = "") -> Any:
    import tyro

    positional = (tyro.conf.PositionalRequiredArgs, tyro.conf.PositionalMetavarFromFieldName)
    options = with_fields(options)  # the strings under the fields, whose lines tyro would break as the source does
    read: Any = tyro.cli(_spelled(options), args=argv, prog=prog, description=description, config=positional)
    return options(**vars(read))


def _spelled(options: type) -> type:
    """The options as tyro reads them.

    A field called `continue_`, which Python wants for a keyword, is spelled `--continue`; one whose metadata say
    `positional` may be given without its name, though it has a default.
    """
    import tyro

    how = {
        field: tyro.conf.arg(name=_spelling(field)) if field.name.endswith("_") else tyro.conf.Positional
        for field in dataclasses.fields(options)
        if field.name.endswith("_") or field.metadata.get("positional")
    }
    if not how:
        return options
    types = get_type_hints(options)
    spelled = [(field.name, Annotated[types[field.name], mark], field.default) for field, mark in how.items()]
    return dataclasses.make_dataclass(options.__name__, spelled, bases=(options,), frozen=True)


def _spelling(field: dataclasses.Field[Any]) -> str:
    return field.name.removesuffix("_")


def _asks_for_help(argv: Sequence[str]) -> bool:
    return any(argument in HELP for argument in argv)


def _usage(field: dataclasses.Field[Any]) -> str:
    """`--seeds 0 1 2`: an option with its default as an example, or with its name in capitals where that is None."""
    name, default = "--" + _spelling(field).replace("_", "-"), field.default
    if isinstance(default, bool):
        return name
    if default is None:
        return f"{name} {_spelling(field).upper()}"
    return f"{name} {' '.join(map(str, default)) if isinstance(default, tuple) else default}"
