"""Engines on disk and what they are checked against: no TensorRT and no GPU is needed for any of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foldcut.compiler.support.errors import BackendError, OutputError
from foldcut.runtime.tensorrt.device import Gpu
from foldcut.runtime.tensorrt.engine import EngineInfo, TensorRTEngine, load_engine, sha256
from foldcut.runtime.tensorrt.library import FULL, RTX, Library
from foldcut.runtime.tensorrt.profile import Profile, TensorInfo, choose_profiles
from hypothesis import given, settings
from hypothesis import strategies as st

MODEL = b"the model's bytes"
INFO = EngineInfo(
    model_sha256=sha256(MODEL),
    flavour=RTX,
    version="1.7.1.116",
    precision="fp16",
    targets=("sm86", "sm89"),
    device="",
    profiles={"x": Profile(min=(1, 3), opt=(2, 3), max=(4, 3))},
    inputs=(
        TensorInfo(name="x", dtype="float32", shape=(-1, 3)),
        TensorInfo(name="mask", dtype="bool", shape=(3,)),
    ),
    outputs=(TensorInfo(name="out", dtype="float32", shape=(-1, 10)),),
    network_layers=7,
    float32_operators=2,
    half_error=0.001,
)
ENGINE = TensorRTEngine(plan=b"the plan's bytes" * 100, info=INFO)


def gpu(target: str) -> Gpu:
    return Gpu(name="a card", target=target, driver_cuda="13.0")


def test_saved_and_read_again(tmp_path: Path) -> None:
    plan, metadata = ENGINE.save(tmp_path / "deep" / "net.plan")
    assert plan.read_bytes() == ENGINE.plan  # as trtexec --loadEngine takes it
    assert load_engine(plan) == ENGINE
    assert load_engine(str(plan), MODEL) == ENGINE
    assert sorted(path.name for path in plan.parent.iterdir()) == [plan.name, metadata.name]


def test_saving_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("here before")
    ENGINE.save(tmp_path / "net.plan")
    replace(ENGINE, plan=b"another").save(tmp_path / "net.plan")
    assert load_engine(tmp_path / "net.plan").plan == b"another"
    assert (tmp_path / "other").read_text() == "here before"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        ENGINE.save(tmp_path / "file" / "net.plan")


def test_another_model(tmp_path: Path) -> None:
    plan, _ = ENGINE.save(tmp_path / "net.plan")
    with pytest.raises(BackendError, match="another model"):
        load_engine(plan, b"not the model")


@pytest.mark.parametrize("name", ["net.plan", "net.plan.json"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    plan, _ = ENGINE.save(tmp_path / "net.plan")
    (tmp_path / name).unlink()
    with pytest.raises(BackendError, match="cannot read") as caught:
        load_engine(plan)
    assert "two files" in str(caught.value)


def test_a_pair_that_does_not_belong_together(tmp_path: Path) -> None:
    plan, _ = ENGINE.save(tmp_path / "net.plan")
    other, _ = replace(ENGINE, plan=b"another").save(tmp_path / "other.plan")
    plan.write_bytes(other.read_bytes())
    with pytest.raises(BackendError, match="damaged, or is not the plan"):
        load_engine(plan)


def test_metadata_of_a_later_format(tmp_path: Path) -> None:
    plan, metadata = ENGINE.save(tmp_path / "net.plan")
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"format": 2}))
    with pytest.raises(BackendError, match="another format"):
        load_engine(plan)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, len(ENGINE.plan) - 1), st.integers(1, 255), st.booleans())
def test_a_plan_with_a_changed_or_missing_byte(place: int, change: int, cut: bool) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        plan, _ = ENGINE.save(Path(folder) / "net.plan")
        content = bytearray(ENGINE.plan)
        content[place] ^= change
        plan.write_bytes(ENGINE.plan[:place] if cut else bytes(content))
        with pytest.raises(BackendError, match="damaged"):
            load_engine(plan)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_truncated_metadata(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        plan, metadata = ENGINE.save(Path(folder) / "net.plan")
        text = metadata.read_bytes()
        metadata.write_bytes(text[: data.draw(st.integers(0, len(text) - 3))])
        with pytest.raises(BackendError, match="not the metadata"):
            load_engine(plan)


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(INFO.to_dict())), json_values)
def test_metadata_with_a_field_of_another_kind(name: str, value: Any) -> None:
    """It is read as something that can be checked against, or refused: never an error of Python's own."""
    fields = json.loads(json.dumps(INFO.to_dict())) | {name: value}
    try:
        read = EngineInfo.from_dict(fields)
    except BackendError as error:
        assert "metadata" in str(error)
    else:
        assert isinstance(read.network_layers, int)
        for check in (lambda: read.check_gpu(gpu("sm89")), lambda: read.check_inputs({"x": np.zeros((1, 3))})):
            try:
                check()
            except BackendError as error:
                assert error.hint


@pytest.mark.parametrize("value", [None, [], 3, "text"])
def test_metadata_that_is_no_object(value: object) -> None:
    with pytest.raises(BackendError, match="metadata"):
        EngineInfo.from_dict(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flavour", "version"), [(RTX, "1.6.0.1"), (FULL, "1.7.1.116"), (FULL, "11.4.0.106"), (RTX, "1.7.1.117")]
)
def test_another_library(flavour: str, version: str) -> None:
    with pytest.raises(BackendError, match="another TensorRT") as caught:
        INFO.check_library(Library(trt=None, flavour=flavour, version=version))
    assert (caught.value.expected, caught.value.actual) == ("TensorRT-RTX 1.7.1.116", f"{flavour} {version}")


def test_the_same_library() -> None:
    INFO.check_library(Library(trt=None, flavour=RTX, version="1.7.1.116"))


@pytest.mark.parametrize(
    ("targets", "here", "fits"),
    [
        (("sm86", "sm89"), "sm89", True),
        (("sm86", "sm89"), "sm120", False),
        (("sm80+",), "sm120", True),
        (("sm80+",), "sm80", True),
        (("sm80+",), "sm75", False),
        (("sm75",), "sm80", False),
    ],
)
def test_the_gpu_that_an_engine_is_for(targets: tuple[str, ...], here: str, fits: bool) -> None:
    info = replace(INFO, targets=targets)
    if fits:
        info.check_gpu(gpu(here))
        return
    with pytest.raises(BackendError, match="another GPU") as caught:
        info.check_gpu(gpu(here))
    assert here in str(caught.value.actual)
    assert here in str(caught.value.hint)


def test_an_engine_of_full_tensorrt_names_its_card() -> None:
    info = replace(INFO, flavour=FULL, targets=("sm90",), device="NVIDIA H200")
    with pytest.raises(BackendError, match="another GPU") as caught:
        info.check_gpu(gpu("sm89"))
    assert "NVIDIA H200" in str(caught.value.expected)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((5, 3), np.float32), "outside of the sizes"),
        (np.zeros((1, 4), np.float32), "shape"),
        (np.zeros((1, 3), np.float64), "dtype"),
        (np.zeros((1, 3, 1), np.float32), "shape"),
    ],
)
def test_inputs_that_do_not_fit(x: np.ndarray[Any, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        INFO.check_inputs({"x": x, "mask": np.ones(3, bool)})


def test_inputs_that_fit() -> None:
    for batch in (1, 4):
        INFO.check_inputs({"x": np.zeros((batch, 3), np.float32), "mask": np.ones(3, bool)})
    with pytest.raises(BackendError, match="names"):
        INFO.check_inputs({"x": np.zeros((1, 3), np.float32)})


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), max_size=4))
def test_a_profile_holds_its_own_shapes_or_is_refused(dimensions: list[tuple[int, int, int]]) -> None:
    low, likely, high = (tuple(sizes[i] for sizes in dimensions) for i in range(3))
    if all(a <= b <= c for a, b, c in dimensions):
        profile = Profile(min=low, opt=likely, max=high)
        assert all(profile.holds(shape) for shape in (low, likely, high))
        assert not profile.holds((*high, 1))
        assert not any(profile.holds((*high[:i], high[i] + 1, *high[i + 1 :])) for i in range(len(high)))
    else:
        with pytest.raises(BackendError, match="min <= opt <= max"):
            Profile(min=low, opt=likely, max=high)


@pytest.mark.parametrize("shape", [(1, -1), (1.0, 2), ("n", 3), 5, (True, 2), None])
def test_a_profile_of_something_else(shape: Any) -> None:
    with pytest.raises(BackendError, match="whole numbers"):
        Profile(min=shape, opt=shape, max=shape)


def test_profiles_are_chosen_for_dynamic_inputs_only() -> None:
    tensors = [*INFO.inputs, TensorInfo(name="y", dtype="float32", shape=(-1,))]
    inputs = {"x": np.zeros((2, 3)), "mask": np.ones(3, bool), "y": np.zeros(7)}
    given_profile = Profile(min=(1,), opt=(7,), max=(9,))
    chosen = choose_profiles(tensors, inputs, {"y": given_profile})
    assert chosen == {"x": Profile.fixed((2, 3)), "y": given_profile}
