"""What half precision does to the numbers in an array: whole numbers, angles, constants, probabilities, random draws.

A `Number` goes along with each value of a jaxpr: bounds, whether it is whole, how far the roundings to half precision
may have moved it. `find` looks at one operation and the numbers of its operands, `follow` says what its result is. They
are the part of `audit` that knows traps T19, T20 and T23, and constants that vanish (T14).

What is unknown is taken to be of order one: an activation in half is no large angle. Sums of activations stay of that
order.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmp.instruments.finding import Counted, Finding, found
from jaxmp.jaxprs import SAME_VALUES
from jaxmp.trees import HALF

ANGLE_ERROR = 2.0**-4
"""error of an angle, in radians, from which on its sine is reported"""


@dataclasses.dataclass(frozen=True)
class Number:
    """What is known of the numbers in an array."""

    known: float | None = None
    """the one number that all elements are, before it is rounded to half"""
    whole: bool = False
    """whole numbers"""
    levels: float = math.inf
    """of whole numbers: how many different ones there may be"""
    count: bool = False
    """of whole numbers: how many of something there are, such as the sum of a mask"""
    low: float = -1.0
    """lower bound; -1 if unknown"""
    high: float = 1.0
    """upper bound; 1 if unknown"""
    position: bool = False
    """made of arguments, constants and whole numbers, one by one or by outer products: a position, a time, an angle"""
    spread: bool = False
    """broadcast along an axis"""
    error: float = 0.0
    """how far roundings to half precision may have moved it"""
    half: Any = None
    """the dtype of the coarsest of these roundings"""
    positive: bool = False
    """0 or above"""
    near_one: str = ""
    """the function that this is a value of, if its values gather at 1, as those of the sigmoid do"""
    coarse: Any = None
    """of such a value: the half precision that it was rounded to"""
    negative: str = ""
    """minus a value of such a function, after rounding"""
    rest: str = ""
    """1 minus a value of such a function, after rounding: what it was made of"""
    exponentials: bool = False
    """a sum of exponentials, or 1 plus one"""
    random: bool = False
    """random bits"""
    eps: Finding | None = None
    """the constant that vanished when it was added to this, or bounded it"""
    factor: Finding | None = None
    """the constant that became 0 when this was multiplied by it"""

    @property
    def largest(self) -> float:
        """Bound of the magnitude."""
        return max(abs(self.low), abs(self.high))


def of_array(x: Any) -> Number:
    """Returns what is known of a constant: a literal, or an array that the function closes over."""
    try:
        array = np.asarray(x).astype(np.float64)
    except (TypeError, ValueError):
        return Number()
    if not array.size or not np.all(np.isfinite(array)):
        return Number(known=float(array)) if array.ndim == 0 else Number()
    low, high = float(array.min()), float(array.max())
    whole = bool(np.all(array == np.round(array))) if array.size <= 2**20 else False
    return Number(
        known=low if low == high else None,
        whole=whole,
        levels=float(len(np.unique(array))) if whole else math.inf,
        low=low,
        high=high,
        position=True,
        positive=low >= 0,
    )


def of_aval(aval: Any, number: Number) -> Number:
    """Returns `number` with what the dtype says of it."""
    dtype = getattr(aval, "dtype", None)
    if dtype is None or not isinstance(dtype, np.dtype) or number.known is not None:
        return number
    if dtype == np.bool_:
        return dataclasses.replace(number, whole=True, levels=2, low=0, high=1, positive=True)
    if jnp.issubdtype(dtype, jnp.integer) and not number.whole:
        bounds = (float(jnp.iinfo(dtype).min), float(jnp.iinfo(dtype).max))
        low, high = bounds if dtype.itemsize == 1 else (-math.inf, math.inf)
        return dataclasses.replace(
            number, whole=True, levels=high - low + 1, low=low, high=high, position=True, positive=low >= 0
        )
    return number


def find(eqn: Any, given: Sequence[Number], place: Counted) -> Iterator[Finding]:
    """Yields the faults of one operation, given what is known of its operands."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    dtype = getattr(out, "dtype", None)
    if name == "bitcast_convert_type" and dtype in HALF and given[0].random:
        what = f"random numbers are drawn in {dtype.name}: one of {2 ** jnp.finfo(dtype).nmant} at most"
        yield found("half random draw", what, dtype, place)
    yield from _find_whole(eqn, given, dtype, place)
    yield from _find_constants(eqn, given, dtype, place)
    if name in ("sin", "cos", "tan") and given[0].error >= ANGLE_ERROR:
        of = "positions" if math.isinf(given[0].largest) else f"angles up to {given[0].largest:.4g}"
        what = f"{name} of {of} that were rounded to {given[0].half.name}"
        yield found("half angle", what, given[0].half, place)
    yield from _find_probabilities(eqn, given, place)


def _find_whole(eqn: Any, given: Sequence[Number], dtype: Any, place: Counted) -> Iterator[Finding]:
    """Whole numbers beyond what half can count, and whole numbers made of what was rounded to half."""
    name = eqn.primitive.name
    if (
        name == "convert_element_type"
        and jnp.issubdtype(dtype, jnp.integer)
        and given[0].half
        and given[0].near_one in ("", "exp")
    ):
        what = f"whole numbers are made of numbers that were rounded to {given[0].half.name}"
        yield found("half whole number", what, given[0].half, place)
    if dtype not in HALF or (name in _SAME and name != "convert_element_type"):
        return
    made = follow(eqn, 0, given, place, exact=True)
    if not (made.whole and _beyond(made, dtype)) or made.known is not None:
        return
    if any(_beyond(number, v.aval.dtype) for v, number in zip(eqn.invars, given, strict=True) if _in_half(v)):
        return
    exact = 2 ** (jnp.finfo(dtype).nmant + 1)
    what = f"{name} makes whole numbers up to {made.largest:.6g} in {dtype.name}, which counts to {exact}"
    yield found("half count" if made.count else "half position", what, dtype, place)


def _find_constants(eqn: Any, given: Sequence[Number], dtype: Any, place: Counted) -> Iterator[Finding]:
    """Constants that vanish where they stand, or of which the use shows that it matters."""
    name = eqn.primitive.name
    rule = "vanished constant"
    if dtype in HALF:
        made = follow(eqn, 0, given, place, exact=True).known
        if made is not None and math.isfinite(made) and name not in _SAME - {"convert_element_type"}:
            kept = _rounded(made, dtype)
            if made and not kept:
                yield found(rule, f"a constant {made:.6g} is 0 in {dtype.name}", dtype, place)
            elif name == "convert_element_type" and abs(made - 1) > 2.0**-25 and kept == 1:
                yield found(rule, f"a constant {made:.10g} is 1 in {dtype.name}", dtype, place)
        if name in ("add", "sub") and len(given) == 2 and all(g.known is not None for g in given):
            larger, smaller = sorted((abs(g.known or 0) for g in given), reverse=True)
            if smaller and made is not None and abs(_rounded(made, dtype)) == larger:
                yield found(
                    rule, f"a constant {smaller:.6g} vanishes beside {larger:.6g} in {dtype.name}", dtype, place
                )
        if name == "mul" and any(math.isinf(_rounded(g.known or 0, dtype)) for g in given):
            yield found(rule, f"a factor that is infinite in {dtype.name}: 0 times it is NaN", dtype, place)
        if name == "div" and given[1].known == 0:
            yield found(rule, f"a divisor that is 0 in {dtype.name}", dtype, place)
    if name in ("lt", "gt") and eqn.invars[0].aval.dtype == np.float16:
        less, more = given if name == "lt" else reversed(given)
        if less.positive and less.known is None and more.known == 0:
            yield found(rule, "what is never negative is compared with a bound that is 0 in float16", np.float16, place)
    divisor = _divisor(eqn, given)
    if divisor is not None and (eps := given[divisor].eps):
        yield eps
    if name in ("add", "sub", "add_any"):
        yield from (g.factor for g in given if g.factor)


def _divisor(eqn: Any, given: Sequence[Number]) -> int | None:
    """The place of the operand that an operation divides by, or takes the logarithm of."""
    name = eqn.primitive.name
    if name == "integer_pow" and eqn.params["y"] < 0:
        return 0
    if name == "pow" and (given[1].known or 0) < 0:
        return 0
    return {"div": 1, "rsqrt": 0, "log": 0, "log2": 0}.get(name)


def _find_probabilities(eqn: Any, given: Sequence[Number], place: Counted) -> Iterator[Finding]:
    """Logarithms of p and of 1 - p, p rounded to half: near 1 nothing is left of the difference (T23)."""
    name, rule = eqn.primitive.name, "half probability"
    if not given:
        return
    divisor = _divisor(eqn, given)
    if divisor is not None and given[divisor].rest:
        what = "log of" if name.startswith("log") else "division by"
        yield found(rule, f"{what} 1 - {given[divisor].rest}", given[divisor].coarse, place)
    elif name in ("log", "log2") and given[0].coarse and given[0].near_one not in _NOT_ITSELF:
        yield found(rule, f"log of a {_words(given[0])}", given[0].coarse, place)
    elif name == "log1p" and given[0].negative:
        yield found(rule, f"log of 1 - {given[0].negative}", given[0].coarse, place)
    elif name in ("atanh", "acos", "asin", "erf_inv") and given[0].coarse:
        yield found(rule, f"{name} of a {_words(given[0])}", given[0].coarse, place)


_NOT_ITSELF = {"exp", "min(x, 1)"}


def _words(number: Number) -> str:
    return f"{number.near_one} that was rounded to {number.coarse.name}"


# What comes of an operation

_SAME = SAME_VALUES | {"slice", "dynamic_slice", "rev", "gather", "squeeze", "reduce_max", "reduce_min"}
_SUMS = {"reduce_sum", "cumsum", "reduce_window_sum", "dot_general", "conv_general_dilated", "scatter-add", "psum"}
_ROUNDING = {"floor", "ceil", "round"}
_INTERVALS: dict[str, Callable[[Number], tuple[float, float]]] = {
    "exp": lambda x: (_exp(x.low), _exp(x.high)),
    "exp2": lambda x: (_exp(x.low * math.log(2)), _exp(x.high * math.log(2))),
    "logistic": lambda x: (0, 1),
    "tanh": lambda x: (-1, 1),
    "erf": lambda x: (-1, 1),
    "sin": lambda x: (-1, 1),
    "cos": lambda x: (-1, 1),
    "neg": lambda x: (-x.high, -x.low),
    "abs": lambda x: (0, x.largest),
    "sign": lambda x: (-1, 1),
    "square": lambda x: (0, x.largest**2 if x.largest < 1e150 else math.inf),
    "sqrt": lambda x: (0, math.sqrt(x.largest)),
    "floor": lambda x: (x.low - 1, x.high),
    "ceil": lambda x: (x.low, x.high + 1),
    "round": lambda x: (x.low - 0.5, x.high + 0.5),
}
_CONSTANT: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "max": max,
    "min": min,
    "neg": lambda a: -a,
    "abs": abs,
    "square": lambda a: a * a,
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "pow": lambda a, b: a**b,
}
"""Operations on constants, in float64."""


def follow(eqn: Any, i: int, given: Sequence[Number], place: Counted, *, exact: bool = False) -> Number:
    """Returns what is known of result `i` of an operation.

    Args:
      eqn: the equation.
      i: the place of the result.
      given: what is known of the operands.
      place: where the equation stands.
      exact: whether the result is described before it is rounded to half.
    """
    aval = eqn.outvars[i].aval
    dtype = getattr(aval, "dtype", None)
    made = _made(eqn, i, given, place)
    if exact:
        return made
    if not isinstance(dtype, np.dtype) or not jnp.issubdtype(dtype, jnp.floating):
        return of_aval(aval, dataclasses.replace(made, error=0.0, half=None, coarse=None))
    if dtype not in HALF or _keeps(eqn, made, given, dtype):
        return made
    error = made.error + made.largest * 2.0 ** -(jnp.finfo(dtype).nmant + 1)
    half = dtype if made.half is None or jnp.finfo(dtype).nmant < jnp.finfo(made.half).nmant else made.half
    return dataclasses.replace(made, error=error, half=half, coarse=dtype if made.near_one else made.coarse)


def _keeps(eqn: Any, made: Number, given: Sequence[Number], dtype: Any) -> bool:
    """Whether the rounding of a result to half loses nothing."""
    name = eqn.primitive.name
    if made.known is not None or (made.whole and not _beyond(made, dtype) and math.isfinite(made.largest)):
        return True
    if name == "mul" and any(_power_of_two(g.known) for g in given):
        return True
    if name == "convert_element_type":
        return eqn.invars[0].aval.dtype == dtype
    chosen = _SAME | {"neg", "abs", "max", "min", "select_n", "clamp", "concatenate", "sign", "pad", "copy"} | _ROUNDING
    return name in chosen and all(v.aval.dtype == dtype for v in eqn.invars[-1:])


def _made(eqn: Any, i: int, given: Sequence[Number], place: Counted) -> Number:
    """What an operation makes, before it is rounded."""
    name, aval = eqn.primitive.name, eqn.outvars[i].aval
    if name == "iota":
        last = aval.shape[eqn.params["dimension"]] - 1
        return Number(whole=True, levels=last + 1, low=0, high=last, position=True, positive=True)
    if name == "random_bits":
        return Number(random=True)
    if not given:
        return Number()
    first = given[0]
    if name in _SAME or name == "sort":
        return _same(eqn, given[i] if name == "sort" else first)
    if name in ("argmax", "argmin"):
        last = max(eqn.invars[0].aval.shape, default=1)
        return Number(whole=True, levels=last + 1, low=0, high=last, positive=True)
    if name in _SUMS:
        return _sum(eqn, given)
    if name in _BITS and any(g.random for g in given):
        return Number(random=True)
    if name not in _ELEMENTWISE:
        return Number()
    return _elementwise(eqn, given, place)


_BITS = {"shift_right_logical", "shift_left", "or", "and", "xor", "add", "sub", "mul"}
_ELEMENTWISE = {
    *("add", "sub", "mul", "div", "max", "min", "rem", "pow", "integer_pow", "select_n", "clamp", "concatenate", "pad"),
    *("log", "log1p", "log2", "rsqrt", "sign", "square", "add_any", "expm1", "cbrt"),
    *_INTERVALS,
}


def _same(eqn: Any, number: Number) -> Number:
    name = eqn.primitive.name
    if name == "broadcast_in_dim" and eqn.invars[0].aval.size > 1 and number.known is None:
        before, after = eqn.invars[0].aval, eqn.outvars[0].aval
        return dataclasses.replace(number, spread=number.spread or after.size > before.size or after.ndim > before.ndim)
    if name in ("reshape", "expand_dims"):
        return dataclasses.replace(number, spread=number.spread or 1 in eqn.outvars[0].aval.shape)
    if name == "convert_element_type" and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.integer) and not number.whole:
        return dataclasses.replace(number, whole=True, levels=math.inf, low=-math.inf, high=math.inf)
    return number


def _sum(eqn: Any, given: Sequence[Number]) -> Number:
    """Sums, products of matrices and convolutions."""
    name, first = eqn.primitive.name, given[0]
    if name == "dot_general" and _contracted(eqn) == 1:
        spread = [dataclasses.replace(g, spread=True) for g in given]
        return _product(eqn, spread)
    if name in ("dot_general", "conv_general_dilated"):
        terms = _contracted(eqn) if name == "dot_general" else math.inf
        if not all(g.whole for g in given) or math.isinf(terms):
            return Number(error=max(g.error for g in given), half=_coarsest(given))
        bound = terms * _times(given[0].largest, given[1].largest)
        low = 0 if all(g.positive for g in given) else -bound
        count = all(_is_mask(g) for g in given)
        return Number(whole=True, levels=bound - low + 1, count=count, low=low, high=bound, positive=low == 0)
    if name in ("scatter-add", "psum"):
        return Number(positive=all(g.positive for g in given))
    terms = _terms(eqn)
    exponentials = first.near_one == "exp"
    if not first.whole:
        return Number(positive=first.positive, exponentials=exponentials, half=first.half, error=first.error)
    low, high = min(0, _times(terms, first.low)), max(0, _times(terms, first.high))
    known = first.known * terms if first.known is not None and name == "reduce_sum" else None
    levels = 1 if known is not None else _times(terms, first.high - first.low) + 1
    return Number(
        known=known,
        whole=True,
        levels=levels,
        count=_is_mask(first),
        low=low,
        high=high,
        position=name == "cumsum",
        positive=first.positive,
        error=first.error * terms,
    )


def _contracted(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return math.prod(eqn.invars[0].aval.shape[d] for d in contracted)


def _terms(eqn: Any) -> int:
    if eqn.primitive.name == "reduce_window_sum":
        return math.prod(eqn.params["window_dimensions"])
    if eqn.primitive.name == "cumsum":
        return int(eqn.invars[0].aval.shape[eqn.params["axis"]])
    return int(eqn.invars[0].aval.size // max(eqn.outvars[0].aval.size, 1))


def _product(eqn: Any, given: Sequence[Number]) -> Number:
    """Of two arrays, element by element or as an outer product."""
    a, b = given
    corners = [_times(x, y) for x, y in itertools.product((a.low, a.high), (b.low, b.high))]
    low, high = min(corners), max(corners)
    position = a.position and b.position
    known = any(g.known is not None for g in given)
    if position and a.spread and b.spread and not known and not (a.whole and b.whole):
        # Unknown coordinates times frequencies: as far as they may go.
        if any(g.low == -1 and g.high == 1 for g in given):
            low, high = -math.inf, math.inf
    whole = a.whole and b.whole
    levels = a.levels * b.levels if not (a.levels == 0 or b.levels == 0) else 0
    error = _times(a.largest, b.error) + _times(b.largest, a.error)
    if math.isinf(high) and (a.half or b.half):
        error = math.inf
    return Number(
        whole=whole,
        levels=levels,
        low=low,
        high=high,
        position=position,
        spread=a.spread or b.spread,
        error=error,
        half=_coarsest(given),
        positive=(a.positive and b.positive) or eqn.invars[0] is eqn.invars[1],
    )


def _elementwise(eqn: Any, given: Sequence[Number], place: Counted) -> Number:
    name = eqn.primitive.name
    values = given[1:] if name == "select_n" else given[:1] if name == "pad" else given
    number = _bounds(eqn, name, values)
    known = _known(eqn, name, values)
    if known is not None:
        position = number.position
        return dataclasses.replace(of_array(known), position=position)
    return dataclasses.replace(number, **_probability(eqn, name, values), **_constant(eqn, name, values, place))


def _bounds(eqn: Any, name: str, given: Sequence[Number]) -> Number:
    """Bounds, wholeness, error and origin of what an elementwise operation makes."""
    position = all(g.position for g in given)
    whole = all(g.whole for g in given)
    base = Number(
        position=position,
        spread=any(g.spread for g in given),
        half=_coarsest(given),
        error=max(g.error for g in given),
        positive=name in ("exp", "exp2", "logistic", "abs", "sqrt", "square"),
    )
    if name == "mul":
        return _product(eqn, given)
    if name in _INTERVALS:
        low, high = _INTERVALS[name](given[0])
        whole = (whole and name in ("neg", "abs", "sign", "square", *_ROUNDING)) or name in ("sign", *_ROUNDING)
        levels = 3 if name == "sign" else given[0].levels if given[0].whole else math.inf
        growth = _GROWTH.get(name, lambda x, high: 1)(given[0], high)
        error = _times(base.error, growth)
        if name in ("sign",):
            return dataclasses.replace(base, whole=True, levels=3, low=-1, high=1, error=0.0, half=None)
        return dataclasses.replace(base, whole=whole, levels=levels, low=low, high=high, error=error)
    if name in ("add", "sub", "add_any"):
        a, b = given[0], given[1]
        b = dataclasses.replace(b, low=-b.high, high=-b.low) if name == "sub" else b
        if position or whole:
            low, high, error = a.low + b.low, a.high + b.high, a.error + b.error
        else:
            low, high, error = min(a.low, b.low), max(a.high, b.high), base.error
        low, high = (-math.inf if math.isnan(low) else low), (math.inf if math.isnan(high) else high)
        positive = name != "sub" and a.positive and b.positive
        levels = a.levels * b.levels if whole else math.inf
        return dataclasses.replace(base, whole=whole, levels=levels, low=low, high=high, error=error, positive=positive)
    if name in ("max", "min", "select_n", "clamp", "concatenate", "pad"):
        low, high = min(g.low for g in given), max(g.high for g in given)
        if name == "max":
            low = max(g.low for g in given)
        elif name == "min":
            high = min(g.high for g in given)
        elif name == "clamp":
            low, high = given[0].low, given[2].high
        positive = any(g.positive for g in given) if name == "max" else all(g.positive for g in given)
        levels = sum(g.levels for g in given) if whole else math.inf
        return dataclasses.replace(
            base, whole=whole, levels=levels, low=low, high=max(low, high), positive=positive or low > 0
        )
    if name == "div":
        by = given[1]
        scale = abs(by.known) if by.known else 1.0
        integer = whole and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.integer)
        low, high = given[0].low / scale, given[0].high / scale
        if by.known is not None and by.known < 0:
            low, high = -high, -low
        return dataclasses.replace(
            base,
            whole=integer,
            levels=given[0].levels if integer else math.inf,
            low=low,
            high=high,
            error=given[0].error / scale + (_times(by.error, given[0].largest) if by.error else 0.0),
            positive=all(g.positive for g in given),
        )
    if name == "rem":
        bound = given[1].largest if given[1].known is not None else given[0].largest
        levels = min(given[0].levels, bound + 1)
        return dataclasses.replace(base, whole=whole, levels=levels, low=-bound, high=bound)
    if name in ("pow", "integer_pow"):
        return _power(eqn, given, base)
    return base


_GROWTH: dict[str, Callable[[Number, float], float]] = {
    "exp": lambda x, high: high,
    "exp2": lambda x, high: high,
    "square": lambda x, high: 2 * x.largest,
}
"""By how much operations may magnify an error, given their operand and the bound of their result; else not at all."""


def _power(eqn: Any, given: Sequence[Number], base: Number) -> Number:
    if eqn.primitive.name == "integer_pow":
        y = eqn.params["y"]
        if y == 2:
            bound = _times(given[0].largest, given[0].largest)
            return dataclasses.replace(
                base, whole=given[0].whole, levels=given[0].levels, low=0, high=bound, positive=True
            )
        return base
    a, b = given
    if a.known is None or a.known <= 0:
        return base
    ends = [_exp(b.low * math.log(a.known)), _exp(b.high * math.log(a.known))]
    return dataclasses.replace(base, low=min(ends), high=max(ends), positive=True, error=max(ends) * base.error)


def _known(eqn: Any, name: str, given: Sequence[Number]) -> float | None:
    """The constant that an operation makes of constants."""
    values = [g.known for g in given]
    if any(value is None for value in values):
        return None
    if name == "integer_pow":
        return _constant_value(lambda a: a ** eqn.params["y"], values)
    if name == "convert_element_type":
        return values[0]
    if name in ("select_n", "concatenate") and len(set(values)) == 1:
        return values[0]
    if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.integer):
        return None
    return _constant_value(_CONSTANT[name], values) if name in _CONSTANT else None


def _constant_value(operation: Callable[..., float], values: Sequence[Any]) -> float | None:
    try:
        value = operation(*values)
    except (ArithmeticError, ValueError):
        return None
    return value if isinstance(value, float | int) else None


def _probability(eqn: Any, name: str, given: Sequence[Number]) -> dict[str, Any]:
    """What is known of a value near 1, or of 1 minus such a value."""
    first = given[0]
    if name in ("logistic", "tanh", "erf", "exp"):
        return {"near_one": "sigmoid" if name == "logistic" else name}
    if name in _ROUNDING:
        return {"near_one": first.near_one, "coarse": first.coarse}
    if name in ("square", "integer_pow") or (name == "mul" and eqn.invars[0] is eqn.invars[1]):
        near = first.near_one and first.near_one != "exp" and eqn.params.get("y", 2) > 0
        return {"near_one": f"{first.near_one}" if near else "", "coarse": first.coarse if near else None}
    if name == "mul" and any(_is_mask(g) for g in given):
        masked = next((g for g in given if g.near_one), first)
        return {"near_one": masked.near_one, "coarse": masked.coarse}
    if name == "neg":
        coarse = first.coarse
        return {"negative": _words(first) if first.near_one and coarse else "", "coarse": coarse}
    if name in ("add", "sub"):
        a, b = given
        constant = next((g.known for g in given if g.known is not None), None)
        other = b if a.known is not None else a
        if constant is None:
            return {}
        if abs(constant) <= 1e-3 and other.near_one:
            return {"near_one": other.near_one, "coarse": other.coarse}
        if abs(constant) <= 1e-3 and other.rest:
            return {"rest": other.rest, "coarse": other.coarse}
        near_one = abs(constant - 1) < 2.0**-7
        if name == "sub" and a.known is not None and near_one and b.near_one and b.coarse:
            return {"rest": _words(b), "coarse": b.coarse}
        if name == "add" and near_one and other.negative:
            return {"rest": other.negative, "coarse": other.coarse}
        if name == "add" and near_one and other.near_one == "exp":
            return {"exponentials": True}
        return {}
    if name == "div":
        if given[1].exponentials and (first.near_one == "exp" or first.known == 1):
            return {"near_one": "softmax" if first.known is None else "sigmoid"}
        return {}
    if name in ("max", "min", "clamp", "select_n"):
        probability = next((g for g in given if g.near_one), None)
        rest = next((g for g in given if g.rest), None)
        if rest is not None and name != "select_n":
            return {"rest": rest.rest, "coarse": rest.coarse}
        if probability is not None:
            return {"near_one": probability.near_one, "coarse": probability.coarse}
        dtype = eqn.outvars[0].aval.dtype
        bound = given[2].known if name == "clamp" else next((g.known for g in given if g.known is not None), None)
        if name in ("min", "clamp") and dtype in HALF and bound and _rounded(bound, dtype) == 1:
            return {"near_one": "min(x, 1)", "coarse": dtype}
    return {}


def _constant(eqn: Any, name: str, given: Sequence[Number], place: Counted) -> dict[str, Any]:
    """The fact that a constant came out as 0 in half; its use says whether that matters."""
    dtype, rule = eqn.outvars[0].aval.dtype, "vanished constant"
    carried = next((g.eps for g in given if g.eps), None)
    if dtype in HALF:
        zeros = [i for i, g in enumerate(given) if g.known is not None and not _rounded(g.known, dtype)]
        others = [g for g in given if g.known is None]
        if name in ("add", "sub") and zeros and others and (name == "add" or zeros == [1]):
            how = "added to" if name == "add" else "subtracted from"
            what = f"a constant that is 0 in {dtype.name} is {how} a divisor (eps?)"
            return {"eps": found(rule, what, dtype, place)}
        if dtype == np.float16 and others and name in ("max", "clamp", "select_n"):
            if (zeros and name != "clamp") or 0 in zeros:
                what = f"a constant that is 0 in {dtype.name} bounds a divisor (eps?)"
                return {"eps": found(rule, what, dtype, place)}
        if dtype == np.float16 and name == "mul" and zeros and others:
            what = f"a factor that is 0 in {dtype.name}, of what is added to something"
            return {"factor": found(rule, what, dtype, place)}
    passing = name in ("mul", "sqrt", "square", "integer_pow", "abs", "neg", "min") or (
        name == "pow" and given[1].known is not None
    )
    return {"eps": carried} if passing and carried else {}


def _coarsest(given: Sequence[Number]) -> Any:
    halves = [g.half for g in given if g.half is not None]
    return min(halves, key=lambda dtype: jnp.finfo(dtype).nmant, default=None)


def _beyond(number: Number, dtype: Any) -> bool:
    """Whether whole numbers are too large, and too many, for a half precision to keep them apart."""
    exact = 2 ** (jnp.finfo(dtype).nmant + 1)
    return number.whole and exact < number.largest < math.inf and number.levels > exact


def _rounded(x: float, dtype: Any) -> float:
    with np.errstate(all="ignore"):
        return float(np.float64(x).astype(dtype))


def _in_half(v: Any) -> bool:
    return getattr(v.aval, "dtype", None) in HALF


def _is_mask(number: Number) -> bool:
    return number.whole and number.low >= 0 and number.high <= 1


def _power_of_two(x: float | None) -> bool:
    return bool(x) and math.isfinite(x or 0) and abs(math.frexp(x or 0)[0]) == 0.5


def _times(a: float, b: float) -> float:
    return a * b if a and b else 0.0


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
