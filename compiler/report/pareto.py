"""The plot of error against latency: plans that were tried, the goal, the result with its interval. Geometry only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .words import TIMES, error_words, goal_ratio, lines, number, plan_mark, plan_words

WIDTH, HEIGHT = 480.0, 360.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 16.0, 30.0, 46.0
#: Errors that are further apart than this are shown on a logarithmic scale.
LINEAR_RANGE = 25.0


def pareto_plot(report: Mapping[str, Any]) -> dict[str, Any]:
    """Axes, points and lines in the units of an SVG of `WIDTH` times `HEIGHT`."""
    latency, error = report["latency"], report["output_error"]
    tried = [t for t in report.get("tried", ()) if t["error"] is not None and t["ratio"] is not None]
    goal = goal_ratio(report)
    ratios = [1.0, latency["ratio"], latency["low"], latency["high"], *(t["ratio"] for t in tried)]
    ratios += [goal] if goal is not None else []
    x, x_ticks = _linear(min(ratios), max(ratios), LEFT, WIDTH - RIGHT, margin=0.08)
    shown = 0.0 if error is None else float(error)
    y, y_ticks, broken = _errors([shown, *(t["error"] for t in tried)])
    result: dict[str, Any] = {
        "x": x(latency["ratio"]),
        "y": y(shown),
        "low": x(latency["low"]),
        "high": x(latency["high"]),
        "tip": lines(
            [
                "Result",
                f"latency ratio {latency['ratio']:.3f} (95 %: {latency['low']:.3f} to {latency['high']:.3f})",
                f"relative output error {error_words(report)}",
            ]
        ),
    }
    marks = [(x(t["ratio"]), y(t["error"])) for t in tried] + [(x(1.0), y(0.0))]
    result["label"] = _label(result, marks, None if goal is None else x(goal))
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
        "x_ticks": x_ticks,
        "y_ticks": y_ticks,
        "broken": broken,
        "goal": None if goal is None else _goal(x(goal), f"goal {TIMES}{number(goal)}"),
        "points": [_point(report, t, x, y) for t in tried],
        "front": _front(tried, x, y),
        "original": {"x": x(1.0), "y": y(0.0), "tip": "Original\nlatency ratio 1, error 0"},
        "result": result,
        "chosen": next(({"x": x(t["ratio"]), "y": y(t["error"])} for t in tried if t["chosen"]), None),
    }


def _goal(x: float, text: str) -> dict[str, Any]:
    """The goal's line, its name on the side that has room for it."""
    fits = x + 9 * len(text) < WIDTH
    return {"x": x, "text": text, "dx": 6.0 if fits else -6.0, "anchor": "start" if fits else "end"}


def _label(result: Mapping[str, Any], marks: Sequence[tuple[float, float]], goal: float | None) -> dict[str, Any]:
    """Where the result's name hides least: beside, below or above it."""
    wide, high = 7.2 * len("result"), 14.0
    places: list[tuple[float, int, dict[str, Any]]] = []
    for dy in (24.0, -13.0, 4.5):
        for anchor, dx, left in (("start", 14.0, 14.0), ("end", -14.0, -14.0 - wide), ("middle", 0.0, -wide / 2)):
            if dy == 4.5 and anchor == "middle":
                continue
            x0, y1 = result["x"] + left, result["y"] + dy + 3
            hidden = sum(x0 - 8 < mx < x0 + wide + 8 and y1 - high - 8 < my < y1 + 8 for mx, my in marks)
            hidden += goal is not None and x0 - 2 < goal < x0 + wide + 2
            outside = x0 < LEFT or x0 + wide > WIDTH or y1 - high < TOP or y1 > HEIGHT - BOTTOM
            places.append((hidden + 4 * outside, len(places), {"dx": dx, "dy": dy, "anchor": anchor}))
    return min(places)[2]


def _point(
    report: Mapping[str, Any], plan: Mapping[str, Any], x: Callable[[float], float], y: Callable[[float], float]
) -> dict[str, Any]:
    return {
        "x": x(plan["ratio"]),
        "y": y(plan["error"]),
        "kind": plan_mark(report, plan["counts"]),
        "chosen": bool(plan["chosen"]),
        "tip": lines(
            [
                "Chosen plan, as tried" if plan["chosen"] else "Plan that was tried",
                plan_words(report, plan["counts"]),
                f"latency ratio {plan['ratio']:.3f} (upper end of its interval)",
                f"relative output error {number(plan['error'])} after a quick re-solve",
            ]
        ),
    }


def _front(tried: Sequence[Mapping[str, Any]], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    """The tried plans that no other beats in both, as a path."""
    best, corners = math.inf, []
    for plan in sorted(tried, key=lambda t: (t["ratio"], t["error"])):
        if plan["error"] < best:
            best = plan["error"]
            corners.append(f"{x(plan['ratio']):.1f},{y(plan['error']):.1f}")
    return "M" + " L".join(corners) if len(corners) > 1 else ""


def _linear(
    low: float, high: float, start: float, end: float, *, margin: float
) -> tuple[Callable[[float], float], list[dict[str, Any]]]:
    """A scale from values to positions, and its ticks."""
    room = margin * (high - low or abs(high) or 1.0)
    low, high = low - room, high + room

    def place(value: float) -> float:
        return start + (value - low) / (high - low) * (end - start)

    return place, [{"at": place(v), "text": f"{v:g}"} for v in nice_ticks(low, high)]


def _errors(errors: Sequence[float]) -> tuple[Callable[[float], float], list[dict[str, Any]], bool]:
    """The scale of errors: from 0 up where they are near each other, else logarithmic with 0 below a break."""
    bottom, top = HEIGHT - BOTTOM, TOP
    positive = [e for e in errors if e > 0]
    if not positive or max(positive) <= LINEAR_RANGE * min(positive):
        most = 1.15 * max(positive, default=1.0)

        def flat(value: float) -> float:
            return bottom - value / most * (bottom - top)

        return flat, [{"at": flat(v), "text": f"{v:g}"} for v in nice_ticks(0.0, most)], False
    first, last = math.floor(math.log10(min(positive))), math.ceil(math.log10(1.05 * max(positive)))
    floor = bottom - 26

    def steep(value: float) -> float:
        if value <= 0:
            return bottom
        return floor - (math.log10(value) - first) / (last - first) * (floor - top)

    ticks = [{"at": bottom, "text": "0"}]
    ticks += [{"at": steep(10.0**power), "text": f"{10.0**power:g}"} for power in range(first, last + 1)]
    return steep, ticks, True


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between low and high, some `about` of them."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= about)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]
