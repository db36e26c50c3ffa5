"""The little SVG that the benchmarks' figures need: no plotting package for a few lines and points."""

from __future__ import annotations

from collections.abc import Iterable

GREY = "#334155"


def text(x: float, y: float, words: str, anchor: str = "middle", colour: str = GREY) -> str:
    """Words at a place."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-family="sans-serif">{words}</text>'
    )


def frame(left: float, top: float, size: float) -> str:
    """The square of a panel."""
    return f'<rect x="{left}" y="{top}" width="{size}" height="{size}" fill="none" stroke="#cbd5e1"/>'


def dot(x: float, y: float, colour: str, title: str) -> str:
    """A point that says what it is under the pointer."""
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" fill-opacity="0.75"><title>{title}</title></circle>'
    )


def document(width: float, height: float, parts: Iterable[str]) -> str:
    """The file."""
    body = "".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-size="12">{body}</svg>\n'
