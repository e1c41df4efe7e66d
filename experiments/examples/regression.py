"""A polynomial of degree 4 from noiseless points: one Dense layer, the Huber loss.

After pytorch/examples/regression/main.py.   Run: python experiments/examples/regression.py
"""

import flax.linen as nn
import numpy as np
import optax

from jaxmp import Adam, Arrays, CosineDecay, Experiment, Loop, Run, fit

W, B = np.array([[1.5], [-3.0], [0.5], [2.0]]), -4.0
X = np.random.default_rng(0).normal(size=(4096, 1)) ** np.arange(1, 5)


def huber(outputs, batch):
    """The loss of each row."""
    return optax.huber_loss(outputs, batch["y"])[:, 0]


DATA = Arrays.of({"x": X.astype(np.float32), "y": (X @ W + B).astype(np.float32)}, batch_size=32)
EXPERIMENT = Experiment(nn.Dense(1), DATA, huber, Adam(0.1, schedule=CosineDecay()), "float32", loop=Loop(steps=3000))
if __name__ == "__main__":
    print(Run(fit(EXPERIMENT, name="regression").path, EXPERIMENT).state().params, "of", W[:, 0], B)
