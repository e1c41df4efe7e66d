"""`jaxmp report RUN...`: one HTML page about one or more runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxmp.commands.command import Command, require_path
from jaxmp.errors import DONE, InputError


@dataclass(frozen=True)
class Options:
    """The options of `jaxmp report`."""

    runs: tuple[str, ...]
    """Run folders, or folders that contain one run each."""
    output: str | None = None
    """HTML file to write; by default report.html in the folder of the run, if there is only one."""
    look: bool = False
    """For a run without --loop.ranges-every: run the step after its last checkpoint once, and show the value ranges."""


def report(options: Options) -> int:
    """Writes an HTML page about one or more runs: curves, skipped steps, precision and provenance."""
    require_path(output=options.output)
    for run in options.runs:
        require_path(run=run)
    from jaxmp.reports.run_report import report as page
    from jaxmp.runs.run import Run

    found = [Run(run) for run in options.runs]
    if not found:
        raise InputError("report: expected RUN..., one or more run folders")
    if options.output is None and len(found) > 1:
        raise InputError(f"report: of {len(found)} runs there is no one folder for it; expected --output FILE")
    path = Path(options.output).expanduser() if options.output is not None else found[0].path / "report.html"
    page(found, look=options.look).write(path)
    print(path)
    return DONE


COMMAND = Command("report", Options, report)
