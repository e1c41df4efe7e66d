from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import jmp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.lax import DotAlgorithmPreset

from jaxmp.errors import InputError
from jaxmp.precision.policy import PRESETS, Policy, parse_policy
from jaxmp.trees import cast_floats, is_castable

NAMES = ["f16", "float16", "bf16", "bfloat16", "f32", "float32", "f64", "float64", "full", "half"]
DTYPES = [jnp.dtype(name) for name in ("float16", "bfloat16", "float32", "float64")]


def triple(policy):
    return tuple(jnp.dtype(d) for d in (policy.param_dtype, policy.compute_dtype, policy.output_dtype))


def jmp_notations():
    yield from NAMES
    for keys in (("p", "c", "o"), ("params", "compute", "output")):
        for count in (1, 2, 3):
            for chosen in itertools.combinations(keys, count):
                for values in itertools.product(["f16", "bfloat16", "half", "full"], repeat=count):
                    yield ",".join(f"{key}={value}" for key, value in zip(chosen, values, strict=True))


def test_parse_policy_means_what_jmp_means():
    compared = 0
    for text in jmp_notations():
        try:
            theirs = jmp.get_policy(text)
        except (ValueError, KeyError):
            continue
        assert triple(parse_policy(text)) == triple(theirs), text
        compared += 1
    assert compared > 200


@pytest.mark.parametrize("text", ["c=f16,p=f32", "o=f16,c=bf16,p=f32", "p=float32,compute=half"])
def test_fields_come_in_any_order_as_in_jmp(text):
    assert triple(parse_policy(text)) == triple(jmp.get_policy(text))


def test_spaces_are_allowed_b6():
    assert parse_policy("p=f32, c=f16") == parse_policy("p=f32,c=f16")
    assert parse_policy("  p = f32 ,c= bf16 , o =f32, reduce = bf16 ") == parse_policy("p=f32,c=bf16,o=f32,reduce=bf16")
    assert parse_policy(" mixed_float16 ") == PRESETS["mixed_float16"]


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "float32": "p=f32,c=f32,o=f32,matmul=F32_F32_F32",
        "tensorfloat32": "p=f32,c=f32,o=f32,matmul=TF32_TF32_F32",
        "mixed_bfloat16": "p=f32,c=bf16,o=f32",
        "bf16-mixed": "p=f32,c=bf16,o=f32",
        "mixed_float16": "p=f32,c=f16,o=f32",
        "16-mixed": "p=f32,c=f16,o=f32",
        "bfloat16": "p=bf16,c=bf16,o=bf16",
        "float16": "p=f16,c=f16,o=f16",
    }.items(),
)
def test_presets(name, expected):
    assert str(parse_policy(name)) == expected
    assert PRESETS[name] == parse_policy(expected)


def test_the_setting_bfloat16_is_not_ignored_b8():
    assert triple(parse_policy("bfloat16")) == (jnp.dtype(jnp.bfloat16),) * 3


@st.composite
def policies(draw):
    dtype = st.sampled_from(DTYPES)
    compute = draw(dtype)
    return Policy(
        draw(dtype),
        compute,
        draw(dtype),
        grad=draw(st.sampled_from([jnp.dtype("float32"), compute])),
        reduce=draw(st.sampled_from([jnp.float32, jnp.bfloat16])),
        matmul=draw(st.sampled_from(list(DotAlgorithmPreset))),
    )


@given(policies())
def test_parse_of_str_is_the_same_policy(policy):
    assert parse_policy(str(policy)) == policy
    assert parse_policy(str(policy).replace(",", " , ").replace("=", " = ")) == policy
    assert hash(parse_policy(str(policy))) == hash(policy)


@pytest.mark.parametrize("preset", PRESETS)
def test_fields_may_follow_a_preset(preset):
    policy = parse_policy(f"{preset}, reduce=bf16, matmul=bf16_bf16_f32")
    assert triple(policy) == triple(PRESETS[preset])
    assert policy.reduce == jnp.bfloat16
    assert policy.matmul == DotAlgorithmPreset.BF16_BF16_F32
    assert parse_policy(f"{preset},o=f16").output_dtype == jnp.float16


def test_dtypes_of_numpy_jax_and_strings_are_one_policy_b6():
    ways = [
        (jnp.float32, jnp.float16, jnp.bfloat16),
        ("float32", "float16", "bfloat16"),
        (np.float32, np.float16, ml_dtypes.bfloat16),
        (np.dtype("float32"), np.dtype("float16"), np.dtype("bfloat16")),
    ]
    made = [Policy(*way) for way in ways]
    assert len(set(made)) == 1
    assert {str(policy) for policy in made} == {"p=f32,c=f16,o=bf16"}
    assert isinstance(made[0], jmp.Policy)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mixed_flaot16", ["'mixed_flaot16'", "did you mean 'mixed_float16'?"]),
        ("flaot32", ["did you mean 'float32'?"]),
        ("fp16", ["did you mean 'mixed_float16', with float32 master weights, or 'float16', without?"]),
        ("AMP", ["did you mean 'mixed_float16', with float32 master weights"]),
        ("p=f32, mixed_float16", ["'mixed_float16' is not a field", "rules for modules end with ;"]),
        ("p=f32,c=bf17", ["'bf17' is no dtype", "did you mean 'bf16'?"]),
        ("p=f32,compte=f16", ["'compte=f16'", "did you mean 'compute'?"]),
        ("mixed_float16, reduc=f32", ["did you mean 'reduce'?"]),
        ("mixed_float16,matmul=F32_F32_F23", ["no dot algorithm", "did you mean 'F32_F32_F32'?"]),
        ("p=f32,p=f16", ["'p' is given twice"]),
        ("p=f32,params=f16", ["given twice"]),
        ("p=f32,", ["KEY=VALUE"]),
        ("p=f32,f16", ["'f16' is not a field"]),
        ("", ["expected one of"]),
        ("p=i32", ["'i32' is no dtype"]),
        ("mixed_bfloat16,grad=f16", ["grad=f16", "f32", "bf16"]),
        ("mixed_float16,reduce=f16", ["reduce=f16", "bf16"]),
    ],
)
def test_errors_name_the_value_and_the_nearest_name(text, words):
    with pytest.raises(InputError) as error:
        parse_policy(text)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("dtype", ["int32", "bool", "float8_e4m3fn", "complex64"])
def test_only_floats_of_two_bytes_or_more_make_a_policy(dtype):
    with pytest.raises(InputError, match=dtype):
        Policy("float32", dtype, "float32")


def test_gradients_are_never_reduced_in_float16_t3():
    with pytest.raises(InputError, match="reduce=f16"):
        Policy("float32", "float16", "float32", reduce="float16")


UNTOUCHED = {
    "int": jnp.arange(3),
    "uint8": np.arange(3, dtype=np.uint8),
    "bool": jnp.array([True, False]),
    "key": jax.random.key(0),
    "raw_key": jax.random.key_data(jax.random.key(0)),
    "float0": np.zeros(2, jax.dtypes.float0),
    "e4m3": jnp.ones(2, jnp.float8_e4m3fn),
    "e5m2": np.ones(2, ml_dtypes.float8_e5m2),
    "complex": jnp.ones(2, jnp.complex64),
    "python_float": 1.5,
    "python_int": 3,
    "flag": True,
    "text": "relu",
    "function": jnp.tanh,
}


@pytest.mark.parametrize("cast", ["cast_to_param", "cast_to_compute", "cast_to_output"])
def test_casts_leave_what_is_no_float_alone_b4_b5(cast):
    policy = Policy("bfloat16", "float16", "float16")
    out = getattr(policy, cast)(UNTOUCHED)
    assert all(out[name] is leaf for name, leaf in UNTOUCHED.items())
    assert not any(is_castable(leaf) for leaf in UNTOUCHED.values())


@given(
    st.recursive(
        st.sampled_from([jnp.ones(2, dtype) for dtype in DTYPES[:3]] + [np.float32(1), *UNTOUCHED.values()]),
        lambda children: st.lists(children, max_size=3) | st.dictionaries(st.sampled_from("abc"), children),
        max_leaves=6,
    ),
    st.sampled_from(DTYPES[:3]),
)
def test_casts_keep_the_structure_and_are_idempotent(tree, dtype):
    once = cast_floats(tree, dtype)
    assert jax.tree.structure(once) == jax.tree.structure(tree)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(once) if is_castable(leaf))
    twice = cast_floats(once, dtype)
    assert all(a is b for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True))


def test_each_cast_goes_to_its_own_dtype():
    policy, x = Policy("bfloat16", "float16", "float32"), np.ones(2, np.float64)
    assert policy.cast_to_param(x).dtype == jnp.bfloat16
    assert policy.cast_to_compute(x).dtype == jnp.float16
    assert policy.cast_to_output(x).dtype == jnp.float32


def test_traced_values_are_cast_like_arrays():
    out = jax.eval_shape(lambda x: cast_floats({"x": x, "n": 1.0}, jnp.float16)["x"], jnp.ones(3))
    assert out.dtype == jnp.float16


@pytest.mark.parametrize(
    ("text", "scaled"),
    [
        ("mixed_float16", True),
        ("float16", True),
        ("p=f32,c=f32,o=f16", True),
        ("mixed_bfloat16", False),
        ("f32", False),
    ],
)
def test_float16_anywhere_wants_a_loss_scale(text, scaled):
    assert parse_policy(text).wants_scaling is scaled


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "precision None: expected text such as 'mixed_float16'"),
        (parse_policy("float16"), r"or str\(policy\) for a Policy"),
        ("a=float32; mixed_float16", r"jaxmp\.PolicyTree\.parse"),
    ],
)
def test_what_is_not_the_text_of_one_policy_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        parse_policy(given)
