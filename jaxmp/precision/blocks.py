"""Block formats: narrow elements with a scale for each block of them, emulated exactly on any device.

    quantize(x, "mxfp8")                          # rounds to numbers of OCP's MXFP8; shape and dtype stay those of x
    quantize(w, "nvfp4_16x16")                    # one scale for each 16x16 block
    quantize(g, "mxfp4:rceil", axis=0, rounding="stochastic", key=key)
    packed = pack(x, "mxfp4"); packed.unpack()    # elements and scales in as many bits as the format has

Rounding uses integer operations on the bits of float32, as in `jaxmp.precision.formats`, and additions, products and
powers of two of normal float32 numbers, which all devices compute exactly as IEEE 754 has them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.lax import bitcast_convert_type

from jaxmp.errors import InputError, nearest
from jaxmp.precision import formats
from jaxmp.precision.float32_arithmetic import (
    INFINITY,
    LEADING,
    MANTISSA,
    divide,
    significand_and_exponent,
    times_power_of_two,
    to_bits,
)
from jaxmp.precision.formats import (
    Format,
    Rounding,
    check_carrier,
    drop_bits,
    float32_bits,
    from_float32_bits,
    parse_format,
    round_bits,
    rounding_noise,
)


@dataclasses.dataclass(frozen=True)
class Integer:
    """A fixed-point element: a whole number in two's complement, times `2^-fraction_bits`.

    `int8` and `int4` have no fraction bits and are symmetric: -127 to 127, and -7 to 7. The element of `mxint8` has 6
    fraction bits, and -2 as well (OCP MX 1.0, section 5.3.4).
    """

    bits: int
    """number of bits, sign included, 2 to 8"""
    fraction_bits: int = 0
    """number of bits after the binary point"""

    def __post_init__(self) -> None:
        """Checks the sizes."""
        if not (2 <= self.bits <= 8 and 0 <= self.fraction_bits < self.bits):
            raise InputError(
                f"integer element of {self.bits} bits, {self.fraction_bits} of them a fraction: expected 2 to 8 bits, "
                "and fewer fraction bits than that"
            )

    def __str__(self) -> str:
        return f"int{self.bits}" + (f"f{self.fraction_bits}" if self.fraction_bits else "")

    @property
    def max(self) -> float:
        """The largest number."""
        return (2 ** (self.bits - 1) - 1) * 2.0**-self.fraction_bits

    @property
    def max_exponent(self) -> int:
        """The base 2 logarithm of the largest power of two."""
        return self.bits - 2 - self.fraction_bits

    @property
    def mantissa_bits(self) -> int:
        """The bits after the leading one of the largest number."""
        return self.bits - 2

    @property
    def largest_codes(self) -> tuple[int, int]:
        """The largest magnitudes, positive and negative, in units of the smallest."""
        largest = 2 ** (self.bits - 1) - 1
        return largest, largest + (self.fraction_bits > 0)


Element = Format | Integer

RULES = {"e8m0": ("floor", "rceil", "ceil", "even"), "e4m3": ("te", "torchao"), "f32": ("amax",)}
"""The scale formats, each with its scale rules; the first is the default."""


@dataclasses.dataclass(frozen=True)
class BlockFormat:
    """A format in which each block of elements shares a scale: a number is an element times the scale of its block.

    The scale of a block follows from `amax`, the largest magnitude in it, by the scale rule:

    - Scale format `e8m0` (a power of two, 2^-127 to 2^127). The scale is 2^e, where m is the largest number of the
      element format and m_e the largest power of two in it. `floor`: e = floor(log2(amax / m_e)); values up to twice
      m_e * scale are clipped to the largest element (OCP MX 1.0, section 6.3). `rceil`: e = ceil(log2(amax / m)), and
      nothing is clipped (NVIDIA's cuBLAS and Transformer Engine; 2506.08027). `ceil`: e = ceil(log2(amax / m_e)).
      `even`: as `floor`, of amax rounded to the mantissa bits of the element.
    - Scale format `e4m3`, with a float32 scale for the whole tensor. `te`: Transformer Engine's order of operations in
      float32: g = (448 m) / amax of the tensor, scale = e4m3(amax * (g * (1 / m))), and elements are rounded from
      x * (1 / (scale * (1 / g))). `torchao`: p = amax of the tensor / (448 m), scale = e4m3((amax / m) / p), at least
      2^-6, and elements are rounded from x * ((1 / p) / scale). With both, up to 1/17 of a block's largest values may
      be clipped, since the scale is rounded to nearest; with `te` more where the scale is below 2^-6, and all of a
      block whose scale becomes 0.
    - Scale format `f32`. `amax`: elements are rounded from x * e with e = m / amax, at most 2^126, and the scale is
      1 / e (DeepSeek-V3, 2412.19437, section 3.3.2; torchao's and Transformer Engine's order).

    With stochastic rounding, the mean is `x` only if nothing is clipped: see `unbiased`.

    A block that holds an infinity or NaN is all NaN (its scale is; OCP MX 1.0, section 5.1), and has no effect on the
    scale of the tensor. A block of zeros is zeros; -0 keeps its sign if the element format has one. A last block that
    is not full is scaled as if it were filled up with zeros.

    `parse_block_format(str(format))` returns an equal format.

    Raises:
      InputError: the block, scale format or rule is unknown, or the rule belongs to another scale format.
    """

    element: Element
    """format of the elements"""
    block: tuple[int, ...] | str
    """lengths of a block along one axis or two, or `channel` (all of the axis) or `tensor`"""
    scale: str = "f32"
    """format of the scales: e8m0, e4m3 (with a float32 scale of the tensor) or f32"""
    rule: str = ""
    """how the scale follows from the largest magnitude; empty for the first of the scale format"""

    def __post_init__(self) -> None:
        """Checks that the parts go together."""
        element = str(self.element)
        if isinstance(self.block, str):
            if self.block not in ("channel", "tensor"):
                raise InputError(
                    f"block format with {element} elements: block={self.block!r}; expected channel, tensor, or one or "
                    f"two lengths{nearest(self.block, ('channel', 'tensor'))}"
                )
        elif len(self.block) not in (1, 2) or any(not isinstance(n, int) or n < 1 for n in self.block):
            raise InputError(
                f"block format with {element} elements: block={self.block!r}; expected one or two lengths of 1 or more"
            )
        if self.scale not in RULES:
            raise InputError(
                f"block format with {element} elements: scale={self.scale!r}; expected one of {', '.join(RULES)}"
                f"{nearest(self.scale, RULES)}"
            )
        if not self.rule:
            object.__setattr__(self, "rule", RULES[self.scale][0])
        if self.rule not in RULES[self.scale]:
            raise InputError(
                f"block format with {element} elements: scale rule {self.rule!r}; with {self.scale} scales expected "
                f"{' or '.join(RULES[self.scale])}{nearest(self.rule, RULES[self.scale])}"
            )
        if isinstance(self.element, Format) and (self.element.bits > 8 or self.element.specials == "fnuz"):
            raise InputError(
                f"block format with {element} elements: expected at most 8 bits, ieee or fn, or int2 to int8"
            )

    @property
    def name(self) -> str:
        """The shortest name, such as `mxfp4`, `mxfp4:rceil` or `e3m4:block64:e8m0`."""
        for name, preset in PRESETS.items():
            if self == preset:
                return name
        for name, preset in PRESETS.items():
            if self == dataclasses.replace(preset, rule=self.rule, scale=self.scale) and self.scale == preset.scale:
                return f"{name}:{self.rule}"
        block = self.block if isinstance(self.block, str) else "block" + "x".join(map(str, self.block))
        parts = [str(self.element), block, *([self.scale] if self.scale != "f32" else [])]
        return ":".join([*parts, *([self.rule] if self.rule != RULES[self.scale][0] else [])])

    def __str__(self) -> str:
        return self.name

    @property
    def unbiased(self) -> bool:
        """Whether stochastic rounding is unbiased: whether the scale rule clips no value of the block."""
        return self.rule in ("rceil", "ceil", "amax")

    @property
    def bits(self) -> float:
        """The number of bits for each number of a large array, block scales included."""
        scale_bits = 32 if self.scale == "f32" else 8
        return self.element.bits + (0 if isinstance(self.block, str) else scale_bits / math.prod(self.block))


def _mx(element: str, rule: str = "") -> BlockFormat:
    return BlockFormat(parse_format(element), (32,), "e8m0", rule)


PRESETS: dict[str, BlockFormat] = {
    "mxfp8_e4m3": _mx("e4m3"),
    "mxfp8_e5m2": _mx("e5m2"),
    "mxfp6_e2m3": _mx("e2m3"),
    "mxfp6_e3m2": _mx("e3m2"),
    "mxfp4": _mx("e2m1"),
    "mxint8": BlockFormat(Integer(8, 6), (32,), "e8m0"),
    "nvfp4": BlockFormat(parse_format("e2m1"), (16,), "e4m3"),
    "nvfp4_16x16": BlockFormat(parse_format("e2m1"), (16, 16), "e4m3"),
    "block128": BlockFormat(parse_format("e4m3"), (128,)),
    "block128x128": BlockFormat(parse_format("e4m3"), (128, 128)),
    "int8": BlockFormat(Integer(8), "tensor"),
    "int4": BlockFormat(Integer(4), "tensor"),
}
"""The block formats that have names. Sources: OCP Microscaling Formats (MX) 1.0, section 5.2 (`mx...`); NVIDIA 2025,
Pretraining Large Language Models with NVFP4, 2509.25149 (`nvfp4`); DeepSeek-V3, 2412.19437 (`block128`)."""

SYNONYMS = {"mxfp8": "mxfp8_e4m3", "mxfp4_e2m1": "mxfp4"}
"""Other names of presets."""

_BLOCK = re.compile(r"(?:block|group)(\d+)(?:x(\d+))?")
_INTEGER = re.compile(r"int(\d+)(?:f(\d+))?")
_SCALES = {"e8m0": "e8m0", "e4m3": "e4m3", "f32": "f32", "fp32": "f32", "float32": "f32"}
_OPTIONS = ("tensor", "channel", "block32", "group128", *_SCALES, *(rule for rules in RULES.values() for rule in rules))


def parse_block_format(text: str) -> BlockFormat:
    """Parses the name of a block format.

    A name is a preset (`mxfp8` or `mxfp8_e4m3`, `mxfp8_e5m2`, `mxfp6_e2m3`, `mxfp6_e3m2`, `mxfp4`, `mxint8`, `nvfp4`,
    `nvfp4_16x16`, `block128`, `block128x128`, `int8`, `int4`), or an element format (`eXmY`, `intN`), and after it, in
    any order and each after a colon:

    - the block: `blockN` or `groupN` (N numbers along an axis), `blockNxM`, `channel` (all of an axis) or `tensor`;
    - the format of the scales: `e8m0`, `e4m3` or `f32`, by default that of the preset, or `f32`;
    - the scale rule: `floor`, `rceil`, `ceil` or `even` (e8m0), `te` or `torchao` (e4m3), `amax` (f32).

    >>> str(parse_block_format("mxfp8")), str(parse_block_format("e4m3:block32:e8m0:rceil"))
    ('mxfp8_e4m3', 'mxfp8_e4m3:rceil')
    >>> parse_block_format("int4:group64").block
    (64,)

    Raises:
      InputError: a part is unknown, or named twice, or an element has no block.
    """
    head, *options = (part.strip() for part in text.lower().split(":"))
    preset = PRESETS.get(SYNONYMS.get(head, head))
    if preset is not None:
        element: Element = preset.element
    elif match := _INTEGER.fullmatch(head):
        element = Integer(int(match[1]), int(match[2] or 0))
    elif options and re.match(r"(float|e\d|b)", head):
        element = parse_format(head)
    else:
        known = [*PRESETS, *SYNONYMS]
        raise InputError(
            f"block format {text!r}: {head!r} is no block format and no element with a block; expected one of "
            f"{', '.join(known)}, or an element and a block such as e4m3:block128{nearest(head, known)}"
        )
    given: dict[str, Any] = {}
    for option in options:
        if match := _BLOCK.fullmatch(option):
            field, value = "block", tuple(int(n) for n in match.groups() if n)
        elif option in ("tensor", "channel"):
            field, value = "block", cast(Any, option)
        elif option in _SCALES:
            field, value = "scale", cast(Any, _SCALES[option])
        elif any(option in rules for rules in RULES.values()):
            field, value = "rule", cast(Any, option)
        else:
            raise InputError(
                f"block format {text!r}: {option!r} is no block, scale format or scale rule; expected blockN, "
                f"blockNxM, channel or tensor; {', '.join(RULES)}; or a rule: "
                f"{', '.join(rule for rules in RULES.values() for rule in rules)}{nearest(option, _OPTIONS)}"
            )
        if field in given:
            raise InputError(f"block format {text!r}: {option!r} is a second {field}; expected one")
        given[field] = value
    if preset is not None:
        if given.get("scale", preset.scale) != preset.scale:
            given.setdefault("rule", "")
        return dataclasses.replace(preset, **given)
    if "block" not in given and isinstance(element, Integer):
        given["block"] = "tensor"
    if "block" not in given:
        raise InputError(
            f"block format {text!r}: no block; expected one, such as {head}:block32, {head}:channel or {head}:tensor"
        )
    return BlockFormat(element, **given)


def is_block_format(text: str) -> bool:
    """Whether `text` looks like the name of a block format rather than of a float format."""
    head = text.strip().lower().partition(":")[0]
    return ":" in text or head in PRESETS or head in SYNONYMS or re.match(r"mx|nv|block|int", head) is not None


def quantize(
    x: Any,
    format: BlockFormat | Format | str,
    *,
    axis: int | Sequence[int] | None = None,
    rounding: Rounding = "nearest",
    key: jax.Array | None = None,
    saturate: bool | None = None,
) -> jax.Array:
    """Rounds `x` to the numbers of a block format or a float format; returns an array with the shape and dtype of `x`.

    For float formats such as `e4m3`, see `jaxmp.precision.formats.quantize`. For block formats, see `BlockFormat` for
    how a block is scaled and what becomes of infinities, NaN and zeros. The rounding is exact on every device; the
    result is the same with and without jit. In a bfloat16 or float16 `x`, the result is rounded to that dtype. What is
    beyond the largest number of the dtype, as a scale that is rounded up can make it, becomes that number.

    The derivative is 1 in forward and reverse mode (the straight-through estimator, Bengio et al. 2013).

    Args:
      x: float32, bfloat16 or float16, any shape.
      format: a `BlockFormat` or `Format`, or the name of one: `parse_block_format`, `parse_format`.
      axis: the axis along which blocks run, usually that over which a product sums. Blocks of two lengths take a pair,
        by default the last two axes; `channel` may take several; `tensor` takes none. The default is the last axis.
      rounding: `nearest` rounds ties to even. `stochastic` rounds to one of the two neighbours, with probabilities that
        make the mean equal to `x`, except for what the scale rule clips (see `BlockFormat.unbiased`). Under `floor`,
        2.3 % of Gaussian numbers are clipped in `mxfp4`, and the projection on x, <q, x> / <x, x>, is 1.0 % too small.
      key: PRNG key of stochastic rounding; 32 random bits are drawn per number.
      saturate: what overflow becomes, in a float format; block formats saturate.

    >>> x = jnp.array([0.3, -1.0, 5.2, 100.0])
    >>> quantize(x, "mxfp4"), quantize(x, "mxfp4:rceil")
    (Array([ 0., -0.,  8., 96.], dtype=float32), Array([ 0., -0.,  0., 96.], dtype=float32))
    >>> quantize(jnp.array([[1.0, jnp.inf], [2.0, 3.3]]), "mxfp8")
    Array([[ nan,  nan],
           [2.  , 3.25]], dtype=float32)

    Raises:
      InputError: the format or rounding is unknown; stochastic rounding has no key; `x` is none of the three dtypes;
        `x` has no such axis; a float format has an `axis`, or a block format `saturate`.
    """
    if isinstance(format, str):
        format = parse_block_format(format) if is_block_format(format) else parse_format(format)
    if isinstance(format, Format):
        if axis is not None:
            raise InputError(f"quantize to {format}: axis={axis!r}; expected none, since a float format has no blocks")
        return formats.quantize(x, format, rounding=rounding, key=key, saturate=saturate)
    if saturate is not None:
        raise InputError(f"quantize to {format}: saturate={saturate!r}; expected none, since block formats saturate")
    x = check_carrier(x, format)
    axes = _axes(x.shape, format, axis)
    return _quantize_blocks(x, rounding_noise(x, rounding, key), format, axes)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("elements", "scales", "tensor_scale"),
    meta_fields=("format", "shape", "axis"),
)
@dataclasses.dataclass(frozen=True)
class PackedBlocks:
    """An array in a block format, in as many bits as the format has: elements and scales. A pytree of arrays.

    `pack` makes it from numbers, `from_ml_dtypes` from arrays of ml_dtypes.
    """

    elements: jax.Array
    """uint8, codes of the elements along the last axis: one a byte of 8, 7 or 5 bits, four in three bytes of 6 bits,
    two a byte of 4 bits or fewer. The first has the low bits. Floats are sign and magnitude, integers in two's
    complement"""
    scales: jax.Array
    """uint8 codes of e8m0 or e4m3, or float32: the shape of the array, with the number of blocks along each axis"""
    tensor_scale: jax.Array | None
    """float32 scalar: the scale of the tensor where scales are e4m3; None otherwise"""
    format: BlockFormat
    """the block format"""
    shape: tuple[int, ...]
    """shape of the array"""
    axis: tuple[int, ...]
    """axes along which blocks run"""

    @property
    def nbytes(self) -> int:
        """The size of elements and scales in bytes."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def unpack(self, dtype: Any = jnp.float32) -> jax.Array:
        """Returns the numbers, in float32 or rounded to bfloat16 or float16: those that `quantize` returns."""
        codes = _unpack_codes(self.elements, self.format.element.bits, self.shape)
        magnitudes, negative = _split_sign(codes, self.format.element)
        layout = _Layout(self.shape, self.format.block, self.axis)
        scale = _decoded_scale(layout.expand(self.scales), self.tensor_scale, self.format)
        codes = layout.grouped(magnitudes)
        bits = _scaled(_numbers(codes, self.format.element), *scale)
        return _finish(layout.ungrouped(_with_specials(bits, codes, self.format.element)), negative, jnp.dtype(dtype))

    def to_ml_dtypes(self) -> tuple[np.ndarray, np.ndarray, float | None]:
        """Returns elements (shape of the array), scales and scale of the tensor as NumPy arrays of ml_dtypes.

        Elements are, for instance, `float8_e4m3fn`, `float4_e2m1fn`, `int8` or `int4`; scales are `float8_e8m0fnu`,
        `float8_e4m3fn` or float32.

        Raises:
          InputError: ml_dtypes has no dtype for the elements.
        """
        codes = np.asarray(_unpack_codes(self.elements, self.format.element.bits, self.shape)).astype(np.uint8)
        dtype, scales = _ml_dtype(self.format), np.asarray(self.scales)
        if isinstance(self.format.element, Integer):
            shift = 8 - self.format.element.bits
            elements = ((codes << shift).view(np.int8) >> shift).astype(dtype)
        else:
            elements = codes.view(dtype)
        if self.format.scale != "f32":
            scales = scales.view(_SCALE_DTYPES[self.format.scale])
        return elements, scales, None if self.tensor_scale is None else float(self.tensor_scale)


def pack(
    x: Any,
    format: BlockFormat | str,
    *,
    axis: int | Sequence[int] | None = None,
    rounding: Rounding = "nearest",
    key: jax.Array | None = None,
) -> PackedBlocks:
    """Rounds `x` to a block format and returns elements and scales; arguments are as for `quantize`.

    >>> packed = pack(jnp.arange(32.0), "mxfp4")
    >>> packed.nbytes, packed.elements.shape, packed.scales.tolist()
    (17, (16,), [129])
    >>> bool((packed.unpack() == quantize(jnp.arange(32.0), "mxfp4")).all())
    True
    """
    format = parse_block_format(format) if isinstance(format, str) else format
    x = check_carrier(x, format)
    return _packed(x, rounding_noise(x, rounding, key), format, _axes(x.shape, format, axis))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _packed(x: jax.Array, noise: jax.Array | None, format: BlockFormat, axes: tuple[int, ...]) -> PackedBlocks:
    layout, bits = _Layout(x.shape, format.block, axes), float32_bits(x)
    scaling = _scaling(bits & ~_SIGN, layout, format)
    numbers = _elements(*_operands(bits, noise, layout), scaling, format.element)
    magnitudes = layout.ungrouped(jnp.where(scaling.bad, jnp.uint32(0), _codes(numbers, format.element)))
    codes = _join_sign(magnitudes, (bits & _SIGN) > 0, format.element)
    scales = jnp.squeeze(scaling.stored, layout.inner)
    return PackedBlocks(_pack_codes(codes, format.element.bits), scales, scaling.tensor_scale, format, x.shape, axes)


def from_ml_dtypes(
    elements: Any,
    scales: Any,
    format: BlockFormat | str,
    *,
    axis: int | Sequence[int] | None = None,
    tensor_scale: float | None = None,
) -> PackedBlocks:
    """Packs elements and scales that another library has made, as arrays of ml_dtypes (`PackedBlocks.to_ml_dtypes`).

    Args:
      elements: one number an element, in the ml_dtypes dtype of the format's elements; any shape.
      scales: float8_e8m0fnu, float8_e4m3fn or float32, as the format has them; the shape of `elements`, with the number
        of blocks along each axis on which blocks run.
      format: a `BlockFormat` or its name.
      axis: the axis along which blocks run; as for `quantize`.
      tensor_scale: the scale of the tensor by which e4m3 scales are multiplied; 1 by default.

    Infinite and NaN elements stay what they are, and blocks with a NaN scale are NaN.

    Raises:
      InputError: a dtype is another one, the block length does not fit the shapes of elements and scales, or a scale is
        negative.
    """
    format = parse_block_format(format) if isinstance(format, str) else format
    elements, scales = np.asarray(elements), np.asarray(scales)
    dtype, scale_dtype = _ml_dtype(format), np.dtype(_SCALE_DTYPES[format.scale])
    for what, array, expected in (("elements", elements, dtype), ("scales", scales, scale_dtype)):
        if array.dtype != expected:
            raise InputError(f"from_ml_dtypes to {format}: {what} are {array.dtype}; expected {expected}")
    axes = _axes(elements.shape, format, axis)
    expected_shape = _Layout(elements.shape, format.block, axes).scale_shape
    if scales.shape != expected_shape:
        lengths = " x ".join(str(n) for n in format.block) if isinstance(format.block, tuple) else format.block
        along = f"blocks of {lengths} along {'axis' if len(axes) == 1 else 'axes'} {', '.join(map(str, axes))}"
        raise InputError(
            f"from_ml_dtypes to {format}: elements of shape {elements.shape} with scales of shape {scales.shape}; "
            f"{along} need scales of shape {expected_shape}"
        )
    if tensor_scale is not None and format.scale != "e4m3":
        raise InputError(
            f"from_ml_dtypes to {format}: tensor_scale={tensor_scale}; expected none, since only e4m3 scales have one"
        )
    if tensor_scale is not None and not 0 <= tensor_scale < np.inf:
        raise InputError(f"from_ml_dtypes to {format}: tensor_scale={tensor_scale}; expected a number of 0 or more")
    if format.scale != "e8m0":  # which has no sign
        numbers = scales.astype(np.float32)
        if (numbers < 0).any():
            place = tuple(int(i) for i in np.argwhere(numbers < 0)[0])
            raise InputError(f"from_ml_dtypes to {format}: scale {place} is {numbers[place]:g}; expected 0 or more")
        scales = np.abs(scales)  # a NaN or a zero may have a sign, which means nothing
    codes = (elements.astype(np.int8) if isinstance(format.element, Integer) else elements).view(np.uint8)
    codes = jnp.asarray(codes & (2**format.element.bits - 1), jnp.uint32)
    return PackedBlocks(
        _pack_codes(codes, format.element.bits),
        jnp.asarray(scales if format.scale == "f32" else scales.view(np.uint8)),
        None if format.scale != "e4m3" else jnp.float32(1 if tensor_scale is None else tensor_scale),
        format,
        elements.shape,
        axes,
    )


class BlockScales(NamedTuple):
    """The scales with which an array is rounded to a block format."""

    of_blocks: jax.Array
    """float32, NaN where a block holds an infinity or NaN: the shape of the array, with the number of blocks along each
    axis"""
    of_numbers: jax.Array
    """float32, shape of the array: the scale of each number's block"""
    amax: jax.Array
    """float32, shape of `of_blocks`: the largest finite magnitude of each block whose numbers are all finite, else 0"""
    limit: jax.Array
    """float32, shape of `of_blocks`: the magnitude above which positive numbers of the block are clipped (and negative
    ones, but for integers with a fraction, which have one more); NaN as `of_blocks`. It is no product of these: where a
    scale is subnormal, processors take it for 0"""
    limit_of_numbers: jax.Array
    """float32, shape of the array: the limit of each number's block"""


def block_scales(x: Any, format: BlockFormat | str, *, axis: int | Sequence[int] | None = None) -> BlockScales:
    """Computes the scales with which `pack` and `quantize` round `x`; arguments are as for `quantize`.

    >>> block_scales(jnp.array([[1.0] * 32 + [448.0], [0.0] * 33]), "mxfp8").of_blocks
    Array([[0.00390625, 1.        ],
           [0.        , 0.        ]], dtype=float32)
    """
    format = parse_block_format(format) if isinstance(format, str) else format
    x = check_carrier(x, format)
    layout = _Layout(x.shape, format.block, _axes(x.shape, format, axis))
    return _block_scales(_scaling(float32_bits(x) & ~_SIGN, layout, format), layout, format)


def _block_scales(scaling: _Scaling, layout: _Layout, format: BlockFormat) -> BlockScales:
    def times_scale(number: float) -> jax.Array:
        return bitcast_convert_type(_scaled(jnp.float32(number), scaling.decode, scaling.bad), jnp.float32)

    scale, limit = times_scale(1.0), times_scale(clips_above(format.element))
    if format.scale == "e8m0":  # a block of zeros stores 2^-127, the smallest scale
        scale = jnp.where((scaling.amax == 0) & ~scaling.bad, 0, scale)
    amax = bitcast_convert_type(scaling.amax, jnp.float32)
    whole, whole_limit = (layout.ungrouped(jnp.broadcast_to(each, layout.split)) for each in (scale, limit))
    inner = layout.inner
    return BlockScales(
        jnp.squeeze(scale, inner), whole, jnp.squeeze(amax, inner), jnp.squeeze(limit, inner), whole_limit
    )


def clips_above(element: Element, *, negative: bool = False) -> float:
    """Returns the magnitude from which an element is clipped, rather than rounded to the largest number of its sign."""
    if isinstance(element, Format):
        return element.max + 2.0 ** (element.max_exponent - element.mantissa_bits - 1)
    return (element.largest_codes[negative] + 0.5) * 2.0**-element.fraction_bits


def _e4m3_numbers(codes: jax.Array) -> jax.Array:
    """Returns the numbers of codes of positive e4m3, float32."""
    code = codes.astype(jnp.uint32)
    normal = bitcast_convert_type((code << 20) + np.uint32((127 - _E4M3.bias) << 23), jnp.float32)
    return jnp.where(code < 8, code.astype(jnp.int32).astype(jnp.float32) * _E4M3.smallest_subnormal, normal)


# Emulation with integer operations. Below, `bits` are the bits of a float32, as uint32.

_SIGN = np.uint32(0x80000000)
_LARGEST = np.uint32(INFINITY - 1)
_NAN = np.uint32(INFINITY | 0x400000)
_FLOAT32_MAX = np.float32(np.finfo(np.float32).max)
_NAN_CODES = {"e8m0": 255, "e4m3": 127}
_SCALE_DTYPES: dict[str, Any] = {"e8m0": ml_dtypes.float8_e8m0fnu, "e4m3": ml_dtypes.float8_e4m3fn, "f32": np.float32}
_E4M3 = parse_format("e4m3")


class _Layout:
    """How an array is seen as blocks: each axis along which blocks run is split into (number of blocks, length)."""

    def __init__(self, shape: tuple[int, ...], block: tuple[int, ...] | str, axes: tuple[int, ...]):
        self.shape = shape
        lengths = dict(zip(axes, (shape[a] for a in axes) if isinstance(block, str) else block, strict=True))
        self.padding = [(0, -n % max(lengths.get(a, 1), 1)) for a, n in enumerate(shape)]
        self.split: list[int] = []
        inner: list[int] = []
        for a, (n, (_, more)) in enumerate(zip(shape, self.padding, strict=True)):
            if a in lengths:
                length = max(lengths[a], 1)
                inner.append(len(self.split) + 1)
                self.split += [(n + more) // length, length]
            else:
                self.split.append(n)
        self.inner = tuple(inner)
        """the axes of a split array that lie within a block"""
        self.scale_shape = tuple(n for i, n in enumerate(self.split) if i not in inner)

    def grouped(self, x: jax.Array) -> jax.Array:
        """Splits an array of the shape, filled up with zeros."""
        if any(more for _, more in self.padding):
            x = jnp.pad(x, self.padding)
        return x.reshape(self.split)

    def ungrouped(self, x: jax.Array) -> jax.Array:
        """Undoes `grouped`."""
        x = x.reshape([n + more for n, (_, more) in zip(self.shape, self.padding, strict=True)])
        return x[tuple(slice(n) for n in self.shape)] if any(more for _, more in self.padding) else x

    def expand(self, scales: jax.Array) -> jax.Array:
        """Gives scales an axis of length 1 for each that lies within a block."""
        return jnp.expand_dims(scales, self.inner)


class _Factor(NamedTuple):
    """A positive number for each block, by which its numbers are multiplied: factor * 2^exponent."""

    factor: jax.Array | None
    """float32 in [1, 2), or 0; None for 1"""
    exponent: jax.Array
    """int32"""


class _Scaling(NamedTuple):
    """The scales of all blocks. Each array has the shape of the split array, with 1 for what lies within a block."""

    stored: jax.Array
    """the scale as it is stored: uint8 code of e8m0 or e4m3, or float32"""
    tensor_scale: jax.Array | None
    """float32 scalar"""
    encode: _Factor
    """what numbers are multiplied by before they are rounded to elements"""
    decode: _Factor
    """the scale: what elements are multiplied by"""
    bad: jax.Array
    """bool: the block holds an infinity or NaN"""
    amax: jax.Array
    """bits of the largest magnitude of each block that is not bad, else 0"""


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _quantize_blocks(x: jax.Array, noise: jax.Array | None, format: BlockFormat, axes: tuple[int, ...]) -> jax.Array:
    """Implements `quantize`. `noise` holds 32 random bits per number; None rounds to nearest."""
    with jax.named_scope(f"quantize_{str(format).replace(':', '-')}"):  # profiles and `blame` show it as one operation
        return round_blocks(x, noise, format, axes)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))  # outside of jit, one call instead of a hundred
def round_blocks(
    x: jax.Array,
    noise: jax.Array | None,
    format: BlockFormat,
    axes: tuple[int, ...],
    spread: tuple[str, int] | None = None,
) -> jax.Array:
    """Rounds as `quantize` does, without its checks and without a derivative.

    Args:
      x: float32, bfloat16 or float16.
      noise: uint32 random bits for each number of `x`; None rounds to nearest.
      format: the block format.
      axes: the axes along which blocks run, none negative: all of them for a `tensor` format.
      spread: mapped axis over which `x` is spread, and the axis of `x` that is: a scale of the whole tensor, or of all
        of that axis (`channel`), follows from the largest magnitude on all replicas; other blocks lie on one each.
    """
    layout, bits = _Layout(x.shape, format.block, axes), float32_bits(x)
    return _rounded(bits, noise, _scaling(bits & ~_SIGN, layout, format, axes, spread), layout, format, x.dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def round_blocks_with_scales(
    x: jax.Array, noise: jax.Array | None, format: BlockFormat, axes: tuple[int, ...]
) -> tuple[jax.Array, BlockScales]:
    """Rounds as `round_blocks` does; returns also what `block_scales` returns."""
    layout, bits = _Layout(x.shape, format.block, axes), float32_bits(x)
    scaling = _scaling(bits & ~_SIGN, layout, format)
    return _rounded(bits, noise, scaling, layout, format, x.dtype), _block_scales(scaling, layout, format)


def _rounded(
    bits: jax.Array, noise: jax.Array | None, scaling: _Scaling, layout: _Layout, format: BlockFormat, dtype: Any
) -> jax.Array:
    numbers = _elements(*_operands(bits, noise, layout), scaling, format.element)
    result = layout.ungrouped(_scaled(numbers, scaling.decode, scaling.bad))
    return _finish(result, (bits & _SIGN) > 0, dtype, keep_zero=isinstance(format.element, Format))


@_quantize_blocks.defjvp
def _straight_through(format: BlockFormat, axes: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _quantize_blocks(*primals, format, axes), tangents[0]


def _operands(bits: jax.Array, noise: jax.Array | None, layout: _Layout) -> tuple[jax.Array, jax.Array | None]:
    return layout.grouped(bits), None if noise is None else layout.grouped(noise)


def _scaling(
    magnitude: jax.Array,
    layout: _Layout,
    format: BlockFormat,
    axes: tuple[int, ...] = (),
    spread: tuple[str, int] | None = None,
) -> _Scaling:
    """Computes the scales of all blocks from the magnitudes of the array; `axes` and `spread` as in `round_blocks`."""
    # As integers, a NaN is larger than infinity, and that than any number: a maximum cannot miss one (trap T18).
    amax = jnp.max(layout.grouped(magnitude), axis=layout.inner, keepdims=True, initial=0)
    if spread is not None and (format.block == "tensor" or (format.block == "channel" and spread[1] in axes)):
        amax = jax.lax.pmax(amax, spread[0])
    bad = amax >= INFINITY
    amax = jnp.where(bad, jnp.uint32(0), amax)
    if format.scale == "e8m0":
        code = _e8m0_code(amax, format.element, format.rule)
        stored = jnp.where(bad, np.uint8(_NAN_CODES["e8m0"]), code.astype(jnp.uint8))
        return _Scaling(stored, None, _Factor(None, 127 - code), _Factor(None, code - 127), bad, amax)
    if format.scale == "f32":
        # With this limit the scale is a normal number, which others can multiply by without losing it (trap T10).
        encode = _once(jnp.minimum(divide(to_bits(format.element.max), amax), to_bits(2.0**126)))
        decode = _once(divide(to_bits(1), encode))
        bad = bad | (decode >= INFINITY)  # of elements below 1, and a block of float32's largest numbers
        stored = jnp.where(bad, jnp.float32(jnp.nan), bitcast_convert_type(decode, jnp.float32))
        return _Scaling(stored, None, _factor(encode), _factor(decode), bad, amax)
    tensor_amax = jnp.max(amax, initial=0)
    if spread is not None:
        tensor_amax = jax.lax.pmax(tensor_amax, spread[0])
    code, tensor_scale, encode, decode = _e4m3_scaling(amax, tensor_amax, format)
    stored = jnp.where(bad, np.uint8(_NAN_CODES["e4m3"]), code.astype(jnp.uint8))
    tensor_scale = bitcast_convert_type(tensor_scale, jnp.float32)
    return _Scaling(stored, tensor_scale, _factor(encode), _factor(decode), bad, amax)


def _factor(bits: jax.Array) -> _Factor:
    factor, exponent = significand_and_exponent(bits)
    return _Factor(jnp.where(bits == 0, jnp.float32(0), factor), exponent)


def _e8m0_code(amax: jax.Array, element: Element, rule: str) -> jax.Array:
    """Returns the biased exponent of the scale, int32, 0 to 254."""
    if rule == "even":
        amax = amax + np.uint32(1 << (22 - element.mantissa_bits))
    exponent, mantissa = (amax >> 23).astype(jnp.int32), amax & MANTISSA
    if rule == "ceil":
        exponent += (mantissa > 0).astype(jnp.int32)
    if rule == "rceil":  # amax / max > 2^k, by integers: a quotient in float32 would be rounded
        exponent += (mantissa > (to_bits(element.max) & MANTISSA)).astype(jnp.int32)
    return jnp.clip(exponent - element.max_exponent, 0, 254)


def _e4m3_scaling(amax: jax.Array, tensor_amax: jax.Array, format: BlockFormat) -> tuple[jax.Array, ...]:
    """Returns codes of the scales, and bits: of the scale of the tensor, and of the factors of numbers and elements."""
    one, largest, product = to_bits(1), to_bits(format.element.max), to_bits(448 * format.element.max)
    if format.rule == "te":
        encode_tensor = _once(jnp.minimum(divide(product, tensor_amax), _LARGEST))
        tensor_scale = _once(divide(one, encode_tensor))
        reciprocal = np.float32(1) / np.float32(format.element.max)
        multiplier = jnp.minimum(bitcast_convert_type(encode_tensor, jnp.float32) * reciprocal, _FLOAT32_MAX)
        code = _e4m3_codes(jnp.minimum(_normal_product(amax, multiplier), 448))
        decode = _once(_e4m3_product(code, tensor_scale))
        return code, tensor_scale, _once(jnp.minimum(divide(one, decode), _LARGEST)), decode
    tensor_scale = _once(divide(tensor_amax, product))
    ratio = jnp.where(amax > 0, divide(divide(amax, largest), tensor_scale), jnp.uint32(0))
    code = _e4m3_codes(bitcast_convert_type(jnp.clip(ratio, to_bits(2.0**-6), to_bits(448)), jnp.float32))
    scale = bitcast_convert_type(_e4m3_numbers(code), jnp.uint32)
    encode = _once(jnp.minimum(divide(_once(divide(one, tensor_scale)), scale), _LARGEST))
    return code, tensor_scale, encode, _once(_e4m3_product(code, tensor_scale))


def _normal_product(amax: jax.Array, multiplier: jax.Array) -> jax.Array:
    """Multiplies float32 bits by a normal number; the result is exact but for 0 in place of what is subnormal."""
    # A subnormal amax is a whole number of 2^-149.
    shifted = jnp.maximum(bitcast_convert_type(multiplier, jnp.int32) - (149 << 23), 0)
    of_subnormal = amax.astype(jnp.int32).astype(jnp.float32) * bitcast_convert_type(shifted, jnp.float32)
    return jnp.where(amax < LEADING, of_subnormal, bitcast_convert_type(amax, jnp.float32) * multiplier)


def _e4m3_codes(x: jax.Array) -> jax.Array:
    """Rounds positive float32 numbers up to 448 to nearest in e4m3; returns codes, uint32."""
    bits = bitcast_convert_type(x, jnp.uint32)
    normal = ((bits + (0x7FFFF + ((bits >> 20) & 1))) >> 20) - np.uint32((127 - _E4M3.bias) << 3)
    # Adding 2^23 to a number of subnormal quanta rounds it to a whole one.
    quanta = x * np.float32(1 / _E4M3.smallest_subnormal) + np.float32(2.0**23)
    small = bitcast_convert_type(quanta, jnp.uint32) - to_bits(2.0**23)
    return jnp.where(bits < to_bits(_E4M3.smallest_normal), small, normal)


def _e4m3_product(code: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns the bits of a positive e4m3 number times a finite float32 number, which is given as bits too."""
    # The product of two whole numbers has 28 bits: it is exact.
    stored = (factor >> 23).astype(jnp.int32)
    whole = (factor & MANTISSA) | jnp.where(stored > 0, jnp.uint32(LEADING), jnp.uint32(0))
    whole = ((code & 7) | jnp.where(code >= 8, jnp.uint32(8), jnp.uint32(0))) * whole
    exponent = jnp.maximum(code.astype(jnp.int32) >> 3, 1) + jnp.maximum(stored, 1) - (10 + 150)
    # float32 rounds it to 24 bits. What is subnormal has fewer: it is rounded once, to a whole number of 2^-149.
    bits = bitcast_convert_type(whole.astype(jnp.int32).astype(jnp.float32), jnp.uint32)
    normal = bits + (exponent.astype(jnp.uint32) << 23)
    quanta = whole << jnp.clip(exponent + 149, 0, 31).astype(jnp.uint32)
    quanta = drop_bits(quanta, jnp.clip(-149 - exponent, 0, 31).astype(jnp.uint32), None)
    product = jnp.where((bits >> 23).astype(jnp.int32) + exponent >= 1, normal, quanta)
    return jnp.where(whole == 0, jnp.uint32(0), product)


def _once(bits: jax.Array) -> jax.Array:
    """Returns `bits` of positive numbers such that XLA computes them once, not in each operation that uses them.

    XLA:CPU fuses what is computed for a block into the loop over its numbers, unless it ends with a division: nvfp4 of
    2^20 numbers would take 43 ms instead of 3. (It drops optimization barriers before.) Positive numbers have no sign
    bit; XLA does not know that, and keeps this division by 1.
    """
    return jax.lax.div(bits, (bits >> 31) + 1)


def _decoded_scale(stored: jax.Array, tensor_scale: jax.Array | None, format: BlockFormat) -> tuple[_Factor, jax.Array]:
    """Returns what elements are multiplied by, given the stored scales, and whether that is NaN."""
    if format.scale == "e8m0":
        return _Factor(None, stored.astype(jnp.int32) - 127), stored == _NAN_CODES["e8m0"]
    if format.scale == "f32":
        bits = bitcast_convert_type(stored, jnp.uint32)
        return _factor(bits), bits >= INFINITY
    assert tensor_scale is not None
    product = _once(_e4m3_product(stored.astype(jnp.uint32), bitcast_convert_type(tensor_scale, jnp.uint32)))
    return _factor(product), stored == _NAN_CODES["e4m3"]


def _elements(bits: jax.Array, noise: jax.Array | None, scaling: _Scaling, element: Element) -> jax.Array:
    """Multiplies numbers by `scaling.encode` and rounds them to elements; returns their magnitudes, float32.

    What it returns of a block that is bad has no meaning.
    """
    magnitude = (bits & ~_SIGN).astype(jnp.int32)
    # The bits of a number as if exponents had no end: a subnormal number is normal, and 0 is 2^-227.
    subnormal = bitcast_convert_type(magnitude.astype(jnp.float32), jnp.int32) - (149 << 23)
    wide = jnp.where(magnitude < LEADING, jnp.maximum(subnormal, -(100 << 23)), magnitude)
    if scaling.encode.factor is not None:
        significand = wide & MANTISSA
        product = bitcast_convert_type(significand | (127 << 23), jnp.float32) * scaling.encode.factor
        wide = wide - significand + (bitcast_convert_type(product, jnp.int32) - (127 << 23))
    if scaling.tensor_scale is not None:  # a scale that e4m3 rounds to 0 leaves its block far beyond the largest number
        wide = jnp.minimum(wide, (jnp.minimum(200 - scaling.encode.exponent, 255) << 23) | MANTISSA)
    wide = wide + (scaling.encode.exponent << 23)
    # A number of the binade 2^e is rounded to a multiple of 2^(e - mantissa_bits), e at least min_exponent.
    mantissa_bits, min_exponent = _binades(element)
    if noise is None:  # adding 2^(e - mantissa_bits + 23) rounds it, and ties to even
        wide = jnp.maximum(wide, 0)
        binade = jnp.maximum(wide & ~MANTISSA, (min_exponent + 127) << 23)
        shift = bitcast_convert_type(binade + ((23 - mantissa_bits) << 23), jnp.float32)
        numbers = (bitcast_convert_type(wide, jnp.float32) + shift) - shift
    else:
        exponent = wide >> 23
        binade = jnp.maximum(exponent, min_exponent + 127)
        drop = binade - exponent + (23 - mantissa_bits)
        significand = ((wide & MANTISSA) | LEADING).astype(jnp.uint32)
        significand >>= jnp.clip(drop - 31, 0, 31).astype(jnp.uint32)  # 32 random bits can decide about 31 dropped bits
        quanta = drop_bits(significand, jnp.minimum(drop, 31).astype(jnp.uint32), noise)
        quantum = bitcast_convert_type((binade - mantissa_bits) << 23, jnp.float32)
        numbers = quanta.astype(jnp.int32).astype(jnp.float32) * quantum
    if isinstance(element, Format) or not element.fraction_bits:
        return jnp.minimum(numbers, np.float32(element.max))
    positive, negative = (np.float32(code * 2.0**-element.fraction_bits) for code in element.largest_codes)
    return jnp.minimum(numbers, jnp.where(bits >= _SIGN, negative, positive))


def _scaled(numbers: jax.Array, scale: _Factor, bad: jax.Array) -> jax.Array:
    """Returns the bits of magnitudes of elements times their scales, at most float32's largest; NaN where `bad`.

    A subnormal product with a scale that is no power of two is rounded twice: it can be 2^-149 from the nearest.
    """
    if scale.factor is not None:
        numbers = numbers * scale.factor
    result = times_power_of_two(bitcast_convert_type(numbers, jnp.uint32), scale.exponent)
    return jnp.where(bad, _NAN, jnp.minimum(result, _LARGEST))


def _codes(numbers: jax.Array, element: Element) -> jax.Array:
    """Returns the codes of magnitudes of elements, uint32.

    The codes of a float format are in the order of its numbers: those below the second binade are multiples of the
    smallest. All codes of an integer are.
    """
    mantissa_bits, min_exponent = _binades(element)
    quanta = (numbers * np.float32(2.0 ** (mantissa_bits - min_exponent))).astype(jnp.int32).astype(jnp.uint32)
    if isinstance(element, Integer):
        return quanta
    normal = (bitcast_convert_type(numbers, jnp.uint32) >> (23 - mantissa_bits)) - np.uint32(
        (min_exponent + 126) << mantissa_bits
    )
    return jnp.where(numbers < np.float32(2.0**min_exponent), quanta, normal)


def _numbers(codes: jax.Array, element: Element) -> jax.Array:
    """Undoes `_codes`; returns float32."""
    mantissa_bits, min_exponent = _binades(element)
    quanta = codes.astype(jnp.int32).astype(jnp.float32) * np.float32(2.0 ** (min_exponent - mantissa_bits))
    if isinstance(element, Integer):
        return quanta
    normal = (codes << (23 - mantissa_bits)) + np.uint32((min_exponent + 126) << 23)
    return jnp.where(codes < 1 << mantissa_bits, quanta, bitcast_convert_type(normal, jnp.float32))


def _with_specials(bits: jax.Array, codes: jax.Array, element: Element) -> jax.Array:
    """Puts infinity and NaN where codes of a float format say so, as those of another library may."""
    if isinstance(element, Integer) or not element.has_nan:
        return bits
    code = element.largest_code
    special = jnp.where(codes == code + 1, jnp.uint32(INFINITY), _NAN) if element.has_infinity else _NAN
    return jnp.where(codes > code, jnp.maximum(bits, special), bits)  # NaN, too, where the scale is


def _binades(element: Element) -> tuple[int, int]:
    """Returns mantissa bits and the smallest exponent; an integer is a float with subnormal numbers alone."""
    if isinstance(element, Format):
        return element.mantissa_bits, element.min_exponent
    return element.bits, element.bits - element.fraction_bits


def _finish(magnitude: jax.Array, negative: jax.Array, dtype: Any, keep_zero: bool = True) -> jax.Array:
    """Puts the sign on magnitude bits, and rounds to `dtype`: a number to one, if only to the largest."""
    if not keep_zero:
        negative = negative & (magnitude > 0)
    if dtype != jnp.float32:
        rounded = round_bits(magnitude, None, parse_format(dtype.name), True)
        magnitude = jnp.where(magnitude == INFINITY, magnitude, rounded)
    return from_float32_bits(magnitude | jnp.where(negative, _SIGN, jnp.uint32(0)), dtype)


def _join_sign(magnitude: jax.Array, negative: jax.Array, element: Element) -> jax.Array:
    """Returns the codes of elements, sign and magnitude for floats and two's complement for integers."""
    if isinstance(element, Format):
        return magnitude | (negative.astype(jnp.uint32) << (element.bits - 1))
    return jnp.where(negative, (2**element.bits - magnitude) & (2**element.bits - 1), magnitude)


def _split_sign(code: jax.Array, element: Element) -> tuple[jax.Array, jax.Array]:
    """Undoes `_join_sign`."""
    negative = (code >> (element.bits - 1)) > 0
    if isinstance(element, Format):
        return code & (2 ** (element.bits - 1) - 1), negative
    return jnp.where(negative, 2**element.bits - code, code), negative


def _codes_a_group(bits: int) -> tuple[int, int]:
    """(number of codes, number of bytes) that are packed together."""
    return (2, 1) if bits <= 4 else (4, 3) if bits == 6 else (1, 1)


def _pack_codes(codes: jax.Array, bits: int) -> jax.Array:
    count, size = _codes_a_group(bits)
    if count == 1 or not codes.ndim:
        return codes.astype(jnp.uint8)
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % count)])
    codes = codes.reshape(*codes.shape[:-1], -1, count)
    width = 8 * size // count
    word = functools.reduce(jnp.bitwise_or, [codes[..., i] << (width * i) for i in range(count)])
    packed = jnp.stack([(word >> (8 * i)) & 0xFF for i in range(size)], -1).astype(jnp.uint8)
    return packed.reshape(*packed.shape[:-2], -1)


def _unpack_codes(packed: jax.Array, bits: int, shape: tuple[int, ...]) -> jax.Array:
    count, size = _codes_a_group(bits)
    codes = jnp.asarray(packed, jnp.uint32)
    if count == 1 or not shape:
        return codes
    codes = codes.reshape(*codes.shape[:-1], -1, size)
    word = functools.reduce(jnp.bitwise_or, [codes[..., i] << (8 * i) for i in range(size)])
    width = 8 * size // count
    codes = jnp.stack([(word >> (width * i)) & (2**bits - 1) for i in range(count)], -1)
    return codes.reshape(*codes.shape[:-2], -1)[..., : shape[-1]]


def _ml_dtype(format: BlockFormat) -> np.dtype:
    """The dtype of ml_dtypes, or NumPy's int8, for the elements of a format."""
    element = format.element
    if isinstance(element, Integer) and element.bits in (2, 4, 8):
        return np.dtype(np.int8 if element.bits == 8 else getattr(ml_dtypes, f"int{element.bits}"))
    for name in _ELEMENT_DTYPES:
        if isinstance(element, Format) and parse_format(name) == element:
            return np.dtype(getattr(ml_dtypes, name))
    raise InputError(
        f"block format {format}: ml_dtypes has no dtype for {element}; expected one of {', '.join(_ELEMENT_DTYPES)}, "
        "int2, int4 or int8"
    )


_ELEMENT_DTYPES = (
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3", "float8_e3m4"),
    *("float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn"),
)


def _axes(shape: tuple[int, ...], format: BlockFormat, axis: int | Sequence[int] | None) -> tuple[int, ...]:
    """Returns the axes along which blocks run, none negative; raises InputError if the array has no such axes."""
    if format.block == "tensor":
        return tuple(range(len(shape)))
    count = 1 if isinstance(format.block, str) else len(format.block)
    if axis is None:
        given = tuple(range(-count, 0))
    else:
        given = tuple(map(operator.index, axis if isinstance(axis, Iterable) else (axis,)))
    normal = tuple(a + len(shape) if a < 0 else a for a in given)
    if any(not 0 <= a < len(shape) for a in normal) or len(set(normal)) < len(normal):
        raise InputError(f"quantize to {format}: axis={axis!r}, by which blocks run along {given}, of shape {shape}")
    if (len(normal) != count and format.block != "channel") or not normal:
        raise InputError(f"quantize to {format}: axis={axis!r}; expected {count} for its blocks, of shape {shape}")
    return normal
