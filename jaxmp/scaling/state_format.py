"""`state_format`: stores the state of any optax optimizer in a block format, such as 8 bits a number instead of 32.

    tx = state_format(optax.adam(1e-3), mu="e4m3:block128", nu="e4m3:block128", expand_range=True)

Between two steps, the named fields of the state are `PackedArray`s: elements and scales in as many bits as the format
has. In each step they are unpacked to float32, the optimizer runs in float32, and its new state is packed again.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp.errors import InputError, nearest
from jaxmp.precision.blocks import BlockFormat, Element, PackedBlocks, pack, parse_block_format
from jaxmp.precision.formats import Format, Rounding
from jaxmp.trees import is_castable, strongly_typed, upcast

ROUNDINGS = ("stochastic", "nearest")
"""values of `rounding`; the first is the default"""

EXPANDED = "expanded"
"""the word for range expansion in the text that `parse_state_format` reads"""

POWERS = (0.25, 16.0)
"""The smallest and the largest power of range expansion. At 1/4, the spacing of the stored numbers is four times that
of the format's, and 2^71 lies between the smallest and the largest that e4m3 can hold."""


class StateFormatState(NamedTuple):
    """The optimizer state of `state_format`."""

    inner_state: Any
    """state of the inner optimizer; the arrays of the named fields are `PackedArray`s"""
    steps: jax.Array
    """number of steps so far, int32 scalar; stochastic rounding draws other random bits in each step"""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("blocks", "powers"), meta_fields=("shape", "outer"))
@dataclasses.dataclass(frozen=True)
class PackedArray:
    """An array of an optimizer's state, in a block format."""

    blocks: PackedBlocks
    """elements and scales, of the array in C order: blocks of one length run over all of it"""
    powers: jax.Array | None
    """bfloat16, one for each block: magnitudes were raised to this power before rounding; None without expansion"""
    shape: tuple[int, ...]
    """shape of the array"""
    outer: int = 0
    """number of `state_format`s around the one that packed the array; they leave it as it is"""

    @property
    def format(self) -> BlockFormat:
        """The block format."""
        return self.blocks.format

    def unpack(self) -> jax.Array:
        """Returns the array, float32."""
        numbers = self.blocks.unpack()
        if self.powers is not None:
            numbers = _compressed(numbers, self.powers.astype(jnp.float32), self.format)
        return numbers.reshape(self.shape)


def state_format(
    inner: optax.GradientTransformation,
    *,
    rounding: Rounding = "stochastic",
    expand_range: bool = False,
    seed: int = 0,
    **formats: BlockFormat | str,
) -> optax.GradientTransformationExtraArgs:
    """Stores fields of the state of `inner` in block formats; all arithmetic is in float32, as in `float32_math`.

    `inner` gets gradients and parameters in float32 (float64 stays float64), whatever their dtypes, and its packed
    state in float32. The updates are float32. Blocks of one length run over each array in C order, so that only its
    last block may be short. Scalars and arrays that are not floats are stored as they are.

    In an optimizer that divides by the square root of a moment, as Adam does, a number of `nu` that is rounded to 0
    makes a large update: Adam with e4m3:block128 diverges (experiments/optimizer_state). Range expansion (COAT)
    prevents it: a block of magnitudes x is stored as x^k, with k such that
    the smallest non-zero magnitude of the block and its largest are the smallest and the largest number of the element
    format; k is from 1/4 to 16. With stochastic rounding, the mean of what is stored is still x.

    Args:
      inner: any optax transformation; place it inside `loss_scaling`, which leaves the state of a skipped step as it
        was.
      rounding: `stochastic` rounds without bias where the scale rule clips nothing (`BlockFormat.unbiased`), so that
        slow decay is not lost: of b2 = 0.999 with 3 mantissa bits, rounding to nearest loses all of it. `nearest`
        rounds ties to even.
      expand_range: expand the dynamic range of each block. It needs blocks of one length with float32 scales, and adds
        2 bytes a block.
      seed: seed of stochastic rounding. The random bits depend only on it, the step and the place in the state, so that
        replicas agree and a resumed run continues to the bit. Two `state_format` with the same seed draw the same bits:
        give each its own.
      formats: the format of each field of the state by its name, such as `mu`, `nu`, or `trace`: a `BlockFormat` or its
        name. Attributes of the parameters, such as those of an Equinox module, are not fields of the state. To round
        fields differently, nest two `state_format`: the outer one leaves what the inner one stores as it is.

    Raises:
      InputError: a format or `rounding` is unknown; no field is named; range expansion with other scales. In `init`:
        the state of `inner` has no float array in a field of that name.

    >>> tx = state_format(optax.adam(1e-3), mu="e4m3:block128", nu="e4m3:block128", expand_range=True)
    >>> adam = tx.init({"w": jnp.ones((256, 128))}).inner_state[0]
    >>> adam.nu["w"].blocks.elements.dtype, adam.nu["w"].blocks.nbytes, adam.nu["w"].powers.shape
    (dtype('uint8'), 33792, (256, 1))

    Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, 2110.02861 (blockwise state); Xi et al.
    2025, COAT, 2410.19313, section 4.1 (range expansion).
    """
    if not formats:
        raise InputError(
            "state_format: no field of the state is named; expected the format of each, such as mu='e4m3:block128'"
        )
    if rounding not in ROUNDINGS:
        raise InputError(
            f"state_format: rounding={rounding!r}; expected {' or '.join(ROUNDINGS)}{nearest(str(rounding), ROUNDINGS)}"
        )
    parsed = {name: _format_of(name, format) for name, format in formats.items()}
    for name, format in parsed.items():
        if expand_range and (format.scale != "f32" or isinstance(format.block, str) or len(format.block) > 1):
            raise InputError(
                f"state_format: {name}={str(format)!r} with range expansion; expected blocks of one length with "
                "float32 scales, such as e4m3:block128, or no expansion"
            )
    if not isinstance(inner, optax.GradientTransformation):  # such as optax.MultiSteps, which only has init and update
        inner = optax.GradientTransformationExtraArgs(inner.init, inner.update)
    inner = optax.with_extra_args_support(inner)
    keys = functools.partial(_keys, seed) if rounding == "stochastic" else _no_keys

    def init(params: Any) -> StateFormatState:
        steps, seen, packed = jnp.array(0, jnp.int32), set[str](), set[str]()
        next_key = keys(steps)

        def stored(fields: list[str], x: Any) -> Any:
            if isinstance(x, PackedArray):
                return dataclasses.replace(x, outer=x.outer + 1)
            if not is_castable(x) or not x.ndim:
                return strongly_typed(x)
            seen.update(fields)
            name = next((name for name in fields if name in parsed), None)
            if name is None:
                return strongly_typed(x)
            packed.add(name)
            return _pack(x, parsed[name], rounding, next_key(), expand_range)

        state = map_with_fields(stored, inner.init(_upcast_all(params)), params)
        # Without parameters, as where a step is checked before there are any, there is nothing to look for.
        for name in parsed.keys() - packed if jax.tree.leaves(params) else ():
            raise InputError(
                f"state_format: {name}={str(parsed[name])!r}, but the state of the optimizer has no arrays in a field "
                f"{name!r}{nearest(name, seen) or '; it has ' + (', '.join(sorted(seen)) or 'none')}"
            )
        return StateFormatState(inner_state=state, steps=steps)

    def update(grads: Any, state: StateFormatState, params: Any = None, **extra: Any) -> tuple[Any, StateFormatState]:
        def unpacked(x: Any) -> Any:
            if not isinstance(x, PackedArray):
                return x
            return dataclasses.replace(x, outer=x.outer - 1) if x.outer else x.unpack()

        inner_state = jax.tree.map(unpacked, state.inner_state, is_leaf=_is_packed)
        updates, new = inner.update(_upcast_all(grads), inner_state, _upcast_all(params), **extra)
        next_key = keys(state.steps + 1)  # `init` drew the bits of step 0

        def stored(old: Any, x: Any) -> Any:
            if not isinstance(old, PackedArray):
                is_plain = not jnp.issubdtype(old.dtype, jax.dtypes.extended)
                return jnp.asarray(x, old.dtype) if is_plain else x
            if old.outer:
                return dataclasses.replace(x, outer=old.outer)
            return _pack(x, old.format, rounding, next_key(), old.powers is not None)

        new = jax.tree.map(stored, state.inner_state, new, is_leaf=_is_packed)
        return updates, StateFormatState(new, state.steps + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def parse_state_format(text: str) -> dict[str, Any]:
    """Parses the text of a state format: the keyword arguments of `state_format` that it stands for.

    The text has parts with a comma between them: `FIELD=FORMAT` for each field of the state; `nearest` or `stochastic`
    (the default); and `expanded`, for range expansion.

    >>> parse_state_format("mu=e4m3:block128, nu=block128, nearest, expanded")
    {'mu': 'block128', 'nu': 'block128', 'rounding': 'nearest', 'expand_range': True}

    Raises:
      InputError: a format or a word is unknown, a part appears twice, or no field is named.
    """
    found: dict[str, Any] = {}
    words = (*ROUNDINGS, EXPANDED)
    for part in (part.strip() for part in text.split(",")):
        name, equals, format = (each.strip() for each in part.partition("="))
        if equals and name.isidentifier():
            value: Any = str(_format_of(name, format))
        elif part in ROUNDINGS:
            name, value = "rounding", part
        elif part == EXPANDED:
            name, value = "expand_range", True
        else:
            raise InputError(
                f"state format {text!r}: {part!r} is not understood; expected FIELD=FORMAT, such as mu=e4m3:block128, "
                f"or one of {', '.join(words)}{nearest(part, words)}"
            )
        if name in found:
            raise InputError(f"state format {text!r}: {part!r} is a second {name}; expected one")
        found[name] = value
    state_format(optax.identity(), **found)  # the checks that need no state
    return found


def _format_of(name: str, format: BlockFormat | str) -> BlockFormat:
    if isinstance(format, BlockFormat):
        return format
    try:
        return parse_block_format(format)
    except InputError as error:
        raise InputError(f"state_format: {name}={format!r}: {error}") from error


def _upcast_all(tree: Any) -> Any:
    return jax.tree.map(upcast, tree)


def _is_packed(x: Any) -> bool:
    return isinstance(x, PackedArray)


def map_with_fields(function: Callable[[list[str], Any], Any], state: Any, params: Any) -> Any:
    """Maps `function(fields, leaf)` over the state of an optimizer; a `PackedArray` is a leaf.

    `fields` are the names of the attributes on the path of the leaf, but for attributes of nodes that come from the
    parameters. A node comes from the parameters if these have a node of its type: a mask or a partition changes the
    structure of the parameters in the state, but not the types of the nodes that stay.
    """
    types_of_params, types = set[type](), dict[Any, type]()

    def note(node: Any) -> bool:
        types_of_params.add(type(node))
        return False

    def note_path(path: Any, node: Any) -> bool:
        types[path] = type(node)
        return _is_packed(node)

    def mapped(path: Any, leaf: Any) -> Any:
        attributes = [(path[:i], key.name) for i, key in enumerate(path) if isinstance(key, jax.tree_util.GetAttrKey)]
        return function([name for node, name in attributes if types[node] not in types_of_params], leaf)

    jax.tree.leaves(params, is_leaf=note)
    return jax.tree_util.tree_map_with_path(mapped, state, is_leaf=note_path, is_leaf_takes_path=True)


def _keys(seed: int, steps: jax.Array) -> Any:
    """A function that returns the key of the next array of the state at each call."""
    key, place = jax.random.fold_in(jax.random.key(seed), steps), itertools.count()
    return lambda: jax.random.fold_in(key, next(place))


def _no_keys(steps: jax.Array) -> Any:
    del steps
    return lambda: None


def _pack(x: Any, format: BlockFormat, rounding: Rounding, key: jax.Array | None, expand_range: bool) -> PackedArray:
    shape, numbers = jnp.shape(x), jnp.asarray(x, jnp.float32).reshape(_stored_shape(jnp.shape(x), format))
    powers = None
    if expand_range:
        powers, numbers = _expanded(numbers, format, stochastic=key is not None)
    return PackedArray(pack(numbers, format, rounding=rounding, key=key), powers, shape)


def _stored_shape(shape: tuple[int, ...], format: BlockFormat) -> tuple[int, ...]:
    """The shape under which an array is packed.

    Flat, unless its blocks are the same without: where the state is split over devices, so is the array.
    """
    if isinstance(format.block, str):
        return shape
    if len(format.block) == 2:
        return shape if len(shape) > 1 else (1, *shape)
    return shape if shape[-1] % format.block[0] == 0 else (math.prod(shape),)


# Range expansion. A block of magnitudes x with the largest a is stored as a (x/a)^k, whose largest is a too.


def _expanded(x: jax.Array, format: BlockFormat, stochastic: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the power k of each block, bfloat16, and the numbers to be rounded to `format`."""
    shares, largest = _shares(x, format)
    smallest = jnp.min(jnp.where(shares > 0, shares, 1), axis=-1, keepdims=True)
    wanted = math.log2(format.element.max / _quantum(format.element))
    power = jnp.clip(wanted / jnp.maximum(-jnp.log2(smallest), wanted / POWERS[1]), *POWERS)
    # Rounded down to bfloat16, so that the smallest magnitude stays at or above the smallest number of the format.
    bits = jax.lax.bitcast_convert_type(power, jnp.uint32) & np.uint32(0xFFFF0000)
    power = jax.lax.bitcast_convert_type(bits, jnp.float32)
    raised = _raised(shares, power)
    if stochastic:
        raised = _unbiased(shares, raised, power, format.element)
    return power[..., 0].astype(jnp.bfloat16), _joined(largest * raised, x)


def _compressed(x: jax.Array, powers: jax.Array, format: BlockFormat) -> jax.Array:
    """Undoes `_expanded`, of numbers that were rounded since."""
    shares, largest = _shares(x, format)
    return _joined(largest * _raised(shares, 1 / powers[..., None]), x)


def _shares(x: jax.Array, format: BlockFormat) -> tuple[jax.Array, jax.Array]:
    """Splits the last axis into blocks; returns magnitudes as shares of the largest of their block, and the largest.

    The largest is NaN if the block holds an infinity or NaN, which makes all of it NaN, as the format does.
    """
    assert isinstance(format.block, tuple)
    (length,) = format.block
    magnitude = jnp.abs(x)
    magnitude = jnp.pad(magnitude, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % length)])
    magnitude = magnitude.reshape(*x.shape[:-1], magnitude.shape[-1] // length, length)
    magnitude = jnp.where(magnitude < _NORMAL, 0, magnitude)  # XLA takes no logarithm of subnormal numbers (trap T10)
    finite = jnp.all(jnp.isfinite(magnitude), axis=-1, keepdims=True)  # XLA:CPU's maximum misses a NaN (trap T18)
    largest = jnp.where(finite, jnp.max(magnitude, axis=-1, keepdims=True, initial=0), jnp.nan)
    shares = jnp.where(largest > 0, magnitude / jnp.where(largest > 0, largest, 1), 0)
    return jnp.where(shares < _NORMAL, 0, shares), largest


def _joined(magnitude: jax.Array, like: jax.Array) -> jax.Array:
    """Undoes the splitting of `_shares`, and puts the signs of `like` on magnitudes."""
    whole = magnitude.reshape(*like.shape[:-1], math.prod(magnitude.shape[-2:]))[..., : like.shape[-1]]
    return jnp.copysign(whole, like)


def _raised(shares: jax.Array, power: jax.Array) -> jax.Array:
    """Returns `shares ** power`, for shares from 0 to 1."""
    return jnp.where(shares > 0, jnp.exp2(power * jnp.log2(jnp.where(shares > 0, shares, 1))), 0)


def _unbiased(shares: jax.Array, raised: jax.Array, power: jax.Array, element: Element) -> jax.Array:
    """Moves raised shares between their two neighbours in the element format, so that rounding is unbiased in `shares`.

    Stochastic rounding rounds up with the share of the way from one neighbour to the other. Here it is to be the share
    of the way that the numbers have gone before they were raised.
    """
    scaled = raised * element.max
    quantum = jnp.full_like(scaled, _quantum(element))
    if isinstance(element, Format):
        quantum = jnp.maximum(jnp.exp2(jnp.floor(jnp.log2(_at_least(scaled))) - element.mantissa_bits), quantum)
    low = jnp.floor(scaled / quantum) * quantum
    high = jnp.minimum(low + quantum, element.max)
    back_low, back_high = (_raised(each / element.max, 1 / power) for each in (low, high))
    way = (shares - back_low) / jnp.where(back_high > back_low, back_high - back_low, 1)
    return (low + jnp.clip(way, 0, 1) * (high - low)) / element.max


def _at_least(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, _NORMAL)


_NORMAL = np.float32(2.0**-126)
"""the smallest normal number of float32"""


def _quantum(element: Element) -> float:
    """The smallest positive number of an element format."""
    return element.smallest_subnormal if isinstance(element, Format) else 2.0**-element.fraction_bits
