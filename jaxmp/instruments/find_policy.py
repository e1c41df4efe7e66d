"""`find_policy`: finds which modules of a model may compute in half, by the error that this makes in the gradient.

Each module is put in half alone, and the gradient on real batches is compared with the gradient in float64 from the
same float32 parameters and inputs. Then modules are added to a `PolicyTree`, those with the least error for their FLOPs
first, as long as the error stays within a budget. Every tree is measured exactly as it would be used, the tree that is
found included.

The error of a parameter's gradient is a multiple of a unit. A tree is judged by its worst parameter, so that a branch
with small gradients counts as much as one with large ones, as under Adam. The default unit is the noise that the
gradient has because a batch is a sample. If rounding adds e times that noise, independently, the variance of the
gradient grows by the factor 1 + e**2, as if the batch were smaller by that factor: the variance is in inverse
proportion to the batch size (McCandlish et al. 2018, An Empirical Model of Large-Batch Training, section 2.2). The
default budget of 0.1 allows as much as a batch smaller by 1 %.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.errors import InputError, nearest
from jaxmp.html.elements import cell_of
from jaxmp.instruments.audit import Dot, audit
from jaxmp.instruments.float64 import draws, in_float64
from jaxmp.instruments.gradient_error import float64_arrays
from jaxmp.precision.policy import Policy, parse_policy
from jaxmp.precision.policy_tree import PolicyTree, Rule
from jaxmp.scaling.scalers import DynamicScaler, require_power_of_two
from jaxmp.text_table import table, without_nan
from jaxmp.training.gradients import differentiate
from jaxmp.trees import FLOAT32, HALF, Pattern, cast_floats, path_and_above

if TYPE_CHECKING:
    from jaxmp.modules.linen import ModulePolicy

UNITS = ("noise", "gradient", "float32")
"""Units of the error of a parameter's gradient; see `find_policy`."""

UNRESOLVED = 0.01
"""A parameter whose gradient has a larger relative error in float32 is not judged: its gradient is rounding noise in
float32 already, as that of a bias before a normalisation, which is truly 0, and says nothing about half precision."""


class Point(NamedTuple):
    """Parameters, and the batches on which the gradient is taken there."""

    params: Any
    batches: Sequence[tuple[Any, ...]]
    """the arguments of the loss after the parameters, one tuple for each batch; all batches have one size"""


_Gradients = Callable[[Point], Iterator[tuple[float, dict[str, np.ndarray]]]]
_EXACT = PolicyTree((), Policy(np.float64, np.float64, np.float64))
_FULL = parse_policy("float32")


class Gap(NamedTuple):
    """How far the loss and its gradient under a policy are from those in float64, over all points and batches."""

    error: float
    """error of the gradient of the worst parameter at the worst point: root mean square over the batches, in units; inf
    if anything is not finite"""
    parameter: str
    """path of that parameter"""
    relative_error: float
    """error of the whole gradient at the worst point: its root mean square over that of the gradient's norm"""
    loss_error: float
    """largest relative error of the loss"""
    underflow: float
    """of the numbers in the gradient that are not 0, the share that became 0"""
    overflow: float
    """of the numbers in the gradient, the share that is not finite"""


class ModuleResult(NamedTuple):
    """One module: the error that it makes alone in half, and whether it is in half in the tree that was found."""

    module: str
    """path of the module; "" for the model itself, whose own code runs under the default of the tree"""
    type: str
    """name of its class"""
    parameters: int
    """how many numbers its own parameters have"""
    flops: int
    """FLOPs of its own products in one loss and gradient"""
    alone: Gap | None
    """errors with this module alone in half; None for a module without parameters and FLOPs, which is in half if the
    model itself is"""
    half: bool
    """whether it is in half in the tree that was found"""


class SearchStep(NamedTuple):
    """One step of the search: modules put in half in addition to those taken before."""

    added: tuple[str, ...]
    """paths of the modules that were tried"""
    half_flops: int
    """FLOPs of all modules in half, those taken before included"""
    gap: Gap
    """errors with all of them in half"""
    taken: bool
    """whether the error was within the budget, so that the modules stay in half"""


@dataclasses.dataclass(frozen=True)
class FoundPolicy:
    """The result of `find_policy`. `print` shows tables; `to_json` returns the same for programs."""

    precision: str
    """the tree as text, for `--precision`"""
    budget: float
    """largest error allowed, in units"""
    unit: str
    """unit of the errors, one of `UNITS`"""
    loss_scale: float
    """loss scale under which all was measured"""
    modules: tuple[ModuleResult, ...]
    """all modules, in the order in which they are called"""
    trials: tuple[SearchStep, ...]
    """the steps of the search, in order; a module whose error alone is above the budget is in none of them"""
    gap: Gap
    """errors under the tree"""
    float32: Gap
    """errors with all modules in float32"""
    flops_by_dtype: Mapping[str, int]
    """FLOPs of all products in one loss and gradient under the tree, as audited: by the dtype of the operands, or of
    products of a recipe by their formats, see `Audit.flops_by_operands`"""
    unresolved: tuple[str, ...]
    """paths of parameters that were not judged, because their gradient is rounding noise in float32 already"""

    @property
    def tree(self) -> PolicyTree:
        """The tree that was found."""
        return PolicyTree.parse(self.precision)

    @property
    def half_flops_share(self) -> float:
        """The share of all FLOPs of products that runs in half, or under a recipe, under the tree."""
        names = {dtype.name for dtype in HALF}
        half = sum(flops for name, flops in self.flops_by_dtype.items() if name in names or "/" in name)
        return half / (sum(self.flops_by_dtype.values()) or 1)

    def to_json(self) -> dict[str, Any]:
        """Returns the result as dicts, lists, strings and numbers, with None for NaN and infinities."""
        found = {
            "precision": self.precision,
            "half_flops_share": self.half_flops_share,
            "flops_by_dtype": dict(self.flops_by_dtype),
            "budget": self.budget,
            "unit": self.unit,
            "loss_scale": self.loss_scale,
            "gap": self.gap._asdict(),
            "float32": self.float32._asdict(),
            "modules": [
                {**result._asdict(), "alone": None if result.alone is None else result.alone._asdict()}
                for result in self.modules
            ],
            "trials": [{**step._asdict(), "gap": step.gap._asdict()} for step in self.trials],
            "unresolved": list(self.unresolved),
        }
        return without_nan(found)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        """Shows the same in a notebook."""
        return cell_of(self._lines())

    def _lines(self) -> Iterator[str]:
        of = {"noise": "its noise", "gradient": "its norm", "float32": "the error of float32"}[self.unit]
        yield f"gradient errors of modules in half, of the worst parameter as a multiple of {of}; loss scale " + (
            f"{self.loss_scale:g}"
        )
        header = ("module", "class", "parameters", "FLOPs", "error", "whole", "underflow", "overflow", "found", "worst")
        rows = []
        for result in self.modules:
            measured = [""] * 4 if result.alone is None else _cells(result.alone)
            worst = "" if result.alone is None else result.alone.parameter
            found = "half" if result.half else "float32"
            share, name = self._share(result.flops), result.module or "(model)"
            rows.append((name, result.type, f"{result.parameters:,}", share, *measured, found, worst))
        yield table(rows, header=header, right=range(2, 8), indent=2)
        yield ""
        yield f"search, within {self.budget:g}"
        steps = []
        for step in self.trials:
            added = ", ".join(name or "(model)" for name in step.added)
            taken = "taken" if step.taken else "left"
            steps.append((self._share(step.half_flops), *_cells(step.gap), taken, added))
        names = ("half FLOPs", "error", "whole", "underflow", "overflow", "", "added")
        yield table(steps, header=names, right=range(5), indent=2)
        yield ""
        if self.unresolved:
            yield f"not judged, rounding noise in float32 already: {', '.join(self.unresolved)}"
        yield f"{'error':<16} {self.gap.error:.3g} ({self.gap.parameter}); float32: {self.float32.error:.3g}"
        yield f"{'half FLOPs':<16} {self.half_flops_share:.2%}"
        yield f"{'precision':<16} {self.precision}"

    def _share(self, flops: int) -> str:
        """The share of the FLOPs of all modules, as text; "" if they have none."""
        total = sum(result.flops for result in self.modules)
        return f"{flops / total:.1%}" if total else ""


def find_policy(
    loss: Callable[[PolicyTree], Callable[..., jax.Array]],
    explain: Callable[[PolicyTree], Iterable[ModulePolicy]],
    points: Iterable[Point | tuple[Any, Sequence[tuple[Any, ...]]]],
    *,
    half: Policy | str = "mixed_float16",
    budget: float = 0.1,
    unit: str = "noise",
    loss_scale: float | None = None,
    log: Callable[[str], None] = lambda message: None,
) -> FoundPolicy:
    """Finds a PolicyTree with as many FLOPs in half as a budget for the error of the gradient allows.

    The search is greedy, by error for FLOPs. It tries several modules at once; if the budget does not allow all of
    them, it tries the first half of them, and then the second. It compiles the gradient about once for each module.

        loss = lambda tree: lambda params, x, y: cross_entropy(jaxmp.with_policy(model.apply, tree)(params, x), y)
        explain = lambda tree: jaxmp.explain(model, tree, x)
        print(jaxmp.find_policy(loss, explain, [(params, [(x, y), (x2, y2), ...])]))

    Values that the loss or the model itself casts to float32 are float32 in the reference too, unless it draws random
    numbers: then the float64 gradient is that of all its operations, with the numbers that it draws in float32.

    Args:
      loss: `loss(tree)` returns the loss under a tree, `loss(tree)(params, *batch)`: a scalar, a mean over the batch.
        Random numbers in it come of one key, the same for all trees.
      explain: `explain(tree)` returns the modules and the policy of each, as `jaxmp.explain` does.
      points: where gradients are taken: float32 parameters, with at least two batches for each. They are read only
        after all other arguments were checked.
      half: the policy of modules in half: mixed_float16, mixed_bfloat16, or another with float32 parameters. With a
        recipe, such as nvfp4, FLOPs are those of the products that it rounds, and only modules with such are tried
        alone.
      budget: the largest error allowed, in units, of any parameter's gradient at any point.
      unit: the unit of the error of a parameter's gradient, at each point: "noise", the standard deviation of the exact
        gradient over the batches; "gradient", its root mean square; "float32", the error of float32.
      loss_scale: the factor of the loss, a power of two; by default 2**15 for float16, else 1. A gradient that
        overflows at this scale exceeds any budget.
      log: called with one line for each measurement.

    Returns:
      The tree and the measurements. Its rules name paths: float32 rules before a half default if the model's own code,
      which no path names, can be in half; else half rules before a float32 default.

    Raises:
      InputError: `budget` is not positive, or below the error of float32; `half` is not a half policy; there are too
        few batches or modules; or no module with FLOPs can be in half.
    """
    name = half if isinstance(half, str) else str(half)
    policy = _require_half(half)
    if not (math.isfinite(budget) and budget > 0):
        raise InputError(f"budget {budget:g}: expected a positive number, the largest error in units of {unit}")
    if unit not in UNITS:
        raise InputError(f"unit {unit!r}: expected one of {', '.join(UNITS)}{nearest(unit, UNITS)}")
    if loss_scale is None:
        loss_scale = DynamicScaler.init_scale if policy.wants_scaling else 1.0
    require_power_of_two("loss_scale", loss_scale)
    full = PolicyTree((), _FULL)
    rows = list(explain(full))
    if len(rows) < 2:
        raise InputError(
            f"find_policy: {rows[0].type if rows else 'the model'} has one module only, so there is nothing to choose "
            f"between; train it under {name} as a whole"
        )
    at = [Point(*point) for point in points]
    fewest = 2 if unit == "noise" else 1
    if not at or min(len(point.batches) for point in at) < fewest:
        raise InputError(f"find_policy: the unit {unit} takes {fewest} batches or more at each point, and one point")
    flops = _flops(loss(full if policy.recipe is None else PolicyTree((), policy)), rows, at[0], policy)
    if not any(flops.values()):
        raise InputError(
            "find_policy: no module has a product or a convolution of its own, so that none can be in half"
        )
    measure = _Measure(loss, at, loss_scale, unit)
    own = measure.of(full)
    log(f"float32: {own.error:.3g}")
    if own.error > budget:
        raise InputError(
            f"budget {budget:g}: float32 itself has an error of {own.error:.3g} ({own.parameter}), in units of {unit}; "
            "expected more than that"
        )
    search = _Search(rows, flops, policy, explain, measure, budget, log)
    taken = search.run()
    if not any(flops[path] for path in taken):
        least = min((row.module for row in rows if flops[row.module]), key=lambda path: search.alone[path].error)
        gap = search.alone[least]
        nearly = f"{least} comes nearest, with {gap.error:.3g}" if math.isfinite(gap.error) else "all of them overflow"
        raise InputError(
            f"budget {budget:g}: no module with FLOPs can be in half within it, in units of {unit}, under "
            f"{name} at loss scale {loss_scale:g}; {nearly}"
        )
    tree = search.tree(taken)
    return FoundPolicy(
        precision=_spelled(tree, {policy: name, _FULL: "float32"}),
        budget=budget,
        unit=unit,
        loss_scale=loss_scale,
        modules=tuple(
            ModuleResult(
                row.module,
                row.type,
                row.parameters,
                flops[row.module],
                search.alone.get(row.module),
                row.module in taken,
            )
            for row in rows
        ),
        trials=tuple(search.trials),
        gap=search.gap(taken),
        float32=own,
        flops_by_dtype=audit(_gradient(loss(tree)), at[0].params, *at[0].batches[0]).flops_by_operands,
        unresolved=tuple(measure.unresolved),
    )


def _require_half(half: Policy | str) -> Policy:
    policy = parse_policy(half) if isinstance(half, str) else half
    low = policy.compute_dtype in HALF or policy.recipe is not None
    if not low or policy.param_dtype != FLOAT32:
        raise InputError(
            f"half {half}: expected a policy that computes in half or under a recipe, from float32 parameters, such as "
            "mixed_float16, mixed_bfloat16 or nvfp4"
        )
    if policy.recipe is not None and policy.recipe.is_delayed:
        raise InputError(
            f"half {half}: its scales follow from the steps before, and gradients are measured one by one; expected a "
            "recipe without delayed scales, such as fp8_current"
        )
    return policy


def _flops(
    loss: Callable[..., Any], rows: Sequence[ModulePolicy], point: Point, half: Policy = _FULL
) -> dict[str, int]:
    """FLOPs of the products of the loss and its gradient that each module runs itself, by path; of those in a recipe,
    if `half` has one."""
    flops = dict.fromkeys((row.module for row in rows), 0)
    for dot in audit(_gradient(loss), point.params, *point.batches[0]).dots:
        module = _module(dot, rows[0].type, flops)
        if module is not None and (half.recipe is None or dot.product):
            flops[module] += dot.flops
    return flops


def _module(dot: Dot, model: str, modules: Mapping[str, int]) -> str | None:
    """The innermost of the modules that a product stands in; None outside of the model."""
    scopes = dot.path.split("/")
    if model not in scopes:
        return None
    names = scopes[scopes.index(model) + 1 :]
    # The path is one of calls: a cell that stands beside its nn.RNN is called within it.
    called = ("/".join(names[start:end]) for end in range(len(names), 0, -1) for start in range(end))
    return next((path for path in called if path in modules), "")


def _gradient(loss: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """`(params, *batch) -> (gradients, loss)` of `loss(params, *batch)`."""

    def gradient(params: Any, *batch: Any) -> tuple[Any, Any]:
        def with_value(params: Any) -> tuple[Any, Any]:
            value = loss(params, *batch)
            return value, value

        return differentiate(with_value, params)

    return gradient


class _Measure:
    """The exact gradients, and how far others are from them."""

    def __init__(self, loss: Any, points: Sequence[Point], loss_scale: float, unit: str):
        self._loss, self._points, self._scale = loss, points, loss_scale
        self._exact = self._in_float64(PolicyTree((), _FULL))
        gradients = [[grads for _, grads in exact] for exact in self._exact]
        self._norms = [_root_mean_square(each) for each in gradients]
        float32 = self._compile(PolicyTree((), _FULL), loss_scale)
        own = [self._errors(float32, i)[0] for i in range(len(points))]
        self.unresolved = [
            path
            for path in self._norms[0]
            if all(error[path] > UNRESOLVED * norm[path] for error, norm in zip(own, self._norms, strict=True))
        ]
        if unit == "noise":
            self._units = [_deviation(each) for each in gradients]
        else:
            self._units = self._norms if unit == "gradient" else own
        if not all(math.isfinite(n) for norms in self._norms for n in norms.values()):
            raise InputError("find_policy: the gradient of the loss is not finite in float64; look at the loss first")
        if len(self.unresolved) == len(self._norms[0]):
            raise InputError(
                "find_policy: the gradient of every parameter is rounding noise in float32 already; expected points "
                "where the loss has a gradient"
            )

    def _in_float64(self, full: PolicyTree) -> list[list[tuple[float, dict[str, np.ndarray]]]]:
        """The loss and the exact gradients of each batch, at each point."""
        gradient, first = _gradient(self._loss(full)), self._points[0]
        if not draws(gradient, first.params, *first.batches[0]):
            with jax.enable_x64(True):
                exact = self._compile(_EXACT, 1.0)
                return [list(exact(Point(*_in_float64(point)))) for point in self._points]
        # Under a policy for float64 it would draw others.
        same = in_float64(gradient)
        found = [[same(point.params, *batch) for batch in point.batches] for point in self._points]
        return [[(float(value), float64_arrays(grads)) for grads, value in batches] for batches in found]

    def of(self, tree: PolicyTree) -> Gap:
        """The errors under a tree."""
        gradients = self._compile(tree, self._scale)
        gaps = [self._at(gradients, i) for i in range(len(self._points))]
        worst = max(gaps, key=lambda gap: gap.error)
        largest = [max(column) for column in zip(*(gap[2:4] for gap in gaps), strict=True)]
        shares = [sum(column) / len(gaps) for column in zip(*(gap[4:] for gap in gaps), strict=True)]
        return Gap(worst.error, worst.parameter, *largest, *shares)

    def _at(self, gradients: _Gradients, i: int) -> Gap:
        errors, loss_error, underflow, overflow = self._errors(gradients, i)
        judged = {p: _ratio(e, self._units[i][p]) for p, e in errors.items() if p not in self.unresolved}
        parameter = max(judged, key=lambda path: judged[path])
        whole = _ratio(math.hypot(*errors.values()), math.hypot(*self._norms[i].values()))
        error = judged[parameter] if math.isfinite(loss_error) and not overflow else math.inf
        return Gap(error, parameter, whole, loss_error, underflow, overflow)

    def _errors(self, gradients: _Gradients, i: int) -> tuple[dict[str, float], float, float, float]:
        """Root mean square error of each parameter's gradient; the largest relative error of the loss; the shares of
        underflow and overflow."""
        squares: dict[str, float] = collections.defaultdict(float)
        worst = 0.0
        numbers = overflowed = nonzero = lost = 0
        for (loss, grads), (true_loss, true) in zip(gradients(self._points[i]), self._exact[i], strict=True):
            worst = max(worst, _ratio(abs(loss - true_loss), abs(true_loss)))
            for path, grad in grads.items():
                infinite, there = ~np.isfinite(grad), true[path] != 0
                numbers, overflowed = numbers + grad.size, overflowed + int(np.sum(infinite))
                nonzero, lost = nonzero + int(np.sum(there)), lost + int(np.sum(there & (grad == 0)))
                squares[path] += math.inf if infinite.any() else float(np.sum(np.square(grad - true[path])))
        count = len(self._exact[i])
        errors = {path: math.sqrt(total / count) for path, total in squares.items()}
        return errors, worst, lost / (nonzero or 1), overflowed / (numbers or 1)

    def _compile(self, tree: PolicyTree, scale: float) -> _Gradients:
        """The loss and the gradients of each batch at a point, unscaled, in float64."""
        loss = self._loss(tree)

        def scaled(params: Any, *batch: Any) -> Any:
            value = loss(params, *batch)
            return value * jnp.asarray(scale, value.dtype)

        gradient = jax.jit(_gradient(scaled))

        def gradients(point: Point) -> Iterator[tuple[float, dict[str, np.ndarray]]]:
            for batch in point.batches:
                grads, value = gradient(point.params, *batch)
                yield float(value) / scale, float64_arrays(grads, scale)

        return gradients


class _Search:
    """The greedy search: which modules are in half."""

    def __init__(
        self,
        rows: Sequence[ModulePolicy],
        flops: Mapping[str, int],
        half: Policy,
        explain: Callable[[PolicyTree], Iterable[ModulePolicy]],
        measure: _Measure,
        budget: float,
        log: Callable[[str], None],
    ):
        self._rows, self._flops, self._half, self._explain = rows, flops, half, explain
        self._measure, self._budget, self._say = measure, budget, log
        self.alone: dict[str, Gap] = {}
        self.trials: list[SearchStep] = []
        self._trees: dict[frozenset[str], PolicyTree] = {}
        self._gaps: dict[frozenset[str], Gap] = {}

    def run(self) -> frozenset[str]:
        """The modules in half."""
        # A recipe leaves what has no product of its own as it is, and refuses a model in which nothing has one.
        every = self._half.recipe is None
        own = [row.module for row in self._rows if (row.parameters and every) or self._flops[row.module]]
        for path in own:
            self.alone[path] = gap = self.gap(frozenset([path]))
            self._say(f"{path or '(model)'} in half: {gap.error:.3g}")
        fit = [path for path in own if self.alone[path].error <= self._budget]
        if not fit and not every:
            return frozenset()
        # The model's own code, and what goes along with it, brings no FLOPs: last.
        passive = [row.module for row in self._rows if row.module not in own]
        return self._grow(frozenset(), [*sorted(fit, key=self._cost), *passive])

    def _cost(self, path: str) -> tuple[bool, float]:
        """What puts modules in order: error for FLOPs, and after all that have some, error."""
        flops, error = self._flops[path], self.alone[path].error
        return not flops, error / (flops or 1)

    def _grow(self, taken: frozenset[str], more: list[str]) -> frozenset[str]:
        """`taken` with those of `more` that fit, in their order. Where all fit, each fits after those before it."""
        if not more:
            return taken
        together = taken | set(more)
        gap = self.gap(together)
        fits = gap.error <= self._budget
        self.trials.append(SearchStep(tuple(more), sum(self._flops[path] for path in together), gap, fits))
        self._say(f"{len(together)} modules in half: {gap.error:.3g}")
        if fits or len(more) == 1:
            return together if fits else taken
        middle = len(more) // 2
        return self._grow(self._grow(taken, more[:middle]), more[middle:])

    def gap(self, in_half: frozenset[str]) -> Gap:
        """The errors with these modules in half and all others in float32."""
        if in_half not in self._gaps:
            self._gaps[in_half] = self._measure.of(self.tree(in_half))
        return self._gaps[in_half]

    def tree(self, in_half: frozenset[str]) -> PolicyTree:
        """The shortest tree found that puts these modules in half and all others in float32."""
        if in_half not in self._trees:
            want = {row.module: self._half if row.module in in_half else _FULL for row in self._rows}
            self._trees[in_half] = shortest_tree(want, self._explain)
        return self._trees[in_half]


def shortest_tree(want: Mapping[str, Policy], explain: Callable[[PolicyTree], Iterable[ModulePolicy]]) -> PolicyTree:
    """Returns a tree that gives every module the wanted policy, with as few rules for paths as a search finds.

    Args:
      want: policies by path; the policy of the model itself, "", is the default of the tree.
      explain: `explain(tree)` returns the policy of each module; the tree is checked against it.

    Raises:
      InputError: paths do not tell the modules apart.
    """
    default, rules = want[""], list[Rule]()
    # From above, since a rule covers all below; the rules of those below then stand before it.
    for path in sorted(want, key=lambda path: len(path_and_above(path))):
        if _policy(rules, default, path) != want[path]:
            rules.insert(0, Rule(path, want[path]))
    tree = PolicyTree(tuple(_merged(rules, want)), default)
    for _ in want:
        wrong = [row.module for row in explain(tree) if parse_policy(row.policy) != want[row.module]]
        if not wrong:
            return tree
        # A recurrent cell, which stands beside its nn.RNN and goes along with it unless a rule before says otherwise.
        first = Rule(wrong[0], want[wrong[0]])
        tree = PolicyTree((first, *(rule for rule in tree.rules if rule.pattern != first.pattern)), default)
    raise InputError(f"find_policy: no rule by path gives {wrong[0]!r} a policy of its own")


def _merged(rules: list[Rule], want: Mapping[str, Policy]) -> list[Rule]:
    """With `*` in the place of several rules, where that changes the policy of no module."""
    while True:
        shorter = [found for rule in rules for found in _with_globs(rule, rules, want) if len(found) < len(rules)]
        if not shorter:
            return rules
        rules = min(shorter, key=len)


def _with_globs(rule: Rule, rules: list[Rule], want: Mapping[str, Policy]) -> Iterator[list[Rule]]:
    parts = rule.pattern.split("/")
    # Numbers first: Dense_* says more of what it means than *.
    wider = ["/".join(re.sub(r"\d+", "*", part) for part in parts)]
    for sub in (r"\d+", r".+"):
        wider += ["/".join([*parts[:i], re.sub(sub, "*", parts[i]), *parts[i + 1 :]]) for i in range(len(parts))]
    for pattern in dict.fromkeys(wider):
        same = [r for r in rules if r.policy == rule.policy and Pattern(pattern).matches(r.pattern)]
        if len(same) < 2:
            continue
        for place in (rules.index(same[-1]), rules.index(same[0])):
            found = [*rules[:place], Rule(pattern, rule.policy), *rules[place:]]
            found = [r for r in found if r not in same]
            if all(_policy(found, want[""], path) == want[path] for path in want):
                yield found


def _policy(rules: Sequence[Rule], default: Policy, path: str) -> Policy:
    return PolicyTree(tuple(rules), default).lookup(path)


def _spelled(tree: PolicyTree, presets: Mapping[Policy, str]) -> str:
    """The tree as text, with the names of presets."""
    rules = [f"{rule.pattern}={presets[rule.policy]}" for rule in tree.rules]
    return "; ".join([*rules, presets[tree.default]])


def _in_float64(point: Point) -> Any:
    return cast_floats(jax.device_get((point.params, list(point.batches))), np.float64)


def _root_mean_square(batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Of the norm of each parameter's array, over the batches."""
    sums: dict[str, float] = collections.defaultdict(float)
    for arrays in batches:
        for path, array in arrays.items():
            sums[path] += float(np.sum(np.square(array))) / len(batches)
    return {path: math.sqrt(total) for path, total in sums.items()}


def _deviation(batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Standard deviation of each parameter's array over the batches: the root of the trace of its covariance."""
    found = {}
    for path in batches[0]:
        mean = sum(arrays[path] for arrays in batches) / len(batches)
        squares = sum(float(np.sum(np.square(arrays[path] - mean))) for arrays in batches)
        found[path] = math.sqrt(squares / (len(batches) - 1))
    return found


def _ratio(error: float, unit: float) -> float:
    if math.isnan(error):
        return math.inf
    return error / unit if unit else math.inf if error else 0.0


def _cells(gap: Gap) -> list[str]:
    return [f"{gap.error:.2g}", f"{gap.relative_error:.2g}", f"{gap.underflow:.2%}", f"{gap.overflow:.2%}"]
