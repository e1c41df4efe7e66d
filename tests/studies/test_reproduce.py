"""`jaxmp reproduce`: a paper's study is resumed, and every table, plot and verdict comes from its results."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.cli import main
from jaxmp.errors import InputError
from jaxmp.modules.linen import with_policy
from jaxmp.studies import claims, reproduce

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
PAPERS = sorted(path.parent.name for path in EXPERIMENTS.glob("*/paper.py"))
PUBLISHED = [name for name in PAPERS if (EXPERIMENTS / name / "results.json").is_file()]
SMALLEST = "bfloat16_training"

PAPER = """
from jaxmp.html.figure import Axis
from jaxmp.studies import paper_figures
from jaxmp.studies.claims import Claim, Compute, Figure, Paper, higher

def error(seed, *, bits):
    with open({calls!r}, "a") as file:
        file.write(f"{{bits}} {{seed}}\\n")
    return {{"error": 2.0 ** -bits * (1 + seed / 10){edit}}}

def get_paper(quick=False):
    return Paper(
        title="Fewer bits", authors="Nobody 2020", url="https://example.org", seeds=tuple(range(2 if quick else 5)),
        arms={{f"{{bits}} bits": Compute(error, {{"bits": bits}}) for bits in (4, 8)}},
        claims=(
            Claim("fewer-bits", "Fewer bits err more", "0.06", "table 1", True, {arms}, "error", "4 minus 8 bits",
                  higher, "Because | so."),
        ),
        tables=("error",),
        figures=(Figure("errors", "Errors", "The errors.",
                 lambda results: paper_figures.differences(results, ["4 bits"], "8 bits", "error", "error")),),
    )
"""


@pytest.fixture
def paper(tmp_path, monkeypatch):
    """Writes experiments/bits/paper.py in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "experiments" / "bits"
    folder.mkdir(parents=True)

    def write(edit="", arms=("4 bits", "8 bits")):
        (folder / "paper.py").write_text(PAPER.format(calls=str(tmp_path / "calls"), edit=edit, arms=arms))
        return folder

    return write


def test_a_study_writes_tables_plots_and_verdicts_and_is_resumed_until_its_code_changes(paper, tmp_path, capsys):
    folder = paper()
    (folder / "README.md").write_text("# Bits\n\nProse.\n")
    above = folder.parent / "README.md"
    above.write_text("Guide.\n<!-- made by jaxmp reproduce -->\n<!-- end -->\nMore.\n")

    assert main(["reproduce", "bits"]) == 0
    said = capsys.readouterr().out
    assert "fewer-bits  0.06   0.07031 (0.05881 to 0.08182)  reproduced" in said
    readme = (folder / "README.md").read_text()
    assert readme.startswith("# Bits\n\nProse.\n") and "**reproduced**" in readme
    assert "- `fewer-bits`: Because | so." in readme and "| `4 bits` | 0.075 ± 0.0099 |" in readme
    assert "fewer-bits" in above.read_text() and above.read_text().endswith("<!-- end -->\nMore.\n")
    svg = ElementTree.fromstring((folder / "errors.svg").read_text())
    texts = "".join(svg.itertext())
    assert "The errors." in texts and "Made by: " in texts and "reproduce bits" in texts

    calls = tmp_path / "calls"
    assert len(calls.read_text().splitlines()) == 10
    first = (folder / "README.md").read_text()
    assert main(["reproduce", "bits"]) == 0
    assert len(calls.read_text().splitlines()) == 10, "computed again what was there"
    assert (folder / "README.md").read_text() == first
    (folder / "README.md").write_text("# Bits\n\nProse.\n")
    assert main(["reproduce", "bits", "--tables"]) == 0
    assert len(calls.read_text().splitlines()) == 10 and (folder / "README.md").read_text() == first
    paper(edit=" + 0.5")
    assert main(["reproduce", "bits", "--quick"]) == 0
    assert len(calls.read_text().splitlines()) == 14, "read what other code had computed"
    assert json.loads((folder / "results.json").read_text())["seeds"] == [0, 1, 2, 3, 4], "a quick study replaced it"
    assert "± " in (tmp_path / "runs/bits/quick/README.md").read_text()


def test_a_computed_arm_is_computed_anew_after_an_edit_of_jaxmp_and_keeps_the_revision_that_measured_it(
    paper, tmp_path, monkeypatch
):
    folder, calls = paper(), tmp_path / "calls"

    def revisions(now):
        made = {**reproduce.provenance(patch=False), "git": {"revision": now, "dirty": False}}
        monkeypatch.setattr(reproduce, "provenance", lambda *, patch: made)
        results = reproduce.reproduce(folder, log=lambda message: None)
        return {of["git"]["revision"] for arm in results["arms"].values() for of in arm["seeds"].values()}

    assert revisions("first") == {"first"}
    assert revisions("second") == {"first"} and len(calls.read_text().splitlines()) == 10
    monkeypatch.setattr(reproduce, "_sources", lambda: "edited")
    assert revisions("third") == {"third"} and len(calls.read_text().splitlines()) == 20


def test_the_digest_of_sources_changes_with_any_file_of_jaxmp(tmp_path, monkeypatch):
    (tmp_path / "studies").mkdir()
    monkeypatch.setattr(reproduce, "__file__", str(tmp_path / "studies" / "reproduce.py"))
    found = set()
    for text in ("x = 1", "x = 2"):
        (tmp_path / "quantize.py").write_text(text)
        found.add(reproduce._sources.__wrapped__())
    assert len(found) == 2


def test_papers_are_listed_with_their_claims_and_verdicts(paper, capsys):
    paper()
    assert main(["reproduce"]) == 0
    assert "bits" in (line := capsys.readouterr().out.splitlines()[1]) and line.endswith("not run yet")
    assert main(["reproduce", "bits"]) == 0
    capsys.readouterr()
    assert main(["reproduce"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("reproduced")


@pytest.mark.parametrize(
    ("arms", "argument", "message"),
    [
        (("4 bits", "8 bits"), "bit", "paper 'bit': no paper.py in experiments/bit; expected one of bits, "),
        (("4 bits", "8 bits"), "bit", "did you mean 'bits'?"),
        (("4 bits", "8 bits"), "bits --tables", "--tables: no results.json in experiments/bits; expected jaxmp"),
        (("4 bits", "8 bit"), "bits", "claim 'fewer-bits': no arm '8 bit'; did you mean '8 bits'?"),
    ],
)
def test_a_paper_that_is_not_there_or_is_wrong_is_one_message(paper, capsys, arms, argument, message):
    paper(arms=arms)
    assert main(["reproduce", *argument.split()]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_tables_are_refused_where_the_paper_has_other_arms_or_seeds_than_its_results(paper, capsys):
    folder = paper()
    assert main(["reproduce", "bits"]) == 0
    for was, now, said in (
        ('{"bits": bits}', '{"bits": 2 * bits}', "'4 bits': error(seed, bits=8) (was error(seed, bits=4)), and 1 more"),
        ("else 5)", "else 6)", "seeds: [0, 1, 2, 3, 4, 5] (was [0, 1, 2, 3, 4])"),
        ("in (4, 8)", "in (4, 8, 9)", "'9 bits': error(seed, bits=9) (was none); expected jaxmp reproduce bits again"),
    ):
        paper()
        text = (folder / "paper.py").read_text()
        assert was in text
        (folder / "paper.py").write_text(text.replace(was, now))
        assert main(["reproduce", "bits", "--tables"]) == 2
        assert said in capsys.readouterr().err


def test_an_error_in_a_paper_is_said_with_its_line(paper, capsys):
    folder = paper()
    (folder / "paper.py").write_text("x = 1\ny = x.z\n")
    assert main(["reproduce", "bits"]) == 2
    assert "paper.py raised in line 2: AttributeError: 'int' object has no attribute 'z'" in capsys.readouterr().err


@pytest.mark.parametrize("name", PUBLISHED)
def test_tables_plots_and_verdicts_are_those_of_the_committed_results(name):
    """No figure is typed by hand: after an edit of a paper's claims, run `jaxmp reproduce PAPER` again."""
    folder = EXPERIMENTS / name
    results = reproduce.committed(folder)
    again = reproduce.judged(reproduce.load(folder, quick=False), folder, results)
    readme = (folder / "README.md").read_text()
    for path, text in reproduce.written(folder, again, folder, readme).items():
        assert path.read_text() == text, f"{path} is not what its results.json makes"


def test_a_signal_stops_a_study_after_the_arm_that_it_came_in(paper, tmp_path, capsys):
    paper(edit=" + (__import__('signal').raise_signal(15) or 0)")
    for number in (1, 2):
        assert main(["reproduce", "bits"]) == 75
        assert "stopped after this arm; the same command goes on from there" in capsys.readouterr().out
        assert len((tmp_path / "calls").read_text().splitlines()) == number, "what was computed is kept"


def test_results_of_other_settings_are_refused():
    """The settings of an experiment of paper.py stand in no line of results.json: its runs' folders have their hash."""
    name = "loss_scalers"
    folder, paper = EXPERIMENTS / name, reproduce.load(EXPERIMENTS / name, quick=False)
    results = reproduce.committed(folder)
    arm, how = next((arm, how) for arm, how in paper.arms.items() if not isinstance(how.subject, str))
    slower = dataclasses.replace(how.subject, loop=dataclasses.replace(how.subject.loop, epochs=3))
    other = dataclasses.replace(paper, arms={**paper.arms, arm: dataclasses.replace(how, subject=slower)})
    with pytest.raises(InputError, match=f"made by another paper.py: arm '{arm}': other settings"):
        reproduce.judged(other, folder, results)


def test_the_table_of_all_papers_is_that_of_the_committed_results():
    assert (EXPERIMENTS / "README.md").read_text() == reproduce.overview(EXPERIMENTS)


def test_rules_that_are_judged_once_made_the_same_runs():
    folder = EXPERIMENTS / "loss_scalers"
    results = reproduce.results_of(reproduce.committed(folder))
    torch, *others = sys.modules[reproduce.load(folder, quick=False).arms["torch"].measure.__module__].TORCH_LIKE
    for other in others:
        for seed, found in results[torch].items():
            for metric in ("scales", "loss", "accuracy", "skipped_steps"):
                assert results[other][seed][metric] == found[metric], (other, seed, metric)


@pytest.mark.slow
def test_the_gradient_of_the_label_is_0_from_p_ln_2_on_where_the_softmax_has_p_bits():
    paper = reproduce.load(EXPERIMENTS / "loss_spikes", quick=True)
    module = sys.modules[next(iter(paper.arms.values())).function.__module__]
    with jax.enable_x64(True):
        labels = jnp.zeros(1, jnp.int32)
        losses = [(bits, module.losses_of(bits)) for bits in (5, 11, 24, 53)]
        losses += [(24, module.losses_in(jnp.float32)), (53, module.losses_in(jnp.float64))]
        for bits, of_rows in losses:
            for margin, is_zero in ((bits * math.log(2) - 0.02, False), (bits * math.log(2) + 0.02, True)):
                logits = jnp.array([[margin, 0.0]], jnp.float64)
                if bits == 5:  # 3.375 and 3.5 are neighbours, on the two sides of 5 ln 2 = 3.466
                    logits = jnp.array([[3.5 if is_zero else 3.375, 0.0]], jnp.float64)
                gradient = jax.grad(lambda z, of_rows=of_rows: of_rows(z, labels).sum())(logits)
                assert (gradient[0, 0] == 0) == is_zero, (bits, margin)
                assert gradient[0, 1] > 0, "the gradient of the other class is kept"


@pytest.mark.slow
def test_with_23_classes_the_gradient_of_the_label_is_0_from_log_odds_of_p_ln_2_on_if_sums_are_rounded_once():
    module = module_of("loss_spikes")
    with jax.enable_x64(True):
        labels = jnp.zeros(1, jnp.int32)
        for bits, of_rows in [(24, module.losses_of(24)), (32, module.losses_of(32))]:
            for by, is_zero in ((-0.02, False), (0.02, True)):
                gap = bits * math.log(2) + math.log(22) + by
                logits = jnp.zeros((1, 23), jnp.float64).at[0, 0].set(gap)
                gradient = jax.grad(lambda z, of_rows=of_rows: of_rows(z, labels).sum())(logits)
                assert (gradient[0, 0] == 0) == is_zero, (bits, by)
                assert (gradient[0, 1:] > 0).all()


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the order of a sum is that of XLA:CPU")
def test_in_float32_and_float64_small_terms_are_lost_one_by_one_beside_a_label_that_is_summed_first():
    """Where the label is the first class the gap decides, where it is the last the log-odds: ln 22 = 3.09 apart."""
    module = module_of("loss_spikes")
    with jax.enable_x64(True):
        for bits, of_rows in [(24, module.losses_in(jnp.float32)), (53, module.losses_in(jnp.float64))]:
            for label, gap in ((0, bits * math.log(2)), (22, bits * math.log(2) + math.log(22))):
                for by, is_zero in ((-0.02, False), (0.02, True)):
                    logits = jnp.zeros((1, 23), jnp.float64).at[0, label].set(gap + by)
                    labels = jnp.full(1, label, jnp.int32)
                    gradient = jax.grad(lambda z, of=of_rows, labels=labels: of(z, labels).sum())(logits)
                    assert (gradient[0, label] == 0) == is_zero, (bits, label, by)


def test_a_cure_is_no_event_in_any_seed_where_there_was_one_and_fewer_are_not_none():
    judge = claims.prevents(0.5, 0.05)

    def of(*counts):
        return dict(enumerate(counts))

    many = of(3, 4, 5, 3, 4, 5)
    assert judge([of(0, 0, 0, 0, 0, 0), many]).verdict == claims.REPRODUCED
    assert judge([of(0, 0, 0, 0, 0, 1), many]).verdict == claims.CONTRADICTED, "fewer"
    assert judge([of(*[0] * 6), of(*[0] * 6)]).verdict == claims.NOT_AT_THIS_SIZE, "nothing to cure"
    assert judge([of(0, 0, 0), of(3, 4, 5)]).verdict == claims.NOT_AT_THIS_SIZE, "too few seeds"
    assert judge([of(0, 0, 0, 0, 0, None), many]).verdict == claims.NOT_AT_THIS_SIZE, "a failed run"
    assert judge([of(None), of(None)]).verdict == claims.NOT_AT_THIS_SIZE


def test_a_cure_needs_a_paired_effect_and_events_of_the_reference_count_for_no_arm():
    judge = claims.prevents(0.5, 0.05)

    def of(*counts):
        return dict(enumerate(counts))

    none, many = of(0, 0, 0, 0, 0, 0), of(3, 4, 5, 3, 4, 5)
    found = judge([none, of(0, 4, 5, 3, 4, 5)])
    assert found.verdict == claims.NOT_AT_THIS_SIZE and "McNemar p 0.062" in found.note
    assert judge([none, many, none]).verdict == claims.REPRODUCED
    with_one = of(1, 0, 0, 0, 0, 0)
    assert judge([with_one, many, with_one]).verdict == claims.REPRODUCED, "the reference has it too"
    assert judge([with_one, many, none]).verdict == claims.CONTRADICTED
    assert judge([none, many, many]).verdict == claims.NOT_AT_THIS_SIZE, "nothing beyond the reference to prevent"
    assert judge([none, many, of(0, 0, 0, 0, 0, None)]).verdict == claims.NOT_AT_THIS_SIZE, "the reference failed"


def test_a_loss_is_recovered_only_where_it_was_lost_and_the_cure_is_better_than_none():
    judge, noise = claims.recovers(0.15), [0.01, -0.01, 0.02, -0.02, 0.0, 0.01]

    def of(by):
        return dict(enumerate(by + each for each in noise))

    reference = dict.fromkeys(range(6), 0.0)
    assert judge([of(0.05), of(2.0), reference]).verdict == claims.REPRODUCED
    assert judge([of(-0.5), of(2.0), reference]).verdict == claims.REPRODUCED, "better than the reference"
    assert judge([of(0.5), of(2.0), reference]).verdict == claims.CONTRADICTED
    assert judge([of(0.05), of(0.0), reference]).verdict == claims.NOT_AT_THIS_SIZE, "nothing was lost"
    assert judge([of(0.5), of(0.0), reference]).verdict == claims.NOT_AT_THIS_SIZE, "nothing was lost"
    assert judge([of(0.1), of(0.1), reference]).verdict == claims.NOT_AT_THIS_SIZE, "no better than without"
    assert judge([{**of(0.05), 0: None}, of(2.0), reference]).verdict == claims.NOT_AT_THIS_SIZE, "a failed run"


def test_a_share_of_seeds_is_judged_by_its_exact_interval():
    ones, zeros = dict.fromkeys(range(6), 1), dict.fromkeys(range(6), 0)
    assert claims.share_above(0.5)([ones]).verdict == claims.REPRODUCED
    assert claims.share_above(0.5)([zeros]).verdict == claims.CONTRADICTED
    assert claims.share_above(0.5)([{**ones, 0: 0}]).verdict == claims.NOT_AT_THIS_SIZE
    assert claims.share_above(0.5)([{**ones, 0: None}]).verdict == claims.NOT_AT_THIS_SIZE, "a failed run"
    assert claims.share_above(0.5)([{0: None}]).verdict == claims.NOT_AT_THIS_SIZE


def test_threads_on_one_cpu_are_no_test_of_them(monkeypatch):
    fragile = module_of("fragile_grokking")
    monkeypatch.setattr(fragile, "cores", lambda: 1)
    with pytest.raises(InputError, match="4 threads on one CPU test nothing"):
        fragile.run(0, threads=fragile.THREADS, seeds=1)
    values = [{0: None}, {0: 1.0}]
    assert claims.differing(0.05)(values).verdict == claims.NOT_AT_THIS_SIZE


def test_equal_differences_below_the_least_effect_contradict_it():
    zeros = dict.fromkeys(range(6), 0.0)
    assert claims.higher_by(1.0)([zeros, zeros]).verdict == claims.CONTRADICTED
    assert claims.higher([zeros, zeros]).verdict == claims.NOT_AT_THIS_SIZE
    assert claims.higher_by(1.0)([dict.fromkeys(range(6), 2.0), zeros]).verdict == claims.REPRODUCED


def test_a_spike_is_a_rise_after_calm_and_a_threshold_separates_best():
    paper = reproduce.load(EXPERIMENTS / "loss_spikes", quick=True)
    module = sys.modules[next(iter(paper.arms.values())).function.__module__]
    assert module.spikes(np.array([3.0, 1e-4, 0.2, 0.3, 0.05, 0.2, 1e-5, 0.5])) == [2, 7]
    values, zero = np.array([5.0, 1.0, 2.0, 4.0, 3.0]), np.array([True, False, False, True, False])
    assert module.separating(values, zero) == 3.5
    assert math.isnan(module.separating(values, zero | True))


@pytest.mark.parametrize("name", PAPERS)
def test_each_paper_says_its_figures_and_sources_in_both_sizes(name):
    for quick in (False, True):
        paper = reproduce.load(EXPERIMENTS / name, quick=quick)
        assert paper.claims and all(claim.published and claim.source and claim.measured for claim in paper.claims)
        assert quick or len(paper.seeds) >= 5


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == SMALLEST else pytest.mark.full_size) for name in PAPERS],
)
def test_the_quick_version_of_a_paper_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(EXPERIMENTS.parent)
    assert main(["reproduce", name, "--quick", "--workdir", str(tmp_path)]) == 0
    assert "tables and plots" in capsys.readouterr().out
    results = json.loads((tmp_path / name / "quick" / "results.json").read_text())
    assert all(claim["verdict"] for claim in results["claims"])
    for arm in results["arms"].values():
        for found in arm["seeds"].values():
            assert found["git"] is None or set(found["git"]) == {"revision", "dirty"}, "says not what measured it"


def module_of(name):
    """The module that a paper's file was run as."""
    reproduce.load(EXPERIMENTS / name, quick=True)
    return sys.modules[f"jaxmp_papers.{name}"]


def test_a_unit_scaled_product_has_a_factor_of_its_own_in_each_direction():
    unit = module_of("unit_scaling")
    x, w, g = (np.random.default_rng(seed).normal(size=shape) for seed, shape in enumerate([(5, 3), (3, 4), (5, 4)]))
    y, pull = jax.vjp(lambda x, w: unit.product(x, w, 0.5, 2.0, 8.0), jnp.float32(x), jnp.float32(w))
    to_x, to_w = pull(jnp.float32(g))
    for found, exact in ((y, 0.5 * x @ w), (to_x, 2.0 * g @ w.T), (to_w, 8.0 * x.T @ g)):
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


def test_weights_just_below_a_power_of_two_are_clipped_by_an_mx_block_and_those_just_above_are_not():
    mx = module_of("mx_instabilities")
    for value, share in ((0.97, 1.0), (0.87, 0.0), (1.03, 0.0), (1.97, 1.0)):  # 448 is 1.75 * 2^8: 0.875 is the limit
        params = {
            "norm_0": {"scale": jnp.full(64, value), "bias": jnp.zeros(64)},
            "up_0": {"kernel": jnp.ones((32, 2))},
        }
        assert mx.clipped(params, "mxfp8_e4m3") == share, value
        assert mx.clipped(params, "mxfp8_e4m3", kernels=True) == 0.0


def test_every_cure_but_that_of_the_norms_leaves_their_weights_rounded():
    mx = module_of("mx_instabilities")
    unrounded = {name for name, how in mx.PRECISIONS.items() if not how.affine}
    assert unrounded == {"float32", "e4m3, LayerNorm high"}


def test_the_gradient_of_one_row_of_thousands_is_0_in_float16_and_kept_in_11_bits():
    grokking, rows = module_of("grokking_stability"), int(0.4 * 113**2)
    cotangent, labels = jnp.full(1, 1 / rows, jnp.float32), jnp.zeros(1, jnp.int32)
    with jax.enable_x64(True):
        logits = jnp.zeros((1, 113), jnp.float32).at[0, 0].set(9.0)
        pulled = []
        for loss in (grokking.losses_in(jnp.float16), grokking.losses_of(11)):
            of_rows, pull = jax.vjp(lambda z, of=loss: of(z, labels), logits)
            pulled.append(np.asarray(pull(cotangent.astype(of_rows.dtype))[0][0, 1:], np.float64))
    assert (pulled[0] == 0).all()
    np.testing.assert_allclose(pulled[1], math.exp(-9) / (1 + 112 * math.exp(-9)) / rows, rtol=0.01)


@pytest.mark.parametrize("id", ["stablemax-groks", "orthogonal-gradient-groks"])
def test_a_network_that_does_not_reach_half_of_the_test_pairs_does_not_generalise(id):
    (claim,) = (of for of in reproduce.load(EXPERIMENTS / "grokking_stability", quick=False).claims if of.id == id)
    assert claim.metric == "generalised"
    for value, verdict in ((0, claims.CONTRADICTED), (1, claims.REPRODUCED)):
        assert claim.judge([dict.fromkeys(range(6), value)]).verdict == verdict


def test_a_loss_ten_times_the_median_before_it_is_a_spike_and_a_diverged_one_is():
    mx = module_of("mx_instabilities")
    means = [1.0] * 30
    assert mx.spikes_of(means, [9.0] * 30) == 0
    assert mx.spikes_of(means, [1.0] * 20 + [11.0] + [1.0] * 9) == 1
    assert mx.spikes_of(means, [1.0] * 29 + [mx._bounded(float("nan"))]) == 1
    lost = mx._bounded(float("nan"))
    assert mx.spikes_of([1.0] * 5 + [lost] * 25, [1.0] * 5 + [lost] * 25, first=15) == 15, "a lost run is no calm one"
    assert mx.spikes_of(means, [1.0] * 5 + [11.0] + [1.0] * 24, first=15) == 0


@pytest.mark.parametrize(
    ("format", "largest", "normal", "smallest"), [("e4m3", 448, -6, -9), ("e5m2", 57344, -14, -16)]
)
def test_the_limits_of_fp8_are_found_by_rounding(format, largest, normal, smallest):
    found = module_of("fp8_formats").limits(0, format=format)
    assert found == {"largest": largest, "smallest_normal": 2.0**normal, "smallest": 2.0**smallest}


def test_the_weights_that_are_rounded_after_training_are_those_that_a_policy_rounds_in_training():
    scaling = module_of("scaling_laws")
    x, w = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in enumerate([(4, 32), (32, 6)]))
    after = scaling.rounded({"kernel": w, "embedding": w}, "int4:channel")
    assert (after["embedding"] == w).all() and len(np.unique(after["kernel"][:, 0])) <= 15
    precision = scaling.experiment(scaling.Size(24, 1, 10), "int4:channel").precision
    found = with_policy(nn.Dense(6, use_bias=False).apply, precision)({"params": {"kernel": w}}, x)
    np.testing.assert_allclose(found, x @ after["kernel"], rtol=1e-5, atol=1e-5)


def test_the_parameters_of_a_scaling_law_are_the_matrices_of_the_blocks_and_a_kernel_is_what_multiplies():
    scaling = module_of("scaling_laws")
    size = scaling.Size(width=48, layers=2, steps=100)
    model = scaling.experiment(size).model
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    kernels = [leaf for path, leaf in leaves if path[-1].key == "kernel" and path[0].key != "head"]
    assert sum(leaf.size for leaf in kernels) == size.parameters == 55_296
    assert {path[-1].key for path, leaf in leaves} == {"kernel", "embedding", "scale"}
    assert all(leaf.ndim == 2 for leaf in kernels) and size.tokens == 100 * 16 * 64


def test_a_slope_is_taken_in_each_seed_over_all_arms_and_a_failed_run_leaves_it_undecided():
    scaling = module_of("scaling_laws")
    judge = scaling.by_seed(lambda y: scaling.slope([1, 2, 4], y), claims.above(0.0))
    values = [{seed: of + seed / 100 for seed in range(5)} for of in (3.0, 5.0, 9.0)]
    values[2][4] += 1e-3
    assert judge(values).verdict == claims.REPRODUCED and judge(values).mean == pytest.approx(2.0, abs=1e-3)
    assert judge(values[::-1]).verdict == claims.CONTRADICTED
    values[1][3] = None
    assert judge(values).verdict == claims.NOT_AT_THIS_SIZE and "1 of 5" in judge(values).note
    assert scaling.least_slope([0, 1, 0, 1], [0, 3, 0, 2], [7, 7, 8, 8]) == 2.0


def test_the_slopes_of_the_scaling_laws_find_the_exponents_of_the_law_that_made_the_damages():
    paper = reproduce.load(EXPERIMENTS / "scaling_laws", quick=False)
    scaling = sys.modules["jaxmp_papers.scaling_laws"]
    sizes = {arm: how.subject for arm, how in paper.arms.items()}

    def log_damage(arm, seed):
        width, steps = sizes[arm].model.width, sizes[arm].loop.steps
        size = scaling.Size(width, sizes[arm].model.layers, steps)
        return 0.5068 * math.log(size.tokens) - 0.3439 * math.log(size.parameters) + seed / 100

    slopes = {"grows-with-data": 0.5068, "larger-lose-less": -0.3439, "at-every-size": 0.5068}
    for claim in paper.claims:
        if claim.id in slopes:
            found = claim.judge([{seed: log_damage(arm, seed) for seed in paper.seeds} for arm in claim.arms])
            assert found.mean == pytest.approx(slopes[claim.id]) and found.pairs == 5
