"""`files`: a model as an ONNX file, made from its jaxpr operation by operation.

ONNX Runtime's CPU kernels know few operations on halves, so a float16 or bfloat16 value is kept as float32 here, and
rounded to its grid (Cast to the half and back) after each operation that leaves it. Products of halves are thus summed
in float32, as on a tensor core. A scan becomes Scan, a conditional If, a quantiser a rounding, to the same numbers (see
`jaxmp.deploy.onnx_rounding`). Symbolic numbers of rows stay symbolic. NaN, infinity and integer division by zero
give what they give in JAX. An operation that is not written here is refused, with the module it is in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jax.interpreters import partial_eval

from jaxmp.deploy.forward import Forward
from jaxmp.deploy.onnx_graph import Graph, interface_dtype, kept_dtype, onnx_type, refused, whole_dtype
from jaxmp.deploy.onnx_rounding import parse_scope, rounded, unpacked
from jaxmp.deploy.packed_weight import PackedWeight
from jaxmp.errors import InputError, install
from jaxmp.jaxprs import Place, called, equations, opened, quantiser, scan_counts, tracing
from jaxmp.precision.blocks import BlockFormat
from jaxmp.trees import is_floating

OPSET, IR = 20, 10
"""versions of ONNX's operations and of its file format, which ONNX Runtime 1.20 and later have"""

MOST_BYTES = 2**31 - 2**20
"""size of an ONNX file that holds its weights, protobuf's limit of 2 GiB"""

_UNARY = {
    **{"neg": "Neg", "exp": "Exp", "log": "Log", "tanh": "Tanh", "logistic": "Sigmoid", "sqrt": "Sqrt", "erf": "Erf"},
    **{"abs": "Abs", "sign": "Sign", "floor": "Floor", "ceil": "Ceil", "sin": "Sin", "cos": "Cos", "tan": "Tan"},
    **{"asin": "Asin", "acos": "Acos", "atan": "Atan", "sinh": "Sinh", "cosh": "Cosh", "asinh": "Asinh"},
    **{"acosh": "Acosh", "atanh": "Atanh"},
}
_BINARY = {
    **{"add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "max": "Max", "min": "Min"},
    **{"pow": "Pow", "eq": "Equal", "gt": "Greater", "lt": "Less", "ge": "GreaterOrEqual", "le": "LessOrEqual"},
}
_BITS = {"and": ("And", "BitwiseAnd"), "or": ("Or", "BitwiseOr"), "xor": ("Xor", "BitwiseXor")}
_REDUCE = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_prod": "ReduceProd"}
_SAME = {
    "copy",
    "copy_p",
    "stop_gradient",
    "sharding_constraint",
    "name",
    "pvary",
    "device_put",
    "optimization_barrier",
}
_ON_GRID = {
    *(
        "reshape",
        "squeeze",
        "expand_dims",
        "transpose",
        "broadcast_in_dim",
        "slice",
        "concatenate",
        "stack",
        "gather",
        "pad",
    ),
    *("select_n", "max", "min", "neg", "abs", "sign", "reduce_max", "reduce_min", "clamp", "rev", "split", "floor"),
    *("dynamic_slice", "dynamic_update_slice", "reduce_window_max", "reduce_window_min", "ceil", "round", "tile"),
    *("scatter", "scatter-max", "scatter-min", *_SAME),
}
"""primitives whose results are on the grid of a half if their operands are"""


def require_packages() -> None:
    """Raises InputError if a package that ONNX files need is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise InputError(f"format onnx needs {error.name}: {install('onnx')}") from None


def files(of: Forward, packed: Mapping[str, PackedWeight] = {}) -> dict[str, bytes]:  # only read
    """The model as `model.onnx`, its weights inside, by the name of the file.

    Args:
      of: the function of plain weights.
      packed: weights that the file has packed, by path, with the operations that decode them.

    Raises: InputError for an operation that is not written here, with the module it is in; or for more than 2 GiB.
    """
    size = sum(
        packed[name].nbytes if name in packed else np.asarray(weight).nbytes for name, weight in of.weights.items()
    )
    if size > MOST_BYTES:
        raise InputError(
            f"format onnx: the weights are {size:,} bytes, and an ONNX file holds at most {MOST_BYTES:,}; expected "
            "--format stablehlo"
        )
    return {"model.onnx": _model(of, packed).SerializeToString()}


def _model(of: Forward, packed: Mapping[str, PackedWeight]) -> Any:
    """The `onnx.ModelProto` of a forward function."""
    import onnx
    from onnx import helper

    weights, state, inputs = of.arguments()
    with tracing("export: the model does not trace", "a model for any number of rows"):
        closed = jax.make_jaxpr(of.function)(weights, state, inputs)
    jaxpr: Any = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)[0]
    names = [*of.state, *of.inputs]
    if twice := sorted(name for name in of.state if name in of.inputs):
        raise InputError(
            f"format onnx: {twice[0]!r} names an array of the cache and a column of the data; expected another name "
            "for the column"
        )
    graph = Graph(reserved=names)
    # ONNX Runtime returns outputs in their order: one that has an input's name gets another in the file.
    results = [graph.named(name) for name in (*of.outputs, *(f"{name} after" for name in of.state))]
    for name, spec in {**of.state, **of.inputs}.items():
        for axis, size in enumerate(spec.shape):
            if not isinstance(size, int) and str(size) not in graph.dimensions:
                shape = graph.add("Shape", name)
                graph.dimensions[str(size)] = graph.add("Slice", shape, graph.ints(axis), graph.ints(axis + 1))
    given = [
        _unpacked(graph, name, packed[name]) if name in packed else graph.weight(name, weight)
        for name, weight in of.weights.items()
    ]
    for name, spec in {**of.state, **of.inputs}.items():
        given.append(graph.cast(name, interface_dtype(spec.dtype), kept_dtype(spec.dtype)))
    found = _convert(graph, jaxpr, closed.consts, given, Place())
    for value in found:
        if isinstance(value, InputError):
            raise value
    avals = [variable.aval for variable in jaxpr.outvars]
    for name, value, aval in zip(results, found, avals, strict=True):
        graph.nodes.append(
            helper.make_node("Cast", [value], [name], to=onnx_type(interface_dtype(aval.dtype)), name=f"output {name}")
        )

    def described(name: str, aval: Any) -> Any:
        shape = [size if isinstance(size, int) else str(size) for size in aval.shape]
        return helper.make_tensor_value_info(name, onnx_type(interface_dtype(aval.dtype)), shape)

    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "jaxmp",
            [described(name, spec) for name, spec in zip(names, [*state, *inputs], strict=True)],
            [described(name, aval) for name, aval in zip(results, avals, strict=True)],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR,
        producer_name="jaxmp",
    )
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        first = str(error).strip().partition("\n")[0]
        raise InputError(f"format onnx: the file is not valid ONNX ({first}); expected --format stablehlo") from error
    return model


def _unpacked(graph: Graph, name: str, weight: PackedWeight) -> str:
    """The name of a weight that is stored packed; see `PackedWeight.unpack`."""
    value = unpacked(graph, name, weight.blocks)
    if weight.after is not None:
        value = graph.add("Mul", value, graph.stored(f"{name}.after", np.asarray(weight.after)))
    value = graph.reshape(value, [weight.like.shape[axis] for axis in weight.order])
    return _on_grid(graph, graph.transpose(value, np.argsort(weight.order).tolist()), weight.like)


def _convert(graph: Graph, jaxpr: Any, consts: Sequence[Any], given: Sequence[str], place: Place) -> list[str]:
    """Adds the equations of an open jaxpr, and returns the names of its results.

    Args:
      graph: the graph that they are added to.
      jaxpr: the open jaxpr.
      consts: its constants, arrays.
      given: names of its inputs.
      place: where it stands.
    """
    names: dict[Any, Any] = dict(zip(jaxpr.invars, given, strict=True))
    for variable, value in zip(jaxpr.constvars, consts, strict=True):
        names[variable] = _constant(graph, value, variable.aval.dtype, place)

    def read(atom: Any) -> Any:
        aval: Any = atom.aval
        return _constant(graph, atom.val, aval.dtype, place) if isinstance(atom, Literal) else names[atom]

    for eqn in jaxpr.eqns:
        graph.place = at = place.at(eqn)
        operands = [read(atom) for atom in eqn.invars]
        try:
            results = _equation(graph, eqn, operands, at)
        except jax.errors.InconclusiveDimensionOperation as error:
            what = f"{eqn.primitive.name} of sizes that depend so on the number of rows"
            raise refused(at, what, "sizes that can be compared") from error
        names.update(zip(eqn.outvars, results, strict=True))
    graph.place = place
    return [read(atom) for atom in jaxpr.outvars]


def _constant(graph: Graph, value: Any, dtype: Any, place: Place) -> Any:
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return _no_draws(place)
    return graph.constant(np.asarray(value).astype(dtype).astype(kept_dtype(dtype)))


def _no_draws(place: Place) -> InputError:
    return refused(place, "random draws", "a model that draws nothing in evaluation")


def _equation(graph: Graph, eqn: Any, operands: list[Any], place: Place) -> list[Any]:
    """Adds one equation, and returns the names of its results.

    A random key is an error in the place of a name, which is raised where anything but a key is made of it: the product
    of a recipe takes a key, which its rounding to nearest does not read.
    """
    name = eqn.primitive.name
    if name in _SAME:
        return operands
    inner = called(eqn)
    if inner is not None:
        return _call(graph, eqn, inner, operands, place)
    if eqn.outvars and all(jnp.issubdtype(variable.aval.dtype, jax.dtypes.prng_key) for variable in eqn.outvars):
        return [_no_draws(place)] * len(eqn.outvars)
    for operand in operands:
        if isinstance(operand, InputError):
            raise operand
    if name in _SEVERAL:
        results = _SEVERAL[name](graph, eqn, operands, place)
    else:
        write = _SINGLE.get(name)
        if write is None:
            raise refused(place, _described(name, place))
        results = [write(graph, eqn, operands, place)]
    if name in _ON_GRID:
        return results
    return [_on_grid(graph, value, variable.aval) for value, variable in zip(results, eqn.outvars, strict=True)]


def _described(name: str, place: Place) -> str:
    format = quantiser(place.names)
    if format:
        return f"rounding to the emulated format {format}"
    return "random draws" if name.startswith(("random_", "threefry")) else f"the primitive {name!r}"


def _call(graph: Graph, eqn: Any, inner: Any, operands: list[Any], place: Place) -> list[Any]:
    """A call of a jaxpr: its equations; a quantiser is one rounding."""
    jaxpr, consts = opened(inner)
    inside = list(equations(jaxpr, place.names))
    scopes = {quantiser(names) for _, names in inside}
    # Quantisers look at the bits of a number, unlike what else may be called beside them.
    looks_at_bits = any(each.primitive.name == "bitcast_convert_type" for each, _ in inside)
    if len(scopes) == 1 and looks_at_bits and len(eqn.invars) == 1 and len(eqn.outvars) == 1:
        format, aval = parse_scope(scopes.pop()), eqn.outvars[0].aval
        axes = _block_axes(jaxpr) if isinstance(format, BlockFormat) else {}
        if format is not None and axes is not None:
            return [_on_grid(graph, rounded(graph, operands[0], format, aval, axes), aval)]
    return _convert(graph, jaxpr, consts, operands, place)


def _block_axes(jaxpr: Any) -> dict[int, Any] | None:
    """The axes along which the blocks of a quantiser run, with their lengths.

    They are those of its maximum over the inner axes of an array in blocks.
    """
    for eqn, _ in equations(jaxpr):
        if eqn.primitive.name == "reduce_max":
            shape = eqn.invars[0].aval.shape
            return {axis - 1 - place: shape[axis] for place, axis in enumerate(sorted(eqn.params["axes"]))}
    return None


def _on_grid(graph: Graph, value: Any, aval: Any) -> Any:
    """A value that was computed in float32, rounded to the half that it is in JAX."""
    if is_floating(aval) and kept_dtype(aval.dtype) != aval.dtype:
        return graph.rounded(value, aval.dtype)
    return value


# One function for each primitive, or group of primitives: `(graph, eqn, operands, place) -> name of the result`.


def _unary(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    name, dtype = eqn.primitive.name, kept_dtype(eqn.invars[0].aval.dtype)
    if name == "neg":
        return graph.add_whole("Neg", dtype, operands[0])
    return graph.add(_UNARY[name], operands[0])


def _binary(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    name, dtypes = eqn.primitive.name, [kept_dtype(atom.aval.dtype) for atom in eqn.invars]
    if name in ("max", "min"):
        if dtypes[0].kind == "b":
            return graph.add({"max": "Or", "min": "And"}[name], *operands)
        return graph.add_whole(_BINARY[name], dtypes[0], *operands)
    if dtypes[0].kind == "b" and name in ("gt", "lt", "ge", "le"):
        operands = [graph.cast(operand, bool, np.int32) for operand in operands]
    if name == "pow" and dtypes[0] != dtypes[1]:
        operands[1] = graph.cast(operands[1], dtypes[1], dtypes[0])
    return graph.add(_BINARY[name], *operands)


def _quotient(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    """Quotients and remainders; of integers those of XLA, where a division by zero is defined: -1, and the dividend.

    ONNX Runtime stops at an integer division by zero, and the processor at one of the smallest integer by -1.
    Source: https://openxla.org/xla/operation_semantics, "Element-wise binary arithmetic operations".
    """
    divides, dtype = eqn.primitive.name == "div", kept_dtype(eqn.invars[0].aval.dtype)
    if dtype.kind == "f":
        return graph.add("Div", *operands) if divides else graph.add("Mod", *operands, fmod=1)
    whole = whole_dtype(dtype)
    x, y = (graph.cast(operand, dtype, whole) for operand in operands)

    def computed(y: str) -> str:
        return graph.add("Div", x, y) if divides else graph.add("Mod", x, y, fmod=1)

    divisor = eqn.invars[1]
    if isinstance(divisor, Literal) and np.ndim(divisor.val) == 0 and int(divisor.val) not in (0, -1):
        return graph.cast(computed(y), whole, dtype)
    zero, one, minus = (graph.constant(value, whole) for value in (0, 1, -1))
    is_zero, is_minus = graph.add("Equal", y, zero), graph.add("Equal", y, minus)
    found = computed(graph.add("Where", graph.add("Or", is_zero, is_minus), one, y))
    if divides:
        found = graph.add("Where", is_minus, graph.add("Neg", x), found)
    return graph.cast(graph.add("Where", is_zero, minus if divides else x, found), whole, dtype)


def _not_equal(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    return graph.add("Not", graph.add("Equal", *operands))


def _bits(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    logical, bitwise = _BITS[eqn.primitive.name]
    return graph.add(logical if eqn.outvars[0].aval.dtype == bool else bitwise, *operands)


def _not(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    return graph.add("Not" if eqn.outvars[0].aval.dtype == bool else "BitwiseNot", operands[0])


def _reduce(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    name, axes, dtype = eqn.primitive.name, eqn.params["axes"], kept_dtype(eqn.invars[0].aval.dtype)
    if not axes:
        return operands[0]
    found = graph.add_whole(_REDUCE[name], dtype, operands[0], more=[graph.ints(*axes)], keepdims=0)
    if dtype.kind != "f" or name not in ("reduce_max", "reduce_min"):
        return found
    # ONNX Runtime's maximum takes no notice of a NaN.
    bad = graph.cast(graph.add("ReduceMax", _nans(graph, operands[0]), graph.ints(*axes), keepdims=0), np.uint8, bool)
    return graph.add("Where", bad, graph.constant(np.nan, dtype), found)


def _nans(graph: Graph, value: str) -> str:
    """1 where a float is NaN, else 0, uint8: its maximum tells whether there is one."""
    return graph.cast(graph.add("IsNaN", value), bool, np.uint8)


def _reduce_bool(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    operation, axes = {"reduce_or": "ReduceMax", "reduce_and": "ReduceMin"}[eqn.primitive.name], eqn.params["axes"]
    if not axes:
        return operands[0]
    dtype = eqn.invars[0].aval.dtype
    if dtype.kind != "b":
        raise refused(place, f"{eqn.primitive.name} of {dtype}", "one of bools")
    return graph.add_whole(operation, bool, operands[0], more=[graph.ints(*axes)], keepdims=0)


def _arg(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    (axis,) = eqn.params["axes"]
    dtype, how = kept_dtype(eqn.invars[0].aval.dtype), {"axis": axis, "keepdims": 0}
    operation = {"argmax": "ArgMax", "argmin": "ArgMin"}[eqn.primitive.name]
    found = graph.add(operation, graph.cast(operands[0], dtype, whole_dtype(dtype)), **how)
    if dtype.kind == "f":  # JAX gives the place of the first NaN
        nans = _nans(graph, operands[0])
        bad = graph.cast(graph.add("ReduceMax", nans, graph.ints(axis), keepdims=0), np.uint8, bool)
        found = graph.add("Where", bad, graph.add("ArgMax", nans, **how), found)
    return graph.cast(found, np.int64, eqn.outvars[0].aval.dtype)


def _cumulative(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    axis, reverse = graph.constant(eqn.params["axis"], np.int64), int(eqn.params["reverse"])
    return graph.add_whole("CumSum", kept_dtype(eqn.invars[0].aval.dtype), operands[0], more=[axis], reverse=reverse)


def _dot(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    (contract, other_contract), (batch, other_batch) = eqn.params["dimension_numbers"]
    left, right = (atom.aval.ndim for atom in eqn.invars)
    # Integers are summed in the dtype of the result, or a wider one: it wraps to the same.
    out = kept_dtype(eqn.outvars[0].aval.dtype)
    whole = whole_dtype(out)
    operands = [
        graph.cast(operand, kept_dtype(atom.aval.dtype), whole)
        for operand, atom in zip(operands, eqn.invars, strict=True)
    ]
    # The usual layouts are MatMul's own.
    many = list(range(len(batch)))
    if (
        list(batch) == list(other_batch) == many
        and list(contract) == [left - 1]
        and list(other_contract) == [len(many)]
        and right == len(many) + 2
        and (left == right or not many)
        and left > 1
    ):
        return graph.cast(graph.add("MatMul", *operands), whole, out)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    mine, its = [""] * left, [""] * right
    for i, j in zip((*batch, *contract), (*other_batch, *other_contract), strict=True):
        mine[i] = its[j] = next(letters)
    mine, its = ([letter or next(letters) for letter in each] for each in (mine, its))
    left_over = [mine[i] for i in batch]
    left_over += [letter for i, letter in enumerate(mine) if i not in batch and i not in contract]
    left_over += [letter for j, letter in enumerate(its) if j not in other_batch and j not in other_contract]
    equation = f"{''.join(mine)},{''.join(its)}->{''.join(left_over)}"
    return graph.cast(graph.add("Einsum", *operands, equation=equation), whole, out)


def _convolution(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    params, layout = eqn.params, eqn.params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        raise refused(place, "a convolution in groups of rows")
    if eqn.outvars[0].aval.dtype.kind in "iu":
        raise refused(place, f"a convolution of {eqn.outvars[0].aval.dtype}", "one of floats")
    x = graph.transpose(operands[0], layout.lhs_spec)
    kernel = graph.transpose(operands[1], layout.rhs_spec)
    low, high = zip(*params["padding"], strict=True) if params["padding"] else ((), ())
    dilations, groups = list(params["rhs_dilation"]), params["feature_group_count"]
    if all(dilation == 1 for dilation in params["lhs_dilation"]):
        if min((*low, *high), default=0) < 0:
            raise refused(place, "a convolution that pads by less than nothing")
        y = graph.add(
            "Conv",
            x,
            kernel,
            strides=list(params["window_strides"]),
            pads=[*map(int, low), *map(int, high)],
            dilations=dilations,
            group=groups,
        )
    else:
        # A convolution of what is dilated is the transpose of one with strides, by the kernel turned around.
        spatial = [int(size) for size in np.array(eqn.invars[1].aval.shape)[list(layout.rhs_spec[2:])]]
        reach = [dilation * (size - 1) for dilation, size in zip(dilations, spatial, strict=True)]
        begin = [far - pad for far, pad in zip(reach, low, strict=True)]
        # Unlike in JAX, what ends the last stride is a part of the output only where it is asked for.
        end = [far - pad for far, pad in zip(reach, high, strict=True)]
        more = [max(0, -size) for size in end]
        strides = list(params["lhs_dilation"])
        beyond = any(size >= stride for size, stride in zip(more, strides, strict=True))  # ONNX refuses it
        if groups != 1 or any(stride != 1 for stride in params["window_strides"]) or min(begin) < 0 or beyond:
            raise refused(place, "this transposed convolution")
        axes = list(range(2, 2 + len(spatial)))
        turned = graph.slice(
            graph.transpose(kernel, [1, 0, *axes]),
            graph.ints(*[-1] * len(axes)),
            graph.ints(*[-(2**31)] * len(axes)),
            axes,
            [-1] * len(axes),
        )
        y = graph.add(
            "ConvTranspose",
            x,
            turned,
            strides=strides,
            dilations=dilations,
            pads=[*begin, *(max(0, size) for size in end)],
            output_padding=more,
        )
    return graph.transpose(y, np.argsort(layout.out_spec).tolist())


def _pool(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    """Pooling of floats by MaxPool and AveragePool where they can; else one axis after the other, by slices."""
    params, window, dtype = eqn.params, eqn.params["window_dimensions"], kept_dtype(eqn.outvars[0].aval.dtype)
    strides, dilations, padding = (params[name] for name in ("window_strides", "window_dilation", "padding"))
    name = eqn.primitive.name.removeprefix("reduce_window_")
    if {*params["base_dilation"]} - {1}:
        raise refused(place, "pooling of an array with gaps between its elements")
    spatial = [
        axis for axis, size in enumerate(window) if size != 1 or strides[axis] != 1 or tuple(padding[axis]) != (0, 0)
    ]
    if not spatial:
        return operands[0]
    others = [axis for axis in range(len(window)) if axis not in spatial]
    dilated = any(dilations[axis] != 1 for axis in spatial)
    # ONNX Runtime refuses more; with gaps, a window might hold nothing but padding.
    most = {axis: 0 if dilated else window[axis] - 1 for axis in spatial}
    within = all(0 <= int(pad) <= most[axis] for axis in spatial for pad in padding[axis])
    # ONNX's pooling is over one to three axes, which follow two others; those in excess are pooled by windows of one.
    excess, others = others[1:-1], [*others[:1], *others[1:][-1:]]
    pooled = sorted([*excess, *spatial])
    if dtype.kind != "f" or not within or len(others) != 2 or len(pooled) > 3 or (dilated and name == "sum"):
        return _pool_by_slices(graph, eqn, operands[0], spatial, place)
    order = [*others, *pooled]
    how: dict[str, Any] = {
        "kernel_shape": [window[axis] for axis in pooled],
        "strides": [strides[axis] for axis in pooled],
        "pads": [int(padding[axis][side]) for side in (0, 1) for axis in pooled],
    }
    x = graph.transpose(operands[0], order)
    if name == "sum":
        mean = graph.add("AveragePool", x, count_include_pad=1, **how)
        y = graph.add("Mul", mean, graph.constant(math.prod(window), dtype))
    else:
        how |= {"dilations": [dilations[axis] for axis in pooled]} if dilated else {}
        y = graph.add("MaxPool", x if name == "max" else graph.add("Neg", x), **how)
        if len(pooled) == 3:  # where ONNX Runtime's maximum begins with the least finite number
            least = graph.add("LessOrEqual", y, graph.constant(np.finfo(dtype).min, dtype))
            y = graph.add("Where", least, graph.constant(-np.inf, dtype), y)
        y = y if name == "max" else graph.add("Neg", y)
        # MaxPool takes no notice of a NaN.
        bad = graph.cast(graph.add("MaxPool", _nans(graph, x), **how), np.uint8, bool)
        y = graph.add("Where", bad, graph.constant(np.nan, dtype), y)
    return graph.transpose(y, np.argsort(order).tolist())


_MOST_SLICES = 1024
"""slices by which an array is pooled: each is a node of the graph"""


def _pool_by_slices(graph: Graph, eqn: Any, value: str, axes: Sequence[int], place: Place) -> str:
    """Pooling along one axis after the other, as the maximum, minimum or sum of shifted slices; exact for integers."""
    params, dtype = eqn.params, kept_dtype(eqn.outvars[0].aval.dtype)
    window, name, whole = (
        params["window_dimensions"],
        eqn.primitive.name.removeprefix("reduce_window_"),
        whole_dtype(dtype),
    )
    if sum(window[axis] for axis in axes) > _MOST_SLICES:
        raise refused(place, f"pooling of {dtype} over a window of {list(window)}", "a smaller window")
    operation = {"max": "Max", "min": "Min", "sum": "Add"}[name]
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    neutral = {"max": limits.min, "min": limits.max, "sum": 0}[name]
    if dtype.kind == "f" and name != "sum":
        neutral = -np.inf if name == "max" else np.inf
    value = graph.cast(value, dtype, whole)
    for axis in axes:
        stride, dilation, (low, high) = (params[key][axis] for key in ("window_strides", "window_dilation", "padding"))
        value = _padded(graph, value, [(axis, low, high)], graph.constant(neutral, whole))
        count, parts = eqn.outvars[0].aval.shape[axis], []
        for index in range(window[axis]):
            begin = index * dilation
            end = graph.size(begin + (count - 1) * stride + 1)
            parts.append(graph.slice(value, graph.ints(begin), end, [axis], [stride]))
        value = parts[0]
        for part in parts[1:]:
            value = graph.add(operation, value, part)
    return graph.cast(value, whole, dtype)


def _padded(graph: Graph, value: str, padding: Sequence[tuple[int, Any, Any]], fill: str) -> str:
    """A value with more elements before and after along some axes, or fewer where a number is below zero.

    Args:
      graph: the graph.
      value: an array of a dtype that Pad takes.
      padding: `(axis, low, high)`, the numbers may be symbolic.
      fill: the element that is added.
    """
    if more := [
        (axis, low if _at_least(low, 0) else 0, high if _at_least(high, 0) else 0) for axis, low, high in padding
    ]:
        axes, low, high = zip(*more, strict=True)
        if any(_is_not_zero(each) for each in (*low, *high)):
            value = graph.add("Pad", value, graph.shape([*low, *high]), fill, graph.ints(*axes), mode="constant")
    fewer = [(axis, 0 if _at_least(low, 0) else -low, 0 if _at_least(high, 0) else high) for axis, low, high in padding]
    for axis, low, high in fewer:
        if _is_not_zero(low) or _is_not_zero(high):
            end = graph.size(high) if _is_not_zero(high) else graph.ints(2**31)
            value = graph.slice(value, graph.size(low), end, [axis], [1])
    return value


def _at_least(size: Any, than: int) -> bool:
    """Whether a size is at least a number, for any number of rows; an error of JAX's if that depends on it."""
    return bool(size >= than)


def _is_not_zero(size: Any) -> bool:
    """Whether a size may be other than zero: a symbolic one."""
    return not isinstance(size, int | np.integer) or size != 0


def _convert_type(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    """A value in another dtype; a float that an integer dtype does not have becomes the nearest one, and NaN zero."""
    source, target = kept_dtype(eqn.invars[0].aval.dtype), kept_dtype(eqn.params["new_dtype"])
    if source.kind != "f" or target.kind not in "iu":
        return graph.cast(operands[0], source, target)  # `_equation` puts it on the grid
    limits = np.iinfo(target)
    x = graph.add("Where", graph.add("IsNaN", operands[0]), graph.constant(0, source), operands[0])
    # The largest integer may have no float: 2^31 - 1 has none in float32.
    above = 2.0 ** (target.itemsize * 8 - (target.kind == "i"))
    largest = np.nextafter(np.asarray(above, source), np.asarray(0, source))
    inside = graph.add("Min", graph.add("Max", x, graph.constant(limits.min, source)), graph.constant(largest))
    found = graph.cast(inside, source, target)
    if int(largest) == limits.max:
        return found
    is_above = graph.add("GreaterOrEqual", x, graph.constant(above, source))
    return graph.add("Where", is_above, graph.constant(limits.max, target), found)


def _reduce_precision(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    bits = eqn.params["exponent_bits"], eqn.params["mantissa_bits"]
    known = {(8, 7): jnp.bfloat16, (5, 10): np.float16}
    if bits == (8, 23):
        return operands[0]
    if bits not in known:
        raise refused(place, f"rounding to {bits[0]} bits of exponent and {bits[1]} of mantissa")
    value = graph.rounded(operands[0], known[bits])
    if bits != (5, 10):
        return value
    # XLA rounds to 11 bits first, and makes what is then below the smallest normal number a zero.
    is_small = graph.add("Less", graph.add("Abs", operands[0]), graph.constant(np.float32(2.0**-14 - 2.0**-26)))
    return graph.add("Where", is_small, graph.add("Mul", operands[0], graph.constant(np.float32(0))), value)


def _broadcast(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    shape, axes = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    before = eqn.invars[0].aval.shape
    between: list[Any] = [1] * len(shape)
    for axis, size in zip(axes, before, strict=True):
        between[axis] = size
    value = operands[0] if tuple(between) == tuple(before) else graph.reshape(operands[0], between)
    return value if tuple(between) == tuple(shape) else graph.add("Expand", value, graph.shape(shape))


def _reshape(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    return graph.reshape(operands[0], eqn.outvars[0].aval.shape)


def _tile(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    return graph.add("Tile", operands[0], graph.shape(eqn.params["reps"]))


def _transpose(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    return graph.transpose(operands[0], eqn.params["permutation"])


def _concatenate(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    return graph.add("Concat", *operands, axis=eqn.params["dimension"])


def _slice(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    start, limit, steps = (eqn.params[name] for name in ("start_indices", "limit_indices", "strides"))
    axes = range(len(start))
    return graph.slice(operands[0], graph.shape(start), graph.shape(limit), axes, steps or [1] * len(start))


def _reverse(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    axes = eqn.params["dimensions"]
    ends = graph.ints(*[-(2**31)] * len(axes))
    return graph.slice(operands[0], graph.ints(*[-1] * len(axes)), ends, axes, [-1] * len(axes))


def _pad(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    config, dtype = eqn.params["padding_config"], kept_dtype(eqn.invars[0].aval.dtype)
    whole = whole_dtype(dtype)
    value, fill = (graph.cast(operand, dtype, whole) for operand in operands)
    shape = list(eqn.invars[0].aval.shape)
    for axis, (_, _, interior) in enumerate(config):
        if interior:  # each element is followed by some, which are cut off after the last one
            value = _padded(graph, graph.add("Unsqueeze", value, graph.ints(axis + 1)), [(axis + 1, 0, interior)], fill)
            shape[axis] = shape[axis] * (1 + interior)
            value = _padded(graph, graph.reshape(value, shape), [(axis, 0, -interior)], fill)
            shape[axis] = shape[axis] - interior
    padding = [(axis, low, high) for axis, (low, high, _) in enumerate(config)]
    return graph.cast(_padded(graph, value, padding, fill), whole, dtype)


def _select(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    which, *cases = operands
    dtype = eqn.outvars[0].aval.dtype
    shape = eqn.outvars[0].aval.shape
    if eqn.invars[0].aval.shape != shape:  # a scalar, which chooses a whole array
        which = graph.add("Expand", which, graph.shape(shape))
    if eqn.invars[0].aval.dtype.kind == "b":
        return _where(graph, which, cases[1], cases[0], dtype)
    chosen = cases[-1]
    for index, case in reversed(list(enumerate(cases[:-1]))):
        is_case = graph.add("Equal", which, graph.constant(index, eqn.invars[0].aval.dtype))
        chosen = _where(graph, is_case, case, chosen, dtype)
    return chosen


def _where(graph: Graph, condition: str, yes: str, no: str, dtype: Any) -> str:
    kept = kept_dtype(dtype)
    whole = whole_dtype(kept)
    if kept.kind != "b":
        yes, no = (graph.cast(value, kept, whole) for value in (yes, no))
        return graph.cast(graph.add("Where", condition, yes, no), whole, kept)
    return graph.add("Or", graph.add("And", condition, yes), graph.add("And", graph.add("Not", condition), no))


def _iota(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    shape, axis, dtype = (eqn.params[name] for name in ("shape", "dimension", "dtype"))
    counted = graph.cast(_counted(graph, shape[axis]), np.int64, kept_dtype(dtype))
    if len(shape) == 1:
        return counted
    between = [shape[axis] if each == axis else 1 for each in range(len(shape))]
    return graph.add("Expand", graph.reshape(counted, between), graph.shape(shape))


def _dimension(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    size = graph.reshape(graph.size(eqn.params["dim"]), ())
    return graph.cast(size, np.int64, eqn.outvars[0].aval.dtype)


def _clamp(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    low, x, high = operands
    dtype = kept_dtype(eqn.invars[1].aval.dtype)
    return graph.add_whole("Min", dtype, graph.add_whole("Max", dtype, x, low), high)


def _is_finite(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    return graph.add("Not", graph.add("Or", graph.add("IsNaN", operands[0]), graph.add("IsInf", operands[0])))


def _integer_pow(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    exponent, dtype = eqn.params["y"], kept_dtype(eqn.invars[0].aval.dtype)
    if exponent == 2:
        return graph.add("Mul", operands[0], operands[0])
    if dtype.kind in "iu" and exponent >= 1:  # Pow computes in floats, and does not wrap
        bits = bin(exponent)[3:]
        found = operands[0]
        for bit in bits:
            found = graph.add("Mul", found, found)
            found = graph.add("Mul", found, operands[0]) if bit == "1" else found
        return found
    return graph.add("Pow", operands[0], graph.constant(exponent, dtype))


def _square(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    return graph.add("Mul", operands[0], operands[0])


def _rsqrt(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    return graph.add("Reciprocal", graph.add("Sqrt", operands[0]))


def _erfc(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    """erfc(|x|) = exp(-x^2) t g(t) with t = 1 / (1 + |x| / 2), and 2 - erfc(|x|) below zero, to 5e-7 of each.

    1 - erf(x) would lose the tail. x^2 is h^2 + (x - h)(x + h), with h so short that h^2 is exact.
    """

    def number(value: float) -> str:
        return graph.constant(np.float32(value))

    x = graph.add("Min", graph.add("Abs", operands[0]), number(16))  # erfc(16) is below the smallest float32
    t = graph.add("Reciprocal", graph.add("Add", graph.add("Mul", x, number(0.5)), number(1)))
    u = graph.add("Sub", graph.add("Mul", t, number(2)), number(1))
    g = number(_ERFC[-1])
    for coefficient in reversed(_ERFC[:-1]):
        g = graph.add("Add", graph.add("Mul", g, u), number(coefficient))
    h = graph.add("Mul", graph.add("Round", graph.add("Mul", x, number(16))), number(1 / 16))
    more = graph.add("Mul", graph.add("Sub", x, h), graph.add("Add", x, h))
    powers = [graph.add("Exp", graph.add("Neg", each)) for each in (graph.add("Mul", h, h), more)]
    tail = graph.add("Mul", graph.add("Mul", *powers), graph.add("Mul", t, g))
    below = graph.add("Less", operands[0], number(0))
    return graph.add("Where", below, graph.add("Sub", number(2), tail), tail)


_ERFC = (
    *(0.510791361, 0.343580306, 0.139735788, 0.0182219706, -0.0107520213, -0.00324519165, 0.0015302687),
    *(0.000434734189, -0.000300656189, -4.07332918e-05, 4.26715742e-05, 1.52198629e-06),
)
"""coefficients of g(t) = exp(x^2) erfc(x) / t in powers of u = 2 t - 1, lowest first, for all x >= 0:
    u = numpy.cos(numpy.pi * (numpy.arange(400) + 0.5) / 400); t = (u + 1) / 2
    g = scipy.special.erfcx(2 / t - 2) / t
    numpy.polynomial.chebyshev.cheb2poly(numpy.polynomial.chebyshev.chebfit(u, g, 11, w=1 / g))
"""


def _exp2(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    return graph.add("Pow", graph.constant(np.float32(2)), operands[0])


def _log1p(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    """log(1 + x) = log(u) x / (u - 1) with u the rounded 1 + x, and x where u is 1 (Kahan).

    Source: N. Higham, Accuracy and Stability of Numerical Algorithms, 2002, problem 1.5.
    """
    one = graph.constant(np.float32(1))
    u = graph.add("Add", operands[0], one)
    is_one = graph.add("Or", graph.add("Equal", u, one), graph.add("IsInf", u, detect_negative=0))
    safe = graph.add("Where", is_one, graph.constant(np.float32(2)), u)
    value = graph.add("Div", graph.add("Mul", graph.add("Log", safe), operands[0]), graph.add("Sub", safe, one))
    return graph.add("Where", is_one, operands[0], value)


def _expm1(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    """exp(x) - 1 = (u - 1) x / log(u) with u the rounded exp(x); x where u is 1, u - 1 where it is far from 1.

    Source: N. Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 1.14.1.
    """
    one, x = graph.constant(np.float32(1)), operands[0]
    u = graph.add("Exp", x)
    less = graph.add("Sub", u, one)
    is_far = graph.add("Greater", graph.add("Abs", less), graph.constant(np.float32(0.5)))
    is_one = graph.add("Equal", u, one)
    safe = graph.add("Where", graph.add("Or", is_far, is_one), graph.constant(np.float32(2)), u)
    value = graph.add("Div", graph.add("Mul", less, x), graph.add("Log", safe))
    return graph.add("Where", is_one, x, graph.add("Where", is_far, less, value))


def _round(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    if "EVEN" in str(eqn.params["rounding_method"]):
        return graph.add("Round", operands[0])
    # |x| + 0.5 would be rounded; the fraction is exact.
    magnitude = graph.add("Abs", operands[0])
    floor = graph.add("Floor", magnitude)
    is_up = graph.add("GreaterOrEqual", graph.add("Sub", magnitude, floor), graph.constant(np.float32(0.5)))
    near = graph.add("Add", floor, graph.cast(is_up, bool, np.float32))
    return graph.add("Mul", graph.add("Sign", operands[0]), near)


def _shift(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    if eqn.outvars[0].aval.dtype.kind != "u":
        raise refused(place, f"{eqn.primitive.name} of signed numbers")
    return graph.add("BitShift", *operands, direction="LEFT" if "left" in eqn.primitive.name else "RIGHT")


def _gather(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    """Slices of an array that begin where the data say: Gather where whole rows are taken along one axis."""
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    operand, indices, out = eqn.invars[0].aval, eqn.invars[1].aval, eqn.outvars[0].aval
    sizes = params["slice_sizes"]
    given = graph.cast(operands[1], indices.dtype, np.int64)
    starts, fits = _starts(graph, given, indices.shape, numbers.start_index_map, operand.shape, sizes)
    batching = tuple(numbers.operand_batching_dims)
    rows = [axis for axis in range(out.ndim) if axis not in numbers.offset_dims]
    windows = [axis for axis in range(operand.ndim) if axis not in (*numbers.collapsed_slice_dims, *batching)]
    whole = all(sizes[axis] == operand.shape[axis] for axis in windows)
    one = len(starts) == 1 and tuple(numbers.collapsed_slice_dims) == tuple(starts)
    if one and whole and not batching:
        (axis,) = starts
        found = graph.add("Gather", operands[0], starts[axis], axis=axis)
        # ONNX puts the indices' axes in the place of the one that is taken from; JAX where offset_dims leaves room.
        order = [*numbers.offset_dims[:axis], *rows, *numbers.offset_dims[axis:]]
        found = graph.transpose(found, np.argsort(order).tolist())
    else:
        along = dict(zip(windows, numbers.offset_dims, strict=True))
        along |= {axis: rows[row] for axis, row in zip(batching, numbers.start_indices_batching_dims, strict=True)}
        places = []
        for each in _places(graph, operand.ndim, starts, rows, along, indices.shape, out.shape):
            spread = graph.add("Expand", each, graph.shape(out.shape))
            places.append(graph.add("Unsqueeze", spread, graph.ints(out.ndim)))
        found = graph.add("GatherND", operands[0], graph.add("Concat", *places, axis=out.ndim))
    if "FILL" not in str(params["mode"]) or fits is None:
        return found
    fill = params["fill_value"]
    if fill is None:
        fill = {"i": lambda: np.iinfo(out.dtype).min, "u": lambda: np.iinfo(out.dtype).max, "b": lambda: True}.get(
            out.dtype.kind, lambda: np.nan
        )()
    inside = graph.add("Expand", _by_rows(graph, fits, rows, indices.shape, out.ndim), graph.shape(out.shape))
    return _where(graph, inside, found, graph.constant(np.asarray(fill, kept_dtype(out.dtype))), out.dtype)


def _starts(
    graph: Graph, given: str, shape: Any, axes: Sequence[int], whole: Any, sizes: Any
) -> tuple[dict[int, str], str | None]:
    """Where slices begin along each axis that the data choose, inside, as XLA clamps it; and whether they were inside.

    Args:
      graph: the graph.
      given: the indices, int64.
      shape: their shape: a last axis with an index for each of the axes.
      axes: axes of the array.
      whole: shape of the array.
      sizes: shape of a slice.

    Returns:
      By axis int64 of `shape[:-1]`, and a bool of that shape: None if no axis is chosen.
    """
    starts: dict[int, str] = {}
    fits: str | None = None
    for index, axis in enumerate(axes):
        start = graph.reshape(
            graph.slice(given, graph.ints(index), graph.ints(index + 1), [len(shape) - 1], [1]), shape[:-1]
        )
        zero, last = graph.ints(0), graph.add("Sub", graph.size(whole[axis]), graph.size(sizes[axis]))
        if not shape[:-1]:
            zero, last = graph.reshape(zero, ()), graph.reshape(last, ())
        inside = graph.add("And", graph.add("GreaterOrEqual", start, zero), graph.add("LessOrEqual", start, last))
        fits = inside if fits is None else graph.add("And", fits, inside)
        starts[axis] = graph.add("Min", graph.add("Max", start, zero), last)
    return starts, fits


def _by_rows(graph: Graph, value: str, rows: Sequence[int], shape: Any, ndim: int) -> str:
    """A value with an element for each slice, of the shape of the slices: their rows are the axes of `shape[:-1]`."""
    return graph.reshape(value, [shape[rows.index(axis)] if axis in rows else 1 for axis in range(ndim)])


def _places(
    graph: Graph,
    ndim: int,
    starts: Mapping[int, str],
    rows: Sequence[int],
    along: Mapping[int, int],
    shape: Any,
    slices: Any,
) -> list[str]:
    """The place of each element of slices along each axis of the array, int64, which broadcasts to their shape.

    Args:
      graph: the graph.
      ndim: number of axes of the array.
      starts: see `_starts`.
      rows: the axes of the slices that number them.
      along: the axis of the slices that runs along an axis of the array.
      shape: shape of the indices.
      slices: shape of the slices.
    """
    places = []
    for axis in range(ndim):
        parts = [_by_rows(graph, starts[axis], rows, shape, len(slices))] if axis in starts else []
        if axis in along:
            between = [slices[each] if each == along[axis] else 1 for each in range(len(slices))]
            parts.append(graph.reshape(_counted(graph, slices[along[axis]]), between))
        if not parts:
            parts = [graph.reshape(graph.ints(0), [1] * len(slices))]
        places.append(parts[0] if len(parts) == 1 else graph.add("Add", *parts))
    return places


_SCATTER = {"scatter": "none", "scatter-add": "add", "scatter-sub": "add", "scatter-mul": "mul", "scatter-max": "max"}
_SCATTER |= {"scatter-min": "min"}


def _scatter(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    """Updates slices of an array that begin where the data say; those that are not inside are left out.

    The array is flat here, with one more element, which takes what is left out.
    """
    params, numbers, name = eqn.params, eqn.params["dimension_numbers"], eqn.primitive.name
    whole, indices, updates = (atom.aval for atom in eqn.invars)
    dtype = kept_dtype(whole.dtype)
    if name == "scatter" and params["update_jaxpr"] is not None:
        raise refused(place, "an update by a function, `.at[...].apply`", "`.at[...].set` of its result")
    batching = tuple(numbers.operand_batching_dims)
    rows = [axis for axis in range(updates.ndim) if axis not in numbers.update_window_dims]
    windows = [axis for axis in range(whole.ndim) if axis not in (*numbers.inserted_window_dims, *batching)]
    along = dict(zip(windows, numbers.update_window_dims, strict=True))
    sizes = [updates.shape[along[axis]] if axis in along else 1 for axis in range(whole.ndim)]
    along |= {axis: rows[row] for axis, row in zip(batching, numbers.scatter_indices_batching_dims, strict=True)}
    given = graph.cast(operands[1], indices.dtype, np.int64)
    axes = numbers.scatter_dims_to_operand_dims
    starts, fits = _starts(graph, given, indices.shape, axes, whole.shape, sizes)
    flat = _flat(graph, _places(graph, whole.ndim, starts, rows, along, indices.shape, updates.shape), whole.shape)
    flat = graph.add("Expand", flat, graph.shape(updates.shape))
    if fits is not None and "CLIP" not in str(params["mode"]):
        inside = _by_rows(graph, fits, rows, indices.shape, updates.ndim)
        flat = graph.add("Where", inside, flat, graph.size(math.prod(whole.shape)))
    update = graph.add_whole("Neg", dtype, operands[2]) if name == "scatter-sub" else operands[2]
    return _scattered(graph, operands[0], flat, update, whole, _SCATTER[name])


def _flat(graph: Graph, places: Sequence[str], shape: Any) -> str:
    """The place in a flat array of what has places along each axis of an array of this shape."""
    total = graph.ints(0)
    for axis, each in enumerate(places):
        total = graph.add("Add", total, graph.add("Mul", each, graph.size(math.prod(shape[axis + 1 :]))))
    return total


def _scattered(graph: Graph, value: str, flat: str, update: str, aval: Any, reduction: str) -> str:
    """A value with updates at places of its flat array, of which the one after the last is ignored."""
    dtype = kept_dtype(aval.dtype)
    computed = np.dtype(np.int32) if dtype.kind == "b" else whole_dtype(dtype)

    def scattered(value: str, update: str, computed: np.dtype) -> str:
        one_more = graph.add("Concat", graph.reshape(value, (-1,)), graph.constant([0], computed), axis=0)
        places, update = graph.reshape(flat, (-1,)), graph.reshape(update, (-1,))
        found = graph.add("ScatterElements", one_more, places, update, axis=0, reduction=reduction)
        found = graph.slice(found, graph.ints(0), graph.ints(-1), [0], [1])
        return graph.reshape(found, aval.shape)

    found = scattered(graph.cast(value, dtype, computed), graph.cast(update, dtype, computed), computed)
    found = graph.cast(found, computed, dtype)
    if dtype.kind != "f" or reduction not in ("max", "min"):
        return found
    reduction = "max"
    bad = graph.cast(scattered(_nans(graph, value), _nans(graph, update), np.dtype(np.uint8)), np.uint8, bool)
    return graph.add("Where", bad, graph.constant(np.nan, dtype), found)


def _counted(graph: Graph, size: Any) -> str:
    """0, 1, ... up to a size that may be symbolic, int64 (size,)."""
    zero, one = graph.constant(0, np.int64), graph.constant(1, np.int64)
    return graph.add("Range", zero, graph.reshape(graph.size(size), ()), one)


def _stack(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    axis = eqn.params["axis"]
    return graph.add("Concat", *(graph.add("Unsqueeze", each, graph.ints(axis)) for each in operands), axis=axis)


def _start(graph: Graph, index: str, dtype: Any, size: Any, whole: Any) -> str:
    """Where a dynamic slice begins along an axis, int64 (1,): inside, as JAX clamps it."""
    room = graph.add("Sub", graph.size(whole), graph.size(size))
    index = graph.reshape(graph.cast(index, dtype, np.int64), (1,))
    return graph.add("Min", graph.add("Max", index, graph.ints(0)), room)


def _dynamic_slice(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    whole, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    moving = [axis for axis in range(len(whole)) if whole[axis] != sizes[axis]]
    value = operands[0]
    for axis in moving:
        begin = _start(graph, operands[1 + axis], eqn.invars[1 + axis].aval.dtype, sizes[axis], whole[axis])
        value = graph.slice(value, begin, graph.add("Add", begin, graph.size(sizes[axis])), [axis], [1])
    return value


def _dynamic_update_slice(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    whole, part = (atom.aval.shape for atom in eqn.invars[:2])
    moving = [axis for axis in range(len(whole)) if whole[axis] != part[axis]]
    if not moving:
        return operands[1]
    if len(moving) > 1:
        starts = {
            axis: graph.reshape(
                _start(graph, operands[2 + axis], eqn.invars[2 + axis].aval.dtype, part[axis], whole[axis]), ()
            )
            for axis in moving
        }
        along = {axis: axis for axis in range(len(whole))}
        flat = _flat(graph, _places(graph, len(whole), starts, [], along, (0,), part), whole)
        return _scattered(
            graph, operands[0], graph.add("Expand", flat, graph.shape(part)), operands[1], eqn.outvars[0].aval, "none"
        )
    (axis,) = moving
    begin = _start(graph, operands[2 + axis], eqn.invars[2 + axis].aval.dtype, part[axis], whole[axis])
    end = graph.add("Add", begin, graph.size(part[axis]))
    before = graph.slice(operands[0], graph.ints(0), begin, [axis], [1])
    after = graph.slice(operands[0], end, graph.ints(2**31), [axis], [1])
    return graph.add("Concat", before, operands[1], after, axis=axis)


def _split(graph: Graph, eqn: Any, operands: list[str], place: Place) -> list[str]:
    sizes = graph.shape(eqn.params["sizes"])
    return graph.add("Split", operands[0], sizes, outputs=len(eqn.outvars), axis=eqn.params["axis"])


def _top_k(graph: Graph, eqn: Any, operands: list[str], place: Place) -> list[str]:
    axis = eqn.params.get("axis", eqn.invars[0].aval.ndim - 1)
    dtype = kept_dtype(eqn.invars[0].aval.dtype)
    whole = whole_dtype(dtype)
    x = graph.cast(operands[0], dtype, whole)
    values, indices = graph.add("TopK", x, graph.ints(eqn.params["k"]), outputs=2, axis=axis)
    return [graph.cast(values, whole, dtype), graph.cast(indices, np.int64, eqn.outvars[1].aval.dtype)]


def _scan(graph: Graph, eqn: Any, operands: list[str], place: Place) -> list[str]:
    from onnx import helper

    params, (jaxpr, consts) = eqn.params, opened(eqn.params["jaxpr"])
    constants, carries = scan_counts(params)
    body = Graph(graph)
    scanned = jaxpr.invars[constants + carries :]
    carry = [body.name() for _ in range(carries)]
    rows = [body.name() for _ in scanned]
    inputs = operands[constants:]
    found = _convert(body, jaxpr, consts, [*operands[:constants], *carry, *rows], place)
    found = [body.add("Identity", value) for value in found]

    def described(name: str, dtype: Any) -> Any:
        return helper.make_tensor_value_info(name, onnx_type(kept_dtype(dtype)), None)

    dtypes = [variable.aval.dtype for variable in jaxpr.invars[constants:]]
    described_inputs = [described(*each) for each in zip([*carry, *rows], dtypes, strict=True)]
    if not rows:  # ONNX takes the number of steps from what is scanned
        counter = body.name()
        described_inputs.append(described(counter, np.int64))
        inputs = [*inputs, _counted(graph, params["length"])]
    count, outputs = len(rows) or 1, len(found) - carries
    graph_of_body = helper.make_graph(
        body.nodes,
        "step",
        described_inputs,
        [described(value, variable.aval.dtype) for value, variable in zip(found, jaxpr.outvars, strict=True)],
        body.constants,
    )
    direction = int(params["reverse"])
    return graph.add(
        "Scan",
        *inputs,
        outputs=len(found),
        body=graph_of_body,
        num_scan_inputs=count,
        scan_input_directions=[direction] * count,
        **({"scan_output_directions": [direction] * outputs} if outputs else {}),
    )


def _conditional(graph: Graph, eqn: Any, operands: list[str], place: Place) -> list[str]:
    from onnx import helper

    branches = eqn.params["branches"]
    if len(branches) != 2:
        raise refused(place, f"a choice of {len(branches)} branches", "one of two")

    def branch(closed: Any, name: str) -> Any:
        body, (jaxpr, consts) = Graph(graph), opened(closed)
        found = [body.add("Identity", value) for value in _convert(body, jaxpr, consts, operands[1:], place)]
        described = [
            helper.make_tensor_value_info(value, onnx_type(kept_dtype(variable.aval.dtype)), None)
            for value, variable in zip(found, jaxpr.outvars, strict=True)
        ]
        return helper.make_graph(body.nodes, name, [], described, body.constants)

    no, yes = (branch(closed, name) for closed, name in zip(branches, ("no", "yes"), strict=True))
    kind = eqn.invars[0].aval.dtype
    condition = operands[0] if kind.kind == "b" else graph.add("Greater", operands[0], graph.constant(0, kind))
    return graph.add("If", condition, outputs=len(eqn.outvars), then_branch=yes, else_branch=no)


Write = Callable[[Graph, Any, list[str], Place], str]

_SINGLE: dict[str, Write] = {
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(_BITS, _bits),
    **dict.fromkeys(_REDUCE, _reduce),
    **dict.fromkeys(("reduce_or", "reduce_and"), _reduce_bool),
    **dict.fromkeys(("argmax", "argmin"), _arg),
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window_sum"), _pool),
    **dict.fromkeys(_SCATTER, _scatter),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    **dict.fromkeys(("shift_left", "shift_right_logical"), _shift),
    "ne": _not_equal,
    "not": _not,
    "cumsum": _cumulative,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "convert_element_type": _convert_type,
    "reduce_precision": _reduce_precision,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "concatenate": _concatenate,
    "stack": _stack,
    "slice": _slice,
    "rev": _reverse,
    "pad": _pad,
    "select_n": _select,
    "iota": _iota,
    "dim_as_value": _dimension,
    "clamp": _clamp,
    "is_finite": _is_finite,
    "integer_pow": _integer_pow,
    "square": _square,
    "rsqrt": _rsqrt,
    "erfc": _erfc,
    "exp2": _exp2,
    "log1p": _log1p,
    "expm1": _expm1,
    "round": _round,
    **dict.fromkeys(("div", "rem"), _quotient),
    "tile": _tile,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
}
_SEVERAL: dict[str, Callable[[Graph, Any, list[str], Place], list[str]]] = {
    "split": _split,
    "top_k": _top_k,
    "scan": _scan,
    "cond": _conditional,
}
