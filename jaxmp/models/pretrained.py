"""Published weights as variables of the models: of Hugging Face's `transformers`, torchvision and torch.

    tensors = read_safetensors("model.safetensors")
    variables = gpt2_from_transformers(GPT2(), tensors)
    logits = GPT2().apply(variables, tokens)

A converter takes the tensors of a file by name, and returns the model's variables as float32 NumPy arrays. It raises
InputError unless each of them is there, in its shape, and each tensor of the file is used, or known to have no use.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.errors import InputError, nearest
from jaxmp.models.resnet import ResNet
from jaxmp.models.rnn import SequenceClassifier
from jaxmp.models.transformer import BERT, GPT2, BERTClassifier, BERTMaskedLM, Llama
from jaxmp.models.vit import ViT
from jaxmp.trees import by_path

Tensors = Mapping[str, Any]
"""arrays by name, as NumPy takes them"""

_DTYPES: dict[str, Any] = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "BOOL": np.bool_},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8},
}


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file by name, read-only and memory-mapped.

    Source: https://github.com/huggingface/safetensors, "Format".

    Raises: InputError if there is no such file, or it is not one of that format, whole.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a safetensors file")
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    try:
        header = json.loads(data[8:start].tobytes()) if 8 < start <= len(data) else None
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise InputError(f"{path}: expected a safetensors file, which begins with the size of a header of JSON")
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            kind, shape, (begin, end) = entry["dtype"], tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{path}: {name!r} is {entry!r:.80}; expected its dtype, shape and data_offsets") from None
        if kind not in _DTYPES:
            raise InputError(f"{path}: {name!r} is of dtype {kind}; expected one of {', '.join(_DTYPES)}")
        dtype = np.dtype(_DTYPES[kind])
        size = math.prod(shape) * dtype.itemsize
        if begin < 0 or start + end > len(data) or end - begin != size:
            there = max(0, min(len(data) - start, end) - begin)
            raise InputError(
                f"{path}: {name!r} should have {size} bytes, and has {there}: the file is corrupt or cut off"
            )
        tensors[name] = data[start + begin : start + end].view(dtype).reshape(shape)
    return tensors


def bert_from_transformers(model: BERT, tensors: Tensors) -> dict[str, Any]:
    """Variables of a `BERT`, `BERTClassifier` or `BERTMaskedLM` from `transformers`' names, with or without "bert.".

    Pooler and `classifier` of a `BERTClassifier` are left out where the file has none, and are to be initialised.
    """
    renamed = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))  # in older files
    source = _Source(model, tensors, prefix="bert.", renamed=renamed)
    params: dict[str, Any] = {
        "tokens": source.embed("embeddings.word_embeddings"),
        "positions": source.embed("embeddings.position_embeddings"),
        "types": source.embed("embeddings.token_type_embeddings"),
        "embedding_norm": source.norm("embeddings.LayerNorm"),
    }
    for index in range(model.layers):
        at = f"encoder.layer.{index}."
        params[f"blocks_{index}"] = {
            "attention": {
                **{name: source.dense(f"{at}attention.self.{name}") for name in ("query", "key", "value")},
                "out": source.dense(f"{at}attention.output.dense"),
            },
            "attention_norm": source.norm(f"{at}attention.output.LayerNorm"),
            "up": source.dense(f"{at}intermediate.dense"),
            "down": source.dense(f"{at}output.dense"),
            "mlp_norm": source.norm(f"{at}output.LayerNorm"),
        }
    fresh: tuple[str, ...] = ()
    if isinstance(model, BERTMaskedLM):
        params["transform"] = source.dense("cls.predictions.transform.dense")
        params["transform_norm"] = source.norm("cls.predictions.transform.LayerNorm")
        params["output_bias"] = {"array": source.take("cls.predictions.bias")}
    elif isinstance(model, BERTClassifier):
        fresh = ("pooler", "classifier")
        heads = {"pooler": "pooler.dense", "classifier": "classifier"}
        params |= {name: source.dense(theirs) for name, theirs in heads.items() if source.has(f"{theirs}.weight")}
    else:
        params["pooler"] = source.dense("pooler.dense")
    unused = ("cls.*", "classifier.*", "pooler.*", "embeddings.position_ids")
    return source.variables({"params": params}, jnp.zeros((1, 1), jnp.int32), unused=unused, fresh=fresh)


def gpt2_from_transformers(model: GPT2, tensors: Tensors) -> dict[str, Any]:
    """Variables of a `GPT2` from `transformers`' names, with or without "transformer."."""
    source = _Source(model, tensors, prefix="transformer.")
    params: dict[str, Any] = {
        "tokens": source.embed("wte"),
        "positions": source.embed("wpe"),
        "norm": source.norm("ln_f"),
    }
    for index in range(model.layers):
        at = f"h.{index}."
        params[f"blocks_{index}"] = {
            "attention": {
                **source.split(f"{at}attn.c_attn", ("query", "key", "value"), transposed=False),
                "out": source.dense(f"{at}attn.c_proj", transposed=False),
            },
            "attention_norm": source.norm(f"{at}ln_1"),
            "up": source.dense(f"{at}mlp.c_fc", transposed=False),
            "down": source.dense(f"{at}mlp.c_proj", transposed=False),
            "mlp_norm": source.norm(f"{at}ln_2"),
        }
    unused = ("h.*.attn.bias", "h.*.attn.masked_bias", "lm_head.weight")
    return source.variables({"params": params}, jnp.zeros((1, 1), jnp.int32), unused=unused)


def llama_from_transformers(model: Llama, tensors: Tensors) -> dict[str, Any]:
    """Variables of a `Llama` from `transformers`' names, with or without "model."; norms of heads as Qwen3 has them."""
    source = _Source(model, tensors, prefix="model.")
    params: dict[str, Any] = {"tokens": source.embed("embed_tokens"), "norm": source.norm("norm")}
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    norms = {"query_norm": "q_norm", "key_norm": "k_norm"} if model.qk_norm else {}
    for index in range(model.layers):
        at = f"layers.{index}."
        params[f"blocks_{index}"] = {
            "attention": {
                **{name: source.dense(f"{at}self_attn.{theirs}") for name, theirs in names.items()},
                **{name: source.norm(f"{at}self_attn.{theirs}") for name, theirs in norms.items()},
            },
            "attention_norm": source.norm(f"{at}input_layernorm"),
            "mlp_norm": source.norm(f"{at}post_attention_layernorm"),
            **{name: source.dense(f"{at}mlp.{name}_proj") for name in ("gate", "up", "down")},
        }
    if not model.tied:
        params["head"] = source.dense("lm_head")
    unused = ("lm_head.weight", "*.rotary_emb.inv_freq")
    return source.variables({"params": params}, jnp.zeros((1, 1), jnp.int32), unused=unused)


def resnet_from_torchvision(model: ResNet, tensors: Tensors) -> dict[str, Any]:
    """Variables of a `ResNet` ("v1.5", `strided="3x3"`) from torchvision's names, with its batch statistics."""
    source = _Source(model, tensors)
    params: dict[str, Any] = {"stem": source.conv("conv1"), "head": source.dense("fc")}
    params["BatchNorm_0"], stem = source.batch_norm("bn1")
    statistics: dict[str, Any] = {"BatchNorm_0": stem}
    convolutions = 2 if model.block == "basic" else 3
    for stage, count in enumerate(model.blocks, start=1):
        for index in range(count):
            at, block, block_statistics = f"layer{stage}.{index}.", {}, {}
            for i in range(convolutions):
                block[f"Conv_{i}"] = source.conv(f"{at}conv{i + 1}")
                block[f"BatchNorm_{i}"], block_statistics[f"BatchNorm_{i}"] = source.batch_norm(f"{at}bn{i + 1}")
            if source.has(f"{at}downsample.0.weight"):
                name = f"BatchNorm_{convolutions}"
                block["projection"] = source.conv(f"{at}downsample.0")
                block[name], block_statistics[name] = source.batch_norm(f"{at}downsample.1")
            params[f"stage{stage}_block{index + 1}"] = block
            statistics[f"stage{stage}_block{index + 1}"] = block_statistics
    channels = params["stem"]["kernel"].shape[2]
    image = jnp.zeros((1, 32, 32, channels))
    return source.variables({"params": params, "batch_stats": statistics}, image, unused=("*.num_batches_tracked",))


def vit_from_torchvision(model: ViT, tensors: Tensors) -> dict[str, Any]:
    """Variables of a `ViT` from torchvision's names."""
    source = _Source(model, tensors)
    params: dict[str, Any] = {
        "patches": source.conv("conv_proj", bias=True),
        "class_token": {"array": source.take("class_token")[0]},
        "positions": {"array": source.take("encoder.pos_embedding")[0]},
        "norm": source.norm("encoder.ln"),
        "head": source.dense("heads.head"),
    }
    for index in range(model.layers):
        at = f"encoder.layers.encoder_layer_{index}."
        params[f"blocks_{index}"] = {
            "attention": {
                **source.split(f"{at}self_attention.in_proj", ("query", "key", "value"), separator="_"),
                "out": source.dense(f"{at}self_attention.out_proj"),
            },
            "attention_norm": source.norm(f"{at}ln_1"),
            "up": source.dense(f"{at}mlp.0"),
            "down": source.dense(f"{at}mlp.3"),
            "mlp_norm": source.norm(f"{at}ln_2"),
        }
    side = model.patch * math.isqrt(len(params["positions"]["array"]) - 1)
    image = jnp.zeros((1, side, side, params["patches"]["kernel"].shape[2]))
    return source.variables({"params": params}, image)


def recurrent_from_torch(model: SequenceClassifier, tensors: Tensors) -> dict[str, Any]:
    """Variables of the recurrent layers of a `SequenceClassifier` from those of `torch.nn.RNN`, `LSTM` or `GRU`.

    The embedding and the head, which torch's modules do not have, are left out.
    """
    source = _Source(model, tensors)
    gates = {"simple": ("",), "lstm": ("i", "f", "g", "o"), "gru": ("r", "z", "n")}[model.cell]
    params: dict[str, Any] = {}
    directions = {"forward": "", "backward": "_reverse"} if model.bidirectional else {"forward": ""}
    for index in range(model.layers):
        for direction, suffix in directions.items():
            names = [f"{name}_l{index}{suffix}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            arrays = [np.split(source.take(name), len(gates)) for name in names]
            cell: dict[str, Any] = {}
            for gate, w_input, w_state, b_input, b_state in zip(gates, *arrays, strict=True):
                of_input, of_state = {"kernel": w_input.T}, {"kernel": w_state.T}
                if gate == "n":  # whose reset gate stands before the sum
                    of_input["bias"], of_state["bias"] = b_input, b_state
                else:
                    (of_state if model.cell == "lstm" else of_input)["bias"] = b_input + b_state
                cell |= {f"i{gate}": of_input, f"h{gate}": of_state}
            params[f"{direction}_{index}"] = cell
    width = params["forward_0"]["i" + gates[0]]["kernel"].shape[0]
    sequence = jnp.zeros((1, 1), jnp.int32) if model.vocabulary is not None else jnp.zeros((1, 1, width))
    return source.variables({"params": params}, sequence, fresh=("head", "tokens"))


class _Source:
    """The tensors of a file, of which each is taken by name once."""

    def __init__(
        self, model: Any, tensors: Tensors, *, prefix: str = "", renamed: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.model, self.kind = model, type(model).__name__
        self.tensors: dict[str, Any] = {}
        self.left: set[str] = set()
        for name, tensor in tensors.items():
            plain = name.removeprefix(prefix)
            for old, new in renamed:
                plain = plain.replace(old, new)
            self.tensors[plain] = tensor
            self.left.add(plain)

    def has(self, name: str) -> bool:
        """Whether the file has a tensor of this name."""
        return name in self.tensors

    def take(self, name: str) -> np.ndarray:
        """The tensor of this name, in float32. Raises InputError if there is none."""
        if name not in self.tensors:
            raise InputError(
                f"{self.kind}: the file has no tensor {name!r}, and is of another architecture or size; it has "
                f"{len(self.tensors)} others{nearest(name, self.tensors)}"
            )
        self.left.discard(name)
        return np.asarray(self.tensors[name]).astype(np.float32)

    def embed(self, name: str) -> dict[str, Any]:
        return {"embedding": self.take(f"{name}.weight")}

    def norm(self, name: str) -> dict[str, Any]:
        bias = {"bias": self.take(f"{name}.bias")} if self.has(f"{name}.bias") else {}
        return {"scale": self.take(f"{name}.weight"), **bias}

    def batch_norm(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters and statistics of a batch normalisation."""
        return self.norm(name), {"mean": self.take(f"{name}.running_mean"), "var": self.take(f"{name}.running_var")}

    def dense(self, name: str, *, transposed: bool = True) -> dict[str, Any]:
        """A Dense layer; `transposed`, as torch's Linear keeps its kernel."""
        bias = {"bias": self.take(f"{name}.bias")} if self.has(f"{name}.bias") else {}
        kernel = self.take(f"{name}.weight")
        return {"kernel": kernel.T if transposed else kernel, **bias}

    def split(
        self, name: str, parts: Sequence[str], *, transposed: bool = True, separator: str = "."
    ) -> dict[str, dict[str, Any]]:
        """Several Dense layers that are kept as one."""
        kernel = self.take(f"{name}{separator}weight")
        kernels = np.split(kernel.T if transposed else kernel, len(parts), axis=1)
        given = f"{name}{separator}bias"
        biases = np.split(self.take(given), len(parts)) if self.has(given) else None
        return {
            part: {"kernel": kernels[i], **({} if biases is None else {"bias": biases[i]})}
            for i, part in enumerate(parts)
        }

    def conv(self, name: str, *, bias: bool = False) -> dict[str, Any]:
        """A convolution, whose kernel torch keeps as (out, in, height, width)."""
        more = {"bias": self.take(f"{name}.bias")} if bias else {}
        return {"kernel": self.take(f"{name}.weight").transpose(2, 3, 1, 0), **more}

    def variables(
        self, variables: dict[str, Any], inputs: Any, *, unused: Sequence[str] = (), fresh: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The variables, checked against those of the model for such inputs.

        Args:
          variables: what was converted.
          inputs: the model's input.
          unused: patterns of the names of tensors that may be left over.
          fresh: modules of the model that may be missing.

        Raises: InputError if a variable is missing, has another shape, or is none of the model's; or a tensor is left
          over.
        """
        expected = by_path(jax.eval_shape(self.model.init, jax.random.key(0), inputs))
        given = by_path(variables)
        wrong = [
            f"{path} is {list(given[path].shape) if path in given else 'missing'}, expected "
            f"{list(expected[path].shape) if path in expected else 'none'}"
            for path in sorted({*given, *expected})
            if (path in given or path.split("/")[1] not in fresh)
            and (path not in given or path not in expected or given[path].shape != expected[path].shape)
        ]
        left = [name for name in sorted(self.left) if not any(fnmatch.fnmatch(name, each) for each in unused)]
        wrong += [f"the tensor {name!r} of the file has no place in the model" for name in left]
        if wrong:
            more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise InputError(f"{self.kind}: the file does not fit the model: {'; '.join(wrong[:8])}{more}")
        return variables
