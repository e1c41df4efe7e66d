"""`Spending`: what a run has told of single rows of its training split, its own steps and those before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmp.data.fingerprint import changed_rows
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

    @classmethod
    def of(cls, trainer: Trainer, config: Mapping[str, Any]) -> Spending:
        """That of the run whose config.json is `config`."""
        kept = config.get("privacy", {})
        return cls(trainer, tuple(of and PrivateSteps(**of) for of in kept.get("before", ())), kept.get("first", 0))

    def to_json(self) -> dict[str, Any]:
        """What config.json keeps under `privacy`; `own` has no steps yet."""
        own = self.trainer.private_steps(0, first=self.first)
        before = [of and dataclasses.asdict(of) for of in self.before]
        return {"own": own and dataclasses.asdict(own), "before": before, "first": self.first}

    def after(self, step: int) -> dict[str, float]:
        """`epsilon` and `delta` of the weights after `step`; {} if the optimizer is not private."""
        own = self.trainer.private_steps(step - self.first, first=self.first)
        if own is None:
            return {}
        delta = self.trainer.experiment.optimizer.delta
        return {"epsilon": epsilon([*self.before, own], delta), "delta": delta}


def spent_by(config: Mapping[str, Any], step: int) -> tuple[PrivateSteps | None, ...]:
    """The steps that the weights of a run come from, by its config.json: all up to `step`."""
    kept = config.get("privacy")
    if kept is None or kept["own"] is None:
        return (None,) if step else ()
    own = PrivateSteps(**{**kept["own"], "steps": step - kept["first"]})
    return (*(of and PrivateSteps(**of) for of in kept["before"]), own)


def trained_on_the_same_rows(config: Mapping[str, Any], rows: Mapping[str, Any]) -> bool:
    """Whether a run's training rows, by its config.json, are those that `rows` are the fingerprints of."""
    was = config.get("rows")
    return was is None or not changed_rows("train", was["train"], rows["train"])
