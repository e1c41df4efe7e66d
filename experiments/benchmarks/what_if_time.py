"""Times `jaxmp what-if` beside a train step: how many steps' time the measuring of each recipe takes.

    python experiments/benchmarks/what_if_time.py --output experiments/benchmarks/what_if_time_cpu.json

Both are jitted, and run alternately on the same state and batch; the times are medians. The measuring includes a
forward and a backward pass of its own.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.settings import Parallel
from jaxmp.instruments.what_if import make_what_if, recipe_of
from jaxmp.runs.provenance import provenance
from jaxmp.runs.trainer import Trainer


def main(
    config: str = "digits_cnn",
    precision: str = "float32",
    recipes: tuple[str, ...] = ("mxfp8", "nvfp4"),
    repeats: int = 30,
    output: Path | None = None,
) -> None:
    """Prints the time of a step, and that of measuring each recipe by itself as a multiple of it.

    Args:
      config: whose step is timed.
      precision: of the step.
      recipes: measured one by one.
      repeats: number of times that each is run.
      output: file for the results, as JSON.
    """
    experiment = ConfigFile.find(config).experiment(["--precision", precision])
    trainer = Trainer(dataclasses.replace(experiment, parallel=Parallel("jit")))
    state, batch = trainer.init(), trainer.feed(fuse=False).batch(0)
    arguments = state.params, state.model_state, jnp.float32(1), batch, state.key
    programs: dict[str, tuple[Any, tuple[Any, ...]]] = {"step": (jax.jit(trainer.train_step), (state, batch))}
    for recipe in recipes:
        measure = make_what_if(trainer.replayed[None].loss_fn, {recipe: recipe_of(recipe)})
        programs[recipe] = jax.jit(measure), arguments
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeats + 1):
        for name, (program, given) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*given))
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    steps = {name: medians[name] / medians["step"] for name in recipes}
    print({name: round(1000 * each, 2) for name, each in medians.items()}, "ms;", steps, "steps")
    if output is not None:
        how = f"python experiments/benchmarks/what_if_time.py --config {config} --output {output}"
        content = {**provenance(patch=False), "command": how, "seconds": medians, "steps": steps}
        output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
