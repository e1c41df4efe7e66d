"""`audit`: which operations of a traced function run in which dtype, and where that goes wrong.

The function is traced and never run. Its jaxpr is read once, from the first operation to the last and into every
nested function. A few facts go along with each value (`_Facts`): whether it is a product, a sum of several gradients,
an exponential, a decision on finite gradients. Each rule looks at one operation and the facts of its operands, so that
what is usual in half precision (a maximum, a residual connection, a sum that JAX itself runs in float32) raises no
alarm.

The rules are the traps and defects that a jaxpr shows. It does not show what depends on values, such as an overflow.
With a target, the function is also compiled, for GPUs that need not be there, and XLA's program is read too
(`Program`): a jaxpr shows neither the collectives that the partitioner adds nor the sums and products whose dtype XLA
changes.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxprs_in_params
from jax.interpreters import partial_eval

from jaxmp.html.elements import cell_of
from jaxmp.instruments import numbers
from jaxmp.instruments.finding import Counted, Finding, found
from jaxmp.instruments.flops import FLOPS
from jaxmp.instruments.numbers import Number
from jaxmp.instruments.program import PRODUCT_KERNELS, Program
from jaxmp.instruments.target import COMPILER_OPTIONS, Target
from jaxmp.jaxprs import (
    COLLECTIVE_SUMS,
    SAME_VALUES,
    bare,
    device_count,
    interpret,
    module_path,
    quantized,
    recipe_product,
    scan_counts,
    tracing,
)
from jaxmp.precision.policy import Policy, parse_policy
from jaxmp.precision.policy_tree import PolicyTree, as_tree
from jaxmp.text_table import table
from jaxmp.trees import FLOAT32, HALF, is_floating, path_name, same_structure

if TYPE_CHECKING:
    from jaxmp.modules.linen import ModulePolicy

LONG = 256
"""Terms from which on exp, softmax or log in half is reported: there a bfloat16 sum of ones stands still."""

_TRANSPARENT = SAME_VALUES | {"slice", "dynamic_slice", "rev", "concatenate", "split", "stack", "unstack"}
"""Operations whose result holds values of their operands, and nothing else."""

_CUMULATIVE = {"cumsum": "axis", "reduce_sum": "axes", "reduce_window_sum": "window_dimensions", "reduce": "dimensions"}
_LINEAR = {"mul", "div", "neg", "select_n", "pad", "dynamic_update_slice"}
"""Operations by which a gradient goes on from what was made of a weight (a mask, a slice) to the weight."""
_SCATTERS = {"scatter-add", "scatter_add", "select_and_scatter_add"}
_CALLBACKS = {
    "pure_callback",
    "io_callback",
    "debug_callback",
    "debug_print",
    "infeed",
    "outfeed",
    "host_callback_call",
}
_WITH_SCALAR_FUNCTIONS = {"reduce", "reduce_window", "select_and_scatter", "scatter", "scatter-mul", "sort"} | _SCATTERS
"""Operations that hold a function of single numbers, of which each is one operation."""


class Dot(NamedTuple):
    """A matrix product or convolution."""

    primitive: str
    dtype: str
    """dtype of the operands; of the wider one, if they differ"""
    flops: int
    """floating-point operations of all `times` together: two for each multiplication and addition"""
    path: str
    source: str
    times: int
    formats: tuple[str, str] = ("", "")
    """emulated format to which each operand was rounded; "" if to none"""
    product: str = ""
    """product of a layer under a recipe, `fprop`, `dgrad` or `wgrad`; "" without a recipe"""


class Cast(NamedTuple):
    """A conversion between two float dtypes."""

    before: str
    after: str
    size: int
    """number of elements that one conversion casts"""
    path: str
    source: str
    times: int


@dataclasses.dataclass(frozen=True)
class Audit:
    """The result of `audit`. `print` shows tables; `to_json` returns the same for programs."""

    dots: tuple[Dot, ...]
    """every matrix product and convolution"""
    casts: tuple[Cast, ...]
    """every conversion between float dtypes"""
    observed: tuple[Finding, ...]
    """findings that do not depend on the policy, and all bfloat16 collectives, which a policy may ask for"""
    notes: tuple[str, ...] = ()
    """what the numbers leave out"""
    policy: PolicyTree | None = None
    """the policy that the function is checked against; without one, float32 dots are not findings"""
    modules: Mapping[str, Policy] | None = None
    """the policy of each module by path; needed for rules by class, because a path does not show the class"""
    program: Program | None = None
    """the compiled function, if it was audited for a target"""

    @property
    def dot_flops_by_dtype(self) -> dict[str, int]:
        """The FLOPs of all matrix products and convolutions, by the dtype of their operands, largest first."""
        flops: collections.Counter[str] = collections.Counter()
        for dot in self.dots:
            flops[dot.dtype] += dot.flops
        return dict(flops.most_common())

    @property
    def flops_by_operands(self) -> dict[str, int]:
        """The FLOPs by the dtype of the operands, or of products of a recipe by their formats A/B, largest first.

        An operand that a recipe does not round is `high`, as in its text.
        """
        flops: collections.Counter[str] = collections.Counter()
        for dot in self.dots:
            flops["/".join(format or "high" for format in dot.formats) if dot.product else dot.dtype] += dot.flops
        return dict(flops.most_common())

    @property
    def flops_by_format(self) -> dict[tuple[str, str, str], int]:
        """The FLOPs of products with an operand that was rounded to an emulated format, largest first.

        Keys are the product of a recipe (`fprop`, `dgrad`, `wgrad`; "" without a recipe) and the format of each operand
        ("" if it was not rounded).
        """
        flops: collections.Counter[tuple[str, str, str]] = collections.Counter()
        for dot in self.dots:
            if any(dot.formats):
                flops[dot.product, *dot.formats] += dot.flops
        return dict(flops.most_common())

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, checked against `policy` if there is one."""
        if self.policy is None:
            return self.observed
        reduces = {np.dtype(policy.reduce).name for policy in self.policy.policies}
        kept = [f for f in self.observed if not (f.rule == "half collective" and f.dtype in reduces)]
        return (*kept, *_merged(self._wide_dots(self.policy)))

    def _wide_dots(self, policy: PolicyTree) -> Iterator[Finding]:
        by_class = any(rule.pattern.startswith("@") and rule.policy.compute_dtype not in HALF for rule in policy.rules)
        if by_class and self.modules is None:  # any dot might be meant to be in float32
            return
        traced = set()
        for dot in self.dots:
            compute = self._lookup(policy, dot.path).compute_dtype
            if dot.product:  # a recipe is emulated in float32, whatever is computed in around it
                traced.add(dot.path)
            elif compute in HALF and _is_wide(dot.dtype):
                traced.add(dot.path)
                what = f"{dot.primitive} of {dot.dtype} operands where the policy computes in {compute.name}"
                yield Finding("float32 dot", what, dot.path, dot.source, dot.dtype, dot.times)
        for kernel in () if self.program is None else self.program.kernels:
            path = _module_of(kernel.path)
            compute = self._lookup(policy, path).compute_dtype
            product = kernel.kind in PRODUCT_KERNELS and path not in traced
            product = product and not recipe_product(kernel.path)
            if product and compute in HALF and _is_wide(kernel.dtype):
                what = f"compiled to {kernel.name} of {kernel.dtype} where the policy computes in {compute.name}"
                yield Finding("float32 dot", what, path, kernel.source, kernel.dtype, kernel.times)

    def _lookup(self, policy: PolicyTree, path: str) -> Policy:
        """The policy of the module at `path`, which begins with the class of the model."""
        names = path.split("/")[1:]
        if self.modules is None:
            return policy.lookup("/".join(names))
        # The path is one of calls: a cell that stands beside its nn.RNN is called within it.
        called = ("/".join(names[start:end]) for end in range(len(names), 0, -1) for start in range(end))
        return next(
            (self.modules[module] for module in called if module in self.modules), self.modules.get("", policy.default)
        )

    def under(self, policy: Policy | PolicyTree | str | None, modules: Iterable[ModulePolicy] | None = None) -> Audit:
        """Returns this audit checked against `policy`; for `modules` see `audit`. Nothing is traced again."""
        # The power iteration of a spectral norm is arithmetic of norms, which belongs in float32 (T5).
        table = None if modules is None else {row.module: _full_norm(row) for row in modules}
        return dataclasses.replace(self, policy=None if policy is None else as_tree(policy), modules=table)

    def assert_clean(self, policy: Policy | PolicyTree | str | None = None) -> None:
        """Raises an AssertionError that lists every finding with its path and line, if there are any: for tests.

        Args:
          policy: the policy to check the function against; by default the one it was audited under.
        """
        findings = (self if policy is None else self.under(policy)).findings
        if findings:
            raise AssertionError("\n".join([f"audit: {_count(len(findings), 'finding')}", *map(str, findings)]))

    def to_json(self) -> dict[str, Any]:
        """Returns the audit as dicts, lists, strings and integers."""
        return {
            "dot_flops_by_dtype": self.dot_flops_by_dtype,
            "dot_flops_by_format": [
                {"product": product, "formats": formats, "flops": n}
                for (product, *formats), n in self.flops_by_format.items()
            ],
            "findings": [finding._asdict() for finding in self.findings],
            "dots": [dot._asdict() for dot in self.dots],
            "casts": [cast._asdict() for cast in self.casts],
            "notes": list(self.notes),
            "policy": None if self.policy is None else str(self.policy),
            **({} if self.program is None else {"program": self.program.to_json()}),
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        """Shows the same in a notebook."""
        return cell_of(self._lines())

    def _lines(self) -> Iterator[str]:
        flops = self.dot_flops_by_dtype
        yield "FLOPs of dots and convolutions"
        rows = [(dtype, f"{n:,}", f"{n / sum(flops.values()):.2%}") for dtype, n in flops.items()]
        yield table(rows, right=[1, 2], widths=(14, 18, 7), indent=2) if rows else "  none"
        emulated = self.flops_by_format
        if emulated:
            yield "of these, emulated: operands rounded to a format of fewer bits, and multiplied in the dtype above"
            total = sum(flops.values())
            lines = [
                (product or "product", left or "-", right or "-", f"{n:,}", f"{n / total:.2%}")
                for (product, left, right), n in emulated.items()
            ]
            yield table(lines, right=[3, 4], indent=2)
        changes: collections.Counter[tuple[str, str]] = collections.Counter()
        elements: collections.Counter[tuple[str, str]] = collections.Counter()
        for cast in self.casts:
            changes[cast.before, cast.after] += cast.times
            elements[cast.before, cast.after] += cast.times * cast.size
        yield "casts" if changes else "casts\n  none"
        for (before, after), n in changes.most_common():
            yield f"  {before} to {after}: {n}, of {elements[before, after]:,} elements"
        if self.program is not None:
            yield from self.program.lines()
        yield "findings" if self.findings else "findings\n  none"
        for finding in self.findings:
            yield f"  {finding}"
        yield from (f"note: {note}" for note in self.notes)


def audit(
    fn: Callable[..., Any],
    *args: Any,
    policy: Policy | PolicyTree | str | None = None,
    modules: Iterable[ModulePolicy] | None = None,
    target: Target | str | None = None,
    **kwargs: Any,
) -> Audit:
    """Finds in which dtypes `fn(*args, **kwargs)` runs, and where that goes wrong. Traces `fn`; runs nothing.

    `help(jaxmp.audit)` lists the rules.

    Args:
      fn: any function that JAX traces. A jitted one keeps its own static and donated arguments.
      args: its arguments, arrays or `jax.ShapeDtypeStruct`.
      policy: the policy to check `fn` against; see `Audit.under`. Modules are found by their Flax paths.
      modules: the rows of `jaxmp.explain(model, policy, batch)`, for policies with rules by class. Without them,
        float32 dots are not reported if a rule by class computes in float32.
      target: GPUs to compile `fn` for, such as "h100" or "h100x8", which need not be there; see `Target`. Each of them
        holds all arguments whole, except a `jax.ShapeDtypeStruct` with a sharding over `Target.mesh`. The program is in
        `Audit.program`, and its faults are among the findings.
      kwargs: further arguments of `fn`.

    Returns:
      The audit. The body of a scan counts as often as it is long, the body of a while loop once. Of a conditional, the
      branch with most FLOPs counts (of one between platforms, that of the target or of the local devices). A function
      mapped over devices counts once for each.

    Raises:
      InputError: `fn` does not trace with these arguments, or this JAX cannot compile for the target.

    >>> x = jax.ShapeDtypeStruct((8, 4), jnp.float16)
    >>> w = jax.ShapeDtypeStruct((4, 2), jnp.float16)
    >>> audit(jnp.dot, x, w).dot_flops_by_dtype
    {'float16': 128}
    """
    if target is not None:
        target = Target.parse(target) if isinstance(target, str) else target
        args, kwargs = target.place((args, kwargs))
    name, expected = getattr(fn, "__name__", type(fn).__name__), "a function of arrays or jax.ShapeDtypeStruct"
    with tracing(f"audit: {name} does not trace", f"{expected}, as jax.jit takes it"):
        jitted: Any = fn if hasattr(fn, "trace") else jax.jit(fn)
        traced = jitted.trace(*args, **kwargs)
    jaxpr = bare(traced.jaxpr)
    # What nothing depends on is in the jaxpr and not in the lowered program, such as the last product of a forward pass
    # of which the gradient alone is wanted.
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    platform = "cuda" if target is not None else jax.default_backend()
    walk, whole = _Walk(platform), _Walk(platform)
    constants = [_Facts(number=numbers.of_array(x)) for x in getattr(traced.jaxpr, "consts", ())]
    whole.function(jaxpr, [_ARGUMENT] * len(jaxpr.invars), Counted(), constants)
    jaxpr = live
    out = walk.function(jaxpr, [_ARGUMENT] * len(jaxpr.invars), Counted(), constants)
    walk.leave(out)
    boundary = [*_weak(traced, jaxpr), *_of_state(traced, jaxpr, out, jitted=jitted is fn)]
    # A loss of which only the gradient is wanted is not computed, but its dtype is that in which the gradient begins.
    losses = [f for f in whole.findings if f.rule == "half loss" and whole.differentiated]
    findings = [*losses, *(f for f in walk.findings if f.rule != "half loss"), *walk.of_weights.values()]
    found = _merged([*findings, *boundary])
    program = None
    if target is not None:
        program = Program.read(traced.lower().compile(compiler_options=COMPILER_OPTIONS), str(target))
        found += _merged(_compiled(program, found))
        walk.notes.add("compiled without a GPU: kernels are XLA's defaults, not the fastest that it would have timed")
    report = Audit(tuple(walk.dots), tuple(walk.casts), tuple(found), tuple(sorted(walk.notes)), program=program)
    return report.under(policy, modules)


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What is known of a value."""

    kept: bool = False
    """an argument, or what a loop carries, cast and reshaped at most: it may be state"""
    product: bool = False
    """a product, cast, reshaped or added to other gradients at most"""
    computed: bool = False
    """depends on a product"""
    sums: tuple[Finding, ...] = ()
    """the additions in half of several gradients that this is the result of: faults, if it is a weight's gradient"""
    accumulator: bool = False
    """what a loop carries and only adds to"""
    gradient: bool = False
    """made by transposition, then cast, reshaped or summed over devices at most"""
    mask: bool = False
    """zeros and ones"""
    total: bool = False
    """a sum over all elements of something, over their number"""
    flag: bool = False
    """a decision on whether values are finite"""
    guarded: bool = False
    """depends on a choice by such a decision"""
    terms: int = 0
    """over how many terms this is a sum"""
    exponential: Finding | None = None
    """the exponential in half that this is"""
    unit: Finding | None = None
    """the constant that was rounded to 1 when this was multiplied by it"""
    number: Number = Number()
    """the numbers in it"""
    format: str = ""
    """the emulated format to which it was rounded, then reshaped, padded or sliced at most"""


_NOTHING = _Facts()
_ARGUMENT = _Facts(kept=True, number=Number(position=True))


def _literal(v: Any) -> _Facts:
    return _Facts(number=numbers.of_array(v.val))


class _Walk:
    """Reads jaxprs, and collects what is found on the way."""

    def __init__(self, platform: str) -> None:
        self.platform = "cuda" if platform == "gpu" else platform
        self.dots: list[Dot] = []
        self.casts: list[Cast] = []
        self.findings: list[Finding] = []
        self.of_weights: dict[int, Finding] = {}
        """the additions of several gradients of a weight, by identity: two on one line are two"""
        self.notes: set[str] = set()
        self.differentiated = False

    def function(
        self, jaxpr: Any, given: Sequence[_Facts], place: Counted, constants: Sequence[_Facts] = ()
    ) -> list[_Facts]:
        """What is known of the results of `jaxpr`, for arguments and constants of which this is known."""
        constants = [*constants, *[_ARGUMENT] * len(jaxpr.constvars)][: len(jaxpr.constvars)]

        def equation(eqn: Any, operands: list[_Facts]) -> list[_Facts]:
            return self._equation(eqn, operands, place.at(eqn))

        return interpret(jaxpr, [*constants, *given], equation, _literal)

    def _equation(self, eqn: Any, given: list[_Facts], place: Counted) -> list[_Facts]:
        self.differentiated |= "transpose(" in place.names
        name = eqn.primitive.name
        if name in ("pallas_call", "ffi_call") or "dot_product_attention" in name:  # the last: cuDNN's
            self.notes.add(f"what is inside of {name} is not counted")
        elif name not in _WITH_SCALAR_FUNCTIONS and (inner := list(jaxprs_in_params(eqn.params))):
            return self._nested(eqn, inner, given, place)
        given = [
            dataclasses.replace(f, number=numbers.of_aval(v.aval, f.number))
            for v, f in zip(eqn.invars, given, strict=True)
        ]
        self._count(eqn, given, place)
        self._find(eqn, given, place)
        if "transpose(" not in place.names and name not in _TRANSPARENT and name != "add_any":
            self.leave(given)
        if not eqn.outvars:
            return []
        operands = [facts.number for facts in given]
        self.findings += numbers.find(eqn, operands, place)
        return [
            dataclasses.replace(self._facts(eqn, v, given, place), number=numbers.follow(eqn, i, operands, place))
            for i, v in enumerate(eqn.outvars)
        ]

    def leave(self, values: Iterable[_Facts]) -> None:
        """Values that leave the backward pass: what was added up in it are gradients of weights, not of activations."""
        self.of_weights |= {id(finding): finding for facts in values for finding in facts.sums}

    # Nested functions

    def _nested(self, eqn: Any, inner: list[Any], given: list[_Facts], place: Counted) -> list[_Facts]:
        name = eqn.primitive.name
        if name == "scan":
            return self._scan(eqn, given, place)
        if name == "while":
            return self._while(eqn, given, place)
        if name == "cond":
            return self._cond(eqn, given, place)
        place = dataclasses.replace(place, times=place.times * device_count(eqn))
        results: list[_Facts] = []
        for jaxpr in inner:
            facts = given if len(given) == len(jaxpr.invars) else [_NOTHING] * len(jaxpr.invars)
            out = self.function(jaxpr, facts, place)
            results = results or (out if len(out) == len(eqn.outvars) else [])
        return results or [_NOTHING] * len(eqn.outvars)

    def _scan(self, eqn: Any, given: list[_Facts], place: Counted) -> list[_Facts]:
        jaxpr = bare(eqn.params["jaxpr"])
        consts, carries = scan_counts(eqn.params)
        place = dataclasses.replace(place, times=place.times * eqn.params["length"])
        own, start, slices = given[:consts], given[consts : consts + carries], given[consts + carries :]
        adding = self._carries(jaxpr, jaxpr.invars[consts : consts + carries], place, eqn.params["length"])
        return self._loop(jaxpr, own, start, slices, place, adding)

    def _while(self, eqn: Any, given: list[_Facts], place: Counted) -> list[_Facts]:
        self.notes.add("the body of a while loop is counted once")
        body, n = bare(eqn.params["body_jaxpr"]), eqn.params["cond_nconsts"]
        consts = eqn.params["body_nconsts"]
        own, start = given[n : n + consts], given[n + consts :]
        self.function(bare(eqn.params["cond_jaxpr"]), [*given[:n], *start], place)
        return self._loop(body, own, start, [], place, self._carries(body, body.invars[consts:], place, 0))

    def _loop(
        self, jaxpr: Any, own: list[_Facts], start: list[_Facts], rest: list[_Facts], place: Counted, adding: set[int]
    ) -> list[_Facts]:
        """One turn, with what is known of each carry before the first."""
        carried = [
            dataclasses.replace(f, kept=True, number=Number(), format="", accumulator=i in adding)
            for i, f in enumerate(start)
        ]
        return self.function(jaxpr, [*own, *carried, *rest], place)

    def _carries(self, jaxpr: Any, invars: Sequence[Any], place: Counted, length: int) -> set[int]:
        """Which carries are sums over the turns and nothing else; those in half are found."""
        adding = {i for i, v in enumerate(invars) if _only_added_to(jaxpr, v, jaxpr.outvars[i])}
        for i in sorted(adding):
            aval = invars[i].aval
            if aval.dtype in HALF:
                eqn = next(e for e in jaxpr.eqns if e.outvars[0] in _sources(jaxpr, jaxpr.outvars[i]))
                turns = f" {length}" if length else ""
                what = f"a loop carries a sum over its{turns} turns in {aval.dtype.name}"
                self._found("half accumulation", what, aval.dtype, place.at(eqn))
        return adding

    def _cond(self, eqn: Any, given: list[_Facts], place: Counted) -> list[_Facts]:
        branches, results = [], []
        for branch in self._possible(eqn):
            walk = _Walk(self.platform)
            results.append(walk.function(bare(branch), given[1:], place))
            branches.append(walk)
            self.findings += walk.findings
            self.of_weights |= walk.of_weights
            self.notes |= walk.notes
            self.differentiated |= walk.differentiated
        largest = max(branches, key=lambda walk: sum(dot.flops for dot in walk.dots))
        self.dots += largest.dots
        self.casts += largest.casts
        if len(branches) > 1 and any(walk.dots for walk in branches):
            self.notes.add("of a conditional the branch with most FLOPs is counted")
        guarded = given[0].flag
        return [
            dataclasses.replace(f, guarded=f.guarded or guarded, sums=tuple(s for facts in each for s in facts.sums))
            for f, each in zip(results[branches.index(largest)], zip(*results, strict=True), strict=True)
        ]

    def _possible(self, eqn: Any) -> Sequence[Any]:
        """The branches of a conditional; of one between platforms only the one that lowering keeps."""
        platforms = eqn.params.get("branches_platforms")
        if not platforms:
            return eqn.params["branches"]
        named = [i for i, names in enumerate(platforms) if names is not None and self.platform in names]
        return [eqn.params["branches"][(named or [platforms.index(None)])[0]]]

    # Single operations

    def _found(self, rule: str, what: str, dtype: Any, place: Counted) -> None:
        self.findings.append(found(rule, what, dtype, place))

    def _count(self, eqn: Any, given: list[_Facts], place: Counted) -> None:
        name, path = eqn.primitive.name, place.module
        if name in FLOPS and not _sums_nothing(eqn):
            dtype = jnp.promote_types(eqn.invars[0].aval.dtype, eqn.invars[1].aval.dtype).name
            flops, product = FLOPS[name](eqn) * place.times, recipe_product(place.names)
            formats = given[0].format, given[1].format
            self.dots.append(Dot(name, dtype, flops, path, place.source, place.times, formats, product))
        elif name == "ragged_dot_general":
            self.notes.add("ragged dots are not counted")
        elif name == "convert_element_type":
            before, after = eqn.invars[0].aval, eqn.outvars[0].aval
            if before.dtype != after.dtype and is_floating(before) and is_floating(after):
                cast = Cast(before.dtype.name, after.dtype.name, after.size, path, place.source, place.times)
                self.casts.append(cast)

    def _find(self, eqn: Any, given: list[_Facts], place: Counted) -> None:
        name = eqn.primitive.name
        if name in _CALLBACKS:
            self._found("host callback", f"{name} waits for Python in each call", "", place)
        if not eqn.outvars or not eqn.invars:
            return
        out = eqn.outvars[0].aval
        if (
            "jvp(" in place.names
            and "transpose(" not in place.names
            and given[0].total
            and _half(out)
            and not out.shape
        ):
            self._found("half loss", f"a loss in {out.dtype.name}", out.dtype, place)
        if name in COLLECTIVE_SUMS:
            for dtype in {v.aval.dtype for v in eqn.invars if _half(v.aval)}:
                self._found("half collective", f"{name} over devices in {dtype.name}", dtype, place)
        self._find_uses(eqn, given)
        if _half(out):
            self._find_in_half(eqn, given, place)

    def _find_uses(self, eqn: Any, given: list[_Facts]) -> None:
        """What comes out only where a value that was seen before is used in this way."""
        name = eqn.primitive.name
        if name == "reduce_sum" and (exponential := given[0].exponential):
            terms = _terms(eqn)
            if terms >= LONG:
                self.findings.append(exponential._replace(what=f"{exponential.what}, summed over {terms} terms"))
        if name == "add":
            self.findings += [facts.unit for facts in given if facts.unit]

    def _find_in_half(self, eqn: Any, given: list[_Facts], place: Counted) -> None:
        name, dtype = eqn.primitive.name, eqn.outvars[0].aval.dtype
        counted = given[0].mask or (given[0].number.whole and math.isfinite(given[0].number.largest))
        if _is_sum(eqn) and not (counted and given[0].number.known is None) and _terms(eqn) > 1:
            self._found("half accumulation", f"{name} over {_terms(eqn)} terms in {dtype.name}", dtype, place)
        elif name in _SCATTERS and not eqn.params.get("unique_indices") and not _disjoint(eqn):
            self._found("half accumulation", f"{name} in {dtype.name}", dtype, place)
        elif name in ("log", "log1p") and given[0].terms >= LONG:
            what = f"{name} in {dtype.name}, of a sum over {given[0].terms} terms"
            self._found("half exponential", what, dtype, place)
        elif name in ("mul", "div") and dtype == np.float16 and any(facts.gradient for facts in given):
            if "transpose(" not in place.names and any(_is_number(v, eqn) for v in eqn.invars):
                self._found("half unscaling", f"a gradient in float16, {name} by one number", dtype, place)

    def _facts(self, eqn: Any, v: Any, given: list[_Facts], place: Counted) -> _Facts:
        name, aval = eqn.primitive.name, v.aval
        format = quantized(place.names).replace("-", ":") or (given[0].format if name == "pad" else "")
        shared: dict[str, Any] = {
            "guarded": any(facts.guarded for facts in given),
            "flag": _decides(eqn, given),
            "computed": name in FLOPS or any(facts.computed for facts in given),
            "sums": _sums(eqn, given, place),
        }
        if "transpose(" in place.names:
            shared["gradient"] = True
        if format:
            shared["format"] = format
        if name in _TRANSPARENT:
            first = given[0] if given else _NOTHING
            mask = first.mask or bool(eqn.invars and eqn.invars[0].aval.dtype == np.bool_)
            return dataclasses.replace(first, **{"gradient": first.gradient, **shared, "mask": mask})
        if name in COLLECTIVE_SUMS:
            return _Facts(**{"gradient": any(facts.gradient for facts in given), **shared})
        if name == "add_any":
            return _Facts(product=any(facts.product for facts in given), **shared)
        if name in FLOPS:
            return _Facts(product=True, **shared)
        if name == "select_n" and given[0].flag and not eqn.invars[0].aval.shape:
            return _Facts(**{**shared, "guarded": True})
        if name == "reduce_sum":
            return _Facts(total=aval.shape == () and eqn.invars[0].aval.shape != (), terms=_terms(eqn), **shared)
        if name in ("abs", "neg", "sqrt", "div", "mul", "add", "sub"):
            shared["total"] = aval.shape == () and any(facts.total for facts in given)
            if name == "abs":  # of logsumexp
                shared["terms"] = given[0].terms
        if _half(aval):
            shared["unit"] = _decay(eqn, given, place)
            if name in ("exp", "exp2"):
                what = f"{name} in {aval.dtype.name}"
                shared["exponential"] = found("half exponential", what, aval.dtype, place)
        return _Facts(**shared)


def _sums(eqn: Any, given: list[_Facts], place: Counted) -> tuple[Finding, ...]:
    """The additions of gradients that a result of the backward pass still is the sum of.

    An activation's gradient ends here: its next use is a product, a reduction, or depends on other activations.
    """
    name, dtype = eqn.primitive.name, getattr(eqn.outvars[0].aval, "dtype", FLOAT32)
    sums = tuple({id(finding): finding for facts in given for finding in facts.sums}.values())
    if name == "add_any":
        of_uses = any(facts.product for facts in given) and not any(facts.accumulator for facts in given)
        if of_uses and dtype in HALF:
            what = f"gradients of a weight's uses add up in {dtype.name}"
            sums += (found("half accumulation", what, dtype, place),)
        return sums
    goes_on = name in _LINEAR and "transpose(" in place.names and sum(facts.computed for facts in given) == 1
    return sums if goes_on or name in _TRANSPARENT else ()


def _decay(eqn: Any, given: list[_Facts], place: Counted) -> Finding | None:
    """The finding that a constant was rounded to 1 in half, of state that was multiplied by it."""
    name, dtype = eqn.primitive.name, eqn.outvars[0].aval.dtype
    constants = [facts.number.known for facts in given if facts.number.known is not None]
    if name != "mul" or len(constants) != 1 or not any(facts.kept for facts in given):
        return None
    if not abs(constants[0] - 1) < 0.01 or float(np.float64(constants[0]).astype(dtype)) != 1:
        return None
    return found(
        "vanished constant", f"a factor that is 1 in {dtype.name}, of state that is added to (b2?)", dtype, place
    )


def _decides(eqn: Any, given: list[_Facts]) -> bool:
    name = eqn.primitive.name
    if name == "is_finite":
        return True
    logical = ("and", "or", "not", "reduce_and", "reduce_or", "reduce_min", "reduce_max", "eq", "ne", "lt", "select_n")
    kept = name in logical or name in _TRANSPARENT or name in COLLECTIVE_SUMS or name in ("pmin", "pmax", "min", "max")
    return kept and any(facts.flag for facts in given)


def _full_norm(row: ModulePolicy) -> Policy:
    return parse_policy("float32" if row.type in ("SpectralNorm", "WeightNorm") else row.policy)


def _sums_nothing(eqn: Any) -> bool:
    """Whether a product is an outer product, which loses nothing in any dtype and gains nothing in half."""
    return eqn.primitive.name == "dot_general" and not eqn.params["dimension_numbers"][0][0]


def _is_sum(eqn: Any) -> bool:
    """Whether an operation adds up elements; `reduce` is what jax.lax.reduce leaves where its start is an array."""
    name = eqn.primitive.name
    if name != "reduce":
        return name in _CUMULATIVE
    operations = bare(eqn.params["jaxpr"]).eqns
    return len(operations) == 1 and operations[0].primitive.name == "add"


def _terms(eqn: Any) -> int:
    """Over how many elements a sum, cumulative sum or sum over windows adds up."""
    name = eqn.primitive.name
    if name == "reduce_window_sum":
        return math.prod(eqn.params["window_dimensions"])
    axes = eqn.params[_CUMULATIVE[name]]
    return math.prod(eqn.invars[0].aval.shape[d] for d in (axes if isinstance(axes, tuple) else (axes,)))


def _disjoint(eqn: Any) -> bool:
    """Whether a pooling layer's windows do not overlap, so that its gradient adds nothing up."""
    window, strides = eqn.params.get("window_dimensions"), eqn.params.get("window_strides")
    return window is not None and all(w <= s for w, s in zip(window, strides, strict=True))


def _is_number(v: Any, eqn: Any) -> bool:
    """Whether an operand is one number, times an array."""
    return v.aval.shape == () and eqn.outvars[0].aval.shape != ()


def _sources(jaxpr: Any, v: Any) -> set[Any]:
    """The variable and those that it is a mere copy or cast of, the addition that made it last."""
    made = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}
    found = {v} if not isinstance(v, Literal) else set()
    while v in made and made[v].primitive.name in _TRANSPARENT:
        v = made[v].invars[0]
        if isinstance(v, Literal):
            break
        found.add(v)
    return found


def _only_added_to(jaxpr: Any, before: Any, after: Any) -> bool:
    """Whether a carry goes into one addition, casts aside, which gives the next carry, and into nothing else."""
    if isinstance(after, Literal) or not is_floating(before.aval):
        return False
    made = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}
    addition = next((made[v] for v in _sources(jaxpr, after) if v in made and _adds(made[v])), None)
    uses = [eqn for eqn in jaxpr.eqns if any(v is before for v in eqn.invars)]
    if addition is None or len(uses) != 1:
        return False
    return any(not isinstance(v, Literal) and before in _sources(jaxpr, v) for v in addition.invars)


def _adds(eqn: Any) -> bool:
    return eqn.primitive.name in ("add", "add_any", "sub")


# What lies at the edge of the function


def _trees(traced: Any) -> tuple[Any, Any]:
    """The pytrees of the arguments and of the results, of plain objects.

    `Traced.args_info` and `out_info` put descriptions there, which a user's class that looks at its leaves (as those of
    jmp do) may refuse; a plain object is what JAX asks such classes to let pass.
    """
    structures = traced._in_tree, traced.out_tree  # `in_tree` would be public, and is read from `args_info`
    given, results = (jax.tree.unflatten(each, [object()] * each.num_leaves) for each in structures)
    return given, results


def _weak(traced: Any, jaxpr: Any) -> Iterator[Finding]:
    given, results = _trees(traced)
    names = [("argument", given, jaxpr.invars), ("result", results, jaxpr.outvars)]
    for kind, tree, variables in names:
        for path, v in zip(_paths(kind, tree), variables, strict=True):
            if getattr(v.aval, "weak_type", False):
                what = f"the {kind} is weakly typed, as a Python number is; give it a dtype, such as jnp.float32(...)"
                yield Finding("weakly typed", what, path, "", v.aval.dtype.name, 1)


def _of_state(traced: Any, jaxpr: Any, out: list[_Facts], *, jitted: bool) -> Iterator[Finding]:
    donated = traced._params["donated_invars"]
    paths = _paths("argument", _trees(traced)[0])
    pairs = list(_state(traced, jaxpr))
    guards = any(out[after].guarded for _, after in pairs)
    kept = []
    for before, after in pairs:
        old, new, path = jaxpr.invars[before].aval, jaxpr.outvars[after].aval, paths[before]
        if _typed(old) != _typed(new):
            what = f"goes in as {_typed(old)} and comes out as {_typed(new)}: the next call compiles again"
            yield Finding("compiles twice", what, path, "", new.dtype.name, 1)
        changed = jaxpr.outvars[after] is not jaxpr.invars[before]
        if guards and changed and not out[after].guarded and is_floating(new):
            what = "is replaced whether gradients are finite or not, unlike the rest of the state"
            yield Finding("unguarded state", what, path, "", new.dtype.name, 1)
        if jitted and changed and not donated[before]:
            kept.append((path, old.size * old.dtype.itemsize))
    if kept:
        what = f"{_count(len(kept), 'array')} of {sum(size for _, size in kept):,} bytes replaced and not donated"
        yield Finding("not donated", what, kept[0][0], "", "", 1)


def _state(traced: Any, jaxpr: Any) -> Iterator[tuple[int, int]]:
    """The places of each leaf of the state among the arguments and the results.

    A state is an argument that comes out again as the result, or at its own place in a tuple of results, with the same
    structure and shapes, and of which some leaf is added to, selected, or handed on. Gradients look the same otherwise.
    """
    (given, _), results = _trees(traced)
    whole = bool(given) and same_structure(given[0], results)
    outs = [results] if whole or type(results) not in (tuple, list) else results
    made = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    before = after = 0
    for i, old in enumerate(given):
        size = len(jax.tree.leaves(old))
        if i < len(outs):
            pairs = [(before + n, after + n) for n in range(size)]
            if size and same_structure(old, outs[i]):
                variables = [(jaxpr.invars[a], jaxpr.outvars[b]) for a, b in pairs]
                single = size > 1 or getattr(variables[0][0].aval, "weak_type", False)
                same = all(a.aval.shape == b.aval.shape for a, b in variables)
                if single and same and any(_renewed(a, b, made) for a, b in variables):
                    yield from pairs
            after += len(jax.tree.leaves(outs[i]))
        before += size


def _renewed(before: Any, after: Any, made: dict[Any, Any]) -> bool:
    if isinstance(after, Literal):
        return False
    while after in made and made[after].primitive.name == "convert_element_type":
        after = made[after].invars[0]
        if isinstance(after, Literal):
            return False
    if after is before:
        return True
    if after not in made:
        return False
    eqn = made[after]
    updates = eqn.primitive.name in ("add", "sub", "select_n") or any(True for _ in jaxprs_in_params(eqn.params))
    return updates and any(v is before for v in eqn.invars)


def _paths(kind: str, tree: Any) -> list[str]:
    """The places of all leaves, as one writes them: argument 0/params/kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # Arguments are a pair: by place and by name.
    skip = 1 if kind == "argument" else 0
    return [" ".join(filter(None, (kind, path_name(path[skip:])))) for path, _ in leaves]


# What the compiled program shows


def _compiled(program: Program, traced: list[Finding]) -> Iterator[Finding]:
    """Sums in half that stand in the program and not, at the same place, in the jaxpr."""
    known = {(finding.rule, finding.source) for finding in traced}
    for each in program.collectives:
        sums = each.kind in ("all-reduce", "reduce-scatter") and np.dtype(each.dtype) in HALF
        if sums and ("half collective", each.source) not in known:
            what = f"compiled to {each.kind} in {each.dtype}"
            yield Finding("half collective", what, _module_of(each.path), each.source, each.dtype, each.times)
    for total in program.half_sums:
        if total.terms > 1 and ("half accumulation", total.source) not in known:
            what = f"compiled to a sum over {total.terms} terms in {total.dtype}"
            yield Finding("half accumulation", what, _module_of(total.path), total.source, total.dtype, total.times)


def _module_of(operation: str) -> str:
    """The path of the module that an operation of the program stands in; its last name is that of the primitive."""
    return module_path(operation.rpartition("/")[0])


# Names


def _merged(findings: Any) -> list[Finding]:
    times: dict[Finding, int] = {}
    for finding in findings:
        key = finding._replace(times=0)
        times[key] = times.get(key, 0) + finding.times
    return [finding._replace(times=n) for finding, n in times.items()]


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _typed(aval: Any) -> str:
    return f"{'weakly typed ' if getattr(aval, 'weak_type', False) else ''}{aval.dtype.name}"


def _is_wide(dtype: str) -> bool:
    return dtype in ("float32", "float64")


def _half(aval: Any) -> bool:
    return getattr(aval, "dtype", FLOAT32) in HALF
