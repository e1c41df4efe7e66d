"""`jaxmp configs`: the configs that have a name."""

from __future__ import annotations

from dataclasses import dataclass

from jaxmp.commands.command import Command
from jaxmp.errors import DONE, InputError
from jaxmp.experiment import config_file
from jaxmp.text_table import table


@dataclass(frozen=True)
class Options:
    """`jaxmp configs` has no options."""


def configs(options: Options) -> int:
    """Lists the configs that have a name: those in ./configs, and those that come with jaxmp."""
    found = config_file.available()
    if not found:
        raise InputError(f"no configs in {' or '.join(map(str, config_file.folders()))}")
    print(table([(name, _about(name)) for name in sorted(found)]))
    return DONE


def _about(name: str) -> str:
    """The first line of a config's docstring; why there is none, if the file cannot be read."""
    try:
        return config_file.ConfigFile.find(name).docstring.partition("\n")[0]
    except InputError as error:
        return f"(cannot be read: {error})"


COMMAND = Command("configs", Options, configs)
