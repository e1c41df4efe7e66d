"""Published weights, converted: the forward pass is that of `transformers`, torchvision and torch.

Weights and inputs are random numbers made from their names, so that they need not be kept. The slow tests compare with
these libraries where they are installed (Python 3.11, CPU builds; torch 2.13.0, torchvision 0.28.0, transformers
5.24.0). The others compare with what the libraries returned for small models, kept in vectors.json, which this makes:

    python tests/models/test_pretrained.py
"""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.errors import InputError
from jaxmp.models import pretrained
from jaxmp.models.resnet import ResNet, resnet18, resnet50
from jaxmp.models.rnn import SequenceClassifier
from jaxmp.models.transformer import BERT, GPT2, BERTClassifier, BERTMaskedLM, Llama
from jaxmp.models.vit import ViT

VECTORS = Path(__file__).parent / "vectors.json"


def array(name, shape):
    """Random numbers that depend on the name alone, of the size that such a weight has."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        return np.float32(1 + 0.1 * np.abs(normal))
    if len(shape) < 2:
        return np.float32(0.1 * normal + (name.endswith("weight") and "norm" in name.lower()))
    fan_in = min(shape) if len(shape) == 2 else np.prod(shape[1:])  # kernels are kept in both orders
    return np.float32(normal / np.sqrt(fan_in))


def weights(shapes):
    return {name: array(name, tuple(shape)) for name, shape in shapes.items() if "num_batches" not in name}


def tokens(rows, length, largest):
    return np.random.RandomState(0).randint(0, largest, (rows, length)).astype(np.int32)


def image(rows, size):
    return np.float32(np.random.RandomState(0).standard_normal((rows, size, size, 3)))


# --- the libraries


@functools.cache
def libraries():
    """torch, torchvision and transformers, which imports both; or the reason why not, a string."""
    try:
        import torch
    except ImportError as error:
        return f"needs the CPU build of torch, on Python 3.11: {error}"
    try:
        import torchvision
    except RuntimeError:
        # On the CPU build of torch, torchvision 0.28 lacks operations that it expects to be there.
        from torch import library as operations

        libraries.kept = operations.Library("torchvision", "DEF")
        for operation in ("nms", "qnms"):
            libraries.kept.define(f"{operation}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    import transformers

    return torch, torchvision, transformers


def bert(kind, config, outputs):
    def make(model):
        _, _, transformers = libraries()
        settings = transformers.BertConfig(
            vocab_size=model.vocabulary,
            max_position_embeddings=model.context,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            hidden_size=model.width,
            intermediate_size=model.hidden,
            attn_implementation="eager",
            **config,
        )
        module = getattr(transformers, kind)(settings)

        def call(tokens, mask, segments):
            out = module(input_ids=tokens, attention_mask=mask, token_type_ids=segments)
            return [out[name] for name in outputs]

        return module, call

    return make


def gpt2(model):
    _, _, transformers = libraries()
    module = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=model.vocabulary,
            n_positions=model.context,
            n_layer=model.layers,
            n_head=model.heads,
            n_embd=model.width,
            attn_implementation="eager",
        )
    )
    return module, lambda tokens: [module(input_ids=tokens).logits]


def llama(model):
    _, _, transformers = libraries()
    settings = {
        "vocab_size": model.vocabulary,
        "max_position_embeddings": model.context,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "hidden_size": model.width,
        "intermediate_size": model.hidden,
        "rms_norm_eps": model.epsilon,
        "tie_word_embeddings": model.tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope},
        "attn_implementation": "eager",
    }
    if model.qk_norm:
        head = model.width // model.heads
        module = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=head, **settings))
    else:
        module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    return module, lambda tokens: [module(input_ids=tokens).logits]


def resnet(model):
    _, torchvision, _ = libraries()
    kinds = torchvision.models.resnet
    block = kinds.BasicBlock if model.block == "basic" else kinds.Bottleneck
    module = kinds.ResNet(block, list(model.blocks), num_classes=model.classes)
    return module, lambda image: [module(image.permute(0, 3, 1, 2))]


def vit(model, size):
    _, torchvision, _ = libraries()
    module = torchvision.models.VisionTransformer(
        size, model.patch, model.layers, model.heads, model.width, 4 * model.width, num_classes=model.classes
    )
    return module, lambda image: [module(image.permute(0, 3, 1, 2))]


def recurrent(model):
    torch, _, _ = libraries()
    kind = {"simple": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[model.cell]
    module = kind(4, model.width, model.layers, batch_first=True, bidirectional=model.bidirectional)
    pack = functools.partial(torch.nn.utils.rnn.pack_padded_sequence, batch_first=True, enforce_sorted=False)

    def call(sequence, length):
        state = module(pack(sequence, length))[1]
        state = state[0] if model.cell == "lstm" else state
        return [torch.cat(list(state[-2:] if model.bidirectional else state[-1:]), dim=-1)]

    return module, call


# --- the cases


class Case(NamedTuple):
    model: Any
    convert: Any
    """a converter of jaxmp.models.pretrained"""
    make: Any
    """model -> (the library's module, function of the inputs that returns a list of outputs)"""
    inputs: tuple[np.ndarray, ...]


MASK = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]], np.int32)
TEXT = (tokens(2, 6, 10), MASK, MASK[::-1].copy())
SEQUENCE = (np.float32(np.random.RandomState(0).standard_normal((3, 5, 4))), np.array([5, 1, 3], np.int32))
SMALL = {"vocabulary": 10, "context": 8, "layers": 1, "heads": 2, "width": 16}
hidden_and_pooled = bert("BertModel", {}, ("last_hidden_state", "pooler_output"))
masked_lm = bert("BertForMaskedLM", {}, ("logits",))
vit_small = ViT(4, 1, 2, 16, 5)

LSTM2 = SequenceClassifier("lstm", 6, 2, bidirectional=True, classes=12)
CASES = {
    "bert": Case(BERT(hidden=24, **SMALL), pretrained.bert_from_transformers, hidden_and_pooled, TEXT),
    "gpt2": Case(GPT2(**SMALL | {"layers": 2}), pretrained.gpt2_from_transformers, gpt2, TEXT[:1]),
    "resnet": Case(ResNet((1, 1, 1, 1), classes=5), pretrained.resnet_from_torchvision, resnet, (image(2, 32),)),
    "vit": Case(vit_small, pretrained.vit_from_torchvision, functools.partial(vit, size=8), (image(2, 8),)),
    "lstm": Case(SequenceClassifier("lstm", 6, classes=6), pretrained.recurrent_from_torch, recurrent, SEQUENCE),
    "lstm_bidirectional": Case(LSTM2, pretrained.recurrent_from_torch, recurrent, SEQUENCE),
    "gru": Case(SequenceClassifier("gru", 6, 2, classes=6), pretrained.recurrent_from_torch, recurrent, SEQUENCE),
    "simple": Case(SequenceClassifier("simple", 6, classes=6), pretrained.recurrent_from_torch, recurrent, SEQUENCE),
    "llama": Case(Llama(kv_heads=1, hidden=24, **SMALL), pretrained.llama_from_transformers, llama, TEXT[:1]),
}
"""small models, whose outputs are kept"""

LONG = (tokens(2, 40, 30_000), np.repeat(MASK, [40] + 5 * [0], axis=1), np.zeros((2, 40), np.int32))
FULL = {
    "resnet18": Case(resnet18(), pretrained.resnet_from_torchvision, resnet, (image(2, 64),)),
    "resnet50": Case(resnet50(), pretrained.resnet_from_torchvision, resnet, (image(2, 64),)),
    "vit_b16": Case(ViT(), pretrained.vit_from_torchvision, functools.partial(vit, size=224), (image(1, 224),)),
    "bert_base": Case(BERT(), pretrained.bert_from_transformers, hidden_and_pooled, LONG),
    "gpt2_124m": Case(GPT2(), pretrained.gpt2_from_transformers, gpt2, LONG[:1]),
    "bert_masked_lm": Case(BERTMaskedLM(hidden=24, **SMALL), pretrained.bert_from_transformers, masked_lm, TEXT),
    "bert_classifier": Case(
        BERTClassifier(hidden=24, **SMALL, classes=3),
        pretrained.bert_from_transformers,
        bert("BertForSequenceClassification", {"num_labels": 3}, ("logits",)),
        TEXT,
    ),
    "llama_tied_qk_norm": Case(
        Llama(kv_heads=1, hidden=24, qk_norm=True, tied=True, rope=1e6, **SMALL),
        pretrained.llama_from_transformers,
        llama,
        TEXT[:1],
    ),
}
"""the published sizes, and what the small models leave out"""


def theirs(case):
    """The shapes of the library's weights, and its outputs."""
    module, call = case.make(case.model)
    torch, _, _ = libraries()
    shapes = {name: list(x.shape) for name, x in module.state_dict().items() if "num_batches" not in name}
    tied = {"lm_head.weight", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    if getattr(case.model, "tied", True):  # one array, by two names
        shapes = {name: shape for name, shape in shapes.items() if name not in tied}
    module.load_state_dict({name: torch.tensor(x) for name, x in weights(shapes).items()}, strict=False)
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    with torch.no_grad():
        module.eval()
        inputs = [torch.tensor(x.astype(np.int64) if x.dtype == np.int32 else x) for x in case.inputs]
        return shapes, [x.numpy() for x in call(*inputs)]


def ours(case, tensors):
    variables = case.convert(case.model, tensors)
    if isinstance(case.model, SequenceClassifier):  # the last state is what torch returns
        variables["params"]["head"] = {"kernel": np.eye(case.model.classes), "bias": np.zeros(case.model.classes)}
    return jax.tree.leaves(jax.jit(case.model.apply)(variables, *case.inputs))


def assert_equal(ours, theirs, *, within=1e-5):
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs, strict=True):
        y = np.asarray(y)
        assert x.shape == y.shape
        assert np.abs(y).max() > 0.1
        np.testing.assert_allclose(x, y, rtol=0, atol=within * max(1, np.abs(y).max()))


def kept():
    return json.loads(VECTORS.read_text())


QUICK = ("bert", "gpt2", "resnet", "vit", "lstm")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_small_model_returns_what_the_library_returned(name):
    vector = kept()[name]
    # GELU's two forms differ by less than 1e-5 here; many convolutions, from one JAX to the next, by more than 2e-6.
    within = 1e-5 if name == "resnet" else 2e-6
    assert_equal(ours(CASES[name], weights(vector["shapes"])), vector["outputs"], within=within)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *FULL])
def test_a_forward_pass_is_that_of_the_library(name):
    case = {**CASES, **FULL}[name]
    if isinstance(libraries(), str):
        pytest.skip(libraries())
    shapes, outputs = theirs(case)
    assert_equal(ours(case, weights(shapes)), outputs)


# --- files


def safetensors(tensors):
    """The bytes of a file of these arrays."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, x in tensors.items():
        dtype = {"float32": "F32", "bfloat16": "BF16", "int64": "I64"}[x.dtype.name]
        header[name] = {"dtype": dtype, "shape": x.shape, "data_offsets": [len(data), len(data) + x.nbytes]}
        data += x.tobytes()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


FEW = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.array([-2.5], jnp.bfloat16), "n": np.array(7)}


def test_a_safetensors_file_is_read_as_it_was_written(tmp_path):
    (tmp_path / "few").write_bytes(safetensors(FEW))
    read = pretrained.read_safetensors(tmp_path / "few")
    assert set(read) == set(FEW)
    for name, x in FEW.items():
        assert read[name].dtype == x.dtype
        np.testing.assert_array_equal(read[name], x)


@pytest.mark.slow
def test_a_safetensors_file_is_read_as_the_library_reads_it(tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="needs safetensors")
    library.save_file(FEW, tmp_path / "few", metadata={"format": "np"})
    read = pretrained.read_safetensors(tmp_path / "few")
    for name, x in library.load_file(tmp_path / "few").items():
        np.testing.assert_array_equal(read[name], x)
    assert set(read) == set(FEW)


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (safetensors(FEW)[:-1], "'n' should have 8 bytes, and has 7: the file is corrupt or cut off"),
        (safetensors(FEW)[:40], "begins with the size of a header"),
        (b"", "begins with the size of a header"),
        (b"PK\x03\x04 a zip file of pickles", "begins with the size of a header"),
        (safetensors(FEW).replace(b'"BF16"', b'"F4_E"'), "'b.c' is of dtype F4_E; expected one of F64, F32"),
        (
            safetensors(FEW).replace(b'"dtype": "BF16"', b'"dtypo": "BF16"'),
            "'b.c' is {'dtypo': 'BF16'.*; expected its dtype",
        ),
        (None, "no such file"),
    ],
    ids=["cut_off", "cut_off_header", "empty", "another_format", "dtype", "entry", "missing"],
)
def test_a_file_that_is_no_safetensors_file_is_refused(data, names, tmp_path):
    if data is not None:
        (tmp_path / "file").write_bytes(data)
    with pytest.raises(InputError, match=names):
        pretrained.read_safetensors(tmp_path / "file")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "change", "names"),
    [
        (
            CASES["gpt2"].model.clone(layers=3),
            {},
            "params/blocks_2/up/kernel is missing.* no tensor 'h.2.mlp.c_fc.weight'",
        ),
        (CASES["gpt2"].model.clone(layers=1), {}, "'h.1.attn.c_attn.bias' of the file has no place in the model"),
        (CASES["gpt2"].model.clone(width=8), {}, r"params/blocks_0/attention/key/bias is \[16\], expected \[8\]"),
        (CASES["gpt2"].model.clone(bias=False), {}, r"params/blocks_0/attention/key/bias is \[16\], expected none"),
        (CASES["gpt2"].model, {"transformer.ln_f.bias": None}, "params/norm/bias is missing, expected"),
        (CASES["gpt2"].model, {"transformer.wpe.weight": None}, r"no tensor 'wpe.weight'.*did you mean 'wte.weight'\?"),
        (CASES["gpt2"].model, {"transformer.wte.weight": np.zeros((10, 16), np.int8)}, "'wte.weight' is of dtype int8"),
        (
            CASES["gpt2"].model,
            {"transformer.wte.weight": np.zeros(160)},
            r"tokens/embedding is \[160\], expected \[10, 16\]",
        ),
        (
            BERT(**SMALL),
            {},
            r"none of the tensors of a BERT, such as 'encoder.*'; it has transformer.h.0",
        ),
    ],
)
def test_a_file_of_another_architecture_is_refused_by_name(model, change, names):
    tensors = {**weights(kept()["gpt2"]["shapes"]), **change}
    tensors = {name: x for name, x in tensors.items() if x is not None}
    convert = pretrained.bert_from_transformers if isinstance(model, BERT) else pretrained.gpt2_from_transformers
    with pytest.raises(InputError, match=names):
        convert(model, tensors)


@pytest.mark.slow
def test_older_names_and_what_a_file_lacks_of_a_classifier_are_seen_to():
    tensors = weights(kept()["bert"]["shapes"])
    old = {
        f"bert.{name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta')}": x
        for name, x in tensors.items()
    }
    old["cls.predictions.bias"], old["cls.seq_relationship.weight"] = np.zeros(10), np.zeros((2, 16))
    expected = pretrained.bert_from_transformers(CASES["bert"].model, tensors)["params"]
    of_old = pretrained.bert_from_transformers(CASES["bert"].model, old)["params"]
    jax.tree.map(np.testing.assert_array_equal, of_old, expected)
    classifier = BERTClassifier(hidden=24, **SMALL)
    jax.tree.map(np.testing.assert_array_equal, pretrained.bert_from_transformers(classifier, old)["params"], expected)
    fresh = jax.eval_shape(classifier.init, jax.random.key(0), TEXT[0])["params"]
    assert set(fresh) - set(expected) == {"classifier"}


TIED = {
    "gpt2": (CASES["gpt2"].model, {}, {"lm_head.weight": "transformer.wte.weight"}),
    "llama": (CASES["llama"].model.clone(tied=True), {}, {"lm_head.weight": "model.embed_tokens.weight"}),
    "bert": (
        BERTMaskedLM(hidden=24, **SMALL),
        {
            "cls.predictions.bias": [10],
            "cls.predictions.transform.dense.weight": [16, 16],
            "cls.predictions.transform.dense.bias": [16],
            "cls.predictions.transform.LayerNorm.weight": [16],
            "cls.predictions.transform.LayerNorm.bias": [16],
        },
        {
            "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
    ),
}
"""models that tie their head: further shapes, and the tensors that have to equal another one"""


@pytest.mark.parametrize("name", TIED)
def test_a_head_that_the_model_ties_has_to_equal_its_embedding(name):
    model, more, equal = TIED[name]
    tensors = weights({**kept()[name]["shapes"], **more})
    tensors |= {head: tensors[of] for head, of in equal.items()}
    convert = CASES[name].convert
    params = convert(model, tensors)["params"]
    for head in equal:
        other = {**tensors, head: tensors[head] + np.float32(1)}
        with pytest.raises(InputError, match=rf"tensor '{head}' of the file differs from '.*', which the model ties"):
            convert(model, other)
        only = convert(model, other, only=("blocks_*",))["params"]
        assert set(only) == {path for path in params if path.startswith("blocks_")}


def make_vectors():
    vectors = {}
    for name, case in CASES.items():
        shapes, outputs = theirs(case)
        rounded = [np.vectorize(lambda x: float(f"{x:.7g}"), otypes=[float])(x).tolist() for x in outputs]
        vectors[name] = {"shapes": shapes, "outputs": rounded}
    text = json.dumps(vectors, separators=(",", ":"))
    VECTORS.write_text(text.replace('"outputs"', '\n"outputs"').replace("},", "},\n") + "\n")


if __name__ == "__main__":
    make_vectors()
