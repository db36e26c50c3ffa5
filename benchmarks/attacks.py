"""Attacks on foldcut, repeated: files that would run code or fill the memory, damage, kills, full disks, odd names.

    python benchmarks/attacks.py [--only PATTERN] [--markdown] [--seed N]

Each attack runs in a process of its own with bounded time and memory, and holds when it ends in an error that foldcut
raises on purpose, or in the right result. Ends with 1 when one succeeds: code ran, a wrong network, another exception,
a hang, too much memory. `--markdown` prints the table of docs/hardening.md.

A new attack is a function of a folder and a seed, registered with `@attack("what is attacked", "what is done")` in one
of the modules named below.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
from attack_registry import ATTACKS, Attack, Succeeded
from foldcut.compiler.support.errors import CompilerError

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "compiler")]

import attack_cache  # noqa: E402, F401 - registers its attacks
import attack_files  # noqa: E402, F401
import attack_runs  # noqa: E402, F401

#: What one attack may take: seconds, and bytes more than the process has.
MOST_SECONDS, MOST_BYTES = 180, 4 << 30


def outcome(attack: Attack, folder: Path, seed: int) -> tuple[bool, str]:
    """Whether the attack was held off, and by what. Runs in the child."""
    try:
        return True, attack.run(folder, seed)
    except CompilerError as error:
        return True, f"{type(error).__name__}: {error.message.splitlines()[0]}"
    except Succeeded as reason:
        return False, str(reason)
    except BaseException as error:  # anything that foldcut did not mean to raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        return False, f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"


def in_child(attack: Attack, folder: Path, seed: int) -> tuple[bool, str]:
    """The outcome from a process with limits; its death and its silence are outcomes as well."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.close(ours)
        os.setsid()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, used + MOST_BYTES))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os.chdir(folder)
        warnings.simplefilter("ignore")
        found = json.dumps(outcome(attack, folder, seed))
        os.write(theirs, found.encode()[:60_000])
        os._exit(0)
    os.close(theirs)
    ready, _, _ = select.select([ours], [], [], MOST_SECONDS)
    content = b""
    while ready and (part := os.read(ours, 1 << 16)):
        content += part
    os.close(ours)
    if not ready:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not ready:
        return False, f"still running after {MOST_SECONDS} s"
    if not content:
        return False, f"the process died with status {status}"
    held, said = json.loads(content)
    return bool(held), str(said)


def main() -> int:
    """Run the attacks, print the tally; 1 when one succeeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="*", help="attacks whose target or name matches this pattern")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [a for a in ATTACKS if fnmatch.fnmatch(f"{a.target}: {a.name}", f"*{options.only}*")]
    rows, began = [], time.monotonic()
    for attack in chosen:
        with tempfile.TemporaryDirectory(prefix="foldcut-attack-") as folder:
            held, said = in_child(attack, Path(folder), options.seed)
            rows.append((attack, held, said.replace(folder, "...")))
        if not options.markdown:
            print(
                f"{'held' if held else 'SUCCEEDED':<10}{attack.target}: {attack.name}: {rows[-1][2][:160]}", flush=True
            )
    if options.markdown:
        print("| attacked | how | outcome |\n|---|---|---|")
        for attack, held, said in rows:
            print(f"| {attack.target} | {attack.name} | {'held' if held else '**succeeded**'}: {_cell(said)} |")
    tally = Counter(held for _, held, _ in rows)
    print(f"\n{len(rows)} attacks: {tally[True]} held, {tally[False]} succeeded, in {time.monotonic() - began:.0f} s")
    return 0 if rows and not tally[False] else 1


def _cell(text: str) -> str:
    return text[:110].replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
