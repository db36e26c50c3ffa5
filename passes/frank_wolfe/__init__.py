"""Compression-aware training: stochastic Frank-Wolfe over sets whose vertices are sparse or of low rank."""

from .constraints import Constraint
from .errors import FrankWolfeError
from .optimizer import FrankWolfe
from .parameter_groups import current_norm, parameter_groups, redrawn_norm
from .spectral_balls import NuclearBall, SpectralKSparse, SpectralKSupport
from .spectral_oracles import Gram, Subspace
from .vector_balls import GroupKSupport, KSparse, KSupport, LpBall

__all__ = [
    "Constraint",
    "FrankWolfe",
    "FrankWolfeError",
    "Gram",
    "GroupKSupport",
    "KSparse",
    "KSupport",
    "LpBall",
    "NuclearBall",
    "SpectralKSparse",
    "SpectralKSupport",
    "Subspace",
    "current_norm",
    "parameter_groups",
    "redrawn_norm",
]
