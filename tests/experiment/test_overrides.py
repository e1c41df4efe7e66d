"""Overrides: every field of an experiment can be changed by command-line arguments, and nothing else changes."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp import (
    Adam,
    Arrays,
    CosineDecay,
    Experiment,
    InputError,
    Loop,
)
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.identity import HASHED, field_kinds
from jaxmp.experiment.overrides import override, refuse_without_effect
from jaxmp.tasks.task import objectives_of
from jaxmp.training.optimizers import Private


class Block(nn.Module):
    """A module inside another."""

    width: int = 8
    """Width."""
    rate: float | None = None
    """Dropout."""
    activation: Callable[..., Any] = nn.relu
    """Activation."""
    dtype: Any = jnp.float32
    """dtype."""

    @nn.compact
    def __call__(self, x):
        return self.activation(nn.Dense(self.width)(x))


class Net(nn.Module):
    """All kinds of fields."""

    blocks: tuple[nn.Module, ...] = (Block(), Block(width=9))
    """Blocks."""
    first: Any = Block(name="first")
    """First block."""
    features: Sequence[int] = (4, 5)
    """Widths."""
    kernel: tuple[int, int] = (3, 3)
    """Kernel."""
    bias: bool = True
    """Bias."""
    label: str = "a"
    """Label."""

    @nn.compact
    def __call__(self, x):
        return x


def load(split, rows=4):
    return {"image": np.zeros((rows, 2)), "label": np.zeros(rows, int)}


def experiment(**fields):
    return Experiment(**({"model": Net(), "data": Arrays(load), "optimizer": Adam(schedule=CosineDecay())} | fields))


def leaves(value, path=()):
    """(path, value) of every leaf below a dataclass, as the command line spells it."""
    if dataclasses.is_dataclass(value):
        of_flax = ("parent", "name") if isinstance(value, nn.Module) else ()
        for field in dataclasses.fields(value):
            if field.name not in of_flax:
                yield from leaves(getattr(value, field.name), (*path, field.name))
    elif isinstance(value, tuple) and any(dataclasses.is_dataclass(part) for part in value):
        for index, part in enumerate(value):
            yield from leaves(part, (*path, str(index)))
    else:
        yield path, value


def at(value, path):
    for name in path:
        value = value[int(name)] if name.isdigit() else getattr(value, name)
    return value


# Where any other number or word will not do.
OTHERS = {
    "model.cell": "gru",
    "model.depth": 26,
    "task.byte_counts": "other",
    "task.padding": -2,
    "data.channels": 1,
    "data.crop.ratio": 2.0,
    "data.features.bands": 20,
    "data.features.high": 3900.0,
    "precision": "float32",
    "scaler.kind": "dynamic",
    "scaler.backoff_factor": 0.25,
    "parallel.mode": "pmap",
    "parallel.shard": None,  # another than replicated contradicts the other mode
    "parallel.remat_policy": "dots_saveable",
    "loop.accumulate_overflow": "microbatch",
    "loop.batch_norm": "replica",
    "loop.monitor": "loss",
    "loop.mode": "min",
    "loop.ema_decay": 0.5,
    "pruning.end": 1.0,
    "optimizer.state_format": "mu=block128",
    "data.version": "1.0.0",
    "data.overlong": "cut",
    "data.images": None,  # a tuple, where it is set
    "data.rows.images": None,
    "data.rows.version": "1.0.0",
    "data.tokenizer.file": "other",
    "data.second": "other",
}


CHOICES = {
    "task.order": ("in_turn", "at_once"),
    "optimizer.sampling": ("poisson", "shuffled"),
    "pruning.structure": ("unstructured", "2:4"),
    "pruning.scope": ("layer", "global"),
    "model.block": ("basic", "bottleneck"),
    "model.strided": ("1x1", "3x3"),
    "model.stem": ("7x7", "3x3"),
    "model.shortcut": ("zeros", "projection"),
}


def another(path, value):
    """Another valid value of a leaf; None where it is no scalar."""
    if ".".join(path) in CHOICES:
        return next(choice for choice in CHOICES[".".join(path)] if choice != value)
    if ".".join(path) in ("model.width", "model.heads"):  # the one stays a multiple of the other
        return 2 * value
    if ".".join(path) in OTHERS:
        return OTHERS[".".join(path)]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value if path[-1] == "width" else value + 1
    if isinstance(value, float):
        return value / 2 or 0.5
    return {str: "other", type(None): 7}.get(type(value))


def overridable(experiment):
    """(path, the arguments that give it another value, that value) of every scalar leaf."""
    for path, value in leaves(experiment):
        new = another(path, value)
        *above, name = (part.replace("_", "-") for part in path)
        if isinstance(value, bool):
            yield path, ["--" + ".".join([*above, name if new else f"no-{name}"])], new
        elif new is not None:
            yield path, ["--" + ".".join([*above, name]), str(new)], new


def test_every_scalar_leaf_can_be_overridden_and_changes_the_hash_by_its_kind():
    base = experiment()
    paths, kinds = set(), field_kinds(base)
    for path, arguments, value in overridable(base):
        changed = override(base, arguments)
        assert at(changed, path) == value, path
        assert at(base, path) != value, path
        assert (changed.hash != base.hash) == (kinds.get(".".join(path), "decides") in HASHED), path
        others = [other for other, _ in leaves(base) if other != path]
        assert all(at(changed, other) is at(base, other) or at(changed, other) == at(base, other) for other in others)
        paths.add(".".join(path))
    assert {"model.blocks.1.width", "model.first.rate", "optimizer.schedule.warmup_steps", "model.bias"} <= paths
    assert {"precision", "seed", "scaler.kind", "loop.steps", "data.batch_size", "task.label_smoothing"} <= paths


def test_tuples_and_optional_fields_can_be_overridden():
    changed = override(
        experiment(model=Net(first=Block(rate=0.5))),
        "--model.features 1 2 3 --model.kernel 5 7 --model.first.rate None".split()
        + "--data.mean 0.1 0.2 --optimizer.decay *".split(),
    )
    assert changed.model.features == (1, 2, 3)
    assert changed.model.kernel == (5, 7)
    assert changed.model.first.rate is None
    assert changed.data.mean == (0.1, 0.2)
    assert changed.optimizer.decay == ("*",)


def test_an_override_keeps_all_else_the_names_of_modules_included():
    base = experiment()
    changed = override(base, ["--model.first.width", "77"])
    assert changed.model.first.name == "first"
    assert changed.model.first.activation is nn.relu
    assert changed.data is base.data
    assert changed.optimizer is base.optimizer
    assert changed.model.first.width == 77
    assert override(base, []) is base


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--optimizer.learning-rat 1", "--optimizer.learning-rate"),
        ("--optimizer.learning-rate fast", "could not convert string to float: 'fast'"),
        ("--model.first.width 1.5", "invalid literal for int"),
        ("--loop.mode best", "max"),
        ("--model.kernel 3", "Expected 2 values"),
        ("--model.first.activation gelu", "set in the config file"),
    ],
)
def test_an_override_that_cannot_be_read_is_one_message_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        override(experiment(), arguments.split())
    assert stop.value.code == 2
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--precision flaot32", "did you mean 'float32'"),
        ("--seed -1", "seed"),
        ("--scaler.init-scale 3", "power of two"),
        ("--optimizer.learning-rate -1", "learning_rate = -1.0: expected 0 or a positive number"),
        ("--data.batch-size 0", "at least 1"),
        ("--loop.epochs 0", "at least 1"),
    ],
)
def test_an_override_that_is_refused_is_an_input_error(arguments, message):
    with pytest.raises(InputError, match=message):
        override(experiment(), arguments.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--loop.steps 20 --loop.epochs 3", "--loop.epochs: without effect beside loop.steps = 20"),
        (
            "--scaler.kind static --scaler.growth-interval=5",
            "--scaler.growth-interval: without effect .*scaler.kind = static",
        ),
        ("--scaler.kind none --scaler.init_scale 8", "--scaler.init-scale: without effect .*scaler.kind = none"),
        (
            "--precision mixed_bfloat16 --scaler.init-scale 1024",
            "--scaler.init-scale: without effect .*scaler.kind = auto, which is none with precision mixed_bfloat16",
        ),
        ("--loop.accumulate-overflow microbatch", "microbatch: without effect where loop.accumulate_steps = 1"),
    ],
)
def test_an_override_without_effect_is_refused_but_not_in_a_run_that_recorded_it(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        refuse_without_effect(override(experiment(), arguments.split()), arguments.split())
    path = tmp_path / "my.py"
    path.write_text(
        "from jaxmp import *\nfrom jaxmp.models.mlp import MLP\nget_config = lambda: Experiment(model=MLP())\n"
    )
    assert ConfigFile.find(str(path)).experiment(arguments.split())


@pytest.mark.parametrize(
    "arguments",
    [
        "--loop.steps None --loop.epochs 3",
        "--loop.steps 3",
        "--scaler.kind static --scaler.init-scale 8",
        "--scaler.kind dynamic --scaler.growth-interval 5",
        "--scaler.growth-interval 5",
        "--precision mixed_bfloat16 --scaler.kind dynamic --scaler.growth-interval 5",
        "--loop.accumulate-overflow microbatch --loop.accumulate-steps 2",
    ],
)
def test_an_override_with_effect_is_taken_whatever_the_file_says_beside_it(arguments):
    base = experiment(loop=Loop(epochs=7, steps=20) if "None" in arguments else Loop(epochs=7))
    changed = override(base, arguments.split())
    refuse_without_effect(changed, arguments.split())
    assert changed.hash != base.hash


SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_scalar_leaf_of_every_shipped_config_can_be_overridden(path):
    config = ConfigFile.find(str(path))
    base = config.experiment()
    assert config.docstring
    left_out = {("loop", "epochs")}  # no effect beside steps
    left_out |= {("pruning", "sparsity"), ("pruning", "structure")}  # refused beside adapters
    if hasattr(base.model, "cell"):
        left_out |= {("model", "kernel")}  # cuDNN's is refused beside other cells
    if isinstance(base.optimizer, Private):
        left_out |= {("scaler", "kind"), ("loop", "accumulate_overflow"), ("task", "mixup")}  # refused beside it
    if objectives_of(base.task):
        left_out |= {change[0] for change in overridable(base) if change[0][0] == "lora"}  # refused beside them
    changes = [change for change in overridable(base) if change[0] not in left_out]
    changed = override(base, [argument for _, arguments, _ in changes for argument in arguments])
    for leaf, _, value in changes:
        assert at(changed, leaf) == value, leaf
    assert len(changes) > 40
