"""The models of large_models.py in torch, trained with autocast, by `torch.compile` where there is a GPU."""

from __future__ import annotations

from typing import Any

import jax
import torch
from large_models import Workload
from peer_steps.torch_amp import LSTM, Block, Transformer
from torch import nn


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution without bias, and batch normalisation."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """A block of ResNet."""

    def __init__(self, inputs: int, channels: int, stride: int, *, bottleneck: bool):
        super().__init__()
        outputs = channels * 4 if bottleneck else channels
        parts = (
            [(inputs, channels, 1, 1), (channels, channels, 3, stride), (channels, outputs, 1, 1)]
            if bottleneck
            else [(inputs, channels, 3, stride), (channels, channels, 3, 1)]
        )
        self.layers = nn.ModuleList(convolution(*part) for part in parts)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, 1, stride)

    def forward(self, x: Any) -> Any:
        """Maps images to images."""
        y = x
        for layer in self.layers[:-1]:
            y = torch.relu(layer(y))
        return torch.relu(self.layers[-1](y) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet with a stem of 7x7 or 3x3."""

    def __init__(self, of: Any):
        super().__init__()
        bottleneck, width = of.block == "bottleneck", of.channels
        large = of.stem == "7x7"
        self.stem = convolution(3, width, 7 if large else 3, 2 if large else 1)
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        blocks, inputs = [], width
        for stage, count in enumerate(of.blocks):
            for i in range(count):
                channels = width * 2**stage
                blocks.append(Residual(inputs, channels, 2 if stage and not i else 1, bottleneck=bottleneck))
                inputs = channels * (4 if bottleneck else 1)
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(inputs, of.classes)

    def forward(self, x: Any) -> Any:
        """Maps images (rows, height, width, channels) to logits, channels last in memory."""
        x = self.pool(torch.relu(self.stem(x.permute(0, 3, 1, 2))))
        return self.head(self.blocks(x).mean((2, 3)))


class ViT(nn.Module):
    """The vision transformer with a class token."""

    def __init__(self, of: Any, side: int):
        super().__init__()
        self.patches = nn.Conv2d(3, of.width, of.patch, of.patch)
        count = (side // of.patch) ** 2 + 1
        self.token, self.positions = (
            nn.Parameter(torch.zeros(1, 1, of.width)),
            nn.Parameter(torch.randn(1, count, of.width) * 0.02),
        )
        self.blocks = nn.ModuleList(Block(of.heads, of.width, causal=False) for _ in range(of.layers))
        self.norm, self.head = nn.LayerNorm(of.width), nn.Linear(of.width, of.classes)

    def forward(self, x: Any) -> Any:
        """Maps images (rows, height, width, channels) to logits."""
        x = self.patches(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.to(x.dtype).expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class MaskedLM(nn.Module):
    """BERT: all positions see all, logits at the predicted ones alone."""

    def __init__(self, of: Any):
        super().__init__()
        sizes = of.vocabulary, of.context, of.segments
        self.tokens, self.positions, self.types = (nn.Embedding(size, of.width) for size in sizes)
        for embedding in (self.tokens, self.positions, self.types):
            nn.init.normal_(embedding.weight, std=0.02)
        self.embedding_norm = nn.LayerNorm(of.width, eps=1e-12)
        self.blocks = nn.ModuleList(EncoderBlock(of.heads, of.width, of.hidden) for _ in range(of.layers))
        self.transform, self.transform_norm = nn.Linear(of.width, of.width), nn.LayerNorm(of.width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(of.vocabulary))

    def forward(self, tokens: Any, segments: Any, positions: Any, predicted: Any) -> Any:
        """Maps rows of tokens, (rows, length), and places (rows, count) to logits (rows, count, vocabulary).

        Without the mask: all tokens of these rows are seen, and torch's fast attention takes none.
        """
        x = self.embedding_norm(self.tokens(tokens) + self.positions(positions) + self.types(segments))
        for block in self.blocks:
            x = block(x)
        x = torch.gather(x, 1, predicted[..., None].expand(-1, -1, x.shape[-1]))
        x = self.transform_norm(nn.functional.gelu(self.transform(x)))
        return nn.functional.linear(x, self.tokens.weight, self.bias)


class EncoderBlock(nn.Module):
    """A block of BERT: norms after the residual connections, the exact GELU."""

    def __init__(self, heads: int, width: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Any) -> Any:
        """Maps (rows, length, width) to the same shape."""
        rows, length, width = x.shape
        qkv = self.qkv(x).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        x = self.attention_norm(x + self.out(y.transpose(1, 2).reshape(rows, length, width)))
        return self.mlp_norm(x + self.down(nn.functional.gelu(self.up(x))))


def model_of(workload: Workload) -> nn.Module | None:
    """Returns the torch model; None if there is none of this kind."""
    of: Any = workload.model
    torch.manual_seed(0)
    match type(of).__name__:
        case "ResNet":
            return ResNet(of).to(memory_format=torch.channels_last)
        case "ViT":
            return ViT(of, workload.row[0])
        case "GPT2":
            return Transformer(of, workload.row[0])
        case "BERTMaskedLM":
            return MaskedLM(of)
        case "SequenceClassifier":
            return LSTM(workload.row[-1], of.width, workload.classes)
    return None


def check_parameters(workload: Workload, model: nn.Module) -> None:
    """Raises RuntimeError if a torch model has another number of parameters; without the second bias of its LSTM."""
    params, _ = jax.eval_shape(workload.init, jax.random.key(0))
    own = sum(leaf.size for leaf in jax.tree.leaves(params))
    torchs = sum(each.numel() for name, each in model.named_parameters() if "bias_hh" not in name)
    if own != torchs:
        raise RuntimeError(f"not the same model: {own} parameters, and {torchs} in torch")


def make_steps(workload: Workload, *, half: str | None, device: str) -> Any:
    """Returns `steps(count)`, which makes so many steps and waits for them; None if there is no such model in torch.

    Args:
      workload: what is trained.
      half: dtype of autocast; None: float32, on a GPU by TF32.
      device: cuda, where the model is compiled, or cpu.
    """
    model = model_of(workload)
    if model is None:
        return None
    check_parameters(workload, model)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model = model.to(device)
    fused = device == "cuda"
    optimizer: Any = (
        torch.optim.AdamW(model.parameters(), 1e-4, fused=fused)
        if workload.is_tokens
        else torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9, fused=fused)
    )
    rows = {name: torch.from_numpy(column).to(device) for name, column in workload.batch().items()}
    names = [name for name in workload.task.inputs if name != "mask"]
    inputs = [rows[name].long() if workload.is_tokens else rows[name] for name in names]
    label = next(rows[name] for name in ("label", "next_tokens", "targets") if name in rows).long().flatten()
    scaler = torch.amp.GradScaler(device, enabled=half == "float16")

    def loss_of(*inputs: Any) -> Any:
        with torch.autocast(device, getattr(torch, half or "float32"), enabled=half is not None):
            logits = model(*inputs)
        logits = logits.float().flatten(0, -2)
        return nn.functional.cross_entropy(logits, label), (logits.argmax(-1) == label).float().mean()

    forward = torch.compile(loss_of) if device == "cuda" else loss_of

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            loss, _ = forward(*inputs)  # and the accuracy, which jaxmp's step measures too
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if device == "cuda":
            torch.cuda.synchronize()

    return steps
