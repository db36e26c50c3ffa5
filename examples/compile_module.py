"""Compile an nn.Module to a latency goal: the shortest way through foldcut.

A small residual network, trained on scikit-learn's digits for a few seconds, loses blocks until ONNX Runtime runs it
in 70 % of the time.
"""

import tempfile
from pathlib import Path

import foldcut
from foldcut.compiler.cli.demo import accuracy, load_digits, train_digits

images, labels, test_images, test_labels = load_digits()
net = train_digits(images, labels, seed=0, epochs=4)

# 200 inputs without labels are all that foldcut sees
out = foldcut.compile(
    net,
    images[:200],
    goal=foldcut.Latency(0.7),
    rewrites=("drop_blocks",),
    mimic=foldcut.MimicSettings(iterations=60),
    progress=False,
)

before, after = (accuracy(module, test_images, test_labels) for module in (net, out.module))
print(f"accuracy {before:.1f} % -> {after:.1f} %")
print(
    f"latency  x{out.report.latency['ratio']:.3f} ({out.report.latency['low']:.3f} to {out.report.latency['high']:.3f})"
)
print("dropped ", ", ".join(str(d) for d in out.plan.decisions))

with tempfile.TemporaryDirectory() as folder:
    out.save(Path(folder) / "compiled")
    print("wrote   ", ", ".join(sorted(p.name for p in (Path(folder) / "compiled").iterdir())))
