"""What would a rewrite save? Predicted from the times of a network's parts, then measured on the whole.

python examples/predict_latency.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from foldcut.compiler.analysis.regions import find_regions
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.edit_folds import fold_parameters
from foldcut.passes.drop.drop_blocks import drop_blocks
from foldcut.runtime.measure.backend import resolve_backend
from foldcut.runtime.measure.loading import loaded
from foldcut.runtime.measure.measure import measure_pair
from foldcut.runtime.measure.measurement_cache import MeasurementCache
from foldcut.runtime.measure.timing import Until
from foldcut.runtime.onnxruntime.backend import random_inputs
from foldcut.runtime.predict.latency_table import LatencyTable
from foldcut.runtime.predict.lattice import probe_lattice
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(3, 32, 3, padding=1),
    *(Block(32) for _ in range(4)),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(32, 10),
).eval()
program = fold_parameters(capture(net, torch.randn(2, 3, 32, 32)))
backend = resolve_backend("onnxruntime")  # or "openvino", "tensorrt", a class or an object of your own

with (
    TemporaryDirectory() as folder
):  # leave it out, and times are kept in memory; default_folder() is where foldcut keeps them
    cache = MeasurementCache(Path(folder))
    lattice = probe_lattice(backend, cache=cache)
    print(f"channel counts that cost nothing more: multiples of {dict(lattice.steps)}")

    table = LatencyTable(backend, cache=cache)
    original = to_onnx(program)
    table.fit([(program, table.measure_network(original))])
    before = table.predict(program)
    for segment in before.segments:
        print(f"  {segment.name:24} {segment.units / before.units:6.1%}")

    blocks = find_regions(program).blocks
    for count in (1, 2, 3):
        smaller = drop_blocks(program, blocks[:count])
        after = table.predict(smaller)  # nothing is exported or built: the segments that are left are known
        ratio = after.ratio_to(before)
        print(f"without {count} of {len(blocks)} blocks: predicted x{ratio:.3f}, {after.measured} parts measured")

inputs = random_inputs(original)
with loaded(backend, [(original, inputs), (to_onnx(smaller), inputs)]) as (first, second):
    measured = measure_pair(first, second, until=Until(max_seconds=20))
print(f"measured on the whole: x{measured.ratio:.3f} ({measured.low:.3f} to {measured.high:.3f}), {measured.verdict}")
