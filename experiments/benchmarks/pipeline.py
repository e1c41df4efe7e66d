"""Measures examples a second of shuffled batches: jaxmp beside tfds.data_source, plain Grain and torch's DataLoader.

    python experiments/benchmarks/run.py pipeline

All read the same made-up images, uint8 (28, 28, 1), in batches of 128 in a new order, to float32 from 0 to 1 on the
device. "resident": jaxmp keeps them on the device, and its feed takes the rows there, dispatching each batch singly to
a step that only keeps it. "streamed": all read from memory or from files in this process, without workers.
`tfds.data_source` reads a TFDS dataset prepared in $JAXMP_DATA (MNIST) without TensorFlow, decoding a PNG for each
example; jaxmp's TFDS decodes once and keeps arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from interleaved import load

from jaxmp import TFDS, Arrays, InputError, Parallel, TrainState
from jaxmp.cli import script
from jaxmp.data.pipeline import Batches, stream
from jaxmp.data.table_files import TableFiles
from jaxmp.runs.provenance import provenance
from jaxmp.training.feed import HIDDEN_METRICS, Resident
from jaxmp.training.metrics import Mean, Metrics

BATCH = 128
IMAGE = (28, 28, 1)

Reader = Callable[[], Iterator[Any]]
"""begins an endless iteration over batches"""


@jax.jit
def scaled(image: Any) -> jax.Array:
    """Bytes to floats, on the device."""
    return image.astype(jnp.float32) / 255


def rows_of(count: int) -> dict[str, np.ndarray]:
    """Returns made-up images and labels."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (count, *IMAGE), np.uint8),
        "label": rng.integers(0, 10, count).astype(np.int32),
    }


def of_jaxmp_resident(rows: dict[str, np.ndarray]) -> Iterator[Any]:
    """jaxmp's feed of data on the device, with a step that keeps its batch in the state: each lasts until the next."""
    data = Arrays(lambda split: rows if split == "train" else None, batch_size=BATCH)
    source: Any = data.read("train")
    batches, devices = Batches(len(source), BATCH, seed=0), Parallel().make(BATCH, devices=jax.devices()[:1])

    def keep(state: TrainState, batch: Any, numbers: Any = None) -> Any:
        nothing = {"loss": Mean(jnp.float32(0), jnp.float32(1))}
        return dataclasses.replace(state, step=state.step + 1, model_state=batch), nothing

    feed = Resident(keep, data, source, batches, devices, fuse=False, skip_limit=1)
    state = TrainState.create({}, optax.identity(), key=jax.random.key(0), model_state=feed.batch(0))
    metrics: Metrics = {name: Mean(jnp.float32(0), jnp.float32(0)) for name in ("loss", *HIDDEN_METRICS)}
    state, metrics = devices.put_state(state), devices.put(metrics)
    for step in itertools.count():
        state, metrics = feed.run(state, metrics, step, 1)
        yield state.model_state


def of_jaxmp_streamed(source: Any) -> Iterator[Any]:
    """jaxmp: batches read ahead from a source."""
    for batch in stream(source, Batches(len(source), BATCH, seed=0), 0, 10**9):
        yield {**batch, "image": scaled(batch["image"])}


def of_grain(rows: dict[str, np.ndarray]) -> Iterator[Any]:
    """Grain as in its tutorial: a MapDataset of single rows, shuffled, batched, read ahead by threads."""
    import grain

    count = len(rows["label"])
    data = grain.MapDataset.range(count).shuffle(seed=0).repeat()
    data = data.map(lambda i: {name: column[i] for name, column in rows.items()}).batch(BATCH)
    for batch in data.to_iter_dataset():
        yield {**batch, "image": scaled(batch["image"])}


def of_torch(rows: dict[str, np.ndarray]) -> Iterator[Any]:
    """torch's DataLoader over a TensorDataset."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(*(torch.from_numpy(rows[name]) for name in ("image", "label")))
    while True:
        for image, label in DataLoader(data, BATCH, shuffle=True, drop_last=True):
            yield {"image": image.float() / 255, "label": label}


def of_tfds(folder: str) -> Iterator[Any]:
    """TFDS's data source of MNIST, its examples decoded one by one, in a shuffled order."""
    import tensorflow_datasets as tfds

    source, rng = tfds.data_source("mnist", split="train", data_dir=folder, download=False), np.random.default_rng(0)
    while True:
        for index in rng.permutation(len(source))[: len(source) // BATCH * BATCH].reshape(-1, BATCH):
            examples = [source[int(i)] for i in index]
            image = np.stack([each["image"] for each in examples])
            yield {"image": scaled(image), "label": np.array([each["label"] for each in examples])}


def readers(rows: dict[str, np.ndarray], folder: Path) -> dict[str, dict[str, Reader]]:
    """Returns what is compared, by kind and name; what is not installed or not there is left out."""
    (folder / "rows").mkdir()
    for name, column in rows.items():
        np.save(folder / "rows" / f"{name}.npy", column)
    files = TableFiles(train=str(folder / "rows"), batch_size=BATCH).read("train")
    in_memory: dict[str, Reader] = {
        "jaxmp, resident": functools.partial(of_jaxmp_resident, rows),
        "Grain": functools.partial(of_grain, rows),
    }
    if importlib.util.find_spec("torch"):
        in_memory["torch DataLoader"] = functools.partial(of_torch, rows)
    found = {"arrays in memory": in_memory}
    found["npy files"] = {"jaxmp, streamed": functools.partial(of_jaxmp_streamed, files)}
    data = os.environ.get("JAXMP_DATA")
    try:
        if data is not None:
            source = TFDS(name="mnist", batch_size=BATCH).read("train")
            found["MNIST of TFDS"] = {
                "jaxmp, streamed": functools.partial(of_jaxmp_streamed, source),
                "tfds.data_source": functools.partial(of_tfds, data),
            }
    except InputError as error:
        print(f"left out: MNIST of TFDS, {error}")
    return found


def measure(rows: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Returns examples a second of wall and of processor time, in the fastest of interleaved rounds."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind, of in readers(rows_of(rows), Path(scratch)).items():
            running = {name: begin() for name, begin in of.items()}
            best = {name: [0.0, 0.0] for name in running}
            for turn in range(rounds + 1):
                for name, reader in running.items():
                    began, cpu, count = time.perf_counter(), time.process_time(), 0
                    while time.perf_counter() - began < seconds:
                        batch = next(reader)
                        count += BATCH
                    jax.block_until_ready(batch["image"])
                    if turn:
                        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
                        best[name] = [max(best[name][0], count / wall), max(best[name][1], count / max(cpu, 1e-9))]
            for reader in running.values():
                reader.close()  # type: ignore[attr-defined]
            results[kind] = {
                name: {"examples_per_second": wall, "examples_per_processor_second": cpu}
                for name, (wall, cpu) in best.items()
            }
    return results


def main(
    output: Path | None = None, rows: int = 50_000, rounds: int = 7, seconds: float = 0.5, quick: bool = False
) -> None:
    """Measures, prints, and writes the results as JSON.

    Args:
        output: JSON file to write; none by default.
        rows: Number of made-up images.
        rounds: Number of rounds.
        seconds: Seconds of each in a round.
        quick: One short round, to see that everything works.
    """
    results = measure(2000, 1, 0.02) if quick else measure(rows, rounds, seconds)
    print(json.dumps(results, indent=1))
    if output is not None:
        how = {"rounds": 1 if quick else rounds, "load": load(), "results": results}
        output.write_text(json.dumps(provenance(patch=False) | how, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
