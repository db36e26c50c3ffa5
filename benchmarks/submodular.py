"""Time of greedy channel selection: block Cholesky from moments, against a refit for every candidate at every step.

    python benchmarks/submodular.py [--rows 2000] [--seed 0]

One torch thread, CPU seconds, each measurement in a process of its own. First 64 channels of a 3x3 consumer, of which
48 are kept: both ways start from the same raw activations, in float64, and have to name the same channels in the same
order. Then two large consumers, seconds and peak memory of ours alone: there the reference would take days.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from foldcut.passes.prune.submodular import Objective, Selection, select_units
from foldcut.passes.solve.moments import Moments
from torch.nn import functional as F

CHANNELS, KERNEL, OUTPUTS, KEPT = 64, 3, 64, 48
REPEATS = 3
#: name -> (channels, kernel, outputs, channels to keep)
LARGE = {"1x1 consumer": (2048, 1, 512, 1024), "3x3 consumer": (512, 3, 512, 256)}
LARGE_ROWS, SHARD_ROWS = 16_384, 2_048


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000, help="rows of raw activations in the comparison")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        torch.set_num_threads(1)
        large = LARGE.get(arguments.child)
        result = time_large(*large, arguments.seed) if large else compare(arguments.rows, arguments.seed)
        print(json.dumps(result))
        return
    print_comparison(run_apart("comparison", arguments), arguments.rows)
    print("\n| consumer | columns | outputs | kept | Gram s | selection s | peak MiB | of these before |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name, (channels, kernel, outputs, kept) in LARGE.items():
        row = run_apart(name, arguments)
        print(
            f"| {channels}-channel {name} | {channels * kernel**2} | {outputs} | {kept} | {row['gram']:.1f} "
            f"| {row['selection']:.1f} | {row['peak_mib']:.0f} | {row['before_mib']:.0f} |",
            flush=True,
        )
    print(f"Gram: from {LARGE_ROWS} rows in shards of {SHARD_ROWS}; before: interpreter, torch and one shard")


def run_apart(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--child", case]
    command += ["--rows", str(arguments.rows), "--seed", str(arguments.seed)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def print_comparison(found: dict[str, Any], rows: int) -> None:
    print(
        f"{CHANNELS} channels x {KERNEL**2} patch columns, {OUTPUTS} outputs, {KEPT} kept, "
        f"{rows} rows of raw activations, float64"
    )
    print(f"- refit per candidate (one full run): {found['reference']:.2f} s")
    print(f"- ours, Gram included (median of {REPEATS}): {found['ours']:.3f} s, of it Gram {found['gram']:.3f} s")
    print(f"- the same {KEPT} channels in the same order; largest gap of the errors {found['gap']:.1e}")
    print(f"- closest call: the best candidate led the second by {found['lead']:.1e} of the target's energy")
    print(f"ratio: {found['reference'] / found['ours']:.0f}x", flush=True)


def compare(rows: int, seed: int) -> dict[str, float]:
    """Both ways on the same activations; raises unless they agree."""
    patches = activations(CHANNELS, KERNEL, rows, seed)
    weight = weights(CHANNELS, KERNEL, OUTPUTS, seed)
    runs = [ours(patches, weight) for _ in range(REPEATS)]
    gram, total, selection = sorted(runs, key=lambda run: run[1])[REPEATS // 2]
    seconds, (order, errors, lead) = timed(lambda: refit_greedy(patches, patches @ weight.T, KEPT))
    chosen = selection.order.tolist()
    if chosen != order:
        step = next(i for i in range(KEPT) if chosen[i] != order[i])
        raise AssertionError(f"step {step}: ours takes {chosen[step]}, the reference {order[step]}")
    gap = float((selection.errors - torch.tensor(errors, dtype=torch.float64)).abs().max())
    return {"reference": seconds, "ours": total, "gram": gram, "gap": gap, "lead": lead}


def ours(patches: torch.Tensor, weight: torch.Tensor) -> tuple[float, float, Selection]:
    """Seconds for the Gram and in all, and the selection."""
    gram_seconds, moments = timed(lambda: layer_moments(patches, len(weight)))
    objective = objective_of(moments, weight, KERNEL**2)
    seconds, selection = timed(lambda: select_units([objective], KEPT))
    return gram_seconds, gram_seconds + seconds, selection


def refit_greedy(patches: torch.Tensor, target: torch.Tensor, count: int) -> tuple[list[int], list[float], float]:
    """Greedy selection as the definition says it: for every candidate at every step, a fresh least-squares fit of the
    target on the raw activations of the channels chosen so far and the candidate.

    The order, the relative error after each step, and the least lead of a winner over the second best.
    """
    width = KERNEL**2
    blocks = patches.unflatten(1, (-1, width))
    energy = float(target.square().sum())
    order: list[int] = []
    errors, least_lead = [1.0], 1.0
    for _ in range(count):
        left: dict[int, float] = {}
        for candidate in range(blocks.shape[1]):
            if candidate not in order:
                design = blocks[:, [*order, candidate]].flatten(1)
                fit = torch.linalg.lstsq(design, target, driver="gels").solution
                left[candidate] = float((target - design @ fit).square().sum()) / energy
        best, second = sorted(left.values())[:2]
        order.append(min(left, key=lambda c: (left[c], c)))
        errors.append(best)
        least_lead = min(least_lead, second - best)
    return order, errors, least_lead


def time_large(channels: int, kernel: int, outputs: int, kept: int, seed: int) -> dict[str, float]:
    """Seconds and peak memory of ours, with the Gram summed up over shards as calibration does."""
    weight = weights(channels, kernel, outputs, seed).float()
    patches = activations(channels, kernel, SHARD_ROWS, seed).float()
    before = peak_mib()
    gram_seconds, moments = timed(lambda: layer_moments(patches, outputs))
    for shard in range(1, LARGE_ROWS // SHARD_ROWS):
        patches = activations(channels, kernel, SHARD_ROWS, seed + shard).float()
        seconds, part = timed(lambda rows=patches: layer_moments(rows, outputs))  # type: ignore[misc]
        moments, gram_seconds = moments + part, gram_seconds + seconds
    objective = objective_of(moments, weight, kernel**2)
    seconds, selection = timed(lambda: select_units([objective], kept))
    if len(selection.order.unique()) != kept or not bool((selection.errors.diff() <= 1e-12).all()):
        raise AssertionError("a channel was chosen twice, or an error grew")
    return {"gram": gram_seconds, "selection": seconds, "peak_mib": peak_mib(), "before_mib": before}


def layer_moments(patches: torch.Tensor, outputs: int) -> Moments:
    """Moments with the layer's own output as the target: no residual."""
    rows = patches.T.unsqueeze(0)
    return Moments.of(rows, rows.new_zeros(1, outputs, rows.shape[2]))


def objective_of(moments: Moments, weight: torch.Tensor, width: int) -> Objective:
    units = torch.arange(weight.shape[1]).view(-1, width)
    return Objective.of(moments, weight.unsqueeze(0), units, bias=False)


def activations(channels: int, kernel: int, rows: int, seed: int) -> torch.Tensor:
    """Rows of patches (rows, channels * kernel^2) of random feature maps: channels mixed, smooth, rectified."""
    generator = torch.Generator().manual_seed(seed)
    size = 8
    images = -(-rows // size**2)
    noise = torch.randn(images, channels, size, size, generator=generator, dtype=torch.float64)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64) / channels**0.5
    strength = torch.rand(channels, 1, 1, generator=generator, dtype=torch.float64) + 0.25
    smooth = F.avg_pool2d(noise, 3, stride=1, padding=1) + 0.5 * noise
    maps = (torch.einsum("oc,bcij->boij", mixing, smooth) * strength).relu()
    patches = F.unfold(maps, kernel, padding=kernel // 2).transpose(1, 2).flatten(0, 1)
    return patches[:rows].contiguous()


def weights(channels: int, kernel: int, outputs: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    columns = channels * kernel**2
    return torch.randn(outputs, columns, generator=generator, dtype=torch.float64) / columns**0.5


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds and the result."""
    started = time.process_time()
    result = function()
    return time.process_time() - started, result


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
