"""Adam for a training, of whose states each of several processes may keep its part (ZeRO, stage 1: Rajbhandari et al.
2020)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ...compiler.devices.room import free_bytes
from ...compiler.processes.team import team

#: States are divided where they take more than this share of the memory that is free on the device of a process:
#: handing round the parameters after each step moves up to half as many bytes as the sum of the gradients before it.
STATE_SHARE = 0.1
#: Values that Adam keeps of each parameter.
STATES = 2


def to_be_divided(parameters: Sequence[nn.Parameter], device: torch.device) -> bool:
    """Whether each process should keep a part of the states: where they are large for any of them.

    Arguments:
        parameters: What is trained, the same on all processes.
        device: Where this process trains.
    """
    if team().size == 1:
        return False
    taken = STATES * sum(p.numel() * p.element_size() for p in parameters)
    return any(team().objects(taken > STATE_SHARE * free_bytes(device)))


class DividedAdam:
    """`torch.optim.Adam` with a learning rate for each parameter. Where states are divided, each process keeps those of
    its parameters, moves these and hands them round: Adam goes entry by entry, so the bits are those of the whole.

    Arguments:
        parameters: What is trained, the same on all processes, in the same order.
        divided: Whether each process keeps a part. By itself a process keeps all.

    Example:
        >>> import torch
        >>> from foldcut.passes.mimic.divided_adam import DividedAdam
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.ones(2)
        >>> DividedAdam([weight], divided=False).step([0.1])
        >>> weight.data
        tensor([-0.1000, -0.1000])
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, divided: bool) -> None:
        self.parameters = list(parameters)
        members = team()
        #: Which parameters each process moves, by their places; one list, of all, where nothing is divided.
        self.parts = _parts(self.parameters, members.size) if divided else [list(range(len(self.parameters)))]
        self._own = self.parts[members.rank if divided else 0]
        groups = [{"params": [self.parameters[place]]} for place in self._own]
        self._adam = torch.optim.Adam(groups, betas=(0.9, 0.99)) if groups else None

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, rates: Sequence[float]) -> None:
        """Move the parameters, each at its learning rate."""
        if self._adam is not None:
            for group, place in zip(self._adam.param_groups, self._own, strict=True):
                group["lr"] = rates[place]
            self._adam.step()
        if len(self.parts) == 1:
            return
        for owner, part in enumerate(self.parts):
            values = [self.parameters[place].detach() for place in part]
            moved: list[torch.Tensor] = team().one(owner, functools.partial(list, values))
            if owner != team().rank:
                for place, value in zip(part, moved, strict=True):
                    self.parameters[place].copy_(value)

    def state(self) -> dict[str, torch.Tensor]:
        """The states by the place of the parameter and their name: in the first process all of them. All processes call
        this together."""
        states = {} if self._adam is None else self._adam.state
        own = {
            f"{place} {name}": value.cpu()
            for place in self._own
            for name, value in states.get(self.parameters[place], {}).items()
        }
        if len(self.parts) == 1:
            return own
        members, found = team(), dict[str, torch.Tensor]()
        for owner in range(members.size):
            part = members.one(owner, lambda: own)
            found |= part if members.first else {}
        return found if members.first else own

    def load(self, states: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        """Go on from states, by the place of the parameter and their name."""
        if self._adam is None:
            return
        own = {turn: dict(states[place]) for turn, place in enumerate(self._own) if place in states}
        self._adam.load_state_dict({"state": own, "param_groups": self._adam.state_dict()["param_groups"]})


def _parts(parameters: Sequence[nn.Parameter], size: int) -> list[list[int]]:
    """Parameters by their place, of about as many values for each process: the largest first, to who has least."""
    load = [0] * size
    found: list[list[int]] = [[] for _ in range(size)]
    for place in sorted(range(len(parameters)), key=lambda place: -parameters[place].numel()):
        owner = load.index(min(load))
        load[owner] += parameters[place].numel()
        found[owner].append(place)
    return [sorted(part) for part in found]
