"""How calibration samples are made from a network alone."""

from __future__ import annotations

from collections.abc import Collection, Set
from dataclasses import dataclass
from numbers import Integral

from ..support.errors import CalibrationError
from ..support.setting_checks import Allowed, check_number, check_whole, refuse, settled


@dataclass(frozen=True, kw_only=True)
class SynthesisSettings:
    """How calibration samples are made from a network alone, where there are no data.

    Images begin as dead leaves: shapes of random sizes and colours that cover each other, with the spectrum and the
    edges of photographs. Other floating-point inputs begin as Gaussian noise. Where a network has batch norms, the
    samples are then changed by gradient descent until the mean and the deviation of every channel in front of every
    batch norm are those that the batch norm remembers of the data (ZeroQ, arXiv 2001.00281; DeepInversion, arXiv
    1912.08795, both CVPR 2020). Integers for an embedding are uniform over its rows.

    Arguments:
        count: Number of samples.
        input_shape: Shape of one sample, such as ``(3, 224, 224)``. Needed where the network does not say: for a
            module, and for a file with dynamic sizes besides the batch.
        iterations: Steps of the gradient descent for each sample. 0 leaves the samples as they begin.
        batch: Samples that are changed together, whose statistics are compared. Fewer where memory is short.
        learning_rate: Size of the first step, in deviations of the inputs. It falls along a cosine.
        diverse: Weight of a term for classifiers, that each sample belongs to a class of its own choice, all equally
            often.
        smooth: Weight of the total variation of images.
        compete: Weight of the agreement with another network, the one that `synthesise` is given as `against`: samples
            then show where the two differ (Adaptive DeepInversion, section 3.3). None is 0.001 where there is another
            network; a weight without one is refused.
        seed: Seed of all random choices. None takes that of the compile.

    Raises:
        CalibrationError: If a setting is out of range or of the wrong type.

    Example:
        >>> foldcut.SynthesisSettings(count=200, input_shape=(3, 32, 32)).input_shape
        (3, 32, 32)
    """

    count: int = 500
    input_shape: tuple[int, ...] | None = None
    iterations: int = 24
    batch: int = 100
    learning_rate: float = 0.05
    diverse: float = 0.0
    smooth: float = 0.0
    compete: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        error = CalibrationError
        check_whole("count", self.count, Allowed(least=1), error=error)
        check_whole("iterations", self.iterations, Allowed(least=0), error=error)
        check_whole("batch", self.batch, Allowed(least=2), error=error)
        check_number("learning_rate", self.learning_rate, Allowed(above=0, most=10), error=error)
        for name in ("diverse", "smooth"):
            check_number(name, getattr(self, name), Allowed(least=0), error=error)
        check_number("compete", self.compete, Allowed(least=0, none=True), error=error)
        check_whole("seed", self.seed, Allowed(least=0, most=2**63 - 1, none=True), error=error)
        shape: object = self.input_shape
        if shape is not None:
            if not isinstance(shape, Collection) or isinstance(shape, (str, bytes, Set)) or not _sizes(shape):
                refuse(
                    "input_shape",
                    shape,
                    "the shape of one sample without the batch, such as (3, 224, 224), or None",
                    why="is not a shape",
                    error=error,
                )
            object.__setattr__(self, "input_shape", tuple(map(int, shape)))
        settled(self)


def _sizes(shape: Collection[object]) -> bool:
    return len(shape) > 0 and all(
        isinstance(size, Integral) and not isinstance(size, bool) and int(size) > 0 for size in shape
    )
