"""Weights from safetensors: one file, shards with an index, modules without weights, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import foldcut
import pytest
import torch
from foldcut.compiler.support.errors import CaptureError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(10, 6), nn.BatchNorm1d(6), nn.Linear(6, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.table(tokens)))


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tied:
    torch.manual_seed(seed)
    net = Tied().eval().to(dtype)
    net.norm.running_mean += torch.rand(6, dtype=dtype)
    return net


def empty() -> Tied:
    with torch.device("meta"):
        return Tied().eval()


def written(net: nn.Module, folder: Path) -> dict[str, str]:
    """Two shards and their index, the tied weight once."""
    state = {name: value.contiguous() for name, value in net.state_dict().items() if name != "head.weight"}
    names = list(state)
    where = {name: f"model-0000{1 + (i > 1)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: state[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda: network(1), empty], ids=["filled", "meta"])
def test_shards_with_an_index(make, dtype: torch.dtype, tmp_path: Path) -> None:
    net = network(dtype=dtype)
    written(net, tmp_path)
    found = foldcut.load_shards(make(), tmp_path)
    for name, value in net.state_dict().items():
        assert torch.equal(found.state_dict()[name].to(value.dtype), value), name
    assert found.head.weight is found.table.weight
    tokens = torch.arange(4)
    assert torch.equal(found.to(dtype)(tokens), net(tokens))


@pytest.mark.parametrize("path", [".", "weights.safetensors"])
def test_one_file(path: str, tmp_path: Path) -> None:
    net = nn.Linear(4, 3)
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    assert torch.equal(foldcut.load_shards(nn.Linear(4, 3), tmp_path / path).weight, net.weight)


def test_a_module_without_weights_is_compiled_once_it_has_them(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()

    torch.manual_seed(0)
    net, samples = build(), torch.randn(40, 8)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        bare = build()
    options = {"goal": foldcut.Channels(0.5), "mimic": False, "progress": False, "cache": False}
    with pytest.raises(foldcut.CaptureError, match="on meta"):
        foldcut.compile(bare, samples, **options)
    out = foldcut.compile(foldcut.load_shards(bare, tmp_path), samples, **options)
    assert torch.equal(out.module(samples), foldcut.compile(net, samples, **options).module(samples))


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3, 4), "other": torch.zeros(1)}, tmp_path / "a.safetensors")
    net = nn.Linear(4, 3)
    before = net.weight.detach().clone()
    with pytest.raises(foldcut.CaptureError, match="not those of this network") as caught:
        foldcut.load_shards(net, tmp_path)
    assert caught.value.expected == "bias" and caught.value.actual == "other"
    save_file({"weight": torch.zeros(3, 4), "bias": torch.zeros(4)}, tmp_path / "a.safetensors")
    with pytest.raises(foldcut.CaptureError, match="bias has another shape"):
        foldcut.load_shards(net, tmp_path)
    save_file({"weight": torch.zeros(3, 4)}, tmp_path / "b.safetensors")
    with pytest.raises(foldcut.CaptureError, match=r"weight is in a\.safetensors and in b"):
        foldcut.load_shards(net, tmp_path)
    assert torch.equal(net.weight, before)


def test_damaged_and_hostile_files(tmp_path: Path) -> None:
    with pytest.raises(foldcut.CaptureError, match=r"holds no \.safetensors"):
        foldcut.load_shards(nn.Linear(4, 3), tmp_path)
    inside = tmp_path / "inside"
    inside.mkdir()
    where = written(network(), inside)
    index = inside / "model.safetensors.index.json"
    for file, match in (("../a.safetensors", "outside its folder"), ("gone.safetensors", "a shard is missing")):
        index.write_text(json.dumps({"weight_map": {**where, "norm.bias": file}}))
        with pytest.raises(foldcut.CaptureError, match=match):
            foldcut.load_shards(network(), inside)
    files = sorted(set(where.values()))
    index.write_text(json.dumps({"weight_map": {**where, "table.weight": files[-1]}}))
    with pytest.raises(foldcut.CaptureError, match=r"has no table\.weight"):
        foldcut.load_shards(network(), inside)
    for text in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(foldcut.CaptureError, match="no index of shards"):
            foldcut.load_shards(network(), inside)
    index.unlink()
    shard = next(inside.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(foldcut.CaptureError, match="cannot read"):
        foldcut.load_shards(network(), inside)


@pytest.mark.parametrize("shard_bytes", [1, 200, 10**9])
def test_what_is_saved_is_read_again(tmp_path: Path, shard_bytes: int) -> None:
    net = network()
    paths = foldcut.save_shards(net, tmp_path, shard_bytes=shard_bytes)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    torch.manual_seed(5)
    again = foldcut.load_shards(network(), tmp_path)
    for (name, ours), theirs in zip(net.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_later_save_takes_the_place_of_all_files(tmp_path: Path) -> None:
    many = foldcut.save_shards(network(), tmp_path, shard_bytes=1)
    assert len(many) > 3 and many[-1].name == "model.safetensors.index.json"
    (tmp_path / "config.json").write_text("{}")  # not ours
    assert [path.name for path in foldcut.save_shards(network(), tmp_path)] == ["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    foldcut.load_shards(network(), tmp_path)


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    foldcut.save_shards(net, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert sorted(opened.keys()) == ["0.bias", "0.weight", "1.bias"]
    again = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    again[1].weight = again[0].weight
    assert torch.equal(foldcut.load_shards(again, tmp_path)[1].weight, net[0].weight)


def test_a_compiled_network_goes_out_and_in(tmp_path: Path) -> None:
    samples = torch.randn(40, 6)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    out = foldcut.compile(net, samples, goal=foldcut.Channels(0.5), mimic=None, cache=False, progress=False)
    foldcut.save_shards(out.module, tmp_path, shard_bytes=100)
    empty = foldcut.apply_plan(foldcut.capture(net, samples[:2]), out.plan).module
    assert torch.equal(foldcut.load_shards(empty, tmp_path)(samples), out.module(samples))


def test_nothing_to_save_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="no weights"):
        foldcut.save_shards(nn.ReLU(), tmp_path)
    with pytest.raises(CaptureError, match="no size"):
        foldcut.save_shards(nn.Linear(2, 2), tmp_path, shard_bytes=0)
    assert not list(tmp_path.iterdir())
