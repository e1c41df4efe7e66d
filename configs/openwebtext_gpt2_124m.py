"""OpenWebText with GPT-2 of 124 million parameters, full size.

Source: A. Radford et al., Language Models are Unsupervised Multitask Learners, OpenAI 2019; the settings and the data:
A. Karpathy, nanoGPT, https://github.com/karpathy/nanoGPT, config/train_gpt2.py: 480 windows of 1,024 tokens a step,
AdamW with betas 0.9 and 0.95, a learning rate that rises to 6e-4 in 2,000 steps and falls to 6e-5 along a cosine over
600,000 steps, weight decay 0.1, gradients clipped at norm 1, no dropout. Published: 2.85 nats on its validation split,
on 8 A100 (40 GB) in 4 days.

The data: documents in a column `text`, prepared by TFDS under the name below; 5,000 of them are set apart. The tokens
are GPT-2's own: its vocab.json and merges.txt, in the folder that the command runs in.

Command:   jaxmp train openwebtext_gpt2_124m
Hardware:  meant for 8 GPUs of 40 GB; a step's windows come in 40 microbatches of 12
Expected:  124,439,808 parameters. Not trained here: the tests run it on made-up texts
"""

from __future__ import annotations

from jaxmp import AdamW, CosineDecay, Experiment, Loop
from jaxmp.data.text import TextWindows
from jaxmp.data.tfds import TFDS
from jaxmp.data.tokenizer import BPE
from jaxmp.models.transformer import GPT2
from jaxmp.tasks.language import NextToken


def get_config() -> Experiment:
    """GPT-2 with 12 layers, 12 heads, width 768 and context 1024; 600,000 steps of AdamW."""
    return Experiment(
        model=GPT2(vocabulary=50257, context=1024, layers=12, heads=12, width=768, dropout=0.0),
        data=TextWindows(
            TFDS(name="openwebtext", train="train[5000:]", validation="train[:2500]", test="train[2500:5000]"),
            column="text",
            tokenizer=BPE(50257, file="vocab.json"),
            length=1024,
            joined=True,
            batch_size=480,
            eval_batch_size=16,
        ),
        task=NextToken(byte_counts="next_bytes"),
        optimizer=AdamW(
            6e-4, schedule=CosineDecay(warmup_steps=2000, final=0.1), weight_decay=0.1, b2=0.95, clip_norm=1.0
        ),
        precision="mixed_bfloat16",
        loop=Loop(steps=600_000, eval_every=2000, save_every=2000, accumulate_steps=40),
    )
