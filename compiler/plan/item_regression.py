"""What single items lose and save near a plan, learnt from plans that differ from it. Numbers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .proposals import Item, Mix, Scale, savings_in

#: How far an item's figure may be from its kind's, as a standard deviation relative to it, before anything is known.
ERROR_SPREAD, SAVING_SPREAD = 1.0, 0.15
#: How far an item's figure near a plan may be from its figure at large.
NEAR_SPREAD = 0.5
#: How far what a plan turns out to be may be from the sum of what its items do, relative to the sum of all differences.
ERROR_NOISE, SAVING_NOISE = 0.25, 0.03
#: No item counts for less than this share of what its kind says.
LEAST_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Fit:
    """For each item what its predicted figure is multiplied by, and how sure that is (a standard deviation)."""

    factors: np.ndarray
    spread: np.ndarray


def unknown(count: int, spread: float) -> Fit:
    """Items that do what their kinds say, give or take."""
    return Fit(factors=np.ones(count), spread=np.full(count, spread))


def fitted(differences: np.ndarray, outcomes: np.ndarray, before: Fit, *, noise: float) -> Fit:
    """Factors of the items from plans around one: a row of `differences` for each plan holds what each item's
    prediction changes by, `outcomes` what the plan then changed by.

    Ridge regression toward what was known `before`. A plan counts the less the more it differs, since figures do not
    add up: leaving one item out of the lead says almost exactly what that item does there.
    """
    size = np.abs(differences).sum(1)
    rows, found = differences[size > 0] / size[size > 0, None], outcomes[size > 0] / size[size > 0]
    precision = np.diag(before.spread**-2) + rows.T @ rows / noise**2
    covariance = np.linalg.inv(precision)
    factors = covariance @ (before.factors / before.spread**2 + rows.T @ found / noise**2)
    return Fit(factors=np.maximum(factors, LEAST_SHARE), spread=np.sqrt(np.diag(covariance)))


def error_fit(
    items: Sequence[Item], scales: Mapping[str, Scale], lead: Mix, error: float, tried: Sequence[tuple[Mix, float]]
) -> Fit:
    """How the errors of items near the plan `lead` compare with their predictions: what plans lose as wholes, then what
    they lose less or more than the lead."""
    figures = np.array([_errors(items, scales, mix) for mix, _ in tried])
    found = np.array([each for _, each in tried])
    whole = fitted(figures, found, unknown(len(items), ERROR_SPREAD), noise=ERROR_NOISE)
    wide = Fit(factors=whole.factors, spread=np.maximum(whole.spread, NEAR_SPREAD))
    return fitted(figures - _errors(items, scales, lead), found - error, wide, noise=ERROR_NOISE)


def saving_fit(
    items: Sequence[Item], scales: Mapping[str, Scale], lead: Mix, ratio: float, measured: Sequence[tuple[Mix, float]]
) -> Fit:
    """How the savings of items near the plan `lead` compare with their predictions, from plans' latency ratios."""
    figures = np.array([_savings(items, scales, mix) for mix, _ in measured])
    found = np.array([ratio - each for _, each in measured])
    before = unknown(len(items), SAVING_SPREAD)
    return fitted(figures - _savings(items, scales, lead), found, before, noise=SAVING_NOISE)


def _errors(items: Sequence[Item], scales: Mapping[str, Scale], mix: Mix) -> np.ndarray:
    return np.array([scales[item.kind].error * mix[item].error if item in mix else 0.0 for item in items])


def _savings(items: Sequence[Item], scales: Mapping[str, Scale], mix: Mix) -> np.ndarray:
    saved = savings_in(mix, {item: scales[item.kind] for item in mix})
    return np.array([saved.get(item, 0.0) for item in items])
