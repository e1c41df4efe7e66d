"""What it costs to look at the ranges of one step in a hundred.

    python experiments/benchmarks/ranges_cost.py --output experiments/benchmarks/ranges_cost_cpu.json

Rounds of 100 steps with a look and without, in turns, in one process, each step dispatched as training dispatches it.
A look is all that `--loop.ranges-every 100` adds: the batch again, forward and backward with counting, fetching,
metrics.jsonl and TensorBoard. What counts is the ratio of the fastest rounds, and the median of the ratios round by
round; both are noisy where the machine is busy, as is the time of one look by itself beside that of one step.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import tyro

from jaxmp.config_file import ConfigFile
from jaxmp.instruments.ranges import Looked
from jaxmp.training.build import Training
from jaxmp.training.provenance import provenance
from jaxmp.training.writers import JsonLines, TensorBoard

EVERY = 100


def measure(config: str, rounds: int) -> dict[str, Any]:
    """Seconds of `EVERY` steps with and without a look at the first of them, and of one look alone."""
    training = Training(ConfigFile.find(config).experiment())
    devices, many = training.devices, training.many_steps_pay
    feed = training.feed(many=many)
    folder = Path(tempfile.mkdtemp())
    writers = [JsonLines(folder / "metrics.jsonl"), TensorBoard(folder)]
    carry: Any = devices.put(training.init()), devices.put(training.no_metrics)
    step = 0

    def write(looked: Looked) -> None:
        record = {"step": step, "split": "ranges", "ranges": looked.read()}
        for writer in writers:
            writer.write(record)

    def run(look: bool) -> float:
        nonlocal carry, step
        began, end = time.perf_counter(), step + EVERY
        looked = training.look(devices.get(carry[0]), feed.batch(step)) if look else None
        while step < end:
            stop = min(end, step - step % training.batches.per_epoch + training.batches.per_epoch)
            carry = feed.run(*carry, step, stop - step)
            step = stop
        if looked is not None:
            write(looked)
        jax.block_until_ready(carry)
        return time.perf_counter() - began

    def look_alone() -> float:
        began = time.perf_counter()
        write(training.look(devices.get(carry[0]), feed.batch(step)))
        return time.perf_counter() - began

    functions: dict[str, Callable[[], float]] = {
        "without": lambda: run(False),
        "with": lambda: run(True),
        "look": look_alone,
    }
    for function in functions.values():  # compile
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(function())
    ratios = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    shares = [a / b for a, b in zip(seconds["look"], seconds["without"], strict=True)]
    return {
        "steps_in_one_dispatch": many,
        "milliseconds": {name: 1e3 * min(values) for name, values in seconds.items()},
        "ratio_of_fastest": min(seconds["with"]) / min(seconds["without"]),
        "median_ratio": statistics.median(ratios),
        "look_by_itself": {
            "of_fastest": min(seconds["look"]) / min(seconds["without"]),
            "median": statistics.median(shares),
        },
    }


def main(configs: tuple[str, ...] = ("digits_mlp", "digits_cnn"), rounds: int = 9, output: Path | None = None) -> None:
    """Measures and prints.

    Args:
        configs: Names of configs.
        rounds: How often each is measured, in turns.
        output: JSON file to write; none by default.
    """
    results = {}
    for config in configs:
        results[config] = measure(config, rounds)
        print(config, json.dumps(results[config], indent=1))
    if output is not None:
        origin = provenance()
        git = origin.pop("git")
        origin["git"] = git and {"revision": git["revision"], "dirty": bool(git["patch"])}
        output.write_text(json.dumps(origin | {"every": EVERY, "rounds": rounds, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
