"""A small vision transformer for CIFAR-10, and its training: there is none among the trained networks.

    python benchmarks/cifar_vit.py --data ../shared/data --output models/vit.pt [--epochs 20] [--seed 0]

Patches of 4 x 4, four layers of width 128 with four heads, pre-norm, GELU, the mean of the tokens at the end. AdamW,
learning rate rising for an epoch and falling as a cosine, crops and mirror images, forward pass in bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from cifar_data import accuracy, load_cifar
from frank_wolfe_train import batches, train_step
from torch import nn
from torch.nn import functional as F

WIDTH, DEPTH, HEADS, PATCH = 128, 4, 4, 4
BATCH, LEARNING_RATE, DECAY = 128, 1e-3, 0.05


class Layer(nn.Module):
    """Attention and an MLP, each behind a norm and beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(heads.transpose(1, 2).reshape(batch, tokens, WIDTH))
        result: torch.Tensor = x + self.mlp(self.norm2(x))
        return result


class CifarViT(nn.Module):
    """The network: images (n, 3, 32, 32) to logits (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.position = nn.Parameter(torch.randn(1, (32 // PATCH) ** 2, WIDTH) * 0.02)
        self.layers = nn.Sequential(*(Layer() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        result: torch.Tensor = self.head(self.norm(self.layers(tokens)).mean(1))
        return result


def load_vit(folder: Path) -> CifarViT:
    """The trained network of a folder."""
    net = CifarViT()
    net.load_state_dict(torch.load(folder / "vit.pt", weights_only=True))
    return net.eval()


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    data, net = load_cifar(arguments.data, None, labelled=True), CifarViT()
    per_epoch = math.ceil(len(data.calibration) / BATCH)
    steps = arguments.epochs * per_epoch
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(step / per_epoch, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    generator, start = torch.Generator().manual_seed(arguments.seed), time.process_time()
    for epoch in range(arguments.epochs):
        net.train()
        for images, labels in batches(data, BATCH, generator):
            loss = train_step(net, optimizer, images, labels, smoothing=0.1)
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss:.3f}, {time.process_time() - start:.0f} s", flush=True)
    net.eval()
    part = arguments.output.with_suffix(".part")
    torch.save(net.state_dict(), part)
    part.replace(arguments.output)
    print(f"{accuracy(net, data):.2f} %")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
