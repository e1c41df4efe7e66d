"""Which fields of an experiment name its folder."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jaxmp.data.arrays import Arrays
from jaxmp.data.splits import RandomSplit
from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.identity import HASHED, differences, field_kinds, identity_hash
from jaxmp.models.mlp import MLP
from jaxmp.modules.lora import LoRA
from jaxmp.training.optimizers import Adam
from jaxmp.training.pruning import Pruning
from jaxmp.training.schedules import CosineDecay


def load(split: str) -> None:
    return None


BASE = Experiment(model=MLP(), data=Arrays(load), optimizer=Adam(schedule=CosineDecay()))

KINDS = {
    "loop.eval_every": "chooses",
    "loop.monitor": "chooses",
    "loop.mode": "chooses",
    "loop.patience": "chooses",
    "loop.max_minutes": "operates",
    "loop.log_every": "operates",
    "loop.save_every": "operates",
    "loop.keep": "operates",
    "loop.max_consecutive_skips": "operates",
    "loop.steps_per_dispatch": "operates",
    "loop.ranges_every": "operates",
    "loop.watch": "operates",
    "loop.log_images": "operates",
    "loop.log_samples": "operates",
    "loop.wandb": "operates",
    "data.workers": "operates",
    "data.eval_batch_size": "rounds",
    "data.device_limit": "operates",
    "parallel.mode": "rounds",
    "parallel.shard": "rounds",
    "parallel.remat": "rounds",
    "parallel.remat_policy": "rounds",
    "seed": "apart",
}
"""the fields that do not decide, as design.md's table has them"""

OTHER: dict[str, Any] = {
    "model": MLP(features=(3,)),
    "precision": "float32",
    "trains": ("Dense_1",),
    "loop.watch": ("update_norm",),
    "lora": LoRA(rank=2),
    "lora.where": ("Dense_1",),
    "pruning": Pruning(0.9),
    "pruning.sparsity": 0.5,
    "pruning.structure": "2:4",
    "pruning.scope": "global",
    "pruning.where": ("Dense_1",),
    "pruning.keep": ("Dense_1",),
    "pruning.begin": 0.25,
    "pruning.end": 0.75,
    "loop.mode": "max",
    "loop.monitor": "loss",
    "loop.accumulate_overflow": "microbatch",
    "loop.batch_norm": "replica",
    "loop.ema_decay": 0.5,
    "parallel.mode": "pmap",
    "parallel.shard": "zero1",
    "parallel.remat": ("@Dense",),
    "parallel.remat_policy": "dots_saveable",
    "data.transforms": (load,),
    "data.host_transforms": (load,),
    "data.cuts": (RandomSplit(),),
    "data.images": (),
    "data.mean": (0.5,),
    "data.std": (0.5,),
    "data.load": print,
    "data.augment": dataclasses.replace(BASE.data.augment, flip=True),
    "task": dataclasses.replace(BASE.task, inputs=("x",)),
    "task.inputs": ("x",),
    "optimizer": dataclasses.replace(BASE.optimizer, eps=1e-3),
    "scaler": dataclasses.replace(BASE.scaler, kind="static"),
    "task.target": "class",
    "task.label_smoothing": 0.1,
    "task.class_weights": (1.0, 2.0),
    "optimizer.schedule": CosineDecay(warmup_steps=3),
    "optimizer.clip_norm": 1.0,
    "optimizer.decay": ("**/kernel",),
    "optimizer.state_format": "mu=block128",
    "data": dataclasses.replace(BASE.data, batch_size=3),
    "loop": dataclasses.replace(BASE.loop, epochs=3),
    "parallel": dataclasses.replace(BASE.parallel, mode="pmap"),
}
"""another value for the fields that are no number"""


def changed(experiment: Any, path: str, value: Any) -> Any:
    name, _, rest = path.partition(".")
    return dataclasses.replace(experiment, **{name: changed(getattr(experiment, name), rest, value) if rest else value})


def paths() -> list[str]:
    model = {path for path in field_kinds(BASE) if path.startswith("model.")}
    return [path for path in field_kinds(BASE) if path not in model and path.count(".") < 2]


@pytest.mark.parametrize("path", paths())
def test_every_field_is_hashed_but_those_that_operate_round_or_stand_apart(path):
    kind = field_kinds(BASE)[path]
    assert kind == KINDS.get(path, "decides")
    was: Any = BASE
    for name in path.split("."):
        was = getattr(was, name)
    value = OTHER.get(path)
    if value is None:
        value = not was if isinstance(was, bool) else 2 if was is None else _another(was, path)
    other = changed(BASE, path, value)
    if path == "parallel":  # made of fields that round
        kind = "rounds"
    assert (other.hash != BASE.hash) == (kind in HASHED)
    (found,) = differences(BASE.to_json(), other)
    assert found.path.startswith(path) and found.kind == kind


def _another(value: Any, path: str) -> Any:
    if path.startswith("scaler.") and isinstance(value, str):
        return "static"
    if isinstance(value, float) and path in ("scaler.backoff_factor", "optimizer.b1", "optimizer.b2"):
        return value / 2
    if isinstance(value, int | float):
        return value * 2 if value else 1
    return pytest.fail(f"{path} has no other value in OTHER")


@dataclasses.dataclass(frozen=True)
class Mine:
    strength: float = 1.0
    watched: bool = dataclasses.field(default=False, metadata={"identity": "operates"})
    inputs = ("image",)

    def __call__(self, outputs, batch):
        raise NotImplementedError


def test_the_fields_of_ones_own_parts_decide_unless_they_say_otherwise():
    mine = dataclasses.replace(BASE, task=Mine())
    assert changed(mine, "task.strength", 2.0).hash != mine.hash
    assert changed(mine, "task.watched", True).hash == mine.hash
    assert [str(one) for one in differences(mine.to_json(), changed(mine, "task.watched", True))] == [
        "task.watched = true (was false)"
    ]


def test_a_kind_that_is_none_is_refused_with_the_nearest():
    @dataclasses.dataclass(frozen=True)
    class Wrong(Mine):
        watched: bool = dataclasses.field(default=False, metadata={"identity": "operate"})

    with pytest.raises(InputError, match=r"task\.watched has the identity 'operate'.*did you mean 'operates'"):
        _ = dataclasses.replace(BASE, task=Wrong()).hash


def test_a_run_recorded_before_a_field_was_added_differs_in_nothing(monkeypatch):
    recorded, now = BASE.to_json(), BASE.hash
    for name in ("limit_batches", "overfit_batches", "max_minutes"):
        del recorded["loop"][name]
    assert differences(recorded, BASE) == []
    monkeypatch.setattr(Experiment, "to_json", lambda self: recorded)
    assert BASE.hash == now


def test_what_a_run_begins_with_is_part_of_its_identity():
    begins = [None, {"continue": "abc", "step": 1}, {"continue": "abc", "step": 2}, {"continue": "abd", "step": 1}]
    assert len({identity_hash(BASE, origin) for origin in begins}) == len(begins)
    assert identity_hash(BASE) == BASE.hash


def test_a_precision_differs_from_no_other_spelling_of_itself():
    spelled = changed(BASE, "precision", "p=f32,c=f16,o=f32")
    assert differences(BASE.to_json(), spelled) == []
