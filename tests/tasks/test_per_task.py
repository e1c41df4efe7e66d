from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.errors import InputError
from jaxmp.tasks.classification import Classification
from jaxmp.tasks.per_task import PerTask


@pytest.mark.slow
def test_each_metric_is_that_of_the_rows_of_a_task_and_the_loss_that_of_all():
    rng = np.random.default_rng(0)
    batch = {"label": rng.integers(0, 3, 12), "task": np.arange(12) % 2, "weight": np.float32(np.arange(12) < 10)}
    outputs, inner = jnp.asarray(rng.standard_normal((12, 3)), jnp.float32), Classification()
    loss, metrics = PerTask(inner, count=3)(outputs, batch)
    expected, own = inner(outputs, batch)
    assert loss == expected and metrics["accuracy"] == own["accuracy"]
    for task in range(2):
        mine = {name: column[batch["task"] == task] for name, column in batch.items()}
        assert metrics[f"accuracy_{task}"] == inner(outputs[batch["task"] == task], mine)[1]["accuracy"]
    assert metrics["accuracy_2"].weight == 0
    specs = PerTask(inner, count=3).metrics
    assert specs["accuracy_2"] == specs["accuracy"] and set(specs) == {"loss", *metrics}


def test_a_count_below_one_is_refused():
    with pytest.raises(InputError, match=r"PerTask\.count = 0: expected a whole number of at least 1"):
        PerTask(Classification(), count=0)
