"""The network whose latency is the unit of times: measurements of today and of next week are compared through it."""

from __future__ import annotations

from functools import cache

from .layered_model import layered_model

_CHANNELS, _SIZE, _LAYERS = 64, 28, 3


@cache
def reference_network() -> bytes:
    """Three 3x3 convolutions of 64 channels on 28x28 values, batch 1: 87 million multiply-accumulates.

    What slows the machine (another process, a lower clock) slows it like the network beside it, so times as
    multiples of its time repeat where milliseconds do not.
    """
    kernels = [([_CHANNELS, _CHANNELS, 3, 3], {"pads": [1, 1, 1, 1]})] * _LAYERS
    model = layered_model("Conv", kernels, [1, _CHANNELS, _SIZE, _SIZE], deviation=0.04, last_relu=True)
    return bytes(model.SerializeToString())
