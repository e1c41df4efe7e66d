"""MNIST, differentially private: 50,000 parameters trained so that the weights tell little of any one image.

Source: M. Abadi et al., Deep Learning with Differential Privacy, 2016, https://arxiv.org/abs/1607.00133, who reach 95 %
at epsilon 2 and 97 % at epsilon 8 with 1,000 hidden units on 60 principal components, which are private as well.

Command:   jaxmp data prepare mnist && jaxmp train mnist_dpsgd
           at epsilon 8: jaxmp train mnist_dpsgd --optimizer.noise-multiplier 0.69
Hardware:  1 CPU core, 1 to 2 minutes
Expected:  test accuracy 94.2 ± 0.2 % at epsilon 2.96 and 95.0 ± 0.2 % at epsilon 7.74, delta 1e-5, in each of float32,
           mixed_bfloat16 and mixed_float16, over 3 seeds (configs/results.json)

Needs the extra `private`. Epsilon is for the 55,000 training images, one more or less; the two noise multipliers are
rounded up from those that give 3 and 8.
"""

from __future__ import annotations

from jaxmp import DPSGD, TFDS, CosineDecay, Experiment, Loop
from jaxmp.models.mlp import MLP


def get_config() -> Experiment:
    """Dense 64 relu, Dense 10; Poisson batches of 758 images on average, in microbatches of 32; 20 epochs."""
    return Experiment(
        model=MLP(features=(64,), classes=10),
        data=TFDS(
            name="mnist",
            train="train[:55000]",
            validation="train[55000:]",
            test="test",
            batch_size=1024,
            mean=(0.1307,),
            std=(0.3081,),
        ),
        optimizer=DPSGD(0.5, schedule=CosineDecay(), clip_norm=1.0, noise_multiplier=1.03),
        precision="mixed_float16",
        loop=Loop(epochs=20, accumulate_steps=32),
    )
