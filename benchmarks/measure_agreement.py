"""Whether two measurements of the same two files agree within their intervals, on the machine as it is and busy.

    python benchmarks/measure_agreement.py BEFORE.onnx AFTER.onnx [--repeats 10] [--busy 1] [--output FILE.json]

Each measurement is a `foldcut measure` in a process of its own, one after the other. All pairs of them are compared:
the share whose 95 % intervals overlap, and the share in which each ratio lies in the other's interval. Then BEFORE is
measured against itself as often: no gain and no loss may be claimed. All of it with nothing beside it that this
script knows of, and again with `--busy` processes that compute all the time, which end by themselves. Exit code 1 when
fewer than 95 % of the pairs agree, or when a network is found faster or slower than itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure_stability import busy_cores, say
from rows import write_json

LEAST_AGREEING = 0.95
LEAST_CLAIM = 0.02  # what `Measurement` claims
REGIMES = ("hot", "cold")


def main() -> None:
    arguments = parse_arguments()
    files = {
        "both": (arguments.before, arguments.after),
        "the first against itself": (arguments.before, arguments.before),
    }
    rows = []
    for busy, (what, (before, after)) in itertools.product(sorted({0, arguments.busy}), files.items()):
        with busy_cores(busy):
            found = [
                measured(before, after, arguments, f"{what}, {busy} busy, {repeat + 1} of {arguments.repeats}", repeat)
                for repeat in range(arguments.repeats)
            ]
        rows += [row(what, busy, [one[regime] for one in found]) for regime in REGIMES if regime in found[0]]
        if arguments.output:  # what is there is kept, whatever becomes of the rest
            write_json(arguments.output, {"rows": rows})
    show(arguments, rows)
    passed = all(r["agree"] >= LEAST_AGREEING and r["claims"] == 0 for r in rows)
    if arguments.output:
        write_json(arguments.output, {"rows": rows, "passed": passed})
    sys.exit(0 if passed else 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--busy", type=int, default=1, metavar="N", help="busy processes beside it the second time")
    parser.add_argument("--output", type=Path, help="JSON file with every ratio")
    arguments = parser.parse_args()
    if arguments.repeats < 2 or arguments.busy < 0:
        parser.error("--repeats starts at 2, --busy at 0")
    return arguments


def measured(before: Path, after: Path, arguments: argparse.Namespace, what: str, seed: int) -> dict[str, Any]:
    """What one `foldcut measure` says, by regime."""
    say(what)
    command = [sys.executable, "-m", "foldcut", "measure", str(before), str(after), "--json", "--seed", str(seed)]
    command += ["--backend", arguments.backend, "--threads", str(arguments.threads)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    other = found.pop("other_regime")
    return {one["regime"]: one for one in (found, other) if one is not None}


def row(what: str, busy: int, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How far the measurements of one regime agree."""
    pairs = list(itertools.combinations(found, 2))
    claims = [one for one in found if (one["high"] < 1 or one["low"] > 1) and abs(one["ratio"] - 1) >= LEAST_CLAIM]
    return {
        "what": what,
        "busy": busy,
        "regime": found[0]["regime"],
        "ratios": [[one["ratio"], one["low"], one["high"]] for one in found],
        "half_width": float(np.median([(one["high"] / one["low"]) ** 0.5 - 1 for one in found])),
        "agree": float(np.mean([a["low"] <= b["high"] and b["low"] <= a["high"] for a, b in pairs])),
        "inside": float(np.mean([holds(a, b) and holds(b, a) for a, b in pairs])),
        "claims": len(claims) if what != "both" else 0,
        "contended": sum(one["contended"] for one in found),
    }


def holds(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether an interval holds the other's ratio."""
    return bool(one["low"] <= other["ratio"] <= one["high"])


def show(arguments: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs" if hasattr(os, "getloadavg") else ""
    print(f"{arguments.before.name} and {arguments.after.name}, {arguments.repeats} measurements each, {load}")
    print(
        "\n| files | busy | caches | median | smallest | largest | half width | overlap | each in the other | claims |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for one in rows:
        ratios = [ratio for ratio, _, _ in one["ratios"]]
        figures = f"x{np.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} | {one['half_width']:.1%}"
        shares = f"{one['agree']:.0%} | {one['inside']:.0%} | {one['claims'] if one['what'] != 'both' else ''}"
        print(f"| {one['what']} | {one['busy']} | {one['regime']} | {figures} | {shares} |")


if __name__ == "__main__":
    main()
