from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp.models.attention
from jaxmp.errors import InputError
from jaxmp.models.attention import Attention, attention_weights, rotate, weighted_values
from jaxmp.models.transformer import BERT, GPT2, BERTMaskedLM, Llama
from jaxmp.modules.linen import with_policy

SMALL = {"vocabulary": 11, "context": 12, "layers": 2, "heads": 4, "width": 32}
DECODERS = {"gpt2": GPT2(**SMALL), "llama": Llama(kv_heads=2, hidden=24, qk_norm=True, **SMALL)}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def tokens(rows, length):
    return jax.random.randint(jax.random.key(0), (rows, length), 0, 11)


def heads(dtype, kv_heads=2):
    query, key, value = normal(0, 2, 9, 4, 8), normal(1, 2, 9, kv_heads, 8), normal(2, 2, 9, kv_heads, 8)
    return [(3 * x).astype(dtype) for x in (query, key, value)]


def attend(query, key, value, **how):
    return weighted_values(attention_weights(query, key, **how).astype(value.dtype), value)


def in_float64(query, key, value, *, mask, causal):
    """The same by a loop over examples, heads and positions, in NumPy's float64."""
    query, key, value = (np.asarray(x.astype(jnp.float32), np.float64) for x in (query, key, value))
    out = np.zeros_like(query)
    groups = query.shape[2] // key.shape[2]
    for b, t, h in np.ndindex(query.shape[:3]):
        logits = key[b, :, h // groups] @ query[b, t, h] / math.sqrt(query.shape[-1])
        seen = np.ones(len(logits), bool) if mask is None else np.asarray(mask[b, 0, 0])
        seen = seen & (np.arange(len(logits)) <= t) if causal else seen
        weights = np.where(seen, np.exp(logits - logits[seen].max()), 0)
        out[b, t, h] = weights / weights.sum() @ value[b, :, h // groups]
    return out


MASK = jnp.arange(9) < jnp.array([9, 5])[:, None, None, None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "causal", "kv_heads"), [(None, False, 4), (None, True, 2), (MASK, False, 1), (MASK, True, 2)]
)
@pytest.mark.parametrize(("dtype", "within"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2**-7), (jnp.float16, 2**-10)])
def test_attention_is_that_of_its_formula_and_of_jax(dtype, within, mask, causal, kv_heads):
    arrays = heads(dtype, kv_heads)
    out = jax.jit(functools.partial(attend, mask=mask, causal=causal))(*arrays)
    exact = in_float64(*arrays, mask=mask, causal=causal)
    largest = np.abs(exact).max()
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=within * largest, rtol=0)
    if dtype != jnp.float16:  # which it does not compile for a CPU
        whole = None if mask is None else jnp.broadcast_to(mask, (2, 1, 9, 9))
        theirs = jax.nn.dot_product_attention(*arrays, mask=whole, is_causal=causal, implementation="xla")
        np.testing.assert_allclose(theirs.astype(jnp.float32), exact, atol=within * largest, rtol=0)


@pytest.mark.slow
def test_logits_in_half_are_not_rounded_before_the_softmax():
    # Two logits of 1024 and 1025, which bfloat16 cannot tell apart.
    query = jnp.array([1024.0, 1.0], jnp.bfloat16).reshape(1, 1, 1, 2) * math.sqrt(2)
    key = jnp.array([[1.0, 0.0], [1.0, 1.0]], jnp.bfloat16).reshape(1, 2, 1, 2)
    weights = attention_weights(query, key, mask=None, causal=False)
    assert weights.dtype == jnp.float32
    ratio = float(weights[0, 0, 0, 1] / weights[0, 0, 0, 0])
    assert ratio == pytest.approx(math.exp(float(query[0, 0, 0, 1]) / math.sqrt(2)), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_gradient_of_half_attention_has_half_products_and_is_that_of_float32(dtype):
    arrays = heads(dtype)

    def loss(*arrays):
        return jnp.sum(attend(*arrays, mask=MASK, causal=True).astype(jnp.float32) ** 2)

    gradient = jax.grad(loss, (0, 1, 2))
    products = [e for e in jax.make_jaxpr(gradient)(*arrays).jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) >= 5
    assert {v.aval.dtype for e in products for v in e.invars} == {jnp.dtype(dtype)}
    exact = gradient(*(x.astype(jnp.float32) for x in arrays))
    for half, wide in zip(gradient(*arrays), exact, strict=True):
        np.testing.assert_allclose(half.astype(jnp.float32), wide, atol=0.02 * float(jnp.abs(wide).max()))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_no_matrix_of_logits_is_transposed(kv_heads):
    query, key, value = normal(0, 2, 24, 4, 8), normal(1, 2, 24, kv_heads, 8), normal(2, 2, 24, kv_heads, 8)
    gradient = jax.grad(lambda *of: jnp.sum(attend(*of, mask=None, causal=True) ** 2), (0, 1, 2))
    lines = jax.jit(gradient).lower(query, key, value).compile().as_text().splitlines()
    moved = [line for line in lines if re.search(r"f32\[2,[0-9,]*24,24(,1)?\]\S* (copy|transpose)\(", line)]
    assert any(" dot(" in line for line in lines) and not moved


@pytest.mark.slow
def test_a_rotation_by_positions_leaves_products_that_depend_on_the_distance_alone():
    x, y = normal(0, 1, 1, 1, 64), normal(1, 1, 1, 1, 64)
    at = jnp.array([0, 5, 1000, 1005, 30_000, 30_005])
    rotated = [rotate(jnp.broadcast_to(z, (1, 6, 1, 64)), at)[0, :, 0] for z in (x, y)]
    products = [float(rotated[0][i] @ rotated[1][i + 1]) for i in (0, 2, 4)]
    np.testing.assert_allclose(products, products[0], atol=0.02)
    np.testing.assert_array_equal(rotated[0][0], x[0, 0, 0])
    assert abs(float(rotated[0][0] @ rotated[1][0]) - products[0]) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_angles_are_in_float32_whatever_the_dtype_t20(dtype):
    x = normal(0, 1, 2049, 1, 8).astype(dtype)
    positions = np.arange(2049)
    angle = positions[:, None] * 10_000.0 ** (-np.arange(4) / 4)
    first, second = np.split(np.asarray(x.astype(jnp.float32), np.float64)[0, :, 0], 2, axis=-1)
    exact = np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=-1
    )
    rotated = rotate(x, jnp.arange(2049))
    assert rotated.dtype == dtype
    unit = 2 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(rotated[0, :, 0].astype(jnp.float32), exact, atol=unit * np.abs(exact).max())


# --- decoding


def made(model, *inputs):
    """Variables, from larger numbers than a fresh model's: its logits would all be about 0."""
    variables = jax.jit(model.init)(jax.random.key(1), *inputs)
    return jax.tree.map(lambda x: 8 * x if x.ndim == 2 else x, variables)


def decoder(model, policy):
    """`(variables, tokens) -> (logits, {"cache": ...})`, jitted."""
    apply = with_policy(model.apply, policy)
    return jax.jit(lambda variables, tokens: apply(variables, tokens, decode=True, mutable=["cache"]))


def decoded(decode, variables, tokens, parts):
    logits, state = [], {}
    for part in jnp.split(tokens, parts, axis=1):
        out, state = decode({**variables, **state}, part)
        logits.append(out)
    return jnp.concatenate(logits, axis=1), state


ONE_BY_ONE, PROMPT_FIRST = list(range(1, 12)), [7, 8]


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "within"), [("float32", 1e-6), ("mixed_bfloat16", 0.03), ("mixed_float16", 0.004)])
@pytest.mark.parametrize("name", DECODERS)
def test_decoding_with_a_cache_is_the_whole_forward_pass(name, policy, within):
    model, given = DECODERS[name], tokens(2, 12)
    variables, decode = made(model, given), decoder(model, policy)
    whole = jax.jit(with_policy(model.apply, policy))(variables, given)
    largest = float(jnp.abs(whole).max())
    assert largest > 0.5
    for parts in (ONE_BY_ONE, PROMPT_FIRST) if policy == "float32" else (PROMPT_FIRST,):
        logits, state = decoded(decode, variables, given, parts)
        np.testing.assert_allclose(logits, whole, atol=within * largest, rtol=0)
        assert state["cache"]["index"] == 12
    # And there it ends, under jit with NaN.
    for _ in range(3):
        logits, state = decode({**variables, **state}, given[:, :1])
        assert np.isnan(logits).all()


@pytest.mark.parametrize("name", DECODERS)
def test_decoding_past_the_context_is_refused_where_the_position_is_known(name):
    cache = {"cache": {"index": jnp.int32(DECODERS[name].context - 1)}}
    with pytest.raises(
        InputError, match=rf"{type(DECODERS[name]).__name__}: 2 tokens from position 11 on; .*context=12"
    ):
        DECODERS[name].apply(cache, tokens(1, 2), decode=True, mutable=["cache"])
    with pytest.raises(InputError, match="Attention: 3 tokens from position 2 on; expected at most context=4"):
        Attention(2, context=4).init(jax.random.key(0), normal(0, 1, 3, 8), start=jnp.int32(2))


@pytest.mark.parametrize("name", DECODERS)
def test_init_makes_a_cache_that_is_not_used_yet(name):
    cache = jax.jit(lambda: DECODERS[name].init(jax.random.key(0), tokens(2, 12), decode=True)["cache"])()
    assert int(cache["index"]) == 0 and len(jax.tree.leaves(cache)) > 1
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(cache))


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_a_cache_keeps_its_dtype_whatever_the_policy_of_the_next_call_t21(name):
    model, given = DECODERS[name], jax.ShapeDtypeStruct((2, 6), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(1), given)
    for first, expected in (("float32", "float32"), ("mixed_bfloat16", "bfloat16")):
        _, state = jax.eval_shape(decoder(model, first), variables, given)
        assert {str(x.dtype) for x in jax.tree.leaves(state)} == {expected, "int32"}
        for policy in ("float32", "mixed_bfloat16", "mixed_float16"):
            logits, after = jax.eval_shape(decoder(model, policy), {**variables, **state}, given)
            assert after == state and logits.dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_sees_no_token_that_comes_later(name):
    model, given = DECODERS[name], tokens(2, 12)
    variables, apply = made(model, given), jax.jit(model.apply)
    changed = given.at[:, 6].set((given[:, 6] + 1) % 11)
    one, other = apply(variables, given), apply(variables, changed)
    np.testing.assert_array_equal(one[:, :6], other[:, :6])
    assert (one[:, 6:] != other[:, 6:]).any(axis=-1).all()


@pytest.mark.slow
def test_padding_changes_nothing_that_an_encoder_says_of_the_rest():
    model, given = BERT(hidden=24, **SMALL), tokens(2, 12)
    variables, apply = made(model, given), jax.jit(model.apply)
    mask = (jnp.arange(12) < 8) & jnp.ones((2, 1), bool)
    hidden, pooled = apply(variables, given, mask)
    other, pooled_other = apply(variables, given.at[:, 8:].set(0), mask)
    alone, _ = apply(variables, given[:, :8])
    np.testing.assert_array_equal(hidden[:, :8], other[:, :8])
    np.testing.assert_array_equal(pooled, pooled_other)
    np.testing.assert_allclose(hidden[:, :8], alone, atol=1e-5)


# --- cuDNN, of which a CPU shows how it is called


@pytest.mark.slow
@pytest.mark.parametrize("model", [GPT2(**SMALL), BERTMaskedLM(hidden=24, **SMALL)], ids=["gpt2", "bert"])
def test_of_several_texts_in_a_row_each_is_as_it_is_alone(model):
    texts, number = tokens(1, 12), jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
    positions = jnp.array([[*range(5), *range(4), 0, 0, 0]])
    variables = made(model, texts)
    more = (None,) if isinstance(model, BERT) else ()
    packed = jax.jit(model.apply)(variables, texts, number, *more, positions)
    for part in (slice(0, 5), slice(5, 9)):
        alone = jax.jit(model.apply)(variables, texts[:, part])
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-5)
    # A mask of 0 and 1 is that of bools, at the padding too.
    ones = (number > 0).astype(jnp.int32)
    of_bools, of_ones = (jax.jit(model.apply)(variables, texts, mask) for mask in (number > 0, ones))
    np.testing.assert_array_equal(of_bools, of_ones)


@pytest.mark.slow
def test_logits_of_some_places_are_those_of_all():
    model, texts = BERTMaskedLM(hidden=24, **SMALL), tokens(3, 9)
    variables, places = made(model, texts), jnp.array([[0, 8], [3, 2], [7, 1]])
    some = jax.jit(model.apply)(variables, texts, None, None, None, places)
    every = jax.jit(model.apply)(variables, texts)
    np.testing.assert_allclose(some, jnp.take_along_axis(every, places[..., None], axis=1), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_cudnns_kernel_is_given_the_same_attention(name, monkeypatch):
    model = {**DECODERS, "bert": BERT(hidden=24, dropout=0.0, **SMALL)}[name]
    given = (tokens(2, 12), jnp.arange(12) < jnp.array([[9], [12]])) if name == "bert" else (tokens(2, 12),)
    variables, half = made(model, given[0]), with_policy(model.apply, "mixed_bfloat16")
    expected = jax.tree.leaves(jax.jit(half)(variables, *given))
    calls = []

    def attention(query, *arrays, mask, implementation, **how):
        calls.append(implementation)
        assert mask is None or mask.shape == (2, 1, 12, 12)  # which it wants whole
        return original(query, *arrays, mask=mask, implementation="xla", **how)

    original = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    monkeypatch.setattr(jaxmp.models.attention, "has_cudnn_attention", lambda: True)
    whole = jax.tree.leaves(jax.jit(lambda *args: half(*args))(variables, *given))
    assert calls == ["cudnn"] * 2
    for x, y in zip(whole, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=0.03 * float(jnp.abs(y).max()))
    calls.clear()
    # It computes neither in float32, nor with dropout, nor masks of an odd number of tokens.
    jax.eval_shape(lambda *args: model.apply(*args), variables, *given)
    if name == "gpt2":
        train = {"train": True, "rngs": {"dropout": jax.random.key(0)}}
        jax.eval_shape(lambda *args: half(*args, **train), variables, *given)
    if name == "bert":
        jax.eval_shape(lambda *args: half(*args), variables, *(x[:, :11] for x in given))
    else:
        jax.eval_shape(decoder(model, "mixed_bfloat16"), variables, *given)
    assert not calls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Attention(0), "Attention: heads=0: expected 1 or more"),
        (lambda: Attention(4, kv_heads=3), "heads=4: expected a multiple of kv_heads=3"),
        (lambda: Attention(4, kernel="flash"), "kernel='flash': expected auto or einsum or cudnn"),
        (lambda: init(Attention(3), normal(0, 1, 2, 8)), "a width of 8: expected a multiple of heads=3"),
        (
            lambda: init(Attention(2, kernel="cudnn"), normal(0, 1, 2, 8)),
            "2 tokens, heads of 4 float32s",
        ),
        (lambda: decode_with_a_mask(), "a mask beside start: expected none in decoding"),
        (lambda: masked(1, 3, 3), "Attention: a mask of [1, 3, 3]; expected (batch, length), [1, 3]"),
        (lambda: masked(1, 1), "Attention: a mask of [1, 1]; expected (batch, length), [1, 3]"),
        (lambda: init(Attention(2, rope=1e4), normal(0, 1, 2, 6)), "heads of 3: expected an even width"),
        (lambda: GPT2(width=100), "width=100: expected a multiple of heads=12"),
        (lambda: GPT2(dropout=1.0), "dropout=1.0"),
        (lambda: Llama(heads=8, kv_heads=3), "heads=8: expected a multiple of kv_heads=3"),
        (lambda: init(GPT2(context=4), tokens(1, 5)), "GPT2: 5 tokens; expected at most context=4"),
        (lambda: init(BERT(), normal(0, 1, 5)), r"BERT: tokens are float32[1, 5]; expected whole numbers"),
    ],
)
def test_attention_that_cannot_be_is_refused_by_name(make, names):
    with pytest.raises(InputError) as error:
        make()
    assert names in str(error.value)


def init(model, x):
    return jax.eval_shape(model.init, jax.random.key(0), x)


def masked(*shape):
    Attention(2).init(jax.random.key(0), normal(0, 1, 3, 8), jnp.ones(shape, bool))


def decode_with_a_mask():
    Attention(2).init(jax.random.key(0), normal(0, 1, 2, 8), jnp.ones((1, 2)), start=jnp.int32(0))
