"""One latency goal, several rewrites: the mix of dropped blocks and pruned channels that loses least."""

import foldcut
from foldcut.compiler.cli.demo import load_digits, train_digits

images, labels, test_images, test_labels = load_digits()
net = train_digits(images, labels, seed=0, epochs=3)


def accuracy(module):
    return float((module(test_images).argmax(1) == test_labels).float().mean())


# counts in steps of 16 only: each one that a group may go to is timed
limits = foldcut.ChannelLimits(multiple_of=16)
settings = foldcut.PipelineSettings(channels=foldcut.ChannelSettings(limits=limits))
out = foldcut.compile(
    net,
    images[:300],
    goal=foldcut.Latency(0.6),
    rewrites=("drop_blocks", "prune_channels"),
    mimic=None,
    settings=settings,
    progress=False,
)
for decision in out.plan.decisions:
    print(decision)
for stage, error in out.report.output_errors.items():
    print(f"output error {stage:12} {error:.4f}")
latency = out.report.latency
print(f"latency x{latency['ratio']:.3f} ({latency['low']:.3f} to {latency['high']:.3f})")
print(f"accuracy {accuracy(net.eval()):.3f} -> {accuracy(out.module):.3f}")

# with "factorize" among the rewrites layers may become thinner as well; docs/joint.md says how the mix is found
