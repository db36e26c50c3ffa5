"""Every error that foldcut raises on purpose, and `Reject`, the value that says why something was left alone.

An error carries where it happened and what it expected, so that a caller can act on the fields and a person
on the sentence. Messages always end with what to do next.
"""

from __future__ import annotations

from dataclasses import dataclass


class CompilerError(Exception):
    """Base of all foldcut errors.

    Fields: `stage` is the step that failed (``capture``, ``calibrate``, ``resolve`` ...), `node` the graph node
    concerned, `expected` and `actual` the two sides of a failed check, `excerpt` the lines of the graph
    around the node, `hint` what to do. All but `stage` may be None.
    """

    stage = "compile"

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        node: str | None = None,
        expected: object = None,
        actual: object = None,
        excerpt: str | None = None,
    ) -> None:
        self.message = message
        self.hint = hint
        self.node = node
        self.expected = expected
        self.actual = actual
        self.excerpt = excerpt
        super().__init__(self._render())

    def _render(self) -> str:
        lines = [f"{self.stage}: {self.message}"]
        if self.node is not None:
            lines.append(f"  at node: {self.node}")
        if self.expected is not None or self.actual is not None:
            lines.append(f"  expected: {self.expected}")
            lines.append(f"  actual:   {self.actual}")
        if self.excerpt:
            lines.append("  in the graph:")
            lines.extend(f"    {line}" for line in self.excerpt.splitlines())
        if self.hint:
            lines.append(f"  what to do: {self.hint}")
        return "\n".join(lines)


class CaptureError(CompilerError):
    """The model could not be captured into a graph."""

    stage = "capture"


class CalibrationError(CompilerError):
    """The calibration set is empty, of the wrong shape or dtype, or holds values that are not finite."""

    stage = "calibrate"


class RewriteError(CompilerError):
    """A rewrite was asked for something that the graph does not allow, or failed its own check."""

    stage = "rewrite"


class ProgramError(CompilerError):
    """A Program does not hold what it promises: shapes, names or tensors disagree with its graph."""

    stage = "check"


class PlanError(CompilerError):
    """A plan does not fit the program that it was applied to, or its file cannot be read."""

    stage = "plan"


class GoalError(CompilerError):
    """The goal is not a legal one, or cannot be met.

    When it cannot be met, `best` holds the best result reached (a `Compiled`), so that no work is lost.
    """

    stage = "goal"

    def __init__(self, message: str, *, best: object = None, hint: str | None = None) -> None:
        self.best = best
        super().__init__(message, hint=hint)


class MimicError(CompilerError):
    """The network cannot be trained to mimic another: an operator has no gradient."""

    stage = "mimic"


class ExportError(CompilerError):
    """The program could not be written as ONNX or `.pt2`, or what was written computes something else."""

    stage = "export"


class BackendError(CompilerError):
    """A backend is unknown, not installed, or refused the model."""

    stage = "backend"


class OutputError(CompilerError):
    """The output folder or file cannot be written."""

    stage = "output"


@dataclass(frozen=True, kw_only=True)
class Reject:
    """Why a candidate was left alone: a value to show and to test, not an exception."""

    reason: str
    node: str

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}"


def first_line(cause: BaseException) -> str:
    """What a foreign error says in its first non-empty line; its type when it says nothing."""
    return next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)


def named_first_line(cause: BaseException) -> str:
    """The same with the error's type in front."""
    said = first_line(cause) if str(cause).strip() else "no message"
    return f"{type(cause).__name__}: {said}"
