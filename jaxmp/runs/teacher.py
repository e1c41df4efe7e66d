"""`Teacher`: a run as a function of a batch, which another run learns from."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmp.data.dataset import Dataset
from jaxmp.errors import InputError, nearest
from jaxmp.modules.linen import UnderPolicy
from jaxmp.modules.model import as_model
from jaxmp.runs.folder import RunFolder, parse_step
from jaxmp.runs.run import Run

PREPARED_BY = ("images", "mean", "std")
"""fields of the data that say how the inputs of a model are prepared"""


class _Loaded(NamedTuple):
    """What a teacher computes with."""

    model: Any
    params: Any
    model_state: Any
    inputs: tuple[str, ...]
    data: Any


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A run whose outputs another learns from: its model in evaluation, under its own policy, with averaged weights.

    It is found when it is first needed. In the identity of a run it stands for the run's hash and seed and the step,
    wherever its folder is. Its weights are constants of the programs that it is a part of.

    Raises: InputError, when it is needed, if there is no such run or no such checkpoint, or its experiment cannot be
      made again.
    """

    run: str
    """Run folder of the teacher, or a folder that contains one run."""
    step: str = "best"
    """Weights of the teacher: best, last, or those of a step."""

    def to_canonical(self) -> dict[str, Any]:
        """What identifies the teacher, see `jaxmp.experiment.canonical`."""
        return {
            "class": "jaxmp.Teacher",
            "hash": self._config["hash"],
            "seed": self._config["seed"],
            "step": self._step,
        }

    def __call__(self, batch: Any) -> Any:
        """The outputs for a prepared batch, in the output dtype of the teacher's policy.

        Raises: InputError if the batch lacks an input of the teacher's.
        """
        model, params, model_state, inputs, _ = self._loaded
        missing = [name for name in inputs if name not in batch]
        if missing:
            raise InputError(
                f"teacher {self.run}: its input {missing[0]!r} is none of the batch; it has {', '.join(batch)}"
                f"{nearest(missing[0], batch)}"
            )
        return model.apply(params, model_state, *(batch[name] for name in inputs), key=jax.random.key(0))[0]

    def check(self, data: Dataset) -> None:
        """Raises InputError if its inputs were prepared in another way than `data` prepares them."""
        for name in PREPARED_BY:
            theirs, ours = (getattr(each, name, None) for each in (self._loaded.data, data))
            if theirs != ours:
                raise InputError(
                    f"data.{name} = {ours!r}: the teacher {self.run} was trained with {theirs!r}; expected the same"
                )

    @functools.cached_property
    def _folder(self) -> RunFolder:
        try:
            folder = RunFolder.find(Path(self.run).expanduser())
        except InputError as error:
            raise InputError(f"teacher: {error}; train it first, or give another --task.teacher.run") from None
        if not folder.checkpoint_steps():
            raise InputError(f"teacher {self.run}: it has no checkpoint yet")
        return folder

    @functools.cached_property
    def _config(self) -> dict[str, Any]:
        return self._folder.read_config()

    @functools.cached_property
    def _step(self) -> int:
        step = parse_step(self.step, f"teacher {self.run}, step {self.step}")
        steps = self._folder.checkpoint_steps()
        if step == "best":
            best_of, mode = self._config.get("monitor"), self._config.get("mode", "max")
            checkpoints = self._folder.checkpoints(best_of=best_of, mode=mode)
            step = checkpoints.best_step() or "last"
            checkpoints.close()
        step = steps[-1] if step == "last" else step
        if step not in steps:
            raise InputError(
                f"teacher {self.run}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}"
            )
        return step

    @functools.cached_property
    def _loaded(self) -> _Loaded:
        """Its model and weights; read by path, so that its data need not be there."""
        experiment = Run(self._folder.path).experiment
        checkpoints = self._folder.checkpoints()
        try:
            with jax.ensure_compile_time_eval():  # it may be asked for while a step is traced
                # A leaf is read as an array of NumPy's in the place of one, and as a key in the place of a key.
                array, key = np.zeros(()), jax.random.key(0)
                wanted = {
                    path: key if text.startswith("key<") else array
                    for path, text in checkpoints.leaves(self._step).items()
                    if path.startswith(("state/params/", "state/model_state/", "state/ema/"))
                }
                leaves = checkpoints.read_leaves(self._step, wanted)
        finally:
            checkpoints.close()
        state: dict[str, Any] = {}
        for path, leaf in leaves.items():
            *above, last = path.split("/")[1:]
            node = state
            for name in above:
                node = node.setdefault(name, {})
            node[last] = leaf
        params = _merged(state.get("params", {}), state.get("ema", {}))
        model = as_model(experiment.adapted_model).under(UnderPolicy(experiment.policy))
        return _Loaded(model, params, state.get("model_state", {}), tuple(experiment.task.inputs), experiment.data)


def _merged(params: Any, averaged: Any) -> Any:
    """The parameters, averaged where there is an average."""
    if not isinstance(params, dict):
        return params if averaged is None else averaged
    return {name: _merged(of, (averaged or {}).get(name)) for name, of in params.items()}
