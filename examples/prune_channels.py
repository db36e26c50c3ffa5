"""Channel pruning: which channels go together, half of them removed, and the layers behind re-solved."""

import foldcut
from foldcut.compiler.cli.demo import load_digits, train_digits

images, labels, test_images, test_labels = load_digits()
net = train_digits(images, labels, seed=0, epochs=3)


def accuracy(module):
    return float((module(test_images).argmax(1) == test_labels).float().mean())


# what can be cut, and why the rest cannot
provenance = foldcut.find_units(foldcut.capture(net, images[:2]))
for group in provenance.groups:
    print(f"{group.name:24} {len(group):4} units  {group.reason or 'prunable'}")

# half of every group, no gradient at all; `ignore` leaves a group alone
limits = foldcut.ChannelLimits(multiple_of=4, ignore=(provenance.prunable[0].name,))
settings = foldcut.PipelineSettings(channels=foldcut.ChannelSettings(limits=limits))
out = foldcut.compile(net, images[:300], goal=foldcut.Channels(keep=0.5), mimic=None, settings=settings, progress=False)
for stage, error in out.report.output_errors.items():
    print(f"output error {stage:10} {error:.4f}")
print(f"accuracy {accuracy(net.eval()):.3f} -> {accuracy(out.module):.3f}")

# a MACs goal spreads the cut where it costs the least error
out = foldcut.compile(net, images[:300], goal=foldcut.Macs(0.6), mimic=None, progress=False)
for decision in out.plan.decisions:
    print(decision)
macs = out.report.macs
print(f"MACs x{macs['after'] / macs['before']:.3f}, latency x{out.report.latency['ratio']:.3f}")
