"""Attacks on a run: full disks, kills, Ctrl-C, odd paths, deep JSON."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import foldcut
import hostile_files as hostile
import numpy as np
from attack_registry import Succeeded, attack, needs
from foldcut.compiler.frontend.capture import capture
from foldcut.compiler.support.atomic_files import write_folder
from foldcut.compiler.support.errors import CompilerError

#: Exit codes that the command line promises.
_PROMISED = {0, 1, 2, 3, 130}


def _foldcut(*words: str | bytes | Path, **options: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "foldcut", *words]
    return subprocess.run(command, capture_output=True, check=False, timeout=50, **options)  # type: ignore[call-overload,no-any-return]


def _held(done: subprocess.CompletedProcess[bytes]) -> str:
    said = (done.stdout + done.stderr).decode(errors="replace").strip()
    meant = "Traceback" not in said and "internal error" not in said
    needs(done.returncode in _PROMISED and meant, f"exit {done.returncode}: {said[-200:]}")
    return f"exit {done.returncode}: {said.splitlines()[0] if said else ''}"


@attack("output", "a disk that is full while the folder is written")
def full_disk(folder: Path, _seed: int) -> str:
    old = {"model.onnx": b"old" * 1000, "plan.json": b"{}"}
    write_folder(folder / "out", old)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    for files in ({"model.onnx": bytes(100_000)}, {"plan.json": b"new", "model.onnx": bytes(100_000)}):
        for place in ("out", "fresh"):
            try:
                write_folder(folder / place, files)
            except CompilerError as error:
                said = error.message
            else:
                raise Succeeded("a part was written without an error")
    needs(_content(folder / "out") == old and not (folder / "fresh").exists(), "the old folder is not whole")
    needs({p.name for p in folder.iterdir()} == {"out"}, "something was left behind")
    return said


@attack("output", "80 kills while the folder is written")
def kills(folder: Path, seed: int) -> str:
    draw, out = random.Random(seed), folder / "out"
    versions = [{name: bytes([v]) * 300_000 for name in ("model.onnx", "model.pt2", "plan.json")} for v in range(80)]
    for version in versions:
        child = os.fork()
        if not child:
            write_folder(out, version)
            os._exit(0)
        time.sleep(draw.uniform(0, 0.006))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for content in _content(out).values():
            needs(len(content) == 300_000 and len(set(content)) == 1, "a file was written in part")
    write_folder(out, versions[0])
    needs(_content(out) == versions[0], "the folder cannot be written again")
    return "every file whole after every kill"


def _content(folder: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} if folder.exists() else {}


@attack("plan.json", "nested 100,000 deep")
def deep_plan(folder: Path, _seed: int) -> str:
    (folder / "plan.json").write_text('{"version": 1, "decisions": ' + "[" * 100_000 + "]" * 100_000 + "}")
    return _held(_foldcut("apply", folder / "plan.json", hostile.exported(folder / "net.pt2"), "-o", folder / "out"))


@attack(".pt2", "a graph nested 100,000 deep")
def deep_graph(folder: Path, _seed: int) -> str:
    path = hostile.exported(folder / "net.pt2")
    deep = b'{"graph_module": ' + b'{"a": ' * 100_000 + b"1" + b"}" * 100_000 + b"}"
    hostile.changed(path, lambda entries: entries.update({hostile.GRAPH: deep}))
    return _held(_foldcut("inspect", path))


@attack("paths", "names with quotes, dashes, newlines, 200 letters")
def odd_paths(folder: Path, _seed: int) -> str:
    np.save(folder / "x.npy", np.zeros((50, 3), np.float32))
    for name in ("a b'\"", "-o", "$(touch mark)", "line\nbreak", "n" * 200, "\u00fc\u6f22", "%s{0}"):
        place = folder / name
        place.mkdir()
        path = hostile.exported(place / "net.pt2")
        capture(path)
    said = _held(_foldcut("inspect", folder / "$(touch mark)" / "net.pt2"))
    needs(said.startswith("exit 0"), said)
    needs(not (folder / "mark").exists(), "a name was run")
    return said


@attack("paths", "bytes that are no UTF-8")
def no_utf8(folder: Path, _seed: int) -> str:
    name = os.fsencode(folder) + b"/\xff\xfe.pt2"
    Path(os.fsdecode(name)).write_bytes(hostile.exported(folder / "net.pt2").read_bytes())
    said = [_held(_foldcut("inspect", name)), _held(_foldcut("inspect", os.fsencode(folder) + b"/\xff.pt2"))]
    said.append(_held(_foldcut("measure", b"\xff.onnx", b"\xfe.onnx", cwd=folder)))
    return said[0]


@attack("command line", "Ctrl-C at 12 moments of a start")
def interrupted(folder: Path, _seed: int) -> str:
    path = hostile.exported(folder / "net.pt2")
    codes = []
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background processes ignore it, and so would the child
    for number in range(12):
        command = [sys.executable, "-m", "foldcut", "inspect", str(path)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(0.15 + 0.35 * number)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=50)
        needs(b"Traceback" not in out + err, err.decode(errors="replace")[-200:])
        codes.append(child.returncode)
    needs(set(codes) <= {0, 130, -signal.SIGINT}, f"exit codes {codes}")
    return f"exit codes {sorted(set(codes))}"


@attack("saved folder", "files of another kind in place of each file")
def other_kinds(folder: Path, _seed: int) -> str:
    (folder / "out").mkdir()
    contents = [b"", b"{}", b"[]", b"null", b"\xff" * 100, b"PK\x03\x04", json.dumps({"version": 1}).encode()]
    refused = 0
    for content in contents:
        for name in ("model.onnx", "model.pt2", "plan.json", "report.json"):
            (folder / "out" / name).write_bytes(content)
        try:
            _ = foldcut.load(folder / "out").module
        except CompilerError:
            refused += 1
    needs(refused == len(contents), "a folder of nothing was loaded")
    return f"{refused} of {refused} refused"
