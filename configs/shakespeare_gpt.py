"""Shakespeare, byte by byte, with a GPT-2 of 4 layers.

Source: A. Karpathy, nanoGPT, https://github.com/karpathy/nanoGPT, README, "I only have a macbook": 4 layers, 4 heads,
width 128, context 64, no dropout; 2,000 steps of 12 windows with AdamW, whose learning rate rises to 1e-3 in 100 steps
and falls to 1e-4 along a cosine; weight decay 0.1, gradients clipped at norm 1. Its validation loss is 1.88 nats, on
the last 10 % of the text. Here a token is one of 256 bytes rather than of 65 characters, windows do not overlap, and
the validation split is the first half of these 10 %.

Command:   jaxmp data prepare tiny_shakespeare && jaxmp train shakespeare_gpt
           larger: jaxmp train shakespeare_gpt --model.width 256 --model.context 128 --data.length 128
           --data.batch-size 32
Hardware:  1 CPU core, 1.6 minutes; 49 minutes for the larger one, of 3.2 million parameters
Expected:  validation loss 1.864, 1.865 and 1.878 nats with seeds 0, 1 and 2 in float32; 1.864, 1.862 and 1.874 in
           mixed_bfloat16, 1.864, 1.864 and 1.877 in mixed_float16, no step skipped. The test split is the other half of
           the 10 %: 1.90 ± 0.01 in each precision (configs/results.json), so that both together are at 1.883. The
           larger one: 1.477, and 1.611 on the test split, in float32, one seed (experiments/precisions/README.md)
"""

from __future__ import annotations

from jaxmp import AdamW, CosineDecay, Experiment, Loop
from jaxmp.data.text import TextWindows
from jaxmp.models.transformer import GPT2
from jaxmp.tasks.language import NextToken


def get_config() -> Experiment:
    """GPT-2 with 4 layers, 4 heads, width 128 and context 64; 2,000 steps of AdamW."""
    return Experiment(
        model=GPT2(vocabulary=256, context=64, layers=4, heads=4, width=128, dropout=0.0, bias=False),
        data=TextWindows(length=64, batch_size=12),
        task=NextToken(),
        optimizer=AdamW(
            1e-3, schedule=CosineDecay(warmup_steps=100, final=0.1), weight_decay=0.1, b2=0.99, clip_norm=1.0
        ),
        precision="float32",
        loop=Loop(steps=2000, eval_every=250),
    )
