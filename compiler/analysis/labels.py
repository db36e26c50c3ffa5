"""Integer labels that say which channel an element of a tensor belongs to, and the union-find over them.

A label names one channel of one producer. What must be cut together is united; what cannot be cut is locked, with the
reason. Labels of constants (parameters that meet activations elementwise, padding, class tokens) are *free* until
they are united with a label of an activation: a free element goes wherever its neighbours go.

All operations are vectorised over whole label tensors. Dimensions along which a tensor does not change are kept at
stride 0, so that a label tensor costs about as many elements as it has channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

#: The label of everything that has no channel that could be cut: inputs, positions, values of operators not understood.
FIXED = 0


class Labels:
    """Union-find over labels 0, 1, 2 ...; label 0 is `FIXED`.

    `find` gives a class by its least label. Uniting with FIXED locks the other side instead of merging, so that
    classes that have nothing in common but their lock stay apart.
    """

    def __init__(self) -> None:
        self._parent = torch.zeros(1, dtype=torch.long)
        self._free = torch.zeros(1, dtype=torch.bool)
        self._reason = torch.zeros(1, dtype=torch.long)
        self._count = 1
        self._reasons = [""]

    def __len__(self) -> int:
        return self._count

    def fresh(self, count: int, *, free: bool = False) -> torch.Tensor:
        """`count` new labels as a vector."""
        labels = torch.arange(self._count, self._count + count)
        self._count += count
        if self._count > len(self._parent):
            grown = max(self._count, 2 * len(self._parent))
            self._parent = torch.cat([self._parent, torch.arange(len(self._parent), grown)])
            self._free = torch.cat([self._free, self._free.new_zeros(grown - len(self._free))])
            self._reason = torch.cat([self._reason, self._reason.new_zeros(grown - len(self._reason))])
        self._free[labels] = free
        return labels

    def find(self, labels: torch.Tensor) -> torch.Tensor:
        """The class of each label."""
        roots = self._parent[labels]
        while True:
            above = self._parent[roots]
            if torch.equal(above, roots):
                return roots
            roots = above

    def is_free(self, roots: torch.Tensor) -> torch.Tensor:
        """Whether nothing but constants belongs to the class, for labels that `find` returned."""
        return self._free[roots]

    def locked(self, labels: torch.Tensor) -> torch.Tensor:
        """Whether each label's class is locked; FIXED is."""
        roots = self.find(labels)
        return (self._reason[roots] > 0) | (roots == FIXED)

    def reason(self, label: int) -> str:
        """Why a label's class is locked, "" when it is not."""
        return self._reasons[int(self._reason[self.find(torch.tensor(label))])]

    def lock(self, labels: torch.Tensor, reason: str) -> None:
        """Lock the classes of these labels; the first reason given to a class stays."""
        roots = self.find(slim(labels)).unique()
        fresh = roots[(self._reason[roots] == 0) & (roots != FIXED)]
        if len(fresh):
            self._reasons.append(reason)
            self._reason[fresh] = len(self._reasons) - 1

    def unite(self, first: torch.Tensor, second: torch.Tensor, reason: str) -> bool:
        """Unite element by element (broadcast); `reason` is for those that meet FIXED. True when anything changed."""
        first, second = torch.broadcast_tensors(slim(first), slim(second))
        one, two = self.find(slim(first)).expand_as(first), self.find(slim(second)).expand_as(second)
        differ = one != two
        if not bool(differ.any()):
            return False
        # a pair as one number: sorting numbers is ten times faster than sorting rows
        keys = (one[differ] * self._count + two[differ]).unique()
        pairs = torch.stack([keys // self._count, keys % self._count], -1)
        fixed = (pairs == FIXED).any(1)
        before = len(self._reasons)
        if bool(fixed.any()):
            self.lock(pairs[fixed].amax(1), reason)
        pairs = pairs[~fixed]
        if not len(pairs):
            return len(self._reasons) > before
        members, compact = pairs.unique(return_inverse=True)
        self._merge(members, _components(compact, len(members)))
        return True

    def _merge(self, members: torch.Tensor, component: torch.Tensor) -> None:
        count = int(component.max()) + 1
        roots = torch.full((count,), self._count).scatter_reduce(0, component, members, "amin")
        free = torch.ones(count, dtype=torch.long).scatter_reduce(0, component, self._free[members].long(), "amin")
        reason = torch.zeros(count, dtype=torch.long).scatter_reduce(0, component, self._reason[members], "amax")
        self._parent[members] = roots[component]
        self._free[roots] = free.bool()
        self._reason[roots] = reason

    def tie(self, labels: torch.Tensor, dims: Iterable[int], reason: str) -> bool:
        """Unite all elements that differ only along `dims`. True when anything changed."""
        labels = slim(labels)
        first = labels
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        return self.unite(labels, first, reason)

    def varying(self, labels: torch.Tensor, *, free: bool = False) -> tuple[int, ...]:
        """The dimensions along which the class changes. Free elements take any class, so they do not count unless
        `free` says so."""
        roots = self.find(slim(labels))
        if free:
            return tuple(d for d in range(roots.dim()) if bool((roots != roots.narrow(d, 0, 1)).any()))
        ignored = self.is_free(roots)
        high, low = roots.masked_fill(ignored, -1), roots.masked_fill(ignored, self._count)
        return tuple(d for d in range(roots.dim()) if bool((high.amax(d) > low.amin(d)).any()))

    def all_free(self, labels: torch.Tensor) -> bool:
        """Whether nothing but constants is in this tensor."""
        return bool(self.is_free(self.find(slim(labels))).all())

    def kept_dim(self, labels: torch.Tensor, dims: Sequence[int]) -> int:
        """Of several varying dimensions, the one that leaves the most classes when the others are tied; the last of
        equals."""
        roots = self.find(slim(labels))
        roots = roots.masked_fill(self.is_free(roots), self._count)

        def classes(dim: int) -> int:
            others = [d for d in range(roots.dim()) if d != dim]
            return len((roots.amin(others) if others else roots).unique())

        return max(dims, key=lambda dim: (classes(dim), dim))


def _components(edges: torch.Tensor, count: int) -> torch.Tensor:
    """The connected component of each of `count` vertices."""
    from scipy.sparse import coo_matrix  # imported when needed: importing foldcut stays light
    from scipy.sparse.csgraph import connected_components

    ends = edges.numpy()
    graph = coo_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(count, count))
    return torch.from_numpy(connected_components(graph, directed=False)[1]).long()


def slim(labels: torch.Tensor) -> torch.Tensor:
    """The tensor with its stride-0 dimensions cut to size 1."""
    for dim in range(labels.dim()):
        if labels.stride(dim) == 0 and labels.shape[dim] > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def compress(labels: torch.Tensor) -> torch.Tensor:
    """The same tensor with stride 0 along the dimensions where nothing changes, and no memory held beyond it."""
    shape, small = labels.shape, slim(labels)
    for dim in range(small.dim()):
        first = small.narrow(dim, 0, 1)
        if small.shape[dim] > 1 and bool((small == first).all()):
            small = first
    if small.numel() < small.untyped_storage().nbytes() // small.element_size():
        small = small.clone()
    return small.expand(shape)


def fixed(shape: Sequence[int]) -> torch.Tensor:
    """A tensor of FIXED labels."""
    return torch.zeros([1] * len(shape), dtype=torch.long).expand(list(shape))


def along(vector: torch.Tensor, dim: int, shape: Sequence[int]) -> torch.Tensor:
    """A vector of labels laid along one dimension of a tensor."""
    sizes = [1] * len(shape)
    sizes[dim] = len(vector)
    return vector.view(sizes).expand(list(shape))


def lifted(labels: torch.Tensor, dims: int) -> torch.Tensor:
    """With leading dimensions of size 1, so that broadcasting is dimension by dimension."""
    return labels.reshape([1] * (dims - labels.dim()) + list(labels.shape)) if labels.dim() < dims else labels


def vector(labels: torch.Tensor, dim: int) -> torch.Tensor:
    """The labels along one dimension, read at index 0 of the others."""
    for other in range(labels.dim()):
        if other != dim % labels.dim():
            labels = labels.narrow(other, 0, 1)
    return labels.reshape(-1)
