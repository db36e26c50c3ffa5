"""Optimisation profiles: the range of sizes that an engine is built for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...compiler.support.errors import BackendError
from ..measure.backend import Array

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The least, the likeliest and the largest shape of one input. Raises BackendError unless min <= opt <= max."""

    min: Shape
    opt: Shape
    max: Shape

    def __post_init__(self) -> None:
        for name in ("min", "opt", "max"):
            object.__setattr__(self, name, _checked_shape(getattr(self, name)))
        ranks = {len(shape) for shape in (self.min, self.opt, self.max)}
        if len(ranks) != 1 or not all(
            low <= likely <= high for low, likely, high in zip(self.min, self.opt, self.max, strict=True)
        ):
            raise BackendError(
                "a profile's shapes must be of one rank, with min <= opt <= max in every dimension",
                actual=f"min {self.min}, opt {self.opt}, max {self.max}",
                hint="Profile.fixed(shape) is the profile of one shape only",
            )

    @classmethod
    def fixed(cls, shape: Sequence[int]) -> Profile:
        """The profile of one shape only: the fastest engine, and of no use for any other."""
        return cls(min=tuple(shape), opt=tuple(shape), max=tuple(shape))

    def holds(self, shape: Sequence[int]) -> bool:
        """Whether `shape` lies within the profile."""
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.min} to {self.max}"


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """An input or output of an engine. `dtype` is numpy's name, or ``bfloat16``; -1 in `shape` is a dynamic size."""

    name: str
    dtype: str
    shape: Shape

    @property
    def dynamic(self) -> bool:
        """Whether a size is left open."""
        return -1 in self.shape


def choose_profiles(
    tensors: Sequence[TensorInfo], inputs: Mapping[str, Array] | None, profiles: Mapping[str, Profile]
) -> dict[str, Profile]:
    """Give each dynamic input its profile: the one of `profiles`, or the shape that it has in `inputs`.

    Raises BackendError: a dynamic input has neither, a profile is of no input, or one contradicts the model's sizes.
    """
    for tensor in tensors:
        # TensorRT takes an input of undeclared rank for a scalar, and would build an engine of no use
        if inputs and tensor.name in inputs and len(inputs[tensor.name].shape) != len(tensor.shape):
            raise BackendError(
                f"the input '{tensor.name}' does not have the rank that the model declares",
                expected=tensor.shape,
                actual=inputs[tensor.name].shape,
                hint="export the model with declared input shapes, or pass inputs of the declared rank",
            )
    names = [tensor.name for tensor in tensors]
    unknown = sorted(set(profiles) - set(names))
    if unknown:
        raise BackendError(
            f"there is a profile of '{unknown[0]}', which is no input of the model",
            expected=", ".join(names),
            actual=", ".join(profiles),
            hint="name profiles after the model's inputs",
        )
    # a profile of an input of fixed shape says nothing new, but it must not contradict the model
    return {
        tensor.name: _profile_of(tensor, inputs or {}, profiles)
        for tensor in tensors
        if tensor.dynamic or tensor.name in profiles
    }


def _profile_of(tensor: TensorInfo, inputs: Mapping[str, Array], profiles: Mapping[str, Profile]) -> Profile:
    profile = profiles.get(tensor.name)
    if profile is None:
        if tensor.name not in inputs:
            axes = ", ".join(str(axis) for axis, size in enumerate(tensor.shape) if size == -1)
            raise BackendError(
                f"the input '{tensor.name}' has dynamic dimensions ({axes}) and no profile",
                expected=f"sizes for {tensor.shape}",
                actual="none",
                hint="pass inputs, or "
                f"TensorRTBackend(profiles={{'{tensor.name}': Profile(min=..., opt=..., max=...)}})",
            )
        profile = Profile.fixed(inputs[tensor.name].shape)
    for shape in (profile.min, profile.opt, profile.max):
        fits = len(shape) == len(tensor.shape) and all(
            declared in (-1, size) for declared, size in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            raise BackendError(
                f"the profile of the input '{tensor.name}' contradicts the model's own sizes",
                expected=tensor.shape,
                actual=shape,
                hint="-1 stands for a dynamic size; the others are fixed in the model",
            )
    return profile


def _checked_shape(shape: Sequence[int]) -> Shape:
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else ()
    if not isinstance(shape, (tuple, list)) or any(
        not isinstance(size, int) or isinstance(size, bool) or size < 0 for size in sizes
    ):
        raise BackendError(
            "a profile's shape must be a tuple of whole numbers from 0 up", actual=shape, hint="e.g. (1, 3, 224, 224)"
        )
    return sizes
