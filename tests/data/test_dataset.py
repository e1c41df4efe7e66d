"""A dataset of one's own: only `source`, with a host transform and a transform, trained by `fit`."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass

import jax
import numpy as np
import pytest

import jaxmp
from jaxmp.data.arrays import Arrays
from jaxmp.data.source import Columns
from jaxmp.errors import InputError
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.runs.fit import fit
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer

CONFIG = """
from dataclasses import dataclass

import flax.linen as nn
import jax
import numpy as np

import jaxmp
from jaxmp.data.source import Columns

LETTERS = "abcd"


class Net(nn.Module):
    @nn.compact
    def __call__(self, letters):
        return nn.Dense(2)(nn.Embed(len(LETTERS), 8)(letters).reshape(len(letters), -1))


def tokenise(rows):
    letters = np.array([[LETTERS.index(letter) for letter in word] for word in rows["word"]], np.int32)
    return {"letters": letters, "label": (letters[:, 0] > 1).astype(np.int32)}


def swap(key, row):
    return row if key is None else {**row, "letters": jax.random.permutation(key, row["letters"])}


@dataclass(frozen=True)
class Words(jaxmp.Dataset):
    def source(self, split):
        letters = np.random.default_rng(len(split)).choice(list(LETTERS), (50, 5))
        return Columns({"word": np.array(["".join(row) for row in letters], object)})


def get_config():
    return jaxmp.Experiment(
        model=Net(),
        data=Words(batch_size=16, host_transforms=(tokenise,), transforms=(swap,)),
        task=jaxmp.Classification(inputs=("letters",)),
        loop=jaxmp.Loop(steps=8, log_every=1, eval_every=4, save_every=3),
        precision="float32",
    )
"""
TIMING = {"wall_seconds", "examples_per_second", "steps_per_second", "tflops_per_second"}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The experiment of a config file, with a dataset of its own."""
    file = tmp_path_factory.mktemp("config") / "words.py"
    file.write_text(CONFIG)
    return ConfigFile.find(str(file)).experiment()


@pytest.fixture(scope="module")
def resident(words, tmp_path_factory):
    return fit(words, workdir=tmp_path_factory.mktemp("runs"))


def streamed(experiment, workers=0):
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, device_limit=0, workers=workers))


def lines(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMING} for record in records]


def weights(path, experiment):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(Run(path, experiment).state().params)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_streamed_training_sees_the_batches_of_resident_training(words, resident, workers, tmp_path):
    experiment = streamed(words, workers)
    fitted = fit(experiment, workdir=tmp_path)
    for found, expected in zip(lines(fitted.path), lines(resident.path), strict=True):
        assert found == pytest.approx(expected, rel=1e-6)
    for found, expected in zip(weights(fitted.path, experiment), weights(resident.path, words), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_both_feeds_give_the_same_batch_of_a_step(words):
    feeds = [Trainer(experiment).feed(fuse=True) for experiment in (words, streamed(words))]
    batches = [[feed.batch(step) for step in range(6)] for feed in feeds]
    for found, expected in zip(*batches, strict=True):
        assert found.keys() == expected.keys() == {"letters", "label", "weight"}
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
    drawn = dataclasses.replace(words, data=dataclasses.replace(words.data, transforms=()))
    assert not np.array_equal(Trainer(drawn).feed(fuse=True).batch(0)["letters"], batches[0][0]["letters"])


@pytest.mark.slow
@pytest.mark.parametrize("change", [lambda experiment: experiment, streamed])
def test_a_resumed_run_with_transforms_equals_an_unbroken_one(words, change, tmp_path):
    experiment = change(words)
    unbroken = fit(experiment, workdir=tmp_path).path
    broken = shutil.copytree(unbroken, tmp_path / "copy" / "experiment" / unbroken.name)
    (broken / "summary.json").unlink()
    for checkpoint in (broken / "checkpoints").iterdir():
        if int(checkpoint.name) > 6:
            shutil.rmtree(checkpoint)
    assert [path.name for path in (broken / "checkpoints").glob("[0-9]*")]
    again = fit(experiment, workdir=tmp_path / "copy").path
    assert again == broken and lines(again) == lines(unbroken)
    for found, expected in zip(weights(again, experiment), weights(unbroken, experiment), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_a_run_applies_the_host_transforms_to_rows_of_its_data(words, resident):
    run = Run(resident.path, words)
    rows = words.data.source("test")[np.arange(7)]
    assert run.apply(rows).shape == (7, 2)
    assert run.evaluate("test")["loss"] == pytest.approx(resident.summary["test"]["loss"], rel=1e-6)


def test_the_hash_has_the_transforms_by_name(words):
    data = words.to_json()["data"]
    assert data["transforms"] == ["jaxmp_configs.words.swap"]
    assert data["host_transforms"] == ["jaxmp_configs.words.tokenise"]
    for field in ("transforms", "host_transforms"):
        without = dataclasses.replace(words, data=dataclasses.replace(words.data, **{field: ()}))
        assert without.hash != words.hash


def test_text_that_the_task_names_is_refused_with_the_way_out(words):
    data = dataclasses.replace(words.data, host_transforms=(), transforms=())
    experiment = dataclasses.replace(words, data=data, task=jaxmp.Classification(inputs=("word",)))
    with pytest.raises(InputError, match=r"'word', which holds strings \('\w+', say\).*data.host_transforms"):
        _ = Trainer(experiment).batch_spec


def test_a_dataset_has_nothing_of_images():
    assert {field.name for field in dataclasses.fields(jaxmp.Dataset)} == {
        *("batch_size", "eval_batch_size", "device_limit", "workers", "host_transforms", "transforms", "cuts")
    }


@dataclass(frozen=True)
class Given(jaxmp.Dataset):
    rows: object = None

    def source(self, split):
        return self.rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"x": np.ones(3)}, r"Given.source\('test'\) returned dict; expected a source of rows, such as .*Columns"),
        (3, r"Given.source\('test'\) returned int; expected a source"),
        (Columns({"x": np.ones(0)}), r"Given.source\('test'\) has no rows"),
    ],
)
def test_a_source_that_gives_no_rows_is_bad_input(rows, message):
    with pytest.raises(InputError, match=message):
        Given(rows).read("test")


@dataclass(frozen=True)
class Opens(jaxmp.Dataset):
    path: str = ""

    def source(self, split):
        if self.path == "refused":
            raise InputError("expected a path")
        return Columns({"x": np.load(self.path)[split]})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "nothing.npy",
            r"Opens.source\('train'\) raised FileNotFoundError: .*nothing.npy.* \(test_dataset.py, line \d+\)",
        ),
        (__file__, r"Opens.source\('train'\) raised (ValueError|UnpicklingError): "),
        ("refused", "^expected a path$"),
    ],
)
def test_a_dataset_that_cannot_be_opened_is_one_message(path, message):
    with pytest.raises(InputError, match=message):
        Opens(path=path).read("train")


@pytest.mark.parametrize("field", ["host_transforms", "transforms"])
@pytest.mark.parametrize("value", [print, [print], (print, 3)])
def test_transforms_that_are_no_tuple_of_functions_are_bad_input(field, value):
    with pytest.raises(InputError, match=rf"data.{field} is .*expected a tuple of functions"):
        Arrays(print, **{field: value})


@pytest.mark.slow
def test_an_error_of_a_host_transform_comes_out_of_a_worker_process_as_it_is(words):
    def fail(rows):
        if len(rows["letters"]) > 1:
            raise KeyError("row 3")
        return rows

    data = dataclasses.replace(words.data, host_transforms=(*words.data.host_transforms, fail))
    feed = Trainer(streamed(dataclasses.replace(words, data=data), workers=1)).feed(fuse=False)
    trainer = Trainer(streamed(dataclasses.replace(words, data=data), workers=1))
    state = trainer.devices.put_state(trainer.init())
    with pytest.raises(InputError, match=r"data.host_transforms\[1\] \(.*fail\) raised KeyError: 'row 3'"):
        feed.run(state, trainer.devices.put(trainer.no_metrics), 0, 1)
    feed.close()
