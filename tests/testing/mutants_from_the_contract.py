"""A plain train step in float16 with loss scaling, and faulty variants of it, each of which breaks a rule.

The variants were written from the contract alone, before the laws that have to find them were read or changed; only
`ImaginaryPartDropped` came later.
Each is a subclass of `PlainStep` that overrides the one place where its fault is.
"""

from typing import Any

import jax
import jax.numpy as jnp

HALF = jnp.float16
Tree = Any


def is_inexact(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def tree_where(flag: jax.Array, new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), new, old)


def through_half(tree: Tree) -> Tree:
    """Rounds every real leaf to float16's grid and keeps its dtype."""

    def rounded(leaf: jax.Array) -> jax.Array:
        return jax.lax.reduce_precision(leaf, 5, 10) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(rounded, tree)


class PlainStep:
    """Clipping, AdamW with a warm-up, an average of the weights and a running mean, in one transaction."""

    init_scale = 2.0**15
    growth_factor = 2.0
    backoff_factor = 0.5
    growth_interval = 3
    hysteresis = 1
    min_scale = 2.0**-4
    max_scale = 2.0**24
    microbatches = 1
    """microbatches inside one call"""
    window = 1
    """calls whose gradients are summed before they are applied"""
    axis_name: str | None = None

    clip_norm = 1.0
    decay = 1e-2
    learning_rate = 1e-2
    b1, b2, eps = 0.9, 0.999, 1e-8
    average = 0.99

    # ------------------------------------------------------------------ state

    def init(self, key: jax.Array) -> Tree:
        keys = jax.random.split(key, 4)
        params = {
            "bias": 0.1 * jax.random.normal(keys[0], (8,)),
            "calls": jnp.int32(7),
            "gain": jnp.float32(1.25),
            "phase": 1.0 + 0.5j * jax.random.normal(keys[1], (8,)).astype(jnp.complex64),
            "w_in": jax.random.normal(keys[2], (3, 8)) / 3**0.5,
            "w_out": jax.random.normal(keys[3], (8, 1)) / 8**0.5,
        }
        trained = self.trained(params)
        return {
            "step": jnp.int32(0),
            "key": jax.random.fold_in(key, 1),
            "params": params,
            "model_state": {"mean": jnp.zeros(8)},
            "optimizer": {
                "count": jnp.int32(0),
                "mu": jax.tree.map(jnp.zeros_like, trained),
                "nu": jax.tree.map(lambda leaf: jnp.zeros_like(jnp.real(leaf)), trained),
            },
            "ema": jax.tree.map(jnp.copy, trained),
            "window": {
                "calls": jnp.int32(0),
                "finite": jnp.bool_(True),
                "sum": jax.tree.map(jnp.zeros_like, trained),
            },
            "scaler": {
                "scale": self.first_scale(),
                "good": jnp.int32(0),
                "bad": jnp.int32(0),
                "skipped": jnp.int32(0),
                "in_a_row": jnp.int32(0),
            },
        }

    def first_scale(self) -> Any:
        return jnp.float32(self.init_scale)

    def trained(self, params: Tree) -> Tree:
        return {name: leaf for name, leaf in params.items() if is_inexact(leaf)}

    # --------------------------------------------------------------- the loss

    def outputs(self, params: Tree, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = self.add_bias(x.astype(HALF) @ params["w_in"].astype(HALF), params["bias"])
        hidden = jnp.tanh(hidden)
        turned = jnp.real(hidden.astype(jnp.float32) * params["phase"]).astype(HALF)
        out = (turned @ params["w_out"].astype(HALF)).astype(jnp.float32) * params["gain"]
        return out[:, 0], hidden

    def add_bias(self, hidden: jax.Array, bias: jax.Array) -> jax.Array:
        return (hidden.astype(jnp.float32) + bias).astype(HALF)

    def loss(self, params: Tree, batch: Tree, key: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, hidden = self.outputs(params, batch["x"])
        loss = jnp.sum(batch["weight"] * (out - batch["y"]) ** 2) / weight
        return loss, jnp.mean(hidden.astype(jnp.float32), axis=0)

    def scale_loss(self, loss: jax.Array, scale: jax.Array) -> jax.Array:
        return loss * scale

    def weight(self, batch: Tree) -> jax.Array:
        return self.over_replicas(jnp.sum(batch["weight"]))

    def over_replicas(self, tree: Tree) -> Tree:
        return jax.lax.psum(tree, self.axis_name) if self.axis_name else tree

    def gradients(self, state: Tree, batch: Tree) -> tuple[Tree, jax.Array, Tree]:
        """Returns the gradients of the scaled loss, the loss, and the model's state."""
        params, scale = state["params"], state["scaler"]["scale"]
        key = self.key_of_step(state)
        total = self.weight(batch)
        rest = {name: leaf for name, leaf in params.items() if not is_inexact(leaf)}

        def scaled_loss(trained: Tree, part: Tree) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            loss, mean = self.loss({**trained, **rest}, part, key, self.share(total, part))
            return self.scale_loss(loss, scale), (loss, mean)

        def of_part(part: Tree) -> tuple[Tree, tuple[jax.Array, jax.Array]]:
            grads, aux = jax.grad(scaled_loss, has_aux=True)(self.trained(params), part)
            return jax.tree.map(jnp.conj, grads), aux

        parts = jax.tree.map(lambda leaf: leaf.reshape(self.microbatches, -1, *leaf.shape[1:]), batch)
        sums = None
        for index in range(self.microbatches):
            found = of_part(jax.tree.map(lambda leaf, index=index: leaf[index], parts))
            sums = found if sums is None else self.add_microbatch(sums, found)
        grads, (loss, mean) = sums
        grads, loss = self.reduce_gradients(grads), self.over_replicas(loss)
        if self.axis_name:
            mean = jax.lax.pmean(mean, self.axis_name)
        running = 0.9 * state["model_state"]["mean"] + 0.1 * mean / self.microbatches
        return grads, loss, {"mean": running}

    def key_of_step(self, state: Tree) -> jax.Array:
        return jax.random.fold_in(state["key"], state["step"])

    def share(self, total: jax.Array, part: Tree) -> jax.Array:
        return total

    def reduce_gradients(self, grads: Tree) -> Tree:
        return self.over_replicas(grads)

    def add_microbatch(self, sums: Tree, found: Tree) -> Tree:
        return jax.tree.map(jnp.add, sums, found)

    # -------------------------------------------------------- the transaction

    def all_finite(self, grads: Tree, loss: jax.Array) -> jax.Array:
        flags = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(grads)]
        return jnp.all(jnp.stack([*flags, jnp.isfinite(loss)]))

    def unscale(self, grads: Tree, scale: jax.Array, new_scale: jax.Array) -> Tree:
        return jax.tree.map(lambda leaf: leaf / scale, grads)

    def norm(self, grads: Tree) -> jax.Array:
        return jnp.sqrt(sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(grads)))

    def clip(self, grads: Tree) -> Tree:
        factor = jnp.minimum(1.0, self.clip_norm / jnp.maximum(self.norm(grads), 1e-30))
        return jax.tree.map(lambda leaf: leaf * factor, grads)

    def moments(self, grads: Tree, mu: Tree, nu: Tree) -> tuple[Tree, Tree]:
        mu = jax.tree.map(lambda m, g: self.b1 * m + (1 - self.b1) * g, mu, grads)
        nu = jax.tree.map(lambda n, g: self.b2 * n + (1 - self.b2) * jnp.abs(g) ** 2, nu, grads)
        return mu, nu

    def direction(self, mu: jax.Array, nu: jax.Array, count: jax.Array) -> jax.Array:
        return (mu / (1 - self.b1**count)) / (jnp.sqrt(nu / (1 - self.b2**count)) + self.eps)

    def rate(self, count: jax.Array) -> jax.Array:
        return self.learning_rate * jnp.minimum(1.0, count / 4.0)

    def move(self, param: jax.Array, direction: jax.Array, rate: jax.Array) -> jax.Array:
        return param - rate * (direction + self.decay * param)

    def mix(self, ema: Tree, trained: Tree) -> Tree:
        return jax.tree.map(lambda a, p: self.average * a + (1 - self.average) * p, ema, trained)

    def apply(self, state: Tree, grads: Tree) -> Tree:
        """Returns all that one applied step changes."""
        count = state["optimizer"]["count"] + 1
        mu, nu = self.moments(self.clip(grads), state["optimizer"]["mu"], state["optimizer"]["nu"])
        rate = self.rate(count)
        old = self.trained(state["params"])
        trained = {name: self.move(old[name], self.direction(mu[name], nu[name], count), rate) for name in old}
        return {
            "params": {**state["params"], **trained},
            "optimizer": {"count": count, "mu": mu, "nu": nu},
            "ema": self.mix(state["ema"], trained),
        }

    def commit(self, finite: jax.Array, new: Tree, old: Tree) -> Tree:
        return tree_where(finite, new, old)

    def next_scaler(self, scaler: Tree, finite: jax.Array) -> Tree:
        bad = jnp.where(finite, 0, scaler["bad"] + 1)
        back_off = bad >= self.hysteresis
        good = jnp.where(finite, scaler["good"] + 1, 0)
        grow = good >= self.growth_interval
        grown = self.grown(scaler["scale"])
        lowered = jnp.maximum(scaler["scale"] * self.backoff_factor, self.min_scale)
        scale = jnp.where(back_off, lowered, jnp.where(grow, grown, scaler["scale"]))
        return {
            "scale": scale,
            "good": jnp.where(grow, 0, good),
            "bad": bad,
            "skipped": scaler["skipped"] + jnp.where(finite, 0, 1),
            "in_a_row": jnp.where(finite, 0, scaler["in_a_row"] + 1),
        }

    def grown(self, scale: jax.Array) -> jax.Array:
        larger = scale * self.growth_factor
        return jnp.where(larger <= self.max_scale, larger, scale)

    def add_call(self, total: Tree, grads: Tree) -> Tree:
        return jax.tree.map(jnp.add, total, grads)

    def window_finite(self, before: jax.Array, now: jax.Array) -> jax.Array:
        return before & now

    def emptied(self, total: Tree, due: jax.Array, finite: jax.Array) -> Tree:
        return jax.tree.map(lambda leaf: jnp.where(due, jnp.zeros_like(leaf), leaf), total)

    def __call__(self, state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        scaler = state["scaler"]
        scale = scaler["scale"]
        grads, loss, model_state = self.gradients(state, batch)
        finite = self.all_finite(grads, loss)

        calls = state["window"]["calls"] + 1
        due = calls >= self.window
        whole = self.window_finite(state["window"]["finite"], finite)
        candidate = self.next_scaler(scaler, whole)
        next_scaler = self.commit_scaler(due, candidate, scaler, finite)
        unscaled = self.unscale(grads, scale, next_scaler["scale"])
        total = self.add_call(state["window"]["sum"], jax.tree.map(lambda leaf: leaf / self.window, unscaled))
        total = jax.tree.map(lambda new, old: jnp.where(finite, new, old), total, state["window"]["sum"])

        apply = due & whole
        old = {name: state[name] for name in ("params", "optimizer", "ema")}
        new = self.commit(apply, self.on_growth(self.apply(state, total), old, scale, next_scaler["scale"]), old)
        next_state = {
            **new,
            "step": self.next_step(state["step"], finite),
            "key": self.next_key(state["key"], finite),
            "model_state": self.commit_model_state(finite, model_state, state["model_state"]),
            "window": {
                "calls": jnp.where(due, 0, calls),
                "finite": whole | due,
                "sum": self.emptied(total, due, whole),
            },
            "scaler": next_scaler,
        }
        return next_state, {"loss": loss, "loss_scale": scale, "finite": finite}

    def commit_scaler(self, due: jax.Array, new: Tree, old: Tree, finite: jax.Array) -> Tree:
        return tree_where(due, new, old)

    def commit_model_state(self, finite: jax.Array, new: Tree, old: Tree) -> Tree:
        return self.commit(finite, new, old)

    def next_step(self, step: jax.Array, finite: jax.Array) -> jax.Array:
        return step + 1

    def next_key(self, key: jax.Array, finite: jax.Array) -> jax.Array:
        return key

    def on_growth(self, new: Tree, old: Tree, scale: jax.Array, new_scale: jax.Array) -> Tree:
        return new


class PlainWindow(PlainStep):
    """The same, with gradients summed over two calls."""

    window = 2


class PlainMicrobatches(PlainStep):
    """The same, with two microbatches in each call."""

    microbatches = 2


class PlainStubborn(PlainStep):
    """The same, which lowers the scale only after two overflows in a row."""

    hysteresis = 2


class PlainNoise(PlainStep):
    """The same, with noise on the inputs, drawn from the number of the step."""

    def outputs(self, params: Tree, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return super().outputs(params, x + 0.1 * jax.random.normal(self.noise, x.shape))

    def loss(self, params: Tree, batch: Tree, key: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        self.noise = key
        return super().loss(params, batch, key, weight)


class PlainKeyStream(PlainNoise):
    """The same, with noise drawn from a key that moves on at each step."""

    def key_of_step(self, state: Tree) -> jax.Array:
        return state["key"]

    def next_key(self, key: jax.Array, finite: jax.Array) -> jax.Array:
        return jax.random.fold_in(key, 1)


class PlainThirds(PlainStep):
    """The same, whose scale grows by half: a factor that is no power of two."""

    growth_factor = 1.5


# ================================================================ faulty variants
MUTANTS: dict[str, type[PlainStep]] = {}


def mutant(cls: type[PlainStep]) -> type[PlainStep]:
    MUTANTS[cls.__name__] = cls
    return cls


# ------------------------------------------------------- the loss and its gradient


@mutant
class LossRoundedToHalf(PlainStep):
    """Order 1, T4: the loss passes through float16 before it is scaled."""

    def loss(self, params, batch, key, weight):
        loss, mean = super().loss(params, batch, key, weight)
        return loss.astype(HALF).astype(jnp.float32), mean


@mutant
class ScaledLossInHalf(PlainStep):
    """Order 1: loss times S is formed in float16."""

    def scale_loss(self, loss, scale):
        return loss.astype(HALF) * scale.astype(HALF)


@mutant
class GradientsRoundedToHalf(PlainStep):
    """Order 2: the gradients that come out are rounded to float16, as those of half copies are."""

    def gradients(self, state, batch):
        grads, loss, model_state = super().gradients(state, batch)
        return through_half(grads), loss, model_state


@mutant
class BiasSummedInHalf(PlainStep):
    """T2: the transpose of the bias's broadcast is summed in float16."""

    def add_bias(self, hidden, bias):
        return hidden + bias.astype(HALF)


@mutant
class SumsOfRowsInHalf(PlainStep):
    """T5: the loss is summed over rows in float16."""

    def loss(self, params, batch, key, weight):
        out, hidden = self.outputs(params, batch["x"])
        terms = (batch["weight"] * (out - batch["y"]) ** 2).astype(HALF)
        return jnp.sum(terms).astype(jnp.float32) / weight, jnp.mean(hidden.astype(jnp.float32), axis=0)


@mutant
class MeanOfMeans(PlainMicrobatches):
    """Order 3: each microbatch is divided by its own weight, and the means are averaged."""

    def share(self, total, part):
        return jnp.sum(part["weight"]) * self.microbatches


@mutant
class MicrobatchesSummedInHalf(PlainMicrobatches):
    """Order 3: gradients of microbatches are summed in float16."""

    def add_microbatch(self, sums, found):
        total, aux = super().add_microbatch(sums, found)
        return through_half(total), aux


@mutant
class MicrobatchesAveraged(PlainMicrobatches):
    """Order 3: gradients that were already divided by the whole weight are divided once more."""

    def add_microbatch(self, sums, found):
        total, aux = super().add_microbatch(sums, found)
        return jax.tree.map(lambda leaf: leaf / 2, total), aux


@mutant
class DirectionOfAscentForComplex(PlainStep):
    """T24: the gradient of a complex leaf is not conjugated."""

    def unscale(self, grads, scale, new_scale):
        return jax.tree.map(jnp.conj, super().unscale(grads, scale, new_scale))


@mutant
class ImaginaryPartDropped(PlainStep):
    """T24: the imaginary part of a complex gradient is dropped."""

    def unscale(self, grads, scale, new_scale):
        def real(leaf):
            return jnp.real(leaf).astype(leaf.dtype)

        return jax.tree.map(real, super().unscale(grads, scale, new_scale))


# ------------------------------------------------------------------- the flag


@mutant
class FlagWithoutTheLoss(PlainStep):
    """Order 4: a loss of NaN with finite gradients is committed."""

    def all_finite(self, grads, loss):
        return super().all_finite(grads, jnp.float32(0))


@mutant
class FlagWithoutScalars(PlainStep):
    """Order 4: leaves without axes have no say."""

    def all_finite(self, grads, loss):
        return super().all_finite([leaf for leaf in jax.tree.leaves(grads) if leaf.ndim], loss)


@mutant
class FlagOfRealParts(PlainStep):
    """Order 4: the imaginary part of a complex leaf has no say."""

    def all_finite(self, grads, loss):
        return super().all_finite(jax.tree.map(jnp.real, grads), loss)


@mutant
class FlagOfInfinitiesOnly(PlainStep):
    """Order 4: NaN is no overflow."""

    def all_finite(self, grads, loss):
        bad = [jnp.any(jnp.isinf(leaf)) for leaf in [*jax.tree.leaves(grads), loss]]
        return ~jnp.any(jnp.stack(bad))


@mutant
class FlagOfNaNOnly(PlainStep):
    """Order 4: an infinity is no overflow."""

    def all_finite(self, grads, loss):
        bad = [jnp.any(jnp.isnan(leaf)) for leaf in [*jax.tree.leaves(grads), loss]]
        return ~jnp.any(jnp.stack(bad))


@mutant
class FlagWithoutMinusInfinity(PlainStep):
    """Order 4: only what is too large upwards is seen."""

    def all_finite(self, grads, loss):
        good = [jnp.all(jnp.real(leaf) < jnp.inf) for leaf in [*jax.tree.leaves(grads), loss]]
        return jnp.all(jnp.stack(good))


@mutant
class FlagInTheRangeOfHalf(PlainStep):
    """Laws: a scaled float32 gradient above 65504 is taken for an overflow."""

    def all_finite(self, grads, loss):
        small = [jnp.all(jnp.abs(leaf) <= 65504.0) for leaf in jax.tree.leaves(grads)]
        return super().all_finite(grads, loss) & jnp.all(jnp.stack(small))


@mutant
class FlagFromScaledLossInHalf(PlainStep):
    """Laws: the flag asks whether the scaled loss is finite in float16."""

    def all_finite(self, grads, loss):
        return super().all_finite(grads, loss) & jnp.isfinite((loss * 2.0**15).astype(HALF))


@mutant
class FlagFromTheSquaredNorm(PlainStep):
    """T5: the flag is made of a sum of squares in float16."""

    def all_finite(self, grads, loss):
        squares = sum(jnp.sum(jnp.abs(leaf).astype(HALF) ** 2) for leaf in jax.tree.leaves(grads))
        return super().all_finite(grads, loss) & jnp.isfinite(squares)


# ------------------------------------------------------------------- unscaling


@mutant
class UnscaledByTheNewScale(PlainStep):
    """B7: on the step on which the scale grows, all gradients are half of what they should be."""

    def unscale(self, grads, scale, new_scale):
        return super().unscale(grads, new_scale, new_scale)


@mutant
class UnscaledByTheFirstScale(PlainStep):
    """Order 5: the scale of the first step is built into the program."""

    def unscale(self, grads, scale, new_scale):
        return super().unscale(grads, jnp.float32(self.init_scale), new_scale)


@mutant
class NotUnscaled(PlainStep):
    """Order 5: Adam hides that nothing is unscaled."""

    clip_norm = 1e30

    def unscale(self, grads, scale, new_scale):
        return grads


@mutant
class VectorsNotUnscaled(PlainStep):
    """Order 5: leaves with one axis, whose clip and Adam hide it, keep the scale."""

    def unscale(self, grads, scale, new_scale):
        return jax.tree.map(lambda leaf: leaf if leaf.ndim == 1 else leaf / scale, grads)


@mutant
class ScalarsNotUnscaled(PlainStep):
    """Order 5: leaves without axes keep the scale."""

    def unscale(self, grads, scale, new_scale):
        return jax.tree.map(lambda leaf: leaf if leaf.ndim == 0 else leaf / scale, grads)


@mutant
class RealPartsUnscaled(PlainStep):
    """Order 5: the imaginary part of a complex leaf keeps the scale."""

    def unscale(self, grads, scale, new_scale):
        def one(leaf):
            return leaf / scale if not jnp.iscomplexobj(leaf) else jnp.real(leaf) / scale + 1j * jnp.imag(leaf)

        return jax.tree.map(one, grads)


@mutant
class UnscaledInHalf(PlainStep):
    """B3: gradients are divided in float16; 2^-26 becomes 0."""

    def unscale(self, grads, scale, new_scale):
        return through_half(super().unscale(grads, scale, new_scale))


@mutant
class ReciprocalInHalf(PlainStep):
    """B3: 1/S is formed in float16 and multiplied: 0 where S is above 2^24."""

    max_scale = 2.0**30

    def unscale(self, grads, scale, new_scale):
        factor = (1 / scale).astype(HALF).astype(jnp.float32)
        return jax.tree.map(lambda leaf: leaf * factor, grads)


@mutant
class UnscaledByAHundredthLess(PlainStep):
    """Order 5: the divisor is off by one part in a hundred once the scale is not the first."""

    def unscale(self, grads, scale, new_scale):
        off = jnp.where(scale == self.init_scale, 1.0, 1.01)
        return jax.tree.map(lambda leaf: leaf / (scale * off), grads)


@mutant
class ScaleOfLargestHalf(PlainStep):
    """B9: a cap of 65504, which is no power of two."""

    max_scale = 65504.0

    def grown(self, scale):
        return jnp.minimum(scale * self.growth_factor, self.max_scale)


@mutant
class TinyGradientsFlushed(PlainStep):
    """Laws: what is below float16's smallest subnormal after unscaling is dropped."""

    def unscale(self, grads, scale, new_scale):
        grads = super().unscale(grads, scale, new_scale)
        return jax.tree.map(lambda leaf: jnp.where(jnp.abs(leaf) < 2.0**-24, 0, leaf), grads)


# ------------------------------------------------------------------ the optimizer


@mutant
class ClippedBeforeUnscaling(PlainStep):
    """Order 6, B16: the clip sees scaled gradients."""

    def unscale(self, grads, scale, new_scale):
        return super().unscale(self.clip(grads), scale, new_scale)


@mutant
class NormInHalf(PlainStep):
    """T5: the global norm is formed in float16."""

    def norm(self, grads):
        squares = [jnp.sum(jnp.abs(leaf).astype(HALF) ** 2) for leaf in jax.tree.leaves(grads)]
        return jnp.sqrt(sum(squares)).astype(jnp.float32)


@mutant
class FirstMomentInHalf(PlainStep):
    """T14: the first moment is rounded to float16."""

    def moments(self, grads, mu, nu):
        mu, nu = super().moments(grads, mu, nu)
        return through_half(mu), nu


@mutant
class SecondMomentInHalf(PlainStep):
    """T14: the second moment is rounded to float16, where small ones are 0."""

    def moments(self, grads, mu, nu):
        mu, nu = super().moments(grads, mu, nu)
        return mu, through_half(nu)


@mutant
class SecondMomentDecaysInBfloat16(PlainStep):
    """T14: b2 is .999 in bfloat16, which is 1.0."""

    def moments(self, grads, mu, nu):
        b2 = jnp.bfloat16(self.b2).astype(jnp.float32)
        mu, _ = super().moments(grads, mu, nu)
        return mu, jax.tree.map(lambda n, g: b2 * n + (1 - self.b2) * jnp.abs(g) ** 2, nu, grads)


@mutant
class DirectionInHalf(PlainStep):
    """T14: Adam's quotient is formed in float16, with eps rounded to 0."""

    def direction(self, mu, nu, count):
        if jnp.iscomplexobj(mu):
            return super().direction(mu, nu, count)
        up = (mu / (1 - self.b1**count)).astype(HALF)
        down = jnp.sqrt((nu / (1 - self.b2**count)).astype(HALF)) + jnp.asarray(self.eps, HALF)
        return (up / down).astype(jnp.float32)


@mutant
class DirectionRoundedToHalf(PlainStep):
    """T14: the finished direction passes through float16."""

    def direction(self, mu, nu, count):
        return through_half(super().direction(mu, nu, count))


@mutant
class WeightsMovedInHalf(PlainStep):
    """Order 2: the masters are rounded to float16 after the step."""

    def move(self, param, direction, rate):
        return through_half(super().move(param, direction, rate))


@mutant
class AverageInHalf(PlainStep):
    """Order 7: the average of the weights is mixed in float16."""

    def mix(self, ema, trained):
        return through_half(super().mix(ema, trained))


@mutant
class DecayOutsideTheTransaction(PlainStep):
    """B16: weight decay shrinks the weights on skipped steps."""

    def commit(self, finite, new, old):
        kept = super().commit(finite, new, old)
        if "params" not in kept:
            return kept
        shrunk = {
            name: leaf * (1 - self.decay * self.learning_rate) if is_inexact(leaf) else leaf
            for name, leaf in kept["params"].items()
        }
        return {**kept, "params": {**kept["params"], **tree_where(finite, kept["params"], shrunk)}}


@mutant
class CountRunsOnSkips(PlainStep):
    """B13, B16: the schedule's count goes on when a step is skipped."""

    def commit(self, finite, new, old):
        kept = super().commit(finite, new, old)
        if "optimizer" not in kept:
            return kept
        return {**kept, "optimizer": {**kept["optimizer"], "count": new["optimizer"]["count"]}}


@mutant
class AverageRunsOnSkips(PlainStep):
    """Order 7: the average moves towards the weights on skipped steps."""

    def commit(self, finite, new, old):
        kept = super().commit(finite, new, old)
        if "ema" not in kept:
            return kept
        return {**kept, "ema": tree_where(finite, new["ema"], self.mix(old["ema"], self.trained(old["params"])))}


@mutant
class StatisticsOfSkippedSteps(PlainStep):
    """B13: batch statistics are committed on skipped steps."""

    def commit_model_state(self, finite, new, old):
        return new


@mutant
class CommitByAddingZero(PlainStep):
    """Order 7: -0.0 + 0.0 is +0.0."""

    def commit(self, finite, new, old):
        def one(a, b):
            return b + jnp.where(finite, a - b, 0) if is_inexact(a) else jnp.where(finite, a, b)

        return jax.tree.map(one, new, old)


@mutant
class CommitByMultiplying(PlainStep):
    """Order 7, B17: 0 * inf is NaN."""

    def commit(self, finite, new, old):
        def one(a, b):
            return a * finite + b * (1 - finite) if is_inexact(a) else jnp.where(finite, a, b)

        return jax.tree.map(one, new, old)


@mutant
class MomentsLostOnSkips(PlainStep):
    """Order 7: a skipped step empties the moments."""

    def commit(self, finite, new, old):
        kept = super().commit(finite, new, old)
        if "optimizer" not in kept:
            return kept
        empty = jax.tree.map(jnp.zeros_like, old["optimizer"])
        return {**kept, "optimizer": tree_where(finite, new["optimizer"], empty)}


@mutant
class StepStandsStillOnSkips(PlainNoise):
    """Order 7: the step counts attempts, so that key and data go on after a skip."""

    def next_step(self, step, finite):
        return step + finite.astype(jnp.int32)


@mutant
class KeyStandsStillOnSkips(PlainKeyStream):
    """Order 7: the key stream goes on after a skip."""

    def next_key(self, key, finite):
        return jnp.where(finite, super().next_key(key, finite), key)


@mutant
class IntegersScaled(PlainStep):
    """B4: an integer leaf goes through the loss scale."""

    def apply(self, state, grads):
        new = super().apply(state, grads)
        moved = (new["params"]["calls"].astype(jnp.float32) / state["scaler"]["scale"]).astype(jnp.int32)
        return {**new, "params": {**new["params"], "calls": moved}}


# ------------------------------------------------------------------ the scaler


@mutant
class GrowsOneStepLate(PlainStep):
    """Scaler rule: at good == growth_interval, not after one more."""

    def next_scaler(self, scaler, finite):
        following = super().next_scaler(scaler, finite)
        good = jnp.where(finite, scaler["good"] + 1, 0)
        grow = good >= self.growth_interval + 1
        scale = jnp.where(finite, jnp.where(grow, self.grown(scaler["scale"]), scaler["scale"]), following["scale"])
        return {**following, "scale": scale, "good": jnp.where(grow, 0, good)}


@mutant
class GoodStepsKeptOverAnOverflow(PlainStep):
    """Scaler rule: an overflow begins the count of good steps anew."""

    def next_scaler(self, scaler, finite):
        following = super().next_scaler(scaler, finite)
        return {**following, "good": jnp.where(finite, following["good"], scaler["good"])}


@mutant
class GoodStepsKeptOverGrowth(PlainStep):
    """Scaler rule: after growth the count begins at 0; else the scale grows at every step."""

    def next_scaler(self, scaler, finite):
        return {**super().next_scaler(scaler, finite), "good": jnp.where(finite, scaler["good"] + 1, 0)}


@mutant
class NoCap(PlainStep):
    """B10: the scale grows past its cap, and reaches inf."""

    def grown(self, scale):
        return scale * self.growth_factor


@mutant
class NoFloor(PlainStep):
    """B10: the scale falls past its floor, and reaches 0."""

    def next_scaler(self, scaler, finite):
        following = super().next_scaler(scaler, finite)
        return {**following, "scale": jnp.where(finite, following["scale"], scaler["scale"] * self.backoff_factor)}


@mutant
class FloorOfOne(PlainStep):
    """B1: the floor is 1, whatever was asked for."""

    def next_scaler(self, scaler, finite):
        following = super().next_scaler(scaler, finite)
        return {**following, "scale": jnp.maximum(following["scale"], 1.0)}


@mutant
class NeverBelowTheFirst(PlainStep):
    """Laws: the claimed floor is never reached, since the scale stays at its first value or above."""

    def next_scaler(self, scaler, finite):
        following = super().next_scaler(scaler, finite)
        return {**following, "scale": jnp.maximum(following["scale"], self.init_scale)}


@mutant
class CapIsNeverReached(PlainStep):
    """Laws: the claimed cap is never reached, since the scale stops one factor below."""

    def grown(self, scale):
        larger = scale * self.growth_factor
        return jnp.where(larger < self.max_scale, larger, scale)


@mutant
class AppliedAtTheFloor(PlainStep):
    """Laws: at the floor an overflow is committed, for there is no lower scale to try."""

    def all_finite(self, grads, loss):
        return super().all_finite(grads, loss) | self.at_floor

    def __call__(self, state, batch):
        self.at_floor = state["scaler"]["scale"] <= self.min_scale
        return super().__call__(state, batch)


@mutant
class StuckAtTheFloor(PlainStep):
    """Laws: once at its floor, the scale never grows again."""

    def grown(self, scale):
        return jnp.where(scale <= self.min_scale, scale, super().grown(scale))


@mutant
class GrowsOverTheFloorOnOverflow(PlainStep):
    """Laws: an overflow at the floor sends the scale back to its first value."""

    def next_scaler(self, scaler, finite):
        following = super().next_scaler(scaler, finite)
        back = ~finite & (scaler["scale"] <= self.min_scale)
        return {**following, "scale": jnp.where(back, self.init_scale, following["scale"])}


@mutant
class GrowsByTwoWhateverIsAsked(PlainThirds):
    """Laws: growth by a factor that is no power of two."""

    def grown(self, scale):
        larger = scale * 2.0
        return jnp.where(larger <= self.max_scale, larger, scale)


@mutant
class GrowthRoundedToAPowerOfTwo(PlainThirds):
    """Laws: growth by half again, rounded down to a power of two, which is no growth at all."""

    def grown(self, scale):
        return jnp.exp2(jnp.floor(jnp.log2(super().grown(scale))))


@mutant
class BacksOffByAQuarter(PlainStep):
    """Scaler rule: an overflow multiplies by the backoff factor once."""

    def next_scaler(self, scaler, finite):
        following = super().next_scaler(scaler, finite)
        lower = jnp.maximum(scaler["scale"] * self.backoff_factor**2, self.min_scale)
        return {**following, "scale": jnp.where(finite, following["scale"], lower)}


@mutant
class HysteresisIgnored(PlainStubborn):
    """Scaler rule: two overflows in a row are asked for, one lowers the scale."""

    def next_scaler(self, scaler, finite):
        following = super().next_scaler(scaler, finite)
        lower = jnp.maximum(scaler["scale"] * self.backoff_factor, self.min_scale)
        return {**following, "scale": jnp.where(finite, following["scale"], lower)}


@mutant
class HysteresisNotInARow(PlainStubborn):
    """Scaler rule: overflows count in a row, a good step between them begins anew."""

    def next_scaler(self, scaler, finite):
        bad = jnp.where(finite, scaler["bad"], scaler["bad"] + 1)
        following = super().next_scaler({**scaler, "bad": scaler["bad"]}, finite)
        lower = jnp.maximum(scaler["scale"] * self.backoff_factor, self.min_scale)
        scale = jnp.where(finite, following["scale"], jnp.where(bad >= self.hysteresis, lower, scaler["scale"]))
        return {**following, "scale": scale, "bad": jnp.where(bad >= self.hysteresis, 0, bad)}


@mutant
class HysteresisCommitsTheFirst(PlainStubborn):
    """Laws: the first of two overflows, which lowers nothing, is applied."""

    def all_finite(self, grads, loss):
        return super().all_finite(grads, loss) | self.patient

    def __call__(self, state, batch):
        self.patient = jnp.bool_(False)
        finite = super().all_finite(*self.gradients(state, batch)[:2])
        self.patient = ~finite & (state["scaler"]["bad"] + 1 < self.hysteresis)
        return super().__call__(state, batch)


@mutant
class SkipsNotCounted(PlainStep):
    """Order 8: the skipped steps are reported."""

    def next_scaler(self, scaler, finite):
        return {**super().next_scaler(scaler, finite), "skipped": scaler["skipped"]}


@mutant
class SkipsInARowNeverEnd(PlainStep):
    """Order 8: an applied step ends the row of skipped ones."""

    def next_scaler(self, scaler, finite):
        following = super().next_scaler(scaler, finite)
        return {**following, "in_a_row": scaler["in_a_row"] + jnp.where(finite, 0, 1)}


@mutant
class WeaklyTypedScale(PlainStep):
    """T7, B11: the first scale is a Python float: two compiles."""

    def first_scale(self):
        return jnp.asarray(self.init_scale)

    def init(self, key):
        state = super().init(key)
        state["scaler"]["scale"] = self.init_scale
        return state


# ------------------------------------------- the very step on which the scale grows


@mutant
class WeightsInHalfOnGrowth(PlainStep):
    """Laws: the step on which the scale grows commits weights rounded to float16."""

    def on_growth(self, new, old, scale, new_scale):
        return {**new, "params": tree_where(new_scale > scale, through_half(new["params"]), new["params"])}


@mutant
class AverageStandsStillOnGrowth(PlainStep):
    """Laws: the step on which the scale grows leaves the average where it was."""

    def on_growth(self, new, old, scale, new_scale):
        return {**new, "ema": tree_where(new_scale > scale, old["ema"], new["ema"])}


@mutant
class NothingAppliedOnGrowth(PlainStep):
    """Laws: the step on which the scale grows is not applied."""

    def on_growth(self, new, old, scale, new_scale):
        return tree_where(new_scale > scale, old, new)


@mutant
class SecondMomentOfGrowthScaled(PlainStep):
    """B7: the second moment alone sees the new scale."""

    def on_growth(self, new, old, scale, new_scale):
        factor = (scale / jnp.maximum(new_scale, scale)) ** 2
        nu = jax.tree.map(lambda leaf: leaf * factor, new["optimizer"]["nu"])
        return {**new, "optimizer": {**new["optimizer"], "nu": nu}}


# ------------------------------------------------------------------- windows


@mutant
class ScaleMovesInsideAWindow(PlainWindow):
    """Accumulation: S changes between two calls of one window."""

    def commit_scaler(self, due, new, old, finite):
        return tree_where(due | ~finite, new, old)


@mutant
class ScaleCountsEveryCall(PlainWindow):
    """Accumulation: the scaler is updated at every call, not once a window."""

    def commit_scaler(self, due, new, old, finite):
        return self.next_scaler(old, finite)


@mutant
class DroppedWindowKept(PlainWindow):
    """Accumulation: what a dropped window has summed goes into the next one."""

    def emptied(self, total, due, finite):
        return super().emptied(total, due & finite, finite)


@mutant
class WindowOfTheLastCall(PlainWindow):
    """Accumulation: the flag of a window is that of its last call."""

    def window_finite(self, before, now):
        return now


@mutant
class SumInHalf(PlainWindow):
    """B15: the sum of a window is rounded to float16."""

    def add_call(self, total, grads):
        return through_half(super().add_call(total, grads))


@mutant
class SumDividedTwice(PlainWindow):
    """Accumulation: the mean of a window is divided once more."""

    def add_call(self, total, grads):
        return super().add_call(total, jax.tree.map(lambda leaf: leaf / 2, grads))


# ------------------------------------------------------------------- replicas


@mutant
class EachReplicaItsOwnFlag(PlainStep):
    """B14: replicas look at their own gradients, before the sum."""

    def all_finite(self, grads, loss):
        return super().all_finite(self.own, loss) if self.axis_name else super().all_finite(grads, loss)

    def reduce_gradients(self, grads):
        self.own = grads
        return super().reduce_gradients(grads)


@mutant
class ReducedInHalf(PlainStep):
    """T3: gradients are summed over replicas in float16."""

    def reduce_gradients(self, grads):
        return through_half(self.over_replicas(through_half(grads))) if self.axis_name else grads
