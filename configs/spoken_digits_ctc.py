"""Strings of three to six spoken digits, with connectionist temporal classification.

Source: A. Graves, S. Fernandez, F. Gomez and J. Schmidhuber, Connectionist temporal classification, ICML 2006,
https://doi.org/10.1145/1143844.1143891: a bidirectional LSTM, greedy decoding.

Data: recordings of the Free Spoken Digit Dataset, see spoken_digits_lstm, joined without a pause: 4,000 strings to
train on and 500 each to validate and test on, each of one speaker and of recordings of its own split.

Command:   jaxmp data prepare spoken_digits --manual FOLDER && jaxmp train spoken_digits_ctc --precision float32
Folder:    FOLDER has fsdd_recordings.tar.gz, or the folder recordings
Hardware:  1 CPU core, 1 minute in float32 and mixed_float16
Expected:  label error rate 0.87 ± 0.14 % on the test split in float32, 0.79 ± 0.14 % in mixed_bfloat16 and 0.94 ±
           0.16 % in mixed_float16, over 3 seeds (configs/results.json)

`jaxmp audit` reports three products in float32: optax picks log-probabilities by products with zeros and ones, and a
loss is in float32 under any policy.
"""

from __future__ import annotations

from jaxmp import Adam, CosineDecay, Experiment, Loop
from jaxmp.data.audio import JoinedRecordings, LogMel, SpecAugment
from jaxmp.models.rnn import SequenceLabeller
from jaxmp.tasks.ctc import CTC


def get_config() -> Experiment:
    """A bidirectional LSTM of 128 units over pairs of frames, 10 digits and the blank; 1,500 steps of Adam."""
    return Experiment(
        model=SequenceLabeller(cell="lstm", width=128, bidirectional=True, classes=11, dropout=0.3, stack=2),
        data=JoinedRecordings(batch_size=32, features=LogMel(hop=160), augment=SpecAugment(bands=5, frames=5, masks=2)),
        task=CTC(),
        optimizer=Adam(2e-3, schedule=CosineDecay(warmup_steps=100), clip_norm=1.0),
        precision="mixed_float16",
        loop=Loop(steps=1500, eval_every=125),
    )
