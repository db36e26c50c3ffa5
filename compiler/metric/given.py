"""The metric that a compile is given."""

from __future__ import annotations

from ..data.calibration_set import CalibrationSet
from ..data.synthetic import said_of
from ..export.edit_types import as_stored
from ..ir.program import Program
from ..plan.goal import Goal
from ..support.errors import CalibrationError, GoalError
from ..support.progress import StageClock
from .metric import Evaluate, Metric, check_evaluate, metric_name, module_of
from .top1 import Top1


def check_metric(evaluate: Evaluate | Top1 | None, goal: Goal) -> None:
    """Raise CompilerError for a metric that cannot be called, GoalError for a goal that needs one that is not there."""
    if evaluate is not None and not isinstance(evaluate, Top1):
        check_evaluate(evaluate)
    if evaluate is None and goal.needs_metric:
        raise GoalError(
            f"{goal} is about a metric, and there is none",
            hint="pass evaluate=, a function of the network that gives a number (--evaluate package.module:callable), "
            "or evaluate=foldcut.Top1(labels) (--labels labels.npy)",
        )


def check_labelled(evaluate: Evaluate | Top1 | None, made: bool) -> None:
    """Raise CalibrationError for labels of samples that were made from the network alone."""
    if isinstance(evaluate, Top1) and made:
        raise CalibrationError(
            "there are labels, but the samples are made from the network alone, and nobody knows their classes",
            hint="pass the samples that the labels are of, or evaluate=, a function that has data of its own",
        )


def check_labels(evaluate: Evaluate | Top1 | None, samples: CalibrationSet) -> None:
    """Raise CalibrationError for labels that are not those of the samples: before the network is captured, since
    nothing but their number has to be known."""
    check_labelled(evaluate, said_of(samples) is not None)
    if isinstance(evaluate, Top1):
        evaluate.check_count(samples)


def check_output(evaluate: Evaluate | Top1 | None, program: Program) -> None:
    """Raise CalibrationError for labels that a network has no output for."""
    if isinstance(evaluate, Top1):
        evaluate.check_classes(program)


def metric_of(
    evaluate: Evaluate | Top1 | None,
    program: Program,
    samples: CalibrationSet,
    test: CalibrationSet,
    clock: StageClock,
) -> Metric | None:
    """What reads the metric of a compile. Labels have been checked: `check_labels`, `check_output`."""
    if evaluate is None:
        return None
    if isinstance(evaluate, Top1):
        return Metric(evaluate.name, evaluate.bound(program, samples, test), program, clock, on_test=True)
    user = evaluate
    return Metric(metric_name(user), lambda network: user(module_of(as_stored(network))), program, clock)
