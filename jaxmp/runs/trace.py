"""`Trace`: a profile of some steps of a run, which xprof and TensorBoard open."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxmp.errors import InputError


class StepRange(NamedTuple):
    """Steps `first` to `last`, both among them, counted from 1."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> StepRange:
        """Reads `FIRST:LAST`. Raises InputError if the text is no such range."""
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise InputError(f"--profile {text!r}: expected FIRST:LAST, two steps counted from 1, such as 100:105")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.first}:{self.last}"

    def check(self, begin: int, end: int) -> None:
        """Raises InputError unless all of its steps are in a session that goes from step `begin` to step `end`."""
        if not (begin < self.first <= self.last <= end and self.first >= 1):
            after = f" and goes on from step {begin}" if begin else ""
            raise InputError(
                f"--profile {self}: the run has {end} steps{after}; expected FIRST:LAST within {begin + 1}:{end}"
            )


class Trace:
    """Traces the dispatches of some steps. Without a range it only passes calls on.

    Args:
      steps: which steps; None for no trace.
      folder: the run folder; the trace goes to `plugins/profile` in it, where TensorBoard looks.
      log: is told where the trace is.
    """

    def __init__(self, steps: StepRange | None, folder: Path, log: Callable[[str], None]):
        self._steps, self._folder, self._log, self._runs = steps, folder, log, False

    def run(self, dispatch: Callable[..., tuple[Any, Any]], state: Any, metrics: Any, step: int, count: int) -> Any:
        """Returns `dispatch(state, metrics, step, count)`; traces it if its step is in the range.

        The first dispatch of the range waits for those before it, and the last one is waited for.
        """
        if self._steps is None or not self._steps.first <= step + 1 <= self._steps.last:
            return dispatch(state, metrics, step, count)
        if step + 1 == self._steps.first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._runs = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
            result = dispatch(state, metrics, step, count)
        if step + count == self._steps.last:
            jax.block_until_ready(result)
            self.close()
        return result

    def close(self) -> None:
        """Ends a trace that has begun, and writes it."""
        if self._runs:
            self._runs = False
            jax.profiler.stop_trace()
            self._log(
                f"the trace of steps {self._steps} is in {self._folder / 'plugins' / 'profile'}; "
                f"`xprof --logdir {self._folder}`, or TensorBoard's profile page, shows it"
            )
