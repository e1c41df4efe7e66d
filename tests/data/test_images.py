"""Images: scaled, normalised and, in training, augmented, wherever the row lies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.data.arrays import Arrays
from jaxmp.data.augment import Augment
from jaxmp.data.pipeline import resident
from jaxmp.errors import InputError

KEY = jax.random.key(0)


def load(split):
    return {"image": np.random.default_rng(0).integers(0, 256, (23, 6, 6, 3), np.uint8), "label": np.arange(23)}


SOURCE = Arrays(load).source("train")


def batch_of(rows):
    return {name: jnp.asarray(column[rows]) for name, column in resident(SOURCE).items()}


def test_images_are_scaled_and_normalised_and_all_else_is_left():
    data = Arrays(load, mean=(0.5, 0.4, 0.3), std=(0.2,))
    batch = batch_of(np.arange(4))
    ready = jax.jit(data.prepare(train=False))(batch, KEY)
    assert ready["image"].dtype == jnp.float32
    expected = (np.asarray(batch["image"]) / 255 - np.array([0.5, 0.4, 0.3])) / 0.2
    np.testing.assert_allclose(ready["image"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ready["label"], batch["label"])
    assert ready["label"].dtype == batch["label"].dtype


def test_images_that_are_no_bytes_are_not_divided():
    images = jnp.linspace(0, 2, 36, dtype=jnp.float16).reshape(1, 6, 6, 1)
    ready = Arrays(load).prepare(train=True)({"image": images}, KEY)["image"]
    assert ready.dtype == jnp.float32
    np.testing.assert_array_equal(ready, images.astype(jnp.float32))


AUGMENTED = Arrays(load, augment=Augment(rotation=20.0, scale=0.1, crop_padding=2, flip=True, cutout=2))
augmented = jax.jit(AUGMENTED.prepare(train=True))


@pytest.mark.slow
def test_only_training_augments():
    batch = batch_of(np.arange(8))
    plain = jax.jit(Arrays(load).prepare(train=True))(batch, KEY)["image"]
    np.testing.assert_array_equal(jax.jit(AUGMENTED.prepare(train=False))(batch, KEY)["image"], plain)
    assert not np.array_equal(augmented(batch, KEY)["image"], plain)


@pytest.mark.slow
def test_augmentation_draws_by_row_and_not_by_device():
    batch = batch_of(np.arange(8))
    whole = augmented(batch, KEY)["image"]
    for first in (0, 4):
        part = jax.tree.map(lambda column, first=first: column[first : first + 4], batch)
        np.testing.assert_array_equal(augmented(part, KEY, first + jnp.arange(4))["image"], whole[first : first + 4])
    alike = augmented(batch_of(np.zeros(8, int)), KEY)["image"]
    assert len({row.tobytes() for row in np.asarray(alike)}) == 8


@pytest.mark.slow
def test_the_images_of_one_row_are_changed_alike():
    data = Arrays(load, images=("image", "other"), augment=AUGMENTED.augment)
    batch = batch_of(np.arange(4))
    ready = jax.jit(data.prepare(train=True))(batch | {"other": batch["image"]}, KEY)
    np.testing.assert_array_equal(ready["image"], ready["other"])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"images": ("imgae",)}, r"data.images names 'imgae'; the data has .*did you mean 'image'"),
        ({"images": ("label",)}, r"data.images names 'label', of shape \(4,\); expected \(batch, height"),
        ({"mean": (0.1, 0.2)}, r"data.mean \(0.1, 0.2\)"),
    ],
)
def test_images_that_are_none_are_bad_input(settings, message):
    with pytest.raises(InputError, match=message):
        Arrays(load, **settings).prepare(train=True)(batch_of(np.arange(4)), KEY)


@pytest.mark.slow
def test_a_draw_comes_from_the_step_and_the_place_in_the_batch_and_nothing_else():
    batch = batch_of(np.arange(4))
    image, ready = batch["image"], augmented(batch, KEY, jnp.arange(8, 12))["image"]
    keys = [jax.random.fold_in(KEY, place) for place in range(8, 12)]
    alone = jax.jit(AUGMENTED.augment)
    expected = [alone(key, row / 255) for key, row in zip(keys, image.astype(jnp.float32), strict=True)]
    np.testing.assert_allclose(ready, jnp.stack(expected), rtol=1e-5, atol=1e-6)


def test_without_an_image_column_there_are_no_images():
    table = {"x": jnp.ones((4, 3))}
    assert Arrays(load).prepare(train=True)(table, KEY).keys() == {"x"}
    assert Arrays(load, images=()).prepare(train=True)(table, KEY).keys() == {"x"}


def test_a_named_image_column_that_is_missing_is_bad_input():
    with pytest.raises(InputError, match=r"data.images names 'image'; the data has x"):
        Arrays(load, images=("image",)).prepare(train=True)({"x": jnp.ones((4, 3))}, KEY)


@pytest.mark.parametrize("setting", [{"mean": (0.1,)}, {"std": (2.0,)}, {"augment": Augment(flip=True)}])
def test_settings_of_images_without_images_are_bad_input(setting):
    with pytest.raises(InputError, match=r"data.\w+ is .*the data has no column 'image', only x"):
        Arrays(load, **setting).prepare(train=True)({"x": jnp.ones((4, 3))}, KEY)


def test_an_image_column_that_is_not_to_be_prepared_is_left():
    image = jnp.ones((4, 64), jnp.uint8)
    with pytest.raises(InputError, match=r"data.images is by default 'image', of shape \(4, 64\).*data.images=\(\)"):
        Arrays(load).prepare(train=True)({"image": image}, KEY)
    assert Arrays(load, images=()).prepare(train=True)({"image": image}, KEY)["image"] is image
