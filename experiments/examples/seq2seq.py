"""Addition as translation: an LSTM reads "123+45", another writes "168", a character at a time.

After google/flax/examples/seq2seq (train.py, models.py, input_pipeline.py).
Run: python experiments/examples/seq2seq.py
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp import Adam, Arrays, Evaluated, Experiment, Loop, Mean, MetricSpec, Task, fit, random_split

CHARACTERS, QUERY, ANSWER = " 0123456789+=", 7, 5


def encode(texts, length):
    """Numbers of the letters of texts, filled up with spaces to one length."""
    return np.array([[CHARACTERS.index(letter) for letter in text.ljust(length)] for text in texts], np.int32)


class Seq2Seq(nn.Module):
    """An LSTM that reads, and one that goes on from its state."""

    width: int = 256

    def setup(self):
        self.characters = nn.Embed(len(CHARACTERS), 32)
        self.encoder = nn.RNN(nn.LSTMCell(self.width), return_carry=True)
        self.decoder = nn.RNN(nn.LSTMCell(self.width), return_carry=True)
        self.head = nn.Dense(len(CHARACTERS))

    def __call__(self, query, answer):
        state, _ = self.encoder(self.characters(query))
        given = jnp.concatenate([encode("=", 1) + 0 * answer[:, :1], answer[:, :-1]], axis=1)
        return self.head(self.decoder(self.characters(given), initial_carry=state)[1])

    def answer(self, query):
        state, letters = self.encoder(self.characters(query))[0], [jnp.full(len(query), CHARACTERS.index("="))]
        for _ in range(ANSWER):
            state, hidden = self.decoder(self.characters(letters[-1][:, None]), initial_carry=state)
            letters.append(jnp.argmax(self.head(hidden[:, 0]), axis=-1))
        return jnp.stack(letters[1:], axis=1)


@dataclasses.dataclass(frozen=True)
class Addition(Task):
    """Cross-entropy of the letters, and the share of answers that are right as a whole."""

    inputs: tuple[str, ...] = ("query", "answer")
    metrics: ClassVar = {"accuracy": MetricSpec("max", "%")}
    monitor = "accuracy"

    def __call__(self, outputs, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), batch["answer"])
        right = jnp.all(jnp.argmax(outputs, axis=-1) == batch["answer"], axis=1)
        return Mean.of(losses.mean(axis=1), batch["weight"]), {"accuracy": Mean.of(right, batch["weight"])}


def decode(evaluated: Evaluated):
    """Prints three answers that the model writes letter by letter, after each evaluation."""
    query = encode(["1+2", "99+12", "34+567"], QUERY)
    written = Seq2Seq().apply({"params": evaluated.state.params}, query, method="answer")
    print("1+2, 99+12, 34+567:", *("".join(CHARACTERS[i] for i in row).strip() for row in np.asarray(written)))


NUMBERS = np.random.default_rng(0).integers(0, (100, 1000), (30000, 2)).tolist()
ROWS = {
    "query": encode([f"{a}+{b}" for a, b in NUMBERS], QUERY),
    "answer": encode([str(a + b) for a, b in NUMBERS], ANSWER),
}
DATA = random_split(Arrays.of(ROWS, batch_size=128), validation=1000)
EXPERIMENT = Experiment(Seq2Seq(), DATA, Addition(), Adam(3e-3, clip_norm=1.0), loop=Loop(epochs=15))
if __name__ == "__main__":
    fit(EXPERIMENT, name="seq2seq", hooks=(decode,))
