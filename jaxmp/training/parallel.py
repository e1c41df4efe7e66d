"""Data parallelism: one train step on several devices, run by `jit` or `pmap`, with explicit sums over the devices.

The option `shard` says how the train state is stored:

- `replicated`: every device holds all of it.
- `zero1`: the optimizer state is split over the devices. Each device receives its share of the summed gradients, and
  the new weights are gathered (Rajbhandari et al. 2020, section 5.1, https://arxiv.org/abs/1910.02054).
- `fsdp`: parameters are split too, and XLA's partitioner places the collectives.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmp.errors import InputError
from jaxmp.trees import has_gradient, is_key, upcast

AXIS = "data"
"""name of the mesh axis along which a batch is split over the devices"""

SMALL = 2**8
"""Arrays with fewer elements are replicated: splitting them would save less than the collectives cost."""

SPLIT = {
    "replicated": (),
    "zero1": ("opt_state", "ema", "compensation"),
    "fsdp": ("params", "model_state", "opt_state", "ema", "compensation"),
}
"""the fields of a `TrainState` that are split over the devices, for each value of `shard`"""


def split_axis(shape: tuple[int, ...], count: int) -> int | None:
    """Returns the axis along which an array is split over `count` devices: the largest axis that `count` divides.

    Returns None, for an array that is replicated, if no axis is divisible or the array is small.

    >>> split_axis((3, 3, 64, 128), 8), split_axis((4096, 50257), 8), split_axis((128,), 8)
    (3, 0, None)
    """
    fitting = [axis for axis, size in enumerate(shape) if size % count == 0]
    return max(fitting, key=shape.__getitem__) if fitting and math.prod(shape) >= SMALL else None


def _spec(x: Any, count: int) -> P:
    axis = split_axis(x.shape, count)
    return P() if axis is None else P(*[None] * axis, AXIS)


def shardings(state: Any, mesh: Mesh, shard: str) -> Any:
    """Returns the sharding of each leaf of a `TrainState` on the devices of `mesh`.

    Args:
      state: a `TrainState` of arrays or `jax.ShapeDtypeStruct`s.
      mesh: mesh of all devices.
      shard: `replicated`, `zero1` or `fsdp`.
    """
    whole = NamedSharding(mesh, P())
    return type(state)(
        **{
            field.name: jax.tree.map(
                lambda x, split=field.name in SPLIT[shard]: (
                    NamedSharding(mesh, _spec(x, mesh.size)) if split else whole
                ),
                getattr(state, field.name),
            )
            for field in dataclasses.fields(state)
        }
    )


@dataclasses.dataclass(frozen=True)
class Replicas:
    """The replicas as seen inside a train step: splits a batch over them, and sums results over them.

    A replica is one device with its share of the batch.
    """

    axis_name: str | None = None
    """name of the mapped axis; None with a single replica, or if one program handles all replicas (`fsdp`)"""
    mesh: Mesh | None = None
    """devices over which the gradient is mapped under `jit`; None under `pmap`, which maps the whole step"""
    reduce_dtype: Any = jnp.float32
    """dtype in which gradients are summed over replicas"""
    shard: Literal["replicated", "zero1", "fsdp"] = "replicated"
    """which parts of the state are split over the devices"""

    @property
    def several(self) -> bool:
        """Whether there is more than one replica; only inside the mapped region."""
        return self.axis_name is not None and jax.lax.axis_size(self.axis_name) > 1

    def shard_map(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Maps `function(params, model_state, scale, batch, key) -> (grads, ...)` over shares of the batch."""
        if self.mesh is None or self.axis_name is None:
            return function
        mesh = self.mesh

        def shard_map(params: Any, *args: Any) -> Any:
            grads = jax.tree.map(self._spec, params)
            # check_vma=True would put a psum, in half, at each use of a replicated weight, inside scans (trap T16).
            return jax.shard_map(
                function,
                mesh=mesh,
                in_specs=(P(), P(), P(), P(AXIS), P()),
                out_specs=(grads, P(), P()),
                check_vma=False,
            )(params, *args)

        return shard_map

    def microbatches(self, batch: dict[str, Any], count: int) -> dict[str, Any]:
        """Splits this replica's rows into `count` microbatches, along a new first axis.

        Expects the rows in the order of `Devices.interleave_microbatches`.
        """
        if self.shard != "fsdp" or self.mesh is None:
            return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
        # One program sees the rows of all devices, one device after the other. Each microbatch takes a share of each
        # device.
        devices, spec = self.mesh.size, NamedSharding(self.mesh, P(None, AXIS))
        batch = jax.tree.map(lambda x: x.reshape(devices, count, -1, *x.shape[1:]).swapaxes(0, 1), batch)
        parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[3:]), batch)
        return jax.lax.with_sharding_constraint(parts, spec)

    def global_index(self, rows: int, microbatches: int) -> jax.Array:
        """Returns the indices in the whole batch of this replica's rows, int32 (microbatches, rows // microbatches)."""
        size = rows // microbatches
        replica, count = (jax.lax.axis_index(AXIS), jax.lax.axis_size(AXIS)) if self.axis_name else (0, 1)
        first = (jnp.arange(microbatches, dtype=jnp.int32) * count + replica) * size
        return first[:, None] + jnp.arange(size, dtype=jnp.int32)

    def sum(self, tree: Any) -> Any:
        """Sums a pytree of float32 arrays over replicas."""
        return tree if self.axis_name is None else jax.lax.psum(tree, self.axis_name)

    def mean(self, tree: Any) -> Any:
        """Averages the float leaves of a pytree over replicas, in float32; returns other leaves unchanged.

        Leaves that are not floats must be equal on all replicas. Dtypes stay the same.
        """
        if self.axis_name is None:
            return tree
        return jax.tree.map(
            lambda x: jax.lax.pmean(upcast(x), self.axis_name).astype(x.dtype) if has_gradient(x) else x, tree
        )

    def sum_gradients(self, grads: Any) -> Any:
        """Sums gradients over replicas, in one collective in the reduce dtype; leaves without gradient are unchanged.

        If the state is split, each device receives only its share of the sum.
        """
        if self.axis_name is None:
            return self.in_shares(grads)
        leaves, structure = jax.tree.flatten(grads)
        where = [i for i, leaf in enumerate(leaves) if has_gradient(leaf)]
        for i, leaf in zip(where, self._reduce([leaves[i] for i in where]), strict=True):
            leaves[i] = leaf
        return jax.tree.unflatten(structure, leaves)

    def _reduce(self, grads: list[jax.Array]) -> list[jax.Array]:
        dtype = jnp.dtype(self.reduce_dtype)
        if dtype.itemsize >= 4:
            return self._sum_shares([g.astype(jnp.promote_types(g.dtype, dtype)) for g in grads])
        # The divisor is a power of two, so that dividing is exact, and at least the number of replicas, so that the sum
        # of values that fit into the dtype also fits into it (trap T3).
        share = 2.0 ** -math.ceil(math.log2(jax.lax.axis_size(self.axis_name)))
        # Complex gradients are summed in their own dtype: JAX has no half-precision complex dtype.
        summed = self._sum_shares([g if jnp.iscomplexobj(g) else (upcast(g) * share).astype(dtype) for g in grads])
        return [g if jnp.iscomplexobj(g) else g.astype(jnp.float32) / share for g in summed]

    def _sum_shares(self, grads: list[jax.Array]) -> list[jax.Array]:
        """Sums gradients over replicas; if the state is split, only into shares, at half the cost of an all-reduce."""
        axes = [next((i for i, name in enumerate(self._spec(g)) if name), None) for g in grads]
        whole = iter(jax.lax.psum([g for g, axis in zip(grads, axes, strict=True) if axis is None], self.axis_name))
        return [
            next(whole) if axis is None else jax.lax.psum_scatter(g, self.axis_name, scatter_dimension=axis, tiled=True)
            for g, axis in zip(grads, axes, strict=True)
        ]

    def _spec(self, x: Any) -> P:
        split = self.shard != "replicated" and self.mesh is not None and has_gradient(x)
        return _spec(x, self.mesh.size) if split else P()  # type: ignore[union-attr]

    def in_shares(self, tree: Any) -> Any:
        """Splits a tree of arrays like the parameters over the devices, if the state is split."""
        if self.shard == "replicated" or self.mesh is None:
            return tree
        mesh = self.mesh
        return jax.tree.map(
            lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, self._spec(x))) if has_gradient(x) else x,
            tree,
        )

    def place(self, state: Any) -> Any:
        """Gives a new `TrainState` the shardings of the old one, so that it can reuse the donated memory."""
        if self.shard == "replicated" or self.mesh is None:
            return state
        # First split: each device adds the updates to its share of the weights; then the weights are gathered.
        state = dataclasses.replace(state, params=self.in_shares(state.params))
        return jax.lax.with_sharding_constraint(state, shardings(state, self.mesh, self.shard))


single = Replicas()
"""a single replica: no collectives, no mapped axis"""


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices as seen outside a train step: places arrays on them and compiles programs for them.

    Under `pmap`, every array has a first axis of length `count`, with one entry per device.
    """

    mode: Literal["jit", "pmap"]
    """which JAX transformation runs the step"""
    mesh: Mesh
    """mesh of all devices, with the single axis `AXIS`"""
    shard: Literal["replicated", "zero1", "fsdp"] = "replicated"
    """which parts of the state are split over the devices"""
    microbatches: int = 1
    """number of microbatches of a batch"""

    @property
    def count(self) -> int:
        """The number of devices."""
        return self.mesh.size

    def replicas(self, reduce_dtype: Any = jnp.float32) -> Replicas:
        """Creates the `Replicas` for a train step on these devices.

        Raises:
          InputError: `shard` is fsdp and `reduce_dtype` is not float32.
        """
        if self.mode == "pmap":
            return Replicas(AXIS, None, reduce_dtype)
        if self.shard == "fsdp" and jnp.dtype(reduce_dtype) != jnp.float32:
            raise InputError(
                f"precision reduce={jnp.dtype(reduce_dtype).name}: with parallel.shard=fsdp XLA places the gradient "
                "collectives, in the dtype of the products; expected parallel.shard=replicated or zero1 with it"
            )
        if self.count == 1:
            return single
        return Replicas(None if self.shard == "fsdp" else AXIS, self.mesh, reduce_dtype, self.shard)

    def compile(self, program: Callable[..., Any], in_axes: tuple[int | None, ...]) -> Callable[..., Any]:
        """Compiles a program and donates its first argument.

        Args:
          program: a function of arrays that were placed with the methods of this class.
          in_axes: for each argument, 0 if it was placed with these methods, None for a plain number.
        """
        if self.mode == "jit":
            return jax.jit(program, donate_argnums=0, compiler_options=self._compiler_options)
        devices = list(self.mesh.devices.flat)
        return jax.pmap(program, AXIS, in_axes=in_axes, donate_argnums=0, devices=devices)

    @property
    def _compiler_options(self) -> dict[str, Any]:
        # Without it, XLA:CPU copies every moment of Adam in each turn of a loop: it does not notice that the kernel
        # that replaces a moment in place is the last one to read it (64 leaves: 134 copies among 640 kernels per step).
        cpu = self.mesh.devices.flat[0].platform == "cpu"
        return {"xla_cpu_copy_insertion_use_region_analysis": True} if cpu else {}

    @property
    def several_processes(self) -> bool:
        """Whether some of the devices belong to other processes."""
        return self.mesh.is_multi_process

    def _placed(self, tree: Any, shardings: Any) -> Any:
        """Places a pytree of arrays with the given shardings; every process passes the whole arrays."""
        if not self.several_processes:
            return jax.device_put(tree, shardings)
        if isinstance(shardings, NamedSharding):
            shardings = jax.tree.map(lambda _: shardings, tree)
        return jax.tree.map(_place_whole, tree, shardings)

    def whole(self, tree: Any) -> Any:
        """Replicates a pytree of arrays on all devices, without the first axis of `pmap`."""
        return self._placed(tree, NamedSharding(self.mesh, P()))

    def put(self, tree: Any) -> Any:
        """Replicates a pytree of arrays on all devices."""
        if self.mode == "jit":
            return self.whole(tree)
        stack = jax.tree.map(lambda x: jnp.broadcast_to(x, (self.count, *jnp.shape(x))), tree)
        return jax.device_put(stack, NamedSharding(self.mesh, P(AXIS)))

    def put_state(self, state: Any) -> Any:
        """Places a `TrainState` on the devices, as `shard` says."""
        return self.put(state) if self.shard == "replicated" else self._placed(state, self.shardings(state))

    def shardings(self, state: Any) -> Any:
        """Returns the shardings of a `TrainState`, under `jit`."""
        return shardings(state, self.mesh, self.shard)

    def get(self, tree: Any) -> Any:
        """Returns arrays without the first axis of `pmap`: those of the first replica, which are equal on all."""
        return tree if self.mode == "jit" else jax.tree.map(lambda x: x[0], tree)

    def put_batch(self, batch: Any) -> Any:
        """Places a batch of host arrays, split over the devices in the order of `interleave_microbatches`."""
        return self.put_local(jax.tree.map(lambda x: x[self.local_indices(len(x))], batch))

    def local_indices(self, batch_size: int) -> np.ndarray:
        """Returns the indices in the whole batch of the rows of this process's devices, (rows,), in their order."""
        return self.interleave_microbatches(np.arange(batch_size))[self.local_rows(batch_size)]

    def put_local(self, rows: Any) -> Any:
        """Places the rows of a batch at `local_indices`, given as host arrays, as `put_batch` does."""
        if self.mode == "pmap":
            rows = jax.tree.map(lambda x: x.reshape(self.count, -1, *x.shape[1:]), rows)
        return self.shard_local_rows(rows)

    def interleave_microbatches(self, rows: Any) -> Any:
        """Reorders the rows of a batch so that each device, taking consecutive rows, gets a share of every microbatch.

        Microbatches are consecutive parts of the batch, regardless of the number of devices, and each is split over all
        devices.
        """
        if self.count == 1 or self.microbatches == 1:
            return rows
        shape = self.microbatches, self.count, -1
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape), rows)

    def local_rows(self, size: int) -> np.ndarray:
        """Returns which of `size` rows, split in order over all devices, belong to this process: (rows,), ascending."""
        global_index = NamedSharding(self.mesh, P(AXIS)).addressable_devices_indices_map((size,)).values()
        return np.sort(np.concatenate([np.arange(size)[place] for place in global_index if place is not None]))

    def shard_local_rows(self, rows: Any) -> Any:
        """Places the rows at `local_rows`, given as host arrays, split over the devices; without the axis of `pmap`."""
        shard_map = NamedSharding(self.mesh, P(AXIS))
        if not self.several_processes:
            return jax.device_put(rows, shard_map)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(shard_map, np.asarray(x)), rows)

    def shard_rows(self, batch: Any) -> Any:
        """Splits a batch over the devices, without the axis of `pmap`; every process passes the whole batch."""
        return self._placed(batch, NamedSharding(self.mesh, P(AXIS)))

    def any_process(self, flag: bool) -> Any:
        """Returns whether `flag` is set in any process. With several, it is a device array that is not waited for."""
        if not self.several_processes:
            return np.bool_(flag)
        flags = self.shard_local_rows(np.full(len(self.local_rows(self.count)), flag))
        return jax.jit(jnp.any, out_shardings=NamedSharding(self.mesh, P()))(flags)

    def share(self, rows: Any) -> Any:
        """Splits the rows of replicated arrays over the devices; only inside a compiled program.

        Under `pmap`, returns the rows of this replica.
        """
        if self.mode == "jit":
            return jax.lax.with_sharding_constraint(rows, NamedSharding(self.mesh, P(AXIS)))
        return jax.tree.map(lambda x: _replica_slice(x, self.count), rows)

    def global_index(self, batch_size: int) -> jax.Array:
        """Returns the indices in the whole batch of the rows from `share`, int32 (rows,); only inside a program."""
        return self.share(self.interleave_microbatches(jnp.arange(batch_size, dtype=jnp.int32)))


def _replica_slice(x: Any, count: int) -> jax.Array:
    size = x.shape[0] // count
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * size, size)


def _place_whole(x: Any, sharding: NamedSharding) -> jax.Array:
    """Places an array that every process holds on the devices of all of them; reshards one that is already there."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    if is_key(x):
        return jax.random.wrap_key_data(_place_whole(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    whole = np.asarray(x)  # jax.device_put would first compare it across processes
    return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)
