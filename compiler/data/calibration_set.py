"""The calibration set: a few hundred unlabelled inputs, checked once and read in batches by every pass."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..ir.execute import widened_inputs
from ..ir.program import Batch, Program, TensorSpec, dtype_name
from ..support.errors import CalibrationError, CaptureError, plural
from .input_binding import ForwardInputs
from .sample_files import check_limit, check_options, read_arrays, read_images, read_shards
from .sample_kinds import check_samples
from .sample_paths import check_readable, shard_files
from .sample_reading import check_counts, content_digests, drawing_keys, read_data

#: What a user may pass: one batch with all samples, a folder, a file, or anything that yields batches.
CalibrationData = Any

#: A change of a whole batch that the task does not care about, sample by sample, such as `horizontal_flip`.
View = Callable[[Batch], Batch]


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationSet:
    """The calibration samples, one tensor per input of the network. Inputs only, no labels and no activations.

    Arguments:
        leaves: Tensor i holds input i of all samples along dimension 0.
        spec: Structure of a batch: a tensor, a tuple or a dict.
        sources: Which samples are views of the same sample, by a number for each. None if all are samples of their
            own.
        ignored: Descriptions of the fields that were left out, such as labels.
        bound: Whether the fields were matched with the inputs of a network.

    Example:
        >>> samples = foldcut.CalibrationSet.of(torch.randn(100, 3, 8, 8))
        >>> len(samples), [len(part) for part in samples.split(seed=0)]
        (100, [90, 10])
    """

    leaves: tuple[torch.Tensor, ...]
    spec: pytree.TreeSpec
    sources: torch.Tensor | None = None
    #: The fields that were left out, in words, and whether those that are here were bound to a network's inputs.
    ignored: tuple[str, ...] = ()
    bound: bool = False

    def __len__(self) -> int:
        return int(self.leaves[0].shape[0])

    def take(self, indices: torch.Tensor | slice) -> CalibrationSet:
        """The samples at the positions `indices`."""
        sources = None if self.sources is None else self.sources[indices]
        return replace(self, leaves=tuple(leaf[indices] for leaf in self.leaves), sources=sources)

    def batch(self, indices: torch.Tensor | slice) -> Batch:
        """The samples at the positions `indices`, in the structure that the model takes."""
        result: Batch = pytree.tree_unflatten([leaf[indices] for leaf in self.leaves], self.spec)
        return result

    def batches(self, size: int) -> Iterator[Batch]:
        """Iterate over all samples in order, `size` at a time. The last batch may be smaller."""
        yield from (self.batch(slice(start, start + size)) for start in range(0, len(self), size))

    def with_views(self, views: Sequence[View]) -> CalibrationSet:
        """The samples, followed by each of the `views` of them."""
        parts = [self, *(view_of(self, view) for view in views)]
        columns = zip(*(part.leaves for part in parts), strict=True)
        sources = torch.arange(len(self), device="cpu") if self.sources is None else self.sources
        return replace(
            self,
            leaves=tuple(torch.cat(column) for column in columns),
            sources=sources.repeat(len(parts)) if views else self.sources,
        )

    def views_together(self) -> CalibrationSet:
        """The same samples, ordered so that each is followed by its views."""
        if self.sources is None or bool((self.sources.diff() >= 0).all()):
            return self
        return self.take(self.sources.argsort(stable=True))

    @property
    def most_views(self) -> int:
        """The largest number of samples that are views of one, that one included."""
        return 1 if self.sources is None else int(self.sources.bincount().max())

    def drawn(self, count: int, seed: int) -> CalibrationSet:
        """A random choice of `count` samples with their views, in the present order. It depends on `seed` and on the
        contents, not on the order. All samples if there are no more."""
        sources = torch.arange(len(self), device="cpu") if self.sources is None else self.sources
        firsts: dict[int, int] = {}
        for position, source in enumerate(sources.tolist()):
            firsts.setdefault(source, position)
        if count >= len(firsts):
            return self
        own = torch.tensor(list(firsts.values()), dtype=torch.long, device="cpu")
        keys = list(drawing_keys([leaf[own] for leaf in self.leaves], seed, Counter()))
        chosen = own[sorted(range(len(keys)), key=keys.__getitem__)[:count]]
        return self.take(torch.isin(sources, sources[chosen]).nonzero().flatten())

    def split(self, seed: int, fraction: float = 0.1, most: int = 64) -> tuple[CalibrationSet, CalibrationSet]:
        """Split at random into samples to fit and held-out samples. The order of the samples makes no difference.

        Arguments:
            seed: Seed of the permutation.
            fraction: Share to hold out, at least one sample.
            most: Largest number of samples to hold out.

        Returns:
            (samples to fit, held-out samples), both in random order. A single sample is on both sides.
        """
        count = min(most, len(self) - 1, max(1, round(len(self) * fraction)))
        if len(self) < 2:
            return self, self
        order = self.content_order[
            torch.randperm(len(self), generator=torch.Generator().manual_seed(seed), device="cpu")
        ]
        return self.take(order[count:]), self.take(order[:count])

    @cached_property
    def digests(self) -> Sequence[bytes]:
        """A hash of the contents of each sample."""
        return content_digests(self.leaves)

    @cached_property
    def content_order(self) -> torch.Tensor:
        """Positions of the samples, sorted by the hash of their contents."""
        return torch.tensor(sorted(range(len(self)), key=self.digests.__getitem__), dtype=torch.long, device="cpu")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all samples."""
        digest = hashlib.blake2b(digest_size=16)
        for leaf in self.leaves:
            digest.update(f"{leaf.dtype}{list(leaf.shape)}".encode())
            digest.update(leaf.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def aligned(self, program: Program) -> CalibrationSet:
        """The samples with the inputs in the order and structure of `program`; keywords may come in any order. Those in
        half precision become float32 where it takes that: networks in half precision are worked on in float32.

        Raises:
            CalibrationError: If the samples do not have its inputs.
        """
        try:
            leaves = program.flatten(self.batch(slice(None)))
        except (CaptureError, KeyError) as cause:
            raise CalibrationError(
                "the calibration set does not have the network's inputs",
                expected=", ".join(map(str, program.inputs)),
                actual=f"{len(self.leaves)} inputs",
                hint="pass a tuple (or a dict by input name) with one entry for each input",
            ) from cause
        args, kwargs = program.structure(widened_inputs(program, leaves))
        leaves, spec = pytree.tree_flatten(kwargs if kwargs else args if len(args) != 1 else args[0])
        return replace(self, leaves=tuple(leaves), spec=spec)

    @classmethod
    def of(
        cls,
        data: CalibrationData,
        *,
        inputs: ForwardInputs | int | Sequence[str] | None = None,
        limit: int | None = None,
        seed: int = 0,
    ) -> CalibrationSet:
        """Read a calibration set.

        Arguments:
            data: A tensor or array with all samples along dimension 0, a tuple or dict of them for several inputs, or
                an iterable of batches or of single samples: a DataLoader, a generator, a list, a data set.
            inputs: The inputs of the network: their names or their number. Other fields, such as labels, are left
                out. If None, the last field of a pair from an iterable counts as the label.
            limit: Number of samples to keep, chosen at random. Of an iterable with more than 4 GiB, a random choice
                of about that size is kept in any case.
            seed: Seed of the choice.

        Returns:
            The checked `CalibrationSet`.

        Raises:
            CalibrationError: If the data are empty, ragged, not numeric or not finite, or `limit` is not a positive
                int.
        """
        check_limit(limit)
        known = ForwardInputs.of(inputs)
        if isinstance(data, CalibrationSet):
            data = data if limit is None else data.drawn(limit, seed)
            if known is None or data.bound:
                return data
            new = cls.of(data.batch(slice(None)), inputs=known)
            return replace(data, leaves=new.leaves, spec=new.spec, ignored=data.ignored + new.ignored, bound=new.bound)
        check_samples(data)
        read = read_data(data, known, limit=limit, seed=seed)
        _check_values(read.leaves)
        bound = known is not None and known.named
        return cls(leaves=read.leaves, spec=read.spec, ignored=read.ignored, bound=bound)

    def check(self, program: Program) -> None:
        """Check number, shape and dtype of the inputs against `program`.

        Raises:
            CalibrationError: If they do not fit, or if the network fixes its batch size.
        """
        if len(self.leaves) != len(program.inputs):
            raise CalibrationError(
                "the calibration set has another number of inputs than the network",
                expected=", ".join(map(str, program.inputs)),
                actual=f"{len(self.leaves)} inputs",
                hint="pass a tuple (or dict) with one entry for each input",
            )
        for leaf, spec in zip(self.leaves, program.inputs, strict=True):
            _check_supported(spec)
            fits = leaf.dim() == len(spec.shape) and all(
                isinstance(want, str) or i == 0 or want == have
                for i, (want, have) in enumerate(zip(spec.shape, leaf.shape, strict=True))
            )
            if not fits:
                raise CalibrationError(
                    f"calibration samples have the wrong shape for input {spec.name!r}",
                    expected=spec,
                    actual=f"{dtype_name(leaf.dtype)}{list(leaf.shape)}",
                    hint="resize the inputs as in deployment, channels where the network has them (N, C, H, W)",
                )
            if leaf.dtype != spec.dtype:
                raise CalibrationError(
                    f"calibration samples have the wrong dtype for input {spec.name!r}",
                    expected=dtype_name(spec.dtype),
                    actual=dtype_name(leaf.dtype),
                    hint=f"convert them, say with .to(torch.{dtype_name(spec.dtype)}), and normalise as in training",
                )


def horizontal_flip(batch: Batch) -> Batch:
    """A view for calibration: images mirrored left to right.

    Arguments:
        batch: One batch. Tensors (N, C, H, W) are mirrored along W, all others are returned as they are.

    Returns:
        The batch in the same structure.

    Example:
        >>> foldcut.horizontal_flip(torch.arange(3.0).view(1, 1, 1, 3)).flatten().tolist()
        [2.0, 1.0, 0.0]
    """

    def flip(leaf: Any) -> Any:
        return leaf.flip(-1) if isinstance(leaf, torch.Tensor) and leaf.dim() == 4 else leaf

    result: Batch = pytree.tree_map(flip, batch)
    return result


def random_crop(padding: int, seed: int) -> View:
    """Make a view for calibration: each image shifted at random, and mirrored with probability 1/2.

    Arguments:
        padding: Largest shift in pixels. The border is filled by repeating the edge.
        seed: Seed of shifts and flips. Every call of the view draws the same ones.

    Returns:
        A function of a batch. It changes floating-point tensors (N, C, H, W) and returns all others as they are.

    Example:
        >>> view = foldcut.random_crop(padding=2, seed=0)
        >>> images = torch.randn(4, 3, 8, 8)
        >>> view(images).shape, torch.equal(view(images), view(images))
        (torch.Size([4, 3, 8, 8]), True)
    """

    def crop(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() != 4 or not leaf.is_floating_point():
            return leaf
        generator = torch.Generator().manual_seed(seed)
        height, width = leaf.shape[2:]
        padded = torch.nn.functional.pad(leaf, (padding,) * 4, mode="replicate")
        offsets = torch.randint(0, 2 * padding + 1, (len(leaf), 2), generator=generator).tolist()
        mirrored = torch.randint(0, 2, (len(leaf),), generator=generator).tolist()
        shifted = [padded[i, :, y : y + height, x : x + width] for i, (y, x) in enumerate(offsets)]
        return torch.stack([image.flip(-1) if flip else image for image, flip in zip(shifted, mirrored, strict=True)])

    def view(batch: Batch) -> Batch:
        result: Batch = pytree.tree_map(crop, batch)
        return result

    return view


def view_of(samples: CalibrationSet, view: View) -> CalibrationSet:
    """The samples as the view shows them. Raises CalibrationError when it changes their number, shape or dtype."""
    leaves, spec = pytree.tree_flatten(view(samples.batch(slice(None))))
    same = len(leaves) == len(samples.leaves) and all(
        isinstance(new, torch.Tensor) and new.shape == old.shape and new.dtype == old.dtype
        for new, old in zip(leaves, samples.leaves, strict=False)
    )
    if not same or spec != samples.spec:
        raise CalibrationError(
            "a view changed the number, shape or dtype of the inputs",
            expected=[f"{dtype_name(t.dtype)}{list(t.shape)}" for t in samples.leaves],
            actual=[f"{dtype_name(t.dtype)}{list(t.shape)}" for t in leaves if isinstance(t, torch.Tensor)],
            hint="a view maps a batch to a batch of the same form",
        )
    _check_values(leaves)
    return CalibrationSet(leaves=tuple(leaves), spec=spec)


def read_calibration(
    path: str | Path,
    *,
    key: str | None = None,
    size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> CalibrationSet:
    """Read calibration samples from a ``.npy``, ``.npz`` or ``.pt`` file, or from a folder of such files or of images.

    Images are taken in the order of their paths, converted to RGB, resized, scaled to [0, 1] and normalised:
    ``(pixels - mean) / std``. No pickled objects are loaded.

    Arguments:
        path: The file or folder.
        key: Name of an array of an ``.npz`` or of an entry of a ``.pt`` file. If None, all arrays become inputs by
            name.
        size: (height, width) to resize images to.
        mean: Three numbers, subtracted per channel. 0 if None.
        std: Three numbers, divided by per channel. 1 if None.
        limit: Number of samples to read, chosen at random.
        seed: Seed of the choice.

    Returns:
        The `CalibrationSet`.

    Raises:
        CalibrationError: If the path cannot be read, or an option does not apply to a file of its kind.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(torch.randn(20, 8), pathlib.Path(folder) / "inputs.pt")
        ...     len(foldcut.read_calibration(pathlib.Path(folder) / "inputs.pt", limit=12))
        12
    """
    from .synthetic import marked

    path = Path(path)
    check_readable(path)
    check_options(path, key, size, {"mean": mean, "std": std}, limit)
    if files := shard_files(path):
        return CalibrationSet.of(read_shards(files, key), limit=limit, seed=seed)
    if path.is_dir():
        shift, scale = (0.0,) * 3 if mean is None else mean, (1.0,) * 3 if std is None else std
        return CalibrationSet.of(read_images(path, size, shift, scale, limit, seed))
    return marked(CalibrationSet.of(read_arrays(path, key), limit=limit, seed=seed), path)


def _check_supported(spec: TensorSpec) -> None:
    if not spec.shape or not isinstance(spec.shape[0], str):
        raise CalibrationError(
            f"the network fixes the batch size of input {spec.name!r}",
            expected="a dynamic first dimension",
            actual=spec,
            hint="export it with dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), or pass the module; a loop over the "
            "samples or a view with a constant batch fixes the size",
        )


def _check_values(leaves: Sequence[torch.Tensor]) -> None:
    counts = {leaf.shape[0] if leaf.dim() else 0 for leaf in leaves}
    if not leaves or counts == {0}:
        raise CalibrationError(
            "the calibration set is empty",
            hint="pass at least a few unlabelled inputs; 50 to 1,000 are usual",
        )
    check_counts(leaves)
    for index, leaf in enumerate(leaves):
        if leaf.is_floating_point() and not bool(leaf.isfinite().all()):
            bad = (~leaf.isfinite()).flatten(1).any(1) if leaf.dim() > 1 else ~leaf.isfinite()
            raise CalibrationError(
                f"input {index} holds NaN or infinite values",
                actual=f"{int(bad.sum())} of {plural(leaf.shape[0], 'sample')}, the first at {int(bad.nonzero()[0])}",
                hint="leave those samples out, or correct how they are read",
            )
