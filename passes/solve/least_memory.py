"""What a compile needs in memory at the least, whatever it does one after another and however little it keeps."""

from __future__ import annotations

import math

from ...compiler.data.live_bytes import live_bytes
from ...compiler.ir.cost import weight_bytes
from ...compiler.ir.program import Program
from ...compiler.onnx.model_file import fits_a_message
from .layers import find_layers
from .moments import gram_bytes, thinning

#: Gram matrices of a layer that are there at once while it is solved: of all rows, of those held out, of a batch, the
#: sum of two, and a factorisation.
GRAMS = 5
#: Copies of the weights that a training holds: the student's, their gradients, two moments of each, the best so far;
#: and that an export does.
TRAINED_WEIGHTS, EXPORTED_WEIGHTS = 5, 4
#: Networks that a measurement has loaded, and how often each holds its weights.
SESSIONS, SESSION_WEIGHTS = 3, 2
#: Whatever else a compile loads and lays out.
REST_BYTES = 64 << 20


def least_bytes(
    program: Program,
    *,
    views: int = 1,
    rows_per_column: int | None = None,
    trained: bool = False,
    measuring_bytes: int = 0,
) -> int:
    """Bytes that a compile of a program takes on top of what the process holds once the network and the samples are
    there: for one sample with its `views` at a time, one layer after another. `measuring_bytes` is what a measurement
    takes beside the networks. An estimate from the graph."""
    live, weights = live_bytes(program), weight_bytes(program)
    grams = rows = 1
    for layer in find_layers(program)[0].values():
        columns, count = program.module.get_parameter(layer.weight)[0].numel(), layer.rows_per_sample(program)
        grams = max(grams, gram_bytes(program, layer))
        read = math.ceil(count / thinning(count, columns, rows_per_column))
        rows = max(rows, 4 * layer.groups * columns * read)
    solved = views * (2 * live.most + rows) + GRAMS * grams
    trained_bytes = TRAINED_WEIGHTS * weights + 4 * live.whole if trained else 0
    if fits_a_message(weights):
        measured = SESSIONS * (SESSION_WEIGHTS * weights + live.most) + measuring_bytes
        return max(solved, measured, EXPORTED_WEIGHTS * weights, trained_bytes) + REST_BYTES
    # in files: new weights are in memory until all are solved, exports write one after the other, and one session at a
    # time holds its own
    return max(solved + weights, weights + live.most + measuring_bytes, trained_bytes) + REST_BYTES
