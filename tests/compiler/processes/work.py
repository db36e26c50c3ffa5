"""What the processes of the tests do: ``python work.py NAME,... FOLDER ...``."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foldcut
import torch
import torch.distributed as dist
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
