"""`LoRA`: adapters of low rank beside the layers of an unmodified model, which are trained in place of its weights.

    lora = LoRA(rank=8, alpha=16, where=("**/query", "**/value"))
    model = as_model(module).under(lora)            # `init` makes base and adapters, `apply` uses both
    params = lora.merge(params)                     # the plain model's parameters again

A layer y = x W gets y = x W + (alpha / rank) (x A) B, with A (inputs, rank) and B (rank, outputs). B begins at zero, so
that the first output is the base's. A and B are layers of their own, `lora_a` and `lora_b` inside the layer: a policy,
its rules, emulated formats and the instruments reach their products as they reach any other.

Source: E. Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, https://arxiv.org/abs/2106.09685,
section 4.1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import string
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.recurrent import DenseParams

from jaxmp.errors import InputError, whole_number
from jaxmp.modules.interventions import LIFTED, Context, Interceptor, Intervention, MetModules, Order, Run
from jaxmp.trees import Pattern

A, B = "lora_a", "lora_b"
"""names of the two layers of an adapter, inside the layer that it adapts"""

ADAPTERS = (f"**/{A}", f"**/{B}")
"""patterns of the parameters of all adapters"""

GAUSSIAN = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
"""initialiser of A"""

ZEROS = nn.initializers.zeros
"""initialiser of B"""


@dataclasses.dataclass(frozen=True)
class LoRA(Intervention):
    """Adapters of low rank beside the layers that `where` names.

    Layers that can have one: Dense, DenseGeneral (attention's too), Einsum, Conv and ConvTranspose of one group, and
    the gates of every recurrent cell of Flax. Not: subclasses, which may compute something else; layers with batch
    dimensions, groups or masks; layers in `nn.WeightNorm` or `nn.SpectralNorm`, which would change the adapter's
    kernels too; an Einsum whose kernel does not begin with the contracted axes.

    The kernels of `nn.OptimizedLSTMCell` are joined by the cell before they meet an input; there A B is formed, in the
    compute dtype, and added to the kernel in float32.

    Raises:
      InputError: a value is not one of those below; when the model is initialised, a pattern names no layer that can
        have an adapter; or the model is one of `from_nnx`.
    """

    rank: int = 0
    """Rank of LoRA's adapters, which are trained in place of the model's weights; 0: there are none."""
    alpha: float = 16.0
    """What an adapter adds is multiplied by alpha / rank."""
    where: tuple[str, ...] = ("**",)
    """Layers that get an adapter: patterns of paths, such as **/query, or @Dense; a pattern covers what is below it."""

    order: ClassVar[Order] = Order.ADAPTERS

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", whole_number("LoRA.rank", self.rank, 0))
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise InputError(f"LoRA.alpha = {self.alpha!r}: expected a positive number")
        if isinstance(self.where, str):
            raise InputError(f"LoRA.where = {self.where!r}: expected a tuple, ({self.where!r},)")
        object.__setattr__(self, "where", tuple(self.where))
        if not self.where:
            raise InputError("LoRA.where = (): expected at least one pattern, such as '**/query'")
        for text in self.where:
            try:
                Pattern(text)
            except InputError as error:
                raise InputError(f"LoRA.where: {error}") from error

    def trace_key(self) -> Hashable:
        """All of its values."""
        return self

    def call(self, run: Run, model: Any, variables: Any, args: Any, kwargs: Any) -> Any:
        """One call of the model, with its adapters."""
        return run(_Call(self).intercept if self.rank else _plain, variables, args, kwargs)

    @contextlib.contextmanager
    def initializing(self) -> Iterator[Interceptor | None]:
        """The interceptor that makes the adapters' parameters; afterwards each pattern must have named a layer."""
        if not self.rank:
            yield None
            return
        call = _Call(self)
        yield call.intercept
        call.check()

    def call_as_a_whole(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """Raises an InputError: adapters stand inside modules."""
        raise InputError(f"LoRA.where = {self.where}: a model made by from_nnx has no modules to name")

    def merge(self, params: Any) -> Any:
        """The parameters of the model without adapters, that computes the same: kernel + (alpha / rank) A B.

        Formed in float32, or wider where a parameter is, and cast to the kernel's dtype. A layer that is stacked by
        `nn.scan` or `nn.vmap` is merged along its leading axes.

        Args:
          params: nested dicts, with adapters or without; kernels of any shape, A of (..., rank), B of (..., rank, ...).

        Raises: InputError if the shapes of an adapter do not fit its kernel.
        """
        return self._merged(params, "")

    def _merged(self, params: Any, path: str) -> Any:
        if not isinstance(params, Mapping):
            return params
        kept = {k: self._merged(of, f"{path}{k}/") for k, of in params.items() if k not in (A, B)}
        if A not in params or B not in params:
            return {**kept, **{name: params[name] for name in (A, B) if name in params}}
        kernel, a, b = (nn.unbox(each) for each in (params["kernel"], params[A]["kernel"], params[B]["kernel"]))
        wide = jnp.result_type(kernel, a, b, jnp.float32)
        # Axes that come before those of the product: of stacked layers, and of a convolution's window, where B has 1.
        lead = a.ndim + b.ndim - 2 - kernel.ndim
        inputs, outputs = a.shape[lead:-1], b.shape[lead + 1 :]
        fits = 0 <= lead < min(a.ndim, b.ndim) and a.shape[-1] == b.shape[lead]
        if not fits or (*a.shape[:lead], *inputs, *outputs) != kernel.shape:
            raise InputError(
                f"{path}kernel of shape {list(kernel.shape)}: an adapter of {list(a.shape)} and {list(b.shape)} does "
                "not fit it"
            )
        product = jnp.matmul(
            a.astype(wide).reshape(*a.shape[:lead], math.prod(inputs), a.shape[-1]),
            b.astype(wide).reshape(*b.shape[: lead + 1], math.prod(outputs)),
            precision=jax.lax.Precision.HIGHEST,
        )
        merged = kernel.astype(wide) + product.reshape(kernel.shape) * (self.alpha / a.shape[-1])
        return {**kept, "kernel": merged.astype(kernel.dtype)}


def _plain(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Context) -> Any:
    return next_fun(*args, **kwargs)


class _Call:
    """One call of a model: its interceptor, and the layers that it has met."""

    def __init__(self, lora: LoRA):
        self.lora = lora
        self.patterns = [Pattern(text) for text in lora.where]
        self.met = MetModules()
        self.able: list[str] = []  # the paths of the layers that can have an adapter
        self.normalised = 0  # number of modules, of those that are running, that change the kernels within

    def check(self) -> None:
        """Raises InputError if a pattern names no layer that can have an adapter."""
        for pattern in self.patterns:
            if not any(self._covers(pattern, path) for path in self.able):
                there = {path: self.met.classes[path] for path in self.able}
                raise InputError(
                    f"LoRA.where: the pattern {str(pattern)!r} names no layer that can have an adapter; "
                    f"{pattern.what_there_is(there)}"
                )

    def _covers(self, pattern: Pattern, path: str) -> bool:
        # A model that is a layer itself has no name that a path could match.
        whole = str(pattern) == "**"
        return whole or any(pattern.covers(at, self.met.classes) for at in self.met.with_owners(path))

    def intercept(self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Context) -> Any:
        """Runs one method of one module, and adds what its adapter adds."""
        module, method = context.module, context.method_name
        if method in (LIFTED, "setup"):
            return next_fun(*args, **kwargs)
        path = "/".join(module.path)
        self.met.meet(path, module)
        if isinstance(module, nn.WeightNorm | nn.SpectralNorm):
            self.normalised += 1
            try:
                return next_fun(*args, **kwargs)
            finally:
                self.normalised -= 1
        if method != "__call__" or self.normalised or path.rpartition("/")[2] in (A, B):
            return next_fun(*args, **kwargs)
        added = _added(module, self.lora, *args, **kwargs)
        if added is None:
            return next_fun(*args, **kwargs)
        self.able.append(path)
        if not any(self._covers(pattern, path) for pattern in self.patterns):
            return next_fun(*args, **kwargs)
        # The base comes first, so that the adapter changes none of the draws of its parameters.
        return added(next_fun(*args, **kwargs))


def _added(module: nn.Module, lora: LoRA, /, *args: Any, **kwargs: Any) -> Callable[[Any], Any] | None:
    """The function that adds an adapter to the outputs of a layer; None for a module that can have none."""
    layer: Any = module
    kind, rank, scale = type(module), lora.rank, lora.alpha / lora.rank
    x = args[0] if args else kwargs.get("inputs")

    def beside(make_a: Any, of_a: dict[str, Any], make_b: Any, of_b: dict[str, Any]) -> Callable[[Any], Any]:
        def add(y: Any) -> Any:
            a = make_a(**of_a, **_common(layer), kernel_init=GAUSSIAN, name=A)
            b = make_b(**of_b, **_common(layer), kernel_init=ZEROS, name=B)
            return y + (b(a(x)) * scale).astype(y.dtype)

        return add

    def add_to_kernel(kernel_and_bias: Any) -> Any:
        kernel, bias = kernel_and_bias
        common = {"use_bias": False, "param_dtype": layer.param_dtype}
        a, _ = DenseParams(rank, **common, kernel_init=GAUSSIAN, name=A)(x)
        product = nn.Dense(layer.features, **common, precision=layer.precision, kernel_init=ZEROS, name=B)(a)
        master = nn.unbox(layer.get_variable("params", "kernel"))
        wide = jnp.promote_types(master.dtype, jnp.float32)
        # To the master weights: in half, a small adapter would be lost beside a large weight.
        return (master.astype(wide) + product.astype(wide) * scale).astype(kernel.dtype), bias

    if kind is DenseParams:
        return add_to_kernel
    if kind is nn.Dense:
        return beside(kind, {"features": rank}, kind, {"features": layer.features})
    if kind is nn.DenseGeneral and not layer.batch_dims:
        return beside(kind, {"features": rank, "axis": layer.axis}, kind, {"features": layer.features})
    if kind in (nn.Conv, nn.ConvTranspose) and layer.mask is None:
        one_group = kind is nn.ConvTranspose or layer.feature_group_count == 1
        if not one_group or getattr(layer, "transpose_kernel", False):
            return None
        window = [layer.kernel_size] if isinstance(layer.kernel_size, int) else list(layer.kernel_size)
        same = ["kernel_size", "strides", "padding", "kernel_dilation", "input_dilation"]
        of_a = {"features": rank} | {name: getattr(layer, name) for name in same if hasattr(layer, name)}
        return beside(kind, of_a, nn.Conv, {"features": layer.features, "kernel_size": [1] * len(window)})
    if kind is nn.Einsum:
        equation = layer.einsum_str or (args[1] if len(args) > 1 else kwargs["einsum_str"])
        factors = _factored(equation, layer.shape, rank)
        return None if factors is None else beside(kind, factors[0], kind, factors[1])
    return None


def _common(layer: Any) -> dict[str, Any]:
    """The arguments of an adapter's layers that are those of the layer beside it."""
    given = {"use_bias": False, "param_dtype": layer.param_dtype, "precision": layer.precision}
    return given | ({"dtype": layer.dtype} if hasattr(layer, "dtype") else {})


def _factored(equation: str, shape: tuple[int, ...], rank: int) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Shapes and equations of the two factors of an einsum's kernel; None if it has no such form.

    "abc,cde->abde" with a kernel of (5, 6, 7) becomes "abc,cr->abr" and "abr,rde->abde".
    """
    left, _, out = equation.replace(" ", "").partition("->")
    x, _, kernel = left.partition(",")
    contracted = "".join(axis for axis in kernel if axis in x and axis not in out)
    produced = "".join(axis for axis in kernel if axis not in x and axis in out)
    if not contracted or kernel != contracted + produced or len(kernel) != len(shape):
        return None
    r = next(axis for axis in string.ascii_letters[17:] if axis not in equation)
    kept, count = "".join(axis for axis in x if axis not in contracted), len(contracted)
    return (
        {"shape": (*shape[:count], rank), "einsum_str": f"{x},{contracted}{r}->{kept}{r}"},
        {"shape": (rank, *shape[count:]), "einsum_str": f"{kept}{r},{r}{produced}->{out}"},
    )
