"""The identity of a run: which fields of an experiment name its folder, and in what two experiments differ.

A field says in its metadata what it does to a run, `field(default=50, metadata={"identity": "operates"})`:

    decides    which numbers come out; the default
    chooses    which weights count as the best, and when training stops early
    operates   how the run is watched, saved and fed; no bit of the state or of a metric depends on it
    rounds     the order of sums, and so the last digits
    apart      names the run beside the hash: the seed

The hash is of the fields that decide and of those that choose. A run can be gone on with under another value of the
others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxmp.errors import InputError, nearest
from jaxmp.experiment.canonical import canonical
from jaxmp.modules.lora import LoRA
from jaxmp.precision.policy_tree import PolicyTree
from jaxmp.training.objective import EVERYTHING
from jaxmp.training.pruning import Pruning

KINDS = ("decides", "chooses", "operates", "rounds", "apart")
"""what a field can do to a run"""

HASHED = ("decides", "chooses")
"""the kinds of fields that name a run's folder"""


class Difference(NamedTuple):
    """A value in which two experiments differ."""

    path: str
    """the field, `loop.epochs`"""
    kind: str
    """one of KINDS"""
    was: Any
    """its value in the first experiment, as JSON; None if that has no such field"""
    now: Any
    """its value in the second"""

    def __str__(self) -> str:
        return f"{self.path} = {_short(self.now)} (was {_short(self.was)})"


def field_kinds(value: Any, above: str = "") -> dict[str, str]:
    """The kind of every field of a dataclass and of the dataclasses in it, by path: {"loop.keep": "operates", ...}.

    A field below one that does not decide is of that one's kind. Raises InputError if a field's metadata names no kind.
    """
    kinds: dict[str, str] = {}
    for field in dataclasses.fields(value):
        if not field.init:
            continue
        path, kind = f"{above}{field.name}", field.metadata.get("identity", "decides")
        if kind not in KINDS:
            raise InputError(
                f"{path} has the identity {kind!r} in its metadata; expected one of {', '.join(KINDS)}"
                f"{nearest(str(kind), KINDS)}"
            )
        kinds[path] = kind
        of = getattr(value, field.name, None)
        if dataclasses.is_dataclass(of) and not isinstance(of, type):
            below = field_kinds(of, f"{path}.")
            kinds |= below if kind == "decides" else dict.fromkeys(below, kind)
    return kinds


def identity_hash(experiment: Any, origin: Mapping[str, Any] | None = None) -> str:
    """12 hexadecimal digits that name a run's folder: of the fields that decide and choose.

    Args:
      experiment: the Experiment that is trained.
      origin: what identifies the state or the weights that the run begins with, as JSON; None if it begins afresh.
    """
    content = _normal(experiment.to_json())
    for path, kind in field_kinds(experiment).items():
        if kind not in HASHED:
            _drop(content, path.split("."))
    whole = content if origin is None else {"experiment": content, "origin": dict(origin)}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(
    recorded: Mapping[str, Any], experiment: Any, changed: Mapping[str, Any] | None = None
) -> list[Difference]:
    """The values in which `experiment` differs from a recorded one, in the order of their paths.

    Args:
      recorded: what `Experiment.to_json` returned.
      experiment: what is to be trained now.
      changed: values that replaced recorded ones since, by path.
    """
    was = dict(_leaves(_normal(recorded))) | dict(changed or {})
    now, kinds = dict(_leaves(_normal(experiment.to_json()))), None
    found = []
    for path in sorted({*was, *now}):
        if was.get(path) != now.get(path):
            kinds = kinds or field_kinds(experiment)
            default = _ADDED_LATER.get(path)
            found.append(Difference(path, _kind(path, kinds), was.get(path, default), now.get(path, default)))
    return found


def hashed_values(experiment: Any) -> dict[str, Any]:
    """The values of the fields that decide and choose, by path: numbers, bools and texts; what is unset is left out."""
    kinds, found = field_kinds(experiment), {}
    for path, value in _leaves(_normal(experiment.to_json())):
        if _kind(path, kinds) in HASHED and value is not None:
            found[path] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return found


def _kind(path: str, kinds: Mapping[str, str]) -> str:
    """The kind of a leaf: that of the innermost field which it belongs to."""
    parts = path.split(".")
    above = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((kinds[name] for name in above if name in kinds), "decides")


_ABSENT = object()

# Fields that were added after 0.1, and the default with which they change nothing: left out, so that a run of before
# keeps its folder. `*` is the name of an objective.
_ADDED_LATER: dict[str, Any] = {
    "trains": list(EVERYTHING),
    **{f"lora.{name}": value for name, value in json.loads(json.dumps(canonical(LoRA(), "lora"))).items()},
    "lora": {},
    **{f"pruning.{name}": value for name, value in json.loads(json.dumps(canonical(Pruning(), "pruning"))).items()},
    "pruning": {},
    "data.cuts": [],
    "task.class_weights": [],
    "task.mixup": 0.0,
    "optimizer.state_format": None,
    "optimizer.*.state_format": None,
    "loop.limit_batches": None,
    "loop.overfit_batches": None,
}


def _places(content: Any, path: Sequence[str]) -> list[dict[str, Any]]:
    """The dicts at `path`, in which `*` is any name."""
    if not isinstance(content, dict):
        return []
    if not path:
        return [content]
    below = content.values() if path[0] == "*" else [content.get(path[0])]
    return [place for value in below for place in _places(value, path[1:])]


def _normal(content: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with the precision in one spelling, without fields that were added later and have their default."""
    copied = json.loads(json.dumps(content))
    for path, default in _ADDED_LATER.items():
        *above, field = path.split(".")
        for place in _places(copied, above):
            if place.get(field, _ABSENT) == default:
                del place[field]
    if isinstance(copied.get("precision"), str):
        copied["precision"] = str(PolicyTree.parse(copied["precision"]))
    return copied


def _drop(content: Any, names: list[str]) -> None:
    *above, last = names
    for name in above:
        content = content.get(name) if isinstance(content, dict) else None
    if isinstance(content, dict):
        content.pop(last, None)


def _leaves(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested JSON objects by path; what names a class is called by the field that holds its instance."""
    if not isinstance(content, dict) or not content:
        yield path, content
        return
    for name, of in content.items():
        inner = path if name == "class" and path else f"{path}.{name}" if path else name
        yield from ((inner, of),) if name == "class" else _leaves(of, inner)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
