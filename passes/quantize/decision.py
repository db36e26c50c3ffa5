"""The decision to compute a layer in integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from typing import Any

from ...compiler.ir.program import Program
from ...compiler.plan.decision import Decision


@dataclass(frozen=True, kw_only=True)
class QuantizeLayer(Decision):
    """Decision: store the weight of one layer, and the values in front of it and behind it, in int8.

    Arguments:
        layer: Name of the node. What stands for it after other rewrites (its factors) is quantised with it.
        bits: Bits of a value: 8.
        weight_limit: Weights are integers from ``-weight_limit`` to ``weight_limit``: 127, or 63 where the backend's
            kernels overflow with more.
        values: Integers of values: ``uint8`` or ``int8``.
        symmetric: Whether zero is in the middle of their range.
        grids: Node, scale and zero point of the values in front of the layer and behind it. Empty until they are
            known.
        equalised: Layer, and the power of two that each of its output channels is divided by, for the channels in front
            of this layer and behind it whose ranges were evened out. What reads them multiplies by it.
        path: Module path of the layer, for display.
        error: Relative output error when this layer alone is quantised. None if not predicted.

    Example:
        >>> print(foldcut.QuantizeLayer(layer="conv2d_3"))
        quantise conv2d_3 to int8
    """

    layer: str
    bits: int = 8
    weight_limit: int = 127
    values: str = "uint8"
    symmetric: bool = False
    grids: tuple[tuple[str, float, int], ...] = ()
    equalised: tuple[tuple[str, tuple[int, ...]], ...] = ()
    path: str = ""
    error: float | None = None

    kind = "quantize"
    nouns = ("layer in int8", "layers in int8")

    @property
    def subject(self) -> str:
        """Name of the layer."""
        return self.layer

    @property
    def what(self) -> str:
        """The module path, or the name of the layer."""
        return self.path or self.layer

    @property
    def how(self) -> str:
        """The precision."""
        return f"int{self.bits}"

    def marks(self, program: Program) -> dict[str, dict[str, Any]]:
        """The precision of the layer."""
        del program
        return {self.layer: {"bits": self.bits}}

    @property
    def change(self) -> list[Any]:
        """Layer and precision."""
        return [self.layer, self.bits, self.weight_limit, self.values, self.symmetric]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizeLayer:
        """Read a decision back. Raises KeyError, TypeError or ValueError for anything else."""
        grids = tuple((str(node), float(scale), int(zero)) for node, scale, zero in data.get("grids", ()))
        equalised = tuple(
            (str(layer), tuple(index(power) for power in powers)) for layer, powers in data.get("equalised", ())
        )
        rest = {name: value for name, value in data.items() if name != "kind"}
        return cls(**{**rest, "grids": grids, "equalised": equalised})

    def __str__(self) -> str:
        return f"quantise {self.layer} to int{self.bits}"
