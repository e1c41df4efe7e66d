"""`PolicyTree`: the policy of each module of a model, as ordered rules in one line of text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jaxmp.errors import InputError
from jaxmp.precision.policy import Policy, parse_policy
from jaxmp.trees import FLOAT32, HALF, Classes, Pattern


@dataclasses.dataclass(frozen=True)
class Rule:
    """A policy for the modules that a pattern names, and for all modules below them.

    Raises: InputError if the pattern can match no module.
    """

    pattern: str
    """which modules, in the language of `jaxmp.trees.Pattern`: `encoder/layer_0`, `encoder/*` or `@LayerNorm`"""
    policy: Policy
    """the policy"""

    def __post_init__(self) -> None:
        """Refuses a pattern that can match nothing."""
        try:
            Pattern(self.pattern)
        except InputError as error:
            raise InputError(f"rule {self}: {error}") from None

    def __str__(self) -> str:
        return f"{self.pattern}={self.policy}"

    @functools.cached_property
    def _pattern(self) -> Pattern:
        return Pattern(self.pattern)

    def names(self, path: str, classes: Classes) -> bool:
        """Whether the pattern names the module at `path` itself, not only one above it."""
        return self._pattern.matches(path, classes)

    def covers(self, path: str, classes: Classes) -> bool:
        """Whether the pattern names the module at `path` or one above it."""
        return self._pattern.covers(path, classes)


@dataclasses.dataclass(frozen=True)
class PolicyTree:
    """Ordered rules and a default: the first rule that covers a module gives it its policy.

    A rule covers the modules that it names and all below them. Its output dtype is that of the results of the modules
    which it names, not of those below; the default's is that of the model's outputs.

    >>> tree = PolicyTree.parse("head=float32; @LayerNorm=float32; encoder/*=mixed_bfloat16; mixed_float16")
    >>> str(tree.lookup("encoder/layer_0/mlp"))
    'p=f32,c=bf16,o=f32'
    >>> str(tree.lookup("decoder")) == str(tree.default) == str(parse_policy("mixed_float16"))
    True
    >>> PolicyTree.parse(str(tree)) == tree
    True

    Raises:
      InputError: two rules have the same pattern; a rule has a `reduce` dtype of its own, though one collective sums
        all gradients; or policies with half-precision parameters differ in `rounding`.
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
        """Returns `{"rules": [[pattern, policy], ...], "default": policy}`, in strings."""
        return {"rules": [[rule.pattern, str(rule.policy)] for rule in self.rules], "default": str(self.default)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PolicyTree:
        """The tree of which `to_json` returned `value`."""
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
        """Whether gradients can underflow under one of the policies, so that the loss needs a scale."""
        return any(policy.wants_scaling for policy in self.policies)

    def rule(self, path: str, classes: Classes | None = None) -> Rule | None:
        """The first rule that covers the module at `path`; None if none does. For arguments see `lookup`."""
        return next((rule for rule in self.rules if rule.covers(path, classes or {})), None)

    def lookup(self, path: str, classes: Classes | None = None) -> Policy:
        """The policy of the module at `path`.

        Args:
          path: names joined by `/`, as in the tree of parameters; "" is the model itself.
          classes: class names, bases included, of the module and of those above it, by path. Without it, rules by
            class match nothing.
        """
        rule = self.rule(path, classes)
        return self.default if rule is None else rule.policy

    def require_match(self, classes: Classes) -> None:
        """Raises InputError if a rule has no effect on the modules in `classes`.

        That is a rule that names none of them, with the nearest name in the message, or a rule with another one before
        it that wins for all modules which it covers.
        """
        for rule in self.rules:
            covered = [path for path in classes if rule.covers(path, classes)]
            first = {self.rule(path, classes) for path in covered}
            if covered and rule not in first:
                before = ", ".join(sorted(str(winner) for winner in first))
                raise InputError(f"rule {rule} never wins: {before} stands before it, and the first that matches wins")
            if not any(rule.names(path, classes) for path in classes):
                raise InputError(f"rule {rule} matches no module; {Pattern(rule.pattern).what_there_is(classes)}")


def as_tree(policy: PolicyTree | Policy | str) -> PolicyTree:
    """A tree from a tree, a policy for everything, or the text of either. Raises InputError if it is none of them."""
    if isinstance(policy, str):
        return PolicyTree.parse(policy)
    if isinstance(policy, Policy):
        return PolicyTree((), policy)
    if not isinstance(policy, PolicyTree):
        raise InputError(f"precision {policy!r}: expected a Policy, a PolicyTree, or text such as 'mixed_float16'")
    return policy


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
