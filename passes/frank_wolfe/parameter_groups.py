"""Parameter groups of a model: a set for each conv and linear weight, with a radius from that layer's initialisation.

Radii are looked up by module and parameter. (The authors' code keys initial norms by shape, and a batch norm's scale,
initialised at 1, and shift, at 0, have the same: one then takes the other's radius.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ...compiler.devices.precision import in_float64
from .constraints import Constraint

#: Makes a set for a weight, whose radius `parameter_groups` then sets: `lambda weight: KSupport(k=weight.shape[0])`.
ConstraintFactory = Callable[[torch.Tensor], Constraint]
#: E||W_init||_F of a module's parameter of that name.
InitialNorm = Callable[[nn.Module, str], float]
#: The layers whose weights are constrained by default: rows of their matrices are output channels, which
#: those of transposed convolutions are not.
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
DRAWS, SEED = 8, 0


def parameter_groups(
    model: nn.Module,
    constraint: ConstraintFactory,
    *,
    factor: float | None = 10.0,
    layers: tuple[type[nn.Module], ...] = LAYERS,
    ignore: Sequence[str] = (),
    others: ConstraintFactory | None = None,
    initial_norm: InitialNorm | None = None,
) -> list[dict[str, Any]]:
    """Groups for `FrankWolfe`: one for each weight of `layers`, and one, or one each, for everything else.

    The radius of each set is that at which its diameter is 2 * factor * E||W_init||_F (arXiv 2205.11921); with `factor`
    None it stays as `constraint` made it. `ignore` are patterns of parameter names ("head.*") that count as
    everything else. `others` makes sets for biases, norms and the rest (`lambda p: LpBall(p=2)`); without it they take
    plain SGD steps. `initial_norm` is `redrawn_norm` by default: deterministic, so that all ranks agree; a model whose
    initialisation is not torch's own takes `current_norm` before training starts.

    Shared parameters appear once, under their first name. Each constrained group has a "name".
    """
    owners = _owners(model)
    groups, rest = [], []
    for name, (module, own, parameter) in owners.items():
        ignored = any(fnmatchcase(name, pattern) for pattern in ignore)
        make = constraint if isinstance(module, layers) and own == "weight" and not ignored else others
        if make is None:
            rest.append(parameter)
            continue
        made = make(parameter)
        if factor is not None:
            norm = (initial_norm or redrawn_norm)(module, own)
            made = made.with_radius(made.initial_radius(parameter, factor, norm=norm))
        groups.append({"params": [parameter], "constraint": made, "name": name})
    return groups + ([{"params": rest, "constraint": None, "name": "unconstrained"}] if rest else [])


@torch.no_grad()
def redrawn_norm(module: nn.Module, name: str) -> float:
    """The mean L2 norm of a parameter over draws of the module's own `reset_parameters`, on a copy, from a fixed seed.

    A module without that method is taken as it is. 1 where the initialisation is zero, as for the shift of a norm.
    """
    drawn: Any = copy.deepcopy(module)
    if not callable(getattr(drawn, "reset_parameters", None)):
        return current_norm(module, name)
    drawn.to_empty(device="cpu")
    total = 0.0
    with torch.random.fork_rng(devices=[]):
        # the generator of the CPU only: torch.manual_seed would also seed those of accelerators, for good
        torch.default_generator.manual_seed(SEED)
        for _ in range(DRAWS):
            drawn.reset_parameters()
            total += _norm(drawn, name)
    return total / DRAWS or 1.0


def current_norm(module: nn.Module, name: str) -> float:
    """The L2 norm of the parameter as it is: for a model just initialised, or to stay near where training starts."""
    return _norm(module, name) or 1.0


def _norm(module: nn.Module, name: str) -> float:
    return float(torch.linalg.vector_norm(in_float64(getattr(module, name).detach())))


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, str, nn.Parameter]]:
    """Name -> (the module that holds it, its name there, the parameter), each parameter once."""
    found: dict[str, tuple[nn.Module, str, nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                found[f"{prefix}.{own}" if prefix else own] = (module, own, parameter)
    return found
