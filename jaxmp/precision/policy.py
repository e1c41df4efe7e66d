"""`Policy`: the dtypes of parameters, computations, outputs and gradient sums."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
import jmp
import numpy as np
from jax.lax import DotAlgorithmPreset

from jaxmp.errors import InputError, nearest
from jaxmp.precision.blocks import is_block_format
from jaxmp.precision.formats import Format, parse_format
from jaxmp.precision.recipe import KEYS as RECIPE_KEYS
from jaxmp.precision.recipe import RECIPES, Recipe, parse_recipe
from jaxmp.precision.rounding import ROUNDINGS
from jaxmp.trees import FLOAT32, HALF, cast_floats


@dataclasses.dataclass(frozen=True)
class Policy(jmp.Policy):
    """A `jmp.Policy` that also holds the dtypes of gradient sums and the rounding of products and updates.

    dtypes are normalised: `jnp.float16`, `"float16"` and `np.dtype("float16")` give equal policies.
    `parse_policy(str(policy))` returns an equal policy.

    Raises:
      InputError: a dtype is not a float of at least 16 bits; `grad` is neither float32 nor the compute dtype; `reduce`
        is float16; `rounding` is unknown, or is not `nearest` although parameters are wider than 16 bits; only one of
        `operands` and `cotangents` is given, or a `recipe` beside them; or a `recipe` with a compute dtype of 64 bits
        or a `grad` that is not float32.
    """

    param_dtype: Any
    """dtype in which parameters are stored between steps (float32: master weights)"""
    compute_dtype: Any
    """dtype of the operands of every layer"""
    output_dtype: Any
    """dtype of the model outputs that the loss receives"""
    grad: Any = FLOAT32
    """dtype in which the gradients from all uses of a parameter are summed: float32, or the compute dtype to study what
    plain half precision loses (traps T1, T2 and T15; in a policy tree with rules, only T2 and T15)"""
    reduce: Any = FLOAT32
    """dtype in which gradients are summed over replicas: float32 or bfloat16 (trap T3)"""
    matmul: DotAlgorithmPreset = DotAlgorithmPreset.DEFAULT
    """algorithm of float32 dots and convolutions; DEFAULT is JAX's default, which is TensorFloat-32 on a GPU"""
    operands: Format | None = None
    """format to which layers with a kernel round their operands, emulated in the compute dtype; values that are too
    large become the largest number of the format"""
    cotangents: Format | None = None
    """format to which the gradients of the results of such layers are rounded; overflow becomes inf or NaN where the
    format has them, so that the loss scaler sees it"""
    recipe: Recipe | None = None
    """formats below 16 bits of the three products of each layer, emulated in float32; None: products are in the compute
    dtype"""
    rounding: str = "nearest"
    """how updates to half-precision parameters are rounded: nearest, stochastic or kahan (see `apply_updates`)"""

    def __post_init__(self) -> None:
        """Normalises the dtypes and checks the fields."""
        if (self.operands is None) != (self.cotangents is None):
            raise InputError(f"operands={self.operands}, cotangents={self.cotangents}: expected a format for both")
        if self.operands is not None and jnp.dtype(self.compute_dtype) != FLOAT32:
            raise InputError(f"operands={self.operands}: formats are emulated in float32, not in {self.compute_dtype}")
        for name in ("param_dtype", "compute_dtype", "output_dtype", "grad", "reduce"):
            dtype = jnp.dtype(getattr(self, name))
            object.__setattr__(self, name, dtype)
            if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize == 1:
                raise InputError(
                    f"{name}={dtype.name}: expected a float of two bytes or more, such as float16 or float32"
                )
        if self.grad not in (FLOAT32, self.compute_dtype):
            raise InputError(
                f"grad={_name(self.grad)} in policy {self}: gradients accumulate in f32 or in the compute dtype "
                f"({_name(self.compute_dtype)})"
            )
        if self.recipe is not None:
            self._check_recipe()
        if self.rounding not in ROUNDINGS:
            raise InputError(
                f"rounding={self.rounding!r}: expected one of {', '.join(ROUNDINGS)}{nearest(self.rounding, ROUNDINGS)}"
            )
        if self.rounding != "nearest" and self.param_dtype not in HALF:
            raise InputError(
                f"rounding={self.rounding} in policy {self}: it only affects half-precision parameters, but these are "
                f"{_name(self.param_dtype)}; expected p=bf16 or p=f16, as in the presets bfloat16 and float16"
            )
        if self.reduce == np.float16:
            raise InputError(f"reduce=f16 in policy {self}: float16 sums overflow; expected f32 or bf16")

    def _check_recipe(self) -> None:
        if self.operands is not None:
            raise InputError(
                f"c={self.operands}/{self.cotangents} beside {self.recipe}: both say how operands are rounded; "
                "expected one of them"
            )
        if self.compute_dtype.itemsize > 4:
            raise InputError(
                f"policy {self}: a recipe is emulated in float32; expected c=f32, c=bf16 or c=f16, not "
                f"c={_name(self.compute_dtype)}"
            )
        if self.grad != FLOAT32:
            raise InputError(f"policy {self}: grad={_name(self.grad)} beside a recipe; expected grad=f32")

    def cast_to_param(self, x: Any) -> Any:
        """Casts the float leaves of a pytree to the parameter dtype; other leaves are unchanged."""
        return cast_floats(x, self.param_dtype)

    def cast_to_compute(self, x: Any) -> Any:
        """Casts the float leaves of a pytree to the compute dtype; other leaves are unchanged."""
        return cast_floats(x, self.compute_dtype)

    def cast_to_output(self, x: Any) -> Any:
        """Casts the float leaves of a pytree to the output dtype; other leaves are unchanged."""
        return cast_floats(x, self.output_dtype)

    @property
    def wants_scaling(self) -> bool:
        """Whether training needs a loss scale, because gradients can underflow to zero.

        True if any dtype is float16, or if `cotangents` or the recipe rounds gradients, without a scale of their own,
        to a format whose range is no wider than float16's.
        """
        if self.cotangents is not None and self.cotangents.max_exponent <= 15:
            return True
        if self.recipe is not None and self.recipe.wants_scaling:
            return True
        return np.dtype(np.float16) in (self.param_dtype, self.compute_dtype, self.output_dtype)

    @property
    def matmul_precision(self) -> str | None:
        """The argument for `jax.default_matmul_precision` that selects `matmul`; None for JAX's default."""
        # Portable names where they exist: CPUs refuse the name of the TF32 algorithm.
        return {
            DotAlgorithmPreset.DEFAULT: None,
            DotAlgorithmPreset.F32_F32_F32: "float32",
            DotAlgorithmPreset.TF32_TF32_F32: "tensorfloat32",
        }.get(self.matmul, self.matmul.name)

    def __str__(self) -> str:
        compute = _name(self.compute_dtype) if self.operands is None else f"{self.operands}/{self.cotangents}"
        text = f"p={_name(self.param_dtype)},c={compute},o={_name(self.output_dtype)}"
        if self.grad != FLOAT32:
            text += f",grad={_name(self.grad)}"
        if self.reduce != FLOAT32:
            text += f",reduce={_name(self.reduce)}"
        if self.matmul != DotAlgorithmPreset.DEFAULT:
            text += f",matmul={self.matmul.name}"
        if self.recipe is not None:
            text += f",{self.recipe}"
        if self.rounding != "nearest":
            text += f",rounding={self.rounding}"
        return text


_SHORT = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}
_DTYPES = {name: jnp.dtype(long) for long, short in _SHORT.items() for name in (short, long)} | {"full": FLOAT32}
_NARROW = re.compile(r"e\d|tf32|float[468]_")
"""Matches the beginning of a format name that is not a policy dtype: such a format is emulated."""
_KEYS = {
    "p": "param_dtype",
    "params": "param_dtype",
    "c": "compute_dtype",
    "compute": "compute_dtype",
    "o": "output_dtype",
    "output": "output_dtype",
    "grad": "grad",
    "reduce": "reduce",
    "matmul": "matmul",
    "rounding": "rounding",
    **{key: key for key in RECIPE_KEYS},
}


def _mixed(half: Any) -> Policy:
    return Policy(jnp.float32, half, jnp.float32)


def _pure(dtype: Any, **fields: Any) -> Policy:
    return Policy(dtype, dtype, dtype, **fields)


PRESETS = {
    "float32": _pure(jnp.float32, matmul=DotAlgorithmPreset.F32_F32_F32),
    "tensorfloat32": _pure(jnp.float32, matmul=DotAlgorithmPreset.TF32_TF32_F32),
    "mixed_bfloat16": _mixed(jnp.bfloat16),
    "mixed_float16": _mixed(jnp.float16),
    "bfloat16": _pure(jnp.bfloat16),
    "float16": _pure(jnp.float16),
    "bf16-mixed": _mixed(jnp.bfloat16),
    "16-mixed": _mixed(jnp.float16),
    **{
        name: _pure(jnp.float32, matmul=DotAlgorithmPreset.F32_F32_F32, recipe=recipe)
        for name, recipe in RECIPES.items()
    },
}
"""Policies by name: Keras's names, Lightning's for the mixed ones, and recipes, with everything but their products in
float32. `float32` is true float32 on every device."""

_HALF = "'mixed_float16', with float32 master weights, or 'float16', without"
_MEANT = {
    **dict.fromkeys(("fp16", "amp", "mixed", "mixed_precision"), _HALF),
    "bfp16": "'mixed_bfloat16', with float32 master weights, or 'bfloat16', without",
    "fp32": "'float32'",
    "tf32": "'tensorfloat32'",
    "fp8": "'mxfp8' or 'fp8_current'",
    "fp4": "'mxfp4' or 'nvfp4'",
}
"""what other names of precisions are here: the nearest by its letters, f16 of fp16, is another policy"""


def parse_policy(text: str) -> Policy:
    """Parses a policy.

    `text` is one of:

    - a preset, such as `mixed_float16`;
    - one dtype for everything, such as `bf16`. `f32` leaves the products of float32 to JAX's default, which is TF32 on
      GPUs that have it, where the preset `float32` is true float32 on every device;
    - jmp's notation, such as `p=f32,c=bf16,o=f32`: `p` is the parameter dtype (default: float32), `c` the compute dtype
      (default: that of the parameters), `o` the output dtype (default: the compute dtype).

    Each may be followed by the fields `grad`, `reduce`, `matmul` and `rounding` of `Policy`, and by the parts of a
    recipe, `recipe`, `fprop`, `dgrad`, `wgrad`, `stochastic`, `hadamard` and `accumulate`, see `parse_recipe`. Spaces
    are ignored.

    `c` also accepts a format that `parse_format` knows, which is emulated in float32, or two formats: `c=e4m3/e5m2`
    rounds operands to e4m3 and gradients to e5m2.

    >>> str(parse_policy("mixed_float16"))
    'p=f32,c=f16,o=f32'
    >>> str(parse_policy("p=f32, c=bf16, o=f32, reduce=bf16"))
    'p=f32,c=bf16,o=f32,reduce=bf16'
    >>> str(parse_policy("c=e4m3/e5m2"))
    'p=f32,c=e4m3/e5m2,o=f32'
    >>> str(parse_policy("mixed_bfloat16, recipe=nvfp4, hadamard=none"))
    'p=f32,c=bf16,o=f32,recipe=nvfp4,hadamard=none'

    Raises:
      InputError: `text` is not a string; contains an unknown preset, key, dtype or algorithm; gives a key twice; or
        contains rules for single modules (`PolicyTree.parse` reads those).
    """
    if not isinstance(text, str):
        raise InputError(f"precision {text!r}: expected text such as 'mixed_float16', or str(policy) for a Policy")
    if ";" in text:
        raise InputError(f"precision {text!r}: expected one policy; jaxmp.PolicyTree.parse reads rules for modules")
    head, *parts = [part.strip() for part in text.split(",")]
    if "=" in head:
        base, parts = None, [head, *parts]
    elif head in PRESETS:
        base = PRESETS[head]
    elif head in _DTYPES or head == "half":
        base = _pure(_dtype(head, text))
    else:
        meant = _MEANT.get(head.lower())
        hint = f"; did you mean {meant}?" if meant else nearest(head, [*PRESETS, *_DTYPES, "half"])
        raise InputError(
            f"precision {text!r}: {head!r} is no preset, dtype or field; expected one of {', '.join(PRESETS)}, "
            f"or a policy such as p=f32,c=bf16,o=f32{hint}"
        )
    fields: dict[str, Any] = {}
    recipe: dict[str, str] = {}
    for part in parts:
        key, sign, value = (word.strip() for word in part.partition("="))
        if not sign or key not in _KEYS:
            hint = "; rules for modules end with ;" if value in PRESETS or key in PRESETS else nearest(key, _KEYS)
            raise InputError(
                f"precision {text!r}: {part!r} is not a field; expected KEY=VALUE with KEY one of p, c, o, grad, "
                f"reduce, matmul, rounding, {', '.join(RECIPE_KEYS)}{hint}"
            )
        if _KEYS[key] in fields or key in recipe:
            raise InputError(f"precision {text!r}: {key!r} is given twice")
        if key in RECIPE_KEYS:
            recipe[key] = value
        elif key == "matmul":
            fields["matmul"] = _algorithm(value, text)
        elif key == "rounding":
            fields["rounding"] = value
        elif _KEYS[key] == "compute_dtype" and (_NARROW.match(value) or "/" in value):
            fields |= _emulated(value, text)
        else:
            fields[_KEYS[key]] = _dtype(value, text)
    if recipe:
        try:
            fields["recipe"] = parse_recipe(recipe, base and base.recipe)
        except InputError as error:
            raise InputError(f"precision {text!r}: {error}") from None
    if base is not None:
        return dataclasses.replace(base, **fields)
    fields.setdefault("param_dtype", FLOAT32)
    fields.setdefault("compute_dtype", fields["param_dtype"])
    fields.setdefault("output_dtype", fields["compute_dtype"])
    return Policy(**fields)


def _name(dtype: Any) -> str:
    return _SHORT.get(dtype.name, dtype.name)


def _dtype(value: str, text: str) -> np.dtype:
    if value == "half":  # jmp: bfloat16 on a TPU, else float16
        return jnp.dtype(jmp.half_dtype())
    if is_block_format(value):
        raise InputError(
            f"precision {text!r}: {value!r} is a block format, not a dtype; expected it in a recipe, such as "
            f"fprop={value}, dgrad={value} or wgrad={value}"
        )
    if value not in _DTYPES:
        raise InputError(
            f"precision {text!r}: {value!r} is no dtype; expected one of {', '.join(_SHORT.values())} "
            f"(or half, full, or for c= a format such as e4m3/e5m2){nearest(value, [*_DTYPES, 'half'])}"
        )
    return _DTYPES[value]


def _emulated(value: str, text: str) -> dict[str, Any]:
    forward, sign, backward = (word.strip() for word in value.partition("/"))
    try:
        operands = parse_format(forward)
        cotangents = parse_format(backward) if sign else operands
    except InputError as error:
        raise InputError(f"precision {text!r}: {error}") from None
    return {"compute_dtype": FLOAT32, "operands": operands, "cotangents": cotangents}


def _algorithm(value: str, text: str) -> DotAlgorithmPreset:
    names = [preset.name for preset in DotAlgorithmPreset]
    if value.upper() not in names:
        raise InputError(
            f"precision {text!r}: {value!r} is no dot algorithm; expected a name of jax.lax.DotAlgorithmPreset, "
            f"such as F32_F32_F32 or TF32_TF32_F32{nearest(value.upper(), names)}"
        )
    return DotAlgorithmPreset[value.upper()]
