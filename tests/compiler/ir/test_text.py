"""Golden texts: the graph of two small networks, line by line."""

from types import SimpleNamespace

import pytest
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir.program import Program

RESIDUAL = """\
input  x: float32[batch, 3, 8, 8]
%conv2d = conv2d(%x, stem.0.weight[8, 3, 3, 3], None, [1, 1], [1, 1]) -> float32[batch, 8, 8, 8]
%_native_batch_norm_legit_no_training = _native_batch_norm_legit_no_training(%conv2d, stem.1.weight[8], \
stem.1.bias[8], stem.1.running_mean[8], stem.1.running_var[8], 0.1, 1e-05) \
-> (float32[batch, 8, 8, 8], float32[0], float32[0])
%getitem = getitem(%_native_batch_norm_legit_no_training, 0) -> float32[batch, 8, 8, 8]
%relu = relu(%getitem) -> float32[batch, 8, 8, 8]
%conv2d_1 = conv2d(%relu, blocks.0.conv1.weight[8, 8, 3, 3], None, [1, 1], [1, 1]) -> float32[batch, 8, 8, 8]
%_native_batch_norm_legit_no_training_1 = _native_batch_norm_legit_no_training(%conv2d_1, blocks.0.bn1.weight[8], \
blocks.0.bn1.bias[8], blocks.0.bn1.running_mean[8], blocks.0.bn1.running_var[8], 0.1, 1e-05) \
-> (float32[batch, 8, 8, 8], float32[0], float32[0])
%getitem_3 = getitem(%_native_batch_norm_legit_no_training_1, 0) -> float32[batch, 8, 8, 8]
%relu_1 = relu(%getitem_3) -> float32[batch, 8, 8, 8]
%conv2d_2 = conv2d(%relu_1, blocks.0.conv2.weight[8, 8, 3, 3], None, [1, 1], [1, 1]) -> float32[batch, 8, 8, 8]
%_native_batch_norm_legit_no_training_2 = _native_batch_norm_legit_no_training(%conv2d_2, blocks.0.bn2.weight[8], \
blocks.0.bn2.bias[8], blocks.0.bn2.running_mean[8], blocks.0.bn2.running_var[8], 0.1, 1e-05) \
-> (float32[batch, 8, 8, 8], float32[0], float32[0])
%getitem_6 = getitem(%_native_batch_norm_legit_no_training_2, 0) -> float32[batch, 8, 8, 8]
%add_40 = add.Tensor(%relu, %getitem_6) -> float32[batch, 8, 8, 8]
%relu_2 = relu(%add_40) -> float32[batch, 8, 8, 8]
%mean = mean.dim(%relu_2, [2, 3]) -> float32[batch, 8]
%linear = linear(%mean, head.weight[4, 8], head.bias[4]) -> float32[batch, 4]
output output: float32[batch, 4] = %linear
"""

ATTENTION = """\
input  x: float32[batch, 5, 6]
%sym_size_int_1 = sym_size.int(%x, 0) -> size batch
%linear = linear(%x, embed.weight[8, 6], embed.bias[8]) -> float32[batch, 5, 8]
%layer_norm = layer_norm(%linear, [8], blocks.0.norm1.weight[8], blocks.0.norm1.bias[8], 1e-05, False) \
-> float32[batch, 5, 8]
%linear_1 = linear(%layer_norm, blocks.0.qkv.weight[24, 8], blocks.0.qkv.bias[24]) -> float32[batch, 5, 24]
%view = reshape(%linear_1, [%sym_size_int_1, 5, 3, 2, 4]) -> float32[batch, 5, 3, 2, 4]
%permute = permute(%view, [2, 0, 3, 1, 4]) -> float32[3, batch, 2, 5, 4]
%unbind = unbind.int(%permute) -> (float32[batch, 2, 5, 4], float32[batch, 2, 5, 4], float32[batch, 2, 5, 4])
%getitem = getitem(%unbind, 0) -> float32[batch, 2, 5, 4]
%getitem_1 = getitem(%unbind, 1) -> float32[batch, 2, 5, 4]
%getitem_2 = getitem(%unbind, 2) -> float32[batch, 2, 5, 4]
%scaled_dot_product_attention = scaled_dot_product_attention(%getitem, %getitem_1, %getitem_2) \
-> float32[batch, 2, 5, 4]
%transpose = transpose.int(%scaled_dot_product_attention, 1, 2) -> float32[batch, 5, 2, 4]
%view_1 = reshape(%transpose, [%sym_size_int_1, 5, 8]) -> float32[batch, 5, 8]
%linear_2 = linear(%view_1, blocks.0.proj.weight[8, 8], blocks.0.proj.bias[8]) -> float32[batch, 5, 8]
%add_56 = add.Tensor(%linear, %linear_2) -> float32[batch, 5, 8]
%layer_norm_1 = layer_norm(%add_56, [8], blocks.0.norm2.weight[8], blocks.0.norm2.bias[8], 1e-05, False) \
-> float32[batch, 5, 8]
%linear_3 = linear(%layer_norm_1, blocks.0.up.weight[16, 8], blocks.0.up.bias[16]) -> float32[batch, 5, 16]
%gelu = gelu(%linear_3) -> float32[batch, 5, 16]
%linear_4 = linear(%gelu, blocks.0.down.weight[8, 16], blocks.0.down.bias[8]) -> float32[batch, 5, 8]
%add_77 = add.Tensor(%add_56, %linear_4) -> float32[batch, 5, 8]
%layer_norm_2 = layer_norm(%add_77, [8], norm.weight[8], norm.bias[8], 1e-05, False) -> float32[batch, 5, 8]
%mean = mean.dim(%layer_norm_2, [1]) -> float32[batch, 8]
%linear_5 = linear(%mean, head.weight[4, 8], head.bias[4]) -> float32[batch, 4]
output output: float32[batch, 4] = %linear_5
"""


@pytest.fixture(scope="module")
def one_block(nets: SimpleNamespace) -> Program:
    return capture(nets.ResNet(1).eval(), nets.images())


def test_golden_text_of_a_residual_network(one_block: Program) -> None:
    assert one_block.text() == RESIDUAL


def test_golden_text_of_an_attention_block(nets: SimpleNamespace) -> None:
    assert capture(nets.Transformer(1).eval(), nets.tokens()).text() == ATTENTION


def test_an_excerpt_marks_the_node(one_block: Program) -> None:
    lines = one_block.excerpt(one_block.nodes["relu_1"], context=1).splitlines()
    assert [line[:2] for line in lines] == ["  ", "> ", "  "]
    assert lines[1] == "> %relu_1 = relu(%getitem_3) -> float32[batch, 8, 8, 8]"
    assert lines[2].startswith("  %conv2d_2 = ")


def test_an_excerpt_at_the_edge_is_shorter(one_block: Program) -> None:
    assert one_block.excerpt(one_block.nodes["x"], context=1).splitlines()[0] == "> input  x"
