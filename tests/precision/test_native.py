"""Products in a block format by one call of JAX, and the law that emulation and hardware agree."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.commands.doctor import native_formats
from jaxmp.errors import InputError
from jaxmp.precision.blocks import pack
from jaxmp.precision.native import FORMATS, is_native, native_call, native_product


def emulated(x, w):
    return np.asarray(x.unpack(), np.float64) @ np.asarray(w.unpack(), np.float64).T


def operands(name):
    """Numbers that the format holds, whose sums fit in the 13 bits that tensor cores keep at the least."""
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-2, 3, (64, 128)).astype(np.float32) for _ in range(2))
    x[:, ::32] = w[:, ::32] = 6  # the largest of each block: its scale is a power of two
    return pack(x, name), pack(w, name)


def law(name):
    """Emulation and the native call give the same numbers, to the bit but for the factors that are no powers of two."""
    x, w = operands(name)
    found = np.asarray(jax.jit(native_product)(x, w))
    np.testing.assert_allclose(found, emulated(x, w), rtol=1e-6, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_emulation_and_hardware_agree(name):
    device = jax.devices()[0]
    if not is_native(name, device):
        needed = native_call(name).capability
        pytest.skip(f"no GPU of compute capability {needed}, which multiplies {name} natively; this is {device}")
    law(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_where_there_is_no_such_unit_the_call_gives_what_emulation_does(name):
    law(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_for_a_gpu_the_product_is_lowered_to_one_call_on_the_elements(name):
    x, w = operands(name)
    text = jax.jit(native_product).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    element = {"e4m3": "f8E4M3FN", "e5m2": "f8E5M2", "e2m1": "f4E2M1FN"}[str(x.format.element)]
    call = "dot_general" if native_call(name).capability < 10 else "block_scaled_dot"
    assert any(call in line and element in line for line in text.splitlines()), text


def test_what_is_native_follows_from_the_compute_capability():
    gpus = {each: types.SimpleNamespace(platform="gpu", compute_capability=each) for each in ("8.0", "9.0", "10.0")}
    found = {each: [name for name in FORMATS if is_native(name, gpu)] for each, gpu in gpus.items()}
    assert found == {"8.0": [], "9.0": ["e4m3:tensor", "e5m2:tensor"], "10.0": list(FORMATS)}
    assert not is_native("mxfp8", types.SimpleNamespace(platform="gpu", compute_capability="gfx942"))
    lines = list(native_formats(gpus["9.0"]))
    assert "native, by jax.lax.dot_general" in lines[0] and "compute capability 10.0" in lines[-1]


@pytest.mark.parametrize(
    ("x", "w", "shape", "message"),
    [
        ("block128", "block128", (4, 128), "no single call of JAX multiplies them"),
        ("mxfp8", "nvfp4", (4, 32), "no single call"),
        ("mxfp8", "mxfp8", (4, 40), "multiple of the block length 32"),
    ],
)
def test_what_no_call_multiplies_is_one_message(x, w, shape, message):
    with pytest.raises(InputError, match=message):
        native_product(pack(jnp.ones(shape), x), pack(jnp.ones(shape), w))
