"""`WeightsFile`: pretrained weights in a safetensors file, which a run begins with."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.errors import InputError, local_path
from jaxmp.models.pretrained import convert, read_safetensors
from jaxmp.runs.checkpoint import describe
from jaxmp.runs.initial_weights import check_only, choose_weights, name_within, weights_of, with_weights
from jaxmp.runs.trainer import Trainer
from jaxmp.training.state import TrainState
from jaxmp.trees import by_path

SUFFIX = ".safetensors"


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """A safetensors file with the weights that a run begins with.

    Its tensors are named as Hugging Face's `transformers` and torchvision name them (see `jaxmp.models.pretrained`), or
    by the model's own paths, such as Dense_0/kernel.
    """

    path: Path
    only: tuple[str, ...] = ()
    """patterns of the weights that are taken; all if empty"""

    takes_all = False

    @staticmethod
    def is_named_by(text: str | os.PathLike[str]) -> bool:
        """Whether --init-from names such a file, rather than a run."""
        return os.fspath(text).endswith(SUFFIX)

    @classmethod
    def find(cls, text: str | os.PathLike[str], only: Sequence[str] = ()) -> WeightsFile:
        """The file that --init-from names. Raises InputError if there is none, or it is corrupt."""
        check_only(only)
        path = local_path("--init-from FILE", text)
        read_safetensors(path)
        return cls(path, tuple(only))

    @classmethod
    def of(cls, run: Path, config: Mapping[str, Any]) -> WeightsFile:
        """The file that the run in the folder `run`, of this config.json, began with.

        Raises: InputError if it is not there any more, or its content has changed.
        """
        begins, name = config["begins_with"], config.get("weights_file")
        if name is not None and Path(name).is_file():
            found = cls(Path(name), tuple(begins.get("only", ())))
            if found.begins_with == begins:
                return found
        raise InputError(
            f"{run} began with weights of the SHA-256 {begins['sha256']}, and {name or 'a file not recorded'} "
            "does not have them any more; bring the file back there"
        )

    @functools.cached_property
    def begins_with(self) -> dict[str, Any]:
        """What identifies the weights, as JSON: the file's content, wherever it lies."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"how": "init", "sha256": digest, **({"only": list(self.only)} if self.only else {})}

    def check(self, trainer: Trainer, rows: Mapping[str, Any]) -> None:
        """Nothing stands in the way of taking weights alone, see `Parent.check`."""

    def give_weights(self, trainer: Trainer, fresh: TrainState, log: Any) -> TrainState:
        """The fresh state of a run, with the weights of the file, cast to the dtypes of the model's parameters.

        Raises: InputError if the file is of another architecture, a leaf differs in path or shape or is not of floats,
          or a pattern of --init-only matches none.
        """
        mine = weights_of(fresh)
        found = self._by_path(trainer.experiment.model, mine)
        option = f"--init-from {self.path}: the weights in this file"
        described = {
            path: _in_dtype(value, mine[path]) if path in mine else describe(value) for path, value in found.items()
        }
        adapters = bool(trainer.experiment.lora.rank)
        taken = choose_weights(described, fresh, self.only, option, adapters=adapters)
        log(f"weights of {self.path}: {len(taken)} of {len(mine)} leaves, the others fresh")
        return with_weights(fresh, {path: found[path] for path in taken})

    def _by_path(self, model: Any, mine: Mapping[str, Any]) -> dict[str, Any]:
        """The weights by their path in the state: state/params/Dense_0/kernel."""
        tensors = read_safetensors(self.path)
        own = {name_within(path): path for path in mine}
        if not tensors.keys().isdisjoint(own):
            return {own.get(name, f"state/params/{name}"): tensor for name, tensor in tensors.items()}
        variables = convert(model, tensors, **({"only": self.only} if self.only else {}))
        return {
            f"state/params/{path.partition('/')[2]}"
            if path.startswith("params/")
            else f"state/model_state/{path}": leaf
            for path, leaf in by_path(variables).items()
        }


def _in_dtype(value: np.ndarray, like: Any) -> str:
    """Dtype and shape of a tensor; that of `like`, to which it is cast, where both are floats."""
    both = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (value, like))
    return describe(jax.ShapeDtypeStruct(value.shape, like.dtype) if both else value)
