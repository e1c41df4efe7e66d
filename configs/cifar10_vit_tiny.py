"""CIFAR-10 with a ViT-Ti that reads patches of 4x4 pixels.

Source: the network is that of H. Touvron et al., Training data-efficient image transformers, ICML 2021,
https://arxiv.org/abs/2012.12877, table 1: width 192, 3 heads, 12 blocks, with 64 patches of 4x4 pixels: 5,362,762
parameters. Its section 6 trains with AdamW, a learning rate of 5e-4 for each 512 images of a batch, weight decay 0.05
and a cosine schedule with 5 epochs of warm-up for 300 epochs; here 100 epochs in batches of 256, with crops and flips
alone. A transformer without convolutions needs far more augmentation than this to do as well as a ResNet on 45,000
images.

Command:   jaxmp data prepare cifar10 && jaxmp train cifar10_vit_tiny
Hardware:  not trained yet: an epoch is 50e12 multiplications and additions, an accelerator's seconds and hours of a CPU
Expected:  not known; nothing is published for this recipe
"""

from __future__ import annotations

from jaxmp import TFDS, AdamW, Augment, Classification, CosineDecay, Experiment, Loop
from jaxmp.models.vit import vit_tiny


def get_config() -> Experiment:
    """ViT-Ti with patches of 4x4 pixels; 100 epochs of AdamW with label smoothing, in batches of 256."""
    return Experiment(
        model=vit_tiny(patch=4, classes=10),
        data=TFDS(
            name="cifar10",
            train="train[:45000]",
            validation="train[45000:]",
            test="test",
            batch_size=256,
            mean=(0.4917, 0.4825, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            augment=Augment(crop_padding=4, flip=True),
        ),
        task=Classification(label_smoothing=0.1),
        optimizer=AdamW(2.5e-4, schedule=CosineDecay(warmup_steps=880), weight_decay=0.05, clip_norm=1.0),
        precision="mixed_bfloat16",
        loop=Loop(steps=100 * 176),
    )
