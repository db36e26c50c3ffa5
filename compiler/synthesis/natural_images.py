"""Images that are nobody's: dead leaves, which have the edges, the spectrum and the colours of photographs.

Discs and bars of random sizes cover each other (their sizes follow a power law, which is what makes the spectrum fall
as that of photographs does; Lee, Mumford and Huang 2001), each of one colour with a ramp and some texture of its own.
Colours vary together, most in brightness. Nothing of any data set goes into them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

#: How much red, green and blue vary along brightness, yellow to blue and green to magenta.
_COLOUR_AXES = ((0.58, 0.58, 0.58), (0.71, 0.0, -0.71), (0.41, -0.82, 0.41))
_COLOUR_SCALES = (1.0, 0.30, 0.16)
#: Sizes of leaves, as shares of the image's side, and the power by which small ones are more frequent.
_SMALLEST, _LARGEST, _POWER = 0.04, 0.7, 2.2
#: Leaves of one image; what they leave is the ground, a slow ramp.
_LEAVES = 90
#: How strong the texture of a leaf is, beside the spread of colours.
_TEXTURE = 0.25


@dataclass(frozen=True)
class ImageForm:
    """Channels, height and width of an image."""

    channels: int
    height: int
    width: int


def dead_leaves(count: int, form: ImageForm, generator: torch.Generator) -> torch.Tensor:
    """So many images (count, channels, height, width), float32; each channel has mean 0 and standard deviation 1 over
    all of them together, within rounding. The generator alone decides what is on them."""
    images = torch.stack([_image(form, generator) for _ in range(count)])
    mean = images.mean((0, 2, 3), keepdim=True)
    return (images - mean) / images.std((0, 2, 3), keepdim=True).clamp_min(1e-6)


def _image(form: ImageForm, generator: torch.Generator) -> torch.Tensor:
    """One image, leaves from the lowest to the highest."""
    side = min(form.height, form.width)
    rows = torch.arange(form.height, dtype=torch.float32).view(-1, 1) / side
    columns = torch.arange(form.width, dtype=torch.float32).view(1, -1) / side
    contrast = float(torch.empty(()).uniform_(0.5, 1.3, generator=generator))
    light = _colours(1, form.channels, generator)[0] * 0.7
    noise = _spectral_noise(form, generator)
    draws = torch.rand(_LEAVES, 9, generator=generator, dtype=torch.float32)
    colours = _colours(_LEAVES + 1, form.channels, generator)
    image = light.view(-1, 1, 1) + contrast * (_ramp(draws[0], rows, columns) + colours[-1].view(-1, 1, 1))
    image = image + contrast * _TEXTURE * noise
    low, high = _SMALLEST ** (1 - _POWER), _LARGEST ** (1 - _POWER)
    for draw, colour in zip(draws, colours, strict=False):
        size = float(low + draw[0] * (high - low)) ** (1 / (1 - _POWER))
        inside = _inside(draw, size, (rows, columns))
        texture = _TEXTURE * float(draw[7]) * 2 * noise
        leaf = light.view(-1, 1, 1) + contrast * (colour.view(-1, 1, 1) + _ramp(draw, rows, columns) + texture)
        image = torch.lerp(image, leaf, inside)
    return image


def _inside(draw: torch.Tensor, size: float, places: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """How much of each pixel a leaf covers: a disc or a bar, turned by any angle, with an edge of about a pixel, or of
    several where it is out of focus."""
    rows, columns = places
    height, width = len(rows), columns.shape[1]
    side = min(height, width)
    y, x = rows - draw[1] * height / side, columns - draw[2] * width / side
    angle = float(draw[3]) * math.pi
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    ratio = 0.3 + 0.7 * float(draw[4])
    if draw[5] < 0.5:
        distance = (along.square() + (across / ratio).square()).sqrt() - size / 2
    else:
        distance = torch.maximum(along.abs(), across.abs() / ratio) - size / 2
    softness = (1.0 + 6.0 * float(draw[6]) ** 4 * side / 64) / side
    return (0.5 - distance / softness).clamp(0, 1)


def _ramp(draw: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """A slow change of brightness in some direction, as light makes it."""
    angle = float(draw[8]) * 2 * math.pi
    return 0.5 * float(draw[7]) * ((columns - 0.5) * math.cos(angle) + (rows - 0.5) * math.sin(angle))


def _colours(count: int, channels: int, generator: torch.Generator) -> torch.Tensor:
    """Random colours: three channels as light has them, any other number with one part that all share."""
    if channels == 3:
        scales, axes = (torch.tensor(values, dtype=torch.float32) for values in (_COLOUR_SCALES, _COLOUR_AXES))
        return torch.randn(count, 3, generator=generator, dtype=torch.float32) * scales @ axes
    shared = torch.randn(count, 1, generator=generator, dtype=torch.float32)
    return 0.9 * shared + 0.45 * torch.randn(count, channels, generator=generator, dtype=torch.float32)


def _spectral_noise(form: ImageForm, generator: torch.Generator) -> torch.Tensor:
    """Noise whose amplitude falls as one over the frequency, with the colours of images; about standard deviation 1."""
    white = _colours(form.height * form.width, form.channels, generator)
    white = white.T.reshape(form.channels, form.height, form.width)
    rows = torch.fft.fftfreq(form.height, dtype=torch.float32).view(-1, 1)
    columns = torch.fft.rfftfreq(form.width, dtype=torch.float32).view(1, -1)
    falling = 1 / (rows.square() + columns.square()).sqrt().clamp_min(1 / max(form.height, form.width))
    noise = torch.fft.irfft2(torch.fft.rfft2(white) * falling, s=(form.height, form.width))
    return noise / noise.std().clamp_min(1e-6)
