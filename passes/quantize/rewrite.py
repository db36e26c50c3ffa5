"""The rewrite that puts layers into int8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...compiler.data.calibration_set import CalibrationSet
from ...compiler.data.kept import kept_for
from ...compiler.data.output_error import output_error
from ...compiler.ir.cost import node_macs
from ...compiler.ir.edit_folds import fold_batch_norms
from ...compiler.ir.program import Program, argument
from ...compiler.ir.segments import is_dequantized
from ...compiler.plan.decision import Decision
from ...compiler.plan.goal import Goal
from ...compiler.plan.proposals import Claims, Item, Proposal
from ...compiler.rewrite.budget import Budget
from ...compiler.rewrite.context import Context
from ...compiler.rewrite.rewrite import Applied, Offer, Rewrite
from ...compiler.rewrite.work import Work
from ...compiler.support.errors import BackendError, CompilerError, Reject, RewriteError, plural
from ...compiler.support.setting_checks import (
    Allowed,
    check_kind,
    check_switch,
    check_texts,
    check_whole,
    check_word,
    settled,
)
from ...runtime.predict.integer_kernels import IntegerKernels
from ...runtime.predict.lattice import kinds_in
from ..solve.layers import all_layer_names, find_layers, matching_layers
from .boundaries import borders, boundary_costs
from .decision import QuantizeLayer
from .edit_quantize import ValueGrid, quantize_program
from .equalise import Exponents, Fitted, Precision, choose_scales, equalised, fitted
from .grids import WAYS, best_way, few_of
from .quantize import Rounding, plain_integers, quantize
from .ranges import GridKind
from .savings import Saved, integer_savings, starts_of
from .values import AS_SAVED, quantizable, standing_for, standing_of, unquantizable, usual_grids, values_of

#: Seconds that time a layer in int8; passes that one with rounded values takes, and finding roundings on a sample.
INTEGERS_S, ROUNDED_PASSES, ROUNDING_PASSES = 0.4, 5, 24


@dataclass(frozen=True, kw_only=True)
class Quantize(Rewrite):
    """Rewrite: store the weights of layers, and the values in front of them and behind them, in int8.

    QuantizeLinear and DequantizeLinear stand around what is computed (`quantize_per_tensor` and its kin in torch).
    Weights are symmetric, one scale for each output; values have one scale and zero point each. With ``G = A^T A`` the
    Gram matrix of the rounded inputs of a layer, in float64, its weight W is rounded to the integers Q, times their
    scales, that keep

        ||A (W - Q)^T||_F^2 = tr (W - Q) G (W - Q)^T

    small: column by column, what one loses is taken over by those still free (GPTQ, arXiv 2210.17323, equation 3). No
    output loses more than by rounding each weight to the nearest. Exact where weights and values are on their grids.
    It comes last: everything else is cut, solved and trained before.

    Which integers the kernels of the backend multiply exactly is tried on it: where 8-bit weights overflow, 7-bit ones
    are used. Where int8 is not faster, it is not taken.

    Arguments:
        ranges: How the range of a value is taken from the samples. ``minmax``: all of it. ``percentile``: without the
            outermost 0.01 % at either end. ``mse``: that of least squared error. ``entropy``: that of least
            Kullback-Leibler divergence. ``each``: for each value the one of these that loses least at the layers behind
            it. ``best``: the one of all these with which the network's outputs lose least.
        equalise: Whether the ranges of channels between layers are evened out first, by powers of two that the layers
            around them take in (arXiv 1906.04721): where rounding then changes at least a tenth less.
        rows_per_column: Largest number of rows of inputs in a Gram matrix, per column. None reads all.
        samples: Number of judging samples that say what each layer alone loses.
        ignore: Shell-style patterns of layers (node, module path or weight) that stay as they are.
        kernels: The integers to use. If None, the finest that the backend computes exactly, which a compile tries.
        refused: Why there are none, after they were tried.

    Raises:
        CompilerError: If a setting is out of range or of the wrong type.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> program = foldcut.capture(net, torch.randn(2, 8))
        >>> smaller = foldcut.Quantize().shape(program, [foldcut.QuantizeLayer(layer="linear")])
        >>> [node.name for node in smaller.graph.nodes if node.name.endswith("_quantized")]
        ['input_1_quantized', 'relu_quantized']
    """

    ranges: str = "best"
    equalise: bool = True
    rows_per_column: int | None = 50
    samples: int = 16
    ignore: tuple[str, ...] = ()
    kernels: IntegerKernels | None = None
    refused: str = ""

    name = "quantize"
    verb = "quantise layers"
    decides = QuantizeLayer
    phase = 90
    comes_last = True

    def __post_init__(self) -> None:
        check_word("ranges", self.ranges, WAYS)
        check_switch("equalise", self.equalise)
        check_whole("rows_per_column", self.rows_per_column, Allowed(least=1, none=True))
        check_whole("samples", self.samples, Allowed(least=2))
        check_texts("ignore", self.ignore)
        check_kind("kernels", self.kernels, IntegerKernels, none=True)
        check_kind("refused", self.refused, str)
        settled(self)

    @classmethod
    def configured(cls, settings: Any) -> Quantize:
        """The rewrite, without the layers that ``settings.ranks`` ignores."""
        return cls(ignore=settings.ranks.ignore)

    def serves(self, goal: Goal) -> bool:
        """True for goals that go by a measured latency."""
        return goal.mixes and goal.measured

    def prepared(self, ctx: Context) -> Quantize:
        """The rewrite with the integers that the backend computes exactly, or with the reason why there are none."""
        if ctx.latency is None or self.kernels is not None:
            return self
        try:
            return replace(self, kernels=ctx.latency.probe.integers())
        except BackendError as refusal:
            return replace(self, refused=refusal.message)

    def multiples(self, ctx: Context) -> Mapping[str, int]:
        """The channel lattice of the backend's integer kernels: in between, some are slower than in floating point."""
        if ctx.latency is None or self.kernels is None:
            return {}
        layers = _layers(ctx.teacher, ctx.teacher.derived(fold_batch_norms)[0])
        kinds = kinds_in(ctx.teacher, layers)
        lattice = ctx.latency.probe.lattice(kinds, integers=self.kernels, progress=ctx.progress)
        return {name: lattice.step_of(ctx.teacher, name) for name in layers}

    def named(self, program: Program) -> Sequence[str]:
        """The layers of `program`: node, module path and weight."""
        return all_layer_names(program)

    def work(self, ctx: Context) -> Mapping[str, Work]:
        """Layers timed in int8, each weighed alone, and ranges and roundings of those that are chosen."""
        count, few = len(find_layers(ctx.teacher)[0]), min(self.samples, len(ctx.judge))
        return {
            "time integers": Work(seconds=INTEGERS_S * count),
            "weigh integers": Work(passes=ROUNDED_PASSES * few * count),
            "re-solve": Work(passes=ROUNDING_PASSES * len(ctx.solve)),
        }

    def offer(self, ctx: Context, budget: Budget) -> Offer:
        """Every layer, with what it saves beside others in int8 and what it alone loses; none where all of them
        together are not faster, or where the backend does not compute them."""
        if self.kernels is None:
            reason = self.refused or "there is no backend to quantise for"
            return Offer(rejects=(Reject(reason=reason, node=self.name),))
        folded, _ = ctx.teacher.derived(fold_batch_norms)
        left = matching_layers(ctx.teacher, self.ignore)
        layers = [name for name in _layers(ctx.teacher, folded) if name not in left]
        rejects = _rejects(folded)
        if not layers:
            return Offer(rejects=rejects)
        with ctx.clock.stage("time integers"):
            try:
                savings = self._savings(ctx, budget, layers)
            except CompilerError as cause:  # a segment that is not exported, or not taken
                reason = f"cannot be timed in int8: {cause.message}"
                return Offer(rejects=(*rejects, Reject(reason=reason, node=self.name)))
        if not savings:
            slower = Reject(reason="all layers together are not faster in int8 on this backend", node=self.name)
            return Offer(rejects=(*rejects, slower))
        with ctx.clock.stage("weigh integers"):
            errors = self._errors(ctx, layers)
        items = tuple(self._item(ctx.teacher, name, errors[name], *savings[name]) for name in layers)
        return Offer(items=items, rejects=rejects, starts=starts_of(items))

    def requires(self, program: Program, decisions: Sequence[Decision]) -> None:
        """Raise RewriteError where `program` does not have a layer as planned, where two decisions are about one, and
        where they are for kernels that differ."""
        standing_of(program, _mine(decisions))

    def still(self, program: Program, decisions: Sequence[Decision]) -> Sequence[Decision]:
        """The decisions whose layers are there."""
        found = standing_for(program, [decision.layer for decision in _mine(decisions)])
        return [decision for decision in _mine(decisions) if found[decision.layer]]

    def shape(self, program: Program, decisions: Sequence[Decision]) -> Program:
        """The program with the layers in int8, on grids of any scale, for timing and counting."""
        return self._plainly(program, _mine(decisions), None, {})

    def plain(self, program: Program, decisions: Sequence[Decision]) -> Program:
        """The program with the grids of the decisions, weights rounded one by one. Raises RewriteError where a decision
        has no grids: ranges come from data."""
        mine = _mine(decisions)
        missing = [decision.layer for decision in mine if not decision.grids]
        if missing:
            raise RewriteError(
                f"no ranges are known for {missing[0]}", hint="ranges come from data: give a calibration set"
            )
        grids: dict[str, ValueGrid] = {}
        for decision in mine:
            for value, grid in decision.value_grids.items():
                if grids.setdefault(value, grid) != grid:
                    raise RewriteError("two layers have other grids for it", node=value, hint=AS_SAVED)
        exponents = {layer: powers for decision in mine for layer, powers in decision.exponents.items()}
        return self._plainly(program, mine, grids, exponents)

    def apply(self, program: Program, decisions: Sequence[Decision], ctx: Context) -> Applied:
        """The program with the layers in int8: ranges from ``ctx.solve``, weights solved and rounded on it."""
        mine = _mine(decisions)
        if not mine:
            return Applied(program=program)
        folded, layers = _folded(program, mine)
        names = [name for standing in layers.values() for name in standing]
        if ctx.trial:
            # whatever the plan, about as much is lost by rounding: not worth more than it takes to see that
            few = few_of(ctx.solve)
            fit = self._fitted(folded, names, few, mine[0], self._known_way(ctx, mine[0]))
            weights = plain_integers(fit.program, names, fit.grids, _how(mine[0]))
            made = quantize_program(fit.program, fit.grids, weights, note=f"{plural(len(names), 'layer')} in int8")
        else:
            fit = self._fitted(folded, names, ctx.solve, mine[0], self.ranges)
            how = replace(_how(mine[0]), rows_per_column=self.rows_per_column)
            made = quantize(fit.program, names, fit.grids, ctx.solve, how, progress=ctx.progress)
        settled_ = tuple(fit.stated(d, layers[d.layer]) for d in mine)
        return Applied(program=made, decisions=settled_)

    def ensures(self, before: Program, after: Program, decisions: Sequence[Decision]) -> None:
        """Raise RewriteError where a layer still has a weight or an input in floating point."""
        _, layers = _folded(before, _mine(decisions))
        for name in (name for standing in layers.values() for name in standing):
            node = after.nodes.get(name)
            if node is None or not all(is_dequantized(argument(node, place, "")) for place in (0, 1)):
                raise RewriteError("the layer is not in int8", node=name)

    def report(self, ctx: Context, applied: Applied) -> Mapping[str, Any]:
        """The integers used, why no finer ones, and the share of the multiply-accumulates that is done in them."""
        program = applied.program
        macs = {name: node_macs(program, node) for name, node in program.nodes.items()}
        inside = sum(count for name, count in macs.items() if count and is_dequantized(program.nodes[name].args[0]))
        mine = _mine(applied.decisions)
        del ctx
        if not mine:
            return {}
        share = inside / max(1, sum(macs.values()))
        note = self._weight_words(mine[0].weight_limit)
        refused = "" if self.kernels is None else self.kernels.refused
        return {
            "values": mine[0].values,
            "weight_limit": mine[0].weight_limit,
            "weights": note,
            "kernels": str(mine[0].kernels),
            **({"why_no_finer": refused} if refused else {}),
            "share_of_macs": share,
            "figures": [{"label": "MACs in int8", "before": "0 %", "after": f"{100 * share:.0f} %", "note": note}],
        }

    def _weight_words(self, limit: int) -> str:
        """How fine weights are, and why."""
        words = f"weights of {limit.bit_length() + 1} bits"
        if self.kernels is None or not self.kernels.refused or limit != self.kernels.weight_limit or limit == 127:
            return words
        return f"{words}, because this machine's 8-bit kernels overflow"

    def _item(self, program: Program, name: str, error: float, saved: Saved, boundaries: Mapping[str, float]) -> Item:
        decision = replace(self._decision(name), path=program.path(program.nodes[name]), error=error)
        # what it computes faster, it also saves less of by what is cut off it
        proposal = Proposal(
            error=error, saving=saved.saving, decision=decision, overlap=saved.share, boundaries=boundaries
        )
        return Item(kind=self.name, name=name, claims=Claims(needs=frozenset([name])), proposals=(proposal,))

    def _decision(self, name: str) -> QuantizeLayer:
        assert self.kernels is not None
        return QuantizeLayer.for_kernels(name, self.kernels)

    def _savings(
        self, ctx: Context, budget: Budget, layers: Sequence[str]
    ) -> dict[str, tuple[Saved, Mapping[str, float]]]:
        """What each layer saves where all of them are in int8, and less for each neighbour that is not; nothing where
        all together are not faster."""
        assert budget.latency is not None
        latency = budget.latency
        decisions = {name: self._decision(name) for name in layers}
        folded, standing = _folded(ctx.teacher, list(decisions.values()))
        whole = self.shape(ctx.teacher, list(decisions.values()))

        def measured(names: Sequence[str]) -> float:
            mine = [decisions[name] for name in names]
            changes = [decision.change for decision in mine]
            shaped = (lambda: whole) if len(mine) == len(layers) else (lambda: self.shape(ctx.teacher, mine))
            return 1 - latency.estimate("integers", changes, shaped)

        table = latency.probe.table()
        found = integer_savings(table, folded, whole, standing, measured(layers), progress=ctx.progress)
        costs = boundary_costs(found, borders(folded, standing), measured) if found else {}
        return {name: (saved, costs.get(name, {})) for name, saved in found.items()}

    def _errors(self, ctx: Context, layers: Sequence[str]) -> dict[str, float]:
        """Relative output errors with each layer alone in int8, its weight rounded value by value."""
        few = ctx.judge.take(slice(0, self.samples))

        def found() -> list[float]:
            folded, standing = _folded(ctx.teacher, [self._decision(name) for name in layers])
            names = [name for found in standing.values() for name in found]
            decision, fitting = self._decision(layers[0]), few_of(ctx.solve)
            fit = self._fitted(folded, names, fitting, decision, self._known_way(ctx, decision))
            whole, grids = fit.program, fit.grids
            errors = []
            for done, (name, inside) in enumerate(standing.items(), 1):
                around = {value: grids[value] for value in values_of(whole, inside)}
                weights = plain_integers(whole, inside, grids, _how(self._decision(name)))
                alone = quantize_program(whole, around, weights, note=f"{name} in int8")
                errors.append(output_error(ctx.teacher, alone, few))
                ctx.progress("weigh integers", done, len(standing))
            return errors

        kept = ctx.store.value("integer errors", [ctx.teacher, ctx.solve, few, self, list(layers)], found)
        return dict(zip(layers, kept, strict=True))

    def _fitted(
        self, folded: Program, names: Sequence[str], samples: CalibrationSet, decision: QuantizeLayer, ranges: str
    ) -> Fitted:
        """Grids of the values around some layers, with their channels evened out first where that is wanted."""
        precision = Precision(_kind(decision), ranges, decision.weight_limit)
        exponents = choose_scales(folded, names, samples, precision) if self.equalise else {}
        return fitted(folded, exponents, names, samples, precision)

    def _known_way(self, ctx: Context, decision: QuantizeLayer) -> str:
        """How ranges are taken of plans that are compared: as serves the original best, of all values alike."""
        if self.ranges != "best":
            return self.ranges
        kept, key = kept_for(ctx.teacher, ctx.solve), ("way", decision.kernels)
        if key not in kept:
            folded, _ = ctx.teacher.derived(fold_batch_norms)
            kept[key] = best_way(folded, list(quantizable(folded)), few_of(ctx.solve), _kind(decision))
        way: str = kept[key]
        return way

    def _plainly(
        self,
        program: Program,
        decisions: Sequence[QuantizeLayer],
        grids: Mapping[str, ValueGrid] | None,
        exponents: Exponents,
    ) -> Program:
        """Without data: on grids of any scale where there are none."""
        if not decisions:
            return program
        folded, layers = _folded(program, decisions)
        folded = equalised(folded, exponents)
        names = [name for standing in layers.values() for name in standing]
        around = values_of(folded, names)
        grids = usual_grids(folded, around, _kind(decisions[0])) if grids is None else grids
        for value in around:
            if value not in grids:
                raise RewriteError("no range is known for it", node=value, hint=AS_SAVED)
        used = {value: grids[value] for value in around}
        weights = plain_integers(folded, names, used, _how(decisions[0]))
        return quantize_program(folded, used, weights, note=f"{plural(len(names), 'layer')} in int8")


def _mine(decisions: Sequence[Decision]) -> list[QuantizeLayer]:
    return [decision for decision in decisions if isinstance(decision, QuantizeLayer)]


def _kind(decision: QuantizeLayer) -> GridKind:
    return GridKind(dtype=getattr(torch, decision.values), symmetric=decision.symmetric)


def _how(decision: QuantizeLayer) -> Rounding:
    return Rounding(limit=decision.weight_limit, bias=decision.bias)


def _layers(program: Program, folded: Program) -> list[str]:
    """The layers that can be quantised once batch norms are `folded` into them, by their names before."""
    weights = {layer.weight for layer in quantizable(folded).values()}
    return [name for name, layer in find_layers(program)[0].items() if layer.weight in weights]


def _rejects(folded: Program) -> tuple[Reject, ...]:
    """What stays in floating point, or as it came, with the reason."""
    return tuple(Reject(reason=f"not put into int8: {reason}", node=name) for name, reason in unquantizable(folded))


def _folded(program: Program, decisions: Sequence[QuantizeLayer]) -> tuple[Program, dict[str, list[str]]]:
    """The program with batch norms folded into its layers, and the layers there that stand for each of the decisions':
    a layer that took over a norm has the norm's name."""
    before = {name: layer.weight for name, layer in find_layers(program)[0].items()}
    standing = standing_of(program, decisions)
    folded, _ = program.derived(fold_batch_norms)
    after = {layer.weight: name for name, layer in quantizable(folded).items()}
    return folded, {name: [after[before[inside]] for inside in found] for name, found in standing.items()}
