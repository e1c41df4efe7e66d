"""What `jaxmp train digits_mlp` does, by Keras on JAX: `python keras_fit.py STEPS FOLDER`."""

from __future__ import annotations

import os
import sys

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def main(count: int, folder: str) -> None:
    """Trains for `count` steps, evaluates each 5 epochs (100 steps), and saves the weights there."""
    images, labels = load_digits(return_X_y=True)
    images = ((images / 255 - 0.0192) / 0.0236).astype(np.float32)
    x, rest, y, rest_labels = train_test_split(images, labels.astype(np.int32), train_size=1258, random_state=0)
    keras.config.set_dtype_policy("mixed_float16")
    layers = [keras.layers.Dense(512, "relu"), keras.layers.Dropout(0.2), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((64,)), *layers, keras.layers.Activation("linear", dtype="float32")])
    schedule = keras.optimizers.schedules.CosineDecay(1e-3, 1000)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Keras wraps the optimizer in its LossScaleOptimizer under mixed_float16.
    model.compile(keras.optimizers.Adam(schedule), loss, metrics=["accuracy"], steps_per_execution=min(count, 20))
    if count == 1:
        model.train_on_batch(x[:64], y[:64])
        return
    for epoch in range(0, count // 20, 5):
        model.fit(x, y, batch_size=64, epochs=5, verbose=0)
        print(20 * (epoch + 5), model.evaluate(rest[:270], rest_labels[:270], verbose=0), flush=True)
        model.save_weights(os.path.join(folder, f"{epoch}.weights.h5"))
    print(model.evaluate(rest[270:], rest_labels[270:], verbose=0))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
