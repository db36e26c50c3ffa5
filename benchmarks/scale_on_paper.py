"""What several processes do to a compile, worked out from what was measured: bytes, time by stage, where it stops.

    python benchmarks/scale_on_paper.py [--rows scale.jsonl] [--processes 1,8,64]

First the model itself: from the stages of one process (rows of `benchmarks/scale.py`) it works out how long n processes
take, beside what they took. Then a Llama of 8 billion parameters, its MLP channels cut and re-solved: multiply-
accumulates and bytes are counted, rates are assumptions that are printed with the result.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

from rows import Row, read_lines

#: Stages that are divided; what is left is done by one process while the others wait, or by all alike.
DIVIDED = frozenset({"re-solve", "mimic", "choose", "try plans", "test", "offer channels", "compare data"})
#: Measured here: seconds of an exchange of a few words, and bytes a second of a sum, between processes of one machine.
EXCHANGE_S, SUM_BYTES_S = 5e-4, 1.1e9


@dataclass(frozen=True)
class Machine:
    """Assumed rates of one GPU and of the network between them, as multiply-accumulates and bytes a second."""

    half_macs_s: float = 0.4 * 495e12
    single_macs_s: float = 0.6 * 33e12
    double_macs_s: float = 0.5 * 33e12
    network_bytes_s: float = 20e9
    exchange_s: float = 1e-3


@dataclass(frozen=True)
class Linear:
    """A layer of n columns and m outputs."""

    columns: int
    outputs: int
    solved: bool


#: One block of an 8-billion-parameter Llama: queries, keys and values, the way out, and the MLP, whose channels are
#: cut: the layer that reads them is solved.
BLOCK = (
    Linear(4096, 4096, False),
    Linear(4096, 2048, False),
    Linear(4096, 4096, False),
    Linear(4096, 2 * 14336, False),
    Linear(14336, 4096, True),
)
BLOCKS, TOKENS, ROWS_PER_COLUMN, RIDGES = 32, 128 * 2048, 200, 3


def simulated_s(alone: Row, row: Row) -> float:
    """Seconds of n processes: what is divided takes 1/n as long, and what they say to each other is added."""
    size, stages = row["processes"], alone["stages"]
    divided = sum(seconds for stage, seconds in stages.items() if stage in DIVIDED)
    whole = alone["wall_s"] - divided
    said = row["exchanges"][0] * EXCHANGE_S + row["sent_bytes"][0] / SUM_BYTES_S
    return float(whole + divided / size + said)


def sum_bytes(layer: Linear) -> float:
    """What each process has of a layer's moments: one triangle of the Gram matrices of all rows and of those held out,
    and their cross moments."""
    n, m = layer.columns, layer.outputs
    return 2 * 8 * (n * (n + 1) / 2 + n * m)


def stages(size: int, machine: Machine) -> dict[str, float]:
    """Seconds of each stage of the large compile with so many GPUs."""
    forward = sum(layer.columns * layer.outputs for layer in BLOCK) * BLOCKS * TOKENS
    solved = [layer for layer in BLOCK if layer.solved]
    found = {"values of both networks": 2 * forward / machine.half_macs_s / size}
    moments = said = algebra = chosen = 0.0
    for layer in solved:
        n, m = layer.columns, layer.outputs
        rows = min(TOKENS, ROWS_PER_COLUMN * n)
        moments += BLOCKS * rows * n * (n / 2 + m)
        said += BLOCKS * sum_bytes(layer) * 2 * (size - 1) / size
        algebra += BLOCKS * RIDGES * (n**3 / 6 + n * n * m)
        chosen += BLOCKS * n * n * (n + m) / 2
    found["moments"] = moments / machine.single_macs_s / size
    found["sums between processes"] = said / machine.network_bytes_s
    found["solves, one after the other"] = algebra / machine.double_macs_s
    found["choice of channels, by the CPUs"] = chosen / 2e11 / min(size, BLOCKS)
    found["exchanges"] = BLOCKS * len(solved) * 8 * machine.exchange_s if size > 1 else 0.0
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("scale.jsonl"))
    parser.add_argument("--processes", default="1,8,64")
    arguments = parser.parse_args()
    rows = read_lines(arguments.rows)
    print("| goal | processes | s | worked out |\n|---|---|---|---|")
    for row in rows:
        alone = next(
            (r for r in rows if (r["goal"], r["model"], r["processes"]) == (row["goal"], row["model"], 1)), None
        )
        if alone is not None and row["processes"] > 1:
            print(f"| {row['goal']} | {row['processes']} | {row['wall_s']:.0f} | {simulated_s(alone, row):.0f} |")
    sizes = [int(size) for size in arguments.processes.split(",")]
    tables = [stages(size, Machine()) for size in sizes]
    rates = ", ".join(f"{name} {value:.3g}" for name, value in asdict(Machine()).items())
    print(f"\nassumed: {rates}\n\n| stage, s | {' | '.join(map(str, sizes))} |\n|---|{'---|' * len(sizes)}")
    for name in tables[0]:
        print(f"| {name} | {' | '.join(f'{table[name]:.1f}' for table in tables)} |")
    print(f"| all | {' | '.join(f'{sum(table.values()):.0f}' for table in tables)} |")
    for layer in (layer for layer in BLOCK if layer.solved):
        size = f"{sum_bytes(layer) / 1e9:.2f} GB for each layer of {layer.columns} columns"
        print(f"\nbytes of a sum: {size}, {BLOCKS} times")


if __name__ == "__main__":
    main()
