"""`jaxmp blame RUN`: why a step of a run was skipped."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from jaxmp.commands.command import Command, require_path
from jaxmp.errors import DONE


@dataclass(frozen=True)
class Options:
    """The options of `jaxmp blame`."""

    run: str
    """Run folder, or a folder that contains one run."""
    step: int | None = None
    """Step to repeat, from 1; by default the last skipped one. A step that was not skipped is compared with float32."""
    objective: str | None = None
    """Which of several objectives; needed with --step, else the one that was skipped last."""
    json: str | None = None
    """File to which the answer is also written, as JSON."""


def blame(options: Options) -> int:
    """Names what overflowed in a skipped step of a run, and what would have prevented it.

    Shows the module, the operation and the line of source, the loss scale and the policy rule without overflow.
    """
    require_path(run=options.run, json=options.json)
    from jaxmp.reports.page import write
    from jaxmp.runs.run import Run
    from jaxmp.studies.overflow import blame_run
    from jaxmp.text_table import without_nan

    found = blame_run(Run(options.run), options.step, objective=options.objective)
    print(found)
    if options.json is not None:
        write(
            Path(options.json).expanduser(), json.dumps(without_nan(found.to_json()), indent=1, allow_nan=False) + "\n"
        )
    return DONE


COMMAND = Command("blame", Options, blame)
