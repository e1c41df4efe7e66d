"""`blame`: finds the operation that made the first inf or NaN in the results of a function.

The function is traced, and its jaxpr is evaluated operation by operation: inside jit, remat, custom derivatives and
conditionals too, and turn by turn in loops. A gradient is one jaxpr, the forward pass and then the backward pass, so
both are evaluated alike. An operation is *suspect* if its operands are finite and its result is not. Blamed is the
first suspect whose non-finite values lead, from operation to operation, to a result of the function. A value that a
`where` masks leads nowhere, and is not blamed.

Infinities that were written on purpose are not suspect: a mask of -inf is finite again after the softmax. An operation
on them is suspect if its result is NaN, or is not finite in an element whose operands were.

Each operation is rounded to its dtype in the jaxpr. A compiled function may keep more precision (trap T6): XLA drops
pairs of casts between two operations of one kernel, and on a CPU it computes float16 and bfloat16 in float32. So an
overflow that is found here may not show on one device, and show on another.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxpr_as_fun

from jaxmp.html.elements import cell_of
from jaxmp.jaxprs import (
    Place,
    bare,
    bind,
    called,
    interpret,
    is_backward,
    is_scaling,
    opened,
    quantized,
    recipe_operand,
    recipe_product,
    scan_counts,
    tracing,
)
from jaxmp.precision.blocks import is_block_format
from jaxmp.precision.formats import parse_format
from jaxmp.text_table import table
from jaxmp.trees import is_inexact, path_name

_LOOPS = ("scan", "while")

_BY_ELEMENT = {
    *("abs", "add", "add_any", "sub", "mul", "div", "neg", "max", "min", "rem", "sign", "square", "clamp", "select_n"),
    *("exp", "exp2", "expm1", "log", "log1p", "pow", "integer_pow", "sqrt", "rsqrt", "cbrt", "logistic", "tanh"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "asinh", "acosh", "atanh"),
    *("erf", "erfc", "erf_inv", "lgamma", "digamma", "floor", "ceil", "round", "convert_element_type", "copy"),
}
"""Elementwise operations: bad values are followed through them element by element."""

ON_HOST = 2**16
"""Arrays with up to as many numbers are checked on the host, which compiles nothing; on a CPU, all arrays are."""

AS_WRITTEN = {"xla_allow_excess_precision": False}
"""Options for `jax.jit` that round every operation to its dtype, inside compiled loops too (trap T6)."""


class Magnitudes(NamedTuple):
    """The numbers in an operand or a result of an operation: their magnitudes, and how many are not finite."""

    name: str
    """`operand 0`, `result`"""
    dtype: str
    """name of the dtype, or of the emulated format"""
    shape: tuple[int, ...]
    smallest: float
    """smallest finite magnitude other than 0; 0 if there is none"""
    largest: float
    """largest finite magnitude"""
    limit: float
    """largest number of the dtype or format"""
    zeros: int
    """how many are 0"""
    inf: int
    """how many are inf"""
    minus_inf: int
    """how many are -inf"""
    nan: int
    """how many are NaN"""

    @property
    def bad(self) -> str:
        """The kinds of values that are not finite, such as `inf and NaN`."""
        return " and ".join(name for name, n in self._bad() if n)

    def _bad(self) -> list[tuple[str, int]]:
        return [("inf", self.inf), ("-inf", self.minus_inf), ("NaN", self.nan)]

    def __str__(self) -> str:
        counted = [f"{n:,} {name}" for name, n in [*self._bad(), ("zero", self.zeros)] if n]
        parts = [f"{' and '.join(counted)} of {math.prod(self.shape):,}"] if counted else []
        if self.largest:
            parts.append(f"magnitudes {self.smallest:.5g} to {self.largest:.5g}")
        return f"{self.dtype}[{','.join(map(str, self.shape))}]: {', '.join(parts)}"


@dataclasses.dataclass(frozen=True)
class Blame:
    """The operation, or argument, whose non-finite value is the first that reaches a result of the function.

    `print` shows a table; `to_json` returns the same for programs.
    """

    primitive: str
    """JAX's name of the operation, jaxmp's name of its own operations, or `argument` if the value was given"""
    value: str
    """kind of value: inf, -inf, NaN, or several of them"""
    backward: bool
    """whether the operation is in the backward pass"""
    path: str
    """modules or named scopes around it, the class of the model first; of an argument, its path in the pytree"""
    source: str
    """file:line of the user's code, or "" """
    turns: tuple[tuple[int, int], ...]
    """for each loop around it, outermost first: the index in what is scanned over, from 0, and the length; the length
    of a while loop is 0"""
    result: Magnitudes
    """its result"""
    operands: tuple[Magnitudes, ...]
    """its float operands"""
    reaches: tuple[str, ...]
    """paths of the function's results that are not finite"""
    note: str = ""
    """further explanation, or "" """

    @property
    def what(self) -> str:
        """The finding in a few words, such as `inf from dot_general in Net/head, backward`."""
        if self.primitive == "argument":
            return f"{self.value} in the argument {self.path}"
        where = f" in {self.path}" if self.path else ""
        turns = "".join(f", turn {at}{f' of {n}' if n else ''}" for at, n in self.turns)
        return f"{self.value} from {self.primitive}{where}{turns}, {'backward' if self.backward else 'forward'}"

    def to_json(self) -> dict[str, Any]:
        """Returns the finding as dicts, lists, strings and numbers."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"result": self.result._asdict(), "operands": [r._asdict() for r in self.operands]}

    def __str__(self) -> str:
        return table(self.rows(), widths=(10,))

    def _repr_html_(self) -> str:
        """Shows the same in a notebook."""
        return cell_of([str(self)])

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yields the lines of the table: a name and a text each."""
        yield "first", self.what
        if self.source:
            yield "line", _relative(self.source)
        if self.primitive != "argument":
            for operand in self.operands:
                yield operand.name, str(operand)
        yield "result", f"{self.result}; {self.result.dtype} holds up to {self.result.limit:.6g}"
        shown = ", ".join(self.reaches[:3]) + (f" and {len(self.reaches) - 3} more" if len(self.reaches) > 3 else "")
        yield "reaches", shown
        if self.note:
            yield "note", self.note


def blame(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Blame | None:
    """Evaluates `fn(*args, **kwargs)` operation by operation, and finds what made the first inf or NaN in its results.

    Args:
      fn: any function that JAX traces: a loss, `jax.grad` of one, a train step. A Pallas kernel, a callback, or a
        function that is mapped over devices runs as one operation.
      args: its arguments, arrays and Python numbers.
      kwargs: further arguments of `fn`.

    Returns:
      The operation or argument and where it stands; None if all results are finite.

    Raises:
      InputError: `fn` does not trace with these arguments.

    >>> import jax.numpy as jnp
    >>> found = blame(lambda x: jnp.exp(x) / 2, jnp.float16(12))
    >>> found.what
    'inf from exp, forward'
    >>> found.operands[0].largest, found.result.limit
    (12.0, 65504.0)
    """
    return Replay(fn, *args, **kwargs).blame(*args, **kwargs)


class Replay:
    """A function, traced once, that is evaluated operation by operation on arguments of the same shapes and dtypes.

    Arguments and errors are those of `blame`.
    """

    def __init__(self, fn: Callable[..., Any], *args: Any, **kwargs: Any):
        self._names = functools.partial(_argument_names, fn)
        name = getattr(fn, "__name__", type(fn).__name__)
        with tracing(f"blame: {name} does not trace", "a function of arrays, as jax.jit takes it"):
            closed, out = jax.make_jaxpr(lambda args, kwargs: fn(*args, **kwargs), return_shape=True)(args, kwargs)
        self._jaxpr, self._consts = opened(closed)
        self._results = [_joined("result", path) for path, _ in jax.tree_util.tree_leaves_with_path(out)]
        self._machine = _Machine()

    def blame(self, *args: Any, **kwargs: Any) -> Blame | None:
        """Finds what made the first inf or NaN in the results on these arguments, as the function `blame` does."""
        names = self._names(args, kwargs)
        given = [_given(_as_array(x), name) for x, name in zip(jax.tree.leaves((args, kwargs)), names, strict=True)]
        with np.errstate(all="ignore"):  # JAX lets NumPy cast numbers that are known while tracing
            run = self._machine.run(self._jaxpr, [*map(_constant, self._consts), *given], _Place())
        reaches = tuple(name for name, out in zip(self._results, run.out, strict=True) if out.state)
        if not reaches:
            return None
        suspect = run.suspect({i: None for i, out in enumerate(run.out) if out.state is BAD}).suspect
        # Where no operation is suspect, what was put there came through as it was.
        found: Any = suspect or next(x.state.suspect for x in run.out if isinstance(x.state, _Put))
        return dataclasses.replace(found, reaches=reaches)


# What is known of a value: None if it is finite, BAD where some operation made it so, and `_Put` where somebody did.

BAD = "bad"


@dataclasses.dataclass(frozen=True)
class _Put:
    """Infinities or NaN that were given or written, and no more than these."""

    suspect: Blame | None
    """what to blame where nothing else is; None for a constant that no operation has used yet"""
    flags: tuple[bool, bool, bool]
    """whether there is NaN, inf, -inf"""
    given: bool
    """whether in an argument, rather than in a constant"""


class _Value(NamedTuple):
    value: Any
    state: Any


@dataclasses.dataclass(frozen=True)
class _Place(Place):
    """Where an equation stands, and in which turns of the loops around it."""

    turns: tuple[tuple[int, int], ...] = ()
    """place in what is scanned over and length of each loop, as in `Blame.turns`"""


_Wanted = dict[int, np.ndarray | None]
"""bad values that are asked for, by their places: which elements of each, an array of bools, or None for any"""


class _Traced(NamedTuple):
    """Where the non-finite results of some equations come from."""

    suspect: Blame | None
    """the first suspect that leads there"""
    inputs: _Wanted
    """the non-finite inputs that lead there"""


class _Event(NamedTuple):
    """An equation with a result that is not finite."""

    eqn: Any
    bad: set[Any]
    """the variables that are bad after it"""
    came_from: Callable[[_Wanted], _Traced]
    """from bad results, by their places among its outputs, to where they come from, by places among its operands"""


class _Run(NamedTuple):
    """A jaxpr that was evaluated."""

    jaxpr: Any
    out: list[_Value]
    events: list[_Event]

    def suspect(self, outputs: _Wanted) -> _Traced:
        """The first suspect that leads to these of the bad outputs, and the inputs (constants first) that do."""
        wanted: dict[Any, np.ndarray | None] = {}

        def want(v: Any, elements: np.ndarray | None) -> None:
            if not isinstance(v, Literal):
                before = wanted.get(v, elements)
                wanted[v] = None if before is None or elements is None else before | elements

        for i, elements in outputs.items():
            want(self.jaxpr.outvars[i], elements)
        first: Blame | None = None
        for event in reversed(self.events):
            places = {i: wanted[v] for i, v in enumerate(event.eqn.outvars) if v in wanted and v in event.bad}
            if places:
                found = event.came_from(places)
                first = found.suspect or first
                for i, elements in found.inputs.items():
                    want(event.eqn.invars[i], elements)
        inputs = [*self.jaxpr.constvars, *self.jaxpr.invars]
        return _Traced(first, {i: wanted[v] for i, v in enumerate(inputs) if v in wanted})


class _Machine:
    """Evaluates jaxprs; keeps what it compiles for the next time."""

    def __init__(self) -> None:
        self.compiled: dict[Any, Any] = {}

    def run(self, jaxpr: Any, given: Sequence[_Value], place: _Place) -> _Run:
        """Evaluates a jaxpr on the values of its constants and inputs."""
        events: list[_Event] = []

        def equation(eqn: Any, operands: list[_Value]) -> list[_Value]:
            out, came_from = self.equation(eqn, operands, place.at(eqn))
            bad = {v for v, x in zip(eqn.outvars, out, strict=True) if x.state is BAD}
            if bad:
                events.append(_Event(eqn, bad, came_from))
            return out

        out = interpret(jaxpr, given, equation, lambda literal: _constant(literal.val, literal.aval))
        return _Run(jaxpr, out, events)

    def equation(self, eqn: Any, given: list[_Value], place: _Place) -> tuple[list[_Value], Any]:
        """The results of an equation, and where bad ones among them come from."""
        name = eqn.primitive.name
        with eqn.ctx.manager:
            function = called(eqn)
            if function is not None and not _works_on_bits(bare(function)):
                return self.inside(*opened(function), given, place)
            if name == "cond":
                branches = eqn.params["branches"]
                taken = min(max(int(given[0].value), 0), len(branches) - 1)
                out, came_from = self.inside(*opened(branches[taken]), given[1:], place)
                return out, lambda places: _shifted(came_from(places), 1)
            values = [x.value for x in given]
            out = bind(eqn, values) if function is None and name not in _LOOPS else self.whole(eqn)(*values)
        if name == "select_n":
            given = _selected(given)
        states = _states(eqn, given, out, place)
        results = [_Value(x, state) for x, state in zip(out, states, strict=True)]
        if BAD not in states:
            return results, None
        bad_operands = {i for i, x in enumerate(given) if x.state is BAD}
        if name in _LOOPS:
            return results, functools.partial(self.turns, eqn, results, given, place)
        if bad_operands:
            result = results[0].value
            if name in _BY_ELEMENT and all(np.shape(x.value) in ((), result.shape) for x in given):
                return results, _by_element(eqn, given, result, place)
            return results, lambda _: _Traced(None, dict.fromkeys(bad_operands))
        first = next(i for i, state in enumerate(states) if state is BAD)
        suspect = _argument_among(given) if not _is_fresh(out[first], values) else None
        suspect = suspect or _observed(eqn, given, out[first], place)
        return results, lambda _: _Traced(suspect, {})

    def inside(self, jaxpr: Any, consts: list[Any], given: list[_Value], place: _Place) -> tuple[list[_Value], Any]:
        """The results of a function that an equation calls."""
        run = self.run(jaxpr, [*map(_constant, consts), *given], place)
        return run.out, lambda places: _shifted(run.suspect(places), -len(jaxpr.constvars))

    def whole(self, eqn: Any) -> Callable[..., list[Any]]:
        """A loop or a function as one operation, compiled once."""
        if eqn not in self.compiled:
            self.compiled[eqn] = jax.jit(lambda *values: bind(eqn, values), compiler_options=AS_WRITTEN)
        return self.compiled[eqn]

    def turns(self, eqn: Any, results: list[_Value], given: list[_Value], place: _Place, places: _Wanted) -> _Traced:
        """Where bad results of a loop come from: the turn is looked for from the last to the first."""
        loop = _Loop.of(eqn)
        if ("turn", eqn) not in self.compiled:
            self.compiled["turn", eqn] = jax.jit(loop.turn, compiler_options=AS_WRITTEN)
        turn = self.compiled["turn", eqn]
        values = [x.value for x in given]
        seen = _seen_of_turns(loop, turn, values, [x.state for x in given])
        found = _turn_to_blame(loop, seen, set(places))
        if found.turn is None:
            return _Traced(None, dict.fromkeys(found.inputs))
        carry = loop.carry(values)
        for t in range(found.turn):
            carry, _ = turn(values, carry, t)
        inputs = loop.inputs(values, carry, found.turn)
        operands = [_inside(x, given[i].state) for i, x in zip(loop.operands, inputs, strict=True)]
        where = dataclasses.replace(place, turns=(*place.turns, (loop.position(found.turn), loop.length)))
        run = self.run(loop.body, [*map(_constant, opened(loop.closed)[1]), *operands], where)
        bad: _Wanted = {i: None for i in found.outputs if run.out[i].state is BAD}
        # The compiled turn and the one that was run operation by operation may differ in the last bit of a sum.
        suspect = run.suspect(bad).suspect or _observed(eqn, given, results[min(places)].value, where)
        return _Traced(suspect, dict.fromkeys(found.inputs))


# Loops


@dataclasses.dataclass(frozen=True)
class _Loop:
    """A scan or while loop as a function of one turn."""

    closed: Any
    """the body, of `(*constants, *carry, *elements)`, which returns `(*carry, *elements)`"""
    operands: tuple[int, ...]
    """which operand of the equation is each input of the body"""
    num_consts: int
    num_carry: int
    length: int
    """0 where only the condition knows"""
    reverse: bool = False
    goes_on: Callable[..., Any] | None = None
    """of the values of all operands and the carry: whether there is one more turn"""

    @classmethod
    def of(cls, eqn: Any) -> _Loop:
        params, count = eqn.params, len(eqn.invars)
        if eqn.primitive.name == "scan":
            num_consts, num_carry = scan_counts(params)
            body, operands = params["jaxpr"], tuple(range(count))
            return cls(body, operands, num_consts, num_carry, params["length"], params["reverse"])
        of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
        operands = tuple(range(of_cond, count))
        condition = jax.jit(jaxpr_as_fun(params["cond_jaxpr"]))

        def goes_on(values: Sequence[Any], carry: Sequence[Any]) -> bool:
            return bool(condition(*values[:of_cond], *carry)[0])

        return cls(params["body_jaxpr"], operands, of_body, len(operands) - of_body, 0, goes_on=goes_on)

    @property
    def body(self) -> Any:
        """The body without its constants."""
        return bare(self.closed)

    def position(self, turn: int) -> int:
        """The place of a turn in what is scanned over."""
        return self.length - 1 - turn if self.reverse else turn

    def carry(self, values: Sequence[Any]) -> list[Any]:
        """The carry before the first turn."""
        return [values[i] for i in self.operands[self.num_consts : self.num_consts + self.num_carry]]

    def inputs(self, values: Sequence[Any], carry: Sequence[Any], turn: Any) -> list[Any]:
        """What the body is given in a turn."""
        constants = [values[i] for i in self.operands[: self.num_consts]]
        scanned = [values[i] for i in self.operands[self.num_consts + self.num_carry :]]
        elements = [jax.lax.dynamic_index_in_dim(x, self.position(turn), keepdims=False) for x in scanned]
        return [*constants, *carry, *elements]

    def turn(self, values: Sequence[Any], carry: Sequence[Any], turn: Any) -> tuple[list[Any], Any]:
        """The carry after a turn, and what is not finite in the inputs and the outputs of the body: (n, 3) bools."""
        inputs = self.inputs(values, carry, turn)
        out = jaxpr_as_fun(self.closed)(*inputs)
        flags = [
            jnp.stack([_flags(x, jnp) for x in values]) if values else np.zeros((0, 3), bool)
            for values in (inputs, out)
        ]
        return out[: self.num_carry], flags

    @functools.cached_property
    def depends(self) -> list[set[int]]:
        """For each output of the body, the inputs that it depends on."""
        of: dict[Any, frozenset[int]] = {v: frozenset([i]) for i, v in enumerate(self.body.invars)}
        for eqn in self.body.eqns:
            given = [of.get(v, frozenset()) for v in eqn.invars if not isinstance(v, Literal)]
            of |= dict.fromkeys(eqn.outvars, frozenset().union(*given))
        return [set() if isinstance(v, Literal) else set(of.get(v, ())) for v in self.body.outvars]


class _Seen(NamedTuple):
    """What was bad in one turn."""

    inputs: set[int]
    outputs: set[int]


class _Found(NamedTuple):
    turn: int | None
    """the first turn that makes something bad which leads to the results asked for; None if none does"""
    outputs: set[int]
    """the outputs of the body that it makes bad"""
    inputs: set[int]
    """the bad operands of the loop that lead there"""


def _seen_of_turns(loop: _Loop, turn: Any, values: list[Any], states: list[Any]) -> list[_Seen]:
    carry, flags = loop.carry(values), list[Any]()
    while loop.goes_on(values, carry) if loop.goes_on else len(flags) < loop.length:
        carry, seen = turn(values, carry, len(flags))
        flags.append(seen)
    # What was there before the first turn, such as a running maximum of -inf, is allowed to stay.
    put = [_put_flags(states[i]) for i in loop.operands]
    allowed = put[loop.num_consts : loop.num_consts + loop.num_carry]
    none = np.zeros((len(loop.body.outvars) - loop.num_carry, 3), bool)
    after = np.concatenate([np.reshape(allowed, (-1, 3)), none]).astype(bool)
    before = np.reshape(put, (-1, 3)).astype(bool)
    return [_Seen(_places(i & ~before), _places(o & ~after)) for i, o in jax.device_get(flags)]


def _turn_to_blame(loop: _Loop, seen: list[_Seen], places: set[int]) -> _Found:
    """Goes from the last turn to the first, along what each output of the body depends on."""
    carry = {i for i in places if i < loop.num_carry}
    turn, made, operands = None, set[int](), set[int]()
    for t in reversed(range(len(seen))):
        wanted = (carry | {i for i in places if i >= loop.num_carry}) & seen[t].outputs
        inputs = set[int]().union(*(loop.depends[i] for i in wanted)) & seen[t].inputs
        carry = {i - loop.num_consts for i in inputs if loop.num_consts <= i < loop.num_consts + loop.num_carry}
        if wanted and not inputs:
            turn, made = t, wanted
        outside = inputs if t == 0 else inputs - {i + loop.num_consts for i in carry}
        operands |= {loop.operands[i] for i in outside}
    if not seen:  # a loop without a turn returns what it was given
        operands |= {loop.operands[loop.num_consts + i] for i in carry}
    return _Found(turn, made, operands)


# States


def _states(eqn: Any, given: list[_Value], out: list[Any], place: _Place) -> list[Any]:
    """The state of each result of one operation."""
    if any(x.state is BAD for x in given):
        return [None if _is_finite(x) else BAD for x in out]
    return [None if _is_finite(x) else _state_of_first(eqn, given, x, place) for x in out]


def _state_of_first(eqn: Any, given: list[_Value], out: Any, place: _Place) -> Any:
    """The state of a result that is not finite, where no operand is bad."""
    puts = [x.state for x in given if isinstance(x.state, _Put)]
    flags = _flags_of_array(out)
    new = [now and not any(put.flags[i] for put in puts) for i, now in enumerate(flags)]
    # In a loop that begins at -inf anything else is new; elsewhere inf may be -inf with its sign changed.
    if not puts or new[0] or (eqn.primitive.name in _LOOPS and any(new)) or _is_fresh(out, [x.value for x in given]):
        return BAD
    suspect = next((put.suspect for put in puts if put.suspect), None) or _observed(eqn, given, out, place)
    return _Put(suspect, flags, any(put.given for put in puts))


def _selected(given: list[_Value]) -> list[_Value]:
    """The operands of a `select_n`; what is bad only where it was not selected leads nowhere."""
    which = np.asarray(given[0].value)
    cases = (
        x._replace(state=None) if x.state is BAD and not np.any(_lost(x.value) & (which == i)) else x
        for i, x in enumerate(given[1:])
    )
    return [given[0], *cases]


def _by_element(eqn: Any, given: list[_Value], out: Any, place: _Place) -> Callable[[_Wanted], _Traced]:
    """Where the bad elements of an operation element by element come from, some of whose operands are bad."""
    lost = _lost(out)
    which = np.asarray(given[0].value) if eqn.primitive.name == "select_n" else None
    shapes = [np.shape(x.value) for x in given]
    of_operands = {
        i: _lost(x.value) & (True if which is None else which == i - 1) for i, x in enumerate(given) if x.state is BAD
    }
    own = functools.reduce(np.logical_and, (~elements for elements in of_operands.values()), lost)
    # Made here of finite ones, or put there by someone: seldom both, and so not kept until it is asked for.
    suspect = _observed(eqn, given, out, place) if np.any(own) else None

    def came_from(places: _Wanted) -> _Traced:
        wanted = lost if places[0] is None else lost & places[0]
        inputs: _Wanted = {}
        for i, elements in of_operands.items():
            if np.any(wanted & elements):
                inputs[i] = wanted & elements if shapes[i] else None
        return _Traced(suspect if np.any(wanted & own) else None, inputs)

    return came_from


def _lost(x: Any) -> np.ndarray:
    """Which elements are not finite."""
    return ~np.isfinite(np.asarray(x))


def _is_fresh(out: Any, operands: list[Any]) -> bool:
    """Whether an operation element by element made one that is not finite of such as are."""
    floats = [np.isfinite(np.asarray(x)) for x in operands if is_inexact(x)]
    if any(finite.shape not in ((), out.shape) for finite in floats):
        return False
    return bool(np.any(functools.reduce(np.logical_and, floats, ~np.isfinite(np.asarray(out)))))


def _constant(x: Any, aval: Any = None) -> _Value:
    value = x if hasattr(x, "dtype") else jnp.asarray(x, getattr(aval, "dtype", None))
    return _Value(value, None if _is_finite(value) else _Put(None, _flags_of_array(value), given=False))


def _given(x: Any, name: str) -> _Value:
    return _Value(x, None if _is_finite(x) else _Put(_argument(name, x), _flags_of_array(x), given=True))


def _argument_among(given: list[_Value]) -> Blame | None:
    """The argument whose infinities or NaN an operation was given: what it makes of them is the argument's fault."""
    return next((x.state.suspect for x in given if isinstance(x.state, _Put) and x.state.given), None)


def _inside(x: Any, outside: Any) -> _Value:
    """An input of a loop's body in one turn, of whose operand the state is known."""
    return _Value(x, None if _is_finite(x) else outside if isinstance(outside, _Put) else BAD)


def _put_flags(state: Any) -> tuple[bool, bool, bool]:
    return state.flags if isinstance(state, _Put) else (False, False, False)


def _places(flags: np.ndarray) -> set[int]:
    return set(np.flatnonzero(flags.any(axis=1)).tolist())


def _shifted(traced: _Traced, by: int) -> _Traced:
    """With its inputs counted from another place on; those before it are constants, which are never bad."""
    return _Traced(traced.suspect, {i + by: elements for i, elements in traced.inputs.items() if i + by >= 0})


# Arrays


@jax.jit
def _all_finite(x: Any) -> jax.Array:
    return jnp.all(jnp.isfinite(x))


def _is_finite(x: Any) -> bool:
    if not is_inexact(x):
        return True
    if isinstance(x, jax.Array) and x.size > ON_HOST and x.itemsize > 1 and next(iter(x.devices())).platform != "cpu":
        return bool(_all_finite(x))
    return bool(np.all(np.isfinite(np.asarray(x))))


def _flags(x: Any, np: Any = np) -> Any:
    """Whether there is NaN, inf, -inf in an array: (3,) bools. `np` is jax.numpy to trace it."""
    if not is_inexact(x):
        return np.zeros(3, bool)
    x = np.asarray(x, np.float32) if x.dtype.itemsize == 1 else np.asarray(x)
    infinite, negative = np.isinf(x), np.real(x) < 0
    return np.stack([np.any(np.isnan(x)), np.any(infinite & ~negative), np.any(infinite & negative)])


def _flags_of_array(x: Any) -> tuple[bool, bool, bool]:
    nan, positive, negative = _flags(x).tolist()
    return nan, positive, negative


def _as_array(x: Any) -> Any:
    return x if hasattr(x, "dtype") else jnp.asarray(x)


def _works_on_bits(jaxpr: Any) -> bool:
    """Whether floats are put together from their bits, as in an emulated format: one operation, to a person."""
    return any(
        eqn.primitive.name == "bitcast_convert_type" and is_inexact(eqn.outvars[0].aval) for eqn in jaxpr.eqns
    ) or any(_works_on_bits(bare(eqn.params["jaxpr"])) for eqn in jaxpr.eqns if eqn.primitive.name == "jit")


# What is shown


def _observed(eqn: Any, given: list[_Value], out: Any, place: _Place) -> Blame:
    """The blame of one operation."""
    name, inner = eqn.primitive.name, ""
    if (function := called(eqn)) is not None:
        inner = "/".join(str(each.source_info.name_stack) for each in bare(function).eqns)
        name = eqn.params.get("name", name)
    format = quantized(f"{place.names}/{inner}")
    operand, product = recipe_operand(place.names), recipe_product(place.names)
    if operand:
        name = f"{f'quantize_{format}' if format else name} of the {operand} of {product}"
    elif format:
        name = f"quantize_{format}"
    elif product:
        name = f"{name}, the {product} of a recipe"
    operands = [x.value for x in given if is_inexact(x.value)]
    magnitudes = tuple(_magnitudes(f"operand {i}", x) for i, x in enumerate(operands))
    return _blame_of(name, place, _magnitudes("result", out, format), magnitudes)


def _argument(name: str, x: Any) -> Blame:
    return dataclasses.replace(_blame_of("argument", _Place(), _magnitudes("result", x), ()), path=name)


def _blame_of(primitive: str, place: _Place, result: Magnitudes, operands: tuple[Magnitudes, ...]) -> Blame:
    return Blame(
        primitive=primitive,
        value=result.bad,
        backward=is_backward(place.names),
        path=place.module,
        source=place.source,
        turns=place.turns,
        result=result,
        operands=operands,
        reaches=(),
        note=SCALING_NOTE if is_scaling(place.names) else "",
    )


SCALING_NOTE = "jaxmp's own: the loss times the loss scale"


def _magnitudes(name: str, x: Any, format: str = "") -> Magnitudes:
    host = np.asarray(x)
    wide = np.abs(host.astype(np.complex128 if np.iscomplexobj(host) else np.float64))
    finite = wide[np.isfinite(wide)]
    infinite, negative = np.isinf(wide), np.real(host) < 0
    return Magnitudes(
        name=name,
        dtype=format or host.dtype.name,
        shape=host.shape,
        smallest=float(np.min(finite, where=finite > 0, initial=np.inf)) if np.any(finite) else 0.0,
        largest=float(np.max(finite, initial=0.0)),
        limit=float(jnp.finfo(host.dtype).max) if not format or _has_blocks(format) else parse_format(format).max,
        zeros=int(np.sum(wide == 0)),
        inf=int(np.sum(infinite & ~negative)),
        minus_inf=int(np.sum(infinite & negative)),
        nan=int(np.sum(np.isnan(wide))),
    )


def _has_blocks(format: str) -> bool:
    return is_block_format(format.replace("-", ":"))  # as the scope spells it


def _argument_names(fn: Callable[..., Any], args: Any, kwargs: Any) -> list[str]:
    """The places of all leaves, the name of the parameter first: `params/head/kernel`."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # a builtin
        parameters = []
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]

    def first(path: Any) -> str:
        if path[0].idx == 1:
            return path[1].key
        return positional[path[1].idx] if path[1].idx < len(positional) else f"argument {path[1].idx}"

    leaves = jax.tree_util.tree_leaves_with_path((args, kwargs))
    return [_joined(first(path), path[2:]) for path, _ in leaves]


def _joined(first: str, path: Any) -> str:
    return "/".join([first, *filter(None, [path_name(path)])])


def _relative(source: str) -> str:
    folder = os.getcwd() + os.sep
    return source.removeprefix(folder)


def name_nonfinite(gradients: Any, loss: jax.Array) -> str | None:
    """What is not finite in a step, in words: the loss, or else its gradients by path; None if all is finite.

    Args:
      gradients: a pytree like the parameters.
      loss: float scalar.
    """
    if not jnp.isfinite(loss):
        return f"the loss, which is {float(loss):g}"
    leaves = [
        path_name(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not jnp.all(jnp.isfinite(leaf))
    ]
    if not leaves:
        return None
    more = f" and {len(leaves) - 1} more" if leaves[1:] else ""
    return f"the gradient of {leaves[0]}{more} (loss {float(loss):g})"
