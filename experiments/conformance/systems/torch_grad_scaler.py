"""Adapter of torch's GradScaler on CPU, in the train step of torch's AMP recipe, with BatchNorm.

The laws for a scaler alone are not checked: they run 2**18 steps in a scan, and each would call torch on the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from subject import Subject, batch

from jaxmp.testing import StepAdapter, step_laws


def grad_scaler(state: dict[str, Any], growth_interval: int = 2000) -> torch.amp.GradScaler:
    """Creates a GradScaler in the given state."""
    scaler = torch.amp.GradScaler("cpu", growth_interval=growth_interval)
    saved = {"scale": float(state["scale"]), "_growth_tracker": int(state["growth"])}
    scaler.load_state_dict(scaler.state_dict() | saved)
    scaler.scale(torch.zeros(()))  # it makes its tensors only now
    return scaler


def state_of(scaler: torch.amp.GradScaler) -> dict[str, Any]:
    """Returns the state of a GradScaler: `scale` float32, `growth` int32."""
    saved = scaler.state_dict()
    return {"scale": np.float32(saved["scale"]), "growth": np.int32(saved["_growth_tracker"])}


def tensor(x: Any, dtype: Any = None) -> torch.Tensor:
    """Copies an array to a tensor."""
    return torch.tensor(np.array(x), dtype=dtype)


def step() -> StepAdapter:
    """Returns an adapter of the step in the recipe: float16 autocast, `scale(loss).backward()`, `step`, `update`."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    first = {name: np.array(value) for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]

    def init():
        scaler = {"scale": np.float32(2.0**10), "growth": np.int32(0)}
        momentum = {name: np.zeros_like(first[name]) for name in names}
        return {"model": {k: v.copy() for k, v in first.items()}, "momentum": momentum, "scaler": scaler}

    def train_step(state, batch):
        model.load_state_dict({name: tensor(value) for name, value in state["model"].items()})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for name, param in model.named_parameters():
            optimizer.state[param]["momentum_buffer"] = tensor(state["momentum"][name])
        scaler = grad_scaler(state["scaler"], growth_interval=4)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = torch.nn.functional.mse_loss(model(tensor(batch["x"])).float(), tensor(batch["y"]))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        parameters = dict(model.named_parameters())
        return {
            "model": {name: np.array(value) for name, value in model.state_dict().items()},
            "momentum": {name: np.array(optimizer.state[parameters[name]]["momentum_buffer"]) for name in names},
            "scaler": state_of(scaler),
        }

    def kept(state):
        # num_batches_tracked counts batches that were seen, by its name.
        model = {name: value for name, value in state["model"].items() if "num_batches" not in name}
        return {"model": model, "momentum": state["momentum"]}

    return StepAdapter(
        init,
        train_step,
        batch(),
        kept,
        loss_scale=lambda state: state["scaler"]["scale"],
    )


def subjects() -> list[Subject]:
    """Returns the step."""
    return [Subject("torch, AMP recipe with BatchNorm", ("torch",), step_laws(step()))]
