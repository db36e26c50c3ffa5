"""The pipeline by hand: capture, look at the regions, drop two blocks, re-solve, compare. For those who embed foldcut
in a toolchain."""

import foldcut
from foldcut.compiler.cli.demo import load_digits, train_digits
from foldcut.compiler.data.output_error import output_error
from foldcut.compiler.export.exporter import to_onnx
from foldcut.compiler.ir.cost import program_cost
from foldcut.passes.drop.drop_blocks import changes_of_drops, drop_blocks
from foldcut.passes.drop.recoverability import Recoverability
from foldcut.passes.solve.resolve_network import resolve_network

images, labels, _, _ = load_digits()
net = train_digits(images, labels, seed=0, epochs=3)
calibration = foldcut.CalibrationSet.of(images[:150])
fit, held_out = calibration.split(seed=0)

teacher = foldcut.capture(net, images[:2])
analysis = foldcut.find_regions(teacher)
print(f"{len(analysis.regions)} removable regions, {len(analysis.blocks)} of them blocks")

# which block does the rest of the network recover best?
errors = Recoverability(teacher, fit)([], analysis.blocks)
chosen = sorted(analysis.blocks, key=lambda region: errors[region.name])[:2]
print("dropping", ", ".join(region.path for region in chosen))

student = drop_blocks(teacher, chosen)
resolved = resolve_network(teacher, student, fit, changes_of_drops(chosen))
dropped, solved = (output_error(teacher, program, held_out) for program in (student, resolved.program))
print(f"output error {dropped:.4f} dropped, {solved:.4f} re-solved")
print(f"MACs {program_cost(teacher).macs:,} -> {program_cost(resolved.program).macs:,}")
print(f"ONNX model of {len(to_onnx(resolved.program)):,} bytes")
