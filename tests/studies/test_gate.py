"""A gate: what it decides, how often wrongly, and that its pairs are planned before the first run."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from jaxmp.cli import main
from jaxmp.errors import InputError
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.reports import gate_report
from jaxmp.reports.page import Page
from jaxmp.runs.folder import RunFolder
from jaxmp.studies import gate as gates
from jaxmp.studies.gate import INFERIOR, LOOKS, NOT_INFERIOR, UNDECIDED, decidable_margin, decide, gate


def test_it_decides_by_the_t_test_of_differences_minus_the_margin():
    rng = np.random.default_rng(0)
    for mean in (-1.0, 0.0, 1.0, 3.0):
        worse = mean + rng.normal(size=8)
        found = decide(worse, margin=1.0, p=0.05)
        less = stats.ttest_1samp(worse, 1.0, alternative="less")
        assert found.p == pytest.approx(less.pvalue, rel=1e-12)
        assert found.p_inferior == pytest.approx(stats.ttest_1samp(worse, 1.0, alternative="greater").pvalue, rel=1e-12)
        assert found.bound == pytest.approx(less.confidence_interval(0.95).high, rel=1e-12)
        assert (found.answer == NOT_INFERIOR) == (found.bound < 1.0)
        assert (found.answer == INFERIOR) == (found.p_inferior < 0.05)


@pytest.mark.parametrize(
    ("worse", "failed", "first", "answer"),
    [
        ([0.0] * 10, 0, 0, NOT_INFERIOR),  # the same to the bit
        ([0.0] * 4, 0, 0, UNDECIDED),  # 2^-4
        ([2.0] * 10, 0, 0, INFERIOR),
        ([1.0] * 10, 0, 0, UNDECIDED),  # just the margin
        ([0.1, -0.1] * 5, 0, 0, NOT_INFERIOR),
        ([0.1, -0.1] * 4 + [0.1], 1, 0, UNDECIDED),  # one that failed alone
        ([0.1, -0.1] * 4 + [0.1], 0, 1, NOT_INFERIOR),  # the first failed: not held against it
        ([0.1, -0.1], 4, 0, UNDECIDED),
        ([0.1, -0.1], 5, 0, INFERIOR),  # 2^-5
        ([0.1, -0.1], 5, 5, UNDECIDED),
        ([0.1], 0, 0, UNDECIDED),
        ([], 0, 3, UNDECIDED),
    ],
)
def test_seeds_that_failed_count_against_and_no_spread_is_no_certainty(worse, failed, first, answer):
    assert decide(worse, 1.0, 0.05, failed, first).answer == answer


def test_nothing_is_accepted_by_a_few_pairs_of_many_or_where_both_runs_of_a_pair_failed():
    ended = [0.1, -0.1, 0.0, 0.05]
    assert decide(ended, 1.0, 0.05).answer == NOT_INFERIOR
    found = decide(ended, 1.0, 0.05, both_failed=1)
    assert (found.answer, found.pairs, found.both_failed) == (UNDECIDED, 4, 1)
    assert decide([0.01, -0.01], 1.0, 0.05, first_failed=8).answer == UNDECIDED
    assert decide([5.0, 5.01], 1.0, 0.05, both_failed=8).answer == UNDECIDED
    assert decide([5.0, 5.01, 5.02], 1.0, 0.05, both_failed=7).answer == INFERIOR


def test_what_is_worse_by_the_margin_is_accepted_in_5_percent_of_normal_studies():
    # The table of 20,000 studies each: experiments/benchmarks/gate_errors.py. Here the tests are of whole arrays.
    rng, studies = np.random.default_rng(0), 40_000
    worse = rng.normal(size=(studies, LOOKS[-1]))
    p = {n: stats.ttest_1samp(worse[:, :n], 0, axis=1, alternative="less").pvalue for n in (3, *LOOKS)}
    assert [decide(1 + row[:5], 1.0, 0.05).p for row in worse[:20]] == pytest.approx(list(p[5][:20]), rel=1e-9)
    for n in (3, *LOOKS):
        assert np.mean(p[n] < gates.P) <= 0.055
    assert 0.045 <= np.mean(np.any([p[n] < gates.P_OF_LOOKS for n in LOOKS], axis=0)) <= 0.055


def test_the_margin_that_can_be_decided_is_accepted_in_80_percent():
    rng = np.random.default_rng(1)
    for n, margin in ((3, 2.3), (5, 1.36), (10, 0.86), (20, 0.58)):
        assert math.ceil(100 * decidable_margin(n, 0.05)) / 100 == margin
        accepted = stats.ttest_1samp(rng.normal(size=(20_000, n)), margin, axis=1, alternative="less").pvalue < 0.05
        assert np.mean(accepted) == pytest.approx(0.8, abs=0.015)


# Plans, with runs made up.


@pytest.fixture
def made_up(monkeypatch, blobs):
    """`made_up(loss)` lets `loss(precision, seed)` be what a run ends with, None where it fails; lists the runs."""

    def use(loss):
        trained = []

        def train(cell, workdir, name, origin, log):
            trained.append((cell.precision, cell.seed))
            value = loss(cell.precision, cell.seed)
            return {"failed": value is None and "diverged", "summary": {"test": {"loss": value, "accuracy": value}}}

        monkeypatch.setattr(gates, "train_cell", train)
        return trained

    return use


@pytest.fixture
def blobs():
    from jaxmp.data.arrays import Arrays
    from jaxmp.experiment.experiment import Experiment
    from jaxmp.experiment.settings import Loop
    from jaxmp.models.mlp import MLP

    def load(split):
        label = np.arange(48) % 2
        return {"image": (60 * label[:, None, None, None] + np.zeros((1, 4, 4, 1))).astype(np.uint8), "label": label}

    return Experiment(MLP((4,), 2), Arrays(load, batch_size=4), loop=Loop(steps=6, log_every=3, eval_every=6))


PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


def noise(precision, seed):
    return 1.0 + (0.01 * math.sin(7 * seed) if precision != "float32" else 0.0)


def run(subject, folder, margin=0.1, metric="loss", **how):
    said = []
    found = gate(subject, PRECISIONS, margin=margin, metric=metric, workdir=str(folder), log=said.append, **how)
    return found, said


def test_seeds_that_had_runs_before_the_plan_are_named_with_the_answer(tmp_path, blobs, made_up):
    """Whoever has seen them may have chosen the margin to fit."""
    made_up(noise)
    for seed in (0, 2):
        folder = RunFolder.of(dataclasses.replace(blobs, precision=PRECISIONS[1], seed=seed), tmp_path, "experiment")
        folder.path.mkdir(parents=True)
        (folder.path / "summary.json").write_text("{}")
    found, said = run(blobs, tmp_path)
    assert found["before"] == [0, 2] and said[0].startswith("seeds 0 2 had finished runs before this plan")
    assert said[0] in gate_report.text(found)
    again, _ = run(blobs, tmp_path)
    assert again["before"] == [0, 2], "not those that the plan itself has trained"
    fresh, said = run(blobs, tmp_path, seeds=range(100, 110))
    assert fresh["before"] == [] and "had finished runs" not in gate_report.text(fresh)


def test_pairs_are_planned_and_every_look_is_kept(tmp_path, blobs, made_up):
    trained = made_up(noise)
    found, said = run(blobs, tmp_path)
    assert found.is_open and len(trained) == 30 and found["looks"] == [10] and found.common_seeds == list(range(10))
    assert "0.86 with 10 pairs" in said[0] and "[pair 1/10] float32, seed 0" in said[1]
    assert Path(found["file"]).parent == tmp_path / "experiment"
    kept = json.loads(Path(found["file"]).read_text())
    assert [look["pairs"] for look in kept["studies"][0]["looks"]] == [10]
    again, _ = run(blobs, tmp_path)
    assert again == found and json.loads(Path(found["file"]).read_text()) == kept

    # More pairs, another margin or looks, once looked at: with fresh seeds alone.
    for how in ({"seeds": range(20)}, {"margin": 0.2}, {"looks": True}):
        with pytest.raises(InputError, match=r"looked at before, by another plan.*fresh seeds, from"):
            run(blobs, tmp_path, **how)
    fresh, _ = run(blobs, tmp_path, seeds=range(100, 120))
    assert fresh.is_open and len(json.loads(Path(found["file"]).read_text())["studies"]) == 2
    row = gate_report.text(fresh).splitlines()[-3].split()  # before what is said of risk and looks
    assert row[:4] == ["mixed_float16", "not", "inferior", "20"]
    page = Page("a")
    gate_report.add(page, fresh)
    assert "20 pairs: mixed_bfloat16 not inferior" in str(page)


@pytest.mark.slow
def test_no_spelling_of_the_same_question_makes_seeds_fresh(tmp_path, made_up):
    made_up(noise)
    config = ConfigFile.find("configs/digits_mlp.py")
    run(config, tmp_path, seeds=range(3))
    assert len(list(tmp_path.rglob("gate-*.json"))) == 1
    alias = ("float32", "p=float32,c=bfloat16,o=float32", "mixed_float16")
    for how in ({"overrides": ["--loop.log-every", "7"]}, {"precisions": alias}):
        with pytest.raises(InputError, match="looked at before, by another plan"):
            asked = {"precisions": PRECISIONS, "margin": 0.2, "seeds": range(3), "metric": "loss", **how}
            gate(config, workdir=str(tmp_path), log=len, **asked)
    assert len(list(tmp_path.rglob("gate-*.json"))) == 1


def test_two_gates_at_once_keep_the_plans_and_looks_of_both(tmp_path):
    path, hashes = tmp_path / "gate-x.json", ["1", "2", "3"]
    a = gates.Plan(list(PRECISIONS), "loss", "min", 0.1, [0, 1, 2], [3], 0.05)
    b, c = a._replace(seeds=[3, 4, 5]), a._replace(margin=0.2)
    look = {"pairs": 3, "verdicts": {}}
    for plan in (a, b, c):
        assert gates._keep(path, plan, hashes)["looks"] == []
    for plan in (a, a, b):
        assert gates._keep(path, plan, hashes, look)["looks"] == [look]
    kept = [(study["plan"]["seeds"], len(study["looks"])) for study in json.loads(path.read_text())["studies"]]
    assert kept == [([0, 1, 2], 1), ([3, 4, 5], 1), ([0, 1, 2], 0)]
    with pytest.raises(InputError, match=r"by another plan: margin 0.2 \(was 0.1\)"):  # it was planned, not looked at
        gates._keep(path, c, hashes, look)


def test_seeds_are_looked_at_whatever_else_is_compared_along(tmp_path, blobs, made_up):
    made_up(noise)
    first, half, brain = "float32", "mixed_float16", "mixed_bfloat16"
    how = {"metric": "loss", "workdir": str(tmp_path), "seeds": range(5), "log": len}
    assert gate(blobs, (first, half), margin=0.1, **how) is not None
    for precisions in ((first, half, brain), (first, brain, half), (first, "p=f32,c=f16,o=f32")):
        with pytest.raises(InputError, match=r"by another plan: margin 0.2 \(was 0.1\)\. Another"):
            gate(blobs, precisions, margin=0.2, **how)
    # By the same plan, along with another one, it is the same look; and the other one was not looked at before.
    assert gate(blobs, (first, brain, half), margin=0.1, **how)["verdicts"][half]["pairs"] == 5
    with pytest.raises(InputError, match=r"by another plan: margin 0.2 \(was 0.1\)"):
        gate(blobs, (first, brain), margin=0.2, **how)
    # Compared with another first one, or by another metric, it is another question.
    assert gate(blobs, (half, first), margin=0.2, **how) is not None
    assert gate(blobs, (first, half), margin=0.2, **how | {"metric": "accuracy"}) is not None
    assert len(list(tmp_path.rglob("gate-*.json"))) == 3


def test_a_precision_that_was_not_looked_at_has_all_seeds(tmp_path, blobs, made_up):
    made_up(noise)
    how = {"metric": "loss", "workdir": str(tmp_path), "seeds": range(5), "log": len}
    assert gate(blobs, ("float32", "mixed_float16"), margin=0.1, **how) is not None
    assert gate(blobs, ("float32", "mixed_bfloat16"), margin=0.2, **how) is not None
    (file,) = tmp_path.rglob("gate-*.json")
    assert len(json.loads(file.read_text())["studies"]) == 2


def test_looks_of_an_earlier_version_which_say_no_experiments_are_refused(tmp_path, blobs, made_up):
    made_up(noise)
    found, _ = run(blobs, tmp_path)
    kept = json.loads(Path(found["file"]).read_text())
    del kept["studies"][0]["experiments"]
    earlier = Path(found["file"]).rename(tmp_path / "experiment" / "gate-0123456789ab.json")
    earlier.write_text(json.dumps(kept))
    with pytest.raises(InputError, match=r"gate-0123456789ab\.json has looks at some of them by an earlier jaxmp"):
        run(blobs, tmp_path)
    assert run(blobs, tmp_path, seeds=range(100, 110))[0] is not None
    assert run(blobs, tmp_path, metric="accuracy")[0] is not None


def test_what_is_decided_at_a_look_is_trained_no_further(tmp_path, blobs, made_up):
    def loss(precision, seed):
        if precision == "mixed_float16":
            return None if seed == 3 else 1.0 + 0.3 * math.sin(7 * seed)  # undecided to the end
        return noise(precision, seed)

    trained = made_up(loss)
    found, said = run(blobs, tmp_path, looks=True)
    assert [look["pairs"] for look in found["taken"]] == [5, 10, 20]
    assert sum(precision == "mixed_bfloat16" for precision, _ in trained) == 5
    assert found["verdicts"]["mixed_bfloat16"]["answer"] == NOT_INFERIOR
    worse = found["verdicts"]["mixed_float16"]
    assert (worse["answer"], worse["failed"], worse["pairs"]) == (UNDECIDED, 1, 19)
    assert not found.is_open and found.common_seeds == list(range(5)) and "20 pairs" in said[0]


def test_of_an_accuracy_less_is_worse(tmp_path, blobs, made_up):
    by = {"float32": 0.5, "mixed_bfloat16": 0.3, "mixed_float16": 0.7}
    made_up(lambda precision, seed: by[precision] + 0.01 * math.sin(7 * seed + len(precision)))
    found, _ = run(blobs, tmp_path, metric="accuracy")
    answers = {precision: verdict["answer"] for precision, verdict in found["verdicts"].items()}
    assert answers == {"mixed_bfloat16": INFERIOR, "mixed_float16": NOT_INFERIOR}
    assert gate_report.RISK in gate_report.text(found), "something was accepted"
    assert found["verdicts"]["mixed_bfloat16"]["mean"] == pytest.approx(0.2, abs=0.02)
    assert "accuracy at most 0.1 less" in gate_report.text(found)


def test_differences_that_look_skewed_are_said_to_be(tmp_path, blobs, made_up):
    made_up(lambda precision, seed: noise(precision, seed) + (0.05 if precision == PRECISIONS[1] and seed == 4 else 0))
    found, _ = run(blobs, tmp_path)
    (line,) = [line for line in gate_report.text(found).splitlines() if "skewed" in line]
    assert line.startswith("mixed_bfloat16: ") and "as if a few seeds were far worse" in line
    page = Page("a")
    gate_report.add(page, found)
    assert str(page).count("are skewed (skewness") == 1


def test_what_fails_always_is_inferior_whatever_the_margin(tmp_path, blobs, made_up):
    made_up(lambda precision, seed: None if precision == "mixed_float16" else noise(precision, seed))
    found, _ = run(blobs, tmp_path)
    assert found["verdicts"]["mixed_float16"]["answer"] == INFERIOR and not found.is_open


def test_a_gate_stays_closed_where_most_pairs_failed_under_both_and_says_so(tmp_path, blobs, made_up):
    made_up(lambda precision, seed: None if seed >= 4 else noise(precision, seed))
    found, _ = run(blobs, tmp_path)
    assert not found.is_open
    for verdict in found["verdicts"].values():
        assert (verdict["answer"], verdict["pairs"], verdict["both_failed"]) == (UNDECIDED, 4, 6)
    shown = gate_report.text(found)
    assert "alone 0, the first 0, both 6" in shown
    assert "mixed_bfloat16: both runs failed in 6 of the planned pairs" in shown


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"margin": 0.0}, "--margin 0: expected a positive number"),
        ({"margin": math.nan}, "--margin = nan: expected a number"),
        ({"metric": "los"}, "did you mean 'loss'"),
        ({"seeds": (0, 1)}, "2 pairs decide nothing"),
        ({"seeds": range(5), "looks": True}, "expected as many --seeds, not 5"),
        ({"precisions": ("float32",)}, "expected two or more"),
    ],
)
def test_what_cannot_be_decided_is_refused_before_the_first_run(tmp_path, blobs, made_up, how, message):
    trained = made_up(noise)
    with pytest.raises(InputError, match=message):
        gate(blobs, **{"precisions": PRECISIONS, "margin": 0.1, "workdir": str(tmp_path), **how}, log=len)
    assert not trained and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_compare_with_a_margin_is_a_gate_by_its_exit_code(tmp_path, capsys):
    config = tmp_path / "small.py"
    config.write_text(
        "from jaxmp import TFDS, Experiment, Loop\nfrom jaxmp.models.mlp import MLP\n"
        "def get_config():\n    return Experiment(MLP((8,), 10), TFDS(name='digits', batch_size=64), "
        "loop=Loop(steps=20, eval_every=20))\n"
    )
    command = ["compare", str(config), "--precision", "float32", "mixed_bfloat16", "--seeds", "0", "1", "2"]
    command += ["--workdir", str(tmp_path / "runs")]
    assert main([*command, "--margin", "5", "--metric", "loss"]) == 0
    out = capsys.readouterr().out
    assert "2.30 with 3 pairs" in out and "mixed_bfloat16  not inferior" in out
    page = (tmp_path / "runs/small/compare.html").read_text()
    assert "<h2>Gate</h2>" in page and "3 pairs: mixed_bfloat16 not inferior" in page
    assert main([*command, "--margin", "1e-9", "--metric", "accuracy"]) == 1
    capsys.readouterr()
    for more, message in (
        (["--metric", "loss"], "only with --margin"),
        (["--margin", "4", "--metric", "loss"], "margin 4.0 (was 5.0)"),
        (["--margin", "5", "--metric", "loss", "--seeds", "7", "8", "9", "--gradients", "-1"], "gradients at -1 steps"),
    ):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*-s7"))
