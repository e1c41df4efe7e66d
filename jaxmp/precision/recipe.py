"""`Recipe`: how layers with a product are trained below 16 bits.

A layer has three products: the forward product, the gradient of its input and that of its weights (NVIDIA and
DeepSeek: Fprop, Dgrad, Wgrad). A recipe says for each to which format its two operands are rounded. It is the field
`recipe` of a `Policy`, and a part of its text:

    nvfp4                                         # a preset, as --precision takes it
    nvfp4,hadamard=none                           # without its Hadamard transform
    blocks_3=float32; head=float32; nvfp4         # two layers kept in float32
    p=f32,c=bf16,fprop=mxfp8/mxfp8,dgrad=mxfp8_e5m2/mxfp8,wgrad=mxfp8/mxfp8_e5m2,stochastic=gradients
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxmp.errors import InputError, nearest
from jaxmp.precision.blocks import PRESETS, BlockFormat, Element, Integer, is_block_format, parse_block_format
from jaxmp.precision.formats import DelayedScaling, Format, parse_format

ROLES = ("activations", "weights", "gradients")
"""What an operand of a product is; `gradients` are those of the result of the layer."""

PRODUCTS = {
    "fprop": ("activations", "weights"),
    "dgrad": ("gradients", "weights"),
    "wgrad": ("activations", "gradients"),
}
"""The products of a layer, each with the roles of its operands, in the order in which a recipe's text names them: the
forward product, the gradient of the input, and the gradient of the weights."""


HISTORIES = "delayed_scaling"
"""Collection of the model state with scales and largest magnitudes of `Delayed` operands."""

GRADIENT_AMAX = "gradient_amax"
"""Collection of the model state with the largest magnitude of the gradients of each product's result in the last step.
Each is an input without an effect, whose gradient is the new magnitude: what differentiates the loss puts it there."""


@dataclasses.dataclass(frozen=True)
class Delayed:
    """A format with a scale for the whole tensor, from its largest magnitudes in earlier steps.

    The scale follows from them as in `DelayedScaling`, and is not rounded to a power of two. The magnitudes are arrays
    in the model state.

    Raises:
      InputError: the history is shorter than one step.
    """

    format: Element
    """format of the elements: floats, int8 or int4"""
    history: int = 1024
    """number of steps whose largest magnitudes are kept"""

    def __post_init__(self) -> None:
        """Checks the history."""
        self.scaling  # noqa: B018  # checks its fields

    @property
    def scaling(self) -> DelayedScaling:
        """The rule of the scale."""
        return DelayedScaling(self.format, self.history, power_of_two=False)

    def __str__(self) -> str:
        return f"{self.format}:delayed" + ("" if self.history == Delayed.history else str(self.history))


Operand = Format | BlockFormat | Delayed | None
"""The format of an operand; None: it is not rounded."""


class RecipeOperand(NamedTuple):
    """One operand of one product of a recipe."""

    product: str
    """`fprop`, `dgrad` or `wgrad`"""
    role: str
    """`activations`, `weights` or `gradients`"""
    format: Operand
    """what it is rounded to; None: it is not rounded"""
    rounding: str
    """`nearest` or `stochastic`"""
    hadamard: int
    """length of the Hadamard transform before it is rounded; 0: none"""


@dataclasses.dataclass(frozen=True)
class Product:
    """One of the three products of a layer: the formats of its operands, and its Hadamard transform.

    The transform multiplies both operands, along the axis over which the product sums, by the same orthogonal matrix,
    block by block, before they are rounded. It leaves the product as it is, and spreads outliers over their block.

    Raises:
      InputError: `hadamard` is not a power of two.
    """

    left: Operand
    """format of the first operand: the activations of fprop and wgrad, the gradients of dgrad"""
    right: Operand
    """format of the second operand: the weights of fprop and dgrad, the gradients of wgrad"""
    hadamard: int = 0
    """length of the Hadamard transform, a power of two; 0: none"""

    def __post_init__(self) -> None:
        """Checks the length of the transform."""
        n = self.hadamard
        if not isinstance(n, int) or isinstance(n, bool) or n < 0 or n == 1 or n & (n - 1):
            below = 2 ** max(n.bit_length() - 1, 1) if isinstance(n, int) else 16
            raise InputError(
                f"hadamard={n!r}: expected a power of two, 2 or more, or none; did you mean {below} or {2 * below}?"
            )


@dataclasses.dataclass(frozen=True)
class Level:
    """One level of an accumulator: a register in `format` to which a partial sum of `every` terms is added at a time.

    Raises:
      InputError: `every` is below 1.
    """

    format: Format
    """format of the register, rounded to nearest after each addition; float32: not rounded"""
    every: int
    """number of terms of the product in each partial sum"""

    def __post_init__(self) -> None:
        """Checks the number of terms."""
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise InputError(f"accumulate={self.format}:{self.every}: expected 1 or more terms in each partial sum")

    def __str__(self) -> str:
        return f"{self.format}:{self.every}"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The formats of the three products of a layer, how operands are rounded, and how products are summed.

    Blocks run along the axis over which a product sums, so an operand that two products share is rounded for each
    apart: the activations along the features for `fprop`, and along the batch for `wgrad`. Blocks of two lengths lie on
    (input features, output features) of weights, so that both products round a weight to the same number.

    Source of the three products apart: OCP MX 1.0, section 6; Rouhani et al. 2023, Microscaling Data Formats for Deep
    Learning, 2310.10537, figure 2; DeepSeek-V3, 2412.19437, section 3.3.

    Raises:
      InputError: `stochastic` names no role or product, or one of which nothing is rounded; the levels of the
        accumulator do not grow by whole multiples; two products have delayed scales of different formats for one role;
        or the recipe changes nothing.
    """

    fprop: Product
    """forward product: activations and weights"""
    dgrad: Product
    """gradient of the input: gradients and weights"""
    wgrad: Product
    """gradient of the weights: activations and gradients"""
    stochastic: tuple[str, ...] = ()
    """roles and products whose operands are rounded stochastically; all others are rounded to nearest"""
    accumulate: tuple[Level, ...] = ()
    """the levels of the accumulator, innermost first; (): sums are those of JAX's float32 product"""

    def __post_init__(self) -> None:
        """Checks that the parts go together."""
        order = (*ROLES, *PRODUCTS)
        for name in self.stochastic:
            if name not in order:
                raise InputError(
                    f"stochastic={name}: expected none, or one or several of {', '.join(order)}, joined by /"
                    f"{nearest(name, order)}"
                )
        object.__setattr__(self, "stochastic", tuple(name for name in order if name in self.stochastic))
        for name in self.stochastic:
            if all(each.format is None for each in self.operands() if name in (each.role, each.product)):
                raise InputError(f"stochastic={name} in recipe {self}: no operand of {name} is rounded")
        for inner, outer in zip(self.accumulate, self.accumulate[1:], strict=False):
            if outer.every % inner.every:
                raise InputError(
                    f"accumulate={'/'.join(map(str, self.accumulate))}: {outer.every} terms are no multiple of the "
                    f"{inner.every} of the level before"
                )
        for role in ROLES:
            delayed = {
                str(of.format): None for of in self.operands() if isinstance(of.format, Delayed) and of.role == role
            }
            if len(delayed) > 1:
                raise InputError(f"{' and '.join(delayed)} for {role}: they have one history; expected one of them")
        if not self.accumulate and all(each.format is None for each in self.operands()):
            raise InputError("a recipe that rounds no operand and has no accumulator: expected a format, such as mxfp8")

    def product(self, name: str) -> Product:
        """Returns the product called `fprop`, `dgrad` or `wgrad`."""
        return getattr(self, name)

    def operand(self, product: str, role: str) -> RecipeOperand:
        """Returns one operand of a product, by its role."""
        of, roles = self.product(product), PRODUCTS[product]
        format = (of.left, of.right)[roles.index(role)]
        rounding = "stochastic" if {product, role} & set(self.stochastic) else "nearest"
        return RecipeOperand(product, role, format, rounding, of.hadamard)

    def operands(self) -> Iterator[RecipeOperand]:
        """Yields the six operands: those of fprop, then of dgrad, then of wgrad."""
        for product, roles in PRODUCTS.items():
            for role in roles:
                yield self.operand(product, role)

    @property
    def is_delayed(self) -> bool:
        """Whether a scale follows from earlier steps, so that the recipe has state."""
        return any(isinstance(each.format, Delayed) for each in self.operands())

    @property
    def is_stochastic(self) -> bool:
        """Whether any operand is rounded stochastically."""
        return any(each.rounding == "stochastic" and each.format is not None for each in self.operands())

    @property
    def wants_scaling(self) -> bool:
        """Whether training needs a loss scale: gradients are rounded to a narrow range without a scale of their own."""
        formats = [each.format for each in self.operands() if each.role == "gradients"]
        return any(isinstance(format, Format) and format.max_exponent <= 15 for format in formats)

    def fields(self) -> dict[str, str]:
        """Returns the parts of the text by key: fprop, dgrad, wgrad, stochastic, hadamard and accumulate."""
        products = {name: f"{_spell(self.product(name).left)}/{_spell(self.product(name).right)}" for name in PRODUCTS}
        lengths = {name: self.product(name).hadamard for name in PRODUCTS}
        same = set(lengths.values())
        hadamard = str(*same) if len(same) == 1 else "/".join(f"{name}:{n}" for name, n in lengths.items() if n)
        return {
            **products,
            "stochastic": "/".join(self.stochastic) or "none",
            "hadamard": "none" if same == {0} else hadamard,
            "accumulate": "/".join(map(str, self.accumulate)) or "none",
        }

    def __str__(self) -> str:
        """The shortest text: `recipe=PRESET` with at most one field after it, or all fields that are not none."""
        own = self.fields()
        for name, preset in RECIPES.items():
            theirs = preset.fields()
            different = [f"{key}={value}" for key, value in own.items() if theirs[key] != value]
            if len(different) <= 1:
                return ",".join([f"recipe={name}", *different])
        return ",".join(f"{key}={value}" for key, value in own.items() if key in PRODUCTS or value != "none")


KEYS = ("recipe", *PRODUCTS, "stochastic", "hadamard", "accumulate")
"""The keys of a recipe in the text of a policy."""


def parse_recipe(fields: Mapping[str, str], base: Recipe | None = None) -> Recipe:
    """Makes a recipe of parts of text by key.

    - `recipe`: a preset, one of `RECIPES`, that the other parts change.
    - `fprop`, `dgrad`, `wgrad`: two formats, A/B, or one for both, in the order activations/weights, gradients/weights
      and activations/gradients. A format is a block format (`parse_block_format`), a float format (`parse_format`), a
      float format, int8 or int4 with `:delayed` or `:delayedN` for a scale from the last N steps, or `high` for no
      rounding.
    - `stochastic`: roles (activations, weights, gradients) or products (fprop, dgrad, wgrad), joined by /, or `none`.
    - `hadamard`: a length for all products, `none`, or products each with a length: `wgrad:16`, `dgrad:16/wgrad:32`.
    - `accumulate`: levels FORMAT:TERMS from the inside out, joined by /, such as `f32:128` or `e8m13:32/f32:128`, or
      `none`.

    Products that neither the text nor `base` names are not rounded.

    Raises:
      InputError: a part is unknown or does not go with the others; the message names the nearest valid one.
    """
    for key in fields:
        if key not in KEYS:
            raise InputError(f"{key}={fields[key]}: expected one of {', '.join(KEYS)}{nearest(key, KEYS)}")
    if "recipe" in fields:
        name = fields["recipe"]
        if name not in RECIPES:
            raise InputError(f"recipe={name}: expected one of {', '.join(RECIPES)}{nearest(name, RECIPES)}")
        base = RECIPES[name]
    high = Product(None, None)
    products = {name: high if base is None else base.product(name) for name in PRODUCTS}
    for name, roles in PRODUCTS.items():
        if name in fields:
            left, right = _parse_pair(name, fields[name], roles)
            products[name] = dataclasses.replace(products[name], left=left, right=right)
    if "hadamard" in fields:
        lengths = _parse_hadamard(fields["hadamard"])
        products = {name: dataclasses.replace(of, hadamard=lengths.get(name, 0)) for name, of in products.items()}
    stochastic = () if base is None else base.stochastic
    if "stochastic" in fields:
        text = fields["stochastic"]
        stochastic = () if text == "none" else tuple(part.strip() for part in text.split("/"))
    accumulate = () if base is None else base.accumulate
    if "accumulate" in fields:
        accumulate = _parse_levels(fields["accumulate"])
    return Recipe(**products, stochastic=stochastic, accumulate=accumulate)


def parse_operand(text: str) -> Operand:
    """Parses the format of an operand, see `parse_recipe`.

    >>> str(parse_operand("nvfp4")), str(parse_operand("e4m3:delayed16")), parse_operand("high")
    ('nvfp4', 'e4m3:delayed16', None)

    Raises:
      InputError: the format is unknown.
    """
    text = text.strip()
    if text == "high":
        return None
    head, _, last = text.rpartition(":")
    if match := re.fullmatch(r"delayed(\d*)", last):
        if isinstance(element := getattr(PRESETS.get(head), "element", None), Integer) and head == str(element):
            return Delayed(element, int(match[1] or Delayed.history))
        if is_block_format(head):
            raise InputError(f"format {text!r}: blocks have scales of their own; expected such as e4m3:delayed")
        return Delayed(parse_format(head), int(match[1] or Delayed.history))
    if not is_block_format(text):
        return parse_format(text)
    try:
        return parse_block_format(text)
    except InputError as error:
        raise InputError(f"{error}{nearest(last, ('delayed',))}") from None


def _spell(operand: Operand) -> str:
    return "high" if operand is None else str(operand)


def _parse_pair(name: str, text: str, roles: tuple[str, str]) -> tuple[Operand, Operand]:
    parts = text.split("/")
    if len(parts) > 2:
        raise InputError(f"{name}={text}: expected a format for the {roles[0]} and one for the {roles[1]}, A/B")
    try:
        left, right = (parse_operand(part) for part in (parts[0], parts[-1]))
    except InputError as error:
        raise InputError(f"{name}={text}: {error}") from None
    return left, right


def _parse_hadamard(text: str) -> dict[str, int]:
    if text == "none":
        return {}
    lengths: dict[str, int] = {}
    for part in text.split("/"):
        name, sign, length = (word.strip() for word in part.rpartition(":"))
        if not re.fullmatch(r"\d+", length) or (sign and name not in PRODUCTS) or name in lengths:
            near = nearest(name, PRODUCTS) if sign else ""
            raise InputError(
                f"hadamard={text}: expected none, a length such as 16, or lengths of products such as wgrad:16{near}"
            )
        lengths |= {each: int(length) for each in ([name] if sign else PRODUCTS)}
    return lengths


def _parse_levels(text: str) -> tuple[Level, ...]:
    if text == "none":
        return ()
    levels = []
    for part in text.split("/"):
        format, sign, every = (word.strip() for word in part.partition(":"))
        if not sign or not re.fullmatch(r"\d+", every):
            raise InputError(f"accumulate={text}: expected none, or FORMAT:TERMS such as f32:128 or e8m13:32/f32:128")
        try:
            levels.append(Level(parse_format(format), int(every)))
        except InputError as error:
            raise InputError(f"accumulate={text}: {error}") from None
    return tuple(levels)


def _same(format: str, **fields: Any) -> Recipe:
    return parse_recipe({**dict.fromkeys(PRODUCTS, format), **fields})


def _mxfp8() -> Recipe:
    """Microscaling FP8, e4m3 in all products, scales rounded up so that nothing is clipped.

    Source: Mishra et al. 2025, Recipes for Pre-training LLMs with MXFP8, 2506.08027, sections 2 and 3; OCP MX 1.0.
    """
    return _same("mxfp8_e4m3:rceil")


def _mxfp4() -> Recipe:
    """Microscaling FP4 in all products, after a Hadamard transform of a block; the backward pass is stochastic.

    Source: Castro et al. 2025, Quartet: Native FP4 Training Can Be Optimal for Large Language Models, 2505.14669,
    algorithm 1. Two things differ. Scales are rounded up, which clips nothing, where Quartet clips in the forward pass
    and shrinks values by 3/4 in the backward pass. The backward pass rounds the numbers themselves, not those that the
    forward pass has rounded.
    """
    return _same("mxfp4:rceil", hadamard="32", stochastic="dgrad/wgrad")


def _nvfp4() -> Recipe:
    """NVFP4: 16x16 blocks of weights, stochastic gradients, a Hadamard transform of 16 in the gradient of the weights.

    The source also keeps about 15 % of the layers, most of them at the end, in 16 bits, and the head: that is a rule of
    the policy tree, such as `blocks_3=float32; head=float32; nvfp4`.

    Source: NVIDIA 2025, Pretraining Large Language Models with NVFP4, 2509.25149, sections 4 and 5.
    """
    return parse_recipe(
        {
            "fprop": "nvfp4/nvfp4_16x16",
            "dgrad": "nvfp4/nvfp4_16x16",
            "wgrad": "nvfp4/nvfp4",
            "stochastic": "gradients",
            "hadamard": "wgrad:16",
        }
    )


def _block128() -> Recipe:
    """DeepSeek-V3's FP8: e4m3, tiles of 1x128 for activations and gradients, blocks of 128x128 for weights.

    Sums are promoted to float32 every 128 terms.

    Source: DeepSeek-V3 Technical Report, 2412.19437, sections 3.3.2 and 3.3.3.
    """
    return parse_recipe(
        {
            "fprop": "block128/block128x128",
            "dgrad": "block128/block128x128",
            "wgrad": "block128/block128",
            "accumulate": "f32:128",
        }
    )


def _fp8_delayed() -> Recipe:
    """FP8 with a scale for each tensor from its largest magnitude in the last 1024 steps; gradients are e5m2.

    Source: Micikevicius et al. 2022, FP8 Formats for Deep Learning, 2209.05433, section 3; the recipe `DelayedScaling`
    of NVIDIA's Transformer Engine with its defaults (HYBRID, history of 1024, the maximum of it, margin 0).
    """
    return parse_recipe(
        {"fprop": "e4m3:delayed", "dgrad": "e5m2:delayed/e4m3:delayed", "wgrad": "e4m3:delayed/e5m2:delayed"}
    )


def _fp8_current() -> Recipe:
    """FP8 with a scale for each tensor from its own largest magnitude; gradients are e5m2.

    Source: the recipe `Float8CurrentScaling` of NVIDIA's Transformer Engine with its defaults (HYBRID, scales that are
    no powers of two).
    """
    return parse_recipe(
        {"fprop": "e4m3:tensor", "dgrad": "e5m2:tensor/e4m3:tensor", "wgrad": "e4m3:tensor/e5m2:tensor"}
    )


RECIPES: dict[str, Recipe] = {
    "mxfp8": _mxfp8(),
    "mxfp4": _mxfp4(),
    "nvfp4": _nvfp4(),
    "block128": _block128(),
    "fp8_delayed": _fp8_delayed(),
    "fp8_current": _fp8_current(),
}
"""Recipes by name; each is described in the docstring of the function that makes it, with its source."""
