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
from jaxmp.modules.products import observed_products
from jaxmp.precision.blocks import BlockFormat, block_scales, clips_above
from jaxmp.precision.formats import Format
from jaxmp.precision.policy import parse_policy
from jaxmp.precision.product import Contraction, block_axes, largest_magnitude, round_operand, transformed
from jaxmp.precision.recipe import PRODUCTS, RECIPES, Delayed, Recipe, RecipeOperand, parse_recipe
from jaxmp.text_table import table
from jaxmp.training.batch import LossFn
from jaxmp.training.gradients import make_gradients
from jaxmp.training.objective import EVERYTHING, fill, trained_view

STALL = math.sqrt(3)
"""Signal to noise of a gradient below which training stalls (Chmiel et al. 2025, FP4 All the Way, 2505.19115)."""

GROUPS = 16
"""number of parts of an array over which the interval of a bias is estimated"""

_T = 2.131449545559323  # the 97.5 % point of Student's t with 15 degrees of freedom

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
    """What one operand of a product loses. Shares are of its numbers that are not zero; None where all are zero."""

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
    """norm of the exact product by the norm of its error; None where the product is zero or not finite, infinity
    without an error"""

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

    Measured are Dense, DenseGeneral and Conv layers, also within attention, scan, remat and vmap; products of a layer
    that runs several times are taken together. Scales of `Delayed` formats are those of the step's own magnitudes.

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

    def measure(params: Any, model_state: Any, scale: Any, batch: Any, key: Any) -> Measurements:
        met: dict[str, None] = {}

        def note(path: str, contraction: Contraction, x: Any, w: Any, y: Any) -> Any:
            met[path] = None
            return y

        def noted(*args: Any) -> Any:  # a function of its own: of `loss_fn`, JAX may know the shapes
            return loss_fn(*args)

        with observed_products(note):
            jax.eval_shape(noted, params, model_state, batch, key)
        if not met:
            raise InputError(
                "what-if: the loss runs no layer with a product (Dense, DenseGeneral, Conv) under a policy; expected a "
                "model of Linen modules, called under jaxmp.with_policy"
            )
        # What is measured comes out as the gradient of an input that changes nothing, and so out of any transformation.
        shape = (len(recipes), len(PRODUCTS), 2 * _OPERAND + _SUMS)
        sinks = {path: jnp.zeros(shape, jnp.float32) for path in met}

        def observed(both: Any, model_state: Any, batch: Any, key: Any) -> Any:
            own, sinks = both

            def tapped(path: str, contraction: Contraction, x: Any, w: Any, y: Any) -> Any:
                return _tap(_Measure(contraction, tuple(recipes.values())), y, x, w, sinks[path])

            with observed_products(tapped):
                return loss_fn(fill(own, params), model_state, batch, key)

        gradients = make_gradients(observed, accumulate_steps=accumulate_steps)
        (_, found), _, _ = gradients((trained_view(params, trains), sinks), model_state, scale, batch, key)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(measure: _Measure, y: jax.Array, x: jax.Array, w: jax.Array, sink: jax.Array) -> jax.Array:
    return y


def _tap_forward(measure: _Measure, y: jax.Array, x: jax.Array, w: jax.Array, sink: jax.Array) -> Any:
    return y, (x, w)


def _tap_backward(measure: _Measure, kept: Any, g: jax.Array) -> Any:
    x, w = kept
    return g, jnp.zeros_like(x), jnp.zeros_like(w), measure(x, w, g)


_tap.defvjp(_tap_forward, _tap_backward)


@dataclasses.dataclass(frozen=True)
class _Measure:
    """Sums up what recipes do to the three products of a layer."""

    contraction: Contraction
    recipes: tuple[Recipe, ...]

    def __call__(self, x: jax.Array, w: jax.Array, g: jax.Array) -> jax.Array:
        """Returns float32 (recipes, products, sums)."""
        arrays = {role: a.astype(jnp.float32) for role, a in (("activations", x), ("weights", w), ("gradients", g))}
        shapes = {"fprop": g.shape, "dgrad": x.shape, "wgrad": w.shape}
        plain = self.contraction.products(())
        exact = {
            product: plain[product](*(arrays[role] for role in roles), shapes[product])
            for product, roles in PRODUCTS.items()
        }
        operands: dict[RecipeOperand, tuple[jax.Array, jax.Array]] = {}  # recipes share some
        found = []
        for recipe in self.recipes:
            products = self.contraction.products(recipe.accumulate)
            for product, roles in PRODUCTS.items():
                own = [recipe.operand(product, role) for role in roles]
                for operand in own:
                    if operand not in operands:
                        operands[operand] = self._operand(arrays[operand.role], operand)
                rounded = products[product](*(operands[operand][0] for operand in own), shapes[product])
                sums = [*(operands[operand][1] for operand in own), _sums(exact[product], rounded)[0]]
                found.append(jnp.concatenate(sums))
        return jnp.stack(found).reshape(len(self.recipes), len(PRODUCTS), -1)

    def _operand(self, x: jax.Array, operand: RecipeOperand) -> tuple[jax.Array, jax.Array]:
        """Returns the operand as it is multiplied, and the sums of what it lost."""
        axes, format = self.contraction.axes[operand.role], operand.format
        x = transformed(x, operand, axes)
        noise = None
        if operand.rounding == "stochastic" and format is not None:
            noise = jax.random.bits(jax.random.key(0), x.shape, jnp.uint32)
        delayed = isinstance(format, Delayed)
        # As if the history held the magnitudes of this step.
        amax = largest_magnitude(x) if delayed else None
        factor = None if amax is None else jnp.where(amax > 0, format.format.max / amax, 1.0)  # type: ignore[union-attr]
        rounded = round_operand(x, operand, axes=axes, noise=noise, scale=factor)
        limit, scales = jnp.float32(jnp.inf), jnp.zeros(3)
        if isinstance(format, BlockFormat):
            along = None if format.block == "tensor" else block_axes(operand, axes)
            found = block_scales(x, format, axis=along)
            limit = found.of_numbers * clips_above(format.element)
            logs = jnp.log2(jnp.where(found.amax > 0, jnp.maximum(found.of_blocks, 2.0**-126), 1))
            scales = jnp.stack([jnp.sum(found.amax > 0).astype(jnp.float32), jnp.sum(logs), jnp.sum(logs**2)])
        elif delayed:
            limit = clips_above(format.format) / factor  # type: ignore[union-attr, operator]
        elif isinstance(format, Format):
            limit = jnp.float32(clips_above(format))
        there = x != 0
        sums, counts = _sums(x, rounded, there, there & (rounded == 0), jnp.abs(x) > limit)
        return rounded, jnp.concatenate([sums, jnp.full(1, x.size, jnp.float32), counts, scales])


def _sums(exact: jax.Array, rounded: jax.Array, *flags: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of error times number and of squares by group, and of squared errors; and how many of each flag are set.

    Returns:
      float32 (2 * GROUPS + 1,), and float32 (len(flags),).
    """
    error = rounded - exact
    columns = [error * exact, exact * exact, error * error, *(flag.astype(jnp.float32) for flag in flags)]
    # One reduction for all: else XLA:CPU rounds the operand anew for each.
    groups = [jnp.pad(jnp.ravel(x), (0, -x.size % GROUPS)).reshape(GROUPS, -1) for x in columns]
    zeros = [np.float32(0)] * len(groups)
    along, squares, errors, *counts = jax.lax.reduce(groups, zeros, _add, (1,))
    sums = jnp.concatenate([along, squares, jnp.sum(errors)[None]])
    return sums, jnp.stack([jnp.sum(each) for each in counts]) if counts else jnp.zeros(0)


def _add(a: Any, b: Any) -> Any:
    return [x + y for x, y in zip(a, b, strict=True)]


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
    if not np.isfinite(sums).all() or total <= 0:
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
