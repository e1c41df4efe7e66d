"""`--init-from FILE.safetensors`: a run begins with the weights of a file."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from jaxmp.data.arrays import Arrays
from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop
from jaxmp.models.cnn import CNN
from jaxmp.models.pretrained import read_safetensors, write_safetensors
from jaxmp.models.resnet import ResNet
from jaxmp.models.vit import ViT
from jaxmp.runs.fit import fit
from jaxmp.runs.replay import Past
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer
from jaxmp.runs.weights_file import WeightsFile
from jaxmp.tasks.classification import Classification
from jaxmp.training.optimizers import Adam
from jaxmp.trees import by_path


class Small(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(2, name="head")(x)


def rows(split):
    rng = np.random.default_rng(len(split))
    label = rng.integers(0, 2, 20)
    image = rng.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    return {"x": rng.normal(size=(20, 3)).astype(np.float32), "image": image, "label": label}


BASE = Experiment(
    model=Small(),
    data=Arrays(rows, batch_size=10, images=()),
    task=Classification(inputs=("x",)),
    optimizer=Adam(0.0),
    precision="mixed_bfloat16",
    loop=Loop(steps=1),
)
"""trains nothing, so that the weights at the end are those at the start"""

KERNEL = np.arange(12, dtype=np.float32).reshape(3, 4)
OWN = {
    "Dense_0/kernel": KERNEL.astype(np.float16),
    "Dense_0/bias": np.ones(4, np.float32),
    "BatchNorm_0/scale": np.full(4, 2, np.float32),
    "BatchNorm_0/bias": np.full(4, 3, np.float32),
    "BatchNorm_0/mean": np.full(4, 5, np.float32),
    "BatchNorm_0/var": np.full(4, 7, np.float32),
}
HEAD = {"head/kernel": np.zeros((4, 2), np.float32), "head/bias": np.zeros(2, np.float32)}


def begun(tmp_path, tensors, experiment=BASE, **how):
    """The first state of a run that begins with these tensors."""
    write_safetensors(tmp_path / "w.safetensors", tensors)
    trainer = Trainer(experiment)
    file = WeightsFile.find(tmp_path / "w.safetensors", how.get("only", ()))
    return file.give_weights(trainer, trainer.init(), lambda text: None)


def test_a_file_with_the_models_own_paths_is_taken_by_path_in_the_dtypes_of_the_model(tmp_path):
    state = begun(tmp_path, OWN | HEAD, dataclasses.replace(BASE, loop=Loop(steps=1, ema_decay=0.9)))
    assert state.params["Dense_0"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(state.params["Dense_0"]["kernel"], KERNEL)
    np.testing.assert_array_equal(state.ema["Dense_0"]["kernel"], KERNEL)
    np.testing.assert_array_equal(state.model_state["batch_stats"]["BatchNorm_0"]["var"], 7)


@pytest.mark.parametrize(
    ("tensors", "only", "message"),
    [
        (OWN, (), r"head/bias: nothing there, float32\[2\] here\n  head/kernel: nothing there, float32\[4, 2\] here"),
        (
            OWN | HEAD | {"head/kernel": np.zeros((4, 5), np.float32), "head/bias": np.zeros(2, np.int8)},
            (),
            r"head/kernel: float32\[4, 5\] there, float32\[4, 2\] here\n  head/bias: int8\[2\] there, float32",
        ),
        (
            OWN | {"more/kernel": KERNEL},
            ("Dense_0", "more"),
            "--init-only more: no such weight; there are BatchNorm_0/b",
        ),
        (OWN | HEAD | {"more/kernel": KERNEL}, (), r"more/kernel: float32\[3, 4\] there, nothing here"),
        ({"fc.weight": KERNEL}, (), "Small: no converter .* fc.weight; expected .*ResNet.* own paths"),
    ],
)
def test_what_differs_from_the_model_is_named(tmp_path, tensors, only, message):
    with pytest.raises(InputError, match=message):
        begun(tmp_path, tensors, only=only)


def test_a_file_that_is_not_there_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match=r"w.safetensors: no such file"):
        fit(BASE, workdir=tmp_path, init_from=tmp_path / "w.safetensors")
    assert not [*tmp_path.iterdir()]


def test_the_file_that_a_run_began_with_is_found_again_unless_it_has_changed(tmp_path):
    file, run = tmp_path / "w.safetensors", tmp_path / "run"
    write_safetensors(file, OWN | HEAD)
    began = WeightsFile.find(file, ("head",))
    config = {"begins_with": began.begins_with, "weights_file": str(file)}
    assert WeightsFile.of(run, config) == began
    write_safetensors(file, OWN)
    for recorded, named in ((config, str(file)), ({"begins_with": began.begins_with}, "a file not recorded")):
        with pytest.raises(InputError, match=rf"weights of the SHA-256 .*{named} does not have them any more"):
            WeightsFile.of(run, recorded)


def of_torchvision(model):
    """Tensors with the names and shapes that torchvision gives a small ResNet of basic blocks, with 7 classes."""
    rng = np.random.default_rng(0)
    shapes = {"conv1.weight": (4, 3, 7, 7), "fc.weight": (7, 32), "fc.bias": (7,)}

    def norm(name, channels):
        shapes.update({f"{name}.{each}": (channels,) for each in ("weight", "bias", "running_mean", "running_var")})

    norm("bn1", 4)
    before = 4
    for stage, channels in enumerate((4, 8, 16, 32), start=1):
        at = f"layer{stage}.0"
        shapes |= {f"{at}.conv1.weight": (channels, before, 3, 3), f"{at}.conv2.weight": (channels, channels, 3, 3)}
        norm(f"{at}.bn1", channels)
        norm(f"{at}.bn2", channels)
        if before != channels:
            shapes |= {f"{at}.downsample.0.weight": (channels, before, 1, 1)}
            norm(f"{at}.downsample.1", channels)
        before = channels
    return {name: np.float32(rng.uniform(0.5, 1, shape)) for name, shape in shapes.items()} | {
        "bn1.num_batches_tracked": np.array(3)
    }


@pytest.mark.slow
def test_a_resnet_of_torchvision_is_gone_on_with_under_a_new_head(tmp_path):
    model = ResNet((1, 1, 1, 1), "basic", channels=4, classes=2)
    tensors = of_torchvision(model)
    write_safetensors(tmp_path / "resnet.safetensors", tensors)
    experiment = dataclasses.replace(
        BASE, model=model, data=Arrays(rows, batch_size=10, images=("image",)), task=Classification()
    )
    how = {"workdir": tmp_path, "init_from": tmp_path / "resnet.safetensors", "log": lambda text: None}
    with pytest.raises(InputError, match=r"params/head/kernel is \[32, 7\], expected \[32, 2\]"):
        fit(experiment, **how)
    fitted = fit(experiment, init_only=("stem", "stage*", "BatchNorm_0"), **how)
    state, fresh = Run(fitted.path, experiment).state(), Trainer(experiment).init()
    past = Past(Run(fitted.path, experiment), lambda text: None)
    begun = past.before(1)
    past.feed.close()
    kernel = tensors["layer2.0.conv1.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(begun.params["stage2_block1"]["Conv_0"]["kernel"], kernel)
    np.testing.assert_array_equal(state.params["stage2_block1"]["Conv_0"]["kernel"], kernel)
    np.testing.assert_array_equal(state.params["head"]["kernel"], fresh.params["head"]["kernel"])
    changed = [
        not np.array_equal(a, b) for a, b in zip(*(jax.tree.leaves(s.params) for s in (state, fresh)), strict=True)
    ]
    assert sum(changed) == len(changed) - 2
    # The same weights elsewhere are the same run; others are another.
    write_safetensors(tmp_path / "moved.safetensors", tensors)
    how["init_from"] = tmp_path / "moved.safetensors"
    assert not fit(experiment, init_only=("stem", "stage*", "BatchNorm_0"), **how).trained
    assert fit(experiment, init_only=("stem",), **how).path != fitted.path
    with pytest.raises(InputError, match="of another architecture: it has none of the tensors of a ViT"):
        fit(dataclasses.replace(experiment, model=ViT(4, 1, 2, 16, 5)), **how)
    with pytest.raises(InputError, match="CNN: no converter"):
        fit(dataclasses.replace(experiment, model=CNN((4,), classes=2)), **how)


@pytest.mark.slow
def test_what_is_written_is_read_back_by_us_and_by_the_library(tmp_path):
    tensors = OWN | {"n": np.array(7), "b": np.array([True])}
    write_safetensors(tmp_path / "file.safetensors", tensors)
    readers = [read_safetensors]
    try:
        from safetensors.numpy import load_file

        readers.append(load_file)
    except ImportError:
        pass
    for read in readers:
        found = read(tmp_path / "file.safetensors")
        assert found.keys() == tensors.keys()
        for name, x in by_path(tensors).items():
            assert found[name].dtype == np.asarray(x).dtype
            np.testing.assert_array_equal(found[name], x)
