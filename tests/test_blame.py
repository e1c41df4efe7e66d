"""`blame`: overflows that were planted are found where they were planted, and nothing else is blamed."""


import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxmp.instruments.blame import blame
from jaxmp.precision.flax import with_policy
from jaxmp.precision.formats import fake_quantize, quantize

F16, F32 = jnp.float16, jnp.float32


def half(*numbers):
    return jnp.array(numbers, F16)


def loss_of(model, policy="mixed_float16", scale=1.0):
    """The loss of a model under a policy, times a loss scale, as a function of its parameters and input."""
    apply = with_policy(model.apply, policy)

    def loss(params, x):
        return jnp.sum(apply({"params": params}, x).astype(F32)) * scale

    return loss


def variables(model, x, **changed):
    """Parameters of ones, but for those that are named by their path, `_` for `/`."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    fill = {path.replace("_", "/"): value for path, value in changed.items()}

    def value(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.full(leaf.shape, fill.get(name.replace("_", "/"), 1.0), leaf.dtype)

    return jax.tree_util.tree_map_with_path(value, shapes)


# The planted faults. Each is a function and its arguments.


class Net(nn.Module):
    """Two layers, of which the second is called head."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, name="head")(nn.relu(nn.Dense(3, name="hidden")(x)))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.SimpleCell(2, name="cell", activation_fn=lambda h: h), name="rnn")(x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        return nn.Dense(2, use_bias=False, name="dense")(carry), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return layers(name="layers")(x, None)[0]


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(nn.Dense)(3, name="block")(x) * 2


class Attention(nn.Module):
    """Logits of one position to 70,000, their softmax in half."""

    @nn.compact
    def __call__(self, x):
        q = nn.Dense(1, name="query")(x)
        logits = q * jnp.zeros(70_000, q.dtype)
        with jax.named_scope("softmax"):
            total = lax.reduce(jnp.exp(logits), np.zeros((), logits.dtype), lax.add, (1,))
            return logits - jnp.log(total)


class Scores(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(1, name="attention")(x, x, x)


class Embedded(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Embed(5, 4, name="table")(x.astype(int))


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (g * F16(1e4),))


@jax.custom_jvp
def squashed(x):
    return jnp.tanh(x)


squashed.defjvp(lambda primals, tangents: (jnp.tanh(primals[0]), tangents[0] * jnp.exp(primals[0])))


def in_rules(x):
    with jax.named_scope("rules"):
        return doubled(x).astype(F32).sum() * 16


def in_jvp_rule(x):
    with jax.named_scope("squash"):
        return squashed(x).sum()


def norm(x):
    with jax.named_scope("norm"):
        return jnp.sqrt(lax.reduce(x * x, np.float16(0), lax.add, (0,)))


def branch(x):
    return lax.cond(x[0] > 0, lambda x: jnp.log(x - x), lambda x: x, x).sum()


def growing(x):
    return lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 1, c[1] * c[1]), (0, x))[1]


def forward_scan(x):
    return lax.scan(lambda c, x: (c * x, c), F16(1), x)[0]


def nested_scans(x):
    def outer(c, row):
        return lax.scan(lambda c, x: (c + x, None), c, row)[0], None

    return lax.scan(outer, F16(0), x)[0]


def running_maximum(x):
    """As in online softmax: the carry begins at -inf, and the exponential of an overflow comes later."""

    def body(c, x):
        highest = jnp.maximum(c[0], x)
        return (highest, c[1] * jnp.exp(c[0] - highest) + jnp.exp(x) * 100), None

    return lax.scan(body, (F16(-jnp.inf), F16(0)), x)[0][1]


def grad_of(model, x, scale=1.0, policy="mixed_float16", **values):
    return jax.grad(loss_of(model, policy, scale)), variables(model, x, **values), x


def loss_and(model, x, policy="mixed_float16", **values):
    return loss_of(model, policy), variables(model, x, **values), x


ONES = np.ones((2, 4), np.float32)
PLANTED = {
    # name: (function and arguments, value, primitive, path, backward, turns)
    "exp": (lambda: (jnp.exp, half(1, 12)), "inf", "exp", "", False, ()),
    "log of zero": (lambda: (lambda x: jnp.log(x).sum(), half(1, 0)), "-inf", "log", "", False, ()),
    "division by zero": (lambda: (lambda x: (1 / x).sum(), half(1, 0)), "inf", "div", "", False, ()),
    "norm of large values": (lambda: (norm, half(300, 300)), "inf", "mul", "norm", False, ()),
    "sum in half": (lambda: (norm, half(*[200] * 4)), "inf", "reduce_sum", "norm", False, ()),
    "cast": (lambda: (lambda x: x.astype(F16) * 0, jnp.array([1e5])), "inf", "convert_element_type", "", False, ()),
    "gradient of a square root": (
        lambda: (jax.grad(lambda x: jnp.sqrt(x).sum()), half(4, 0)),
        *("inf", "div", "", False, ()),  # JAX computes the factor in the forward pass
    ),
    "gradient of a masked logarithm": (
        lambda: (jax.grad(lambda x: jnp.where(x > 0, jnp.log(x), 0).sum()), half(1, 0)),
        *("NaN", "div", "", True, ()),
    ),
    "branch of a conditional": (lambda: (branch, half(1)), "-inf", "log", "", False, ()),
    "scan": (lambda: (forward_scan, half(100, 100, 10, 100)), "inf", "mul", "", False, ((2, 4),)),
    "scan in a scan": (lambda: (nested_scans, jnp.full((3, 4), 7000, F16)), "inf", "add", "", False, ((2, 3), (1, 4))),
    "while loop": (lambda: (growing, F16(3)), "inf", "mul", "", False, ((3, 0),)),
    "carry that begins at -inf": (lambda: (running_maximum, half(1, 3, 7, 3)), "inf", "mul", "", False, ((2, 4),)),
    "backward in a scan": (
        lambda: (jax.grad(lambda x: forward_scan(x) * F16(2e3)), half(0.5, 1, 2, 4, 4, 2)),
        *("inf", "mul", "", True, ((2, 6),)),
    ),
    "dense, forward": (lambda: loss_and(Net(), ONES * 1e4, head_kernel=2), "inf", "dot_general", "Net/head", False, ()),
    "dense, backward: the loss scale": (
        lambda: grad_of(Net(), ONES, scale=2.0**15, head_kernel=3),
        *("inf", "dot_general", "Net/head", True, ()),
    ),
    "cotangent of the output: the loss scale": (
        lambda: grad_of(Net(), ONES, scale=2.0**16),
        *("inf", "convert_element_type", "", True, ()),
    ),
    "bias gradient in half": (
        lambda: grad_of(
            Net(), jnp.ones((200, 4)), 2.0**10, "p=f32,c=f16,o=f32,grad=f16", head_kernel=0.1, hidden_kernel=0
        ),
        *("inf", "reduce_sum", "Net/head", True, ()),
    ),
    "embedding gradient in half": (
        lambda: grad_of(Embedded(), jnp.zeros(3), 2.0**15, "p=f32,c=f16,o=f32,grad=f16"),
        *("inf", "scatter-add", "Embedded/table", True, ()),
    ),
    "recurrent cell": (
        lambda: loss_and(Recurrent(), jnp.ones((1, 5, 2)), cell_h_kernel=20),
        *("inf", "dot_general", "Recurrent/rnn/cell/h", False, ((3, 5),)),
    ),
    "recurrent cell, backward": (
        lambda: grad_of(Recurrent(), jnp.ones((1, 5, 2)) * 1e-4, 2.0**6, cell_h_kernel=8, cell_i_bias=0),
        *("inf", "dot_general", "Recurrent/rnn/cell/h", True, ((2, 5),)),
    ),
    "scanned layers": (
        lambda: loss_and(Scanned(), jnp.ones((1, 2)), layers_dense_kernel=20),
        *("inf", "dot_general", "Scanned/layers/dense", False, ((3, 4),)),
    ),
    "remat": (lambda: loss_and(Remat(), ONES * 1e4), "inf", "mul", "Remat", False, ()),
    "remat, backward": (
        lambda: (
            jax.grad(lambda p, x: loss_of(Remat(), scale=2.0**14)(p, x)),
            variables(Remat(), jnp.ones((1, 4)) * 3),
            jnp.ones((1, 4)) * 3,
        ),
        *("inf", "dot_general", "Remat/block", True, ()),
    ),
    "rule of a custom_vjp": (lambda: (jax.grad(in_rules), half(1)), "inf", "mul", "rules", True, ()),
    "rule of a custom_jvp": (lambda: (jax.grad(in_jvp_rule), half(12)), "inf", "exp", "squash", False, ()),
    "softmax in half": (
        lambda: loss_and(Attention(), jnp.ones((1, 2)), "float16"),
        *("inf", "reduce_sum", "Attention/softmax", False, ()),
    ),
    "attention scores": (
        lambda: loss_and(Scores(), jnp.ones((1, 3, 4)) * 100),
        *("inf", "dot_general", "Scores/attention", False, ()),
    ),
    "emulated e5m2 gradients": (
        lambda: grad_of(Net(), ONES, 2.0**16, "c=e4m3/e5m2"),
        *("inf", "quantize_e5m2", "Net/head", True, ()),
    ),
    "emulated e4m3": (
        lambda: (lambda x: quantize(x, "e4m3", saturate=False), jnp.array([500.0])),
        "NaN",
        "quantize_e4m3",
        "",
        False,
        (),
    ),
    "emulated e4m3, backward": (
        lambda: (jax.grad(lambda x: fake_quantize(x, None, "e4m3", saturate=False) * 1e3), F32(1)),
        *("NaN", "quantize_e4m3", "", True, ()),
    ),
    "NaN in the data": (
        lambda: loss_and(Net(), np.where(np.arange(4) == 1, np.nan, ONES)),
        "NaN",
        "argument",
        "x",
        False,
        (),
    ),
    "inf in a parameter": (
        lambda: loss_and(Net(), ONES, head_kernel=jnp.inf),
        *("inf", "argument", "params/head/kernel", False, ()),
    ),
    "-inf in a parameter": (
        lambda: loss_and(Net(), ONES, head_kernel=-jnp.inf),
        *("-inf", "argument", "params/head/kernel", False, ()),
    ),
    "a row that is masked as a whole": (
        lambda: (lambda x: jax.nn.softmax(jnp.where(x > 5, x, -jnp.inf)), half(1, 2)),
        *("NaN", "sub", "", False, ()),
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name):
    planted, value, primitive, path, backward, turns = PLANTED[name]
    found = blame(*planted())
    assert (found.value, found.primitive, found.path, found.backward, found.turns) == (
        value,
        primitive,
        path,
        backward,
        turns,
    )
