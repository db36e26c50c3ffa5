"""Layer norms that a file wrote out in pieces are one operator after importing, and the file's function stays."""

from __future__ import annotations

from pathlib import Path

import foldcut
import onnx
import pytest
import torch
from foldcut.compiler.export.exporter import to_onnx, to_onnx_model
from torch import nn


class Encoder(nn.Module):
    """A residual stream with two layer norms, as transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(4, 16), nn.Linear(16, 3)
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16, bias=False)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        for norm in (self.first, self.second):
            norm.weight.data.uniform_(0.5, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.down(torch.relu(self.up(self.first(x))))
        return self.head(self.second(x))


@pytest.fixture(scope="module")
def pieces() -> onnx.ModelProto:
    """The network in opset 13, where a layer norm takes nine nodes."""
    model = to_onnx_model(foldcut.capture(Encoder().eval(), torch.randn(2, 5, 4)), opset=13)
    assert "LayerNormalization" not in {n.op_type for n in model.graph.node}
    return model


def test_the_pieces_become_one_operator(pieces: onnx.ModelProto) -> None:
    program = foldcut.capture(pieces)
    targets = [str(n.target) for n in program.graph.nodes]
    assert sum("layer_norm" in t for t in targets) == 2
    assert not any("sqrt" in t or "mean" in t for t in targets)


def test_the_channels_around_the_norms_can_be_pruned(pieces: onnx.ModelProto) -> None:
    sizes = {len(g) for g in foldcut.find_units(foldcut.capture(pieces)).prunable}
    assert sizes == {16, 32}  # the stream and the hidden layer


def test_it_goes_out_in_pieces_again(pieces: onnx.ModelProto, tmp_path: Path) -> None:
    program = foldcut.capture(pieces)
    again = onnx.load_from_string(to_onnx(program))
    assert again.opset_import[0].version == 13
    assert "LayerNormalization" not in {n.op_type for n in again.graph.node}
    x = torch.randn(3, 5, 4)
    assert torch.allclose(foldcut.capture(again)(x), program(x), atol=1e-5)


@pytest.mark.parametrize("op", ["Sub", "Sqrt", "Div"])
def test_a_piece_that_is_read_elsewhere_stays(pieces: onnx.ModelProto, op: str) -> None:
    """An intermediate value that the file returns has to be computed, so nothing is merged over it."""
    model = onnx.ModelProto()
    model.CopyFrom(pieces)
    piece = next(n for n in model.graph.node if n.op_type == op)
    model.graph.output.append(onnx.helper.make_tensor_value_info(piece.output[0], 1, None))
    program = foldcut.capture(model)
    assert sum("layer_norm" in str(n.target) for n in program.graph.nodes) == 1
    assert [s.name for s in program.outputs][1] == piece.output[0]
