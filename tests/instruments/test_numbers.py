"""What `audit` says of the numbers in half precision: each kind of fault in several forms, and no alarm without one.

What is said is held against the numbers themselves: a fault of the tables is one that a float64 calculation shows.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.instruments.audit import audit
from jaxmp.precision.autocast import autocast

F16, BF16, F32, I32 = jnp.float16, jnp.bfloat16, jnp.float32, jnp.int32


def of(*shape, dtype=F16):
    return jax.ShapeDtypeStruct(shape, dtype)


X, B, T = of(1000), of(1000, dtype=BF16), of(1000, dtype=F32)
IDS = of(1000, dtype=I32)
MASK = of(1000, dtype=jnp.bool_)
KEY = jax.random.key(0)
RATES = np.array([1.0, 0.1], np.float32)


def rope(length, dtype):
    angles = jnp.arange(length, dtype=dtype)[:, None] * 10000.0 ** (-jnp.arange(4, dtype=dtype) / 4)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def timestep_embedding(t, dtype):
    freqs = jnp.exp(-jnp.log(10000.0) * jnp.arange(8, dtype=F32) / 8).astype(dtype)
    return jnp.sin(t.astype(dtype)[:, None] * freqs[None])


def softmax_by_hand(x):
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def drawn(x, draw):
    return x + draw(KEY, x.shape, x.dtype)


def lerp(p, low):
    return jnp.clip(p, low, 1 - low)


FOUND = {
    # Positions, and other whole numbers, above 256 or 2048 (T20).
    "iota": ("half position", lambda x: x + jnp.arange(1000, dtype=BF16), (B,)),
    "iota cast": ("half position", lambda x: x + jnp.arange(1000).astype(BF16), (B,)),
    "iota in float16": ("half position", lambda: jnp.arange(5000, dtype=F16), ()),
    "linspace": ("half position", lambda: jnp.linspace(0, 1, 1024, dtype=BF16), ()),
    "row times width plus column": (
        "half position",
        lambda: jnp.arange(32, dtype=BF16)[:, None] * 32 + jnp.arange(32, dtype=BF16),
        (),
    ),
    "cumulative count": ("half count", lambda m: jnp.cumsum(m.astype(BF16)), (MASK,)),
    "argmax": ("half position", lambda x: jnp.argmax(x.reshape(2, 500), -1).astype(BF16), (B,)),
    # Counts of masks.
    "sum of a mask": ("half count", lambda m: jnp.sum(m.astype(BF16)), (MASK,)),
    "sum of a mask in half": ("half count", lambda m: jax.lax.reduce_sum(m.astype(BF16), (0,)), (MASK,)),
    "count of a comparison": ("half count", lambda x: jnp.sum(x > 0, dtype=BF16), (B,)),
    "count_nonzero": ("half count", lambda x: x / jnp.count_nonzero(x).astype(BF16), (B,)),
    "counts by a product": (
        "half count",
        lambda i: jax.nn.one_hot(i, 7, dtype=BF16).T @ jnp.ones((1000, 1), BF16),
        (IDS,),
    ),
    "a loss by its mask": (
        "half count",
        lambda x, m: jnp.sum(x * m.astype(F16)) / jnp.sum(m.astype(F16)),
        (of(5000), of(5000, dtype=jnp.bool_)),
    ),
    # Angles.
    "sine of positions": ("half angle", lambda: jnp.sin(jnp.arange(1024, dtype=BF16)), ()),
    "rope": ("half angle", lambda: rope(1024, BF16), ()),
    "angles cast": ("half angle", lambda t: jnp.sin((t[:, None] * RATES).astype(BF16)), (T,)),
    "outer product": (
        "half angle",
        lambda t: jnp.sin(jnp.einsum("t,f->tf", t.astype(BF16), jnp.asarray(RATES, BF16))),
        (T,),
    ),
    "rounded before": ("half angle", lambda t: jnp.cos(t.astype(BF16).astype(F32)[:, None] * RATES), (T,)),
    "whole turns taken off": ("half angle", lambda i: jnp.tan(jnp.arange(1000, dtype=BF16) * 0.3 % 6.28), (IDS,)),
    "timesteps": ("half angle", lambda t: timestep_embedding(t, BF16), (IDS,)),
    "a factor": ("half angle", lambda x, w: jnp.sin(1000 * (x @ w)), (of(4, 8), of(8, 2))),
    # Whole numbers made of what was rounded.
    "floor of a product": ("half whole number", lambda x, w: jnp.floor(x @ w).astype(I32), (of(4, 8), of(8, 2))),
    "in float32 after the product": (
        "half whole number",
        lambda x, w: jnp.round((x @ w).astype(F32) * 10).astype(I32),
        (of(4, 8), of(8, 2)),
    ),
    "pixels": ("half whole number", lambda x: (x * 255).astype(jnp.uint8), (B,)),
    "codes of a sigmoid": ("half whole number", lambda x: (jax.nn.sigmoid(x) * 255).astype(jnp.uint8), (X,)),
    "identifiers that were cast": ("half whole number", lambda x: x.astype(BF16).astype(I32), (T,)),
    "bins": ("half whole number", lambda x: jnp.clip(x / 0.1, 0, 9).astype(I32), (X,)),
    # Probabilities (T23).
    "log(1 - sigmoid)": ("half probability", lambda x: jnp.log(1 - jax.nn.sigmoid(x)), (B,)),
    "log(1 - sigmoid + eps)": ("half probability", lambda x: jnp.log(1 - jax.nn.sigmoid(x) + 1e-7), (X,)),
    "log(1 - p) in the loss": ("half probability", lambda x: jnp.log(1 - jax.nn.sigmoid(x).astype(F32)), (B,)),
    "log of a softmax in the loss": (
        "half probability",
        lambda x: -jnp.log(jax.nn.softmax(x.reshape(100, 10)).astype(F32)),
        (B,),
    ),
    "log of a softmax by hand": ("half probability", lambda x: jnp.log(softmax_by_hand(x.reshape(100, 10))), (X,)),
    "log1p(-sigmoid)": ("half probability", lambda x: jnp.log1p(-jax.nn.sigmoid(x)), (B,)),
    "log(1 - tanh^2)": ("half probability", lambda x: jnp.log(1 - jnp.tanh(x) ** 2 + 1e-6), (X,)),
    "the odds": ("half probability", lambda x: jax.nn.sigmoid(x) / (1 - jax.nn.sigmoid(x)), (X,)),
    "atanh of tanh": ("half probability", lambda x: jnp.arctanh(jnp.tanh(x)), (X,)),
    "sigmoid by hand": ("half probability", lambda x: jnp.log(1 - 1 / (1 + jnp.exp(-x))), (X,)),
    "rounded at the end": ("half probability", lambda x: jnp.log(jax.nn.sigmoid(x.astype(F32)).astype(BF16)), (B,)),
    # Random draws (T19).
    "uniform": ("half random draw", lambda x: drawn(x, jax.random.uniform), (B,)),
    "normal": ("half random draw", lambda x: drawn(x, jax.random.normal), (X,)),
    "gumbel": ("half random draw", lambda x: drawn(x, jax.random.gumbel), (B,)),
    # Constants that vanish.
    "+ eps": ("vanished constant", lambda x, y: x / (y + 1e-8), (X, X)),
    "- eps": ("vanished constant", lambda x, y: x / (y - 1e-8), (X, X)),
    "max(x, eps)": ("vanished constant", lambda x, y: x / jnp.maximum(y, 1e-8), (X, X)),
    "max(x, eps) of an array": ("vanished constant", lambda x: jnp.log(jnp.maximum(x, jnp.full_like(x, 1e-8))), (X,)),
    "clip": ("vanished constant", lambda x: jnp.log(jnp.clip(x, 1e-9)), (X,)),
    "where": ("vanished constant", lambda x: 1 / jnp.where(x > 0, x, 1e-9), (X,)),
    "eps squared": ("vanished constant", lambda x: x / (x + jnp.full_like(x, 1e-4) ** 2), (X,)),
    "eps squared in Python": ("vanished constant", lambda x: x / jnp.sqrt(x + 1e-5**2), (X,)),
    "rsqrt": ("vanished constant", lambda x: jax.lax.rsqrt(x + 1e-10), (X,)),
    "a power": ("vanished constant", lambda x: (x + 1e-9) ** -0.5, (X,)),
    "eps of a square root's gradient": (
        "vanished constant",
        jax.grad(lambda x: jnp.sum(jnp.sqrt(x + 1e-8).astype(F32))),
        (X,),
    ),
    "eps of one of two factors": ("vanished constant", lambda x, y: x / ((y + 1e-8) * x), (X, X)),
    "eps as an array of float32": ("vanished constant", lambda x: x / (x + jnp.float32(1e-8).astype(F16)), (X,)),
    "1 + tiny": ("vanished constant", lambda x: x * (jnp.ones_like(x) + 1e-4), (X,)),
    "1 - tiny as a bound": ("vanished constant", lambda x: jnp.log(1 - lerp(x, 1e-4)), (B,)),
    "1 - tiny of labels": ("vanished constant", lambda m: jnp.where(m, jnp.ones(1000, BF16), 0.999), (MASK,)),
    "tolerance": ("vanished constant", lambda x: jnp.where(jnp.abs(x) < 1e-8, 0, x), (X,)),
    "a weight of the loss": ("vanished constant", lambda x, y: x + 1e-9 * y, (X, X)),
    "a divisor": ("vanished constant", lambda x: x / 1e-9, (X,)),
    "a mask by a product": ("vanished constant", lambda x, m: x + (1 - m.astype(F16)) * -jnp.inf, (X, MASK)),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_fault_of_numbers_is_found_with_its_line(name):
    rule, fn, args = FOUND[name]
    found = [finding for finding in audit(fn, *args).findings if finding.rule == rule]
    assert found, audit(fn, *args).findings
    assert Path(__file__).name in found[0].source and found[0].dtype in ("float16", "bfloat16")


CLEAN = {
    "short positions": (lambda: jnp.sin(jnp.arange(200, dtype=BF16)), ()),
    "positions in float32": (lambda x: x + rope(1024, F32)[:1000, 0].astype(BF16), (B,)),
    "timesteps in float32": (lambda t: timestep_embedding(t, F32).astype(BF16), (IDS,)),
    "multiples of a power of two": (lambda: jnp.arange(200, dtype=BF16) * 1024, ()),
    "a short mask": (lambda m: jnp.sum(m[:200].astype(BF16)), (MASK,)),
    "a count in float32": (lambda x, m: x / jnp.sum(m, dtype=F32).astype(F32), (T, MASK)),
    "a mean of a mask": (lambda m: jnp.mean(m.astype(BF16)), (MASK,)),
    "a mask of attention": (lambda x, m: jax.nn.softmax(jnp.where(m, x, -1e9)[:100]), (X, MASK)),
    "a mask by a product": (lambda x, m: x + (1 - m.astype(BF16)) * -1e9, (B, MASK)),
    "one hot": (lambda i, w: jax.nn.one_hot(i, 1000, dtype=BF16) @ w, (IDS, of(1000, 4, dtype=BF16))),
    "images": (lambda i: i.astype(BF16) / 255, (of(8, 8, dtype=jnp.uint8),)),
    "sine of an activation": (lambda x, w: jnp.sin(x @ w), (of(4, 8, dtype=BF16), of(8, 2, dtype=BF16))),
    "sine of a turn": (lambda x, w: jnp.sin(2 * jnp.pi * (x @ w)), (of(4, 8, dtype=BF16), of(8, 2, dtype=BF16))),
    "snake": (lambda x, a: x + jnp.sin(a * x) ** 2 / a, (of(4, 8, dtype=BF16), of(8, dtype=BF16))),
    "a decision": (lambda x, w: (x @ w > 0.5).astype(I32), (of(4, 8), of(8, 2))),
    "a rounded sigmoid": (lambda x, w: jnp.round(jax.nn.sigmoid(x @ w)).astype(I32), (of(4, 8), of(8, 2))),
    "signs": (lambda x, w: jnp.sign(x @ w).astype(I32), (of(4, 8), of(8, 2))),
    "a mask as a number": (lambda m: m.astype(BF16).astype(I32), (MASK,)),
    "log_softmax": (lambda x: jax.nn.log_softmax(x.reshape(100, 10)), (X,)),
    "log_sigmoid": (jax.nn.log_sigmoid, (X,)),
    "softplus": (jax.nn.softplus, (X,)),
    "probabilities in float32": (lambda x: jnp.log(1 - jax.nn.sigmoid(x.astype(F32))), (B,)),
    "gradients of probabilities": (
        jax.grad(lambda x: jnp.sum((jax.nn.sigmoid(x) * jnp.tanh(x)).astype(F32))),
        (of(10),),
    ),
    "attention": (lambda q: jax.nn.softmax(q @ q.T) @ q, (of(100, 8),)),
    "draws in float32": (lambda x: x + jax.random.normal(KEY, x.shape).astype(x.dtype), (X,)),
    "dropout": (lambda x: jnp.where(jax.random.bernoulli(KEY, 0.9, x.shape), x / 0.9, 0), (X,)),
    "integers drawn": (lambda x: x[jax.random.randint(KEY, (5,), 0, 9)], (X,)),
    "eps in range": (lambda x, y: x / (jnp.sqrt(y) + 1e-4), (X, X)),
    "eps in bfloat16": (lambda x, y: x / jnp.maximum(y - 1e-8, 1e-8), (B, B)),
    "eps by autocast": (autocast(lambda x, y: x / (y + 1e-8), dtype=F16), (T, T)),
    "relu": (lambda x: jax.nn.relu(x) / (1 + jax.nn.relu(x)), (X,)),
    "sums of relus": (lambda x: x / (jnp.sum(jax.nn.relu(x)) + 1), (X,)),
    "a nonzero test": (lambda x: jnp.where(jnp.abs(x) > 0, x, 1), (X,)),
    "zeros as a start": (lambda x: jax.lax.scan(lambda c, y: (jnp.tanh(c + y), c), jnp.zeros((), F16), x)[1], (X,)),
    "smooth labels": (lambda m: jnp.where(m, jnp.ones(1000, BF16), 0.9), (MASK,)),
    "a factor of one": (lambda x, y: 1.0 * jnp.tanh(x) + y, (X, X)),
}


@pytest.mark.parametrize("name", CLEAN)
def test_no_alarm_about_sound_numbers(name):
    fn, args = CLEAN[name]
    audit(fn, *args).assert_clean()
