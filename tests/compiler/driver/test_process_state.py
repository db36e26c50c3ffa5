"""What belongs to the whole process: threads, default device, autocast, inference mode, filters of warnings, Ctrl-C."""

import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from io import BytesIO, TextIOWrapper
from pathlib import Path

import foldcut
import pytest
import torch
from foldcut.compiler.cli import main as cli
from foldcut.compiler.support.one_at_a_time import alone
from torch import nn

pytestmark = pytest.mark.usefixtures("quick_measurement")

IMAGES = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).eval()


def cut(net: nn.Module) -> foldcut.Compiled:
    return foldcut.compile(net, IMAGES, goal=foldcut.Channels(0.5), mimic=None, progress=False, cache=False)


@contextmanager
def on_meta() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.fixture(scope="module")
def plain() -> foldcut.Compiled:
    return cut(small(0))


def same(left: foldcut.Compiled, right: foldcut.Compiled) -> bool:
    ours, theirs = left.module.state_dict(), right.module.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
def test_three_compiles_in_threads() -> None:
    """Each ends as it does alone; afterwards warnings are heard as before."""
    nets = [small(seed) for seed in range(3)]
    wanted = [cut(net) for net in nets]
    found: dict[int, foldcut.Compiled] = {}
    failed: list[BaseException] = []

    def work(place: int) -> None:
        try:
            found[place] = cut(nets[place].train())  # training mode: each has a warning of its own
        except BaseException as error:
            failed.append(error)

    shown, filters = warnings.showwarning, list(warnings.filters)
    with warnings.catch_warnings(record=True):
        threads = [threading.Thread(target=work, args=(place,)) for place in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    assert all(same(found[place], wanted[place]) for place in range(3))
    assert all(len([w for w in found[p].report.warnings if "training mode" in w]) == 1 for p in range(3))
    assert warnings.showwarning is shown
    assert warnings.filters == filters


def test_captures_wait_for_each_other() -> None:
    """While one thread works, another's capture has not begun."""
    begun, done = threading.Event(), threading.Event()

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            begun.set()
            return x * 2

    def work() -> None:
        foldcut.capture(Net().eval(), torch.randn(2, 3))
        done.set()

    thread = threading.Thread(target=work)
    with alone():
        thread.start()
        assert not begun.wait(0.3)
    thread.join()
    assert begun.is_set()
    assert done.is_set()


@pytest.mark.parametrize(("cpus", "inside"), [(1, 1), (2, 2), (64, 3)])
def test_torch_has_no_more_threads_than_there_are_cpus(cpus: int, inside: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldcut.compiler.support.one_at_a_time.free_cpus", lambda: cpus)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with alone():
            assert torch.get_num_threads() == inside
            with alone():
                assert torch.get_num_threads() == inside
        assert torch.get_num_threads() == 3
        with pytest.raises(RuntimeError), alone():
            raise RuntimeError
        assert torch.get_num_threads() == 3, "also after an error"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "state",
    [on_meta, torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["meta", "inference", "no_grad", "autocast"],
)
def test_a_compile_in_the_callers_own_state(state: Callable[[], AbstractContextManager[None]]) -> None:
    net = small(0)
    with state():
        found = cut(net)
        program = foldcut.capture(net, IMAGES[:2])
        assert len(foldcut.find_units(program).groups) == 3
    assert same(found, cut(small(0)))


def test_mimicking_without_gradients(plain: foldcut.Compiled) -> None:
    settings = foldcut.MimicSettings(iterations=4)
    with torch.no_grad():
        result = foldcut.compile(
            small(0), IMAGES, goal=foldcut.Channels(0.5), mimic=settings, progress=False, cache=False
        )
    assert result.report.met


@pytest.fixture
def interrupted_import(tmp_path: Path) -> dict[str, str]:
    """An environment where Ctrl-C comes while torch is imported."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    home = str(Path(foldcut.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), home])}


def run_interruptible(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command that Ctrl-C ends, also where the tests themselves were started with it ignored."""
    return subprocess.run(
        command,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ctrl_c_while_the_command_loads(interrupted_import: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "foldcut"
    script.write_text("from foldcut.compiler.cli.main import main\nmain()\n")
    for command in ([sys.executable, "-m", "foldcut"], [sys.executable, "-P", str(script)]):
        ended = run_interruptible([*command, "inspect", "net.onnx"], interrupted_import)
        assert (ended.returncode, ended.stderr) == (130, "interrupted; nothing was written\n")


def test_ctrl_c_in_a_program_that_imports_foldcut(interrupted_import: dict[str, str]) -> None:
    command = [
        sys.executable,
        "-c",
        "try:\n    import foldcut\n    foldcut.compile\nexcept KeyboardInterrupt:\n    print('mine')",
    ]
    ended = run_interruptible(command, interrupted_import)
    assert (ended.returncode, ended.stdout) == (0, "mine\n")


def test_a_name_that_is_no_text_can_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    written = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(written, encoding="utf-8"))
    monkeypatch.setattr(cli, "app", lambda: print(os.fsdecode(b"wrote out\xff/"), flush=True))
    cli.main()
    assert written.getvalue() == b"wrote out\\udcff/\n"
