"""A pruned run is a run: resumed to the bit, gone on with, exported; and its trade is what was measured."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from deployed_runs import images

import jaxmp
from jaxmp import Pruning
from jaxmp.cli import main
from jaxmp.commands.prune import _default_pruning, without_pruning
from jaxmp.data.source import Columns
from jaxmp.deploy.export import Measured
from jaxmp.deploy.forward import Forward
from jaxmp.deploy.prune import Weight, _flops, prune
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.modules.linen import module_classes
from jaxmp.training.pruning import pruning_state
from jaxmp.trees import by_path, is_key

pytestmark = pytest.mark.xdist_group("deploy")  # one worker: the fixture trains

PRUNED = ("Conv_0/kernel", "Dense_0/kernel", "Dense_1/kernel")


def quiet(text):
    pass


def bits(state):
    leaves = [jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(state)]
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def pruned_experiment(run, pruning, **loop):
    experiment = run.experiment
    return dataclasses.replace(
        experiment, pruning=pruning, loop=dataclasses.replace(experiment.loop, **({"steps": 4, "eval_every": 1} | loop))
    )


@pytest.mark.slow
def test_a_pruned_run_has_as_many_zeros_as_it_says_is_resumed_to_the_bit_and_exported(run, tmp_path):
    said = []
    experiment = pruned_experiment(run, Pruning(0.8, end=0.5, rounds=2))
    found = prune(run, experiment, workdir=tmp_path, log=said.append)
    assert any(line.startswith("not pruned: ") and "Dense_0/bias (1 axis)" in line for line in said)
    state = found.run.state("best")
    for weight in found.weights:
        leaf = np.asarray(by_path(state.averaged_params)[weight.path])
        zeros = np.sum(leaf == 0) if weight.path in PRUNED else 0
        assert weight.why == ("" if weight.path in PRUNED else "1 axis")
        assert zeros == weight.size - weight.kept == (round(0.8 * leaf.size) if weight.path in PRUNED else 0)
        assert weight.sparse == (leaf.nbytes if weight.why else 4 * weight.kept + -(-leaf.size // 8))
    assert found.trade is not None and found.trade.before.rows == 20
    # One row: the convolution has 4 x 4 positions, 9 weights and 4 channels; pooling leaves 3 x 3.
    flops = 2 * (16 * 9 * 4 + 36 * 8 + 8 * 3)
    kept = {weight.path: weight.kept for weight in found.weights}
    left = 2 * (16 * kept["Conv_0/kernel"] + kept["Dense_0/kernel"] + kept["Dense_1/kernel"])
    assert found.flops == {"bfloat16": (flops, left)}
    # The masks were whole with the third step: what was measured before is no candidate for the best.
    lines = [line for line in found.run.metrics if line["split"] == "validation"]
    assert [round(line["sparsity"], 4) for line in lines] == [0.0, 0.7, 0.8, 0.8]
    assert int(state.step) in (3, 4)
    # Killed after its second step, and resumed.
    copied = tmp_path / "killed" / found.run.path.parent.name / found.run.path.name
    shutil.copytree(found.run.path, copied)
    for name in ("summary.json", "checkpoints/3", "checkpoints/4"):
        path = copied / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = prune(run, experiment, workdir=tmp_path / "killed", log=quiet)
    assert bits(again.run.state()) == bits(found.run.state())
    artefact = jaxmp.export(found.run, output=tmp_path / "out")
    assert artefact.certificate["against"]["run"]["bit_equal"]
    assert artefact(images(7)).shape == (7, 3)


@pytest.mark.full_size
def test_pruning_begins_in_the_middle_of_a_run_and_goes_on_from_a_pruned_one(run, tmp_path):
    said: list[str] = []
    began = pruned_experiment(run, Pruning(0.5, end=0.5), eval_every=2)
    parts = {"workdir": tmp_path, "log": said.append, "progress": "none"}
    half = jaxmp.Run(jaxmp.fit(began, continue_from=run.path, **parts).path, began)
    assert "fresh: the masks of pruning" in said
    found = pruning_state(half.state().opt_state)
    # Steps are counted from the beginning of the run: the schedule was over when it went on.
    assert int(found.step) == 4 and float(found.sparsity) == 0.5
    more = pruned_experiment(run, Pruning(0.75, end=0.5), steps=6, eval_every=2)
    said.clear()
    whole = jaxmp.Run(jaxmp.fit(more, continue_from=half.path, **parts).path, more)
    assert "fresh: the masks of pruning" in said
    for name in PRUNED:
        leaf, before = (np.asarray(by_path(each.state().params)[name]) for each in (whole, half))
        assert np.sum(leaf == 0) == round(0.75 * leaf.size) and not np.any(leaf[before == 0])
    longer = pruned_experiment(run, Pruning(0.75, end=0.5), steps=8, eval_every=2)
    said.clear()
    jaxmp.fit(longer, continue_from=whole.path, **parts)
    assert not any(line.startswith("fresh") for line in said)
    plain = pruned_experiment(run, Pruning(), steps=8, eval_every=2)
    dense = jaxmp.Run(jaxmp.fit(plain, continue_from=whole.path, **parts).path, plain)
    assert pruning_state(dense.state().opt_state) is None
    assert dense.summary["best"]["step"] == 8


CONFIG = """
from deployed_runs import Net, load
from jaxmp import Adam, Arrays, Experiment, Loop, Pruning
get_config = lambda: Experiment(
    model=Net(), data=Arrays(load, batch_size=10), optimizer=Adam(0.1), loop=Loop(steps=2), precision="mixed_float16"
)
"""


class Attention(nn.Module):
    """Products with weights, and two of attention, which have none; and a cell that joins its gates."""

    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        cell = nn.OptimizedLSTMCell(4, name="cell")
        x, _ = cell(cell.initialize_carry(jax.random.key(0), x[:, 0].shape), x[:, 0])
        return nn.Dense(3, name="head")(x[1])


@pytest.mark.slow
def test_products_of_two_activations_save_no_flops():
    model, x = Attention(), np.ones((1, 6, 8), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    of = Forward(
        function=lambda given, state, inputs: [
            model.apply({"params": jax.tree.unflatten(jax.tree.structure(shapes), given)}, *inputs)
        ],
        weights=by_path(shapes),
        state={},
        inputs={"x": x},
        treedef=jax.tree.structure(0),
        outputs={},
    )
    weights = [
        Weight(name, leaf.shape, leaf.size // 2, leaf.size, 0, 0, 0, "" if leaf.ndim > 1 else "1 axis")
        for name, leaf in by_path(shapes).items()
    ]
    found = _flops(of, tuple(weights), Measured("test", Columns({"x": x}), 1), module_classes(model, x))
    with_weights = 2 * (4 * 6 * 8 * 8 + (8 + 4) * 16 + 4 * 3)
    attention = 2 * (2 * 6 * 6 * 8)
    assert found == {"float32": (with_weights + attention, with_weights // 2 + attention)}


@pytest.mark.slow
def test_the_command_prunes_a_config_and_a_run_and_refuses_in_one_message(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(CONFIG)

    def jaxmp_prune(*arguments):
        code = main(["prune", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    structure = ("--pruning.structure", "2:4", "--pruning.keep", "Conv_0")
    code, out, err = jaxmp_prune("small.py", *structure, "--quiet")
    assert code == 0 and not err, err
    assert "bytes packed" in out and "50.00% zeros" in out and "stays: pruning.keep" in out
    pruned = jaxmp.Run(out.split()[-1])
    (dense,) = (path for path in Path("runs/small").iterdir() if path.name != pruned.path.name)
    kernel = np.asarray(pruned.state("best").params["Dense_0"]["kernel"])
    assert np.all((kernel.reshape(-1, 4, 8) != 0).sum(axis=1) == 2)
    assert jaxmp_prune(str(dense), *structure, "--quiet") == (0, out, "")  # it is there, and read
    with monkeypatch.context() as inside:
        inside.chdir(dense)
        code, found, _ = jaxmp_prune(".", *structure, "--quiet")
        assert code == 0 and Path(found.split()[-1]) == tmp_path / pruned.path
    for arguments, message in (
        (("small.py", "--seed", "1", "--pruning.sparsity", "0.5", "--rows", "0"), "rows 0: expected 1 or more"),
        ((str(dense),), "pruning.sparsity = 0, and nothing would be pruned; expected --pruning.sparsity 0.9"),
        ((str(dense), "--pruning.sparsity", "1.5"), "Pruning.sparsity = 1.5: expected a share"),
        ((str(dense), "--pruning.structure", "2:4"), "Conv_0/kernel of shape (3, 3, 1, 4) sums over 1 inputs"),
        ((str(dense), "--pruning.sparsity", "0.5", "--pruning.where", "Dense_9"), "'Dense_9' matches no parameter"),
        (("small.py", "--pruning.sparsity", "0.5", "--pruning.where", "**/bias"), "no parameter is pruned"),
        (("small.py", "--pruning.sparsity", "0.5", "--lora.rank", "1"), "lora.rank is set"),
        (("runs/small",), "holds 2 runs; name one of them"),
        (("smal.py",), "no such file; did you mean 'small.py'?"),
    ):
        code, _, err = jaxmp_prune(*arguments)
        assert code == 2 and message in err and "Traceback" not in err, arguments
    (dense / "failed.json").write_text('{"step": 2, "reason": "the loss is NaN"}')
    code, _, err = jaxmp_prune(str(dense), "--pruning.sparsity", "0.5")
    assert code == 2 and "failed (the loss is NaN), and a failed run is not pruned" in err
    (tmp_path / "whole.py").write_text(CONFIG.replace("Net(),", 'Net(), pruning=Pruning(0.5, scope="global"),', 1))
    assert ConfigFile.find("whole.py").experiment(_default_pruning()).pruning == Pruning()
    assert without_pruning(["--seed", "1", "--pruning.keep", "a", "b", "--loop.steps", "2"]) == [
        *("--seed", "1", "--loop.steps", "2")
    ]
    assert sorted(path.name for path in Path("runs/small").iterdir()) == sorted([dense.name, pruned.path.name])
