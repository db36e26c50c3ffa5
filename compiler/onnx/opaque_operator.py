"""`foldcut::onnx_node` as torch knows it. Registered when foldcut is imported, so that a saved `.pt2` file with opaque
nodes loads; what it does lies in `onnx_opaque`, which imports onnx only when a node runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.library.custom_op("foldcut::onnx_node", mutates_args=(), schema="(Tensor[] inputs, str node) -> Tensor[]")
def onnx_node(inputs: Sequence[torch.Tensor], node: str) -> list[torch.Tensor]:
    """Run one ONNX node (base64 of a model that holds it) in ONNX Runtime on the CPU."""
    from .opaque_node import run_node

    return run_node(inputs, node)


@onnx_node.register_fake
def _(inputs: Sequence[torch.Tensor], node: str) -> list[torch.Tensor]:
    from .opaque_node import infer_node

    return infer_node(inputs, node)


def _count_inputs(ctx: Any, inputs: tuple[Sequence[torch.Tensor], str], output: Any) -> None:  # noqa: ARG001
    ctx.count = len(inputs[0])


def _no_gradient(context: Any, *_gradients: Any) -> tuple[list[None], None]:
    """Nothing flows back: what lies behind an opaque node trains, what lies before it keeps its weights."""
    return [None] * context.count, None


onnx_node.register_autograd(_no_gradient, setup_context=_count_inputs)
