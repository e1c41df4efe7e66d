"""The parts of a first step, in seconds, as JSON: `python parts.py jaxmp|hand-written`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
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
    arguments = state, metrics, feed._columns, rows, feed.arguments, np.int32(1)
    result = compiled(parts, feed.program, arguments)(*arguments)
    jax.block_until_ready(result)
    parts.end("the step")


def hand_written(parts: Parts) -> None:
    """The same of one step in plain JAX, by SGD and without dropout: the least that a first step needs."""
    import jax
    import numpy as np
    from sklearn.datasets import load_digits

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from peer_steps import hand_written as by_hand
    from peer_steps.cases import Case

    from jaxmp.models.mlp import MLP

    parts.end("importing")
    images, labels = load_digits(return_X_y=True)
    batch = {"x": images[:64].astype(np.float32), "label": labels[:64].astype(np.int32)}
    parts.end("data")
    step, state = by_hand.make(Case(MLP((512,)), (64,), 64), "float16")
    parts.end("first state")
    program = jax.jit(step, donate_argnums=0)
    jax.block_until_ready(compiled(parts, program, (state, batch))(state, batch))
    parts.end("the step")


if __name__ == "__main__":
    found = Parts()
    {"jaxmp": jaxmp, "hand-written": hand_written}[sys.argv[1]](found)
    print(json.dumps(found.seconds))
