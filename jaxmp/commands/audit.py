"""`jaxmp audit CONFIG`: the dtypes of a train step."""

from __future__ import annotations

import dataclasses
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

    from jaxmp.instruments import audit as instrument
    from jaxmp.instruments.target import Target
    from jaxmp.reports.page import write
    from jaxmp.runs.trainer import Training

    target = None if options.target is None else Target.parse(options.target)
    # Otherwise JAX does not load its CUDA build where there is no GPU.
    if target is not None and not jax.config.jax_platforms:  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")
    # pmap runs the same step, which wants its arrays stacked.
    experiment = dataclasses.replace(experiment, parallel=dataclasses.replace(experiment.parallel, mode="jit"))
    training = Training(experiment, None if target is None else target.mesh())
    step = training.devices.compile(training.train_step, (0, 0))
    policy, modules = experiment.policy, training.explain()
    report = instrument.audit(step, *training.arguments, policy=policy, modules=modules, target=target)
    print(report)
    if options.json is not None:
        write(Path(options.json), json.dumps(report.to_json(), indent=1) + "\n")
    return FAILED if options.strict and report.findings else DONE


COMMAND = ConfigCommand("audit", Options, audit)
