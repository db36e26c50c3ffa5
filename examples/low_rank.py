"""Low rank: layers replaced by thinner pairs, ranks chosen together for a goal, nothing trained."""

import foldcut
from foldcut.compiler.cli.demo import load_digits, train_digits

images, labels, test_images, test_labels = load_digits()
net = train_digits(images, labels, seed=0, epochs=3)


def accuracy(module):
    return float((module(test_images).argmax(1) == test_labels).float().mean())


# half of the multiply-accumulates; for each layer the scheme and rank that cost the least error together
settings = foldcut.PipelineSettings(ranks=foldcut.RankSettings(multiple_of=4))
out = foldcut.compile(
    net,
    images[:300],
    goal=foldcut.Macs(0.5),
    rewrites=("factorize",),
    mimic=None,
    settings=settings,
    progress=False,
)
for decision in out.plan.decisions:
    print(decision)
for stage, error in out.report.output_errors.items():
    print(f"output error {stage:12} {error:.4f}")
macs = out.report.macs
print(f"MACs x{macs['after'] / macs['before']:.3f}, latency x{out.report.latency['ratio']:.3f}")
print(f"accuracy {accuracy(net.eval()):.3f} -> {accuracy(out.module):.3f}")

# other goals: foldcut.Latency(0.7) with rewrites=("factorize",) times every option on the backend;
# foldcut.Ranks(energy=0.99) takes each layer on its own (or rank=, keep=, error=, macs=)
