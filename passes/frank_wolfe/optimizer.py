"""Stochastic Frank-Wolfe as a torch optimizer: each weight stays in its set, steps go toward the sets' vertices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch

from .constraints import Constraint
from .errors import FrankWolfeError
from .feasibility import NormBounds, pull_inside
from .ordering import where_exact
from .update import RESCALES, Job, Moved, Rescale, move, stacked

Group = dict[str, Any]


class FrankWolfe(torch.optim.Optimizer):
    """Stochastic Frank-Wolfe with momentum (Zimmer, Spiegel & Pokutta, arXiv 2205.11921).

    For each weight with gradient g and set C:  m <- momentum * m + (1 - dampening) * g  (the first m is g, as in
    `torch.optim.SGD`),  v = argmin_{u in C} <m, u>,  w <- w + eta (v - w),  eta = lr rescaled and clipped to [0, 1]:
    see `update`. With `rescale="gradient"` a step is as long as SGD's at the same lr, so SGD's schedules carry over.

        FrankWolfe([{"params": [w], "constraint": SpectralKSupport(k=4, radius=3.0)}], lr=0.1, momentum=0.9)
        FrankWolfe(parameter_groups(model, lambda weight: KSupport(k=weight.numel() // 10)), lr=0.1, momentum=0.9)

    Every setting can be given per group. `constraint` None (the default) makes a group take plain SGD steps.
    `weight_decay` adds weight_decay * w to the gradient, in any group. Weights without gradient are skipped.

    Weights must start in their sets, else the first step raises; `make_feasible` brings them in. After each step each
    weight is in its set: `constraint.norm(w) <= radius` holds for the rounded weight, in float32 and bfloat16 alike
    (see `feasibility`; bfloat16 weights of spectral sets pay for it with a decomposition a step near the boundary).
    (Write to weights in place, under `torch.no_grad()`, not through `.data`, which goes unnoticed.)

    Works with torch's learning-rate schedulers, `GradScaler` and DistributedDataParallel: a step uses neither random
    numbers nor the rank, so equal gradients give equal weights. `state_dict` holds plain data and tensors only (it
    loads with `weights_only=True`); sets appear in it as text, and `load_state_dict` wants the optimizer to have been
    built with the same ones. `ZeroRedundancyOptimizer(parameter_groups(...), optimizer_class=FrankWolfe, lr=0.1)` keeps
    a part of the momenta and bases in each process: weights are moved one by one, so they are those of the whole. Its
    own `state_dict` holds the sets themselves; this optimizer loads it too.

    Raises `FrankWolfeError`, before it writes anything, for settings out of range, weights that do not fit their set
    or lie outside, gradients that are sparse or not finite, and a closure that is none or leaves no gradient.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        momentum: float = 0.0,
        *,
        dampening: float = 0.0,
        rescale: Rescale | None = "gradient",
        constraint: Constraint | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        settings: Group = {"lr": lr, "momentum": momentum, "dampening": dampening, "rescale": rescale}
        super().__init__(params, settings | {"constraint": constraint, "weight_decay": weight_decay})
        self._bounds = NormBounds(self.state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # the weights of a copy are other tensors, and load_state_dict makes a new mapping
        self._bounds = NormBounds(self.state)

    def add_param_group(self, param_group: Group) -> None:
        """As in torch; the group is refused, and not added, when its settings do not fit its weights."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except FrankWolfeError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; `closure`, if given, computes the loss and its gradients again, and its value is returned."""
        loss = self._evaluate(closure)
        active = list(self._active())
        before = self._check_before_writing(active)
        directions = self._directions()
        _descend(active, directions)
        jobs = [self._job(g, w, directions[w]) for _, g, w in active if g["constraint"] is not None]
        done = [(batch, move(batch)) for batch in stacked(jobs)]
        # read from the device once all work is under way
        for batch, moved in done:
            self._settle(batch, moved, before)
        return loss

    @torch.no_grad()
    def make_feasible(self, *, project: bool = False) -> int:
        """Bring every constrained weight that lies outside into its set; how many there were.

        By scaling down to the boundary, or with `project` to the nearest point, for sets that have a closed form.
        Under DistributedDataParallel call it on every rank.
        """
        outside = 0
        constrained = [(g["constraint"], w) for g in self.param_groups for w in g["params"] if g["constraint"]]
        for constraint, weight in constrained:
            norm = constraint.norm(weight)
            if not math.isfinite(norm):
                raise FrankWolfeError("a weight is not finite", actual=norm, hint="start from finite weights")
            if norm > constraint.radius:
                outside += 1
                if project:
                    weight.copy_(constraint.project(weight))
                pull_inside(weight, constraint)
        return outside

    @torch.no_grad()
    def oracle_gaps(self) -> dict[str, float]:
        """How far the oracle of each constrained weight is from optimal for its momentum now: 0 is exact, 0.01 one
        per cent. For warm-started oracles; costs a decomposition for each weight. Keys are the weights' names."""
        gaps = {}
        for name, group, weight in self._active():
            if group["constraint"] is not None:
                direction = self.state[weight].get("momentum_buffer", weight.grad)
                job = self._job(group, weight, direction)
                bases = None if job.basis is None else job.basis.unsqueeze(0)
                bases = None if bases is None else where_exact(bases)
                points = job.constraint.unit_vertices(where_exact(direction).unsqueeze(0), bases).points
                gaps[name] = job.constraint.with_radius(1.0).oracle_gap(direction, points[0])
        return gaps

    def state_dict(self) -> dict[str, Any]:
        """torch's, with the sets as text: momenta, bases of warm-started oracles, settings."""
        state = super().state_dict()
        groups = [group | {"constraint": _as_text(group["constraint"])} for group in state["param_groups"]]
        return state | {"param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over momenta, bases and settings; the sets stay this optimizer's and must be those of the state."""
        groups = state_dict["param_groups"]
        own = [_as_text(group["constraint"]) for group in self.param_groups]
        saved = [_as_text(group.get("constraint")) for group in groups]
        if own != saved:
            raise FrankWolfeError(
                "the state belongs to other sets",
                expected=own,
                actual=saved,
                hint="build the optimizer with the groups and constraints that the state was saved with",
            )
        pairs = zip(groups, self.param_groups, strict=True)
        sets = [saved | {"constraint": mine["constraint"]} for saved, mine in pairs]
        super().load_state_dict({**state_dict, "param_groups": sets})

    def _evaluate(self, closure: Callable[[], float] | None) -> float | None:
        if closure is None:
            return None
        if not callable(closure):
            raise FrankWolfeError(
                "step takes a closure, a function that computes the loss and calls backward",
                actual=type(closure).__name__,
                hint="call loss.backward() and then step() without arguments",
            )
        with torch.enable_grad():
            loss = closure()
        if not any(True for _ in self._active()):
            raise FrankWolfeError("the closure left no gradients", hint="call backward on the loss inside it")
        return loss

    def _active(self) -> Iterator[tuple[str, Group, torch.Tensor]]:
        """(name, group, weight) of all that have a gradient."""
        for index, group in enumerate(self.param_groups):
            for place, weight in enumerate(group["params"]):
                if weight.grad is not None:
                    yield _name(group, index, place), group, weight

    def _check_before_writing(self, active: Sequence[tuple[str, Group, torch.Tensor]]) -> dict[torch.Tensor, float]:
        """All that can be wrong, before a weight or a momentum is touched; bounds of the norms of those with a set."""
        for group in self.param_groups:
            _check_group(group)
        _check_gradients([(name, weight.grad) for name, _, weight in active if weight.grad is not None])
        held = [
            (name, group["constraint"], weight) for name, group, weight in active if group["constraint"] is not None
        ]
        return {weight: self._bounds.admit(weight, constraint, name) for name, constraint, weight in held}

    def _directions(self) -> dict[torch.Tensor, torch.Tensor]:
        """The gradient of each weight with decay and momentum; momenta are updated."""
        found: dict[torch.Tensor, torch.Tensor] = {}
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            gradients = [weight.grad for weight in weights]
            if weights and group["weight_decay"]:
                gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
            if weights and group["momentum"]:
                gradients = self._momenta(group, weights, gradients)
            found |= dict(zip(weights, gradients, strict=True))
        return found

    def _momenta(
        self, group: Group, weights: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        pairs = list(zip(weights, gradients, strict=True))
        known = [(self.state[w]["momentum_buffer"], g) for w, g in pairs if "momentum_buffer" in self.state[w]]
        if known:
            buffers = [buffer for buffer, _ in known]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, [g for _, g in known], alpha=1 - group["dampening"])
        for weight, gradient in pairs:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = gradient.detach().clone()
        return [self.state[weight]["momentum_buffer"] for weight in weights]

    def _job(self, group: Group, weight: torch.Tensor, direction: torch.Tensor) -> Job:
        return Job(
            weight=weight,
            direction=direction,
            constraint=group["constraint"],
            lr=float(group["lr"]),
            rescale=group["rescale"],
            basis=self.state[weight].get("basis"),
        )

    def _settle(self, jobs: Sequence[Job], moved: Moved, before: Mapping[torch.Tensor, float]) -> None:
        """After a step: bases are kept, and each weight is in its set."""
        for index, (job, eta) in enumerate(zip(jobs, moved.etas.tolist(), strict=True)):
            if moved.bases is not None:
                # in the weight's dtype, as load_state_dict would make it: a resumed run goes on bit for bit
                self.state[job.weight]["basis"] = moved.bases[index].to(job.weight.dtype, copy=True)
            self._bounds.advance(job.weight, job.constraint, before=before[job.weight], eta=eta)


def _descend(
    active: Sequence[tuple[str, Group, torch.Tensor]], directions: Mapping[torch.Tensor, torch.Tensor]
) -> None:
    """w <- w - lr m for the weights without a set."""
    by_rate: dict[float, list[torch.Tensor]] = {}
    for _, group, weight in active:
        if group["constraint"] is None:
            by_rate.setdefault(float(group["lr"]), []).append(weight)
    for lr, weights in by_rate.items():
        torch._foreach_add_(weights, [directions[weight] for weight in weights], alpha=-lr)


def _name(group: Group, index: int, place: int) -> str:
    """What errors call a weight: by the group's `name` (see `parameter_groups`), else by its place."""
    name = str(group.get("name", f"group {index}"))
    return name if len(group["params"]) == 1 else f"{name}[{place}]"


def _as_text(constraint: Constraint | str | None) -> str | None:
    return repr(constraint) if isinstance(constraint, Constraint) else constraint


def _check_group(group: Group) -> None:
    """Raise unless the settings are in range and the weights fit the set."""
    lr, constraint = float(group["lr"]), group["constraint"]
    most = 1.0 if constraint is not None and group["rescale"] is None else math.inf
    _check_range(0 <= lr <= most and math.isfinite(lr), "lr", f"0 <= lr <= {most}", lr)
    _check_range(0 <= group["momentum"] < 1, "momentum", "0 <= momentum < 1", group["momentum"])
    _check_range(0 <= group["dampening"] < 1, "dampening", "0 <= dampening < 1", group["dampening"])
    decay = group["weight_decay"]
    _check_range(0 <= decay < math.inf, "weight_decay", "a finite number >= 0", decay)
    _check_range(group["rescale"] in (None, *RESCALES), "rescale", f"None or one of {RESCALES}", group["rescale"])
    _check_range(
        constraint is None or isinstance(constraint, Constraint), "constraint", "a Constraint or None", constraint
    )
    for weight in group["params"]:
        _check_range(weight.is_floating_point(), "params", "tensors of a floating dtype", weight.dtype)
        if constraint is not None:
            constraint.check(weight)


def _check_range(holds: bool, what: str, expected: str, actual: object) -> None:
    if not holds:
        raise FrankWolfeError(f"{what} is out of range", expected=expected, actual=actual)


def _check_gradients(gradients: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Raise unless all are dense and finite; one read from each device."""
    sparse = next((name for name, g in gradients if g.layout != torch.strided), None)
    if sparse is not None:
        raise FrankWolfeError("a gradient is sparse", node=sparse, hint="use an embedding with sparse=False")
    finite: dict[torch.device, list[torch.Tensor]] = {}
    for _, gradient in gradients:
        finite.setdefault(gradient.device, []).append(torch.isfinite(gradient).all())
    if not all(bool(torch.stack(flags).all()) for flags in finite.values()):
        raise FrankWolfeError(
            "a gradient is not finite",
            node=next(name for name, g in gradients if not bool(torch.isfinite(g).all())),
            hint="nothing was changed; lower the learning rate, or let GradScaler skip such steps",
        )
