"""Images and labels of ImageNet from a JPEG archive: the first so many to calibrate with, the last to test on."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from cifar_data import MEAN, STD, Cifar
from PIL import Image

#: Images that nothing is calibrated with.
TEST = 400


def load_imagenet(folder: Path, samples: int) -> Cifar:
    """The middle 224 x 224 pixels of `samples` images, and of the last `TEST` ones with their labels."""
    with np.load(folder / "imagenet700.npz") as archive:
        jpeg, offset, label = archive["jpeg"], archive["offset"], archive["label"]
    first = len(label) - TEST
    if samples > first:
        raise SystemExit(f"there are {first} images to calibrate with")
    calibration, test = (
        torch.stack([_decoded(jpeg[offset[i] : offset[i + 1]].tobytes()) for i in places])
        for places in (range(samples), range(first, len(label)))
    )
    return Cifar(calibration=calibration, test=test, labels=torch.from_numpy(label[first:].astype(np.int64)))


def _decoded(content: bytes) -> torch.Tensor:
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    top, left = (pixels.shape[0] - 224) // 2, (pixels.shape[1] - 224) // 2
    image = torch.from_numpy(pixels[top : top + 224, left : left + 224].copy()).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (image - mean) / std
