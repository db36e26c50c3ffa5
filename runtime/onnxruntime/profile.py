"""Time of each node as ONNX Runtime runs it, after its own fusing, from its profiler."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ...compiler.onnx.model_file import OnnxModel
from ...compiler.support.errors import BackendError, first_line
from ..measure.backend import Array, NodeTime
from .backend import OPTIMISED, create_session

#: A profile takes so many seconds, within these numbers of runs.
PROFILE_S, LEAST_RUNS, MOST_RUNS = 0.4, 5, 60
_TIMED = "_kernel_time"
#: What ORT appends to the name of the value of a convolution that it gives a blocked layout.
_BLOCKED = "_nchwc"


def profile_model(model: OnnxModel, inputs: Mapping[str, Array], *, threads: int = 1) -> tuple[NodeTime, ...]:
    """Run `model` a number of times under ONNX Runtime's profiler on the CPU; the nodes in the order in which they run.

    Raises BackendError when ORT refuses the model or gives no profile.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        session: Any = create_session(model, threads=threads, traced=Path(folder))
        try:
            _run(session, dict(inputs))
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
            optimised = onnx.load(str(Path(folder) / OPTIMISED), load_external_data=False)
        except Exception as cause:  # ORT raises types of its own
            raise BackendError(
                f"ONNX Runtime gave no profile: {first_line(cause)}", hint="check space in the temporary folder"
            ) from cause
    made = {node.name: [value for value in node.output if value] for node in optimised.graph.node if node.name}
    return _node_times(events, made)


def _run(session: Any, feeds: Mapping[str, Array]) -> None:
    start = time.perf_counter()
    for done in range(MOST_RUNS):
        if done >= LEAST_RUNS and time.perf_counter() - start > PROFILE_S:
            return
        session.run(None, feeds)


def _node_times(events: Sequence[Any], made: Mapping[str, Sequence[str]]) -> tuple[NodeTime, ...]:
    """The median time of each node over the runs. `made` are the values that the optimised nodes make, by name."""
    times: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    for event in events:
        label = str(event.get("name", ""))
        if event.get("cat") != "Node" or not label.endswith(_TIMED):
            continue
        name = label.removesuffix(_TIMED)
        times.setdefault(name, []).append(float(event.get("dur", 0)) / 1000)
        kinds[name] = str(event.get("args", {}).get("op_name", ""))
    return tuple(
        NodeTime(
            names=tuple(dict.fromkeys((*made.get(name, ()), name.removesuffix(_BLOCKED), name))),
            kind=kinds[name],
            ms=median(found),
        )
        for name, found in times.items()
    )
