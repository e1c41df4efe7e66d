"""Replicas on one device: runs a step that is written for `pmap` over an axis of `vmap`."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp.errors import InputError


def replicated(adapter: Any, axis_name: str, replicas: int = 4) -> Any:
    """Returns the adapter of a step over several replicas, which does by `vmap` on one device what `pmap` would do.

    Every leaf of the state gets a leading axis over replicas, and the rows of the batch are split along it.

    Args:
      adapter: the adapter of the step on one replica. Its `step` is not compiled, and reduces gradients over
        `axis_name`.
      axis_name: name of the mapped axis in the step.
      replicas: number of replicas.

    Raises:
      InputError: the rows of the batch do not divide over the replicas.
    """

    def interleave_microbatches(x: Any) -> Any:
        if x.shape[0] % replicas:
            raise InputError(f"replicated: a batch of {x.shape[0]} rows does not divide over {replicas} replicas")
        return x.reshape(replicas, -1, *x.shape[1:])

    def first(tree: Any) -> Any:
        return jax.tree.map(lambda x: x[0], tree)

    def trace(state: Any, batch: Any) -> Any:
        return jax.make_jaxpr(adapter.step, axis_env=[(axis_name, replicas)])(first(state), first(batch))

    fields = {
        "init": lambda: jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * replicas), adapter.init()),
        "step": jax.jit(jax.vmap(adapter.step, axis_name=axis_name)),
        "batch": jax.tree.map(interleave_microbatches, adapter.batch),
        "stacked": True,
        "trace": trace,
    }
    if dataclasses.is_dataclass(adapter) and not isinstance(adapter, type):
        return dataclasses.replace(adapter, **fields)
    return types.SimpleNamespace(**{**{name: getattr(adapter, name) for name in _public(adapter)}, **fields})


def _public(adapter: Any) -> list[str]:
    return [name for name in dir(adapter) if not name.startswith("_")]
