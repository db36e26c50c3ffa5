"""The user's own metric: read for the original and for few finished networks, counted and timed."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from inspect import Signature, signature
from typing import Any

from torch import nn

from ..ir.graph_copy import copied
from ..ir.program import Program
from ..support.errors import CompilerError, named_first_line
from ..support.progress import StageClock
from .kept_state import state_kept
from .reading import Loss, NoNumberError, Reading

#: What a user passes: a module as they would call it -> a number, larger is better, or one for each sample.
Evaluate = Callable[[nn.Module], Any]


class Metric:
    """Reads what is computed from a network, once for each.

    What goes wrong ends nothing: a metric that raises, or gives no finite number, is told of in a warning, and
    `read` is None. `on_test` says that it looks at the samples that test. `finalists` are the networks that it was
    asked about in a search, as a report shows them.
    """

    def __init__(
        self,
        name: str,
        measure: Callable[[Program], Any],
        original: Program,
        clock: StageClock,
        *,
        on_test: bool = False,
    ) -> None:
        self.name, self.on_test = name, on_test
        self.calls, self.seconds = 0, 0.0
        self.told: list[str] = []
        self.finalists: list[dict[str, Any]] = []
        self._measure, self._original, self._clock = measure, original, clock
        self._readings: dict[str, Reading | None] = {}

    def read(self, program: Program) -> Reading | None:
        """What the metric says of a network; None where it says nothing."""
        key = program.fingerprint
        if key not in self._readings:
            self._readings[key] = self._called(program)
        return self._readings[key]

    def loss(self, program: Program) -> Loss | None:
        """What a network loses against the original; None where the metric says nothing of one of them. The metric is
        not called for a network that nothing can be said of."""
        return self.between(self._original, program)

    def between(self, program: Program, other: Program) -> Loss | None:
        """What `other` loses against a network."""
        before = self.read(program)
        after = None if before is None else self.read(other)
        return None if before is None or after is None else Loss.between(before, after)

    def best(self, programs: Sequence[Program]) -> int:
        """Which of some networks, in the order in which they would be taken without it, is the best by the metric: a
        later one only where it gains more than a standard error, or anything at all where there is none."""
        lead = 0
        for place in range(1, len(programs)):
            loss = self.between(programs[lead], programs[place])
            if loss is not None and -loss.value > (loss.error or 0.0):
                lead = place
        return lead

    def to_dict(self, program: Program) -> dict[str, Any]:
        """What a report says: the original and the result, how far apart they are, and what it took to know that."""
        before, after, loss = self.read(self._original), None, self.loss(program)
        if before is not None:
            after = self.read(program)
        return {
            "name": self.name,
            "before": None if before is None else before.value,
            "after": None if after is None else after.value,
            **loss_entries(loss),
            "on_test": self.on_test,
            "calls": self.calls,
            "seconds": round(self.seconds, 3),
            "told": list(self.told),
            "finalists": list(self.finalists),
        }

    def _called(self, program: Program) -> Reading | None:
        self.calls += 1
        began = time.monotonic()
        try:
            with self._clock.stage("evaluate"), state_kept():
                return Reading.of(self._measure(program), sampled=self.on_test)
        except NoNumberError as cause:
            self._tell(str(cause))
        # the user's own code raises whatever it raises, scripts end themselves
        except (Exception, SystemExit) as cause:
            self._tell(f"failed: {named_first_line(cause)}")
        finally:
            self.seconds += time.monotonic() - began
        return None

    def _tell(self, what: str) -> None:
        said = f"the metric {self.name} {what}"
        if said not in self.told:
            self.told.append(said)
            warnings.warn(f"{said}; the output error decides instead", stacklevel=4)


def loss_entries(loss: Loss | None) -> dict[str, Any]:
    """A loss as a report has it."""
    if loss is None:
        return {"loss": None, "most": None, "samples": None}
    return {"loss": loss.value, "most": loss.most, "samples": loss.samples}


def module_of(program: Program) -> nn.Module:
    """A network as its user calls it: a module of its own, so that what is done to it (moved, frozen, quantised) is
    done to nothing else."""
    return copied(program.module).eval()


def check_evaluate(evaluate: object) -> None:
    """Raise CompilerError for what cannot be called with one module."""
    example = "a function of the network alone: evaluate(module) -> a number, larger is better"
    if not callable(evaluate):
        raise CompilerError(f"evaluate={_name(evaluate)} cannot be called", hint=f"give {example}")
    try:
        taken: Signature = signature(evaluate)
    except (ValueError, TypeError):  # some of C's functions do not say what they take
        return
    try:
        taken.bind(None)
    except TypeError as cause:
        raise CompilerError(
            f"evaluate={_name(evaluate)} cannot be called with the network alone: {cause}",
            expected="evaluate(module)",
            actual=f"{_name(evaluate)}{taken}",
            hint=f"give {example}; bind what else it needs: evaluate=lambda module: {_name(evaluate)}(module, ...)",
        ) from cause


def metric_name(evaluate: object) -> str:
    """What a report calls a metric: the name of the function, where it has one."""
    name = _name(evaluate)
    return "own metric" if name == "<lambda>" else name


def _name(evaluate: object) -> str:
    inner = getattr(evaluate, "func", evaluate)  # of functools.partial
    return str(getattr(inner, "__name__", type(inner).__name__))
