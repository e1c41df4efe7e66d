"""CIFAR-10 with two 3x3 convolutions and no hidden Dense layer.

Source: TensorFlow's tutorial Convolutional Neural Network (CNN), https://www.tensorflow.org/tutorials/images/cnn,
without its third convolution and its hidden Dense layer. The tutorial reaches about 70 % test accuracy in 10 epochs.

Command:   jaxmp data prepare cifar10 && jaxmp train cifar10_cnn
Hardware:  2 CPU cores, 10 minutes, while other programs ran
Expected:  test accuracy 74.4 % in mixed_float16, 2 of 8,448 steps skipped; one seed

`mean` and `std` were computed from the train split:

    python -c "import numpy as np; from jaxmp import TFDS
    source = TFDS(name='cifar10', train='train[:45000]').source('train')
    images = source[np.arange(len(source))]['image'] / 255
    print(images.mean((0, 1, 2)), images.std((0, 1, 2)))"
"""

from __future__ import annotations

from jaxmp import TFDS, Adam, Augment, CosineDecay, Experiment, Loop
from jaxmp.models.cnn import CNN


def get_config() -> Experiment:
    """3x3 conv 32, pool, 3x3 conv 64, pool, Dense 10; flips, Adam with a cosine schedule, 12 epochs."""
    return Experiment(
        model=CNN(channels=(32, 64), kernel=3, classes=10),
        data=TFDS(
            name="cifar10",
            train="train[:45000]",
            validation="train[45000:]",
            test="test",
            batch_size=64,
            mean=(0.4917, 0.4825, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            augment=Augment(flip=True),
        ),
        optimizer=Adam(1e-3, schedule=CosineDecay()),
        precision="mixed_float16",
        loop=Loop(epochs=12),
    )
