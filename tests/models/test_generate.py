from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.errors import InputError
from jaxmp.models.generate import generate
from jaxmp.models.transformer import GPT2, Llama
from jaxmp.modules.linen import with_policy

SMALL = {"vocabulary": 11, "context": 12, "layers": 1, "heads": 2, "width": 16}
KEY = jax.random.key(0)


def made(model):
    prompt = jax.random.randint(KEY, (2, 4), 0, 11)
    variables = jax.jit(model.init)(jax.random.key(1), prompt)
    return jax.tree.map(lambda x: 8 * x if x.ndim == 2 else x, variables), prompt


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("model", [GPT2(**SMALL), Llama(kv_heads=1, hidden=24, **SMALL)], ids=["gpt2", "llama"])
def test_tokens_of_no_temperature_are_the_most_probable_of_the_whole_forward_pass(model, policy):
    variables, prompt = made(model)
    apply = with_policy(model.apply, policy)
    drawn = jax.jit(lambda v, p: generate(model, v, p, 8, key=KEY, temperature=0, apply=apply))(variables, prompt)
    logits = jax.jit(apply)(variables, jnp.concatenate([prompt, drawn], axis=1))[:, 3:-1]
    chosen = jnp.take_along_axis(logits, drawn[..., None], axis=-1)[..., 0]
    within = 0 if policy == "float32" else 0.05 * float(jnp.abs(logits).max())
    assert drawn.dtype == jnp.int32 and drawn.shape == (2, 8)
    assert (chosen >= logits.max(axis=-1) - within - 1e-6).all()
    assert len(np.unique(drawn)) > 2


@pytest.mark.slow
def test_tokens_are_drawn_with_the_probabilities_of_the_softmax_t19():
    model = GPT2(**SMALL)
    variables, prompt = made(model)
    many = jnp.repeat(prompt[:1], 4000, axis=0)
    apply = with_policy(model.apply, "mixed_bfloat16")
    draw = jax.jit(lambda key: generate(model, variables, many, 1, key=key, temperature=2.0, apply=apply))
    probabilities = jax.nn.softmax(apply(variables, prompt[:1])[0, -1] / 2)
    found = np.bincount(np.asarray(draw(KEY)[:, 0]), minlength=11) / 4000
    np.testing.assert_allclose(found, probabilities, atol=0.03)
    np.testing.assert_array_equal(draw(KEY), draw(KEY))
    assert (draw(KEY) != draw(jax.random.key(1))).any()


@pytest.mark.parametrize(
    ("length", "count", "temperature", "names"),
    [
        (4, 9, 1.0, "9 tokens after a prompt of 4; expected at least one of each, and together at most context=12"),
        (0, 1, 1.0, "1 tokens after a prompt of 0"),
        (4, 0, 1.0, "0 tokens after a prompt of 4"),
        (4, 1, -1.0, "temperature=-1.0: expected 0 or more"),
    ],
)
def test_what_cannot_be_generated_is_refused(length, count, temperature, names):
    with pytest.raises(InputError) as error:
        generate(GPT2(**SMALL), {}, jnp.zeros((1, length), jnp.int32), count, key=KEY, temperature=temperature)
    assert names in str(error.value)
    with pytest.raises(InputError, match=r"a prompt of \[4\]; expected tokens \(batch, length\)"):
        generate(GPT2(**SMALL), {}, jnp.zeros(4, jnp.int32), 1, key=KEY)


def test_no_token_beyond_the_vocabulary_is_drawn():
    logits = jnp.array([0.0, 0.0, 0.0, 50.0, 60.0])

    def apply(variables, tokens, **options):
        return jnp.broadcast_to(logits, (*tokens.shape, 5)), {}

    for temperature in (0.0, 1.0):
        how = {"key": KEY, "temperature": temperature, "apply": apply}
        prompt = jnp.zeros((50, 2), jnp.int32)
        assert (generate(GPT2(**SMALL), {}, prompt, 4, **how) == 4).all()
        drawn = generate(GPT2(**SMALL), {}, prompt, 4, **how, vocabulary=3)
        assert drawn.max() == (2 if temperature else 0)
