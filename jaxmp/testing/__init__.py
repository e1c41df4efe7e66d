"""Property tests for anyone's mixed precision: laws that every policy, scaler and train step has to obey.

    import jaxmp.testing
    test_policy = jaxmp.testing.policy_laws(MyNet(), "head=float32; mixed_float16", batch)
    test_scaler = jaxmp.testing.scaler_laws(adapter)
    test_step = jaxmp.testing.step_laws(adapter)

Each of the three is a value: printed, it is a table of laws with the smallest counterexample of each that is broken; in
a test module, under a name that begins with `test`, pytest makes a test of each law.

Needs hypothesis: `pip install jaxmp[testing]`. Two of its profiles are registered here: `jaxmp-quick`, which the laws
run under, and `jaxmp-thorough`, which they run under where it is the one in force (import this module in `conftest.py`
and run `pytest --hypothesis-profile=jaxmp-thorough`).
"""

try:
    import hypothesis as _hypothesis
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "jaxmp.testing needs hypothesis, which is not installed: pip install 'jaxmp[testing]'", name="hypothesis"
    ) from None

from jaxmp.testing.laws import Broken, Laws, Row
from jaxmp.testing.policies import policy_laws
from jaxmp.testing.replicas import replicated
from jaxmp.testing.scalers import ScalerAdapter, from_value_and_grad, scaler_laws
from jaxmp.testing.steps import StepAdapter, step_laws

__all__ = [
    "Broken",
    "Laws",
    "Row",
    "ScalerAdapter",
    "StepAdapter",
    "from_value_and_grad",
    "policy_laws",
    "replicated",
    "scaler_laws",
    "step_laws",
]

del _hypothesis
