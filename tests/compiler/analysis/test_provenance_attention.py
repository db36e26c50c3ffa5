"""Transformers and other networks of matrix products: heads, streams, tokens and positions as units or not."""

import math
from typing import Any

import pytest
import torch
from foldcut.compiler.analysis.provenance import Provenance, find_units
from foldcut.compiler.analysis.unit_groups import UnitGroup
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.program import Program
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, TOKENS = 8, 2, 5


def split_heads(x: torch.Tensor, heads: int = HEADS) -> torch.Tensor:
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def by_matmul(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def by_einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


class Attention(nn.Module):
    """Separate projections of the queries, keys and values, and a residual stream."""

    def __init__(self, mix: Any = F.scaled_dot_product_attention, heads: int = HEADS) -> None:
        super().__init__()
        self.mix, self.heads = mix, heads
        self.embed = nn.Linear(3, WIDTH)
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        q, k, v = (split_heads(layer(x), self.heads) for layer in (self.q, self.k, self.v))
        return self.head(x + self.proj(merge_heads(self.mix(q, k, v)))).mean(1)


class VisionTransformer(nn.Module):
    """Patches, a class token, position embeddings, one MLP branch, the class token's features."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.position = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x[:, 0])


class Mixer(nn.Module):
    """MLP-Mixer: one MLP over the tokens, for each channel; the tokens' hidden units are units as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4)
        self.up, self.down = nn.Linear(TOKENS, 7), nn.Linear(7, TOKENS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        mixed = self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)
        return self.head((x + mixed).mean(1))


def units_of(module: nn.Module, *shape: int) -> Provenance:
    return find_units(capture(module.eval(), torch.randn(2, *(shape or (TOKENS, 3)))))


def by_name(provenance: Provenance) -> dict[str, UnitGroup]:
    groups = {g.name: g for g in provenance.groups}
    assert len(groups) == len(provenance.groups)
    return groups


def layers(slots: tuple[tuple[str, int], ...]) -> set[str]:
    return {name.rpartition(".")[0] for name, _ in slots}


@pytest.mark.parametrize("mix", [F.scaled_dot_product_attention, by_matmul, by_einsum])
def test_a_head_is_one_unit(mix: Any) -> None:
    provenance = units_of(Attention(mix))
    groups = by_name(provenance)
    assert not provenance.unknown
    assert {n: len(g) for n, g in groups.items() if g.reason is None} == {"embed": WIDTH, "q": HEADS}
    assert layers(groups["q"].producers) == {"q", "k", "v"}
    assert groups["q"].consumers == (("proj.weight", 1),)
    assert groups["q"].widths == (WIDTH // HEADS,)


@pytest.mark.parametrize("mix", [F.scaled_dot_product_attention, by_matmul])
def test_with_one_head_queries_and_values_are_cut_by_channel(mix: Any) -> None:
    groups = by_name(units_of(Attention(mix, heads=1)))
    assert {n: len(g) for n, g in groups.items() if g.reason is None} == dict.fromkeys(("embed", "q", "v"), WIDTH)
    assert layers(groups["q"].producers) == {"q", "k"}
    assert groups["q"].consumers == ()
    assert groups["v"].consumers == (("proj.weight", 1),)


def test_the_stream_of_a_transformer_is_one_group(transformer: Program) -> None:
    groups = by_name(find_units(transformer))
    made = {"embed", *(f"blocks.{i}.{name}" for i in range(2) for name in ("proj", "down"))}
    assert layers(groups["embed"].producers) == made
    assert len(groups["embed"]) == 8


def test_fused_projections_give_one_unit_a_head(transformer: Program) -> None:
    provenance = find_units(transformer)
    groups = by_name(provenance)
    for i in range(2):
        qkv = groups[f"blocks.{i}.qkv"]
        assert (len(qkv), qkv.widths) == (2, (12,))
        slot = next(s for s in provenance.slots if s.parameter == f"blocks.{i}.qkv.weight" and s.role == "out")
        assert torch.equal(slot.labels, qkv.units.repeat_interleave(4).repeat(3))
        assert len(groups[f"blocks.{i}.up"]) == 16


def test_layer_norm_parameters_follow_the_stream(transformer: Program) -> None:
    provenance = find_units(transformer)
    assert torch.equal(provenance.constants["norm.weight"], by_name(provenance)["embed"].units)


def test_a_mask_does_not_bind_the_heads_to_anything_else() -> None:
    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    groups = by_name(units_of(Attention(masked)))
    assert {n: len(g) for n, g in groups.items() if g.reason is None} == {"embed": WIDTH, "q": HEADS}


def test_a_bias_for_each_head_is_cut_with_it() -> None:
    """Relative position biases, (heads, tokens, tokens)."""

    class Biased(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))
            self.mix = lambda q, k, v: (q @ k.transpose(-1, -2) + self.table).softmax(-1) @ v

    provenance = units_of(Biased())
    heads = by_name(provenance)["q"].units
    assert len(heads) == HEADS
    assert torch.equal(provenance.constants["table"], heads.view(-1, 1, 1).expand(HEADS, TOKENS, TOKENS))


def test_class_tokens_and_positions_follow_the_stream() -> None:
    provenance = units_of(VisionTransformer(), 3, 4, 4)
    groups = by_name(provenance)
    assert {n: len(g) for n, g in groups.items() if g.reason is None} == {"patch": WIDTH, "up": 12}
    assert layers(groups["patch"].producers) == {"patch", "down"}
    assert torch.equal(provenance.constants["token"].reshape(-1), groups["patch"].units)
    assert torch.equal(provenance.constants["position"], groups["patch"].units.expand(1, 5, WIDTH))


def test_mlps_over_tokens() -> None:
    """Their hidden units may go; the tokens, which are positions, may not."""
    provenance = units_of(Mixer())
    groups = by_name(provenance)
    free = {n: len(g) for n, g in groups.items() if g.reason is None}
    assert free.get("embed") == WIDTH
    assert "down" not in free


def test_torchs_own_attention_module() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4)
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x)
            return self.head(x + self.attention(x, x, x, need_weights=False)[0]).mean(1)

    groups = by_name(units_of(Own()))
    free = {n: (len(g), g.widths) for n, g in groups.items() if g.reason is None}
    assert free["embed"] == (WIDTH, (1,))
    assert (HEADS, (3 * WIDTH // HEADS,)) in free.values()


def test_grouped_queries_are_refused_with_a_reason() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv, self.proj = nn.Linear(3, 8), nn.Linear(3, 4), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            k = split_heads(self.kv(x), 1)
            mixed = F.scaled_dot_product_attention(split_heads(self.q(x), 2), k, k, enable_gqa=True)
            return self.proj(merge_heads(mixed)).mean(1)

    groups = by_name(units_of(Grouped()))
    assert all(g.reason for g in groups.values())
    assert "grouped-query" in str(groups["q"].reason)


def test_a_product_with_an_input_locks_what_it_contracts() -> None:
    class Correlation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(TOKENS, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x) @ y.transpose(1, 2)).mean(1)

    example = (torch.randn(2, TOKENS, 3), torch.randn(2, TOKENS, 6))
    group = by_name(find_units(capture(Correlation().eval(), example)))["a"]
    assert group.reason is not None
