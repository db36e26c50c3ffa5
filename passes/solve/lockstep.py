"""Teacher and student side by side, node by node, over the whole calibration set.

A sequential re-solve needs, layer after layer, the student's input to the layer (with everything before it already
solved) and the teacher's value to reach. Running both networks from the start for each layer would cost the square of
the depth. Here each batch keeps just the values that are still needed (its frontier), and each node of either network
runs once for the whole sweep; only the nodes of the branch being solved run again, from the frontier in front of it.
Frontiers live in their device's memory up to a budget, beyond it in host memory, and in temporary files beyond that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ...compiler.data.calibration_set import CalibrationSet
from ...compiler.devices.room import free_bytes
from ...compiler.devices.spilled import Hosted, Spilled
from ...compiler.ir.execute import Tensors, bind, device_of, required, run_nodes
from ...compiler.ir.program import Program
from ...compiler.processes.sharing import own
from ...compiler.processes.team import team
from .targets import Target

#: The share of the memory there is that frontiers may take.
FREE_SHARE = 0.4

#: What a value's name begins with in a file: whose it is.
TEACHER, STUDENT = "t", "s"

Frontier = tuple[dict[str, Any], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one group of layers needs: nodes to run in either network, in order, and what stays afterwards.

    `targets` are solved in order from one frontier in front of the first. `shared` are student values taken over from
    the teacher, whose computation the rewrite did not touch; `scratch` runs from the frontier through the group and
    is dropped, since the solves change it. `teacher_needs` and `student_needs` are the values that stand while the
    group is solved, the `keeps` those that stay behind it: all others go as soon as their last reader has run.
    """

    targets: tuple[Target, ...]
    teacher_runs: tuple[str, ...]
    student_runs: tuple[str, ...]
    shared: tuple[str, ...]
    scratch: tuple[str, ...]
    scratch_shared: tuple[str, ...]
    teacher_needs: frozenset[str]
    student_needs: frozenset[str]
    teacher_keeps: frozenset[str]
    student_keeps: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class View:
    """One batch at a group, by its place among all: student values up to the frontier, and the teacher's."""

    batch: int
    student: dict[str, Any]
    teacher: dict[str, Any]


def plan_steps(teacher: Program, student: Program, groups: Sequence[Sequence[Target]], changed: set[str]) -> list[Step]:
    """Lay out the sweep. `groups` in topological order; `changed` are the student nodes whose value is not the
    teacher's."""
    drafts = _student_side(student, groups, changed)
    known = {n.name for n in teacher.graph.nodes if n.op == "placeholder"}
    fetched = [
        {*d["shared"], *d["scratch_shared"], *(name for t in d["targets"] for name in t.counterparts)} for d in drafts
    ]
    steps = []
    for index, draft in enumerate(drafts):
        runs = required(teacher, fetched[index], known)
        known |= set(runs)
        keeps = _still_read(teacher, set().union(*fetched[index + 1 :]), known)
        known &= keeps
        needs = keeps.union(draft["scratch_shared"], *(target.counterparts for target in draft["targets"]))
        steps.append(
            Step(
                **draft,
                teacher_runs=tuple(runs),
                teacher_needs=frozenset(needs),
                teacher_keeps=frozenset(keeps),
            )
        )
    return steps


def _student_side(student: Program, groups: Sequence[Sequence[Target]], changed: set[str]) -> list[dict[str, Any]]:
    known: set[str] = {n.name for n in student.graph.nodes if n.op == "placeholder"}
    fronts = [_live_at(student, student.order[group[0].layer.node]) for group in groups] + [set()]
    drafts = []
    for index, group in enumerate(groups):
        runs, shared = _split(student, fronts[index], known, changed)
        known |= set(runs) | set(shared)
        wanted = {name for target in group for name in (target.layer.input, target.anchor)}
        scratch, scratch_shared = _split(student, wanted, known, changed)
        keeps = _still_read(student, fronts[index + 1], known)
        needs = _still_read(student, wanted, known | set(scratch_shared)) | keeps
        known &= keeps
        drafts.append(
            {
                "targets": tuple(group),
                "student_runs": tuple(runs),
                "shared": tuple(shared),
                "scratch": tuple(scratch),
                "scratch_shared": tuple(scratch_shared),
                "student_needs": frozenset(needs),
                "student_keeps": frozenset(keeps),
            }
        )
    return drafts


def _still_read(program: Program, wanted: set[str], known: set[str]) -> set[str]:
    """Those of the known values that are wanted themselves or that computing the wanted ones reads."""
    pending = required(program, wanted, known)
    return (wanted & known) | {o.name for n in pending for o in program.nodes[n].all_input_nodes if o.name in known}


def _live_at(program: Program, position: int) -> set[str]:
    """Values computed before `position` that something at or after it reads."""
    return {
        name
        for name, node in program.nodes.items()
        if node.op in {"call_function", "placeholder"}
        and program.order[name] < position
        and any(program.order[user.name] >= position for user in node.users)
    }


def _split(student: Program, wanted: set[str], known: set[str], changed: set[str]) -> tuple[list[str], list[str]]:
    """(nodes to run in the student, values to take from the teacher) to have `wanted`."""
    untouched = {n for n in student.nodes if n not in changed}
    runs = [n for n in required(student, wanted, known | untouched) if n not in untouched]
    operands = {o.name for n in runs for o in student.nodes[n].all_input_nodes if o.op != "get_attr"}
    return runs, sorted((wanted | operands) & untouched - known, key=student.order.__getitem__)


class Lockstep:
    """Runs the steps of a sweep, each process on its own batches. Use as a context manager: temporary files are removed
    on leaving, also after Ctrl-C."""

    def __init__(
        self,
        teacher: Program,
        student: Program,
        calibration: CalibrationSet,
        *,
        batch_size: int,
        ram_bytes: int | None = None,
    ) -> None:
        """`ram_bytes` is how much the frontiers may take in memory, that of their device, and as much again in that of
        the host where this is another; None: a share of what there is."""
        self.teacher = teacher
        self.student = student
        self._batch_size = batch_size
        self._batches = -(-len(calibration) // batch_size)
        batches = list(own(calibration.batches(batch_size)))
        #: The places of this process's batches among all, and the frontier of each.
        self._places = [place for place, _ in batches]
        self._frontiers: list[Frontier | Hosted | Spilled] = [(bind(teacher, b), bind(student, b)) for _, b in batches]
        self._device = device_of(student)
        places = (self._device, torch.device("cpu"))
        self._ram_bytes, self._host_bytes = (
            int(FREE_SHARE * free_bytes(place)) // team().neighbours if ram_bytes is None else ram_bytes
            for place in places
        )
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def __len__(self) -> int:
        """The number of batches, those of other processes included."""
        return self._batches

    def advance(self, step: Step, tensors: Tensors) -> None:
        """Move every frontier up to the group's first layer, with the weights as they are by now."""
        for index in range(len(self._frontiers)):
            teacher, student = self._load(index)
            teacher = _run(self.teacher, step.teacher_runs, teacher, None, step.teacher_needs.union(step.shared))
            student |= {name: teacher[name] for name in step.shared}
            student = _run(self.student, step.student_runs, student, tensors, step.student_needs)
            self._store(index, (_only(teacher, step.teacher_needs), student))

    def views(self, step: Step, most: int | None = None) -> Iterator[View]:
        """For each batch of this process, the values that the group's nodes start from; where `most` is given, of those
        among the first batches that hold so many samples."""
        count = len(self) if most is None else min(len(self), -(-most // self._batch_size))
        for index, place in enumerate(self._places):
            if place >= count:
                return
            teacher, student = self._load(index)
            shared = {name: teacher[name] for name in step.scratch_shared}
            yield View(batch=place, student={**student, **shared}, teacher=teacher)

    def finish(self, step: Step) -> None:
        """Forget what no later step reads."""
        for index in range(len(self._frontiers)):
            teacher, student = self._load(index)
            self._store(index, (_only(teacher, step.teacher_keeps), _only(student, step.student_keeps)))

    def _load(self, index: int) -> Frontier:
        frontier = self._frontiers[index]
        if not isinstance(frontier, (Hosted, Spilled)):
            return frontier
        values = frontier.read()
        sides: Frontier = ({}, {})
        for name, value in values.items():
            sides[name.startswith(STUDENT)][name[1:]] = value
        return sides

    def _store(self, index: int, frontier: Frontier) -> None:
        taken = _bytes(frontier) * len(self._frontiers)
        if taken <= self._ram_bytes:
            self._frontiers[index] = frontier
            return
        sides = zip((TEACHER, STUDENT), frontier, strict=True)
        values = {f"{side}{name}": value for side, values in sides for name, value in values.items()}
        if self._device.type != "cpu" and taken <= self._host_bytes:
            self._frontiers[index] = Hosted.moved(values, self._device)
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="foldcut-")
        # a mapped file is never overwritten in place: the new one takes its name
        path = Path(self._folder.name) / f"{index}.values"
        fresh = Spilled.written(values, path.with_suffix(".new"))
        fresh.path.replace(path)
        self._frontiers[index] = replace(fresh, path=path)


def _run(
    program: Program, names: Sequence[str], values: Mapping[str, Any], tensors: Tensors | None, needs: frozenset[str]
) -> dict[str, Any]:
    """Run nodes in order, and return the values that are needed behind them."""
    with torch.no_grad():
        return _only(run_nodes(program, names, values, tensors, keep=needs), needs)


def _only(values: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}


def _bytes(frontier: Frontier) -> int:
    tensors = {id(v): v for values in frontier for v in values.values() if isinstance(v, torch.Tensor)}
    return sum(v.numel() * v.element_size() for v in tensors.values())
