"""Crops of large inputs: a network that takes images of any size can be trained on parts of them, at a part of the
work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ...compiler.data.calibration_set import CalibrationSet
from ...compiler.ir.execute import bind, required, run_until
from ...compiler.ir.program import Batch, Program, data_inputs, is_call, is_tensor

aten = torch.ops.aten

#: A crop has so many steps of the coarsest feature map each way, and so many pixels, at least.
LEAST_STEPS, LEAST_PIXELS = 4, 64
#: A crop shows at most this share of an image: beyond there is little to save.
MOST_SHARE = 0.7
#: So far may mean squares of features on crops be from those on whole images, relative to these; how many images are
#: looked at, and how many crops of each at most.
TOLERANCE, LOOKED_AT, MOST_EACH = 0.1, 8, 16

#: What changes the size of a map by a step.
_WINDOWS = (aten.conv2d, aten.convolution, aten.max_pool2d, aten.avg_pool2d)
#: What relates places of a map to each other over any distance: on a part of the image it is something else.
_GLOBAL = (aten.scaled_dot_product_attention, aten.matmul, aten.bmm, aten.mm, aten.baddbmm, aten.einsum)

#: Mean squares of what is compared, on a batch.
MeanSquares = Callable[[Batch], list[float]]
Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Crop:
    """The size (height, width) of crops, and of what they are cut from."""

    size: Size
    whole: Size

    @property
    def share(self) -> float:
        """The share of an image that one shows."""
        return math.prod(self.size) / math.prod(self.whole)

    def __str__(self) -> str:
        (height, width), (whole_height, whole_width) = self.size, self.whole
        return f"crops of {height} x {width} of {whole_height} x {whole_width}"

    def cut(self, batch: Batch, generator: torch.Generator) -> Batch:
        """A part of each sample, at a place of its own; the same place in each input that has these places."""
        leaves, spec = pytree.tree_flatten(batch)
        count = next(len(leaf) for leaf in leaves if self._has_places(leaf))
        tops, lefts = (
            torch.randint(whole - size + 1, (count,), generator=generator).tolist()
            for size, whole in zip(self.size, self.whole, strict=True)
        )
        height, width = self.size
        for index, leaf in enumerate(leaves):
            if self._has_places(leaf):
                parts = [
                    sample[..., y : y + height, x : x + width] for sample, y, x in zip(leaf, tops, lefts, strict=True)
                ]
                leaves[index] = torch.stack(parts)
        result: Batch = pytree.tree_unflatten(leaves, spec)
        return result

    def _has_places(self, leaf: object) -> bool:
        return isinstance(leaf, torch.Tensor) and leaf.dim() == 4 and tuple(leaf.shape[2:]) == self.whole


@dataclass(frozen=True, kw_only=True)
class Read:
    """A network and what is read of it, by node name."""

    program: Program
    names: Sequence[str]


def find_crop(
    networks: Sequence[Read], samples: CalibrationSet, share: float, mean_squares: MeanSquares
) -> Crop | None:
    """Crops that show such a share of each image; larger ones where features of those are others than on whole images,
    or where that is too small for the network. None where the networks do not take parts of images, or where nothing
    would be saved."""
    whole = image_size(samples)
    if whole is None:
        return None
    step = math.lcm(*(step_of(network, whole) for network in networks))
    crops = list(_sizes(whole, step, share))
    if not crops:
        return None
    generator = torch.Generator().manual_seed(0)
    least = next(_sizes(whole, step, 0.0)).cut(samples.batch(slice(0, 2)), generator)
    if not all(takes_parts(network, samples.batch(slice(0, 2)), least) for network in networks):
        return None
    looked_at = samples.batch(slice(0, LOOKED_AT))
    wanted = mean_squares(looked_at)
    for crop in crops:
        each = min(MOST_EACH, math.ceil(1 / crop.share))
        found = [mean_squares(crop.cut(looked_at, generator)) for _ in range(each)]
        means = [sum(column) / each for column in zip(*found, strict=True)]
        if all(
            abs(mean - whole_mean) <= TOLERANCE * whole_mean for mean, whole_mean in zip(means, wanted, strict=True)
        ):
            return crop
    return None


def image_size(samples: CalibrationSet) -> Size | None:
    """Height and width of the images; None where there are none, or some of several sizes."""
    sizes = {(int(leaf.shape[2]), int(leaf.shape[3])) for leaf in samples.leaves if leaf.dim() == 4}
    return sizes.pop() if len(sizes) == 1 else None


def step_of(network: Read, whole: Size) -> int:
    """A number of pixels that every map of the network has a whole number of places for."""
    steps = {1}
    for name in required(network.program, network.names, set()):
        node = network.program.nodes[name]
        if is_call(node, *_WINDOWS) and is_tensor(node):
            places = network.program.shape(node)[2:]
            if math.prod(places) > 1:
                steps |= {max(1, round(w / p)) for w, p in zip(whole, places, strict=False)}
    return math.lcm(*steps)


def takes_parts(network: Read, samples: Batch, parts: Batch) -> bool:
    """Whether a network computes of parts of images what it computes of whole ones, place by place: whether it runs,
    each map keeps its relation to the image, and none loses it but by pooling over all places."""
    program = network.program
    nodes = [program.nodes[name] for name in required(program, network.names, set())]
    if any(is_call(node, *_GLOBAL) and len(data_inputs(node)) > 1 for node in nodes):
        return False
    (whole, count), (size, _) = _image(samples), _image(parts)
    try:
        with torch.no_grad():
            values = run_until(program, network.names, bind(program, parts), free=False)
    except Exception:  # sizes that are frozen into the graph: an operator raises whatever it raises
        return False
    changed: set[fx.Node] = set()
    for node in (n for n in program.nodes.values() if n.name in values and is_tensor(n)):
        before, after = program.shape(node, count), tuple(values[node.name].shape)
        if before == after:
            pooled = len(before) < 3 or math.prod(before[2:]) == 1
            if not pooled and any(operand in changed for operand in node.all_input_nodes):
                return False
            continue
        changed.add(node)
        if len(before) != len(after) or not all(
            b == a or _keeps_relation(b, a, whole, size) for b, a in zip(before, after, strict=True)
        ):
            return False
    return True


def _image(batch: Batch) -> tuple[Size, int]:
    """The size of the images of a batch, and their number."""
    shape = next(leaf.shape for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim() == 4)
    return (int(shape[2]), int(shape[3])), int(shape[0])


def _keeps_relation(before: int, after: int, whole: Size, size: Size) -> bool:
    """Whether a dimension follows height, width, or the number of places."""
    if before * math.prod(size) == after * math.prod(whole):
        return True
    return any(_follows(before, after, w, s) for w, s in zip(whole, size, strict=True))


def _follows(before: int, after: int, whole: int, size: int) -> bool:
    if before >= whole:
        times = round(before / whole)
        return after - times * size == before - times * whole
    step = round(whole / before)
    return abs((after * step - size) - (before * step - whole)) < step


def _sizes(whole: Size, step: int, share: float) -> Iterator[Crop]:
    """Crops from one that shows a share of an image on, each about twice as large as the one before."""
    largest = [n - n % step for n in whole]
    least = max(LEAST_STEPS, math.ceil(LEAST_PIXELS / step)) * step
    if min(largest) < step:
        return
    while True:
        side = math.sqrt(share)
        height, width = (
            min(most, max(least, math.floor(n * side / step) * step)) for n, most in zip(whole, largest, strict=True)
        )
        crop = Crop(size=(height, width), whole=whole)
        if crop.share > MOST_SHARE:
            return
        yield crop
        share = 2 * max(share, crop.share)
