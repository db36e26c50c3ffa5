"""ONNX models above what one protobuf message holds: a file, with its weights in other files beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..support.atomic_files import StoredFile, digest
from ..support.errors import CaptureError, first_line
from .file import check_onnx, model_tensors

if TYPE_CHECKING:
    import onnx

#: Protobuf cannot hold more in one message; larger models have their weights beside the file.
MAX_PROTOBUF_BYTES = 2_000_000_000
#: The file of the weights, beside a model of this name.
MODEL, WEIGHTS = "model.onnx", "model.onnx.data"


def fits_a_message(size_bytes: int) -> bool:
    """Whether so much is held in memory in one piece, and in one file."""
    return size_bytes <= MAX_PROTOBUF_BYTES


class OnnxFile(StoredFile):
    """An ONNX model in a file whose weights lie in files beside it (ONNX's external data).

    ``os.fspath`` gives its path, which runtimes load it by. The files go when nobody refers to the model any more,
    unless they are somebody else's.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from foldcut.compiler.export.exporter import save_onnx
        >>> from foldcut.compiler.onnx.model_file import OnnxFile
        >>> program = foldcut.capture(nn.Linear(64, 64).eval(), torch.randn(2, 64))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = OnnxFile(save_onnx(program, Path(folder) / "net.onnx", inline_bytes=1000)[0])
        ...     sorted(model.beside()), len(model.structure().graph.initializer)
        (['net.onnx.data'], 2)
    """

    @property
    def size_bytes(self) -> int:
        """Bytes of the file and of those with its weights."""
        return super().size_bytes + sum(file.size_bytes for file in self.beside().values())

    def structure(self) -> onnx.ModelProto:
        """The graph, without the weights that lie beside the file."""
        import onnx

        return onnx.load(self.path, load_external_data=False)

    def beside(self) -> dict[str, StoredFile]:
        """The files with its weights, by the names that the model calls them."""
        import onnx

        found = {
            entry.value: StoredFile(self.path.parent / entry.value, self._folder)
            for tensor in model_tensors(self.structure())
            if tensor.data_location == onnx.TensorProto.EXTERNAL
            for entry in tensor.external_data
            if entry.key == "location"
        }
        return dict(sorted(found.items()))

    def pieces(self) -> Iterator[bytes]:
        """The file, then those with its weights."""
        yield from super().pieces()
        for file in self.beside().values():
            yield from file.pieces()

    def variant(self, model: onnx.ModelProto) -> OnnxFile:
        """Another model that reads the same files: written beside them, under a name of its own. Only where they are
        temporary: nothing is written into a user's folder."""
        assert self._folder is not None, "a file of somebody else's is not changed"
        content = model.SerializeToString(deterministic=True)
        path = self.path.with_name(f"{digest(content)}.onnx")
        path.write_bytes(content)
        return OnnxFile(path, self._folder)


OnnxModel: TypeAlias = "bytes | OnnxFile"


def structure_of(model: OnnxModel) -> onnx.ModelProto:
    """The graph of a model; weights that lie beside it are not read."""
    import onnx

    return model.structure() if isinstance(model, OnnxFile) else onnx.load_model_from_string(model)


def changed_like(model: OnnxModel, proto: onnx.ModelProto) -> OnnxModel:
    """A changed graph as what the model is: bytes, or a file that reads the same weights."""
    return model.variant(proto) if isinstance(model, OnnxFile) else bytes(proto.SerializeToString())


def readable(model: OnnxModel) -> bytes | str:
    """What runtimes load: bytes, or a path."""
    return str(model.path) if isinstance(model, OnnxFile) else model


def as_model(source: str | Path | onnx.ModelProto) -> OnnxModel:
    """The model as backends take it: its bytes, or the file itself when its weights lie in other files. Raises
    CaptureError for a damaged file, for weights outside its folder, and for a proto of more than 2 GB."""
    import onnx

    if isinstance(source, onnx.ModelProto):
        return _serialised(source)
    content = Path(source).read_bytes()
    return content if check_onnx(source, content) else OnnxFile(Path(source))


def _serialised(model: onnx.ModelProto) -> bytes:
    try:
        return bytes(model.SerializeToString())
    except Exception as cause:  # protobuf's EncodeError
        raise CaptureError(
            f"the model is too large for one message: {first_line(cause)}",
            hint="save it with external data, and give the path: onnx.save(model, path, save_as_external_data=True)",
        ) from cause
