"""ONNX in, ONNX out: all that there is is a file, and what comes back drops into its place.

Input and output names, dtypes, dynamic and fixed dims, opset, metadata and doc strings stay; the blocks that the
network can do without are gone, and its latency is measured against the very file that came in.
"""

import tempfile
from pathlib import Path

import foldcut
import onnx
import onnxruntime
from foldcut.compiler.cli.demo import load_digits, train_digits
from foldcut.compiler.export.exporter import to_onnx_model
from foldcut.compiler.onnx.compare_files import compare_onnx

images, labels, test_images, test_labels = load_digits()

with tempfile.TemporaryDirectory() as folder:
    # somebody else's file: written by some exporter, opset 13, its own names, batch fixed at 1
    theirs = Path(folder) / "classifier.onnx"
    exported = to_onnx_model(foldcut.capture(train_digits(images, labels, seed=0, epochs=4), images[:2]), opset=13)
    for value, name in ((exported.graph.input[0], "pixels"), (exported.graph.output[0], "scores")):
        for node in exported.graph.node:
            node.input[:] = [name if n == value.name else n for n in node.input]
            node.output[:] = [name if n == value.name else n for n in node.output]
        value.name = name
        value.type.tensor_type.shape.dim[0].dim_value = 1
    exported.metadata_props.add(key="owner", value="somebody else")
    onnx.save(exported, theirs)

    out = foldcut.compile(theirs, images[:200], goal=foldcut.Blocks(2), mimic=None, progress=False)
    ours = out.save(Path(folder) / "compiled") / "model.onnx"

    ratio = out.report.latency
    print(f"latency   x{ratio['ratio']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}) of the file that came in")
    print("dropped  ", ", ".join(d.path or d.region for d in out.plan.decisions if isinstance(d, foldcut.DropBlock)))

    found = compare_onnx(theirs, ours, foldcut.CalibrationSet.of(test_images))
    print("interface", "kept" if not found.interface else found.interface)
    print(f"outputs   cosine {min(d.cosine for d in found.outputs.values()):.4f} on {found.samples} samples")

    for path in (theirs, ours):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        hits = [
            session.run(["scores"], {"pixels": image[None].numpy()})[0].argmax() == int(label)
            for image, label in zip(test_images, test_labels, strict=True)
        ]
        print(f"accuracy  {100 * sum(hits) / len(hits):.1f} % with {path.name}")
