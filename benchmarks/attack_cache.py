"""Attacks on what foldcut keeps: cache entries, measurements and saved folders with flipped bits, cut, exchanged."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import conftest
import foldcut
import foldcut.compiler.store.analysis_store as analysis_store
import test_analysis_store as kept
import torch
from attack_registry import attack, needs
from foldcut.compiler.support.errors import CompilerError
from foldcut.runtime.measure.measurement_cache import MeasurementCache

#: The files of a result that hold no times.
_SAME = ("model.onnx", "model.pt2", "plan.json")


def _compiled(folder: Path) -> dict[str, bytes]:
    torch.manual_seed(0)
    made = foldcut.compile(
        conftest.ResNet(3, 8).eval(),
        conftest.images(48),
        goal=foldcut.Macs(0.7),
        mimic=None,
        progress=False,
        backend=conftest.WorkBackend(),
        settings=foldcut.PipelineSettings(
            channels=foldcut.ChannelSettings(limits=foldcut.ChannelLimits(multiple_of=2))
        ),
        cache=folder,
    )
    return {name: made.files[name] for name in _SAME}


Damage = Callable[[random.Random, list[Path]], None]


def _exchanged_at_random(draw: random.Random, paths: list[Path]) -> None:
    contents = [path.read_bytes() for path in paths]
    draw.shuffle(contents)
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)


def _damaging(name: str, damage: Damage) -> None:
    @attack("cache", f"every entry {name}")
    def run(folder: Path, seed: int) -> str:
        expected = _compiled(folder / "cache")
        for number in range(3):
            paths = sorted(p for p in (folder / "cache").rglob("*.safetensors") if p.is_file())
            needs(bool(paths), "nothing was kept: the attack attacks nothing")
            damage(random.Random(seed + number), paths)
            needs(_compiled(folder / "cache") == expected, "another network came out")
        return f"3 compiles over {len(paths)} entries, the same bytes"


_damaging("with a flipped bit", kept.flip)
_damaging("cut off", kept.cut)
_damaging("in the place of another", _exchanged_at_random)
_damaging("of another program", kept.forge)


@attack("cache", "300 results with flipped bits")
def flipped(folder: Path, seed: int) -> str:
    analysis_store._warned.append(folder)
    expected, _ = kept.results(folder)
    draw = random.Random(seed)
    for _ in range(25):
        kept.flip(draw, sorted(kept.entries(folder)))
        needs(kept.results(folder) == (expected, 12), "a damaged result was taken")
    return "all were computed again"


@attack("measurements", "200 damaged files")
def measurements(folder: Path, seed: int) -> str:
    values = {f"key {i}": {"units": i / 7} for i in range(40)}
    found = 0
    for number in range(200):
        draw = random.Random(1000 * seed + number)
        place = folder / str(number)
        cache = MeasurementCache(place)
        cache.put(values)
        assert cache.path is not None
        content = bytearray(cache.path.read_bytes())
        for _ in range(draw.choice([1, 10, 200])):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        cache.path.write_bytes(content[: draw.choice([len(content), draw.randrange(len(content))])])
        read = MeasurementCache(place).get(values)
        needs(all(values[key] == value for key, value in read.items()), "a damaged value was taken")
        found += len(read)
        shutil.rmtree(place)
    return f"{found} of {200 * len(values)} values were found whole, none was wrong"


@attack("saved folder", "60 folders with a flipped bit")
def saved(folder: Path, seed: int) -> str:
    for name, content in _compiled(folder / "cache").items():
        (folder / "out").mkdir(exist_ok=True)
        (folder / "out" / name).write_bytes(content)
    torch.manual_seed(0)
    net, x = conftest.ResNet(3, 8).eval(), conftest.images(4)
    expected, plan = foldcut.load(folder / "out").module(x), foldcut.load(folder / "out").plan
    draw, refused = random.Random(seed), 0
    for number in range(60):
        path = folder / "out" / draw.choice(_SAME)
        whole = bytearray(path.read_bytes())
        changed = bytearray(whole)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            if number % 6:
                found = foldcut.load(folder / "out")
                needs(found.plan == plan and torch.equal(found.module(x), expected), "another network was loaded")
            else:
                again = foldcut.apply(net, folder / "out" / "plan.json", example=x[:2], cache=False)
                needs(torch.equal(again.module(x), expected), "another network came out")
        except CompilerError:
            refused += 1
        path.write_bytes(whole)
    return f"{refused} refused, {60 - refused} without effect"
