"""Data parallelism over the devices: one train step, run by `jit` or by `pmap`, with an explicit reduction.

Three ways to lay out the state (`shard`): `replicated`; `zero1`, which splits what only the optimizer reads, so that
gradients are scattered and new weights gathered (Rajbhandari et al. 2020, section 5.1, https://arxiv.org/abs/1910.02054);
`fsdp`, which splits all of it and leaves the collectives to the partitioner.
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
"""name of the mapped axis over which a batch is spread"""

SMALL = 2**8
"""numbers in an array below which every device keeps it whole: split, it would save less than its collective costs"""

SPLIT = {
    "replicated": (),
    "zero1": ("opt_state", "ema", "compensation"),
    "fsdp": ("params", "model_state", "opt_state", "ema", "compensation"),
}
"""the fields of a `TrainState` that are split over the devices"""


def split_axis(shape: tuple[int, ...], count: int) -> int | None:
    """The axis along which an array is split over `count` devices: the largest that divides; None for a small array.

    >>> split_axis((3, 3, 64, 128), 8), split_axis((4096, 50257), 8), split_axis((128,), 8)
    (3, 0, None)
    """
    fitting = [axis for axis, size in enumerate(shape) if size % count == 0]
    return max(fitting, key=shape.__getitem__) if fitting and math.prod(shape) >= SMALL else None


def _spec(x: Any, count: int) -> P:
    axis = split_axis(x.shape, count)
    return P() if axis is None else P(*[None] * axis, AXIS)


def shardings(state: Any, mesh: Mesh, shard: str) -> Any:
    """Where each leaf of a `TrainState`, of arrays or `jax.ShapeDtypeStruct`s, lies on the devices of `mesh`."""
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
    """Inside a step: how the examples of one batch are spread, and how what they give comes together again."""

    axis_name: str | None = None
    """mapped axis, None where there is one replica, or one program for all (`fsdp`)"""
    mesh: Mesh | None = None
    """devices to map the gradient over, under `jit`; None under `pmap`, where the whole step is mapped"""
    reduce_dtype: Any = jnp.float32
    """dtype of the gradient collective"""
    shard: Literal["replicated", "zero1", "fsdp"] = "replicated"
    """what of the state is split"""

    @property
    def several(self) -> bool:
        """Inside the mapped region: whether there are other replicas than this one."""
        return self.axis_name is not None and jax.lax.axis_size(self.axis_name) > 1

    def shard_map(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(params, model_state, scale, batch, key) -> (grads, ...)` on each replica's share of the batch."""
        if self.mesh is None or self.axis_name is None:
            return function
        mesh = self.mesh

        def shard_map(params: Any, *args: Any) -> Any:
            grads = jax.tree.map(self._spec, params)
            # check_vma=True would put a psum at each use of a replicated weight, in half, inside scans (trap T16).
            return jax.shard_map(
                function,
                mesh=mesh,
                in_specs=(P(), P(), P(), P(AXIS), P()),
                out_specs=(grads, P(), P()),
                check_vma=False,
            )(params, *args)

        return shard_map

    def microbatches(self, batch: dict[str, Any], count: int) -> dict[str, Any]:
        """This replica's rows in `count` parts, along a new first axis; `Devices` has dealt them out for that."""
        if self.shard != "fsdp" or self.mesh is None:
            return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
        # One program sees the rows of all devices, one device after the other: each gives a share to each part.
        devices, spec = self.mesh.size, NamedSharding(self.mesh, P(None, AXIS))
        batch = jax.tree.map(lambda x: x.reshape(devices, count, -1, *x.shape[1:]).swapaxes(0, 1), batch)
        parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[3:]), batch)
        return jax.lax.with_sharding_constraint(parts, spec)

    def global_index(self, rows: int, microbatches: int) -> jax.Array:
        """The places in the whole batch of this replica's `rows`: int32 (microbatches, rows of one)."""
        size = rows // microbatches
        replica, count = (jax.lax.axis_index(AXIS), jax.lax.axis_size(AXIS)) if self.axis_name else (0, 1)
        first = (jnp.arange(microbatches, dtype=jnp.int32) * count + replica) * size
        return first[:, None] + jnp.arange(size, dtype=jnp.int32)

    def sum(self, tree: Any) -> Any:
        """The sum over replicas of a pytree of float32 arrays."""
        return tree if self.axis_name is None else jax.lax.psum(tree, self.axis_name)

    def mean(self, tree: Any) -> Any:
        """The mean over replicas of the floats of a pytree, summed in float32; other leaves are taken to be equal."""
        if self.axis_name is None:
            return tree
        return jax.tree.map(
            lambda x: jax.lax.pmean(upcast(x), self.axis_name).astype(x.dtype) if has_gradient(x) else x, tree
        )

    def sum_gradients(self, grads: Any) -> Any:
        """The sum of the gradients over replicas, one collective in the reduce dtype; leaves without one stay.

        Where the state is split, each device comes out with its share of the sum.
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
        # A power of two, so that the division is exact, and no smaller than the number of replicas, so that a sum of
        # values that fit the dtype fits it too (trap T3).
        share = 2.0 ** -math.ceil(math.log2(jax.lax.axis_size(self.axis_name)))
        # There is no complex number of two halves: those are summed as they are.
        summed = self._sum_shares([g if jnp.iscomplexobj(g) else (upcast(g) * share).astype(dtype) for g in grads])
        return [g if jnp.iscomplexobj(g) else g.astype(jnp.float32) / share for g in summed]

    def _sum_shares(self, grads: list[jax.Array]) -> list[jax.Array]:
        """The sums, whole or, where the state is split, in shares: a reduce-scatter is half of an all-reduce."""
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
        """Each device with its share of arrays like the parameters, where the state is split."""
        if self.shard == "replicated" or self.mesh is None:
            return tree
        mesh = self.mesh
        return jax.tree.map(
            lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, self._spec(x))) if has_gradient(x) else x,
            tree,
        )

    def place(self, state: Any) -> Any:
        """A new `TrainState` where the old one lay, so that it can take its memory."""
        if self.shard == "replicated" or self.mesh is None:
            return state
        # First in shares: each device adds the updates to its share of the weights, and those are gathered.
        state = dataclasses.replace(state, params=self.in_shares(state.params))
        return jax.lax.with_sharding_constraint(state, shardings(state, self.mesh, self.shard))


single = Replicas()
"""One replica: no collective, no mapped axis."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """Around a step: where arrays lie, and how a program over them is compiled. Under `pmap` every array is stacked."""

    mode: Literal["jit", "pmap"]
    mesh: Mesh
    shard: Literal["replicated", "zero1", "fsdp"] = "replicated"
    microbatches: int = 1

    @property
    def count(self) -> int:
        """The number of devices."""
        return self.mesh.size

    def replicas(self, reduce_dtype: Any = jnp.float32) -> Replicas:
        """What the step is to know of these devices."""
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
        """`program` compiled, its first argument donated. `in_axes`: 0 for what was put, None for a plain number."""
        if self.mode == "jit":
            return jax.jit(program, donate_argnums=0, compiler_options=self._compiler_options)
        devices = list(self.mesh.devices.flat)
        return jax.pmap(program, AXIS, in_axes=in_axes, donate_argnums=0, devices=devices)

    @property
    def _compiler_options(self) -> dict[str, Any]:
        # Without it XLA:CPU copies every moment of Adam in each turn of a loop, since it does not see that the kernel
        # that replaces it in place is the last to read it (64 leaves: 134 copies of 640 kernels a step).
        cpu = self.mesh.devices.flat[0].platform == "cpu"
        return {"xla_cpu_copy_insertion_use_region_analysis": True} if cpu else {}

    @property
    def several_processes(self) -> bool:
        """Whether some of the devices are another process's."""
        return self.mesh.is_multi_process

    def _placed(self, tree: Any, shardings: Any) -> Any:
        """A pytree of arrays, each as its sharding says; of several processes, each has it whole."""
        if not self.several_processes:
            return jax.device_put(tree, shardings)
        if isinstance(shardings, NamedSharding):
            shardings = jax.tree.map(lambda _: shardings, tree)
        return jax.tree.map(_of_equal_parts, tree, shardings)

    def whole(self, tree: Any) -> Any:
        """A pytree of arrays on every device, for a program that is not mapped."""
        return self._placed(tree, NamedSharding(self.mesh, P()))

    def put(self, tree: Any) -> Any:
        """A pytree of arrays on every device."""
        if self.mode == "jit":
            return self.whole(tree)
        stack = jax.tree.map(lambda x: jnp.broadcast_to(x, (self.count, *jnp.shape(x))), tree)
        return jax.device_put(stack, NamedSharding(self.mesh, P(AXIS)))

    def put_state(self, state: Any) -> Any:
        """A `TrainState` on the devices, each with its share of what is split."""
        return self.put(state) if self.shard == "replicated" else self._placed(state, self.shardings(state))

    def shardings(self, state: Any) -> Any:
        """Where the leaves of a `TrainState` lie, for a program that is not mapped."""
        return shardings(state, self.mesh, self.shard)

    def get(self, tree: Any) -> Any:
        """The arrays that were put, or that a program returned; one replica's of equal ones."""
        return tree if self.mode == "jit" else jax.tree.map(lambda x: x[0], tree)

    def put_batch(self, batch: Any) -> Any:
        """A batch of host arrays, each device with its share of the rows, dealt out for its microbatches."""
        return self.put_local(jax.tree.map(lambda x: x[self.local_indices(len(x))], batch))

    def local_indices(self, batch_size: int) -> np.ndarray:
        """The places in the whole batch of the rows that this process's devices take, (rows,), in their order."""
        return self.interleave_microbatches(np.arange(batch_size))[self.local_rows(batch_size)]

    def put_local(self, rows: Any) -> Any:
        """The rows of a batch that `taken` names, host arrays, as `put_batch` places them."""
        if self.mode == "pmap":
            rows = jax.tree.map(lambda x: x.reshape(self.count, -1, *x.shape[1:]), rows)
        return self.shard_local_rows(rows)

    def interleave_microbatches(self, rows: Any) -> Any:
        """The rows of a batch in the order in which devices take them.

        The microbatches of a batch are its parts in order, however many devices share each: so every device gets a
        piece of each part, and not one of its own.
        """
        if self.count == 1 or self.microbatches == 1:
            return rows
        shape = self.microbatches, self.count, -1
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape), rows)

    def local_rows(self, size: int) -> np.ndarray:
        """Which of `size` rows that are spread over the devices in order are this process's: (rows,), ascending."""
        global_index = NamedSharding(self.mesh, P(AXIS)).addressable_devices_indices_map((size,)).values()
        return np.sort(np.concatenate([np.arange(size)[place] for place in global_index if place is not None]))

    def shard_local_rows(self, rows: Any) -> Any:
        """The rows that `own_rows` names, host arrays, for a program that is not mapped, spread over the devices."""
        shard_map = NamedSharding(self.mesh, P(AXIS))
        if not self.several_processes:
            return jax.device_put(rows, shard_map)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(shard_map, np.asarray(x)), rows)

    def shard_rows(self, batch: Any) -> Any:
        """A batch for a program that is not mapped, spread over the devices; every process has the whole of it."""
        return self._placed(batch, NamedSharding(self.mesh, P(AXIS)))

    def any_process(self, flag: bool) -> Any:
        """Whether `flag` is set in any process; where there are several, on the device, and not waited for."""
        if not self.several_processes:
            return np.bool_(flag)
        flags = self.shard_local_rows(np.full(len(self.local_rows(self.count)), flag))
        return jax.jit(jnp.any, out_shardings=NamedSharding(self.mesh, P()))(flags)

    def share(self, rows: Any) -> Any:
        """Inside a program: this replica's rows of arrays that every device has whole."""
        if self.mode == "jit":
            return jax.lax.with_sharding_constraint(rows, NamedSharding(self.mesh, P(AXIS)))
        return jax.tree.map(lambda x: _own(x, self.count), rows)

    def global_index(self, batch_size: int) -> jax.Array:
        """Inside a program: the places in the whole batch of this program's rows, int32."""
        return self.share(self.interleave_microbatches(jnp.arange(batch_size, dtype=jnp.int32)))


def _own(x: Any, count: int) -> jax.Array:
    size = x.shape[0] // count
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * size, size)


def _of_equal_parts(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array over the devices of several processes, of which each has `x`; one that is there already stays."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    if is_key(x):
        return jax.random.wrap_key_data(_of_equal_parts(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    whole = np.asarray(x)  # jax.device_put would first compare it with that of every other process
    return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)
