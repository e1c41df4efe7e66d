"""MNIST with two 5x5 convolutions and a Dense layer of 1,024 units.

Source: the network of TensorFlow's tutorial Deep MNIST for Experts (TensorFlow 1), which reaches about 99.2 % test
accuracy in 20,000 steps of 50 images, with Adam at 1e-4 and dropout 0.5. Here the learning rate of Adam falls from 1e-3
to 0 in 5 epochs, about a fourth of those images.

Command:   jaxmp data prepare mnist && jaxmp train mnist_cnn
Hardware:  2 CPU cores, 5 minutes
Expected:  test accuracy 99.37 % in mixed_float16, 99.41 % in mixed_bfloat16, 99.37 % in float32; one seed
           (experiments/precisions/mnist.json)

`mean` and `std` were computed from the train split, with the command in mnist_mlp.
"""

from __future__ import annotations

from jaxmp import TFDS, Adam, CosineDecay, Experiment, Loop
from jaxmp.models.cnn import CNN


def get_config() -> Experiment:
    """5x5 conv 32, pool, 5x5 conv 64, pool, Dense 1024, dropout 0.5, Dense 10; Adam, cosine schedule, 5 epochs."""
    return Experiment(
        model=CNN(channels=(32, 64), kernel=5, dense=(1024,), classes=10, dropout=0.5),
        data=TFDS(
            name="mnist",
            train="train[:55000]",
            validation="train[55000:]",
            test="test",
            batch_size=64,
            mean=(0.1307,),
            std=(0.3081,),
        ),
        optimizer=Adam(1e-3, schedule=CosineDecay()),
        precision="mixed_float16",
        loop=Loop(epochs=5),
    )
