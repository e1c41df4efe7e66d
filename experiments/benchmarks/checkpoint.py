"""Measures what a checkpoint costs: how long a save blocks training, and GB/s, beside plain Orbax on the same tree.

    python experiments/benchmarks/run.py checkpoint

Both save in the background by Orbax's AsyncCheckpointer, to a folder in $TMPDIR. "blocks" is the time until the call
returns, "whole" until all is on disk; jaxmp also makes a manifest with a CRC-32 of each file, inside its "whole".
Restoring reads it back, jaxmp's with the sums compared.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from interleaved import load

from jaxmp.cli import script
from jaxmp.runs.checkpoint import Checkpoints
from jaxmp.runs.provenance import provenance

MB = 10**6


def tree(megabytes: int) -> dict[str, jax.Array]:
    """Returns float32 arrays of so many MB together: random bits, of 16 leaves."""
    rng, each = np.random.default_rng(0), megabytes * MB // 4 // 16
    return {f"leaf_{i}": jnp.asarray(rng.random(each, np.float32)) for i in range(16)}


def saving_by_jaxmp(folder: Path, arrays: Any) -> tuple[Callable[[int], None], Callable[[], None], Callable[[], Any]]:
    """Returns `save(step)`, `wait()` and `restore()`."""
    checkpoints = Checkpoints(folder, keep=1)

    def restore() -> Any:
        return checkpoints.restore(arrays)

    return lambda step: checkpoints.save(step, arrays), checkpoints.wait, restore


def saving_by_orbax(folder: Path, arrays: Any) -> tuple[Callable[[int], None], Callable[[], None], Callable[[], Any]]:
    """Returns the same of plain Orbax."""
    checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
    saved: list[Path] = []

    def save(step: int) -> None:
        saved.append(folder / str(step))
        checkpointer.save(saved[-1], args=ocp.args.PyTreeSave(arrays))

    def wait() -> None:
        checkpointer.wait_until_finished()
        for path in saved[:-1]:
            shutil.rmtree(path, ignore_errors=True)

    def restore() -> Any:
        how = ocp.checkpoint_utils.construct_restore_args(arrays)
        return checkpointer.restore(saved[-1], args=ocp.args.PyTreeRestore(arrays, restore_args=how))

    return save, wait, restore


def measure(megabytes: int, rounds: int) -> dict[str, Any]:
    """Returns the seconds of both, fastest and median, and GB/s of the fastest."""
    arrays = tree(megabytes)
    times: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        makers = {"jaxmp": saving_by_jaxmp, "Orbax": saving_by_orbax}
        both = {name: make(Path(scratch) / name, arrays) for name, make in makers.items()}
        for name in both:
            (Path(scratch) / name).mkdir(exist_ok=True)
        for turn in range(rounds + 1):
            for name in list(both) if turn % 2 else reversed(list(both)):
                save, wait, restore = both[name]
                began = time.perf_counter()
                save(turn)
                blocked = time.perf_counter() - began
                wait()
                whole = time.perf_counter() - began
                began = time.perf_counter()
                jax.block_until_ready(restore())
                restored = time.perf_counter() - began
                if turn:
                    for kind, seconds in (("blocks", blocked), ("whole", whole), ("restore", restored)):
                        times.setdefault(kind, {}).setdefault(name, []).append(seconds)
    result: dict[str, Any] = {"load": load()}
    for kind, of in times.items():
        result[kind] = {
            name: {"min": min(each), "median": statistics.median(each), "GB_per_second": megabytes / 1000 / min(each)}
            for name, each in of.items()
        }
        result[kind]["ratio"] = min(of["jaxmp"]) / min(of["Orbax"])
        result[kind]["median_ratio"] = statistics.median(a / b for a, b in zip(of["jaxmp"], of["Orbax"], strict=True))
    return result


def main(
    output: Path | None = None, megabytes: tuple[int, ...] = (100, 2000), rounds: int = 7, quick: bool = False
) -> None:
    """Measures, prints, and writes the results as JSON.

    Args:
        output: JSON file to write; none by default. What it has already is not measured again.
        megabytes: Sizes of the tree.
        rounds: Number of saves of each.
        quick: 1 MB, saved once, to see that everything works.
    """
    kept = json.loads(output.read_text()) if output is not None and output.exists() else {}
    results: dict[str, Any] = kept.get("results", {})
    for size in (1,) if quick else megabytes:
        if str(size) in results:
            continue
        results[str(size)] = measure(size, 1 if quick else rounds)
        print(size, "MB", json.dumps(results[str(size)]), flush=True)
        if output is not None:
            made = provenance(patch=False) | {"rounds": rounds, "results": results}
            output.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
