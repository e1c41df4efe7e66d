"""The steps as in PyTorch's AMP recipe: `autocast`, and `GradScaler` in float16; eager, or by `torch.compile`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .cases import FIRST_SCALE, LEARNING_RATE, Case

PACKAGES = ("torch",)


class CNN(nn.Module):
    """Blocks of convolution and pooling."""

    def __init__(self, channels: tuple[int, ...], row: tuple[int, ...], classes: int):
        super().__init__()
        sizes = (row[-1], *channels)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(sizes, channels, strict=False))
        self.head = nn.Linear((row[0] // 2 ** len(channels)) ** 2 * channels[-1], classes)

    def forward(self, x: Any) -> Any:
        """Maps images (rows, height, width, channels) to logits: channels last in memory, as torch advises."""
        x = x.permute(0, 3, 1, 2)
        for convolution in self.convolutions:
            x = nn.functional.max_pool2d(nn.functional.relu(convolution(x)), 2)
        return self.head(x.flatten(1))


class LSTM(nn.Module):
    """torch's own LSTM, and a layer from its last step."""

    def __init__(self, inputs: int, width: int, classes: int):
        super().__init__()
        self.lstm, self.head = nn.LSTM(inputs, width, batch_first=True), nn.Linear(width, classes)

    def forward(self, x: Any) -> Any:
        """Maps sequences (rows, time, features) to logits."""
        return self.head(self.lstm(x)[0][:, -1])


class Block(nn.Module):
    """A transformer block."""

    def __init__(self, heads: int, width: int, *, causal: bool = True):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Any) -> Any:
        """Maps (rows, length, width) to the same shape."""
        rows, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*qkv.unbind(0), is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Transformer(nn.Module):
    """GPT-2 with tied embeddings."""

    def __init__(self, of: Any, length: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(of.vocabulary, of.width), nn.Embedding(length, of.width)
        self.blocks = nn.ModuleList(Block(of.heads, of.width) for _ in range(of.layers))
        self.norm = nn.LayerNorm(of.width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Any) -> Any:
        """Maps tokens (rows, length) to logits."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return nn.functional.linear(self.norm(x), self.tokens.weight)


def model_of(case: Case) -> nn.Module:
    """Returns the torch model of a case."""
    of: Any = case.model
    torch.manual_seed(0)
    match type(of).__name__:
        case "MLP":
            sizes, parts = (*case.row, *of.features), []
            for a, b in zip(sizes, of.features, strict=False):
                parts += [nn.Linear(a, b), nn.ReLU()]
            return nn.Sequential(*parts, nn.Linear(sizes[-1], case.classes))
        case "CNN":
            return CNN(of.channels, case.row, case.classes).to(memory_format=torch.channels_last)
        case "SequenceClassifier":
            return LSTM(case.row[-1], of.width, case.classes)
    return Transformer(of, case.row[0])


def parameters(case: Case) -> int:
    """Returns the number of parameters, without the second bias of torch's LSTM, which is only added to the first."""
    named = model_of(case).named_parameters()
    return sum(each.numel() for name, each in named if "bias_hh" not in name)


def make_steps(case: Case, precision: str, *, compiled: bool = False, device: str = "cpu") -> Any:
    """Returns `steps(count)`, which makes so many steps on one batch, and waits for them."""
    model = model_of(case).to(device)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    scaler = torch.amp.GradScaler(device, init_scale=FIRST_SCALE, enabled=precision == "float16")
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    rows = case.columns()
    x, label = torch.from_numpy(rows["x"]).to(device), torch.from_numpy(rows["label"]).long().to(device).flatten()
    forward = torch.compile(model) if compiled else model

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, dtype, enabled=precision != "float32"):
                logits = forward(x)
            logits = logits.float().flatten(0, -2)
            loss = nn.functional.cross_entropy(logits, label)
            with torch.no_grad():
                (logits.argmax(-1) == label).float().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if device != "cpu":
            torch.cuda.synchronize()

    return steps
