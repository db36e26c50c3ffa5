"""A model with two inputs and named outputs, compiled by the number of blocks; the result takes the same arguments."""

import foldcut
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Scorer(nn.Module):
    """Scores a sequence of tokens under a mask."""

    def __init__(self, width: int = 32, depth: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, 3)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.blocks(self.embedding(tokens)) * mask.unsqueeze(-1)
        pooled = x.sum(1) / mask.sum(1, keepdim=True)
        return {"score": self.head(pooled), "embedding": pooled}


torch.manual_seed(0)
net = Scorer().eval()
tokens, mask = torch.randint(0, 100, (64, 12)), torch.ones(64, 12)

out = foldcut.compile(
    net, (tokens, mask), goal=foldcut.Blocks(2), mimic=foldcut.MimicSettings(iterations=20), progress=False
)
result = out.module(tokens[:5], mask[:5])
print({name: tuple(value.shape) for name, value in result.items()})
print("inputs ", ", ".join(map(str, out.program.inputs)))
print("outputs", ", ".join(map(str, out.program.outputs)))
print("dropped", ", ".join(str(d) for d in out.plan.decisions), f"- output error {out.report.output_error:.4f}")
