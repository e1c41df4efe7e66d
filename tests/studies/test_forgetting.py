from __future__ import annotations

import json

import numpy as np
import pytest

from jaxmp.data.arrays import Arrays
from jaxmp.data.task_sequence import PermutedTasks
from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop
from jaxmp.models.mlp import MLP
from jaxmp.runs.fit import fit
from jaxmp.studies.forgetting import forgetting
from jaxmp.tasks.classification import Classification
from jaxmp.tasks.per_task import PerTask
from jaxmp.training.optimizers import Adam


def test_forgetting_is_the_best_of_a_task_before_less_its_last(tmp_path):
    after = [[0.9, 0.1, 0.2], [0.5, 0.8, 0.1], [0.6, 0.7, 0.95]]
    (tmp_path / "config.json").write_text("{}")
    lines = [
        {"step": 10 * k + 5, "split": split, "epoch": k + epoch, **{f"accuracy_{j}": x for j, x in enumerate(row)}}
        for k, row in enumerate(after)
        for split, epoch in (("validation", 0.5), ("validation", 1.0), ("test", 1.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = forgetting(tmp_path)
    assert found.after == tuple(map(tuple, after))
    np.testing.assert_allclose(found.of_tasks, [0.9 - 0.6, 0.8 - 0.7])
    assert np.isclose(found.average_forgetting, 0.2) and np.isclose(found.average_metric, 0.75)
    assert "average accuracy 0.7500, average forgetting 0.2000" in str(found)
    with pytest.raises(InputError, match="no validation line at the end of an epoch has error_0"):
        forgetting(tmp_path, "error")
    kept = [line for line in lines if line["epoch"] != 2]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    with pytest.raises(InputError, match="no evaluation after epoch 2, at the end of task 1; expected a finished run"):
        forgetting(tmp_path)


@pytest.mark.slow
def test_replay_forgets_less(tmp_path):
    def load(split):
        rng = np.random.default_rng({"train": 0, "validation": 1}.get(split, 2))
        label = rng.integers(0, 4, 400)
        image = rng.standard_normal((400, 8, 8, 1)) / 2
        image[np.arange(400), label, 0, 0] += 2
        return {"image": image.astype(np.float32), "label": label}

    def after(replay):
        data = PermutedTasks(rows=Arrays(load), tasks=4, passes=4, replay=replay, buffer=100, batch_size=40)
        task, model = PerTask(Classification(), count=4), MLP(features=(64,), classes=4)
        experiment = Experiment(model, data, task, Adam(1e-2), precision="mixed_bfloat16", loop=Loop(epochs=4))
        return forgetting(fit(experiment, workdir=tmp_path, progress="none", log=lambda text: None).path)

    without, replayed = after(0.0), after(0.5)
    assert without.average_forgetting > 0.1, str(without)
    assert replayed.average_forgetting < 0.7 * without.average_forgetting, str(replayed)
    assert min(row[k] for k, row in enumerate(replayed.after)) > 0.85


def test_a_metric_that_was_not_finite_is_nan_and_so_is_what_it_is_needed_for(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    after = [[0.9, 0.1, 0.2], [None, 0.8, 0.1], [0.6, 0.7, 0.95]]
    lines = [
        {"step": k, "split": "validation", "epoch": k + 1.0, **{f"accuracy_{j}": x for j, x in enumerate(row)}}
        for k, row in enumerate(after)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = forgetting(tmp_path)
    np.testing.assert_allclose(found.of_tasks, [np.nan, 0.8 - 0.7])
    assert np.isclose(found.average_metric, 0.75) and np.isnan(found.average_forgetting) and "nan" in str(found)
