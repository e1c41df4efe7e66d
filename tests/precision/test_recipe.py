from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmp.errors import InputError
from jaxmp.precision.policy import Policy, parse_policy
from jaxmp.precision.policy_tree import PolicyTree
from jaxmp.precision.recipe import PRODUCTS, RECIPES, ROLES, Level, Product, Recipe, parse_operand

OPERANDS = [
    "high",
    "mxfp8",
    "mxfp4:rceil",
    "nvfp4",
    "nvfp4_16x16",
    "e4m3:tensor",
    "e5m2",
    "bf16",
    "e4m3:delayed",
    "int8:delayed",
    "int8",
]


@st.composite
def recipes(draw):
    # The operands of one role share a history, so that they have one delayed format.
    delayed = draw(st.sampled_from([name for name in OPERANDS if ":delayed" in name]))
    operand = st.sampled_from([name for name in OPERANDS if ":delayed" not in name or name == delayed])
    operand = operand.map(parse_operand)
    product = st.builds(Product, operand, operand, st.sampled_from([0, 2, 16, 128]))
    levels = st.sampled_from(["", "f32:128", "e8m13:32/f32:128", "f16:1/f16:64"])
    accumulate = [
        Level(parse_operand(f), int(n)) for f, _, n in (x.partition(":") for x in draw(levels).split("/") if x)
    ]
    made = Recipe(*(draw(product) for _ in PRODUCTS), accumulate=tuple(accumulate) or (Level(parse_operand("f32"), 1),))
    rounded = {name for each in made.operands() if each.format is not None for name in (each.role, each.product)}
    stochastic = draw(st.lists(st.sampled_from(sorted(rounded)), unique=True)) if rounded else []
    return Recipe(made.fprop, made.dgrad, made.wgrad, tuple(stochastic), made.accumulate)


@given(recipes(), st.sampled_from(["float32", "bfloat16"]))
def test_parse_of_str_is_the_same_policy(recipe, compute):
    policy = Policy("float32", compute, "float32", recipe=recipe)
    assert parse_policy(str(policy)) == policy
    assert parse_policy(str(policy).replace(",", " , ").replace("=", " = ")) == policy
    tree = PolicyTree.parse(f"head=float32; encoder/*={policy}; nvfp4")
    assert PolicyTree.parse(str(tree)) == tree == PolicyTree.from_json(tree.to_json())


@pytest.mark.parametrize("name", RECIPES)
def test_a_preset_is_a_precision_and_its_own_spelled_out_text(name):
    policy = parse_policy(name)
    assert policy.recipe == RECIPES[name] and str(policy).endswith(f",recipe={name}")
    written = ",".join(f"{key}={value}" for key, value in RECIPES[name].fields().items())
    assert parse_policy(f"float32,{written}") == policy
    assert policy.wants_scaling is False


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nvfp4,hadamard=none", "recipe=nvfp4,hadamard=none"),
        ("nvfp4, stochastic = none", "recipe=nvfp4,stochastic=none"),
        ("c=bf16,recipe=mxfp8,stochastic=gradients", "recipe=mxfp8,stochastic=gradients"),
        ("fprop=mxfp8", "fprop=mxfp8_e4m3/mxfp8_e4m3,dgrad=high/high,wgrad=high/high"),
        ("mxfp8,accumulate=e8m13:32/float32:128", "recipe=mxfp8,accumulate=e8m13:32/f32:128"),
        ("mxfp8,hadamard=wgrad:16/dgrad:32", "recipe=mxfp8,hadamard=dgrad:32/wgrad:16"),
        ("nvfp4,fprop=nvfp4,dgrad=nvfp4", "fprop=nvfp4/nvfp4,dgrad=nvfp4/nvfp4,wgrad=nvfp4/nvfp4,stochastic=gradients,"
         "hadamard=wgrad:16"),
    ],
)  # fmt: skip
def test_a_recipe_is_spelled_in_its_shortest_form(text, expected):
    assert str(parse_policy(text)).partition(",o=")[2].partition(",")[2].removeprefix("matmul=F32_F32_F32,") == expected


def test_an_operand_is_stochastic_by_its_role_or_its_product():
    recipe = parse_policy("mxfp8,stochastic=gradients/fprop").recipe
    assert recipe.stochastic == ("gradients", "fprop")
    found = {(each.product, each.role) for each in recipe.operands() if each.rounding == "stochastic"}
    assert found == {("fprop", "activations"), ("fprop", "weights"), ("dgrad", "gradients"), ("wgrad", "gradients")}


def test_only_gradients_without_a_scale_of_their_own_want_a_loss_scale():
    assert parse_policy("fprop=e4m3,dgrad=e5m2/e4m3").wants_scaling
    assert not parse_policy("fprop=e4m3,dgrad=bf16/e4m3").wants_scaling
    assert not parse_policy("fprop=e4m3,dgrad=e5m2:delayed/e4m3").wants_scaling


BAD = {
    "nvfp4,hadamard=24": ("hadamard=24: expected a power of two", "did you mean 16 or 32?"),
    "nvfp4,hadamard=wgrd:16": ("hadamard=wgrd:16", "did you mean 'wgrad'?"),
    "mxfp8,fprop=mxfp4:rcel": ("scale rule", "did you mean 'rceil'?"),
    "fprop=e4m3:delayd": ("fprop=e4m3:delayd", "did you mean 'delayed'?"),
    "fprop=mxfp8:delayed": ("blocks have scales of their own", "e4m3:delayed"),
    "fprop=mxfp8/mxfp8/mxfp8": ("activations", "weights"),
    "recipe=nvfp": ("recipe=nvfp", "did you mean 'nvfp4'?"),
    "nvfp44": ("'nvfp44' is no preset", "did you mean 'nvfp4'?"),
    "c=mxfp8": ("'mxfp8' is a block format, not a dtype", "fprop=mxfp8"),
    "c=e4m3,fprop=mxfp8": ("beside fprop=mxfp8_e4m3", "expected one of them"),
    "mxfp8,stochastic=gradient": ("stochastic=gradient", "did you mean 'gradients'?"),
    "fprop=mxfp8,stochastic=gradients": ("no operand of gradients is rounded",),
    "mxfp8,accumulate=e8m13:32/f32:100": ("100 terms are no multiple of the 32",),
    "mxfp8,accumulate=f32": ("accumulate=f32", "f32:128"),
    "mxfp8,accumulate=f32:0": ("expected 1 or more terms",),
    "mxfp8,hadamrd=16": ("'hadamrd=16' is not a field", "did you mean 'hadamard'?"),
    "mxfp8,fprop=mxfp8,fprop=mxfp4": ("'fprop' is given twice",),
    "mxfp8,p=f64,c=f64": ("emulated in float32",),
    "c=bf16,grad=bf16,recipe=mxfp8": ("grad=bf16", "grad=f32"),
    "fprop=high": ("rounds no operand", "mxfp8"),
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_bad_input_is_one_message_with_the_nearest_valid_name(text):
    with pytest.raises(InputError) as error:
        parse_policy(text)
    for part in BAD[text]:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_roles_and_products_have_no_name_in_common():
    assert not set(ROLES) & set(PRODUCTS)
