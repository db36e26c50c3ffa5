"""What the user wants left alone, when several rewrites are mixed: names of layers, unit groups and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from ...passes.solve.layers import find_layers, layer_names
from ..analysis.provenance import find_units
from ..ir.program import Program
from ..support.errors import GoalError
from .joint_rewrite import JointSettings


def sorted_ignores(
    program: Program, settings: JointSettings, rewrites: Sequence[str] = ("drop_blocks", "prune_channels", "factorize")
) -> JointSettings:
    """The settings with every `ignore` pattern, of channels or ranks, given to the kinds of rewrite that it says
    something to, of those that are used; channels alone go by their own. Raises GoalError when one matches no layer, no
    unit group and no output."""
    pruning = set(rewrites) == {"prune_channels"}
    for_all = () if pruning else settings.ranks.ignore
    patterns = tuple(dict.fromkeys([*settings.channels.limits.ignore, *for_all]))
    if not patterns:
        return settings
    groups = [*(group.name for group in find_units(program).groups), *(spec.name for spec in program.outputs)]
    layers = [name for layer in find_layers(program)[0].values() for name in layer_names(program, layer)]
    layers = [] if pruning else layers
    for_channels = tuple(p for p in patterns if _matches(p, groups))
    for_ranks = tuple(p for p in patterns if _matches(p, layers))
    for pattern in patterns:
        if pattern not in for_channels and pattern not in for_ranks:
            raise GoalError(
                f"ignore: no {'unit group' if pruning else 'layer, unit group or output'} matches {pattern!r}",
                hint="`foldcut inspect` lists them; patterns are those of a shell: head*",
            )
    limits = replace(settings.channels.limits, ignore=for_channels)
    return replace(
        settings,
        channels=replace(settings.channels, limits=limits),
        ranks=replace(settings.ranks, ignore=for_ranks),
    )


def ignored_layers(program: Program, patterns: Sequence[str]) -> frozenset[str]:
    """The nodes of the layers that the patterns name."""
    layers = find_layers(program)[0]
    return frozenset(
        name for name, layer in layers.items() if any(_matches(p, layer_names(program, layer)) for p in patterns)
    )


def _matches(pattern: str, names: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)
