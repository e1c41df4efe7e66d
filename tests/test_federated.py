"""experiments/federated: federated averaging, its clients on eight devices."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import jaxmp
from jaxmp.errors import InputError
from jaxmp.models.mlp import MLP

FILE = Path(__file__).parents[1] / "experiments" / "federated" / "fedavg.py"
CLIENTS, ROWS = 16, 6
MODEL = MLP(features=(8,), classes=3)


@pytest.fixture(scope="module")
def fedavg():
    spec = importlib.util.spec_from_file_location("fedavg", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fedavg"] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_partition_deals_each_row_once_and_shards_have_few_labels(fedavg):
    labels = np.random.default_rng(0).integers(0, 10, 1000)
    for how, most in (("iid", 10), ("shards", 4)):
        parts = fedavg.partition(labels, 20, how, seed=3)
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
        kinds = [len(np.unique(labels[part])) for part in parts]
        assert (max(kinds) <= most) and (how == "iid") == (min(kinds) > 4)


def test_a_client_makes_so_many_epochs_over_its_rows_and_no_step_more(fedavg):
    own_rows = np.array([3, 8, 1, 5, 4, 9, 2])
    rows, weight = fedavg.local_batches(own_rows, 2, 3, 8, (0,))
    assert rows.shape == weight.shape == (8, 3) and not weight[6:].any()
    for epoch in range(2):
        own = rows[3 * epoch : 3 * epoch + 3][weight[3 * epoch : 3 * epoch + 3] > 0]
        np.testing.assert_array_equal(np.sort(own), np.sort(own_rows))

    def step(state, batch):
        params = jax.tree.map(lambda x: x + 1, state.params)
        return dataclasses.replace(state, step=state.step + 1, params=params), {"steps": jnp.float32(1)}

    params, tx = {"w": jnp.zeros(2)}, jaxmp.loss_scaling(optax.sgd(1.0), jaxmp.NoScaler())
    of = [jaxmp.TrainState.create(params, tx, key=jax.random.key(i)) for i in range(2)]
    states = jax.tree.map(lambda *x: jnp.stack(x), *of)
    batches = {"weight": jnp.asarray([weight, np.ones((8, 3))], jnp.float32)}
    averaged, new, metrics = fedavg.make_round(step, mesh(1))(params, states, batches, jnp.ones(2))
    assert new.step.tolist() == [6, 8] and float(averaged["w"][0]) == 7 and float(metrics["steps"]) == 14


def clients(precision, steps, scaler=None, rate=0.5):
    """A step, the server's weights, and the clients' states, batches and numbers of rows."""
    rng = np.random.default_rng(1)
    image = jnp.asarray(rng.standard_normal((CLIENTS, steps, ROWS, 5)), jnp.float32)
    label = jnp.asarray(rng.integers(0, 3, (CLIENTS, steps, ROWS)))
    rows = rng.integers(1, ROWS + 1, CLIENTS)
    weight = jnp.asarray(np.arange(ROWS) < rows[:, None, None], jnp.float32) * jnp.ones((1, steps, 1))
    tx = jaxmp.loss_scaling(optax.sgd(rate), scaler or jaxmp.DynamicScaler(init_scale=2.0**10))
    step = jaxmp.make_train_step(jaxmp.make_loss(MODEL, jaxmp.Classification(), precision), tx)
    params = MODEL.init(jax.random.key(0), image[0, 0])["params"]
    of = [jaxmp.TrainState.create(params, tx, key=jax.random.key(i)) for i in range(CLIENTS)]
    states = jax.tree.map(lambda *x: jnp.stack(x), *of)
    batches = {"image": image, "label": label, "weight": weight}
    return step, params, states, batches, jnp.asarray(rows, jnp.float32)


def mesh(count):
    return jax.make_mesh((count,), ("clients",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


def off(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    both = [(np.asarray(a), np.asarray(b)) for a, b in pairs]
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in both)


@pytest.mark.slow
@pytest.mark.eight_devices
def test_a_round_of_eight_devices(fedavg):
    # One local step on all of a client's rows: the average is a step of SGD on the rows of all (FedSGD).
    step, params, states, batches, rows = clients("float32", 1)
    averaged, new, metrics = fedavg.make_round(step, mesh(8))(params, states, batches, rows)
    one = jax.tree.map(lambda x: x[0], states)
    together, measured = jax.jit(step)(one, jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), batches))
    assert off(averaged, together.params) < 1e-5
    np.testing.assert_allclose(metrics["loss"].total, measured["loss"].total, rtol=1e-5)
    assert float(metrics["loss"].weight) == float(rows.sum())

    # Several steps in float16: the same on one device, and each client keeps its own key, step and scale.
    step, params, states, batches, rows = clients("mixed_float16", 4)
    averaged, new, _ = fedavg.make_round(step, mesh(8))(params, states, batches, rows)
    alone, _, _ = fedavg.make_round(step, mesh(1))(params, states, batches, rows)
    assert off(averaged, alone) < 1e-5 and all(x.dtype == jnp.float32 for x in jax.tree.leaves(averaged))
    by_hand, one_step = [], jax.jit(step)
    for i in range(CLIENTS):
        state = jax.tree.map(lambda x, i=i: x[i], states)
        for j in range(4):
            state, _ = one_step(state, jax.tree.map(lambda x, i=i, j=j: x[i, j], batches))
        by_hand.append(jax.tree.map(lambda x, i=i: x * rows[i] / rows.sum(), state.params))
    assert off(averaged, jax.tree.map(lambda *x: sum(x), *by_hand)) < 1e-2

    # A client whose rows overflow skips its own steps and lowers its own scale; it counts with the weights it was sent.
    bad = batches | {"image": batches["image"].at[5].set(jnp.inf)}
    averaged, new, _ = fedavg.make_round(step, mesh(8))(params, states, bad, rows)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(averaged))
    skipped = [int(x) for x in new.opt_state.skipped]
    assert skipped == [4 * (i == 5) for i in range(CLIENTS)]
    scales = np.asarray(new.opt_state.scaler.scale)
    assert scales[5] == 2.0**6 and np.all(np.delete(scales, 5) == 2.0**10)
    for own, sent in zip(jax.tree.leaves(new.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(own[5], sent)
    # The next round: its optimizer begins anew, its scale does not.
    fresh = fedavg.fresh_optimizer(jax.tree.map(lambda x: x[5], new), jaxmp.loss_scaling(optax.adam(1e-3)))
    assert float(fresh.opt_state.scaler.scale) == 2.0**6 and int(fresh.opt_state.inner_state[0].count) == 0


@pytest.mark.parametrize(("fields", "message"), [({"fraction": 0.0}, "--fraction 0.0"), ({"rounds": 0}, "--rounds 0")])
@pytest.mark.slow
def test_a_federation_of_nothing_is_refused(fedavg, fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(fedavg.Federation(), **fields)


WITHOUT_ACCURACY = """
import flax.linen as nn
import numpy as np
from jaxmp import Arrays, Experiment


def squared(outputs, batch):
    return (outputs[:, 0] - batch["y"]) ** 2


def get_config():
    columns = {"x": np.ones((80, 2), np.float32), "y": np.ones(80, np.float32)}
    return Experiment(nn.Dense(1), Arrays.of(columns, batch_size=8), squared)
"""


@pytest.mark.slow
def test_a_task_without_accuracy_is_refused(fedavg, tmp_path):
    (tmp_path / "squares.py").write_text(WITHOUT_ACCURACY)
    federation = fedavg.Federation(config=str(tmp_path / "squares.py"), clients=4)
    with pytest.raises(InputError, match="measures no accuracy; expected a config of a classification task"):
        fedavg.train(federation, "float32", "iid", 0)
