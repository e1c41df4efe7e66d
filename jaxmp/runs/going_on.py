"""Going on with a run: in its own folder with other settings, or in a folder of its own from the state of another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.identity import HASHED, Difference, differences
from jaxmp.runs.folder import RunFolder

Log = Callable[[str], None]

DEVICES = "devices"
"""what a session calls the number of devices, which is no field of an experiment"""


# In the same folder.


def changed_settings(config: dict[str, Any], experiment: Experiment, devices: int | None = None) -> list[Difference]:
    """What a session of a run would do differently from the session before: fields that operate or round.

    Args:
      config: the run's config.json.
      experiment: what is to be trained, of the same hash.
      devices: the number of devices now; None if it does not matter.
    """
    since = {path: pair["is"] for session in config.get("sessions", ()) for path, pair in session["changed"].items()}
    count = since.pop(DEVICES, len(config["devices"]))
    found = differences(config["experiment"], experiment, since)
    found = [difference for difference in found if difference.kind in ("operates", "rounds")]
    if devices is not None and devices != count:
        found.append(Difference(DEVICES, "rounds", count, devices))
    return found


def log_changes(changes: Iterable[Difference], log: Log) -> None:
    """Says with which other settings a run goes on, and what they do to it."""
    for change in changes:
        if change.path == DEVICES:
            log(
                f"this run goes on on {change.now} devices, after {change.was}: sums are rounded in another order, and "
                "a module that draws noise by itself, other than by nn.Dropout, draws another"
            )
        elif change.kind == "rounds":
            log(f"going on with {change}: sums are rounded in another order, so that last digits may differ")
        else:
            log(f"going on with {change}: no bit of the state or of a metric depends on it")


def log_without_effect(changes: Iterable[Difference], log: Log) -> None:
    """Says which other settings have no effect on a finished run."""
    for change in changes:
        log(f"{change} has no effect: the run is finished")


def with_session(config: dict[str, Any], step: int, changes: Iterable[Difference]) -> dict[str, Any]:
    """config.json with another entry in `sessions`: the step from which, and the settings with which, a run goes on."""
    changed = {change.path: {"was": change.was, "is": change.now} for change in changes}
    return config | {"sessions": [*config.get("sessions", ()), {"step": step, "changed": changed}]}


def log_neighbours(folder: RunFolder, experiment: Experiment, origin: dict[str, Any] | None, log: Log) -> None:
    """Says which runs beside this new one differ from it in one field alone, and what --continue would do with them."""
    for other in folder.beside():
        try:
            config = other.read_config()
            if config["seed"] != experiment.seed or config.get("begins_with") != origin:
                continue
            found = [one for one in differences(config["experiment"], experiment) if one.kind in HASHED]
        except (OSError, InputError):  # a run of another version
            continue
        if len(found) == 1:
            log(f"a new run: it differs from {other.path} in {found[0]} alone; {_would_do(other, found[0])}")


def _would_do(other: RunFolder, difference: Difference) -> str:
    steps = other.checkpoint_steps()
    if not steps:
        return "that has no state yet with which --continue could go on"
    if is_other_data(difference.path):
        return f"--continue goes on over the same batches only; --init-from {other.path} takes its weights"
    return f"--continue {other.path} goes on from its step {steps[-1]}, in a folder of its own, with all of its state"


SAME_BATCHES = ("data.augment", "data.transforms", "data.host_transforms", "data.images", "data.mean", "data.std")
"""fields of the data that leave each step its rows"""


def is_other_data(path: str) -> bool:
    """Whether a field that differs gives the steps of a run other rows."""
    kept = any(path == name or path.startswith(f"{name}.") for name in SAME_BATCHES)
    return path.partition(".")[0] == "data" and not kept
