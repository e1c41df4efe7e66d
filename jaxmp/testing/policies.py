"""Laws of a policy on a model: whether each dtype is the one asked for, and how far results are from float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.errors import InputError, nearest
from jaxmp.instruments.float64 import draws, in_float64
from jaxmp.jaxprs import equations
from jaxmp.modules.linen import cast_to_param, explain, with_policy
from jaxmp.modules.model import mode_argument
from jaxmp.precision.policy import Policy, parse_policy
from jaxmp.precision.policy_tree import PolicyTree
from jaxmp.testing.laws import Broken, Law, Laws, Skipped, calling, require
from jaxmp.testing.snapshots import describe, first_difference, snapshot
from jaxmp.testing.strategies import odd_trees
from jaxmp.testing.sums import SUMS, terms
from jaxmp.trees import cast_floats, is_castable, is_floating, is_inexact, same_structure, upcast

MULTIPLE = 64
"""Unit roundoffs of the coarsest dtype by which outputs and gradients may differ from float64."""
NORMS = ("LayerNorm", "BatchNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}

Loss = Callable[[Any], jax.Array]


def policy_laws(
    model: nn.Module,
    policy: Policy | PolicyTree | str,
    batch: Any,
    *,
    inputs: tuple[str, ...] = ("image",),
    loss: Loss | None = None,
    multiple: float = MULTIPLE,
    apply_policy: Callable[[Any, PolicyTree], Any] = with_policy,
) -> Laws:
    """Returns the laws of a policy on a model: a table when printed, tests when pytest collects them.

    The parameters are those of `model.init(jax.random.key(0), ...)`. The model runs as in training; one that needs a
    key for that, as dropout does, runs as in evaluation. If it draws there too, it draws the same numbers in float64.

    Args:
      model: a Linen module.
      policy: a policy, a tree of them, or the text of one.
      batch: the model's input, an array with examples along axis 0; a tuple of several; or a dict of arrays.
      inputs: the keys of the model's inputs in such a dict, in order.
      loss: `loss(outputs)`, the scalar to differentiate, in float32 or wider; by default half the mean square.
      multiple: by how many unit roundoffs of the coarsest dtype outputs and gradients may differ from float64.
      apply_policy: `apply_policy(model.apply, tree)` returns an apply under the policy; by default `with_policy`. To
        test an implementation other than jaxmp's.

    Raises:
      InputError: the policy cannot be read, a rule matches nothing, or the batch lacks an input.

    >>> laws = policy_laws(nn.Dense(2), "mixed_float16", jnp.ones((3, 4)))
    >>> laws["dots_have_compute_dtype"].verdict
    'holds'
    """
    tree = policy if isinstance(policy, PolicyTree) else _tree(policy)
    subject = _Subject(model, tree, _inputs(batch, inputs), loss or half_mean_square, multiple, apply_policy)
    rows = subject.rows  # a rule that matches nothing is an error before any law runs
    checks = (
        text_round_trip,
        casts_are_sound,
        gradients_match_parameters,
        outputs_have_dtype,
        norms_keep_compute_dtype,
        model_state_keeps_dtype,
        dots_have_compute_dtype,
        sums_in_float32,
        activations_fit,
        gradients_fit,
        outputs_near_float64,
        gradients_near_float64,
    )
    laws = [Law.of(check, subject) for check in checks]
    return Laws(f"{type(model).__name__} ({len(rows)} modules) under {tree}", laws)


def half_mean_square(outputs: Any) -> jax.Array:
    """Returns half the mean square of each float array in the outputs, summed; in float32 or wider."""
    wide = [upcast(x) for x in jax.tree.leaves(outputs) if is_inexact(x) and x.dtype.itemsize > 1]
    return sum((jnp.mean(jnp.square(jnp.abs(x) if jnp.iscomplexobj(x) else x)) for x in wide), jnp.float32(0)) / 2


def _tree(policy: Policy | str) -> PolicyTree:
    return PolicyTree.parse(policy) if isinstance(policy, str) else PolicyTree((), policy)


def _inputs(batch: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    if isinstance(batch, Mapping):
        for name in names:
            if name not in batch:
                raise InputError(
                    f"policy_laws: the batch has no {name!r}; it has {', '.join(batch)}{nearest(name, batch)}. Name "
                    "the model's inputs: inputs=(...)"
                )
        batch = tuple(batch[name] for name in names)
    return batch if isinstance(batch, tuple) else (batch,)


@dataclasses.dataclass(frozen=True)
class _Subject:
    model: Any
    tree: PolicyTree
    inputs: tuple[Any, ...]
    loss: Loss
    multiple: float
    apply_policy: Callable[[Any, PolicyTree], Any]

    @functools.cached_property
    def rows(self) -> Any:
        return explain(self.model, self.tree, tuple(self.inputs))

    def policy_of(self, path: str) -> Policy:
        """The policy of a module, as `explain` has it: below a module that a rule names, also of what it calls."""
        found = {row.module: row.policy for row in self.rows}
        return parse_policy(found[path]) if path in found else self.tree.default

    @functools.cached_property
    def classes(self) -> dict[str, set[str]]:
        """For rules by class: of each module."""
        found: dict[str, set[str]] = {}

        def note(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            names = {c.__name__ for c in type(context.module).__mro__ if issubclass(c, nn.Module)}
            found.setdefault("/".join(context.module.path), names)
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(note):
            jax.eval_shape(lambda: self.model.init(jax.random.key(0), *self.inputs, **mode_argument(self.model, False)))
        return found

    @functools.cached_property
    def mode(self) -> dict[str, Any]:
        """How the model is told to train; to evaluate, where training would draw random numbers.

        A model that draws in evaluation too gets a key.
        """
        for mode in (mode_argument(self.model, True), mode_argument(self.model, False)):
            try:
                jax.eval_shape(lambda v: self._plain(v, **mode), self.fresh)  # noqa: B023
                return mode
            except flax.errors.InvalidRngError:
                pass
        with jax.ensure_compile_time_eval():  # it may be asked for first while a loss is traced
            return {**mode, "rngs": {"params": jax.random.key(1)}}

    def _plain(self, variables: Any, **mode: Any) -> Any:
        return self.model.apply(variables, *self.inputs, mutable=self.mutable, **mode)

    @functools.cached_property
    def draws(self) -> bool:
        """Whether the model draws random numbers as it is run here."""
        return draws(lambda v: self._plain(v, **self.mode)[0], self.fresh)

    @functools.cached_property
    def fresh(self) -> Any:
        """The variables in float32."""
        variables = self.model.init(jax.random.key(0), *self.inputs, **mode_argument(self.model, False))
        return {name: tree for name, tree in nn.unbox(dict(variables)).items() if name != "intermediates"}

    @property
    def mutable(self) -> list[str]:
        return [name for name in self.fresh if name != "params"]

    @functools.cached_property
    def variables(self) -> Any:
        params = cast_to_param(self.model, self.tree, self.fresh.get("params", {}), *self.inputs)
        return {**self.fresh, "params": params}

    def apply(self, variables: Any, inputs: Any, tree: PolicyTree | None = None, **kwargs: Any) -> Any:
        """(outputs, mutated collections) under the policy, or under another one as jaxmp applies it."""
        run = self.apply_policy(self.model.apply, self.tree) if tree is None else with_policy(self.model.apply, tree)
        return calling("the model under the policy", lambda: run(variables, *inputs, **self.mode, **kwargs))

    def scaled_loss(self, params: Any, scale: Any, inputs: Any) -> jax.Array:
        outputs, _ = self.apply({**self.variables, "params": params}, inputs, mutable=self.mutable)
        return self.loss(outputs) * scale

    def gradients(self, scale: float, rows: slice = slice(None)) -> Any:
        """The still scaled gradients on some rows of the batch."""
        inputs = jax.tree.map(lambda x: x[rows], self.inputs)
        return self._gradient(self.variables["params"], jnp.float32(scale), inputs)

    @functools.cached_property
    def _gradient(self) -> Any:
        return jax.jit(jax.grad(self.scaled_loss))

    @functools.cached_property
    def gradient_jaxpr(self) -> Any:
        return jax.make_jaxpr(jax.grad(self.scaled_loss))(self.variables["params"], jnp.float32(1), self.inputs)

    def module_at(self, names: str) -> str:
        """The path of the innermost module in a stack of names, "" for the model itself."""
        stack = [name.strip("()") for name in names.split("/")]
        best = (0, 0, "")
        for row in self.rows:
            path = row.module.split("/")
            for end in range(len(stack), len(path) - 1, -1):
                if row.module and stack[end - len(path) : end] == path:
                    best = max(best, (end, len(path), row.module))
                    break
        return best[2]

    @property
    def unit_roundoff(self) -> float:
        """Of the coarsest compute dtype or format."""
        formats = [f for p in self.tree.policies for f in (p.operands, p.cotangents) if f is not None]
        dtypes = [d.name for p in self.tree.policies for d in (p.compute_dtype, p.param_dtype, p.output_dtype)]
        return max([UNIT_ROUNDOFF[name] for name in dtypes] + [f.unit_roundoff for f in formats])

    @property
    def bound(self) -> float:
        return self.multiple * self.unit_roundoff

    @functools.cached_property
    def captured(self) -> Any:
        """What each module hands on, by path: under the policy, and in float64."""
        if not isinstance(self.model, nn.Module):
            raise Skipped("only a Linen model shows what each of its modules hands on")
        return self._capture(None), self._capture(FLOAT64)

    def _capture(self, tree: PolicyTree | None) -> dict[str, Any]:
        def run(variables: Any, inputs: Any) -> Any:
            mutable = [*self.mutable, "intermediates"]
            return self.apply(variables, inputs, tree, mutable=mutable, capture_intermediates=True)[1]

        if tree is None:
            found = jax.jit(run)(self.variables, self.inputs)
        else:
            with jax.enable_x64(True):
                found = jax.jit(run)(*_doubled((self.variables, self.inputs)))
        flat = flax.traverse_util.flatten_dict(found.get("intermediates", {}), sep="/")
        return {path.removesuffix("__call__").rstrip("/"): value for path, value in flat.items() if "__call__" in path}

    @functools.cached_property
    def plain_float64(self) -> bool:
        """Whether the model by itself, on float64, runs in float64: no dtypes of its own, no carries in float32."""
        cells = any("RNNCellBase" in names for names in self.classes.values())
        return not cells and not any(row.own_dtype for row in self.rows)

    def in_float64(self, variables: Any, inputs: Any) -> Any:
        """(outputs, mutated collections) of the model in float64, of float64 variables and inputs."""
        if self.plain_float64:
            return self.model.apply(variables, *inputs, **self.mode, mutable=self.mutable)
        return self.apply(variables, inputs, FLOAT64, mutable=self.mutable)

    @property
    def noise(self) -> float:
        """Share of the largest number of a float64 gradient below which there are rounding errors alone.

        A policy for float64 leaves softmax in attention and carries in float32.
        """
        return 2.0**-40 if self.plain_float64 else 2.0**-24

    def reference(self, rows: slice = slice(None)) -> tuple[Any, Any]:
        """(outputs, gradients of the unscaled loss) in float64, from the parameters as they are kept."""
        inputs = jax.tree.map(lambda x: x[rows], self.inputs)
        if self.draws:  # others in float64
            return self._with_the_same_draws(inputs)
        with jax.enable_x64(True):
            variables, inputs = _doubled((self.variables, inputs))
            params = variables.pop("params", {})

            def run(params: Any) -> Any:
                outputs, _ = self.in_float64({**variables, "params": params}, inputs)
                return self.loss(outputs), outputs

            grads, outputs = jax.jit(jax.grad(run, has_aux=True))(params)
            return jax.tree.map(np.asarray, (outputs, grads))

    def _with_the_same_draws(self, inputs: Any) -> tuple[Any, Any]:
        """As `reference`: of the plain model traced in float32, each operation in float64."""
        variables = cast_floats(self.variables, jnp.float32)
        params = variables.pop("params", {})

        def run(params: Any) -> Any:
            outputs, _ = self.model.apply({**variables, "params": params}, *inputs, **self.mode, mutable=self.mutable)
            return self.loss(outputs), outputs

        grads, outputs = in_float64(jax.grad(run, has_aux=True))(params)
        return outputs, grads

    def outputs(self, rows: slice = slice(None)) -> Any:
        inputs = jax.tree.map(lambda x: x[rows], self.inputs)
        return jax.jit(lambda v, x: self.apply(v, x, mutable=self.mutable)[0])(self.variables, inputs)

    def largest_scale(self, rows: slice = slice(None)) -> tuple[float, Any]:
        """The scale at which training would settle, and the gradients under it, in float64 and unscaled.

        From 2**15 down to where all gradients are finite, as `DynamicScaler` goes; 1 where nothing wants a scale.
        """
        for exponent in range(15, -15, -1) if self.tree.wants_scaling else (0,):
            grads = self.gradients(2.0**exponent, rows)
            wide = jax.tree.map(lambda g: np.asarray(g).astype(_double(g)), grads)
            if all(np.all(np.isfinite(g)) for g in jax.tree.leaves(wide)):
                return 2.0**exponent, jax.tree.map(lambda g: g * 2.0**-exponent, wide)  # noqa: B023
        bad = [
            jax.tree_util.keystr(p) for p, g in jax.tree_util.tree_leaves_with_path(wide) if not np.isfinite(g).all()
        ]
        raise Broken(f"the gradient of {bad[0]} is not finite under any loss scale down to {2.0**exponent:g}")


FLOAT64 = PolicyTree((), parse_policy("f64"))


# --- laws


def text_round_trip(subject: _Subject) -> None:
    """The text of the policy is read back as the same policy.

    Defect B6.
    """
    for value in (subject.tree, *subject.tree.policies):
        parse = PolicyTree.parse if isinstance(value, PolicyTree) else parse_policy
        if parse(str(value)) != value:
            raise Broken(f"{value!r} is written as {str(value)!r}, which is read as {parse(str(value))!r}")


def casts_are_sound(subject: _Subject) -> None:
    """Casts keep the structure and all leaves but floats, and casting twice is casting once.

    Defects B4 and B5.
    """
    casts = [
        (f"{name} of {policy}", getattr(policy, name))
        for policy in dict.fromkeys(subject.tree.policies)
        for name in ("cast_to_param", "cast_to_compute", "cast_to_output")
    ]

    def counterexample(tree: Any) -> str | None:
        for name, cast in casts:
            once = calling(name, cast, tree, given=describe(tree))
            if not same_structure(once, tree):
                return f"{name} turned {describe(tree)} into {describe(once)}"
            for before, after in zip(jax.tree.leaves(tree), jax.tree.leaves(once), strict=True):
                if not is_castable(before) and (
                    getattr(before, "dtype", type(before)) != getattr(after, "dtype", type(after))
                    or first_difference(snapshot(before), snapshot(after))
                ):
                    return f"{name} turned {describe(before)} into {describe(after)}"
            if different := first_difference(snapshot(once), snapshot(cast(once))):
                return f"{name} of {describe(tree)}, done twice: {different}"
        return None

    require(odd_trees(), counterexample)


def gradients_match_parameters(subject: _Subject) -> None:
    """Each gradient has the dtype of its parameter.

    The masters are differentiated, and the casts are inside.
    """
    params = subject.variables["params"]
    grads = jax.eval_shape(jax.grad(subject.scaled_loss), params, jnp.float32(1), subject.inputs)
    for (path, param), grad in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(grads), strict=True):
        if param.dtype != grad.dtype:
            name = jax.tree_util.keystr(path)
            raise Broken(f"the parameter {name} is {describe(param)}, its gradient {describe(grad)}")


def outputs_have_dtype(subject: _Subject) -> None:
    """The model, and each module that a rule names, returns the output dtype of its policy."""
    shapes = jax.eval_shape(lambda v: subject.apply(v, subject.inputs, mutable=subject.mutable)[0], subject.variables)
    wanted = subject.tree.lookup("", subject.classes).output_dtype
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
        if is_floating(x) and x.dtype != wanted:
            raise Broken(f"the model's output{jax.tree_util.keystr(path)} is {describe(x)}; asked for: {wanted.name}")
    under, _ = subject.captured
    for path, values in under.items():
        rule = subject.tree.rule(path, subject.classes)
        if not path or rule is None or not rule.names(path, subject.classes):
            continue
        if any("RNNCellBase" in name for name in subject.classes.get(path, ())):
            continue  # it hands on a carry as well, in the carry's dtype
        for x in jax.tree.leaves(values):
            if is_castable(x) and x.dtype != rule.policy.output_dtype:
                raise Broken(f"{path} hands on {describe(x)}; the rule {rule} asks for {rule.policy.output_dtype.name}")


def norms_keep_compute_dtype(subject: _Subject) -> None:
    """Each normalisation returns the compute dtype of its policy.

    Statistics and affine are in float32; a float32 result would make all that follows float32 (trap T8).
    """
    under, _ = subject.captured
    norms = [row for row in subject.rows if row.type in NORMS]
    if not norms:
        raise Skipped("the model has no norm")
    for row in norms:
        rule = subject.tree.rule(row.module, subject.classes)
        policy = subject.policy_of(row.module)
        # A norm that a rule names is an edge, with the output dtype.
        edge = rule is not None and rule.names(row.module, subject.classes)
        wanted = policy.output_dtype if edge else policy.compute_dtype
        for x in jax.tree.leaves(under.get(row.module, ())):
            if row.module and is_castable(x) and x.dtype != wanted:
                raise Broken(f"{row.module} ({row.type}) hands on {describe(x)}; expected {wanted.name}")


def model_state_keeps_dtype(subject: _Subject) -> None:
    """Batch statistics and other model state keep their dtypes.

    Otherwise the second step is another program, or the statistics are rounded.
    """
    if not subject.mutable:
        raise Skipped("the model has no state but its parameters")
    before = {name: subject.variables[name] for name in subject.mutable}
    after = jax.eval_shape(lambda v: subject.apply(v, subject.inputs, mutable=subject.mutable)[1], subject.variables)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(dict(after)), strict=True):
        if a.dtype != b.dtype:
            raise Broken(f"{jax.tree_util.keystr(path)} was {describe(a)}, and is {describe(b)} after a step")


def dots_have_compute_dtype(subject: _Subject) -> None:
    """Every matrix product and convolution runs in the compute dtype of its module.

    Trap T8: one float32 array makes all products after it float32.
    """
    for equation, names in equations(subject.gradient_jaxpr):
        if equation.primitive.name not in ("dot_general", "conv_general_dilated"):
            continue
        if equation.primitive.name == "dot_general" and not equation.params["dimension_numbers"][0][0]:
            continue  # an outer product sums nothing
        path = subject.module_at(names)
        if any(row.module == path and row.type in ("SpectralNorm", "WeightNorm") for row in subject.rows):
            continue  # the power iteration of a norm, which belongs in float32 (T5)
        wanted = subject.policy_of(path).compute_dtype
        found = [v.aval for v in equation.invars]
        if any(is_floating(a) and a.dtype != wanted for a in found):
            way = "backward, " if "transpose" in names else ""
            operands = " and ".join(describe(a) for a in found)
            where = path or "the model itself, or the loss"
            raise Broken(f"{way}in {where}: a {equation.primitive.name} of {operands}; asked for: {wanted.name}")


def sums_in_float32(subject: _Subject) -> None:
    """Every sum runs in float32, in the backward pass too.

    Average pooling is a sum. Traps T2, T4, T5 and T15. Skipped if the policy asks for sums in half by its `grad`.
    """
    if any(p.grad.itemsize < 4 for p in subject.tree.policies):
        raise Skipped("the policy asks for gradients summed in half (grad=)")
    worst = (1, "")
    for equation, names in equations(subject.gradient_jaxpr):
        name = equation.primitive.name
        if name not in SUMS or equation.invars[0].aval.dtype not in (jnp.float16, jnp.bfloat16):
            continue
        operand = equation.invars[0].aval
        count = terms(equation)
        if count < 2:
            continue  # such as pooling over windows of one element
        way = "backward, " if "transpose" in names else ""
        words = f"{way}in {subject.module_at(names) or 'the model itself'}: a {name} adds up {count} "
        worst = max(worst, (count, f"{words}numbers in {operand.dtype.name}"))
    if worst[1]:
        raise Broken(worst[1])


def activations_fit(subject: _Subject) -> None:
    """No activation overflows or underflows on this batch.

    No module returns an inf, a NaN, or zeros instead of numbers.
    """
    under, exact = subject.captured
    broken = {path: words for path in under if (words := _unfit(subject, path, under[path], exact.get(path, ())))}
    order = [row.module for row in subject.rows if row.module in broken] or list(broken)
    for path in order:
        # Where a module breaks because of one inside it, it is the inner one that is of interest.
        if not any(other != path and (not path or other.startswith(f"{path}/")) for other in order):
            raise Broken(f"{path or 'the model itself'} {broken[path]}")


def gradients_fit(subject: _Subject) -> None:
    """Under some loss scale, no gradient overflows or underflows.

    The scale is found as `DynamicScaler` finds it.
    """
    scale, grads = subject.largest_scale()
    _, exact = subject.reference()
    # Such as in the gradient of a bias before a batch normalisation, which is 0.
    noise = subject.noise * max(np.abs(g).max(initial=0.0) for g in jax.tree.leaves(exact))
    for (path, g), true in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(exact), strict=True):
        true = np.where(np.abs(true) > noise, true, 0)
        if (lost := _lost(g, true)) > subject.bound:
            name = jax.tree_util.keystr(path)
            i = np.argmax(np.where(g == 0, np.abs(true), 0))
            raise Broken(
                _at(f"under the scale {scale:g}, the largest without overflow, {lost:.1%} of the gradient of {name}, "
                    f"by norm, has become 0", i, true)
            )  # fmt: skip


def outputs_near_float64(subject: _Subject) -> None:
    """Outputs are within the bound of float64.

    Relative to the norm of each output.
    """
    _smallest(subject, lambda rows: _far(subject, "the output", subject.outputs(rows), subject.reference(rows)[0]))


def gradients_near_float64(subject: _Subject) -> None:
    """Gradients are within the bound of float64.

    Relative to the norm of each gradient, or a sixteenth of that of all of them together, if that is more. Trap T1
    among others.
    """
    _smallest(
        subject,
        lambda rows: _far(subject, "the gradient of ", subject.largest_scale(rows)[1], subject.reference(rows)[1]),
    )


# --- parts of laws


def _unfit(subject: _Subject, path: str, values: Any, exact: Any) -> str | None:
    """What has become of what a module hands on, in words; None if it is all there."""
    for x, true in zip(jax.tree.leaves(values), jax.tree.leaves(exact), strict=False):
        if not is_castable(x):
            continue
        x, true = np.asarray(x).astype(np.float64), np.asarray(true)
        bad = np.flatnonzero(~np.isfinite(x))
        if len(bad) and np.all(np.isfinite(true)):
            return _at(f"hands on {x.ravel()[bad[0]]}", bad[0], true)
        if (lost := _lost(x, true)) > subject.bound:
            return f"hands on 0 for {lost:.1%} of its numbers, by norm"
    return None


def _smallest(subject: _Subject, words: Callable[[slice], str | None]) -> None:
    """Checks the whole batch; where that is broken, as few rows of it as will do."""
    if not words(slice(None)):
        return
    for count in (1, 2, 4):
        if found := words(slice(0, count)):
            raise Broken(f"on the first {f'{count} rows' if count > 1 else 'row'} of the batch, {found}")
    raise Broken(f"on the whole batch, {words(slice(None))}")


def _far(subject: _Subject, what: str, found: Any, exact: Any) -> str | None:
    """Which leaf is farther from float64 than the bound, in words."""
    pairs = [
        (jax.tree_util.keystr(path), np.asarray(a).astype(_double(a)), np.asarray(b))
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(exact), strict=True)
        if jnp.issubdtype(jnp.result_type(a), jnp.inexact) or jnp.iscomplexobj(b)
    ]
    total = np.sqrt(sum(np.sum(np.abs(b) ** 2) for _, _, b in pairs))
    worst: tuple[float, str] = (0.0, "")
    for path, a, b in pairs:
        size = max(np.linalg.norm(b), total / 16)
        error = np.linalg.norm(a - b) / size if size else np.linalg.norm(a)
        i = int(np.nanargmax(np.abs(a - b))) if a.size and not np.all(np.isnan(a)) else 0
        if not error <= subject.bound:
            shown = f"{a.ravel()[i]:.6g} instead of {b.ravel()[i]:.6g}" if a.size else ""
            worst = max(
                worst,
                (
                    float(np.nan_to_num(error, nan=np.inf)),
                    f"{what}{path} is off by {error:.3g} of its norm, {shown}; {subject.multiple:g} unit roundoffs "
                    f"are {subject.bound:.3g}",
                ),
            )
    return worst[1] or None


def _lost(found: np.ndarray, true: np.ndarray) -> float:
    """The share of an array, by norm, that has become 0."""
    norm = np.linalg.norm(true)
    return float(np.linalg.norm(true[found == 0]) / norm) if norm and found.shape == true.shape else 0.0


def _at(words: str, i: Any, true: np.ndarray) -> str:
    place = [int(k) for k in np.unravel_index(int(i), true.shape)]
    return f"{words}; at {place} the number is {true.ravel()[int(i)]:.6g}"


def _doubled(tree: Any) -> Any:
    """Floats in float64 and complex numbers in complex128, all strongly typed."""
    return jax.tree.map(lambda x: np.asarray(x).astype(_double(x)) if _is_number(x) else x, tree)


def _double(x: Any) -> Any:
    """The dtype in which numbers are compared: float64, of complex ones complex128."""
    return np.complex128 if jnp.iscomplexobj(x) else np.float64


def _is_number(x: Any) -> bool:
    return is_castable(x) or (is_inexact(x) and jnp.iscomplexobj(x))
