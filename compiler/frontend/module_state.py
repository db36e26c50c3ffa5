"""A module while it is captured: in eval mode, and as it was when it is given back."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..support.errors import CaptureError, named_first_line


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside `torch.compile`, `DataParallel` and `DistributedDataParallel`, which take any arguments."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def check_weights(model: nn.Module) -> None:
    """Raise CaptureError unless all weights are there, in the memory that foldcut works in."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise CaptureError(
                f"the network has no weights yet: {name} is uninitialised",
                hint="run it on a batch, then load its trained weights: a first run here would make up random ones",
            )
        if tensor.device.type == "meta":
            raise CaptureError(
                f"the network has no weights: {name} is on meta",
                hint="load them first; the meta device holds shapes only",
            )


def device_of_model(model: object) -> torch.device:
    """Where a network is that was given: the CPU for files. Raises CaptureError for one that is on several devices."""
    tensors: list[object] = []
    if isinstance(model, nn.Module):
        tensors = [*model.parameters(), *model.buffers()]
    elif isinstance(model, torch.export.ExportedProgram):
        tensors = [*model.state_dict.values(), *model.constants.values()]
    found = {tensor.device for tensor in tensors if isinstance(tensor, torch.Tensor)}
    if len(found) > 1:
        raise CaptureError(
            "the network is on several devices",
            expected="one",
            actual=", ".join(sorted(map(str, found))),
            hint="move it to one of them: net.to(device), or for an exported program "
            "torch.export.passes.move_to_device_pass(exported, device)",
        )
    return next(iter(found), torch.device("cpu"))


def on_the_cpu(model: nn.Module) -> nn.Module:
    """The module, or a copy of it on the CPU where it is elsewhere: graphs are traced there. Raises CaptureError."""
    if device_of_model(model).type == "cpu":
        return model
    try:
        return copy.deepcopy(model).cpu()
    except Exception as cause:  # modules may hold what does not copy
        raise CaptureError(
            f"the network cannot be copied to the CPU: {named_first_line(cause)}",
            hint="pass net.cpu(), and device= where it shall run",
        ) from cause


@contextmanager
def eval_mode(model: nn.Module, *, warn: bool = True) -> Iterator[None]:
    """All modules in eval mode inside, as they were outside."""
    training = [m for m in model.modules() if m.training]
    if training and warn:
        warnings.warn(
            "the model is in training mode; it is captured as in eval mode (call model.eval() to silence this)",
            stacklevel=6,
        )
    for module in training:
        module.training = False
    # the fused attention of torch's own modules zeroes padded rows, which the exported graph does not
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in training:
            module.training = True


def name_keywords(model: nn.Module, names: Iterable[str]) -> None:
    """Give forward() a parameter for each name that its ``**kwargs`` takes: torch.export keeps no batch dynamic
    otherwise. For use inside `restored`, which takes it back."""
    try:
        known = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # code that is not Python's
        return
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    fresh = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names if name not in known]
    if not open_ended or not fresh:
        return
    own = model.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    stated = [p for p in known.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    forward.__signature__ = inspect.Signature([*stated, *fresh])  # type: ignore[attr-defined]
    model.forward = forward


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """What a forward pass leaves behind goes again: attributes that it set, buffers that it wrote to, random numbers
    that it drew."""
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    attributes = [(m, _shallow(vars(m))) for m in modules]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for module, before in attributes:
                _put_back(vars(module), before)
            with torch.no_grad():
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    """A copy of a module's attributes and of the tables that some of them are; tensors are the same."""
    return {key: value.copy() if type(value) is dict else value for key, value in attributes.items()}


def _put_back(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    for key in [key for key in attributes if key not in before]:
        del attributes[key]
    for key, value in before.items():
        if type(value) is dict and type(attributes.get(key)) is dict:
            if not _same(attributes[key], value):
                attributes[key].clear()
                attributes[key].update(value)
        else:
            attributes[key] = value


def _same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(left[key] is right[key] for key in left)
