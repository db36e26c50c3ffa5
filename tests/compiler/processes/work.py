"""What the processes of the tests do: ``python work.py NAME,... FOLDER ...``."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import ctypes
import datetime
import importlib.util
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foldcut
import torch
import torch.distributed as dist
from foldcut.compiler.devices.precision import WideSum
from foldcut.compiler.devices.triangle import mirrored
from foldcut.compiler.processes import exchange, heartbeat, joining, on_device
from foldcut.compiler.processes.joining import agree, joined
from foldcut.compiler.processes.sharing import by_first, in_place, in_turn, largest, own, spread
from foldcut.compiler.processes.team import team
from foldcut.compiler.support.errors import CompilerError, GoalError
from torch import nn

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
shared_path = Path(__file__).parents[2] / "conftest.py"
loaded = importlib.util.spec_from_file_location("shared_networks", shared_path)
assert loaded is not None and loaded.loader is not None
shared: Any = importlib.util.module_from_spec(loaded)
loaded.loader.exec_module(shared)


def said(work: Callable[[], Any]) -> Any:
    """What it returns, or the error."""
    try:
        with joined():
            return work()
    except Exception as error:
        return f"{type(error).__name__}: {getattr(error, 'message', error)}"


def symmetric() -> tuple[int, bool]:
    """What is sent of a Gram matrix that some processes have, and whether all of it comes back."""
    matrix = mirrored(torch.randn(2, 41, 41, generator=torch.Generator().manual_seed(1)).double())
    total, before = WideSum(symmetric=True), team().sent_bytes
    if RANK:
        total.add(matrix)
    whole = total.value()
    return team().sent_bytes - before, torch.equal(whole, matrix * (SIZE - 1))


def exchanges(folder: Path) -> dict[str, Any]:
    """Every exchange once, and what goes wrong in each way that it can."""
    del folder
    found: dict[str, Any] = {}
    mine = torch.full((2, 3), 10.0**RANK)
    third = torch.tensor([float(RANK), torch.nan if RANK == 0 else 1.0])

    def sums() -> list[Any]:
        return team().sums([mine, None, mine if RANK else None])

    def maxima() -> dict[str, torch.Tensor]:
        return largest({"a": third, **({"b": mine} if RANK else {})}, ["a", "b", "c"])

    def fails() -> float:
        return in_turn(1e9, lambda: 1 / 0)

    def one_fails() -> list[int]:
        return spread([(1.0, lambda: 1), (3.0, lambda: 3 // 0), (2.0, lambda: 2)])

    def alone_fails() -> list[Any]:
        if RANK == SIZE - 1:
            raise CompilerError("only here", hint="nothing")
        return sums()

    def others_shapes() -> list[Any]:
        return team().sums([torch.ones(RANK + 1)])

    def other_ways() -> Any:
        return sums() if RANK == 0 else team().objects(1)

    found["sums"] = said(sums)
    found["symmetric"] = said(symmetric)
    found["maxima"] = said(maxima)
    found["objects"] = said(lambda: team().objects({"rank": RANK}))
    found["own"] = said(lambda: in_place([item for _, item in own("abcdefg")]))
    found["few"] = said(lambda: in_place([item for _, item in own("a")]))
    found["first"] = said(lambda: by_first(lambda: RANK))
    found["turn"] = said(lambda: [in_turn(1e9, lambda: RANK) for _ in range(2 * SIZE)])
    found["spread"] = said(lambda: spread([(1.0, lambda: (RANK, team().size)) for _ in range(2 * SIZE)]))
    found["agree"] = said(lambda: agree({"seeds": 3}))
    found["disagree"] = said(lambda: agree({"goals": "one", "seeds": RANK}))
    found["missing"] = said(lambda: agree({"seeds": 3} if RANK else {}))
    for name, work in (("fails", fails), ("one fails", one_fails), ("alone fails", alone_fails)):
        found[name] = said(work)
    found["others' shapes"] = said(others_shapes)
    found["other ways"] = said(other_ways)
    found["after all"] = said(sums)
    return found


def added() -> float:
    """The number of processes, as they all add it up."""
    (found,) = team().sums([torch.ones(())])
    assert found is not None
    return float(found)


def stopped(folder: Path, silent: str) -> tuple[float, Any]:
    """One process stops in a call; how long the others take to say so, and what."""
    del folder
    heartbeat.BEAT_S = 0.25

    def work() -> list[float]:
        first = added()
        if int(silent) == RANK:
            os.kill(os.getpid(), signal.SIGSTOP)
        return [first, added()]

    began = time.monotonic()
    words = said(work)
    took_s = time.monotonic() - began
    dist.destroy_process_group()  # waits for nobody
    return took_s, words


def busy(folder: Path) -> dict[str, Any]:
    """Processes that work for as long as it takes to be silent, several times over: the first one waits for something
    else, the last one lets no other thread of Python run."""
    del folder
    heartbeat.BEAT_S = 0.1

    def work() -> float:
        if RANK == 0:
            time.sleep(3)
        if RANK == SIZE - 1:
            ctypes.PyDLL(None).usleep(4_000_000)
        return added()

    return {"busy": said(work), "again": said(work)}


def unreachable(folder: Path) -> dict[str, Any]:
    """The last process cannot reach the first one but by the process group."""
    del folder
    if RANK:
        heartbeat.CONNECT_WITHIN = datetime.timedelta(seconds=2)
    else:
        heartbeat._address = lambda rank: "no.such.machine.invalid"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        total = said(added)
    return {"warned": "".join(str(one.message) for one in caught), "sum": total}


class Unsent:
    """An exchange that fails."""

    def wait(self) -> None:
        raise RuntimeError("no devices like these")


class OnElsewhere:
    """Adds up tensors of the second device of tests/devices, as a backend that exchanges them there would."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.count, self.broken = device, 0, False
        self.through = dist.new_group(backend="gloo") if SIZE > 1 else None

    def allreduce(self, tensors: list[Any], options: Any) -> Any:
        """The sum of one tensor, which is on the device."""
        del options
        (tensor,) = tensors
        assert tensor.device == self.device and tensor.dtype == torch.float64, tensor
        if self.broken:
            return Unsent()
        self.count += 1
        return dist.all_reduce(tensor.inner, group=self.through, async_op=True)


def devices(folder: Path) -> dict[str, Any]:
    """Sums on a device with a backend that takes them there: with a device for each process, with one for all, with a
    backend that fails, and a compile."""
    del folder
    path = Path(__file__).parents[2] / "devices" / "conftest.py"
    loaded = importlib.util.spec_from_file_location("second_device", path)
    assert loaded is not None and loaded.loader is not None
    second: Any = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(second)
    device = torch.device(second.NAME, 0)
    group, new_group = OnElsewhere(device), dist.new_group
    dist.get_backend_config = lambda: f"cpu:gloo,{second.NAME}:there"
    dist.new_group = lambda backend, timeout: (
        group if backend == "there" else new_group(backend=backend, timeout=timeout)
    )
    found: dict[str, Any] = {}

    def total() -> tuple[list[Any], int]:
        """Sums, those of nothing on one process included, and how many were on the device."""
        before = group.count
        terms = [torch.full((3,), 2.0, device=device), torch.ones(()), None] if RANK else [None] * 3
        sums = team().sums(terms)
        return [None if s is None else (s.cpu().tolist(), s.device.type) for s in sums], group.count - before

    def afresh(own: bool, broken: bool = False) -> Any:
        """The same in a team that is formed anew."""
        joining._formed.clear()
        group.broken = broken
        on_device.place = exchange.place = lambda device: RANK + 1 if own else 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            return said(total), "".join(str(one.message) for one in caught)

    if SIZE > 1:
        found = {"one": afresh(own=False), "broken": afresh(own=True, broken=True), "own": afresh(own=True)}
    net, samples = network("cnn")
    options: dict[str, Any] = {"goal": foldcut.Channels(0.5), "backend": shared.CountingBackend(), "device": device}
    out = foldcut.compile(net, samples, progress=False, cache=False, mimic=False, **options)
    return {**found, "weights": {name: w.cpu() for name, w in out.module.state_dict().items()}, "sums": group.count}


GOALS: dict[str, Callable[[], foldcut.Goal]] = {
    "blocks": lambda: foldcut.Blocks(1),
    "channels": lambda: foldcut.Channels(0.5),
    "macs": lambda: foldcut.Macs(0.6),
    "parameters": lambda: foldcut.Parameters(0.6),
    "ranks": lambda: foldcut.Ranks(keep=0.5),
    "latency": lambda: foldcut.Latency(0.7),
    "error": lambda: foldcut.MaxError(0.01),
    "loss": lambda: foldcut.MaxLoss(0.2),
}
#: Of each network some goals.
CASES = {
    "cnn": tuple(GOALS),
    "transformer": ("blocks", "channels", "latency"),
}


#: Those that three processes make.
SOME = ("cnn blocks", "cnn channels", "cnn ranks", "cnn latency", "transformer channels")


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    if name == "cnn":
        return shared.seeded(lambda: shared.ResNet(2, 16)), shared.images(60)
    return shared.seeded(lambda: shared.Transformer(2, 16)), shared.tokens(60)


def compiled(name: str, goal: str, cache: bool | str = False, **more: Any) -> dict[str, Any]:
    net, samples = network(name)
    options: dict[str, Any] = more
    if goal == "loss":
        options["evaluate"] = lambda module: float(module(samples[:8]).mean())
    if goal in ("error", "loss"):  # all of them take far longer
        options["rewrites"] = ["drop_blocks"]
    backend = shared.CountingBackend()
    mimic = foldcut.MimicSettings(iterations=12, checks=2, batch_size=16)
    settings = foldcut.PipelineSettings(mimic=mimic)
    try:
        out = foldcut.compile(
            net, samples, goal=GOALS[goal](), backend=backend, settings=settings, progress=False, cache=cache, **options
        )
    except GoalError as unmet:
        assert isinstance(unmet.best, foldcut.Compiled), unmet
        out = unmet.best
    return {
        "decisions": [decision.to_dict() for decision in out.plan.decisions],
        "weights": dict(out.module.state_dict()),
        "error": out.report.output_error,
        "tried": len(out.report.tried),
        "processes": dict(out.report.processes),
    }


def compiles(folder: Path) -> dict[str, Any]:
    """Every case once, or of three processes some."""
    del folder
    every = {f"{name} {goal}": (name, goal) for name, goals in CASES.items() for goal in goals}
    return {case: compiled(*every[case]) for case in (every if SIZE < 3 else SOME)}


def resumed(folder: Path, cache: str) -> dict[str, Any]:
    """A compile that keeps its analyses."""
    del folder
    return compiled("cnn", "latency", cache)


def killed(folder: Path, cache: str) -> str:
    """The same; the last process is killed on the way, and the others say what they make of that."""
    from foldcut.passes.solve.lockstep import Lockstep

    advance, count = Lockstep.advance, [0]

    def counted(self: Lockstep, *arguments: Any) -> None:
        count[0] += 1
        if count[0] == 12 and RANK == SIZE - 1:
            (folder / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        advance(self, *arguments)

    Lockstep.advance = counted  # type: ignore[method-assign]
    try:
        compiled("cnn", "latency", cache)
    except Exception as error:
        took_s = time.time() - float((folder / "killed").read_text())
        return f"{took_s:.1f} {type(error).__name__}: {error}"
    return "it went on"


def unequal(folder: Path) -> dict[str, str]:
    """Arguments that are not the same."""
    del folder
    net, samples = network("cnn")
    base: dict[str, Any] = {"goal": foldcut.Channels(0.5), "backend": shared.CountingBackend()}
    base |= {"progress": False, "cache": False, "mimic": False}
    last = RANK == SIZE - 1
    other = shared.seeded(lambda: shared.ResNet(2, 16), seed=1) if last else net
    cases: dict[str, tuple[nn.Module, torch.Tensor, dict[str, Any]]] = {
        "seed": (net, samples, {"seed": RANK}),
        "goal": (net, samples, {"goal": foldcut.Channels(0.5 if last else 0.25)}),
        "samples": (net, samples + RANK, {}),
        "network": (other, samples, {}),
        "bad here": (net, samples[:0] if last else samples, {}),
        "bad device": (net, samples, {"device": "cuda:77"}),
    }
    found = {}
    for name, (module, data, options) in cases.items():
        try:
            foldcut.compile(module, data, **{**base, **options})
            found[name] = "it went on"
        except CompilerError as error:
            found[name] = f"{type(error).__name__}: {error}"
    settings = foldcut.PipelineSettings(processes=False)
    if RANK == 0:
        found["by itself"] = str(foldcut.compile(net, samples, settings=settings, **base).report.output_error)
    return found


def parts(folder: Path) -> dict[str, Any]:
    """Samples of which each process has its part."""
    del folder
    net, samples = network("cnn")
    options: dict[str, Any] = {"goal": foldcut.Channels(0.5), "backend": shared.CountingBackend()}
    options |= {"progress": False, "cache": False, "mimic": False}
    data = torch.utils.data.TensorDataset(samples[:59])  # not a multiple of two or three: the sampler repeats some
    sampler = torch.utils.data.DistributedSampler(data, SIZE, RANK, shuffle=True, seed=3) if SIZE > 1 else None
    loader = torch.utils.data.DataLoader(data, 7, sampler=sampler)
    by_sampler = foldcut.compile(net, foldcut.Sharded(loader), **options)
    uneven = samples[:50] if RANK == 0 else samples[50:59] if RANK == 1 else None
    by_hand = foldcut.compile(net, foldcut.Sharded(samples[:59] if SIZE == 1 else uneven), **options)
    last = foldcut.Sharded(samples[:20, :, :4] if RANK == SIZE - 1 else samples[:20])
    return {
        "samples": [out.report.calibration["samples"] for out in (by_sampler, by_hand)],
        "weights": [dict(out.module.state_dict()) for out in (by_sampler, by_hand)],
        "nothing": said(lambda: foldcut.compile(net, foldcut.Sharded(None), **options)),
        "others": said(lambda: foldcut.compile(net, last, **options)) if SIZE > 1 else "",
    }


def frank_wolfe(folder: Path) -> dict[str, Any]:
    """A few steps of Frank-Wolfe under DDP, each process with its share of every batch."""
    from foldcut.passes.frank_wolfe import FrankWolfe, SpectralKSupport, parameter_groups

    del folder
    net = shared.seeded(lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)))
    optimiser = FrankWolfe(parameter_groups(net, lambda weight: SpectralKSupport(k=2)), lr=0.1)
    inputs, wanted = torch.randn(5, 12, 8), torch.randn(5, 12, 4)
    model = nn.parallel.DistributedDataParallel(net) if SIZE > 1 else net
    for x, y in zip(inputs, wanted, strict=True):
        optimiser.zero_grad()
        nn.functional.mse_loss(model(x[RANK::SIZE]), y[RANK::SIZE]).backward()
        optimiser.step()
    return dict(net.state_dict())


def frank_wolfe_divided(folder: Path) -> dict[str, Any]:
    """The same steps with all momenta in each process, and with a part of them (ZeRO), cut off and taken up again."""
    from foldcut.passes.frank_wolfe import FrankWolfe, KSupport, SpectralKSupport, parameter_groups
    from torch.distributed.optim import ZeroRedundancyOptimizer

    del folder

    def start(divided: bool) -> tuple[nn.Module, Any]:
        net = shared.seeded(lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4)))
        groups = parameter_groups(net, lambda weight: SpectralKSupport(k=2) if weight.shape[0] > 4 else KSupport(k=9))
        options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
        if divided:
            return net, ZeroRedundancyOptimizer(groups, optimizer_class=FrankWolfe, **options)
        return net, FrankWolfe(groups, **options)

    def go_on(net: nn.Module, optimiser: Any, steps: range) -> None:
        model = nn.parallel.DistributedDataParallel(net)
        generator = torch.Generator().manual_seed(3)
        data = [(torch.randn(12, 8, generator=generator), torch.randn(12, 4, generator=generator)) for _ in range(8)]
        for x, y in (data[step] for step in steps):
            optimiser.zero_grad()
            nn.functional.mse_loss(model(x[RANK::SIZE]), y[RANK::SIZE]).backward()
            optimiser.step()

    whole, all_states = start(divided=False)
    go_on(whole, all_states, range(8))
    net, part = start(divided=True)
    go_on(net, part, range(5))
    part.consolidate_state_dict(0)
    kept: list[Any] = [part.state_dict() if RANK == 0 else None]
    dist.broadcast_object_list(kept, 0)
    weights = {name: weight.clone() for name, weight in net.state_dict().items()}
    found = {"whole": dict(whole.state_dict()), "kept": len(part.optim.state), "all": len(all_states.state)}
    for divided in (True, False):
        again, optimiser = start(divided)
        again.load_state_dict(weights)
        optimiser.load_state_dict(copy.deepcopy(kept[0]))  # torch's changes what it is given
        go_on(again, optimiser, range(5, 8))
        found["divided" if divided else "together"] = dict(again.state_dict())
    return found


def mimicked(folder: Path) -> dict[str, Any]:
    """A training with all of Adam's states in each process, with a part of them, and cut off and taken up again."""
    from foldcut.compiler.store import checkpoint
    from foldcut.passes.mimic import divided_adam

    found: dict[str, Any] = {}
    sizes: list[int] = []
    step = divided_adam.DividedAdam.step

    def watched(self: Any, rates: Any) -> None:
        step(self, rates)
        sizes.append(0 if self._adam is None else sum(v.numel() for s in self._adam.state.values() for v in s.values()))

    divided_adam.DividedAdam.step = watched  # type: ignore[method-assign]
    for name, share in (("together", 1.0), ("divided", 0.0)):
        divided_adam.STATE_SHARE = share
        sizes.clear()
        weights = compiled("cnn", "blocks")["weights"]
        found[name] = {"weights": weights, "sizes": set(sizes), "steps": len(sizes)}
    checkpoint.EVERY_S, checkpoint.SHARE = 0.0, 0.0  # a state after each step

    def cut_off(self: Any, rates: Any) -> None:
        if len(sizes) == 7:
            raise KeyboardInterrupt
        watched(self, rates)

    divided_adam.DividedAdam.step = cut_off  # type: ignore[method-assign]
    sizes.clear()
    with contextlib.suppress(KeyboardInterrupt):
        compiled("cnn", "blocks", str(folder / "cache"))
    divided_adam.DividedAdam.step = watched  # type: ignore[method-assign]
    sizes.clear()
    weights = compiled("cnn", "blocks", str(folder / "cache"))["weights"]
    found["again"] = {"weights": weights, "steps": len(sizes)}
    return found


def others(folder: Path) -> dict[str, Any]:
    """`sweep`, and `apply` of one of its plans; half precision; samples made from the network alone."""
    del folder
    net, samples = network("cnn")
    options: dict[str, Any] = {"progress": False, "cache": False, "mimic": False}
    goals = [foldcut.Channels(0.5), foldcut.Blocks(1)]
    swept = foldcut.sweep(net, samples, goals=goals, backend=shared.CountingBackend(), **options)
    first = swept.points[0].compiled
    assert first is not None
    applied = foldcut.apply(net, first.plan, calibration=samples, **options)
    half = shared.seeded(lambda: shared.ResNet(2, 16)).to(torch.bfloat16)
    low = foldcut.compile(half, samples.bfloat16(), goal=goals[0], backend=shared.CountingBackend(), **options)
    made = foldcut.SynthesisSettings(count=12, input_shape=(3, 8, 8), iterations=4)
    alone = foldcut.compile(net, made, goal=goals[0], backend=shared.CountingBackend(), **options)
    networks = [*(point.compiled for point in swept.points), applied, low, alone]
    return {str(place): dict(found.module.state_dict()) for place, found in enumerate(networks) if found is not None}


class Counted(concurrent.futures.Executor):
    """Hands on what it gets, and counts it."""

    def __init__(self, inner: concurrent.futures.Executor) -> None:
        self.inner, self.count = inner, 0

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Any:
        self.count += 1
        return self.inner.submit(function, *arguments, **named)


class Broken(Counted):
    """Loses what it gets."""

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Any:
        raise OSError("the cluster is away")


def searched(executor: Any) -> dict[str, Any]:
    """A search that tries plans which do not depend on each other."""
    net, samples = shared.seeded(lambda: shared.ResNet(3, 16)), shared.images(60)
    options: dict[str, Any] = {"rewrites": ["drop_blocks", "prune_channels", "factorize"], "mimic": False}
    options |= {"backend": shared.CountingBackend(), "progress": False, "cache": False, "executor": executor}
    out = foldcut.compile(net, samples, goal=foldcut.Macs(0.4), **options)
    return {"tried": out.report.tried, "weights": dict(out.module.state_dict()), "error": out.report.output_error}


def executed(folder: Path) -> dict[str, Any]:
    """The same search with plans tried here, by other processes, and by what loses them."""
    del folder
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as inner:
        executor = Counted(inner)
        there = searched(executor)
        return {
            "here": searched(None),
            "there": there,
            "count": executor.count,
            "lost": said(lambda: searched(Broken(inner))),
        }


if __name__ == "__main__":
    torch.set_num_threads(1)
    if SIZE > 1:
        dist.init_process_group("gloo")
    names, place = sys.argv[1].split(","), Path(sys.argv[2])
    for name in names:
        torch.manual_seed(0)
        with shared.measured_quickly():
            made = globals()[name](place, *sys.argv[3:])
        leaves = place / name if len(names) > 1 else place
        leaves.mkdir(exist_ok=True)
        torch.save(made, leaves / f"{RANK}.pt")
