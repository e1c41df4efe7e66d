"""What a model draws in training depends on the example, and not on how the examples are spread."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp.modules.dropout import DropoutByExample
from jaxmp.modules.interventions import intervene
from jaxmp.modules.linen import with_policy

ROWS = 8
KEY = jax.random.key(3)


class Dropped(nn.Module):
    """Dropout of whatever shape comes in."""

    broadcast_dims: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, broadcast_dims=self.broadcast_dims, deterministic=False)(x)


class Merged(nn.Module):
    """The examples together with another axis, as before a windowed attention."""

    @nn.compact
    def __call__(self, x):
        return Dropped()(x.reshape(-1, x.shape[-1])).reshape(x.shape)


class Attention(nn.Module):
    broadcast_dropout: bool = False
    masked: bool = True

    @nn.compact
    def __call__(self, x):
        attention = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, broadcast_dropout=self.broadcast_dropout)
        mask = nn.make_causal_mask(x[..., 0]) if self.masked else nn.make_causal_mask(x[:1, :, 0])
        return attention(x, mask=mask, deterministic=False)


class Body(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        return nn.remat(Dropped)()(nn.Dense(16)(carry)), None


class Scanned(nn.Module):
    """Dropout in a rematerialised module in a scan over layers, each with a mask of its own."""

    @nn.compact
    def __call__(self, x):
        body = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=3)
        return body()(x, None)[0]


class Recurrent(nn.Module):
    """A recurrent network over time, with dropout of its outputs."""

    @nn.compact
    def __call__(self, x):
        return Dropped()(nn.RNN(nn.SimpleCell(4))(x))


JittedDropped = nn.jit(Dropped)  # once: what it has traced, it keeps


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return JittedDropped()(x)


class Odd(nn.Module):
    """Dropout of something whose first axis is no multiple of the examples."""

    @nn.compact
    def __call__(self, x):
        return Dropped()(x.T).T


class Noisy(nn.Module):
    """Draws by itself, for all rows at once."""

    @nn.compact
    def __call__(self, x):
        return x + jax.random.normal(self.make_rng("dropout"), x.shape)


BY_EXAMPLE = [
    Dropped((1,)), Merged(), Attention(masked=False), Scanned(), Recurrent(), Jitted()
]  # fmt: skip


def inputs():
    return jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, 5, 16)), jnp.float32)


@functools.cache
def variables(model):
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return jax.jit(model.init)(keys, inputs())


@functools.cache
def compiled(model):
    def apply(variables, x, global_index):
        return intervene(model.apply, DropoutByExample(global_index, len(x)))(variables, x, rngs={"params": KEY})

    return jax.jit(apply)


def applied(model, x, global_index=None):
    return np.asarray(compiled(model)(variables(model), x, global_index))


def parts(model, x, count):
    """The outputs of `count` parts of the batch, each on its own, as replicas and microbatches are."""
    size = ROWS // count
    global_index = [jnp.arange(start, start + size) for start in range(0, ROWS, size)]
    return [applied(model, x[at], at) for at in global_index]


@pytest.mark.few_variants
@pytest.mark.parametrize(
    "model",
    [pytest.param(m, marks=pytest.mark.slow) if isinstance(m, Attention | Recurrent) else m for m in BY_EXAMPLE],
    ids=lambda model: type(model).__name__,
)
def test_dropout_draws_by_the_example(model):
    """Alone or merged with other axes, in attention, under scan, remat, RNN and nn.jit."""
    x, order = inputs(), np.random.default_rng(1).permutation(ROWS)
    whole = applied(model, x, jnp.arange(ROWS))
    shuffled = applied(model, x[order], jnp.asarray(order))
    np.testing.assert_allclose(shuffled, whole[order], rtol=1e-5, atol=1e-6)
    alike = applied(model, jnp.broadcast_to(x[:1], x.shape), jnp.arange(ROWS))
    assert len({row.tobytes() for row in alike}) == ROWS  # each has a mask of its own


@pytest.mark.slow
def test_the_parts_of_a_batch_draw_what_the_whole_draws():
    x = inputs()
    np.testing.assert_array_equal(np.concatenate(parts(Dropped(), x, 2)), applied(Dropped(), x))


@pytest.mark.slow
def test_what_nn_jit_has_traced_serves_no_other_places():
    x, global_index = inputs(), jnp.arange(ROWS)
    first, second = (jax.jit(lambda x, at, c=c: compiled(Jitted()).__wrapped__({}, x, at) + c) for c in (0, 0.0))
    np.testing.assert_array_equal(first(x, global_index), second(x, global_index))
    assert not np.array_equal(first(x, global_index), second(x, global_index + 1))


def test_the_share_that_is_dropped_is_the_rate():
    out = applied(Dropped(), jnp.ones((ROWS, 10_000)))
    np.testing.assert_allclose((out == 0).mean(1), 0.5, atol=0.02)  # four standard deviations
    np.testing.assert_array_equal(np.unique(out), [0, 2])


@pytest.mark.slow
@pytest.mark.parametrize("model", [Dropped((0,)), Dropped((-3, -2)), Attention(broadcast_dropout=True)], ids=repr)
def test_a_mask_that_the_examples_share_is_the_same_everywhere(model):
    x = jnp.broadcast_to(inputs()[:1], (ROWS, 5, 16))
    outs = [applied(model, x, global_index) for global_index in (jnp.arange(ROWS), jnp.arange(ROWS, 2 * ROWS))]
    assert len({row.tobytes() for out in outs for row in out}) == 1


@pytest.mark.slow
def test_what_a_module_draws_by_itself_differs_between_parts():
    x = jnp.zeros((ROWS, 4))
    model = Noisy()
    assert len({out.tobytes() for out in parts(model, x, 4)}) == 4
    np.testing.assert_array_equal(applied(model, x), model.apply({}, x, rngs={"params": KEY}))  # of the whole: Flax's


@pytest.mark.slow
def test_dropout_along_no_axis_of_examples_differs_between_parts():
    outs = [(out != 0).tobytes() for out in parts(Odd(), jnp.ones((ROWS, 31)), 4)]
    assert len(set(outs)) == 4


def test_attention_computes_under_the_policy_as_well():
    def function(variables, x):
        apply = with_policy(intervene(Attention().apply, DropoutByExample(None, ROWS)), "mixed_bfloat16")
        return apply(variables, x, rngs={"params": KEY})

    report = jaxmp.audit(function, variables(Attention()), inputs())
    assert set(report.dot_flops_by_dtype) == {"bfloat16"}
