"""Every model under every preset: it traces, hands on the output dtype, and the audit of its loss gradient is clean."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxmp.instruments.audit import audit
from jaxmp.models.dcgan import DCGAN
from jaxmp.models.resnet import CifarResNet, ResNet
from jaxmp.models.rnn import SequenceClassifier, SequenceLabeller
from jaxmp.models.transformer import BERT, GPT2, BERTClassifier, BERTMaskedLM, Llama
from jaxmp.models.unet import UNet
from jaxmp.models.vae import VAE
from jaxmp.models.vgg import VGG
from jaxmp.models.vit import ViT
from jaxmp.modules.linen import explain
from jaxmp.precision.policy import parse_policy
from jaxmp.tasks.loss import init_model, make_loss
from jaxmp.tasks.task import Task
from jaxmp.training.gradients import make_gradients
from jaxmp.training.metrics import Mean

ROWS = 512
"""more than 256, from where on a sum in half over the rows is one that the audit reports"""


def image(*shape):
    return {"image": jax.ShapeDtypeStruct((ROWS, *shape), jnp.float32)}


def tokens(count, **others):
    given = {"tokens": jax.ShapeDtypeStruct((ROWS, count), jnp.int32)}
    return given | {name: jax.ShapeDtypeStruct((ROWS, *shape), jnp.int32) for name, shape in others.items()}


def frames(count, width):
    given = {"features": jax.ShapeDtypeStruct((ROWS, count, width), jnp.float32)}
    return given | {"frames": jax.ShapeDtypeStruct((ROWS,), jnp.int32)}


SMALL = {"vocabulary": 40, "context": 8, "layers": 2, "heads": 2, "width": 16}
MODELS = {
    "resnet_basic": (ResNet(blocks=(1, 1), block="basic", channels=4, classes=3), image(32, 32, 3)),
    "resnet_bottleneck": (ResNet(blocks=(1, 1), channels=4, classes=3, strided="1x1"), image(32, 32, 3)),
    "cifar_resnet": (CifarResNet(8, channels=4), image(8, 8, 3)),
    "vgg": (VGG((1, 2), (4, 8), (16,), 3, batch_norm=True), image(8, 8, 3)),
    "simple_rnn": (SequenceClassifier("simple", 8, dropout=0.5), image(6, 5, 1)),
    "lstm": (SequenceClassifier("lstm", 8, 2, bidirectional=True, vocabulary=9), tokens(300, length=())),
    "gru": (SequenceClassifier("gru", 8), image(6, 5)),
    "labeller": (SequenceLabeller("lstm", 8, bidirectional=True, stack=2, dropout=0.5), frames(301, 5)),
    "vit": (ViT(4, 2, 2, 16, 3, dropout=0.1, qk_norm=True), image(8, 8, 3)),
    "bert": (BERT(hidden=32, **SMALL), tokens(8, mask=(8,), segments=(8,))),
    "bert_classifier": (BERTClassifier(hidden=32, **SMALL), tokens(8, mask=(8,))),
    "bert_masked_lm": (BERTMaskedLM(hidden=32, **SMALL), tokens(8)),
    "gpt2": (GPT2(**SMALL), tokens(8)),
    "llama": (Llama(kv_heads=1, hidden=24, qk_norm=True, **SMALL), tokens(8)),
    "dcgan": (DCGAN((8, 8, 1), (8, 4), 5, 3), image(8, 8, 1)),
    "vae": (VAE((8, 8, 1), (16,), 4), image(8, 8, 1)),
    "unet": (UNet((4, 8)), image(8, 8, 1)),
}


@dataclasses.dataclass(frozen=True)
class SumOfSquares(Task):
    """The sum of squares of whatever a model returns."""

    inputs: tuple[str, ...]

    def __call__(self, outputs, batch):
        rows = [
            jnp.sum(jnp.square(x.astype(jnp.float32)).reshape(x.shape[0], -1), axis=-1)
            for x in jax.tree.leaves(outputs)
        ]
        return Mean.of(sum(rows), batch["weight"]), {}


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_audit_of_a_models_loss_gradient_is_clean(name, policy):
    model, inputs = MODELS[name]
    batch = {**inputs, "weight": jax.ShapeDtypeStruct((ROWS,), jnp.float32)}
    task, key = SumOfSquares(tuple(inputs)), jax.random.key(0)
    state = jax.eval_shape(lambda: init_model(model, task, batch, key))
    gradients = make_gradients(make_loss(model, task, policy))
    report = audit(
        gradients,
        *state,
        jax.ShapeDtypeStruct((), jnp.float32),
        batch,
        key,
        policy=policy,
        modules=explain(model, policy, batch, inputs=task.inputs),
    )
    report.assert_clean()
    assert set(report.dot_flops_by_dtype) == {parse_policy(policy).compute_dtype.name}
