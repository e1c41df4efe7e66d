"""Measures what the data pipelines of shipped configs cost: examples a second, and their share of a train step.

    python experiments/benchmarks/run.py pipelines

A pipeline is all that happens between the rows and the step: taking the rows of a batch, and scaling, augmenting or
features on the device; of streamed data reading the files as well. The share is the pipeline's time by the sum of its
time and the step's, both on the same machine. Times are CPU time of the process, the least of several rounds, so that
other load on the machine changes them little; examples a second are for one CPU core. What both pay, a call of the
device, is part of both, and gone where many steps run in one dispatch.

Configs that are made for accelerators are not among them, nor mnist_distilled, whose teacher is a run. Data come from
$JAXMP_DATA and jaxmp's cache; a config whose data are not there is left out. `image files` reads made-up JPEG files of
256x256 pixels, and `npy files` rows of floats; they belong to no config, and have no share.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from jaxmp import Experiment, InputError
from jaxmp.cli import script
from jaxmp.data.image_folder import ImageFolder
from jaxmp.data.pipeline import Batches, prepared_ahead, resident, stream
from jaxmp.data.table_files import TableFiles
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.runs.provenance import provenance
from jaxmp.runs.trainer import Trainer

CONFIGS = (
    "digits_mlp",
    "digits_cnn",
    "mnist_mlp",
    "mnist_cnn",
    "mnist_simple_rnn",
    "mnist_vae",
    "cifar10_cnn",
    "cifar10_resnet20",
    "spoken_digits_lstm",
    "spoken_digits_rnn",
    "spoken_digits_ctc",
    "shakespeare_gpt",
    "sst2_lstm",
    "sst2_bert_tiny",
    "mnist_dcgan",
    "mnist_dpsgd",
    "permuted_mnist",
)


def least_cpu_seconds(run: Callable[[], Any], rounds: int, seconds: float) -> float:
    """CPU seconds of the process that a call of `run` takes, the least of `rounds` rounds of `seconds` each."""
    jax.block_until_ready(run())
    began = time.process_time()
    jax.block_until_ready(run())
    count = max(1, int(seconds / max(time.process_time() - began, 1e-6)))
    found = []
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(count):
            jax.block_until_ready(run())
        found.append((time.process_time() - began) / count)
    return min(found)


def of_config(name: str, rounds: int, seconds: float) -> dict[str, Any]:
    """The pipeline and the step of a config, its training split in memory. Raises InputError without its data."""
    experiment: Experiment = ConfigFile.find(name).experiment()
    data, trainer = experiment.data, Trainer(experiment)
    columns = jax.device_put(resident(prepared_ahead(data, trainer.source())))
    prepare = data.prepare(train=True)

    @jax.jit
    def pipeline(columns: Any, rows: Any, weight: Any, step: Any) -> Any:
        raw = {name: jax.numpy.take(column, rows, axis=0) for name, column in columns.items()}
        return prepare({**raw, "weight": weight}, jax.random.fold_in(jax.random.key(0), step))

    rows, weight = trainer.batches.rows(0)
    batch = pipeline(columns, rows, weight, 0)
    step, _ = trainer.program()
    state = trainer.devices.put_state(trainer.init())

    def train() -> Any:
        nonlocal state
        state, metrics = step(state, batch, trainer.numbers)
        return metrics

    of_pipeline = least_cpu_seconds(lambda: pipeline(columns, rows, weight, 0), rounds, seconds)
    of_step = least_cpu_seconds(train, rounds, seconds)
    return {
        "batch": data.batch_size,
        "examples_per_second": round(data.batch_size / of_pipeline),
        "pipeline_ms": round(1e3 * of_pipeline, 3),
        "step_ms": round(1e3 * of_step, 3),
        "share": round(of_pipeline / (of_pipeline + of_step), 4),
    }


def of_files(data: Any, rounds: int, seconds: float) -> dict[str, Any]:
    """The reading of a streamed dataset alone, in batches of its size."""
    source = data.read("train")
    batches = Batches(len(source), data.batch_size, seed=0)
    reader: Iterator[Any] = stream(source, batches, 0, 10**9)
    try:
        of_pipeline = least_cpu_seconds(lambda: [next(reader) for _ in range(16)], rounds, seconds) / 16
    finally:
        reader.close()  # type: ignore[attr-defined]
    return {"batch": data.batch_size, "examples_per_second": round(data.batch_size / of_pipeline)}


def image_files(folder: Path) -> ImageFolder:
    """64 JPEG files of 256x256 pixels, smooth as photographs are."""
    rng = np.random.default_rng(0)
    for index in range(64):
        path = folder / "images" / "train" / str(index % 4) / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(path, quality=90)
    return ImageFolder(folder=str(folder / "images"), size=(256, 256), batch_size=32)


def npy_files(folder: Path) -> TableFiles:
    """65,536 rows of 784 floats, 206 MB."""
    (folder / "rows").mkdir()
    rng = np.random.default_rng(0)
    np.save(folder / "rows" / "x.npy", rng.standard_normal((65_536, 784), np.float32))
    np.save(folder / "rows" / "label.npy", rng.integers(0, 10, 65_536))
    return TableFiles(train=str(folder / "rows"), batch_size=256)


def main(output: Path | None = None, rounds: int = 5, seconds: float = 0.3) -> None:
    """Measures all pipelines, prints a table, and writes the results as JSON.

    Args:
        output: JSON file to write; none by default.
        rounds: Number of rounds of each measurement.
        seconds: CPU seconds of a round.
    """
    results: dict[str, dict[str, Any]] = {}
    for name in CONFIGS:
        try:
            results[name] = of_config(name, rounds, seconds)
        except InputError as error:
            print(f"{name:<22} left out: {str(error).partition(';')[0]}", flush=True)
            continue
        report(name, results[name])
    with tempfile.TemporaryDirectory() as folder:
        for name, make in (("image files", image_files), ("npy files", npy_files)):
            results[name] = of_files(make(Path(folder)), rounds, seconds)
            report(name, results[name])
    if output is not None:
        made = dataclasses.asdict(Settings(rounds, seconds))
        output.write_text(json.dumps(provenance(patch=False) | made | {"results": results}, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the times were taken."""

    rounds: int
    seconds: float


def report(name: str, result: dict[str, Any]) -> None:
    """Prints a result as one line."""
    share = f"  {100 * result['share']:5.2f} % of a step of {result['step_ms']} ms" if "share" in result else ""
    print(f"{name:<22} {result['examples_per_second']:>9,} examples/s{share}", flush=True)


if __name__ == "__main__":
    sys.exit(script(main))
