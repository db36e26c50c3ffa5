"""Networks and images of the block-dropping runs of papers.py: a network's own images, and those of other domains."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import foldcut
import numpy as np
import torch
from cifar_data import MEAN, STD, Cifar, CifarResNet, load_cifar, load_resnet
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.ir.program import Program
from foldcut.runtime.measure.backend import resolve_backend
from foldcut.runtime.measure.conditions import Conditions
from foldcut.runtime.probe.latency_probe import LatencyProbe
from imagenet_data import TEST, load_imagenet
from papers_run import Options, percent, predicted
from torch.nn import functional as F

#: Calibration images of one seed begin so many behind those of the seed before.
STRIDE = 500
SIZES = {"resnet20": 32, "resnet56": 32, "mobilenetv2": 224}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network to compress: as a program, as a file, and (the CIFAR ones) as a module; its probe, and images with
    labels that nothing is calibrated with, with what the network itself says of them."""

    name: str
    program: Program
    module: CifarResNet | None
    probe: LatencyProbe
    test: torch.Tensor
    labels: torch.Tensor
    said: torch.Tensor

    @property
    def top1(self) -> float:
        return percent(self.said, self.labels)

    def judged(self, classes: torch.Tensor) -> dict[str, float]:
        """Top-1 of what a student says, and how often it agrees with the original."""
        return {"top1": percent(classes, self.labels), "agreement": percent(classes, self.said)}


@functools.lru_cache(maxsize=1)
def subject(name: str, seed: int, options: Options) -> Subject:
    """A network with its test images. For ImageNet, of which there are 700, the seed says which 400 those are."""
    if name == "mobilenetv2":
        path = options.models / "mobilenetv2.onnx"
        order = imagenet_order(seed)[-TEST:][: 24 if options.quick else None]
        pixels, labels = imagenet(options.data)
        example, test, labels = pixels[:2], pixels[order], labels[order]
        model: Any = str(path)
        module = None
    else:
        data = cifar(options.data, STRIDE, 500 if options.quick else None)
        model = module = load_resnet(options.models, name)
        example, test, labels = data.calibration[:2], data.test, data.labels
    program = foldcut.capture(model, example)
    original = Path(model).read_bytes() if module is None else to_onnx(program)
    probe = LatencyProbe(
        program,
        original,
        resolve_backend("onnxruntime"),
        CalibrationSet.of(example[:1]),
        Conditions(seed=seed),
    )
    said = predicted(original, test)
    return Subject(name=name, program=program, module=module, probe=probe, test=test, labels=labels, said=said)


@functools.lru_cache(maxsize=2)
def cifar(folder: Path, samples: int, test: int | None, labelled: bool = False) -> Cifar:
    """CIFAR-10, kept while the process lives."""
    return load_cifar(folder, samples, test, labelled=labelled)


@functools.lru_cache(maxsize=1)
def imagenet(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All 700 images and labels."""
    data = load_imagenet(folder, 700 - TEST)
    with np.load(folder / "imagenet700.npz") as archive:
        labels = torch.from_numpy(archive["label"].astype(np.int64))
    return torch.cat([data.calibration, data.test]), labels


def imagenet_order(seed: int) -> torch.Tensor:
    """Which images calibrate (the first) and test (the last): seed 0 is the order of the file."""
    return torch.arange(700) if seed == 0 else torch.randperm(700, generator=torch.Generator().manual_seed(seed))


def calibration(network: str, source: str, count: int, seed: int, options: Options) -> torch.Tensor:
    """So many images of a source for a network, other ones for each seed."""
    size, first = SIZES[network], seed * STRIDE
    if source == "synthetic":
        return _of_file(options.synthetic, "images for the network, as `foldcut synthesise` writes them", count, size)
    if source == "noise":
        return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    if source == "digits":
        return digits32(options.digits, count, seed)
    if source == "imagenet":
        pixels, order = imagenet(options.data)[0], imagenet_order(seed)
        chosen = pixels[order[:count]]
        return chosen if size == 224 else F.interpolate(chosen, size=(size, size), mode="area")
    images = cifar(options.data, first + max(count, STRIDE), 500 if options.quick else None).calibration
    chosen = images[first : first + count]
    return chosen if size == 32 else F.interpolate(chosen, size=(size, size), mode="bilinear", align_corners=False)


def _of_file(path: Path | None, what: str, count: int, size: int) -> torch.Tensor:
    if path is None:
        raise ValueError(f"give --synthetic PATH: an .npz of {what}")
    with np.load(path) as archive:
        images = torch.from_numpy(np.asarray(archive[archive.files[0]], np.float32))
    if images.shape[1:] != (3, size, size) or len(images) < count:
        raise ValueError(f"{path} has {tuple(images.shape)}, not at least {count} of (3, {size}, {size})")
    return images[:count]


def digits(path: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Grey images (n, height, width) from 0 to 1 and labels, in one seeded order: of a file, or scikit-learn's 1,797
    of 8 x 8 (in the `bench` extra)."""
    if path is not None:
        with np.load(path) as archive:
            pixels, labels = archive["images"].astype(np.float32), archive["labels"].astype(np.int64)
        pixels = pixels / max(float(pixels.max()), 1e-9)
    else:
        from sklearn.datasets import load_digits

        found = load_digits()
        pixels, labels = found.images.astype(np.float32) / 16, found.target.astype(np.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(pixels)[order], torch.from_numpy(labels)[order]


def digits32(path: Path | None, count: int, seed: int) -> torch.Tensor:
    """Digits as a CIFAR network takes images: 32 x 32, three equal colours, normalised as CIFAR is."""
    pixels, _ = digits(path)
    chosen = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))[:count]].unsqueeze(1)
    wide = F.interpolate(chosen, size=(32, 32), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return ((wide - mean) / std).contiguous()
