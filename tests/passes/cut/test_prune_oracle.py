"""The channel rewrite beside an oracle that knows nothing of data movement: the whole network, run as it is, each
contraction without the columns of its weight that the cut takes. Many small graphs, with whatever torch has to offer
between two layers; a cut of them is exact or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from foldcut.compiler.analysis.operator_kinds import kind_of
from foldcut.compiler.analysis.provenance import Provenance, find_units
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.execute import bind, evaluate
from foldcut.compiler.ir.program import Program, output_nodes
from foldcut.compiler.support.errors import RewriteError
from foldcut.passes.cut.cuttable import cuttable_groups
from foldcut.passes.cut.prune_channels import prune_channels
from torch import nn
from torch.nn import functional as F

Between = Callable[[torch.Tensor, "Net"], torch.Tensor]


class Net(nn.Module):
    """A layer of eight channels, something between, and layers behind; parameters that `between` may use."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.between = between
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        for name, shape in (("p", (8,)), ("q", (8, 4)), ("w", (8, 8)), ("m", (8, 8)), ("image", (8, 6, 6))):
            self.register_parameter(name, nn.Parameter(torch.rand(shape) + 0.5))
        self.register_buffer("order", torch.tensor([5, 0, 3, 3, 7, 1, 2, 6]))
        self.register_buffer("gathered", torch.randint(0, 8, (1, 8, 6, 6)))
        self.register_buffer("uneven", torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7, 7]))
        with torch.no_grad():
            out = between(torch.rand(1, 8, 6, 6), self)
        self.b = nn.Conv2d(out.shape[1], 5, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.between(torch.sigmoid(self.a(x)), self)).relu().mean((2, 3)))


def b(p: torch.Tensor) -> torch.Tensor:
    """A vector beside the channels of an image."""
    return p.view(1, -1, 1, 1)


def scattered(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 2] = 1.0
    return y


BETWEEN: dict[str, Between] = {
    # movement
    "roll": lambda x, n: x.roll(3, 1),
    "roll two dims": lambda x, n: x.roll((4, 1), (1, 2)),
    "roll flat": lambda x, n: x.roll(4),
    "flip": lambda x, n: x.flip(1),
    "flip both": lambda x, n: x.flip((1, 2)),
    "gather": lambda x, n: x.gather(1, n.gathered.expand(x.shape[0], -1, -1, -1)),
    "gather rows": lambda x, n: x.gather(2, n.gathered.expand(x.shape[0], -1, -1, -1).clamp(max=5)),
    "take along": lambda x, n: torch.take_along_dim(x, n.order.view(1, -1, 1, 1), 1),
    "index": lambda x, n: x[:, n.order],
    "index repeats": lambda x, n: x[:, n.uneven],
    "index two": lambda x, n: x[:, n.order, n.order % 6].unsqueeze(-1),
    "index select": lambda x, n: x.index_select(1, n.order),
    "boolean": lambda x, n: x[:, n.order > 2],
    "strided slice": lambda x, n: x[:, ::3],
    "slices": lambda x, n: torch.cat([x[:, 4:], x[:, :3]], 1),
    "overlapping": lambda x, n: torch.cat([x[:, :5], x[:, 3:]], 1),
    "select": lambda x, n: x * x[:, 3:4],
    "one channel": lambda x, n: torch.stack([x[:, 3], x[:, 5]], 1),
    "unbind": lambda x, n: torch.stack(x.unbind(1)[::-1], 1),
    "chunk": lambda x, n: torch.cat(x.chunk(2, 1)[::-1], 1),
    "split": lambda x, n: torch.cat(x.split([1, 3, 4], 1)[::-1], 1),
    "gated": lambda x, n: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid(),
    "repeat": lambda x, n: x.repeat(1, 2, 1, 1),
    "interleave": lambda x, n: x.repeat_interleave(2, 1),
    "tile": lambda x, n: x.tile(1, 3, 1, 1),
    "pixel shuffle": lambda x, n: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x, n: F.pixel_unshuffle(x, 2),
    "channel shuffle": lambda x, n: F.channel_shuffle(x, 2),
    "shuffle by hand": lambda x, n: x.view(-1, 4, 2, 6, 6).transpose(1, 2).reshape(-1, 8, 6, 6),
    "space to depth": lambda x, n: x.view(-1, 8, 3, 2, 3, 2).permute(0, 3, 5, 1, 2, 4).reshape(-1, 32, 3, 3),
    "fold channels in": lambda x, n: x.permute(0, 2, 3, 1).reshape(-1, 6, 6, 8).permute(0, 3, 1, 2),
    "wrong way": lambda x, n: x.permute(0, 2, 3, 1).reshape(-1, 8, 6, 6),
    "transposed": lambda x, n: x.transpose(1, 2).reshape(-1, 8, 6, 6),
    "diagonal": lambda x, n: x[:, :, :, 0].unsqueeze(1).expand(-1, 8, -1, -1).diagonal(dim1=1, dim2=2).mT.unsqueeze(-1),
    "diagonal of channels": lambda x, n: F.pad(x, (0, 2, 0, 2)).diagonal(dim1=1, dim2=2).mT.unsqueeze(-1),
    "as strided": lambda x, n: x.contiguous().as_strided((x.shape[0], 8, 6, 6), (288, 36, 6, 1)),
    "unfold": lambda x, n: x.unfold(1, 2, 2).flatten(3).mean(3, keepdim=True),
    "unfold overlapping": lambda x, n: x.unfold(1, 4, 1).permute(0, 1, 4, 2, 3).reshape(-1, 20, 6, 6),
    "im2col": lambda x, n: F.unfold(x, 2).unsqueeze(-1),
    "tril": lambda x, n: F.pad(x, (0, 2, 0, 2)).transpose(1, 2).tril().transpose(1, 2),
    "scatter": lambda x, n: scattered(x),
    "select scatter": lambda x, n: x.select_scatter(x[:, 0] * 2, 1, 5),
    "slice scatter": lambda x, n: x.slice_scatter(x[:, :3], 1, 2, 5),
    "index put": lambda x, n: x.transpose(0, 1).index_put((n.order[:2],), x.transpose(0, 1)[:2]).transpose(0, 1),
    "index add": lambda x, n: x.index_add(1, n.order[:2], x[:, :2]),
    "index fill": lambda x, n: x.index_fill(1, n.order[:2], 0.5),
    "masked fill": lambda x, n: x.masked_fill(b(n.order > 3), 0.0),
    "where": lambda x, n: torch.where(b(n.order > 3), x, 0.3 * b(n.p)),
    "rot90": lambda x, n: F.pad(x, (0, 2, 0, 2)).rot90(1, (1, 2)),
    "pad": lambda x, n: F.pad(x, (0, 0, 0, 0, 2, 3)),
    "crop": lambda x, n: F.pad(x, (0, 0, 0, 0, -2, 0)),
    "circular": lambda x, n: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "replicate": lambda x, n: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "cat of constant": lambda x, n: torch.cat([x, n.image.expand(x.shape[0], -1, -1, -1)], 1),
    "cat along rows": lambda x, n: torch.cat([x, n.image[None, :, :2].expand(x.shape[0], -1, -1, -1)], 2),
    # arithmetic over the channels
    "softmax": lambda x, n: x.softmax(1),
    "cumsum": lambda x, n: x.cumsum(1),
    "sort": lambda x, n: x.sort(1)[0],
    "argsort": lambda x, n: x.gather(1, x.argsort(1)),
    "topk": lambda x, n: x.topk(3, 1)[0],
    "norm": lambda x, n: x / x.norm(dim=1, keepdim=True),
    "mean": lambda x, n: x - x.mean(1, keepdim=True),
    "maximum": lambda x, n: torch.max(x, b(n.p)),
    "max": lambda x, n: x * x.amax(1, keepdim=True),
    "glu": lambda x, n: F.glu(x, 1),
    "local response": lambda x, n: F.local_response_norm(x, 3),
    "pooled channels": lambda x, n: F.max_pool2d(x.flatten(2), 3, 1, 1).view(-1, 8, 6, 6),
    "averaged channels": lambda x, n: F.avg_pool1d(x.flatten(2).mT, 2).mT.view(-1, 4, 6, 6),
    "diff": lambda x, n: x.diff(dim=1),
    "normalised": lambda x, n: F.normalize(x, dim=1),
    "cross": lambda x, n: torch.linalg.cross(x[:, :3], x[:, 3:6], dim=1),
    "cosine": lambda x, n: x * F.cosine_similarity(x, b(n.p), 1).unsqueeze(1),
    "outer": lambda x, n: torch.einsum("nchw,nchw->nc", x, x)[:, :, None, None],
    "gram": lambda x, n: (x.flatten(2) @ x.flatten(2).mT).unsqueeze(-1),
    # products with stored matrices
    "einsum": lambda x, n: torch.einsum("nchw,cd->ndhw", x, n.w),
    "einsum out": lambda x, n: torch.einsum("nchw,dc->ndhw", x, n.w).relu() * b(n.p),
    "matmul": lambda x, n: (x.permute(0, 2, 3, 1) @ n.w).permute(0, 3, 1, 2),
    "transposed matrix": lambda x, n: (x.permute(0, 2, 3, 1) @ n.w.t()).permute(0, 3, 1, 2),
    "matrix both ways": lambda x, n: (F.linear(x.permute(0, 2, 3, 1), n.w).relu() @ n.w).permute(0, 3, 1, 2),
    "matrix in front": lambda x, n: (n.w @ x.flatten(2)).view(-1, 8, 6, 6),
    "softmax of a matrix": lambda x, n: (x.permute(0, 2, 3, 1) @ n.w.softmax(0)).permute(0, 3, 1, 2),
    "softmax of a matrix, linear": lambda x, n: F.linear(x.permute(0, 2, 3, 1), n.w.softmax(1)).permute(0, 3, 1, 2),
    # constants computed in the graph
    "p": lambda x, n: x * b(n.p),
    "p softmax": lambda x, n: x * b(n.p.softmax(0)),
    "p cumsum": lambda x, n: x * b(n.p.cumsum(0)),
    "p sort": lambda x, n: x * b(n.p.sort()[0]),
    "p flip": lambda x, n: x * b(n.p.flip(0)),
    "p roll": lambda x, n: x * b(n.p.roll(1)),
    "p norm": lambda x, n: x * b(n.p / n.p.norm()),
    "p mean": lambda x, n: x * b(n.p - n.p.mean()),
    "p twice": lambda x, n: x * b(n.p) + b(n.p.softmax(0)),
    "p exp": lambda x, n: x * b(-torch.exp(n.p)),
    "p product": lambda x, n: x * b(n.p * n.w[0]),
    "p unknown": lambda x, n: x * b(n.p) + torch.logdet(n.p.diag()),
    "p median": lambda x, n: x * b(n.p) + n.p.median(),
    "p var": lambda x, n: x * b(torch.var_mean(n.q, 1)[0]),
    "p rows": lambda x, n: x * b((n.q / n.q.sum(1, keepdim=True))[:, 0]),
    "p columns": lambda x, n: x * b((n.q / n.q.norm(dim=0)).sum(1)),
    "p chunk": lambda x, n: x * b(torch.cat(n.p.chunk(2)[::-1])),
    "p matrix": lambda x, n: x * b(n.w @ n.p),
    "p inverse": lambda x, n: x * b(n.w.inverse()[0]),
    "p interpolated": lambda x, n: x + F.interpolate(n.image[None, :, :3, :3], size=(6, 6), mode="bilinear"),
    "p image": lambda x, n: x + n.image.softmax(0),
    "p diagonal": lambda x, n: x * b(n.w.diagonal()),
    "p outer": lambda x, n: x * b(torch.outer(n.p, n.p)[0]),
    "p triangle": lambda x, n: x * b(n.w.tril().sum(1)),
    "arange": lambda x, n: x * b(torch.arange(8) + 1.0),
    "linspace": lambda x, n: x * b(torch.linspace(0.0, 1.0, 8)),
    "eye": lambda x, n: x * b(torch.eye(8)[3] + 0.5),
    "one hot": lambda x, n: x * b(F.one_hot(n.order, 8).float().sum(0)),
    "zeros": lambda x, n: torch.cat([x, torch.zeros(x.shape[0], 2, 6, 6)], 1) + 1,
    "table": lambda x, n: x * b(F.embedding(n.order, n.q).mean(1)),
    "table of rows": lambda x, n: (
        F.linear(x.permute(0, 2, 3, 1), n.w).permute(0, 3, 1, 2)
        + F.embedding((x[:, 0] * 7).long(), n.w).permute(0, 3, 1, 2)
    ),
}


def without_columns(program: Program, provenance: Provenance, removed: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The whole program; where a layer contracts, the columns of what was removed are zero."""
    slots = {}
    for slot in provenance.slots:
        if slot.role == "in":
            slots.setdefault(slot.node, []).append(slot)
    values: dict[str, Any] = bind(program, x)
    for node in program.graph.nodes:
        if node.op == "call_function":
            tensors = {}
            given = dict(values)
            if node.name not in slots and kind_of(node) in ("matmul", "einsum"):
                for operand in node.all_input_nodes:  # a product with a matrix that the graph computes
                    labels = provenance.values.get(operand.name)
                    if operand.op == "call_function" and isinstance(labels, torch.Tensor):
                        given[operand.name] = values[operand.name].masked_fill(removed[labels], 0)
            for slot in slots.get(node.name, ()):
                weight = program.tensor(slot.parameter).detach().clone()
                weight.movedim(slot.dim, 0)[removed[slot.labels]] = 0
                tensors |= {name: weight for name, first in program.first_names.items() if first == slot.parameter}
            values[node.name] = evaluate(program, node, given, tensors)
    (result,) = output_nodes(program.graph)
    return values[result.name]


def patterns(provenance: Provenance, groups: list[Any], count: int = 4) -> list[torch.Tensor]:
    """Random subsets to remove, each group keeping one at least; then each group alone."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        parts = []
        for g in groups:
            gone = int(torch.randint(1, len(g), (1,), generator=generator))
            parts.append(g.units[torch.randperm(len(g), generator=generator)[:gone]])
        found.append(torch.cat(parts))
    return found + [g.units[[0]] for g in groups]


def check_exact(program: Program, x: torch.Tensor) -> int:
    """Cut at random where it can be cut: exact, or refused. How many cuts were made."""
    program.check()
    provenance = find_units(program)
    groups, _ = cuttable_groups(provenance, provenance.prunable)
    made = 0
    for units in patterns(provenance, groups) if groups else []:
        removed = provenance.removal(units)
        try:
            smaller = prune_channels(provenance, units).program
        except RewriteError:
            continue
        made += 1
        with torch.no_grad():
            wanted = without_columns(program, provenance, removed, x)
            found = smaller(x)
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())), units
    return made


@pytest.mark.parametrize("name", BETWEEN)
def test_a_cut_is_exact_or_refused(name: str) -> None:
    torch.manual_seed(0)
    net = Net(BETWEEN[name]).eval()
    x = torch.rand(2, 3, 6, 6)
    made = check_exact(capture(net, x), x)
    assert made > 0
