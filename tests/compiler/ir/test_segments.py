"""Segments: cut where one activation passes, exact when run one after another, distinguished by what they cost."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.compare import flatten_outputs
from foldcut.compiler.ir.cost import program_cost
from foldcut.compiler.ir.program import Program, is_size, output_nodes
from foldcut.compiler.ir.segments import Segment, find_segments, segment_key
from foldcut.runtime.predict.edit_extract import extract_segments
from torch import nn
from torch.nn import functional as F


class Masked(nn.Module):
    """Two branches that both read a mask worked out from a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weight = (mask > 0).to(x.dtype)
        x = x + self.first(x) * weight
        return x + self.second(x) * weight


class Windows(nn.Module):
    """The batch size goes through views between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        windows = self.first(x).view(n, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(n * 16, 16)
        return self.second(windows).view(n, 16, 5)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 6, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = F.relu(self.stem(x))
        return {"a": self.a(x).mean((2, 3)), "stem": x, "b": self.b(x).argmax(1)}


def run_apart(program: Program, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Values by name, from segments extracted one at a time and run in turn."""
    values = dict(zip((n.name for n in program.graph.nodes if n.op == "placeholder"), inputs, strict=True))
    for segment in find_segments(program):
        part = extract_segments(program, [segment], batch=len(inputs[0]))
        values |= zip(segment.exits, part(tuple(values[name] for name in segment.entries)), strict=True)
    return values


CASES: dict[str, Any] = {
    "residual": lambda n: (n.seeded(lambda: n.ResNet(3), seed=1), (n.images(3),)),
    "transformer": lambda n: (n.seeded(lambda: n.Transformer(2), seed=2), (n.tokens(3),)),
    "dense": lambda n: (n.seeded(n.DenseNet, seed=1), (n.images(3),)),
    "inverted": lambda n: (n.seeded(lambda: n.image_net(n.Inverted(), n.Inverted()), seed=3), (n.images(3),)),
    "masked": lambda n: (Masked().eval(), (torch.randn(3, 6), torch.randn(3, 6))),
    "windows": lambda n: (Windows().eval(), (n.images(3),)),
    "two heads": lambda n: (TwoHeads().eval(), (n.images(3),)),
}


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest, nets: SimpleNamespace) -> tuple[Program, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    net, inputs = CASES[request.param](nets)
    return capture(net, inputs), inputs


def test_segments_in_turn_compute_the_program(case: tuple[Program, tuple[torch.Tensor, ...]]) -> None:
    program, inputs = case
    values = run_apart(program, *inputs)
    for node, expected in zip(output_nodes(program.graph), flatten_outputs(program(inputs)), strict=True):
        torch.testing.assert_close(values[node.name], expected, rtol=0, atol=0)


def test_every_call_lies_in_one_segment(case: tuple[Program, tuple[torch.Tensor, ...]]) -> None:
    program, _ = case
    members = [name for segment in find_segments(program) for name in segment.nodes]
    assert sorted(members) == sorted(n.name for n in program.graph.nodes if n.op == "call_function" and not is_size(n))
    assert sum(segment.macs for segment in find_segments(program)) == program_cost(program).macs


def test_side_by_side_they_export_at_once(case: tuple[Program, tuple[torch.Tensor, ...]]) -> None:
    program, _ = case
    segments = find_segments(program)
    together = extract_segments(program, segments, batch=2)
    assert [spec.name for spec in together.inputs] == [
        f"s{i}_{name}" for i, segment in enumerate(segments) for name in segment.entries
    ]
    assert all(isinstance(d, int) for spec in (*together.inputs, *together.outputs) for d in spec.shape)
    assert to_onnx(together)


def test_blocks_are_segments(residual: Program) -> None:
    segments = find_segments(residual)
    assert [s.name for s in segments] == ["x>relu", "relu>relu_2", "relu_2>relu_4", "relu_4>mean", "mean>linear"]


def test_equal_blocks_share_a_key_and_others_do_not(residual: Program) -> None:
    stem, first, second, third, head = (segment_key(residual, s, 2) for s in find_segments(residual))
    assert first == second  # the weights differ
    assert len({stem, first, third, head}) == 4
    assert first != segment_key(residual, find_segments(residual)[1], 3)


@pytest.mark.parametrize("change", ["stride", "dilation", "kernel", "width", "bias", "dtype", "size"])
def test_whatever_changes_the_time_changes_the_key(change: str) -> None:
    def key(**options: Any) -> str:
        dtype, size = options.pop("dtype", torch.float32), options.pop("size", 12)
        net = nn.Conv2d(3, **{"out_channels": 8, "kernel_size": 3, **options}).to(dtype)
        program = capture(net.eval(), torch.zeros(2, 3, size, size, dtype=dtype))
        (segment,) = find_segments(program)
        return segment_key(program, segment, 1)

    changed = {
        "stride": {"stride": 2},
        "dilation": {"dilation": 2},
        "kernel": {"kernel_size": 5},
        "width": {"out_channels": 9},
        "bias": {"bias": False},
        "dtype": {"dtype": torch.float64},
        "size": {"size": 13},
    }[change]
    assert key() == key()
    assert key() != key(**changed)


def test_a_mask_comes_in_at_every_segment_that_reads_it() -> None:
    program = capture(Masked().eval(), (torch.zeros(2, 6), torch.ones(2, 6)))
    segments = find_segments(program)
    assert len(segments) == 2
    assert [len(s.entries) for s in segments] == [2, 2]


def test_segments_are_plain_values() -> None:
    a = Segment(nodes=("a",), entries=("x",), exits=("a",), macs=3)
    assert a == Segment(nodes=("a",), entries=("x",), exits=("a",), macs=4)
    assert a.name == "x>a"


def widths(*channels: int) -> list[int]:
    """The widths at the cuts of a chain of 1 x 1 convolutions with these widths."""
    layers = [nn.Conv2d(i, o, 1) for i, o in itertools.pairwise((3, *channels))]
    program = capture(nn.Sequential(*layers).eval(), torch.zeros(2, 3, 6, 6))
    return [program.shape(program.nodes[s.exits[0]])[1] for s in find_segments(program)]


def test_what_a_bottleneck_widens_stays_inside() -> None:
    assert widths(4, 24, 24, 4, 8, 4) == [4, 4, 8, 4]
    assert widths(4, 24, 6, 36, 36, 6) == [4, 6, 6]


def test_a_network_that_stays_wide_is_cut_there() -> None:
    assert widths(4, 40, 40, 40, 40, 8) == [4, 40, 40, 40, 40, 8]
    assert widths(40, 4, 2) == [40, 4, 2]
