"""MNIST with a simple recurrent network that reads an image row by row.

Source: the network is that of J. Elman, Finding structure in time, Cognitive Science 14, 1990, with 128 units; an image
is a sequence of 28 rows of 28 pixels. (Q. Le et al., https://arxiv.org/abs/1504.00941, read it pixel by pixel.)

Command:   jaxmp data prepare mnist && jaxmp train mnist_simple_rnn
Hardware:  1 CPU core, 17 s in float32, 19 s in mixed_float16, 29 s in mixed_bfloat16
Expected:  test accuracy 97.5 ± 0.1 % in float32, 97.4 ± 0.1 % in mixed_bfloat16 and 97.5 ± 0.2 % in mixed_float16, over
           3 seeds (configs/results.json)

`mean` and `std` were computed from the train split, with the command in mnist_mlp.
"""

from __future__ import annotations

from jaxmp import TFDS, Adam, CosineDecay, Experiment, Loop
from jaxmp.models.rnn import SequenceClassifier


def get_config() -> Experiment:
    """128 tanh units over 28 rows, Dense 10; Adam at 1e-3 with a cosine schedule, gradients clipped at 1, 10 epochs."""
    return Experiment(
        model=SequenceClassifier(cell="simple", width=128, classes=10),
        data=TFDS(
            name="mnist",
            train="train[:55000]",
            validation="train[55000:]",
            test="test",
            batch_size=64,
            mean=(0.1307,),
            std=(0.3081,),
        ),
        optimizer=Adam(1e-3, schedule=CosineDecay(), clip_norm=1.0),
        precision="mixed_float16",
        loop=Loop(epochs=10),
    )
