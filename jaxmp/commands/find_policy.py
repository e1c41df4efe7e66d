"""`jaxmp find-policy CONFIG`: the modules that can compute in half precision."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxmp.commands.command import ConfigCommand, require_path
from jaxmp.errors import DONE
from jaxmp.experiment.config_file import ConfigFile

if TYPE_CHECKING:
    from jaxmp.experiment.experiment import Experiment


@dataclass(frozen=True)
class Options:
    """The options of `jaxmp find-policy`."""

    budget: float = 0.1
    """Largest error that the gradient of any parameter may have, as a multiple of --unit."""
    unit: Literal["noise", "gradient", "float32"] = "noise"
    """Unit of that error: the gradient's spread over batches, the gradient's norm, or the error in float32."""
    half: str = "mixed_float16"
    """Policy of the modules in half precision: mixed_float16, mixed_bfloat16, or a recipe such as nvfp4."""
    batches: int = 4
    """Number of training batches to take gradients on, at each state."""
    warmup_steps: int = 100
    """Gradients are taken at the fresh weights, and again after training them for so many steps in float32."""
    run: str | None = None
    """Folder of a run of the same model: take gradients at the weights of its checkpoints instead."""
    loss_scale: float | None = None
    """Loss scale, a power of two; by default the scaler's initial one."""
    objective: str | None = None
    """Which of the task's several objectives; its gradient is judged."""
    json: str | None = None
    """File to which the measured errors are written, as JSON."""


def find_policy(config: ConfigFile, options: Options, experiment: Experiment, overrides: list[str]) -> int:
    """Finds the modules of a config's model that can compute in half precision.

    Each is judged by the error that half precision makes in the gradients.
    """
    require_path(run=options.run, json=options.json)
    from jaxmp.studies import cheapest_policy as study

    chosen = dataclasses.asdict(options)
    file = chosen.pop("json")
    found = study.find_policy_of(experiment, **chosen)
    print(f"\n{found}")
    if file is not None:
        study.save(found, config.name, Path(file).expanduser())
    return DONE


COMMAND = ConfigCommand("find-policy", Options, find_policy)
