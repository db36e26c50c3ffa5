"""The demo: a small residual network trained on real handwritten digits, compiled to a latency goal. Needs
scikit-learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from ...passes.mimic.settings import MimicSettings
from ..driver.api import Compiled
from ..driver.api import compile as compile_model
from ..driver.pipeline_settings import PipelineSettings
from ..goals.latency import Latency
from ..plan.goal import Goal
from ..support.atomic_files import check_writable
from ..support.errors import CompilerError, GoalError
from .compile import end_unmet, say_written
from .console import FIRST, guarded, out, show_line
from .goals import read_rewrites
from .options import DemoOptions

EPOCHS = 8
CALIBRATION_SAMPLES = 300
#: The search for better plans ends then: a demo is to be over in minutes.
SEARCH_SECONDS = 60.0


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norms around an identity shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x + y)


class DigitNet(nn.Module):
    """A ResNet for 8 x 8 grey images: a stem, two stages of residual blocks, global pooling, ten classes."""

    def __init__(self, blocks: int = 4, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stage1 = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.down = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()
        )
        self.stage2 = nn.Sequential(*(ResidualBlock(2 * width) for _ in range(blocks)))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.stage2(self.down(self.stage1(self.stem(x))))
        logits: torch.Tensor = self.head(features.mean((2, 3)))
        return logits


def load_digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(training images, labels, test images, labels) of scikit-learn's bundled digits: 1,797 real 8 x 8 scans, a
    seeded split."""
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as cause:
        raise CompilerError("the demo needs scikit-learn", hint='pip install "foldcut[demo]"') from cause
    data = bundled()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1300], order[1300:]
    return images[train], labels[train], images[test], labels[test]


def train_digits(
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    seed: int,
    epochs: int = EPOCHS,
    make: Callable[[], nn.Module] = DigitNet,
) -> nn.Module:
    """Ordinary supervised training; foldcut itself never sees the labels."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            loss = F.cross_entropy(net(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    return net.eval()


def accuracy(module: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 accuracy in percent."""
    with torch.no_grad():
        return 100 * float((module(images).argmax(1) == labels).float().mean())


def run_demo(
    goal: Goal, *, rewrites: Sequence[str] | None = None, seed: int, progress: bool, console: Console
) -> tuple[Compiled, GoalError | None]:
    """Train, compile, print the table; the result, and what was not reached where the goal is not met."""
    images, labels, test_images, test_labels = load_digits()
    console.print(f"training a residual network on {len(images)} handwritten digits ...")
    net = train_digits(images, labels, seed=seed)
    console.print(f"compiling it to {goal} from {CALIBRATION_SAMPLES} unlabelled images ...")
    brief, settings = MimicSettings(iterations=120), PipelineSettings(search_seconds=SEARCH_SECONDS)
    samples = images[:CALIBRATION_SAMPLES]
    missed: GoalError | None = None
    try:
        result = compile_model(
            net, samples, goal=goal, rewrites=rewrites, mimic=brief, settings=settings, seed=seed, progress=progress
        )
    except GoalError as unmet:
        if not isinstance(unmet.best, Compiled):
            raise
        result, missed = unmet.best, unmet
    table = Table(title=f"foldcut demo: {goal}")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    before, after = accuracy(net, test_images, test_labels), accuracy(result.module, test_images, test_labels)
    table.add_row(
        f"accuracy ({len(test_images)} test images)",
        f"{before:.2f} %",
        f"{after:.2f} %",
        f"{after - before:+.2f} points",
    )
    for row in result.report.rows():
        table.add_row(*row)
    console.print(table)
    show_line("done: " + ", ".join(map(str, result.plan.decisions)), console)
    return result, missed


def run(options: DemoOptions) -> None:
    """Carry it out."""

    def work() -> None:
        check_writable(options.output)
        asked, console = Latency(options.goal), Console(quiet=True) if options.quiet else out
        allowed = read_rewrites(options.rewrites, [asked])
        shown = not options.quiet
        result, unmet = run_demo(asked, rewrites=allowed, seed=options.seed, progress=shown, console=console)
        if FIRST:
            result.save(options.output)
        if shown:
            say_written(options.output, result)
        if unmet is not None:
            end_unmet(unmet)

    guarded(work, debug=options.debug, by="all together")
