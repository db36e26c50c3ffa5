"""A rewrite from outside the package in a mix: taken where it pays, applied again in a process of its own.

    pip install --no-deps torchvision
    python benchmarks/own_rewrite.py [--nets demo hardswish mobilenet_v3_small] [--goal 0.7] [--samples 64] [--size 96]
        [--output own_rewrite.jsonl]

The rewrite is that of examples/own_rewrite.py: costly activations become ReLU. Beside it stand all rewrites that
foldcut brings. `demo` is the network of `foldcut demo`, which has ReLUs only, so that there is nothing to exchange;
`hardswish` is the same with Hardswish in their place, trained alike; any other name is a torchvision classifier with
random weights, where only structure and latency mean anything. Each plan is written to a folder and applied again by
`foldcut.apply` in a fresh process, with the saved weights; the largest difference of the outputs is in the table. Exit
code 1: an exchange was replayed wrongly, or taken where there is nothing to exchange.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import foldcut
import torch
from foldcut.compiler.cli import demo
from foreign_ops import declare_torchvision_ops
from rows import Row, append_line, read_lines
from torch import nn
from torch.nn import functional as F

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "own_rewrite.py"
BUILT_IN = ("drop_blocks", "prune_channels", "factorize")
DEMO = ("demo", "hardswish")
TOLERANCE = 1e-4


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.child:
        print(replayed(arguments.child))
        return
    settings = {name: getattr(arguments, name) for name in ("goal", "samples", "size", "seed")}
    done = {row["net"]: row for row in read_lines(arguments.output) if row["settings"] == settings}
    for name in arguments.nets:
        if name not in done:
            done[name] = {"net": name, "settings": settings} | compiled(name, arguments)
            append_line(arguments.output, done[name])
    sys.exit(0 if table([done[name] for name in arguments.nets]) else 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=[*DEMO, "mobilenet_v3_small"])
    parser.add_argument("--goal", type=float, default=0.7, help="share of the latency")
    parser.add_argument("--samples", type=int, default=64, help="random images, for torchvision's networks")
    parser.add_argument("--size", type=int, default=96, help="their height and width")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("own_rewrite.jsonl"))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def the_example() -> ModuleType:
    """The file of the example, as a module."""
    spec = importlib.util.spec_from_file_location("own_rewrite_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def network(name: str, arguments: argparse.Namespace) -> tuple[nn.Module, torch.Tensor]:
    """A network and the images to compile it with."""
    if name in DEMO:
        images, labels, _, _ = demo.load_digits()
        made = demo.train_digits(images, labels, seed=arguments.seed, make=lambda: untrained(name))
        return made, images[: demo.CALIBRATION_SAMPLES]
    torch.manual_seed(arguments.seed)
    return untrained(name).eval(), torch.randn(arguments.samples, 3, arguments.size, arguments.size)


def untrained(name: str) -> nn.Module:
    """The network of a name, with random weights."""
    if name in DEMO:
        return demo.DigitNet() if name == "demo" else hardswish_net()
    declare_torchvision_ops()
    import torchvision

    found: nn.Module = torchvision.models.get_model(name, weights=None)
    return found


def hardswish_net() -> nn.Module:
    """The demo's network with Hardswish for every ReLU."""
    traced = torch.fx.symbolic_trace(demo.DigitNet())
    for node in traced.graph.nodes:
        if node.op == "call_function" and node.target is F.relu:
            node.target, node.kwargs = F.hardswish, {}
    for name, module in list(traced.named_modules()):
        if isinstance(module, nn.ReLU):
            traced.set_submodule(name, nn.Hardswish())
    traced.recompile()
    return traced


def compiled(name: str, arguments: argparse.Namespace) -> Row:
    """One mix, and its plan applied again in a process of its own."""
    net, images = network(name, arguments)
    own = the_example().ExchangeActivations()
    started = time.process_time()
    met = True
    try:
        out = foldcut.compile(
            net,
            images,
            goal=foldcut.Latency(arguments.goal),
            rewrites=(*BUILT_IN, own),
            mimic=None,
            cache=False,
            seed=arguments.seed,
            progress=True,
        )
    except foldcut.GoalError as unmet:
        if not isinstance(unmet.best, foldcut.Compiled):
            raise
        out, met = unmet.best, False
    seconds = time.process_time() - started
    with tempfile.TemporaryDirectory() as folder:
        out.save(folder)
        with torch.no_grad():
            torch.save((name, net.state_dict(), images[:8], out.module(images[:8])), Path(folder) / "wanted.pt")
        again = subprocess.run([sys.executable, __file__, "--child", folder], capture_output=True, text=True)
        if again.returncode:
            raise RuntimeError(again.stderr)
    row: Row = {
        "taken": dict(Counter(decision.kind for decision in out.plan.decisions)),
        "ratio": out.report.latency["ratio"],
        "met": met,
        "error": out.report.output_error,
        "difference": float(again.stdout),
        "cpu_s": seconds,
    }
    if name in DEMO:
        _, _, tests, labels = demo.load_digits()
        row["accuracy"] = [demo.accuracy(net, tests, labels), demo.accuracy(out.module, tests, labels)]
    return row


def replayed(folder: Path) -> float:
    """The largest difference of what the plan of a folder gives in this process, of the largest output."""
    name, weights, images, wanted = torch.load(folder / "wanted.pt")
    net = untrained(name).eval()
    net.load_state_dict(weights)
    own = the_example().ExchangeActivations()
    again = foldcut.apply(net, folder / "plan.json", example=images[:2], rewrites=[own], progress=False)
    with torch.no_grad():
        return float((again.module(images) - wanted).abs().max() / wanted.abs().max())


def table(rows: Sequence[Row]) -> bool:
    """Print the rows; whether each plan was applied again as it is, and nothing exchanged where there is nothing."""
    print("| network | taken | latency | met | output error (test) | accuracy | replayed, difference | CPU s |")
    print(f"|{'---|' * 8}")
    for row in rows:
        taken = ", ".join(f"{count} {kind}" for kind, count in row["taken"].items())
        accuracy = " to ".join(f"{share:.2f}" for share in row.get("accuracy", ())) or "-"
        print(
            f"| {row['net']} | {taken} | x{row['ratio']:.3f} | {'yes' if row['met'] else 'no'} | {row['error']:.4f} "
            f"| {accuracy} | {row['difference']:.1e} | {row['cpu_s']:.0f} |"
        )
    idle = all("to_relu" not in row["taken"] for row in rows if row["net"] == "demo")
    return idle and all(row["difference"] <= TOLERANCE for row in rows)


if __name__ == "__main__":
    main()
