"""The outputs that hardening.py expects of a cut network: the original run under the oracle, from the weights that are
left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from hardening_oracle import COMPUTED, Marked, rms_norm
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class _WholeNorms(TorchFunctionMode):
    """Norms that torch would take to pieces, as one operator of the oracle."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return (rms_norm if func in (torch.rms_norm, nn.functional.rms_norm) else func)(*args, **(kwargs or {}))


@contextmanager
def _as_probed() -> Iterator[None]:
    """Attention as the matrix products and the softmax that it is made of, RMS norms in one piece."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _WholeNorms():
        yield


def deletions(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The elements of each weight that a cut took away, by name, identified by the values that are left.

    A tensor whose values repeat cannot be read so and is left out: what it meets says enough.
    """
    found = {}
    for name, old in before.items():
        new = after.get(name)
        if new is None or new.shape == old.shape or not old.is_floating_point():
            continue
        gone = ~torch.isin(old, new)
        if int((~gone).sum()) == new.numel():
            found[name] = gone
    return found


class Expected:
    """The outputs of a module whose weights have lost the elements of `gone`, by name.

    `before` are the weights that the cut began with: those that the module does not have under such a name (constants
    computed before the cut) are recognised by their values where the module computes them.
    """

    def __init__(self, module: nn.Module, gone: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]) -> None:
        self.module, self.gone = module, gone
        names = {name for name, _ in _tensors(module)}
        self.computed = [(before[name], lost) for name, lost in gone.items() if name not in names]

    def __call__(self, inputs: tuple[Any, ...]) -> list[Marked]:
        """The outputs, in order, each with its mask."""
        marked: dict[int, Marked] = {}
        for name, tensor in _tensors(self.module):
            held = marked.setdefault(id(tensor), Marked(tensor.detach(), None, True))
            lost = self.gone.get(name)
            if lost is not None:
                held.gone = lost if held.gone is None else held.gone | lost
        state = {name: marked[id(tensor)] for name, tensor in _tensors(self.module)}
        given = tuple(Marked(x) if isinstance(x, torch.Tensor) else x for x in inputs)
        COMPUTED[:] = self.computed
        try:
            with _as_probed():
                result = torch.func.functional_call(self.module, state, given, tie_weights=False)
        finally:
            COMPUTED.clear()
        return [leaf if isinstance(leaf, Marked) else Marked(leaf) for leaf in pytree.tree_leaves(result)]


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers under every name that they have."""
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
