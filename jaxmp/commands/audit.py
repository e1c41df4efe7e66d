"""`jaxmp audit CONFIG`: the dtypes of a train step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxmp.commands.command import ConfigCommand, require_path
from jaxmp.errors import DONE, FAILED
from jaxmp.experiment.config_file import ConfigFile

if TYPE_CHECKING:
    from jaxmp.experiment.experiment import Experiment


@dataclass(frozen=True)
class Options:
    """The options of `jaxmp audit`."""

    strict: bool = False
    """Exit with code 1 if the audit finds a problem."""
    json: str | None = None
    """File to which the audit is also written, as JSON."""
    target: str | None = None
    """Also compile the step for these GPUs: h100, or h100x8 for eight. Needs JAX with CUDA, but no GPU."""


def audit(config: ConfigFile, options: Options, experiment: Experiment, overrides: list[str]) -> int:
    """Shows the dtypes in which a config's train step computes, and the problems in them.

    The step is traced, and compiled for --target, but not run.
    """
    require_path(json=options.json)
    import jax

    from jaxmp.instruments.target import Target
    from jaxmp.reports.page import write
    from jaxmp.studies.audit import audit as study

    target = None if options.target is None else Target.parse(options.target)
    # Otherwise JAX does not load its CUDA build where there is no GPU.
    if target is not None and not jax.config.jax_platforms:  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")
    report = study(experiment, target=target)
    print(report)
    if options.json is not None:
        write(Path(options.json).expanduser(), json.dumps(report.to_json(), indent=1) + "\n")
    return FAILED if options.strict and report.findings else DONE


COMMAND = ConfigCommand("audit", Options, audit)
