"""`jaxmp weights`: a run's weights as a file, which another run begins with."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmp.cli import main
from jaxmp.models.pretrained import read_safetensors

CONFIG = '''
"""Points in the plane."""

import flax.linen as nn
import numpy as np

from jaxmp import Adam, Arrays, Classification, Experiment, Loop


class Small(nn.Module):
    """One hidden layer."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.relu(nn.Dense(8, name="body")(x)))


def load(split):
    x = np.random.default_rng(len(split)).normal(size=(40, 2)).astype(np.float32)
    return {"x": x, "label": (x[:, 0] > 0).astype(int)}


def get_config():
    data, task = Arrays(load, batch_size=40, images=()), Classification(inputs=("x",))
    return Experiment(model=Small(), data=data, task=task, optimizer=Adam(0.1), loop=Loop(steps=2))
'''


@pytest.mark.slow
def test_adapters_alone_and_merged_weights_are_written_and_begun_with(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(CONFIG)
    assert main(["train", "small.py", "--lora.rank", "2", "--lora.where", "body"]) == 0
    assert main(["weights", "runs", "--output", "all.safetensors"]) == 0
    assert main(["weights", "runs", "--output", "adapters.safetensors", "--only", "**/lora_[ab]"]) == 0
    assert main(["weights", "runs", "--output", "merged.safetensors", "--merged"]) == 0
    assert "4 of 4, 42 numbers" in capsys.readouterr().out
    whole, adapters, merged = (read_safetensors(f"{name}.safetensors") for name in ("all", "adapters", "merged"))
    a, b = (adapters[f"body/lora_{name}/kernel"] for name in "ab")
    assert adapters.keys() | merged.keys() == whole.keys() and len(adapters) == 2 and np.abs(b).max() > 0
    expected = whole["body/kernel"] + np.float64(16 / 2) * (np.float64(a) @ b)
    np.testing.assert_allclose(merged["body/kernel"], expected, rtol=1e-6, atol=1e-7)

    plain = ["train", "small.py", "--optimizer.learning-rate", "0", "--workdir", "plain"]
    assert main([*plain, "--init-from", "merged.safetensors"]) == 0
    assert main(["weights", "plain", "--output", "again.safetensors"]) == 0
    again = read_safetensors("again.safetensors")
    assert all(np.array_equal(again[name], x) for name, x in merged.items())
    for arguments, message in (
        (["plain", "--merged"], "was trained without adapters"),
        (["plain", "--only", "bdy"], "--only bdy: no such weight; there are body/bias"),
        (["plain", "--output", "weights.npz"], "expected a file whose name ends in .safetensors"),
        (["plain", "--output", "no/w.safetensors"], "there is no folder 'no'"),
    ):
        assert main(["weights", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main([*plain, "--init-from", "all.safetensors"]) == 2
    assert "body/lora_a/kernel: float32[2, 2] there, nothing here" in capsys.readouterr().err
