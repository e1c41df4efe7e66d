"""What a study takes of a run that is there already: a failure of its numbers, and no run that a hook ended early."""

from __future__ import annotations

from collections.abc import Callable

from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.reachable import made_by
from jaxmp.runs.fit import Fitted
from jaxmp.runs.folder import RunFolder
from jaxmp.runs.going_on import changed_settings, refuse_other_code, refuse_other_rows_if_readable
from jaxmp.runs.trainer import Trainer


def recorded_failure(folder: RunFolder, experiment: Experiment, log: Callable[[str], None]) -> str | None:
    """Why the run in a folder failed before; None if `fit` may train it.

    `fit` would go on with it, past the failure, so that the same study run twice would have another result. A hook's
    error is no result, nor are skipped steps once `loop.max_consecutive_skips` is larger. What the machine lacked, such
    as memory, is recorded nowhere, and is tried again.

    Raises: InputError if the code or the data have changed since, as `fit` does.
    """
    why = folder.read_failure()
    if why is None or why.startswith("hook "):  # how `jaxmp.runs.hooks` begins each of its messages
        return None
    config = folder.read_config()
    folder.refuse_earlier_version(config)
    refuse_other_code(folder, config, made_by(experiment), log)
    refuse_other_rows_if_readable(folder, config, Trainer(experiment), log)
    limits = [change for change in changed_settings(config, experiment) if change.path == "loop.max_consecutive_skips"]
    if "were skipped" in why and any(limit.now > limit.was for limit in limits):
        return None
    log(f"{folder.path} failed before, and is not trained on; only jaxmp train goes on with it")
    return why


def require_all_steps(fitted: Fitted) -> None:
    """Raises InputError if a hook ended a run early: the others of its study have all their steps."""
    if because := fitted.summary.get("stopped_because"):
        raise InputError(
            f"{fitted.path}: a hook ended this run early, after step {fitted.summary['steps']}: {because}. It "
            "cannot stand beside runs of all steps; begin it anew with jaxmp train --overwrite, without the "
            "hook, delete its folder, or choose another --workdir"
        )
