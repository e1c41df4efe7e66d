"""Masked language modelling of SST-2's sentences with a BERT of 2 layers: the pretraining of `sst2_bert_tiny`.

Source: J. Devlin et al., https://arxiv.org/abs/1810.04805, section 3.1; the size: I. Turc et al.,
https://arxiv.org/abs/1908.08962, table 1, BERT-Tiny: 2 layers, 2 heads, width 128. There it is pretrained on Wikipedia
and BookCorpus, 30,522 tokens; here on the 66,002 phrases of SST-2's train split that `sst2_bert_tiny` is fine-tuned on,
without their labels, and 8,000 tokens. Rows hold several phrases, and at most 24 tokens of a row are predicted.

Command:   jaxmp data prepare glue/sst2 && jaxmp train sst2_bert_tiny_mlm
Hardware:  1 CPU core, 20 minutes
Expected:  perplexity 95.0 and accuracy 31.0 % of the hidden tokens of the published validation split, float32, seed 0;
           after 4 epochs, --loop.epochs 4, they are 441 and 15.3 %. One seed, so their spread is not known
"""

from __future__ import annotations

from jaxmp import AdamW, Experiment, LinearDecay, Loop
from jaxmp.data.masking import Masking
from jaxmp.data.text import PackedTexts
from jaxmp.data.tfds import TFDS
from jaxmp.data.tokenizer import WordPiece
from jaxmp.models.transformer import BERTMaskedLM
from jaxmp.tasks.language import MaskedLM


def get_config() -> Experiment:
    """A BERT with 2 layers, 2 heads and width 128 over 8,000 word pieces; 20 epochs of AdamW."""
    return Experiment(
        model=BERTMaskedLM(vocabulary=8000, context=128, layers=2, heads=2, width=128, hidden=512),
        data=PackedTexts(
            TFDS(name="glue/sst2", train="train[2%:]", validation="train[:2%]", test="validation"),
            column="sentence",
            tokenizer=WordPiece(8000),
            length=128,
            masking=Masking(0.15, most=24),
            batch_size=32,
            eval_batch_size=64,
        ),
        task=MaskedLM(inputs=("tokens", "mask", "segments", "positions", "predicted")),
        optimizer=AdamW(1e-3, schedule=LinearDecay(warmup_steps=200), weight_decay=0.01, clip_norm=1.0),
        precision="float32",
        loop=Loop(epochs=20),
    )
