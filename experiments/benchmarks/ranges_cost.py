"""Measures the cost of `--loop.ranges-every 100`, which records value ranges of one step in a hundred.

    python experiments/benchmarks/run.py ranges_cost

Alternates in one process between some training steps, dispatched as in training, and one look. A look is everything
that `--loop.ranges-every` adds to a step: forward and backward pass of the batch again, with counting; fetching the
counts; and writing metrics.jsonl and TensorBoard events. The reported share is the time of a look divided by the time
of 100 steps, each from its fastest round, once in wall time and once in processor time of all threads. (In training,
fetching and writing overlap with the computation of the device.)
"""

from __future__ import annotations

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
from jaxmp.runs.provenance import provenance
from jaxmp.runs.trainer import Trainer
from jaxmp.runs.writers import JsonLines, TensorBoard

EVERY, STEPS = 100, 10


def measure(config: str, rounds: int) -> dict[str, Any]:
    """Returns milliseconds per step and per look, and the time of a look as a share of the steps."""
    trainer = Trainer(ConfigFile.find(config).experiment())
    devices, fuse = trainer.devices, trainer.fuse_steps
    feed = trainer.feed(fuse=fuse)
    folder = Path(tempfile.mkdtemp())
    writers = [JsonLines(folder / "metrics.jsonl"), TensorBoard(folder)]
    carry: Any = devices.put(trainer.init()), devices.put(trainer.no_metrics)
    step = 0

    def steps() -> None:
        nonlocal carry, step
        carry = feed.run(*carry, step, STEPS)  # all of one epoch: its data are what matters, not their order
        jax.block_until_ready(carry)

    def look() -> None:
        seen = trainer.step_ranges()(devices.get(carry[0]), devices.shard_rows(feed.batch(step))).read()
        for writer in writers:
            writer.write({"step": step, "split": "ranges", "ranges": seen})

    def timed(function: Callable[[], None]) -> tuple[float, float]:
        began = time.perf_counter(), time.process_time()
        function()
        return time.perf_counter() - began[0], time.process_time() - began[1]

    found: dict[str, list[tuple[float, float]]] = {"steps": [], "look": []}
    for done in range(rounds + 1):
        for name, function in (("steps", steps), ("look", look)):
            seconds = timed(function)
            if done:  # the first round compiles
                found[name].append(seconds)
    results: dict[str, Any] = {"steps_in_one_dispatch": fuse}
    for i, clock in enumerate(("wall", "processor")):
        one = min(seconds[i] for seconds in found["steps"]) / STEPS
        other = min(seconds[i] for seconds in found["look"])
        results[clock] = {"step_ms": 1e3 * one, "look_ms": 1e3 * other, "share": other / (EVERY * one)}
    return results


CONFIGS = ("digits_mlp", "digits_cnn", "mnist_mlp", "mnist_cnn", "cifar10_cnn")


def main(configs: tuple[str, ...] = CONFIGS, rounds: int = 15, output: Path | None = None) -> None:
    """Measures and prints.

    Args:
        configs: Names of configs.
        rounds: How often steps and look are measured, alternately.
        output: JSON file to write; none by default.
    """
    results = {}
    for config in configs:
        results[config] = measure(config, rounds)
        print(config, json.dumps(results[config]), flush=True)
    if output is not None:
        origin = provenance(patch=False)
        output.write_text(json.dumps(origin | {"every": EVERY, "rounds": rounds, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
