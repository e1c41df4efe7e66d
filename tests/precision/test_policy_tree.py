from __future__ import annotations

import functools
import re
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxmp
from jaxmp.cli import main
from jaxmp.errors import InputError
from jaxmp.modules.linen import cast_to_param, explain, with_policy
from jaxmp.precision.policy import PRESETS, parse_policy
from jaxmp.precision.policy_tree import PolicyTree, Rule, as_tree

KEY = jax.random.key(0)

# --- text


names = st.sampled_from(["encoder", "head", "layer_0", "*", "**", "Dense_*"])
patterns = st.one_of(
    st.lists(names, min_size=1, max_size=3).map("/".join),
    st.sampled_from(["LayerNorm", "Dense", "MyBlock"]).map("@{}".format),
)
policies = st.one_of(st.sampled_from(sorted(PRESETS)), st.just("p=f32,c=e4m3/e5m2")).map(parse_policy)
trees = st.builds(
    PolicyTree,
    st.lists(st.builds(Rule, patterns, policies), max_size=4, unique_by=lambda rule: rule.pattern).map(tuple),
    policies,
)


@given(trees)
def test_a_tree_is_what_its_text_and_its_json_say(tree):
    assert PolicyTree.parse(str(tree)) == tree
    assert PolicyTree.from_json(tree.to_json()) == tree


def test_the_last_segment_is_the_default_and_the_others_are_rules():
    tree = PolicyTree.parse("head=float32; @LayerNorm = float32 ;encoder/*=mixed_bfloat16; p=f32, c=f16, o=f32")
    assert [rule.pattern for rule in tree.rules] == ["head", "@LayerNorm", "encoder/*"]
    assert tree.default == parse_policy("mixed_float16")
    assert PolicyTree.parse("mixed_float16") == PolicyTree((), parse_policy("mixed_float16"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ends without a default"),
        ("head=float32;", "ends without a default"),
        ("head=float32", r"The last segment is the policy for all else: head=float32; mixed_float16"),
        ("head; float32", "'head' is no rule; expected PATTERN=POLICY"),
        ("=float32; float32", "'=float32' is no rule"),
        ("head=mixed_float61; float32", "'mixed_float61' is no preset.*did you mean 'mixed_float16'"),
        ("head=float32; mixed_float61", "'mixed_float61' is no preset.*did you mean 'mixed_float16'"),
        ("a//b=float32; float32", "'a//b' is no pattern"),
        ("/a=float32; float32", "'/a' is no pattern"),
        ("@=float32; float32", "'@' is no pattern"),
        ("@a/b=float32; float32", "'a/b' is not the name of a class"),
        ("a b=float32; float32", "'a b' is no pattern"),
        ("a=float32; a=mixed_float16; float32", "rule a=.*c=f16.* can never match: a=p=f32"),
        ("a=p=f32,c=bf16,reduce=bf16; float32", "one collective; give reduce= in the default"),
        ("a=c=e9m9; float32", "float format e9m9: expected 2 to 8 exponent bits"),
        ("a=c=e4m3/e5m; float32", "'e5m'"),
        ("a=mixed_bfloat16,grad=f16; float32", "grad=f16"),
    ],
)
def test_a_malformed_tree_is_one_message_with_the_place(text, message):
    with pytest.raises(InputError, match=message):
        PolicyTree.parse(text)


# --- which rule


@pytest.mark.parametrize(
    ("pattern", "path", "covered"),
    [
        ("encoder", "encoder", True),
        ("encoder", "encoder/layer_0/mlp", True),
        ("encoder", "decoder/encoder", False),
        ("encoder", "encoder_2", False),
        ("encoder/*", "encoder", False),
        ("encoder/*", "encoder/layer_0", True),
        ("encoder/*/mlp", "encoder/layer_0/mlp/Dense_0", True),
        ("encoder/*/mlp", "encoder/a/b/mlp", False),
        ("**/mlp", "encoder/a/b/mlp", True),
        ("**/mlp", "mlp/x", True),
        ("layer_?", "layer_3", True),
        ("layer_[01]", "layer_2", False),
        ("*", "", False),
    ],
)
def test_a_path_pattern_covers_what_it_names_and_all_below(pattern, path, covered):
    tree = PolicyTree.parse(f"{pattern}=float32; mixed_float16")
    assert (tree.lookup(path) == parse_policy("float32")) is covered


def test_the_first_rule_that_matches_wins_be_it_above_or_below():
    tree = PolicyTree.parse("a/b=bfloat16; a=float32; a/b/c=float16; mixed_float16")
    assert tree.lookup("a/b/c") == parse_policy("bfloat16")
    assert tree.lookup("a/x") == parse_policy("float32")


class Norm(nn.LayerNorm):
    """A class of one's own is what its bases are."""


class Block(nn.Module):
    features: int = 4

    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(self.features)(Norm()(x))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="stem")(x)
        x = Block(name="block_0")(x)
        x = Block(name="block_1")(x)
        return nn.Dense(3, name="head", dtype=jnp.bfloat16)(x)


X = jnp.linspace(-1, 1, 10).reshape(2, 5)


def outputs(model, text, x=X):
    """The dtype that each module hands on, by path, and the model itself."""
    variables = jax.eval_shape(model.init, KEY, x)
    apply = with_policy(model.apply, PolicyTree.parse(text))
    out, state = jax.eval_shape(
        functools.partial(apply, capture_intermediates=True, mutable=["intermediates"]), variables, x
    )
    flat = jax.tree_util.tree_leaves_with_path(state["intermediates"])
    named = {"/".join(key.key for key in path[:-2]): leaf.dtype.name for path, leaf in flat}
    return named | {"": out.dtype.name}


def test_a_class_pattern_covers_subclasses_and_all_below_them():
    rows = {row.module: row for row in explain(Net(), PolicyTree.parse("@LayerNorm=float32; mixed_float16"), X)}
    assert rows["block_0/Norm_0"].rule == "@LayerNorm" and rows["block_0/Dense_0"].rule == ""
    rows = {row.module: row for row in explain(Net(), PolicyTree.parse("@Block=bfloat16; float32"), X)}
    assert {path for path, row in rows.items() if row.rule} == {path for path in rows if path.startswith("block_")}
    assert outputs(Net(), "@LayerNorm=float32; mixed_float16")["block_0/Norm_0"] == "float32"
    assert outputs(Net(), "mixed_float16")["block_0/Norm_0"] == "float16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("haed=float32; mixed_float16", "rule haed=.* matches no module; there are block_0, .*; did you mean 'head'"),
        ("@LayerNrom=float32; mixed_float16", "@Block, @Dense, .*; did you mean '@LayerNorm'"),
        ("block_0/head=float32; mixed_float16", "matches no module"),
    ],
)
def test_a_rule_that_matches_nothing_is_an_error_with_the_nearest(text, message):
    tree = PolicyTree.parse(text)
    with pytest.raises(InputError, match=message):
        jaxmp.explain(Net(), tree, X)
    variables = jax.eval_shape(Net().init, KEY, X)
    with pytest.raises(InputError, match=message):
        jax.eval_shape(with_policy(Net().apply, tree), variables, X)


class Auxiliary(nn.Module):
    """A head that only training calls."""

    @nn.compact
    def __call__(self, x, train: bool):
        y = nn.Dense(2, name="main")(x)
        if train or self.is_initializing():
            y = y + nn.LayerNorm(name="aux")(x).sum()
        return y


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["aux", "@LayerNorm"])
def test_a_rule_for_what_only_training_calls_is_no_error_in_evaluation(rule):
    variables = Auxiliary().init(KEY, X, train=True)
    apply = with_policy(Auxiliary().apply, PolicyTree.parse(f"{rule}=float32; mixed_float16"))
    assert apply(variables, X, train=False).dtype == jnp.float32


def test_a_model_without_a_float_is_refused():
    class Counter(nn.Module):
        def __call__(self, x):
            return x + self.get_variable("stats", "n")

    with pytest.raises(InputError, match="neither the variables nor the inputs of the model hold a float"):
        with_policy(Counter().apply, parse_policy("mixed_float16"))({"stats": {"n": 1}}, jnp.arange(3))


# --- what runs in which dtype


def test_output_dtypes_act_where_a_rule_names_a_module_and_nowhere_below():
    found = outputs(Net(), "block_0=p=f32,c=bf16,o=f32; block_1=p=f32,c=bf16; mixed_float16")
    assert found["block_0/Dense_0"] == found["block_1/Dense_0"] == "bfloat16"
    assert found["block_0"] == "float32" and found["block_1"] == "bfloat16"
    assert found["stem"] == found["head"] == "float16" and found[""] == "float32"


def products(function, *args):
    """Operand dtypes of each product of a function, in order, inner jaxprs included."""
    found = dots(jax.make_jaxpr(function)(*args).jaxpr)
    return ["/".join(sorted({v.aval.dtype.name for v in equation.invars})) for equation in found]


def dots(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from dots(inner)


def test_every_product_runs_in_its_own_policy_forward_and_backward():
    variables = jax.eval_shape(Net().init, KEY, X)
    apply = with_policy(Net().apply, PolicyTree.parse("block_*=mixed_bfloat16; head=float32; mixed_float16"))
    assert products(apply, variables, X) == ["float16", "bfloat16", "bfloat16", "float32"]
    backward = jax.grad(lambda v: apply(v, X).sum())
    assert sorted(products(backward, variables)) == ["bfloat16"] * 6 + ["float16"] * 2 + ["float32"] * 3


class OwnArithmetic(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("w", nn.initializers.ones, (x.shape[-1], 2))


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return OwnArithmetic(name="second")(OwnArithmetic(name="first")(x))


def test_a_module_that_knows_of_no_dtype_gets_inputs_and_parameters_in_its_own():
    variables = jax.eval_shape(Outer().init, KEY, X)
    apply = with_policy(Outer().apply, PolicyTree.parse("second=mixed_bfloat16; float32"))
    assert products(apply, variables, X) == ["float32", "bfloat16"]


def test_an_input_that_reaches_a_wider_module_as_it_came_is_not_rounded_on_the_way():
    variables = {"params": {"first": {"w": jnp.ones((5, 2))}, "second": {"w": jnp.ones((2, 2))}}}
    x = jnp.full((1, 5), 1 + 2.0**-20)
    apply = with_policy(Outer().apply, PolicyTree.parse("first=float32; second=float32; mixed_bfloat16"))
    assert jax.jit(apply)(variables, x)[0, 0] == 10 * (1 + 2.0**-20)


class Layers(nn.Module):
    """scan over remat, vmap and jit."""

    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return Block(x.shape[-1], name="block")(x), None

        layers = nn.scan(nn.remat(Step), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers(name="layers")(x, None)
        heads = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
        x = heads(4, name="heads")(x).mean(0)
        return nn.jit(nn.Dense)(3, name="last")(x)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("layers/block", ["bfloat16", "float16", "float16"]),
        ("@Block", ["bfloat16", "float16", "float16"]),
        ("layers", ["bfloat16", "float16", "float16"]),
        ("heads", ["float16", "bfloat16", "float16"]),
        ("last", ["float16", "float16", "bfloat16"]),
        ("**/Dense_0", ["bfloat16", "float16", "float16"]),
    ],
)
def test_rules_reach_into_lifted_modules(rule, expected):
    variables = jax.eval_shape(Layers().init, KEY, X)
    apply = with_policy(Layers().apply, PolicyTree.parse(f"{rule}=p=f32,c=bf16,o=f16; mixed_float16"))
    assert products(apply, variables, X) == expected


class Scanned(nn.Module):
    """A residual block under nn.scan: what comes out of a turn goes into the next."""

    @nn.compact
    def __call__(self, x):
        class Residual(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.Dense(x.shape[-1])(nn.LayerNorm()(x)), None

        layers = nn.scan(Residual, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


@pytest.mark.parametrize("rule", ["layers", "layers/Dense_0", "@Residual"])
@pytest.mark.parametrize(("policy", "dtype"), [("float32", "float32"), ("mixed_bfloat16", "bfloat16")])
def test_the_carry_of_a_scanned_block_keeps_its_dtype_under_any_rule(rule, policy, dtype):
    variables = jax.eval_shape(Scanned().init, KEY, X)
    apply = with_policy(Scanned().apply, f"{rule}={policy}; mixed_float16")
    assert products(apply, variables, X) == [dtype]


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.RNN(nn.SimpleCell(4), name="rnn")(x))


@pytest.mark.parametrize("rule", ["rnn", "@RNN", "@SimpleCell"])
def test_the_cell_of_an_rnn_belongs_to_it_though_it_stands_beside_it(rule):
    x = jnp.ones((2, 5, 3))
    variables = jax.eval_shape(Recurrent().init, KEY, x)
    apply = with_policy(Recurrent().apply, f"{rule}=mixed_bfloat16; mixed_float16")
    assert sorted(products(apply, variables, x)) == ["bfloat16", "bfloat16", "float16"]
    rows = {row.module: row.policy for row in explain(Recurrent(), f"{rule}=mixed_bfloat16; mixed_float16", x)}
    assert rows["SimpleCell_0/h"] == "p=f32,c=bf16,o=f32" and rows["Dense_0"] == "p=f32,c=f16,o=f32"


class Given(nn.Module):
    """Calls a module that it was given, which stands elsewhere."""

    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.inner(nn.Dense(5)(x))


class Shared(nn.Module):
    def setup(self):
        self.shared = OwnArithmetic()
        self.head = Given(self.shared)

    def __call__(self, x):
        return self.head(x)


def test_a_module_runs_under_its_own_policy_whoever_calls_it():
    variables = jax.eval_shape(Shared().init, KEY, X)
    apply = with_policy(Shared().apply, "head=float32; mixed_float16")
    assert products(apply, variables, X) == ["float32", "float16"]
    found = [e.params["precision"] for e in dots(jax.make_jaxpr(apply)(variables, X).jaxpr)]
    assert found == [(jax.lax.Precision.HIGHEST,) * 2, None]
    with jax.default_matmul_precision("high"):  # what a policy leaves to JAX is left to what was in force
        found = [e.params["precision"] for e in dots(jax.make_jaxpr(apply)(variables, X).jaxpr)]
    assert found == [(jax.lax.Precision.HIGHEST,) * 2, (jax.lax.Precision.HIGH,) * 2]


def test_a_rule_that_another_always_beats_is_refused():
    with pytest.raises(InputError, match=r"rule head=.* never wins: \*=.* stands before it"):
        explain(Net(), "*=float32; head=mixed_bfloat16; mixed_float16", X)


def test_a_cell_named_by_a_rule_keeps_its_carry_and_casts_its_inputs_and_outputs():
    model, x = nn.RNN(nn.LSTMCell(4), name="rnn"), jnp.ones((2, 5, 6))
    variables = jax.eval_shape(model.init, KEY, x)
    apply = with_policy(model.apply, PolicyTree.parse("@LSTMCell=p=f32,c=bf16,o=f16; float32"))
    assert set(products(apply, variables, x)) == {"bfloat16"}


def test_a_rule_for_the_class_of_the_model_itself_is_a_rule_for_all_of_it():
    assert outputs(Net(), "@Net=p=f32,c=bf16,o=bf16; mixed_float16")[""] == "bfloat16"
    assert outputs(Net(), "@Net=p=f32,c=bf16,o=bf16; mixed_float16")["stem"] == "bfloat16"


def test_true_float32_and_tensorfloat32_are_in_force_where_their_rules_are():
    variables = jax.eval_shape(Net().init, KEY, X)
    apply = with_policy(Net().apply, PolicyTree.parse("stem=tensorfloat32; block_0=p=f32; float32"))
    found = [e.params["precision"] for e in dots(jax.make_jaxpr(apply)(variables, X).jaxpr)]
    high, highest = jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST
    assert found == [(high, high), None, (highest, highest), (highest, highest)]


# --- parameters


@pytest.mark.slow
def test_a_rule_may_keep_its_parameters_in_half():
    params = Net().init(KEY, X)["params"]
    cast = cast_to_param(Net(), PolicyTree.parse("@Block=bfloat16; mixed_float16"), params, X)
    dtypes = {"/".join(k.key for k in path): x.dtype for path, x in jax.tree_util.tree_leaves_with_path(cast)}
    assert {dtype for path, dtype in dtypes.items() if path.startswith("block_")} == {jnp.dtype("bfloat16")}
    assert {dtype for path, dtype in dtypes.items() if not path.startswith("block_")} == {jnp.dtype("float32")}


# --- explain


def test_explain_shows_policy_rule_and_the_dtype_that_gives_way():
    tree = PolicyTree.parse("head=float32; @LayerNorm=float32; mixed_float16")
    rows = jaxmp.explain(Net(), tree, {"image": X, "label": jnp.zeros(2)})
    by_path = {row.module: row for row in rows}
    assert by_path["head"].rule == "head" and by_path["head"].own_dtype == "bfloat16"
    assert by_path["stem"].rule == "" and by_path["stem"].own_dtype == ""
    assert outputs(Net(), "mixed_float16")["head"] == "float16"
    text = str(rows)
    assert re.search(r"^head +Dense +15 +p=f32,c=f32,o=f32,\S+ \(not bfloat16\) +head$", text, re.MULTILINE)
    assert re.search(r"^stem +Dense +24 +p=f32,c=f16,o=f32 +\(default\)$", text, re.MULTILINE)
    with pytest.raises(InputError, match="the batch has no 'imgae'; it has image; did you mean 'image'"):
        jaxmp.explain(Net(), tree, {"image": X}, inputs=("imgae",))


# --- cost


def transformer(depth=2):
    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(32)(x)))

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
            return x + Mlp(name="mlp")(nn.LayerNorm()(x))

    class Transformer(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(50, 16, name="embed")(ids)
            for i in range(depth):
                x = Layer(name=f"layer_{i}")(x)
            return nn.Dense(50, name="head")(nn.LayerNorm()(x))

    return Transformer(), jnp.ones((2, 7), int)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(4):
            x = nn.relu(nn.Dense(8)(x))
        return nn.Dense(3, name="head")(x)


def casts(model, x, text):
    """Casts between floats in the StableHLO of a gradient, and the leaves of the parameters."""
    params = jax.eval_shape(model.init, KEY, x)["params"]
    apply = with_policy(model.apply, PolicyTree.parse(text))
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(apply({"params": params}, x).astype(jnp.float32))))
    text = gradient.lower(params).as_text()
    found = re.findall(r"stablehlo.convert .*\(tensor<\S*f(?:32|16)>\) -> tensor<\S*f(?:32|16)>", text)
    return len(found), len(jax.tree.leaves(params))


@pytest.mark.few_variants
@pytest.mark.parametrize(
    ("case", "text", "edges"),
    [
        # The edges where the dtype changes, the model's input (a constant) and output included.
        ("mlp", "float32", 0),
        ("mlp", "mixed_bfloat16", 1),
        ("mlp", "head=float32; mixed_bfloat16", 1),
        ("mlp", "Dense_2=float32; mixed_bfloat16", 3),
        # Two for each of 5 norms and for each of 2 softmaxes, which are in float32 in any case; one output.
        ("transformer", "mixed_bfloat16", 2 * 5 + 2 * 2 + 1),
        ("transformer", "head=float32; @LayerNorm=float32; mixed_bfloat16", 2 * 5 + 2 * 2 + 1),
    ],
)
def test_a_tree_adds_at_most_two_casts_a_parameter_and_two_a_changed_edge(case, text, edges):
    model, x = (MLP(), X) if case == "mlp" else transformer()
    found, parameters = casts(model, x, text)
    assert found <= 2 * parameters + 2 * edges
    assert (found == 0) == (text == "float32")


@pytest.mark.full_size
def test_tracing_under_a_tree_takes_at_most_half_as_long_again():
    model, x = transformer(8)
    params = jax.jit(model.init)(KEY, x)["params"]
    tree = PolicyTree.parse("head=float32; @LayerNorm=float32; layer_3/**=mixed_float16; mixed_bfloat16")

    def seconds(apply):
        jax.clear_caches()
        began = time.process_time()
        jax.jit(jax.grad(lambda params: jnp.sum(apply({"params": params}, x).astype(jnp.float32)))).trace(params)
        return time.process_time() - began

    applies = model.apply, with_policy(model.apply, tree)
    rounds = [[seconds(apply) for apply in applies] for _ in range(6)]
    plain, under_tree = np.min(rounds, axis=0)
    assert under_tree <= 1.5 * plain


# --- from the command line


MY_OWN = """
import flax.linen as nn
import numpy as np
from jaxmp import Arrays, Experiment, Loop

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.LayerNorm()(nn.Dense(4, name="body")(x)))

def load(split):
    rng = np.random.default_rng(0)
    return {"image": rng.normal(size=(32, 3)).astype(np.float32), "label": rng.integers(0, 2, 32)}

def get_config():
    return Experiment(model=Net(), data=Arrays(load, batch_size=16, images=()), loop=Loop(steps=2))
"""


@pytest.mark.slow
def test_a_tree_is_a_precision_on_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "my.py").write_text(MY_OWN)
    monkeypatch.chdir(tmp_path)
    precision = ["--precision", "head=float32; @LayerNorm=bfloat16; mixed_bfloat16"]
    assert main(["train", "my.py", *precision, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^LayerNorm_0 +LayerNorm +8 +p=bf16,c=bf16,o=bf16 +@LayerNorm$", out, re.MULTILINE)
    assert main(["train", "my.py", *precision]) == 0
    assert "no float32 master weights" in capsys.readouterr().out
    assert main(["train", "my.py", "--precision", "haed=float32; mixed_bfloat16"]) == 2
    assert "rule haed=" in (error := capsys.readouterr().err) and "did you mean 'head'" in error
    assert [path.name for path in (tmp_path / "runs/my").iterdir()] == [next((tmp_path / "runs/my").iterdir()).name]


class Head(nn.Module):
    auxiliary: bool

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(x.shape[-1])(x)
        return (y, jnp.float32(0)) if self.auxiliary else y


class WithHead(nn.Module):
    auxiliary: bool
    remat: bool

    @nn.compact
    def __call__(self, x):
        head = nn.remat(Head) if self.remat else Head
        return head(self.auxiliary, name="head")(nn.Dense(x.shape[-1], name="body")(x))


@pytest.mark.parametrize("remat", [False, True])
def test_a_result_with_a_loss_beside_it_is_no_carry(remat):
    x = jnp.linspace(0.1, 1, 8).reshape(2, 4)
    variables = WithHead(False, remat).init(KEY, x)

    def result(auxiliary):
        apply = with_policy(WithHead(auxiliary, remat).apply, "head=float32; p=f32,c=bf16,o=f32")
        return jax.jit(apply)(variables, x)

    assert (result(True)[0] == result(False)).all()
    assert (result(False) != result(False).astype(jnp.bfloat16)).any()


class Turn(nn.Module):
    @nn.compact
    def __call__(self, h, x):
        h = nn.tanh(nn.Dense(h.shape[-1])(h) + nn.Dense(h.shape[-1])(x))
        return h, None


class Sequence(nn.Module):
    """Its carry begins in the dtype of its input, and only training calls its dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        turns = nn.scan(Turn, variable_broadcast="params", split_rngs={"params": False}, in_axes=1)
        h, _ = turns(name="turns")(jnp.zeros((x.shape[0], 4), x.dtype), x)
        return nn.Dropout(0.1, deterministic=False, name="drop")(h) if train else h


@pytest.mark.parametrize("rule", ["drop", "@Dropout"])
def test_a_rule_for_what_only_training_calls_holds_where_the_carry_has_the_dtype_of_the_input(rule):
    x = jnp.ones((2, 5, 3))
    variables = jax.eval_shape(Sequence().init, KEY, x)
    for train in (True, False):
        apply = functools.partial(with_policy(Sequence().apply, f"{rule}=float32; mixed_float16"), train=train)
        assert jax.eval_shape(apply, variables, x, rngs={"dropout": KEY}).dtype == jnp.float32
    with pytest.raises(InputError, match=r"nope=.* matches no module; there are drop, turns"):
        jax.eval_shape(with_policy(Sequence().apply, "nope=float32; mixed_float16"), variables, x)


@pytest.mark.parametrize("policy", [jnp.float16, None, 16, {"head": "float32"}])
def test_what_is_no_policy_is_refused(policy):
    with pytest.raises(InputError, match="expected a Policy, a PolicyTree, or text such as 'mixed_float16'"):
        as_tree(policy)
