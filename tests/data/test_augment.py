"""Augmentation: pure functions of (key, image)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.data.augment import Augment, RandomResizedCrop, cutout, random_crop, random_flip, warp
from jaxmp.errors import InputError

KEY = jax.random.key(0)
IMAGE = jax.random.uniform(jax.random.key(7), (9, 7, 3), minval=0.5)
EVERY = Augment(rotation=15.0, scale=0.1, crop_padding=2, flip=True, cutout=3)


def draws(function, count=64):
    """`function(key)` for many keys."""
    return np.asarray(jax.jit(jax.vmap(function))(jax.random.split(KEY, count)))


def test_no_augmentation_is_the_identity_and_traces_nothing_that_touches_the_image():
    traced = jax.make_jaxpr(Augment())(KEY, IMAGE)
    assert traced.jaxpr.outvars == [traced.jaxpr.invars[1]]


@pytest.mark.slow
def test_augmentation_keeps_shape_and_dtype_and_is_a_function_of_the_key():
    change = jax.jit(EVERY)
    first = change(KEY, IMAGE)
    assert (first.shape, first.dtype) == (IMAGE.shape, jnp.float32)
    np.testing.assert_array_equal(first, change(KEY, IMAGE))
    assert not np.array_equal(first, change(jax.random.key(1), IMAGE))


@pytest.mark.slow
def test_a_crop_is_a_shift_by_up_to_the_padding_with_zeros_from_outside():
    padded = np.pad(IMAGE, ((2, 2), (2, 2), (0, 0)))
    shifts = {(y, x): padded[y : y + 9, x : x + 7] for y in range(5) for x in range(5)}
    seen = {
        next(shift for shift, moved in shifts.items() if np.array_equal(moved, crop))
        for crop in draws(lambda key: random_crop(key, IMAGE, 2), 400)
    }
    assert seen == set(shifts)


def test_a_flip_mirrors_left_and_right_half_of_the_time():
    flipped = [np.array_equal(image, IMAGE[:, ::-1]) for image in draws(lambda key: random_flip(key, IMAGE), 400)]
    kept = [np.array_equal(image, IMAGE) for image in draws(lambda key: random_flip(key, IMAGE), 400)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 150 < sum(flipped) < 250


@pytest.mark.slow
def test_cutout_zeroes_one_square_that_may_reach_over_the_edge():
    blank = draws(lambda key: cutout(key, IMAGE, 3), 400)[..., 0] == 0
    sizes = blank.any(2).sum(1) * blank.any(1).sum(1)
    np.testing.assert_array_equal(blank.sum((1, 2)), sizes)  # a filled rectangle
    assert set(sizes.tolist()) == {9, 6, 4}  # whole, over an edge, over a corner
    assert blank.any(0).all()  # and anywhere


def test_warp_by_nothing_is_the_identity_to_the_bit():
    np.testing.assert_array_equal(warp(IMAGE, 0.0, 1.0), IMAGE)


def test_warp_by_a_quarter_turn_is_rot90():
    square = IMAGE[:7]
    np.testing.assert_allclose(warp(square, 90.0, 1.0), np.rot90(square), atol=1e-5)


def test_warp_by_a_factor_enlarges_about_the_centre():
    spot = jnp.zeros((9, 9, 1)).at[4, 6].set(1.0)
    larger = np.asarray(warp(spot, 0.0, 2.0))[..., 0]
    assert np.unravel_index(larger.argmax(), larger.shape) == (4, 8)
    assert larger.sum() > 1.5


@pytest.mark.slow
def test_rotation_and_scale_stay_within_their_bounds():
    wheel = jnp.zeros((41, 41, 1)).at[20, 38].set(1.0)  # a spot 18 pixels right of the centre
    spots = draws(lambda key: Augment(rotation=30.0, scale=0.2)(key, wheel), 200)[..., 0].reshape(200, -1)
    y, x = np.divmod(spots[spots.any(1)].argmax(1), 41)
    angles, radii = np.degrees(np.arctan2(20 - y, x - 20)), np.hypot(y - 20, x - 20)
    assert -33 < angles.min() < -20 and 20 < angles.max() < 33
    assert 13.5 < radii.min() < 16 and 19 < radii.max() < 22.5


@pytest.mark.slow
def test_switching_one_augmentation_on_leaves_the_draws_of_the_others():
    keys = jax.random.split(KEY, 32)
    flips = jax.jit(jax.vmap(Augment(flip=True), (0, None)))(keys, IMAGE)
    both = jax.jit(jax.vmap(Augment(flip=True, cutout=3), (0, None)))(keys, IMAGE)
    np.testing.assert_array_equal(np.where(both == 0, flips, both), flips)


@pytest.mark.parametrize("field, value", [("rotation", -1.0), ("crop_padding", -1), ("cutout", -2), ("scale", 1.0)])
def test_an_impossible_augmentation_is_bad_input(field, value):
    with pytest.raises(InputError, match=rf"data\.augment\.{field} is {value}; expected"):
        Augment(**{field: value})


@pytest.mark.slow
def test_a_random_part_is_resized_and_evaluation_sees_the_middle():
    row = {"image": IMAGE, "weight": jnp.float32(1)}
    crop = RandomResizedCrop(size=5)
    np.testing.assert_array_equal(crop(None, row)["image"], IMAGE[2:7, 1:6])
    parts = draws(lambda key: crop(key, row)["image"])
    assert parts.shape == (64, 5, 5, 3) and len({part.tobytes() for part in parts}) == 64
    assert parts.min() >= 0.5 - 1e-6 and parts.max() <= 1 + 1e-6
    # Of an image whose pixels are their places, a part shows where it lies: its area and its ratio.
    places = jnp.stack(jnp.meshgrid(jnp.arange(64.0), jnp.arange(64.0), indexing="ij"), axis=-1)
    whole = RandomResizedCrop(size=16, area=0.25, ratio=2.0)
    parts = draws(lambda key: whole(key, {"image": places, "weight": jnp.float32(1)})["image"], 256)
    sides = np.stack([parts[:, -4, 8, 0] - parts[:, 3, 8, 0], parts[:, 8, -4, 1] - parts[:, 8, 3, 1]]) * 16 / 9
    area, ratio = sides.prod(0) / 64**2, sides[0] / sides[1]
    assert 0.24 < area.min() < 0.35 and 0.8 < area.max() < 1.01
    assert 0.5 < ratio.min() < 0.6 and 1.7 < ratio.max() < 2.01
    exact = RandomResizedCrop(size=7, area=1.0, ratio=1.0)
    np.testing.assert_allclose(exact(KEY, {**row, "image": IMAGE[:7]})["image"], IMAGE[:7], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 0}, "RandomResizedCrop.size = 0: expected a whole number"),
        ({"area": 0.0}, "area = 0.0: expected a fraction above 0"),
        ({"ratio": 0.5}, "ratio = 0.5: expected 1 or more"),
        ({"size": 8}, "an image of 9 x 7 pixels; expected at least 8 x 8"),
    ],
)
def test_a_part_that_cannot_be_cut_is_refused(fields, message):
    with pytest.raises(InputError) as error:
        RandomResizedCrop(**fields)(None, {"image": IMAGE})
    assert message in str(error.value)
