"""Ranges: what is counted is exact, whatever it is counted in, and counting changes nothing."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxmp
from jaxmp import Adam, Arrays, Experiment, Loop, Run, quantize
from jaxmp.instruments import ranges
from jaxmp.instruments.ranges import FORMATS, Range, count, count_each, count_lost_updates, gradients_and_module_counts
from jaxmp.modules.linen import with_policy
from jaxmp.training.gradients import make_gradients

pytestmark = pytest.mark.xdist_group("ranges")  # one worker: the fixtures train

SPECIAL = [
    0.0,
    -0.0,
    np.inf,
    -np.inf,
    np.nan,
    1.0,
    -1.0,
    65504.0,
    65519.9,
    65520.0,
    448.0,
    464.0,
    464.1,
    57344.0,
    61440.0,
]
SPECIAL += [2.0**-149, 3 * 2.0**-149, 2.0**-127, 2.0**-126, 2.0**-25, 1.1 * 2.0**-25, 2.0**-24, 2.0**-14, 2.0**-10]
SPECIAL += [3.38e38, 3.3961775e38, 3.3895314e38, 3.4e38, 2.0**-134, 1.01 * 2.0**-134, 2.0**127, 2.0**-9, 2.0**-17]


def numbers(dtype) -> np.ndarray:
    """Every kind of number there is, and 20,000 of all magnitudes."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        return np.concatenate(
            [bits, np.array(SPECIAL, np.float32), rng.standard_normal(999).astype(np.float32)]
        ).astype(dtype)


def reference(x: np.ndarray) -> dict:
    """The same by plain NumPy in float64, where float32's subnormals are normal numbers."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        values = np.abs(np.asarray(x, np.float64).ravel())
    finite = values[np.isfinite(values) & (values != 0)]
    exponents, counts = np.unique(np.frexp(finite)[1] - 1, return_counts=True)
    return {
        "size": values.size,
        "zeros": int(np.sum(values == 0)),
        "infinite": int(np.sum(np.isinf(values))),
        "nan": int(np.sum(np.isnan(values))),
        "smallest": float(finite.min()) if finite.size else None,
        "largest": float(finite.max()) if finite.size else None,
        "exponents": dict(zip(exponents.tolist(), counts.tolist(), strict=True)),
    }


def fields(found: Range) -> dict:
    return {name: getattr(found, name) for name in reference(np.ones(1))}


@pytest.fixture(scope="module")
def jitted():
    return jax.jit(count)


@pytest.mark.slow
@pytest.mark.parametrize("parity", [0, 1])  # large arrays are counted by halves, where they have them
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn], ids=str)
def test_counts_are_those_of_numpy_with_subnormals_zeros_infinities_and_nan(jitted, dtype, parity):
    x = numbers(dtype)
    x = x[(x.size + parity) % 2 :]
    found = Range.read(jitted(jnp.asarray(x)))
    assert fields(found) == reference(x) and found.exact
    assert fields(Range.read(count(jnp.asarray(x)))) == fields(found)  # without jit


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_what_a_format_loses_is_what_rounding_to_it_loses(jitted, format):
    x = numbers(np.float32)
    found = Range.read(jitted(jnp.asarray(x)))
    finite = np.isfinite(x) & (x != 0)
    dtype = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}.get(format) or jnp.dtype(format)
    with np.errstate(over="ignore", invalid="ignore"):
        wide, rounded = x.astype(np.float64), x.astype(dtype).astype(np.float64)
    tiny = float(ml_dtypes.finfo(dtype).smallest_normal)
    zero, lost = finite & (rounded == 0), finite & ~np.isfinite(rounded)
    total = finite.sum()
    assert found.underflow[format] == zero.sum() / total
    assert found.overflow[format] == lost.sum() / total
    assert found.subnormal[format] == np.sum(finite & ~zero & (np.abs(wide) < tiny)) / total
    assert 0 < zero.sum() and 0 < lost.sum()
    ours = np.asarray(quantize(jnp.asarray(x), format, saturate=False))
    np.testing.assert_array_equal(ours[finite] == 0, rounded[finite] == 0)


@pytest.mark.slow
def test_the_smallest_may_be_a_subnormal_of_float32():
    for size in (5, 2**14):
        found = Range.read(count(jnp.asarray(np.array([3 * 2.0**-149, 2.0**-140] + [0.0] * (size - 2), np.float32))))
        assert (found.smallest, found.largest, found.exponents) == (3 * 2.0**-149, 2.0**-140, {-148: 1, -140: 1})


@pytest.mark.slow
def test_nothing_and_integers_have_no_range(jitted):
    found = Range.read(jitted(jnp.zeros((0, 3))))
    assert found.size == 0 and found.smallest is None and found.underflow["float16"] is None
    assert found.to_json()["underflow"]["float16"] is None and found.to_json()["counts"] == []
    assert list(count_each({"a": jnp.ones(2), "b": jnp.arange(3), "c": {"d": jnp.float16(0)}})) == ["a", "c/d"]
    assert json.loads(json.dumps(found.to_json(), allow_nan=False)) == found.to_json()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=str)
def test_swallowed_updates_are_those_that_float64_says_round_to_the_same_number(dtype):
    rng = np.random.default_rng(1)
    params = rng.standard_normal(5000).astype(dtype)
    updates = (rng.standard_normal(5000) * 2.0 ** rng.integers(-30, 0, 5000)).astype(np.float32)
    updates[:10] = 0.0
    exact = params.astype(np.float64) + updates.astype(np.float64)
    same = (exact.astype(dtype) == params) & (updates != 0)
    (found,) = jax.jit(count_lost_updates)({"w": params}, {"w": updates}).values()
    assert 0 < same.sum() < 4990
    # float64's sum is rounded once, float32's twice: they part where a sum lies half-way within 2^-24 of its size.
    assert abs(int(ranges.whole(found)) - same.sum()) <= (0 if dtype == np.float32 else 2)


# More numbers than an int32 can count.


def test_counts_of_many_arrays_and_of_many_turns_are_those_of_more_than_an_int32():
    counts = count(jnp.ones(2**22))
    together = Range.read(ranges._together([counts] * 600))
    turns = Range.read(ranges.decoded(4096 * ranges.encoded(counts)))  # what a scan of 4096 turns adds up
    assert (together.size, together.exponents) == (600 * 2**22, {0: 600 * 2**22})
    assert (turns.size, turns.exponents) == (2**34, {0: 2**34})
    summed = Range.read(ranges.decoded(4096 * ranges.encoded(ranges._together([counts] * 3))))
    assert summed.exponents == {0: 3 * 2**34}


def test_an_array_of_more_elements_than_an_int32_counts_is_counted_in_parts(monkeypatch):
    shapes = jax.eval_shape(count, jax.ShapeDtypeStruct((2**31 + 3,), jnp.float32))
    assert shapes.counts.shape == (2, len(ranges.EDGES))
    x = numbers(np.float32)[: 2**13 + 5]
    monkeypatch.setattr(ranges, "_PART", 1000)
    assert fields(Range.read(jax.jit(count)(jnp.asarray(x)))) == reference(x)


def test_flags_are_counted_beyond_an_int32():
    flags = np.random.default_rng(2).random((7, 300, 11)) < 0.7
    number_of = jax.jit(ranges.number_of)
    assert ranges.whole(number_of(flags)) == flags.sum()
    # As if so many flags had been set in each row.
    assert ranges.whole(number_of(np.full((9, 1), 2**30 + 1, np.int32))) == 9 * (2**30 + 1)


# Modules.


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(4)(x)), None


class Net(nn.Module):
    """A module once, one in a scan, one rematerialised, one that is used twice."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first")(x)
        scanned = nn.scan(Block, variable_broadcast="params", split_rngs={"params": False}, length=3)
        x, _ = scanned(name="scanned")(x, None)
        x = nn.remat(nn.Dense)(4, name="remat")(x)
        tied = nn.Dense(4, name="tied")
        return tied(nn.tanh(tied(x)))


@pytest.mark.slow
def test_module_counts_are_of_what_modules_hand_on_and_get_back_under_scan_and_remat():
    model, scale = Net(), 2.0**10
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 4)), jnp.float32)
    params = model.init(jax.random.key(0), x)["params"]

    def loss_fn(params, model_state, batch, key):
        out = with_policy(model.apply, "mixed_float16")({"params": params}, batch["x"])
        return jnp.sum(out.astype(jnp.float32) ** 2), (jnp.float32(1), {"out": out}, model_state)

    arguments = params, {}, jnp.float32(scale), {"x": x}, None
    grads, measured, modules = jax.jit(gradients_and_module_counts(loss_fn))(*arguments)
    plain, *_ = jax.jit(make_gradients(loss_fn))(*arguments)
    out = measured.metrics["out"]
    jax.tree.map(np.testing.assert_array_equal, grads, plain)
    read = {path: (Range.read(both.outputs), Range.read(both.gradients)) for path, both in modules.items()}
    assert {path: both[0].size for path, both in read.items()} == {
        "": 20, "first": 20, "scanned": 60, "scanned/Dense_0": 60, "remat": 20, "tied": 40
    }  # fmt: skip
    assert {path: both[1].size for path, both in read.items()} == {path: both[0].size for path, both in read.items()}
    assert read["first"][0].exact and not read["scanned"][0].exact and not read["tied"][1].exact
    # The model's own: its output as float16, and the gradient of a square.
    half = np.asarray(out, np.float16)
    assert fields(read[""][0]) == reference(half)
    assert fields(read[""][1]) == reference(np.asarray(2 * scale * np.asarray(out, np.float32)).astype(np.float16))
    # In a scan: the same as the turns one by one.
    kernel, bias = (params["scanned"]["Dense_0"][name].astype(jnp.float16) for name in ("kernel", "bias"))
    with jax.default_matmul_precision("float32"):
        y = with_policy(nn.Dense(4).apply, "mixed_float16")({"params": params["first"]}, x).astype(jnp.float16)
        turns = []
        for _ in range(3):
            y = (y @ kernel) + bias
            turns.append(np.asarray(y))
            y = nn.relu(y)
    assert read["scanned/Dense_0"][0].exponents == reference(np.stack(turns))["exponents"]


@pytest.mark.slow
def test_an_observed_trace_is_no_ones_under_nn_jit():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.jit(Inner)(name="inner")(x)

    model, x = Outer(), jnp.ones((2, 3))
    params = model.init(jax.random.key(0), x)["params"]

    def loss_fn(params, model_state, batch, key):
        outputs = with_policy(model.apply, "mixed_float16")({"params": params}, batch["x"])
        return jnp.sum(outputs), (jnp.float32(1), {}, model_state)

    arguments = params, {}, jnp.float32(1), {"x": x}, None
    before, *_ = make_gradients(loss_fn)(*arguments)
    for _ in range(2):
        found, _, modules = gradients_and_module_counts(loss_fn)(*arguments)
        assert {path: Range.read(both.outputs).size for path, both in modules.items()} == {
            "": 6, "inner": 6, "inner/Dense_0": 6
        }  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, found, before)
    make_gradients(loss_fn)(*arguments)


# In a run.


def load(split):
    rng = np.random.default_rng({"train": 0, "validation": 1, "test": 2}[split])
    label = rng.integers(0, 3, 60)
    image = rng.integers(0, 100, (60, 2, 2, 1)) + 50 * label[:, None, None, None]
    return {"image": image.astype(np.uint8), "label": label}


class Small(nn.Module):
    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.relu(nn.Dense(8)(image.reshape(image.shape[0], -1)))
        return nn.Dense(3)(nn.Dropout(0.1, deterministic=not train)(x))


def experiment(every=None, **loop):
    loop = {"epochs": 4, "log_every": 4, "eval_every": 6, "ranges_every": every} | loop
    return Experiment(
        model=Small(), data=Arrays(load, batch_size=20, mean=(0.3,)), optimizer=Adam(0.1), loop=Loop(**loop)
    )


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    """The run folders of one experiment: with ranges every 5 steps, and without."""
    folder = tmp_path_factory.mktemp("looked")
    return [jaxmp.fit(experiment(every), workdir=folder / str(every)).path for every in (5, None)]


@pytest.mark.slow
def test_ranges_change_no_bit_of_a_run_and_not_its_name(looked):
    with_ranges, without = (Run(path, experiment()) for path in looked)
    assert with_ranges.path.name == without.path.name
    for a, b in zip(*(jax.tree.leaves(run.state()) for run in (with_ranges, without)), strict=True):
        a, b = (jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (a, b))
        np.testing.assert_array_equal(a, b)
    timed = {"examples_per_second", "steps_per_second", "tflops_per_second", "wall_seconds"}
    lines = [
        [{k: v for k, v in line.items() if k not in timed} for line in run.metrics] for run in (with_ranges, without)
    ]
    assert lines[0] == lines[1]
    assert with_ranges.summary["test"] == without.summary["test"]


@pytest.mark.slow
def test_a_run_has_what_was_seen_of_the_first_step_and_every_fifth_after(looked):
    run = Run(looked[0], experiment())
    assert [line["step"] for line in run.ranges] == [1, 6, 11]
    assert Run(looked[1], experiment()).ranges == []
    steps = [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    first = run.ranges[0]
    assert first["loss_scale"] == 2.0**15
    seen = first["ranges"]
    assert set(seen) == {"parameters", "gradients", "scaled_gradients", "updates", "outputs", "output_gradients"}
    assert set(seen["outputs"]) == set(seen["output_gradients"]) == {"", "Dense_0", "Dense_1", "Dropout_0"}
    kernel = seen["parameters"]["Dense_0/kernel"]
    assert kernel["size"] == 32 and sum(kernel["counts"]) + kernel["zeros"] == 32
    scaled, unscaled = (seen[kind]["Dense_0/kernel"] for kind in ("scaled_gradients", "gradients"))
    assert scaled["counts"] == unscaled["counts"]
    assert scaled["lowest_exponent"] == unscaled["lowest_exponent"] + 15
    assert seen["updates"]["Dense_0/kernel"]["lost_updates"] == 0


@pytest.mark.slow
def test_what_is_seen_of_a_step_are_the_numbers_of_that_step(looked):
    from jaxmp.runs.trainer import Trainer

    trainer = Trainer(experiment())
    state, feed = trainer.init(), trainer.feed(fuse=False)
    after, _ = jax.jit(trainer.train_step)(state, feed.batch(0))
    seen = Run(looked[0], experiment()).ranges[0]["ranges"]
    for path, before in (("Dense_0/kernel", state.params), ("Dense_1/bias", state.params)):
        module, name = path.split("/")
        assert seen["parameters"][path]["largest"] == (float(jnp.max(jnp.abs(before[module][name]))) or None)
        moved = np.abs(
            np.asarray(after.params[module][name], np.float64) - np.asarray(before[module][name], np.float64)
        )
        # p + u is rounded in the last place of p.
        assert seen["updates"][path]["largest"] == pytest.approx(moved.max(), rel=1e-5)


@pytest.mark.slow
def test_a_run_without_ranges_is_looked_at_afterwards(looked):
    run = Run(looked[1], experiment())
    (line,) = run.count_ranges(6)
    assert line["step"] == 7 and line["ranges"]["output_gradients"]["Dense_0"]["size"] == 160
    assert run.count_ranges()[0]["step"] == 13
    again = Run(looked[0], experiment()).ranges[1]
    assert again["step"] == 6  # the same kind of line
    assert set(again["ranges"]) == set(line["ranges"])


@pytest.mark.slow
def test_a_run_that_is_resumed_has_each_look_once(looked, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmp.runs.fit.stop_signals", stop_after(3))
    assert jaxmp.fit(experiment(5), workdir=tmp_path).stopped
    monkeypatch.undo()
    run = Run(jaxmp.fit(experiment(5), workdir=tmp_path).path, experiment())
    assert [line["step"] for line in run.ranges] == [1, 6, 11]
    whole = Run(looked[0], experiment())
    assert [line["ranges"] for line in run.ranges] == [line["ranges"] for line in whole.ranges]


def stop_after(times):
    """Stop signals that are there from the `times`-th question on."""
    import contextlib

    @contextlib.contextmanager
    def signals():
        asked = []
        yield lambda: asked.append(1) or len(asked) > times

    return signals


@pytest.mark.slow
def test_the_program_that_looks_is_compiled_once(looked):
    from jaxmp.runs.trainer import Trainer

    trainer = Trainer(experiment(5))
    feed, state = trainer.feed(fuse=False), trainer.init()
    for step in range(3):
        trainer.step_ranges()(state, feed.batch(step))
    assert trainer.step_ranges().func._cache_size() == 1


@pytest.mark.slow
def test_tensorboard_has_the_histograms(looked):
    from tensorboardX.proto.event_pb2 import Event

    (path,) = Path(looked[0]).glob("events*")
    data, found = path.read_bytes(), {}
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        found |= {(event.step, v.tag): v.histo for v in event.summary.value if v.HasField("histo")}
    histogram = found[6, "ranges/output_gradients/Dense_0 log2"]
    seen = Run(looked[0], experiment()).ranges[1]["ranges"]["output_gradients"]["Dense_0"]
    assert list(histogram.bucket) == seen["counts"]
    assert histogram.bucket_limit[0] == seen["lowest_exponent"] + 1 and histogram.num == sum(seen["counts"])


def test_ranges_every_has_to_be_a_number_of_steps():
    with pytest.raises(jaxmp.InputError, match="ranges_every = 0"):
        Loop(ranges_every=0)


# In a report.


@pytest.mark.slow
def test_the_report_has_the_figure_of_activation_gradients(looked):
    import xml.etree.ElementTree as ElementTree

    from jaxmp.reports.run_report import report

    for path, look in zip(looked, (False, True), strict=True):
        run = Run(path, experiment())
        text = str(report([run], look=look))
        figures = [part.partition("</svg>")[0] for part in text.split("<svg")[1:]]
        (svg,) = [figure for figure in figures if "Activation gradients" in figure]
        figure = ElementTree.fromstring(f"<svg{svg}</svg>")
        lines = run.ranges or run.count_ranges()
        seen = [s for line in lines for s in line["ranges"]["output_gradients"].values()]
        size = sum(s["size"] for s in seen)
        bars = {float(r.get("data-x")): float(r.get("data-y")) for r in figure.iter("rect") if r.get("data-x")}
        (zeros,) = [float(r.get("data-y")) for r in figure.iter("rect") if r.get("data-y") and not r.get("data-x")]
        assert zeros == pytest.approx(100 * sum(s["zeros"] for s in seen) / size, rel=1e-6)
        assert sum(bars.values()) + zeros == pytest.approx(100, rel=1e-5)
        lowest = min(s["lowest_exponent"] for s in seen if s["counts"])
        assert min(bars) == lowest
        assert "0 without the scale" in svg and "lost_updates" in text
        texts = [text for text in figure.iter("text") if text.text]
        on_the_axis = [text.text for text in texts if text.get("class") == "tick middle"]
        assert len(set(on_the_axis)) == len(on_the_axis) and "zeros" in on_the_axis
        (mark,) = [text for text in texts if "without the scale" in text.text]
        assert float(mark.get("y")) < min(float(r.get("y")) for r in figure.iter("rect"))
    assert "Activation gradients" not in str(report([run]))


@pytest.mark.slow
def test_a_magnitude_that_is_known_to_a_power_of_two_is_not_shown_as_exact(looked):
    from jaxmp.reports.page import Page
    from jaxmp.reports.ranges import add_ranges

    (line, *_) = Run(looked[0], experiment()).ranges
    seen = line["ranges"]["outputs"]["Dense_0"]
    for exact, smallest, largest in [
        (True, "3.12e-02", "4.00e+00"),
        (False, "3.12e-02 to 6.25e-02", "4.00e+00 to 8.00e+00"),
    ]:
        seen.update(exact=exact, smallest=2.0**-5, largest=4.0)
        add_ranges(page := Page(""), {"run": [line]})
        assert f'>{smallest}</td><td class="n">{largest}</td>' in str(page).replace("\N{MINUS SIGN}", "-")
        assert ("somewhere from A on" in str(page)) is not exact
