"""`what_if`: what each recipe would do to the three products of each layer, measured in one step that is not changed.

The step runs in its own precision. At each layer's product, its operands (activations, weights, gradients of the
result) are also rounded as each recipe would round them, and multiplied: what is lost in the operands and in the
product is summed up on the device.

    measure = make_what_if(loss_fn, {"mxfp8": RECIPES["mxfp8"], "nvfp4": RECIPES["nvfp4"]})
    print(measure(params, model_state, jnp.float32(1), batch, key).read())
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
from jaxmp.instruments.block_ranges import is_clipped
from jaxmp.instruments.product_sums import make_product_sums
from jaxmp.modules.products import ObservedProduct
from jaxmp.precision.blocks import BlockFormat, clips_above, round_blocks_with_scales
from jaxmp.precision.formats import Format
from jaxmp.precision.policy import parse_policy
from jaxmp.precision.product import (
    Contraction,
    block_axes,
    largest_magnitude,
    random_bits,
    round_operand,
    summed_axis,
    transformed,
)
from jaxmp.precision.recipe import PRODUCTS, RECIPES, Delayed, Recipe, RecipeOperand, parse_recipe
from jaxmp.text_table import table
from jaxmp.training.batch import LossFn
from jaxmp.training.objective import EVERYTHING

STALL = math.sqrt(3)
"""Signal to noise of a gradient below which quantized training becomes less effective.

Source: Chmiel et al. 2025, FP4 All the Way, 2505.19115, abstract.
"""

GROUPS = 16
"""number of parts over which the interval of a bias is estimated: of an array, or of each of two axes of a product"""

_LANES = 16

_RESULTS = {"fprop": "gradients", "dgrad": "activations", "wgrad": "weights"}
"""the role of the operand that has the axes of a product"""

_SMALLEST = 2.0**-80  # sum of squares in float32, of a million numbers say, whose errors' squares do not underflow

_SUMS = 2 * GROUPS + 1  # of errors times numbers and of squares, by group; of squared errors
_PRODUCT = 2 * GROUPS**2 + 1  # the same by cell
_OPERAND = _SUMS + 7  # and counts: numbers, not zero, underflow, clipped; of scales: number, logarithms, their squares


def recipe_of(text: str) -> Recipe:
    """Returns the recipe that a text stands for: a recipe's name or fields, or one format for all operands.

    >>> str(recipe_of("mxfp4,hadamard=none")), str(recipe_of("e4m3:block32"))
    ('recipe=mxfp4,hadamard=none', 'fprop=e4m3:block32/e4m3:block32,dgrad=e4m3:block32/e4m3:block32,\
wgrad=e4m3:block32/e4m3:block32')

    Raises:
      InputError: it is neither, with the nearest name; or a policy without a recipe.
    """
    head, _, rest = text.partition(",")
    if head.strip() in RECIPES or "=" in text:
        recipe = parse_policy(text).recipe
        if recipe is None:
            raise InputError(
                f"recipe {text!r}: it rounds no operand of a product; expected one of {', '.join(RECIPES)}"
            )
        return recipe
    if rest:
        raise InputError(f"recipe {text!r}: expected one of {', '.join(RECIPES)}, or a format such as e4m3:block32")
    return parse_recipe(dict.fromkeys(PRODUCTS, text))


class OperandLoss(NamedTuple):
    """What one operand of a product loses. Shares are of its numbers that are not zero; None where all are zero.

    Errors and bias are None as well where the norm is below 2^-40: the squares of errors would underflow in float32.
    """

    format: str
    """the format it is rounded to; `high` if it is not rounded"""
    underflow: float | None
    """share that is rounded to 0"""
    clipped: float | None
    """share that is clipped to the largest number of the format in its block: under stochastic rounding all that is
    above it, under rounding to nearest what is more than half a step above it"""
    mse: float | None
    """mean squared error, as a share of the mean square"""
    bias: float | None
    """projection of the error on the operand: -0.01 where numbers are 1 % too small on average"""
    low: float | None
    """lower end of the 95 % interval of `bias`: jackknife over 16 parts of the array, without those that are 0;
    None if fewer than two are left"""
    high: float | None
    spread: float | None
    """standard deviation of the base 2 logarithm of the scales of blocks, those of blocks of zeros left out; None
    without scales"""


class ProductLoss(NamedTuple):
    """What a recipe would do to one product of one layer."""

    recipe: str
    layer: str
    """path of the module"""
    product: str
    """`fprop`, `dgrad` or `wgrad`"""
    operands: dict[str, OperandLoss]
    """by role, in the order of the product"""
    bias: float | None
    """projection of the product's error on the exact product"""
    low: float | None
    """lower end of the 95 % interval of `bias`; None if the product has one row or column

    A number of an operand enters a whole row or column of the product, so the errors of both are clusters: the variance
    is that between 16 parts of the rows, plus that between 16 parts of the columns, less that between their cells,
    each by the jackknife. Source: Cameron, Gelbach and Miller 2011, Robust Inference with Multiway Clustering, J. Bus.
    Econ. Stat. 29(2), section 2. Axes of a convolution are the batch or the input channels, and the channels.
    """
    high: float | None
    signal_to_noise: float | None
    """norm of the exact product by the norm of its error; None where the product is not finite, or its norm is 0 or
    below 2^-40, where squares of errors would underflow; infinity without an error"""

    @property
    def stalls(self) -> bool:
        """Whether it is a gradient below `STALL`."""
        return self.product != "fprop" and self.signal_to_noise is not None and self.signal_to_noise < STALL


@dataclasses.dataclass(frozen=True)
class WhatIf:
    """What recipes would do to each layer's products in one step. `print` shows a table."""

    rows: tuple[ProductLoss, ...]
    """by recipe, layer and product"""

    def to_json(self) -> list[dict[str, Any]]:
        """Returns the rows as dicts, strings and numbers; an infinite signal to noise is None."""
        found = []
        for row in self.rows:
            ratio = row.signal_to_noise
            plain = {**row._asdict(), "operands": {role: of._asdict() for role, of in row.operands.items()}}
            plain["signal_to_noise"] = None if ratio is None or math.isinf(ratio) else ratio
            found.append({**plain, "stalls": row.stalls})
        return found

    def __str__(self) -> str:
        head = ("recipe", "layer", "product", "underflow %", "clipped %", "mse", "bias %", "signal/noise", "scales")
        stalled = sum(row.stalls for row in self.rows)
        notes = [
            "",
            "underflow, clipped, mse (of the mean square) and scales (the spread of their exponents): of both operands",
            "activations/weights of fprop, gradients/weights of dgrad, activations/gradients of wgrad.",
            "bias (with its 95 % interval, over rows and columns) and signal/noise: of the product.",
            f"Training is less effective where a gradient's signal/noise is below {STALL:.2f} (2505.19115); marked *: "
            f"{stalled}.",
        ]
        return "\n".join([table(map(_line, self.rows), header=head, right=[3, 4, 5, 6, 7, 8]), *notes])


def make_what_if(
    loss_fn: LossFn,
    recipes: Mapping[str, Recipe],
    *,
    accumulate_steps: int = 1,
    trains: tuple[str, ...] = EVERYTHING,
) -> Callable[..., Measurements]:
    """Makes a function that measures what recipes would do to the products in one step.

    Measured are Dense, DenseGeneral and Conv layers without groups, also within attention, scan, remat and vmap, and if
    the step runs under a recipe, the other layers that it rounds. Products of a layer that runs several times are taken
    together. Scales of `Delayed` formats are those of the step's own magnitudes.

    Args:
      loss_fn: a loss function that runs Linen modules under `jaxmp.with_policy`.
      recipes: the recipes by the name under which they are listed.
      accumulate_steps: number of microbatches of a batch.
      trains: the parameters that are differentiated, see `jaxmp.Objective`.

    Returns:
      `(params, model_state, scale, batch, key) -> Measurements`; works under jit. Gradients are those of the mean loss
      times `scale`.

    Raises:
      InputError: when it is called: the loss runs no such layer.
    """

    every = tuple(recipes.values())

    def measures(path: str, product: ObservedProduct) -> _Measure | None:
        # Groups have blocks of their own, which are not measured here: only a recipe of the step's own shows them.
        return None if product.contraction.groups > 1 else _Measure(every)

    gather = make_product_sums(loss_fn, measures, accumulate_steps=accumulate_steps, trains=trains)

    def measure(params: Any, model_state: Any, scale: Any, batch: Any, key: Any) -> Measurements:
        found = gather(params, model_state, scale, batch, key)
        if not found:
            raise InputError(
                "what-if: the loss runs no layer with a product (Dense, DenseGeneral, Conv) under a policy; expected a "
                "model of Linen modules, called under jaxmp.with_policy"
            )
        return Measurements(found, tuple(recipes.items()))

    return measure


@functools.partial(jax.tree_util.register_dataclass, data_fields=("sums",), meta_fields=("recipes",))
@dataclasses.dataclass(frozen=True)
class Measurements:
    """The sums that were measured, on the device."""

    sums: dict[str, jax.Array]
    """by the path of the layer, float32 (recipes, products, sums)"""
    recipes: tuple[tuple[str, Recipe], ...]

    def read(self) -> WhatIf:
        """Fetches the sums, and divides them into shares and ratios."""
        sums = jax.device_get(self.sums)
        return WhatIf(
            tuple(
                _read(name, recipe, path, product, sums[path][i, j])
                for i, (name, recipe) in enumerate(self.recipes)
                for path in sums
                for j, product in enumerate(PRODUCTS)
            )
        )


@dataclasses.dataclass(frozen=True)
class _Measure:
    """Sums up what recipes do to the three products of a layer."""

    recipes: tuple[Recipe, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(recipes, products, sums)."""
        return len(self.recipes), len(PRODUCTS), 2 * _OPERAND + _PRODUCT

    def __call__(self, product: ObservedProduct, gradient: jax.Array) -> jax.Array:
        """Returns float32 (recipes, products, sums)."""
        contraction: Contraction = product.contraction
        given = {"activations": product.activations, "weights": product.weights, "gradients": gradient}
        arrays = {role: each.astype(jnp.float32) for role, each in given.items()}
        shapes = {"fprop": gradient.shape, "dgrad": arrays["activations"].shape, "wgrad": arrays["weights"].shape}
        operands: dict[Any, _Rounded] = {}
        exact: dict[str, _Exact] = {}
        found = []
        for name, roles in PRODUCTS.items():
            result = contraction.products(())[name](*(arrays[role] for role in roles), shapes[name])
            exact[name] = _Exact.of(result, contraction.axes[_RESULTS[name]])
        plain_operands: dict[Any, _Exact] = {}
        for recipe in self.recipes:
            products = contraction.products(recipe.accumulate)
            for name, roles in PRODUCTS.items():
                own = []
                for role in roles:
                    operand, axes = recipe.operand(name, role), contraction.axes[role]
                    before, rounding = _sameness(operand, axes)
                    if before not in plain_operands:
                        plain_operands[before] = _Exact.of(transformed(arrays[role], operand, axes))
                    if rounding not in operands:
                        operands[rounding] = _rounded(plain_operands[before], operand, axes)
                    own.append(operands[rounding])
                rounded = products[name](*(each.numbers for each in own), shapes[name])
                found.append(jnp.concatenate([*(each.sums for each in own), exact[name].sums(rounded)]))
        return jnp.stack(found).reshape(self.shape)


def _sameness(operand: RecipeOperand, axes: tuple[int, int]) -> tuple[Any, Any]:
    """What an operand has in common with others that are equal before they are rounded, and after."""
    along = summed_axis(operand, axes)
    left = PRODUCTS[operand.product][0] == operand.role
    before = (operand.role, (operand.hadamard, along, left) if operand.hadamard else None)
    by_axis = isinstance(operand.format, BlockFormat) and len(block_axes(operand, axes, 3)) == 1
    place = _place(operand) if operand.rounding == "stochastic" else None  # each place draws its own noise
    return before, (before, operand.format, place, along if by_axis else None)


def _place(operand: RecipeOperand) -> int:
    """Which of the six operands of the three products it is, from 0."""
    return [(name, role) for name, roles in PRODUCTS.items() for role in roles].index((operand.product, operand.role))


class _Rounded(NamedTuple):
    """An operand as it is multiplied, and the sums of what it lost."""

    numbers: jax.Array
    sums: jax.Array
    """float32 (_OPERAND,)"""


class _Exact(NamedTuple):
    """An array before it is rounded, with what all of its roundings are compared with."""

    numbers: jax.Array
    squares: jax.Array
    """sums of their squares by part"""
    there: jax.Array
    """how many are not zero"""
    axes: tuple[int, int] | None = None
    """rows and columns of a product, whose parts are cells of both; None: parts are groups in C order"""

    @classmethod
    def of(cls, x: jax.Array, axes: tuple[int, int] | None = None) -> _Exact:
        return cls(x, _by_part(x * x, axes), _count(x != 0), axes)

    def sums(self, rounded: jax.Array) -> jax.Array:
        """Sums of error times number and of squares by part, and of squared errors; float32 (_SUMS or _PRODUCT,)."""
        error = rounded - self.numbers
        along = _by_part(error * self.numbers, self.axes)
        return jnp.concatenate([along, self.squares, jnp.sum(_by_group(error * error))[None]])


def _by_part(x: jax.Array, axes: tuple[int, int] | None) -> jax.Array:
    """Sums by group, (GROUPS,), or by cell of the two axes, (GROUPS^2,); other axes are summed."""
    if axes is None:
        return _by_group(x)
    table = jnp.sum(jnp.moveaxis(x, axes, (-2, -1)), range(x.ndim - 2))
    rows, columns = (_membership(n) for n in table.shape)
    # As products of matrices, which are fast on every device, where sums of parts of unequal lengths are not.
    sums = jnp.matmul(
        jnp.matmul(rows.T, table, precision=lax.Precision.HIGHEST), columns, precision=lax.Precision.HIGHEST
    )
    return jnp.ravel(sums)


def _membership(count: int) -> jax.Array:
    """Returns ones where a place is in a part of its axis, else zeros, (count, GROUPS). The last may be empty."""
    place = jnp.arange(count)[:, None] * min(count, GROUPS) // count
    return (place == jnp.arange(GROUPS)).astype(jnp.float32)


def _by_group(x: jax.Array) -> jax.Array:
    """Sums of equal parts of an array in C order, (GROUPS,)."""
    groups = jnp.pad(jnp.ravel(x), (0, -x.size % GROUPS)).reshape(GROUPS, -1)
    # In lanes that are added at the end: XLA:CPU adds 16 numbers at a time, where it adds those of one sum in turn.
    lanes = jnp.pad(groups, ((0, 0), (0, -groups.shape[1] % _LANES))).reshape(GROUPS, -1, _LANES)
    return jnp.sum(jnp.sum(lanes, axis=1), axis=1)


def _count(flags: jax.Array) -> jax.Array:
    """How many flags are set, float32: exact below 2^24, from there on to 24 bits."""
    return jnp.sum(_by_group(flags.astype(jnp.int32)).astype(jnp.float32))


def _rounded(exact: _Exact, operand: RecipeOperand, axes: tuple[int, int]) -> _Rounded:
    """Rounds an operand, already transformed, and sums up what it loses."""
    x, format, noise = exact.numbers, operand.format, None
    if operand.rounding == "stochastic" and format is not None:
        noise = random_bits(jax.random.fold_in(jax.random.key(0), _place(operand))[None], x.shape)
    nearest, scales = jnp.float32(jnp.inf), jnp.zeros(3)
    if isinstance(format, BlockFormat):
        rounded, found = round_blocks_with_scales(x, noise, format, block_axes(operand, axes, x.ndim))
        nearest = found.limit_of_numbers
        logs = jnp.log2(jnp.where(found.amax > 0, jnp.maximum(found.of_blocks, 2.0**-126), 1))
        scales = jnp.stack([_count(found.amax > 0), *(jnp.sum(_by_group(each)) for each in (logs, logs * logs))])
    elif isinstance(format, Delayed):  # as if the history held the magnitudes of this step
        amax = largest_magnitude(x)
        factor = jnp.where(amax > 0, format.format.max / amax, 1.0)
        rounded = round_operand(x, operand, axes=axes, noise=noise, scale=factor)
        nearest = clips_above(format.format) / factor
    else:
        rounded = round_operand(x, operand, axes=axes, noise=noise)
        if isinstance(format, Format):
            nearest = jnp.float32(clips_above(format))
    clipped = _count(is_clipped(x, nearest, operand))
    underflow = _count((x != 0) & (rounded == 0))
    counts = jnp.stack([jnp.float32(x.size), exact.there, underflow, clipped])
    return _Rounded(rounded, jnp.concatenate([exact.sums(rounded), counts, scales]))


def _read(name: str, recipe: Recipe, path: str, product: str, sums: np.ndarray) -> ProductLoss:
    operands = {}
    for place, role in enumerate(PRODUCTS[product]):
        own = sums[place * _OPERAND : (place + 1) * _OPERAND].astype(np.float64)
        _, there, underflow, clipped, scales, logs, squares = own[_SUMS:].tolist()
        bias, low, high, ratio = _bias_and_ratio(own[:_SUMS])
        operands[role] = OperandLoss(
            format=str(recipe.operand(product, role).format or "high"),
            underflow=underflow / there if there else None,
            clipped=clipped / there if there else None,
            mse=None if ratio is None else ratio**-2,
            bias=bias,
            low=low,
            high=high,
            spread=math.sqrt(max(squares / scales - (logs / scales) ** 2, 0)) if scales else None,
        )
    bias, low, high, ratio = _bias_and_ratio(sums[2 * _OPERAND :].astype(np.float64), parts=(GROUPS, GROUPS))
    return ProductLoss(name, path, product, operands, bias, low, high, ratio)


def _bias_and_ratio(
    sums: np.ndarray, *, parts: tuple[int, ...] = (GROUPS,)
) -> tuple[float | None, float | None, float | None, float | None]:
    """Returns bias, its interval, and signal to noise, of sums by part: groups, or cells of two axes."""
    along, squares = sums[:-1].reshape(2, *parts)
    total, error = float(squares.sum()), float(sums[-1])
    if not np.isfinite(sums).all() or total < _SMALLEST:
        return None, None, None, None
    bias, ratio = float(along.sum()) / total, math.sqrt(total / error) if error > 0 else math.inf
    found = _jackknife(along, squares) if len(parts) == 1 else _two_way(along, squares)
    if found is None:
        return bias, None, None, ratio
    from scipy import special  # here: importing it takes longer than `jaxmp --help` may

    half = float(special.stdtrit(found.parts - 1, 0.975)) * math.sqrt(found.variance)
    return bias, bias - half, bias + half, ratio


class _Variance(NamedTuple):
    """The variance of a ratio, and the number of parts that it is estimated from."""

    variance: float
    parts: int


def _two_way(along: np.ndarray, squares: np.ndarray) -> _Variance | None:
    """Returns the variance of the sum of `along` by that of `squares`, (rows, columns), of clusters along both axes."""
    rows, columns = (_jackknife(along.sum(axis), squares.sum(axis)) for axis in (1, 0))
    cells = _jackknife(np.ravel(along), np.ravel(squares))
    if rows is None or columns is None or cells is None:
        return None
    # What a cell adds of its own is in both. The difference is an estimate, and may be below the larger of them.
    larger = max(rows, columns)
    variance = max(larger.variance, rows.variance + columns.variance - cells.variance)
    return larger._replace(variance=variance)


def _jackknife(along: np.ndarray, squares: np.ndarray) -> _Variance | None:
    """Returns the variance of the sum of `along` by that of `squares`; None if fewer than two parts are not zero."""
    along, squares = along[squares > 0], squares[squares > 0]
    count, rest = len(along), squares.sum() - squares
    if count < 2 or not (rest > 0).all():
        return None
    off = (along.sum() - along) / rest - along.sum() / squares.sum()
    return _Variance((count - 1) / count * float((off**2).sum()), count)


def _line(row: ProductLoss) -> tuple[str, ...]:
    def both(name: str, show: Callable[[float], str]) -> str:
        values = [getattr(operand, name) for operand in row.operands.values()]
        return "/".join("-" if value is None else show(value) for value in values)

    bias = "-" if row.bias is None else f"{100 * row.bias:+.2f}"
    if row.low is not None and row.high is not None:
        bias += f" [{100 * row.low:+.2f}, {100 * row.high:+.2f}]"
    ratio = "-" if row.signal_to_noise is None else f"{row.signal_to_noise:.3g}"
    return (
        row.recipe,
        row.layer or "(model)",
        row.product,
        both("underflow", lambda share: f"{100 * share:.2f}"),
        both("clipped", lambda share: f"{100 * share:.2f}"),
        both("mse", lambda share: f"{share:.1e}"),
        bias,
        ratio + (" *" if row.stalls else ""),
        both("spread", lambda spread: f"{spread:.1f}"),
    )
