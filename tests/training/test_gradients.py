"""The gradient of a loss."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.training.gradients import differentiate


@pytest.mark.parametrize("z", [0j, 3 - 2j, -1 + 5j])
def test_the_gradient_of_a_complex_leaf_is_the_direction_of_ascent(z):
    grads, _ = differentiate(lambda p: (jnp.abs(p["z"] - (1 + 1j)) ** 2, None), {"z": jnp.complex64(z)})
    np.testing.assert_allclose(grads["z"], 2 * (z - (1 + 1j)), rtol=1e-5)
