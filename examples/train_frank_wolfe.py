"""Compression-aware training: a network trained by stochastic Frank-Wolfe beside one trained by SGD, both decomposed
and pruned without retraining. Draws accuracy over compression: python examples/train_frank_wolfe.py [picture.png]"""

import sys
import tempfile
from pathlib import Path

import matplotlib
import torch
from foldcut.compiler.analysis.provenance import find_units
from foldcut.compiler.cli.demo import DigitNet, load_digits
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.frontend.capture import capture
from foldcut.passes.cut.prune_channels import prune_channels
from foldcut.passes.factorize.decision import Ranks
from foldcut.passes.factorize.factorize import factorize
from foldcut.passes.factorize.select_ranks import RankAnalysis, RankSettings
from foldcut.passes.frank_wolfe import FrankWolfe, SpectralKSupport, parameter_groups
from foldcut.passes.prune.channel_budget import ChannelLimits, uniform_counts
from foldcut.passes.prune.select_channels import select_by_norm
from matplotlib import pyplot
from torch.nn import functional as F

matplotlib.use("Agg")
torch.set_num_threads(1)  # the layers are so small that more threads only get in each other's way

EPOCHS = 16
SHARES = (0.75, 0.5, 0.35, 0.25)
images, labels, test_images, test_labels = load_digits()


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


def frank_wolfe(net):
    """Conv and linear weights in tight spectral k-support balls, k a tenth of full rank; biases and norms by SGD."""

    def ball(weight):
        return SpectralKSupport(k=max(1, min(weight.shape[0], weight[0].numel()) // 10))

    optimizer = FrankWolfe(parameter_groups(net, ball, factor=2.0), lr=0.1, momentum=0.9)
    optimizer.make_feasible()
    return optimizer


def train(make_optimizer):
    torch.manual_seed(0)
    net = DigitNet(blocks=1)
    optimizer = make_optimizer(net)
    steps = EPOCHS * -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(module):
    return 100 * float((module(test_images).argmax(1) == test_labels).float().mean())


def decomposed(analysis, share):
    """Each layer to a pair that costs at most that share of its multiply-accumulates: a plain SVD of the weight."""
    return factorize(analysis.program, analysis.factors(analysis.each(Ranks(macs=share)))).module


def without_filters(provenance, share):
    """The filters of least L2 norm out of every group, channels physically removed."""
    groups = provenance.prunable
    counts = uniform_counts(groups, share, ChannelLimits(multiple_of=1))
    gone = [g.without(select_by_norm(provenance, g, counts[g.name]).order) for g in groups]
    return prune_channels(provenance, torch.cat(gone)).program.module


curves = {}
for name, make_optimizer in (("SGD", sgd), ("Frank-Wolfe", frank_wolfe)):
    net = train(make_optimizer)
    program = capture(net, images[:2])
    dense = accuracy(net)
    plain = RankSettings(schemes=("channel",), metric="weights", multiple_of=1)
    analysis = RankAnalysis(program, CalibrationSet.of(images[:2]), settings=plain)
    ranks = [accuracy(decomposed(analysis, share)) for share in SHARES]
    provenance = find_units(program)
    filters = [accuracy(without_filters(provenance, share)) for share in SHARES]
    curves[name] = (dense, ranks, filters)
    print(f"{name}: dense {dense:.1f} %")
    for share, by_rank, by_filter in zip(SHARES, ranks, filters, strict=True):
        print(f"  {share:.0%} of the MACs by rank: {by_rank:.1f} %    {share:.0%} of the filters: {by_filter:.1f} %")

figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), sharey=True)
for name, (dense, ranks, filters) in curves.items():
    left.plot([1.0, *SHARES], [dense, *ranks], marker="o", label=name)
    right.plot([1.0, *SHARES], [dense, *filters], marker="o", label=name)
left.set(title="plain SVD, no retraining", xlabel="MACs kept", ylabel="test accuracy, %")
right.set(title="filters of least norm removed", xlabel="filters kept")
left.invert_xaxis()
right.invert_xaxis()
left.legend()
target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()) / "frank_wolfe.png"
figure.savefig(target, dpi=120, bbox_inches="tight")
print(f"drawn: {target}")
