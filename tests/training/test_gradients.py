"""The gradient of a loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmp.errors import InputError
from jaxmp.scaling.transform import loss_scaling
from jaxmp.training.evaluation import make_eval_step
from jaxmp.training.gradients import differentiate, make_gradients
from jaxmp.training.metrics import Mean
from jaxmp.training.privacy import Privacy
from jaxmp.training.state import TrainState
from jaxmp.training.step import make_train_step


@pytest.mark.parametrize("z", [0j, 3 - 2j, -1 + 5j])
def test_the_gradient_of_a_complex_leaf_is_the_direction_of_ascent(z):
    grads, _ = differentiate(lambda p: (jnp.abs(p["z"] - (1 + 1j)) ** 2, None), {"z": jnp.complex64(z)})
    np.testing.assert_allclose(grads["z"], 2 * (z - (1 + 1j)), rtol=1e-5)


def squares(params, model_state, batch, key):
    """A loss whose model state, in any structure, is handed on in half."""
    loss = Mean.of((batch["x"] * params) ** 2, batch["weight"])
    return loss.total, (loss.weight, {}, jax.tree.map(lambda x: (x + 1).astype(jnp.bfloat16), model_state))


BATCH = {"x": jnp.ones(4), "weight": jnp.ones(4)}


@pytest.mark.parametrize("accumulate_steps", [1, 2])
@pytest.mark.parametrize(
    "state", [jnp.zeros(3), (jnp.zeros(3),), {"mean": jnp.zeros(3)}], ids=["array", "tuple", "dict"]
)
def test_the_model_state_is_any_tree_and_keeps_its_dtype(state, accumulate_steps):
    tx = loss_scaling(optax.sgd(0.1))
    before = TrainState.create(jnp.float32(2), tx, key=jax.random.key(0), model_state=state)
    after, _ = jax.eval_shape(make_train_step(squares, tx, accumulate_steps=accumulate_steps), before, BATCH)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), before)


@pytest.mark.parametrize("private", [None, Privacy(1.0, 1.0, 4)], ids=["", "private"])
def test_a_metric_called_loss_is_refused(private):
    def loss_fn(*args):
        total, (weight, _, model_state) = squares(*args)
        return total, (weight, {"loss": Mean(2 * total, 3 * weight)}, model_state)

    args = jnp.float32(2), {}, BATCH, jax.random.key(0)
    gradients = make_gradients(loss_fn, private=private)
    for function in (lambda p, s, b, k: gradients(p, s, jnp.float32(1), b, k), make_eval_step(loss_fn)):
        with pytest.raises(InputError, match="returns a metric 'loss'"):
            jax.eval_shape(function, *args)
