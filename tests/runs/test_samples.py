from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from jaxmp.commands.sample import Options
from jaxmp.commands.sample import sample as sample_command
from jaxmp.data.arrays import Arrays
from jaxmp.data.text import TextWindows
from jaxmp.data.tokenizer import Bytes
from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop
from jaxmp.models.dcgan import DCGAN
from jaxmp.models.mlp import MLP
from jaxmp.models.transformer import GPT2
from jaxmp.reports.run_report import report
from jaxmp.runs.checks import check
from jaxmp.runs.fit import fit
from jaxmp.runs.folder import RunFolder
from jaxmp.runs.run import Run
from jaxmp.runs.samples import grid, write_samples
from jaxmp.runs.trainer import Trainer
from jaxmp.tasks.adversarial import Adversarial
from jaxmp.tasks.classification import Classification
from jaxmp.tasks.language import MaskedLM, NextToken
from jaxmp.tasks.samples import Samples, Sampling, Trained
from jaxmp.tasks.task import sample


def texts(split):
    return {"text": ["abcabcabc" * 30]}


EXPERIMENT = Experiment(
    model=GPT2(vocabulary=256, context=16, layers=1, heads=2, width=16, dropout=0.0),
    data=TextWindows(Arrays(texts), length=8, batch_size=4),
    task=NextToken(),
    precision="mixed_bfloat16",
    loop=Loop(steps=2),
)


@pytest.mark.slow
def test_texts_of_a_run_begin_with_the_prompt_are_kept_and_shown_in_report_and_tensorboard(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = Run(fit(EXPERIMENT, workdir=tmp_path / "runs", log=lambda text: None).path, EXPERIMENT)
    how = Sampling(count=2, prompt="ab", temperature=0.0)
    drawn = run.sample(how)
    assert len(drawn.texts) == 2 and all(text.startswith("ab") for text in drawn.texts)
    # With no temperature, the most probable token of the whole forward pass, under the run's policy.
    tokens = np.frombuffer(b"ab", np.uint8)
    logits = run.apply({"tokens": np.pad(tokens, (0, 6))[None].astype(np.int32)})
    assert Bytes().vocabulary([]).decode([*tokens, np.asarray(logits[0, 1]).argmax()]) == drawn.texts[0][:3]
    warm = Sampling(count=3, length=5)
    assert run.sample(warm, seed=1) == run.sample(warm, seed=1) != run.sample(warm, seed=2)

    before = sorted(run.path.glob("events*"))
    (path,) = write_samples(RunFolder(run.path), drawn, how, step=2, seed=0)
    assert path.parent == run.path / "samples" and run.samples == [path]
    content = path.read_text()
    assert content.startswith("step 2, seed 0, count 2, prompt 'ab', temperature 0.0\n") and drawn.texts[1] in content
    (event,) = set(run.path.glob("events*")) - set(before)
    assert b"samples" in event.read_bytes() and b"text" in event.read_bytes()
    monkeypatch.setattr("jaxmp.runs.run.Run._rebuild", lambda self: EXPERIMENT)
    assert sample_command(Options(str(run.path), count=1, prompt="a", length=3)) == 0
    assert "\nsamples " in capsys.readouterr().out and len(run.samples) == 2
    page = str(report([run]))
    assert "<h2>Samples</h2>" in page and path.name in page


def test_pictures_stand_side_by_side_in_about_a_square_and_are_kept(tmp_path):
    pictures = np.linspace(0, 1, 5 * 2 * 3).reshape(5, 2, 3, 1).astype(np.float32)
    pictures[0, 0, 0] = np.nan
    whole = grid(pictures)
    assert whole.shape == (5, 11, 1) and whole.dtype == np.uint8
    np.testing.assert_array_equal(whole[3:5, 4:7], np.round(255 * pictures[4]))
    assert whole[0, 0] == 0 and not whole[2].any() and not whole[:, 3].any()
    (path,) = write_samples(RunFolder(tmp_path), Samples(pictures=pictures), Sampling(5), step=1, seed=0)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), whole[..., 0])
    assert list(tmp_path.glob("events*"))


def images(split):
    return {"image": np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1)).astype(np.uint8)}


PICTURED = Experiment(
    model=DCGAN((4, 4, 1), (4, 2), noise=3, kernel=3),
    data=Arrays(images, batch_size=4, mean=(0.5,), std=(0.5,)),
    task=Adversarial(),
    precision="mixed_bfloat16",
    loop=Loop(steps=2, eval_every=1),
)


@pytest.mark.slow
def test_pictures_drawn_at_each_evaluation_change_no_bit_of_the_run_and_are_those_of_the_sample_command(
    tmp_path, capsys, monkeypatch
):
    watched = dataclasses.replace(PICTURED, loop=dataclasses.replace(PICTURED.loop, log_samples=5))
    runs = [
        Run(fit(each, workdir=tmp_path / str(each is watched), log=lambda text: None).path, each)
        for each in (PICTURED, watched)
    ]
    leaves = [jax.tree.leaves(dataclasses.replace(run.state(), key=None)) for run in runs]
    assert [np.asarray(x).tobytes() for x in leaves[0]] == [np.asarray(x).tobytes() for x in leaves[1]]
    assert not runs[0].samples
    run = runs[1]
    assert [path.name.partition("-")[0] for path in run.samples] == ["1", "2"]
    (event,) = run.path.glob("events*")
    assert event.read_bytes().count(b"samples/0") == 2
    drawn = run.sample(Sampling(5))
    np.testing.assert_array_equal(np.asarray(Image.open(run.samples[1])), grid(drawn.pictures)[..., 0])
    assert (run.sample(Sampling(5), seed=1).pictures != drawn.pictures).any()

    monkeypatch.setattr("jaxmp.runs.run.Run._rebuild", lambda self: watched)
    capsys.readouterr()
    assert sample_command(Options(str(run.path), count=5)) == 0
    assert capsys.readouterr().out.startswith("\nsamples ") and len(run.samples) == 2  # in place of the run's own
    page = str(report([run]))
    assert "<h2>Samples</h2>" in page and page.count("data:image/png;base64") >= 2


@pytest.mark.parametrize(
    ("task", "split", "names"),
    [
        (Classification(inputs=("image",)), "validation", "Classification has nothing to sample"),
        (Adversarial(), None, "loop.log_samples = 2 draws at evaluations, and there is no validation split"),
    ],
)
def test_samples_that_cannot_be_drawn_are_refused_before_the_first_step(task, split, names):
    def load(of):
        return {**images(of), "label": np.zeros(8, int)} if of in ("train", split) else None

    data = dataclasses.replace(PICTURED.data, load=load)
    loop = dataclasses.replace(PICTURED.loop, log_samples=2)
    model = MLP(features=(), classes=2) if isinstance(task, Classification) else PICTURED.model
    with pytest.raises(InputError) as error:
        check(Trainer(dataclasses.replace(PICTURED, data=data, loop=loop, task=task, model=model)))
    assert names in str(error.value)


def trained(model=None, data=EXPERIMENT.data):
    model = EXPERIMENT.model if model is None else model
    return Trained(model=model, apply=model.apply, variables={}, data=data)


@pytest.mark.parametrize(
    ("draw", "names"),
    [
        (lambda: Sampling(count=0), "count = 0: expected a whole number of at least 1"),
        (lambda: Sampling(length=1.5), "length = 1.5: expected a whole number"),
        (lambda: Sampling(temperature=-1.0), "temperature = -1.0: expected 0 or more"),
        (
            lambda: sample(Classification(), trained(), None, Sampling()),
            "Classification has nothing to sample; expected",
        ),
        (lambda: sample(MaskedLM(), trained(), None, Sampling()), "MaskedLM has nothing to sample"),
        (
            lambda: sample(NextToken(), trained(MLP()), None, Sampling()),
            "MLP decodes without a cache; expected a decoder",
        ),
        (lambda: sample(NextToken(), trained(), None, Sampling(prompt="")), "prompt = '' has no token"),
        (lambda: sample(NextToken(), trained(), None, Sampling(prompt="x" * 17, length=1)), "at most context=16"),
        (
            lambda: sample(NextToken(), trained(data=Arrays(texts)), None, Sampling()),
            "data = Arrays(...): it says of no",
        ),
    ],
)
def test_what_cannot_be_sampled_is_one_message(draw, names):
    with pytest.raises(InputError) as error:
        draw()
    assert names in str(error.value)


def test_the_end_of_a_text_is_the_prompt_where_the_vocabulary_has_it(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "jaxmp.tasks.language.generate",
        lambda model, variables, prompts, *_, **how: seen.append(prompts.shape) or prompts,
    )
    data = dataclasses.replace(EXPERIMENT.data, tokenizer=Bytes(special=True))
    assert sample(NextToken(), trained(data=data), 0, Sampling(1)).texts == ("",)
    assert sample(NextToken(), trained(), 0, Sampling(1)).texts == ("\n\n",)
    assert len(sample(NextToken(), trained(), 0, Sampling()).texts) == 4 == seen[-1][0]
