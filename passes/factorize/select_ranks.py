"""Which ranks a layer may be cut to, and what each would cost the layer and the network.

The input moments of every layer come from one streamed pass of the original network (several, where they do not fit
into memory together). From them each scheme gives its error at every rank without touching the data again. Only options
that are cheaper than the layer and not dominated (cheaper and better at once) by another are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from itertools import product
from typing import Literal, TypeVar, get_args

import torch

from ...compiler.data.calibration_set import CalibrationSet
from ...compiler.ir.program import Program
from ...compiler.processes.sharing import spread_along
from ...compiler.support.errors import GoalError, Reject, RewriteError
from ...compiler.support.progress import Progress, silent
from ...compiler.support.setting_checks import (
    Allowed,
    check_number,
    check_switch,
    check_texts,
    check_whole,
    check_word,
    refuse,
    settled,
)
from ..solve.layer_moments import LayerMoments
from ..solve.layers import Layer, find_layers, layer_names
from ..solve.moments import Moments
from ..solve.resolve_network import ResolveSettings
from ..solve.targets import Target, output_gain, trace_target
from .decision import FactorizeLayer, Ranks
from .decompositions import PLAIN, Geometry, Metric
from .factorize import Factors, decompose
from .low_rank import SCHEMES, Scheme, suitable

#: Layers with more columns than this are factorised without data: a Gram matrix would take half a gigabyte and more.
WIDEST = 8192
#: Ranks looked at along each axis of a scheme.
STEPS = 16
#: Relative errors that count as none: what float32 activations leave in the moments.
EXACT = 1e-5

T = TypeVar("T")
Judging = Literal["data", "weights"]


@dataclass(frozen=True, kw_only=True)
class RankSettings:
    """How layers are factorised. `Factorize` describes what is minimised.

    Arguments:
        schemes: Schemes to choose from: ``channel``, ``spatial``, ``tucker``.
        multiple_of: Ranks are multiples of this.
        least: Least rank, as a share of the full rank, 0 to 1.
        metric: ``data`` weighs errors by the inputs of the layer. ``weights`` reads no data.
        resolve: Whether the factors and the layers behind are re-solved on the whole network.
        rows_per_column: Largest number of rows of inputs in a Gram matrix, per column. None reads all.
        ignore: Shell-style patterns of layers (node, module path or weight) that stay whole: ``head*``.
        on_lattice: Whether `multiple_of` is taken from the backend. The result then depends on the machine.

    Raises:
        GoalError: If a setting is out of range or of the wrong type.

    Example:
        >>> foldcut.RankSettings(schemes=("channel",), multiple_of=8).metric
        'data'
    """

    schemes: tuple[str, ...] = ("channel", "spatial", "tucker")
    multiple_of: int = 4
    least: float = 0.0
    metric: Judging = "data"
    resolve: bool = True
    rows_per_column: int | None = 50
    ignore: tuple[str, ...] = ()
    on_lattice: bool = False

    def __post_init__(self) -> None:
        check_texts("schemes", self.schemes, error=GoalError)
        if not self.schemes or not set(self.schemes) <= SCHEMES.keys():
            refuse("schemes", self.schemes, f"some of {', '.join(SCHEMES)}", why="is not known", error=GoalError)
        check_whole("multiple_of", self.multiple_of, Allowed(least=1), error=GoalError)
        check_number(
            "least", self.least, Allowed(least=0, most=1, words="a share of full rank, 0 to 1"), error=GoalError
        )
        check_word("metric", self.metric, get_args(Judging), error=GoalError)
        check_whole("rows_per_column", self.rows_per_column, Allowed(least=1, none=True), error=GoalError)
        check_texts("ignore", self.ignore, error=GoalError)
        check_switch("resolve", self.resolve, error=GoalError)
        check_switch("on_lattice", self.on_lattice, error=GoalError)
        settled(self)


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way of factorising a layer: its multiply-accumulates for one sample and its relative error."""

    scheme: str
    ranks: tuple[int, ...]
    macs: int
    error: float


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layer with its options, cheapest first, none dominated by another; `size.macs` is what it costs whole.

    `every` has those too that only another scheme dominates.
    """

    layer: Layer
    target: Target
    size: Geometry
    every: tuple[Option, ...] = ()

    @cached_property
    def options(self) -> tuple[Option, ...]:
        return tuple(not_dominated(self.every))

    def parameters(self, option: Option) -> int:
        """Trained values of the factors of an option; its bias stays and is not counted."""
        return sum(math.prod(shape) for shape in SCHEMES[option.scheme].shapes(self.size, option.ranks))

    def whole(self, unit: str) -> int:
        """What the layer has whole, of ``macs`` or ``parameters``."""
        return self.size.macs if unit == "macs" else self.size.weights

    def cost(self, unit: str, option: Option) -> int:
        """What it has left under an option, of ``macs`` or ``parameters``."""
        return option.macs if unit == "macs" else self.parameters(option)

    def trial(self) -> Option:
        """The option nearest to half of the layer's multiply-accumulates, of those that lose something: an exact one
        says nothing about what errors of this layer do. The cheapest where all are exact."""
        lossy = [option for option in self.options if option.error > EXACT] or self.options[:1]
        return min(lossy, key=lambda option: abs(2 * option.macs - self.size.macs))


@dataclass(frozen=True, kw_only=True)
class Known:
    """Options of layers that need not be looked for: those of an earlier analysis of the same, or, with `only`, those
    of some layers that alone are looked at."""

    options: Mapping[str, tuple[Option, ...]]
    only: bool = False


class RankAnalysis:
    """The layers of a program that low rank can make cheaper, and their factors at any of their ranks.

    `candidates` by node in topological order, `rejects` what was left alone and why; with options that
    are `known`, the data is not read before factors are asked for. Never changes the program.
    Raises GoalError when a pattern of `ignore` matches nothing, CalibrationError when activations are not finite.
    """

    def __init__(
        self,
        program: Program,
        calibration: CalibrationSet,
        *,
        settings: RankSettings | None = None,
        resolve: ResolveSettings | None = None,
        known: Known | None = None,
        progress: Progress = silent,
    ) -> None:
        self.program, self.calibration = program, calibration
        self.settings = settings or RankSettings()
        self.ridge = (resolve or ResolveSettings()).ridge_for(len(calibration))
        layers, locked = find_layers(program)
        self._check_ignored(layers)
        layers = {
            name: layer for name, layer in layers.items() if known is None or not known.only or name in known.options
        }
        self._sizes = {name: Geometry.of(program, layer) for name, layer in layers.items()}
        self._moments = LayerMoments(program, layers, calibration, rows_per_column=self.settings.rows_per_column)
        found: dict[str, Candidate] = {}
        self.rejects: list[Reject] = list(locked)
        for name, layer in layers.items():
            candidate = self._candidate(layer)
            if candidate is not None:
                found[name] = candidate
        options = self._every(found, progress) if known is None else known.options
        self.candidates = {n: replace(c, every=options[n]) for n, c in found.items() if options.get(n)}
        costly = [name for name in found if name not in self.candidates]
        self.rejects += [Reject(reason="no rank that is allowed makes it cheaper", node=name) for name in costly]

    def _every(self, found: Mapping[str, Candidate], progress: Progress) -> dict[str, tuple[Option, ...]]:
        """The options of all candidates, from their moments."""
        names: list[str] = []
        tasks = self._tasks(list(found), names, lambda name, moments: self._options(found[name], moments))
        options = {}
        for index, made in enumerate(spread_along(tasks)):
            options[names[index]] = made
            progress("decompose layers", index + 1, len(found))
        return options

    def _tasks(
        self, names: Sequence[str], met: list[str], make: Callable[[str, Moments | None], T]
    ) -> Iterator[tuple[float, Callable[[], T]]]:
        """What to make of each layer's moments, with about what that takes; `met` says the layers in their order."""
        for name, moments in self._each(names):
            met.append(name)
            yield float(self._sizes[name].columns) ** 3, partial(make, name, moments)

    def factors(self, choice: Mapping[str, Option], *, progress: Progress = silent) -> list[Factors]:
        """The factors of the chosen options, by node. Raises RewriteError for what is no candidate."""
        candidates = {name: self._known(name) for name in choice}

        def made(name: str, moments: Moments | None) -> Factors:
            candidate, option = candidates[name], choice[name]
            metric, gain = self._metric(candidate, moments)
            decomposition = decompose(self.program, candidate.layer, option.scheme, metric, gain, option.ranks)
            return Factors.of(name, decomposition, option.ranks)

        names: list[str] = []
        found = {}
        for index, factors in enumerate(spread_along(self._tasks(list(choice), names, made))):
            found[names[index]] = factors
            progress("factorise", index + 1, len(choice))
        return [found[name] for name in choice]

    def _known(self, name: str) -> Candidate:
        if name not in self.candidates:
            reasons = [reject.reason for reject in self.rejects if reject.node == name]
            raise RewriteError(f"it cannot be factorised: {(reasons or ['it is no layer'])[0]}", node=name)
        return self.candidates[name]

    def decision(self, name: str, option: Option) -> FactorizeLayer:
        """The option as a plan's decision."""
        candidate = self._known(name)
        return FactorizeLayer(
            layer=name,
            scheme=option.scheme,
            ranks=option.ranks,
            full=SCHEMES[option.scheme].full(candidate.size),
            path=self.program.path(self.program.nodes[name]),
            error=option.error,
        )

    def each(self, goal: Ranks) -> dict[str, Option]:
        """The option of each layer that a goal for single layers asks for: where it bounds the error, the cheapest
        that keeps the bound; where it bounds the cost, the best that does; where it gives the rank, of the schemes that
        are cheaper at it the one with the least error. A layer without such an option stays whole."""
        share = goal.macs
        if share is not None:
            fits = {n: [o for o in c.options if o.macs <= share * c.size.macs] for n, c in self.candidates.items()}
            return {name: options[-1] for name, options in fits.items() if options}
        if goal.rank is None and goal.keep is None:
            bound = goal.error if goal.error is not None else 1 - (goal.energy or 0.0)
            kept = {n: [o for o in c.options if o.error <= bound] for n, c in self.candidates.items()}
            return {name: options[0] for name, options in kept.items() if options}
        names: list[str] = []
        tasks = self._tasks(list(self.candidates), names, lambda name, m: self._at(self.candidates[name], goal, m))
        every = list(spread_along(tasks))
        found = {
            name: min(options, key=lambda option: (option.error, option.macs))
            for name, options in zip(names, every, strict=True)
            if options
        }
        return {name: found[name] for name in self.candidates if name in found}

    def _at(self, candidate: Candidate, goal: Ranks, moments: Moments | None) -> list[Option]:
        """One option for each scheme, at the rank that the goal gives, where that is cheaper than the layer."""
        options = []
        metric, gain = self._metric(candidate, moments)
        for scheme in suitable(candidate.size, self._schemes(candidate.size)):
            full = scheme.full(candidate.size)
            wanted = [goal.rank or max(1, round((goal.keep or 0) * rank)) for rank in full]
            ranks = tuple(min(rank, most) for rank, most in zip(wanted, full, strict=True))
            macs = scheme.macs(candidate.size, ranks)
            if macs < candidate.size.macs:
                error = decompose(self.program, candidate.layer, scheme.name, metric, gain).error(ranks)
                options.append(Option(scheme=scheme.name, ranks=ranks, macs=macs, error=error))
        return options

    def _candidate(self, layer: Layer) -> Candidate | None:
        """The layer, unless it is ignored or no scheme is cheaper at its least ranks; rejects say which."""
        size = self._sizes[layer.node]
        names = layer_names(self.program, layer)
        if any(fnmatchcase(name, pattern) for pattern in self.settings.ignore for name in names):
            self.rejects.append(Reject(reason="ignored", node=layer.node))
            return None
        if not any(self._ranks(scheme, size) for scheme in suitable(size, self._schemes(size))):
            self.rejects.append(Reject(reason="no rank that is allowed makes it cheaper", node=layer.node))
            return None
        return Candidate(layer=layer, target=trace_target(self.program, layer, {}), size=size)

    def _check_ignored(self, layers: Mapping[str, Layer]) -> None:
        known = [name for layer in layers.values() for name in layer_names(self.program, layer)]
        for pattern in self.settings.ignore:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise GoalError(f"ignore: no layer matches {pattern!r}", hint=f"layers: {', '.join(layers)}")

    def _schemes(self, size: Geometry) -> tuple[str, ...]:
        """Without data only a decomposition of the outputs' side stays small for a layer that is very wide."""
        if size.columns <= WIDEST:
            return self.settings.schemes
        return tuple(name for name in self.settings.schemes if name == "channel")

    def _ranks(self, scheme: Scheme, size: Geometry) -> list[tuple[tuple[int, ...], int]]:
        """Ranks of a scheme at which it is cheaper than the layer, with their multiply-accumulates: multiples, about
        `STEPS` of them along each axis."""
        axes = [self._multiples(most) for most in scheme.full(size)]
        if len(axes) > 1:
            axes = [_spread(axis) for axis in axes]
        found = [(ranks, scheme.macs(size, ranks)) for ranks in product(*axes)]
        cheap = [(ranks, macs) for ranks, macs in found if macs < size.macs]
        return _spread(cheap) if len(axes) == 1 else cheap

    def _multiples(self, most: int) -> list[int]:
        """The ranks that may be, least first."""
        step = min(self.settings.multiple_of, most)
        first = max(1, math.ceil(self.settings.least * most / step))
        return [number * step for number in range(first, most // step + 1)] or [most]

    def _options(self, candidate: Candidate, moments: Moments | None) -> tuple[Option, ...]:
        """Every option below the layer's own cost that no other of its scheme dominates."""
        found: list[Option] = []
        metric, gain = self._metric(candidate, moments)
        for scheme in suitable(candidate.size, self._schemes(candidate.size)):
            cheap = self._ranks(scheme, candidate.size)
            if cheap:
                decomposition = decompose(self.program, candidate.layer, scheme.name, metric, gain)
                found += not_dominated(
                    [
                        Option(scheme=scheme.name, ranks=ranks, macs=macs, error=decomposition.error(ranks))
                        for ranks, macs in cheap
                    ]
                )
        return tuple(found)

    def _metric(self, candidate: Candidate, moments: Moments | None) -> tuple[Metric, torch.Tensor | None]:
        """What a layer's approximation is judged by, under every scheme: the metric and the gains of the outputs."""
        metric = PLAIN
        if moments is not None:
            metric = Metric.of(moments, ridge=self.ridge, centred=candidate.target.shift is not None)
        gain = output_gain(self.program, candidate.target) if self.settings.metric == "data" else None
        return metric, gain

    def _each(self, names: Sequence[str]) -> Iterator[tuple[str, Moments | None]]:
        """The layers with their moments, those that do without first, with None."""
        blind = [name for name in names if self.settings.metric != "data" or self._wide(name)]
        yield from ((name, None) for name in blind)
        yield from self._moments([name for name in names if name not in blind])

    def _wide(self, name: str) -> bool:
        return self._sizes[name].columns > WIDEST


def _spread(items: list[T]) -> list[T]:
    """About `STEPS` of the items, evenly, the first and the last among them."""
    if len(items) <= STEPS:
        return items
    return [items[round(place * (len(items) - 1) / (STEPS - 1))] for place in range(STEPS)]


def not_dominated(options: Sequence[Option]) -> list[Option]:
    """The options, cheapest first, that are better than every cheaper one."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.macs, o.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept


__all__ = ["Candidate", "Option", "RankAnalysis", "RankSettings", "not_dominated"]
