"""Spoken digits with a simple recurrent network, in both directions, over log-mel features.

Source: J. Elman, Finding structure in time, Cognitive Science 14, 1990; both directions: M. Schuster and K. Paliwal,
Bidirectional recurrent neural networks, IEEE Transactions on Signal Processing 45, 1997.

Data: Z. Jackson, Free Spoken Digit Dataset, https://github.com/Jakobovski/free-spoken-digit-dataset: 3,000 recordings
by six speakers. Test is the official split, recordings 0 to 4 of each digit and speaker; of the others, 5 to 9 are
validation and 10 to 49 train.

Command:   jaxmp data prepare spoken_digits --manual FOLDER && jaxmp train spoken_digits_rnn --precision float32
Folder:    FOLDER has fsdd_recordings.tar.gz, or the folder recordings
Hardware:  1 CPU core, 32 s of its time
Expected:  test accuracy 98.1 ± 0.5 % in float32, 97.8 ± 0.2 % in mixed_bfloat16 and 97.9 ± 0.2 % in mixed_float16, over
           3 seeds (configs/results.json). One recording of the 300 is 0.33 %
"""

from __future__ import annotations

from jaxmp import Adam, Classification, CosineDecay, Experiment, Loop
from jaxmp.data.audio import LogMel, Recordings, SpecAugment
from jaxmp.models.rnn import SequenceClassifier


def get_config() -> Experiment:
    """A simple recurrent network of 128 units, each way, over log-mel features, 50 frames a second, Dense 10; Adam."""
    return Experiment(
        model=SequenceClassifier(cell="simple", width=128, bidirectional=True, classes=10, dropout=0.3),
        data=Recordings(batch_size=64, features=LogMel(hop=160), augment=SpecAugment(bands=5, frames=5)),
        task=Classification(inputs=("features", "frames")),
        optimizer=Adam(1e-3, schedule=CosineDecay(warmup_steps=38), clip_norm=1.0),
        precision="mixed_float16",
        loop=Loop(epochs=30),
    )
