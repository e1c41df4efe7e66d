"""jaxmp: training in mixed precision that runs any experiment under any precision, and checks what it did.

Each public name has its own help, as in `help(jaxmp.loss_scaling)`: shapes, dtypes, errors and source. Traps T1 to T27
and defects B1 to B18, which docstrings name, are those of experiments/conformance/traps.md.

Policies: Policy, parse_policy, PolicyTree. with_policy applies one to a Flax Linen module, from_nnx to an NNX module,
apply_policy to a function; explain shows what each module computes in. autocast runs any function in mixed precision,
by lists of operations: TORCH, APEX_O1, or your own OperationLists.

Loss scaling: loss_scaling wraps an optax optimizer, scale_loss scales the loss. Scalers: DynamicScaler, HeadroomScaler,
StaticScaler, NoScaler; those of other frameworks are in jaxmp.scaling.historical. Read the state by loss_scale,
last_step_finite, skipped_steps, consecutive_skips.

Rounding and formats: apply_updates (to nearest, stochastic, Kahan with init_compensation); Format, parse_format,
fake_quantize, DelayedScaling; quantize, and for blocks BlockFormat, parse_block_format, pack, PackedBlocks,
from_ml_dtypes. A Recipe is the formats of a layer's three products.

Optimizer numerics: float32_math, global_norm, clip_by_global_norm; state_format keeps the state in few bits, in arrays
of PackedArray.

Steps: make_loss, make_train_step, make_eval_step, TrainState; several losses and frozen parts: Objective, and
ObjectiveSpec where a task names them.

Experiments: Experiment, of a model, LoRA beside it; data: Arrays, TFDS, Augment, and Dataset, the base of your own,
any of them cut by random_split, k_folds, balanced; a task: Classification, Adversarial, others in jaxmp.tasks, a
function (FunctionTask), or your own of Task, Mean, MetricSpec, its rows weighted by Weighted, class_weights; an
optimizer: SGD, Adam, AdamW, LAMB, Lion, or one of optax; private: DPSGD, DPAdam (Privacy in a loop of your own); a
schedule: ConstantRate, CosineDecay, LinearDecay, StepDecay; and Loop, Scaling, Parallel, Pruning (magnitude_pruning in
a loop of your own).

Runs: fit, which returns a Fitted, steps, Run, compare, gate, tune; ConfigFile.find reads a config by name. They raise
InputError and RunFailed. Hooks of fit take a StepInfo or an Evaluated, and may return Stop or Pause. export writes a
run as a folder that predicts without jaxmp, load reads it.

Instruments: audit, blame, memory, find_policy, what_if. Laws: jaxmp.testing.
"""

# The public names are the imports in `if TYPE_CHECKING:` below. Each is imported when it is first used, so that
# `import jaxmp`, and with it `jaxmp --help`, needs no JAX.

# ruff: noqa: F401 (the imports are for editors, type checkers and `_homes`)

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the one list: editors and type checkers read it as code, `__getattr__` reads it as text
    from jaxmp.data.arrays import Arrays
    from jaxmp.data.augment import Augment
    from jaxmp.data.dataset import Dataset
    from jaxmp.data.splits import balanced, k_folds, random_split
    from jaxmp.data.tfds import TFDS
    from jaxmp.deploy.export import export, load
    from jaxmp.errors import InputError, RunFailed
    from jaxmp.experiment.config_file import ConfigFile
    from jaxmp.experiment.experiment import Experiment
    from jaxmp.experiment.settings import Loop, Parallel
    from jaxmp.modules.functions import apply_policy
    from jaxmp.modules.linen import explain, with_policy
    from jaxmp.modules.lora import LoRA
    from jaxmp.modules.nnx import from_nnx
    from jaxmp.precision.autocast import APEX_O1, TORCH, OperationLists, autocast
    from jaxmp.precision.blocks import BlockFormat, PackedBlocks, from_ml_dtypes, pack, parse_block_format, quantize
    from jaxmp.precision.formats import DelayedScaling, Format, fake_quantize, parse_format
    from jaxmp.precision.policy import Policy, parse_policy
    from jaxmp.precision.policy_tree import PolicyTree
    from jaxmp.precision.recipe import Recipe
    from jaxmp.precision.rounding import apply_updates, init_compensation
    from jaxmp.runs.fit import Fitted, fit, steps
    from jaxmp.runs.hooks import Evaluated, Pause, StepInfo, Stop
    from jaxmp.runs.run import Run
    from jaxmp.scaling.float32_math import clip_by_global_norm, float32_math, global_norm
    from jaxmp.scaling.scalers import DynamicScaler, HeadroomScaler, NoScaler, Scaling, StaticScaler
    from jaxmp.scaling.state_format import PackedArray, state_format
    from jaxmp.scaling.transform import (
        consecutive_skips,
        last_step_finite,
        loss_scale,
        loss_scaling,
        scale_loss,
        skipped_steps,
    )
    from jaxmp.studies.audit import audit
    from jaxmp.studies.cheapest_policy import find_policy
    from jaxmp.studies.compare import compare
    from jaxmp.studies.gate import gate
    from jaxmp.studies.memory import memory
    from jaxmp.studies.overflow import blame
    from jaxmp.studies.tune import tune
    from jaxmp.studies.what_if import what_if
    from jaxmp.tasks.adversarial import Adversarial
    from jaxmp.tasks.classification import Classification
    from jaxmp.tasks.function import FunctionTask
    from jaxmp.tasks.loss import make_loss
    from jaxmp.tasks.task import Task
    from jaxmp.tasks.weighted import Weighted, class_weights
    from jaxmp.training.evaluation import make_eval_step
    from jaxmp.training.metrics import Mean, MetricSpec
    from jaxmp.training.objective import Objective, ObjectiveSpec
    from jaxmp.training.optimizers import DPSGD, LAMB, SGD, Adam, AdamW, DPAdam, Lion
    from jaxmp.training.privacy import Privacy
    from jaxmp.training.pruning import Pruning, magnitude_pruning
    from jaxmp.training.schedules import ConstantRate, CosineDecay, LinearDecay, StepDecay
    from jaxmp.training.state import TrainState
    from jaxmp.training.step import make_train_step

__version__ = "0.1.0"


def _homes() -> dict[str, str]:
    """The module of each public name, from this file's own text."""
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


_MODULE_OF = _homes()
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """A public name, or a submodule such as `jaxmp.models`, imported when it is first asked for (PEP 562)."""
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        if isinstance(value, type):
            from jaxmp.field_docs import with_fields

            with_fields(value)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    from jaxmp.errors import nearest

    raise AttributeError(f"module 'jaxmp' has no attribute {name!r}{nearest(name, __all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
