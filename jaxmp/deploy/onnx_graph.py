"""`Graph`: the nodes and constants of an ONNX graph, as a jaxpr is written into it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmp.errors import InputError
from jaxmp.jaxprs import Place
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


def whole_dtype(dtype: Any) -> np.dtype:
    """The dtype that computes on a narrow or unsigned integer dtype or bool: int32, or int64 for those of 32 bits.

    ONNX Runtime's CPU kernels take int32 and int64 for every arithmetic operation, and each lacks some of the others.
    """
    dtype = np.dtype(dtype)
    if dtype.kind not in "biu" or dtype == np.int32:
        return dtype
    return np.dtype(np.int64 if dtype.itemsize >= 4 else np.int32)


class Graph:
    """The nodes and constants of a graph; `above` is the graph that it is a body in, whose values it can read.

    `reserved` are the names of the model's inputs and outputs, which no other value gets.
    """

    def __init__(self, above: Graph | None = None, reserved: Iterable[str] = ()):
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.known: dict[Any, str] = {}
        self.dimensions: dict[str, str] = {} if above is None else above.dimensions
        self._names: set[str] = set(reserved) if above is None else above._names
        self._count: list[int] = [0] if above is None else above._count
        self.place: Place = Place() if above is None else above.place

    def name(self) -> str:
        """A name that no other value has."""
        while True:
            self._count[0] += 1
            name = f"v{self._count[0]}"
            if name not in self._names:
                self._names.add(name)
                return name

    def named(self, wanted: str) -> str:
        """The wanted name, followed by as many underscores as make it one that no other value has."""
        while wanted in self._names:
            wanted += "_"
        self._names.add(wanted)
        return wanted

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
        """The name of an initialiser for a weight: the given one, unless an input or output has it."""
        from onnx import numpy_helper

        name = self.named(name)
        self.constants.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def weight(self, name: str, value: Any) -> str:
        """The name of a weight as it is kept; it is stored in its own dtype."""
        array = np.asarray(value)
        return self.cast(self.stored(name, array), array.dtype, kept_dtype(array.dtype))

    def cast(self, value: str, source: Any, target: Any) -> str:
        """The value in another dtype."""
        return value if np.dtype(source) == np.dtype(target) else self.add("Cast", value, to=onnx_type(target))

    def add_whole(self, operation: str, dtype: Any, *values: str, more: Sequence[str] = (), **attributes: Any) -> str:
        """Adds a node that computes on integers in `whole_dtype`, and returns its result in their own dtype, wrapped.

        Args:
          operation: name of the operation.
          dtype: dtype of the values, as they are kept, and of the result.
          values: operands of that dtype.
          more: operands of other dtypes, which follow them.
          attributes: attributes of the node.
        """
        whole = whole_dtype(dtype)
        found = self.add(operation, *(self.cast(value, dtype, whole) for value in values), *more, **attributes)
        return self.cast(found, whole, dtype)

    def rounded(self, value: str, dtype: Any) -> str:
        """A float32 value on the grid of a narrower dtype."""
        attributes = {"saturate": 0} if np.dtype(dtype).itemsize == 1 else {}
        return self.add("Cast", self.add("Cast", value, to=onnx_type(dtype), **attributes), to=onnx_type(np.float32))

    def size(self, dimension: Any) -> str:
        """A dimension as a vector of one int64: a constant, or computed where the program runs."""
        if isinstance(dimension, int | np.integer):
            return self.ints(int(dimension))
        # JAX documents how it writes a dimension (`jax.export.symbolic_shape` reads it): Python but for the power.
        return self._sized(dimension, ast.parse(str(dimension).replace("^", "**"), mode="eval").body)

    def _sized(self, dimension: Any, tree: ast.expr) -> str:
        """A part of a dimension's formula as a vector of one int64."""
        operations = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul"}
        match tree:
            case ast.Constant(value=int(value)):
                return self.ints(value)
            case ast.Name(id=name) if name in self.dimensions:
                return self.dimensions[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self.add("Neg", self._sized(dimension, operand))
            case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int(power))) if power >= 1:
                base = self._sized(dimension, left)
                return self._joined("Mul", [base] * power)
            case ast.BinOp(left=left, op=operation, right=right) if type(operation) in operations:
                both = [self._sized(dimension, each) for each in (left, right)]
                return self.add(operations[type(operation)], *both)
            case ast.Call(func=ast.Name(id="max" | "min" as name), args=args):
                return self._joined(name.title(), [self._sized(dimension, each) for each in args])
            case ast.Call(func=ast.Name(id="floordiv" | "mod" as name), args=[left, right]):
                left_, right_ = (self._sized(dimension, each) for each in (left, right))
                rest = self.add("Mod", left_, right_)  # of the sign of the divisor, as Python's
                return rest if name == "mod" else self.add("Div", self.add("Sub", left_, rest), right_)
        raise refused(self.place, f"a dimension of {dimension}", "a formula of the number of rows")

    def _joined(self, operation: str, values: Sequence[str]) -> str:
        total = values[0]
        for value in values[1:]:
            total = self.add(operation, total, value)
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
    """The error that something cannot be written in ONNX's operations, with the module and the line where it stands."""
    module, line = place.module, place.source
    where = f" in {module}" if module else ""
    at = f" ({line})" if line else ""
    return InputError(
        f"format onnx: jaxmp writes no operation for {what}{where}{at}; expected "
        f"{f'{expected}, or ' if expected else ''}--format stablehlo"
    )
