"""Several goals from one set of analyses, and a plan put into effect again from its folder."""

import tempfile
from pathlib import Path

import foldcut
import torch
from foldcut.compiler.cli.demo import load_digits, train_digits

images, labels, test_images, test_labels = load_digits()
net = train_digits(images, labels, seed=0, epochs=3)


def accuracy(module):
    return float((module(test_images).argmax(1) == test_labels).float().mean())


goals = [foldcut.Macs(0.7), foldcut.Macs(0.5), foldcut.Parameters(0.5)]
with tempfile.TemporaryDirectory() as folder:
    points = foldcut.sweep(net, images[:200], goals=goals, mimic=None, progress=False, cache=folder)
    for point in points.points:
        ratio, error = point.cost
        print(f"{point.goal}: latency x{ratio:.3f}, error {error:.4f}, accuracy {accuracy(point.compiled.module):.3f}")
    print("on the front:", ", ".join(str(point.goal) for point in points.front))

    # the folder of a point: plan.json says what was cut, model.pt2 beside it has the weights
    saved = points.save(Path(folder) / "sweep") / points.points[0].name
    again = foldcut.apply(net, saved / "plan.json", example=images[:2])
    assert torch.equal(again.program(test_images), points.points[0].compiled.module(test_images))
    # elsewhere, with other unlabelled inputs: the same is cut, what is left is solved again
    solved = foldcut.apply(net, saved / "plan.json", calibration=images[200:400], mimic=None)
    print(f"solved again with other inputs: accuracy {accuracy(solved.module):.3f}")
