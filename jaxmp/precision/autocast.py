"""`autocast`: runs any JAX function in mixed precision, with a dtype for each kind of operation.

`with_policy` works on the layers of a Flax model; `autocast` works on the operations of a traced function, and so also
supports Equinox, Haiku, NNX and plain functions. Matrix products and convolutions run in half precision; exponentials,
logarithms, powers and sums run in float32; all other operations run in the widest dtype among their operands.

Casts are placed directly at the operations that need them: in the body of a scan, in a rematerialised block, at each
use of a tied weight. So the gradients of all uses of a float32 weight are summed in float32 (trap T1 of the numerics
contract), and the gradient of a float32 bias is summed over the batch in float32 (trap T2).

Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.3, for the three groups; PyTorch's "Autocast Op
Reference" (torch.amp) for the lists.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core.primitives
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.core import ShapedArray
from jax.extend.core import JaxprEqn, Literal, Primitive, subjaxprs

from jaxmp.errors import InputError, nearest
from jaxmp.jaxprs import bare, bind, called, closed_like, interpret, opened, scan_counts, traced_at
from jaxmp.trees import FLOAT32, HALF, is_castable, is_inexact

ELIGIBLE = (*HALF, FLOAT32)
"""The dtypes that are cast. As in torch, float64, complex, integer and fp8 arrays keep their dtypes."""

SCOPE = "jaxmp.autocast"
"""The `jax.named_scope` of operations in an `autocast` function, for profiles; an outer `autocast` skips them."""

_PRIMITIVES = jax.extend.core.primitives
_LINALG = {v.name for v in vars(lax.linalg).values() if isinstance(v, Primitive)}

_AS_TRACED = _LINALG | {
    # Defined by the width of their operand.
    *("bitcast_convert_type", "nextafter", "rng_uniform"),
    # XLA has no half precision for these.
    *("complex", "fft", "random_gamma"),
    # They read and write memory that has a dtype of its own.
    *("get", "swap", "addupdate"),
}
"""Operations that run in the dtypes with which the function was traced."""

_SCATTERS = {
    "scatter-add": lax.scatter_add,
    "scatter-sub": lax.scatter_sub,
    "scatter-mul": lax.scatter_mul,
    "scatter-min": lax.scatter_min,
    "scatter-max": lax.scatter_max,
}
"""Operations whose parameters include an update function with traced dtypes, and the functions that rebuild them."""

_INDEPENDENT = {"optimization_barrier", "sort", "device_put"}
"""Operations whose operands may have different dtypes."""

_WITH_FUNCTIONS = {
    *("jit", "scan", "while", "cond", "remat2", "custom_jvp_call", "custom_vjp_call", "custom_lin", "shard_map"),
    *("call", "closed_call", "eval_jaxpr", "custom_linear_solve", "reduce", "reduce_window", "select_and_scatter"),
}
"""Primitives with functions as parameters: they have a rule below, or run as traced."""

_PLAIN = {
    *(v.name for m in (lax, _PRIMITIVES) for v in vars(m).values() if isinstance(v, Primitive)),
    # In no public module, or not in all versions of JAX.
    *("ragged_dot_general", "log2", "one_minus_square", "polynomial", "random_wrap", "random_unwrap"),
    *("psum_invariant", "pvary", "pbroadcast", "reduce_scatter", "all_gather_invariant", "all_gather_reduced"),
} - (_AS_TRACED | _WITH_FUNCTIONS)
"""Primitives of JAX that compute in the float dtype of their operands."""

SQUARE, RECIPROCAL = "square", "reciprocal"
LISTABLE = (_PLAIN - {"convert_element_type"}) | {SQUARE, RECIPROCAL}
"""The operation names that `OperationLists` accepts."""


@dataclasses.dataclass(frozen=True)
class OperationLists:
    """Lists of operations that run in half precision and in float32.

    Operations in neither list run in the widest dtype among their operands. Names are those of JAX primitives, as
    `jax.make_jaxpr` shows them. Two names cover several spellings: `square` also means the product of an array with
    itself, and `reciprocal` means a constant divided by an array.

    >>> OperationLists(low=("dot_general",), float32=("exp", "lgo"))
    Traceback (most recent call last):
    ...
    jaxmp.errors.InputError: OperationLists 'own', float32: 'lgo' is no operation that can be listed; ...'log'?

    Raises:
      InputError: a name is not that of an operation, or is in both lists.
    """

    low: Collection[str]
    """operations that run in half precision"""
    float32: Collection[str]
    """operations that run in float32"""
    name: str = "own"
    """name of these lists in error messages"""

    def __post_init__(self) -> None:
        for field in ("low", "float32"):
            names = getattr(self, field)
            names = frozenset([names] if isinstance(names, str) else names)
            object.__setattr__(self, field, names)
            for name in sorted(names - LISTABLE):
                raise InputError(
                    f"OperationLists {self.name!r}, {field}: {name!r} is no operation that can be listed; expected a "
                    f"JAX primitive that computes on floats, such as dot_general or exp{nearest(name, LISTABLE)}"
                )
        for name in sorted(set(self.low) & set(self.float32)):
            raise InputError(
                f"OperationLists {self.name!r}: {name!r} is in low and in float32; expected it in one of them"
            )


TORCH = OperationLists(
    name="TORCH",
    low=("dot_general", "ragged_dot_general", "conv_general_dilated"),
    float32=(
        *("acos", "asin", "cosh", "sinh", "tan", "erf_inv", "rsqrt", RECIPROCAL),
        *("exp", "expm1", "log", "log1p", "log2"),
        # pow, __pow__ and __rpow__: x**2, x**3, x**y and 2**x are four primitives.
        *("pow", "integer_pow", SQUARE, "exp2"),
        *("reduce_sum", "reduce_prod", "cumsum", "cumprod", "cumlogsumexp"),
        # softmax, log_softmax and cross_entropy: with the maximum in float32, so is the difference from it.
        "reduce_max",
        # Average pooling: torch sums it in float32 whatever the dtype, XLA in the operand's.
        "reduce_window_sum",
        # Collectives, of which torch's lists say nothing: four float16 40000s would sum to inf (trap T3).
        *("psum", "psum_invariant", "reduce_scatter"),
    ),
)
"""torch's lists for CUDA, as JAX primitives. Operations that JAX composes of others (norms, losses, softmax) are
covered by these others.

Source: PyTorch documentation, torch.amp, "CUDA Op-Specific Behavior"."""

APEX_O1 = OperationLists(name="APEX_O1", low=TORCH.low, float32=set(TORCH.float32) - {"log1p", RECIPROCAL})
"""apex's optimization level O1: torch's lists without `log1p` and without dividing a constant by an array.

Source: NVIDIA apex, apex/amp/lists (torch_overrides, tensor_overrides, functional_overrides)."""


def autocast(fn: Callable[..., Any], lists: OperationLists = TORCH, *, dtype: Any = jnp.bfloat16) -> Callable[..., Any]:
    """Returns a version of `fn` that computes in mixed precision.

    It takes the same arguments and returns results of the same structure, shapes and dtypes as `fn`. Each call traces
    `fn` and evaluates the traced operations with casts: operations in `lists.low` take their float operands in `dtype`,
    those in `lists.float32` take them in float32, and all others in the widest dtype among their operands. The returned
    function works inside jit, grad, vmap, scan, remat and shard_map, and also casts inside those that `fn` uses,
    including the backward rules of `jax.custom_vjp`. `fn` must be traceable by jit.

    **Results** have the dtypes that `fn` alone would return; torch instead returns the dtype of the last operation. So
    the function can be the body of a scan, a branch, or a custom derivative rule, whose types JAX checks, and casting
    half precision to float32 loses nothing. For the same reason the carry of a loop, in each iteration, and the results
    of a branch keep the dtypes that they have in `fn`. All other values (residuals, stacked outputs of a scan, results
    of an inner jit) stay in the dtype in which they were computed.

    **Constants.** A scalar that is known while tracing (`2 * x`) takes the dtype of the arrays that it is combined
    with, unless `dtype` cannot represent it: `x + 1e-8` in float16 runs in float32, and so does a mask of -1e30.

    **Explicit dtypes.** A product whose `preferred_element_type` is wider than its operands keeps it. However, if `fn`
    computes in float32 anyway, `x.astype(jnp.float32)` leaves no operation in the trace and has no effect. To keep a
    part in float32, list its operations, or wrap the part in an `autocast` with empty lists: of nested `autocast`s, the
    inner one decides. The precision or algorithm of a float32 product does not apply to the half-precision product that
    replaces it.

    **Not cast**, but run in the dtypes of `fn`: linear algebra, FFTs, `lax.custom_linear_solve`, `lax.reduce` with a
    user-defined function, callbacks, Pallas kernels, and primitives that JAX does not define.

    float16 needs a loss scale (`jaxmp.loss_scaling`); bfloat16 has the range of float32 and needs none.

    >>> weight = jnp.ones((4, 3))
    >>> layer = lambda x: jax.nn.softmax(x @ weight)
    >>> jax.make_jaxpr(autocast(layer))(jnp.ones((2, 4))).eqns[2].params["preferred_element_type"]
    dtype(bfloat16)
    >>> autocast(layer)(jnp.ones((2, 4))).dtype
    dtype('float32')

    Args:
      fn: a function of pytrees. Arrays in its arguments are traced; all other leaves (Python numbers, strings,
        activation functions in an Equinox module) are passed to it unchanged. Arrays that it closes over are cast at
        each use, like its arguments.
      lists: `TORCH`, `APEX_O1`, or your own `OperationLists`.
      dtype: the half precision, bfloat16 or float16.

    Raises:
      InputError: `dtype` is another dtype, or `lists` is not an OperationLists; or, when called, `fn` does not compute
        with floats.
    """
    if not isinstance(lists, OperationLists):
        raise InputError(
            f"autocast: lists {lists!r:.80}: expected TORCH, APEX_O1 or OperationLists; the dtype is given by keyword: "
            "autocast(fn, dtype=jnp.float16)"
        )
    return _interpreted(fn, _Interpreter(lists, _half(dtype)))


def between_layers(fn: Callable[..., Any], *, dtype: Any = jnp.bfloat16) -> Callable[..., Any]:
    """Returns `fn`, which runs layers under a policy, with the operations between its layers in mixed precision.

    `fn` is traced in float32 but for its layers, which hand their results on by `hand_on`. Operations that touch none
    of these results run as traced, all others as in `autocast` with `TORCH`'s lists. Products run in `dtype`, or in
    that of the innermost `computing` around them. Results keep the dtypes in which they were computed.

    Args:
      fn: a function of pytrees.
      dtype: dtype of products: a half precision, or float32 to leave them as traced.
    """
    return _interpreted(fn, _Interpreter(TORCH, np.dtype(dtype), layers=True))


def hand_on(tree: Any, dtype: Any) -> Any:
    """The floats of `tree`, rounded to `dtype` and typed float32, for the code between layers; see `between_layers`."""

    def each(x: Any) -> Any:
        x = x.astype(dtype)
        with jax.named_scope(HANDED_ON):
            return x.astype(FLOAT32) if x.dtype in HALF else x

    return jax.tree.map(lambda x: each(x) if is_castable(x) else x, tree)


def in_float32(tree: Any) -> Any:
    """The float32 leaves of `tree`, marked as operands that `between_layers` has to hand over in float32."""
    return jax.tree.map(lambda x: checkpoint_name(x, IN_FLOAT32) if is_castable(x) and x.dtype == FLOAT32 else x, tree)


def computing(dtype: Any) -> Any:
    """Context manager: products that are traced in it have the compute dtype `dtype`; see `between_layers`."""
    return jax.named_scope(f"{COMPUTING}{np.dtype(dtype).name}")


HANDED_ON, IN_FLOAT32, COMPUTING = "jaxmp.handed_on", "jaxmp.in_float32", "jaxmp.computing="
"""names by which `between_layers` knows what layers hand on, what must be float32, and the dtype of products"""


def _interpreted(fn: Callable[..., Any], interpreter: _Interpreter) -> Callable[..., Any]:
    """`fn` with its operations evaluated by an interpreter; see `autocast`."""

    @functools.wraps(fn, updated=())  # a module's attributes are its own
    def cast(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        is_array = [_is_array(x) for x in leaves]
        arrays = [jnp.asarray(x) for x in _pick(is_array, leaves)]
        form: list[Any] = []  # of the result: where its arrays are, its other leaves, its structure

        def of_arrays(*arrays: Any) -> list[Any]:
            args, kwargs = jax.tree.unflatten(tree, _merge(is_array, arrays, leaves))
            out, out_tree = jax.tree.flatten(fn(*args, **kwargs))
            is_result = [isinstance(x, jax.Array) for x in out]
            form[:] = is_result, [None if yes else x for yes, x in zip(is_result, out, strict=True)], out_tree
            return _pick(is_result, out)

        jaxpr = jax.make_jaxpr(of_arrays)(*arrays)
        if not _has_floats(bare(jaxpr)):
            name, given = getattr(fn, "__name__", type(fn).__name__), sorted({str(x.dtype) for x in arrays})
            raise InputError(
                f"autocast of {name}: no float in it (its arguments: {', '.join(given) or 'no arrays'}); "
                "expected a function that computes with floats"
            )
        with jax.named_scope(SCOPE):
            values = interpreter.evaluate(
                jaxpr, arrays, dtypes=None if interpreter.layers else _dtypes(bare(jaxpr).outvars)
            )
        is_result, others, out_tree = form
        return jax.tree.unflatten(out_tree, _merge(is_result, map(jnp.asarray, values), others))

    return cast


class _Operand(NamedTuple):
    """An operand of an operation."""

    value: Any
    """array, in the dtype in which it was computed"""
    aval: Any
    """its abstract type when the function was traced"""
    scalar: bool
    """whether it is a scalar known while tracing, or an array filled with one, that half precision can represent"""


@dataclasses.dataclass(frozen=True)
class _Interpreter:
    """Evaluates jaxprs with casts inserted. Hashable, so that retraced jaxprs can be cached."""

    lists: OperationLists
    dtype: np.dtype
    layers: bool = False
    """whether only what layers handed on is cast; see `between_layers`"""

    def at(self, eqn: JaxprEqn) -> _Interpreter:
        """The interpreter for an equation: under `computing`, with another dtype of products."""
        found = re.findall(rf"{COMPUTING}(\w+)", str(eqn.source_info.name_stack)) if self.layers else []
        return dataclasses.replace(self, dtype=np.dtype(found[-1])) if found else self

    def evaluate(
        self,
        jaxpr: Any,
        args: Sequence[Any],
        *,
        scalars: Sequence[bool] = (),
        dtypes: Sequence[Any] | None = None,
    ) -> list[Any]:
        """Evaluates a jaxpr, open or closed, and returns its outputs.

        Args:
          jaxpr: the jaxpr.
          args: its inputs; floats may have any eligible dtype.
          scalars: `_Operand.scalar` of each input.
          dtypes: dtypes to which outputs are cast; by default they keep those in which they were computed.
        """
        jaxpr, consts = opened(jaxpr)
        known = scalars or [False] * len(args)
        given = [
            *(_Operand(x, v.aval, False) for x, v in zip(consts, jaxpr.constvars, strict=True)),
            *(_Operand(x, v.aval, yes) for x, v, yes in zip(args, jaxpr.invars, known, strict=True)),
        ]

        wide = _read_steeply(jaxpr, _steep(self.lists))

        def equation(eqn: JaxprEqn, operands: list[_Operand]) -> list[_Operand]:
            low = eqn.primitive.name in self.lists.low
            in_wide = any(v in wide for v in eqn.outvars)
            if in_wide and not low:
                operands = _as_traced(operands)
            with traced_at(eqn):
                outer = in_wide and low and _sums_nothing(eqn)
                out = _run_as_traced(eqn, operands) if outer else self.at(eqn).run(eqn, operands)
            scalar = eqn.primitive.name in ("broadcast_in_dim", "convert_element_type") and operands[0].scalar
            return [_Operand(x, v.aval, scalar) for x, v in zip(out, eqn.outvars, strict=True)]

        values = [x.value for x in interpret(jaxpr, given, equation, self._literal)]
        return values if dtypes is None else [_cast(x, dtype) for x, dtype in zip(values, dtypes, strict=True)]

    def run(self, eqn: JaxprEqn, operands: list[_Operand]) -> list[Any]:
        """Runs one equation with its operands cast as the lists say, and returns its outputs."""
        name = eqn.primitive.name
        if any(type(x.aval) is not ShapedArray for x in operands) or SCOPE in str(eqn.source_info.name_stack):
            return _run_as_traced(eqn, operands)
        if self.layers and name == "name" and eqn.params["name"] == IN_FLOAT32:
            return [_cast(operands[0].value, FLOAT32)]
        if self.layers and name == "convert_element_type" and HANDED_ON in str(eqn.source_info.name_stack):
            return [operands[0].value]
        if name in _RULES:
            return _RULES[name](self, eqn, operands)
        if name == "convert_element_type" and eqn.params["new_dtype"] == operands[0].aval.dtype:
            return [operands[0].value]  # only makes a Python scalar strongly typed: nobody asked for this dtype
        if name not in _PLAIN:
            return _run_as_traced(eqn, operands)
        floats = [x for x in operands if is_inexact(x.aval)]
        if not floats or name in _INDEPENDENT:
            return bind(eqn, [x.value for x in operands])
        if any(x.aval.dtype not in ELIGIBLE for x in floats):
            return _run_as_traced(eqn, operands)

        low = _operation(eqn) in self.lists.low
        if self.layers and not low and all(jax.typeof(x.value).dtype == x.aval.dtype for x in floats):
            return bind(eqn, [x.value for x in operands])
        dtype = self._dtype_of(_operation(eqn), floats)
        casts = {id(x.value): _cast(x.value, dtype) for x in operands}  # one for both operands of x * x
        values, params = [casts[id(x.value)] for x in operands], dict(eqn.params)
        if params.get("update_jaxpr") is not None:
            if name not in _SCATTERS:  # the user's own function, by `x.at[i].apply`
                return _run_as_traced(eqn, operands)
            options = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
            return [_SCATTERS[name](*values, **{option: params[option] for option in options})]
        # jnp.dot asks for the dtype of its operands, whatever it is; only a wider one is somebody's wish.
        if params.get("preferred_element_type") is not None:
            if params["preferred_element_type"] == _widest([x.aval for x in floats]):
                params["preferred_element_type"] = dtype
        if "precision" in params and dtype in HALF:
            params["precision"] = None  # says how float32 is multiplied; some algorithms refuse other dtypes
        return bind(eqn, values, params)

    def _dtype_of(self, operation: str, floats: list[_Operand]) -> np.dtype:
        """Returns the dtype in which an operation takes its float operands."""
        if operation in self.lists.low:
            return self.dtype if self.dtype in HALF else _widest([x.aval for x in floats])
        if operation in self.lists.float32:
            return FLOAT32
        # An array filled with a scalar (`jnp.zeros`) may be an accumulator and keeps its dtype; where an operation only
        # picks from it (`jnp.where(mask, x, 0)`), it is as good as the scalar.
        voters = [x for x in floats if not (x.scalar and (x.aval.shape == () or operation == "select_n"))]
        return _widest([jax.typeof(x.value) for x in voters or floats])

    def _literal(self, literal: Any) -> _Operand:
        return _Operand(literal.val, literal.aval, self._can_hold(literal))

    def _can_hold(self, literal: Any) -> bool:
        """Returns whether half precision can represent a constant without turning it into inf, 0 or a subnormal."""
        if literal.aval.dtype != FLOAT32 and not jnp.issubdtype(literal.aval.dtype, jnp.integer):
            return False  # an integer may be cast to float32 later: `jnp.where(mask, x, 0)`
        with np.errstate(all="ignore"):
            x = np.float32(literal.val)
            half = x.astype(self.dtype)
        return bool(np.isfinite(half) == np.isfinite(x) and (x == 0 or not abs(half) < jnp.finfo(self.dtype).tiny))

    def retrace(
        self, jaxpr: Any, operands: Sequence[_Operand], *, scalars: Sequence[bool] = (), dtypes: Any = None
    ) -> Any:
        """Returns `jaxpr` with casts inserted, for the current dtypes of the operands; open if it was open."""
        given = tuple(jax.typeof(x.value).dtype for x in operands)
        closed = _retraced(self, jaxpr, given, tuple(scalars), None if dtypes is None else tuple(dtypes))
        return closed_like(closed, jaxpr)

    def call(self, fn: Callable[..., Any], args: Any, traced_for: Any) -> Any:
        """Calls `fn(*args)` with casts inserted, traced with the dtypes in `traced_for`.

        Args:
          fn: a function of flat sequences of arrays that returns a pytree.
          args: its arguments, in their current dtypes.
          traced_for: dtypes to trace with, in the same structure.

        Returns:
          The result of `fn`, and the same pytree with the types of the trace.
        """
        types = jax.tree.map(lambda x, dtype: jax.typeof(x).update(dtype=dtype, weak_type=False), args, traced_for)
        jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(*types)
        return jax.tree.unflatten(jax.tree.structure(shapes), self.evaluate(jaxpr, jax.tree.leaves(args))), shapes


# JAX hands out one jaxpr for all calls of a jitted function: what is made of it is one too, and lives as long.
_RETRACED: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _retraced(interpreter: _Interpreter, jaxpr: Any, *how: Any) -> Any:
    made = _RETRACED.setdefault(jaxpr, {})
    if (interpreter, *how) not in made:
        made[interpreter, *how] = _retrace(interpreter, jaxpr, *how)
    return made[interpreter, *how]


def _retrace(interpreter: _Interpreter, jaxpr: Any, given: Any, scalars: Any, dtypes: Any) -> Any:
    # The types of the jaxpr's own inputs: those of a scan's body are the elements of what is scanned over.
    inputs = [v.aval for v in bare(jaxpr).invars]
    types = [aval.update(dtype=dtype, weak_type=False) for aval, dtype in zip(inputs, given, strict=True)]
    return jax.make_jaxpr(lambda *args: interpreter.evaluate(jaxpr, args, scalars=scalars, dtypes=dtypes))(*types)


# Rules for the primitives that hold functions. Loops and branches must return what they were given: their carries and
# results keep the dtypes of the trace.


def _call(interpreter: _Interpreter, eqn: JaxprEqn, operands: list[_Operand]) -> list[Any]:
    scalars = [x.scalar for x in operands]
    jaxpr = interpreter.retrace(eqn.params["jaxpr"], operands, scalars=scalars)
    return bind(eqn, [x.value for x in operands], {**eqn.params, "jaxpr": jaxpr})


def _scan(interpreter: _Interpreter, eqn: JaxprEqn, operands: list[_Operand]) -> list[Any]:
    num_consts, num_carry = scan_counts(eqn.params)
    carry = slice(num_consts, num_consts + num_carry)
    operands[carry] = _as_traced(operands[carry])
    body = eqn.params["jaxpr"]
    outputs = bare(body).outvars
    dtypes = _dtypes(outputs[:num_carry]) + [None] * (len(outputs) - num_carry)
    jaxpr = interpreter.retrace(body, operands, dtypes=dtypes)
    return bind(eqn, [x.value for x in operands], {**eqn.params, "jaxpr": jaxpr})


def _while(interpreter: _Interpreter, eqn: JaxprEqn, operands: list[_Operand]) -> list[Any]:
    cond_consts, body_consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = _as_traced(operands[cond_consts + body_consts :])
    of_cond, of_body = operands[:cond_consts], operands[cond_consts : cond_consts + body_consts]
    params = {
        **eqn.params,
        "cond_jaxpr": interpreter.retrace(eqn.params["cond_jaxpr"], [*of_cond, *carry]),
        "body_jaxpr": interpreter.retrace(eqn.params["body_jaxpr"], [*of_body, *carry], dtypes=_dtypes(carry)),
    }
    return bind(eqn, [x.value for x in (*of_cond, *of_body, *carry)], params)


def _cond(interpreter: _Interpreter, eqn: JaxprEqn, operands: list[_Operand]) -> list[Any]:
    dtypes = _dtypes(eqn.outvars)
    branches = tuple(interpreter.retrace(b, operands[1:], dtypes=dtypes) for b in eqn.params["branches"])
    return bind(eqn, [x.value for x in operands], {**eqn.params, "branches": branches})


def _shard_map(interpreter: _Interpreter, eqn: JaxprEqn, operands: list[_Operand]) -> list[Any]:
    # Through the public function: only it can trace a body with its axes in scope.
    mapped = jax.shard_map(
        lambda *args: tuple(interpreter.evaluate(eqn.params["jaxpr"], args)),
        mesh=eqn.params["mesh"],
        in_specs=tuple(eqn.params["in_specs"]),
        out_specs=tuple(eqn.params["out_specs"]),
        axis_names=set(eqn.params["newly_manual_axes"]),
        check_vma=eqn.params["check_vma"],
    )
    return list(mapped(*[x.value for x in operands]))


# A custom derivative is rebuilt around the same interpreter. Its rules are got at by differentiating the original call,
# in the dtypes for which it was traced, and what comes of that is evaluated with casts in its turn.


def _custom_jvp(interpreter: _Interpreter, eqn: JaxprEqn, operands: list[_Operand]) -> list[Any]:
    original = _Original(eqn)

    @jax.custom_jvp
    def call(*args: Any) -> list[Any]:
        return interpreter.evaluate(eqn.params["call_jaxpr"], args)

    @call.defjvp
    def jvp(args: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        def of_floats(args: Any, tangents: Any) -> Any:
            return jax.jvp(original.of_floats(args), _pick(original.is_float, args), tangents)

        tangents = _pick(original.is_float, tangents)
        in_floats = _pick(original.is_float, original.dtypes)
        (out, out_tangents), _ = interpreter.call(of_floats, (list(args), tangents), (original.dtypes, in_floats))
        # The rule must return what the function itself returns.
        dtypes = [x.dtype for x in jax.eval_shape(call, *args)]
        out = [_cast(x, dtype) for x, dtype in zip(out, dtypes, strict=True)]
        out_tangents = [
            _cast(x, dtype) for x, dtype in zip(out_tangents, _pick(original.out_is_float, dtypes), strict=True)
        ]
        return out, _merge(original.out_is_float, out_tangents, [_no_tangent(x) for x in out])

    return list(call(*[x.value for x in operands]))


def _custom_vjp(interpreter: _Interpreter, eqn: JaxprEqn, operands: list[_Operand]) -> list[Any]:
    original = _Original(eqn)
    # What the function closes over has no cotangent, and its rules do not read it here: they hold it themselves.
    consts = [x.value for x in operands[: eqn.params["num_consts"]]]

    @jax.custom_vjp
    def call(*args: Any) -> list[Any]:
        return interpreter.evaluate(eqn.params["call_jaxpr"], [*consts, *args])

    def forward(*args: Any) -> tuple[list[Any], Any]:
        def of_arrays(args: Any) -> Any:
            return jax.vjp(original.of_floats(args), *_pick(original.is_float, args))

        inputs = [*consts, *args]
        (out, pullback), shapes = interpreter.call(of_arrays, (inputs,), (original.dtypes,))
        out = [_cast(x, y.dtype) for x, y in zip(out, jax.eval_shape(call, *args), strict=True)]
        return out, (pullback, _Traced(jax.tree.map(lambda x: x.dtype, shapes[1]), [x.dtype for x in args]))

    def backward(residuals: Any, cotangents: Any) -> tuple[Any, ...]:
        pullback, dtypes = residuals

        def of_arrays(pullback: Any, cotangents: Any) -> Any:
            zeros = [_no_tangent(v.aval) for v in eqn.outvars]
            return pullback(_merge(original.out_is_float, cotangents, zeros))

        out_dtypes = _dtypes(eqn.outvars)
        cotangents = _pick(original.out_is_float, cotangents)
        traced_for = (dtypes.residuals, _pick(original.out_is_float, out_dtypes))
        found, _ = interpreter.call(of_arrays, (pullback, cotangents), traced_for)
        found = _merge(original.is_float, found, [None] * len(original.is_float))[len(consts) :]
        return tuple(None if x is None else _cast(x, dtype) for x, dtype in zip(found, dtypes.args, strict=True))

    call.defvjp(forward, backward)
    return list(call(*[x.value for x in operands[len(consts) :]]))


class _Original:
    """The original call of a function with a custom derivative, as a function of its float inputs."""

    def __init__(self, eqn: JaxprEqn):
        self.eqn = eqn
        self.dtypes = _dtypes(eqn.invars)
        num_consts = eqn.params["num_consts"]
        self.is_float = [i >= num_consts and is_inexact(v.aval) for i, v in enumerate(eqn.invars)]
        self.out_is_float = [is_inexact(v.aval) for v in eqn.outvars]

    def of_floats(self, args: Sequence[Any]) -> Callable[..., list[Any]]:
        """Returns the call as a function of its float inputs; other inputs are taken from `args`."""
        return lambda *floats: list(bind(self.eqn, _merge(self.is_float, floats, args)))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Traced:
    """Static data that a forward rule passes to its backward rule."""

    residuals: Any
    """dtypes with which the residuals were traced"""
    args: list[Any]
    """dtypes of the arguments"""


_RULES = {
    _PRIMITIVES.jit_p.name: _call,
    _PRIMITIVES.remat_p.name: _call,
    _PRIMITIVES.scan_p.name: _scan,
    _PRIMITIVES.while_p.name: _while,
    _PRIMITIVES.cond_p.name: _cond,
    _PRIMITIVES.custom_jvp_call_p.name: _custom_jvp,
    _PRIMITIVES.custom_vjp_call_p.name: _custom_vjp,
    "shard_map": _shard_map,
}


_STEEP = {
    *("log", "log1p", "log2", "sqrt", "rsqrt", "acos", "acosh", "asin", "atanh", "erf_inv", "pow", "sin", "cos", "tan"),
}
"""Operations that magnify the rounding of their operand: at 0 or 1, where it is a difference, as in log(1 - sigmoid(x))
(trap T23), or where it is large, as angles are (trap T20)."""

_ELEMENTWISE = {
    *("add", "sub", "mul", "div", "neg", "max", "min", "clamp", "select_n", "integer_pow", "square", "abs", "pow"),
    *("logistic", "tanh", "erf", "erfc", "exp", "exp2", "expm1", "log", "log1p", "log2", "sqrt", "rsqrt", "cbrt"),
    *("sin", "cos", "tan", "sinh", "cosh", "asin", "acos", "atan", "asinh", "acosh", "atanh", "one_minus_square"),
    *("convert_element_type", "reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "slice", "gather"),
    *("concatenate", "dynamic_slice", "rev", "pad", "stop_gradient", "copy", "name", "reduce_max", "reduce_min"),
}
"""Operations through which the operand of a steep one is followed back."""

_READ_STEEPLY: weakref.WeakKeyDictionary[Any, dict[Any, frozenset[Any]]] = weakref.WeakKeyDictionary()


def _steep(lists: OperationLists) -> frozenset[str]:
    """The steep operations, without those that the lists leave in half where torch's do not."""
    return frozenset(_STEEP - (set(TORCH.float32) - set(lists.float32)))


def _read_steeply(jaxpr: Any, steep: frozenset[str], demanded: Iterable[int] = ()) -> frozenset[Any]:
    """The variables of which a steep operation is a function, element by element: they are computed in float32.

    Products, sums and loops end the search: what they return is as exact as they are. An outer product sums nothing.

    Args:
      jaxpr: an open jaxpr.
      steep: names of the steep operations.
      demanded: places of results that a steep operation outside reads.
    """
    demanded = tuple(demanded)
    known = _READ_STEEPLY.setdefault(jaxpr, {})
    if not demanded and steep in known:
        return known[steep]
    read = {jaxpr.outvars[i] for i in demanded if not isinstance(jaxpr.outvars[i], Literal)}
    for eqn in reversed(jaxpr.eqns):
        name = eqn.primitive.name
        within = called(eqn)
        if within is not None and len(bare(within).invars) == len(eqn.invars):
            inner = bare(within)
            wanted = [i for i, v in enumerate(eqn.outvars) if v in read]
            inside = _read_steeply(inner, steep, wanted)
            read |= {v for v, given in zip(eqn.invars, inner.invars, strict=True) if given in inside and _is_var(v)}
        elif name in steep or ((name in _ELEMENTWISE or _sums_nothing(eqn)) and any(v in read for v in eqn.outvars)):
            read |= {v for v in eqn.invars if _is_var(v) and is_inexact(v.aval)}
    found = frozenset(read)
    if not demanded:
        known[steep] = found
    return found


def _is_var(v: Any) -> bool:
    return not isinstance(v, Literal)


def _sums_nothing(eqn: JaxprEqn) -> bool:
    """Whether a product is one multiplication for each number of its result, such as an outer product of angles."""
    if eqn.primitive.name != "dot_general":
        return False
    (contracted, _), _ = eqn.params["dimension_numbers"]
    aval: Any = eqn.invars[0].aval
    return math.prod(aval.shape[d] for d in contracted) == 1


def _operation(eqn: JaxprEqn) -> str:
    """Returns the name of the operation of an equation, as in the lists."""
    name = eqn.primitive.name
    if name == "mul" and eqn.invars[0] is eqn.invars[1]:
        return SQUARE
    if name == "div" and isinstance(eqn.invars[0], Literal):
        return RECIPROCAL
    return name


def _run_as_traced(eqn: JaxprEqn, operands: list[_Operand]) -> list[Any]:
    return bind(eqn, [x.value for x in _as_traced(operands)])


def _as_traced(operands: Sequence[_Operand]) -> list[_Operand]:
    """Casts operands to the dtypes with which they were traced."""
    return [x._replace(value=_cast(x.value, x.aval.dtype)) if type(x.aval) is ShapedArray else x for x in operands]


def _cast(x: Any, dtype: Any) -> Any:
    """An array in `dtype`, where both are floats that are cast at all. None: as it is."""
    old = jax.typeof(x).dtype
    if dtype is None or old == dtype or old not in ELIGIBLE or dtype not in ELIGIBLE:
        return x
    return lax.convert_element_type(x, dtype) if isinstance(x, jax.Array) else np.asarray(x, old).astype(dtype)


def _dtypes(atoms: Sequence[Any]) -> list[Any]:
    """The dtypes for which variables or operands were traced."""
    return [atom.aval.dtype for atom in atoms]


def _has_floats(jaxpr: Any) -> bool:
    variables = [*jaxpr.constvars, *jaxpr.invars, *(v for eqn in jaxpr.eqns for v in eqn.outvars)]
    if any(is_inexact(v.aval) for v in variables):
        return True
    return any(_has_floats(inner) for inner in subjaxprs(jaxpr))


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array) or (isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind not in "OSUMm")


def _widest(avals: Sequence[Any]) -> np.dtype:
    return functools.reduce(jnp.promote_types, (aval.dtype for aval in avals))


def _no_tangent(x: Any) -> np.ndarray:
    return np.zeros(x.shape, jax.dtypes.float0)


def _pick(mask: Sequence[bool], values: Sequence[Any]) -> list[Any]:
    return [x for yes, x in zip(mask, values, strict=True) if yes]


def _merge(mask: Sequence[bool], chosen: Iterable[Any], others: Sequence[Any]) -> list[Any]:
    """`others`, with `chosen` in the places where `mask` is true."""
    rest = iter(chosen)
    return [next(rest) if yes else x for yes, x in zip(mask, others, strict=True)]


def _half(dtype: Any) -> np.dtype:
    names = [half.name for half in HALF]
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in HALF:
        shown = dtype if found is None else found.name
        raise InputError(
            f"autocast: dtype={shown!s}: expected {' or '.join(names)}, such as a policy's compute_dtype"
            f"{nearest(str(shown), names)}"
        )
    return found
