"""Rounding to emulated formats in ONNX, to the numbers of `jaxmp.quantize`, and weights that are stored in few bits.

A format of ONNX is a Cast. Others are rounded by float32 operations that IEEE 754 rounds once each. Not the same: the
sign of zeros; what is below float32's smallest normal number; and blocks whose largest magnitude is below 2^-117, or,
with float32 scales and elements of 2 bits, above 2^125.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.deploy.onnx_graph import Graph, onnx_type
from jaxmp.errors import InputError
from jaxmp.precision.blocks import BlockFormat, Element, Integer, PackedBlocks, is_block_format, parse_block_format
from jaxmp.precision.formats import Format, parse_format

DELAYED = "-delayed"
"""what follows the name of the elements in the scope of a format with static scales, whose equations are around it"""

_CASTS = {"e4m3": "FLOAT8E4M3FN", "e5m2": "FLOAT8E5M2", "float16": "FLOAT16", "bf16": "BFLOAT16"}
"""formats that ONNX has a type for; a Cast to one of 8 bits saturates"""

_LARGEST, _SMALLEST = float(np.finfo(np.float32).max), 2.0**-126
_POWERS = np.exp2(np.arange(-126, 128)).astype(np.float32)


def parse_scope(scope: str) -> Format | BlockFormat | None:
    """The format that a scope of a quantiser names, such as `e4m3` or `int8-channel`; None if it cannot be written."""
    text = scope.partition(DELAYED)[0].replace("-", ":")
    try:
        return parse_block_format(text) if is_block_format(text) else parse_format(text)
    except InputError:
        return None


def rounded(graph: Graph, value: str, format: Format | BlockFormat, like: Any, axes: Mapping[int, Any]) -> str:
    """A value that is kept as float32 on the grid of a format.

    Args:
      graph: the graph.
      value: the value.
      format: the format.
      like: shape and dtype that the value has in JAX.
      axes: lengths of blocks by the axis along which they run.
    """
    if isinstance(format, Format):
        return _element(graph, value, format)
    return _at_most(graph, _blocks(graph, value, format, like.shape, axes), float(jnp.finfo(like.dtype).max))


def _at_most(graph: Graph, value: str, largest: float) -> str:
    """The value, at most the largest number of a dtype: a scale that is rounded up can make it larger."""
    return graph.add("Max", graph.add("Min", value, _float(graph, largest)), _float(graph, -largest))


def _float(graph: Graph, value: float) -> str:
    return graph.constant(np.float32(value))


def _cast(graph: Graph, value: str, format: str, **how: int) -> str:
    import onnx

    narrow = graph.add("Cast", value, to=getattr(onnx.TensorProto, _CASTS[format]), **how)
    return graph.add("Cast", narrow, to=onnx_type(np.float32))


def _element(graph: Graph, value: str, element: Element) -> str:
    """The value rounded to the nearest element, at most the largest one unless the format is wider than 8 bits."""
    if isinstance(element, Integer):
        unit = 2.0**-element.fraction_bits
        positive, negative = (code * unit for code in element.largest_codes)
        whole = graph.add("Mul", graph.add("Round", graph.add("Div", value, _float(graph, unit))), _float(graph, unit))
        return graph.add("Max", graph.add("Min", whole, _float(graph, positive)), _float(graph, -negative))
    if str(element) in _CASTS:
        return _cast(graph, value, str(element), **({"saturate": 1} if element.bits == 8 else {}))
    magnitude = graph.add("Abs", value)
    least = np.float32(2.0**element.min_exponent)
    quantum = graph.add("Max", _power_of_two(graph, magnitude), graph.constant(least))
    quantum = graph.add("Mul", quantum, _float(graph, 2.0**-element.mantissa_bits))
    near = graph.add("Mul", graph.add("Round", graph.add("Div", magnitude, quantum)), quantum)
    if element.bits <= 8 or not element.has_nan:
        near = graph.add("Min", near, _float(graph, element.max))
    else:
        over = _float(graph, np.inf if element.has_infinity else np.nan)
        near = graph.add("Where", graph.add("Greater", near, _float(graph, element.max)), over, near)
    near = graph.add("Where", graph.add("IsNaN", value), value, near)
    return graph.add("Where", graph.add("Less", value, _float(graph, 0)), graph.add("Neg", near), near)


def _power_of_two(graph: Graph, magnitude: str) -> str:
    """The largest power of two that is not above a magnitude, from 2^-126 to 2^127, exactly."""
    inside = graph.add("Min", graph.add("Max", magnitude, _float(graph, _SMALLEST)), _float(graph, _LARGEST))
    guess = graph.add("Floor", graph.add("Mul", graph.add("Log", inside), _float(graph, 1 / np.log(2))))
    place = graph.add("Add", graph.cast(guess, np.float32, np.int64), graph.constant(126, np.int64))
    place = graph.add("Max", graph.add("Min", place, graph.constant(len(_POWERS) - 1, np.int64)), graph.ints(0))
    # The logarithm is rounded: its floor may be one too large or too small.
    power = graph.add("Gather", graph.constant(_POWERS), place)
    half, two = _float(graph, 0.5), _float(graph, 2)
    power = graph.add("Where", graph.add("Less", inside, power), graph.add("Mul", power, half), power)
    enough = graph.add("GreaterOrEqual", graph.add("Mul", inside, half), power)
    return graph.add("Where", enough, graph.add("Mul", power, two), power)


def _blocks(graph: Graph, value: str, format: BlockFormat, shape: Any, lengths: Mapping[int, Any]) -> str:
    """See `BlockFormat`, whose order of operations this is."""
    split: list[Any] = []
    inner, more = [], [0] * len(shape)
    for axis, size in enumerate(shape):
        if axis not in lengths:
            split.append(size)
            continue
        inner.append(len(split) + 1)
        if isinstance(format.block, str):
            split += [1, size]
        else:
            more[axis] = -size % lengths[axis]
            split += [(size + more[axis]) // lengths[axis], lengths[axis]]
    is_padded = any(not isinstance(extra, int) or extra for extra in more)
    x = value
    if is_padded:
        x = graph.add("Pad", x, graph.shape([*[0] * len(shape), *more]), _float(graph, 0), mode="constant")
    x = graph.add("Reshape", x, graph.shape(split))
    is_bad = graph.add("Or", graph.add("IsNaN", x), graph.add("IsInf", x))
    bad = graph.add("ReduceMax", graph.cast(is_bad, bool, np.int32), graph.ints(*inner), keepdims=1)
    bad = graph.cast(bad, np.int32, bool)
    # A maximum may take no notice of a NaN (trap T18): what is not finite is set aside.
    clean = graph.add("Where", bad, _float(graph, 0), x)
    amax = graph.add("ReduceMax", graph.add("Abs", clean), graph.ints(*inner), keepdims=1)
    encode, decode = _scales(graph, amax, format)
    found = graph.add("Mul", _element(graph, graph.add("Mul", clean, encode), format.element), decode)
    found = graph.add("Where", bad, _float(graph, np.nan), found)
    if not is_padded:
        return graph.reshape(found, shape)
    found = graph.reshape(found, [size + extra for size, extra in zip(shape, more, strict=True)])
    cut = [axis for axis, extra in enumerate(more) if not isinstance(extra, int) or extra]
    ends = graph.shape([shape[axis] for axis in cut])
    return graph.slice(found, graph.ints(*[0] * len(cut)), ends, cut, [1] * len(cut))


def _scales(graph: Graph, amax: str, format: BlockFormat) -> tuple[str, str]:
    """What numbers are multiplied by before they are rounded to elements, and what elements are multiplied by."""
    largest = format.element.max
    if format.scale == "f32":
        encode = graph.add("Min", graph.add("Div", _float(graph, largest), amax), _float(graph, 2.0**126))
        return encode, _inverse(graph, encode)
    if format.scale == "e8m0":
        power = _power_of_two(graph, amax)
        top = 2.0**format.element.max_exponent
        if format.rule == "even":
            more = graph.add("Mul", power, _float(graph, 2.0 ** -(format.element.mantissa_bits + 1)))
            power = _power_of_two(graph, graph.add("Add", amax, more))
        scale = graph.add("Mul", power, _float(graph, 1 / top))
        if format.rule in ("rceil", "ceil"):
            above = graph.add("Mul", power, _float(graph, largest / top if format.rule == "rceil" else 1))
            twice = graph.add("Mul", scale, _float(graph, 2))
            scale = graph.add("Where", graph.add("Greater", amax, above), twice, scale)
        scale = graph.add("Max", scale, _float(graph, _SMALLEST))
        return _inverse(graph, scale), scale
    tensor_amax = graph.add("ReduceMax", amax, keepdims=0)
    product = _float(graph, 448 * largest)
    if format.rule == "te":
        encode_tensor = graph.add("Min", graph.add("Div", product, tensor_amax), _float(graph, _LARGEST))
        tensor_scale = _inverse(graph, encode_tensor)
        multiplier = graph.add("Mul", encode_tensor, _float(graph, float(np.float32(1) / np.float32(largest))))
        scale = graph.add("Min", graph.add("Mul", amax, multiplier), _float(graph, 448))
        decode = graph.add("Mul", _cast(graph, scale, "e4m3", saturate=1), tensor_scale)
        return graph.add("Min", _inverse(graph, decode), _float(graph, _LARGEST)), decode
    tensor_scale = graph.add("Div", tensor_amax, product)
    ratio = graph.add("Div", graph.add("Div", amax, _float(graph, largest)), tensor_scale)
    ratio = graph.add("Where", graph.add("Greater", amax, _float(graph, 0)), ratio, _float(graph, 0))
    ratio = graph.add("Min", graph.add("Max", ratio, _float(graph, 2.0**-6)), _float(graph, 448))
    scale = _cast(graph, ratio, "e4m3", saturate=1)
    encode = graph.add("Div", _inverse(graph, tensor_scale), scale)
    return graph.add("Min", encode, _float(graph, _LARGEST)), graph.add("Mul", scale, tensor_scale)


def _inverse(graph: Graph, value: str) -> str:
    """1 / value: ONNX Runtime makes x / value of x times a 1 / value that is written so, which is rounded otherwise."""
    half = _float(graph, 0.5)
    return graph.add("Div", half, graph.add("Mul", value, half))


def unpacked(graph: Graph, name: str, packed: PackedBlocks) -> str:
    """The numbers of packed blocks, float32: initialisers of codes and scales, and the operations that decode them.

    A code chooses a number from a table, which is multiplied by the scale of its block: the product that
    `PackedBlocks.unpack` rounds. Elements of 4 bits or fewer are stored two in a byte, others one.

    Args:
      graph: the graph.
      name: name of the weight: initialisers are `name.elements` and `name.scales`.
      packed: an array of two axes, its blocks along the last one or of the whole tensor.
    """
    format, (rows, length) = packed.format, packed.shape
    bits = format.element.bits
    codes = np.asarray(packed.elements)
    if bits == 6:
        codes = np.asarray(jax.jit(_single_codes, static_argnums=1)(packed.elements, length))
    elements = graph.stored(f"{name}.elements", codes)
    if bits <= 4:
        low = graph.add("BitwiseAnd", elements, graph.constant(15, np.uint8))
        high = graph.add("BitShift", elements, graph.constant(4, np.uint8), direction="RIGHT")
        last = graph.ints(2)
        both = graph.add("Concat", *(graph.add("Unsqueeze", each, last) for each in (low, high)), axis=2)
        elements = graph.slice(
            graph.reshape(both, (rows, 2 * codes.shape[1])), graph.ints(0), graph.ints(length), [1], [1]
        )
    numbers = graph.add("Gather", graph.constant(_table(format.element)), graph.cast(elements, np.uint8, np.int32))
    scales = np.asarray(packed.scales)
    if format.scale == "f32":
        scale = graph.stored(f"{name}.scales", scales)
    else:
        places = graph.cast(graph.stored(f"{name}.scales", scales), np.uint8, np.int32)
        table = np.exp2(np.arange(256.0) - 127) if format.scale == "e8m0" else _table(parse_format("e4m3"))
        if format.scale == "e8m0":
            table[255] = np.nan
        scale = graph.add("Gather", graph.constant(table.astype(np.float32)), places)
        if packed.tensor_scale is not None:
            tensor_scale = graph.stored(f"{name}.tensor_scale", np.asarray(packed.tensor_scale))
            scale = graph.add("Mul", scale, tensor_scale)
    if not isinstance(format.block, str):
        (size,) = format.block
        blocks = scales.shape[1]
        scale = graph.add("Expand", graph.add("Unsqueeze", scale, graph.ints(2)), graph.ints(rows, blocks, size))
        scale = graph.reshape(scale, (rows, blocks * size))
        scale = graph.slice(scale, graph.ints(0), graph.ints(length), [1], [1])
    return _at_most(graph, graph.add("Mul", numbers, scale), _LARGEST)


def _single_codes(elements: jax.Array, length: int) -> jax.Array:
    """Codes of 6 bits, four in three bytes, as one a byte."""
    word = elements.astype(jnp.uint32).reshape(elements.shape[0], -1, 3)
    word = word[..., 0] | (word[..., 1] << 8) | (word[..., 2] << 16)
    codes = jnp.stack([(word >> (6 * place)) & 63 for place in range(4)], -1)
    return codes.reshape(elements.shape[0], -1)[:, :length].astype(jnp.uint8)


def _table(element: Element) -> np.ndarray:
    """The number of each code, float32 (2^bits,); NaN for a code of none."""
    codes = np.arange(2**element.bits)
    if isinstance(element, Integer):
        signed = np.where(codes < 2 ** (element.bits - 1), codes, codes - 2**element.bits)
        return (signed * 2.0**-element.fraction_bits).astype(np.float32)
    magnitude = codes & (2 ** (element.bits - 1) - 1)
    binade, mantissa = magnitude >> element.mantissa_bits, magnitude & (2**element.mantissa_bits - 1)
    fraction = mantissa / 2**element.mantissa_bits + (binade > 0)
    numbers = fraction * np.exp2(np.maximum(binade, 1) - 1.0 + element.min_exponent)
    numbers[numbers > element.max] = np.nan
    return np.where(codes >= 2 ** (element.bits - 1), -numbers, numbers).astype(np.float32)
