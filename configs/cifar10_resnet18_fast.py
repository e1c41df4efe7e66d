"""CIFAR-10 with ResNet-18, in a short schedule after the records of speed.

Source: the network is that of K. He et al., CVPR 2016, https://arxiv.org/abs/1512.03385, with a 3x3 convolution in the
place of its first two layers, as is usual for 32x32 pixels: 11,173,962 parameters. The schedule is that of D. Page, How
to train your ResNet, 2018, https://github.com/davidcpage/cifar10-fast: batches of 512, SGD with Nesterov's momentum and
weight decay 5e-4, a learning rate that rises for 5 epochs and falls linearly to 0 at the end of the 24th, images
cropped, flipped and with a hole of 8x8 pixels. His network of 9 layers reaches 94 % test accuracy.

Command:   jaxmp data prepare cifar10 && jaxmp train cifar10_resnet18_fast
Hardware:  not trained yet: an epoch is 75e12 multiplications and additions, an accelerator's seconds and hours of a CPU
Expected:  test accuracy about 94 %, as published for a smaller network
"""

from __future__ import annotations

from jaxmp import SGD, TFDS, Augment, Experiment, LinearDecay, Loop
from jaxmp.models.resnet import resnet18


def get_config() -> Experiment:
    """ResNet-18 with a 3x3 stem; 24 epochs of SGD in batches of 512, whose learning rate rises and falls linearly."""
    return Experiment(
        model=resnet18(classes=10).clone(stem="3x3"),
        data=TFDS(
            name="cifar10",
            train="train[:45000]",
            validation="train[45000:]",
            test="test",
            batch_size=512,
            mean=(0.4917, 0.4825, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            augment=Augment(crop_padding=4, flip=True, cutout=8),
        ),
        optimizer=SGD(0.4, schedule=LinearDecay(warmup_steps=440), nesterov=True, weight_decay=5e-4),
        precision="mixed_bfloat16",
        loop=Loop(steps=24 * 88),
    )
