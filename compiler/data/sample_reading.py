"""Calibration data in whatever form they come, read into one tensor for each input."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ..ir.program import Batch, dtype_name
from ..support.errors import CalibrationError
from .input_binding import Binding, Example, Fields, ForwardInputs, Key, bind, fields_of

#: What is kept of data that come one after the other; of more, a fair sample of about this size is drawn.
STREAM_BYTES = 4 * 2**30

_EMPTY = "pass at least a few unlabelled inputs; 50 to 1,000 are usual"


@dataclass(frozen=True, kw_only=True)
class ReadSamples:
    """Every input of all samples along dim 0, their structure, and in words the fields that are no inputs."""

    leaves: tuple[torch.Tensor, ...]
    spec: pytree.TreeSpec
    ignored: tuple[str, ...] = ()


def read_data(
    data: Any, inputs: ForwardInputs | None, *, limit: int | None = None, seed: int = 0, most_bytes: int = STREAM_BYTES
) -> ReadSamples:
    """All samples of the data, or a seeded fair sample of `limit`, or of about `most_bytes` where they come one after
    the other and are more. Raises CalibrationError."""
    items, rows = _items(data)
    first = list(itertools.islice(items, 2))
    if not first or (isinstance(first[0], (Mapping, tuple, list)) and not first[0]):
        raise CalibrationError("the calibration set is empty", hint=_EMPTY)
    whole = rows is False and data is first[0]
    if rows is None and isinstance(first[0], list) and _is_single(first[0]):
        rows = True
    binding, rows = _bound([fields_of(_unboxed(item), inputs) for item in first], inputs, rows, whole=whole)
    if binding.doubtful:
        warnings.warn(f"calibration fields that are left out: {', '.join(binding.doubtful)}", stacklevel=4)
    sampler = _Sampler(limit, seed, most_bytes)
    for item in itertools.chain(first, items):
        sampler.add(_flat(binding(fields_of(_unboxed(item), inputs)), rows))
    leaves, spec = sampler.read()
    return ReadSamples(leaves=_converted(leaves, binding, inputs), spec=spec, ignored=binding.ignored)


def _items(data: Any) -> tuple[Iterator[Any], bool | None]:
    """The items of the data, and whether each is one sample (None: not known)."""
    if _is_batch(data):
        return iter([data]), False
    if isinstance(data, Iterable):
        if isinstance(data, torch.utils.data.DataLoader):
            return iter(data), data.batch_size is None and data.batch_sampler is None
        return iter(data), None
    return (data[index] for index in range(len(data))), True  # a data set that is read by index


def _is_batch(data: Any) -> bool:
    """One batch holding all samples: an array, a dict or what behaves like one, or a tuple of arrays."""
    if _is_array(data) or isinstance(data, Mapping) or (is_dataclass(data) and not isinstance(data, type)):
        return True
    if not isinstance(data, tuple) or not data:
        return False
    parts = [part for part in data if part is not None]
    return bool(parts) and (all(map(_is_array, parts)) or all(map(_is_table, parts)))


def _is_array(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.generic)) or (isinstance(value, torch.Tensor) and value.dim() == 0)


def _is_numbers(value: Any) -> bool:
    """A list of numbers, nested or not."""
    return isinstance(value, (list, tuple)) and bool(value) and all(_is_number(v) or _is_numbers(v) for v in value)


def _is_table(value: Any) -> bool:
    """A list of lists of numbers."""
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_numbers, value))


def _unboxed(item: Any) -> Any:
    """A list of numbers is an array; other lists are fields, as a DataLoader makes them."""
    return _of_list(item) if isinstance(item, list) and _is_numbers(item) else item


def _bound(
    first: list[Fields], inputs: ForwardInputs | None, rows: bool | None, *, whole: bool
) -> tuple[Binding, bool]:
    """The binding, and whether an item is one sample rather than a batch: it is when a field is a single number or a
    plain list of numbers, and when it fits better. Networks take many a single sample too, so it does not tell that one
    runs with an item as it is: what is a batch gives outputs with a row for each sample."""
    if rows is None and any(_is_single(value) for value in first[0].values()):
        rows = True
    if rows is not None:
        return bind(first[0], inputs, _example(first, inputs, rows), whole=whole), rows
    batches = bind(first[0], inputs, _example(first, inputs, False), judged=True)
    if batches.fit < 1 and inputs is not None and inputs.run is not None:
        samples = bind(first[0], inputs, _example(first, inputs, True), judged=True)
        if samples.fit > batches.fit:
            return samples, True
    return batches, False


def _is_single(value: Any) -> bool:
    """A value that must be of one sample: a number, a list of numbers that is no table."""
    return _is_number(value) or (_is_numbers(value) and not _is_table(value))


def _example(first: list[Fields], inputs: ForwardInputs | None, rows: bool) -> Example:
    """So many samples of a field: of the first batch, or the first two items; again from the start where those are
    fewer."""

    def some(key: Key, count: int) -> Any:
        name = inputs.name(key) if inputs is not None else None
        if not rows:
            trees = [
                pytree.tree_map(lambda leaf: leaf[torch.arange(count, device="cpu") % len(leaf)], _tree(first[0][key]))
            ]
        else:
            items = itertools.islice(itertools.cycle(first), count)
            trees = [pytree.tree_map(lambda leaf: leaf[None], _tree(item[key])) for item in items]
        parts = [pytree.tree_leaves(tree) for tree in trees]
        joined = [_cast(torch.cat(column), _wanted(inputs, name, column[0])) for column in zip(*parts, strict=True)]
        return pytree.tree_unflatten(joined, pytree.tree_structure(trees[0]))

    return some


def _flat(batch: Batch, rows: bool) -> tuple[list[torch.Tensor], pytree.TreeSpec]:
    if isinstance(batch, dict):
        tree: Any = {name: _tree(value) for name, value in batch.items()}
    else:
        tree = tuple(map(_tree, batch)) if isinstance(batch, tuple) else _tree(batch)
    leaves, spec = pytree.tree_flatten(tree)
    return [leaf[None] for leaf in leaves] if rows else leaves, spec


def _tree(value: Any) -> Any:
    """The tensors of one field; lists of numbers are one."""
    if _is_numbers(value):
        return _of_list(value)
    return pytree.tree_map(_tensor, value)


def _check_dense(value: torch.Tensor) -> None:
    if value.is_nested:
        hint = "pad them to one shape"
    elif value.layout is not torch.strided:
        hint = "convert them with .to_dense()"
    elif value.is_meta:
        hint = "tensors on the meta device have a shape but no numbers: load or compute the samples on the CPU"
    else:
        return
    kind = "nested" if value.is_nested else "meta" if value.is_meta else str(value.layout).removeprefix("torch.")
    raise CalibrationError("calibration samples are not dense arrays of numbers", actual=f"a {kind} tensor", hint=hint)


def _of_list(value: Any) -> torch.Tensor:
    try:
        array = np.asarray(value)
    except ValueError as cause:
        raise CalibrationError(
            "calibration samples differ in length",
            actual=f"{len(value)} lists of numbers",
            hint="pad them to one length, for example with padding='max_length' of a tokenizer",
        ) from cause
    # lists have no precision of their own: that of torch
    return _tensor(array.astype(np.float32) if array.dtype == np.float64 else array)


def _tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        _check_dense(value)
        return value.detach().cpu()
    array = np.asarray(value)
    if array.dtype == object or array.dtype.kind in "USV":
        raise CalibrationError(
            "calibration samples are not numbers",
            actual=f"numpy {array.dtype}",
            hint="pass numeric arrays of one shape",
        )
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    try:
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    except TypeError as cause:
        raise CalibrationError(
            "calibration samples have a dtype that torch does not know",
            actual=f"numpy {array.dtype}",
            hint="convert them, for example with .astype('float32')",
        ) from cause


class _Sampler:
    """Samples in the order that they come, and beyond a bound a fair sample of all that came.

    Those with the smallest hashes are kept, so it makes no difference in which order they come (bottom-k sampling). A
    hash is of the seed, the content, and how many samples of this content came before: equal samples are drawn one by
    one like others. Nothing is hashed as long as all are kept.
    """

    def __init__(self, limit: int | None, seed: int, most_bytes: int) -> None:
        self._limit, self._seed, self._most_bytes = limit, seed, most_bytes
        self._parts: list[list[torch.Tensor]] = []
        self._spec: pytree.TreeSpec | None = None
        self._seen = 0
        # what is drawn, the largest hash of it first with its place in `_held`, and for each place which sample it was
        self._held: list[torch.Tensor] = []
        self._largest: list[tuple[int, int]] = []
        self._arrivals: list[int] = []
        self._times: Counter[bytes] = Counter()
        self._drawn_of = 0

    def add(self, found: tuple[list[torch.Tensor], pytree.TreeSpec]) -> None:
        """Take one batch."""
        leaves, spec = found
        if self._spec is None:
            self._spec = spec
        if spec != self._spec:
            raise CalibrationError(
                "calibration batches differ in structure", hint="yield the same number of inputs in every batch"
            )
        check_counts(leaves)
        self._parts.append(leaves)
        self._seen += len(leaves[0]) if leaves and leaves[0].dim() else 0
        most = len(self._held[0]) if self._held else self._most(leaves)
        if self._seen > most:
            waiting, self._parts = self._parts[::-1], []
            while waiting:
                self._draw(waiting.pop(), most)

    def _most(self, leaves: Sequence[torch.Tensor]) -> int:
        size = sum(leaf[:1].numel() * leaf.element_size() for leaf in leaves if leaf.dim())
        bound = max(1, self._most_bytes // max(1, size))
        return bound if self._limit is None else min(bound, self._limit)

    def _draw(self, leaves: list[torch.Tensor], most: int) -> None:
        """Each sample with a smaller hash takes the place of the one with the largest."""
        if not self._held:
            self._held = [leaf.new_empty(most, *leaf.shape[1:]) for leaf in leaves]
        for held, leaf in zip(self._held, leaves, strict=True):
            if held.shape[1:] != leaf.shape[1:]:
                raise _uneven([held[0], leaf[0]])
        types = [torch.promote_types(a.dtype, b.dtype) for a, b in zip(self._held, leaves, strict=True)]
        self._held = [held.to(dtype) for held, dtype in zip(self._held, types, strict=True)]
        for row, key in enumerate(drawing_keys(leaves, self._seed, self._times)):
            if len(self._arrivals) < most:
                place = len(self._arrivals)
                self._arrivals.append(self._drawn_of + row)
                heapq.heappush(self._largest, (-key, place))
            elif key < -self._largest[0][0]:
                place = self._largest[0][1]
                self._arrivals[place] = self._drawn_of + row
                heapq.heapreplace(self._largest, (-key, place))
            else:
                continue
            for held, leaf in zip(self._held, leaves, strict=True):
                held[place] = leaf[row]
        self._drawn_of += len(leaves[0])

    def read(self) -> tuple[tuple[torch.Tensor, ...], pytree.TreeSpec]:
        """All that was kept, in the order that it came."""
        assert self._spec is not None
        if not self._held:
            return tuple(leaf.contiguous() for leaf in _joined(self._parts)), self._spec
        order = torch.tensor(sorted(range(len(self._arrivals)), key=self._arrivals.__getitem__), device="cpu")
        if len(order) != self._limit:
            warnings.warn(
                f"more calibration samples came than are kept: a random sample of {len(order):,} of {self._seen:,} is "
                "used",
                stacklevel=5,
            )
        return tuple(held[order] for held in self._held), self._spec


def drawing_keys(leaves: Sequence[torch.Tensor], seed: int, times: Counter[bytes]) -> Iterator[int]:
    """For each sample the hash that it is drawn by: those with the smallest are. `times` counts how often a content
    came before."""
    form = [f"{leaf.dtype}{list(leaf.shape[1:])}" for leaf in leaves]
    for digest in content_digests(leaves, f"{seed} {form}"):
        before = times[digest]
        times[digest] += 1
        again = hashlib.blake2b(digest + str(before).encode(), digest_size=16).digest() if before else digest
        yield int.from_bytes(again)


def content_digests(leaves: Sequence[torch.Tensor], salt: str = "") -> list[bytes]:
    """A hash of what each sample holds in all inputs together."""
    start = hashlib.blake2b(salt.encode(), digest_size=16)
    digests = [start.copy() for _ in range(len(leaves[0]))]
    for leaf in leaves:
        rows = leaf.cpu().contiguous().view(len(leaf), math.prod(leaf.shape[1:])).view(torch.uint8).numpy()
        for digest, row in zip(digests, rows, strict=True):
            digest.update(row.data)
    return [digest.digest() for digest in digests]


def check_counts(leaves: Sequence[torch.Tensor]) -> None:
    """Raise CalibrationError unless all inputs have the same number of samples."""
    counts = {leaf.shape[0] if leaf.dim() else 0 for leaf in leaves}
    if len(counts) > 1:
        raise CalibrationError(
            "the inputs differ in their number of samples",
            actual=sorted(counts),
            hint="give every input the same samples",
        )


def _joined(parts: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    columns = list(zip(*parts, strict=True))
    try:
        return [torch.cat(column) if column[0].dim() else column[0] for column in columns]
    except (RuntimeError, TypeError) as cause:
        raise _uneven(columns[0]) from cause


def _uneven(column: Sequence[torch.Tensor]) -> CalibrationError:
    return CalibrationError(
        "calibration samples differ in shape",
        actual=[list(t.shape) for t in column][:4],
        hint="resize or pad the inputs to one shape",
    )


def _converted(
    leaves: tuple[torch.Tensor, ...], binding: Binding, inputs: ForwardInputs | None
) -> tuple[torch.Tensor, ...]:
    """The leaves as the network wants them, where that says the same: another floating-point precision, integers of
    another width. Said aloud. Integers for floating-point inputs are left: nobody knows how they are to be scaled."""
    flat = len(leaves) == len(binding.kept)
    names = [binding.names.get(key) for key in binding.kept] if flat else [None] * len(leaves)
    result, converted = [], []
    for leaf, name in zip(leaves, names, strict=True):
        new = _cast(leaf, _wanted(inputs, name, leaf))
        if new.dtype != leaf.dtype:
            converted.append(f"{dtype_name(leaf.dtype)} to {dtype_name(new.dtype)}")
        result.append(new)
    if converted:
        words = ", ".join(dict.fromkeys(converted))
        warnings.warn(f"calibration samples are converted to what the network takes: {words}", stacklevel=4)
    return tuple(result)


def _wanted(inputs: ForwardInputs | None, name: str | None, leaf: torch.Tensor) -> torch.dtype | None:
    if inputs is None:
        return None
    return inputs.dtypes.get(name or "", inputs.dtype if leaf.is_floating_point() else None)


def _cast(leaf: torch.Tensor, wanted: torch.dtype | None) -> torch.Tensor:
    if wanted is None or wanted == leaf.dtype or wanted.is_complex or leaf.is_complex():
        return leaf
    if wanted.is_floating_point and leaf.is_floating_point():
        return leaf.to(wanted)
    whole = not wanted.is_floating_point and not leaf.is_floating_point() and torch.bool not in (wanted, leaf.dtype)
    if whole and leaf.numel():
        info = torch.iinfo(wanted)
        if info.min <= int(leaf.min()) and int(leaf.max()) <= info.max:
            return leaf.to(wanted)
    return leaf
