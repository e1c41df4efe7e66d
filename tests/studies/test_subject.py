"""What the instruments say of a subject, an argument or an option that they do not take."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

import jaxmp
from jaxmp.errors import InputError
from jaxmp.experiment.config_file import ConfigFile

X = jnp.ones((2, 2))


def loss(params):
    return jnp.sum(params**2)


@pytest.fixture(scope="module")
def experiment():
    return ConfigFile.find("digits_mlp").experiment()


@pytest.mark.parametrize("name", ["audit", "blame", "find_policy", "memory", "what_if"])
def test_a_name_is_no_subject(name):
    with pytest.raises(InputError, match=rf"^{name}: 'runs/x' is a str: expected an? .*jaxmp\.Run\('runs/x'\)"):
        getattr(jaxmp, name)("runs/x")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: jaxmp.audit(loss, X, polcy="float16"), r"loss\(params\) does not .*'polcy'; did you mean 'policy'\?"),
        (lambda: jaxmp.audit(loss), "missing a required argument: 'params'"),
        (lambda: jaxmp.blame(loss, X, X), "too many positional arguments"),
        (lambda: jaxmp.memory(loss), "missing a required argument: 'params'"),
        (lambda: jaxmp.memory(lambda: 1), r"memory\(loss, params, \*args\)"),
        (lambda: jaxmp.find_policy(loss, None, [], bugdet=1), "'bugdet'; did you mean 'budget'"),
        (lambda: jaxmp.find_policy(loss), "missing a required argument: 'explain'"),
        (lambda: jaxmp.what_if(lambda params, state, batch, key: 0, X), "1 arguments after the loss; expected params,"),
        (lambda: jaxmp.what_if(loss, X, step=3), "step: only of an experiment or a run"),
        (lambda: jaxmp.what_if(loss, X), r"loss\(params\) does not take these arguments: too many"),
    ],
)
def test_arguments_that_a_function_does_not_take_are_named(call, said):
    with pytest.raises(InputError, match=said):
        call()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda of: jaxmp.audit(of, X, policy="float16"), "arguments, policy: only of a function"),
        (lambda of: jaxmp.memory(of, opt_state=[X]), "opt_state: only of a function"),
        (lambda of: jaxmp.find_policy(of, None), "explain and points are those of a loss"),
        (lambda of: jaxmp.find_policy(of, warmup=3), "no 'warmup'; did you mean 'warmup_steps'"),
        (lambda of: jaxmp.what_if(of, trains=("a",)), "trains: only of a function"),
    ],
)
def test_what_an_experiment_has_of_its_own_is_not_given(experiment, call, said):
    with pytest.raises(InputError, match=said):
        call(experiment)
