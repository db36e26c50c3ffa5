"""The decision to compute a layer in integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...compiler.ir.program import Program
from ...compiler.plan.decision import Decision, predicted
from ...compiler.support.errors import CompilerError
from ...compiler.support.setting_checks import Allowed, check_number, check_whole, refuse, settled
from ...runtime.predict.integer_kernels import IntegerKernels
from .edit_quantize import ValueGrid

#: Whether a zero point is one of the integers, a grid itself says.
_ANY = Allowed(least=-128, most=255)
#: Channels are scaled by powers of two up to this one: what lies further apart is nothing on a grid of 8 bits.
MOST_EXPONENT = 10
_POWER = Allowed(least=-MOST_EXPONENT, most=MOST_EXPONENT)


@dataclass(frozen=True, kw_only=True)
class QuantizeLayer(Decision):
    """Decision: store the weight of one layer, and the values in front of it and behind it, in int8.

    Arguments:
        layer: Name of the node. What stands for it after other rewrites (its factors) is quantised with it.
        bits: Bits of a value: 8.
        weight_limit: Weights are integers from ``-weight_limit`` to ``weight_limit``: 127, or 63 where the backend's
            kernels overflow with more.
        values: Integers of values: ``uint8`` or ``int8``.
        symmetric: Whether zero is in the middle of their range, for ``int8``.
        bias: How its bias is stored: ``int32``, or ``float32`` where the backend takes no int32.
        grids: Node, scale and zero point of the values in front of the layer and behind it. Empty until they are
            known.
        equalised: Layer, and the power of two that each of its output channels is divided by, for the channels in front
            of this layer and behind it whose ranges were evened out. What reads them multiplies by it.
        path: Module path of the layer, for display.
        error: Relative output error when this layer alone is quantised. None if not predicted.

    Raises:
        CompilerError: If an argument is out of range or of the wrong type.

    Example:
        >>> print(foldcut.QuantizeLayer(layer="conv2d_3"))
        quantise conv2d_3 to int8
    """

    layer: str
    bits: int = 8
    weight_limit: int = 127
    values: str = "uint8"
    symmetric: bool = False
    bias: str = "int32"
    grids: tuple[tuple[str, float, int], ...] = ()
    equalised: tuple[tuple[str, tuple[int, ...]], ...] = ()
    path: str = ""
    error: float | None = None

    kind = "quantize"
    nouns = ("layer in int8", "layers in int8")

    def __post_init__(self) -> None:
        for name, text in (("layer", self.layer), ("path", self.path)):
            if not isinstance(text, str) or not (text or name == "path"):
                refuse(name, text, "the name of a node", why="is no name")
        check_whole("bits", self.bits, Allowed(least=8, most=8, words="8, there are no others"))
        # integers and grids that there are none of are refused where they are made
        _ = self.kernels, self.value_grids, self.exponents
        settled(self)

    @classmethod
    def for_kernels(cls, layer: str, kernels: IntegerKernels) -> QuantizeLayer:
        """The decision for one layer on a backend.

        Arguments:
            layer: Name of the node.
            kernels: The integers that the backend computes with.

        Returns:
            The decision, without grids.
        """
        return cls(
            layer=layer,
            weight_limit=kernels.weight_limit,
            values=kernels.values,
            symmetric=kernels.symmetric,
            bias=kernels.bias,
        )

    @property
    def kernels(self) -> IntegerKernels:
        """The integers that the layer is computed with."""
        return IntegerKernels(
            values=self.values, symmetric=self.symmetric, weight_limit=self.weight_limit, bias=self.bias
        )

    @property
    def value_grids(self) -> dict[str, ValueGrid]:
        """The grids by node."""
        found = {}
        for grid in self.grids:
            if not isinstance(grid, (tuple, list)) or len(grid) != 3 or not isinstance(grid[0], str):
                refuse("grids", grid, "a node, a scale and a zero point for each", why="is no grid")
            node, scale, zero = grid
            check_number(f"scale of {node}", scale, Allowed(above=0))
            check_whole(f"zero point of {node}", zero, Allowed(least=0, most=0) if self.symmetric else _ANY)
            if node in found:
                refuse("grids", node, "one grid for each node", why="is there twice")
            found[node] = ValueGrid(scale=float(scale), zero_point=int(zero), dtype=getattr(torch, self.values))
        return found

    @property
    def exponents(self) -> dict[str, tuple[int, ...]]:
        """The powers of two by layer."""
        found = {}
        for even in self.equalised:
            if not isinstance(even, (tuple, list)) or len(even) != 2 or not isinstance(even[0], str):
                refuse("equalised", even, "a layer and its powers of two for each", why="is no such pair")
            layer, powers = even
            for power in powers:
                check_whole(f"power of two of {layer}", power, _POWER)
            found[layer] = tuple(powers)
        return found

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
        return [self.layer, self.bits, self.weight_limit, self.values, self.symmetric, self.bias]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizeLayer:
        """Read a decision back. Raises KeyError, TypeError or ValueError for anything else."""
        values = {name: value for name, value in data.items() if name != "kind"}
        grids = tuple(tuple(grid) for grid in data.get("grids", ()))
        equalised = tuple((layer, tuple(powers)) for layer, powers in data.get("equalised", ()))
        try:
            return cls(**{**values, "grids": grids, "equalised": equalised, "error": predicted(data.get("error"))})
        except CompilerError as refusal:
            raise ValueError(f"{refusal.message}: {refusal.hint}") from refusal

    def __str__(self) -> str:
        return f"quantise {self.layer} to int{self.bits}"
