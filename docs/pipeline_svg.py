"""Boxes, words and colours of the pictures of pipelines, as SVG that needs no network and no script."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

WIDTH = 360
"""Units of the picture; shown on a phone one is about a pixel."""
SHOWN_WIDTH = 540
LIGHT = {
    "paper": "#ffffff",
    "ink": "#1f2430",
    "muted": "#5b6475",
    "edge": "#b8bfcc",
    "known": "#2f5bd3",
    "on-known": "#ffffff",
    "draft": "#cfdcff",
    "on-draft": "#1f2430",
    "drop": "#f8cfae",
    "on-drop": "#5a2c08",
    "good": "#1d7a3e",
    "bad": "#b3261e",
    "fill": "#e3e6ec",
    "verify": "#d9b8e8",
    "late": "#f3d27a",
    "imbalance": "#bfe0c4",
    "host": "#f0b3ad",
}
DARK = {
    "paper": "#1b1f27",
    "ink": "#e6e8ee",
    "muted": "#a5aebf",
    "edge": "#596274",
    "known": "#7fa0ff",
    "on-known": "#0e1526",
    "draft": "#2c4180",
    "on-draft": "#e6e8ee",
    "drop": "#7d451d",
    "on-drop": "#ffe3cc",
    "good": "#6fd08f",
    "bad": "#ff8f87",
    "fill": "#3a4150",
    "verify": "#6d4a80",
    "late": "#7a6118",
    "imbalance": "#33603c",
    "host": "#7d3a35",
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    shape = f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3"'
    return f'{shape} class="{kind}"/>'


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="strike"/>'


def label(x: float, y: float, text: str, kind: str = "ink", *, middle: bool = False, small: bool = False) -> str:
    """`text` with its baseline at `y`, from `x` on or about it."""
    classes = " ".join([f"t-{kind}", *(["m"] if middle else []), *(["s"] if small else [])])
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{classes}">{escape(text)}</text>'


def swatches(y: float, names: Sequence[tuple[str, str]]) -> tuple[list[str], float]:
    """A legend, two entries a line, and where it ends."""
    parts = []
    for number, (kind, text) in enumerate(names):
        x, top = 6 + (number % 2) * (WIDTH / 2), y + (number // 2) * 20
        parts += [box(x, top, 14, 14, kind), label(x + 20, top + 11.5, text)]
    return parts, y + 20 * -(-len(names) // 2)


def svg(title: str, description: str, height: float, parts: Sequence[str]) -> str:
    """The whole file."""
    shown = SHOWN_WIDTH * height / WIDTH
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{SHOWN_WIDTH}" '
        f'height="{shown:.0f}" role="img" aria-labelledby="title description">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="description">{escape(description)}</desc>',
        "<style>",
        f"text {{ font: 12px {FONT} }} .m {{ text-anchor: middle }} .s {{ font-size: 11px }}",
        *_colours(LIGHT),
        "@media (prefers-color-scheme: dark) {",
        *_colours(DARK),
        "}",
        "</style>",
        f'<rect width="{WIDTH}" height="{height:.0f}" rx="6" class="paper"/>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _colours(palette: dict[str, str]) -> list[str]:
    rules = [f".{name} {{ fill: {colour} }} .t-{name} {{ fill: {colour} }}" for name, colour in palette.items()]
    edge = palette["edge"]
    return [
        *rules,
        f".empty {{ fill: none; stroke: {edge}; stroke-dasharray: 3 3 }}",
        f".strike {{ stroke: {palette['on-drop']}; stroke-width: 1.5 }}",
    ]
