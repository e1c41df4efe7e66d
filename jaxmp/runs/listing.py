"""`list_runs`: the runs below a folder, read from their files: what differs, how far each came, its best metric."""

from __future__ import annotations

import collections
import dataclasses
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxmp.errors import InputError, local_path
from jaxmp.runs.folder import RunFolder

State = Literal["running", "finished", "failed", "unfinished", "unreadable"]


@dataclass(frozen=True)
class Listed:
    """One run, as `jaxmp runs` shows it."""

    path: Path
    """the run folder"""
    config: str
    """name of its config"""
    differs: str
    """what differs from the config's defaults, `precision=float32 loop.epochs=3`; of runs started from Python, what
    differs between them"""
    seed: int
    """seed of the run"""
    state: State
    """running: a process trains there; unfinished: none does, and the same command goes on; unreadable: `note` says why
    """
    step: int
    """last step with a line of metrics, 0 before the first"""
    steps: int | None
    """number of steps that it trains for, if that is known"""
    metric: str
    """name of the monitored metric; empty if it is not known"""
    mode: Literal["max", "min"] | None
    """whether more or less of that metric is better"""
    best: float | None
    """the best value of that metric on the validation split; None before the first evaluation"""
    digits: int
    """decimals that the metric is shown with"""
    age: float
    """seconds since something was last written about the run"""
    note: str = ""
    """why the run failed, or cannot be read"""


def list_runs(folder: str | os.PathLike[str], *, now: float) -> list[Listed]:
    """All runs in `folder` and in the folders below it, sorted by path. Links to folders are not followed.

    Nothing is changed, and no experiment is built. A run whose files are broken is listed as unreadable.

    Args:
      folder: a working directory of `jaxmp train`, a folder of it, or a run folder.
      now: the time that ages are counted from, in seconds since the epoch.

    Raises:
      InputError: there is no such folder.
    """
    root = local_path("folder", folder)
    if not root.is_dir():
        raise InputError(f"folder {str(root)!r}: {'this is a file' if root.exists() else 'no such folder'}")
    configs = {found.path: _config_of(found) for found in _folders(root)}
    differs = _differences({path: config for path, config in configs.items() if isinstance(config, dict)})
    return [_listed(RunFolder(path), config, differs.get(path, ""), now) for path, config in configs.items()]


def _folders(root: Path) -> Iterator[RunFolder]:
    for at, folders, files in os.walk(root):
        if "config.json" in files:
            if {"checkpoints", "metrics.jsonl", "summary.json"} & {*folders, *files}:
                folders.clear()  # nothing below a run is a run; another program's config.json may have runs below it
            if not at.endswith(".deleted"):
                yield RunFolder(Path(at))
        folders.sort()


def _config_of(folder: RunFolder) -> dict[str, Any] | str:
    """What config.json says, or why it cannot be read."""
    try:
        return folder.read_config()
    except (InputError, OSError) as error:
        return str(error)


def _listed(folder: RunFolder, config: dict[str, Any] | str, differs: str, now: float) -> Listed:
    path = folder.path
    age = max(0.0, now - max(file.stat().st_mtime for file in path.iterdir() if file.is_file()))
    unreadable = Listed(path, path.parent.name, differs, 0, "unreadable", 0, None, "", None, None, 4, age)
    if isinstance(config, str):
        return dataclasses.replace(unreadable, note=config)
    try:
        summary = folder.read_summary()
        lines = folder.read_lines() if summary is None else []  # the summary says what is shown of them
    except InputError as error:
        return dataclasses.replace(unreadable, config=config["name"], seed=config["seed"], note=str(error))
    metric, mode = config.get("monitor", ""), config.get("mode")
    best = (summary or {}).get("best", {}).get(metric)
    failure = folder.read_failure()
    state: State = "finished" if summary else "running" if folder.is_locked() else "failed" if failure else "unfinished"
    return Listed(
        path,
        config["name"],
        differs,
        config["seed"],
        state,
        step=max((line["step"] for line in lines), default=0) if summary is None else summary["steps"],
        steps=config.get("steps"),
        metric=metric,
        mode=mode,
        best=_best(lines, metric, mode, config.get("best_since", 0)) if best is None else best,
        digits=config.get("metrics", {}).get(metric, {}).get("digits", 4),
        age=age,
        note=failure or "" if state == "failed" else "",
    )


def _best(lines: Sequence[Mapping[str, Any]], metric: str, mode: str | None, since: int) -> float | None:
    lines = [line for line in lines if line["split"] == "validation" and line["step"] > since]
    values = [line[metric] for line in lines if line.get(metric) is not None]
    if not values or mode not in ("max", "min"):
        return None
    return max(values) if mode == "max" else min(values)


def _differences(configs: Mapping[Path, dict[str, Any]]) -> dict[Path, str]:
    """What differs in each run: the arguments that it was started with, then leaves that differ between the others.

    Two runs of one config with the same arguments differ in what no argument tells: the config file was edited, or both
    were started from Python.
    """
    alike = collections.defaultdict(list)
    for path, config in configs.items():
        alike[config["name"], _arguments(config)].append(path)
    differs = {}
    for (_, arguments), paths in alike.items():
        leaves = {path: dict(_leaves(configs[path]["experiment"])) for path in paths}
        names = sorted(set().union(*leaves.values()) - {"seed"})
        varying = [name for name in names if len({of.get(name) for of in leaves.values()}) > 1]
        for path in paths:
            own = [f"{name}={leaves[path][name]}" for name in varying if name in leaves[path]]
            parent = configs[path].get("parent")
            after = [f"after {Path(parent).parent.name}/{Path(parent).name}"] if parent else []
            differs[path] = " ".join([*arguments, *own, *after])
    return differs


def _arguments(config: Mapping[str, Any]) -> tuple[str, ...]:
    """`--loop.epochs 3 --seed 1` as ("loop.epochs=3",): the seed is told apart."""
    named: dict[str, list[str]] = {}
    name = ""
    for argument in config.get("overrides", []):
        if argument.startswith("--"):
            name, _, value = argument.removeprefix("--").partition("=")
            named[name] = [value] if value else []
        else:
            named.setdefault(name, []).append(argument)
    return tuple(
        f"{name}={shlex.quote(' '.join(values))}" if values else name
        for name, values in named.items()
        if name != "seed"
    )


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of each leaf of an experiment as JSON; the class of a part is a leaf of its name."""
    if isinstance(value, Mapping):
        for key, of in value.items():
            below = f"{name}.{key}" if name else str(key)
            yield from _leaves(of, name if key == "class" and name else below)
    else:
        yield name, " ".join(map(str, value)) if isinstance(value, list) else str(value)
