"""One option for each of many items under a budget: the exact choice, as an integer programme."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..support.quiet_logs import without_native_output

#: How far from the best the choice may be, relative; nearer takes long and says nothing about the network.
GAP = 1e-4
SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What an option of one item adds to the costs of another's, a row of numbers for the options of the `other`: none
    below 0, or none above. With `as_errors` it is added to the errors as well."""

    item: int
    option: int
    other: int
    costs: Sequence[float]
    as_errors: bool = False


def choose_options(
    errors: Sequence[Sequence[float]],
    costs: Sequence[Sequence[float]],
    budget: float,
    conflicts: Sequence[tuple[int, int]] = (),
    known: Sequence[Sequence[int]] = (),
    overlaps: Sequence[Overlap] = (),
) -> list[int] | None:
    """For each item the index of one of its options: the least sum of errors whose costs add up to at most `budget`.

    `errors` and `costs` hold a row for each item. Of two items in `conflicts` one at least takes its first option, that
    of leaving it alone. A choice among the `known` ones does not come back. `overlaps` are what pairs of options add to
    the costs. None when no choice stays within the budget. Solved by HiGHS; of choices of equal error any may come
    back, the same one every time.
    """
    from scipy import optimize, sparse  # slow to import, and not everyone who imports foldcut needs it

    if not errors:
        return [] if budget >= 0 else None
    sizes = [len(row) for row in errors]
    items = np.repeat(np.arange(len(sizes)), sizes)
    places = np.arange(len(items))
    flat_costs, flat_errors = (np.concatenate([np.asarray(row, float) for row in rows]) for rows in (costs, errors))
    if sum(min(row) for row in costs) + sum(min(0.0, *overlap.costs) for overlap in overlaps) > budget:
        return None
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    one_each = sparse.csr_matrix((np.ones(len(items)), (items, places)), shape=(len(sizes), len(items)))
    constraints = [optimize.LinearConstraint(one_each, 1, 1)]
    if conflicts:
        rows, columns = np.repeat(np.arange(len(conflicts)), 2), starts[np.asarray(conflicts).ravel()]
        alone = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(conflicts), len(items)))
        constraints.append(optimize.LinearConstraint(alone, 1, np.inf))
    if known:
        rows = np.repeat(np.arange(len(known)), len(sizes))
        taken = sparse.csr_matrix(
            (np.ones(len(rows)), (rows, (starts + np.asarray(known)).ravel())), shape=(len(known), len(items))
        )
        constraints.append(optimize.LinearConstraint(taken, -np.inf, len(sizes) - 1))
    cost_scale = max(float(np.abs(flat_costs).max()), 1e-300)
    error_scale = max(float(np.abs(flat_errors).max()), 1e-300)
    total = len(items) + len(overlaps)
    signs = np.array([-1.0 if min(overlap.costs) < 0 else 1.0 for overlap in overlaps])
    scaled = np.concatenate([flat_costs / cost_scale, signs])
    constraints = [_widened(constraint, total) for constraint in constraints]
    constraints.append(optimize.LinearConstraint(scaled[None, :], -np.inf, budget / cost_scale))
    constraints += _bounds(overlaps, starts, cost_scale, total)
    counted = signs * [cost_scale / error_scale if overlap.as_errors else 0.0 for overlap in overlaps]
    with without_native_output():
        found = optimize.milp(
            np.concatenate([flat_errors / error_scale, counted]),
            integrality=(np.arange(total) < len(items)).astype(np.int64),
            bounds=optimize.Bounds(0, np.where(np.arange(total) < len(items), 1, np.inf)),
            constraints=constraints,
            options={"mip_rel_gap": GAP, "time_limit": SECONDS},
        )
    if found.x is None:
        return None
    return [int(found.x[start : start + size].argmax()) for start, size in zip(starts, sizes, strict=True)]


def _bounds(overlaps: Sequence[Overlap], starts: Any, unit: float, columns: int) -> list[Any]:
    """How much each overlap is, as the last variables, in units of a cost. What costs is at least what it costs where
    both are taken; what is gained is at most that, and nothing unless both are."""
    from scipy import optimize, sparse

    if not overlaps:
        return []
    least = sparse.lil_matrix((len(overlaps), columns))
    most = sparse.lil_matrix((2 * len(overlaps), columns))
    floors = np.full(len(overlaps), -np.inf)
    for row, overlap in enumerate(overlaps):
        size = np.abs(overlap.costs) / unit
        own, first, mine = columns - len(overlaps) + row, starts[overlap.other], starts[overlap.item] + overlap.option
        if min(overlap.costs) < 0:
            most[2 * row, own] = most[2 * row + 1, own] = 1.0
            most[2 * row, first : first + len(size)] = -size
            most[2 * row + 1, mine] = -size.max()
        else:
            least[row, own] = 1.0
            least[row, first : first + len(size)] = -size
            least[row, mine] = floors[row] = -size.max()
    return [
        optimize.LinearConstraint(least.tocsr(), floors, np.inf),
        optimize.LinearConstraint(most.tocsr(), -np.inf, 0.0),
    ]


def _widened(constraint: Any, columns: int) -> Any:
    """A constraint over the first of so many variables."""
    from scipy import optimize, sparse

    rows, known = constraint.A.shape
    matrix = sparse.hstack([constraint.A, sparse.csr_matrix((rows, columns - known))], format="csr")
    return optimize.LinearConstraint(matrix, constraint.lb, constraint.ub)
