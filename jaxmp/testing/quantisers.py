"""Laws of a quantiser: that what a function rounds an array to is what a float format or block format says."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxmp.errors import InputError
from jaxmp.precision.blocks import BlockFormat, Integer, is_block_format, parse_block_format
from jaxmp.precision.formats import Format, parse_format
from jaxmp.testing.laws import Broken, Law, Laws, Skipped, calling, require

DRAWS, NUMBERS = 400, 2**22
"""keys with which stochastic rounding is drawn: `DRAWS`, or fewer if that would be more numbers than `NUMBERS`"""
TOLERANCE = 2.0**-18
"""relative error that scales with a float32 factor may have, against exact arithmetic"""


def quantizer_laws(
    fn: Callable[..., Any], format: BlockFormat | Format | str, *, axis: int = -1, title: str = ""
) -> Laws:
    """Returns the laws of a quantiser: a table when printed, tests when pytest collects them.

    What is expected of each number is computed in float64 from the definition of the format, not with jaxmp's own
    quantiser. A law that does not apply is skipped: those of rounding to nearest for a stochastic quantiser, and those
    of stochastic rounding for the others.

    Args:
      fn: `fn(x)` rounds to nearest; `fn(x, key)`, with a PRNG key as its second required parameter, rounds
        stochastically. `x` is float32 (rows, columns), of any size. It returns the rounded numbers in the shape of `x`,
        or a pair of them and the count of infinities and NaN that it met. It may be a function of NumPy.
      format: what it claims to round to: a `BlockFormat` or a `Format` of at most 16 bits, or the name of one.
      axis: the axis along which its blocks run, -1 or 0. Blocks of two lengths use both.
      title: how the table calls it; by default the name of `fn`.

    Raises:
      InputError: the format is unknown or has more than 16 bits; `axis` is another one.

    >>> from jaxmp.testing import quantizer_laws
    >>> laws = quantizer_laws(lambda x: jnp.clip(jnp.round(x * 4) / 4, -8, 8), "e2m1")
    >>> print(laws["on_grid"].words)
    x[0, 0] = 0.1257302165031433: returned 0.25, which is no number of e2m1 (nearest: 0.0)
    """
    if isinstance(format, str):
        format = parse_block_format(format) if is_block_format(format) else parse_format(format)
    if isinstance(format, Format) and format.bits > 16:
        raise InputError(f"quantizer_laws: format {format} has {format.bits} bits; expected at most 16")
    if axis not in (-1, 0):
        raise InputError(f"quantizer_laws: axis={axis!r}; expected -1 or 0, for arrays of two axes")
    subject = _Subject(fn, _Reference(format), axis)
    checks = (
        keeps_shape_and_dtype,
        on_grid,
        scale_by_rule,
        nearest,
        ties_to_even,
        idempotent,
        monotone,
        odd,
        between_neighbours,
        unbiased,
        uncorrelated,
        keys,
        scale_equivariant,
        blocks_are_independent,
        not_finite_survives,
        zeros,
        negative_zero,
        subnormals,
        ragged_shapes,
        transposes,
        same_in_jit_vmap_and_scan,
    )
    name = title or getattr(fn, "__name__", type(fn).__name__)
    return Laws(f"{name} as {format}", [Law.of(check, subject) for check in checks])


class _Reference:
    """A format in float64: the numbers of its elements, and the scales that its rule gives."""

    def __init__(self, format: BlockFormat | Format):
        self.format = format
        self.element = format.element if isinstance(format, BlockFormat) else format
        if isinstance(self.element, Integer):
            positive, negative = self.element.largest_codes
            self.grid = np.arange(positive + 1) * 2.0**-self.element.fraction_bits
            self.lowest = -negative * 2.0**-self.element.fraction_bits
        else:
            bits = self.element.mantissa_bits
            mantissas = np.arange(2**bits)
            exponents = np.arange(self.element.min_exponent, self.element.max_exponent + 1, dtype=np.float64)
            normal = ((1 + mantissas * 2.0**-bits) * np.exp2(exponents)[:, None]).ravel()
            subnormal = mantissas * self.element.smallest_subnormal
            self.grid = np.concatenate([subnormal, normal[normal <= self.element.max]])
            self.lowest = -self.element.max
        self.largest = float(self.grid[-1])
        self.exact = isinstance(format, Format) or format.scale == "e8m0"
        """whether scales are powers of two, so that float32 arithmetic has no rounding errors"""

    @property
    def lengths(self) -> tuple[int, int] | None:
        """The numbers of rows and columns of a block; None if it is all of an axis, or there are no blocks."""
        block = self.format.block if isinstance(self.format, BlockFormat) else ""
        return None if isinstance(block, str) else (1, *block)[-2:]  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int]:
        """A shape of two blocks and more along each axis."""
        rows, columns = self.lengths or (1, 32)
        return max(2 * rows, 4), max(2 * columns, 32)

    def by_block(self, x: np.ndarray, reduce: Callable[..., np.ndarray]) -> np.ndarray:
        """Reduces each block, and gives each number the value of its block."""
        block = self.format.block if isinstance(self.format, BlockFormat) else "tensor"
        if block == "tensor":
            return np.full(x.shape, reduce(x))
        if block == "channel":
            return np.broadcast_to(reduce(x, axis=1, keepdims=True), x.shape)
        assert self.lengths is not None
        rows, columns = self.lengths
        padded = np.pad(x, [(0, -x.shape[0] % rows), (0, -x.shape[1] % columns)])
        split = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
        each = np.broadcast_to(reduce(split, axis=(1, 3), keepdims=True), split.shape)
        return each.reshape(padded.shape)[: x.shape[0], : x.shape[1]]

    def scales(self, x: np.ndarray) -> list[np.ndarray]:
        """Returns the scale of each number by the rule; two, where a rounding error may decide between them."""
        x = np.abs(x.astype(np.float64))
        if isinstance(self.format, Format):
            return [np.ones_like(x)]
        amax = self.by_block(x, np.max)
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.format.scale == "e8m0":
                return [np.where(amax > 0, np.exp2(np.clip(self._exponent(amax), -127, 127)), 1.0)]
            if self.format.scale == "f32":
                return [np.where(amax > 0, np.maximum(amax / self.largest, 2.0**-126), 1.0)]
            tensor = amax.max() / (448 * self.largest)
            found = []
            for ratio in (1 - TOLERANCE, 1 + TOLERANCE):
                wanted = np.minimum(amax / self.largest / tensor * ratio, 448) if tensor else amax
                if self.format.rule == "torchao":
                    wanted = np.maximum(wanted, 2.0**-6)
                found.append(_E4M3.round(wanted) * tensor)
        return found

    def subnormal_scales(self, x: np.ndarray) -> np.ndarray:
        """Which numbers have a scale in e4m3 that is subnormal or 0."""
        if isinstance(self.format, Format) or self.format.scale != "e4m3" or self.format.rule == "torchao":
            return np.zeros(x.shape, bool)
        amax = self.by_block(np.abs(x.astype(np.float64)), np.max)
        return amax / amax.max() * 448 < 2.0**-6 if amax.max() else amax > 0

    def _exponent(self, amax: np.ndarray) -> np.ndarray:
        assert isinstance(self.format, BlockFormat)
        if self.format.rule == "even":
            fraction, exponent = np.frexp(amax)
            unit = 2.0 ** (self.element.mantissa_bits + 1)
            amax = np.ldexp(np.floor(fraction * unit + 0.5) / unit, exponent)
        if self.format.rule == "rceil":  # ceil(log2(v)), without a logarithm: v = fraction * 2^exponent, from 1/2 to 1
            fraction, exponent = np.frexp(amax / self.largest)
            return exponent - (fraction == 0.5)
        fraction, exponent = np.frexp(amax)
        up = self.format.rule == "ceil"
        return exponent - 1 - self.element.max_exponent + (up & (fraction > 0.5))

    def neighbours(self, scaled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the largest number of the element not above `scaled`, and the smallest above; clipped."""
        magnitude = np.minimum(np.abs(scaled), np.where(scaled < 0, -self.lowest, self.largest))
        grid = np.append(self.grid, -self.lowest) if -self.lowest > self.largest else self.grid
        index = np.searchsorted(grid, magnitude, "right") - 1
        sign = np.where(np.signbit(scaled), -1.0, 1.0)
        return sign * grid[index], sign * grid[np.minimum(index + 1, len(grid) - 1)]

    def round(self, scaled: np.ndarray) -> np.ndarray:
        """Rounds to the nearest number of the element, ties to even."""
        below, above = self.neighbours(scaled)
        clipped = np.clip(scaled, self.lowest, self.largest)
        to_below, to_above = np.abs(clipped - below), np.abs(above - clipped)
        even = np.searchsorted(self.grid, np.abs(below)) % 2 == 0
        return np.where((to_below < to_above) | ((to_below == to_above) & even), below, above)

    def expected(self, x: np.ndarray) -> list[np.ndarray]:
        """Returns `x` rounded to nearest, for each candidate of the scales."""
        return [self.round(_divided(x, scale)) * scale for scale in self.scales(x)]

    def deviation(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns how far each number of `y` is from an element, in units of the rule's scale; and that scale."""
        scale, *others = self.scales(x)
        for other in others:
            off, other_off = (self.by_block(self._off(y, each), np.max) for each in (scale, other))
            scale = np.where(off <= other_off, scale, other)
        return self._off(y, scale), scale

    def _off(self, y: np.ndarray, scale: np.ndarray) -> np.ndarray:
        scaled = _divided(y, scale)
        return np.abs(scaled - self.round(scaled))

    def on_some_scale(self, y: np.ndarray) -> bool:
        """Whether the numbers of one block are elements times one scale of any size; a power of two for e8m0."""
        largest = np.abs(y).max()
        if not largest:
            return True
        numbers = self.grid[self.grid > 0]
        if isinstance(self.format, BlockFormat) and self.format.scale == "e8m0":
            low, high = (math.frexp(largest / n)[1] - 1 for n in (numbers[-1], numbers[0]))
            scales = np.exp2(np.arange(low, high + 1, dtype=np.float64))
        else:
            scales = largest / numbers
        for scale in scales[::-1]:
            scaled = y / scale
            off = np.abs(scaled - self.round(scaled)) > (0 if self.exact else TOLERANCE * np.maximum(np.abs(scaled), 1))
            if not off.any() and np.abs(scaled).max() <= -self.lowest * (1 + TOLERANCE):
                return True
        return False

    def in_range(self, x: np.ndarray) -> np.ndarray:
        """Where a float format has to represent a number; a block format always has."""
        if isinstance(self.format, BlockFormat):
            return np.ones(x.shape, bool)
        return np.abs(x) <= self.largest

    def block_of(self, x: np.ndarray, index: tuple[int, int]) -> np.ndarray:
        """The numbers of the block that holds an index."""
        marked = np.zeros(x.shape)
        marked[index] = 1
        return x[self.by_block(marked, np.max) > 0]


_E4M3 = _Reference(parse_format("e4m3"))


def _divided(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """`x / scale` in float64; 0 where the scale is 0, as where the scale of a block has underflowed."""
    return np.where(scale > 0, x.astype(np.float64) / np.where(scale > 0, scale, 1.0), 0.0)


class _Subject:
    """A quantiser, compiled if JAX can, and the reference."""

    def __init__(self, fn: Callable[..., Any], reference: _Reference, axis: int):
        self.fn, self.reference, self.axis = fn, reference, axis
        self.stochastic = _required(fn) == 2
        self._jitted = jax.jit(fn)

    def given(self, x: np.ndarray) -> np.ndarray:
        """The array with its blocks along the axis of the quantiser."""
        return x.T if self.axis == 0 else x

    @functools.cached_property
    def runs_in_jax(self) -> bool:
        """Whether it can be traced; a function of NumPy cannot."""
        shape = jax.ShapeDtypeStruct(self.given(np.zeros(self.reference.shape)).shape, jnp.float32)
        try:
            jax.eval_shape(self.fn, shape, *([jax.random.key(0)] if self.stochastic else []))
        except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError):
            return False
        except Exception:
            return True  # the first law says what it raised, and what it was given
        return True

    def raw(self, x: np.ndarray, key: int = 1) -> Any:
        """What the quantiser returns."""
        x = np.ascontiguousarray(self.given(np.asarray(x, np.float32)))
        function = self._jitted if self.runs_in_jax else self.fn
        arguments = [jnp.asarray(x) if self.runs_in_jax else x]
        if self.stochastic:
            arguments.append(jax.random.key(key))
        with np.errstate(all="ignore"):
            return calling("the quantiser", function, *arguments, given=f"an array of shape {x.shape}")

    def __call__(self, x: np.ndarray, key: int = 1) -> np.ndarray:
        """The rounded numbers, float64 with the shape of `x`."""
        y = self.raw(x, key)
        y = np.asarray(y[0] if isinstance(y, tuple) else y)
        y = y.T if self.axis == 0 else y
        if y.shape != np.shape(x):
            raise Broken(f"an array of shape {np.shape(x)} became one of shape {y.shape}")
        return y.astype(np.float64)

    @functools.cached_property
    def draws(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers, and what keys 0, 1, ... make of them: float64 (draws, rows, columns)."""
        x = _example(self.reference, "normal", 0, 7)
        return x, np.stack([self(x, key) for key in range(min(DRAWS, NUMBERS // x.size))])

    def need_nearest(self) -> None:
        if self.stochastic:
            raise Skipped("the quantiser rounds stochastically")

    def need_stochastic(self) -> None:
        if not self.stochastic:
            raise Skipped("the quantiser has no key: it rounds to nearest")

    def need_blocks(self) -> BlockFormat:
        if isinstance(self.reference.format, Format):
            raise Skipped("a float format has no scales")
        return self.reference.format


def _required(fn: Callable[..., Any]) -> int:
    """The number of parameters without a default that can be given by position."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return 1
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


class _Numbers(NamedTuple):
    """How an example is made."""

    kind: str
    exponent: int
    seed: int


def _example(reference: _Reference, kind: str, exponent: int, seed: int) -> np.ndarray:
    """Float32 numbers of the reference's shape, times 2^exponent; within the range of a float format."""
    random = np.random.default_rng(seed)
    shape = reference.shape
    if kind == "normal":
        x = random.normal(size=shape)
    elif kind == "wide":
        x = random.choice([-1, 1], shape) * np.exp2(random.uniform(-20, 0, shape))
    elif kind == "blocks":  # of widely different sizes: scales down to the smallest of their format, and below
        rows, columns = reference.lengths or (1, 32)
        sizes = np.exp2(random.uniform(-24, 0, (-(-shape[0] // rows), -(-shape[1] // columns))))
        x = random.normal(size=shape) * sizes.repeat(rows, 0)[: shape[0]].repeat(columns, 1)[:, : shape[1]]
    elif kind == "grid":  # numbers and midpoints of the element, in blocks whose scale is a power of two
        start = max(len(reference.grid) - 64, 0)
        if isinstance(reference.format, Format):
            start = int(random.integers(start + 1))
        grid = reference.grid[start:][:64]
        middle = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])
        x = random.choice([-1, 1], shape) * random.choice(middle, shape)
        # The first number of each block is the largest.
        rows, columns = reference.lengths or (1, shape[1])
        x[::rows, ::columns] = reference.largest
    else:  # numbers that differ a little from one: their block has no other
        x = random.choice([-1, 1], shape) * (1 + random.integers(-3, 4, shape) * 2.0**-6)
    if isinstance(reference.format, Format):
        exponent = exponent % 3
        x = np.clip(x * 2.0**exponent, -reference.largest, reference.largest)
        return x.astype(np.float32)
    return (x * 2.0**exponent).astype(np.float32)


def _examples(reference: _Reference, kinds: tuple[str, ...] = ("normal", "wide", "blocks", "grid", "near one")) -> Any:
    return st.builds(_Numbers, st.sampled_from(kinds), st.integers(0, 20) | st.integers(-80, 40), st.integers(0, 2**16))


def _first(bad: np.ndarray) -> tuple[int, int]:
    """The index of the first bad number."""
    row, column = np.unravel_index(int(np.argmax(bad)), bad.shape)
    return int(row), int(column)


def _number(subject: _Subject, x: np.ndarray, index: tuple[int, int]) -> str:
    """An input in words, with the block that it stands in."""
    words = f"x[{index[0]}, {index[1]}] = {float(x[index])!r}"
    if isinstance(subject.reference.format, BlockFormat):
        words += f" in a block with largest magnitude {float(np.abs(subject.reference.block_of(x, index)).max())!r}"
    return words


def _search(subject: _Subject, wrong: Callable[[np.ndarray], str | None], **options: Any) -> None:
    require(_examples(subject.reference, **options), lambda numbers: wrong(_example(subject.reference, *numbers)))


# The laws


def keeps_shape_and_dtype(subject: _Subject) -> None:
    """The result has the shape and dtype of the array."""
    subject(np.ones(subject.reference.shape))  # raises if the shape is another
    y = subject.raw(np.ones(subject.reference.shape))
    dtype = np.asarray(y[0] if isinstance(y, tuple) else y).dtype
    if dtype != np.float32:
        raise Broken(f"a float32 array became {dtype}")


def on_grid(subject: _Subject) -> None:
    """The numbers of a block are elements of the format times one scale."""
    reference = subject.reference

    def wrong(x: np.ndarray) -> str | None:
        y = subject(x)
        if isinstance(reference.format, Format):
            bad = (y != reference.round(y)) & reference.in_range(x)
            if not bad.any():
                return None
            index = _first(bad)
            return (
                f"{_number(subject, x, index)}: returned {float(y[index])!r}, which is no number of {reference.format} "
                f"(nearest: {float(reference.round(y)[index])!r})"
            )
        rows, columns = reference.lengths or (1, x.shape[1])
        for i in range(0, x.shape[0], rows):
            for j in range(0, x.shape[1], columns):
                block = reference.block_of(y, (i, j))
                if np.isfinite(block).all() and not reference.on_some_scale(block):
                    some = np.unique(np.abs(block))
                    return (
                        f"the block at [{i}, {j}] became {len(some)} magnitudes, among them "
                        f"{', '.join(f'{v:.6g}' for v in some[-6:])}: no scale makes all of them {reference.element}"
                    )
        return None

    _search(subject, wrong)


def scale_by_rule(subject: _Subject) -> None:
    """The scale of a block follows from its largest magnitude by the rule of the format."""
    subject.need_blocks()
    reference = subject.reference

    def wrong(x: np.ndarray) -> str | None:
        y = subject(x)
        off, scale = reference.deviation(x, y)
        scaled = np.abs(_divided(y, scale))
        bad = off > (0 if reference.exact else TOLERANCE * np.maximum(scaled, 1))
        # Numbers on a coarser grid can be on this one too; the largest number of a block cannot be.
        amax = np.abs(x) == reference.by_block(np.abs(x), np.max)
        gap = np.abs(np.subtract(*reference.neighbours(_divided(x, scale))))
        distance = np.abs(_divided(x, scale) - _divided(y, scale))
        clipped = np.maximum(np.abs(_divided(x, scale)) - reference.largest, 0)
        slack = 0 if reference.exact else TOLERANCE * np.maximum(scaled, 1)
        bad |= amax & (scale > 0) & (distance > np.maximum(gap, clipped) + slack)
        if not bad.any():
            return None
        index = _first(bad)
        words = f"{_number(subject, x, index)}: returned {float(y[index])!r}"
        return f"{words}; by the rule the scale is {float(scale[index])!r}"

    _search(subject, wrong)


def _far(subject: _Subject, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where `y` is not the number nearest to `x`; a tie may go either way."""
    reference = subject.reference
    far = np.ones(x.shape, bool)
    for want, scale in zip(reference.expected(x), reference.scales(x), strict=True):
        slack = 0 if reference.exact else TOLERANCE * np.maximum(np.abs(x), scale)
        far &= ~(np.abs(y - x) <= np.abs(want - x) + slack)
    return far & reference.in_range(x)


def nearest(subject: _Subject) -> None:
    """Each number is rounded to the nearest number of its block."""
    subject.need_nearest()
    reference = subject.reference

    def wrong(x: np.ndarray) -> str | None:
        y = subject(x)
        far = _far(subject, x, y)
        if not far.any():
            return None
        index = _first(far)
        want = " or ".join(dict.fromkeys(repr(float(w[index])) for w in reference.expected(x)))
        return f"{_number(subject, x, index)}: returned {float(y[index])!r}; the nearest is {want}"

    _search(subject, wrong)


def ties_to_even(subject: _Subject) -> None:
    """A number halfway between two goes to the one whose last bit is 0."""
    subject.need_nearest()
    reference = subject.reference
    if not reference.exact:
        raise Skipped("the scale is no power of two: rounding errors of float32 decide a tie")

    def wrong(x: np.ndarray) -> str | None:
        y = subject(x)
        (scale, *_), (want, *_) = reference.scales(x), reference.expected(x)
        scaled = _divided(x, scale)
        below, above = reference.neighbours(scaled)
        tie = (np.abs(scaled - below) == np.abs(above - scaled)) & (below != above)
        bad = tie & (y != want)
        if not bad.any():
            return None
        index = _first(bad)
        return f"{_number(subject, x, index)}: returned {float(y[index])!r}; ties go to even, {float(want[index])!r}"

    _search(subject, wrong, kinds=("grid",))


def idempotent(subject: _Subject) -> None:
    """Rounding what has been rounded changes nothing, unless the scale of its block is a subnormal number.

    There are few subnormal scales, so that another one may follow from the largest magnitude once that is rounded.
    """
    subject.need_nearest()
    reference = subject.reference

    def wrong(x: np.ndarray) -> str | None:
        y = subject(x)
        again = subject(y)
        bad = ~(np.abs(again - y) <= (0 if reference.exact else TOLERANCE) * np.abs(y))
        bad &= reference.in_range(x) & ~reference.subnormal_scales(x)
        if not bad.any():
            return None
        index = _first(bad)
        return f"{_number(subject, x, index)}: returned {float(y[index])!r}, and of that {float(again[index])!r}"

    _search(subject, wrong)


def monotone(subject: _Subject) -> None:
    """Within a block, a larger number does not become a smaller one."""
    subject.need_nearest()

    def wrong(x: np.ndarray) -> str | None:
        rows, columns = subject.reference.lengths or (1, x.shape[1])
        if rows > 1:
            x = np.repeat(x[::rows], rows, 0)[: x.shape[0]]
        for j in range(0, x.shape[1], columns):
            x[:, j : j + columns] = np.sort(x[:, j : j + columns], 1)
        y = subject(x)
        falls = (y[:, 1:] < y[:, :-1]) & (x[:, 1:] >= x[:, :-1])
        falls &= (np.arange(1, x.shape[1]) % columns) > 0
        falls &= (subject.reference.in_range(x) & np.isfinite(y))[:, 1:]
        if not falls.any():
            return None
        i, j = _first(falls)
        return (
            f"{float(x[i, j])!r} and {float(x[i, j + 1])!r} of one block became {float(y[i, j])!r} and "
            f"{float(y[i, j + 1])!r}"
        )

    _search(subject, wrong)


def odd(subject: _Subject) -> None:
    """The negative of an array becomes the negative of its result."""
    subject.need_nearest()
    if -subject.reference.lowest != subject.reference.largest:
        raise Skipped(f"{subject.reference.element} has one number more below zero")

    def wrong(x: np.ndarray) -> str | None:
        y, negative = subject(x), subject(-x)
        bad = (y != -negative) & subject.reference.in_range(x)
        if not bad.any():
            return None
        index = _first(bad)
        return f"{_number(subject, x, index)}: returned {float(y[index])!r}, and of -x {float(negative[index])!r}"

    _search(subject, wrong)


def between_neighbours(subject: _Subject) -> None:
    """Stochastic rounding returns one of the two neighbours; a number that its block has stays as it is."""
    subject.need_stochastic()
    reference = subject.reference

    def wrong(x: np.ndarray) -> str | None:
        y = subject(x)
        far = np.ones(x.shape, bool)
        for scale in reference.scales(x):
            scaled, got = _divided(x, scale), _divided(y, scale)
            slack = 0 if reference.exact else TOLERANCE * np.maximum(np.abs(scaled), 1)
            below, above = reference.neighbours(scaled)
            near = reference.round(scaled)
            exact = np.abs(scaled - near) <= (0 if reference.exact else TOLERANCE * np.abs(scaled))
            below, above = np.where(exact, near, below), np.where(exact, near, above)
            far &= ~((np.abs(got - below) <= slack) | (np.abs(got - above) <= slack))
            first = (below * scale, above * scale)
        far &= reference.in_range(x)
        if not far.any():
            return None
        index = _first(far)
        lower, upper = (float(each[index]) for each in first)
        want = f"expected {lower!r}" if lower == upper else f"the neighbours are {lower!r} and {upper!r}"
        return f"{_number(subject, x, index)}: returned {float(y[index])!r}; {want}"

    _search(subject, wrong)


class _Moments(NamedTuple):
    """What stochastic rounding of an array should have: all in units of the scale, of each number."""

    mean: np.ndarray
    variance: np.ndarray
    share: np.ndarray
    """probability of the neighbour that is further from zero"""
    scale: np.ndarray


def _moments(subject: _Subject, x: np.ndarray) -> _Moments:
    """Computes the moments in float64; a draw decides between two candidates of a scale."""
    reference = subject.reference
    y = subject(x, 0)
    _, scale = reference.deviation(x, y)
    scaled = np.clip(_divided(x, scale), reference.lowest, reference.largest)
    below, above = reference.neighbours(scaled)
    gap = np.abs(above - below)
    share = np.where(gap > 0, np.abs(scaled - below) / np.where(gap > 0, gap, 1), 0)
    return _Moments(scaled, share * (1 - share) * gap**2, share, scale)


def unbiased(subject: _Subject) -> None:
    """The mean of stochastic rounding is the number, or the largest of its block where it is clipped."""
    subject.need_stochastic()
    x, draws = subject.draws
    mean, variance, share, scale = _moments(subject, x)
    # Rounding errors of a float32 scale are no bias.
    error = np.stack([_divided(y, scale) for y in draws]).mean(0) - mean
    slack = 0 if subject.reference.exact else 4 * TOLERANCE * np.maximum(np.abs(mean), 1)
    error = np.sign(error) * np.maximum(np.abs(error) - slack, 0)
    seldom = (
        len(draws) * share * (1 - share) < 5
    )  # too seldom for a normal distribution: judged together with the others
    sigma = np.sqrt(variance / len(draws))
    off = np.where(seldom, 0, np.abs(error) / np.where(sigma > 0, sigma, 1))
    if off.max() > 5.5:
        index = _first(off == off.max())
        raise Broken(
            f"{_number(subject, x, index)}: the mean of {len(draws)} keys is "
            f"{float((mean + error)[index] * scale[index])!r}, {off.max():.1f} standard errors from it"
        )
    # Together: outwards from zero, and by how far the number is on its way to the next.
    outwards = error * np.sign(mean)
    groups = [("all numbers", variance > 0)]
    for low in (0, 0.25, 0.5, 0.75):
        groups.append((f"numbers {low:g} to {low + 0.25:g} of the way", (share > low) & (share <= low + 0.25)))
    for name, chosen in groups:
        spread = math.sqrt(np.sum(variance[chosen]) / len(draws))
        together = float(np.sum(outwards[chosen]))
        if spread and abs(together) > 4 * spread:
            raise Broken(
                f"{name} to their larger neighbour ({chosen.sum()}): the mean of {len(draws)} keys is off by "
                f"{together / chosen.sum():+.3g} of a scale, outwards from zero: {abs(together) / spread:.1f} standard "
                "errors"
            )


def uncorrelated(subject: _Subject) -> None:
    """The errors of stochastic rounding are independent along a row and along a column, so that they average out."""
    subject.need_stochastic()
    x, draws = subject.draws
    mean, variance, share, scale = _moments(subject, x)
    errors = np.stack([_divided(y, scale) for y in draws]) - mean
    errors = np.where(variance > 0, errors / np.sqrt(np.where(variance > 0, variance, 1)), 0)
    kept = share * (1 - share) > 0.05
    for axis, name in ((1, "row"), (0, "column")):
        count = kept.sum(axis)
        if not (count > 1).any():
            continue
        sums = (errors * kept).sum(1 + axis)[:, count > 1] / np.sqrt(count[count > 1])
        ratio = float(np.mean(sums**2))
        if abs(ratio - 1) > 0.1 + 6 * math.sqrt(2 / sums.size):
            raise Broken(
                f"the sum of a {name}'s errors has {ratio:.2f} times the variance of independent ones "
                f"({len(draws)} keys, {int(count.max())} numbers a {name})"
            )


def keys(subject: _Subject) -> None:
    """The same key gives the same bits, another key others; key 0 is no exception."""
    subject.need_stochastic()
    x, draws = subject.draws
    for key in (0, 1):
        if not np.array_equal(subject(x, key), draws[key], equal_nan=True):
            raise Broken(f"two calls with key({key}) differ")
    if len({y.tobytes() for y in draws}) < len(draws):
        raise Broken(f"{len(draws)} keys gave {len({y.tobytes() for y in draws})} different results")
    mean, _, share, scale = _moments(subject, x)
    clear = (share > 0.2) & (share < 0.8)
    nearest = np.where(share > 0.5, 1, 0)
    for key in range(4):
        up = np.abs(_divided(draws[key], scale)) > np.abs(mean)
        if clear.sum() > 20 and (up == nearest)[clear].mean() > 0.95:
            raise Broken(f"key({key}) rounds to nearest: {(up == nearest)[clear].mean():.0%} of {clear.sum()} numbers")


def scale_equivariant(subject: _Subject) -> None:
    """An array times a power of two becomes the result times that power."""
    subject.need_blocks()

    def wrong(numbers: tuple[str, int, int]) -> str | None:
        kind, seed, power = numbers
        x = _example(subject.reference, kind, 0, seed)
        y, moved = subject(x), subject(x * np.float32(2.0**power))
        bad = y * 2.0**power != moved
        if not bad.any():
            return None
        index = _first(bad)
        return (
            f"{_number(subject, x, index)}: returned {float(y[index])!r}; times 2^{power}, "
            f"{float(moved[index])!r} = {float(moved[index] / 2.0**power)!r} * 2^{power}"
        )

    kinds = st.sampled_from(("normal", "blocks"))
    require(st.tuples(kinds, st.integers(0, 100), st.integers(1, 60) | st.integers(-60, -1)), wrong)


def blocks_are_independent(subject: _Subject) -> None:
    """What a block becomes does not depend on the numbers of others."""
    format = subject.need_blocks()
    if format.block == "tensor":
        raise Skipped("the tensor is one block")
    reference = subject.reference

    def wrong(x: np.ndarray) -> str | None:
        other = x.copy()
        marked = np.zeros(x.shape)
        marked[0, 0] = 1
        first = reference.by_block(marked, np.max) > 0
        # The scale of the tensor stays: the largest of all is in no block that changes.
        other[first] *= 0.25
        x[-1, -1] = other[-1, -1] = 4 * np.abs(x).max()
        y, changed = subject(x), subject(other)
        bad = (y != changed) & ~first
        if not bad.any():
            return None
        index = _first(bad)
        return (
            f"{_number(subject, x, index)}: returned {float(y[index])!r}, and {float(changed[index])!r} after the "
            "block at [0, 0] was made smaller"
        )

    _search(subject, wrong, kinds=("normal", "blocks"))


def not_finite_survives(subject: _Subject) -> None:
    """An infinity or NaN stays infinite or NaN, or is counted: none becomes a finite number in silence."""
    element = subject.reference.format
    if isinstance(element, Format) and not element.has_infinity and not element.has_nan:
        raise Skipped(f"{element} has neither infinity nor NaN")
    for bad in (np.inf, -np.inf, np.nan):
        x = _example(subject.reference, "normal", 0, 0)
        index = (1, x.shape[1] // 2 + 3)
        x[index] = bad
        result = subject.raw(x)
        if isinstance(result, tuple):
            if not int(np.asarray(result[1])):
                raise Broken(f"x[{index[0]}, {index[1]}] = {bad}: none was counted")
            continue
        y = subject(x)
        if np.isfinite(y[index]):
            raise Broken(f"x[{index[0]}, {index[1]}] = {bad}: returned {float(y[index])!r}, and all else is finite")


def zeros(subject: _Subject) -> None:
    """Zeros stay zeros, in a block of zeros and in an array of zeros too."""
    x = _example(subject.reference, "normal", 0, 0)
    marked = np.zeros(x.shape)
    marked[0, 0] = 1
    first = subject.reference.by_block(marked, np.max) > 0
    for words, given in (("an array of zeros", np.zeros_like(x)), ("a block of zeros", np.where(first, 0, x))):
        y = subject(given)
        bad = (given == 0) & (y != 0)
        if bad.any():
            raise Broken(f"x[{_first(bad)[0]}, {_first(bad)[1]}] = 0.0 in {words}: returned {float(y[_first(bad)])!r}")
        if not np.isfinite(y).all():
            raise Broken(f"{words} beside finite numbers: returned {float(y[_first(~np.isfinite(y))])!r}")


def negative_zero(subject: _Subject) -> None:
    """-0 stays -0, and 0 stays 0, if the format has both."""
    if isinstance(subject.reference.element, Integer) or not subject.reference.element.has_negative_zero:
        raise Skipped(f"{subject.reference.element} has no -0")
    x = np.array(_example(subject.reference, "normal", 0, 0))
    x[:, 1::4], x[:, 2::4] = -0.0, 0.0
    y = subject(x)
    bad = (x == 0) & (np.signbit(x) != np.signbit(y))
    if bad.any():
        index = _first(bad)
        raise Broken(f"x[{index[0]}, {index[1]}] = {float(x[index])!r}: returned {float(y[index])!r}")


def subnormals(subject: _Subject) -> None:
    """Float32's subnormal numbers become zero or what the rule makes of them, and no other numbers change."""
    reference = subject.reference
    x = _example(reference, "normal", 0, 0)
    marked = np.zeros(x.shape)
    marked[0, 0] = 1
    first = reference.by_block(marked, np.max) > 0
    tiny = np.where(first, x * np.float32(2.0**-130), x)
    tiny = np.asarray(tiny, np.float32)
    y = subject(tiny)
    limit = np.abs(tiny.astype(np.float64)) * 2 + reference.largest * 2.0**-126
    bad = first & ~(np.abs(y) <= limit) | ~np.isfinite(y)
    format = reference.format
    if not subject.stochastic and not (isinstance(format, BlockFormat) and format.block == "tensor"):
        bad |= ~first & _far(subject, tiny, y)
    if bad.any():
        index = _first(bad)
        raise Broken(f"{_number(subject, tiny, index)}: returned {float(y[index])!r}")


def ragged_shapes(subject: _Subject) -> None:
    """Any shape can be given; a last block that is not full is rounded as if it were filled up with zeros."""
    reference = subject.reference
    rows, columns = reference.lengths or (1, 16)
    for shape in ((rows + rows // 2, columns + columns // 3), (1, 1), (rows, columns - 1)):
        shape = (max(shape[0], 1), max(shape[1], 1))
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        if isinstance(reference.format, Format):
            x = np.clip(x, -reference.largest, reference.largest)
        y = subject(x)
        if subject.stochastic:
            off, scale = reference.deviation(x, y)
            bad = off > (0 if reference.exact else TOLERANCE * np.maximum(np.abs(_divided(y, scale)), 1))
        else:
            bad = _far(subject, x, y)
        if bad.any():
            index = _first(bad)
            raise Broken(f"shape {shape}, {_number(subject, x, index)}: returned {float(y[index])!r}")


def transposes(subject: _Subject) -> None:
    """With blocks of two equal lengths, the transpose of an array becomes the transpose of the result."""
    subject.need_nearest()
    lengths = subject.reference.lengths
    if lengths is None or lengths[0] != lengths[1]:
        raise Skipped("the blocks are not square")

    sizes = np.random.default_rng(0).integers(-6, 7, (2, *subject.reference.shape))

    def wrong(x: np.ndarray) -> str | None:
        # Blocks of another shape would have other largest numbers.
        x = x * np.exp2(sizes[0, :, :1] + sizes[1, :1]).astype(np.float32)
        y, transposed = subject(x), subject(np.ascontiguousarray(x.T)).T
        bad = y != transposed
        if not bad.any():
            return None
        index = _first(bad)
        return (
            f"{_number(subject, x, index)}: returned {float(y[index])!r}, and transposed {float(transposed[index])!r}"
        )

    _search(subject, wrong, kinds=("normal", "wide"))


def same_in_jit_vmap_and_scan(subject: _Subject) -> None:
    """The bits are the same with and without jit, under vmap and in a scan."""
    if not subject.runs_in_jax:
        raise Skipped("the quantiser does not run in JAX")
    kinds = ("normal", "wide", "grid")
    stack = np.stack([_example(subject.reference, kind, 0, seed) for seed, kind in enumerate(kinds)])
    stack = np.stack([subject.given(x) for x in stack])
    keys = jax.random.split(jax.random.key(3), len(stack))

    def call(x: jax.Array, key: jax.Array) -> Any:
        y = subject.fn(x, key) if subject.stochastic else subject.fn(x)
        return y[0] if isinstance(y, tuple) else y

    def plain(xs: jax.Array, keys: jax.Array) -> np.ndarray:
        return np.stack([np.asarray(call(x, key)) for x, key in zip(xs, keys, strict=True)])

    def jitted(xs: jax.Array, keys: jax.Array) -> np.ndarray:
        return np.stack([np.asarray(jax.jit(call)(x, key)) for x, key in zip(xs, keys, strict=True)])

    def scanned(xs: jax.Array, keys: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda carry, xk: (carry, call(*xk)), None, (xs, keys))[1]

    ways: dict[str, Callable[..., Any]] = {"jit": jitted, "vmap": jax.jit(jax.vmap(call)), "scan": jax.jit(scanned)}
    want = calling("the quantiser", plain, jnp.asarray(stack), keys)
    for name, way in ways.items():
        got = np.asarray(calling(f"the quantiser in {name}", way, jnp.asarray(stack), keys))
        bad = ~((got == want) & (np.signbit(got) == np.signbit(want)) | np.isnan(got) & np.isnan(want))
        if bad.any():
            index = tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))
            raise Broken(
                f"x{list(index[1:])} = {float(stack[index])!r}: {float(got[index])!r} in {name}, "
                f"{float(want[index])!r} in a plain call"
            )
