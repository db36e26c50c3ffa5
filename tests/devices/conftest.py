"""A second device that computes on the CPU, so that what mixes devices or waits for one shows where there is no GPU.

Its tensors say that they are on the device ``elsewhere:0``. An operator that gets one of them together with a tensor of
the CPU raises, as it does on a GPU; a tensor of no dimensions and indices may come from the CPU, as there. Whatever
makes the CPU wait for the device, such as reading a number, is counted. Numbers are the CPU's own, bit for bit.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.devices.precision import widest
from foldcut.compiler.export.edit_device import _move_node
from foldcut.compiler.ir.edit import rebuild
from foldcut.compiler.ir.graph_copy import copied
from foldcut.compiler.ir.program import Program
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
NAME = "elsewhere"
COPIES = (aten._to_copy.default, aten.copy_.default)
#: Operators whose indices may be on the CPU.
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
#: Operators that make tensors, and would otherwise give another one its shape.
FACTORIES = ("arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace")
#: Operators whose result's size, or whose result itself, the CPU has to know.
WAITED_FOR = {
    aten._local_scalar_dense.default,
    aten._linalg_check_errors.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}


class State:
    """What the device was asked, and whether it has float64."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.float64 = True
        #: Where devices were mixed in a thread of torch's own, of backward passes: an exception there ends the process.
        self.mixed: list[str] = []


STATE = State()


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device, around one of the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Elsewhere:
        if inner.dtype == torch.float64 and not STATE.float64:
            raise TypeError(f"the device {NAME} has no float64")
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_elsewhere(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            made: torch.Tensor = self.detach().clone()
            memo[id(self)] = nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made
        return memo[id(self)]  # type: ignore[no-any-return]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{NAME}({self.inner!r})"


def run_elsewhere(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operator: on the values of the CPU, its results on the device that they would be on."""
    leaves = pytree.tree_leaves((args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, Elsewhere)]
    device = kwargs.get("device")
    here = torch.device(device).type == NAME if device is not None else bool(ours)
    check_devices(func, args, leaves, ours, here)
    if waits(func, args, kwargs, here):
        STATE.waits.append(place(func))
    inner_args, inner_kwargs = pytree.tree_map(
        lambda leaf: leaf.inner if isinstance(leaf, Elsewhere) else leaf, (args, kwargs)
    )
    if device is not None:
        inner_kwargs["device"] = torch.device("cpu")
    result = func(*inner_args, **inner_kwargs)
    if func is aten.copy_.default and not isinstance(args[0], Elsewhere):
        return args[0]
    known = {id(leaf.inner): leaf for leaf in ours}  # what is changed in place stays the same tensor

    def outside(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return known[id(leaf)] if id(leaf) in known else Elsewhere(leaf)

    if id(result) in known:
        if known[id(result)].shape != result.shape:
            raise NotImplementedError(f"{func} gives a tensor on {NAME} another shape")
        return known[id(result)]
    return pytree.tree_map(outside, result) if here else result


def check_devices(func: Any, args: Any, leaves: list[Any], ours: list[Elsewhere], here: bool) -> None:
    """Raise RuntimeError where tensors of two devices meet."""
    if here and any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"{func} on {NAME} with a generator of the CPU")
    if func in COPIES:
        return
    indices = {id(leaf) for leaf in pytree.tree_leaves(args[1])} if func in INDEXED else set()
    for leaf in leaves:
        plain = isinstance(leaf, torch.Tensor) and not isinstance(leaf, Elsewhere)
        if ours and plain and leaf.dim() and id(leaf) not in indices:
            said = f"{func}: tensors on {NAME}:0 and on {leaf.device}, {list(leaf.shape)}"
            if threading.current_thread() is threading.main_thread():
                raise RuntimeError(said)
            STATE.mixed.append(said)


def waits(func: Any, args: Any, kwargs: dict[str, Any], here: bool) -> bool:
    """Whether the CPU has to wait for the device: to read from it, or for a copy to it that is not said to go on by
    itself (``non_blocking``). Indices of the CPU are copied so."""
    if func is aten.copy_.default:
        there, source = (isinstance(leaf, Elsewhere) for leaf in args[:2])
        return there != source and (source or not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)))
    if func is aten._to_copy.default:
        source = isinstance(args[0], Elsewhere)
        return source != here and (source or not kwargs.get("non_blocking", False))
    if func in INDEXED and isinstance(args[0], Elsewhere):
        indices = [leaf for leaf in pytree.tree_leaves(args[1]) if isinstance(leaf, torch.Tensor)]
        return any(leaf.dtype == torch.bool or not isinstance(leaf, Elsewhere) for leaf in indices)
    return func in WAITED_FOR


def place(func: Any) -> str:
    """The line of foldcut that an operator was called from, or of the test; the operator alone where a backward pass
    did."""
    lines = traceback.extract_stack()
    own = [frame for frame in lines if "/passes/" in frame.filename or "/compiler/" in frame.filename]
    if threading.current_thread() is not threading.main_thread():
        return str(func)
    frame = own[-1] if own else lines[-2]
    return f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.line}"


class _Module:
    """What torch asks of a device's module."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """There is no generator to seed."""

    @staticmethod
    def get_rng_state(device: int = 0) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: int = 0) -> None:
        """As above."""

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@contextmanager
def watched() -> Iterator[list[str]]:
    """The places that wait for the device meanwhile, one entry for each time."""
    STATE.waits = found = []
    try:
        yield found
    finally:
        STATE.waits = []


@contextmanager
def without_float64() -> Iterator[None]:
    STATE.float64 = False
    widest.cache_clear()  # it asks each device once
    try:
        yield
    finally:
        STATE.float64 = True
        widest.cache_clear()


def samples_of(data: Any, device: torch.device) -> CalibrationSet:
    """Samples that lie on the device already."""
    samples = CalibrationSet.of(data)
    return replace(samples, leaves=tuple(leaf.to(device) for leaf in samples.leaves))


def _register() -> list[torch.library.Library]:
    """Make the device known to torch. That has to be before the first backward pass of the process, which sets up a
    queue for each device there is: so when the tests are collected, before any of them runs."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: run_elsewhere(op, args, kwargs), "PrivateUse1")
    factories = torch.library.Library("aten", "IMPL")
    for name in FACTORIES:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(aten, packet), overload or "default")
        factories.impl(name, lambda *args, op=operator, **kwargs: run_elsewhere(op, args, kwargs), "PrivateUse1")
    return [library, factories]


#: What says how the device computes, for as long as it is held.
LIBRARIES = _register()


@pytest.fixture(autouse=True)
def nothing_mixed() -> Iterator[None]:
    """Fails a test in whose backward passes devices were mixed."""
    STATE.mixed = []
    yield
    assert STATE.mixed == []


@pytest.fixture(scope="session")
def elsewhere() -> SimpleNamespace:
    """The device and what is known of it."""
    found: Callable[[Any], CalibrationSet] = lambda data: samples_of(data, torch.device(NAME, 0))  # noqa: E731
    return SimpleNamespace(
        device=torch.device(NAME, 0), watched=watched, without_float64=without_float64, samples=found
    )


class Fake:
    """A mode for fake tensors, and the device that they say they are on."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.mode = device, FakeTensorMode(allow_non_fake_inputs=False)

    def program(self, program: Program) -> Program:
        """The program with fake tensors of the device."""
        module = rebuild(program.module, copied(program.graph))
        for node in module.graph.nodes:
            _move_node(node, self.device)
            if node.op == "get_attr":
                path, _, leaf = str(node.target).rpartition(".")
                owner, old = module.get_submodule(path), program.constant(node)
                new = self.mode.from_tensor(old.detach(), static_shapes=True)
                with self.mode:
                    new = new.to(self.device)
                    if isinstance(old, nn.Parameter):
                        owner._parameters[leaf] = nn.Parameter(new, requires_grad=False)
                    else:
                        owner._buffers[leaf] = new
        return replace(program, module=rebuild(module, module.graph))

    def samples(self, data: torch.Tensor) -> CalibrationSet:
        """Fake samples on the CPU."""
        samples = CalibrationSet.of(data)
        return replace(
            samples, leaves=tuple(self.mode.from_tensor(leaf, static_shapes=True) for leaf in samples.leaves)
        )

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        with self.mode:
            return torch.empty(shape, device=self.device, dtype=dtype)


@pytest.fixture
def fake(elsewhere: SimpleNamespace) -> Iterator[Fake]:
    built: bool = torch.backends.cuda.is_built()
    yield Fake(torch.device("cuda", 0) if built else elsewhere.device)
    widest.cache_clear()
