"""`prune`: a run whose small weights are set to zero while it is trained again; and what that costs, measured."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmp.data.dataset import Split
from jaxmp.deploy.accuracy import Trade, trade
from jaxmp.deploy.export import ROWS, Measured
from jaxmp.deploy.forward import Forward, traced
from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.instruments.audit import audit
from jaxmp.runs.fit import fit
from jaxmp.runs.folder import how_to_blame
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer
from jaxmp.text_table import table
from jaxmp.training.metrics import compute
from jaxmp.training.pruning import why_dense
from jaxmp.training.state import TrainState
from jaxmp.trees import Classes, by_path

INDEX_BITS = 2
"""bits that say which of four neighbours a value of a 2:4 weight is, in the layout of sparse tensor cores"""


class Weight(NamedTuple):
    """A parameter, and how much of it is left."""

    path: str
    shape: tuple[int, ...]
    kept: int
    """its numbers that are not zero"""
    size: int
    """all of its numbers"""
    nbytes: int
    """its bytes, zeros included"""
    sparse: int
    """its bytes as values that are not zero with one bit a number, which says where they are; those of a dense one"""
    packed: int
    """its bytes as 2:4, two values of four with two bits each; as `sparse` without that structure"""
    why: str
    """why it stays dense; "" if it is pruned"""


@dataclasses.dataclass(frozen=True)
class Pruned:
    """A pruned run and what was measured of it; printed, a report."""

    run: Run
    """the run that was trained with pruning"""
    weights: tuple[Weight, ...]
    """every parameter of its best weights"""
    structure: str
    """see `jaxmp.Pruning`"""
    trade: Trade | None
    """accuracy of the run before and after; None where the task decides nothing that is labelled"""
    metrics: tuple[dict[str, float], dict[str, float]]
    """metrics of the run before and after, on the same rows, where there is no `trade`; else empty"""
    flops: dict[str, tuple[int, int]]
    """FLOPs of products for one row by dtype: all, and those with weights that are not zero"""

    @property
    def sparsity(self) -> float:
        """The share of zeros among the weights that are pruned."""
        pruned = [weight for weight in self.weights if not weight.why]
        return 1 - sum(weight.kept for weight in pruned) / sum(weight.size for weight in pruned)

    def total(self, field: Literal["nbytes", "sparse", "packed"]) -> int:
        """Bytes of all parameters, stored in one of the ways of `Weight`."""
        return sum(getattr(weight, field) for weight in self.weights)

    def __str__(self) -> str:
        rows = [
            (
                weight.path,
                "x".join(map(str, weight.shape)),
                f"stays: {weight.why}" if weight.why else f"{1 - weight.kept / weight.size:.2%} zeros",
                f"{weight.kept:,}",
            )
            for weight in self.weights
        ]
        size, kept = (sum(getattr(weight, name) for weight in self.weights) for name in ("size", "kept"))
        dense, sparse, packed = (self.total(name) for name in ("nbytes", "sparse", "packed"))  # type: ignore[arg-type]
        lines = [table(rows, header=("weight", "shape", "pruned", "not zero"), right=(3,)), ""]
        lines.append(f"sparsity         {self.sparsity:.2%} of what is pruned; {kept:,} of {size:,} numbers are left")
        lines.append(f"bytes dense      {dense:,}")
        lines.append(f"bytes sparse     {sparse:,}, {dense / sparse:.2f} times fewer: values, and one bit a number")
        if self.structure == "2:4":
            lines.append(f"bytes packed     {packed:,}, {dense / packed:.2f} times fewer: 2:4, two bits a value")
        if self.trade is not None:
            lines += self.trade.lines("pruned")
        for name in self.metrics[0]:
            lines.append(f"{name:<16} {self.metrics[0][name]:.6g} before, {self.metrics[1][name]:.6g} pruned")
        for dtype, (all_, left) in self.flops.items():
            fewer = f"{all_ / left:.2f} times fewer" if left else "all of them saved"
            lines.append(f"FLOPs a row      {dtype} {all_:,}; {left:,} with weights that are not zero, {fewer}")
        lines.append("                 (saved only by hardware and kernels that skip zeros)")
        return "\n".join(lines)


def prune(
    run: Run | str | Path,
    experiment: Experiment | None = None,
    *,
    workdir: str | os.PathLike[str] | None = None,
    origin: Mapping[str, Any] | None = None,
    split: Split | None = None,
    rows: int = ROWS,
    progress: Literal["auto", "none"] = "auto",
    log: Callable[[str], None] = print,
) -> Pruned | None:
    """Trains a run again from its best weights with pruning, in a run folder of its own, and measures what that costs.

        prune(run, dataclasses.replace(run.experiment, pruning=Pruning(0.9)))

    The learning rate begins anew: to retrain with the schedule of the original training recovers more than its last
    learning rate does (A. Renda, J. Frankle and M. Carbin, Comparing Rewinding and Fine-tuning in Neural Network
    Pruning, ICLR 2020, https://arxiv.org/abs/2003.02389). The same call resumes it, and reads it where it has ended.

    Args:
      run: the run, or its folder.
      experiment: what is trained: the run's experiment with `pruning`, and with what else is to change, such as fewer
        epochs; by default the run's own, which then has pruning.
      workdir: folder of all runs; by default that of the run.
      origin: how the experiment can be made again, see `jaxmp.fit`.
      split: rows on which both are compared; by default test, else validation, else train.
      rows: the most rows on which they are compared, spread evenly over the split.
      progress: as of `jaxmp.fit`.
      log: takes each message to the user.

    Returns:
      What was measured; None if a signal stopped the training, which the same call goes on with.

    Raises:
      InputError: as `jaxmp.fit` does; the run has failed; or nothing would be pruned.
      RunFailed: as `jaxmp.fit` does.
    """
    run = run if isinstance(run, Run) else Run(run)
    experiment = run.experiment if experiment is None else experiment
    check(run, experiment)
    measured = Measured.of_run(run, split, rows)
    fitted = fit(
        experiment,
        workdir=_workdir_of(run) if workdir is None else workdir,
        name=run.config["name"],
        origin=dict(origin or {}),
        init_from=f"{run.path}@best",
        progress=progress,
        log=log,
    )
    if fitted.stopped:
        return None
    return measure(run, Run(fitted.path, experiment), measured)


def _workdir_of(run: Run) -> Path:
    """The folder of all runs that a run stands in, as its path names it, if that goes so far up."""
    named, real = run.path.parent.parent, run.path.resolve().parent.parent
    return named if named.resolve() == real else real


def check(run: Run, experiment: Experiment) -> None:
    """Refuses a run that failed, and an experiment that prunes nothing, or what cannot be pruned."""
    if run.failure:
        how = how_to_blame(run.path, run.config)
        why = f"; `{how}` tells why" if how else ""
        raise InputError(f"{run.path} failed ({run.failure}), and a failed run is not pruned{why}")
    check_weights(Trainer(experiment))


def check_weights(trainer: Trainer) -> None:
    """Raises InputError if the experiment of a trainer prunes nothing, or what cannot be pruned."""
    if not trainer.experiment.pruning.share:
        raise InputError(
            "prune: pruning.sparsity = 0, and nothing would be pruned; expected --pruning.sparsity 0.9, say, or "
            "--pruning.structure 2:4"
        )
    _ = list(trainer.pruned())


def measure(run: Run, pruned: Run, measured: Measured) -> Pruned:
    """What a pruned run costs and saves beside the run that it began with.

    Args:
      run: the run before.
      pruned: the run that was trained with pruning.
      measured: the rows on which both are compared.
    """
    pruning, before, after = pruned.experiment.pruning, run.state("best"), pruned.state("best")
    found = trade(
        run,
        measured.source,
        lambda batch: run.outputs(dict(batch), before),
        lambda batch: pruned.outputs(dict(batch), after),
    )
    metrics: tuple[dict[str, float], dict[str, float]] = {}, {}
    if found is None:
        metrics = _metrics(run, measured, before), _metrics(pruned, measured, after)
    view, classes = by_path(pruned.trainer.trained_spec), pruned.trainer.module_classes
    weights = tuple(
        _weight(name, np.asarray(leaf), why_dense(pruning, name, view.get(name), classes), pruning.structure)
        for name, leaf in by_path(after.averaged_params).items()
    )
    flops = _flops(traced(pruned, after, measured.source), weights, measured, classes)
    return Pruned(pruned, weights, pruning.structure, found, metrics, flops)


def _metrics(run: Run, measured: Measured, state: TrainState) -> dict[str, float]:
    """The metrics of a run on the rows that are measured, as `Run.evaluate` has those of a split."""
    trainer = run.trainer
    placed = trainer.devices.get(trainer.devices.put_state(state))
    return compute(trainer.evaluation(placed, measured.source))


def _weight(path: str, leaf: np.ndarray, why: str, structure: str) -> Weight:
    """What is left of a parameter, its bytes those of the arrays that hold it."""
    is_zero = leaf.astype(np.float32) == 0 if not why else np.zeros(leaf.shape, bool)
    values = leaf[~is_zero]
    sparse = packed = leaf.nbytes
    if not why:
        sparse = values.nbytes + np.packbits(is_zero).nbytes
        half = leaf.size // 2  # a group may have more zeros than two
        packed = half * leaf.itemsize + half * INDEX_BITS // 8 if structure == "2:4" else sparse
    return Weight(path, leaf.shape, values.size, leaf.size, leaf.nbytes, sparse, packed, why)


def _flops(
    of: Forward, weights: tuple[Weight, ...], measured: Measured, classes: Classes
) -> dict[str, tuple[int, int]]:
    """FLOPs of products for one row by dtype: all of them, and those with weights that are not zero.

    A product multiplies the weights of its module; of a recurrent cell, which may join its gates, those of its layers.
    Other modules multiply the outputs of their layers, as attention does, and save nothing there.
    """
    row = measured.source[np.arange(1)]
    arguments: tuple[Any, ...] = of.arguments()[0], [], [np.asarray(jnp.asarray(row[name])) for name in of.inputs]
    found: dict[str, tuple[int, int]] = {}
    for dot in audit(of.function, *arguments).dots:
        module = dot.path.partition("/")[2]
        is_cell = "RNNCellBase" in classes.get(module, ())
        own = [weight for weight in weights if not weight.why and module and _is_of(weight.path, module, is_cell)]
        size, kept = (sum(getattr(weight, name) for weight in own) for name in ("size", "kept"))
        left = round(dot.flops * kept / size) if size else dot.flops
        both = found.get(dot.dtype, (0, 0))
        found[dot.dtype] = both[0] + dot.flops, both[1] + left
    return found


def _is_of(path: str, module: str, is_cell: bool) -> bool:
    """Whether a weight is one of a module, or of a layer right in it if that is a recurrent cell."""
    inside = path.removeprefix(f"{module}/")
    return inside != path and inside.count("/") <= is_cell
