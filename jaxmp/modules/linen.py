"""A policy applied to an unmodified Flax Linen module, casting at each use.

Parameters stay in their own dtype (float32 master weights) until the very operation that uses them. The cast therefore
sits inside the body of a scan, of a rematerialised block and of each use of a tied weight, and the gradients of all
uses meet in float32 (trap T1 of the numerics contract: cast once outside, a bfloat16 weight used 1000 times gets 256
for a gradient of 1000). Two gradients would still be summed in half inside one layer, so these layers get help: a bias
is broadcast in float32 and then cast (T2), an embedding is gathered in float32 and its rows are cast (T15).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.core.axes_scan
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmp.errors import InputError
from jaxmp.modules.functions import by_operations
from jaxmp.modules.nnx import FromNNX
from jaxmp.precision.formats import fake_quantize, quantize
from jaxmp.precision.policy import Policy
from jaxmp.precision.policy_tree import PolicyTree, Rule, as_tree, path_and_above
from jaxmp.text_table import table
from jaxmp.trees import FLOAT32, by_path, cast_floats, is_castable, path_name

AFFINE = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvTranspose, nn.ConvLocal, nn.Einsum)
"""Layers that compute `f(x, kernel) + bias`."""

# A module under nn.jit is traced once for all calls that jax.jit takes to be equal. As a part of jit's cache key, the
# policy makes calls under different policies different.
_policy_in_force = jax.make_user_context(None)

Observer = Callable[[str, Any], Any]
"""`(path, outputs) -> outputs`: looks at what the module at `path` hands on."""
_observer: contextvars.ContextVar[Observer | None] = contextvars.ContextVar("observer", default=None)
_observations = itertools.count()


def with_policy(
    apply: Callable[..., Any], policy: Policy | PolicyTree | str, *, axis_name: str | None = None
) -> Callable[..., Any]:
    """`module.apply` under `policy`: same arguments, same results, other dtypes.

    Float inputs are cast to the compute dtype and float outputs to the output dtype; normalisation layers compute
    statistics and affine in float32 and hand on the compute dtype; a `dtype` given in the model's code gives way.
    Mutable collections (batch statistics) keep their dtypes. The result goes into jit, grad, scan, vmap and remat like
    `apply`.

    Under a `PolicyTree` the same holds of every module that a rule names: its float inputs are cast to the rule's
    compute dtype and its outputs to the rule's output dtype. An input of the model that reaches such a module as it
    came is not rounded on the way.

    Args:
      apply: a bound `apply` of a Linen module, `model.apply`, or what wraps one (`functools.wraps`); or of `from_nnx`,
        which is under the policy by operations (`apply_policy`).
      policy: the policy, or a tree of them, or the text of either. `matmul` is in force for every dot and convolution
        without a precision of its own.
      axis_name: mapped axis over which BatchNorm layers that name none take their statistics.

    Raises (when called): InputError where a rule names nothing in the model, or nothing in it is a float.

    >>> model = nn.Dense(3)
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
    >>> half = Policy(jnp.float32, jnp.float16, jnp.float16)
    >>> with_policy(model.apply, half)(variables, jnp.ones((1, 2))).dtype
    dtype('float16')
    """
    tree = as_tree(policy)
    model = getattr(inspect.unwrap(apply, stop=lambda f: hasattr(f, "__self__")), "__self__", None)
    if isinstance(model, FromNNX):
        whole, run = by_operations(apply, tree)

        def applied_to_nnx(variables: Any, *args: Any, **kwargs: Any) -> Any:
            out = run(variables, *args, **kwargs)
            return _handed_on(whole, variables, out, mutable=bool(kwargs.get("mutable")))

        return applied_to_nnx

    def applied(variables: Any, *args: Any, **kwargs: Any) -> Any:
        _require_floats(tree, variables, args, kwargs)
        call = _Call(tree, axis_name, model)
        whole = call.policy_of("")
        if whole.grad != FLOAT32 and not tree.rules:
            # What casting once, outside of all uses, loses is to be seen: trap T1, and T2 and T15 with it.
            variables = {**variables, "params": whole.cast_to_compute(variables.get("params", {}))}
        cast_args, cast_kwargs = whole.cast_to_compute((args, kwargs))
        call.remember((args, kwargs), (cast_args, cast_kwargs))
        # An observer is of one trace: no other may meet what it left under nn.jit.
        trace = str(tree) if call.observer is None else f"{tree} observed {next(_observations)}"
        with (
            _policy_in_force(trace),
            _matmul_precision(whole),
            nn.intercept_methods(call.intercept),
        ):
            out = apply(variables, *cast_args, **cast_kwargs)
        call.check(variables, args)
        return _handed_on(whole, variables, out, mutable=kwargs.get("mutable", False) is not False)

    return applied


def _handed_on(policy: Policy, variables: Any, out: Any, *, mutable: bool) -> Any:
    """What `apply` returned, in the output dtype; with mutable collections beside it, these in their own."""
    if not mutable:
        return policy.cast_to_output(out)
    return policy.cast_to_output(out[0]), _in_dtypes_of(variables, out[1])


@contextlib.contextmanager
def observed_modules(observer: Observer) -> Iterator[None]:
    """Within: what each Linen module's `__call__` under `with_policy` returns goes through `observer`, when traced.

    It is what the module hands on, after its policy; the whole model's, "", before the cast to the output dtype.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


class Row(NamedTuple):
    """One module of a model, and the policy that it runs under."""

    module: str
    """path of the module, "" for the model itself"""
    type: str
    """name of its class"""
    parameters: int
    """numbers in the parameters that it declares itself"""
    policy: str
    """the policy in force"""
    rule: str
    """pattern of the rule that chose it; "" where it is the default"""
    own_dtype: str
    """the dtype that the model's code gives this module, which the policy overrides; "" for none"""


class Explanation(tuple[Row, ...]):
    """The rows of a model; printed, a table."""

    def __str__(self) -> str:
        rows = [
            (
                row.module or "(model)",
                row.type,
                f"{row.parameters:,}",
                row.policy + (f" (not {row.own_dtype})" if row.own_dtype else ""),
                row.rule or "(default)",
            )
            for row in self
        ]
        return table(rows, header=("module", "class", "parameters", "policy", "rule"), right=[2])


def explain(model: nn.Module, policy: Policy | PolicyTree | str, *inputs: Any, **kwargs: Any) -> Explanation:
    """The modules of a model in the order in which they are first called, found by an abstract `init`: nothing runs.

    Args:
      model: the module.
      policy: the policy, or tree, to apply.
      inputs: its inputs, arrays or `jax.ShapeDtypeStruct`s.
      kwargs: further arguments of its `__call__`. Whether it trains need not be said: by default it does not.

    Raises: InputError where a rule names none of the modules.
    """
    tree = as_tree(policy)
    found, met, params = _modules(model, *inputs, **kwargs)
    classes = met.classes
    if any(not any(rule.names(path, classes) for path in classes) for rule in tree.rules):
        # It may name what only training calls.
        classes = classes | _modules(model, *inputs, **{**mode_argument(model, True), **kwargs})[1].classes
    tree.require_match(classes)
    sizes = dict.fromkeys(found, 0)
    for path, leaf in by_path(params).items():
        sizes[_owner(path, found)] += leaf.size
    rows = []
    for path, module in found.items():
        rule = met.rule(tree, path)
        rows.append(
            Row(
                module=path,
                type=type(module).__name__,
                parameters=sizes[path],
                policy=str(tree.default if rule is None else rule.policy),
                rule="" if rule is None else rule.pattern,
                own_dtype=_own_dtype(module),
            )
        )
    return Explanation(rows)


def cast_to_param(model: nn.Module, policy: Policy | PolicyTree, params: Any, *inputs: Any, **kwargs: Any) -> Any:
    """The parameters of a model, each in the parameter dtype of its module's policy. For arguments see `explain`."""
    if isinstance(policy, Policy) or not policy.rules:
        return (policy if isinstance(policy, Policy) else policy.default).cast_to_param(params)
    found, met, _ = _modules(model, *inputs, **kwargs)

    def cast(path: tuple[Any, ...], leaf: Any) -> Any:
        rule = met.rule(policy, _owner(path_name(path), found))
        return (policy.default if rule is None else rule.policy).cast_to_param(leaf)

    return jax.tree_util.tree_map_with_path(cast, params)


def mode_argument(model: Any, train: bool) -> dict[str, bool]:
    """The argument by which this model is told whether it trains; {} for one that wants none."""
    call = type(model).__call__ if isinstance(model, nn.Module) else model.apply
    parameters = inspect.signature(call).parameters
    for name, value in (("train", train), ("training", train), ("deterministic", not train)):
        if name in parameters:
            return {name: value}
    return {}


def _modules(model: nn.Module, *inputs: Any, **kwargs: Any) -> tuple[dict[str, nn.Module], Modules, Any]:
    """The modules that `init` calls, by path, what rules may call them, and the shapes of the parameters, unboxed."""
    found: dict[str, Any] = {} if isinstance(model, nn.Module) else {"": model}
    met = Modules()

    def note(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name not in ("<lambda>", "setup"):
            path = "/".join(context.module.path)
            found.setdefault(path, context.module)
            met.meet(path, context.module)
        return next_fun(*args, **kwargs)

    kwargs = {**mode_argument(model, False), **kwargs}
    with nn.intercept_methods(note):
        variables = jax.eval_shape(functools.partial(model.init, **kwargs), jax.random.key(0), *inputs)
    return found, met, nn.unbox(variables).get("params", {})


def _owner(path: str, modules: Any) -> str:
    """The module that declares the parameter at `path`, whose own name may contain slashes."""
    while path and path not in modules:
        path = path.rpartition("/")[0]
    return path


def _own_dtype(module: nn.Module) -> str:
    dtype = getattr(module, "dtype", None) if _knows_dtype(module) else None
    return "" if dtype is None else jnp.dtype(dtype).name


def _knows_dtype(module: nn.Module) -> bool:
    return hasattr(module, "dtype") and not isinstance(getattr(type(module), "dtype", None), property)


def _require_floats(tree: PolicyTree, variables: Any, args: Any, kwargs: Any) -> None:
    if variables and not any(is_castable(leaf) for leaf in jax.tree.leaves((variables, args, kwargs))):
        raise InputError(f"precision {tree}: neither the variables nor the inputs of the model hold a float to cast")


def _matmul_precision(policy: Policy) -> Any:
    precision = policy.matmul_precision
    return contextlib.nullcontext() if precision is None else jax.default_matmul_precision(precision)


class _Call:
    """One call of a model under a tree of policies: a Linen method interceptor, and what it has seen so far.

    It runs wherever Flax runs a method, lifted transforms included.
    """

    def __init__(self, tree: PolicyTree, axis_name: str | None, model: Any):
        self.tree, self.axis_name, self.model = tree, axis_name, model
        self.observer = _observer.get()
        self.modules = Modules()
        if isinstance(model, nn.Module):
            self.modules.meet("", model)
        self.active: list[tuple[str, Policy]] = []  # the modules whose methods are running, the innermost last
        self.inputs: dict[int, tuple[Any, Any]] = {}  # the model's inputs as cast and as they came, by id of the cast
        # Where a policy leaves it to JAX: what is in force now.
        self.matmul = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]

    def policy_of(self, path: str) -> Policy:
        """The policy of the module at `path`, as far as modules have been met."""
        rule = self.modules.rule(self.tree, path)
        return self.tree.default if rule is None else rule.policy

    def remember(self, given: Any, cast: Any) -> None:
        """Notes which inputs of the model were rounded."""
        for before, after in zip(jax.tree.leaves(given), jax.tree.leaves(cast), strict=True):
            if before is not after:
                self.inputs[id(after)] = after, before

    def check(self, variables: Any, args: Any) -> None:
        """Raises InputError where a rule names no module: neither one with parameters nor one that can be called."""
        params = by_path(nn.unbox(dict(variables).get("params", {})))
        above = {path.rpartition("/")[0] for path in params}
        known = {path: self.modules.classes.get(path, frozenset()) for path in (*self.modules.classes, *above)}
        if any(not any(rule.names(path, known) for path in known) for rule in self.tree.rules):
            if isinstance(self.model, nn.Module):
                # There may be modules that only the other mode calls. Uncast: this is the model without any policy.
                explain(self.model, self.tree, *args)
            else:
                self.tree.require_match(known)

    def intercept(
        self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        """Runs one method of one module under its policy, before the eyes of an observer where there is one."""
        out = self._run(next_fun, args, kwargs, context)
        if self.observer is None or context.method_name != "__call__":
            return out
        return self.observer("/".join(context.module.path), out)

    def _run(self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module, method = context.module, context.method_name
        if method == "<lambda>":  # Flax's own, around a transformed class: no module of the user's
            return next_fun(*args, **kwargs)
        path = "/".join(module.path)
        self.modules.meet(path, module)
        rule = self.modules.rule(self.tree, path)
        policy = self.tree.default if rule is None else rule.policy
        if not self.tree.rules or method == "setup" or not hasattr(type(module), method):
            # One policy for all, or a function that was lifted over the module.
            out = _under(policy, self.axis_name, next_fun, args, kwargs, module, method)
            return _with_carry_as_given(out, args) if self.tree.rules else out
        given = args
        carry, args = (
            (args[:1], args[1:]) if isinstance(module, nn.RNNCellBase) and method == "__call__" else ((), args)
        )
        # An edge is where a module is called from outside that a rule names, or whose caller has another policy; the
        # model's own is in `with_policy`.
        outside = path != "" and path not in [at for at, _ in self.active]
        named = outside and rule is not None and rule.names(path, self.modules.classes)
        caller = self.active[-1][1] if self.active else policy
        if named or (outside and caller != policy):
            args, kwargs = jax.tree.map(
                lambda x: cast_floats(self._unrounded(x, policy), policy.compute_dtype), (args, kwargs)
            )
        self.active.append((path, policy))
        try:
            with jax.default_matmul_precision(policy.matmul_precision or self.matmul):
                out = _under(policy, self.axis_name, next_fun, (*carry, *args), kwargs, module, method)
        finally:
            self.active.pop()
        if named:
            out = policy.cast_to_output(out)
        elif outside:
            out = cast_floats(out, caller.compute_dtype) if caller != policy else out
        return _with_carry_as_given(out, given, cell=bool(carry))

    def _unrounded(self, x: Any, policy: Policy) -> Any:
        """The model's input that `x` is the rounded form of, where it is one and this policy keeps more of it."""
        cast, given = self.inputs.get(id(x), (None, None))
        return given if cast is x and policy.compute_dtype.itemsize > x.dtype.itemsize else x


def _with_carry_as_given(out: Any, args: Any, *, cell: bool = False) -> Any:
    """A result `(carry, y)` of a scan's body, or a recurrent cell, in the dtypes of the carry that it was called with.

    It has to go into the next turn, whatever a rule says of outputs.
    """
    if not (isinstance(out, tuple) and len(out) == 2 and args):
        return out
    before, after = args[0], out[0]
    structure: Any = jax.tree.structure(before)
    alike = structure == jax.tree.structure(after) and jax.tree.all(
        jax.tree.map(lambda a, b: is_castable(a) and is_castable(b) and a.shape == b.shape, before, after)
    )
    if not (alike and (cell or _is_scanned())):
        return out
    return jax.tree.map(lambda a, b: cast_floats(b, a.dtype), before, after), out[1]


def _is_scanned() -> bool:
    """Whether `nn.scan` stands between the method that runs and that of the module which called it.

    An interceptor is not told, and `(carry, y)` may as well be a result and a loss beside it: the stack says.
    """
    frame: types.FrameType | None = sys._getframe()
    methods = 0
    while frame is not None and methods < 2:
        if frame.f_globals.get("__name__") == flax.core.axes_scan.__name__:
            return True
        methods += frame.f_code is _Call.intercept.__code__
        frame = frame.f_back
    return False


class Modules:
    """Modules met so far: what rules may call them."""

    def __init__(self) -> None:
        self.classes: dict[str, frozenset[str]] = {}  # names of the class and its bases, by path
        self.owners: dict[str, str] = {}  # a recurrent cell stands beside its nn.RNN, and belongs to it

    def meet(self, path: str, module: nn.Module) -> None:
        """Notes a module."""
        names = (c.__name__ for c in type(module).__mro__ if issubclass(c, nn.Module) and c is not nn.Module)
        self.classes[path] = self.classes.get(path, frozenset()) | frozenset(names)
        inner: list[Any] = []
        if isinstance(module, nn.RNN):
            inner = [module.cell]
        elif isinstance(module, nn.Bidirectional):
            inner = [module.forward_rnn, module.backward_rnn]
        for each in inner:
            if isinstance(each, nn.Module) and each.scope is not None:
                self.owners.setdefault("/".join(each.path), path)

    def rule(self, tree: PolicyTree, path: str) -> Rule | None:
        """The first rule that covers the module at `path`, or one that it belongs to."""
        paths = [path]
        for each in paths:  # which grows on the way
            paths += [self.owners[at] for at in path_and_above(each) if self.owners.get(at, path) not in paths]
        covering = [tree.rule(at, self.classes) for at in paths]
        return next((rule for rule in tree.rules if rule in covering), None)


def _under(
    policy: Policy,
    axis_name: str | None,
    next_fun: Callable[..., Any],
    args: Any,
    kwargs: Any,
    module: nn.Module,
    method: str,
) -> Any:
    """One method of one module under its policy."""
    dtype = policy.compute_dtype
    wide = jnp.promote_types(FLOAT32, policy.param_dtype)
    sum_in_half = policy.grad != FLOAT32

    def param(*args: Any, **kwargs: Any) -> Any:
        return cast_floats(type(module).param(module, *args, **kwargs), dtype)

    def call(**values: Any) -> Any:
        with attributes(module, **values):
            return next_fun(*args, **kwargs)

    knows_dtype = _knows_dtype(module)
    if method == "setup":
        # An embedding's own methods get the masters below; what others read of it (`embed.embedding.T`) is cast.
        return call(param=param) if not knows_dtype or isinstance(module, nn.Embed) else call()
    # A module that declares parameters and knows of no dtype: hand them out in the compute dtype.
    values: dict[str, Any] = {"dtype": dtype} if knows_dtype else {"param": param}
    if isinstance(module, nn.MultiHeadDotProductAttention) and not sum_in_half:
        values |= _softmax_in_float32(module, dtype)
    if isinstance(module, nn.BatchNorm) and module.axis_name is None:
        values["axis_name"] = axis_name
    if isinstance(module, nn.Embed) and not sum_in_half:
        values["embedding"] = _stored(module, "embedding").astype(wide)
        if method == "__call__":
            values["dtype"] = wide
        return cast_floats(call(**values), dtype)
    if isinstance(module, AFFINE) and method == "__call__" and policy.operands is not None:
        return _emulated(policy, module, call, values)
    if isinstance(module, AFFINE) and method == "__call__" and module.use_bias and not sum_in_half:
        bias = _stored(module, "bias")
        if isinstance(module, nn.Einsum) or getattr(module, "batch_dims", None):
            # The bias goes through a reshape of the layer's own: have it added in float32.
            def promote(x: Any, kernel: Any, bias: Any, **_: Any) -> Any:
                return x.astype(dtype), kernel.astype(dtype), bias.astype(wide)

            return cast_floats(call(**values, promote_dtype=promote), dtype)
        if bias is not None:
            y = call(**values, use_bias=False)
            return y + jnp.broadcast_to(bias.astype(wide), y.shape).astype(y.dtype)
    y = call(**values)
    if isinstance(module, nn.RNNCellBase) and method == "__call__":
        # The carry of a scan keeps its dtype: that of the initial carry, float32 in Flax's RNN.
        return jax.tree.map(lambda new, old: new.astype(old.dtype), y[0], args[0]), cast_floats(y[1], dtype)
    return y


def _emulated(policy: Policy, module: Any, call: Callable[..., Any], values: dict[str, Any]) -> Any:
    """A layer whose product has its operands, and the gradients of its result, in emulated formats."""

    def promote(x: Any, kernel: Any, bias: Any, **_: Any) -> Any:
        x, kernel = (quantize(v.astype(policy.compute_dtype), operands, saturate=True) for v in (x, kernel))
        return x, kernel, None if bias is None else bias.astype(policy.compute_dtype)

    operands: Any = policy.operands
    bias: Any = _stored(module, "bias") if module.use_bias else None
    apart = bias is not None and not (isinstance(module, nn.Einsum) or getattr(module, "batch_dims", None))
    y = call(**values, promote_dtype=promote, **({"use_bias": False} if apart else {}))
    y = fake_quantize(y, None, policy.cotangents, saturate=False)
    return y + jnp.broadcast_to(bias, y.shape) if apart else y


def _softmax_in_float32(module: nn.MultiHeadDotProductAttention, dtype: Any) -> dict[str, Any]:
    """Attributes by which attention takes its softmax in float32 (T4) and both its products in the compute dtype."""
    if module.attention_fn is not nn.dot_product_attention or module.attn_weights_value_einsum_cls is not None:
        return {"force_fp32_for_softmax": True}

    @functools.wraps(nn.dot_product_attention)  # Flax reads the signature
    def attention(*args: Any, precision: Any, **kwargs: Any) -> jax.Array:
        einsum = functools.partial(jnp.einsum, precision=precision)
        kwargs["qk_attn_weights_einsum"] = einsum
        # Flax leaves the weights in float32, which would make the second product a float32 one.
        kwargs["attn_weights_value_einsum"] = lambda spec, weights, value: einsum(spec, weights.astype(dtype), value)
        return nn.dot_product_attention(*args, **kwargs)

    return {"force_fp32_for_softmax": True, "attention_fn": attention}


def _stored(module: nn.Module, name: str) -> Any:
    """A parameter as it is kept, without the box of `nn.with_partitioning`; None where there is none yet."""
    return nn.unbox(module.get_variable("params", name))


def _in_dtypes_of(old: Any, new: Any) -> Any:
    """`new` with its floats in the dtypes that they have in `old`, where they are there."""
    dtypes = {path: jnp.result_type(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(old)}
    return jax.tree_util.tree_map_with_path(lambda path, x: cast_floats(x, dtypes.get(path, x.dtype)), new)


@contextlib.contextmanager
def attributes(module: nn.Module, **values: Any) -> Iterator[None]:
    """Sets attributes of one bound module for the length of a call."""
    old = {name: module.__dict__[name] for name in values if name in module.__dict__}
    for name, value in values.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in old:
                object.__setattr__(module, name, old[name])
            else:
                object.__delattr__(module, name)
