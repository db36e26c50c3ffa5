"""Calibration data bound to the inputs of a network: every common form, and what is left out by name."""

import warnings
from collections import UserDict, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import foldcut
import numpy as np
import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.data.input_binding import ForwardInputs
from foldcut.compiler.data.sample_reading import read_data
from foldcut.compiler.export.exporter import to_exported, to_onnx
from foldcut.compiler.frontend.model_inputs import needed_inputs
from foldcut.compiler.support.errors import CalibrationError
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

pytestmark = pytest.mark.usefixtures("quick_measurement")

IDS = torch.arange(60).view(10, 6) % 7
MASK = (torch.arange(60).view(10, 6) % 5 > 0).long()
LABELS = torch.arange(10) % 3
IMAGES = torch.randn(10, 3, 8, 8)


class Text(nn.Module):
    """Tokens with an optional mask and optional labels, for which it adds a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> dict[str, torch.Tensor]:
        if input_ids is None:
            raise ValueError("input_ids are needed")
        hidden = self.table(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask[:, :, None]
        found = {"logits": self.head(hidden.mean(1))}
        if labels is not None:
            found["loss"] = nn.functional.cross_entropy(found["logits"], labels)
        return found


class Masked(nn.Module):
    """An optional second input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.table(ids)
        return hidden if mask is None else hidden * mask[:, :, None]


class Conv(nn.Module):
    def __init__(self, wide: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x: torch.Tensor, features: bool = False) -> torch.Tensor:
        return self.conv(x)


class AnyArguments(nn.Module):
    """A wrapper that hands on whatever comes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Rows(Dataset[Any]):
    """Single samples with their labels, read by index."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index >= 10:
            raise IndexError
        return IMAGES[index], int(LABELS[index])


class Tokens(UserDict[str, Any]):
    """As what a tokenizer returns."""


Pair = namedtuple("Pair", ["image", "label"])
Named = namedtuple("Named", ["labels", "input_ids"])


@dataclass
class Row:
    input_ids: Any
    attention_mask: Any = None


def read(model: nn.Module, data: Any) -> CalibrationSet:
    return CalibrationSet.of(data, inputs=needed_inputs(model.eval()))


def as_batch(samples: CalibrationSet) -> Any:
    return samples.batch(slice(None))


def listed(tensor: torch.Tensor) -> list[Any]:
    found: list[Any] = tensor.tolist()
    return found


def loader(*tensors: torch.Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors), batch_size=4)


TEXT_FORMS = {
    "dict": {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS},
    "tokenizer": Tokens(input_ids=IDS, attention_mask=MASK, labels=LABELS),
    "tokenizer's lists": Tokens(input_ids=listed(IDS), attention_mask=listed(MASK)),
    "other order": {"labels": LABELS, "attention_mask": MASK, "input_ids": IDS},
    "rows of lists": [
        {"input_ids": listed(i), "attention_mask": listed(m), "labels": int(c), "text": "a text"}
        for i, m, c in zip(IDS, MASK, LABELS, strict=True)
    ],
    "rows of arrays": [
        {"input_ids": i.numpy(), "attention_mask": m.numpy(), "labels": 1} for i, m in zip(IDS, MASK, strict=True)
    ],
    "batches of dicts": [
        {"input_ids": i, "attention_mask": m} for i, m in zip(IDS.split(4), MASK.split(4), strict=True)
    ],
    "None entries": {"input_ids": IDS, "attention_mask": MASK, "labels": None},
    "dataclass": Row(IDS, MASK),
    "loader": loader(IDS, MASK, LABELS),
    "tuple": (IDS, MASK, None),
    "int32": {"input_ids": IDS.int(), "attention_mask": MASK.int()},
}


@pytest.mark.parametrize("form", TEXT_FORMS)
def test_tokens_with_a_mask_in_many_forms(form: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        samples = read(Text(), TEXT_FORMS[form])
    batch = as_batch(samples)
    ids, mask = batch if isinstance(batch, tuple) else (batch["input_ids"], batch["attention_mask"])
    assert torch.equal(ids.long(), IDS) and torch.equal(mask.long(), MASK)
    assert len(samples.leaves) == 2
    assert [f.name for f in foldcut.capture(Text().eval(), samples.batch(slice(0, 2))).outputs] == ["logits"]


def test_a_loader_of_tokens_and_masks_keeps_the_mask() -> None:
    batch = as_batch(read(Masked(), loader(IDS, MASK)))
    assert isinstance(batch, tuple) and torch.equal(batch[1], MASK)


def test_a_mask_of_ones_is_an_input_though_it_changes_nothing() -> None:
    assert len(read(Masked(), loader(IDS, torch.ones_like(MASK))).leaves) == 2


def test_labels_are_named_when_they_are_left_out() -> None:
    with pytest.warns(UserWarning, match="'labels' \\(with it the network only returns a loss\\)"):
        samples = read(Text(), TEXT_FORMS["dict"])
    assert samples.ignored == ("'labels' (with it the network only returns a loss)",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = read(Conv(), loader(IMAGES, LABELS))  # too common for a warning: the report has it
    assert images.ignored == ("field 2",)
    assert torch.equal(as_batch(images), IMAGES)


def test_an_option_is_no_input() -> None:
    """The second parameter is a flag: a label is not taken for it, by position or by name."""
    assert len(read(Conv(), (IMAGES, LABELS)).leaves) == 1
    with pytest.warns(UserWarning, match="'features'"):
        assert list(as_batch(read(Conv(), {"x": IMAGES, "features": LABELS}))) == ["x"]


def test_an_optional_input_that_cannot_be_meant_is_left_out() -> None:
    """Labels behind tokens do not have the form of a mask."""
    with pytest.warns(UserWarning, match="field 2 \\(the network does not run with it\\)"):
        assert torch.equal(as_batch(read(Masked(), loader(IDS, LABELS))), IDS)


def test_required_targets_are_inputs() -> None:
    class Loss(nn.Module):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(x, labels)

    assert len(read(Loss(), (torch.randn(10, 3), LABELS)).leaves) == 2


@pytest.mark.parametrize(
    "data",
    [
        [(image, int(label)) for image, label in zip(IMAGES, LABELS, strict=True)],
        list(IMAGES),
        [image.numpy() for image in IMAGES],
        Rows(),
        DataLoader(Rows(), batch_size=None),
        [Pair(image, label) for image, label in zip(IMAGES.split(4), LABELS.split(4), strict=True)],
        {"pixel_values": IMAGES},
        (IMAGES, None),
    ],
    ids=["pairs", "images", "arrays", "data set", "unbatched loader", "named tuples", "one other name", "None"],
)
def test_images_in_many_forms(data: Any) -> None:
    samples = read(Conv(), data)
    assert len(samples.leaves) == 1 and torch.equal(samples.leaves[0], IMAGES)


class Pooled(nn.Module):
    """Tokens: it also runs with a single row of them, and without a batch its output is of one width."""

    def __init__(self, width: int, aside: bool = False) -> None:
        super().__init__()
        self.table, self.head, self.aside = nn.Embedding(7, 4), nn.Linear(4, width), aside

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        scores = self.head(torch.relu(self.table(ids)))
        found = [scores.mean(-2)]
        if self.aside:
            found.append(scores.square().mean())
        if labels is not None:
            found.append(nn.functional.cross_entropy(scores.flatten(0, -2), labels.flatten()))
        return found


class PooledImages(nn.Module):
    """Convolutions take images without a batch as well."""

    def __init__(self, inside: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((-2, -1))


SINGLE = {
    "rows": lambda: list(IDS),
    "arrays": lambda: [row.numpy() for row in IDS],
    "lists": lambda: listed(IDS),
    "dicts": lambda: [{"ids": row} for row in IDS],
    "dicts of lists": lambda: [{"ids": listed(row)} for row in IDS],
    "tuples": lambda: [(row,) for row in IDS],
    "generator": lambda: (row for row in IDS),
    "labelled": lambda: [{"ids": row, "labels": row % 2} for row in IDS],
    "batches": lambda: list(IDS.split(4)),
    "batches of one": lambda: list(IDS.split(1)),
    "batches of dicts": lambda: [{"ids": rows, "labels": rows % 2} for rows in IDS.split(4)],
    "loader": lambda: loader(IDS),
    "loader of batches": lambda: DataLoader(TensorDataset(IDS), batch_sampler=[[*range(4)], [*range(4, 10)]]),
}


@pytest.mark.parametrize("form", SINGLE)
def test_single_samples_that_run_as_a_batch_are_single_samples(form: str) -> None:
    """The outputs tell: for a batch they have a row for each sample, whatever their width is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for net in (Pooled(2), Pooled(3), Pooled(4), Pooled(6), Pooled(4, aside=True)):
            samples = read(net, SINGLE[form]())
            assert len(samples.leaves) == 1 and torch.equal(samples.leaves[0], IDS)


@pytest.mark.parametrize("inside", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_single_images_are_single_images(inside: int, width: int) -> None:
    images, net = torch.rand(9, inside, 8, 8), PooledImages(inside, width)
    for data in (list(images), list(images.split(1)), list(images.split(4)), [images]):
        assert torch.equal(read(net, data).leaves[0], images)


def test_items_that_may_be_either_are_batches() -> None:
    rows = torch.rand(10, 6, 5)
    assert read(nn.Linear(5, 2), list(rows)).leaves[0].shape == (60, 5)
    assert read(nn.Linear(5, 2), list(rows.flatten(0, 1).split(7))).leaves[0].shape == (60, 5)


def test_a_loader_gives_batches_and_nothing_is_tried() -> None:
    """Also where the outputs have no row for each sample, and where labels are a list of numbers."""

    def refused(batch: Any) -> Any:
        raise AssertionError("a loader was tried")

    def collated(rows: list[Any]) -> dict[str, Any]:
        return {"ids": torch.stack([row for (row,) in rows]), "weights": [1.0] * len(rows)}

    known = ForwardInputs(names=("ids", "weights"), required=frozenset({"ids", "weights"}), run=refused)
    both = DataLoader(TensorDataset(IDS), batch_size=4, collate_fn=collated)
    assert [len(leaf) for leaf in CalibrationSet.of(both, inputs=known).leaves] == [10, 10]


def test_a_list_of_numbers_is_a_sample_without_a_network_too() -> None:
    assert torch.equal(CalibrationSet.of(listed(IDS)).leaves[0], IDS)


def test_rows_of_numbers() -> None:
    rows = torch.randn(8, 5)
    for data in (list(rows), listed(rows), [r.numpy() for r in rows], [{"input": listed(r)} for r in rows]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            samples = read(nn.Linear(5, 2), data)
        assert torch.allclose(samples.leaves[0], rows) and samples.leaves[0].dtype == torch.float32


def test_what_anything_may_be_handed_to() -> None:
    """A wrapper with *args and **kwargs: what the network reads is an input."""
    assert len(read(AnyArguments(Masked()), loader(IDS, MASK)).leaves) == 2
    with pytest.warns(UserWarning, match="'labels'"):
        assert set(as_batch(read(AnyArguments(Text()), TEXT_FORMS["dict"]))) == {"input_ids", "attention_mask"}


def test_a_named_tuple_is_bound_by_its_names() -> None:
    with pytest.warns(UserWarning, match="'labels'"):
        batch = as_batch(read(Text(), [Named(LABELS, IDS)]))
    assert list(batch) == ["input_ids"] and torch.equal(batch["input_ids"], IDS)


def test_an_input_in_between_may_be_left_out() -> None:
    class Three(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor | None = None, c: torch.Tensor | None = None) -> Any:
            return a if c is None else a + 2 * c

    batch = as_batch(read(Three(), (torch.ones(4, 2), None, torch.zeros(4, 2))))
    assert list(batch) == ["a", "c"]


@pytest.mark.parametrize("net_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_another_precision_is_converted_aloud(net_dtype: torch.dtype, dtype: torch.dtype) -> None:
    net = nn.Linear(3, 2).to(net_dtype)
    data = torch.randn(4, 3).to(dtype)
    if dtype == net_dtype:
        assert read(net, data).leaves[0].dtype == dtype
        return
    with pytest.warns(UserWarning, match="are converted to what the network takes"):
        samples = read(net, data)
    assert torch.equal(samples.leaves[0], data.to(net_dtype))


def test_float64_files_meet_float32_networks(tmp_path: Any) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(6, 3, 8, 8)))
    with pytest.warns(UserWarning, match="float64 to float32"):
        samples = read(Conv(), foldcut.read_calibration(tmp_path / "x.npy"))
    assert samples.leaves[0].dtype == torch.float32
    samples.aligned(foldcut.capture(Conv().eval(), samples.batch(slice(0, 2)))).check(
        foldcut.capture(Conv().eval(), samples.batch(slice(0, 2)))
    )


def test_a_set_that_was_read_without_the_network_is_bound_too(tmp_path: Any) -> None:
    np.savez(tmp_path / "xy.npz", x=IMAGES.numpy(), y=LABELS.numpy())
    with pytest.warns(UserWarning, match="'y'"):
        samples = read(Conv(), foldcut.read_calibration(tmp_path / "xy.npz"))
    assert list(as_batch(samples)) == ["x"]
    assert read(Conv(), samples) is samples


def test_names_may_be_given() -> None:
    """What one leaves out oneself needs no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = CalibrationSet.of(TEXT_FORMS["dict"], inputs=("input_ids",))
    assert list(as_batch(samples)) == ["input_ids"] and read(Text(), samples) is samples
    both = CalibrationSet.of(TEXT_FORMS["dict"], inputs=("input_ids", "labels"))
    assert list(as_batch(read(Text(), both))) == ["input_ids", "labels"]


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (Conv(), {"image": IMAGES, "label": LABELS}, "no field for input 'x'"),
        (Masked(), {"mask": MASK}, "no field for input 'ids'"),
        (Text(), {"input_ids": [[1, 2, 3], [1, 2]]}, "differ in length"),
        (Text(), [{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2]}], "differ in shape"),
        (Text(), [{"input_ids": [1, 2]}, {"labels": 1}], "differ in structure"),
        (Conv(), ["a", "b"], "not numbers"),
        (Conv(), (None, None), "is empty|no field"),
    ],
    ids=["unknown names", "missing", "ragged lists", "ragged rows", "other fields", "text", "nothing"],
)
def test_what_cannot_be_bound_is_refused(model: nn.Module, data: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        read(model, data)
    assert caught.value.hint


def test_integers_for_weights_of_fractions_are_not_guessed_at() -> None:
    data = (255 * torch.rand(4, 3, 8, 8)).to(torch.uint8)
    with pytest.raises(foldcut.CompilerError, match=r"uint8|Byte|dtype"):
        foldcut.compile(Conv().eval(), data, goal=foldcut.Channels(0.5), progress=False, cache=False)


def test_exported_networks_and_files_are_bound_by_name(tmp_path: Any) -> None:
    program = foldcut.capture(Masked().eval(), {"ids": IDS[:2], "mask": MASK[:2]})
    exported = to_exported(program)
    torch.export.save(exported, tmp_path / "net.pt2")
    (tmp_path / "net.onnx").write_bytes(to_onnx(program))
    for model in (exported, tmp_path / "net.pt2", tmp_path / "net.onnx"):
        known: Any = needed_inputs(model)
        assert len(CalibrationSet.of(loader(IDS, MASK, LABELS), inputs=known).leaves) == 2
        with pytest.warns(UserWarning, match="int32 to int64"):
            narrow = CalibrationSet.of((IDS.int(), MASK), inputs=known)
        assert narrow.leaves[0].dtype == torch.int64


def test_the_network_is_left_as_it_was() -> None:
    net = Text().train()
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="labels"):
        CalibrationSet.of(TEXT_FORMS["dict"], inputs=needed_inputs(net))
    assert all(module.training for module in net.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_stream_beyond_the_bound_is_sampled() -> None:
    """Class after class, and only 100 of 1,000 samples may be kept: all classes are among them."""

    def batches() -> Iterator[torch.Tensor]:
        yield from (torch.arange(1000).view(-1, 1) // 100).split(7)

    with pytest.warns(UserWarning, match="more calibration samples came.* a random sample of 100 of 1,000 is"):
        kept = read_data(batches(), None, most_bytes=800).leaves[0]
    counts = torch.bincount(kept.flatten(), minlength=10)
    # chi square with 9 degrees of freedom: above 33.7 once in ten thousand
    assert len(kept) == 100 and float(((counts - 10.0) ** 2 / 10).sum()) < 33.7
    with pytest.warns(UserWarning, match="random sample"):
        assert torch.equal(read_data(batches(), None, most_bytes=800).leaves[0], kept)
    everything = read_data(batches(), None).leaves[0]
    assert torch.equal(everything, torch.arange(1000).view(-1, 1) // 100)
    assert len(CalibrationSet.of(batches(), limit=30).leaves[0]) == 30
