"""Published weights as variables of the models: of Hugging Face's `transformers`, torchvision and torch.

    tensors = read_safetensors("model.safetensors")
    variables = gpt2_from_transformers(GPT2(), tensors)
    logits = GPT2().apply(variables, tokens)

A converter takes the tensors of a file by name, and returns the model's variables as float32 NumPy arrays. It raises
InputError, which names each that differs, unless all of them are there, in their shapes, and each tensor of the file is
used, or known to have no use; an output head that the model ties to its embedding has to equal it. With `only`,
patterns of variables such as `blocks_*`, it converts and checks these alone, and returns no others. `convert` chooses
the converter by the class of the model.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
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
from jaxmp.trees import Pattern, by_path

Tensors = Mapping[str, Any]
"""arrays by name, as NumPy takes them"""

EVERYTHING = ("**",)
"""the patterns of all variables"""

_DTYPES: dict[str, Any] = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "BOOL": np.bool_},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8},
    **{"U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8},
    **{"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2},
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


def write_safetensors(path: str | Path, tensors: Tensors) -> None:
    """Writes arrays by name as a safetensors file, which replaces one that is there when it is whole.

    Raises: InputError if an array's dtype has no name in this format, or the file cannot be written.
    """
    names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
    header, data, offset = {}, [], 0
    for name, tensor in tensors.items():
        array = np.asarray(tensor)
        if array.dtype not in names:
            raise InputError(f"{path}: {name!r} is of dtype {array.dtype.name}; expected one of {', '.join(_DTYPES)}")
        end = offset + array.nbytes
        header[name] = {"dtype": names[array.dtype], "shape": array.shape, "data_offsets": (offset, end)}
        data.append(array.tobytes())
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    partial = Path(path).with_name(f"{Path(path).name}.partial")
    try:
        partial.write_bytes(b"".join((len(text).to_bytes(8, "little"), text, *data)))
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def bert_from_transformers(model: BERT, tensors: Tensors, *, only: Sequence[str] = EVERYTHING) -> dict[str, Any]:
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
    tied: tuple[tuple[str, str], ...] = ()
    if isinstance(model, BERTMaskedLM):
        tied = (
            ("cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"),
            ("cls.predictions.decoder.bias", "cls.predictions.bias"),
        )
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
    tokens = jnp.zeros((1, 1), jnp.int32)
    return source.variables({"params": params}, tokens, only, unused=unused, fresh=fresh, tied=tied)


def gpt2_from_transformers(model: GPT2, tensors: Tensors, *, only: Sequence[str] = EVERYTHING) -> dict[str, Any]:
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
    unused, tied = ("h.*.attn.bias", "h.*.attn.masked_bias"), (("lm_head.weight", "wte.weight"),)
    return source.variables({"params": params}, jnp.zeros((1, 1), jnp.int32), only, unused=unused, tied=tied)


def llama_from_transformers(model: Llama, tensors: Tensors, *, only: Sequence[str] = EVERYTHING) -> dict[str, Any]:
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
    tied = (("lm_head.weight", "embed_tokens.weight"),) if model.tied else ()
    if not model.tied:
        params["head"] = source.dense("lm_head")
    unused = ("*.rotary_emb.inv_freq",)
    return source.variables({"params": params}, jnp.zeros((1, 1), jnp.int32), only, unused=unused, tied=tied)


def resnet_from_torchvision(model: ResNet, tensors: Tensors, *, only: Sequence[str] = EVERYTHING) -> dict[str, Any]:
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
    if model.block == "bottleneck" and model.strided != "3x3":
        raise InputError(f"ResNet: strided={model.strided!r}: expected '3x3', as torchvision's weights want it")
    image = jnp.zeros((1, 32, 32, source.size("conv1.weight", 1, otherwise=3)))
    variables = {"params": params, "batch_stats": statistics}
    return source.variables(variables, image, only, unused=("*.num_batches_tracked",))


def vit_from_torchvision(model: ViT, tensors: Tensors, *, only: Sequence[str] = EVERYTHING) -> dict[str, Any]:
    """Variables of a `ViT` from torchvision's names, those of its published files too."""
    renamed = ((".mlp.linear_1.", ".mlp.0."), (".mlp.linear_2.", ".mlp.3."))  # in the published files
    source = _Source(model, tensors, renamed=renamed)
    params: dict[str, Any] = {
        "patches": source.conv("conv_proj", bias=True),
        "class_token": {"array": source.take("class_token", lambda x: x[0])},
        "positions": {"array": source.take("encoder.pos_embedding", lambda x: x[0])},
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
    patches = source.size("encoder.pos_embedding", 1, otherwise=2) - 1
    side = model.patch * math.isqrt(patches)
    image = jnp.zeros((1, side, side, source.size("conv_proj.weight", 1, otherwise=3)))
    return source.variables({"params": params}, image, only)


def recurrent_from_torch(
    model: SequenceClassifier, tensors: Tensors, *, only: Sequence[str] = EVERYTHING
) -> dict[str, Any]:
    """Variables of the recurrent layers of a `SequenceClassifier` from those of `torch.nn.RNN`, `LSTM` or `GRU`.

    The embedding and the head, which torch's modules do not have, are left out.
    """
    source = _Source(model, tensors)
    gates = {"simple": ("",), "lstm": ("i", "f", "g", "o"), "gru": ("r", "z", "n")}[model.cell]
    params: dict[str, Any] = {}
    directions = {"forward": "", "backward": "_reverse"} if model.bidirectional else {"forward": ""}
    for index in range(model.layers):
        for direction, suffix in directions.items():
            w_input, w_state, b_input, b_state = (
                f"{name}_l{index}{suffix}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            cell: dict[str, Any] = {}
            for i, gate in enumerate(gates):
                of_gate = functools.partial(_of_gate, i, len(gates))
                of_input: dict[str, Any] = {"kernel": source.take(w_input, of_gate)}
                of_state: dict[str, Any] = {"kernel": source.take(w_state, of_gate)}
                if gate == "n":  # whose reset gate stands before the sum
                    of_input["bias"], of_state["bias"] = source.take(b_input, of_gate), source.take(b_state, of_gate)
                else:
                    both = source.take(b_input, lambda a, b, f=of_gate: f(a) + f(b), b_state)
                    (of_state if model.cell == "lstm" else of_input)["bias"] = both
                cell |= {f"i{gate}": of_input, f"h{gate}": of_state}
            params[f"{direction}_{index}"] = cell
    width = source.size("weight_ih_l0", 1, otherwise=1)
    sequence = jnp.zeros((1, 1), jnp.int32) if model.vocabulary is not None else jnp.zeros((1, 1, width))
    return source.variables({"params": params}, sequence, only, fresh=("head", "tokens"))


def convert(model: Any, tensors: Tensors, *, only: Sequence[str] = EVERYTHING) -> dict[str, Any]:
    """Variables of a model by the converter of its class, see `CONVERTERS`.

    Raises: InputError if the model's class has no converter, and as the converters do.
    """
    for kind, converter in CONVERTERS.items():
        if isinstance(model, kind):
            return converter(model, tensors, only=only)
    names = ", ".join(kind.__name__ for kind in CONVERTERS)
    raise InputError(
        f"{type(model).__name__}: no converter from a file with tensors such as {', '.join(sorted(tensors)[:3])}; "
        f"expected a model that is one of {names}, or a file with the model's own paths"
    )


CONVERTERS: dict[type, Callable[..., dict[str, Any]]] = {
    BERT: bert_from_transformers,
    GPT2: gpt2_from_transformers,
    Llama: llama_from_transformers,
    ResNet: resnet_from_torchvision,
    ViT: vit_from_torchvision,
    SequenceClassifier: recurrent_from_torch,
}
"""The converter of each class of models."""


def _of_gate(index: int, count: int, array: np.ndarray) -> np.ndarray:
    """The part of one gate of what torch keeps of all gates as one; of a kernel, as Flax keeps it."""
    return np.split(array, count)[index].T


@dataclasses.dataclass(frozen=True)
class _Taken:
    """A variable that is yet to be made from tensors of the file, so that only those that are wanted are read."""

    names: tuple[str, ...]
    make: Callable[..., np.ndarray]


class _Source:
    """The tensors of a file by name."""

    def __init__(
        self, model: Any, tensors: Tensors, *, prefix: str = "", renamed: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.model, self.kind = model, type(model).__name__
        self.tensors: dict[str, Any] = {}
        for name, tensor in tensors.items():
            plain = name.removeprefix(prefix)
            for old, new in renamed:
                plain = plain.replace(old, new)
            self.tensors[plain] = tensor

    def has(self, name: str) -> bool:
        """Whether the file has a tensor of this name."""
        return name in self.tensors

    def size(self, name: str, axis: int, *, otherwise: int) -> int:
        """The size of a tensor along an axis; `otherwise` if the file has no such tensor or axis."""
        shape = np.shape(self.tensors[name]) if name in self.tensors else ()
        return shape[axis] if axis < len(shape) else otherwise

    def take(self, name: str, make: Callable[..., np.ndarray] = lambda x: x, *more: str) -> _Taken:
        """The variable that `make` makes of the tensor of this name, and those of `more`, in float32."""
        return _Taken((name, *more), make)

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
        return {"kernel": self.take(f"{name}.weight", np.transpose if transposed else np.asarray), **bias}

    def split(
        self, name: str, parts: Sequence[str], *, transposed: bool = True, separator: str = "."
    ) -> dict[str, dict[str, Any]]:
        """Several Dense layers that are kept as one."""

        def part(index: int, array: np.ndarray) -> np.ndarray:
            array = array.T if transposed and array.ndim == 2 else array
            return np.array_split(array, len(parts), axis=-1)[index]

        given, dense = f"{name}{separator}bias", {}
        for index, of in enumerate(parts):
            take = functools.partial(self.take, make=functools.partial(part, index))
            dense[of] = {
                "kernel": take(f"{name}{separator}weight"),
                **({"bias": take(given)} if self.has(given) else {}),
            }
        return dense

    def conv(self, name: str, *, bias: bool = False) -> dict[str, Any]:
        """A convolution, whose kernel torch keeps as (out, in, height, width)."""
        more = {"bias": self.take(f"{name}.bias")} if bias else {}
        return {"kernel": self.take(f"{name}.weight", lambda x: np.moveaxis(x, (0, 1), (-1, -2))), **more}

    def variables(
        self,
        variables: dict[str, Any],
        inputs: Any,
        only: Sequence[str],
        *,
        unused: Sequence[str] = (),
        fresh: Sequence[str] = (),
        tied: Sequence[tuple[str, str]] = (),
    ) -> dict[str, Any]:
        """The variables that `only` names, made and checked against those of the model for such inputs.

        Args:
          variables: what is to be converted.
          inputs: the model's input.
          only: patterns of their paths, without the name of the collection.
          unused: patterns of the names of tensors that may be left over.
          fresh: modules of the model that may be missing.
          tied: pairs of names: the first tensor, which the file may have, has to equal the second, which is converted.

        Raises: InputError if a variable is missing, has another shape or no floats, or is none of the model's; or a
          tensor is left over, where all variables are wanted; or one that the model ties to another differs from it.
        """
        patterns = [Pattern(text) for text in only]

        def wanted(tree: Any) -> dict[str, Any]:
            leaves = by_path(tree).items()
            return {p: leaf for p, leaf in leaves if any(each.covers(p.partition("/")[2]) for each in patterns)}

        expected = wanted(jax.eval_shape(self.model.init, jax.random.key(0), inputs))
        chosen: dict[str, _Taken] = wanted(variables)
        missing = [name for taken in chosen.values() for name in taken.names if not self.has(name)]
        if chosen and len(set(missing)) == len({name for taken in chosen.values() for name in taken.names}):
            raise InputError(
                f"{self.kind}: the file is of another architecture: it has none of the tensors of a {self.kind}, such "
                f"as {missing[0]!r}; it has {', '.join(sorted(self.tensors)[:3]) or 'no tensors'}"
            )
        made: dict[str, np.ndarray] = {}
        wrong: list[str] = []
        for path, taken in chosen.items():
            problem = self._problem(taken)
            if problem is None:
                try:
                    made[path] = taken.make(*(np.asarray(self.tensors[x]).astype(np.float32) for x in taken.names))
                except (ValueError, IndexError):
                    given = ", ".join(f"{x!r} is {list(np.shape(self.tensors[x]))}" for x in taken.names)
                    problem = f"it cannot be made of a tensor of this shape: {given}"
            shape = list(expected[path].shape) if path in expected else "none"
            if problem is not None and path in expected:
                wrong.append(f"{path} is missing, expected {shape}: {problem}")
            elif path in made and list(made[path].shape) != shape:
                wrong.append(f"{path} is {list(made[path].shape)}, expected {shape}")
        for path in expected:
            if path not in chosen and path.split("/")[1] not in fresh:
                wrong.append(f"{path} is missing, expected {list(expected[path].shape)}")
        used = {name for taken in chosen.values() for name in taken.names}
        for name, other in tied:
            if other not in used or not (self.has(name) and self.has(other)):
                continue
            if not np.array_equal(self.tensors[name], self.tensors[other]):
                wrong.append(f"the tensor {name!r} of the file differs from {other!r}, which the model ties it to")
        if tuple(only) == EVERYTHING:
            unused = (*unused, *(name for name, _ in tied))
            left = [name for name in sorted(self.tensors) if name not in used]
            left = [name for name in left if not any(fnmatch.fnmatch(name, each) for each in unused)]
            wrong += [f"the tensor {name!r} of the file has no place in the model" for name in left]
        if wrong:
            listed = "".join(f"\n  {one}" for one in wrong)
            raise InputError(f"{self.kind}: the file does not fit the model:{listed}")
        return _nested(made)

    def _problem(self, taken: _Taken) -> str | None:
        """Why a variable cannot be made of the file; None if it can."""
        for name in taken.names:
            if name not in self.tensors:
                return f"the file has no tensor {name!r}{nearest(name, self.tensors)}"
            dtype = np.asarray(self.tensors[name]).dtype
            if not jnp.issubdtype(dtype, jnp.floating):
                return f"the tensor {name!r} is of dtype {dtype.name}, expected floats"
        return None


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict of leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *above, last = path.split("/")
        node = tree
        for name in above:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree
