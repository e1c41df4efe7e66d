"""`jaxmp train CONFIG --dry-run`: what a run would be, from one step that is traced and compiled, and never run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from jaxmp.data.pipeline import nbytes
from jaxmp.experiment.experiment import Experiment
from jaxmp.runs.fit import check
from jaxmp.runs.trainer import Training
from jaxmp.text_table import table

MIB = 2**20


def dry_run(experiment: Experiment) -> str:
    """Shapes, batches, parameters, policies by module, and memory of a step, as text.

    Raises: InputError for all that training would refuse before its first step.
    """
    training = Training(experiment)
    check(training)
    return "\n".join(_lines(training))


def _lines(training: Training) -> Iterator[str]:
    experiment, batches, devices = training.experiment, training.batches, training.devices
    state = jax.eval_shape(training.init)
    sizes = ", ".join(f"{split} {len(experiment.data.source(split))}" for split in ("train", "validation", "test"))
    shapes = ", ".join(f"{name} {leaf.dtype} {leaf.shape}" for name, leaf in training.example.items())
    epochs = training.steps / batches.per_epoch
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    yield f"experiment  {experiment.hash}, seed {experiment.seed}"
    yield f"precision   {experiment.policy}, {experiment.make_scaler()}"
    yield f"devices     {devices.count} x {jax.local_devices()[0].device_kind}, {devices.mode}, {devices.shard}"
    yield f"rows        {sizes}"
    yield f"batch       {shapes}"
    yield f"steps       {batches.per_epoch} batches an epoch, {training.steps} steps in {epochs:.4g} epochs"
    yield f"parameters  {count:,}, {_nbytes(state.params) / MIB:.2f} MiB"
    yield ""
    yield str(training.explain())
    yield ""
    yield from _memory(training)


def _memory(training: Training) -> Iterator[str]:
    """What lies on each device during a step, in MiB: as predicted, and by the compiler's own account."""
    step: Any = training.devices.compile(training.train_step, (0, 0))
    compiled = step.lower(*training.arguments).compile().memory_analysis()
    resident = nbytes(training.source) <= training.experiment.data.device_limit * MIB
    parts = {
        "state and batch": compiled.argument_size_in_bytes,
        "temporaries": compiled.temp_size_in_bytes,
        "training set": nbytes(training.source) if resident else 0,
    }
    yield "memory of a device, in MiB: predicted from shapes"
    yield str(training.memory())
    yield "and as compiled for these devices"
    rows = [
        (name, f"{size / MIB:,.2f}", "streamed" if name == "training set" and not resident else "")
        for name, size in (*parts.items(), ("together", sum(parts.values())))
    ]
    yield table(rows, right=[1], widths=(36, 12))


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
