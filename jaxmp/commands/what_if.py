"""`jaxmp what-if CONFIG|RUN`: what recipes below 16 bits would do to each layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmp.commands.command import ConfigCommand, options_alone, require_path
from jaxmp.errors import DONE
from jaxmp.experiment.config_file import ConfigFile

if TYPE_CHECKING:
    from jaxmp.experiment.experiment import Experiment


@dataclass(frozen=True)
class Options:
    """The options of `jaxmp what-if`."""

    recipes: tuple[str, ...] = ("mxfp8", "mxfp4", "nvfp4", "block128", "fp8_current")
    """Recipes to measure: names, fields such as mxfp4,hadamard=none, or a format for all operands: e4m3:block32."""
    step: int | None = None
    """Step to measure, from 1; by default the first of a config, and the last of a run."""
    objective: str | None = None
    """Which of the task's several objectives."""
    json: str | None = None
    """File to which the measurements are also written, as JSON."""


def what_if(config: ConfigFile, options: Options, experiment: Experiment, overrides: list[str]) -> int:
    """Measures what recipes below 16 bits would do to each layer's products, in one step that is not changed.

    Shows underflow, clipping, errors, bias and noise of each product; of a run, RUN instead of CONFIG, of any step.
    """
    return _show(experiment, options, config.name)


def of_run(options: Any, path: str) -> int:
    """The same for the run in the folder `path`."""
    from jaxmp.runs.run import Run

    return _show(Run(path), options, path)


def _show(subject: Any, options: Options, name: str) -> int:
    require_path(json=options.json)
    from jaxmp.studies import what_if as study

    chosen = dataclasses.asdict(options)
    file = chosen.pop("json")
    found = study.what_if_of(subject, **chosen)
    print(f"\n{found}")
    if file is not None:
        study.save(found, name, Path(file).expanduser())
    return DONE


class _ConfigOrRun(ConfigCommand):
    def __call__(self, argv: Sequence[str]) -> int:
        """As of `ConfigCommand`; a folder as first argument is a run."""
        if argv and not argv[0].startswith("-") and Path(argv[0]).is_dir():
            return of_run(options_alone(self.options, argv[1:], f"jaxmp {self.name} RUN", self.description), argv[0])
        return super().__call__(argv)


COMMAND = _ConfigOrRun("what-if", Options, what_if)
