"""Symmetric matrices sent as one triangle of theirs."""

from __future__ import annotations

import torch


def mirrored(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices whose lower triangle stands in their upper one too: of products that are symmetric but for their last
    bits.

    Arguments:
        matrices: (..., n, n).

    Returns:
        New ones of the same shape, symmetric bit for bit.

    Example:
        >>> from foldcut.compiler.devices.triangle import mirrored
        >>> mirrored(torch.tensor([[1.0, 2.1], [2.0, 3.0]])).tolist()
        [[1.0, 2.0], [2.0, 3.0]]
    """
    size = matrices.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=matrices.device).tril()
    return torch.where(lower, matrices, matrices.mT)


def packed(matrices: torch.Tensor) -> torch.Tensor:
    """The lower triangles of symmetric matrices as rectangles that hold nothing else: the left half of a matrix, in
    whose upper triangle stands what is right of it (rectangular full packed format: Gustavson et al. 2010).

    Arguments:
        matrices: (..., n, n), symmetric.

    Returns:
        (..., n + 1, n / 2) for even n, (..., n, (n + 1) / 2) for odd n. `unpacked` gives back the same bits.

    Example:
        >>> from foldcut.compiler.devices.triangle import packed, unpacked
        >>> gram = torch.tensor([[1.0, 2.0], [2.0, 3.0]])
        >>> packed(gram).shape, torch.equal(unpacked(packed(gram)), gram)
        (torch.Size([3, 1]), True)
    """
    size = matrices.shape[-1]
    left, right, shift = -(-size // 2), size // 2, 1 - size % 2
    found = matrices.new_empty((*matrices.shape[:-2], size + shift, left))
    found[..., shift:, :] = matrices[..., :, :left]
    corner = found[..., :right, left - right :]
    corner.copy_(torch.where(_upper(right, matrices.device), matrices[..., left:, left:], corner))
    return found


def unpacked(found: torch.Tensor) -> torch.Tensor:
    """The symmetric matrices that `packed` made rectangles of.

    Arguments:
        found: What it returned, or a sum of such.

    Example:
        >>> from foldcut.compiler.devices.triangle import packed, unpacked
        >>> unpacked(packed(torch.eye(3))).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    rows, left = found.shape[-2:]
    size = 2 * left if rows > 2 * left else rows
    right, shift = size // 2, 1 - size % 2
    half, corner = found[..., shift:, :], found[..., :right, left - right :]
    matrices = found.new_empty((*found.shape[:-2], size, size))
    matrices[..., :left, :left] = mirrored(half[..., :left, :])
    matrices[..., left:, :left] = half[..., left:, :]
    matrices[..., :left, left:] = half[..., left:, :].mT
    matrices[..., left:, left:] = torch.where(_upper(right, found.device), corner, corner.mT)
    return matrices


def _upper(size: int, device: torch.device) -> torch.Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).triu()
