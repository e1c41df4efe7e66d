"""8x8 handwritten digits with one hidden layer: seconds on a CPU, and nothing to download.

Data: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998, https://doi.org/10.24432/C50P49,
as included in scikit-learn, in a stratified split that jaxmp makes: 1,258 train, 270 validation, 269 test.

Command:   jaxmp train digits_mlp
Hardware:  2 CPU cores, 4 s after the start of Python and JAX
Expected:  test accuracy 98.6 ± 0.2 % over 5 seeds, in each of float32, mixed_bfloat16 and mixed_float16
           (experiments/precisions/digits.json)

`mean` and `std` were computed from the train split:

    python -c "import numpy as np; from jaxmp import TFDS
    source = TFDS(name='digits').source('train'); images = source[np.arange(len(source))]['image'] / 255
    print(images.mean((0, 1, 2)), images.std((0, 1, 2)))"
"""

from __future__ import annotations

from jaxmp import TFDS, Adam, CosineDecay, Experiment, Loop
from jaxmp.models.mlp import MLP


def get_config() -> Experiment:
    """Dense 512 relu, dropout 0.2, Dense 10; 1,000 steps of Adam with a cosine schedule."""
    return Experiment(
        model=MLP(features=(512,), classes=10, dropout=0.2),
        data=TFDS(name="digits", batch_size=64, mean=(0.0192,), std=(0.0236,)),
        optimizer=Adam(1e-3, schedule=CosineDecay()),
        precision="mixed_float16",
        loop=Loop(epochs=50, eval_every=100),
    )
