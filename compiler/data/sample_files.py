"""Files of samples: arrays of numbers, and folders of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..archives.archive_check import check_extents, check_pickled_file
from ..support.errors import CalibrationError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})


def check_options(
    path: Path,
    key: str | None,
    size: Sequence[int] | None,
    normalising: Mapping[str, Sequence[float] | None],
    limit: int | None,
) -> None:
    """Raise CalibrationError for what is out of range, and for what says nothing about a file of this kind: an option
    that is left aside in silence looks as if it had been heeded."""
    check_limit(limit)
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise CalibrationError("size is the height and the width in pixels, from 1 on", actual=size)
    for name, numbers in normalising.items():
        if numbers is not None and len(numbers) != 3:
            raise CalibrationError(f"{name} is three numbers, one per channel", actual=numbers)
    if key is not None and path.suffix not in (".npz", ".pt"):
        raise CalibrationError(
            f"key names an array of an .npz or an entry of a .pt file, and {path.name} has none",
            hint="leave key (--key) out",
        )
    given = [name for name, value in {"size": size, **normalising}.items() if value is not None]
    if given and not path.is_dir():
        raise CalibrationError(
            f"{' and '.join(given)}: for folders of images only, and {path.name} is none",
            hint=f"resize and normalise the arrays themselves as in training, and leave {' and '.join(given)} out",
        )


def check_limit(limit: int | None) -> None:
    """Raise CalibrationError for what is no number of samples."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, Integral) or limit < 1):
        raise CalibrationError(
            "limit is a whole number from 1 on", actual=limit, hint="leave it out to take all samples"
        )


def read_arrays(path: Path, key: str | None) -> Any:
    """What a `.npy`, `.npz` or `.pt` file holds: an array, or arrays by name. Raises CalibrationError. No pickled
    objects are loaded."""
    check_pickled_file(path, CalibrationError)
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:  # np.load would take an archive of this name as well
                return np.lib.format.read_array(file, allow_pickle=False)
        return _read_npz(path, key) if path.suffix == ".npz" else _read_pt(path, key)
    except CalibrationError:
        raise
    except Exception as cause:  # a damaged file raises whatever its reader raises
        raise CalibrationError(
            f"cannot read {path}: {cause}", hint="arrays of numbers only; pickled objects are not loaded"
        ) from cause


def _read_npz(path: Path, key: str | None) -> Any:
    with np.load(path, allow_pickle=False) as archive:
        if key is not None:
            _check_key(path, key, archive.files)
            return archive[key]
        arrays = {name: archive[name] for name in archive.files}
    return next(iter(arrays.values())) if len(arrays) == 1 else arrays


def _read_pt(path: Path, key: str | None) -> Any:
    data = torch.load(path, weights_only=True, map_location="cpu")
    check_extents(data, CalibrationError)
    if key is None:
        return data
    if not isinstance(data, dict):
        raise CalibrationError(
            f"{path.name} has no entries to choose {key!r} from",
            expected="a dict",
            actual=f"a {type(data).__name__}",
            hint="leave key (--key) out",
        )
    _check_key(path, key, list(data))
    return data[key]


def _check_key(path: Path, key: str, names: Sequence[object]) -> None:
    if key not in names:
        raise CalibrationError(
            f"{path.name} has no entry {key!r}",
            expected=f"one of {', '.join(map(str, names))}",
            actual=key,
            hint="give one of these as key (--key), or leave it out to take all as inputs by name",
        )


def read_shards(files: Sequence[Path], key: str | None) -> Iterator[Any]:
    """The samples of one file after another. Raises CalibrationError."""
    return (read_arrays(file, key) for file in files)


def read_images(
    folder: Path,
    size: tuple[int, int] | None,
    mean: Sequence[float],
    std: Sequence[float],
    limit: int | None,
    seed: int = 0,
) -> torch.Tensor:
    """The images in a folder, by path, as (N, 3, H, W) in [0, 1] less `mean` over `std`: all, or a seeded random choice
    of `limit`. Raises CalibrationError."""
    from PIL import Image, UnidentifiedImageError

    files = _chosen(sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES), limit, seed)
    if not files:
        raise CalibrationError(f"no images in {folder}", expected=", ".join(sorted(IMAGE_SUFFIXES)))
    shift, scale = (torch.tensor(list(v)).view(3, 1, 1) for v in (mean, std))
    samples = []
    for file in files:
        try:
            with Image.open(file) as image:
                rgb = image.convert("RGB")
                rgb = rgb.resize((size[1], size[0]), Image.Resampling.BILINEAR) if size else rgb
                pixels = torch.from_numpy(np.asarray(rgb).copy()).permute(2, 0, 1).float() / 255
        except (UnidentifiedImageError, OSError) as cause:
            raise CalibrationError(f"cannot read image {file}: {cause}", hint="remove or replace the file") from cause
        samples.append((pixels - shift) / scale)
    if len({s.shape for s in samples}) > 1:
        raise CalibrationError("the images differ in size", hint="give --size H,W (size=(h, w)) to resize them")
    return torch.stack(samples)


def _chosen(files: list[Path], limit: int | None, seed: int) -> list[Path]:
    """So many of all files, in their order; the first so many would often be of one class. What is left out is never
    decoded."""
    if limit is None or limit >= len(files):
        return files
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:limit]
    return [files[index] for index in sorted(order.tolist())]
