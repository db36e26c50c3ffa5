"""torchvision and timm without their compiled operators: declare the few that their Python code names, then import
works."""

from __future__ import annotations

from functools import cache

import torch

_LIBRARY = torch.library.Library("torchvision", "DEF")


@cache
def declare_torchvision_ops() -> None:
    """Call once before importing torchvision or timm where torchvision has no build for the installed torch."""
    for name in ("nms", "qnms"):
        _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
