"""Models that are not plain classifiers go through the whole pipeline, or get one clear sentence."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import foldcut
import pytest
import torch
from torch import nn
from torch.nn import functional as F

QUICK = foldcut.MimicSettings(iterations=6, batch_size=8, checks=2)


class Branch(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding="same")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(F.relu(self.a(x)))


class Body(nn.Module):
    """A stem, three residual branches and whatever head a test wants."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.Sequential(Branch(6), Branch(6), Branch(6))
        self.head = head

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.blocks(F.relu(self.stem(x))))


class Flattened(nn.Module):
    """A view of a map that is larger than one pixel asks for a memory layout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6 * 8 * 8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.flatten(x, 1))


class Several(nn.Module):
    """A mask, a repeated value, a parameter and the input of the head beside the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(6, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.linear(x.mean((2, 3)))
        return y, y > 0, y, self.scale


class Labels(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.argmax(1)


class Masked(nn.Module):
    """Logits with minus infinity in them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.mean((2, 3))
        return torch.where(torch.arange(6) == 2, torch.full_like(y, -torch.inf), y)


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.mean((2, 3))).squeeze(-1) * 2.0


class Threshold(nn.Module):
    """Nothing can be differentiated through the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b((self.a(x) > 0).float())


def build(head: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Body(head).eval()


@pytest.fixture
def compile_small(counting_backend: Any, quick_measurement: None) -> Callable[..., foldcut.Compiled]:
    def run(net: Any, data: Any, **options: Any) -> foldcut.Compiled:
        options = {"goal": foldcut.Blocks(1), "mimic": QUICK, "progress": False, **options}
        return foldcut.compile(net, data, backend=counting_backend, **options)

    return run


Small = Callable[..., foldcut.Compiled]


@pytest.mark.parametrize("head", [Flattened, Several, Labels, Masked, Regression, Threshold], ids=lambda h: h.__name__)
def test_heads_of_every_kind(head: type[nn.Module], nets: SimpleNamespace, compile_small: Small) -> None:
    net, images = build(head()), nets.images(20)
    result = compile_small(net, images)
    assert len(result.plan.decisions) == 1
    assert result.report.onnx_difference <= 1e-4
    assert 0 <= result.report.output_error < 1
    once, whole = net(images[:3]), result.module(images[:3])
    assert type(once) is type(whole)


def test_a_square_head_is_not_dropped_for_its_features(nets: SimpleNamespace, compile_small: Small) -> None:
    """Features inside or in front of a removable region do not show its loss: the outputs judge."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(layer for _ in range(3) for layer in (nn.Linear(12, 12), nn.ReLU())), nn.Linear(12, 12)
    ).eval()
    data = torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    result = compile_small(net, data, mimic=None)
    assert result.plan.decisions[0].error is not None
    assert result.plan.decisions[0].error > 1e-3


def test_an_encoder_with_a_padding_mask(nets: SimpleNamespace, compile_small: Small) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
            self.head = nn.Linear(12, 3)

        def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
            return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])

    torch.manual_seed(0)
    x, padding = torch.randn(16, 5, 12), torch.zeros(16, 5, dtype=torch.bool)
    padding[:, 4] = True
    result = compile_small(Encoder().eval(), (x, padding))
    assert result.module(x[:3], padding[:3]).shape == (3, 3)


def test_keywords_in_any_order(nets: SimpleNamespace, compile_small: Small) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.other = build(nn.Identity()), nn.Linear(4, 6)

        def forward(self, image: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
            return self.body(image).mean((2, 3)) + self.other(extra)

    net = Two().eval()
    image, extra = nets.images(16), torch.randn(16, 4)
    exported = torch.export.export(
        net,
        (),
        {"image": image, "extra": extra},
        dynamic_shapes={"image": {0: torch.export.Dim.DYNAMIC}, "extra": {0: torch.export.Dim.DYNAMIC}},
    )
    result = compile_small(exported, {"extra": extra, "image": image})
    assert result.module(image=image[:2], extra=extra[:2]).shape == (2, 6)


def test_a_fixed_batch_is_one_clear_sentence(nets: SimpleNamespace, compile_small: Small) -> None:
    exported = torch.export.export(build(Flattened()), (nets.images(2),))
    with pytest.raises(foldcut.CalibrationError, match="fixes the batch size") as caught:
        compile_small(exported, nets.images(8))
    assert "dynamic_shapes" in str(caught.value)


def test_a_plan_is_applied_to_its_own_network_only(nets: SimpleNamespace, compile_small: Small) -> None:
    net, images = build(Regression()), nets.images(12)
    result = compile_small(net, images, mimic=None)
    program = foldcut.capture(net, images[:2])
    assert len(foldcut.apply_plan(program, result.plan).nodes) == len(result.program.nodes)
    with pytest.raises(foldcut.PlanError, match="another network"):
        foldcut.apply_plan(foldcut.capture(build(Regression(), seed=1), images[:2]), result.plan)
