"""Symmetric matrices as one triangle."""

import pytest
import torch
from foldcut.compiler.devices.triangle import mirrored, packed, unpacked


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 33])
@pytest.mark.parametrize("groups", [(), (3,)])
def test_the_same_bits_from_half_the_numbers(size: int, groups: tuple[int, ...]) -> None:
    wanted = mirrored(torch.randn(*groups, size, size, dtype=torch.float64))
    assert torch.equal(wanted, wanted.mT)
    sent = packed(wanted)
    assert sent.numel() == wanted.numel() // size * (size + 1) // 2, "no number twice"
    assert torch.equal(unpacked(sent), wanted)
    assert torch.equal(unpacked(sent + sent), wanted + wanted), "sums of triangles are triangles of sums"


def test_the_lower_triangle_counts() -> None:
    matrix = torch.tensor([[1.0, 9.0], [2.0, 3.0]])
    assert mirrored(matrix).tolist() == unpacked(packed(matrix)).tolist() == [[1, 2], [2, 3]]
