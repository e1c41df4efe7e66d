"""`jaxmp report RUN...`: one HTML page about one or more runs, or about a study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxmp.commands.command import Command, require_path
from jaxmp.errors import DONE, InputError


@dataclass(frozen=True)
class Options:
    """The options of `jaxmp report`."""

    runs: tuple[str, ...]
    """Run folders, or folders that contain one run each; or the folder of a study of `jaxmp tune`."""
    output: str | None = None
    """HTML file to write; by default report.html in the folder of the run, if there is only one."""
    look: bool = False
    """For a run without --loop.ranges-every: run the step after its last checkpoint once, and show the value ranges."""
    storage: str | None = None
    """For a study whose trials are in a database: its URL, if that needs a password."""


def report(options: Options) -> int:
    """Writes an HTML page about one or more runs: curves, skipped steps, precision; or about a study of many trials."""
    require_path(output=options.output)
    for run in options.runs:
        require_path(run=run)
    from jaxmp.studies.tune_study import StudyFolder

    studies = [run for run in options.runs if StudyFolder.is_one(Path(run).expanduser())]
    if studies:
        if len(options.runs) > 1:
            raise InputError(f"report: {studies[0]} is a study; expected it alone")
        return _report_study(Path(studies[0]).expanduser(), options)
    if options.storage is not None:
        raise InputError(f"--storage: {' '.join(options.runs) or 'nothing'} is no study; expected the folder of one")
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


def _report_study(folder: Path, options: Options) -> int:
    from jaxmp.studies.tune_study import StudyFolder, require_optuna, study_to_json

    require_optuna()
    from jaxmp.reports.study_report import page

    path = Path(options.output).expanduser() if options.output is not None else folder / "report.html"
    page(study_to_json(StudyFolder(folder), options.storage)).write(path)
    print(path)
    return DONE


COMMAND = Command("report", Options, report)
