"""A policy applied to an unmodified Flax Linen module, casting at each use.

Parameters stay in their own dtype (float32 master weights) until the very operation that uses them. The cast therefore
sits inside the body of a scan, of a rematerialised block and of each use of a tied weight, and the gradients of all
uses meet in float32 (trap T1: cast once outside, a bfloat16 weight used 1000 times gets 256
for a gradient of 1000). Two gradients would still be summed in half inside one layer, so these layers get help: a bias
is broadcast in float32 and then cast (T2), an embedding is gathered in float32 and its rows are cast (T15).
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import types
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, NamedTuple

import flax.core.axes_scan
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmp.errors import InputError, nearest
from jaxmp.html.elements import cell_of
from jaxmp.jaxprs import bare
from jaxmp.modules.functions import by_operations
from jaxmp.modules.interventions import (
    LIFTED,
    Context,
    Intervention,
    MetModules,
    Order,
    Run,
    in_turn,
    intervene,
    trace_apart,
)
from jaxmp.modules.linen_layers import is_complex, knows_dtype, run_method
from jaxmp.modules.model import as_model, mode_argument, module_of
from jaxmp.modules.recipe_layers import PRODUCT_LAYERS, RecipeCall, Spread, with_stream
from jaxmp.modules.sensitive import EDGE, LAYER, ROUNDED, sensitive
from jaxmp.precision.autocast import between_layers, computing, hand_on, in_float32
from jaxmp.precision.policy import Policy
from jaxmp.precision.policy_tree import PolicyTree, Rule, as_tree
from jaxmp.precision.recipe import GRADIENT_AMAX, HISTORIES
from jaxmp.text_table import table
from jaxmp.trees import FLOAT32, HALF, by_path, cast_floats, is_castable, is_inexact, path_and_above, path_name


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

    Raises: InputError if `policy` is no policy, or `apply` is the model itself; when called, where a rule names nothing
    in the model (without `method=`), or nothing in it is a float.

    >>> model = nn.Dense(3)
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
    >>> half = Policy(jnp.float32, jnp.float16, jnp.float16)
    >>> with_policy(model.apply, half)(variables, jnp.ones((1, 2))).dtype
    dtype('float16')
    """
    if isinstance(apply, nn.Module):
        raise InputError(f"with_policy takes the function model.apply; {type(apply).__name__} is the model itself")
    return intervene(apply, UnderPolicy(policy, axis_name))


@dataclasses.dataclass(frozen=True)
class UnderPolicy(Intervention):
    """A policy as an intervention; see `with_policy`, which says what it does and raises."""

    policy: Policy | PolicyTree | str
    """the policy, a tree of them, or the text of either"""
    axis_name: str | None = None
    """mapped axis over which BatchNorm layers that name none take their statistics"""
    spread: Spread = Spread()
    """how the examples are spread, for a recipe: its random draws and its scales of whole tensors depend on it"""
    starting: bool = False
    """whether layers make the state of delayed scaling, see `init_delayed_scaling`"""

    order: ClassVar[Order] = Order.POLICY

    def __post_init__(self) -> None:
        """Parses a text."""
        object.__setattr__(self, "policy", self.tree)

    @property
    def tree(self) -> PolicyTree:
        """The policy as a tree."""
        return as_tree(self.policy)

    def trace_key(self) -> Hashable:
        """The text of the policy, and the axes; another one for each call that draws by the example's index."""
        if self.spread.index is not None and self._has_recipe:
            return object()
        return str(self.tree), self.axis_name, self.spread.axis_name, self.spread.rows, self.starting

    @property
    def _has_recipe(self) -> bool:
        return any(policy.recipe is not None for policy in self.tree.policies)

    def call(self, run: Run, model: Any, variables: Any, args: Any, kwargs: Any) -> Any:
        """One call of the model: its inputs in the compute dtype, its outputs in the output dtype."""
        tree = self.tree
        _require_floats(tree, variables, args, kwargs)
        if any(policy.recipe is not None and policy.recipe.is_stochastic for policy in tree.policies):
            kwargs = {**kwargs, "rngs": with_stream(kwargs.get("rngs"))}
        met = MetModules()
        if self._needs_operations(met, run, model, variables, args, kwargs):
            return self._by_operations(run, model, variables, args, kwargs)
        call = _Call(tree, self.axis_name, model, met, products=self._products())
        whole = call.policy_of("")
        if whole.grad != FLOAT32 and not tree.rules:
            # What casting once, outside of all uses, loses is to be seen: trap T1, and T2 and T15 with it.
            variables = {**variables, "params": whole.cast_to_compute(variables.get("params", {}))}
        cast_args, cast_kwargs = whole.cast_to_compute((args, kwargs))
        call.remember((args, kwargs), (cast_args, cast_kwargs))
        with _matmul_precision(whole):
            out = run(call.intercept, variables, cast_args, cast_kwargs)
        if kwargs.get("method") is None:
            call.check(variables, args)
        return _handed_on(whole, variables, out, mutable=kwargs.get("mutable", False) is not False)

    def _products(self) -> RecipeCall:
        return RecipeCall(self.spread, starting=self.starting)

    def _needs_operations(self, met: MetModules, run: Run, model: Any, variables: Any, args: Any, kwargs: Any) -> bool:
        """Whether the code between the model's layers fails in half precision, or is wrong there (`sensitive`)."""
        tree = self.tree
        whole = tree.lookup("")
        if not any(p.compute_dtype in HALF for p in tree.policies) or any(p.grad != FLOAT32 for p in tree.policies):
            return False
        leaves, structure = jax.tree.flatten((variables, args, kwargs))
        arrays = {i: x for i, x in enumerate(leaves) if hasattr(x, "dtype") and hasattr(x, "shape")}
        others = tuple(x for i, x in enumerate(leaves) if i not in arrays)
        types = tuple((i, x.shape, str(x.dtype)) for i, x in arrays.items())
        key: Any = (model, str(tree), self.axis_name, structure, types, others, jax.config.read("jax_enable_x64"))
        try:
            known = _NEEDS_OPERATIONS.get(key) if model is not None else None
        except TypeError:
            key, known = None, None
        if known is not None:
            return known
        call = _Call(tree, self.axis_name, model, met, looked_at=True, products=self._products())

        def call_model(variables: Any, args: Any, kwargs: Any) -> Any:
            # Where that can be, without the other interventions: an observer counts the calls that it sees.
            if not isinstance(model, nn.Module):
                return run(call.intercept, variables, args, kwargs)
            with nn.intercept_methods(in_turn((call.intercept,))):
                return model.apply(variables, *args, **kwargs)

        def traced(arrays: dict[int, Any]) -> Any:
            variables, args, kwargs = jax.tree.unflatten(structure, [arrays.get(i, x) for i, x in enumerate(leaves)])
            with jax.named_scope(ROUNDED):
                cast_args, cast_kwargs = whole.cast_to_compute((args, kwargs))
            call.remember((args, kwargs), (cast_args, cast_kwargs))
            out = call_model(variables, cast_args, cast_kwargs)
            return [x for x in jax.tree.leaves(out) if isinstance(x, jax.Array)]

        try:
            # What this leaves under nn.jit must not meet the call that follows.
            with trace_apart(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = sensitive(bare(jax.make_jaxpr(traced)(arrays)))
        except InputError:
            return False
        except Exception:
            found = True
        if key is not None and model is not None:
            if len(_NEEDS_OPERATIONS) >= 256:
                _NEEDS_OPERATIONS.clear()
            _NEEDS_OPERATIONS[key] = found
        return found

    def _by_operations(self, run: Run, model: Any, variables: Any, args: Any, kwargs: Any) -> Any:
        """One call of a model by operations between its layers; if its layers do not bear that, inside them too."""
        whole = self.tree.lookup("")

        def result(opened: bool) -> Any:
            call = _Between(self.tree, self.axis_name, model, opened, self._products())

            def called(variables: Any, args: Any, kwargs: Any) -> Any:
                args, kwargs = jax.tree.map(
                    lambda x: x.astype(FLOAT32) if is_castable(x) and x.dtype in HALF else x, (args, kwargs)
                )
                return run(call.intercept, variables, args, kwargs)

            with _matmul_precision(whole):
                out = between_layers(called, dtype=whole.compute_dtype)(variables, args, kwargs)
            if kwargs.get("method") is None:
                call.check(variables, args)
            return out

        try:
            out = result(opened=False)
        except InputError:
            raise
        except Exception:
            out = result(opened=True)
        return _handed_on(whole, variables, out, mutable=kwargs.get("mutable", False) is not False)

    def call_as_a_whole(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """`apply` of `from_nnx` under the policy by operations, see `apply_policy`."""
        whole, run = by_operations(apply, self.tree)

        def applied(variables: Any, *args: Any, **kwargs: Any) -> Any:
            out = run(variables, *args, **kwargs)
            return _handed_on(whole, variables, out, mutable=kwargs.get("mutable", False) is not False)

        return applied


def _handed_on(policy: Policy, variables: Any, out: Any, *, mutable: bool) -> Any:
    """What `apply` returned, in the output dtype; with mutable collections beside it, these in their own."""
    if not mutable:
        return policy.cast_to_output(out)
    return policy.cast_to_output(out[0]), _in_dtypes_of(variables, out[1])


class ModulePolicy(NamedTuple):
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
    """pattern of the rule that chose it; "" if it is the default"""
    own_dtype: str
    """the dtype that the model's code gives this module, which the policy overrides; "" for none"""


class Explanation(tuple[ModulePolicy, ...]):
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

    def _repr_html_(self) -> str:
        """Shows the same in a notebook."""
        return cell_of([str(self)])


def explain(
    model: Any, policy: Policy | PolicyTree | str, batch: Any, *, inputs: tuple[str, ...] = ("image",), **kwargs: Any
) -> Explanation:
    """The modules of a model, each with its policy and the rule that chose it; printed, a table.

    They come in the order in which they are first called, found by an abstract `init`: nothing runs.

    Args:
      model: a Linen module; one of `from_nnx` is a single row.
      policy: the policy, a tree of them, or the text of either.
      batch: the model's input, an array or `jax.ShapeDtypeStruct`; a tuple of several; or a batch, a dict of arrays.
      inputs: names of the arrays in such a batch that are the model's inputs.
      kwargs: further arguments of the model's `__call__`. By default it does not train.

    Raises:
      InputError: a rule names none of the modules, with the nearest in the message; or the batch lacks an input.

    >>> explain(nn.Dense(3), "mixed_float16", jnp.ones((1, 2)))[0].policy
    'p=f32,c=f16,o=f32'
    """
    tree, arguments = as_tree(policy), _inputs(batch, inputs)
    found, met, params = _modules(model, *arguments, **kwargs)
    classes = met.classes
    if any(not any(rule.names(path, classes) for path in classes) for rule in tree.rules):
        # It may name what only training calls.
        classes = (
            classes
            | _modules(model, *arguments, **{**mode_argument(module_of(model), True, "init"), **kwargs})[1].classes
        )
    tree.require_match(classes)
    sizes = dict.fromkeys(found, 0)
    for path, leaf in by_path(params).items():
        sizes[_owner(path, found)] += leaf.size
    rows = []
    for path, module in found.items():
        rule = _rule(tree, met, path)
        rows.append(
            ModulePolicy(
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
        rule = _rule(policy, met, _owner(path_name(path), found))
        return (policy.default if rule is None else rule.policy).cast_to_param(leaf)

    return jax.tree_util.tree_map_with_path(cast, params)


def init_delayed_scaling(model: Any, policy: Policy | PolicyTree | str, *inputs: Any) -> dict[str, Any]:
    """Makes the state of the delayed scales of a model under a policy; {} if no recipe has any.

    It is a part of the model state: `model_state | init_delayed_scaling(...)`.

    Args:
      model: a Linen module.
      policy: the policy, a tree of them, or the text of either.
      inputs: the model's inputs, arrays or `jax.ShapeDtypeStruct`s, with any number of rows.

    Raises:
      InputError: a layer with a delayed scale stands inside nn.scan or nn.vmap.

    >>> state = init_delayed_scaling(nn.Dense(3), "fp8_delayed", jnp.ones((1, 2)))
    >>> sorted(state), state["delayed_scaling"]["weights_0"]["amax_history"].shape
    (['delayed_scaling', 'gradient_amax'], (1024,))
    """
    tree = as_tree(policy)
    if not any(each.recipe is not None and each.recipe.is_delayed for each in tree.policies):
        return {}
    apply = intervene(model.apply, UnderPolicy(tree, starting=True))

    def start(*inputs: Any) -> Any:
        key = jax.random.key(0)
        params, model_state = as_model(model).init(key, *inputs)
        mode = mode_argument(model, True)
        variables = {"params": params, **model_state}
        mutable = [*model_state, HISTORIES, GRADIENT_AMAX]
        _, made = apply(variables, *inputs, rngs={"params": key}, mutable=mutable, **mode)
        return {name: made[name] for name in (HISTORIES, GRADIENT_AMAX) if name in made}

    shapes = jax.eval_shape(start, *inputs)
    # Scales begin at 1, and nothing is known of magnitudes: see `DelayedScaling.init`.
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.full(x.shape, float(path_name(path).endswith("/scale")), x.dtype), dict(shapes)
    )


def _inputs(batch: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    """The inputs of a model: `batch` itself, what it holds, or, of a dict, what has these names."""
    if not isinstance(batch, Mapping):
        return batch if isinstance(batch, tuple) else (batch,)
    missing = [name for name in names if name not in batch]
    if missing:
        raise InputError(f"the batch has no {missing[0]!r}; it has {', '.join(batch)}{nearest(missing[0], batch)}")
    return tuple(batch[name] for name in names)


def module_classes(model: Any, *inputs: Any) -> dict[str, frozenset[str]]:
    """The names of the class of each module and of its bases, by path, found by an abstract `init`.

    Args:
      model: a Linen module; one of `from_nnx` has no modules that are known.
      inputs: shapes and dtypes of the model's inputs.
    """
    return _modules(model, *inputs)[1].classes


def _modules(model: Any, *inputs: Any, **kwargs: Any) -> tuple[dict[str, Any], MetModules, Any]:
    """The modules that `init` calls, by path, what rules may call them, and the shapes of the parameters, unboxed."""
    found: dict[str, Any] = {} if isinstance(module_of(model), nn.Module) else {"": model}
    met = MetModules()

    def note(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Context) -> Any:
        if context.method_name not in (LIFTED, "setup"):
            path = "/".join(context.module.path)
            found.setdefault(path, context.module)
            met.meet(path, context.module)
        return next_fun(*args, **kwargs)

    def init(*inputs: Any) -> Any:
        return as_model(model).init(jax.random.key(0), *inputs, **kwargs)[0]

    with nn.intercept_methods(note):
        params = jax.eval_shape(init, *inputs)
    return found, met, nn.unbox(params)


def _rule(tree: PolicyTree, met: MetModules, path: str) -> Rule | None:
    """The first rule that covers the module at `path`, or one that it belongs to."""
    covering = [tree.rule(at, met.classes) for at in met.with_owners(path)]
    return next((rule for rule in tree.rules if rule in covering), None)


def _owner(path: str, modules: Any) -> str:
    """The module that declares the parameter at `path`, whose own name may contain slashes."""
    while path and path not in modules:
        path = path.rpartition("/")[0]
    return path


def _own_dtype(module: nn.Module) -> str:
    dtype = getattr(module, "dtype", None) if knows_dtype(module) else None
    return "" if dtype is None else jnp.dtype(dtype).name


def _require_floats(tree: PolicyTree, variables: Any, args: Any, kwargs: Any) -> None:
    if variables and not any(is_inexact(leaf) for leaf in jax.tree.leaves((variables, args, kwargs))):
        raise InputError(f"precision {tree}: neither the variables nor the inputs of the model hold a float to cast")


def _matmul_precision(policy: Policy) -> Any:
    precision = policy.matmul_precision
    return contextlib.nullcontext() if precision is None else jax.default_matmul_precision(precision)


class _Call:
    """One call of a model under a tree of policies: a Linen method interceptor, and what it has seen so far.

    It runs wherever Flax runs a method, lifted transforms included.
    """

    def __init__(
        self,
        tree: PolicyTree,
        axis_name: str | None,
        model: Any,
        met: MetModules,
        *,
        products: RecipeCall,
        looked_at: bool = False,
    ):
        self.products = products
        self.called: dict[str, nn.Module] = {}  # the modules by path, for messages
        self.tree, self.axis_name, self.model = tree, axis_name, model
        self.modules = met
        self.looked_at = looked_at  # whether scopes have to say what is a layer, see `sensitive`
        if isinstance(model, nn.Module):
            self.modules.meet("", model)
        self.active: list[tuple[str, Policy]] = []  # the modules whose methods are running, the innermost last
        self.inputs: dict[int, tuple[Any, Any]] = {}  # the model's inputs as cast and as they came, by id of the cast
        # Where a policy leaves it to JAX: what is in force now.
        self.matmul = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]

    def policy_of(self, path: str) -> Policy:
        """The policy of the module at `path`, as far as modules have been met."""
        rule = _rule(self.tree, self.modules, path)
        return self.tree.default if rule is None else rule.policy

    def meet(self, module: nn.Module) -> tuple[str, Rule | None, Policy]:
        """The path of a module that is called, the rule that names it or a module around it, and its policy."""
        path = "/".join(module.path)
        self.modules.meet(path, module)
        self.called[path] = module
        rule = _rule(self.tree, self.modules, path)
        return path, rule, self.tree.default if rule is None else rule.policy

    def remember(self, given: Any, cast: Any) -> None:
        """Notes which inputs of the model were rounded."""
        for before, after in zip(jax.tree.leaves(given), jax.tree.leaves(cast), strict=True):
            if before is not after:
                self.inputs[id(after)] = after, before

    def check(self, variables: Any, args: Any) -> None:
        """Raises InputError if a rule names no module, or there is a recipe and no layer has a product for it.

        A rule may name what holds parameters, or can be called. Not for a call of another method than `__call__`, which
        need not reach what rules and recipes are for.
        """
        params = by_path(nn.unbox(dict(variables).get("params", {})))
        above = {at for path in params for at in path_and_above(path)[:-1]}
        known = {path: self.modules.classes.get(path, frozenset()) for path in (*self.modules.classes, *above)}
        if any(not any(rule.names(path, known) for path in known) for rule in self.tree.rules):
            if isinstance(self.model, nn.Module):
                # There may be modules that only the other mode calls. Uncast: this is the model without any policy.
                explain(self.model, self.tree, args)
            else:
                self.tree.require_match(known)
        recipes = [policy for policy in self.tree.policies if policy.recipe is not None]
        if recipes and not self.products.calls:
            classes = sorted({type(module).__name__ for module in self.called.values()})
            raise InputError(
                f"precision {self.tree}: no layer has a product that {recipes[0].recipe} rounds. The model called "
                f"{', '.join(classes) or 'no layer'}; expected one of "
                f"{', '.join(layer.__name__ for layer in PRODUCT_LAYERS)} under this policy"
            )

    def intercept(self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Context) -> Any:
        """Runs one method of one module under its policy."""
        module, method = context.module, context.method_name
        if method == LIFTED:
            return next_fun(*args, **kwargs)
        path, rule, policy = self.meet(module)
        scope = jax.named_scope if self.looked_at else _no_scope
        layer = scope(LAYER) if _is_layer(module) else contextlib.nullcontext()
        if not self.tree.rules or method == "setup" or not hasattr(type(module), method):
            # One policy for all, or a function that was lifted over the module.
            with layer:
                out = run_method(policy, self.axis_name, next_fun, args, kwargs, module, method, self.products)
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
            with scope(EDGE):
                args, kwargs = jax.tree.map(
                    lambda x: cast_floats(self._unrounded(x, policy), policy.compute_dtype), (args, kwargs)
                )
        self.active.append((path, policy))
        try:
            with jax.default_matmul_precision(policy.matmul_precision or self.matmul), layer:
                out = run_method(
                    policy, self.axis_name, next_fun, (*carry, *args), kwargs, module, method, self.products
                )
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


def _no_scope(name: str) -> Any:
    return contextlib.nullcontext()


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of Flax's, whose operations all have the dtype that it is given.

    Attention holds other layers, and a cache of its own.
    """
    own = knows_dtype(module) and not isinstance(module, nn.MultiHeadDotProductAttention)
    return own and any(c.__module__.startswith("flax.") for c in type(module).__mro__[:1])


class _Between(_Call):
    """One call of a model whose code between layers is traced in float32, for `between_layers`."""

    def __init__(self, tree: PolicyTree, axis_name: str | None, model: Any, opened: bool, products: RecipeCall):
        super().__init__(tree, axis_name, model, MetModules(), products=products)
        self.opened = opened  # whether the operations of layers count as the model's own

    def intercept(self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Context) -> Any:
        """Runs one method of one module: a layer under its policy, what is around it in float32."""
        module, method = context.module, context.method_name
        if method == LIFTED:
            return next_fun(*args, **kwargs)
        path, rule, policy = self.meet(module)
        if is_complex(module, (args, kwargs)):
            return next_fun(*args, **kwargs)
        layer = _is_layer(module) and not self.opened
        wide = dataclasses.replace(policy, compute_dtype=FLOAT32, operands=None, cotangents=None)
        if method == "setup" or not hasattr(type(module), method):
            return run_method(
                policy if layer else wide, self.axis_name, next_fun, args, kwargs, module, method, self.products
            )
        outside = path != "" and path not in [at for at, _ in self.active]
        named = outside and rule is not None and rule.names(path, self.modules.classes)
        caller = self.active[-1][1] if self.active else self.tree.default
        edge = named or (outside and caller != policy)
        carry, rest = (
            (args[:1], args[1:]) if isinstance(module, nn.RNNCellBase) and method == "__call__" else ((), args)
        )
        if edge or (layer and policy.compute_dtype not in HALF):
            rest, kwargs = _to(policy.compute_dtype, (rest, kwargs))
        if layer and policy.compute_dtype in HALF:
            rest, kwargs = cast_floats((rest, kwargs), policy.compute_dtype)
        self.active.append((path, policy))
        try:
            with jax.default_matmul_precision(policy.matmul_precision or self.matmul), computing(policy.compute_dtype):
                run_under = policy if layer else wide
                out = run_method(
                    run_under, self.axis_name, next_fun, (*carry, *rest), kwargs, module, method, self.products
                )
        finally:
            self.active.pop()
        if layer:
            out = jax.tree.map(lambda x: hand_on(x, x.dtype) if is_castable(x) else x, out)
        if not edge:
            return out
        dtype = policy.output_dtype if named else caller.compute_dtype
        return (out[0], _to(dtype, out[1])) if carry else _to(dtype, out)


def _to(dtype: Any, tree: Any) -> Any:
    """The floats of `tree`, which are typed float32, in the dtype of a module that gets them."""
    return hand_on(tree, dtype) if dtype in HALF else in_float32(tree)


_NEEDS_OPERATIONS: dict[Any, bool] = {}
"""What `sensitive` said, by model, policy, and types of arguments: a call that is not traced pays for it once."""


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


def _in_dtypes_of(old: Any, new: Any) -> Any:
    """`new` with its floats in the dtypes that they have in `old`, where they are there."""
    dtypes = {path: jnp.result_type(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(old)}
    return jax.tree_util.tree_map_with_path(lambda path, x: cast_floats(x, dtypes.get(path, x.dtype)), new)
