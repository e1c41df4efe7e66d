"""Data parallelism over the local devices: one train step, run by `jit` or by `pmap`, with an explicit reduction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmp.errors import InputError

AXIS = "data"
"""name of the mapped axis over which a batch is spread"""


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How the work is spread over the local devices."""

    mode: Literal["jit", "pmap"] = "jit"
    """jit with a manual region around the gradient, or pmap"""

    def make(self, batch_size: int) -> Devices:
        """The local devices, run in this mode. Raises InputError where the batch does not divide over them."""
        count = jax.local_device_count()
        if batch_size % count:
            below, above = batch_size // count * count, -(-batch_size // count) * count
            fitting = f"{below} or {above}" if below else f"{above}"
            raise InputError(
                f"data.batch_size={batch_size} does not divide over {count} devices; the nearest that does: {fitting}"
            )
        return Devices(self.mode, jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,)))


@dataclasses.dataclass(frozen=True)
class Replicas:
    """Inside a step: how the examples of one batch are spread, and how what they give comes together again."""

    axis_name: str | None = None
    """mapped axis, None where there is one replica"""
    mesh: Mesh | None = None
    """devices to map the gradient over, under `jit`; None under `pmap`, where the whole step is mapped"""
    reduce_dtype: Any = jnp.float32
    """dtype of the gradient collective"""

    def spread(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(params, model_state, scale, batch, key)` on each replica's share of the batch."""
        if self.mesh is None:
            return function
        # check_vma=True would put a psum at each use of a replicated weight, in half, inside scans (trap T16).
        specs = (P(), P(), P(), P(AXIS), P())
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=P(), check_vma=False)

    def sum(self, tree: Any) -> Any:
        """The sum over replicas of a pytree of float32 arrays."""
        return tree if self.axis_name is None else jax.lax.psum(tree, self.axis_name)

    def mean(self, tree: Any) -> Any:
        """The mean over replicas of the floats of a pytree; other leaves are taken to be equal."""
        if self.axis_name is None:
            return tree
        return jax.tree.map(lambda x: jax.lax.pmean(x, self.axis_name) if _is_inexact(x) else x, tree)

    def sum_gradients(self, grads: Any) -> Any:
        """The sum of the gradients over replicas, one collective in the reduce dtype; leaves without one stay."""
        if self.axis_name is None:
            return grads
        leaves, structure = jax.tree.flatten(grads)
        where = [i for i, leaf in enumerate(leaves) if _is_inexact(leaf)]
        for i, leaf in zip(where, self._reduce([leaves[i] for i in where]), strict=True):
            leaves[i] = leaf
        return jax.tree.unflatten(structure, leaves)

    def _reduce(self, grads: list[jax.Array]) -> list[jax.Array]:
        dtype = jnp.dtype(self.reduce_dtype)
        if dtype.itemsize >= 4:
            return jax.lax.psum([g.astype(jnp.promote_types(g.dtype, dtype)) for g in grads], self.axis_name)
        # A power of two, so that the division is exact, and no smaller than the number of replicas, so that a sum of
        # values that fit the dtype fits it too (trap T3).
        share = 2.0 ** -math.ceil(math.log2(jax.lax.axis_size(self.axis_name)))
        summed = jax.lax.psum([(g.astype(jnp.float32) * share).astype(dtype) for g in grads], self.axis_name)
        return [g.astype(jnp.float32) / share for g in summed]

    def own_key(self, key: jax.Array) -> jax.Array:
        """A key that differs between replicas; `key` itself where there is one."""
        if self.axis_name is None or jax.lax.axis_size(self.axis_name) == 1:
            return key
        return jax.random.fold_in(key, jax.lax.axis_index(self.axis_name))


single = Replicas()
"""One replica: no collective, no mapped axis."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """Around a step: where arrays lie, and how a program over them is compiled. Under `pmap` every array is stacked."""

    mode: Literal["jit", "pmap"]
    mesh: Mesh

    @property
    def count(self) -> int:
        """The number of devices."""
        return self.mesh.size

    def replicas(self, reduce_dtype: Any = jnp.float32) -> Replicas:
        """What the step is to know of these devices."""
        if self.mode == "pmap":
            return Replicas(AXIS, None, reduce_dtype)
        return single if self.count == 1 else Replicas(AXIS, self.mesh, reduce_dtype)

    def compile(self, program: Callable[..., Any], in_axes: tuple[int | None, ...]) -> Callable[..., Any]:
        """`program` compiled, its first argument donated. `in_axes`: 0 for what was put, None for a plain number."""
        if self.mode == "jit":
            return jax.jit(program, donate_argnums=0, compiler_options=self._compiler_options)
        return jax.pmap(program, AXIS, in_axes=in_axes, donate_argnums=0)

    @property
    def _compiler_options(self) -> dict[str, Any]:
        # Without it XLA:CPU copies every moment of Adam in each turn of a loop, since it does not see that the kernel
        # that replaces it in place is the last to read it (64 leaves: 134 copies of 640 kernels a step).
        cpu = self.mesh.devices.flat[0].platform == "cpu"
        return {"xla_cpu_copy_insertion_use_region_analysis": True} if cpu else {}

    def whole(self, tree: Any) -> Any:
        """A pytree of arrays on every device, for a program that is not mapped."""
        return jax.device_put(tree, NamedSharding(self.mesh, P()))

    def put(self, tree: Any) -> Any:
        """A pytree of arrays on every device."""
        if self.mode == "jit":
            return self.whole(tree)
        stack = jax.tree.map(lambda x: jnp.broadcast_to(x, (self.count, *jnp.shape(x))), tree)
        return jax.device_put(stack, NamedSharding(self.mesh, P(AXIS)))

    def get(self, tree: Any) -> Any:
        """The arrays that were put, or that a program returned; one replica's of equal ones."""
        return tree if self.mode == "jit" else jax.tree.map(lambda x: x[0], tree)

    def put_batch(self, batch: Any) -> Any:
        """A batch of host arrays, each device with its share of the rows."""
        if self.mode == "pmap":
            batch = jax.tree.map(lambda x: x.reshape(self.count, -1, *x.shape[1:]), batch)
        return jax.device_put(batch, NamedSharding(self.mesh, P(AXIS)))

    def spread_rows(self, batch: Any) -> Any:
        """A batch of host arrays for a program that is not mapped, spread over the devices."""
        return jax.device_put(batch, NamedSharding(self.mesh, P(AXIS)))

    def share(self, rows: Any) -> Any:
        """Inside a program: this replica's rows of arrays that every device has whole."""
        if self.mode == "jit":
            return jax.lax.with_sharding_constraint(rows, NamedSharding(self.mesh, P(AXIS)))
        return jax.tree.map(lambda x: _own(x, self.count), rows)

    def first_row(self, rows: jax.Array) -> Any:
        """Inside a program: the place in the whole batch of the first of this program's `rows`."""
        return 0 if self.mode == "jit" else jax.lax.axis_index(AXIS) * rows.shape[0]


def _own(x: Any, count: int) -> jax.Array:
    size = x.shape[0] // count
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * size, size)


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)
