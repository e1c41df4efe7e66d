"""`PolicyTree`: which policy which module of a model runs under, as ordered rules in one line of text."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from jaxmp.errors import InputError, nearest
from jaxmp.precision.policy import Policy, parse_policy
from jaxmp.trees import FLOAT32, HALF

Classes = Mapping[str, Iterable[str]]
"""The names of a module's class and its bases, by the module's path; "" is the model itself."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A policy for the modules that a pattern names, and all below them."""

    pattern: str
    """a path such as `encoder/layer_0`, with `*` for any part of one name and `**` for any number of names; or `@` and
    the name of a module class, which its subclasses have as well"""
    policy: Policy
    """the policy"""

    def __post_init__(self) -> None:
        """Refuses a pattern that can match nothing."""
        name = self.pattern.removeprefix("@")
        if not name or name.startswith("/") or name.endswith("/") or "//" in name or any(c.isspace() for c in name):
            raise InputError(
                f"rule {self}: {self.pattern!r} is no pattern; expected a path such as encoder/layer_0 or encoder/*, "
                "or @ and a module class, such as @LayerNorm"
            )
        if self.pattern.startswith("@") and not name.isidentifier():
            raise InputError(f"rule {self}: {name!r} is not the name of a class")

    def __str__(self) -> str:
        return f"{self.pattern}={self.policy}"

    def names(self, path: str, classes: Classes) -> bool:
        """Whether the pattern names the module at `path` itself, not only one above it."""
        return names(self.pattern, path, classes)


@dataclasses.dataclass(frozen=True)
class PolicyTree:
    """Ordered rules, of which the first that matches wins, and a default for all else.

    A rule covers the modules that it names and all below them. Its output dtype acts where the module that it names
    hands on its result, and nowhere below; the default's acts at the model's output.

    >>> tree = PolicyTree.parse("head=float32; @LayerNorm=float32; encoder/*=mixed_bfloat16; mixed_float16")
    >>> str(tree.lookup("encoder/layer_0/mlp"))
    'p=f32,c=bf16,o=f32'
    >>> str(tree.lookup("decoder")) == str(tree.default) == str(parse_policy("mixed_float16"))
    True
    >>> PolicyTree.parse(str(tree)) == tree
    True

    Raises: InputError where a rule asks for a gradient collective of its own: there is one for the whole step.
    """

    rules: tuple[Rule, ...]
    """the rules, in the order in which they are tried"""
    default: Policy
    """the policy where no rule matches"""

    def __post_init__(self) -> None:
        """Refuses rules that contradict each other or the default."""
        seen: dict[str, Rule] = {}
        for rule in self.rules:
            if rule.pattern in seen:
                raise InputError(f"rule {rule} can never match: {seen[rule.pattern]} stands before it")
            seen[rule.pattern] = rule
            if rule.policy.reduce not in (FLOAT32, self.default.reduce):
                raise InputError(
                    f"rule {rule}: gradients are summed over replicas in one collective; give reduce= in the default, "
                    "which stands last"
                )
        roundings = {policy.rounding for policy in self.policies if policy.param_dtype in HALF}
        if len(roundings) > 1:
            raise InputError(
                f"precision {self}: one rounding of updates for all, not {' and '.join(sorted(roundings))}"
            )

    @classmethod
    def parse(cls, text: str) -> PolicyTree:
        """The tree that `text` names: `PATTERN=POLICY; PATTERN=POLICY; DEFAULT`, the policies as for `parse_policy`.

        The last segment is the default, always; the others are rules. `str(tree)` is parsed back to the same tree.

        Raises:
          InputError: an unknown policy, a malformed rule, or no default.
        """
        *rules, default = [segment.strip() for segment in text.split(";")]
        if not default:
            raise InputError(f"precision {text!r} ends without a default: put a policy after the last ;")
        try:
            tree_default = parse_policy(default)
        except InputError as error:
            raise InputError(f"{error}{_missing_default(default, rules)}") from None
        return cls(tuple(_parse_rule(rule, text) for rule in rules), tree_default)

    def __str__(self) -> str:
        return "; ".join([*map(str, self.rules), str(self.default)])

    def to_json(self) -> dict[str, Any]:
        """As JSON: `{"rules": [[pattern, policy], ...], "default": policy}`."""
        return {"rules": [[rule.pattern, str(rule.policy)] for rule in self.rules], "default": str(self.default)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PolicyTree:
        """The tree that `to_json` gave."""
        rules = tuple(Rule(pattern, parse_policy(policy)) for pattern, policy in value["rules"])
        return cls(rules, parse_policy(value["default"]))

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The policies of the rules, and the default."""
        return (*(rule.policy for rule in self.rules), self.default)

    @property
    def reduce(self) -> Any:
        """The dtype of the gradient collective."""
        return self.default.reduce

    @property
    def rounding(self) -> str:
        """How updates are added to parameters in half precision."""
        return next((policy.rounding for policy in self.policies if policy.rounding != "nearest"), "nearest")

    @property
    def wants_scaling(self) -> bool:
        """Whether gradients can underflow somewhere, so that the loss wants a scale."""
        return any(policy.wants_scaling for policy in self.policies)

    def rule(self, path: str, classes: Classes | None = None) -> Rule | None:
        """The first rule that covers the module at `path`; None where the default holds. For arguments see `lookup`."""
        above = path_and_above(path)
        return next((rule for rule in self.rules if any(rule.names(at, classes or {}) for at in above)), None)

    def lookup(self, path: str, classes: Classes | None = None) -> Policy:
        """The policy of the module at `path`.

        Args:
          path: names joined by `/`, as in the tree of parameters; "" is the model itself.
          classes: for rules by class: the names of the classes, bases included, of the module and of those above it,
            by path. Without it such rules match nothing.
        """
        rule = self.rule(path, classes)
        return self.default if rule is None else rule.policy

    def explain(self, model: Any, batch: Any, *, inputs: tuple[str, ...] = ("image",), **kwargs: Any) -> Any:
        """The modules of a Linen model with the policy of each and the rule that chose it; printed, it is a table.

        Args:
          model: the module.
          batch: its input, an array or `jax.ShapeDtypeStruct`; a tuple of several; or a batch, a dict of arrays.
          inputs: which arrays of such a batch are the model's inputs.
          kwargs: further arguments of its `__call__`. Whether it trains (`train=False`) need not be said.

        Raises:
          InputError: a rule matches nothing; the message has the nearest path.
        """
        from jaxmp.modules.linen import explain  # here: below this module nothing knows of Flax

        if isinstance(batch, Mapping):
            missing = [name for name in inputs if name not in batch]
            if missing:
                raise InputError(
                    f"the batch has no {missing[0]!r}; it has {', '.join(batch)}{nearest(missing[0], batch)}"
                )
            batch = tuple(batch[name] for name in inputs)
        return explain(model, self, *(batch if isinstance(batch, tuple) else (batch,)), **kwargs)

    def require_match(self, classes: Classes) -> None:
        """Raises InputError where a rule names none of the modules in `classes`, with the nearest that there is.

        So it does where a rule that stands before it wins for all that it covers.
        """
        for rule in self.rules:
            covered = [path for path in classes if any(rule.names(at, classes) for at in path_and_above(path))]
            first = {self.rule(path, classes) for path in covered}
            if covered and rule not in first:
                before = ", ".join(sorted(str(winner) for winner in first))
                raise InputError(f"rule {rule} never wins: {before} stands before it, and the first that matches wins")
            if not any(rule.names(path, classes) for path in classes):
                raise InputError(f"rule {rule} matches no module; {there_are(rule.pattern, classes)}")


def as_tree(policy: PolicyTree | Policy | str) -> PolicyTree:
    """A tree from a tree, a policy for everything, or the text of either."""
    if isinstance(policy, str):
        return PolicyTree.parse(policy)
    return PolicyTree((), policy) if isinstance(policy, Policy) else policy


def _parse_rule(segment: str, text: str) -> Rule:
    pattern, sign, policy = segment.partition("=")
    if not sign or not pattern.strip():
        raise InputError(
            f"precision {text!r}: {segment!r} is no rule; expected PATTERN=POLICY, such as head=float32 or "
            "@LayerNorm=float32 (the policy for all else stands last)"
        )
    return Rule(pattern.strip(), parse_policy(policy.strip()))


def _missing_default(default: str, rules: list[str]) -> str:
    """What to add to a message about a default that looks like one more rule."""
    pattern, _, policy = default.partition("=")
    try:
        Rule(pattern.strip(), parse_policy(policy.strip()))
    except InputError:
        return ""
    return f". The last segment is the policy for all else: {'; '.join([*rules, default])}; mixed_float16"


def names(pattern: str, path: str, classes: Classes) -> bool:
    """Whether a rule's pattern names the module at `path` itself, not only one above it."""
    if pattern.startswith("@"):
        return pattern[1:] in classes.get(path, ())
    return bool(path) and _matches(path.split("/"), pattern.split("/"))


def there_are(pattern: str, classes: Classes) -> str:
    """The end of a message about a pattern that names no module: those that there are, and the nearest."""
    by_class = pattern.startswith("@")
    known = {f"@{name}" for above in classes.values() for name in above} if by_class else classes
    shown = sorted(filter(None, known))
    listed = ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")
    return f"there are {listed or 'none below the model itself'}{nearest(pattern, shown)}"


def path_and_above(path: str) -> list[str]:
    """The path, and those of all modules above it, from "" on."""
    parts = path.split("/") if path else []
    return ["/".join(parts[:n]) for n in range(len(parts) + 1)]


def _matches(names: list[str], patterns: list[str]) -> bool:
    if not patterns or not names:
        return not names and all(pattern == "**" for pattern in patterns)
    if patterns[0] == "**":
        return _matches(names, patterns[1:]) or _matches(names[1:], patterns)
    return fnmatch.fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])
