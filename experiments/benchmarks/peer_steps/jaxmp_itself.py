"""jaxmp in each of the ways that it trains: `make_train_step` in a loop of one's own, `steps`, and `fit`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp import (
    Arrays,
    Classification,
    DynamicScaler,
    Experiment,
    Loop,
    NoScaler,
    TrainState,
    fit,
    loss_scaling,
    make_loss,
    make_train_step,
    steps,
)
from jaxmp.scaling.scalers import Scaling

from .cases import FIRST_SCALE, PRECISIONS, Case, optimizer

PACKAGES = ("jaxmp",)
TASK = Classification(inputs=("x",))


def make(case: Case, precision: str, *, no_scaler: bool = False) -> tuple[Any, Any]:
    """Returns `(step, state)`: with loss scaling in float16, else with the bare optimizer, or under `NoScaler`."""
    tx: Any = optimizer()
    if precision == "float16":
        tx = loss_scaling(tx, DynamicScaler(init_scale=FIRST_SCALE))
    elif no_scaler:
        tx = loss_scaling(tx, NoScaler())
    step = make_train_step(make_loss(case.model, TASK, PRECISIONS[precision]), tx)

    def weighted(state: Any, batch: Any) -> Any:
        return step(state, {**batch, "weight": jnp.ones(len(batch["x"]), jnp.float32)})

    return weighted, TrainState.create(case.params(), tx, key=jax.random.key(0))


def experiment(case: Case, precision: str, *, epoch: int, epochs: int) -> Experiment:
    """Returns the experiment: epochs of `epoch` steps, each one a dispatch where steps are fused, and a line.

    It is evaluated and saved at its end alone: nobody else here evaluates or saves.
    """

    def load(split: str) -> Any:
        return case.columns(epoch) if split == "train" else None

    return Experiment(
        model=case.model,
        task=TASK,
        data=Arrays(load, batch_size=case.rows, images=()),
        optimizer=optimizer(),
        precision=PRECISIONS[precision],
        scaler=Scaling(init_scale=FIRST_SCALE),
        loop=Loop(epochs=epochs, log_every=epoch, eval_every=epochs * epoch, max_consecutive_skips=epoch),
    )


def steps_of(case: Case, precision: str, *, epoch: int, epochs: int) -> Callable[[int], None]:
    """Returns `turn(count)`: the next `count` steps of `jaxmp.steps`, which `epoch` divides."""
    infos: Iterator[Any] = steps(experiment(case, precision, epoch=epoch, epochs=epochs))
    done = 0

    def turn(count: int) -> None:
        nonlocal done
        end = done + count
        while done < end:
            info = next(infos)
            done = info.step
        jax.block_until_ready(info.state)

    return turn


def fit_around(case: Case, precision: str, *, epoch: int, epochs: int, between: Callable[[float], None]) -> None:
    """Runs `fit`, and calls `between(seconds of a step)` after each epoch, whose time is not counted."""
    began = time.perf_counter()

    def hook(info: Any) -> None:
        nonlocal began
        if not hasattr(info, "metrics") or info.step % epoch:
            return
        jax.block_until_ready(info.state)
        between((time.perf_counter() - began) / epoch)
        began = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        fit(
            experiment(case, precision, epoch=epoch, epochs=epochs),
            workdir=Path(folder),
            hooks=[hook],
            progress="none",
            log=lambda message: None,
        )
