"""What is done after every pass, as compilers do: check the program, save it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from ..export.exporter import to_exported, to_pt2
from ..ir.program import Program
from ..support.atomic_files import write_folder

#: Set to anything, every program is checked between passes (`Program.check`).
CHECK = "FOLDCUT_CHECK"


@dataclass(kw_only=True)
class Instruments:
    """Called after each pass of a compile: a rewrite, a solve, mimicking.

    With `check` the program is checked: schemas, stated shapes by fake tensors, names, shared storage, the signature.
    With a `folder`, ``00-capture.txt``, ``01-drop_blocks.txt`` and so on are written there, each program as text, with
    the .pt2 beside it.
    """

    check: bool = field(default_factory=lambda: bool(os.environ.get(CHECK)))
    folder: Path | None = None
    count: int = 0

    def after(self, name: str, program: Program, before: Program | None = None) -> Program:
        """The program, checked and saved as asked for. Raises ProgramError and OutputError."""
        if self.check:
            program.check(before)
        if self.folder is not None:
            stem = f"{self.count:02}-{name.replace(' ', '-')}"
            files = {f"{stem}.txt": program.text().encode(), f"{stem}.pt2": to_pt2(to_exported(program))}
            write_folder(self.folder, files)
        self.count += 1
        return program

    def for_trials(self) -> Instruments:
        """For plans that are only compared: checked, not saved."""
        return Instruments(check=self.check)
