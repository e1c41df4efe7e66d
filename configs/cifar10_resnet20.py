"""CIFAR-10 with ResNet-20, by the recipe of its paper.

Source: K. He, X. Zhang, S. Ren and J. Sun, Deep Residual Learning for Image Recognition, CVPR 2016,
https://arxiv.org/abs/1512.03385, section 4.2: 45,000 images to train on and 5,000 to validate, batches of 128, SGD with
momentum 0.9 and weight decay 1e-4, a learning rate of 0.1 that is divided by 10 after 32,000 and 48,000 of 64,000
steps, images padded by 4 pixels, cropped and flipped. Its test error is 8.75 %. Here the mean of each channel is
subtracted rather than that of each pixel.

Command:   jaxmp data prepare cifar10 && jaxmp train cifar10_resnet20
Hardware:  an epoch of 352 steps takes 5 minutes of one CPU core, and 4 of two; all 64,000 steps 12 hours of two
Expected:  test accuracy 91.25 %, as published. 15 epochs, an hour of two cores (--loop.steps 5280, so that the learning
           rate falls after 7.5 and 11.25 of them), reach 85.50 % in float32, one seed; how it got there is in
           experiments/precisions/README.md
"""

from __future__ import annotations

from jaxmp import SGD, TFDS, Augment, Experiment, Loop, StepDecay
from jaxmp.models.resnet import CifarResNet


def get_config() -> Experiment:
    """ResNet-20; 64,000 steps of SGD, whose learning rate drops at one half and at three quarters of them."""
    return Experiment(
        model=CifarResNet(depth=20, classes=10),
        data=TFDS(
            name="cifar10",
            train="train[:45000]",
            validation="train[45000:]",
            test="test",
            batch_size=128,
            mean=(0.4917, 0.4825, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            augment=Augment(crop_padding=4, flip=True),
        ),
        optimizer=SGD(0.1, schedule=StepDecay(boundaries=(0.5, 0.75)), momentum=0.9, weight_decay=1e-4, decay=("**",)),
        precision="float32",
        loop=Loop(steps=64_000),
    )
