"""`jaxmp runs [FOLDER]`: a table of runs."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxmp.commands.command import Command, require_path
from jaxmp.errors import DONE, InputError

if TYPE_CHECKING:
    from jaxmp.runs.listing import Listed

NARROWEST = 12
"""what is left, in characters, of a column that is cut to the width of the terminal"""


@dataclass(frozen=True)
class Options:
    """The options of `jaxmp runs`."""

    folder: str = dataclasses.field(default="runs", metadata={"positional": True})
    """Folder whose runs to list, at any depth."""
    config: str = "*"
    """Runs of these configs only: a name, with * for any part of it."""
    differs: str = "*"
    """Runs in whose differences this stands: precision=float32, say, with * for any part."""
    state: Literal["any", "running", "finished", "failed", "unfinished", "unreadable"] = "any"
    """Runs in this state only; unfinished: no process trains it, and the same `jaxmp train` goes on."""
    sort: Literal["age", "config", "best", "step"] = "age"
    """Order: the newest first, by config, the best first within a config, or the furthest first."""


def runs(options: Options) -> int:
    """Lists runs: what differs in each, its state, its step, its best metric and its age."""
    require_path(folder=options.folder)
    from jaxmp.runs.listing import list_runs
    from jaxmp.text_table import table

    found = list_runs(options.folder, now=time.time())
    kept = [
        run
        for run in found
        if fnmatch.fnmatchcase(run.config, options.config)
        and fnmatch.fnmatchcase(differs_in(run, found), f"*{options.differs}*")
        and options.state in ("any", run.state)
    ]
    if not kept:
        there = f"{len(found)} others" if found else "none at all"
        raise InputError(f"{options.folder} holds no such run, and {there}; `jaxmp train CONFIG` makes one")
    differs = {run.path: differs_in(run, found) for run in kept}
    columns = _fitted(_columns(sorted(kept, key=ORDERS[options.sort]), options.folder, differs))
    print(table(zip(*columns.values(), strict=True), header=list(columns)))
    for run in kept:
        if run.note:
            print(f"{run.path}: {run.note}", file=sys.stderr)
    return DONE


def differs_in(run: Listed, runs: Sequence[Listed]) -> str:
    """What tells a run from the others of its config: the seed too where they have several; never nothing."""
    seeds = {other.seed for other in runs if other.config == run.config}
    seed = [f"seed={run.seed}"] if len(seeds) > 1 else []
    return " ".join([*filter(None, [run.differs]), *seed]) or "(nothing)"


def _columns(runs: list[Listed], folder: str, differs: Mapping[Path, str]) -> dict[str, list[str]]:
    """The cells of each column, by its head. The head of the best values names the metric where there is but one."""
    metrics = sorted({run.metric for run in runs if run.metric})
    values = ["" if run.best is None else f"{run.best:.{run.digits}f}" for run in runs]
    named = [f"{run.metric} {value}" if value else "" for run, value in zip(runs, values, strict=True)]
    return {
        "run": [os.path.relpath(run.path, folder) for run in runs],
        "differs in": [differs[run.path] for run in runs],
        "state": [run.state for run in runs],
        "step": [_step(run) for run in runs],
        f"best {metrics[0]}" if len(metrics) == 1 else "best": values if len(metrics) == 1 else named,
        "age": [_age(run.age) for run in runs],
    }


def _step(run: Listed) -> str:
    """The last step; of a run that goes on, the number of all steps too."""
    whole = run.state == "finished" or run.steps is None
    return f"{run.step:,}" if whole else f"{run.step:,}/{run.steps:,}"


def _rank(run: Listed) -> float:
    """Less for a better run; infinite for one without a best value."""
    if run.best is None or run.mode is None:
        return math.inf
    return run.best if run.mode == "min" else -run.best


ORDERS: dict[str, Callable[[Listed], Any]] = {
    "age": lambda run: run.age,
    "config": lambda run: (run.config, run.differs, run.seed),
    "best": lambda run: (run.config, run.metric, _rank(run)),
    "step": lambda run: -run.step,
}
"""the key by which runs are sorted, by the value of `--sort`"""


def _age(seconds: float) -> str:
    """The largest whole unit: 59 s, 3 min, 2 h, 5 d."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"


def _fitted(columns: dict[str, list[str]]) -> dict[str, list[str]]:
    """The columns, fitted to the width of the terminal; as they are where there is none.

    The differences are cut first, then the age and the steps are left out.
    """
    if not sys.stdout.isatty():
        return columns
    for left_out in ((), ("age",), ("age", "step")):
        kept = {name: cells for name, cells in columns.items() if name not in left_out}
        others = [max(map(len, [name, *cells])) for name, cells in kept.items() if name != "differs in"]
        room = shutil.get_terminal_size().columns - sum(others) - 2 * len(others)
        if room >= NARROWEST:
            break
    return kept | {"differs in": [_shortened(cell, max(room, NARROWEST)) for cell in columns["differs in"]]}


def _shortened(differs: str, length: int) -> str:
    """What differs, in at most `length` characters: without the long names first, then without its middle."""
    last_names = re.sub(r"(?<!\S)[\w.-]+\.(?=[\w-]+=)", "", differs)  # optimizer.learning-rate=1 -> learning-rate=1
    values = re.sub(r"(?<!\S)[\w.-]+=", "", differs)
    for text in (differs, last_names, values):
        if len(text) <= length:
            return text
    half = (length - 1) // 2
    return f"{values[: length - 1 - half]}…{values[len(values) - half :]}"


COMMAND = Command("runs", Options, runs)
