"""The product of a layer under a `Recipe`: forward product and both gradients, each of operands rounded for it alone.

    y = matrix_product(x, w, parse_policy("nvfp4").recipe, draws=Draws(key))       # x (rows, K), w (K, N), y (rows, N)

Formats are emulated: operands are rounded to numbers of their formats, exactly, and multiplied in float32. The backward
pass is given the operands as they came: what it rounds, it rounds anew, along the axis over which it sums.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmp.errors import InputError
from jaxmp.jaxprs import RECIPE
from jaxmp.precision.blocks import BlockFormat, Integer, round_blocks
from jaxmp.precision.formats import Format, float32_bits, from_float32_bits, quantize, round_bits
from jaxmp.precision.recipe import PRODUCTS, Delayed, Level, Recipe, RecipeOperand
from jaxmp.trees import FLOAT32

_LONGEST_UNROLLED = 16  # chunks of an accumulator; more are added in a loop

_SUMMED = {
    ("fprop", "activations"): 1,
    ("fprop", "weights"): 0,
    ("dgrad", "gradients"): 1,
    ("dgrad", "weights"): 1,
    ("wgrad", "activations"): 0,
    ("wgrad", "gradients"): 0,
}
"""Which of the two axes of an operand a product sums over: of activations and gradients (rows, features), of weights
(input features, output features)."""


class Draws(NamedTuple):
    """What stochastic rounding draws from. Rows that lie on other replicas, or in other microbatches, draw the same."""

    key: jax.Array | None = None
    """PRNG key of this product in this step, the same on all replicas; None: nothing is drawn"""
    places: jax.Array | None = None
    """indices of the examples in the whole batch, int32 (examples,); None: the batch is the whole"""
    examples: int | None = None
    """number of examples; the rows of an operand are drawn by the example if it divides their number"""


NOTHING_DRAWN = Draws()


class Delay(NamedTuple):
    """The scales of `Delayed` operands, float32 scalars by role, and what gives back the magnitude of the gradients."""

    scales: Mapping[str, jax.Array]
    """what each operand is multiplied by before it is rounded"""
    amax: jax.Array
    """float32 scalar without an effect, whose gradient is the largest magnitude of the gradients of the result"""


class Contraction:
    """A bilinear function of activations and weights, and the axes over which its three products sum."""

    axes: Mapping[str, tuple[int, int]]
    """by role: axes of the operand, rows and features, or input and output features"""
    groups: int = 1
    """number of groups in which features are multiplied apart"""

    def products(self, accumulate: tuple[Level, ...]) -> dict[str, Callable[..., jax.Array]]:
        """Returns the three products by name: functions of two operands and of the shape of the result."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Matrices(Contraction):
    """The product of matrices: (..., rows, K) by (..., K, N), with `batch` leading axes that are not summed."""

    batch: int = 0

    @property
    def axes(self) -> Mapping[str, tuple[int, int]]:  # type: ignore[override]
        """The last two axes of each operand."""
        return dict.fromkeys(("activations", "weights", "gradients"), (self.batch, self.batch + 1))

    def products(self, accumulate: tuple[Level, ...]) -> dict[str, Callable[..., jax.Array]]:
        """See `Contraction`."""
        first, last = self.batch, self.batch + 1

        def sum_over(a_axis: int, b_axis: int) -> Callable[..., jax.Array]:
            return lambda a, b, shape: _sum_products(a, b, a_axis, b_axis, self.batch, accumulate)

        return {"fprop": sum_over(last, first), "dgrad": sum_over(last, last), "wgrad": sum_over(first, first)}


@dataclasses.dataclass(frozen=True)
class Convolution(Contraction):
    """A convolution, whose products sum over channels, or over the batch, and over positions.

    Blocks run along the channels at each position, or along the batch at each position: an operand is rounded as it
    lies in memory, not as a kernel's patches would hold it, in which it is several times.
    """

    window_strides: tuple[int, ...]
    padding: Any
    lhs_dilation: tuple[int, ...] | None
    rhs_dilation: tuple[int, ...] | None
    dimension_numbers: lax.ConvDimensionNumbers
    groups: int = 1

    @property
    def axes(self) -> Mapping[str, tuple[int, int]]:  # type: ignore[override]
        """The axes of batch and channels."""
        numbers = self.dimension_numbers
        return {
            "activations": (numbers.lhs_spec[0], numbers.lhs_spec[1]),
            "weights": (numbers.rhs_spec[1], numbers.rhs_spec[0]),
            "gradients": (numbers.out_spec[0], numbers.out_spec[1]),
        }

    def products(self, accumulate: tuple[Level, ...]) -> dict[str, Callable[..., jax.Array]]:
        """See `Contraction`. Raises InputError if an accumulator is not float32; chunks of one are not emulated."""
        if any(level.format != _FLOAT32_FORMAT for level in accumulate):
            raise InputError(
                f"accumulate={'/'.join(map(str, accumulate))}: a convolution sums in float32 here; expected f32, or a "
                "rule for convolutions such as @Conv=float32"
            )

        def fprop(x: jax.Array, w: jax.Array, shape: Any = None) -> jax.Array:
            return lax.conv_general_dilated(
                x,
                w,
                self.window_strides,
                self.padding,
                lhs_dilation=self.lhs_dilation,
                rhs_dilation=self.rhs_dilation,
                dimension_numbers=self.dimension_numbers,
                feature_group_count=self.groups,
                precision=lax.Precision.HIGHEST,
            )

        def dgrad(g: jax.Array, w: jax.Array, shape: Any) -> jax.Array:
            return jax.linear_transpose(lambda x: fprop(x, w), jax.ShapeDtypeStruct(shape, FLOAT32))(g)[0]

        def wgrad(x: jax.Array, g: jax.Array, shape: Any) -> jax.Array:
            return jax.linear_transpose(lambda w: fprop(x, w), jax.ShapeDtypeStruct(shape, FLOAT32))(g)[0]

        return {"fprop": fprop, "dgrad": dgrad, "wgrad": wgrad}


_FLOAT32_FORMAT = Format(8, 23, 127, "ieee")


def matrix_product(
    x: jax.Array,
    w: jax.Array,
    recipe: Recipe,
    *,
    batch: int = 0,
    draws: Draws = NOTHING_DRAWN,
    delay: Delay | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Multiplies matrices under a recipe, which also holds for the gradients of the result.

    Args:
      x: activations, float32, bfloat16 or float16, (..., rows, K).
      w: weights, of one of these dtypes, (..., K, N).
      recipe: the formats of the three products.
      batch: number of leading axes, of equal lengths, that are multiplied apart.
      draws: what stochastic rounding draws from.
      delay: scales of `Delayed` operands.
      axis_name: mapped axis over which the rows are spread, for scales of a whole tensor.

    Returns:
      float32 (..., rows, N).

    Raises:
      InputError: stochastic rounding has nothing to draw from, or a `Delayed` operand no scale.
    """
    return _product(_Plan(Matrices(batch), recipe, draws.examples, axis_name), x, w, draws.key, draws.places, delay)


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    recipe: Recipe,
    *,
    draws: Draws = NOTHING_DRAWN,
    delay: Delay | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """`jax.lax.dot_general` of activations and weights under a recipe; returns float32. See `matrix_product`.

    Axes that are summed together are seen as one, in the order in which they are named; so are the others.
    """
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = dimension_numbers
    lhs_free = [i for i in range(lhs.ndim) if i not in (*lhs_sum, *lhs_batch)]
    rhs_free = [i for i in range(rhs.ndim) if i not in (*rhs_sum, *rhs_batch)]
    batch = [lhs.shape[i] for i in lhs_batch]
    k = math.prod(lhs.shape[i] for i in lhs_sum)
    head = [math.prod(batch)] if batch else []
    rows, columns = (math.prod(each.shape[i] for i in free) for each, free in ((lhs, lhs_free), (rhs, rhs_free)))
    x = lax.transpose(lhs, [*lhs_batch, *lhs_free, *lhs_sum]).reshape(*head, rows, k)
    w = lax.transpose(rhs, [*rhs_batch, *rhs_sum, *rhs_free]).reshape(*head, k, columns)
    y = matrix_product(x, w, recipe, batch=len(head), draws=draws, delay=delay, axis_name=axis_name)
    return y.reshape(*batch, *(lhs.shape[i] for i in lhs_free), *(rhs.shape[i] for i in rhs_free))


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    *,
    recipe: Recipe,
    draws: Draws = NOTHING_DRAWN,
    delay: Delay | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` of activations and weights under a recipe; returns float32.

    See `matrix_product`, and `Convolution` for where the blocks lie.

    Raises:
      InputError: as `matrix_product`, or the recipe has an accumulator that is not float32.
    """
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    contraction = Convolution(
        tuple(window_strides),
        padding if isinstance(padding, str) else tuple(map(tuple, padding)),
        None if lhs_dilation is None else tuple(lhs_dilation),
        None if rhs_dilation is None else tuple(rhs_dilation),
        numbers,
        feature_group_count,
    )
    contraction.products(recipe.accumulate)  # refuses what is not emulated before anything is computed
    return _product(_Plan(contraction, recipe, draws.examples, axis_name), lhs, rhs, draws.key, draws.places, delay)


def round_operand(
    x: jax.Array,
    operand: RecipeOperand,
    *,
    axes: tuple[int, int] = (-2, -1),
    noise: jax.Array | None = None,
    scale: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Rounds an operand of a product to its format; returns float32. `hadamard` comes before it where there is one.

    Infinities and NaN stay what they are, or make their block NaN. The derivative by `x` is 1, as that of `quantize`:
    the gradient of a product can be differentiated again, in a penalty on gradients, say.

    Args:
      x: the operand, float32, bfloat16 or float16.
      operand: which one it is, and its format.
      axes: its axes: rows and features of activations and gradients, input and output features of weights. Blocks run
        along the one over which the product sums; blocks of two lengths lie on both.
      noise: 32 random bits for each number, uint32; None rounds to nearest.
      scale: of a `Delayed` format, what `x` is multiplied by.
      axis_name: mapped axis over which the rows are spread, for a scale of the whole tensor or of all rows.
    """
    format = operand.format
    x = x.astype(FLOAT32)
    if format is None:
        return x
    if isinstance(format, Delayed) and scale is None:
        raise InputError(f"format {format} of {operand.role}: expected a scale, which is kept in model state")
    return _rounded(x, noise, scale, operand, (axes[0] % x.ndim, axes[1] % x.ndim), axis_name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _rounded(
    x: jax.Array,
    noise: jax.Array | None,
    scale: jax.Array | None,
    operand: RecipeOperand,
    axes: tuple[int, int],
    axis_name: str | None,
) -> jax.Array:
    """Rounds float32 as `round_operand` does; no axis is negative."""
    format = operand.format
    with jax.named_scope(f"quantize_{str(format).replace(':', '-')}"):
        if isinstance(format, BlockFormat):
            spread = None if axis_name is None or operand.role == "weights" else (axis_name, axes[0])
            return round_blocks(x, noise, format, block_axes(operand, axes, x.ndim), spread)
        if isinstance(format, Delayed):
            assert scale is not None
            if isinstance(format.format, Integer):
                rounded = round_to_integer(x * scale, noise, format.format)
            else:
                rounded = _round_numbers(x * scale, noise, format.format, True)
            # A product, as in Transformer Engine: XLA makes one of a quotient in some programs, others keep it.
            rounded = rounded * (1 / scale)
        else:
            assert format is not None
            # Gradients overflow to what a loss scaler sees.
            rounded = _round_numbers(x, noise, format, operand.role != "gradients")
        return jnp.where(jnp.isfinite(x), rounded, x)


@_rounded.defjvp
def _straight_through(
    operand: RecipeOperand, axes: tuple[int, int], axis_name: str | None, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    return _rounded(*primals, operand, axes, axis_name), tangents[0]


@functools.partial(jax.jit, static_argnums=(2, 3))  # a call, which an exported program shows as one operation
def _round_numbers(x: jax.Array, noise: jax.Array | None, format: Format, saturate: bool) -> jax.Array:
    """Rounds float32 to the numbers of a float format; `saturate` is that of `quantize`."""
    return from_float32_bits(round_bits(float32_bits(x), noise, format, saturate), FLOAT32)


def round_to_integer(x: jax.Array, noise: jax.Array | None, element: Integer) -> jax.Array:
    """Rounds float32 to whole numbers within the symmetric range of `element`, ties to even; returns float32.

    Args:
      x: numbers that are scaled into the range.
      noise: 32 random bits for each number, uint32, for stochastic rounding; None rounds to nearest.
      element: an integer without a fraction, such as int8.
    """
    if noise is None:
        whole = jnp.round(x)
    else:  # x + noise would be rounded, up to the next whole number even where x is one
        below = jnp.floor(x)
        whole = below + ((noise >> 8).astype(FLOAT32) * 2.0**-24 < x - below)
    return jnp.clip(whole, -element.max, element.max)


def block_axes(operand: RecipeOperand, axes: tuple[int, int], ndim: int) -> tuple[int, ...]:
    """Returns the axes of an operand along which the blocks of its block format run; for `axes` see `round_operand`."""
    assert isinstance(operand.format, BlockFormat)
    if operand.format.block == "tensor":
        return tuple(range(ndim))
    if isinstance(operand.format.block, tuple) and len(operand.format.block) == 2:
        return axes
    return (summed_axis(operand, axes),)


def summed_axis(operand: RecipeOperand, axes: tuple[int, int]) -> int:
    """Returns that of the two `axes` of an operand over which its product sums; see `round_operand`."""
    return axes[_SUMMED[operand.product, operand.role]]


def split_groups(x: jax.Array, contraction: Contraction, role: str) -> tuple[jax.Array, tuple[int, int]]:
    """Returns an operand whose features are split into (groups, features of each), and its axes; see `round_operand`.

    Each group of channels has blocks of its own. Without groups, the operand stays as it is.
    """
    first, second = contraction.axes[role]
    if contraction.groups == 1:
        return x, (first, second)
    each = x.shape[second] // contraction.groups
    x = x.reshape(*x.shape[:second], contraction.groups, each, *x.shape[second + 1 :])
    return x, (first + (first > second), second + 1)


def transformed(x: jax.Array, operand: RecipeOperand, axes: tuple[int, int]) -> jax.Array:
    """Returns an operand after its Hadamard transform, as `round_operand` is given it; float32. See `round_operand`."""
    x = x.astype(FLOAT32)
    if not operand.hadamard:
        return x
    stages, is_left = operand.hadamard.bit_length() - 1, PRODUCTS[operand.product][0] == operand.role
    exponent = stages // 2 if is_left else stages - stages // 2
    return hadamard(x, operand.hadamard, summed_axis(operand, axes), exponent=exponent)


def hadamard(x: jax.Array, length: int, axis: int = -1, *, exponent: int | None = None) -> jax.Array:
    """Multiplies blocks of `length` numbers along an axis by a random Hadamard matrix; fills up the last with zeros.

    The matrix is H D 2^-exponent, with Sylvester's H of ones and minus ones, and a diagonal D of random signs, the same
    in all layers and steps. The transforms of two operands whose exponents add up to log2(length) cancel out in their
    product: no factor is rounded.

    The sums are float32, in log2(length) stages of pairs: numbers of 24 - log2(length) bits are transformed exactly.

    Source: Ashkboos et al. 2024, QuaRot, 2404.00456, section 2; one fixed vector of signs for all layers: NVIDIA 2025,
    2509.25149, section 4.

    Args:
      x: float32.
      length: a power of two.
      axis: the axis along which blocks run.
      exponent: of the factor; by default half of log2(length), rounded down.

    >>> x = jnp.arange(4.0)
    >>> bool((hadamard(x, 4) @ hadamard(x, 4) == x @ x))
    True
    """
    axis %= x.ndim
    stages = length.bit_length() - 1
    exponent = stages // 2 if exponent is None else exponent
    more = -x.shape[axis] % length
    if more:
        x = jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])
    before, count, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    x = x.reshape(*before, count // length, length, *after)
    signs = _signs(length) * np.float32(2.0**-exponent)
    x = x * signs.reshape(length, *[1] * len(after))
    for stage in range(stages):
        width = 2**stage
        pairs = x.reshape(*before, count // (2 * width), 2, width, *after)
        a, b = (lax.index_in_dim(pairs, i, axis + 1, keepdims=True) for i in (0, 1))
        x = lax.concatenate([a + b, a - b], axis + 1)
    return x.reshape(*before, count, *after)


@functools.cache
def _signs(length: int) -> np.ndarray:
    """Returns `length` random signs, float32, always the same: the first bits of a counter-based generator."""
    raw = np.random.Philox(key=2509_25149).random_raw(length)
    return np.where(raw >> np.uint64(63), np.float32(-1), np.float32(1))


# The product and its gradients.


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What of a product is known when it is traced."""

    contraction: Contraction
    recipe: Recipe
    examples: int | None
    axis_name: str | None

    def run(
        self,
        product: str,
        left: jax.Array,
        right: jax.Array,
        shape: tuple[int, ...] | None,
        key: Any,
        index: Any,
        scales: Mapping[str, jax.Array],
    ) -> jax.Array:
        """Rounds the operands of one product and multiplies them; `shape` is that of a gradient."""
        given = []
        with jax.named_scope(RECIPE + product):
            for role, x in zip(PRODUCTS[product], (left, right), strict=True):
                with jax.named_scope(f"{RECIPE}{product}-{role}"):
                    given.append(self._operand(self.recipe.operand(product, role), x, key, index, scales))
            return self.contraction.products(self.recipe.accumulate)[product](*given, shape)

    def _operand(
        self, operand: RecipeOperand, x: jax.Array, key: Any, index: Any, scales: Mapping[str, jax.Array]
    ) -> jax.Array:
        x, (first, second) = split_groups(x, self.contraction, operand.role)
        x = transformed(x, operand, (first, second))
        noise = None
        if operand.rounding == "stochastic" and operand.format is not None:
            noise = self._noise(operand, x.shape, key, index)
        x = round_operand(
            x,
            operand,
            axes=(first, second),
            noise=noise,
            scale=scales.get(operand.role),
            axis_name=self.axis_name,
        )
        if self.contraction.groups == 1:
            return x
        return x.reshape(*x.shape[: second - 1], x.shape[second - 1] * x.shape[second], *x.shape[second + 1 :])

    def _noise(self, operand: RecipeOperand, shape: tuple[int, ...], key: Any, index: Any) -> jax.Array:
        if key is None:
            raise InputError(
                f"stochastic rounding of {operand.role} in {operand.product} without a key: expected one for the call "
                "of the model, such as apply(variables, x, rngs={'params': jax.random.key(0)})"
            )
        place = [(product, role) for product, roles in PRODUCTS.items() for role in roles]
        key = jax.random.fold_in(key, place.index((operand.product, operand.role)))
        rows, count = self.contraction.axes[operand.role][0], self.examples
        if operand.role == "weights":
            return random_bits(key[None], shape)
        if rows != 0 or not count or shape[0] % count:
            return random_bits((key if index is None else jax.random.fold_in(key, index[0]))[None], shape)
        index = jnp.arange(count, dtype=jnp.int32) if index is None else index
        return random_bits(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index), shape)


def random_bits(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws 32 random bits for each number of an array, uint32.

    The array is cut into as many equal parts as there are keys, and each part is a hash of its key and of the position
    in it: the finaliser of MurmurHash3, twice. Threefry, JAX's own, would take longer than the product that is rounded.

    Args:
      keys: typed PRNG keys, (parts,).
      shape: shape of the array; the parts divide the number of its elements.
    """
    words = jax.random.key_data(keys).astype(jnp.uint32)
    first, second = words[:, :1], words[:, -1:]
    position = lax.broadcasted_iota(jnp.uint32, (len(words), math.prod(shape) // max(len(words), 1)), 1)
    return _hashed(_hashed(position * np.uint32(0x9E3779B9) + first) ^ second).reshape(shape)


def _hashed(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3 (A. Appleby, 2011), which maps 32 bits to 32 bits, one to one."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(plan: _Plan, x: jax.Array, w: jax.Array, key: Any, index: Any, delay: Delay | None) -> jax.Array:
    return plan.run("fprop", x, w, None, key, index, {} if delay is None else delay.scales)


def _forward(plan: _Plan, x: jax.Array, w: jax.Array, key: Any, index: Any, delay: Delay | None) -> Any:
    # Operands are kept as they came: the backward pass rounds them along other axes.
    return _product(plan, x, w, key, index, delay), (x, w, key, index, delay)


def _backward(plan: _Plan, kept: Any, g: jax.Array) -> Any:
    x, w, key, index, delay = kept
    scales = {} if delay is None else delay.scales
    dx = plan.run("dgrad", g, w, x.shape, key, index, scales).astype(x.dtype)
    dw = plan.run("wgrad", x, g, w.shape, key, index, scales).astype(w.dtype)
    of_delay = None
    if delay is not None:
        of_delay = Delay(jax.tree.map(jnp.zeros_like, delay.scales), largest_magnitude(g, plan.axis_name))
    return dx, dw, None, None, of_delay


_product.defvjp(_forward, _backward)


def largest_magnitude(x: jax.Array, axis_name: str | None = None) -> jax.Array:
    """Returns the largest magnitude of an array, on all replicas, float32 scalar; NaN or infinite if a number is."""
    # As integers, a NaN is larger than infinity, and that than any number (trap T18).
    bits = jnp.max(float32_bits(x) & np.uint32(0x7FFFFFFF), initial=0)
    return lax.bitcast_convert_type(bits if axis_name is None else lax.pmax(bits, axis_name), jnp.float32)


def _sum_products(
    a: jax.Array, b: jax.Array, a_axis: int, b_axis: int, batch: int, accumulate: tuple[Level, ...]
) -> jax.Array:
    """Multiplies matrices that sum over an axis each, by the levels of an accumulator."""
    leading = tuple(range(batch))
    if not accumulate:
        numbers = (((a_axis,), (b_axis,)), (leading, leading))
        return lax.dot_general(a, b, numbers, precision=lax.Precision.HIGHEST, preferred_element_type=FLOAT32)
    *inner, level = accumulate
    count = -(-a.shape[a_axis] // level.every)

    def add(total: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        total = total + _sum_products(a, b, a_axis, b_axis, batch, tuple(inner))
        return total if level.format == _FLOAT32_FORMAT else quantize(total, level.format, saturate=False)

    free = [x.shape[i] for x, axis in ((a, a_axis), (b, b_axis)) for i in range(batch, x.ndim) if i != axis]
    total = jnp.zeros((*a.shape[:batch], *free), FLOAT32)
    if count <= _LONGEST_UNROLLED:
        for i in range(count):
            at = i * level.every, min((i + 1) * level.every, a.shape[a_axis])
            total = add(total, lax.slice_in_dim(a, *at, axis=a_axis), lax.slice_in_dim(b, *at, axis=b_axis))
        return total
    chunks = (_chunks(a, a_axis, count, level.every), _chunks(b, b_axis, count, level.every))
    return lax.scan(lambda total, each: (add(total, *each), None), total, chunks)[0]


def _chunks(x: jax.Array, axis: int, count: int, length: int) -> jax.Array:
    """Splits an axis, filled up with zeros, into chunks along a new first axis."""
    more = count * length - x.shape[axis]
    x = jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, length, *x.shape[axis + 1 :]), axis, 0)
