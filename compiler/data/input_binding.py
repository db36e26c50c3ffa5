"""Which fields of calibration data are inputs of the network: bound by what its forward() takes.

Fields come by position (tuples, lists) or by name (dicts and what behaves like one, named tuples, dataclasses). A field
for a parameter without default is an input. One for a parameter with default None may be an input (a mask) or a
training target (labels), and names do not tell: two samples are run with it and without. It is a target when the
network then returns one number more for the whole batch, a loss, or does not run with it. A parameter whose default is
a flag or a number takes no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeAlias

import torch

from ..ir.program import Batch
from ..support.errors import CalibrationError

Key: TypeAlias = int | str
Fields: TypeAlias = dict[Key, Any]
#: So many samples of a field.
Example: TypeAlias = Callable[[Key, int], Any]


@dataclass(frozen=True, kw_only=True)
class ForwardInputs:
    """What a network can be called with: the parameters that may take a tensor.

    `names` in order (None for a flag), `keywords` those that go by name only, `required` those without default; `more`
    and `more_names` that there are ``*args`` and ``**kwargs``. `named` False: only the number of inputs is known;
    `chosen`: they were named by the user, who knows what is left out. `dtype` is that of the network's floating-point
    weights, `dtypes` what inputs are known to want. `run` gives the outputs for a batch of samples, and raises whatever
    the network raises.
    """

    names: tuple[str | None, ...] = ()
    keywords: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
    more: bool = False
    more_names: bool = False
    named: bool = True
    chosen: bool = False
    dtype: torch.dtype | None = None
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    run: Callable[[Batch], Any] | None = None

    @classmethod
    def of(cls, inputs: ForwardInputs | int | Sequence[str] | None) -> ForwardInputs | None:
        """From a number of inputs or from the names of those to take."""
        if inputs is None or isinstance(inputs, ForwardInputs):
            return inputs
        named = not isinstance(inputs, int)
        if isinstance(inputs, int):
            names = tuple(f"input {i}" for i in range(inputs))
        else:
            names = (inputs,) if isinstance(inputs, str) else tuple(inputs)
        return cls(names=names, required=frozenset(names) if named else frozenset(), named=named, chosen=named)

    def takes(self, key: Key) -> bool:
        """Whether a field may be an input."""
        if isinstance(key, int):
            return self.more if key >= len(self.names) else self.names[key] is not None
        return key in self.names or key in self.keywords or (self.more_names and None not in self.names)

    def name(self, key: Key) -> str | None:
        """The parameter that a field goes to; None when it has no name."""
        return (self.names[key] if key < len(self.names) else None) if isinstance(key, int) else key

    def declares(self, key: Key) -> bool:
        """Whether the signature has a parameter of its own for the field."""
        name = self.name(key)
        return name is not None and (name in self.names or name in self.keywords)


@dataclass(frozen=True, kw_only=True)
class Binding:
    """The fields that are inputs, in order, and in words those that are not. `plain` leaves out fields beyond the
    parameters, as labels beside images are; `doubtful` is for what one might have meant as an input. `fit` is the share
    of the network's outputs that have a row for each sample, -1 when it does not run with them or that was not
    tried."""

    kept: tuple[Key, ...]
    names: Mapping[Key, str | None]
    plain: tuple[str, ...] = ()
    doubtful: tuple[str, ...] = ()
    fit: float = -1.0

    def __call__(self, found: Fields) -> Batch:
        """The inputs of one item in the form that the network is called with. Raises CalibrationError."""
        missing = [key for key in self.kept if found.get(key) is None]
        if missing:
            raise CalibrationError(
                "calibration batches differ in structure",
                expected=f"fields {', '.join(map(str, self.kept))}",
                actual=f"no {', '.join(map(str, missing))}",
                hint="yield the same inputs in every batch",
            )
        if all(isinstance(key, str) for key in self.kept):
            return {str(key): found[key] for key in self.kept}
        if self.kept == tuple(range(len(self.kept))):
            return found[0] if len(self.kept) == 1 else tuple(found[key] for key in self.kept)
        # an input in between is left out: those behind it go by name
        named = {self.names.get(key): found[key] for key in self.kept}
        if None in named:
            raise CalibrationError(
                "an input is None, and those behind it have no name", hint="pass a dict by input name"
            )
        return {str(name): value for name, value in named.items()}

    @property
    def ignored(self) -> tuple[str, ...]:
        return (*self.plain, *self.doubtful)


def fields_of(item: Any, inputs: ForwardInputs | None) -> Fields:
    """The fields of one item: by name where it has names that say something about the network, else by position."""
    if isinstance(item, Mapping):
        found = {str(key): value for key, value in item.items()}
        alone = [value for value in found.values() if value is not None]
        unknown = inputs is not None and inputs.named and not any(map(inputs.takes, found))
        if unknown and len(alone) == 1:
            return {0: alone[0]}
        return dict(found.items())
    names: tuple[str, ...] = getattr(item, "_fields", ())
    if is_dataclass(item) and not isinstance(item, type):
        names = tuple(f.name for f in fields(item))
        item = tuple(getattr(item, name) for name in names)
    if names and inputs is not None and inputs.named and any(map(inputs.declares, names)):
        return dict(zip(names, item, strict=True))
    return dict(enumerate(item)) if isinstance(item, (tuple, list)) else {0: item}


def bind(
    found: Fields, inputs: ForwardInputs | None, example: Example, *, whole: bool = False, judged: bool = False
) -> Binding:
    """Decide which fields of an item are inputs. `example` gives so many samples of a field; `whole` says that the item
    is all of the data: then nothing of it is a label when nothing is known about the network. `judged` asks for the
    `fit` of what is bound.

    Raises CalibrationError when an input has no field.
    """
    given = [key for key, value in found.items() if value is not None]
    if inputs is None or (not inputs.named and all(isinstance(key, str) for key in given)):
        last = inputs is None and not whole and len(given) > 1 and isinstance(given[-1], int)
        kept = given[:-1] if last else given
        return Binding(kept=tuple(kept), names={}, plain=tuple(_words(key) for key in given if key not in kept))
    taken = [key for key in given if inputs.takes(key)]
    names = {key: inputs.name(key) for key in taken}
    _check_required(inputs, found, set(names.values()))
    beyond = tuple(_words(key) for key in given if key not in taken)
    plain = beyond if inputs.chosen or all(isinstance(key, int) for key in given) else ()
    trial = _Trial(inputs, names, example)
    kept = trial.inputs(taken)
    return Binding(
        kept=tuple(kept),
        names=names,
        plain=plain,
        doubtful=(*(() if plain else beyond), *trial.reasons),
        fit=trial.fit(kept) if judged else -1.0,
    )


def _check_required(inputs: ForwardInputs, found: Fields, bound: set[str | None]) -> None:
    missing = sorted(inputs.required - bound)
    if missing:
        wanted = [name for name in inputs.names if name is not None] + sorted(inputs.keywords)
        raise CalibrationError(
            f"the calibration samples have no field for input {missing[0]!r}",
            expected=f"{', '.join(wanted)} (those that must be there: {', '.join(sorted(inputs.required))})",
            actual=", ".join(_words(key) for key in found) or "no fields",
            hint="name the fields as the parameters of forward(), or give tuples in their order",
        )


class _Trial:
    """Runs of two samples with and without a field that need not be an input, and of three."""

    def __init__(self, inputs: ForwardInputs, names: Mapping[Key, str | None], example: Example) -> None:
        self._inputs, self._names, self._example = inputs, names, example
        self._outputs: dict[tuple[tuple[Key, ...], int], list[torch.Tensor] | None] = {}
        self.reasons: list[str] = []

    def inputs(self, taken: list[Key]) -> list[Key]:
        """Those of the fields that are inputs."""
        kept = list(taken)
        if self._inputs.run is None:
            return kept
        for key in reversed(taken):
            if self._names[key] in self._inputs.required or len(kept) == 1:
                continue
            reason = self._no_input(kept, key)
            if reason:
                kept.remove(key)
                self.reasons.append(f"{_words(key)} ({reason})")
        return kept

    def fit(self, kept: list[Key]) -> float:
        """The share of outputs with two rows for two samples and three for three; a width of two is not taken for two
        samples. -1 when the network does not run with these."""
        two = self._of(kept) if self._inputs.run is not None else None
        if two is None:
            return -1.0
        pairs = zip(two, self._of(kept, 3) or (), strict=False)
        follow = sum(a.shape[:1] == (2,) and b.shape[:1] == (3,) for a, b in pairs)
        return follow / max(1, len(two))

    def _no_input(self, kept: list[Key], key: Key) -> str:
        """Why a field is no input; empty when it is one."""
        without = self._of([other for other in kept if other != key])
        if without is None:
            return ""
        outputs = self._of(kept)
        if outputs is None:
            return "the network does not run with it"
        if _losses(outputs) > _losses(without):
            return "with it the network only returns a loss"
        if not self._inputs.declares(key) and _equal(outputs, without):
            return "the network does not read it"
        return ""

    def _of(self, kept: list[Key], count: int = 2) -> list[torch.Tensor] | None:
        chosen = tuple(kept)
        if (chosen, count) not in self._outputs:
            assert self._inputs.run is not None
            try:
                batch = Binding(kept=chosen, names=self._names)({key: self._example(key, count) for key in chosen})
                self._outputs[chosen, count] = list(_tensors(self._inputs.run(batch)))
            except Exception:  # a network may raise anything when it is called otherwise than it should be
                self._outputs[chosen, count] = None
        return self._outputs[chosen, count]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of any output."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        for f in fields(value):
            yield from _tensors(getattr(value, f.name))


def _losses(outputs: list[torch.Tensor]) -> int:
    """Outputs that are one number for the whole batch."""
    return sum(output.dim() == 0 for output in outputs)


def _equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )


def _words(key: Key) -> str:
    return f"field {key + 1}" if isinstance(key, int) else repr(key)
