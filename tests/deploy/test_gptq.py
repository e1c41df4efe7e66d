"""GPTQ is optimal brain quantisation in float64, column by column; AWQ takes the best of its scales."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp import InputError
from jaxmp.deploy.awq import EXPONENTS, SMALLEST, awq
from jaxmp.deploy.gptq import DAMPING, check_format, gptq
from jaxmp.precision.blocks import pack, parse_block_format


def problem(rows=6, inputs=20, seed=0):
    """A weight, and inputs that are correlated and of unequal size; one is always 0."""
    rng = np.random.default_rng(seed)
    x = (
        rng.standard_normal((200, inputs))
        @ rng.standard_normal((inputs, inputs))
        * np.exp2(rng.integers(-2, 3, inputs))
    )
    x[:, 7] = 0
    return rng.standard_normal((rows, inputs)).astype(np.float32), x


def squared_error(rounded, weight, x):
    return float(np.sum((x @ (np.asarray(rounded, np.float64) - weight).T) ** 2))


@pytest.mark.slow
@pytest.mark.parametrize(("format", "block"), [("int4:channel", 20), ("int8:group6", 6)])
def test_gptq_is_optimal_brain_quantisation_of_columns_in_their_order(format, block):
    weight, x = problem()
    largest = {"int4": 7, "int8": 127}[format.partition(":")[0]]
    gram = x.T @ x
    seen = np.diagonal(gram) > 0
    hessian = gram + np.diag(np.where(seen, DAMPING * np.diagonal(gram)[seen].mean(), 1.0))
    # Frantar and Alistarh 2022, Optimal Brain Compression, 2208.11580, equation 7: the inverse is made anew for the
    # columns that are left.
    left, expected = weight.astype(np.float64), np.zeros(weight.shape)
    for column in range(20):
        if column % block == 0:
            scale = np.abs(left[:, column : column + block]).max(axis=1) / largest
        inverse = np.linalg.inv(hessian[column:, column:])
        expected[:, column] = np.clip(np.rint(left[:, column] / scale), -largest, largest) * scale
        error = left[:, column] - expected[:, column]
        left[:, column:] -= np.outer(error / inverse[0, 0], inverse[0])
    found = gptq(weight, gram, parse_block_format(format))
    np.testing.assert_allclose(found.unpack(), expected, rtol=1e-5, atol=1e-6)
    nearest = pack(jnp.asarray(weight), format, axis=1).unpack()
    assert squared_error(found.unpack(), weight, x) < 0.8 * squared_error(nearest, weight, x)


@pytest.mark.slow
def test_gptq_leaves_a_pruned_matrix_pruned():
    weight, x = problem()
    weight[:, 1::2] = 0
    found = np.asarray(gptq(weight, x.T @ x, parse_block_format("int4:group4")).unpack())
    assert np.all(found[:, 1::2] == 0) and np.any(found[:, ::2] != 0)


@pytest.mark.parametrize(
    "format",
    [pytest.param("int4:group8", marks=pytest.mark.slow), pytest.param("nvfp4", marks=pytest.mark.full_size)],
)
def test_awq_takes_the_scales_of_inputs_with_the_least_error_of_outputs(format):
    weight, x = problem()
    magnitudes = np.abs(x).mean(axis=0)
    relative = np.maximum(magnitudes / magnitudes.max(), SMALLEST)
    errors = []
    for exponent in EXPONENTS:
        scale = relative**exponent / np.sqrt((relative**exponent).max() * (relative**exponent).min())
        rounded = np.asarray(jaxmp.quantize((weight * scale).astype(np.float32), format, axis=1), np.float64) / scale
        errors.append(squared_error(rounded, weight, x))
    blocks, after = awq(weight, x.T @ x, magnitudes, parse_block_format(format))
    assert after is not None and after.shape == (20,)
    found = squared_error(np.asarray(blocks.unpack(), np.float64) * after, weight, x)
    assert found == pytest.approx(min(errors), rel=1e-3) and found < 0.9 * errors[0]


def test_gptq_refuses_a_format_that_it_cannot_round_to():
    for format in ("nvfp4", "e4m3:channel", "int4", "int3:group32", "mxint8"):
        with pytest.raises(InputError, match=r"--method gptq with --weights .*expected int8, int4.*--method awq"):
            check_format(parse_block_format(format))
