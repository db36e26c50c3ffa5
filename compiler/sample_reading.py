"""Calibration data in whatever form they come, read into one tensor for each input."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from .errors import CalibrationError
from .input_binding import Binding, Fields, ForwardInputs, Key, bind, fields_of
from .program import Batch, dtype_name

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
    binding, rows = _bound([fields_of(_unboxed(item), inputs) for item in first], inputs, rows, whole=whole)
    if binding.told:
        warnings.warn(f"calibration fields that are left out: {', '.join(binding.told)}", stacklevel=4)
    reservoir = _Reservoir(limit, seed, most_bytes)
    for item in itertools.chain(first, items):
        reservoir.add(_flat(binding(fields_of(_unboxed(item), inputs)), rows))
    leaves, spec = reservoir.read()
    return ReadSamples(leaves=_converted(leaves, binding, inputs), spec=spec, ignored=binding.ignored)


def _items(data: Any) -> tuple[Iterator[Any], bool | None]:
    """The items of the data, and whether each is one sample (None: not known)."""
    if _is_batch(data):
        return iter([data]), False
    if isinstance(data, Iterable):
        if isinstance(data, torch.utils.data.DataLoader):
            return iter(data), (data.batch_size is None and data.batch_sampler is None) or None
        return iter(data), None
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):  # a data set that is read by index
        return (data[index] for index in range(len(data))), True
    raise CalibrationError(
        f"cannot read calibration samples from a {type(data).__name__}",
        hint="pass a tensor, an array, a tuple or dict of them, a DataLoader or a generator of batches",
    )


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
    plain list of numbers, and when the network runs with samples put together but not with an item as it is."""
    if rows is None and any(_is_single(value) for value in first[0].values()):
        rows = True
    if rows is not None:
        return bind(first[0], inputs, _example(first, inputs, rows), whole=whole), rows
    batches = bind(first[0], inputs, _example(first, inputs, False), whole=whole)
    if batches.runs is False:
        samples = bind(first[0], inputs, _example(first, inputs, True), whole=whole)
        if samples.runs:
            return samples, True
    return batches, False


def _is_single(value: Any) -> bool:
    """A value that must be of one sample: a number, a list of numbers that is no table."""
    return _is_number(value) or (_is_numbers(value) and not _is_table(value))


def _example(first: list[Fields], inputs: ForwardInputs | None, rows: bool) -> Any:
    """Two samples of a field: of the first batch, or the first two items."""

    def two(key: Key) -> Any:
        name = inputs.name(key) if inputs is not None else None
        if not rows:
            trees = [pytree.tree_map(lambda leaf: leaf[:2], _tree(first[0][key]))]
        else:
            trees = [pytree.tree_map(lambda leaf: leaf[None], _tree(item[key])) for item in first]
            trees = trees * 2 if len(trees) == 1 else trees
        parts = [pytree.tree_leaves(tree) for tree in trees]
        joined = [_cast(torch.cat(column), _wanted(inputs, name, column[0])) for column in zip(*parts, strict=True)]
        return pytree.tree_unflatten(joined, pytree.tree_structure(trees[0]))

    return two


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
        return value.detach().cpu()
    array = np.asarray(value)
    if array.dtype == object or array.dtype.kind in "USV":
        raise CalibrationError(
            "calibration samples are not numbers",
            actual=f"numpy {array.dtype}",
            hint="pass numeric arrays of one shape",
        )
    try:
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    except TypeError as cause:
        raise CalibrationError(
            "calibration samples have a dtype that torch does not know",
            actual=f"numpy {array.dtype}",
            hint="convert them, for example with .astype('float32')",
        ) from cause


class _Reservoir:
    """Samples in the order that they come, and beyond a bound a fair sample of all that came (reservoir sampling)."""

    def __init__(self, limit: int | None, seed: int, most_bytes: int) -> None:
        self._limit, self._most_bytes = limit, most_bytes
        self._random = np.random.default_rng(seed)
        self._parts: list[list[torch.Tensor]] = []
        self._spec: pytree.TreeSpec | None = None
        self._seen = 0
        self._drawn = False

    def add(self, found: tuple[list[torch.Tensor], pytree.TreeSpec]) -> None:
        """Take one batch."""
        leaves, spec = found
        if self._spec is None:
            self._spec = spec
        if spec != self._spec:
            raise CalibrationError(
                "calibration batches differ in structure", hint="yield the same number of inputs in every batch"
            )
        counts = {leaf.shape[0] if leaf.dim() else 0 for leaf in leaves}
        count, most = max(counts, default=0), self._most(leaves)
        if len(counts) == 1 and self._seen + count > most:
            self._replace(leaves, count, most)
        else:
            self._parts.append(leaves)
            self._seen += count

    def _most(self, leaves: Sequence[torch.Tensor]) -> int:
        size = sum(leaf[:1].numel() * leaf.element_size() for leaf in leaves if leaf.dim())
        bound = max(1, self._most_bytes // max(1, size))
        return bound if self._limit is None else min(bound, self._limit)

    def _replace(self, leaves: list[torch.Tensor], count: int, most: int) -> None:
        """Each further sample takes the place of a random one, with the probability that keeps all alike."""
        self._drawn = True
        room = max(0, most - self._seen)
        if room:
            self._parts.append([leaf[:room] for leaf in leaves])
        self._parts = [[leaf.clone() for leaf in _joined(self._parts)]]
        places = self._random.integers(0, np.arange(self._seen + room, self._seen + count) + 1)
        self._seen += count
        for index in np.flatnonzero(places < most).tolist():
            for held, leaf in zip(self._parts[0], leaves, strict=True):
                _check_shape(held[0], leaf[room + index])
                held[int(places[index])] = leaf[room + index]

    def read(self) -> tuple[tuple[torch.Tensor, ...], pytree.TreeSpec]:
        """All that was kept."""
        leaves = tuple(leaf.contiguous() for leaf in _joined(self._parts))
        kept = leaves[0].shape[0] if leaves and leaves[0].dim() else 0
        if self._drawn and kept != self._limit:
            warnings.warn(
                f"{self._seen:,} calibration samples came, more than are kept: a random sample of {kept:,} is used",
                stacklevel=5,
            )
        assert self._spec is not None
        return leaves, self._spec


def _joined(parts: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    columns = list(zip(*parts, strict=True))
    try:
        return [torch.cat(column) if column[0].dim() else column[0] for column in columns]
    except (RuntimeError, TypeError) as cause:
        raise _uneven(columns[0]) from cause


def _check_shape(held: torch.Tensor, new: torch.Tensor) -> None:
    if held.shape != new.shape:
        raise _uneven([held, new])


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
    result, told = [], []
    for leaf, name in zip(leaves, names, strict=True):
        new = _cast(leaf, _wanted(inputs, name, leaf))
        if new.dtype != leaf.dtype:
            told.append(f"{dtype_name(leaf.dtype)} to {dtype_name(new.dtype)}")
        result.append(new)
    if told:
        words = ", ".join(dict.fromkeys(told))
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
