"""Ranges by block: how large the blocks of a recipe's operands are, which scales they have, and which of them clip.

    measure = make_block_ranges(loss_fn)
    for operand in measure(params, model_state, jnp.float32(1), batch, key).read():
        print(operand.layer, operand.product, operand.role, operand.amax.exponents, operand.first_clipped)

The step runs as it does in training, under its own recipe. What each operand of each product is rounded from is
measured where it is multiplied, and no result changes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmp.instruments.product_sums import make_product_sums
from jaxmp.instruments.ranges import Counts, Range, count, decoded, encoded, encoded_size, number_of, whole
from jaxmp.modules.products import ObservedProduct
from jaxmp.precision.blocks import BlockFormat, BlockScales, Element, Integer, block_scales, clips_above
from jaxmp.precision.formats import Format
from jaxmp.precision.product import block_axes, largest_magnitude, split_groups, transformed
from jaxmp.precision.recipe import ROLES, Delayed, Recipe, RecipeOperand
from jaxmp.training.batch import LossFn
from jaxmp.training.objective import EVERYTHING


class Block(NamedTuple):
    """One block of an operand."""

    place: tuple[int, ...]
    """its place among the blocks: along an axis of the operand without blocks, the place of the number; the operand has
    the axes (..., rows, features), those of weights are (..., input features, output features), and a convolution's
    are its own"""
    amax: float
    """largest finite magnitude of the block; 0 if it holds an infinity or NaN"""
    scale: float
    """its scale; NaN if it holds an infinity or NaN"""

    def __str__(self) -> str:
        return f"block ({', '.join(map(str, self.place))}) with amax {self.amax:.4g} and scale {self.scale:.4g}"


@dataclasses.dataclass(frozen=True)
class OperandBlocks:
    """The blocks of one operand of a product of a layer, before it is rounded."""

    layer: str
    """path of the module"""
    product: str
    """`fprop`, `dgrad` or `wgrad`"""
    role: str
    """`activations`, `weights` or `gradients`; these are times the loss scale"""
    format: str
    amax: Range
    """largest finite magnitudes of the blocks; blocks with an infinity or NaN are counted as NaN"""
    scales: Range
    """scales of the blocks; those of blocks with an infinity or NaN are NaN"""
    numbers: int
    clipped: int
    """how many numbers are clipped to the largest of the format in their block: under stochastic rounding all that are
    above it, under rounding to nearest those more than half a step above it"""
    clipped_blocks: int
    """how many blocks have such a number"""
    first_clipped: Block | None
    """the first of these, in C order; None if there is none, or if the layer runs several times"""
    first_nonfinite: Block | None
    """the first block with an infinity or NaN; None as `first_clipped`"""

    @property
    def blocks(self) -> int:
        """The number of blocks, over all runs of the layer."""
        return self.amax.size

    @property
    def name(self) -> str:
        """Layer, product and role, such as `Dense_0 wgrad gradients`."""
        return f"{self.layer or '(model)'} {self.product} {self.role}"

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as dicts, lists, strings and numbers."""
        own = {name: getattr(self, name) for name in ("layer", "product", "role", "format", "numbers", "clipped")}
        first = {
            name: None if block is None else {"place": list(block.place), "amax": block.amax}
            for name, block in (("first_clipped", self.first_clipped), ("first_nonfinite", self.first_nonfinite))
        }
        ranges = {"amax": self.amax.to_json(), "scales": self.scales.to_json()}
        return {**own, "clipped_blocks": self.clipped_blocks, **first, **ranges}


def block_operands(recipe: Recipe | None) -> tuple[RecipeOperand, ...]:
    """Returns the operands of a recipe that are rounded with scales, in the order of its products.

    A `Delayed` operand is one block, whose scale is that which the step uses.
    """
    operands = () if recipe is None else tuple(recipe.operands())
    return tuple(operand for operand in operands if isinstance(operand.format, BlockFormat | Delayed))


def is_clipped(x: jax.Array, nearest: jax.Array, operand: RecipeOperand) -> jax.Array:
    """Returns which numbers the rounding of an operand clips: bool, shape of `x`; False where a limit is NaN.

    Args:
      x: the numbers.
      nearest: as of `clipping_limit`.
      operand: which operand, its format and rounding.
    """
    limit, element = clipping_limit(nearest, operand), _element(operand)
    if isinstance(element, Integer) and len(set(element.largest_codes)) > 1:
        largest = element.largest_codes[1] * 2.0**-element.fraction_bits
        highest = largest if operand.rounding == "stochastic" else clips_above(element, negative=True)
        # Not by a rounding error of the limit.
        below = nearest * np.float32(highest / clips_above(element) * (1 + 2.0**-20))
        limit = jnp.where(x < 0, below, limit)
    return jnp.abs(x) > limit


def _element(operand: RecipeOperand) -> Element | None:
    format = operand.format
    if isinstance(format, BlockFormat):
        return format.element
    return format.format if isinstance(format, Delayed) else format


def clipping_limit(nearest: jax.Array, operand: RecipeOperand) -> jax.Array:
    """Returns the magnitudes above which the rounding of an operand clips positive numbers.

    Args:
      nearest: the magnitudes above which rounding to nearest clips, as of `BlockScales.limit`: half a step above the
        largest number. Stochastic rounding clips all that is above the largest number.
      operand: which operand, its format and rounding.
    """
    format, element = operand.format, _element(operand)
    if operand.rounding != "stochastic" or element is None:
        return nearest
    highest = clips_above(element)
    if isinstance(format, Format) or (isinstance(format, BlockFormat) and format.scale == "e8m0"):
        # Both limits have one exponent, so their bits differ by a constant, whatever the power of two. A factor would
        # be rounded, and the largest number itself counted as clipped.
        difference = np.float32(highest).view(np.uint32) - np.float32(element.max).view(np.uint32)
        bits = lax.bitcast_convert_type(nearest, jnp.uint32) - difference
        return jnp.where(jnp.isfinite(nearest), lax.bitcast_convert_type(bits, jnp.float32), nearest)
    # Other scales are rounded, and may leave the largest magnitude of a block a little above the largest number.
    return nearest * np.float32(element.max / highest * (1 + 2.0**-20))


def make_block_ranges(
    loss_fn: LossFn,
    *,
    accumulate_steps: int = 1,
    trains: tuple[str, ...] = EVERYTHING,
) -> Callable[..., BlockRanges]:
    """Makes a function that measures the blocks of all operands that recipes round with scales, in one step.

    Measured are all layers whose product a recipe rounds, also within attention, scan, remat and vmap. Blocks of a
    layer that runs several times are counted together. Each group of a grouped convolution has blocks of its own.

    Args:
      loss_fn: a loss function that runs Linen modules under `jaxmp.with_policy`.
      accumulate_steps: number of microbatches of a batch.
      trains: the parameters that are differentiated, see `jaxmp.Objective`.

    Returns:
      `(params, model_state, scale, batch, key) -> BlockRanges`; works under jit.
    """

    shapes: dict[str, dict[RecipeOperand, tuple[int, ...]]] = {}

    def measures(path: str, product: ObservedProduct) -> _Measure | None:
        found = _Measure(block_operands(product.recipe))
        if not found.operands:
            return None
        arrays = {role: product.operand(role, product.result) for role in ROLES}
        shapes[path] = {
            operand: _scales_of(*_multiplied(arrays[operand.role], operand, product), operand, product).of_blocks.shape
            for operand in found.operands
        }
        return found

    gather = make_product_sums(loss_fn, measures, accumulate_steps=accumulate_steps, trains=trains)

    def measure(params: Any, model_state: Any, scale: Any, batch: Any, key: Any) -> BlockRanges:
        shapes.clear()
        found = gather(params, model_state, scale, batch, key)
        return BlockRanges(found, tuple((path, tuple(shapes[path].items())) for path in found))

    return measure


@functools.partial(jax.tree_util.register_dataclass, data_fields=("sums",), meta_fields=("operands",))
@dataclasses.dataclass(frozen=True)
class BlockRanges:
    """What was measured of all operands, on the device."""

    sums: dict[str, jax.Array]
    """by the path of the layer, float32 (operands, sums)"""
    operands: tuple[tuple[str, tuple[tuple[RecipeOperand, tuple[int, ...]], ...]], ...]
    """by the path of the layer: the operands, and how many blocks each has along its axes"""

    def counts(self) -> dict[str, dict[str, Counts]]:
        """The largest magnitudes and the scales of blocks by the name of the operand, for `StepRanges`; traceable."""
        found: dict[str, dict[str, Counts]] = {"block_amax": {}, "block_scales": {}}
        for path, operands in self.operands:
            for i, (operand, _) in enumerate(operands):
                name, sums = f"{path or '(model)'} {operand.product} {operand.role}", self.sums[path][i]
                found["block_amax"][name] = decoded(sums[:_COUNTS])
                found["block_scales"][name] = decoded(sums[_COUNTS : 2 * _COUNTS])
        return found

    def read(self) -> tuple[OperandBlocks, ...]:
        """Fetches what was measured, by layer and operand."""
        sums = jax.device_get(self.sums)
        return tuple(
            _read(path, operand, shape, sums[path][i])
            for path, operands in self.operands
            for i, (operand, shape) in enumerate(operands)
        )


_COUNTS = encoded_size()
_FIRST = 5  # of a block: index in two parts, amax, scale, and whether there is one
_SIZE = 2 * _COUNTS + 4 + 2 * _FIRST + 2  # and numbers of two parts each: clipped, clipped blocks; all


@dataclasses.dataclass(frozen=True)
class _Measure:
    """Sums up the blocks of operands."""

    operands: tuple[RecipeOperand, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(operands, sums)."""
        return len(self.operands), _SIZE

    def __call__(self, product: ObservedProduct, gradient: jax.Array) -> jax.Array:
        """Returns float32 (operands, sums)."""
        return jnp.stack([_measured(product.operand(each.role, gradient), each, product) for each in self.operands])


def _multiplied(x: jax.Array, operand: RecipeOperand, product: ObservedProduct) -> tuple[jax.Array, tuple[int, int]]:
    """The numbers that are rounded, and their axes."""
    x, axes = split_groups(x, product.contraction, operand.role)
    return transformed(x, operand, axes), axes


def _scales_of(x: jax.Array, axes: tuple[int, int], operand: RecipeOperand, product: ObservedProduct) -> BlockScales:
    """The scales with which the numbers are rounded."""
    if isinstance(operand.format, BlockFormat):
        return block_scales(x, operand.format, axis=_axis(operand, axes, x.ndim))
    amax, scale = largest_magnitude(x), 1 / product.scales[operand.role]
    finite = jnp.isfinite(amax)
    scale, amax = jnp.where(finite, scale, jnp.nan), jnp.where(finite, amax, 0)
    limit = scale * clips_above(operand.format.format)  # type: ignore[union-attr]
    of_block, of_numbers = (
        (lambda value: value.reshape((1,) * x.ndim)),
        (lambda value: jnp.broadcast_to(value, x.shape)),
    )
    return BlockScales(of_block(scale), of_numbers(scale), of_block(amax), of_block(limit), of_numbers(limit))


def _axis(operand: RecipeOperand, axes: tuple[int, int], ndim: int) -> tuple[int, ...] | None:
    assert isinstance(operand.format, BlockFormat)
    return None if operand.format.block == "tensor" else block_axes(operand, axes, ndim)


def _measured(x: jax.Array, operand: RecipeOperand, product: ObservedProduct) -> jax.Array:
    """The sums of one operand, float32 (_SIZE,)."""
    numbers, axes = _multiplied(x, operand, product)
    found = _scales_of(numbers, axes, operand, product)
    bad = jnp.isnan(found.of_blocks)
    over = is_clipped(numbers, found.limit_of_numbers, operand)
    clipped = _scales_of(over.astype(jnp.float32), axes, operand, product).amax > 0
    totals = jnp.concatenate([number_of(over), number_of(clipped)]).astype(jnp.float32)
    size = jnp.array([x.size & 0xFFF, x.size >> 12], jnp.float32)
    parts = [encoded(count(jnp.where(bad, jnp.nan, found.amax))), encoded(count(found.of_blocks)), totals]
    parts += [_first(flags, found) for flags in (clipped, bad)]
    return jnp.concatenate([*parts, size])


def _first(flags: jax.Array, found: Any) -> jax.Array:
    """The first block with its flag set, float32 (_FIRST,); zeros if there is none."""
    index = jnp.argmax(jnp.ravel(flags)).astype(jnp.int32)
    amax, scale = (jnp.ravel(each)[index] for each in (found.amax, found.of_blocks))
    values = jnp.stack([index & 0xFFF, index >> 12]).astype(jnp.float32)
    scale = jnp.where(jnp.isnan(scale), 0, scale)  # a sum over turns must not lose what others found
    whole = jnp.concatenate([values, jnp.stack([amax, scale, jnp.float32(1)])])
    return jnp.where(jnp.any(flags), whole, 0)


def _read(path: str, operand: RecipeOperand, shape: tuple[int, ...], sums: np.ndarray) -> OperandBlocks:
    amax, scales = (Range.read(decoded(sums[i * _COUNTS : (i + 1) * _COUNTS])) for i in (0, 1))
    rest = sums[2 * _COUNTS :]
    first = [_block(rest[4 + i * _FIRST :][:_FIRST], shape, bad=i == 1) if amax.exact else None for i in (0, 1)]
    clipped, clipped_blocks, numbers = whole(np.stack([rest[:2], rest[2:4], rest[-2:]])).tolist()
    return OperandBlocks(
        path,
        operand.product,
        operand.role,
        str(operand.format),
        amax=amax,
        scales=scales,
        numbers=numbers,
        clipped=clipped,
        clipped_blocks=clipped_blocks,
        first_clipped=first[0],
        first_nonfinite=first[1],
    )


def _block(values: np.ndarray, shape: tuple[int, ...], *, bad: bool) -> Block | None:
    if not values[4]:
        return None
    index = np.unravel_index(int(values[0]) + (int(values[1]) << 12), shape)
    return Block(tuple(map(int, index)), float(values[2]), float("nan") if bad else float(values[3]))
