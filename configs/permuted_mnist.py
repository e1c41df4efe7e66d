"""Permuted MNIST: five tasks, one after the other, and how much of the earlier ones is forgotten.

Source: I. Goodfellow et al., An Empirical Investigation of Catastrophic Forgetting in Gradient-Based Neural Networks,
2013, https://arxiv.org/abs/1312.6211; forgetting as A. Chaudhry et al. 2018, https://arxiv.org/abs/1801.10112, define
it; replay of a buffer as A. Chaudhry et al. 2019, https://arxiv.org/abs/1902.10486.
"""

from __future__ import annotations

from jaxmp import TFDS, Adam, Classification, Experiment, Loop
from jaxmp.data.task_sequence import PermutedTasks
from jaxmp.models.mlp import MLP
from jaxmp.tasks.per_task import PerTask


def get_config() -> Experiment:
    """Dense 256 relu, twice, Dense 10; Adam; an epoch a task, half of each batch replayed from 1,000 images a task."""
    return Experiment(
        model=MLP(features=(256, 256), classes=10),
        data=PermutedTasks(
            rows=TFDS(name="mnist", train="train[:55000]", validation="train[55000:]", test="test"),
            tasks=5,
            replay=0.5,
            buffer=1000,
            batch_size=64,
            mean=(0.1307,),
            std=(0.3081,),
        ),
        task=PerTask(Classification(), count=5),
        optimizer=Adam(1e-3),
        precision="mixed_float16",
        loop=Loop(epochs=5, log_every=430),
    )
