"""`Forward`: a trained model as a function of flat lists of arrays, which is what is exported."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.interpreters import partial_eval

from jaxmp.data import catalog
from jaxmp.data.source import Source, is_numeric
from jaxmp.data.tfds import TFDS
from jaxmp.errors import InputError
from jaxmp.jaxprs import tracing
from jaxmp.modules.linen import UnderPolicy, cast_to_param, init_delayed_scaling, with_policy
from jaxmp.modules.model import as_model
from jaxmp.precision.policy_tree import PolicyTree
from jaxmp.precision.recipe import GRADIENT_AMAX, HISTORIES
from jaxmp.runs.run import Run
from jaxmp.training.evaluation import evaluation_key
from jaxmp.training.state import TrainState
from jaxmp.trees import by_path

KEY = "key_data"
"""name among the weights of the data of the random key, of a model that draws in evaluation"""

Spec = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Forward:
    """A trained model as a pure function of flat lists of arrays, with what the lists hold."""

    function: Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], list[Any]]
    """`(weights, state, inputs) -> [*outputs, *new state]`"""
    weights: dict[str, Any]
    """parameters and model state that the outputs depend on, by path"""
    state: Spec
    """what is handed from call to call, by path, its rows symbolic: the cache of a decoder; {} for other models"""
    inputs: Spec
    """raw columns of the data that the outputs depend on, with symbolic rows, in the order of their names"""
    treedef: Any
    """structure of the model's outputs"""
    outputs: Spec
    """outputs by name, with symbolic rows"""
    context: int | None = None
    """most tokens of a row that a decoder takes at a time; None for other models"""

    def arguments(self) -> tuple[list[Any], list[Any], list[Any]]:
        """Shapes and dtypes of the function's arguments, with symbolic rows."""
        weights = [jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf)) for leaf in self.weights.values()]
        return weights, list(self.state.values()), list(self.inputs.values())

    def structure(self) -> Any:
        """The structure of the outputs as JSON: dicts and lists, with the place of each array."""
        return _structure(jax.tree.unflatten(self.treedef, range(len(self.outputs))))

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The outputs as the model returns them."""
        return jax.tree.unflatten(self.treedef, leaves)


def forward(run: Run, state: TrainState, source: Source, *, precision: str | None = None) -> Forward:
    """The outputs of `run.apply` as a function of raw rows, whose preparation is inside.

    Args:
      run: the run.
      state: the state whose averaged weights are taken.
      source: rows after the host transforms; only their columns' shapes and dtypes matter.
      precision: policy to compute under instead of the run's own.

    Raises: InputError if the model cannot be traced for a number of rows that is not known, or an output has no
      leading axis of rows.
    """
    of = traced(run, state, source, precision=precision)
    _check_rows(run, of.outputs, next(iter(of.inputs.values())).shape[0])
    return of


def traced(run: Run, state: TrainState, source: Source, *, precision: str | None = None) -> Forward:
    """Does what `forward` does for outputs of any shape. For arguments see there.

    Raises: InputError if the model cannot be traced for a number of rows that is not known.
    """
    experiment = run.experiment
    tree = experiment.policy if precision is None else PolicyTree.parse(precision)
    model = as_model(experiment.adapted_model).under(UnderPolicy(tree))
    params, model_state = variables(run, state, tree)
    prepared = experiment.data.prepare(train=False)
    columns = {name: column for name, column in source[np.arange(1)].items() if is_numeric(column)}
    rows = symbolic("b")
    specs = {
        name: jax.ShapeDtypeStruct((rows, *column.shape[1:]), jax.dtypes.canonicalize_dtype(column.dtype))
        for name, column in sorted(columns.items())
    }

    def outputs(variables: Any, batch: dict[str, Any], key_data: Any) -> Any:
        (count,) = {column.shape[0] for column in batch.values()}
        key = jax.random.wrap_key_data(key_data)
        batch = prepared({**batch, "weight": jnp.ones(count, jnp.float32)}, None)
        return model.apply(*variables, *(batch[name] for name in experiment.task.inputs), key=key)[0]

    key_data = jax.random.key_data(evaluation_key(state))
    trained = (params, model_state)
    with tracing(f"export: the model of {run.path} does not trace", "a model for any number of rows"):
        closed, shapes = jax.make_jaxpr(outputs, return_shape=True)(trained, specs, key_data)
    weights, used_columns, draws = _used(closed, (trained, specs, key_data))
    if not used_columns:
        raise InputError(f"export: the outputs of the model of {run.path} depend on no column of its data")
    leaves, treedef = jax.tree.flatten(trained)
    names = list(_weight_names(params, model_state))
    kept = [index for index, name in enumerate(names) if name in weights]

    def function(given: Sequence[Any], state: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        given = list(given)
        key = given.pop() if draws else jnp.zeros(key_data.shape, key_data.dtype)
        found: list[Any] = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves]  # those that nothing reads
        for index, leaf in zip(kept, given, strict=True):
            found[index] = leaf
        batch = dict(zip(used_columns, inputs, strict=True))
        count = inputs[0].shape[0]
        for name in specs:
            batch.setdefault(name, jnp.zeros((count, *specs[name].shape[1:]), specs[name].dtype))
        return jax.tree.leaves(outputs(jax.tree.unflatten(treedef, found), batch, key))

    return Forward(
        function=function,
        weights={names[index]: leaves[index] for index in kept} | ({KEY: key_data} if draws else {}),
        state={},
        inputs={name: specs[name] for name in used_columns},
        treedef=jax.tree.structure(shapes),
        outputs=_by_name(shapes),
    )


def decoder(run: Run, state: TrainState, *, precision: str | None = None) -> Forward:
    """One step of decoding with a cache: `(tokens, cache) -> (logits, cache)`, any number of rows and of tokens.

    Args:
      run: a run of a decoder, such as GPT2 or Llama, whose `__call__` takes `decode=`.
      state: the state whose averaged weights are taken.
      precision: policy to compute under instead of the run's own.

    Raises: InputError if the model is no decoder, cannot be traced for unknown numbers of rows and tokens, or has an
      output without a leading axis of rows.
    """
    experiment = run.experiment
    tree = experiment.policy if precision is None else PolicyTree.parse(precision)
    module = experiment.model
    if "decode" not in inspect.signature(type(module).__call__).parameters or not hasattr(module, "context"):
        raise InputError(
            f"--decode: {type(module).__name__} decodes without a cache; expected a decoder, such as GPT2 or Llama, "
            "whose __call__ takes decode="
        )
    params, model_state = variables(run, state, tree)
    if experiment.lora.rank:
        params = experiment.lora.merge(params)
    apply = with_policy(module.apply, tree)
    (name,) = experiment.task.inputs
    rows, length = export.symbolic_shape("b, t", constraints=[f"t <= {module.context}"])
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def start(variables: Any, tokens: Any) -> Any:
        return apply(variables, tokens, decode=True, mutable=["cache"])

    trained = {"params": params, **model_state}
    with tracing(f"export: the decoder of {run.path} does not trace", "a model for any number of rows and tokens"):
        logits, made = jax.eval_shape(start, trained, tokens)
    _check_rows(run, _by_name(logits), rows)
    leaves, treedef = jax.tree.flatten(trained)
    cache_leaves, cache_treedef = jax.tree.flatten(made)

    def function(given: Sequence[Any], cache: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        variables = {**jax.tree.unflatten(treedef, given), **jax.tree.unflatten(cache_treedef, cache)}
        logits, after = apply(variables, *inputs, decode=True, mutable=["cache"])
        return [*jax.tree.leaves(logits), *jax.tree.leaves(after)]

    return Forward(
        function=function,
        weights=dict(zip(_weight_names(params, model_state), leaves, strict=True)),
        state=dict(zip(by_path(made), cache_leaves, strict=True)),
        inputs={name: tokens},
        treedef=jax.tree.structure(logits),
        outputs=_by_name(logits),
        context=module.context,
    )


def variables(run: Run, state: TrainState, tree: PolicyTree) -> tuple[Any, Any]:
    """Averaged parameters in the dtypes of a policy, and the model state with that of delayed scaling."""
    experiment, params, model_state = run.experiment, state.averaged_params, state.model_state
    if tree == experiment.policy:
        return params, model_state
    model, inputs = experiment.adapted_model, run.trainer.inputs
    return cast_to_param(model, tree, params, *inputs), {**init_delayed_scaling(model, tree, *inputs), **model_state}


def symbolic(name: str) -> Any:
    """A dimension whose size is not known."""
    (dimension,) = export.symbolic_shape(name)
    return dimension


def class_names(data: Any, target: str | None) -> list[str] | None:
    """The names of the classes that the column `target` numbers, if the data know them.

    A dataset's own `classes()` are those of the column `label`; None if it has no names.
    """
    if hasattr(data, "classes"):
        names = data.classes() if target == "label" else None
        return None if names is None else list(names)
    if isinstance(data, TFDS) and target is not None:
        try:
            feature = catalog.read_tfds_info(catalog.find_dataset(data.name, data.version)).features[target]
        except (KeyError, TypeError, InputError):
            return None
        return list(feature.names) if getattr(feature, "names", None) else None
    return None


def _weight_names(params: Any, model_state: Any) -> dict[str, Any]:
    """Parameters and model state by path; a path in both gets its collection's name before it."""
    own = by_path(params)
    return own | {(f"state/{path}" if path in own else path): leaf for path, leaf in by_path(model_state).items()}


def _used(closed: Any, arguments: tuple[Any, Any, Any]) -> tuple[set[str], list[str], bool]:
    """Which weights and which columns the outputs depend on, by name, and whether they depend on the key."""
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    variables, specs, _ = arguments
    (*of_arrays, of_key) = used
    names = list(_weight_names(*variables))
    weights = {name for name, is_used in zip(names, of_arrays, strict=False) if is_used and not _of_gradients(name)}
    columns = [name for name, is_used in zip(specs, of_arrays[len(names) :], strict=True) if is_used]
    return weights, columns, of_key


def _of_gradients(name: str) -> bool:
    """Whether an input of a product has a part in its gradients alone, which its custom derivative hides."""
    collection, *path = name.split("/")
    # The operand is the last but one: a module may have such a name, too.
    return collection == GRADIENT_AMAX or (collection == HISTORIES and path[-2].startswith("gradients_"))


def _check_rows(run: Run, outputs: Spec, rows: Any) -> None:
    """Raises InputError if an output does not have the symbolic number of rows as its first dimension."""
    for name, leaf in outputs.items():
        if not leaf.shape or str(leaf.shape[0]) != str(rows):
            found = f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"
            raise InputError(
                f"export: the output {name} of the model of {run.path} is {found} for {rows} rows; expected the rows "
                f"first in each output, [{rows}, ...]"
            )


def _by_name(outputs: Any) -> Spec:
    """Outputs by name: `output`, of a single array, or their paths."""
    return {name or "output": leaf for name, leaf in by_path(outputs).items()}


def _structure(value: Any) -> Any:
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, Mapping):
        return {str(name): _structure(inside) for name, inside in value.items()}
    if hasattr(value, "_fields"):
        return {name: _structure(getattr(value, name)) for name in value._fields}
    if isinstance(value, tuple | list):
        return [_structure(inside) for inside in value]
    return by_path(value)
