"""`jaxmp train CONFIG --dry-run`: describes a run by one step that is traced and compiled, but not run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from jaxmp.data.pipeline import nbytes
from jaxmp.experiment.experiment import Experiment
from jaxmp.runs.checks import check
from jaxmp.runs.trainer import Trainer
from jaxmp.studies.memory import memory
from jaxmp.text_table import table
from jaxmp.training.accountant import epsilon

MIB = 2**20


def dry_run(experiment: Experiment, begins_with: str | None = None) -> str:
    """Describes a run as text: shapes, batches, parameters, the policy of each module, and the memory of a step.

    Args:
      experiment: what would be trained.
      begins_with: the run that it would begin with (--init-from, --continue), which is not read; None without.

    Raises:
      InputError: training would refuse the experiment before its first step.
    """
    trainer = Trainer(experiment)
    check(trainer)
    return "\n".join(_lines(trainer, begins_with))


def _lines(trainer: Trainer, begins_with: str | None) -> Iterator[str]:
    experiment, batches, devices = trainer.experiment, trainer.batches, trainer.devices
    state = trainer.state_spec
    sizes = ", ".join(f"{split} {len(trainer.source(split))}" for split in trainer.splits)
    shapes = ", ".join(f"{name} {leaf.dtype} {leaf.shape}" for name, leaf in trainer.batch_spec.items())
    epochs = trainer.steps / batches.per_epoch
    yield f"experiment  {experiment.hash}, seed {experiment.seed}"
    scalers = [f"{name} {scaler}" for name, scaler in experiment.make_scalers().items()]
    yield f"precision   {experiment.policy}, {', '.join(scalers) or experiment.make_scaler()}"
    yield f"devices     {devices.count} x {jax.local_devices()[0].device_kind}, {devices.mode}, {devices.shard}"
    yield f"rows        {sizes}"
    yield f"batch       {shapes}"
    yield f"steps       {batches.per_epoch} batches an epoch, {trainer.steps} steps in {epochs:.4g} epochs"
    yield f"parameters  {trainer.parameter_counts['parameters']:,}, {_nbytes(state.params) / MIB:.2f} MiB"
    yield from _trained(trainer)
    yield from _privacy(trainer, begins_with)
    yield ""
    yield str(trainer.explain())
    yield ""
    yield from _memory(trainer)


def _trained(trainer: Trainer) -> Iterator[str]:
    """What is trained of the parameters, where that is not all of them by one objective."""
    counts = trainer.parameter_counts
    if "trained_parameters" in counts:
        yield f"trained     {counts['trained_parameters']:,}, {_nbytes(trainer.trained_spec) / MIB:.2f} MiB"
    for name, spec in trainer.objectives.items():
        often = "each step" if spec.every == 1 else f"every {spec.every} steps"
        yield f"{name:<11} trains {', '.join(spec.trains)}, {often}"
    yield from trainer.frozen()


def _privacy(trainer: Trainer, begins_with: str | None) -> Iterator[str]:
    """What the weights of the whole run will tell of a row, where the optimizer is private."""
    steps, optimizer = trainer.private_steps(trainer.steps), trainer.experiment.optimizer
    if steps is not None:
        after = "after all steps"
        if begins_with is not None:
            after = "of its own steps; those of the run that it begins with come on top"
        yield (
            f"privacy     epsilon {epsilon([steps], optimizer.delta):.4g}, delta {optimizer.delta:g} {after}; "
            f"{optimizer.sampling} batches of {trainer.batches.expected_rows:,.1f} rows on average"
        )


def _memory(trainer: Trainer) -> Iterator[str]:
    """Lists the memory of each device during a step, in MiB: predicted from shapes, then reported by the compiler."""
    experiment, (step, arguments) = trainer.experiment, trainer.program()
    compiled = step.lower(*arguments).compile().memory_analysis()
    parts = {
        "state and batch": compiled.argument_size_in_bytes,
        "temporaries": compiled.temp_size_in_bytes,
        "training set": nbytes(trainer.source(), experiment.data.prepare_ahead) if not trainer.is_streamed else 0,
    }
    yield "memory of a device, in MiB: predicted from shapes"
    yield str(memory(experiment))
    yield "and as compiled for these devices"
    rows = [
        (name, f"{size / MIB:,.2f}", "streamed" if name == "training set" and trainer.is_streamed else "")
        for name, size in (*parts.items(), ("together", sum(parts.values())))
    ]
    yield table(rows, right=[1], widths=(36, 12))


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
