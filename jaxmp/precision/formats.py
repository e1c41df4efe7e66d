"""Float formats: their properties, and exact emulation of any of them on any device.

    quantize(x, "e4m3")                           # rounds to the numbers of OCP's e4m3; the dtype stays that of x
    fake_quantize(x, "e4m3", "e5m2")              # also rounds the gradient, to e5m2
    quantize(x, "e3m4", rounding="stochastic", key=key)

Formats with a scale for each block of numbers are in `jaxmp.precision.blocks`, whose `quantize`, exported as
`jaxmp.quantize`, takes both kinds.

The name `e4m3` means 4 exponent bits and 3 mantissa bits. Emulation works on the bits of float32 with integer
operations. So XLA cannot remove it, as it can remove a cast (trap T6: between two 16-bit operations XLA may keep the
unrounded value); it handles float32's subnormals, which XLA flushes to zero in float arithmetic (trap T10); and it
gives the same bits on every device, with and without jit.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import bitcast_convert_type

from jaxmp.errors import InputError, nearest

Specials = Literal["ieee", "fn", "fnuz"]
Rounding = Literal["nearest", "stochastic"]

_OCP_FN = {(4, 3), (2, 1), (2, 3), (3, 2)}  # formats that OCP standardised without infinities
_SHORT = {(8, 23): "f32", (8, 10): "tf32", (8, 7): "bf16", (5, 10): "f16"}


@dataclasses.dataclass(frozen=True)
class Format:
    """A binary float format with a sign bit, exponent bits, mantissa bits and subnormal numbers.

    Its normal numbers are ±2^(E - bias) * 1.M with E at least 1, its subnormals ±2^(1 - bias) * 0.M. Float32 can
    represent all of them. `specials` says which codes are infinity and NaN:

    - `ieee`: the codes with the largest exponent are infinities and NaNs, as in IEEE 754;
    - `fn`: there is no infinity. If the format has 8 bits or more, NaN is the largest code; if it has fewer, it has no
      NaN either (OCP's e4m3, e2m1, e2m3 and e3m2; ml_dtypes' names that end in `fn`);
    - `fnuz`: there is no infinity and no negative zero; NaN is the code that negative zero would have.

    `parse_format(str(format))` returns an equal format.

    Sources: IEEE 754-2019, section 3.4; OCP 8-bit Floating Point Specification (OFP8) 1.0; OCP Microscaling Formats
    (MX) 1.0, section 5.3; Noune et al. 2022, 8-bit Numerical Formats for Deep Neural Networks (fnuz).
    Raises:
      InputError: a size is out of range, `specials` is unknown, or float32 cannot represent every number of the format.
    """

    exponent_bits: int
    """number of exponent bits, 2 to 8"""
    mantissa_bits: int
    """number of mantissa bits, 1 to 23, without the implicit leading 1 of normal numbers"""
    bias: int
    """exponent bias: the exponent of a normal number is its stored exponent minus the bias"""
    specials: Specials
    """which codes are infinity and NaN: ieee, fn or fnuz"""

    def __post_init__(self) -> None:
        """Checks the sizes, and that float32 can represent every number."""
        shape = f"e{self.exponent_bits}m{self.mantissa_bits}"
        if not (2 <= self.exponent_bits <= 8 and 1 <= self.mantissa_bits <= 23):
            raise InputError(f"float format {shape}: expected 2 to 8 exponent bits and 1 to 23 mantissa bits")
        if self.specials not in ("ieee", "fn", "fnuz"):
            raise InputError(f"float format {shape}: specials={self.specials!r}; expected ieee, fn or fnuz")
        # Below 2^-126 float32 has no normal numbers; there only formats with float32's own subnormals work.
        fits_below = self.min_exponent == -126 or self.min_exponent - self.mantissa_bits >= -126
        if not fits_below or self.max_exponent > 127:
            raise InputError(
                f"float format {shape} with bias {self.bias} ({self.specials}): its exponents, {self.min_exponent} to "
                f"{self.max_exponent}, go beyond float32, which carries the numbers; another bias would fit"
            )

    @property
    def name(self) -> str:
        """The shortest name, such as `e4m3`, `e4m3ieee`, `e4m3b11fnuz` or `bf16`."""
        shape = (self.exponent_bits, self.mantissa_bits)
        specials = "" if self.specials == _usual_specials(*shape) else self.specials
        bias = "" if self.bias == _usual_bias(self.exponent_bits, self.specials) else f"b{self.bias}"
        if shape in _SHORT and not specials and not bias:
            return _SHORT[shape]
        return f"e{self.exponent_bits}m{self.mantissa_bits}{bias}{specials}"

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        """The number of bits, sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def has_infinity(self) -> bool:
        """Whether the format has infinities."""
        return self.specials == "ieee"

    @property
    def has_nan(self) -> bool:
        """Whether the format has a NaN."""
        return self.specials != "fn" or self.bits >= 8

    @property
    def has_negative_zero(self) -> bool:
        """Whether the format has a negative zero."""
        return self.specials != "fnuz"

    @property
    def min_exponent(self) -> int:
        """The base 2 logarithm of the smallest normal number."""
        return 1 - self.bias

    @property
    def max_exponent(self) -> int:
        """The base 2 logarithm of the largest power of two."""
        return (self.largest_code >> self.mantissa_bits) - self.bias

    @property
    def max(self) -> float:
        """The largest number."""
        fraction = self.largest_code & (2**self.mantissa_bits - 1)
        return (1 + fraction * 2.0**-self.mantissa_bits) * 2.0**self.max_exponent

    @property
    def smallest_normal(self) -> float:
        """The smallest positive normal number."""
        return 2.0**self.min_exponent

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number; every subnormal number is a multiple of it."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    @property
    def unit_roundoff(self) -> float:
        """The largest relative error of rounding to nearest, within the normal range."""
        return 2.0 ** -(self.mantissa_bits + 1)

    @property
    def largest_code(self) -> int:
        """The code of the largest number, without the sign."""
        if self.specials == "ieee":
            return ((2**self.exponent_bits - 1) << self.mantissa_bits) - 1
        return 2 ** (self.bits - 1) - 1 - (self.specials == "fn" and self.has_nan)

    def contains(self, other: Format) -> bool:
        """Whether this format can represent every finite number of `other`."""
        return (
            other.mantissa_bits <= self.mantissa_bits
            and other.max <= self.max
            and other.smallest_subnormal >= self.smallest_subnormal
        )


def _usual_specials(exponent_bits: int, mantissa_bits: int) -> Specials:
    return "fn" if (exponent_bits, mantissa_bits) in _OCP_FN else "ieee"


def _usual_bias(exponent_bits: int, specials: str) -> int:
    return 2 ** (exponent_bits - 1) - (specials != "fnuz")


_SYNONYMS = {
    name: shape
    for shape, names in {
        "e8m23": ("f32", "fp32", "float32"),
        "e8m10": ("tf32", "tensorfloat32"),
        "e8m7": ("bf16", "bfloat16"),
        "e5m10": ("f16", "fp16", "float16"),
    }.items()
    for name in names
}
_KNOWN = (
    *_SYNONYMS,
    *("e4m3", "e4m3fn", "e4m3ieee", "e4m3fnuz", "e4m3b11fnuz", "e5m2", "e5m2fnuz", "e3m4", "e2m1", "e2m3", "e3m2"),
    *("float8_e4m3fn", "float8_e4m3", "float8_e5m2", "float8_e3m4", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"),
)
_GRAMMAR = re.compile(r"(?:float(\d+)_)?e(\d+)m(\d+)(?:b(-?\d+))?(ieee|fnuz|fn)?")


def parse_format(text: str) -> Format:
    """Parses the name of a float format.

    A name is one of:

    - `eXmY`, with X exponent bits (2 to 8) and Y mantissa bits (1 to 23). `e4m3`, `e2m1`, `e2m3` and `e3m2` have no
      infinities (`fn`), as OCP standardised them; all others follow IEEE 754, including `e5m2`.
    - `eXmY` with a suffix `ieee`, `fn` or `fnuz` (see `Format`), such as `e4m3ieee`. `bN` before the suffix sets the
      bias, as in `e4m3b11fnuz`. The default bias is 2^(X-1) - 1, or 2^(X-1) for `fnuz`.
    - `float32` (`f32`), `tensorfloat32` (`tf32`), `bfloat16` (`bf16`), `float16` (`f16`).
    - A dtype name of ml_dtypes. Note that `float8_e4m3` is the IEEE-like `e4m3ieee`, while `float8_e4m3fn` is OCP's
      `e4m3`.

    `e8m0` is refused: it has neither zero nor sign, and is used for scales rather than for numbers.

    >>> parse_format("e4m3").max, parse_format("float8_e4m3").max, parse_format("e5m2").max
    (448.0, 240.0, 57344.0)
    >>> str(parse_format("float8_e4m3fn")), str(parse_format("bfloat16")), str(parse_format("e6m9"))
    ('e4m3', 'bf16', 'e6m9')

    Raises:
      InputError: the name is unknown, a size is out of range, or the number of bits contradicts the sizes.
    """
    name = text.strip().lower()
    match = _GRAMMAR.fullmatch(_SYNONYMS.get(name, name))
    if match is None:
        raise InputError(
            f"float format {text!r}: expected eXmY with X exponent and Y mantissa bits, such as e4m3, e5m2 or e2m1, or "
            f"one of tf32, bf16, float16, float32{nearest(name, _KNOWN)}"
        )
    bits, exponent_bits, mantissa_bits, bias = (None if group is None else int(group) for group in match.groups()[:4])
    assert exponent_bits is not None and mantissa_bits is not None  # the grammar demands them
    if match[5] is not None:
        specials = cast(Specials, match[5])
    else:  # the names of ml_dtypes always spell out `fn`
        specials = "ieee" if bits is not None else _usual_specials(exponent_bits, mantissa_bits)
    if bits is not None and bits != 1 + exponent_bits + mantissa_bits:
        raise InputError(
            f"float format {text!r}: a sign, {exponent_bits} exponent and {mantissa_bits} mantissa bits are "
            f"{1 + exponent_bits + mantissa_bits} bits, not {bits}{nearest(name, _KNOWN)}"
        )
    return Format(
        exponent_bits, mantissa_bits, _usual_bias(exponent_bits, specials) if bias is None else bias, specials
    )


def quantize(
    x: Any,
    format: Format | str,
    *,
    rounding: Rounding = "nearest",
    key: jax.Array | None = None,
    saturate: bool | None = None,
) -> jax.Array:
    """Rounds `x` to the numbers of `format`; returns an array with the shape and dtype of `x`.

    The rounding is exact, subnormal numbers of the format included. NaN stays NaN, even if the format has no NaN (a
    cast would hide it). Zero keeps its sign if the format has a negative zero. Subnormal float32 inputs are not treated
    as zero; if the format has such numbers (bf16, tf32), they are returned, although the next addition may flush them.
    Except for these cases and for `saturate`, rounding to nearest gives the same bits as a cast with ml_dtypes.

    The derivative is 1 in forward and reverse mode (the straight-through estimator, Bengio et al. 2013), not the 0 of a
    step function.

    Args:
      x: float32, bfloat16 or float16, any shape.
      format: a `Format` or its name.
      rounding: `nearest` rounds ties to even. `stochastic` rounds to one of the two neighbours, with probabilities that
        make the mean equal to `x`. They are exact down to 2^-8 of the smallest subnormal, and off by less than 2^-31
        below. Values beyond the largest number are rounded as if the format went on, and then overflow.
      key: PRNG key of stochastic rounding; 32 random bits are drawn per number. Replicas that must agree pass the same
        key. Under `vmap`, pass a batch of keys; in `shard_map`, fold the axis index into the key of a sharded `x`.
      saturate: what overflow and infinity become. If true: the largest number. If false: infinity if the format has
        one, else NaN if it has one, else the largest number. The default is true for formats of at most 8 bits, as
        accelerators convert to them (trap T9: unsaturated e4m3 turns overflow into NaN), and false for others.

    >>> quantize(jnp.array([0.3, 17.0, 1e4]), "e4m3")
    Array([3.125e-01, 1.600e+01, 4.480e+02], dtype=float32)
    >>> quantize(jnp.array([1e4, -jnp.inf]), "e4m3", saturate=False)
    Array([nan, nan], dtype=float32)

    Raises:
      InputError: the format or rounding is unknown; stochastic rounding has no key; the dtype of `x` is none of the
        three (float64 would be rounded twice, first to float32), or cannot represent every number of `format`.
    """
    format = _as_format(format)
    x = check_carrier(x, format)
    return _quantize(x, rounding_noise(x, rounding, key), format, _saturates(format, saturate))


def fake_quantize(
    x: Any,
    forward: Format | str | None,
    backward: Format | str | None = None,
    *,
    rounding: Rounding = "nearest",
    backward_rounding: Rounding = "nearest",
    key: jax.Array | None = None,
    saturate: bool | None = None,
) -> jax.Array:
    """Rounds `x` to the numbers of `forward`, and its cotangent (the gradient in the backward pass) to `backward`.

    To emulate a matrix product with operands in e4m3 and gradients in e5m2, round the operands forward and the result
    backward, so that both products of the backward pass see the rounded cotangent:
    `fake_quantize(fake_quantize(a, "e4m3") @ fake_quantize(b, "e4m3"), None, "e5m2")`
    (the HYBRID recipe of NVIDIA's Transformer Engine; Micikevicius et al. 2022, FP8 Formats for Deep Learning).

    Args:
      x: float32, bfloat16 or float16, any shape.
      forward: format of the result; None leaves `x` unrounded.
      backward: format of the cotangent; None leaves it unrounded. With a format, only reverse mode works.
      rounding: how `x` is rounded; see `quantize`.
      backward_rounding: how the cotangent is rounded; see `quantize`.
      key: PRNG key of stochastic rounding; it is split into one for each direction.
      saturate: see `quantize`; applies to both directions.

    Raises:
      InputError: as for `quantize`.
    """
    forward_key, backward_key = (None, None) if key is None else jax.random.split(key)
    if forward is not None:
        x = quantize(x, forward, rounding=rounding, key=forward_key, saturate=saturate)
    if backward is None:
        return jnp.asarray(x)
    backward = _as_format(backward)
    x = check_carrier(x, backward)
    _check_rounding(backward_rounding, backward_key)
    return _round_cotangent(x, backward_key, backward, backward_rounding, _saturates(backward, saturate))


class DelayedScalingState(NamedTuple):
    """The state of `DelayedScaling` for one tensor."""

    scale: jax.Array
    """factor by which the tensor is multiplied before rounding, float32 scalar"""
    amax_history: jax.Array
    """largest magnitude of the tensor in each of the last steps, newest first, float32 (history,); initially 0"""


@dataclasses.dataclass(frozen=True)
class DelayedScaling:
    """Scales a tensor into the range of a narrow format, based on its largest magnitudes (amax) in earlier steps.

    The scale is `format.max / max(amax_history) / 2^margin`, rounded down to a power of two so that multiplying by it
    is exact. It does not change while all magnitudes in the history are below 2^-126. An amax of inf or NaN changes
    neither scale nor history. (Transformer Engine keeps the scale too, but adds such an amax to its history, and the
    scale stays fixed until it drops out of the history.)

    >>> scaling = DelayedScaling("e4m3", history=16)
    >>> x, state = jnp.array([0.001, -0.02]), scaling.init()
    >>> state = scaling.update(state, jnp.max(jnp.abs(x)))
    >>> scale = scaling.scale(state)
    >>> scale, quantize(x * scale, scaling.format) / scale
    (Array(16384., dtype=float32), Array([ 0.00097656, -0.01953125], dtype=float32))

    Source: the DelayedScaling recipe of NVIDIA's Transformer Engine (`_default_sf_compute`), with the default history
    and the maximum over it; Micikevicius et al. 2022, FP8 Formats for Deep Learning, section 3.
    Raises:
      InputError: the format is unknown, or a number is out of range.
    """

    format: Any = "e4m3"
    """float format to which the scaled tensor is rounded, or its name; or `jaxmp.precision.blocks.Integer`, without
    `power_of_two`"""
    history: int = 1024
    """number of past steps whose largest magnitudes are kept"""
    margin: int = 0
    """headroom below the largest number of the format, in powers of two"""
    power_of_two: bool = True
    """whether the scale is rounded down to a power of two; Transformer Engine does not round it"""

    def __post_init__(self) -> None:
        """Checks the fields, so that an error is raised before the first step."""
        _as_format(self.format)
        if self.history != int(self.history) or self.history < 1:
            raise InputError(f"DelayedScaling.history={self.history}: expected a whole number of at least 1")
        if self.margin != int(self.margin) or abs(self.margin) > 126:
            raise InputError(f"DelayedScaling.margin={self.margin}: expected a whole number from -126 to 126")

    def init(self) -> DelayedScalingState:
        """Creates the state before the first step, with scale 1."""
        return DelayedScalingState(jnp.array(1, jnp.float32), jnp.zeros(self.history, jnp.float32))

    def scale(self, state: DelayedScalingState) -> jax.Array:
        """Returns the factor for the tensor of the next step, float32 scalar within [2^-126, 2^126]."""
        return state.scale

    def update(self, state: DelayedScalingState, amax: jax.Array) -> DelayedScalingState:
        """Returns the state after a step.

        Args:
          state: the state before the step.
          amax: largest magnitude of the unscaled tensor in this step, scalar; if the tensor is sharded, the maximum
            over all replicas.
        """
        amax = jnp.asarray(amax, jnp.float32)
        usable = jnp.isfinite(amax)
        history = jnp.where(usable, jnp.roll(state.amax_history, 1).at[0].set(amax), state.amax_history)
        largest = jnp.max(history)
        scale = self._power_of_two_scale(largest) if self.power_of_two else self._exact_scale(largest)
        known = usable & (largest >= jnp.float32(2.0**-126))  # not `> 0`: devices differ in flushing subnormals (T10)
        return DelayedScalingState(jnp.where(known, scale, state.scale), history)

    def _power_of_two_scale(self, amax: jax.Array) -> jax.Array:
        """The largest power of two S with S * amax <= max / 2^margin, from exponents: a division might round up."""
        amax_bits, top = float32_bits(amax).astype(jnp.int32), int(np.float32(_as_format(self.format).max).view("i4"))
        exponent = (top >> 23) - (amax_bits >> 23) - ((amax_bits & _MANTISSA) > (top & _MANTISSA)) - self.margin
        return bitcast_convert_type((jnp.clip(exponent, -126, 126) + 127) << 23, jnp.float32)

    def _exact_scale(self, amax: jax.Array) -> jax.Array:
        scale = jnp.float32(_as_format(self.format).max) / amax * jnp.float32(2.0**-self.margin)
        return jnp.clip(scale, jnp.float32(2.0**-126), jnp.float32(2.0**126))


# Emulation with integer operations. Below, `bits` are the bits of a float32, as uint32.

_SIGN = np.uint32(0x80000000)
_INFINITY, _NAN, _MANTISSA, _LEADING = 0x7F800000, 0x7FC00000, 0x007FFFFF, 0x00800000
_CARRIERS = tuple(jnp.dtype(name) for name in ("float32", "bfloat16", "float16"))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _quantize(x: jax.Array, noise: jax.Array | None, format: Format, saturate: bool) -> jax.Array:
    """Implements `quantize`. `noise` holds 32 random bits per number; None rounds to nearest."""
    # Profiles and `blame` show it as one operation. The converter to ONNX knows the format by this name, too.
    other = "" if saturate == _saturates(format, None) else "-saturated" if saturate else "-unsaturated"
    with jax.named_scope(f"quantize_{format}{other}"):
        return from_float32_bits(round_bits(float32_bits(x), noise, format, saturate), x.dtype)


@_quantize.defjvp
def _straight_through(format: Format, saturate: bool, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _quantize(*primals, format, saturate), tangents[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _round_cotangent(x: jax.Array, key: jax.Array | None, format: Format, rounding: str, saturate: bool) -> jax.Array:
    return x


def _keep_key(x: jax.Array, key: jax.Array | None, *_: Any) -> tuple[jax.Array, jax.Array | None]:
    return x, key  # random bits are drawn in the backward pass, so they take no memory before it


def _round_back(
    format: Format, rounding: str, saturate: bool, key: jax.Array | None, cotangent: jax.Array
) -> tuple[jax.Array, None]:
    return _quantize(cotangent, rounding_noise(cotangent, rounding, key), format, saturate), None


_round_cotangent.defvjp(_keep_key, _round_back)


def round_bits(bits: jax.Array, noise: jax.Array | None, format: Format, saturate: bool) -> jax.Array:
    """Rounds float32 bits to a neighbour in `format`; returns float32 bits."""
    sign, magnitude = bits & _SIGN, bits & ~_SIGN
    mantissa_bits, min_exponent = format.mantissa_bits, format.min_exponent
    if min_exponent == -126:  # the format has float32's exponents: dropping low bits of the code rounds it
        drop = jnp.uint32(23 - mantissa_bits)
        rounded = drop_bits(magnitude, drop, noise) << drop
    else:
        # x is significand * 2^(exponent - 23); it is rounded to a whole number of quanta, each 2^quantum.
        stored = (magnitude >> 23).astype(jnp.int32)
        exponent = jnp.maximum(stored, 1) - 127
        significand = (magnitude & _MANTISSA) | jnp.where(stored > 0, jnp.uint32(_LEADING), jnp.uint32(0))
        quantum = jnp.maximum(exponent, min_exponent) - mantissa_bits
        drop = quantum - (exponent - 23)
        # 32 random bits can decide about 31 dropped bits; bits below those are ignored.
        significand >>= jnp.clip(drop - 31, 0, 31).astype(jnp.uint32)
        quanta = drop_bits(significand, jnp.minimum(drop, 31).astype(jnp.uint32), noise)
        # float32 holds the count exactly; the quantum is added to its exponent.
        product = bitcast_convert_type(quanta.astype(jnp.int32).astype(jnp.float32), jnp.int32) + (quantum << 23)
        rounded = jnp.where(quanta > 0, product.astype(jnp.uint32), jnp.uint32(0))

    largest = np.float32(format.max).view(np.uint32)
    if saturate or not format.has_nan:
        overflow = largest
    else:
        overflow = np.uint32(_INFINITY if format.has_infinity else _NAN)
    result = jnp.where(rounded > largest, overflow, rounded)
    result = jnp.where(magnitude > _INFINITY, magnitude, result)
    if not format.has_negative_zero:
        sign = jnp.where(result == 0, jnp.uint32(0), sign)
    return sign | result


def drop_bits(value: jax.Array, count: jax.Array, noise: jax.Array | None) -> jax.Array:
    """Rounds `value / 2^count` to a whole number. `count` is at most 31; `value` must leave room for the carry."""
    dropped = (jnp.uint32(1) << count) - 1
    if noise is not None:
        carry = noise & dropped
    else:  # just below half, plus the last kept bit: ties round up from odd numbers, so to even ones
        carry = (dropped >> 1) + ((value >> count) & 1 & dropped)
    return (value + carry) >> count


def float32_bits(x: jax.Array) -> jax.Array:
    """Returns the bits of `x` (float32, bfloat16 or float16) converted to float32, as uint32.

    Uses integer operations rather than a cast: XLA might keep the value from before `x` was rounded to 16 bits.
    """
    if x.dtype == np.float32:
        return bitcast_convert_type(x, jnp.uint32)
    bits = bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    if x.dtype == jnp.bfloat16:
        return bits << 16
    sign, magnitude = (bits & 0x8000) << 16, bits & 0x7FFF
    rebias = np.uint32((127 - 15) << 23)
    finite = (magnitude << 13) + rebias
    subnormal = bitcast_convert_type(magnitude.astype(jnp.int32).astype(jnp.float32), jnp.uint32) - np.uint32(24 << 23)
    result = jnp.where(magnitude >= 0x7C00, finite + rebias, finite)
    result = jnp.where(magnitude < 0x0400, jnp.where(magnitude > 0, subnormal, jnp.uint32(0)), result)
    return sign | result


def from_float32_bits(bits: jax.Array, dtype: Any) -> jax.Array:
    """Converts float32 bits to an array of `dtype`, which must be able to represent the numbers."""
    if dtype == jnp.bfloat16:
        return bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return bitcast_convert_type(bits, jnp.float32).astype(dtype)


def _as_format(format: Format | str) -> Format:
    return parse_format(format) if isinstance(format, str) else format


def _saturates(format: Format, saturate: bool | None) -> bool:
    return format.bits <= 8 if saturate is None else bool(saturate)


def check_carrier(x: Any, format: Any) -> jax.Array:
    """Returns `x` as an array; raises InputError if its dtype cannot be rounded to `format`, a `Format` or another."""
    x = jnp.asarray(x)
    if x.dtype not in _CARRIERS:
        raise InputError(
            f"quantize to {format}: x is {x.dtype.name}; expected float32, bfloat16 or float16 (float64 would be "
            "rounded twice; cast it to float32 first if you accept that)"
        )
    if isinstance(format, Format) and not parse_format(x.dtype.name).contains(format):
        raise InputError(
            f"quantize to {format}: x is {x.dtype.name}, which cannot hold every number of {format}; cast it to float32"
        )
    return x


def _check_rounding(rounding: str, key: jax.Array | None) -> None:
    if rounding not in ("nearest", "stochastic"):
        raise InputError(
            f"rounding={rounding!r}: expected nearest or stochastic{nearest(rounding, ('nearest', 'stochastic'))}"
        )
    if rounding == "stochastic" and key is None:
        raise InputError("rounding='stochastic' without a key: expected key=, a PRNG key such as jax.random.key(0)")


def rounding_noise(x: jax.Array, rounding: str, key: jax.Array | None) -> jax.Array | None:
    """Draws 32 random bits per number of `x`; returns None for rounding to nearest."""
    _check_rounding(rounding, key)
    return None if rounding == "nearest" or key is None else jax.random.bits(key, x.shape, jnp.uint32)
