"""`summed_axes`: over which of its axes the products of a model sum each weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmp.deploy.forward import Forward
from jaxmp.jaxprs import called, interpret, opened, scan_counts

Axes = tuple[frozenset[int], ...]
"""for each axis of an array, the axes of a weight that lie along it"""

Known = dict[str, Axes]
"""the weights that an array is made of, by path"""


def summed_axes(of: Forward) -> dict[str, tuple[int, ...]]:
    """The axes of each weight that its products sum over, by path, from the products' own dimension numbers.

    Of the kernel of a Dense layer (features in, features out) it is axis 0; of attention's query, (features, heads,
    head size), axis 0 too; of its output, (heads, head size, features), axes 0 and 1; of a convolution all axes but the
    output channels; of layers in `nn.scan`, the same behind the axis of the layers. A weight that is in no product
    has no entry, such as an embedding that is only looked up. Of products that sum over other axes the first counts.

    Args:
      of: the forward function, under a policy without a recipe: what a quantiser does to a weight is not followed.
    """
    weights, state, inputs = of.arguments()
    closed = jax.make_jaxpr(of.function)(weights, state, inputs)
    own = [{name: tuple(frozenset({axis}) for axis in range(np.ndim(leaf)))} for name, leaf in of.weights.items()]
    given: list[Known] = [*own, *({} for _ in (*state, *inputs))]
    found: dict[str, tuple[int, ...]] = {}
    _follow(closed.jaxpr, [*({} for _ in closed.consts), *given], found)
    return found


def _follow(jaxpr: Any, given: Sequence[Known], found: dict[str, tuple[int, ...]]) -> list[Known]:
    """What is known of the results of an open jaxpr, given that of its constants and inputs; adds to `found`."""

    def equation(eqn: Any, operands: list[Known]) -> list[Known]:
        inner = called(eqn)
        if inner is not None:
            jaxpr, consts = opened(inner)
            return _follow(jaxpr, [*({} for _ in consts), *operands], found)
        if not any(operands):
            return [{} for _ in eqn.outvars]
        name = eqn.primitive.name
        if name == "scan":
            return _scan(eqn, operands, found)
        if name == "cond":
            for jaxpr, consts in map(opened, eqn.params["branches"]):
                results = _follow(jaxpr, [*({} for _ in consts), *operands[1:]], found)
            return results
        if name == "dot_general":
            for known, axes in zip(operands, eqn.params["dimension_numbers"][0], strict=True):
                _sum(known, axes, found)
        if name == "conv_general_dilated":
            spec = eqn.params["dimension_numbers"].rhs_spec
            _sum(operands[1], spec[1:], found)
        return [_through(eqn, operands, variable) for variable in eqn.outvars]

    return interpret(jaxpr, given, equation, lambda _: {})


def _sum(known: Known, axes: Sequence[int], found: dict[str, tuple[int, ...]]) -> None:
    for name, along in known.items():
        found.setdefault(name, tuple(sorted(frozenset().union(*(along[axis] for axis in axes)))))


def _scan(eqn: Any, operands: list[Known], found: dict[str, tuple[int, ...]]) -> list[Known]:
    """A loop: what it reads along its leading axis is seen without it, what it carries is not followed."""
    jaxpr, consts = opened(eqn.params["jaxpr"])
    constants, carries = scan_counts(eqn.params)
    rows = [{name: axes[1:] for name, axes in known.items()} for known in operands[constants + carries :]]
    inside = [*operands[:constants], *({} for _ in range(carries)), *rows]
    _follow(jaxpr, [*({} for _ in consts), *inside], found)
    return [{} for _ in eqn.outvars]


def _through(eqn: Any, operands: list[Known], out: Any) -> Known:
    """The weights in the result of one equation, where their axes can be told."""
    name, params, shape = eqn.primitive.name, eqn.params, out.aval.shape
    if name == "transpose":
        return {path: tuple(axes[i] for i in params["permutation"]) for path, axes in operands[0].items()}
    if name == "broadcast_in_dim":
        places = params["broadcast_dimensions"]
        return {
            path: tuple(axes[places.index(i)] if i in places else frozenset() for i in range(len(shape)))
            for path, axes in operands[0].items()
        }
    if name in ("reshape", "squeeze", "expand_dims"):
        groups = _merged(eqn.invars[0].aval.shape, shape)
        if groups is None:
            return {}
        return {
            path: tuple(frozenset().union(*(axes[i] for i in group)) for group in groups)
            for path, axes in operands[0].items()
        }
    known: Known = {}
    for atom, of_atom in zip(eqn.invars, operands, strict=True):
        same = atom.aval.shape == shape or (name in ("concatenate", "slice") and len(atom.aval.shape) == len(shape))
        known |= of_atom if same else {}
    return known if name not in ("dot_general", "conv_general_dilated", "gather") else {}


def _merged(before: Sequence[Any], after: Sequence[Any]) -> list[list[int]] | None:
    """For each axis after a reshape those before it that it joins; None if it splits one.

    >>> _merged((3, 4, 5), (1, 12, 5)), _merged((12, 5), (3, 4, 5))
    ([[], [0, 1], [2]], None)
    """
    groups: list[list[int]] = []
    left = [axis for axis, size in enumerate(before) if size != 1]
    for size in after:
        group: list[int] = []
        while left and size != 1 and math.prod(before[axis] for axis in group) != size:
            group.append(left.pop(0))
        if size != 1 and math.prod(before[axis] for axis in group) != size:
            return None
        groups.append(group)
    return groups


def matrix_axes(path: str, leaf: Any, summed: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a weight as a matrix: those of its rows, and those that products sum over.

    A weight that is in no product is seen as one that is: of an embedding the last axis, of others all but the last.
    """
    axes = tuple(range(np.ndim(leaf)))
    default = axes[-1:] if path.rpartition("/")[2] == "embedding" else axes[:-1]
    columns = summed.get(path) or default
    return tuple(axis for axis in axes if axis not in columns), columns
