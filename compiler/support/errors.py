"""Every error that foldcut raises on purpose, and `Reject`, the value that says why something was left alone.

An error carries where it happened and what it expected, so that a caller can act on the fields and a person
on the sentence. Messages always end with what to do next.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Self


class CompilerError(Exception):
    """Base class of the errors that foldcut raises on purpose.

    The text of the error lists the fields that are set, the hint last. `stage` names the step that failed, such as
    ``capture``, ``calibrate`` or ``export``; each subclass sets it.

    Arguments:
        message: What is wrong, in one sentence.
        hint: What to do about it.
        node: Name of the graph node concerned.
        expected: What a failed check asked for.
        actual: What it found.
        excerpt: Lines of the graph text around the node.

    Example:
        >>> try:
        ...     foldcut.Channels(2)
        ... except foldcut.CompilerError as error:
        ...     print(error.stage, "|", error.message)
        goal | Channels(2) is not a goal
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

    def about(self, what: str) -> Self:
        """The same error, told of one of several things that were passed."""
        told = copy.copy(self)
        told.message = f"{what}: {self.message}"
        Exception.__init__(told, told._render())
        return told

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (type(self), self.args, self.__dict__)

    def _render(self) -> str:
        lines = [f"{self.stage}: {self.message}"]
        if self.node is not None:
            lines.append(f"  at node: {self.node}")
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if self.actual is not None:
            lines.append(f"  actual:   {self.actual}")
        if self.excerpt:
            lines.append("  in the graph:")
            lines.extend(f"    {line}" for line in self.excerpt.splitlines())
        if self.hint:
            lines.append(f"  what to do: {self.hint}")
        return "\n".join(lines)


def _remade(kind: type[CompilerError], args: tuple[object, ...], fields: dict[str, object]) -> CompilerError:
    """An error that another process has sent: `__init__` would put its text together a second time."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class CaptureError(CompilerError):
    """The model could not be captured into a graph.

    Raised when `torch.export` or the ONNX importer cannot take the model, when a file cannot be read as a network,
    when graph and model disagree, or when a batch does not have the structure of the captured inputs.
    """

    stage = "capture"


class CalibrationError(CompilerError):
    """The calibration set cannot be used.

    Raised when it is empty, ragged, not numeric or not finite, when its shapes or dtypes do not fit the inputs of the
    network, and for options of reading samples or of `MimicSettings` that are out of range.
    """

    stage = "calibrate"


class RewriteError(CompilerError):
    """A rewrite does not apply to the graph, or its result failed a check.

    Raised when a decision names a region, channel or layer that the program does not have or may not lose.
    """

    stage = "rewrite"


class ProgramError(CompilerError):
    """A `Program` breaks an invariant: shapes, names or tensors disagree with its graph.

    Raised by `Program.check`. The `node` and the lines around it are part of the error.
    """

    stage = "check"


class PlanError(CompilerError):
    """A plan does not fit the program, or cannot be read.

    Raised when a plan was made for another network or other weights, when it is malformed or of an unknown version,
    and when one of its decisions belongs to a rewrite that is not available.
    """

    stage = "plan"


class GoalError(CompilerError):
    """The goal is not valid, or cannot be met.

    Raised before anything is computed for a goal out of range and for rewrites that cannot serve it, and after the
    search when the result misses the goal. Patterns in `ignore` that match nothing raise it too, as do settings of
    `RankSettings` and `ChannelLimits` that are out of range.

    Arguments:
        message: What is wrong, in one sentence.
        best: The best result found, a `Compiled`, when the goal was missed; None otherwise.
        hint: What to do about it.

    Example:
        >>> try:
        ...     foldcut.Blocks(0)
        ... except foldcut.GoalError as error:
        ...     print(error.hint, error.best)
        give the number of blocks to drop, 1 or more None
    """

    stage = "goal"

    def __init__(self, message: str, *, best: object = None, hint: str | None = None) -> None:
        self.best = best
        super().__init__(message, hint=hint)


class MimicError(CompilerError):
    """The network cannot be trained to mimic another: an operator has no gradient."""

    stage = "mimic"


class ExportError(CompilerError):
    """The program could not be written as ONNX or ``.pt2``, or the file written computes something else."""

    stage = "export"


class BackendError(CompilerError):
    """The backend is unknown or not installed, or refused the model."""

    stage = "backend"


class OutputError(CompilerError):
    """A file or folder cannot be written, or a saved folder cannot be read.

    Raised by `Compiled.save` and `Sweep.save`, and by `load` and `apply` when a saved file is missing, damaged or
    from another run.
    """

    stage = "output"


class ProcessError(CompilerError):
    """The processes of a compile do not work together.

    Raised when one of them failed or ended, when they were started with unequal arguments or versions, and when there
    is no process group where one was asked for.
    """

    stage = "processes"


@dataclass(frozen=True, kw_only=True)
class Reject:
    """Why a candidate was left unchanged. A value to show and to test, not an exception.

    Arguments:
        reason: The reason, in one sentence.
        node: Name of the node or of the unit group concerned. May be empty.

    Example:
        >>> print(foldcut.Reject(reason="a value inside is also used outside", node="add_3"))
        add_3: a value inside is also used outside
    """

    reason: str
    node: str

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}"


def plural(count: int, one: str, many: str | None = None) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def first_line(cause: BaseException) -> str:
    """What a foreign error says in its first non-empty line; its type when it says nothing."""
    return next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)


def named_first_line(cause: BaseException) -> str:
    """The same with the error's type in front."""
    said = first_line(cause) if str(cause).strip() else "no message"
    return f"{type(cause).__name__}: {said}"
