"""`jaxmp find-lr CONFIG`: a learning rate to begin with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxmp.commands.command import ConfigCommand, require_path
from jaxmp.errors import DONE
from jaxmp.experiment.config_file import ConfigFile

if TYPE_CHECKING:
    from jaxmp.experiment.experiment import Experiment


@dataclass(frozen=True)
class Options:
    """The options of `jaxmp find-lr`."""

    lowest: float = 1e-6
    """Learning rate of the first step."""
    highest: float = 1.0
    """Learning rate of the last step."""
    steps: int = 200
    """Number of steps of the objective; fewer where the loss diverges before."""
    objective: str | None = None
    """Which of several objectives; the others train at their own learning rates."""
    output: str | None = None
    """HTML file to write, with the plot; by default runs/CONFIG/find_lr.html."""


def find_lr(config: ConfigFile, options: Options, experiment: Experiment, overrides: list[str]) -> int:
    """Suggests a learning rate by a range test: a tenth of the rate at which the loss was lowest."""
    require_path(output=options.output)
    from jaxmp.studies import learning_rate as study

    found = study.find_lr(
        experiment,
        lowest=options.lowest,
        highest=options.highest,
        steps=options.steps,
        objective=options.objective,
    )
    output = Path(options.output or Path("runs") / config.name / "find_lr.html").expanduser()
    study.save(found, config.name, output)
    print(f"{'learning rate':<16} {found.suggestion:.2g}")
    print(f"{'steps':<16} {len(found.rates)} applied, {found.skipped} skipped")
    print(f"{'plot':<16} {output}")
    return DONE


COMMAND = ConfigCommand("find-lr", Options, find_lr)
