"""Small networks, a backend whose clock counts layers, and settings that every test shares."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from foldcut.compiler.analysis.provenance import Provenance
from foldcut.compiler.data.calibration_set import CalibrationSet
from foldcut.compiler.data.sample_sets import SampleSets
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.ir import edit, edit_chain, edit_folds
from foldcut.compiler.ir.edit import set_tensors
from foldcut.compiler.ir.program import Program
from foldcut.compiler.onnx.model_file import OnnxModel, readable, structure_of
from foldcut.compiler.plan.search_time import SearchTime
from foldcut.compiler.rewrite.context import Context
from foldcut.compiler.store.analysis_store import NOTHING_KEPT
from foldcut.compiler.support.progress import StageClock, silent
from foldcut.passes.solve.resolve_network import ResolveSettings
from foldcut.runtime.measure.backend import Array, Availability
from hypothesis import settings
from torch import nn
from torch.nn import functional as F

torch.set_num_threads(1)
settings.register_profile("foldcut", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("foldcut")


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    """conv, bn, relu, conv, bn, add, relu."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    def __init__(self, blocks: int = 2, channels: int = 8) -> None:
        super().__init__()
        self.stem = conv_bn(3, channels)
        self.blocks = nn.Sequential(*(Residual(channels) for _ in range(blocks)))
        self.head = nn.Linear(channels, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class PreActivation(nn.Module):
    """bn, relu, conv, bn, relu, conv, add: nothing after the add."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class Inverted(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1, add."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        wide = 2 * channels
        self.branch = nn.Sequential(
            conv_bn(channels, wide, 1),
            conv_bn(wide, wide, 3, groups=wide),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


class Gated(nn.Module):
    """A residual branch with squeeze and excite."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.squeeze = nn.Conv2d(channels, 4, 1)
        self.excite = nn.Conv2d(4, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.conv(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return x + y * gate


class Nested(nn.Module):
    """A residual addition inside the branch of another."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.conv1(x))
        y = y + self.conv2(y)
        return x + self.conv3(y)


class Downsample(nn.Module):
    """A residual block that halves the image and doubles the channels."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.branch = nn.Sequential(conv_bn(channels, 12, 3), nn.Conv2d(12, 2 * channels, 3, 2, 1))
        self.shortcut = nn.Conv2d(channels, 2 * channels, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class DenseNet(nn.Module):
    def __init__(self, channels: int = 8, growth: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        widths = [channels + i * growth for i in range(layers)]
        self.layers = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Conv2d(w, growth, 3, padding=1)) for w in widths)
        self.head = nn.Linear(channels + layers * growth, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(torch.cat(features, 1).mean((2, 3)))


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP branches."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.proj(mixed.transpose(1, 2).reshape(n, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, blocks: int = 1, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.blocks = nn.ModuleList(EncoderBlock(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x).mean(1))


def image_net(*parts: nn.Module, channels: int = 8) -> nn.Sequential:
    """A stem, the parts, global pooling and a head; `channels` is the width behind the last part."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)
    )


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The module with seeded weights, batch norms with statistics of their own, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = make()
        for norm in module.modules():
            if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
                nn.init.uniform_(norm.running_mean, -0.3, 0.3)
                nn.init.uniform_(norm.running_var, 0.3, 0.8)
                if norm.weight is None:
                    continue
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.uniform_(norm.bias, -0.3, 0.3)
    return module.eval()


def silence(block: Residual) -> None:
    """Make the branch exactly zero: its last norm returns nothing."""
    with torch.no_grad():
        block.bn2.weight.zero_()
        block.bn2.bias.zero_()


def zeroed(provenance: Provenance, units: Iterable[int]) -> Program:
    """The program with all that makes or carries these units at zero: weights, biases, scales and shifts."""
    program = provenance.program
    removed = provenance.removal(units)
    state = {name: value.clone() for name, value in program.module.state_dict().items()}
    changed = set()
    for slot in provenance.slots:
        if slot.role != "in" and bool(removed[slot.labels].any()):
            state[slot.parameter].movedim(slot.dim, 0)[removed[slot.labels]] = 0
            changed.add(slot.parameter)
    for name, labels in provenance.constants.items():
        if bool(removed[labels].any()) and not name.endswith("running_var"):
            state[name][removed[labels]] = 0
            changed.add(name)
    return set_tensors(program, {name: state[name] for name in changed}, note="zero units")


def images(count: int = 2, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def tokens(count: int = 2, length: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, length, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measurements are kept in a folder of the test run's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLDCUT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Every test begins at the same state of torch's generator, whichever tests ran before it in its process."""
    torch.manual_seed(0)


def checked(rewrite: Callable[..., Program]) -> Callable[..., Program]:
    """The rewrite, its result held to what a Program promises."""

    @functools.wraps(rewrite)
    def run(program: Program, *args: Any, **kwargs: Any) -> Program:
        result = rewrite(program, *args, **kwargs)
        if result is not program:
            result.check(program)
        return result

    return run


@pytest.fixture(scope="session", autouse=True)
def check_rewrites() -> Iterator[None]:
    """Every rewrite in every test is checked, wherever it is called from."""
    rewrites = (edit.bypass, edit.replace_calls, edit_chain.replace_layers, edit_folds.fold_parameters)
    importlib.import_module("foldcut")
    with pytest.MonkeyPatch.context() as patch:
        for rewrite in rewrites:
            for name, module in list(sys.modules.items()):
                if name.startswith("foldcut.") and getattr(module, rewrite.__name__, None) is rewrite:
                    patch.setattr(module, rewrite.__name__, checked(rewrite))
        yield


def context(program: Program, samples: CalibrationSet, judge: CalibrationSet | None = None, **options: Any) -> Context:
    """What rewrites work with: the same samples to fit, to judge and to test with, unless others are given."""
    judge = samples if judge is None else judge
    usual: dict[str, Any] = {
        "goal": None,
        "latency": None,
        "store": NOTHING_KEPT,
        "clock": StageClock(),
        "progress": silent,
        "time": SearchTime(),
        "resolve": ResolveSettings(),
        "solve_samples": 512,
    }
    sets = SampleSets(fit=samples, judge=judge, test=judge)
    return Context(teacher=program, sets=sets, **(usual | options))


@pytest.fixture(scope="session")
def contexts() -> Callable[..., Context]:
    return context


@pytest.fixture(scope="session")
def nets() -> SimpleNamespace:
    """The classes and helpers above."""
    return SimpleNamespace(
        conv_bn=conv_bn,
        Residual=Residual,
        ResNet=ResNet,
        PreActivation=PreActivation,
        Inverted=Inverted,
        Gated=Gated,
        Nested=Nested,
        Downsample=Downsample,
        DenseNet=DenseNet,
        EncoderBlock=EncoderBlock,
        Transformer=Transformer,
        image_net=image_net,
        seeded=seeded,
        silence=silence,
        zeroed=zeroed,
        images=images,
        tokens=tokens,
    )


@pytest.fixture(scope="session")
def residual_net() -> nn.Module:
    """A ResNet with three blocks, the second of which does nothing. Not to be changed."""
    net = seeded(lambda: ResNet(3), seed=1)
    silence(net.blocks[1])
    return net


@pytest.fixture(scope="session")
def residual(residual_net: nn.Module) -> Program:
    """`residual_net`, captured."""
    return capture(residual_net, images())


@pytest.fixture(scope="session")
def transformer_net() -> nn.Module:
    return seeded(lambda: Transformer(2), seed=2)


@pytest.fixture(scope="session")
def transformer(transformer_net: nn.Module) -> Program:
    """`transformer_net`, captured: four branches."""
    return capture(transformer_net, tokens())


@pytest.fixture(scope="session")
def inverted(nets: SimpleNamespace) -> Program:
    """Two inverted residual blocks, with depthwise convolutions."""
    return capture(seeded(lambda: image_net(Inverted(), Inverted()), seed=3), images())


class CountingRunner:
    """Computes with ONNX Runtime; its clock shows 1 ms and 10 ms more for each convolution or matrix product."""

    clock = "cuda"

    def __init__(self, model: OnnxModel, inputs: Mapping[str, Array]) -> None:
        from onnxruntime import InferenceSession

        graph = structure_of(model).graph
        layers = sum(node.op_type in {"Conv", "Gemm", "MatMul"} for node in graph.node)
        self.time_ms = 1.0 + 10.0 * layers
        self.session = InferenceSession(readable(model), providers=["CPUExecutionProvider"])
        self.inputs = dict(inputs)
        self.values: tuple[Array, ...] = ()

    def run(self) -> None:
        if not self.values:
            self.values = tuple(np.asarray(v) for v in self.session.run(None, self.inputs))

    def elapsed_ms(self) -> float:
        return self.time_ms

    def outputs(self) -> tuple[Array, ...]:
        return self.values

    def close(self) -> None:
        pass


class CountingBackend:
    """A backend whose latency is known in advance, so that a test of a latency goal depends on no machine."""

    name = "counting"

    def available(self) -> Availability:
        return Availability(can_build=True, can_run=True, reason="")

    def build(self, model: OnnxModel, inputs: Mapping[str, Array] | None = None) -> OnnxModel:
        return model

    def load(self, engine: Any, inputs: Mapping[str, Array], *, threads: int = 1) -> CountingRunner:
        return CountingRunner(engine, inputs)

    def environment(self) -> dict[str, str | int]:
        return {"backend": self.name}


class WorkBackend(CountingBackend):
    """Latency = multiply-accumulates of the convolutions, and a little for each layer: known in advance."""

    name = "work"

    def load(self, engine: Any, inputs: Any, *, threads: int = 1) -> Any:
        runner = super().load(engine, inputs, threads=threads)
        graph = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(engine)).graph
        sizes = {w.name: list(w.dims) for w in graph.initializer}
        shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.value_info}
        shapes |= {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.output}
        convs = [node for node in graph.node if node.op_type == "Conv"]
        macs = sum(math.prod(sizes[n.input[1]]) * math.prod(shapes[n.output[0]][2:]) for n in convs)
        runner.time_ms = 1 + macs / 1e4 + 0.05 * len(convs)
        return runner


@pytest.fixture(scope="session")
def counting_backend() -> CountingBackend:
    return CountingBackend()


@pytest.fixture(scope="session")
def work_backend() -> WorkBackend:
    return WorkBackend()


@contextlib.contextmanager
def measured_quickly() -> Iterator[None]:
    """No network is warmed up or timed for longer than a moment: for tests that do not look at the figures."""
    import foldcut.runtime.measure.cache_eviction as cache_eviction
    import foldcut.runtime.measure.measure as measure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "warm_up", lambda runner, _ms: runner.run())
        patch.setattr(measure, "choose_repeats", lambda _runner, _ms: 1)
        patch.setattr(cache_eviction, "last_level_bytes", lambda: 1 << 16)
        yield


@pytest.fixture(scope="module")
def quick_measurement() -> Iterator[None]:
    """`measured_quickly`, for a whole module."""
    with measured_quickly():
        yield
