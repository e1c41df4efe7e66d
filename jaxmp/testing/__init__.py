"""Property tests for mixed precision, jaxmp's or anyone's: laws of policies, scalers, train steps and
quantisers.

    import jaxmp.testing
    test_policy = jaxmp.testing.policy_laws(MyNet(), "head=float32; mixed_float16", batch)
    test_scaler = jaxmp.testing.scaler_laws(jaxmp.DynamicScaler())  # or an adapter
    test_step = jaxmp.testing.step_laws(adapter)
    test_quantizer = jaxmp.testing.quantizer_laws(my_quantize, "mxfp8")

Each of them returns a `Laws`. Printed, it is a table, with the smallest counterexample of each broken law. In a
test module, under a name that begins with `test`, pytest makes one test for each law.

Needs hypothesis: `pip install jaxmp[testing]`. This module registers two hypothesis profiles. The laws run under
`jaxmp-quick`. To run them under `jaxmp-thorough`, with 500 examples instead of 20, import this module in `conftest.py`
and run `pytest --hypothesis-profile=jaxmp-thorough`.
"""

from jaxmp.errors import install as _install

try:
    import hypothesis as _hypothesis
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        f"jaxmp.testing needs hypothesis, which is not installed: {_install('testing')}", name="hypothesis"
    ) from None

from jaxmp.testing.laws import Broken, LawResult, Laws
from jaxmp.testing.policies import policy_laws
from jaxmp.testing.private import PrivateClaim
from jaxmp.testing.quantisers import quantizer_laws
from jaxmp.testing.replicas import replicated
from jaxmp.testing.scalers import ScalerAdapter, from_value_and_grad, scaler_laws
from jaxmp.testing.steps import StepAdapter, step_laws

__all__ = [
    "Broken",
    "LawResult",
    "Laws",
    "PrivateClaim",
    "ScalerAdapter",
    "StepAdapter",
    "from_value_and_grad",
    "policy_laws",
    "quantizer_laws",
    "replicated",
    "scaler_laws",
    "step_laws",
]

del _hypothesis
