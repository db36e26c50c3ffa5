"""The sequential re-solve: exact where it can be, never worse, and the same however the data comes."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from foldcut.compiler.analysis.regions import Region, find_regions
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.compare import relative_error
from foldcut.compiler.ir.program import Batch, Program
from foldcut.compiler.support.errors import CalibrationError
from foldcut.passes.drop.drop_blocks import changes_of_drops, drop_blocks
from foldcut.passes.solve.resolve_network import Resolved, ResolveSettings, batch_size_for, resolve_network, thinning
from torch import nn


def resolve(
    teacher: Program, regions: list[Region], data: object, settings: ResolveSettings | None = None
) -> tuple[Program, Resolved]:
    """(the dropped network, and re-solved)."""
    student = drop_blocks(teacher, regions)
    samples = CalibrationSet.of(data)
    return student, resolve_network(teacher, student, samples, changes_of_drops(regions), settings=settings)


def same_weights(a: Program, b: Program) -> bool:
    left, right = a.module.state_dict(), b.module.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def reader(program: Program, weight: str) -> str:
    """The layer that a weight belongs to."""
    return next(n.name for n in program.graph.nodes if any(i.target == weight for i in n.all_input_nodes))


def errors(teacher: Program, student: Program, resolved: Program, data: Batch) -> tuple[float, float]:
    wanted = teacher(data)
    return relative_error(wanted, student(data)), relative_error(wanted, resolved(data))


def test_an_unchanged_network_keeps_every_bit(residual: Program, nets: SimpleNamespace) -> None:
    _student, resolved = resolve(residual, [], nets.images(8))
    assert same_weights(residual, resolved.program)
    assert resolved.layers == ()


def test_a_zero_branch_changes_no_weight(residual: Program, nets: SimpleNamespace) -> None:
    """The layers behind and in front are solved, and find that there is nothing to do."""
    data = nets.images(16)
    _student, resolved = resolve(residual, [find_regions(residual).blocks[1]], data)
    assert len(resolved.layers) >= 3
    for name, value in resolved.program.module.state_dict().items():
        torch.testing.assert_close(value, residual.module.state_dict()[name], rtol=0, atol=1e-5)
    torch.testing.assert_close(resolved.program(data), residual(data), rtol=0, atol=1e-5)
    assert all(layer.before <= 1e-10 for layer in resolved.layers)


@pytest.mark.parametrize("chosen", [[0], [2], [0, 2], [2, 1, 0]], ids=str)
def test_each_layer_ends_no_worse_and_the_network_better(
    residual: Program, nets: SimpleNamespace, chosen: list[int]
) -> None:
    blocks = find_regions(residual).blocks
    data = nets.images(64)
    student, resolved = resolve(residual, [blocks[i] for i in chosen], data)
    assert resolved.layers
    assert all(0 <= layer.after <= layer.before for layer in resolved.layers)
    before, after = errors(residual, student, resolved.program, data)
    assert after < 0.5 * before
    assert resolved.program.text() == student.text()
    assert resolved.program.history[-1].startswith("re-solve")


def test_student_and_teacher_are_left_alone(residual: Program, nets: SimpleNamespace) -> None:
    block = find_regions(residual).blocks[0]
    student = drop_blocks(residual, [block])
    states = [{k: v.clone() for k, v in p.module.state_dict().items()} for p in (residual, student)]
    resolved = resolve_network(residual, student, CalibrationSet.of(nets.images(8)), changes_of_drops([block])).program
    assert not same_weights(resolved, student)
    for program, state in zip((residual, student), states, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in program.module.state_dict().items())


@pytest.mark.parametrize("kind", ["PreActivation", "Inverted", "Gated", "Nested"])
def test_other_kinds_of_blocks(nets: SimpleNamespace, kind: str) -> None:
    make = getattr(nets, kind)
    teacher = capture(nets.seeded(lambda: nets.image_net(make(), make()), seed=6), nets.images())
    data = nets.images(48)
    student, resolved = resolve(teacher, [find_regions(teacher).blocks[0]], data)
    before, after = errors(teacher, student, resolved.program, data)
    assert after < before
    assert all(0 <= layer.after <= layer.before for layer in resolved.layers)


def test_a_depthwise_layer_takes_part(inverted: Program, nets: SimpleNamespace) -> None:
    _, resolved = resolve(inverted, [find_regions(inverted).blocks[0]], nets.images(32))
    depthwise = reader(resolved.program, "2.branch.1.0.weight")
    (error,) = (layer for layer in resolved.layers if layer.node == depthwise)
    assert error.after < error.before


@pytest.mark.parametrize("chosen", [[0], [1], [0, 1, 2]], ids=str)
def test_a_transformer(transformer: Program, nets: SimpleNamespace, chosen: list[int]) -> None:
    blocks = find_regions(transformer).blocks
    data = nets.tokens(64)
    student, resolved = resolve(transformer, [blocks[i] for i in chosen], data)
    before, after = errors(transformer, student, resolved.program, data)
    assert after < 0.5 * before


class LinearNet(nn.Module):
    """No activation anywhere: what follows a dropped branch can do its work exactly."""

    def __init__(self, bias: bool, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=bias)
        self.branch = nn.Conv2d(width, width, 1, bias=bias)
        self.after = nn.Conv2d(width, width, 1, bias=bias)
        self.head = nn.Linear(width, 4, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.after(x + self.branch(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_branch_is_absorbed(nets: SimpleNamespace, bias: bool) -> None:
    teacher = capture(nets.seeded(lambda: LinearNet(bias), seed=7), nets.images())
    (region,) = (r for r in find_regions(teacher).regions if r.kind == "residual")
    data, fresh = nets.images(32), nets.images(16, seed=9)
    student, resolved = resolve(teacher, [region], data)
    before, after = errors(teacher, student, resolved.program, fresh)
    assert before > 0.01
    assert after < 1e-3
    exact = resolve(teacher, [region], data, ResolveSettings(ridge=1e-9))[1]
    assert errors(teacher, student, exact.program, fresh)[1] < 1e-6


@pytest.mark.parametrize("count", [1, 2, 10])
def test_tiny_calibration_sets(residual: Program, transformer: Program, nets: SimpleNamespace, count: int) -> None:
    for program, data in ((residual, nets.images(count)), (transformer, nets.tokens(count))):
        student, resolved = resolve(program, [find_regions(program).blocks[0]], data)
        assert all(value.isfinite().all() for value in resolved.program.module.state_dict().values())
        assert all(0 <= layer.after <= layer.before for layer in resolved.layers)
        before, after = errors(program, student, resolved.program, data)
        assert after <= before


def test_shared_weights_are_locked(nets: SimpleNamespace) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.twice, self.branch, self.head = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.twice(self.embed(x).relu())
            x = x + self.branch(x.relu())
            return self.head(self.twice(x.relu()))

    teacher = capture(nets.seeded(Tied, seed=8), torch.randn(2, 6))
    (region,) = (r for r in find_regions(teacher).regions if r.kind == "residual")
    _, resolved = resolve(teacher, [region], torch.randn(40, 6, generator=torch.Generator().manual_seed(0)))
    old, new = teacher.module.state_dict(), resolved.program.module.state_dict()
    assert torch.equal(old["twice.weight"], new["twice.weight"])
    assert torch.equal(old["twice.bias"], new["twice.bias"])
    assert not torch.equal(old["head.weight"], new["head.weight"])
    assert {r.reason for r in resolved.locked} == {"its weight is shared with another layer"}


def test_frontiers_on_disk_give_the_same_bits(
    residual: Program,
    transformer: Program,
    nets: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made: list[object] = []
    real = tempfile.TemporaryDirectory

    def noted(*args: object, **kwargs: object) -> object:
        made.append(args)
        return real(*args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(tempfile, "TemporaryDirectory", noted)
    for program, data in ((residual, nets.images(12)), (transformer, nets.tokens(12))):
        regions = [find_regions(program).blocks[0]]
        in_memory = resolve(program, regions, data, ResolveSettings(batch_size=5))[1]
        assert not made
        on_disk = resolve(program, regions, data, ResolveSettings(batch_size=5, ram_bytes=0))[1]
        assert made
        made.clear()
        assert same_weights(in_memory.program, on_disk.program)
        assert in_memory.layers == on_disk.layers
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_go_when_it_is_interrupted(
    residual: Program, nets: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    block = find_regions(residual).blocks[0]

    def interrupt(_stage: str, _done: int, _total: int) -> None:
        assert list(tmp_path.iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve_network(
            residual,
            drop_blocks(residual, [block]),
            CalibrationSet.of(nets.images(8)),
            changes_of_drops([block]),
            settings=ResolveSettings(ram_bytes=0),
            progress=interrupt,
        )
    assert list(tmp_path.iterdir()) == []


def test_the_batch_size_hardly_matters(residual: Program, nets: SimpleNamespace) -> None:
    regions = [find_regions(residual).blocks[0]]
    one, other = (
        resolve(residual, regions, nets.images(24), ResolveSettings(batch_size=size, refine=0))[1].program
        for size in (24, 7)
    )
    for name, value in one.module.state_dict().items():
        torch.testing.assert_close(other.module.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_the_same_data_gives_the_same_bits(residual: Program, nets: SimpleNamespace) -> None:
    regions = [find_regions(residual).blocks[2]]
    first, second = (resolve(residual, regions, nets.images(16))[1].program for _ in range(2))
    assert same_weights(first, second)


def test_the_order_of_a_chain_does_not_matter(residual: Program, nets: SimpleNamespace) -> None:
    first, second, _ = find_regions(residual).blocks
    one, other = (resolve(residual, order, nets.images(16))[1].program for order in ([first, second], [second, first]))
    assert same_weights(one, other)


def test_refining_is_no_worse_at_the_end_of_a_branch(residual: Program, nets: SimpleNamespace) -> None:
    regions = [find_regions(residual).blocks[0]]
    plain, refined = (resolve(residual, regions, nets.images(48), ResolveSettings(refine=n))[1] for n in (0, 3))
    assert not same_weights(plain.program, refined.program)
    end = reader(plain.program, "blocks.2.conv2.weight")
    before, after = ({e.node: e for e in r.layers}[end].after for r in (plain, refined))
    assert after <= before


def test_the_ridge_falls_with_the_number_of_samples() -> None:
    assert [ResolveSettings().ridge_for(n) for n in (10, 50, 500)] == pytest.approx([0.1, 0.1, 0.01])
    assert ResolveSettings(ridge=0.5).ridge_for(500) == 0.5


def test_progress_counts_the_layers(residual: Program, nets: SimpleNamespace) -> None:
    seen: list[tuple[str, int, int]] = []
    block = find_regions(residual).blocks[2]
    resolved = resolve_network(
        residual,
        drop_blocks(residual, [block]),
        CalibrationSet.of(nets.images(8)),
        changes_of_drops([block]),
        progress=lambda *state: seen.append(state),
    )
    count = len(seen)
    assert 0 < count <= len(resolved.layers)
    assert seen == [("re-solve", i + 1, count) for i in range(count)]


def test_an_overflow_is_an_error_that_names_the_layer(nets: SimpleNamespace) -> None:
    teacher = capture(nets.seeded(lambda: nets.ResNet(2), seed=1), nets.images())
    block = find_regions(teacher).blocks[0]
    huge = 1e25 * nets.images(4)
    with pytest.raises(CalibrationError, match="not finite") as caught:
        resolve(teacher, [block], huge)
    assert caught.value.node in teacher.nodes


def test_rows_are_thinned_to_a_bound() -> None:
    assert thinning(1000, 10, None) == 1
    assert thinning(1000, 10, 100) == 1
    assert thinning(100_000, 10, 100) in {99, 101}
    assert all(thinning(rows, 7, 20) % 2 == 1 for rows in range(1, 5000, 37))


def test_fewer_rows_still_mend(residual: Program, nets: SimpleNamespace) -> None:
    data = nets.images(64)
    regions = [find_regions(residual).blocks[0]]
    student, resolved = resolve(residual, regions, data, ResolveSettings(rows_per_column=8))
    before, after = errors(residual, student, resolved.program, data)
    assert after < before
    assert not same_weights(resolved.program, resolve(residual, regions, data)[1].program)


def test_the_batch_fits_the_budget(residual: Program) -> None:
    from foldcut.passes.solve.layers import find_layers

    layers = find_layers(residual)[0].values()
    assert batch_size_for(residual, layers) == 64
    largest = 4 * 64 * 8 * 9
    assert batch_size_for(residual, layers, budget_bytes=10 * largest) == 10
    assert batch_size_for(residual, layers, budget_bytes=1) == 1
