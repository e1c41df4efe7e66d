"""MNIST with a variational autoencoder of 20 latent variables.

Source: D. Kingma and M. Welling, Auto-Encoding Variational Bayes, ICLR 2014, https://arxiv.org/abs/1312.6114, section
5: 500 hidden units in encoder and decoder, batches of 100. Here the optimizer is Adam rather than Adagrad, and the
pixels are the grey values, so that the loss is not the negative of a bound on a likelihood.

Command:   jaxmp data prepare mnist && jaxmp train mnist_vae
Hardware:  1 CPU core, 1 minute
Expected:  test loss 105.2 ± 0.2 nats in each of float32, mixed_bfloat16 and mixed_float16, over 3 seeds
           (configs/results.json), of which 26.0 are the divergence from the prior. 1-nearest-neighbour accuracy of its
           pictures 93.2 % in float32, one seed (experiments/generative)
"""

from __future__ import annotations

from jaxmp import TFDS, Adam, CosineDecay, Experiment, Loop
from jaxmp.models.vae import VAE
from jaxmp.tasks.variational import EvidenceBound


def get_config() -> Experiment:
    """Dense 500 tanh, 20 latent variables, Dense 500 tanh; Adam at 1e-3 with a cosine schedule, 20 epochs."""
    return Experiment(
        model=VAE(image=(28, 28, 1), hidden=(500,), latent=20),
        data=TFDS(name="mnist", train="train[:55000]", validation="train[55000:]", test="test", batch_size=100),
        task=EvidenceBound(),
        optimizer=Adam(1e-3, schedule=CosineDecay()),
        precision="mixed_float16",
        loop=Loop(epochs=20),
    )
