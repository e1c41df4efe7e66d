"""A run as a function of a batch: what a teacher reads of a checkpoint."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxmp.experiment.config_file import ConfigFile
from jaxmp.runs.fit import fit
from jaxmp.runs.run import Run
from jaxmp.runs.teacher import Teacher

DRAWS = """
import flax.linen as nn
import jax
import numpy as np
from jaxmp import Arrays, Experiment, Loop


class Draws(nn.Module):
    @nn.compact
    def __call__(self, x):
        key = self.variable("key", "own", lambda: jax.random.key(1))
        return nn.Dense(2)(x + jax.random.normal(key.value, x.shape))


def load(split):
    return {"image": np.ones((8, 3), np.float32), "label": np.zeros(8, np.int64)}


def get_config():
    return Experiment(model=Draws(), data=Arrays(load, batch_size=8, images=()), loop=Loop(steps=1))
"""


@pytest.mark.slow
def test_a_teacher_may_keep_a_key_in_its_model_state(tmp_path):
    (tmp_path / "draws.py").write_text(DRAWS)
    config = ConfigFile.find(str(tmp_path / "draws.py"))
    how = {"workdir": tmp_path / "runs", "log": lambda text: None}
    run = fit(config.experiment(), name="draws", origin=config.origin([]), **how).path
    rows = {"image": np.ones((8, 3), np.float32)}
    np.testing.assert_allclose(jax.jit(Teacher(str(run), "last"))(rows), Run(run).apply(rows), rtol=1e-5)
