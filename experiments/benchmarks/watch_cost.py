"""Measures what hooks and logging cost beside a step of 2 to 3 ms, switched off and on.

    python experiments/benchmarks/run.py watch_cost

Switched off: the call that `fit` makes after each dispatch where it has no hook. (A step that watches nothing is the
program that it was before there was `--loop.watch`, which tests/training/test_step.py holds: that costs nothing.)
Switched on: the call of a hook that does nothing; a line of metrics.jsonl and TensorBoard, divided by the 50 steps
between two; and the step that measures all of `--loop.watch`, alternating with the plain one in one process. Each is
the fastest of all rounds, in processor time of all threads, and as a share of the plain step.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxmp.cli import script
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.runs.hooks import Hooks, StepInfo
from jaxmp.runs.provenance import provenance
from jaxmp.runs.trainer import Trainer
from jaxmp.runs.writers import JsonLines, TensorBoard
from jaxmp.training.metrics import WATCHABLE
from jaxmp.training.state import TrainState

STEPS, CALLS, LINES, LOG_EVERY = 20, 1000, 50, 50


def dispatching(trainer: Trainer) -> Callable[[], None]:
    """A function that makes `STEPS` steps as training dispatches them."""
    feed, devices = trainer.feed(fuse=trainer.fuse_steps), trainer.devices
    carry: Any = devices.put(trainer.init()), devices.put(trainer.no_metrics)

    def steps() -> None:
        nonlocal carry
        for first in range(STEPS):
            carry = feed.run(*carry, first, 1)
        jax.block_until_ready(carry)

    return steps


def calling(hooks: Hooks, state: TrainState) -> Callable[[], None]:
    """A function that calls hooks as `fit` does after `CALLS` dispatches."""
    info = StepInfo(1, state, {})

    def calls() -> None:
        for _ in range(CALLS):
            hooks.call(info)

    return calls


def writing(metrics: dict[str, float]) -> Callable[[], None]:
    """A function that writes `LINES` records of the given metrics."""
    folder = Path(tempfile.mkdtemp())
    writers = [JsonLines(folder / "metrics.jsonl"), TensorBoard(folder)]
    record = {"step": 1, "applied_steps": 1, "epoch": 0.1, "split": "train", "loss_scale": 1.0, "skipped_steps": 0}

    def lines() -> None:
        for _ in range(LINES):
            for writer in writers:
                writer.write(record | metrics)

    return lines


def measure(config: str, rounds: int) -> dict[str, Any]:
    """Returns microseconds a step of each, and their share of the plain step."""
    plain = ConfigFile.find(config).experiment()
    watched = dataclasses.replace(plain, loop=dataclasses.replace(plain.loop, watch=WATCHABLE))
    state = Trainer(plain).init()
    functions: dict[str, tuple[Callable[[], None], float]] = {  # by the steps that each call of it stands for
        "step": (dispatching(Trainer(plain)), STEPS),
        "step that watches": (dispatching(Trainer(watched)), STEPS),
        "no hook": (calling(Hooks(), state), CALLS),
        "an empty hook": (calling(Hooks((lambda info: None,)), state), CALLS),
        "a line each 50 steps": (writing(dict.fromkeys(("loss", "accuracy", *WATCHABLE), 0.5)), LINES * LOG_EVERY),
    }
    best = dict.fromkeys(functions, float("inf"))
    for done in range(rounds + 1):
        for name, (function, steps) in functions.items():
            began = time.process_time()
            function()
            if done:  # the first round compiles
                best[name] = min(best[name], 1e6 * (time.process_time() - began) / steps)
    added = {name: us - best["step"] if name == "step that watches" else us for name, us in best.items()}
    return {
        "step_us": best.pop("step"),
        "added_us": {name: added[name] for name in best},
        "share": {name: added[name] / added["step"] for name in best},
    }


def main(config: str = "digits_cnn", rounds: int = 15, output: Path | None = None) -> None:
    """Measures and prints.

    Args:
        config: Name of a config.
        rounds: How often each is measured, alternately.
        output: JSON file to write; none by default.
    """
    results = measure(config, rounds)
    print(config, json.dumps(results), flush=True)
    if output is not None:
        origin = provenance(patch=False)
        output.write_text(
            json.dumps(origin | {"config": config, "rounds": rounds, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    sys.exit(script(main))
