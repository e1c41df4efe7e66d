"""`jaxmp eval RUN`: the metrics of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxmp.commands.command import Command, require_path
from jaxmp.commands.summary import print_summary
from jaxmp.errors import DONE


@dataclass(frozen=True)
class Options:
    """The options of `jaxmp eval`."""

    run: str
    """Run folder, or a folder that contains one run."""
    split: Literal["train", "validation", "test"] = "test"
    """Split to evaluate on, with the rows that the run's config gives it."""
    step: str = "last"
    """Weights to evaluate: of the last checkpoint, of the best by the monitored metric, or of a step: last, best or N.
    """


def evaluate(options: Options) -> int:
    """Evaluates a run on a split of its data, and prints the metrics."""
    require_path(run=options.run)
    from jaxmp.runs.folder import parse_step
    from jaxmp.runs.run import Run

    step = parse_step(options.step, f"--step {options.step}")
    run = Run(options.run)
    state = run.state(step)
    if step == "best":
        print(f"{'step':<16} {int(state.step)}")
    print_summary(run.evaluate(options.split, state))
    return DONE


COMMAND = Command("eval", Options, evaluate)
