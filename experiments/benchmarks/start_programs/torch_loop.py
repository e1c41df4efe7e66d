"""What `jaxmp train digits_mlp` does, by torch with AMP, eager: `python torch_loop.py STEPS FOLDER`."""

from __future__ import annotations

import math
import os
import sys

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn


def main(count: int, folder: str) -> None:
    """Trains for `count` steps, evaluates each 100, and saves the weights there."""
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(((images / 255 - 0.0192) / 0.0236).astype(np.float32))
    x, rest, y, rest_labels = train_test_split(images, torch.from_numpy(labels), train_size=1258, random_state=0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Dropout(0.2), nn.Linear(512, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (1 + math.cos(math.pi * min(i / 1000, 1))) / 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)

    def accuracy(x: torch.Tensor, y: torch.Tensor) -> float:
        model.eval()
        with torch.no_grad():
            found = (model(x).argmax(-1) == y).float().mean().item()
        model.train()
        return found

    order = torch.randperm(len(x))
    for i in range(count):
        batch = order[(i * 64) % (len(x) - 64) :][:64]
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.cross_entropy(model(x[batch]).float(), y[batch])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        if (i + 1) % 100 == 0:
            print(i + 1, accuracy(rest[:270], rest_labels[:270]), flush=True)
            torch.save(model.state_dict(), os.path.join(folder, f"{i}.pt"))
    if count > 1:
        print(accuracy(rest[270:], rest_labels[270:]))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
