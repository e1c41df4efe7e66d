from __future__ import annotations

import numpy as np
import pytest

from jaxmp.data.arrays import Arrays
from jaxmp.data.task_sequence import PermutedTasks
from jaxmp.errors import InputError

IMAGES = np.arange(40 * 12, dtype=np.int32).reshape(40, 4, 3, 1).astype(np.float32)


def load(split):
    return {"image": IMAGES, "label": np.arange(40)} if split == "train" else None


def sequence(**fields):
    return PermutedTasks(**{"rows": Arrays(load), "tasks": 3, "batch_size": 8, "buffer": 5} | fields)


def batches(data, seed=0, **fields):
    how = {"examples": len(data.source("train")), "batch_size": data.batch_size, "seed": seed}
    return data.batches(**how, **fields)


def test_a_task_is_all_images_with_their_pixels_in_one_order_and_the_first_is_the_images_themselves():
    source = sequence().source("train")
    found = [source[np.arange(40) + 40 * task] for task in range(3)]
    np.testing.assert_array_equal(found[0]["image"], IMAGES)
    for task, rows in enumerate(found):
        assert rows["image"].shape == IMAGES.shape and (rows["task"] == task).all()
        np.testing.assert_array_equal(rows["label"], np.arange(40))
        orders = np.argsort(rows["image"].reshape(40, 12), axis=1)
        assert (orders == orders[0]).all() and (task == 0) == (orders[0] == np.arange(12)).all()
    mixed = source[np.array([85, 3, 45])]  # in any order, of any tasks
    for i, (task, row) in enumerate([(2, 5), (0, 3), (1, 5)]):
        np.testing.assert_array_equal(mixed["image"][i], found[task]["image"][row])
    assert sequence().source("validation") is None


def test_the_channels_of_a_pixel_move_together():
    colours = np.concatenate([IMAGES, IMAGES + 1000, IMAGES + 2000], axis=-1)
    data = sequence(rows=Arrays(lambda split: {"image": colours} if split == "train" else None))
    found = data.source("train")[np.arange(40, 80)]["image"]
    np.testing.assert_array_equal(found[..., 1], found[..., 0] + 1000)
    np.testing.assert_array_equal(found[..., 2], found[..., 0] + 2000)
    np.testing.assert_array_equal(found[..., :1], sequence().source("train")[np.arange(40, 80)]["image"])


def test_an_epoch_trains_on_its_task_alone_and_without_replay_on_each_row_once_a_pass():
    whole = batches(sequence(passes=2))
    assert whole.per_epoch == 10 and whole.mean_rows == 8
    for epoch in range(4):
        task, row = np.divmod(whole.epoch_rows(epoch), 40)
        assert (task == epoch % 3).all()
        np.testing.assert_array_equal(np.bincount(row.ravel()), np.full(40, 2))
    assert not np.array_equal(whole.epoch_rows(0), whole.epoch_rows(3))


def test_replay_takes_its_share_of_a_batch_from_the_buffers_of_all_earlier_tasks():
    some = batches(sequence(replay=0.25, passes=20))
    assert (some.epoch_rows(0) < 40).all()
    for epoch in (1, 2):
        replayed, own = np.split(some.epoch_rows(epoch), [2], axis=1)
        assert (own // 40 == epoch).all()
        kept = np.concatenate([some.kept(task) for task in range(epoch)])
        assert len(np.unique(kept)) == 5 * epoch and set(replayed.ravel()) == set(kept)
    again = batches(sequence(replay=0.25, passes=20))
    np.testing.assert_array_equal(again.rows(217)[0], some.epoch_rows(2)[17])
    assert not np.array_equal(batches(sequence(replay=0.25), seed=1).epoch_rows(1), again.epoch_rows(1)[:5])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sequence(replay=1.0), "data.replay = 1.0: expected 0 or more, below 1"),
        (lambda: sequence(tasks=0), "data.tasks"),
        (lambda: batches(sequence(replay=0.95)), "data.replay = 0.95, data.batch_size = 8: 8 rows of a batch"),
        (lambda: batches(sequence(replay=0.05)), "data.replay = 0.05, data.batch_size = 8: 0 rows of a batch"),
        (lambda: sequence(rows=None), "data.rows = None: expected a dataset"),
        (lambda: sequence(column="label").source("train"), "data.column = 'label': expected a column of images"),
        (lambda: batches(sequence(batch_size=41)), "data.batch_size is 41; a task has only 40 training rows"),
    ],
)
def test_what_makes_no_sequence_of_tasks_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
