"""The weights that a run begins with: which of them are taken, and how they get into its fresh state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp.errors import InputError
from jaxmp.modules.lora import ADAPTERS
from jaxmp.runs.checkpoint import describe, named_leaves
from jaxmp.training.objective import restrict
from jaxmp.training.state import TrainState
from jaxmp.trees import Pattern, is_key


def check_only(only: Sequence[str]) -> None:
    """Raises InputError unless each of the patterns of --init-only can name a weight."""
    for pattern in only:
        if Pattern(pattern).by_class:
            raise InputError(f"--init-only {pattern}: a weight has no class; expected a path such as **/kernel")


def weights_of(fresh: TrainState) -> dict[str, Any]:
    """The parameters and the model state of a fresh state, by path: state/params/Dense_0/kernel."""
    return named_leaves({"state": {"params": fresh.params, "model_state": fresh.model_state}})


def weights_by_path(params: Any, model_state: Any) -> dict[str, Any]:
    """Parameters and model state by their paths in the model: Dense_0/kernel, BatchNorm_0/mean."""
    leaves = named_leaves({"state": {"params": params, "model_state": model_state}})
    return {name_within(path): leaf for path, leaf in leaves.items()}


def choose_weights(
    saved: Mapping[str, str], fresh: TrainState, only: Sequence[str], what: str, *, adapters: bool
) -> list[str]:
    """The paths of the weights that are taken.

    Args:
      saved: dtype and shape of each leaf that there is, as `describe` gives them, by path.
      fresh: the state that they go into.
      only: patterns of those to take; all if empty.
      what: names the weights, the beginning of a message.
      adapters: whether LoRA's adapters begin fresh where there are none, unless a pattern names adapters alone.

    Raises: InputError if a pattern matches no weight, or a leaf differs in path, shape or dtype; all are named.
    """
    mine, patterns = weights_of(fresh), [Pattern(text) for text in only]
    weights = {path: name_within(path) for path in {**saved, **mine} if part_of(path) in ("params", "model_state")}
    for pattern in patterns:
        if not any(pattern.covers(name) for path, name in weights.items() if path in mine):
            raise InputError(
                f"--init-only {pattern}: no such weight; {pattern.what_there_is([name_within(path) for path in mine])}"
            )
    if adapters:
        new = {path for path, name in weights.items() if path not in saved and _is_adapter(name)}
        asked = [each for each in patterns if all(_is_adapter(name) for name in weights.values() if each.covers(name))]
        weights = {
            path: name for path, name in weights.items() if path not in new or any(each.covers(name) for each in asked)
        }
    taken = [path for path, name in weights.items() if not patterns or any(each.covers(name) for each in patterns)]
    wrong = [
        f"  {name_within(path)}: {saved.get(path, 'nothing')} there, "
        f"{describe(mine[path]) if path in mine else 'nothing'} here"
        for path in taken
        if path not in mine or saved.get(path) != describe(mine[path])
    ]
    if wrong:
        raise InputError(
            f"{what} differ from this model's; --init-only PATTERN takes those that a pattern names, and the others "
            "begin fresh:\n" + "\n".join(wrong)
        )
    return taken


def _is_adapter(name: str) -> bool:
    """Whether a weight is of one of LoRA's adapters."""
    return any(Pattern(text).covers(name) for text in ADAPTERS)


def with_weights(fresh: TrainState, values: Mapping[str, Any]) -> TrainState:
    """The fresh state with these weights, by path; a moving average begins with them."""
    leaves = [as_leaf(values[path], leaf) if path in values else leaf for path, leaf in weights_of(fresh).items()]
    tree = {"state": {"params": fresh.params, "model_state": fresh.model_state}}
    given = jax.tree.unflatten(jax.tree.structure(tree), leaves)["state"]
    ema = None
    if fresh.ema is not None:
        trained = restrict(given["params"], fresh.ema)
        ema = jax.tree.map(lambda average, param: as_leaf(jnp.copy(param), average), fresh.ema, trained)
    return dataclasses.replace(fresh, params=given["params"], model_state=given["model_state"], ema=ema)


def part_of(path: str) -> str:
    """ "params" of state/params/Dense_0/kernel; "metrics" of metrics/loss/total."""
    names = path.split("/")
    return names[1] if names[0] == "state" and len(names) > 1 else names[0]


def name_within(path: str) -> str:
    """The path of a weight in the model: Dense_0/kernel, of model state without the name of its collection."""
    names = path.split("/")[2:]
    return "/".join(names[1:] if part_of(path) == "model_state" else names)


def as_leaf(value: Any, like: Any) -> Any:
    """An array in the dtype of `like`, on its devices."""
    if is_key(value) or (isinstance(value, jax.Array) and value.dtype == like.dtype):
        return value
    cast = jnp.asarray(value, like.dtype)
    return cast if not getattr(like, "committed", False) else jax.device_put(cast, like.sharding)
