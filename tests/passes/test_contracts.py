"""What each rewrite requires of a program before it, and ensures of the one behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import foldcut
import pytest
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.ir.program import Program
from foldcut.compiler.plan.decision import Decision
from foldcut.compiler.rewrite.context import Context
from foldcut.compiler.rewrite.rewrite import Rewrite
from foldcut.compiler.trial.apply_decisions import applied, finished


def drop(program: Program) -> tuple[Rewrite, Decision]:
    region = foldcut.find_regions(program).blocks[0]
    return foldcut.Drop(), foldcut.DropBlock(entry=region.entry, exit=region.exit)


def prune(program: Program) -> tuple[Rewrite, Decision]:
    group = next(g for g in foldcut.find_units(program).prunable if len(g) > 2)
    return foldcut.Prune(), foldcut.PruneChannels(group=group.name, kept=(0, 1), total=len(group))


def factorize(program: Program) -> tuple[Rewrite, Decision]:
    del program
    return foldcut.Factorize(), foldcut.FactorizeLayer(layer="conv2d_1", scheme="channel", ranks=(2,), full=(8,))


def quantize(program: Program) -> tuple[Rewrite, Decision]:
    del program
    return foldcut.Quantize(), foldcut.QuantizeLayer(layer="conv2d_1")


@pytest.mark.parametrize("made", [drop, prune, factorize, quantize])
def test_what_is_applied_is_what_is_ensured(
    made: Callable[[Program], tuple[Rewrite, Decision]], residual: Program, nets: Any, contexts: Callable[..., Context]
) -> None:
    """A rewrite that is carried out keeps its word; a program that is still the old one does not."""
    rewrite, decision = made(residual)
    rewrite.requires(residual, [decision])
    ctx = contexts(residual, CalibrationSet.of(nets.images(12)))
    done = applied(ctx, [rewrite], [decision], exactly=True)
    done = finished(ctx, [rewrite], done, [decision], exactly=True)
    rewrite.ensures(residual, done.program, done.decisions)
    with pytest.raises(foldcut.RewriteError):
        rewrite.ensures(residual, residual, done.decisions)


def test_a_rewrite_that_breaks_its_word_is_stopped(
    residual: Program, nets: Any, contexts: Callable[..., Context]
) -> None:
    """Of one's own as well: the driver asks after every step."""

    class Forgetful(foldcut.Drop):
        def apply(self, program: Program, decisions: Any, ctx: Context) -> foldcut.Applied:
            del ctx
            return foldcut.Applied(program=program, decisions=tuple(decisions))

    _, decision = drop(residual)
    with pytest.raises(foldcut.RewriteError, match="the block is still there"):
        applied(contexts(residual, CalibrationSet.of(nets.images(12))), [Forgetful()], [decision])
