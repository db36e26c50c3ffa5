"""A picture of samples that were made without data, for people to look at."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from ..data.calibration_set import CalibrationSet

#: Images on a sheet and in a row, and pixels of the longer side of each: small ones are enlarged, pixel by pixel.
_IMAGES, _COLUMNS, _SIDE = 32, 8, 96
#: Pixels between images.
_GAP = 4
#: Shares of all numbers that are below black and below white.
_BLACK, _WHITE = 0.01, 0.99


def contact_sheet(images: torch.Tensor, count: int = _IMAGES) -> bytes:
    """The first so many images (n, channels, height, width) as a PNG; numbers of any range, as all images have them."""
    images = images[:count].float()
    channels = images.shape[1]
    if channels not in (1, 3):
        images = images[:, :3] if channels > 3 else images[:, :1]
    # quantiles of a sample: they need not be exact
    some = images.flatten()[:: max(1, images.numel() // 1_000_000)]
    low, high = (float(some.quantile(share)) for share in (_BLACK, _WHITE))
    pixels = ((images - low) / max(high - low, 1e-12)).clamp(0, 1).mul(255).round().byte()
    tiles = [_tile(one) for one in pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3)]
    width, height = tiles[0].size
    columns = min(_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), "white")
    for place, tile in enumerate(tiles):
        row, column = divmod(place, columns)
        sheet.paste(tile, (column * (width + _GAP), row * (height + _GAP)))
    content = io.BytesIO()
    sheet.save(content, "PNG", optimize=True)
    return content.getvalue()


def images_among(samples: CalibrationSet) -> torch.Tensor | None:
    """The first input of images, channels first; None where there is none."""
    for leaf in samples.leaves:
        if leaf.dim() == 4 and leaf.is_floating_point():
            for images in (leaf, leaf.permute(0, 3, 1, 2)):
                if images.shape[1] <= 4 and min(images.shape[2:]) >= 8:
                    return images
    return None


def with_picture(made: Mapping[str, Any] | None, samples: CalibrationSet) -> dict[str, Any]:
    """What a report says about samples that were made: how, and a picture of the first ones as a data URI; nothing
    where they are data."""
    if made is None:
        return {}
    images = images_among(samples)
    picture = None
    if images is not None:
        picture = "data:image/png;base64," + base64.b64encode(contact_sheet(images)).decode()
    return {"synthetic": {**made, "picture": picture}}


def _tile(pixels: torch.Tensor) -> Image.Image:
    """One image of the size that it has on the sheet."""
    image = Image.fromarray(pixels.contiguous().numpy())
    scale = _SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)
