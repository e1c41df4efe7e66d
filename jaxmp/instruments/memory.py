"""`memory`: the memory that a training step needs, predicted from shapes: nothing is compiled, nothing runs.

What the forward pass saves for the backward pass is read from the jaxpr of `jax.vjp`, as JAX's own
`jax.ad_checkpoint.print_saved_residuals` does. An argument that is saved costs nothing more. Weights that were only
cast are listed apart from activations: they are the price of master weights.

The compiler may need less, if it computes values again, or more, for intermediate results.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from jaxmp.html.elements import cell_of
from jaxmp.jaxprs import SAME_VALUES, bare, interpret, scan_counts, tracing
from jaxmp.scaling.state_format import PackedArray
from jaxmp.text_table import table
from jaxmp.training.objective import EVERYTHING, trained_view
from jaxmp.trees import is_inexact, is_key

MIB = 2**20


class Item(NamedTuple):
    """Arrays of one kind and dtype."""

    name: str
    """kind: master weights (parameters that the loss casts to a narrower dtype), parameters (all others that are
    trained), frozen parameters, moments, other state, batch, gradients, weights cast for compute, or saved
    activations"""
    dtype: str
    """dtype, or block format of an optimizer's packed state"""
    arrays: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes by kind and dtype. `print` shows a table in MiB; what rounds to 0.00 MiB is summed up as "the rest"."""

    items: tuple[Item, ...]

    def nbytes(self, *names: str) -> int:
        """Returns the bytes of the named kinds, in all dtypes together; without names, of all kinds."""
        return sum(item.nbytes for item in self.items if not names or item.name in names)

    def to_json(self) -> list[dict[str, Any]]:
        """Returns the items as lists, dicts, strings and integers."""
        return [item._asdict() for item in self.items]

    def _repr_html_(self) -> str:
        """Shows the same in a notebook."""
        return cell_of([str(self)])

    def __str__(self) -> str:
        shown = [(item.name, item.dtype, item.nbytes) for item in self.items if item.nbytes >= 0.005 * MIB]
        rest = self.nbytes() - sum(nbytes for *_, nbytes in shown)
        shown += [("the rest", "", rest)] if rest else []
        shown.append(("total", "", self.nbytes()))
        rows = [(name, dtype, f"{nbytes / MIB:,.2f}") for name, dtype, nbytes in shown]
        return table(rows, right=[2], widths=(24, 10, 12))


def memory(
    loss: Callable[..., Any],
    params: Any,
    *args: Any,
    opt_state: Any = None,
    state: Any = None,
    trains: tuple[str, ...] = EVERYTHING,
) -> Memory:
    """Predicts the memory of a training step that differentiates `loss(params, *args)` with respect to `params`.

    Args:
      loss: a function that returns one float scalar.
      params: the parameters, arrays or `jax.ShapeDtypeStruct`s. Leaves without a gradient, such as integers, count as
        other state.
      args: the further arguments of `loss`, such as the batch.
      opt_state: the optimizer's state. Float arrays count as moments, all else as other state. Arrays that
        `state_format` packs are moments, elements and scales together, under the name of their block format.
      state: what else persists between steps, such as batch statistics or an average of the weights.
      trains: the parameters that are differentiated, see `jaxmp.Objective`; the others are frozen.

    Returns:
      The items, in the order in which a step uses them. An array with a sharding counts with one device's share. What
      the loss computes counts as traced, so `args` should have the shapes of one device.

    Raises:
      InputError: `loss` cannot be differentiated with these arguments.

    >>> w, x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32), jax.ShapeDtypeStruct((64, 1024), jnp.bfloat16)
    >>> half = lambda w, x: jnp.sum(jnp.exp(x @ w.astype(x.dtype)), dtype=jnp.float32)
    >>> print(memory(half, w, x))
    master weights            float32             4.00
    batch                     bfloat16            0.12
    gradients                 float32             4.00
    saved activations         bfloat16            0.12
    total                                         8.25
    """
    leaves, structure = jax.tree.flatten(params)
    is_trained = jax.tree.leaves(trained_view(params, trains), is_leaf=lambda leaf: leaf is None)
    diff = [i for i, leaf in enumerate(leaves) if is_inexact(leaf) and is_trained[i] is not None]

    def of(leaves_and_args: tuple[Any, ...]) -> Any:
        own, others, args = leaves_and_args

        def differentiated(own: Any) -> Any:
            filled = dict(enumerate(others)) | dict(zip(diff, own, strict=True))
            value = loss(jax.tree.unflatten(structure, [filled[i] for i in range(len(leaves))]), *args)
            if not jax.tree_util.all_leaves([value]) or jnp.shape(value):
                shapes = jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", value)
                raise TypeError(f"expected a scalar; it returns {shapes}")
            return value

        # The function that vjp returns is a pytree, of all that it needs for the backward pass.
        return jax.vjp(differentiated, own)[1]

    own = [leaves[i] for i in diff]
    others = [jnp.zeros((), jnp.int8) if i in diff else leaf for i, leaf in enumerate(leaves)]
    with tracing("memory: the loss cannot be differentiated"):
        jaxpr = bare(jax.make_jaxpr(of)((own, others, args)))
    flow = _Flow(len(own))
    kept = flow.function(jaxpr, [_Root(i) for i in range(len(jaxpr.invars))])

    items = _Items()
    for i, leaf in enumerate(leaves):
        place = diff.index(i) if i in diff else None
        kind = "frozen parameters" if is_inexact(leaf) else "other state"
        if place is not None:
            kind = "master weights" if place in flow.masters else "parameters"
        items.add(kind, leaf)
    for leaf in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, PackedArray)):
        if isinstance(leaf, PackedArray):
            items.add_packed("moments", leaf)
        else:
            items.add("moments" if leaf.shape and is_inexact(leaf) else "other state", leaf)
    for leaf in jax.tree.leaves(state):
        items.add("other state", leaf)
    for leaf in jax.tree.leaves(args):
        items.add("batch", leaf)
    for leaf in own:
        items.add("gradients", leaf)
    for name, aval in _saved(kept, [v.aval for v in jaxpr.outvars], len(leaves)):
        items.add(name, aval)
    return items.memory()


class _Root(NamedTuple):
    """What a value is a copy of."""

    key: Any
    """place among the arguments, or the variable that was computed"""
    cast: bool = False
    """whether it was rounded on the way"""
    spread: bool = False
    """whether it has more elements than what it is a copy of"""


class _Flow:
    """Follows values through a jaxpr and the functions in it, as long as they are only handed on."""

    def __init__(self, params: int) -> None:
        self.parameters: dict[Any, int] = {i: i for i in range(params)}  # and slices of them, by key
        self.masters: set[int] = set()

    def function(self, jaxpr: Any, given: Sequence[_Root]) -> list[_Root]:
        """What the results are copies of; on the way, which parameters are cast to a narrower dtype."""
        constants = [_Root(v) for v in jaxpr.constvars]
        return interpret(jaxpr, [*constants, *given], self._equation, lambda _: _Root(object()))

    def _equation(self, eqn: Any, given: list[_Root]) -> list[_Root]:
        name = eqn.primitive.name
        if name in SAME_VALUES:
            before, after = eqn.invars[0].aval, eqn.outvars[0].aval
            (key, cast, spread), narrower = given[0], after.dtype.itemsize < before.dtype.itemsize
            if narrower and key in self.parameters:
                self.masters.add(self.parameters[key])
            return [_Root(key, cast or before.dtype != after.dtype, spread or before.size != after.size)]
        made = [_Root(v) for v in eqn.outvars]
        if name == "scan":
            return self._scan(eqn, given, made)
        for inner in jaxprs_in_params(eqn.params):
            values = given[-len(inner.invars) :] if len(inner.invars) else []  # a conditional's first is the choice
            if len(values) != len(inner.invars):
                continue
            out = self.function(inner, values)
            # What a loop returns is of other turns than what it was given.
            if len(out) == len(made) and name not in ("while", "cond"):
                return out
        return made

    def _scan(self, eqn: Any, given: list[_Root], made: list[_Root]) -> list[_Root]:
        """What is cast of a slice in each turn is stacked to a cast of the whole; all else is made by the loop."""
        (body,) = jaxprs_in_params(eqn.params)
        consts, carries = scan_counts(eqn.params)
        slices = {object(): root for root in given[consts + carries :]}
        turn = [*given[:consts], *(_Root(object()) for _ in range(carries)), *map(_Root, slices)]
        for inner, outer in slices.items():
            if outer.key in self.parameters:
                self.parameters[inner] = self.parameters[outer.key]
        out = self.function(body, turn)
        for i in range(carries, len(made)):
            if (root := slices.get(out[i].key)) is not None:
                made[i] = _Root(root.key, root.cast or out[i].cast, root.spread or out[i].spread)
        return made


def _saved(kept: list[_Root], avals: list[Any], params: int) -> Iterator[tuple[str, Any]]:
    """What is kept beside the arguments, each once, however often it is kept under another shape."""
    seen = set()
    for root, aval in zip(kept, avals, strict=True):
        is_argument = isinstance(root.key, int)
        key = root.key, aval.dtype, aval.size
        whole = is_argument and not root.spread
        if key in seen or (whole and not root.cast) or aval.dtype == jax.dtypes.float0:
            continue
        seen.add(key)
        yield "weights cast for compute" if whole and root.key < params else "saved activations", aval


class _Items:
    """Adds up arrays by name and dtype."""

    def __init__(self) -> None:
        self.arrays: collections.Counter[tuple[str, str]] = collections.Counter()
        self.sizes: collections.Counter[tuple[str, str]] = collections.Counter()

    def add(self, name: str, leaf: Any) -> None:
        key = name, str(leaf.dtype)
        self.arrays[key] += 1
        self.sizes[key] += device_nbytes(leaf)

    def add_packed(self, name: str, packed: PackedArray) -> None:
        key = name, str(packed.format)
        self.arrays[key] += 1
        self.sizes[key] += sum(map(device_nbytes, jax.tree.leaves(packed)))

    def memory(self) -> Memory:
        return Memory(tuple(Item(*key, n, self.sizes[key]) for key, n in self.arrays.items()))


def device_nbytes(leaf: Any) -> int:
    """Returns the bytes of an array or `jax.ShapeDtypeStruct` on one of its devices."""
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    if is_key(leaf):
        words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), leaf.dtype))
        return math.prod(shape) * words.size * words.dtype.itemsize
    return math.prod(shape) * np.dtype(leaf.dtype).itemsize
