"""ImageNet with ViT-B/16, from scratch.

Source: A. Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, https://arxiv.org/abs/2010.11929, tables 1 and
3: batches of 4,096, 300 epochs, a learning rate of 3e-3 that rises for 10,000 steps and falls along a cosine, weight
decay 0.3, dropout 0.1, gradients clipped at norm 1, random parts of the images and flips. It reaches a top-1 accuracy
of 77.91 % after fine-tuning at 384x384 pixels (table 5). 86,567,656 parameters.

Command:   jaxmp train imagenet_vit_b16 --data.folder FOLDER --loop.accumulate-steps N
Folder:    FOLDER/train/n01440764/*.JPEG and so on, FOLDER/val the same
Hardware:  not trained yet: it takes accelerators and the images. Its tests run steps of the full size on made-up images
           on a CPU
Expected:  below 77.91 %, which takes fine-tuning at a higher resolution
"""

from __future__ import annotations

from jaxmp import AdamW, Augment, CosineDecay, Experiment, Loop
from jaxmp.data.augment import RandomResizedCrop
from jaxmp.data.image_folder import ImageFolder
from jaxmp.models.vit import vit_base


def get_config() -> Experiment:
    """ViT-B/16 for 224x224 pixels; 300 epochs of AdamW in batches of 4,096, with a cosine schedule."""
    return Experiment(
        model=vit_base().clone(dropout=0.1),
        data=ImageFolder(
            folder="imagenet",
            validation="val",
            size=(256, 256),
            batch_size=4096,
            eval_batch_size=512,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            augment=Augment(flip=True),
            crop=RandomResizedCrop(size=224),
            workers=8,
        ),
        optimizer=AdamW(3e-3, schedule=CosineDecay(warmup_steps=10_000), weight_decay=0.3, clip_norm=1.0),
        precision="mixed_bfloat16",
        loop=Loop(steps=300 * 313),
    )
