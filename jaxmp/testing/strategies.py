"""Hypothesis strategies: floats by bit pattern, pytrees, gradients, overflow traces, policies, models, optimizers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from hypothesis import strategies as st
from jax.lax import DotAlgorithmPreset

from jaxmp.precision.policy import PRESETS, Policy
from jaxmp.precision.policy_tree import PolicyTree, Rule
from jaxmp.trees import HALF, is_floating

FP8 = tuple(np.dtype(getattr(ml_dtypes, name)) for name in ("float8_e4m3fn", "float8_e5m2"))
FLOATS = (np.dtype(np.float32), *HALF, *FP8, np.dtype(np.float64))


class Steps(tuple[bool, ...]):
    """A trace of steps: True for a finite step, False for an overflow. `print` shows it in words.

    >>> print(Steps([(True, 3), (False, 1)]))
    3 finite steps and 1 overflow
    """

    def __new__(cls, runs: Iterable[tuple[bool, int]] = ()) -> Steps:
        """Makes a trace of runs of equal steps: pairs of (finite, number of steps)."""
        return super().__new__(cls, itertools.chain.from_iterable([finite] * count for finite, count in runs))

    def __iter__(self) -> Iterator[bool]:
        return super().__iter__()

    def upto(self, count: int) -> Steps:
        """Returns the first `count` steps."""
        return Steps([(finite, 1) for finite in self[:count]])

    def __str__(self) -> str:
        words = {True: "finite step", False: "overflow"}
        runs = [(finite, len(list(group))) for finite, group in itertools.groupby(self)]
        return " and ".join(f"{n} {words[finite]}{'s' * (n > 1)}" for finite, n in runs) or "no step"

    __repr__ = __str__


def overflow_traces(*, max_runs: int = 4, longest: int = 10, min_runs: int = 0) -> st.SearchStrategy[Steps]:
    """Generates traces of finite steps and overflows: up to `max_runs` runs of up to `longest` equal steps."""
    run = st.tuples(st.booleans(), st.integers(1, longest))
    return st.lists(run, min_size=min_runs, max_size=max_runs).map(Steps)


def float_bits(dtype: Any = None) -> st.SearchStrategy[np.ndarray]:
    """Generates scalars of a float dtype (by default of any, fp8 included): all bit patterns, the difficult ones often.

    Difficult are zeros, subnormals, the smallest normal number, ties of rounding to half precision, the largest finite
    number, infinities, and NaNs with payloads. Shrinks towards 1.
    """
    if dtype is None:
        return st.sampled_from(FLOATS).flatmap(float_bits)
    dtype = np.dtype(dtype)
    info = ml_dtypes.finfo(dtype)
    unsigned = np.dtype(f"uint{8 * dtype.itemsize}")
    largest, one = _bits(info.max, dtype), _bits(1, dtype)
    low = 1 << info.nmant
    # Half of the distance between two halves, from below, at, and above: at 16 bits fewer, where there are so many.
    ties = [one + (1 << k) + d for k in (info.nmant - 8, info.nmant - 11) if k >= 0 for d in (-1, 0, 1)]
    awkward = [one, 0, 1, low - 1, low, low + 1, largest - 1, largest, largest + 1, largest + 2, largest + 3, *ties]
    sign = 1 << (8 * dtype.itemsize - 1)
    patterns = [b | s for b in awkward for s in (0, sign)]
    patterns = list(dict.fromkeys(b & (2 * sign - 1) for b in patterns))
    codes = st.one_of(st.sampled_from(patterns), st.integers(0, 2 * sign - 1))
    return codes.map(lambda code: np.array(code, unsigned).view(dtype))


def arrays(dtype: Any = np.float32, *, max_size: int = 4) -> st.SearchStrategy[jax.Array]:
    """Generates arrays of floats by bit pattern, with 0, 1 or 2 dimensions, and empty ones."""
    shapes = st.sampled_from([(), (1,), (max_size,), (0,), (2, max_size // 2)])
    return shapes.flatmap(
        lambda shape: st.lists(float_bits(dtype), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))).map(
            lambda xs: jnp.asarray(np.array(xs, dtype).reshape(shape))
        )
    )


def leaves_without_gradient() -> st.SearchStrategy[Any]:
    """Generates arrays that are not trained: integers, bools, PRNG keys, float0, and fp8, which holds scales."""
    return st.sampled_from(
        [
            jnp.array(3, jnp.int32),
            jnp.arange(3, dtype=jnp.uint8),
            jnp.array([True, False]),
            jax.random.key(7),
            jax.random.split(jax.random.key(7), 2),
            np.zeros((2,), jax.dtypes.float0),
            jnp.array([0.5, 448], jnp.float8_e4m3fn),
            jnp.array([0.5, 1.75], jnp.float8_e5m2),
        ]
    )


def odd_trees(*, floats: Iterable[Any] = (np.float32, np.float16)) -> st.SearchStrategy[Any]:
    """Generates pytrees with all that a training state can hold: numbers, untrained leaves, None and empty nodes."""
    numbers = st.just(jnp.array([0.5 - 2j], jnp.complex64))
    leaves = st.one_of(*(arrays(dtype) for dtype in floats), leaves_without_gradient(), numbers, st.none())
    keys = st.sampled_from(["kernel", "bias", "count"])
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.dictionaries(keys, inner, max_size=3),
            st.lists(inner, max_size=2),
            st.lists(inner, max_size=2).map(tuple),
        ),
        max_leaves=5,
    )


def gradient_trees(
    like: Any = None, *, overflow: bool | None = None, underflow: bool = False
) -> st.SearchStrategy[Any]:
    """Generates gradients with the structure, shapes and dtypes of `like`, by default a small dense layer in float32.

    Args:
      like: a pytree of arrays; leaves that are not floats stay as they are.
      overflow: True for one inf or NaN in some leaf, False for none, None for either.
      underflow: True for values so small (2**-30 to 2**-20) that, unscaled, many are 0 in float16.
    """
    like = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)} if like is None else like
    leaves, structure = jax.tree.flatten(like)
    places = [i for i, x in enumerate(leaves) if is_floating(x) and x.size]
    low, high = (-30, -20) if underflow else (-10, 3)

    def build(seed: int, bad: Any) -> Any:
        random = np.random.default_rng(seed)
        new = list(leaves)
        for i in places:
            shape = leaves[i].shape
            new[i] = random.choice([-1, 1], shape) * np.ldexp(random.uniform(1, 2, shape), random.integers(low, high))
            if bad and places[bad[0] % len(places)] == i:
                new[i].flat[bad[1] % leaves[i].size] = bad[2]
            new[i] = jnp.asarray(new[i], leaves[i].dtype)
        return jax.tree.unflatten(structure, new)

    bad = st.tuples(st.integers(0, 31), st.integers(0, 255), st.sampled_from([np.inf, -np.inf, np.nan]))
    none = st.none()
    return st.builds(
        build, st.integers(0, 2**16), bad if overflow else none if overflow is False else st.one_of(none, bad)
    )


def replica_faults(replicas: int) -> st.SearchStrategy[tuple[int, float]]:
    """Generates faults on one of several replicas: (index of the replica, inf or NaN)."""
    return st.tuples(st.integers(0, replicas - 1), st.sampled_from([np.inf, -np.inf, np.nan]))


def policies() -> st.SearchStrategy[Policy]:
    """Generates policies: the presets, and combinations of float32, bfloat16 and float16."""
    floats = st.sampled_from([jnp.dtype(d) for d in (jnp.float32, jnp.bfloat16, jnp.float16)])
    algorithms = st.sampled_from([DotAlgorithmPreset.DEFAULT, DotAlgorithmPreset.F32_F32_F32])

    @st.composite
    def combined(draw: st.DrawFn) -> Policy:
        compute = draw(floats)
        return Policy(
            draw(floats),
            compute,
            draw(floats),
            grad=draw(st.sampled_from([jnp.dtype(jnp.float32), compute])),
            reduce=draw(st.sampled_from([jnp.float32, jnp.bfloat16])),
            matmul=draw(algorithms),
        )

    return st.one_of(st.sampled_from(list(PRESETS.values())), combined())


def policy_trees(
    paths: Iterable[str] = ("encoder/*", "head", "**/norm", "@LayerNorm"),
) -> st.SearchStrategy[PolicyTree]:
    """Generates policy trees with rules for some of the given patterns, each at most once."""

    def build(rules: dict[str, Policy], default: Policy) -> PolicyTree:
        # There is one gradient collective: that of the default.
        reduce = {"reduce": default.reduce}
        return PolicyTree(tuple(Rule(p, dataclasses.replace(policy, **reduce)) for p, policy in rules.items()), default)

    return st.builds(build, st.dictionaries(st.sampled_from(list(paths)), policies(), max_size=3), policies())


class RandomNet(nn.Module):
    """A small net of the given layers, for inputs of shape (examples, features)."""

    layers: tuple[str, ...] = ("dense",)
    """kinds of its layers, in order: dense, norm, relu, tanh, attention"""
    features: int = 4
    """features of each layer"""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns outputs of shape (examples, features)."""
        for layer in self.layers:
            if layer == "dense":
                x = nn.Dense(self.features)(x)
            elif layer == "norm":
                x = nn.LayerNorm()(x)
            elif layer == "attention":
                x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=self.features)(x)
            else:
                x = getattr(nn, layer)(x)
        return nn.Dense(self.features, name="head")(x)


def models(*, max_layers: int = 3) -> st.SearchStrategy[RandomNet]:
    """Generates small Flax models. Shrinks towards one dense layer."""
    layer = st.sampled_from(["dense", "norm", "relu", "tanh", "attention"])
    return st.builds(
        RandomNet, st.lists(layer, max_size=max_layers).map(lambda layers: ("dense", *layers)), st.sampled_from([4, 8])
    )


def optimizers() -> st.SearchStrategy[optax.GradientTransformation]:
    """Generates optimizers with a schedule, whose count a skipped step must not move; some with clipping or decay."""
    schedules = st.sampled_from(
        [
            optax.constant_schedule(1e-2),
            optax.linear_schedule(1e-2, 1e-3, 4),
            optax.cosine_decay_schedule(1e-2, 10),
            optax.exponential_decay(1e-2, 2, 0.5),
        ]
    )
    makers = st.sampled_from(
        [
            optax.sgd,
            lambda rate: optax.sgd(rate, momentum=0.9),
            optax.adam,
            lambda rate: optax.adamw(rate, weight_decay=0.1),
            lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate)),
            lambda rate: optax.inject_hyperparams(optax.adam)(learning_rate=rate),
        ]
    )
    return st.builds(lambda make, schedule: make(schedule), makers, schedules)


def _bits(x: Any, dtype: np.dtype) -> int:
    return int(np.array(x, dtype).view(f"uint{8 * dtype.itemsize}"))
