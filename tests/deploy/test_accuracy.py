"""The accuracy of a trade and of a budget is the run's own metric, whatever the labels are padded with."""

from __future__ import annotations

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp.tasks
from jaxmp import InputError
from jaxmp.data.pipeline import evaluation_batches
from jaxmp.data.source import Columns
from jaxmp.deploy.accuracy import trade
from jaxmp.deploy.decisions import compared, labels_of
from jaxmp.deploy.quantise import _Judge, _search
from jaxmp.precision.blocks import parse_block_format
from jaxmp.tasks.adversarial import Adversarial
from jaxmp.tasks.classification import Classification
from jaxmp.tasks.ctc import CTC
from jaxmp.tasks.distillation import Distillation
from jaxmp.tasks.language import MaskedLM
from jaxmp.tasks.multilabel import MultiLabel
from jaxmp.tasks.per_task import PerTask
from jaxmp.tasks.task import Task
from jaxmp.tasks.tokens import TokenClassification
from jaxmp.tasks.weighted import Weighted
from jaxmp.training.metrics import Mean

ROWS, LENGTH, CLASSES = 10, 5, 3
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, CLASSES, (ROWS, LENGTH))
SHORT = np.arange(LENGTH) >= RNG.integers(1, LENGTH, ROWS)[:, None]
"""where a row is filled up"""
MARKED = RNG.integers(0, 2, (ROWS, LENGTH))

DECIDE = {
    "classes": (Classification(target="y"), TOKENS),
    "class weights": (Classification(target="y", class_weights=(5.0, 1.0, 0.0)), TOKENS),
    "weighted": (Weighted(Classification(target="y"), column="w"), TOKENS),
    "of several tasks": (PerTask(Classification(target="y"), count=2), TOKENS),
    "distillation": (Distillation(target="y", teacher=len, teacher_weight=0.0), TOKENS),
    "bool labels": (MultiLabel(target="y"), MARKED.astype(bool)),
    "labels 0 and 1": (MultiLabel(target="y"), MARKED),
    "float labels": (MultiLabel(target="y"), MARKED.astype(np.float32)),
    "padded": (TokenClassification(target="y"), np.where(SHORT, -1, TOKENS)),
    "padded with another number": (TokenClassification(target="y", padding=-100), np.where(SHORT, -100, TOKENS)),
    "padded with a class": (TokenClassification(target="y", padding=0), np.where(SHORT, 0, TOKENS)),
    "padded and weighted": (Weighted(TokenClassification(target="y"), column="w"), np.where(SHORT, -1, TOKENS)),
}
"""every task that decides, with its labels; their shapes are equal, so that little is compiled"""


def measured(task, labels):
    """A run of a task whose model returns a column of the data, with its rows."""
    shape = labels.shape if isinstance(getattr(task, "task", task), MultiLabel) else (*labels.shape, CLASSES)
    logits = RNG.standard_normal(shape).astype(np.float32)
    source = Columns(
        {"logits": logits, "y": labels, "task": np.arange(ROWS) % 2, "w": np.arange(ROWS, dtype=np.float32)}
    )
    data = SimpleNamespace(eval_batch_size=4, prepare=lambda train: lambda batch, key: batch)
    run = SimpleNamespace(
        experiment=SimpleNamespace(task=task, data=data),
        outputs=lambda batch, state: jnp.asarray(batch["logits"]),
        trainer=SimpleNamespace(splits={"train": source}, source=lambda split: source),
        source=lambda split: source,
    )
    return run, source


def judge_of(run):
    of = SimpleNamespace(function=lambda weights, state, inputs: inputs, inputs=["logits"], weights={})
    of.unflatten = lambda leaves: leaves[0]
    return _Judge(run, None, of, 100)


@pytest.mark.slow
@pytest.mark.parametrize("name", DECIDE)
def test_the_first_accuracy_of_a_trade_is_the_run_s_own(name):
    task, labels = DECIDE[name]
    run, source = measured(task, labels)
    own = Mean(0.0, 0.0)
    for batch in evaluation_batches(source, 4):
        _, metrics = task(jnp.asarray(batch["logits"]), {key: jnp.asarray(column) for key, column in batch.items()})
        own = Mean(own.total + metrics["accuracy"].total, own.weight + metrics["accuracy"].weight)
    right = float(own.total / own.weight)
    outputs = lambda batch: run.outputs(batch, None)  # noqa: E731
    found = trade(run, source, outputs, lambda batch: -outputs(batch))
    assert found is not None and found.before.share == pytest.approx(right, rel=1e-6) and 0 < right < 1
    assert found.before.rows == np.sum(labels != getattr(task, "padding", None))
    judge = judge_of(run)
    assert judge.of_run() == judge({})[0] == found.before.share and judge({})[1] == 0
    (batch,) = evaluation_batches(source, ROWS)
    decided = np.zeros(labels.shape, bool if isinstance(task, MultiLabel) else int)
    assert np.sum(compared(task, batch, decided, decided)) == found.before.rows


def test_labels_are_those_that_the_transforms_on_the_device_leave_in_evaluation():
    task, labels = DECIDE["classes"]
    run, source = measured(task, labels)
    run.experiment.data.prepare = lambda train: lambda batch, key: {**batch, "y": (batch["y"] + 1) % CLASSES}
    outputs = lambda batch: jnp.asarray(batch["logits"])  # noqa: E731
    (batch,) = evaluation_batches(source, ROWS)
    right = np.mean(batch["logits"].argmax(-1) == (labels + 1) % CLASSES)
    found = trade(run, source, outputs, outputs)
    assert found is not None and found.before.share == judge_of(run).of_run() == right


def test_the_divergence_of_several_labels_is_the_mean_of_that_of_each():
    run, source = measured(*DECIDE["bool labels"])
    judge = judge_of(run)
    assert judge({})[1] == 0
    judge._of.weights = {"shift": 0.5}  # of all logits of a row: no softmax shows it
    judge._program = lambda weights, state, inputs: [inputs[0] + weights[0]]
    (batch,) = evaluation_batches(source, ROWS)
    p, q = (1 / (1 + np.exp(-batch["logits"].astype(np.float64) - shift)) for shift in (0, 0.5))
    right = np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert judge({})[1] == pytest.approx(right, rel=1e-5) and right > 0.01


def test_every_task_with_an_accuracy_and_decisions_is_measured():
    def below(of):
        return {of}.union(*(below(each) for each in of.__subclasses__()))

    shipped = {each for each in below(Task) if each.__module__.startswith(jaxmp.tasks.__name__)}
    decide = {each for each in shipped if each.predictions is not Task.predictions and "accuracy" in each.metrics}
    assert decide - {Adversarial} == {type(task) for task, _ in DECIDE.values() if isinstance(task, Task)}
    assert MaskedLM.predictions is Task.predictions  # logits alone


def test_a_sequence_has_no_label_for_each_place_and_its_padding_is_not_compared():
    task, decided = CTC(target="y"), np.array([[2, 1, -1, -1], [0, -1, -1, -1]])
    assert labels_of(task, {"y": np.zeros_like(decided)}, decided) is None
    other = np.array([[2, -1, -1, -1], [0, -1, -1, -1]])
    assert compared(task, {}, decided, other).tolist() == [[True, True, False, False], [True, False, False, False]]


def test_labels_of_padding_alone_give_no_accuracy():
    run, source = measured(TokenClassification(target="y"), np.full((ROWS, LENGTH), -1))
    outputs = lambda batch: batch["logits"]  # noqa: E731
    assert trade(run, source, outputs, outputs) is None
    with pytest.raises(InputError, match=r"--budget: no label of the train rows"):
        judge_of(run).of_run()


@pytest.mark.parametrize("activations", [None, "e4m3"])
def test_a_budget_is_beside_the_run_and_says_by_which_rows_and_what_activations_cost(activations, monkeypatch):
    class Judge(SimpleNamespace):
        def __call__(self, weights):
            return (0.97 if weights.get("w") is weight else 0.95), 0.0

    small = SimpleNamespace(unpack=lambda: None, nbytes=8)
    monkeypatch.setattr("jaxmp.deploy.quantise.packed_weight", lambda *_: small)
    weight, said = np.ones((8, 4), np.float32), []
    of = Judge(of_run=lambda: 0.99, where="validation rows")
    block = parse_block_format("int8:channel")
    found = _search(of, block, {"w": weight}, 2.0, activations, said.append, {"w": (0,)})
    assert found == {"w": None} and said[-1] == "32.00 bits a weight: +2.00 points lost on validation rows"
    with pytest.raises(InputError) as error:
        _search(of, block, {"w": weight}, 1.5, activations, said.append, {"w": (0,)})
    expected = "--budget 1.5: with all weights as they are 2.00 points are lost on validation rows"
    assert str(error.value).startswith(expected) and "expected a budget of 2.00 or more" in str(error.value)
    assert ("the cost of --activations e4m3 alone" in str(error.value)) == (activations is not None)


def test_a_budget_without_a_validation_split_says_that_it_is_measured_on_train():
    run, _ = measured(*DECIDE["classes"])
    assert judge_of(run).where == "train rows, on which the run was trained: there is no validation split"
    run.trainer.splits["validation"] = run.source("train")
    assert judge_of(run).where == "validation rows"
