"""Times a train step under each recipe beside the same step in float32, on a CPU, where formats are emulated.

    python experiments/benchmarks/run.py recipe_time

Times are those of the fastest round, on the clock. All steps of a config run in one process, in rounds of alternating
order, each several times in a row, and once before that is not timed: none follows a larger one. `what-if`
is the time in which all recipes are measured in one pass (`jaxmp what-if`), by the number of recipes: a forward and a
backward pass and the exact products are shared. `--alone` also times passes that measure one recipe, as multiples of a
step. Beside the times stands the load of the machine, in the last minute, at their end.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from interleaved import Run, interleave

from jaxmp.cli import script
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.settings import Parallel
from jaxmp.instruments.what_if import make_what_if, recipe_of
from jaxmp.precision.recipe import RECIPES
from jaxmp.runs.provenance import provenance
from jaxmp.runs.trainer import Trainer

CONFIGS = {
    "digits_mlp": (),
    "digits_cnn": (),
    "cifar10_cnn": (),
    "shakespeare_gpt": ("--model.layers", "1"),
}
"""configs, each with options that make compiling it affordable: all layers of a GPT take the same time"""


def trainer_of(config: str, precision: str, options: tuple[str, ...]) -> Trainer:
    """The config under a precision, on one device."""
    experiment = ConfigFile.find(config).experiment(["--precision", precision, *options])
    return Trainer(dataclasses.replace(experiment, parallel=Parallel("jit")))


def fastest(programs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of a call of each program in the fastest of its rounds."""

    def calls(program: Callable[[], Any]) -> Run:
        def run(count: int) -> float:
            jax.block_until_ready(program())
            began = time.perf_counter()
            for _ in range(count):
                jax.block_until_ready(program())
            return (time.perf_counter() - began) / count

        return run

    runs = {name: calls(program) for name, program in programs.items()}
    return {name: min(each) for name, each in interleave(runs, rounds=rounds, seconds=0.03).items()}


def of_config(config: str, recipes: tuple[str, ...], alone: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """The times of one config, and their ratios to float32's."""
    programs: dict[str, Callable[[], Any]] = {}
    for precision in ("float32", *recipes):
        trainer = trainer_of(config, precision, CONFIGS[config])
        state, batch = trainer.init(), trainer.feed(fuse=False).batch(0)
        step = jax.jit(trainer.train_step)
        programs[precision] = lambda step=step, state=state, batch=batch: step(state, batch)
    trainer = trainer_of(config, "float32", CONFIGS[config])
    state, batch = trainer.init(), trainer.feed(fuse=False).batch(0)
    arguments = state.params, state.model_state, jnp.float32(1), batch, state.key
    for name, measured in {"what-if, all recipes": recipes, **{f"what-if, {each}": (each,) for each in alone}}.items():
        named = {each: recipe_of(each) for each in measured}
        measure = jax.jit(make_what_if(trainer.replayed[None].loss_fn, named))
        programs[name] = lambda measure=measure: measure(*arguments)
    seconds = fastest(programs, rounds)
    ratios = {name: seconds[name] / seconds["float32"] for name in recipes}
    ratios["what-if, each recipe"] = seconds["what-if, all recipes"] / seconds["float32"] / len(recipes)
    ratios |= {name: seconds[name] / seconds["float32"] for name in (f"what-if, {each}" for each in alone)}
    found = {"config": config, "options": list(CONFIGS[config]), "load": round(os.getloadavg()[0], 1)}
    return {**found, "seconds": seconds, "steps in float32": ratios}


def main(
    configs: tuple[str, ...] = tuple(CONFIGS),
    recipes: tuple[str, ...] = tuple(RECIPES),
    alone: tuple[str, ...] = (),
    rounds: int = 9,
    output: Path | None = None,
) -> None:
    """Prints the ratios, and writes them after each config.

    Args:
      configs: of `CONFIGS`.
      recipes: the recipes to time.
      alone: recipes that `what-if` also measures one by one.
      rounds: number of timed runs of each step.
      output: file for the results, as JSON.
    """
    rows = []
    for config in configs:
        rows.append(of_config(config, recipes, alone, rounds))
        print(config, {name: round(each, 2) for name, each in rows[-1]["steps in float32"].items()}, flush=True)
        if output is not None:
            how = f"python experiments/benchmarks/recipe_time.py --configs {' '.join(configs)}"
            how += f" --rounds {rounds}" + (f" --alone {' '.join(alone)}" if alone else "") + f" --output {output}"
            content = {**provenance(patch=False), "command": how, "rounds": rounds, "rows": rows}
            output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
