"""`jaxmp reproduce [PAPER]`: runs the study of a paper, and says which of its claims hold here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jaxmp.commands.command import Command, require_path
from jaxmp.errors import DONE, STOPPED, InputError


@dataclass(frozen=True)
class Options:
    """The options of `jaxmp reproduce`."""

    paper: str | None = field(default=None, metadata={"positional": True})
    """Name of a folder of ./experiments with a paper.py, or the path of one; without it, all papers are listed with
    their claims and verdicts."""
    quick: bool = False
    """Run a small version in less than a minute, with results in WORKDIR/PAPER/quick; its verdicts need more size."""
    tables: bool = False
    """Run nothing: judge the paper's results.json again, and make its tables and plots from that. Refused if arms or
    seeds of paper.py are others by now."""
    workdir: str = "runs"
    """Folder for the runs; runs that exist are resumed, or read if they are finished."""


def reproduce(options: Options) -> int:
    """Runs the study of a paper, and prints its claims with our figures and verdicts.

    The same command resumes a study that was stopped. Results, plots and tables go to the paper's folder.
    """
    require_path(workdir=options.workdir)
    from jaxmp.studies import reproduce as study

    if options.paper is None:
        print(_list())
        return DONE
    folder = study.find(options.paper)
    if options.tables:
        if options.quick:
            raise InputError("--tables makes those of the full study; expected it without --quick")
        kept = study.committed(folder)
        if kept is None:
            raise InputError(f"--tables: no {study.RESULTS} in {folder}; expected jaxmp reproduce {folder.name} first")
        results: dict[str, Any] | None = study.judged(study.load(folder, quick=False), folder, kept)
    else:
        results = study.reproduce(folder, quick=options.quick, workdir=options.workdir)
    if results is None:
        return STOPPED
    path = study.save(folder, results, options.workdir)
    from jaxmp.reports.paper_report import text

    print(text(results))
    print(f"{'tables and plots':<16} {path}")
    return DONE


def _list() -> str:
    """All papers with their claims, and the verdicts of the results that are there."""
    from jaxmp.reports.paper_report import NOT_RUN
    from jaxmp.studies import reproduce as study
    from jaxmp.text_table import table

    rows = []
    for name, folder in study.available().items():
        results = study.committed(folder)
        verdicts = {claim["id"]: claim["verdict"] for claim in results["claims"]} if results else {}
        for claim in study.load(folder, quick=False).claims:
            rows.append((name, claim.id, claim.says, verdicts.get(claim.id, NOT_RUN)))
    if not rows:
        return "no papers: there is no experiments/*/paper.py here"
    return table(rows, header=("paper", "claim", "what it says", "verdict"))


COMMAND = Command("reproduce", Options, reproduce)
