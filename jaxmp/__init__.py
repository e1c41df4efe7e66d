"""jaxmp: training in mixed precision that runs any experiment under any precision, and proves what it did.

The public names. Each is imported when it is first used: `import jaxmp`, and with it `jaxmp --help`, needs no JAX.
"""

# ruff: noqa: F401 (the imports are for editors and type checkers)

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmp.data.arrays import Arrays
    from jaxmp.data.augment import Augment
    from jaxmp.data.tfds import TFDS
    from jaxmp.errors import InputError, RunFailed
    from jaxmp.experiment import Experiment, Scaling
    from jaxmp.instruments.audit import audit
    from jaxmp.instruments.blame import blame
    from jaxmp.instruments.find_policy import find_policy
    from jaxmp.instruments.memory import memory
    from jaxmp.precision.autocast import APEX_O1, TORCH, OperationLists, autocast
    from jaxmp.precision.flax import with_policy
    from jaxmp.precision.formats import DelayedScaling, Format, fake_quantize, parse_format, quantize
    from jaxmp.precision.functions import apply_policy
    from jaxmp.precision.nnx import from_nnx
    from jaxmp.precision.policy import Policy, parse_policy
    from jaxmp.precision.policy_tree import PolicyTree
    from jaxmp.precision.rounding import apply_updates
    from jaxmp.runs.run import Run
    from jaxmp.scaling.float32_math import clip_by_global_norm, float32_math, global_norm
    from jaxmp.scaling.scalers import DynamicScaler, HeadroomScaler, NoScaler, StaticScaler
    from jaxmp.scaling.transform import (
        consecutive_skips,
        last_step_finite,
        loss_scale,
        loss_scaling,
        scale_loss,
        skipped_steps,
    )
    from jaxmp.training.loop import Loop, fit, steps
    from jaxmp.training.optim import LAMB, SGD, Adam, AdamW, Constant, Cosine, Linear, Lion, Step
    from jaxmp.training.parallel import Parallel
    from jaxmp.training.state import TrainState
    from jaxmp.training.step import make_eval_step, make_train_step
    from jaxmp.training.tasks import Classification, make_loss

__version__ = "0.1.0"

# For the interpreter what TYPE_CHECKING above is for editors; a test holds the two together.
_HOME = {
    "jaxmp.data.arrays": ["Arrays"],
    "jaxmp.data.augment": ["Augment"],
    "jaxmp.data.tfds": ["TFDS"],
    "jaxmp.errors": ["InputError", "RunFailed"],
    "jaxmp.experiment": ["Experiment", "Scaling"],
    "jaxmp.instruments.audit": ["audit"],
    "jaxmp.instruments.blame": ["blame"],
    "jaxmp.instruments.find_policy": ["find_policy"],
    "jaxmp.instruments.memory": ["memory"],
    "jaxmp.precision.autocast": ["APEX_O1", "TORCH", "OperationLists", "autocast"],
    "jaxmp.precision.flax": ["with_policy"],
    "jaxmp.precision.formats": ["DelayedScaling", "Format", "fake_quantize", "parse_format", "quantize"],
    "jaxmp.precision.functions": ["apply_policy"],
    "jaxmp.precision.nnx": ["from_nnx"],
    "jaxmp.precision.policy": ["Policy", "parse_policy"],
    "jaxmp.precision.policy_tree": ["PolicyTree"],
    "jaxmp.precision.rounding": ["apply_updates"],
    "jaxmp.runs.run": ["Run"],
    "jaxmp.scaling.float32_math": ["clip_by_global_norm", "float32_math", "global_norm"],
    "jaxmp.scaling.scalers": ["DynamicScaler", "HeadroomScaler", "NoScaler", "StaticScaler"],
    "jaxmp.scaling.transform": [
        "consecutive_skips",
        "last_step_finite",
        "loss_scale",
        "loss_scaling",
        "scale_loss",
        "skipped_steps",
    ],
    "jaxmp.training.loop": ["Loop", "fit", "steps"],
    "jaxmp.training.optim": ["LAMB", "SGD", "Adam", "AdamW", "Constant", "Cosine", "Linear", "Lion", "Step"],
    "jaxmp.training.parallel": ["Parallel"],
    "jaxmp.training.state": ["TrainState"],
    "jaxmp.training.step": ["make_eval_step", "make_train_step"],
    "jaxmp.training.tasks": ["Classification", "make_loss"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """A public name, or a submodule such as `jaxmp.models`, imported when it is first asked for (PEP 562)."""
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    from jaxmp.errors import nearest

    raise AttributeError(f"module 'jaxmp' has no attribute {name!r}{nearest(name, __all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
