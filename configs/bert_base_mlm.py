"""Masked language modelling of Wikipedia with BERT-base, full size.

Source: J. Devlin et al., BERT, https://arxiv.org/abs/1810.04805, section 3.1, task 1, and appendix A.2: 256 rows of 512
tokens a step, 1,000,000 steps of Adam, a learning rate that rises to 1e-4 in 10,000 steps and falls to 0, weight decay
0.01, dropout 0.1. Without its second task, the next sentence (as Y. Liu et al., RoBERTa,
https://arxiv.org/abs/1907.11692, found better), and so without segments; a row holds whole articles and parts of them.

The data: articles in a column `text`, prepared by TFDS under the name below; 5,000 of them are set apart. The tokens
are BERT's own: vocab.txt of its uncased vocabulary, in the folder that the command runs in. BookCorpus, the other part
of BERT's data, is not distributed any more.

Command:   jaxmp train bert_base_mlm
Hardware:  meant for 8 GPUs of 40 GB; a step's rows come in 4 microbatches of 64
Expected:  109,514,298 parameters: BERT-base without head has 109,482,240, less the pooler's 590,592; the
           head has 622,650 beside the embedding. Not trained here: the tests run it on made-up texts
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
    """BERT with 12 layers, 12 heads and width 768; 1,000,000 steps of AdamW."""
    return Experiment(
        model=BERTMaskedLM(),
        data=PackedTexts(
            TFDS(
                name="wikipedia/20230601.en", train="train[5000:]", validation="train[:2500]", test="train[2500:5000]"
            ),
            column="text",
            tokenizer=WordPiece(30522, file="vocab.txt"),
            length=512,
            overlong="split",
            masking=Masking(0.15, most=80),
            batch_size=256,
            eval_batch_size=32,
        ),
        task=MaskedLM(inputs=("tokens", "mask", "segments", "positions", "predicted")),
        optimizer=AdamW(1e-4, schedule=LinearDecay(warmup_steps=10_000), weight_decay=0.01, clip_norm=1.0),
        precision="mixed_bfloat16",
        loop=Loop(steps=1_000_000, eval_every=10_000, save_every=10_000, accumulate_steps=4),
    )
