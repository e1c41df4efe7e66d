"""`Due`: what is due after which step of a run; and `Interruption`: whether a session stops before the last."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from jaxmp.experiment.settings import Loop


@dataclasses.dataclass(frozen=True)
class Due:
    """What is due after a step: functions of the step alone, so that a resumed run does the same."""

    loop: Loop
    per_epoch: int
    """steps of an epoch"""
    last: int
    """the last step of the run"""
    profile: tuple[int, int] | None = None
    """the first and the last step of a trace, each of which is dispatched singly"""

    def evaluation(self, step: int) -> bool:
        """Whether the validation set is evaluated after this step."""
        return step == self.last or step % (self.loop.eval_every or self.per_epoch) == 0

    def save(self, step: int) -> bool:
        """Whether a checkpoint is written after this step."""
        every = self.loop.save_every
        return self.evaluation(step) or (every is not None and step % every == 0)

    def line(self, step: int) -> bool:
        """Whether a line of training metrics ends with this step. Every step that is saved ends one."""
        return self.save(step) or step % self.loop.log_every == 0

    def check(self, step: int) -> bool:
        """Whether the run checks after this step that it can go on: often enough to notice every row of skips."""
        return self.line(step) or step % self.loop.max_consecutive_skips == 0

    def ranges(self, step: int) -> bool:
        """Whether the ranges of the step after this one are counted: of the first, then every `ranges_every`."""
        return self.loop.ranges_every is not None and step % self.loop.ranges_every == 0

    def next_stop(self, step: int, most: int) -> int:
        """The step that a dispatch from `step` on runs to: the next after which something is due, in this epoch.

        Args:
          step: where the dispatch begins.
          most: the most steps in one dispatch.
        """
        loop = self.loop
        every = [loop.log_every, loop.eval_every, loop.save_every, loop.max_consecutive_skips, self.per_epoch]
        every.append(loop.ranges_every)
        due = [step + n - step % n for n in every if n]
        if self.profile is not None and step < self.profile[1]:
            due.append(max(self.profile[0] - 1, step + 1))
        return min(*due, self.last, step + most)


@dataclasses.dataclass(frozen=True)
class Interruption:
    """Whether a session of a run saves and stops before the end: after a signal, or when its time is up."""

    signalled: Callable[[], bool]
    """whether a signal came"""
    began: float
    """when the session began, by `time.monotonic`"""
    max_minutes: float | None
    """minutes that it may take, `Loop.max_minutes`; None for any time"""

    @property
    def time_is_up(self) -> bool:
        """Whether the session has taken its minutes."""
        return self.max_minutes is not None and time.monotonic() - self.began >= 60 * self.max_minutes

    def asked(self) -> bool:
        """Whether to stop now."""
        return self.signalled() or self.time_is_up

    @property
    def why(self) -> str:
        """The words for a message: "" after a signal."""
        return f" after {self.max_minutes:g} minutes (loop.max_minutes)" if self.time_is_up else ""
