"""Settings and arguments that are out of range are refused at once, by name and with what is allowed."""

import math
import re
from collections.abc import Callable
from typing import Any

import foldcut
import numpy as np
import pytest
import torch
from foldcut.compiler.driver.pipeline_settings import MOST_HELD_OUT
from foldcut.compiler.export.exporter import NEWEST_OPSET, to_onnx
from foldcut.compiler.ir.program import Program
from foldcut.compiler.onnx.file import OLDEST_OPSET
from foldcut.compiler.support.errors import CompilerError, ExportError
from foldcut.compiler.support.setting_checks import Allowed, check_number, check_texts, check_whole, refuse
from foldcut.compiler.support.strict_json import json_text
from foldcut.passes.drop.adaptors import AdaptorSettings
from foldcut.passes.drop.recoverability import RecoverabilitySettings
from foldcut.passes.solve.resolve_network import ResolveSettings

WHOLE = "give a whole number from 1 on"
COUNT = "give a whole number from 0 on"
TEXTS = "give a tuple"
SHARE = f"give a share above 0 and at most {MOST_HELD_OUT}"
OPSET = f"give a whole number from {OLDEST_OPSET} to {NEWEST_OPSET}, or None"
BATCH = "batch and threads start at 1"
SEED = "a whole number from 0 on, below 2 ** 63"
SWITCH = "give True or False"
NAN, INF = math.nan, math.inf

#: What is made, which setting, the values that are refused, and what is said to be allowed.
REFUSED: list[tuple[Callable[..., object], str, tuple[object, ...], str]] = [
    (foldcut.PipelineSettings, "held_out", (NAN, INF, -0.5, 0, 0.0, 2.0, 0.9, 0.46, "0.1", None, True), SHARE),
    (foldcut.PipelineSettings, "solve_samples", (0, -5, 2.5, "512", True, None, NAN), WHOLE),
    (foldcut.PipelineSettings, "opset", (99, 26, 8, 0, -1, 18.0, "18", True), OPSET),
    (foldcut.PipelineSettings, "batch", (0, -1, 1.5, "2", True), BATCH),
    (foldcut.PipelineSettings, "threads", (0, -1, 1.5, "2", True), BATCH),
    (foldcut.PipelineSettings, "seed", (-1, 2**63, 1.5, "0", True, None), SEED),
    (foldcut.PipelineSettings, "memory_bytes", (0, -1, 2.5, "4G", True), WHOLE + ", or None"),
    (foldcut.PipelineSettings, "search_seconds", ("60", True), "give a number of seconds from 0 on, or None"),
    (
        foldcut.PipelineSettings,
        "views",
        (foldcut.horizontal_flip, ("flip",), "flip", None),
        "give a tuple of functions",
    ),
    (foldcut.PipelineSettings, "mimic", (True, False, "yes", 1), "give MimicSettings(...), or None"),
    (foldcut.PipelineSettings, "resolve", (None, {}, True), "give ResolveSettings(...)"),
    (foldcut.PipelineSettings, "channels", (None, foldcut.ChannelLimits()), "give ChannelSettings(...)"),
    (foldcut.PipelineSettings, "ranks", (None, "channel"), "give RankSettings(...)"),
    (foldcut.PipelineSettings, "recoverability", (None, "exact"), "give RecoverabilitySettings(...)"),
    (foldcut.ChannelSettings, "score", ("L1", "foo", None, 1), "give one of submodular, l1, l2"),
    (foldcut.ChannelSettings, "variant", ("foo", None), "give one of asymmetric, sequential, layerwise"),
    (foldcut.ChannelSettings, "limits", (None, 8), "give ChannelLimits(...)"),
    (foldcut.ChannelSettings, "resolve", ("no", 1, None), SWITCH),
    (foldcut.ChannelSettings, "stream_target", ("no", 1, None), SWITCH),
    (foldcut.ChannelSettings, "polish", ("no", 1, None), SWITCH),
    (foldcut.ChannelSettings, "on_lattice", ("no", 1, None), SWITCH),
    (foldcut.ChannelLimits, "multiple_of", (2.5, 0, -8, "8", True), WHOLE + ", or None"),
    (foldcut.ChannelLimits, "least", (-0.1, 1.5, NAN, "half", True, None), "give a share from 0 to 1"),
    (foldcut.ChannelLimits, "ignore", ("c1", 5, None, (1,), b"c1"), TEXTS),
    (foldcut.RankSettings, "schemes", ("channel", (), ("magic",), 5, (1,)), "give"),
    (foldcut.RankSettings, "multiple_of", (2.5, 0, -4, "4", True, None), WHOLE),
    (foldcut.RankSettings, "least", (-0.1, 1.5, NAN, "half", True), "give a share of full rank"),
    (foldcut.RankSettings, "metric", ("foo", None), "give one of data, weights"),
    (foldcut.RankSettings, "rows_per_column", (0, -1, 2.5, "50", True), WHOLE + ", or None"),
    (foldcut.RankSettings, "ignore", ("c1", 5, None, (1,)), TEXTS),
    (foldcut.RankSettings, "resolve", ("no", 1, None), SWITCH),
    (foldcut.RankSettings, "on_lattice", ("no", 1, None), SWITCH),
    (ResolveSettings, "ridge", (-1.0, NAN, INF, 10**400, "0.1", True), "give a number from 0 on, or None"),
    (ResolveSettings, "batch_size", (0, -3, 2.5, "8", True), WHOLE + ", or None"),
    (ResolveSettings, "rows_per_column", (0, -1, 2.5, True), WHOLE + ", or None"),
    (ResolveSettings, "refine", (-1, 1.5, "2", True, None), COUNT),
    (ResolveSettings, "guard_samples", (-1, 1.5, "2", True, None), COUNT),
    (ResolveSettings, "ram_bytes", (-1, 1.5, "2", True), COUNT),
    (RecoverabilitySettings, "mode", ("foo", None), "give one of plain, local, calibrated, exact, adaptors"),
    (RecoverabilitySettings, "samples", (0, -1, 1.5, "64", True, None), WHOLE),
    (RecoverabilitySettings, "adaptors", (None, 5), "give AdaptorSettings(...)"),
    (RecoverabilitySettings, "resolve", (None, 5), "give ResolveSettings(...)"),
    (AdaptorSettings, "iterations", (0, -1, 2.5, "400", True, None), WHOLE),
    (AdaptorSettings, "batch_size", (0, -1, 2.5, "32", True, None), WHOLE),
    (AdaptorSettings, "learning_rate", (0, -1.0, NAN, INF, "0.1", True, None), "give a number above 0"),
    (foldcut.MimicSettings, "iterations", (0, -1, 2.5, "400", True, None), WHOLE),
    (foldcut.MimicSettings, "batch_size", (0, -1, 2.5, "32", True, None), WHOLE),
    (foldcut.MimicSettings, "checks", (0, -1, 2.5, "8", True, None), WHOLE),
    (foldcut.MimicSettings, "patience", (0, -1, 2.5, "4", True, None), WHOLE),
    (foldcut.MimicSettings, "learning_rate", (0, -1.0, NAN, INF, "0.1", True, None), "give a number above 0"),
    (foldcut.MimicSettings, "hints", (-1.0, NAN, INF, "6", True, None), "give a number from 0 on"),
    (foldcut.MimicSettings, "outputs", (-1.0, NAN, INF, "6", True, None), "give a number from 0 on"),
    (foldcut.MimicSettings, "augment", ("flip", True), "give a function"),
    (foldcut.MimicSettings, "bfloat16", ("no", 1), SWITCH + ", or None"),
    (foldcut.MimicSettings, "cache_bytes", (-1, 1.5, "1", None), COUNT),
    (foldcut.MimicSettings, "seconds", (-1, NAN, INF, "60", True), "give a number from 0 on, or None"),
    (foldcut.MimicSettings, "macs", (0, -1, 1e14, "1", True), WHOLE + ", or None"),
]

#: The same of the arguments that `compile` and `sweep` have in common.
ARGUMENTS: list[tuple[str, tuple[object, ...], str]] = [
    ("batch", ("2", 1.5, 0, -1, True, NAN), BATCH),
    ("threads", ("2", 1.5, 0, -1, True), BATCH),
    ("seed", ("0", 1.5, -1, 2**63, True), SEED),
    ("views", (foldcut.horizontal_flip, ("flip",), "flip", iter(())), "give a tuple of functions"),
    ("cache", (5, None, b"folder", 0), "give True, False or the path of a folder"),
    ("progress", ("x", None, 1, 0), "give True, False or a function of (stage, done, total)"),
    ("mimic", (1, 0, "yes", ""), "give True, False, None or a foldcut.MimicSettings"),
    ("rewrites", ("prune_channels", 5, iter(("prune_channels",)), (1,)), TEXTS),
    ("settings", (5, foldcut.MimicSettings(), {}), "give PipelineSettings(...), or None"),
]


def named(case: object) -> str:
    """Without addresses: every worker has to find the same tests."""
    return re.sub(r" at 0x\w+", "", getattr(case, "__name__", None) or str(case))[:60]


def assert_says(error: CompilerError, name: str, allowed: str) -> None:
    assert f"{name}=" in error.message and allowed in str(error) and error.hint, str(error)
    assert error.expected is not None


@pytest.mark.parametrize(
    ("made", "name", "value", "allowed"),
    [(made, name, value, allowed) for made, name, values, allowed in REFUSED for value in values],
    ids=named,
)
def test_a_setting_that_is_out_of_range_is_refused(
    made: Callable[..., object], name: str, value: object, allowed: str
) -> None:
    with pytest.raises(CompilerError) as caught:
        made(**{name: value})
    assert_says(caught.value, name, allowed)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [(name, value, allowed) for name, values, allowed in ARGUMENTS for value in values],
    ids=named,
)
@pytest.mark.parametrize("call", ["compile", "sweep"])
def test_an_argument_that_is_out_of_range_is_refused(call: str, name: str, value: object, allowed: str) -> None:
    """Before the model is looked at: there is none."""
    goal = {"goal": foldcut.Channels(0.5)} if call == "compile" else {"goals": [foldcut.Channels(0.5)]}
    with pytest.raises(CompilerError) as caught:
        getattr(foldcut, call)("missing.onnx", torch.zeros(4, 3), **goal, **{name: value})
    assert_says(caught.value, name, allowed)


@pytest.mark.parametrize(
    ("name", "value"), [("mimic", "yes"), ("views", "flip"), ("cache", 5), ("seed", 1.5), ("progress", 1)], ids=named
)
def test_an_argument_of_apply_that_is_out_of_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(CompilerError, match=f"{name}="):
        foldcut.apply("missing.onnx", "missing.json", **{name: value})


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"goals": foldcut.Latency(0.5)}, "goals=[foldcut.Latency(0.8), foldcut.Latency(0.6)]"),
        ({"goals": iter([foldcut.Latency(0.5)])}, "goals=[foldcut.Latency(0.8), foldcut.Latency(0.6)]"),
        ({"goals": "latency"}, "goals=[foldcut.Latency(0.8), foldcut.Latency(0.6)]"),
        ({"goals": [0.5]}, "0.5 is not a goal"),
        ({"each": 5}, "give a function of a SweepPoint, or None"),
    ],
    ids=named,
)
def test_what_is_no_goal_of_a_sweep_is_refused(options: dict[str, Any], allowed: str) -> None:
    with pytest.raises(CompilerError) as caught:
        foldcut.sweep("missing.onnx", torch.zeros(4, 3), **options)
    assert allowed in str(caught.value)


@pytest.mark.parametrize("call", [foldcut.compile, foldcut.sweep])
def test_a_search_that_cannot_be_is_refused_before_the_model_is_read(call: Callable[..., object]) -> None:
    goal = {"goal": foldcut.Latency(0.5)} if call is foldcut.compile else {}
    with pytest.raises(foldcut.GoalError, match="a search cannot take -1 seconds"):
        call("missing.onnx", torch.zeros(4, 3), settings=foldcut.PipelineSettings(search_seconds=-1), **goal)


def test_what_is_in_range_passes() -> None:
    for share in (0.01, 0.1, MOST_HELD_OUT, np.float32(0.25)):
        foldcut.PipelineSettings(held_out=share)
    for opset in (None, OLDEST_OPSET, 13, NEWEST_OPSET, np.int64(18)):
        foldcut.PipelineSettings(opset=opset)
    foldcut.PipelineSettings(solve_samples=1, seed=2**63 - 1, search_seconds=0, mimic=None)
    foldcut.PipelineSettings(views=[foldcut.horizontal_flip, foldcut.random_crop(1, 0)], search_seconds=INF)
    foldcut.ChannelSettings(score="l2", variant="layerwise", resolve=False, on_lattice=True)
    for step in (None, 1, 2**20, np.int32(4)):
        foldcut.ChannelLimits(multiple_of=step, least=1, ignore=["head*"])
    foldcut.RankSettings(schemes=["tucker"], metric="weights", rows_per_column=None, least=1.0, ignore=("head*",))
    ResolveSettings(ridge=0, refine=0, guard_samples=0, ram_bytes=0, batch_size=1, rows_per_column=None)
    RecoverabilitySettings(mode="exact", samples=1)
    foldcut.MimicSettings(seconds=0, macs=1)
    foldcut.MimicSettings(iterations=1, patience=1, hints=0, learning_rate=1e30, augment=lambda batch, _: batch)


@pytest.mark.parametrize("name", ["cache", "progress", "mimic", "views", "rewrites"])
def test_a_good_argument_gets_as_far_as_the_model(name: str, tmp_path: Any) -> None:
    good: dict[str, list[object]] = {
        "cache": [False, str(tmp_path), tmp_path],
        "progress": [True, False, lambda stage, done, total: None],
        "mimic": [None, False, foldcut.MimicSettings()],
        "views": [(), [foldcut.horizontal_flip]],
        "rewrites": [None, ["prune_channels"], {"prune_channels"}],
    }
    for value in good[name]:
        options = {"cache": False, "progress": False, name: value}
        with pytest.raises(foldcut.CaptureError, match=r"cannot read missing\.onnx"):
            foldcut.compile("missing.onnx", torch.zeros(4, 3), goal=foldcut.Channels(0.5), **options)  # type: ignore[arg-type]


def test_numbers_of_numpy_become_those_of_python() -> None:
    """A report holds them, and JSON has no word for numpy's."""
    settings = foldcut.PipelineSettings(batch=np.int64(2), seed=np.int32(3), held_out=np.float32(0.25))
    assert [type(value) for value in (settings.batch, settings.seed, settings.held_out)] == [int, int, float]
    assert json_text([settings.batch, settings.seed, settings.held_out]) == "[2, 3, 0.25]"
    assert type(foldcut.ChannelLimits(multiple_of=np.int64(4)).multiple) is int


def test_an_operator_set_that_the_exporter_does_not_write_is_refused(residual: Program) -> None:
    """torch.onnx would write an older one, and say so in its log only."""
    with pytest.raises(ExportError, match=r"cannot be written in opset 99: torch\.onnx gave opset 18"):
        to_onnx(residual, opset=99)
    with pytest.raises(ExportError, match="opset 0 is too old"):
        to_onnx(residual, opset=0)


def test_the_checks_themselves() -> None:
    check_whole("x", 3, Allowed(least=1, most=3))
    check_number("x", None, Allowed(least=0, none=True))
    check_texts("x", ())
    with pytest.raises(CompilerError, match=r"x=4 is out of range\n.* give a whole number from 1 to 3$"):
        check_whole("x", 4, Allowed(least=1, most=3))
    with pytest.raises(CompilerError, match=r"x=2 is out of range\n.* give a number above 0 and at most 1$"):
        check_number("x", 2, Allowed(above=0, most=1))
    with pytest.raises(CompilerError, match=r"x='a' is a single string\n.* give a tuple: x=\('a',\)$"):
        check_texts("x", "a")
    with pytest.raises(foldcut.CalibrationError) as caught:
        refuse("x", torch.zeros(100, 100), "less", error=foldcut.CalibrationError)
    assert len(str(caught.value).splitlines()) == 2 and caught.value.expected == "less"
