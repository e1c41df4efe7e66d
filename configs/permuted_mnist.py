"""Permuted MNIST: five tasks, one after the other, and how much of the earlier ones is forgotten.

Source: I. Goodfellow et al., An Empirical Investigation of Catastrophic Forgetting in Gradient-Based Neural Networks,
2013, https://arxiv.org/abs/1312.6211; J. Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796, figure 2.
Forgetting as A. Chaudhry et al. 2018 define it, https://arxiv.org/abs/1801.10112; replay from a buffer as A. Chaudhry
et al. 2019, https://arxiv.org/abs/1902.10486.

Command:   jaxmp data prepare mnist && jaxmp train permuted_mnist
           without replay: jaxmp train permuted_mnist --data.replay 0
Hardware:  1 CPU core, 8 s after the start of Python and JAX
Expected:  average forgetting of the validation accuracy in float32, mixed_bfloat16 and mixed_float16, 3 seeds each:
           0.010 in each with replay, 0.247, 0.218 and 0.244 without; average accuracy over the five tasks, of the last
           weights on the test split, 95.3 to 95.4 % with replay, 77.1 to 79.6 % without (configs/results.json)

The forgetting, and the accuracy of each task after each task, are computed from the run's metrics.jsonl:

    python -c "import jaxmp.studies.forgetting as f, sys; print(f.forgetting(sys.argv[1]))" runs/permuted_mnist/HASH-s0
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
