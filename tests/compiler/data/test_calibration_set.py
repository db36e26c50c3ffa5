"""The calibration set: everything that it reads, everything that it refuses, and the split."""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import foldcut
import numpy as np
import pytest
import torch
from foldcut.compiler.data.calibration_set import CalibrationSet, horizontal_flip, read_calibration, view_of
from foldcut.compiler.ir.program import Program
from foldcut.compiler.support.errors import CalibrationError
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset


def samples(count: int = 6, *shape: int) -> torch.Tensor:
    return torch.arange(float(count)).view(-1, *[1] * len(shape)).expand(count, *shape).clone()


def numbers(data: CalibrationSet, leaf: int = 0) -> list[float]:
    """The first value of each sample."""
    return data.leaves[leaf].flatten(1)[:, 0].tolist()


@pytest.mark.parametrize(
    "data",
    [
        samples(6, 3, 4),
        samples(6, 3, 4).numpy(),
        (samples(6, 3, 4),),
        list(samples(6, 3, 4).split(2)),
        [b.numpy() for b in samples(6, 3, 4).split(4)],
        iter(samples(6, 3, 4).split(1)),
        [(batch, torch.zeros(len(batch))) for batch in samples(6, 3, 4).split(2)],
        [[batch, torch.zeros(len(batch))] for batch in samples(6, 3, 4).split(2)],
    ],
    ids=["tensor", "array", "tuple", "list", "arrays", "iterator", "pairs", "list pairs"],
)
def test_one_input_in_many_forms(data: Any) -> None:
    read = CalibrationSet.of(data)
    assert len(read) == 6
    assert numbers(read) == [0, 1, 2, 3, 4, 5]
    assert read.leaves[0].shape == (6, 3, 4)


def test_a_tensor_comes_back_as_a_tensor() -> None:
    read = CalibrationSet.of(samples(5, 2))
    assert isinstance(read.batch(slice(0, 2)), torch.Tensor)
    assert [len(b) for b in read.batches(2)] == [2, 2, 1]
    assert torch.equal(torch.cat(list(read.batches(2))), samples(5, 2))


def test_tuples_and_dicts_keep_their_structure() -> None:
    a, b = samples(4, 2), 10 + samples(4, 3)
    first = CalibrationSet.of((a, b)).batch(slice(1, 3))
    assert isinstance(first, tuple)
    assert torch.equal(first[1], b[1:3])
    second = CalibrationSet.of({"b": b, "a": a}).batch(slice(1, 3))
    assert isinstance(second, dict)
    assert torch.equal(second["a"], a[1:3])
    assert torch.equal(second["b"], b[1:3])


def test_a_data_loader_and_its_labels() -> None:
    loader = DataLoader(TensorDataset(samples(6, 3), torch.arange(6)), batch_size=4)
    assert len(CalibrationSet.of(loader).leaves) == 1
    assert numbers(CalibrationSet.of(loader)) == [0, 1, 2, 3, 4, 5]
    assert len(CalibrationSet.of(loader, inputs=2).leaves) == 2


def test_a_generator_of_dicts() -> None:
    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for part in samples(6, 3).split(4):
            yield {"x": part, "y": 2 * part}

    read = CalibrationSet.of(batches())
    assert numbers(read, 1) == [0, 2, 4, 6, 8, 10]
    assert isinstance(read.batch(slice(0, 1)), dict)


def test_the_number_of_inputs_says_how_many_fields_are_no_labels() -> None:
    triple = [(samples(3, 2), samples(3, 2) + 1, samples(3, 2) + 2)]
    assert len(CalibrationSet.of(triple).leaves) == 2
    assert len(CalibrationSet.of(triple, inputs=1).leaves) == 1
    assert len(CalibrationSet.of(triple, inputs=3).leaves) == 3


def test_a_set_is_given_back_as_it_is() -> None:
    read = CalibrationSet.of(samples(3, 2))
    assert CalibrationSet.of(read) is read


def test_integer_inputs_are_kept() -> None:
    assert CalibrationSet.of(np.arange(6).reshape(3, 2)).leaves[0].dtype == torch.int64


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(0, 3), "is empty"),
        ([], "is empty"),
        (iter([]), "is empty"),
        ({}, "is empty"),
        (np.zeros((0, 3)), "is empty"),
        (torch.tensor(1.0), "calibration"),
        ((torch.zeros(3, 2), torch.zeros(4, 2)), "number of samples"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], "differ in shape"),
        ([torch.zeros(2, 3), torch.zeros(3)], "differ in shape"),
        ([torch.zeros(2, 3), {"x": torch.zeros(2, 3)}], "differ in structure"),
        (np.array(["a", "b"]), "not numbers"),
        (["a", "b"], "not numbers"),
        (np.array([object(), None]), "not numbers"),
        (np.array([[1, 2], [3]], dtype=object), "not numbers"),
        (7, "cannot read"),
        (None, "cannot read"),
        ("images/", "a path was given"),
        (Path("images"), "a path was given"),
    ],
    ids=[
        "empty tensor",
        "empty list",
        "empty iterator",
        "empty dict",
        "empty array",
        "scalar",
        "unequal inputs",
        "ragged",
        "other rank",
        "other structure",
        "array of strings",
        "strings",
        "objects",
        "ragged array",
        "number",
        "nothing",
        "path text",
        "path",
    ],
)
def test_what_is_refused(data: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        CalibrationSet.of(data)
    assert caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    data = samples(6, 3)
    data[4, 1] = value
    with pytest.raises(CalibrationError, match="input 0 holds NaN or infinite") as caught:
        CalibrationSet.of(data)
    assert caught.value.actual == "1 of 6 samples, the first at 4"
    with pytest.raises(CalibrationError, match="input 1 holds NaN or infinite"):
        CalibrationSet.of((samples(6, 3), data))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.longdouble, np.datetime64])
def test_any_numeric_dtype_is_read_or_refused_by_name(dtype: type) -> None:
    """A dtype that cannot be read must still end in a CalibrationError."""
    try:
        read = CalibrationSet.of(np.ones((3, 2)).astype("datetime64[s]" if dtype is np.datetime64 else dtype))
    except CalibrationError:
        return
    assert len(read) == 3


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i8", "<f4"])
def test_the_order_of_bytes_makes_no_difference(dtype: str) -> None:
    read = CalibrationSet.of(samples(6, 3).numpy().astype(dtype))
    assert numbers(read) == [0, 1, 2, 3, 4, 5]
    assert read.leaves[0].dtype == {"f4": torch.float32, "f8": torch.float64, "i8": torch.int64}[dtype[1:]]


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (samples(6, 3).to_sparse(), "to_dense"),
        (samples(6, 3).to("meta"), "no numbers"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "pad"),
    ],
    ids=["sparse", "meta", "nested"],
)
def test_tensors_that_are_no_dense_arrays_are_refused(data: torch.Tensor, hint: str) -> None:
    for form in (data, [data], {"x": data}):
        with pytest.raises(CalibrationError, match="not dense arrays of numbers") as caught:
            CalibrationSet.of(form)
        assert hint in str(caught.value.hint)


@pytest.mark.parametrize("limit", [2.5, 0, -3, True, "3"])
def test_a_limit_is_a_number_of_samples(limit: Any) -> None:
    with pytest.raises(CalibrationError, match="limit is a whole number from 1 on") as caught:
        CalibrationSet.of(samples(6, 3), limit=limit)
    assert caught.value.actual == limit and caught.value.hint
    assert len(CalibrationSet.of(samples(6, 3), limit=np.int64(2))) == 2


@pytest.mark.parametrize("distinct", [400, 20])
def test_a_limit_takes_the_same_samples_in_any_order(distinct: int) -> None:
    """Several inputs, all samples different or many equal, in one piece or one after the other."""
    x, ids = torch.randn(distinct, 3).repeat(400 // distinct, 1), torch.arange(400) % distinct
    order = torch.randperm(400)
    forms: list[Any] = [
        (x, ids),
        (x.flip(0).numpy(), ids.flip(0)),
        list(zip(x[order].split(7), ids[order].split(7), strict=True)),
        iter([{"x": a, "y": b} for a, b in zip(x.flip(0).split(150), ids.flip(0).split(150), strict=True)]),
    ]
    first, *others = (CalibrationSet.of(form, limit=50, inputs=2) for form in forms)
    assert len(first) == 50 and all(sorted(first.digests) == sorted(other.digests) for other in others)
    if distinct == 400:
        assert first.leaves[1].tolist() == sorted(first.leaves[1].tolist())  # in the order in which they came
    assert sorted(CalibrationSet.of(forms[0], limit=50, seed=1).digests) != sorted(first.digests)


def test_a_limit_holds_for_a_set_too() -> None:
    """It takes the samples that it takes of the data, views with them."""
    data = torch.arange(40).view(-1, 1)
    wanted = numbers(CalibrationSet.of(data, limit=6, seed=3))
    read = CalibrationSet.of(data)
    assert numbers(CalibrationSet.of(read, limit=6, seed=3)) == wanted
    assert CalibrationSet.of(read, limit=40) is CalibrationSet.of(read) is read
    viewed = read.with_views([lambda batch: batch + 100])
    few = CalibrationSet.of(viewed, limit=6, seed=3)
    assert numbers(few) == wanted + [number + 100 for number in wanted]
    assert few.sources is not None and few.sources.tolist() == wanted * 2
    assert CalibrationSet.of(viewed, limit=40) is viewed
    with pytest.raises(CalibrationError, match="limit is a whole number"):
        CalibrationSet.of(read, limit=0)


def test_views_stay_views_when_inputs_are_bound() -> None:
    viewed = CalibrationSet.of(samples(5, 3)).with_views([lambda batch: -batch])
    bound = CalibrationSet.of(viewed, inputs=1)
    assert bound.sources is not None and bound.sources.tolist() == [0, 1, 2, 3, 4] * 2


def test_a_limit_takes_every_sample_as_often() -> None:
    """Equal samples too: of 30 that are one and the same and 70 others, three and seven in ten."""
    data = torch.arange(100).clamp(min=29).view(-1, 1)
    drawn = torch.cat([CalibrationSet.of(data, limit=10, seed=seed).leaves[0].flatten() for seed in range(300)])
    counts = torch.bincount(drawn - 29, minlength=71).float()
    # 900 with a deviation of 23.9, and a chi square with 69 degrees of freedom: above 120 once in ten thousand
    assert abs(float(counts[0]) - 900) < 100
    assert float(((counts[1:] - 30) ** 2 / 30).sum()) < 120


def test_what_fits_is_not_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldcut.compiler.data.sample_reading.content_digests", None)
    for data in (samples(6, 3), list(samples(6, 3).split(4))):
        assert numbers(CalibrationSet.of(data, limit=6)) == [0, 1, 2, 3, 4, 5]


def test_the_fit_to_a_program(residual: Program) -> None:
    CalibrationSet.of(samples(3, 3, 8, 8)).check(residual)
    for data, message in [
        (samples(3, 3, 8, 9), "wrong shape for input 'x'"),
        (samples(3, 8, 8), "wrong shape for input 'x'"),
        (samples(3, 8, 8, 3), "wrong shape for input 'x'"),
        (samples(3, 3, 8, 8).double(), "wrong dtype for input 'x'"),
        (samples(3, 3, 8, 8).to(torch.uint8), "wrong dtype for input 'x'"),
        ((samples(3, 3, 8, 8), samples(3, 3, 8, 8)), "another number of inputs"),
    ]:
        with pytest.raises(CalibrationError, match=message) as caught:
            CalibrationSet.of(data).check(residual)
        assert caught.value.hint
        assert caught.value.expected is not None


@given(count=st.integers(2, 200), seed=st.integers(0, 5), fraction=st.floats(0.0, 0.9))
def test_a_split_is_disjoint_and_covers_all(count: int, seed: int, fraction: float) -> None:
    data = CalibrationSet.of(samples(count, 1))
    fit, held_out = data.split(seed, fraction)
    assert len(fit) >= 1
    assert len(held_out) >= 1
    assert sorted(numbers(fit) + numbers(held_out)) == numbers(data)
    assert len(held_out) <= 64
    again = data.split(seed, fraction)
    assert [numbers(part) for part in again] == [numbers(fit), numbers(held_out)]


def test_another_seed_splits_otherwise() -> None:
    data = CalibrationSet.of(samples(100, 1))
    assert numbers(data.split(0)[1]) != numbers(data.split(1)[1])
    assert len(data.split(0)[1]) == 10


def test_one_sample_is_on_both_sides() -> None:
    data = CalibrationSet.of(samples(1, 1))
    assert [len(part) for part in data.split(0)] == [1, 1]


def test_the_fingerprint_depends_on_every_value() -> None:
    data = samples(4, 2)
    same, other = data.clone(), data.clone()
    other[3, 1] += 1
    prints = [CalibrationSet.of(d).fingerprint for d in (data, same, other, data.double())]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_views_follow_the_samples() -> None:
    x = torch.randn(3, 3, 2, 4)
    read = CalibrationSet.of(x).with_views([horizontal_flip, lambda batch: -batch])
    assert torch.equal(read.leaves[0], torch.cat([x, x.flip(3), -x]))
    assert CalibrationSet.of(x).with_views([]).fingerprint == CalibrationSet.of(x).fingerprint


def test_only_images_are_flipped() -> None:
    image, row = torch.randn(3, 3, 2, 4), torch.randn(3, 4)
    first, second = horizontal_flip((image, row))
    assert torch.equal(first, image.flip(-1))
    assert torch.equal(second, row)


@pytest.mark.parametrize(
    "view",
    [lambda x: x[:1], lambda x: x[..., :1], lambda x: x.double(), lambda x: (x, x), lambda x: x / 0],
    ids=["fewer", "smaller", "dtype", "structure", "not finite"],
)
def test_views_that_do_not_fit_are_refused(view: Any) -> None:
    with pytest.raises(CalibrationError):
        view_of(CalibrationSet.of(torch.ones(3, 3, 2, 4)), view)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three PNG files, one in a subfolder, and a file that is no image."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for level, name in enumerate(["b.png", "a.PNG", "more/c.png"]):
        Image.new("RGB", (6, 4), (level * 51, 0, 255)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_a_folder_of_images(pictures: Path) -> None:
    read = read_calibration(pictures)
    assert read.leaves[0].shape == (3, 3, 4, 6)
    assert read.leaves[0][:, 0, 0, 0].tolist() == pytest.approx([0.2, 0.0, 0.4])
    assert read.leaves[0][:, 2].unique().tolist() == [1.0]


def test_images_are_resized_normalised_and_limited(pictures: Path) -> None:
    read = read_calibration(pictures, size=(5, 7), mean=(0.2, 0, 0.5), std=(0.1, 1, 0.25), limit=2)
    assert read.leaves[0].shape == (2, 3, 5, 7)
    # two of the three, by path
    shown = [value for value in (0.0, -2.0, 2.0) if min(abs(read.leaves[0][:, 0, 0, 0] - value)) < 1e-5]
    assert read.leaves[0][:, 0, 0, 0].tolist() == pytest.approx(shown, abs=1e-5)
    assert read.leaves[0][:, 2].unique().tolist() == [2.0]


def test_a_limit_takes_of_all_classes(tmp_path: Path) -> None:
    """Five folders of eight images each: the first ten would be of two classes."""
    for level in range(40):
        (tmp_path / "classes" / str(level // 8)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), (level, 0, 0)).save(tmp_path / "classes" / str(level // 8) / f"{level:02}.png")
    read = [read_calibration(tmp_path / "classes", limit=10, seed=seed).leaves[0] for seed in (0, 0, 1)]
    levels = [(255 * part[:, 0, 0, 0]).round().int().tolist() for part in read]
    assert levels[0] == levels[1] != levels[2]
    assert all(len({level // 8 for level in part}) >= 3 and len(set(part)) == 10 for part in levels)
    array = np.arange(400).reshape(400, 1) // 100
    np.save(tmp_path / "sorted.npy", array)
    np.savez(tmp_path / "sorted.npz", array)
    torch.save(torch.from_numpy(array), tmp_path / "sorted.pt")
    for name in ("sorted.npy", "sorted.npz", "sorted.pt"):
        counts = torch.bincount(read_calibration(tmp_path / name, limit=80).leaves[0].flatten(), minlength=4)
        assert counts.sum() == 80 and counts.min() >= 8


def test_grey_images_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (2, 2), 255).save(tmp_path / "grey.png")
    assert torch.equal(read_calibration(tmp_path).leaves[0], torch.ones(1, 3, 2, 2))


def test_images_that_cannot_be_used(pictures: Path, tmp_path: Path) -> None:
    Image.new("RGB", (3, 3)).save(pictures / "other.png")
    with pytest.raises(CalibrationError, match="differ in size") as caught:
        read_calibration(pictures)
    assert "--size H,W (size=(h, w))" in str(caught.value.hint)
    (pictures / "other.png").write_bytes(b"broken")
    with pytest.raises(CalibrationError, match=r"cannot read image .*other\.png"):
        read_calibration(pictures)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="no images in"):
        read_calibration(tmp_path / "empty")


def test_array_files(tmp_path: Path) -> None:
    array = samples(5, 2).numpy()
    np.save(tmp_path / "one.npy", array)
    np.savez(tmp_path / "one.npz", anything=array)
    np.savez(tmp_path / "two.npz", a=array, b=array + 1)
    torch.save(samples(5, 2), tmp_path / "one.pt")
    torch.save({"a": samples(5, 2), "b": samples(5, 2) + 1}, tmp_path / "two.pt")
    for name in ("one.npy", "one.npz", "one.pt"):
        read = read_calibration(tmp_path / name)
        assert isinstance(read.batch(slice(0, 1)), torch.Tensor)
        assert numbers(read) == [0, 1, 2, 3, 4]
    for name in ("two.npz", "two.pt"):
        batch = read_calibration(tmp_path / name).batch(slice(0, 2))
        assert isinstance(batch, dict)
        assert sorted(batch) == ["a", "b"]
        assert numbers(read_calibration(tmp_path / name, key="b")) == [1, 2, 3, 4, 5]
    few = numbers(read_calibration(str(tmp_path / "one.npy"), limit=3))
    assert few == sorted(set(few)) and len(few) == 3  # in the order of the file


class Executed:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("pickle-was-run"),))


def test_pickles_are_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("objects.npy", np.array([Executed()]), allow_pickle=True)
    np.savez("objects.npz", x=np.array([Executed()]))
    torch.save(Executed(), "objects.pt")
    Path("plain.npy").write_bytes(pickle.dumps(Executed()))
    for name in ("objects.npy", "objects.npz", "objects.pt", "plain.npy"):
        with pytest.raises(CalibrationError, match="cannot read") as caught:
            read_calibration(name)
        assert caught.value.hint
    assert not Path("pickle-was-run").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.npy", None, "no such file or folder"),
        ("data.csv", b"1,2", r"cannot read calibration data from data\.csv"),
        ("data.npy", b"garbage", "cannot read"),
        ("data.npz", b"garbage", "cannot read"),
        ("data.pt", b"garbage", "cannot read"),
        ("data.npy", b"", "cannot read"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read_calibration(tmp_path / name)


def test_a_key_that_is_missing(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", a=np.zeros((2, 2)))
    torch.save({"a": torch.zeros(2, 2)}, tmp_path / "data.pt")
    for name in ("data.npz", "data.pt"):
        with pytest.raises(CalibrationError, match="b") as caught:
            read_calibration(tmp_path / name, key="b")
        assert name in caught.value.message
        assert caught.value.expected == "one of a"
        assert "--key" in str(caught.value.hint)
    torch.save(torch.zeros(2, 2), tmp_path / "bare.pt")
    with pytest.raises(CalibrationError, match=r"bare\.pt has no entries to choose 'b' from") as caught:
        read_calibration(tmp_path / "bare.pt", key="b")
    assert caught.value.actual == "a Tensor"


@pytest.mark.parametrize("name", ["data.npy", "data.npz", "data.pt"])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"size": (4, 4)}, "size"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean"),
        ({"mean": (0, 0, 0), "std": (1, 1, 1)}, "mean and std"),
    ],
    ids=str,
)
def test_options_of_images_are_refused_for_arrays(
    tmp_path: Path, name: str, options: dict[str, Any], named: str
) -> None:
    """Left aside in silence they would look as if they had been heeded."""
    np.save(tmp_path / "data.npy", np.zeros((2, 3, 4, 4)))
    np.savez(tmp_path / "data.npz", a=np.zeros((2, 3, 4, 4)))
    torch.save(torch.zeros(2, 3, 4, 4), tmp_path / "data.pt")
    with pytest.raises(CalibrationError, match=f"{named}: for folders of images only, and {name} is none") as caught:
        read_calibration(tmp_path / name, **options)
    assert f"leave {named} out" in str(caught.value.hint)


def test_a_key_is_refused_where_there_is_but_one_array(pictures: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.zeros((2, 2)))
    for path in (tmp_path / "data.npy", pictures):
        with pytest.raises(CalibrationError, match=r"key names an array of an \.npz") as caught:
            read_calibration(path, key="a")
        assert "leave key" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit is a whole number from 1 on"),
        ({"limit": -5}, "limit is a whole number from 1 on"),
        ({"limit": 2.5}, "limit is a whole number from 1 on"),
        ({"size": (0, 0)}, "size is the height and the width"),
        ({"size": (4, -1)}, "size is the height and the width"),
        ({"size": (4,)}, "size is the height and the width"),
        ({"mean": (0.5,)}, "mean is three numbers"),
        ({"std": (1, 1, 1, 1)}, "std is three numbers"),
    ],
    ids=str,
)
def test_numbers_out_of_range(pictures: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    np.save(tmp_path / "data.npy", np.zeros((9, 2)))
    for path in (pictures, tmp_path / "data.npy"):
        with pytest.raises(CalibrationError, match=message) as caught:
            read_calibration(path, **options)
        assert caught.value.actual is not None


@dataclass
class Signal:
    """A batch, as an own collate function may make it."""

    values: Any
    scale: float = 1.0


NO_SAMPLES: dict[str, tuple[Any, str]] = {
    "number": (3, "from an int"),
    "switch": (True, "from a bool"),
    "function": (torch.randn, "from a builtin_function_or_method"),
    "network": (torch.nn.Sequential(torch.nn.Linear(2, 2)), "from a Sequential"),
    "bytes": (b"ab", "from a bytes"),
    "goal": (foldcut.Latency(0.5), "from a Latency"),
    "settings": (foldcut.PipelineSettings(), "from a PipelineSettings"),
    "class": (foldcut.SynthesisSettings, "from the class SynthesisSettings"),
    "fields": (Signal(values=(1, 2)), "from a Signal"),
}


@pytest.mark.parametrize("what", NO_SAMPLES)
def test_what_holds_no_samples_is_called_so(what: str) -> None:
    """In the place of samples, and in that of a reference before anything is read."""
    data, words = NO_SAMPLES[what]
    for read in (CalibrationSet.of, lambda data: foldcut.PipelineSettings(reference=data)):
        with pytest.raises(CalibrationError, match=f"cannot read calibration samples {words}") as caught:
            read(data)
        assert "pass a tensor" in str(caught.value) and "None" not in str(caught.value)


@pytest.mark.parametrize(
    "data", [Signal(torch.ones(3, 2)), Signal([[1.0, 2.0]] * 3), Signal((torch.ones(3, 2),)), [[1.0, 2.0]] * 3]
)
def test_what_holds_samples_is_read_and_may_be_a_reference(data: Any) -> None:
    assert foldcut.PipelineSettings(reference=data).reference is data
    if not isinstance(getattr(data, "values", None), tuple):
        assert len(CalibrationSet.of(data, inputs=["values"])) == 3


def test_made_samples_are_no_reference() -> None:
    with pytest.raises(CalibrationError, match="reference: samples that are made from the network alone") as caught:
        foldcut.PipelineSettings(reference=foldcut.SynthesisSettings())
    assert "pass samples of the data" in str(caught.value) and "leave reference out" in str(caught.value)
    with pytest.raises(CalibrationError, match="reference: a path was given") as caught:
        foldcut.PipelineSettings(reference="images/")
    assert "read_calibration(path)" in str(caught.value)
