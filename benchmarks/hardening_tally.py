"""The tally of hardening.py's rows, for the terminal and for docs/hardening.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hardening_checks import message_class

Rows = Sequence[Mapping[str, Any]]
STATUSES = ("ok", "refused", "unknown", "exception", "wrong", "crash")
WHAT = (
    ("operators", "operators in the captured graphs"), ("groups", "groups of units"), ("prunable", "prunable groups"),
    ("cuttable", "groups that the rewriter can cut"), ("units prunable", "units in prunable groups"),
    ("cuts", "cuts compared with the oracle"), ("units cut", "units cut"),
    ("cuts that show", "cuts that change the outputs by more than 0.1 %"), ("regions", "removable regions"),
    ("drops", "regions dropped"), ("zero branches dropped", "branches of zeros dropped"),
    ("dead units removed", "dead units removed"), ("layers factorised", "layers factorised at full rank"),
    ("re-solved", "networks re-solved"),
    ("hidden layers tried", "hidden layers with dead, copied and permuted channels"),
    ("exports", "networks run in ONNX Runtime"),
    ("settled in float64", "differences that were float32's"), ("unusable", "networks with values that are not finite"),
)  # fmt: skip


def numbers(rows: Rows) -> dict[str, Any]:
    """All counts."""
    counts: Counter[str] = Counter()
    locks: Counter[str] = Counter()
    messages: dict[str, Counter[str]] = {}
    pieces: Counter[str] = Counter()
    for row in rows:
        counts.update(row.get("counts", {}))
        locks.update(row.get("locks", {}))
        pieces.update(set(row.get("pieces", ())))
        for finding in row["findings"]:
            key = f"{finding['stage']}: {message_class(finding['message'])}"
            messages.setdefault(finding["status"], Counter())[key] += 1
    with_cuts = sum(1 for row in rows if row.get("counts", {}).get("cuts"))
    seconds = [row["cpu_s"] for row in rows if "cpu_s" in row]
    return {
        "networks": len(rows), "status": Counter(row["status"] for row in rows), "counts": counts, "locks": locks,
        "messages": messages, "pieces": pieces, "with cuts": with_cuts, "cpu": sum(seconds),
    }  # fmt: skip


def tables(rows: Rows) -> list[tuple[tuple[str, str], list[tuple[str, str]]]]:
    """(heading, rows) of each table."""
    n = numbers(rows)
    total = max(1, n["networks"])
    outcome = [
        (s, f"{n['status'][s]} ({100 * n['status'][s] / total:.2f} %)")
        for s in STATUSES
        if n["status"][s] or s in STATUSES[:5]
    ]
    what = [
        ("networks", str(n["networks"])),
        ("networks that were cut", f"{n['with cuts']} ({100 * n['with cuts'] / total:.1f} %)"),
    ]
    what += [(words, str(n["counts"][key])) for key, words in WHAT]
    what.append(("CPU seconds a network", f"{n['cpu'] / total:.2f}"))
    result = [(("outcome", "networks"), outcome), (("what was tried", "count"), what)]
    for status in ("wrong", "exception", "crash", "unknown", "refused"):
        found = n["messages"].get(status)
        if found:
            result.append(((f"{status}: where and why", "times"), [(k, str(v)) for k, v in found.most_common(20)]))
    result.append((("why groups are locked", "groups"), [(k, str(v)) for k, v in n["locks"].most_common(25)]))
    result.append((("pieces", "networks that have one"), [(k, str(v)) for k, v in sorted(n["pieces"].items())]))
    return result


def tally(rows: Rows) -> str:
    """For the terminal."""
    lines = []
    for (left, right), body in tables(rows):
        lines.append(f"\n{left}  |  {right}")
        lines += [f"  {value:>16}  {name}" for name, value in body]
    return "\n".join(lines)


INTRODUCTION = """Random networks of 5 to 40 operators, each captured at batch 3, cut at random units of random groups,
bypassed at random regions, factorised at full rank, and run at batches 2 and 5; some go through ONNX Runtime, some are
re-solved. Cuts are judged by an oracle that knows nothing of units: it runs the original module eagerly, follows
element by element what depends on weights that are gone, and leaves that out where it is contracted. A network counts
as the most severe of what was found: *wrong* values, an *exception* that is not a CompilerError, *unknown* (the oracle
has no rule for an operator), *refused* (a CompilerError), *ok*."""
BEGIN, END = "<!-- random networks -->", "<!-- end of random networks -->"


def write_markdown(path: Path, rows: Rows, seed: int) -> None:
    """Put the tally into a page: between its marks where it has them, else at its end."""
    page = path.read_text() if path.exists() else "# Hardening\n\n"
    before, mark, rest = page.partition(BEGIN)
    after = rest.partition(END)[2] if mark else "\n"
    path.write_text(f"{before}{BEGIN}\n{markdown(rows, seed)}{END}{after}")


def markdown(rows: Rows, seed: int) -> str:
    """For docs/hardening.md."""
    command = f"`python benchmarks/hardening.py --networks {len(rows)} --seed {seed}`"
    lines = ["## Random networks", "", INTRODUCTION, "", command]
    for (left, right), body in tables(rows):
        lines += ["", f"| {left} | {right} |", "|---|---|"]
        lines += [f"| {name.replace('|', '/')} | {value} |" for name, value in body]
    return "\n".join(lines) + "\n"
