"""What an experiment is checked for before its first step, on its data and its devices."""

from __future__ import annotations

import ast
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmp.data.dataset import Split
from jaxmp.data.fingerprint import WHOLE_BYTES
from jaxmp.data.pipeline import check_splits, check_values, sample, sampled_rows
from jaxmp.data.source import Columns, Source
from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.runs.teacher import Teacher
from jaxmp.runs.trainer import Trainer
from jaxmp.runs.writers import as_images
from jaxmp.tasks.samples import Sampling
from jaxmp.tasks.task import check_rows
from jaxmp.training.accountant import import_accounting
from jaxmp.training.privacy import refuse_model_state


def check(trainer: Trainer) -> None:
    """Refuses what would otherwise fail at the first evaluation, at the end, or never.

    Raises:
      InputError: a rule of the policy that matches no module, weights that cannot be pruned as `pruning` says, a batch
        that does not divide over the devices, a monitored metric that is not measured, a vocabulary that is too large
        for the model, columns that differ between the splits, labels out of range, integers that do not fit in 32 bits,
        patience without a validation split, samples of a task that has none, workers that would run the script again.
    """
    experiment = trainer.experiment
    teacher = getattr(experiment.task, "teacher", None)
    if isinstance(teacher, Teacher) and getattr(experiment.task, "teacher_weight", True):
        teacher.check(experiment.data)
    trainer.explain()
    _ = list(trainer.pruned())
    experiment.parallel.make(experiment.data.batch_size, experiment.loop.accumulate_steps)
    _ = trainer.monitor
    if trainer.is_private:
        import_accounting()
        refuse_model_state(trainer.state_spec.model_state)
    check_vocabulary(experiment)
    others: dict[Split, Source] = {split: trainer.source(split) for split in trainer.splits if split != "train"}
    if experiment.loop.patience is not None and "validation" not in others:
        raise InputError(
            f"loop.patience = {experiment.loop.patience}: without a validation split nothing says when to stop; "
            "expected a validation split, or no patience"
        )
    check_splits(experiment.data, trainer.source(), others, trainer.columns)
    for split in trainer.splits:
        check_values(trainer.source(split))
    check_targets(trainer, *trainer.splits)
    if experiment.loop.log_images:
        of_shape = {name: np.zeros((1, *spec.shape[1:]), spec.dtype) for name, spec in trainer.batch_spec.items()}
        as_images(of_shape, experiment.task.inputs, experiment.loop.log_images)
    if experiment.loop.log_samples:
        if "validation" not in others:
            raise InputError(
                f"loop.log_samples = {experiment.loop.log_samples} draws at evaluations, and there is no validation "
                "split; expected one, or `jaxmp sample RUN` after training"
            )
        trainer.sample(trainer.init(), Sampling(experiment.loop.log_samples))
    if "zero_losses" in experiment.loop.watch:
        for name in trainer.objectives or (None,):
            loss_fn, state = trainer.make_loss(objective=name, zero_losses=True), trainer.state_spec
            jax.eval_shape(loss_fn, state.params, state.model_state, trainer.batch_spec, state.key)
    if workers := reading_processes(trainer):
        refuse_unguarded_script(workers)


def check_vocabulary(experiment: Experiment) -> None:
    """Raises InputError if the data have more tokens than the model; JAX would take the last one for those beyond."""
    vocabulary = getattr(experiment.data, "vocabulary", None)
    tokens, room = getattr(vocabulary, "size", None), getattr(experiment.model, "vocabulary", None)
    if isinstance(tokens, int) and isinstance(room, int) and tokens > room:
        raise InputError(
            f"model.vocabulary = {room}: the vocabulary of data.tokenizer has {tokens} tokens, numbered from 0 to "
            f"{tokens - 1}; expected --model.vocabulary {tokens} or more, or a smaller vocabulary"
        )


def reading_processes(trainer: Trainer) -> int:
    """How many processes read the training split: `data.workers` if it is streamed, else 0."""
    workers = trainer.experiment.data.workers
    return workers if workers and trainer.is_streamed else 0


def refuse_unguarded_script(workers: int) -> None:
    """Refuses to start processes from a script without a `__main__` guard, which each of them would run again.

    Raises: InputError that names the script and the line that called.
    """
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        file = frame.f_globals.get("__file__")
        if file and frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__":
            if not _is_guarded(Path(file), frame.f_lineno):
                raise InputError(
                    f"data.workers = {workers}: {file}, line {frame.f_lineno}: each of these processes runs this "
                    'script again; put what trains under `if __name__ == "__main__":`, or take data.workers = 0, '
                    "which reads in threads"
                )
            return
        frame = frame.f_back


def _is_guarded(file: Path, line: int) -> bool:
    """Whether a line of a script stands under an `if` about `__name__`; True for what is no text."""
    try:
        body = ast.parse(file.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return True
    guards = [node for node in body if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)]
    return any(node.lineno <= line <= (node.end_lineno or node.lineno) for node in guards)


def check_targets(trainer: Trainer, *splits: Split) -> None:
    """Refuses rows of these splits that the task cannot take, such as labels out of range."""
    for split in splits:
        check_rows(trainer.experiment.task, trainer.outputs, _checked_rows(trainer, split), split)


def _checked_rows(trainer: Trainer, split: Split) -> Mapping[str, Any]:
    """The columns of a split as the task sees them, for `Task.check_rows`.

    Those that transforms change, and a target of images, which are normalised, are of a sample of the rows.
    """
    experiment, source = trainer.experiment, trainer.source(split)
    data, target = experiment.data, getattr(experiment.task, "target", None)
    columns = _Read(source.columns) if isinstance(source, Columns) else sample(source)
    images = ("image",) if getattr(data, "images", None) is None else data.images
    if not data.transforms and target not in images:
        return columns
    found = sample(source)
    batch = {**found, "weight": np.ones(len(next(iter(found.values()))), np.float32)}
    prepared = jax.tree.map(np.asarray, jax.jit(data.prepare(train=False))(batch, None))
    whole = source.columns if isinstance(source, Columns) else {}
    kept = {name: whole[name] for name in whole if name in found and np.array_equal(found[name], prepared.get(name))}
    return _Read({**prepared, **kept})


class _Read(Mapping[str, np.ndarray]):
    """Columns as arrays, read when they are looked up.

    What is in memory, small or a memory-mapped array of whole numbers is whole; of all else a sample of the rows.
    """

    def __init__(self, columns: Mapping[str, Any]):
        self._columns = columns
        self._read: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        column = self._columns[name]
        if type(column) is np.ndarray or (isinstance(column, np.ndarray) and column.dtype.kind in "iu"):
            return column
        if name not in self._read:
            is_small = column[np.arange(1)].nbytes * len(column) <= WHOLE_BYTES
            rows = np.arange(len(column)) if is_small else sampled_rows(len(column))
            self._read[name] = np.asarray(column[rows])
        return self._read[name]

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)
