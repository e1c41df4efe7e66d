"""ImageNet with ResNet-50.

Source: K. He et al., Deep Residual Learning for Image Recognition, CVPR 2016, https://arxiv.org/abs/1512.03385; the
recipe is that of P. Goyal et al., Accurate, Large Minibatch SGD, 2017, https://arxiv.org/abs/1706.02677, section 5.1,
in its batches of 256: SGD with Nesterov's momentum 0.9 and weight decay 1e-4, a learning rate of 0.1 that is divided by
10 after 30, 60 and 80 of 90 epochs, the last normalisation of each block initialised with 0, random parts of the images
and flips. It reaches a validation error of 23.60 %. 25,557,032 parameters.

Command:   jaxmp train imagenet_resnet50 --data.folder FOLDER
Folder:    FOLDER/train/n01440764/*.JPEG and so on, FOLDER/val the same
Hardware:  not trained yet: it takes accelerators and the images. Its tests run steps of the full size on made-up images
           on a CPU
Expected:  validation accuracy 76.4 %, as published
"""

from __future__ import annotations

from jaxmp import SGD, Augment, Experiment, Loop, StepDecay
from jaxmp.data.augment import RandomResizedCrop
from jaxmp.data.image_folder import ImageFolder
from jaxmp.models.resnet import resnet50


def get_config() -> Experiment:
    """ResNet-50 for 224x224 pixels; 90 epochs of SGD in batches of 256, whose learning rate drops three times."""
    return Experiment(
        model=resnet50().clone(last_scale=0.0),
        data=ImageFolder(
            folder="imagenet",
            validation="val",
            size=(256, 256),
            batch_size=256,
            eval_batch_size=256,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            augment=Augment(flip=True),
            crop=RandomResizedCrop(size=224),
            workers=8,
        ),
        optimizer=SGD(0.1, schedule=StepDecay(boundaries=(1 / 3, 2 / 3, 8 / 9)), nesterov=True, weight_decay=1e-4),
        precision="mixed_bfloat16",
        loop=Loop(steps=90 * 5005),
    )
