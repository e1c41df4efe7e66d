"""`Due`: what is due after which step of a run."""

from __future__ import annotations

import dataclasses

from jaxmp.experiment.settings import Loop


@dataclasses.dataclass(frozen=True)
class Due:
    """Which steps something is due after: functions of the step alone, so that a resumed run does the same."""

    loop: Loop
    per_epoch: int
    last: int

    def evaluates(self, step: int) -> bool:
        """Whether the validation set is evaluated after this step."""
        return step == self.last or step % (self.loop.eval_every or self.per_epoch) == 0

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written after this step."""
        every = self.loop.save_every
        return self.evaluates(step) or (every is not None and step % every == 0)

    def writes(self, step: int) -> bool:
        """Whether a line of training metrics ends with this step; so it does with all that is saved."""
        return self.saves(step) or step % self.loop.log_every == 0

    def checks(self, step: int) -> bool:
        """Whether the run is asked after this step if it can go on: often enough that no row of skips is overlooked."""
        return self.writes(step) or step % self.loop.max_consecutive_skips == 0

    def looks(self, step: int) -> bool:
        """Whether the step after this one is looked at: the first, and each that the loop's `ranges_every` says."""
        return self.loop.ranges_every is not None and step % self.loop.ranges_every == 0

    def next_stop(self, step: int, most: int) -> int:
        """The step that a dispatch from `step` on runs to: the next that something is due after, in this epoch."""
        loop = self.loop
        every = [loop.log_every, loop.eval_every, loop.save_every, loop.max_consecutive_skips, self.per_epoch]
        every.append(loop.ranges_every)
        due = [step + n - step % n for n in every if n]
        return min(*due, self.last, step + most)
