"""CIFAR-10 from JPEG archives and the ResNets trained on it: what the accuracy benchmarks share. Paths come from the
command line."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Cifar:
    """Calibration images (with labels only for those who train), and test images with labels; float32, normalised."""

    calibration: torch.Tensor
    test: torch.Tensor
    labels: torch.Tensor
    calibration_labels: torch.Tensor | None = None


def load_cifar(folder: Path, samples: int | None, test_limit: int | None = None, *, labelled: bool = False) -> Cifar:
    """The first so many images of either half; all of them where None is given."""
    calibration, training_labels = _decode(folder / "cifar10_train.npz", samples)
    test, labels = _decode(folder / "cifar10_test.npz", test_limit)
    return Cifar(
        calibration=calibration, test=test, labels=labels, calibration_labels=training_labels if labelled else None
    )


def _decode(path: Path, limit: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(path) as archive:
        jpeg, offset, label = archive["jpeg"], archive["offset"], archive["label"]
    count = len(label) if limit is None else min(limit, len(label))
    pixels = np.stack(
        [np.asarray(Image.open(io.BytesIO(jpeg[offset[i] : offset[i + 1]].tobytes()))) for i in range(count)]
    )
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return ((images - mean) / std).contiguous(), torch.from_numpy(label[:count])


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x if self.stride == 1 else F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + shortcut)


class CifarResNet(nn.Module):
    """He et al.'s CIFAR ResNet with parameter-free shortcuts; `blocks` per stage: 3 is ResNet-20, 9 is ResNet-56."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(blocks)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), *(Block(32, 32, 1) for _ in range(blocks - 1)))
        self.layer3 = nn.Sequential(Block(32, 64, 2), *(Block(64, 64, 1) for _ in range(blocks - 1)))
        self.linear = nn.Linear(64, 10)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(self.features(x).mean((2, 3)))
        return result


def load_resnet(folder: Path, name: str) -> CifarResNet:
    net = CifarResNet({"resnet20": 3, "resnet56": 9}[name])
    net.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
    return net.eval()


def onnx_accuracy(
    model: bytes, data: Cifar, batch: int = 100, *, fused: bool = True, count: int | None = None
) -> float:
    """Top-1 in percent on all test images, or the first `count`, run by ONNX Runtime on one thread: as deployed, or as
    ONNX defines the operators, where nothing is fused."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name, correct = session.get_inputs()[0].name, 0
    count = min(len(data.labels), count or len(data.labels))
    for i in range(0, count, batch):
        rows = slice(i, min(i + batch, count))
        logits = session.run(None, {name: data.test[rows].numpy()})[0]
        correct += int((logits.argmax(1) == data.labels[rows].numpy()).sum())
    return 100 * correct / count


@torch.no_grad()
def accuracy(module: nn.Module, data: Cifar, batch: int = 250) -> float:
    """Top-1 in percent on all test images."""
    correct = sum(
        int((module(data.test[i : i + batch]).argmax(1) == data.labels[i : i + batch]).sum())
        for i in range(0, len(data.labels), batch)
    )
    return 100 * correct / len(data.labels)
