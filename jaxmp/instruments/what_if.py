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

from jaxmp.errors import InputError
from jaxmp.instruments.product_sums import make_product_sums
from jaxmp.modules.products import ObservedProduct
from jaxmp.precision.blocks import BlockFormat, clips_above, round_blocks_with_scales
from jaxmp.precision.formats import Format
from jaxmp.precision.policy import parse_policy
from jaxmp.precision.product import Contraction, block_axes, largest_magnitude, round_operand, summed_axis, transformed
from jaxmp.precision.recipe import PRODUCTS, RECIPES, Delayed, Recipe, RecipeOperand, parse_recipe
from jaxmp.text_table import table
from jaxmp.training.batch import LossFn
from jaxmp.training.objective import EVERYTHING

STALL = math.sqrt(3)
"""Signal to noise of a gradient below which training stalls (Chmiel et al. 2025, FP4 All the Way, 2505.19115)."""

GROUPS = 16
"""number of parts of an array over which the interval of a bias is estimated"""

_LANES = 16

_T = 2.131449545559323  # the 97.5 % point of Student's t with 15 degrees of freedom

_SMALLEST = 2.0**-80  # sum of squares in float32, of a million numbers say, whose errors' squares do not underflow

_SUMS = 2 * GROUPS + 1  # of errors times numbers and of squares, by group; of squared errors
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
    """share beyond the largest number of the format, in its block"""
    mse: float | None
    """mean squared error, as a share of the mean square"""
    bias: float | None
    """projection of the error on the operand: -0.01 where numbers are 1 % too small on average"""
    low: float | None
    """lower end of the 95 % interval of `bias`: jackknife over 16 parts of the array"""
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
            "bias (with its 95 % interval) and signal/noise: of the product.",
            f"A gradient whose signal/noise is below {STALL:.2f} stalls training (2505.19115); marked *: {stalled}.",
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
        return len(self.recipes), len(PRODUCTS), 2 * _OPERAND + _SUMS

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
            exact[name] = _Exact.of(contraction.products(())[name](*(arrays[role] for role in roles), shapes[name]))
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
    return before, (before, operand.format, operand.rounding, along if by_axis else None)


class _Rounded(NamedTuple):
    """An operand as it is multiplied, and the sums of what it lost."""

    numbers: jax.Array
    sums: jax.Array
    """float32 (_OPERAND,)"""


class _Exact(NamedTuple):
    """An array before it is rounded, with what all of its roundings are compared with."""

    numbers: jax.Array
    squares: jax.Array
    """sums of their squares by group"""
    there: jax.Array
    """how many are not zero"""

    @classmethod
    def of(cls, x: jax.Array) -> _Exact:
        return cls(x, _by_group(x * x), _count(x != 0))

    def sums(self, rounded: jax.Array) -> jax.Array:
        """Sums of error times number and of squares by group, and of squared errors; float32 (_SUMS,)."""
        error = rounded - self.numbers
        return jnp.concatenate([_by_group(error * self.numbers), self.squares, jnp.sum(_by_group(error * error))[None]])


def _by_group(x: jax.Array) -> jax.Array:
    """Sums of equal parts of an array in C order, (GROUPS,)."""
    groups = jnp.pad(jnp.ravel(x), (0, -x.size % GROUPS)).reshape(GROUPS, -1)
    # In lanes that are added at the end: XLA:CPU adds 16 numbers at a time, where it adds those of one sum in turn.
    lanes = jnp.pad(groups, ((0, 0), (0, -groups.shape[1] % _LANES))).reshape(GROUPS, -1, _LANES)
    return jnp.sum(jnp.sum(lanes, axis=1), axis=1)


def _count(flags: jax.Array) -> jax.Array:
    """How many flags are set, float32."""
    return jnp.sum(_by_group(flags.astype(jnp.int32))).astype(jnp.float32)


def _rounded(exact: _Exact, operand: RecipeOperand, axes: tuple[int, int]) -> _Rounded:
    """Rounds an operand, already transformed, and sums up what it loses."""
    x, format, noise = exact.numbers, operand.format, None
    if operand.rounding == "stochastic" and format is not None:
        noise = jax.random.bits(jax.random.key(0), x.shape, jnp.uint32)
    limit, scales = jnp.float32(jnp.inf), jnp.zeros(3)
    if isinstance(format, BlockFormat):
        rounded, found = round_blocks_with_scales(x, noise, format, block_axes(operand, axes, x.ndim))
        limit = found.limit_of_numbers
        logs = jnp.log2(jnp.where(found.amax > 0, jnp.maximum(found.of_blocks, 2.0**-126), 1))
        scales = jnp.stack([_count(found.amax > 0), *(jnp.sum(_by_group(each)) for each in (logs, logs * logs))])
    elif isinstance(format, Delayed):  # as if the history held the magnitudes of this step
        amax = largest_magnitude(x)
        factor = jnp.where(amax > 0, format.format.max / amax, 1.0)
        rounded = round_operand(x, operand, axes=axes, noise=noise, scale=factor)
        limit = clips_above(format.format) / factor
    else:
        rounded = round_operand(x, operand, axes=axes, noise=noise)
        if isinstance(format, Format):
            limit = jnp.float32(clips_above(format))
    underflow, clipped = _count((x != 0) & (rounded == 0)), _count(jnp.abs(x) > limit)
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
    bias, low, high, ratio = _bias_and_ratio(sums[2 * _OPERAND :].astype(np.float64))
    return ProductLoss(name, path, product, operands, bias, low, high, ratio)


def _bias_and_ratio(sums: np.ndarray) -> tuple[float | None, float | None, float | None, float | None]:
    """Returns bias, its interval, and signal to noise."""
    along, squares, error = sums[:GROUPS], sums[GROUPS : 2 * GROUPS], float(sums[-1])
    total = float(squares.sum())
    if not np.isfinite(sums).all() or total < _SMALLEST:
        return None, None, None, None
    bias, ratio = float(along.sum()) / total, math.sqrt(total / error) if error > 0 else math.inf
    used = squares > 0
    if used.sum() < GROUPS or not (squares.sum() - squares > 0).all():
        return bias, None, None, ratio
    without = (along.sum() - along) / (squares.sum() - squares)
    error_of_bias = math.sqrt((GROUPS - 1) / GROUPS * float(((without - without.mean()) ** 2).sum()))
    return bias, bias - _T * error_of_bias, bias + _T * error_of_bias, ratio


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
