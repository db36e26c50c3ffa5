"""Values that are kept in a file come back as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from foldcut import CompilerError
from foldcut.compiler.devices.spilled import Spilled

VALUES = {
    "image": torch.randn(2, 3, 5, 7),
    "channels last": torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last),
    "transposed": torch.randn(4, 6).t(),
    "strided": torch.randn(8, 6)[::2, 1:],
    "expanded": torch.randn(3, 1).expand(3, 5),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "half": torch.randn(7).to(torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
    "indices": torch.arange(5),
    "double": torch.randn(3, dtype=torch.float64),
    "complex": torch.randn(3, dtype=torch.complex64),
    "size": 7,
    "nothing": None,
}


def test_values_come_back_bit_for_bit(tmp_path: Path) -> None:
    found = Spilled.written(VALUES, tmp_path / "values").read()
    assert list(found) == list(VALUES)
    for name, value in VALUES.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
        else:
            assert found[name] == value


@pytest.mark.parametrize("name", [name for name, value in VALUES.items() if isinstance(value, torch.Tensor)])
def test_they_are_laid_out_as_they_were(name: str, tmp_path: Path) -> None:
    """Kernels are chosen by it, and so is how they round."""
    assert Spilled.written({name: VALUES[name]}, tmp_path / "values").read()[name].stride() == VALUES[name].stride()


def test_one_tensor_under_two_names_is_written_once(tmp_path: Path) -> None:
    value = torch.randn(100)
    kept = Spilled.written({"a": value, "b": value}, tmp_path / "values")
    assert kept.size == 448  # 400 bytes, and what brings them to a multiple of 64
    assert torch.equal(kept.read()["a"], value) and torch.equal(kept.read()["b"], value)


def test_values_that_are_read_may_be_changed(tmp_path: Path) -> None:
    kept = Spilled.written({"a": torch.ones(3)}, tmp_path / "values")
    kept.read()["a"].zero_()
    assert torch.equal(kept.read()["a"], torch.ones(3))


def test_a_disk_without_room_is_said() -> None:
    with pytest.raises(CompilerError, match="does not fit into memory, and not into /dev either: No space left"):
        Spilled.written({"a": torch.randn(1 << 16)}, Path("/dev/full"))
