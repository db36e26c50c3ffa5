"""The picture of the network: a card for each block with its layers, joins and shortcuts. Geometry only, no colours.

Inside a card every layer stands below all that it reads (longest path), side by side with what is as far down; an edge
that passes a row runs down the gutter at the left. Blocks with many layers show groups of them by module path, networks
with many blocks runs of these: what cannot be read is not drawn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx

from ..support.errors import plural
from .graph import ENTRY, EXIT
from .words import ARROW, TIMES, lines, number, percent, rank_words, scaled

#: More cards than these are put together, and more vertices in a card.
MOST_CARDS, MOST_VERTICES = 64, 24

CHIP_W, CHIP_H, JOIN_H = 120.0, 28.0, 18.0
GAP_X, GAP_Y, STUB, LANE = 10.0, 13.0, 14.0, 9.0
_LETTER = 6.1  # width of a letter on a chip
_BETWEEN = " ... "  # the nodes that a block without a path of its own is named by


def block_cards(graph: Mapping[str, Any], times: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A card for each block, in order; of several blocks where there are very many."""
    blocks = labelled(graph["blocks"])
    for side in ("before_ms", "after_ms"):
        for block, ms in zip(blocks, times.get(side, ()), strict=False):
            block[side] = ms
    return [_card(run) for run in runs_of_blocks(blocks)]


def labelled(blocks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The blocks with a `label`: their name without the path that all of them lie in."""
    shared = shared_path(blocks)
    ends = ([end.removeprefix(shared) for end in _ends(block)] for block in blocks)
    return [{**block, "label": _BETWEEN.join(end)} for block, end in zip(blocks, ends, strict=True)]


def shared_path(blocks: Sequence[Mapping[str, Any]]) -> str:
    """The path that all blocks with a path lie in, up to the separator behind it. No name is left empty by leaving it
    out, or beginning with a mere number."""
    ends = [end for block in blocks for end in _ends(block) if re.search("[./]", end)]
    shared: list[str] = []
    for atoms in zip(*(re.split("(?<=[./])", end)[:-1] for end in ends), strict=False):
        if len(ends) < 2 or len(set(atoms)) > 1:
            break
        shared.append(atoms[0])
    while shared and any(re.match(r"$|\d", end.removeprefix("".join(shared))) for end in ends):
        shared.pop()
    return "".join(shared) if any(map(_atoms, shared)) else ""


def _ends(block: Mapping[str, Any]) -> list[str]:
    """The name of a block, or the first and the last that it is made of (`common_path`)."""
    return str(block["name"]).split(_BETWEEN)


def runs_of_blocks(blocks: Sequence[dict[str, Any]], most: int = MOST_CARDS) -> list[list[dict[str, Any]]]:
    """Neighbouring blocks put together until there are few enough: by as much of their module path as will do."""
    if len(blocks) <= most:
        return [[block] for block in blocks]
    paths = [_atoms(str(block["name"])) for block in blocks]
    for depth in range(max(map(len, paths)) - 1, 0, -1):
        runs = _runs(blocks, [tuple(path[:depth]) for path in paths])
        if len(runs) <= most:
            return runs
    size = -(-len(blocks) // most)
    return [list(blocks[i : i + size]) for i in range(0, len(blocks), size)]


def run_name(run: Sequence[Mapping[str, Any]], key: str = "name") -> str:
    """The name of a block, or of the first and the last of several."""
    return str(run[0][key]) if len(run) == 1 else f"{run[0][key]} \u2026 {run[-1][key]}"


def _runs(blocks: Sequence[dict[str, Any]], keys: Sequence[tuple[str, ...]]) -> list[list[dict[str, Any]]]:
    runs: list[list[dict[str, Any]]] = []
    last: tuple[str, ...] | None = None
    for block, key in zip(blocks, keys, strict=True):
        if key != last:
            runs.append([])
        runs[-1].append(block)
        last = key
    return runs


def _atoms(path: str) -> list[str]:
    return [atom for atom in re.split(r"[./ ]", path) if atom]


def _card(run: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first, layers = run[0], [layer for block in run for layer in block["layers"]]
    macs = {side: sum(block["macs"][side] for block in run) for side in ("before", "after")}
    changes = [layer["change"] for layer in layers]
    name, label = (run_name(run, key) for key in ("name", "label"))
    ms = {side: sum(b[side] for b in run) for side in ("before_ms", "after_ms") if all(side in b for b in run)}
    made = {
        "name": name,
        "label": label,
        "state": _state(changes),
        "macs": macs,
        "share": macs["after"] / macs["before"] if macs["before"] else 1.0,
        "ms": ms,
        "tip": _block_tip(name, run, macs, ms),
        "summary": _summary(layers),
        "several": len(run) > 1,
        "drawing": None,
    }
    if len(run) == 1 and layers:
        made["drawing"] = _drawing(first)
    return made


def _state(changes: Sequence[str]) -> str:
    """``dropped`` when nothing is left, ``kept`` when nothing was touched, else ``changed``."""
    if changes and all(change == "dropped" for change in changes):
        return "dropped"
    return "kept" if all(change == "kept" for change in changes) else "changed"


def _summary(layers: Sequence[Mapping[str, Any]]) -> str:
    changes = [layer["change"] for layer in layers]
    parts = [plural(len(layers), "layer")]
    parts += [f"{changes.count(kind)} {kind}" for kind in ("dropped", "pruned", "factorised") if kind in changes]
    rounded = sum(_in_integers(layer) for layer in layers)
    parts += [f"{rounded} in int8"] if rounded else []
    return ", ".join(parts)


def _block_tip(name: str, run: Sequence[Mapping[str, Any]], macs: Mapping[str, int], ms: Mapping[str, float]) -> str:
    shape = run[-1].get("shape")
    return lines(
        [
            name,
            _summary([layer for block in run for layer in block["layers"]]),
            f"MACs {scaled(macs['before'])} {ARROW} {scaled(macs['after'])}",
            f"latency {number(ms['before_ms'])} {ARROW} {number(ms['after_ms'])} ms (profile)" if len(ms) > 1 else "",
            f"passes on {f' {TIMES} '.join(map(str, shape))}" if shape else "",
            *_drop_lines(run[0].get("drop") if len(run) == 1 else None),
        ]
    )


def _drop_lines(drop: Mapping[str, Any] | None) -> list[str]:
    """What was predicted of a dropped block."""
    known = drop or {}
    error, saving = known.get("error"), known.get("saving")
    return [
        "" if error is None else f"predicted error, with those dropped before it: {number(error)}",
        "" if saving is None else f"predicted saving: {percent(saving)}",
    ]


def _drawing(block: Mapping[str, Any]) -> dict[str, Any]:
    """Positions of a block's layers, joins and edges."""
    vertices, edges = _vertices(block)
    order: nx.DiGraph[str] = nx.DiGraph(edges)
    order.add_nodes_from(vertices)
    depth = {name: level for level, names in enumerate(nx.topological_generations(order)) for name in names}
    places = {name: place for place, name in enumerate(vertices)}
    rows: dict[int, list[str]] = {}
    for name in vertices:
        rows.setdefault(depth[name], []).append(name)
    # a vertex stands as far down as its longest path; the ends stand above and below all
    levels = sorted(rows)
    passing = [(a, b) for a, b in edges if _rank(b, rows) - _rank(a, rows) > 1]
    columns = max(len(names) for names in rows.values())
    gutter = 8.0 + LANE * min(len(passing), 4)
    width = gutter + columns * CHIP_W + (columns - 1) * GAP_X + 2
    boxes: dict[str, dict[str, float]] = {}
    y = STUB
    for level in levels:
        names = sorted(rows[level], key=places.__getitem__)
        height = max(CHIP_H if "layer" in vertices[name] else JOIN_H for name in names)
        left = gutter + (columns - len(names)) * (CHIP_W + GAP_X) / 2
        for name in names:
            own = CHIP_H if "layer" in vertices[name] else JOIN_H
            boxes[name] = {"x": left, "y": y + (height - own) / 2, "w": CHIP_W, "h": own}
            left += CHIP_W + GAP_X
        y += height + GAP_Y
    bottom = y - GAP_Y + STUB
    middle = gutter + (width - 2 - gutter) / 2
    ends = {ENTRY: (middle, 2.0), EXIT: (middle, bottom - 2)}
    return {
        "width": round(width),
        "height": round(bottom),
        "chips": [_chip(vertices[n], boxes[n]) for n in vertices if "layer" in vertices[n]],
        "joins": [
            {"x": b["x"] + b["w"] / 2, "y": b["y"] + b["h"] / 2, "sign": vertices[n]["sign"]}
            for n, b in boxes.items()
            if "sign" in vertices[n]
        ],
        "edges": [_path(a, b, boxes, ends, passing, gutter) for a, b in edges],
        "ends": [ends[ENTRY], ends[EXIT]],
    }


def _rank(name: str, rows: Mapping[int, Sequence[str]]) -> int:
    if name == ENTRY:
        return min(rows) - 1
    if name == EXIT:
        return max(rows) + 1
    return next(level for level, names in rows.items() if name in names)


def _path(
    a: str,
    b: str,
    boxes: Mapping[str, Mapping[str, float]],
    ends: Mapping[str, tuple[float, float]],
    passing: Sequence[tuple[str, str]],
    gutter: float,
) -> dict[str, Any]:
    """An edge as an SVG path: straight or bent to the next row, down the gutter past others."""
    box, to = boxes.get(a), boxes.get(b)
    x0, y0 = (box["x"] + box["w"] / 2, box["y"] + box["h"]) if box else ends[a]
    x1, y1 = (to["x"] + to["w"] / 2, to["y"]) if to else ends[b]
    if (a, b) not in passing:
        bend = (y1 - y0) / 2
        d = f"M{x0:.1f} {y0:.1f}C{x0:.1f} {y0 + bend:.1f} {x1:.1f} {y1 - bend:.1f} {x1:.1f} {y1:.1f}"
        return {"d": d, "shortcut": False}
    lane = gutter - LANE * (0.7 + passing.index((a, b)) % 4)
    ends_at = y1 + (to["h"] / 2 if to else 0)
    leaves = y0 + 3 if box else y0
    # into a join from the side, into a layer from above
    side = to is not None and to["h"] == JOIN_H
    finish = f"H{x1 - JOIN_H / 2:.1f}" if side else f"H{x1 - 4:.1f}Q{x1:.1f} {y1 - 5:.1f} {x1:.1f} {y1:.1f}"
    into = ends_at if side else y1 - 5
    return {
        "d": f"M{x0:.1f} {y0:.1f}V{leaves:.1f}H{lane + 6:.1f}Q{lane:.1f} {leaves:.1f} {lane:.1f} {leaves + 6:.1f}"
        f"V{into - 6:.1f}Q{lane:.1f} {into:.1f} {lane + 6:.1f} {into:.1f}{finish}",
        "shortcut": True,
    }


def _vertices(block: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[tuple[str, str]]]:
    """What a card draws, by name and in order: layers and joins, or groups of them where they are too many."""
    found = {layer["name"]: {"layer": layer} for layer in block["layers"]}
    found |= {join["name"]: {"sign": join["operation"]} for join in block["joins"]}
    edges = [(a, b) for a, b in block["edges"]]
    if len(found) <= MOST_VERTICES:
        return found, edges
    graph: nx.DiGraph[str] = nx.DiGraph(edges)
    paths = {layer["name"]: _atoms(layer["path"]) for layer in block["layers"]}
    for depth in range(max(map(len, paths.values()), default=1) - 1, -1, -1):
        groups = _grouped(graph, paths, depth)
        if len(groups) <= MOST_VERTICES:
            break
    home = {name: place for place, names in enumerate(groups) for name in names}
    layers = {layer["name"]: layer for layer in block["layers"]}
    merged = {str(place): _together([layers[n] for n in names if n in layers]) for place, names in enumerate(groups)}
    label = {name: str(home[name]) for name in home} | {ENTRY: ENTRY, EXIT: EXIT}
    pairs = dict.fromkeys((label[a], label[b]) for a, b in edges if label[a] != label[b])
    return {key: {"layer": value} for key, value in merged.items()}, list(pairs)


def _grouped(graph: nx.DiGraph[str], paths: Mapping[str, Sequence[str]], depth: int) -> list[list[str]]:
    """Vertices of one path down to `depth`, with what lies in a circle between such groups put together; joins go with
    what they read first. In topological order."""
    order = [n for n in nx.topological_sort(graph) if n not in (ENTRY, EXIT)]
    key: dict[str, tuple[str, ...]] = {}
    for name in order:
        before = next((p for p in graph.predecessors(name) if p in key), None)
        key[name] = tuple(paths[name][:depth]) if name in paths else key[before] if before is not None else ()
    quotient: nx.DiGraph[tuple[str, ...]] = nx.DiGraph()
    quotient.add_nodes_from(key.values())
    quotient.add_edges_from((key[a], key[b]) for a, b in graph.edges if a in key and b in key and key[a] != key[b])
    condensed = nx.condensation(quotient)
    result = []
    for place in nx.topological_sort(condensed):
        members = condensed.nodes[place]["members"]
        result.append([name for name in order if key[name] in members])
    return result


def _together(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several layers as one."""
    changes = [str(layer["change"]) for layer in layers]
    touched = [c for c in changes if c != "kept"]
    return {
        "name": str(layers[0]["name"]) if layers else "",
        "path": str(layers[0]["path"]).rsplit(".", 1)[0] if layers else "joins",
        "operation": _summary(layers),
        "macs": {side: sum(layer["macs"][side] for layer in layers) for side in ("before", "after")},
        "change": max(set(touched), key=touched.count) if touched else "kept",
        "together": len(layers),
    }


def _chip(vertex: Mapping[str, Any], box: Mapping[str, float]) -> dict[str, Any]:
    layer = vertex["layer"]
    macs, detail = layer["macs"], _detail(layer)
    share = macs["after"] / macs["before"] if macs["before"] else float(layer["change"] != "dropped")
    room = int((box["w"] - 14 - _LETTER * len(detail)) / _LETTER)
    return {
        **box,
        "change": layer["change"],
        "fill": round(box["w"] * min(1.0, share), 1),
        "label": _short(str(layer["path"] or layer["name"]), room),
        "detail": detail,
        "tip": _layer_tip(layer),
    }


def _short(path: str, room: int) -> str:
    """The end of a path, as much as there is room for."""
    atoms = _atoms(path)
    text = atoms[-1] if atoms else path
    for atom in reversed(atoms[:-1]):
        if not text[0].isdigit():
            break
        text = f"{atom}.{text}"
    return text if len(text) <= room else f"\u2026{text[-max(1, room - 1) :]}"


def _in_integers(layer: Mapping[str, Any]) -> bool:
    return str(layer.get("precision", "")).startswith(("int", "uint"))


def _detail(layer: Mapping[str, Any]) -> str:
    if "together" in layer:
        return plural(layer["together"], "layer")
    if layer["change"] == "dropped":
        return "dropped"
    kept = _kept(layer)
    return f"{kept} {layer['precision']}".strip() if _in_integers(layer) else kept


def _kept(layer: Mapping[str, Any]) -> str:
    """Channels or ranks."""
    if "ranks" in layer:
        ranks, full = (TIMES.join(map(str, layer[key])) for key in ("ranks", "full"))
        return f"rank {ranks}/{full}" if len(layer["ranks"]) == 1 else f"rank {ranks}"  # the rest is in the tip
    outputs, inputs = layer.get("outputs"), layer.get("inputs")
    if outputs and outputs["kept"] < outputs["total"]:
        return f"{outputs['kept']}/{outputs['total']}"
    if inputs and inputs["kept"] < inputs["total"]:
        return f"in {inputs['kept']}/{inputs['total']}"
    return str(outputs["total"]) if outputs else ""


def _layer_tip(layer: Mapping[str, Any]) -> str:
    macs = layer["macs"]
    channels = [
        f"{word} channels: {layer[side]['kept']} of {layer[side]['total']} kept"
        for side, word in (("inputs", "input"), ("outputs", "output"))
        if side in layer and layer["change"] != "dropped"
    ]
    became = {
        "dropped": "dropped",
        "kept": "kept as it was",
        "pruned": "channels pruned",
        "quantised": "kept, and quantised",
    }.get(layer["change"], "")
    return lines(
        [
            str(layer["path"] or layer["name"]),
            str(layer["operation"]),
            f"factorised ({layer['scheme']}), {rank_words(layer)}" if "ranks" in layer else became,
            *channels,
            f"computed in {layer['precision']}" if "precision" in layer else "",
            f"MACs {scaled(macs['before'])} {ARROW} {scaled(macs['after'])}",
            f"node {layer['name']}" if layer["path"] and layer["path"] != layer["name"] else "",
        ]
    )
