"""`files`: a model as an ONNX file, made from its jaxpr operation by operation.

ONNX Runtime's CPU kernels know few operations on halves, so a float16 or bfloat16 value is kept as float32 here, and
rounded to its grid (Cast to the half and back) after each operation that leaves it. Products of halves are thus summed
in float32, as on a tensor core. A scan becomes Scan, a conditional If, a quantiser a rounding, to the same numbers (see
`jaxmp.deploy.onnx_rounding`). Symbolic numbers of rows stay symbolic. What ONNX has no operation for is refused, with
the module it is in.
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
from jaxmp.deploy.onnx_graph import Graph, interface_dtype, kept_dtype, onnx_type, refused
from jaxmp.deploy.onnx_rounding import parse_scope, rounded, unpacked
from jaxmp.deploy.packed_weight import PackedWeight
from jaxmp.errors import InputError
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
    **{"add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min"},
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
    *("dynamic_slice", "dynamic_update_slice", "reduce_window_max", "ceil", "round", "cummax", "cummin", *_SAME),
}
"""primitives whose results are on the grid of a half if their operands are"""


def require_packages() -> None:
    """Raises InputError if a package that ONNX files need is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise InputError(f"format onnx needs {error.name}: pip install 'jaxmp[onnx]'") from None


def files(of: Forward, packed: Mapping[str, PackedWeight] = {}) -> dict[str, bytes]:  # only read
    """The model as `model.onnx`, its weights inside, by the name of the file.

    Args:
      of: the function of plain weights.
      packed: weights that the file has packed, by path, with the operations that decode them.

    Raises: InputError for an operation that ONNX does not have, with the module it is in; or for more than 2 GiB.
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
    graph = Graph()
    names = [*of.state, *of.inputs]
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
    results = [*of.outputs, *(f"{name} after" for name in of.state)]
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
    onnx.checker.check_model(model)
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
        results = _equation(graph, eqn, operands, at)
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
            return [_on_grid(graph, rounded(graph, operands[0], format, aval.shape, axes), aval)]
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
    return graph.add(_UNARY[eqn.primitive.name], operands[0])


def _binary(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    name, dtypes = eqn.primitive.name, [kept_dtype(atom.aval.dtype) for atom in eqn.invars]
    if dtypes[0].kind == "b" and name in ("max", "min"):
        return graph.add({"max": "Or", "min": "And"}[name], *operands)
    if dtypes[0].kind == "b" and name in ("gt", "lt", "ge", "le"):
        operands = [graph.cast(operand, bool, np.int32) for operand in operands]
    if name == "pow" and dtypes[0] != dtypes[1]:
        operands[1] = graph.cast(operands[1], dtypes[1], dtypes[0])
    return graph.add(_BINARY[name], *operands)


def _not_equal(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    return graph.add("Not", graph.add("Equal", *operands))


def _bits(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    logical, bitwise = _BITS[eqn.primitive.name]
    return graph.add(logical if eqn.outvars[0].aval.dtype == bool else bitwise, *operands)


def _not(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    return graph.add("Not" if eqn.outvars[0].aval.dtype == bool else "BitwiseNot", operands[0])


def _reduce(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    name, axes = eqn.primitive.name, graph.ints(*eqn.params["axes"])
    if not eqn.params["axes"]:
        return operands[0]
    return graph.add(_REDUCE[name], operands[0], axes, keepdims=0)


def _reduce_bool(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    operation = {"reduce_or": "ReduceMax", "reduce_and": "ReduceMin"}[eqn.primitive.name]
    whole = graph.cast(operands[0], bool, np.int32)
    return graph.cast(graph.add(operation, whole, graph.ints(*eqn.params["axes"]), keepdims=0), np.int32, bool)


def _arg(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    (axis,) = eqn.params["axes"]
    found = graph.add({"argmax": "ArgMax", "argmin": "ArgMin"}[eqn.primitive.name], operands[0], axis=axis, keepdims=0)
    return graph.cast(found, np.int64, eqn.outvars[0].aval.dtype)


def _cumulative(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    axis, reverse = graph.constant(eqn.params["axis"], np.int64), int(eqn.params["reverse"])
    return graph.add("CumSum", operands[0], axis, reverse=reverse)


def _dot(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    (contract, other_contract), (batch, other_batch) = eqn.params["dimension_numbers"]
    left, right = (atom.aval.ndim for atom in eqn.invars)
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
        return graph.add("MatMul", *operands)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    mine, its = [""] * left, [""] * right
    for i, j in zip((*batch, *contract), (*other_batch, *other_contract), strict=True):
        mine[i] = its[j] = next(letters)
    mine, its = ([letter or next(letters) for letter in each] for each in (mine, its))
    out = [mine[i] for i in batch]
    out += [letter for i, letter in enumerate(mine) if i not in batch and i not in contract]
    out += [letter for j, letter in enumerate(its) if j not in other_batch and j not in other_contract]
    return graph.add("Einsum", *operands, equation=f"{''.join(mine)},{''.join(its)}->{''.join(out)}")


def _convolution(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    params, layout = eqn.params, eqn.params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        raise refused(place, "a convolution in groups of rows")
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
    params, window = eqn.params, eqn.params["window_dimensions"]
    dilated = {*params["base_dilation"], *params["window_dilation"]} - {1}
    spatial = [
        axis
        for axis, size in enumerate(window)
        if size != 1 or params["window_strides"][axis] != 1 or tuple(params["padding"][axis]) != (0, 0)
    ]
    others = [axis for axis in range(len(window)) if axis not in spatial]
    if dilated or len(others) != 2:
        raise refused(place, f"pooling over a window of {list(window)}", "one of two axes that are not pooled")
    order = [*others, *spatial]
    pads = [params["padding"][axis][side] for side in (0, 1) for axis in spatial]
    how: dict[str, Any] = {
        "kernel_shape": [window[axis] for axis in spatial],
        "strides": [params["window_strides"][axis] for axis in spatial],
        "pads": [int(pad) for pad in pads],
    }
    x = graph.transpose(operands[0], order)
    if eqn.primitive.name == "reduce_window_max":
        y = graph.add("MaxPool", x, **how)
    else:
        mean = graph.add("AveragePool", x, count_include_pad=1, **how)
        y = graph.add("Mul", mean, graph.constant(np.float32(math.prod(window))))
    return graph.transpose(y, np.argsort(order).tolist())


def _convert_type(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    source, target = eqn.invars[0].aval.dtype, eqn.params["new_dtype"]
    return graph.cast(operands[0], kept_dtype(source), kept_dtype(target))  # `_equation` puts it on the grid


def _reduce_precision(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    bits = eqn.params["exponent_bits"], eqn.params["mantissa_bits"]
    known = {(8, 7): jnp.bfloat16, (5, 10): np.float16}
    if bits == (8, 23):
        return operands[0]
    if bits not in known:
        raise refused(place, f"rounding to {bits[0]} bits of exponent and {bits[1]} of mantissa")
    return graph.rounded(operands[0], known[bits])


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
    low, high, interior = zip(*eqn.params["padding_config"], strict=True)
    if any(interior) or min((*low, *high)) < 0:
        raise refused(place, "padding between elements, or by less than nothing")
    return graph.add("Pad", operands[0], graph.ints(*low, *high), operands[1], mode="constant")


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
    if np.dtype(dtype).kind != "b":
        return graph.add("Where", condition, yes, no)
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
    return graph.add("Min", graph.add("Max", x, low), high)


def _is_finite(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    return graph.add("Not", graph.add("Or", graph.add("IsNaN", operands[0]), graph.add("IsInf", operands[0])))


def _integer_pow(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    exponent, dtype = eqn.params["y"], kept_dtype(eqn.invars[0].aval.dtype)
    if exponent == 2:
        return graph.add("Mul", operands[0], operands[0])
    return graph.add("Pow", operands[0], graph.constant(exponent, dtype))


def _square(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    return graph.add("Mul", operands[0], operands[0])


def _rsqrt(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    return graph.add("Reciprocal", graph.add("Sqrt", operands[0]))


def _erfc(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    return graph.add("Sub", graph.constant(np.float32(1)), graph.add("Erf", operands[0]))


def _exp2(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    return graph.add("Pow", graph.constant(np.float32(2)), operands[0])


def _log1p(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    """log(1 + x) = log(u) x / (u - 1) with u the rounded 1 + x, and x where u is 1 (Kahan).

    Source: N. Higham, Accuracy and Stability of Numerical Algorithms, 2002, problem 1.5.
    """
    one = graph.constant(np.float32(1))
    u = graph.add("Add", operands[0], one)
    is_one = graph.add("Or", graph.add("Equal", u, one), graph.add("IsInf", u))
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
    half = graph.add("Add", graph.add("Abs", operands[0]), graph.constant(np.float32(0.5)))
    return graph.add("Mul", graph.add("Sign", operands[0]), graph.add("Floor", half))


def _remainder(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    return graph.add("Mod", *operands, fmod=1)


def _shift(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    if eqn.outvars[0].aval.dtype.kind != "u":
        raise refused(place, f"{eqn.primitive.name} of signed numbers")
    return graph.add("BitShift", *operands, direction="LEFT" if "left" in eqn.primitive.name else "RIGHT")


def _gather(graph: Graph, eqn: Any, operands: list[str], place: Place) -> str:
    """Slices of an array that begin where the data say: Gather where whole rows are taken along one axis."""
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    operand, indices, out = eqn.invars[0].aval, eqn.invars[1].aval, eqn.outvars[0].aval
    sizes, mode, kind = params["slice_sizes"], str(params["mode"]), np.dtype(np.int64)
    given = graph.cast(operands[1], indices.dtype, kind)
    # The first place of each slice along each of the axes that the data choose, of shape indices.shape[:-1].
    starts: dict[int, str] = {}
    inside: str | None = None
    for index, axis in enumerate(numbers.start_index_map):
        start = graph.reshape(
            graph.slice(given, graph.ints(index), graph.ints(index + 1), [indices.ndim - 1], [1]), indices.shape[:-1]
        )
        zero = graph.ints(0)
        last = graph.add("Sub", graph.size(operand.shape[axis]), graph.size(sizes[axis]))
        if not indices.shape[:-1]:
            zero, last = graph.reshape(zero, ()), graph.reshape(last, ())
        if "FILL" in mode:
            fits = graph.add("And", graph.add("GreaterOrEqual", start, zero), graph.add("LessOrEqual", start, last))
            inside = fits if inside is None else graph.add("And", inside, fits)
        if "PROMISE" not in mode:
            start = graph.add("Min", graph.add("Max", start, zero), last)
        starts[axis] = start
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
        places = []
        for axis in range(operand.ndim):
            parts = []
            if axis in starts:
                between = [indices.shape[rows.index(each)] if each in rows else 1 for each in range(out.ndim)]
                parts.append(graph.reshape(starts[axis], between))
            if axis in batching or axis in windows:
                along = (
                    rows[numbers.start_indices_batching_dims[batching.index(axis)]]
                    if axis in batching
                    else numbers.offset_dims[windows.index(axis)]
                )
                between = [out.shape[along] if each == along else 1 for each in range(out.ndim)]
                parts.append(graph.reshape(_counted(graph, out.shape[along]), between))
            place_ = parts[0] if len(parts) == 1 else graph.add("Add", *parts)
            spread = graph.add("Expand", place_, graph.shape(out.shape))
            places.append(graph.add("Unsqueeze", spread, graph.ints(out.ndim)))
        found = graph.add("GatherND", operands[0], graph.add("Concat", *places, axis=out.ndim))
    if inside is None:
        return found
    fill = params["fill_value"]
    if fill is None:
        fill = {"i": lambda: np.iinfo(out.dtype).min, "u": lambda: np.iinfo(out.dtype).max, "b": lambda: True}.get(
            out.dtype.kind, lambda: np.nan
        )()
    between = [indices.shape[rows.index(each)] if each in rows else 1 for each in range(out.ndim)]
    spread = graph.add("Expand", graph.reshape(inside, between), graph.shape(out.shape))
    return _where(graph, spread, found, graph.constant(np.asarray(fill, kept_dtype(out.dtype))), out.dtype)


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
        raise refused(place, "an update at a place that moves along several axes")
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
    values, indices = graph.add("TopK", operands[0], graph.ints(eqn.params["k"]), outputs=2, axis=axis)
    return [values, graph.cast(indices, np.int64, eqn.outvars[1].aval.dtype)]


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
    **dict.fromkeys(("reduce_window_max", "reduce_window_sum"), _pool),
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
    "rem": _remainder,
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
