"""A metric on the command line: what is refused before anything is loaded, and what is read."""

from pathlib import Path
from typing import Any

import foldcut
import numpy as np
import pytest
from foldcut.compiler.cli.goals import read_goal
from foldcut.compiler.cli.options import CompileOptions, SweepOptions
from foldcut.compiler.cli.samples import read_evaluate
from foldcut.compiler.metric.metric import metric_name
from torch import nn


@pytest.fixture
def made(tmp_path: Path, monkeypatch: Any) -> Any:
    """Options of a compile, with files that are there."""
    monkeypatch.chdir(tmp_path)
    np.save("inputs.npy", np.zeros((4, 2), np.float32))
    np.save("labels.npy", np.array([0, 1, 1, 0]))
    Path("net.pt2").write_bytes(b"")
    Path("own_metrics.py").write_text(
        "def size(module):\n    return 1.0\n\n\ndef other(module, data):\n    return 1.0\n\n\nshare = 0.5\n"
    )

    def options(kind: Any = CompileOptions, **given: Any) -> Any:
        usual = {"model": "net.pt2", "calib": Path("inputs.npy"), "output": Path("out")}
        return kind(**usual | given)

    return options


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_loss": 0.5}, "--max-loss is about a metric, and there is none"),
        ({"max_loss": 0.5, "latency": "0.7", "evaluate": "own_metrics:size"}, "give one goal"),
        ({"latency": "0.7", "evaluate": "own_metrics:size", "labels": Path("labels.npy")}, "are two metrics"),
        ({"latency": "0.7", "evaluate": "own_metrics"}, "names no function"),
        ({"latency": "0.7", "evaluate": ":size"}, "names no function"),
        ({"latency": "0.7", "labels": Path("none.npy")}, "no such file of labels"),
        ({"latency": "0.7", "labels": Path("net.pt2")}, "no such file of labels"),
        ({"latency": "0.7", "labels": Path("labels.npy"), "limit": 2}, "--limit takes a random choice"),
    ],
)
def test_what_is_refused_at_once(made: Any, given: Any, words: str) -> None:
    with pytest.raises(foldcut.CompilerError, match=words):
        made(**given).check()


def test_a_metric_is_imported_from_where_the_user_is(made: Any) -> None:
    options = made(max_loss=0.5, evaluate="own_metrics:size")
    options.check()
    assert read_goal(options) == foldcut.MaxLoss(0.5)
    evaluate = read_evaluate(options)
    assert callable(evaluate) and evaluate(nn.Linear(2, 2)) == 1.0


def test_labels_are_read(made: Any) -> None:
    for options in (made(max_loss=0.5, labels=Path("labels.npy")), made(SweepOptions, labels=Path("labels.npy"))):
        options.check()
        evaluate = read_evaluate(options)
        assert isinstance(evaluate, foldcut.Top1) and evaluate.labels.tolist() == [0, 1, 1, 0]
    assert read_evaluate(made(latency="0.7")) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:size", "cannot import no_such_module:size: ModuleNotFoundError"),
        ("own_metrics:none", "cannot import own_metrics:none: AttributeError"),
        ("own_metrics:share", "own_metrics:share is a float, which cannot be called"),
        ("own_metrics:other", "other cannot be called with the network alone"),
    ],
)
def test_what_cannot_be_imported_or_called(made: Any, name: str, words: str) -> None:
    with pytest.raises(foldcut.CompilerError, match=words):
        read_evaluate(made(latency="0.7", evaluate=name))


def test_labels_that_are_none(made: Any) -> None:
    np.save("wrong.npy", np.zeros(4))
    with pytest.raises(foldcut.CalibrationError, match="labels are not whole numbers"):
        read_evaluate(made(latency="0.7", labels=Path("wrong.npy")))
    Path("broken.npy").write_bytes(b"nothing")
    with pytest.raises(foldcut.CalibrationError, match="cannot read"):
        read_evaluate(made(latency="0.7", labels=Path("broken.npy")))


def test_what_a_metric_prints_is_no_json(made: Any, capsys: Any) -> None:
    Path("talking_metrics.py").write_text("def size(module):\n    print('hello')\n    return 1.0\n")
    for as_json, place in ((True, 1), (False, 0)):
        evaluate = read_evaluate(made(latency="0.7", evaluate="talking_metrics:size", as_json=as_json))
        assert not isinstance(evaluate, foldcut.Top1) and evaluate is not None
        assert evaluate(nn.Linear(2, 2)) == 1.0 and metric_name(evaluate) == "size"
        assert capsys.readouterr()[place] == "hello\n"


def test_none_is_said_to_be_for_calib(made: Any) -> None:
    with pytest.raises(foldcut.CalibrationError, match="`none` is for --calib of `compile` and `sweep`"):
        made(latency="0.7", reference=Path("none")).check()
