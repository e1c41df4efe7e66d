"""The laws find each faulty train step that was written from the numerics contract alone, and accuse no plain one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.testing import StepAdapter, replicated, step_laws


def load():
    path = Path(__file__).parent / "mutants_from_the_contract.py"
    spec = importlib.util.spec_from_file_location("mutants_from_the_contract", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mutants = load()
KEPT = ("params", "optimizer", "ema", "model_state")


def rows(weights=(1, 1, 1, 1, 2, 2, 2, 3)):
    """Eight rows; by default of unequal weights, so that a mean of means is not the mean."""
    random = np.random.default_rng(0)
    return {
        "x": jnp.asarray(random.normal(size=(8, 3)), jnp.float32),
        "y": jnp.asarray(random.normal(size=8), jnp.float32),
        "weight": jnp.asarray(weights, jnp.float32),
    }


def adapter(cls, axis_name=None, repeats=1, equal_weights=False):
    """A window of two calls forms the mean of two means: its weights are equal, like those of its reference."""
    step = cls()
    equal = equal_weights or step.window > 1
    step.axis_name = axis_name
    # Compiling is most of what a law takes here, so without optimisation.
    compiled = jax.jit(step.__call__, compiler_options={"xla_backend_optimization_level": 0})
    return StepAdapter(
        init=lambda: step.init(jax.random.key(0)),
        step=step.__call__ if axis_name else compiled,
        batch=jax.tree.map(lambda x: jnp.concatenate([x] * repeats), rows([1] * 8) if equal else rows()),
        kept=lambda state: {name: state[name] for name in KEPT},
        loss_scale=lambda state: state["scaler"]["scale"],
        loss=lambda out: out[1]["loss"],
        microbatches=step.window,
        min_scale=step.min_scale,
        max_scale=step.max_scale,
        growth_factor=step.growth_factor,
        backoff_factor=step.backoff_factor,
        growth_interval=step.growth_interval,
        hysteresis=step.hysteresis,
        skipped_steps=lambda state: state["scaler"]["skipped"],
        consecutive_skips=lambda state: state["scaler"]["in_a_row"],
    )


def laws_of(name):
    """The laws of a faulty step: over two replicas, and beside a plain step, where its fault shows only there."""
    cls = mutants.MUTANTS[name]
    if name in ("EachReplicaItsOwnFlag", "ReducedInHalf"):
        return step_laws(replicated(adapter(cls, "data"), "data", 2))
    if name == "BiasSummedInHalf":  # a sum of a few numbers is near enough in half
        return step_laws(adapter(cls, repeats=16))
    return step_laws(adapter(cls), reference=reference_of(cls))


def reference_of(cls):
    """A plain step on the whole batch, for one that takes it in parts."""
    if issubclass(cls, (mutants.PlainMicrobatches, mutants.PlainWindow)):
        return adapter(mutants.PlainStep, equal_weights=issubclass(cls, mutants.PlainWindow))
    return None


# A law that finds each of them; most are found by several.
FOUND = {
    "LossRoundedToHalf": "loss_in_float32",
    "ScaledLossInHalf": "loss_in_float32",
    "GradientsRoundedToHalf": "gradients_keep_their_bits",
    "BiasSummedInHalf": "sums_in_float32",
    "SumsOfRowsInHalf": "loss_in_float32",
    "MeanOfMeans": "as_the_reference",
    "MicrobatchesSummedInHalf": "gradients_keep_their_bits",
    "MicrobatchesAveraged": "as_the_reference",
    "DirectionOfAscentForComplex": "complex_parameters_descend",
    "ImaginaryPartDropped": "complex_parameters_descend",
    "FlagWithoutTheLoss": "bad_loss_is_skipped",
    "FlagWithoutScalars": "bad_gradient_is_skipped",
    "FlagOfRealParts": "bad_gradient_is_skipped",
    "FlagOfInfinitiesOnly": "bad_gradient_is_skipped",
    "FlagOfNaNOnly": "bad_gradient_is_skipped",
    "FlagWithoutMinusInfinity": "bad_gradient_is_skipped",
    "FlagInTheRangeOfHalf": "finite_is_applied",
    "FlagFromScaledLossInHalf": "finite_is_applied",
    "FlagFromTheSquaredNorm": "finite_is_applied",
    "UnscaledByTheNewScale": "growth_step_is_right",
    "UnscaledByTheFirstScale": "scale_does_not_matter",
    "NotUnscaled": "scale_does_not_matter",
    "VectorsNotUnscaled": "scale_does_not_matter",
    "ScalarsNotUnscaled": "scale_does_not_matter",
    "RealPartsUnscaled": "scale_does_not_matter",
    "UnscaledInHalf": "gradients_keep_their_bits",
    "ReciprocalInHalf": "scale_does_not_matter",
    "UnscaledByAHundredthLess": "scale_does_not_matter",
    "ScaleOfLargestHalf": "scale_stays_in_its_range",
    "TinyGradientsFlushed": "tiny_gradients_are_felt",
    "ClippedBeforeUnscaling": "scale_does_not_matter",
    "NormInHalf": "norms_in_float32",
    "FirstMomentInHalf": "moments_in_float32",
    "SecondMomentInHalf": "small_gradients_take_small_steps",
    "SecondMomentDecaysInBfloat16": "second_moments_decay",
    "DirectionInHalf": "updates_in_float32",
    "DirectionRoundedToHalf": "updates_in_float32",
    "WeightsMovedInHalf": "moments_in_float32",
    "AverageInHalf": "moments_in_float32",
    "DecayOutsideTheTransaction": "bad_gradient_is_skipped",
    "CountRunsOnSkips": "bad_gradient_is_skipped",
    "AverageRunsOnSkips": "bad_gradient_is_skipped",
    "StatisticsOfSkippedSteps": "bad_gradient_is_skipped",
    "CommitByAddingZero": "bad_gradient_is_skipped",
    "CommitByMultiplying": "bad_gradient_is_skipped",
    "MomentsLostOnSkips": "bad_gradient_is_skipped",
    "StepStandsStillOnSkips": "random_numbers_advance",
    "KeyStandsStillOnSkips": "random_numbers_advance",
    "IntegersScaled": "scale_does_not_matter",
    "GrowsOneStepLate": "scale_moves_as_claimed",
    "GoodStepsKeptOverAnOverflow": "scale_moves_as_claimed",
    "GoodStepsKeptOverGrowth": "scale_moves_as_claimed",
    "NoCap": "scale_stays_in_its_range",
    "NoFloor": "scale_stays_in_its_range",
    "FloorOfOne": "scale_stays_in_its_range",
    "NeverBelowTheFirst": "scale_stays_in_its_range",
    "CapIsNeverReached": "scale_stays_in_its_range",
    "AppliedAtTheFloor": "scale_stays_in_its_range",
    "StuckAtTheFloor": "scale_stays_in_its_range",
    "GrowsOverTheFloorOnOverflow": "scale_stays_in_its_range",
    "GrowsByTwoWhateverIsAsked": "scale_moves_as_claimed",
    "GrowthRoundedToAPowerOfTwo": "scale_moves_as_claimed",
    "BacksOffByAQuarter": "scale_moves_as_claimed",
    "HysteresisIgnored": "scale_moves_as_claimed",
    "HysteresisNotInARow": "scale_moves_as_claimed",
    "HysteresisCommitsTheFirst": "bad_gradient_is_skipped",
    "SkipsNotCounted": "skips_are_counted",
    "SkipsInARowNeverEnd": "skips_are_counted",
    "WeaklyTypedScale": "scale_is_sound",
    "WeightsInHalfOnGrowth": "growth_step_is_right",
    "AverageStandsStillOnGrowth": "growth_step_is_right",
    "NothingAppliedOnGrowth": "growth_step_is_right",
    "SecondMomentOfGrowthScaled": "growth_step_is_right",
    "ScaleMovesInsideAWindow": "scale_stands_in_a_window",
    "ScaleCountsEveryCall": "scale_stands_in_a_window",
    "DroppedWindowKept": "dropped_window_is_empty",
    "WindowOfTheLastCall": "dropped_window_is_empty",
    "SumInHalf": "gradients_keep_their_bits",
    "SumDividedTwice": "as_the_reference",
    "EachReplicaItsOwnFlag": "replicas_agree",
    "ReducedInHalf": "gradients_keep_their_bits",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUND)
def test_a_faulty_step_is_found(name):
    result = laws_of(name)[FOUND[name]]
    assert result.verdict == "broken" and result.words


def test_every_faulty_step_is_tried():
    assert set(FOUND) == set(mutants.MUTANTS) and len(FOUND) >= 30


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("PlainStep", "PlainNoise")),
        *(
            pytest.param(name, marks=pytest.mark.full_size)
            for name in ("PlainWindow", "PlainMicrobatches", "PlainStubborn")
        ),
    ],
)
def test_a_plain_step_obeys_every_law(name):
    cls = getattr(mutants, name)
    laws = step_laws(adapter(cls), reference=reference_of(cls))
    assert not laws.broken, str(laws)
