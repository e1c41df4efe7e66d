"""`Graph`: the nodes and constants of an ONNX graph, as a jaxpr is written into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmp.errors import InputError
from jaxmp.jaxprs import Place, dimension_size
from jaxmp.trees import HALF


def interface_dtype(dtype: Any) -> np.dtype:
    """The dtype in which ONNX Runtime takes and gives an array: float32 for bfloat16 and 8-bit floats."""
    dtype = np.dtype(dtype)
    return dtype if dtype.kind != "V" else np.dtype(np.float32)


def kept_dtype(dtype: Any) -> np.dtype:
    """The dtype in which a value of a jaxpr is kept: float32 for halves and 8-bit floats."""
    dtype = np.dtype(dtype)
    narrow = dtype in HALF or (jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4)
    return np.dtype(np.float32) if narrow else dtype


def onnx_type(dtype: Any) -> int:
    """ONNX's number of a dtype."""
    from onnx import helper

    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


class Graph:
    """The nodes and constants of a graph; `above` is the graph that it is a body in, whose values it can read."""

    def __init__(self, above: Graph | None = None):
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.known: dict[Any, str] = {}
        self.dimensions: dict[str, str] = {} if above is None else above.dimensions
        self._count: list[int] = [0] if above is None else above._count
        self.place: Place = Place() if above is None else above.place

    def name(self) -> str:
        """A name that no other value has."""
        self._count[0] += 1
        return f"v{self._count[0]}"

    def add(self, operation: str, *inputs: str, outputs: int | None = None, **attributes: Any) -> Any:
        """Adds a node, and returns the name of its result, or a list of `outputs` names."""
        from onnx import helper

        names = [self.name() for _ in range(outputs or 1)]
        label = "/".join(filter(None, (self.place.module, f"{operation} {names[0]}")))
        self.nodes.append(helper.make_node(operation, list(inputs), names, name=label, **attributes))
        return names[0] if outputs is None else names

    def constant(self, value: Any, dtype: Any = None) -> str:
        """The name of a constant."""
        from onnx import numpy_helper

        array = np.asarray(value, dtype)
        key = (array.dtype.name, array.shape, array.tobytes()) if array.size < 64 else None
        if key is None or key not in self.known:
            name = self.name()
            self.constants.append(numpy_helper.from_array(np.array(array, order="C"), name))
            if key is None:
                return name
            self.known[key] = name
        return self.known[key]

    def ints(self, *values: int) -> str:
        """The name of a constant int64 vector."""
        return self.constant(np.array(values, np.int64))

    def stored(self, name: str, array: np.ndarray) -> str:
        """The name of an initialiser that is given it, for weights."""
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def weight(self, name: str, value: Any) -> str:
        """The name of a weight as it is kept; it is stored in its own dtype."""
        array = np.asarray(value)
        return self.cast(self.stored(name, array), array.dtype, kept_dtype(array.dtype))

    def cast(self, value: str, source: Any, target: Any) -> str:
        """The value in another dtype."""
        return value if np.dtype(source) == np.dtype(target) else self.add("Cast", value, to=onnx_type(target))

    def rounded(self, value: str, dtype: Any) -> str:
        """A float32 value on the grid of a narrower dtype."""
        attributes = {"saturate": 0} if np.dtype(dtype).itemsize == 1 else {}
        return self.add("Cast", self.add("Cast", value, to=onnx_type(dtype), **attributes), to=onnx_type(np.float32))

    def size(self, dimension: Any) -> str:
        """A dimension as a vector of one int64: a constant, or computed where the program runs."""
        if isinstance(dimension, int | np.integer):
            return self.ints(int(dimension))
        if str(dimension) in self.dimensions:
            return self.dimensions[str(dimension)]
        names = list(self.dimensions)
        ones = dict.fromkeys(names, 1)
        at_one = dimension_size(dimension, ones)
        slopes = {name: dimension_size(dimension, {**ones, name: 2}) - at_one for name in names}
        rest = at_one - sum(slopes.values())
        check = {name: index + 3 for index, name in enumerate(names)}
        if dimension_size(dimension, check) != rest + sum(slopes[name] * check[name] for name in names):
            raise refused(self.place, f"a dimension of {dimension}", "one that is linear in the number of rows")
        total = self.ints(rest)
        for name, slope in slopes.items():
            if slope:
                total = self.add("Add", total, self.add("Mul", self.dimensions[name], self.ints(slope)))
        return total

    def shape(self, shape: Sequence[Any]) -> str:
        """A shape as an int64 vector."""
        if all(isinstance(size, int | np.integer) for size in shape):
            return self.ints(*map(int, shape))
        return self.add("Concat", *map(self.size, shape), axis=0)

    def reshape(self, value: str, shape: Sequence[Any]) -> str:
        """The value in another shape; a single dimension that is not known needs no computing."""
        unknown = [index for index, size in enumerate(shape) if not isinstance(size, int | np.integer)]
        if len(unknown) == 1 and 0 not in shape:
            shape = [-1 if index in unknown else size for index, size in enumerate(shape)]
        return self.add("Reshape", value, self.shape(shape))

    def transpose(self, value: str, order: Sequence[int]) -> str:
        """The value with its axes in another order."""
        return value if list(order) == sorted(order) else self.add("Transpose", value, perm=[int(i) for i in order])

    def slice(self, value: str, starts: str, ends: str, axes: Sequence[int], steps: Sequence[int]) -> str:
        """A slice along some axes."""
        return self.add("Slice", value, starts, ends, self.ints(*axes), self.ints(*steps))


def refused(place: Place, what: str, expected: str = "") -> InputError:
    """The error that ONNX has no operation for something, with the module and the line where it stands."""
    module, line = place.module, place.source
    where = f" in {module}" if module else ""
    at = f" ({line})" if line else ""
    return InputError(
        f"format onnx: ONNX has no operation for {what}{where}{at}; expected "
        f"{f'{expected}, or ' if expected else ''}--format stablehlo"
    )
