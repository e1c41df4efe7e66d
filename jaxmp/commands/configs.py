"""`jaxmp configs`: the configs that have a name."""

from __future__ import annotations

from dataclasses import dataclass

from jaxmp.commands.command import Command
from jaxmp.errors import DONE, InputError
from jaxmp.experiment import config_file


@dataclass(frozen=True)
class Options:
    """`jaxmp configs` has no options."""


def configs(options: Options) -> int:
    """Lists the configs that have a name: those in ./configs, and those that come with jaxmp."""
    found = config_file.available()
    if not found:
        raise InputError(f"no configs in {' or '.join(map(str, config_file.folders()))}")
    width = max(map(len, found))
    for name in sorted(found):
        print(f"{name:<{width}}  {config_file.ConfigFile.find(name).docstring.partition(chr(10))[0]}")
    return DONE


COMMAND = Command("configs", Options, configs)
