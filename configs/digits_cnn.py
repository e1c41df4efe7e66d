"""8x8 handwritten digits with a small convolutional network: seconds on a CPU, and nothing to download.

Data: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998, https://doi.org/10.24432/C50P49,
as included in scikit-learn, in a stratified split that jaxmp makes: 1,258 train, 270 validation, 269 test.

Command:   jaxmp train digits_cnn
Hardware:  2 CPU cores, 5 s after the start of Python and JAX
Expected:  test accuracy 98.7 to 98.9 % over 5 seeds, in each of float32, mixed_bfloat16 and mixed_float16
           (experiments/precisions/digits.json)

`mean` and `std` were computed from the train split, with the command in digits_mlp.
"""

from __future__ import annotations

from jaxmp import TFDS, Adam, CosineDecay, Experiment, Loop
from jaxmp.models.cnn import CNN


def get_config() -> Experiment:
    """3x3 conv 32, pool, 3x3 conv 64, pool, Dense 128, dropout 0.3, Dense 10; 600 steps of Adam, cosine schedule."""
    return Experiment(
        model=CNN(channels=(32, 64), kernel=3, dense=(128,), classes=10, dropout=0.3),
        data=TFDS(name="digits", batch_size=64, mean=(0.0192,), std=(0.0236,)),
        optimizer=Adam(1e-3, schedule=CosineDecay()),
        precision="mixed_float16",
        loop=Loop(epochs=30, eval_every=100),
    )
