"""The parts of a first step, in seconds, as JSON: `python parts.py jaxmp|hand-written`."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

BEGAN = time.perf_counter()


class Parts:
    """Seconds by part, one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = BEGAN

    def end(self, part: str) -> None:
        """The time since the last end was that of `part`."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now


def compiled(parts: Parts, program: Any, arguments: Any) -> Any:
    """Traces, lowers and compiles a jitted function."""
    traced = program.trace(*arguments)
    parts.end("tracing")
    lowered = traced.lower()
    parts.end("lowering")
    result = lowered.compile()
    parts.end("compiling")
    return result


def jaxmp(parts: Parts) -> None:
    """What `fit` does up to its first step; without the run folder."""
    import jax
    import numpy as np

    from jaxmp.experiment.config_file import ConfigFile
    from jaxmp.runs.checks import check
    from jaxmp.runs.trainer import Trainer

    experiment = ConfigFile.find("digits_mlp").experiment()
    parts.end("importing")
    trainer = Trainer(experiment)
    _ = [trainer.source(split) for split in trainer.splits]
    trainer.fingerprints()
    parts.end("data")
    check(trainer)
    fuse = trainer.fuse_steps
    parts.end("checks")
    feed: Any = trainer.feed(fuse=fuse)
    parts.end("data")
    state, metrics = trainer.devices.put_state(trainer.init()), trainer.devices.put(trainer.no_metrics)
    parts.end("first state")
    rows = trainer.devices.put(trainer.batches.epoch_rows(0))
    arguments = state, metrics, feed.columns, rows, feed.arguments, np.int32(1)
    result = compiled(parts, feed.program, arguments)(*arguments)
    jax.block_until_ready(result)
    parts.end("the step")


def hand_written(parts: Parts) -> None:
    """The same of hand_written.py, which trains the same model with Adam, its schedule, dropout and loss scaling."""
    import hand_written as program
    import jax
    import jax.numpy as jnp
    import numpy as np

    parts.end("importing")
    train, _, _ = program.load()
    x, y = map(jnp.asarray, train)
    order = jnp.asarray(np.random.default_rng(0).permutation(len(x)).astype(np.int32))
    parts.end("data")
    first_state, many, _ = program.programs()
    arguments = *first_state(), x, y, order, np.int32(0), np.int32(1)
    parts.end("first state")
    jax.block_until_ready(compiled(parts, many, arguments)(*arguments))
    parts.end("the step")


if __name__ == "__main__":
    found = Parts()
    {"jaxmp": jaxmp, "hand-written": hand_written}[sys.argv[1]](found)
    print(json.dumps(found.seconds))
