"""Checkpoints: exact, whole after a kill, checked before use."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmp.errors import InputError
from jaxmp.runs.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]


class Moments(NamedTuple):
    mean: jax.Array
    nothing: None
    empty: tuple


@jax.tree_util.register_dataclass
@dataclass
class State:
    params: Any
    key: jax.Array
    moments: Moments


def state() -> State:
    """Every kind of leaf and node that a train state has, with the bit patterns that a cast would lose."""
    bits = np.array(
        [0x7FC00001, 0xFF800001, 0x80000000, 0x00000001, 0x7F800000], np.uint32
    )  # NaN payloads, -0, subnormal
    return State(
        params={
            "float32": jnp.asarray(bits.view(np.float32)),
            "float16": jnp.asarray((bits >> 16).astype(np.uint16).view(np.float16)),
            "bfloat16": jnp.asarray(bits.view(np.uint16).view(jnp.bfloat16)),
            "e4m3": jnp.arange(6, dtype=jnp.float8_e4m3fn).reshape(2, 3),
            "e5m2": jnp.asarray(np.arange(256, dtype=np.uint8).view(jnp.float8_e5m2)),
            "int32": jnp.int32(-7),
            "uint8": jnp.arange(3, dtype=jnp.uint8),
            "bool": jnp.array([True, False]),
            "none": None,
            "no_rows": jnp.zeros((0, 3), jnp.bfloat16),
            "weak": jnp.asarray(2.0),
            "numpy": np.arange(3, dtype=np.int64),
            "integer": 3,
        },
        key=jax.random.key(1),
        moments=Moments(jax.random.split(jax.random.key(2, impl="rbg"), 3), None, (optax.EmptyState(), ())),
    )


def bits(leaf: Any) -> bytes:
    if jnp.issubdtype(getattr(leaf, "dtype", np.int32), jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf, getattr(leaf, "dtype", np.int32)).tobytes()


def assert_same(restored: Any, saved: Any) -> None:
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for (path, new), old in zip(jax.tree.leaves_with_path(restored), jax.tree.leaves(saved), strict=True):
        assert bits(new) == bits(old), path
        assert str(new.dtype) == str(getattr(old, "dtype", "int32")), path
        assert not getattr(new, "weak_type", False), path


def write(folder: Path, *steps: int, **options: Any) -> None:
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, {"w": jnp.full((64, 64), float(step)), "n": jnp.int32(step)}, {"accuracy": step / 100})
    checkpoints.close()


TEMPLATE = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32), "n": jax.ShapeDtypeStruct((), jnp.int32)}


def run(code: str, *arguments: Any, **options: Any) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def test_a_state_comes_back_to_the_bit_and_strongly_typed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state())
    step, restored = checkpoints.restore(state())
    checkpoints.close()
    assert step == 3
    assert_same(restored, state())
    assert isinstance(restored.params["numpy"], np.ndarray)
    assert jax.random.key_impl(restored.moments.mean) == "rbg"
    jax.random.normal(restored.key)


@pytest.mark.parametrize("name", ["a[b]", "a]", "a\\b", "a*?b", "mé %20 #<i>'\"&{a}\n:|@"])
def test_any_name_of_a_folder_is_taken_as_it_is(tmp_path, name):
    with contextlib.closing(Checkpoints(tmp_path / name / "checkpoints")) as checkpoints:
        checkpoints.save(1, {"a": jnp.arange(3)})
        checkpoints.wait()
    with contextlib.closing(Checkpoints(tmp_path / name / "checkpoints")) as checkpoints:
        step, tree = checkpoints.restore({"a": jnp.zeros(3, int)})
    assert step == 1 and tree["a"].tolist() == [0, 1, 2]


def test_a_template_of_shapes_is_enough(tmp_path):
    saved = {"key": jax.random.key(1), "w": jnp.ones((2, 3), jnp.bfloat16)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, saved)
    _, restored = checkpoints.restore(jax.eval_shape(lambda: saved))
    checkpoints.close()
    assert_same(restored, saved)


def test_what_is_written_is_the_state_at_the_time_of_save_though_its_buffers_are_donated(tmp_path):
    @jax.jit
    def fresh():
        return [jnp.zeros((512, 512)) for _ in range(8)]

    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = fresh()
    checkpoints = Checkpoints(tmp_path, keep=5)
    for number in range(1, 6):
        tree = step(tree)
        checkpoints.save(number, tree)
        for _ in range(10):
            tree = step(tree)
        tree = jax.tree.map(lambda x, number=number: jnp.full_like(x, number), tree)
    for number in range(1, 6):
        _, restored = checkpoints.restore(fresh(), step=number)
        assert {float(value) for leaf in restored for value in np.unique(leaf)} == {number}
    checkpoints.close()


def test_a_numpy_array_is_written_as_it_was_at_the_time_of_save(tmp_path):
    counts = np.zeros((1000, 1000))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"counts": counts})
    counts += 1
    _, restored = checkpoints.restore({"counts": counts})
    checkpoints.close()
    assert not restored["counts"].any()


def test_a_restored_state_can_be_donated_and_uncommitted_leaves_stay_uncommitted(tmp_path):
    tree = {"w": jnp.ones((256, 256)), "v": jax.device_put(jnp.ones(3), jax.devices()[0])}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree)
    _, restored = checkpoints.restore(tree)
    checkpoints.close()
    assert [leaf.committed for leaf in jax.tree.leaves(restored)] == [leaf.committed for leaf in jax.tree.leaves(tree)]
    after = jax.jit(lambda t: jax.tree.map(lambda x: x * 2, t), donate_argnums=0)(restored)
    assert float(after["w"].sum()) == 2 * 256 * 256


def test_every_difference_from_the_template_is_named_with_its_path_before_anything_is_read(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    saved = {"w": jnp.ones((2, 3)), "b": jnp.ones(3), "old": jnp.ones(1), "key": jax.random.key(0)}
    checkpoints.save(7, saved)
    checkpoints.wait()
    for path in (tmp_path / "7" / "arrays").iterdir():  # not one of these is looked at
        path.rename(tmp_path / path.name)
    template = {
        "w": jnp.ones((3, 2)),
        "b": jnp.ones(3, jnp.bfloat16),
        "new": jnp.ones(2),
        "key": jax.random.key(0, impl="rbg"),
    }
    with pytest.raises(InputError) as error:
        checkpoints.restore(template)
    checkpoints.close()
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert "w: saved float32[2, 3], expected float32[3, 2]" in lines
    assert "b: saved float32[3], expected bfloat16[3]" in lines
    assert "new: saved nothing, expected float32[2]" in lines
    assert "old: saved float32[1], expected nothing" in lines
    assert "key: saved key<fry>[], expected key<rbg>[]" in lines


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, best_of="accuracy")
    for step, accuracy in enumerate([float("nan"), 0.5, 0.9, 0.9, 0.1, 0.2]):
        checkpoints.save(step, {"w": jnp.ones(2)}, {"accuracy": accuracy})
    checkpoints.close()
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best_step() == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "5"]


def test_the_smallest_is_best_where_asked_and_without_a_metric_only_the_newest_are_kept(tmp_path):
    for folder, best_of, kept in (("loss", "loss", [1, 3]), ("none", None, [3])):
        checkpoints = Checkpoints(tmp_path / folder, keep=1, best_of=best_of, mode="min")
        for step, loss in enumerate([2.0, 1.0, 3.0, 4.0]):
            checkpoints.save(step, {"w": jnp.ones(2)}, {"loss": loss})
        checkpoints.close()
        assert checkpoints.steps() == kept
        assert checkpoints.best_step() == (1 if best_of else None)


def test_saving_a_step_twice_is_harmless_and_may_add_its_metrics(tmp_path):
    checkpoints = Checkpoints(tmp_path, best_of="accuracy")
    checkpoints.save(4, {"w": jnp.ones(2)})
    checkpoints.save(4, {"w": jnp.ones(2)}, {"accuracy": 0.5})
    assert checkpoints.best_step() == 4
    checkpoints.save(4, {"w": jnp.ones(2)}, {"accuracy": 0.1})
    checkpoints.close()
    again = Checkpoints(tmp_path)
    again.save(4, {"w": jnp.ones(2)})
    again.close()
    assert again.steps() == [4]
    assert json.loads((tmp_path / "4" / "manifest.json").read_text())["metrics"] == {"accuracy": 0.5}


def test_nothing_there_is_none_and_reading_creates_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.restore(TEMPLATE) is None
    assert checkpoints.steps() == []
    assert checkpoints.best_step() is None
    checkpoints.close()
    assert not (tmp_path / "run").exists()


def test_a_step_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path):
    write(tmp_path, 1, 2)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(TEMPLATE, step=1)[0] == 1
    with pytest.raises(InputError, match=r"step 3 .* there are \[1, 2\]"):
        checkpoints.restore(TEMPLATE, step=3)
    checkpoints.close()


def test_no_checkpoint_is_called_damaged_where_orbax_does_not_begin(tmp_path, monkeypatch):
    write(tmp_path, 1)
    import orbax.checkpoint as ocp

    def none_left(handler):
        raise RuntimeError("can't start new thread")

    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="can't start new thread"):
        patched.setattr(ocp, "AsyncCheckpointer", none_left)
        checkpoints.restore(TEMPLATE)
    assert checkpoints.restore(TEMPLATE)[0] == 1
    checkpoints.close()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut off":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[random.Random(path.name).randrange(len(data))] ^= 0x10
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["missing", "cut off", "flipped"])
def test_damage_to_any_file_is_reported_and_the_checkpoint_before_is_used(tmp_path, how):
    write(tmp_path, 1, 2)
    for path in files(tmp_path / "2"):
        whole = path.read_bytes()
        if how != "missing" and not whole:
            continue
        damage(path, how)
        said: list[str] = []
        checkpoints = Checkpoints(tmp_path)
        step, restored = checkpoints.restore(TEMPLATE, warn=said.append)
        checkpoints.close()
        assert step == 1 and len(said) == 1 and "checkpoint 2" in said[0] and "is damaged" in said[0], path
        assert_same(restored, {"w": jnp.full((64, 64), 1.0), "n": jnp.int32(1)})
        path.write_bytes(whole)


def test_after_falling_back_the_damaged_step_is_moved_aside_and_saved_again(tmp_path):
    write(tmp_path, 1, 2, 3, keep=3)
    (tmp_path / "3" / "manifest.json").unlink()
    checkpoints = Checkpoints(tmp_path, keep=3)
    step, _ = checkpoints.restore(TEMPLATE, warn=lambda said: None)
    assert step == 2
    assert (tmp_path / "3").exists()  # reading changes nothing
    checkpoints.save(3, {"w": jnp.full((64, 64), 3.0), "n": jnp.int32(3)})
    assert checkpoints.restore(TEMPLATE)[0] == 3
    checkpoints.close()
    assert (tmp_path / "3.corrupt").is_dir()
    assert checkpoints.steps() == [1, 2, 3]


def test_where_all_are_damaged_the_error_says_what_to_do(tmp_path):
    write(tmp_path, 1, 2)
    for step in "12":
        (tmp_path / step / "manifest.json").unlink()
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(InputError, match=r"no intact checkpoint .*--overwrite"):
        checkpoints.restore(TEMPLATE, warn=lambda said: None)
    checkpoints.close()


KILLED = """
import sys
import jax.numpy as jnp
from jaxmp.runs.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=1, best_of=None)
template = {"w": jnp.zeros((256, 256)), "n": jnp.int32(0)}
found = checkpoints.restore(template, warn=lambda said: sys.exit(said))
start = 0 if found is None else found[0]
elsewhere = Checkpoints(sys.argv[1] + "-elsewhere", keep=1)  # the first save imports Orbax: no kill should fall there
elsewhere.save(1, template)
elsewhere.wait()
print("ready", flush=True)
for step in range(start + 1, 10_000):
    checkpoints.save(step, {"w": jnp.full((256, 256), float(step)), "n": jnp.int32(step)})
    checkpoints.wait() if step % 3 == 0 else None
    print(step, flush=True)
"""


@pytest.mark.parametrize("kills", [1, pytest.param(15, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_a_folder_that_restores(tmp_path, kills):
    rng = random.Random(kills)
    reached = 0
    for _ in range(kills):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.1, 0.8))
        child.send_signal(signal.SIGKILL)
        last = max([reached, *map(int, child.stdout.read().split()[:-1] or [0])])
        child.wait()
        child.stdout.close()
        said: list[str] = []
        checkpoints = Checkpoints(tmp_path, keep=1, best_of=None)
        found = checkpoints.restore({"w": jnp.zeros((256, 256)), "n": jnp.int32(0)}, warn=said.append)
        checkpoints.close()
        assert not said
        reached = found[0] if found else 0
        assert reached >= last - 1  # all but the one being written when the next began
        assert found is None or set(np.unique(found[1]["w"])) == {reached}
    assert reached > 3 or kills == 1


@pytest.mark.slow
def test_a_file_that_cannot_be_written_is_one_error_at_the_next_call_and_those_before_are_whole(tmp_path):
    result = run(
        """
        import resource, sys
        import numpy as np, jax.numpy as jnp
        from jaxmp.errors import InputError
        from jaxmp.runs.checkpoint import Checkpoints
        noise = lambda: {"w": jnp.asarray(np.random.default_rng(0).normal(size=(500, 500)), jnp.float32)}
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(1, noise())
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        checkpoints.save(2, noise())
        for call in (checkpoints.wait, lambda: checkpoints.save(2, noise()), lambda: checkpoints.save(3, noise())):
            try:
                call()
            except InputError as error:
                print(error)
            else:
                print("no error")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        try:
            checkpoints.close()
        except InputError as error:
            print(error)
        print(checkpoints.steps(), checkpoints.restore(noise())[0])
        """,
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert "checkpoint of step 2 could not be written" in lines[0] and "Intact checkpoints: [1]" in lines[0]
    assert lines[-1] == "[1] 1"
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_error_and_there_is_room_again_afterwards(small_disk):
    noise = {f"w{i}": jnp.asarray(np.random.default_rng(i).normal(size=(70, 700)), jnp.float32) for i in range(10)}
    checkpoints = Checkpoints(small_disk / "run")
    checkpoints.save(1, noise)
    checkpoints.save(2, noise)
    with pytest.raises(InputError, match=r"step 2 could not be written .*[Nn]o space left .*Intact checkpoints: \[1\]"):
        checkpoints.wait()
    assert checkpoints.restore(noise)[0] == 1
    checkpoints.save(3, jax.tree.map(jnp.ones_like, noise))
    checkpoints.close()
    assert checkpoints.steps() == [1, 3]


def test_a_folder_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "run")
    with pytest.raises(InputError, match=r"step 1 could not be written to .*file/run: Not a directory"):
        checkpoints.save(1, {"w": jnp.ones(2)})
    checkpoints.close()


@pytest.mark.slow
def test_a_checkpoint_moves_between_shardings(tmp_path):
    result = run(
        """
        import sys
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from jaxmp.runs.checkpoint import Checkpoints
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        on = lambda *axes: NamedSharding(mesh, P(*axes))
        w = np.arange(64 * 16, dtype=np.float32).reshape(64, 16)
        keys = jax.random.split(jax.random.key(0), 8)
        placed = lambda w_on, b_on: {
            "w": jax.device_put(w, w_on), "b": jax.device_put(w[:2], b_on), "keys": jax.device_put(keys, w_on)
        }
        trees = [placed(on("data"), on()), placed(on(), on(None, "data")), placed(jax.devices()[3], jax.devices()[0])]
        step = jax.jit(lambda t: t | {"w": t["w"] * 0, "b": t["b"] * 0}, donate_argnums=0)
        checkpoints = Checkpoints(sys.argv[1], keep=9)
        for number in range(3):
            checkpoints.save(number, placed(*[(on("data"), on()), (on(), on(None, "data")),
                                              (jax.devices()[3], jax.devices()[0])][number]))
            for like in trees:
                template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
                for t in (like, template):
                    _, restored = checkpoints.restore(t, step=number)
                    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, like)
                    assert (np.asarray(restored["w"]) == w).all() and (np.asarray(restored["b"]) == w[:2]).all()
                    assert (jax.random.key_data(restored["keys"]) == jax.random.key_data(keys)).all()
        sharded = placed(on("data"), on())
        checkpoints.save(9, sharded)
        for _ in range(5):
            sharded = step(sharded)
        assert (np.asarray(checkpoints.restore(trees[0], step=9)[1]["w"]) == w).all()
        checkpoints.close()
        print("ok")
        """,
        tmp_path,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"},
    )
    assert result.stdout == "ok\n", result.stderr


@pytest.mark.slow
def test_a_program_that_forgets_to_wait_neither_hangs_nor_shows_a_traceback(tmp_path):
    result = run(
        """
        import sys
        import jax.numpy as jnp
        from jaxmp.runs.checkpoint import Checkpoints
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(1, {"w": jnp.ones((500, 500))})
        raise SystemExit(3)
        """,
        tmp_path,
    )
    assert result.returncode == 3
    assert "Traceback" not in result.stderr
    assert (tmp_path / "1").exists() or "not written" in result.stderr


def test_nothing_is_said_and_no_thread_is_left(tmp_path, capfd, caplog):
    before = set(threading.enumerate())
    write(tmp_path, 1, 2, 3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.restore(TEMPLATE)
    checkpoints.close()
    others = set(threading.enumerate()) - before
    for thread in others:  # one that is about to end may need a moment on a busy machine
        thread.join(timeout=10)
    assert not [thread for thread in others if thread.is_alive()]
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""


def test_two_leaves_of_one_path_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(InputError, match="same path"):
        checkpoints.save(0, {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}})
    checkpoints.close()
    assert list(tmp_path.iterdir()) == []


def test_options_that_mean_nothing_are_refused(tmp_path):
    with pytest.raises(InputError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(InputError, match="mode='largest'"):
        Checkpoints(tmp_path, mode="largest")
