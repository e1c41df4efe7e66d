"""Trains on a streamed set of 4 GiB, and measures the largest resident memory of the process.

    python experiments/benchmarks/run.py streamed_memory

The set is made-up rows of 4,096 bytes and labels, in .npy files; a step sees rows from all over the file. What is
measured is the memory of the process: "resident", all of it, and "anonymous", without mapped files such as libraries.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmp import Adam, Classification, Experiment, Loop, fit
from jaxmp.cli import script
from jaxmp.data.table_files import TableFiles
from jaxmp.models.mlp import MLP
from jaxmp.runs.provenance import provenance

ROW = 4096
MIB = 2**20


def write_set(folder: Path, size: int) -> None:
    """Writes `size` MiB of random bytes as rows, and a label for each."""
    rows = size * MIB // ROW
    rng = np.random.default_rng(0)
    x = np.lib.format.open_memmap(folder / "x.npy", mode="w+", dtype=np.uint8, shape=(rows, ROW))
    for start in range(0, rows, MIB // 64):
        part = x[start : start + MIB // 64]
        part[...] = np.frombuffer(rng.bytes(part.size), np.uint8).reshape(part.shape)
    x.flush()
    np.save(folder / "label.npy", rng.integers(0, 10, rows).astype(np.int32))


def memory() -> dict[str, float]:
    """MiB of the process: `resident` and `anonymous`."""
    text = Path("/proc/self/status").read_text()
    names = {"resident": "VmRSS", "anonymous": "RssAnon"}
    return {name: int(re.search(rf"{key}:\s+(\d+)", text)[1]) / 1024 for name, key in names.items()}  # type: ignore[index]


def as_floats(key: Any, row: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Bytes to floats from -1 to 1, on the device."""
    return {**row, "x": row["x"].astype(jax.numpy.float32) / 127.5 - 1}


def main(output: Path | None = None, size: int = 4096, steps: int = 1024, batch_size: int = 1024) -> None:
    """Writes the set to a temporary folder, trains on it, prints and writes what was measured.

    Args:
        output: JSON file to write; none by default.
        size: Size of the set in MiB.
        steps: Steps to train; 1,024 steps of 1,024 rows are one pass over 4 GiB.
        batch_size: Rows in a batch.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "set").mkdir()
        write_set(Path(folder) / "set", size)
        data = TableFiles(
            train=str(Path(folder) / "set"), batch_size=batch_size, images=(), transforms=(as_floats,), device_limit=64
        )
        experiment = Experiment(
            model=MLP(features=(64,), classes=10),
            data=data,
            task=Classification(inputs=("x",)),
            optimizer=Adam(1e-3),
            precision="mixed_bfloat16",
            loop=Loop(steps=steps, log_every=128),
        )
        largest = {"resident": 0.0, "anonymous": 0.0}
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.05):
                now = memory()
                for name in largest:
                    largest[name] = max(largest[name], now[name])

        watcher = threading.Thread(target=watch)
        watcher.start()
        began = time.perf_counter(), time.process_time()
        try:
            run = fit(experiment, workdir=folder)
        finally:
            done.set()
            watcher.join()
        wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    result = {
        "set_mib": size,
        "steps": steps,
        "batch": batch_size,
        "largest_mib": {name: round(value) for name, value in largest.items()},
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "applied_steps": run.summary["applied_steps"],
    }
    print(json.dumps(result, indent=2))
    if output is not None:
        output.write_text(json.dumps(provenance(patch=False) | {"result": result}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
