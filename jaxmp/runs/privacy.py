"""`Spending`: what a run has told of single rows of its training split, its own steps and those before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmp.errors import InputError
from jaxmp.runs.folder import RunFolder
from jaxmp.runs.trainer import Trainer
from jaxmp.training.accountant import PrivateSteps, epsilon


@dataclasses.dataclass(frozen=True)
class Spending:
    """What the weights of a run tell of a row: of a private run, or of one whose state or weights it begins with.

    It is kept in config.json, so that a run that goes on from another pays for the steps of both.
    """

    trainer: Trainer
    before: tuple[PrivateSteps | None, ...] = ()
    """steps over the same rows that the first weights come from; None stands for steps without privacy"""
    first: int = 0
    """the step that this run's own steps begin after"""
    seeds: tuple[int, ...] = ()
    """seeds of the private runs that the first weights come from, ascending: their noise may not be drawn again"""
    taken_for_public: str | None = None
    """path of the run or file whose weights count as public; None if there is none"""

    @classmethod
    def of(cls, trainer: Trainer, config: Mapping[str, Any]) -> Spending:
        """Reads the spending of a run from its config.json."""
        kept = config.get("privacy", {})
        before, seeds = _steps(kept.get("before", ())), tuple(kept.get("seeds", ()))
        return cls(trainer, before, kept.get("first", 0), seeds, kept.get("taken_for_public"))

    def to_json(self) -> dict[str, Any]:
        """What config.json keeps under `privacy`; `own` has no steps yet."""
        own = self.trainer.private_steps(0, first=self.first)
        before = [of and dataclasses.asdict(of) for of in self.before]
        public = {} if self.taken_for_public is None else {"taken_for_public": self.taken_for_public}
        kept = {"own": own and dataclasses.asdict(own), "before": before, "first": self.first}
        return {**kept, "seeds": list(self.seeds), **public}

    def after(self, step: int) -> dict[str, float]:
        """`epsilon` and `delta` of the weights after `step`; {} if the optimizer is not private."""
        own = self.trainer.private_steps(step - self.first, first=self.first)
        if own is None:
            return {}
        delta = self.trainer.experiment.optimizer.delta
        return {"epsilon": epsilon([*self.before, own], delta), "delta": delta}


def spent_by(config: Mapping[str, Any], step: int, rows: Mapping[str, Any]) -> tuple[PrivateSteps | None, ...]:
    """The steps, over rows that may be among `rows`, that the weights of a run after `step` come from.

    Args:
      config: config.json of the run.
      step: the step of its checkpoint.
      rows: fingerprints of the splits of the run that begins with these weights.

    Returns: all steps up to `step`, those of the runs before it included; None stands for steps without privacy, and
      for a run before it whose folder cannot be read any more.
    """
    kept = config.get("privacy")
    own: tuple[PrivateSteps | None, ...] = ()
    if may_share_rows(config, rows):
        if kept is None:
            if step:
                return (None,)
        else:
            own = (PrivateSteps(**{**kept["own"], "steps": step - kept["first"]}),)
            if "taken_for_public" not in kept:
                return (*_steps(kept["before"]), *own)
    # What a run took for public may be rows of this one.
    if "parent" not in config:
        return own
    parent = _parent_of(config)
    return (None,) if parent is None else (*spent_by(parent, config["begins_with"]["step"], rows), *own)


def private_seeds(config: Mapping[str, Any]) -> set[int]:
    """The seeds of the private runs that the weights of a run come from, by its config.json; its own is one of them."""
    kept = config.get("privacy")
    if kept is not None:
        return {config["seed"], *kept.get("seeds", ())}
    parent = _parent_of(config)
    return set() if parent is None else private_seeds(parent)


def may_share_rows(config: Mapping[str, Any], rows: Mapping[str, Any]) -> bool:
    """Whether rows that a run trained on, by its config.json, may be among those that `rows` are the fingerprints of.

    They may where a column has the same name, dtype and shape: other numbers of rows, and other digests, may be another
    cut of the same data. Columns of single numbers, such as labels, are compared only where there are no others.
    """
    was = config.get("rows")
    if was is None:
        return True
    before, now = _kinds(was["train"]), _kinds(rows["train"])
    return any(now.get(name) == kind for name, kind in before.items())


def _kinds(split: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The dtype and shape of each column by name; without those of single numbers, if there are others."""
    kinds = {name: (of["dtype"], *of["shape"]) for name, of in split["columns"].items()}
    return {name: kind for name, kind in kinds.items() if len(kind) > 1 or kind[0] == "text"} or kinds


def _steps(kept: Any) -> tuple[PrivateSteps | None, ...]:
    return tuple(of and PrivateSteps(**of) for of in kept)


def _parent_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """config.json of the run that a run began with; None if it began with none, or that cannot be read any more."""
    try:
        return RunFolder(Path(config["parent"])).read_config() if "parent" in config else None
    except (OSError, InputError):
        return None
