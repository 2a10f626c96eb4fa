"""How charts look: colours that colour-blind readers can tell apart, in light and dark, and Vega-Lite's settings.

Source of the categorical colours: M. Okabe and K. Ito, "Color Universal Design" (2008), darkened or lightened where the
contrast with the background would be below 3.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

ImageFormat = Literal["svg", "png", "pdf"]
SERIES_SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-left")
FONT = "system-ui, 'Segoe UI', 'Liberation Sans', Arial, sans-serif"


@dataclass(frozen=True)
class Palette:
    """Colours by what they are for. `series` are for labels in their order, the baseline having its own; `parts` for
    the parts of a lane's time; `lengths` run from short to long."""

    surface: str
    ink: str
    muted: str
    grid: str
    baseline: str
    good: str
    bad: str
    flag: str
    neutral: str
    series: tuple[str, ...]
    parts: tuple[str, ...]
    lengths: tuple[str, ...]


LIGHT = Palette(
    surface="#ffffff",
    ink="#1b1f24",
    muted="#57606a",
    grid="#d8dee4",
    baseline="#57606a",
    good="#00694d",
    bad="#b34700",
    flag="#6f42a8",
    neutral="#57606a",
    series=("#0072b2", "#c75000", "#007a5a", "#aa4499", "#8a6500", "#4b4bb5"),
    parts=("#0072b2", "#d55e00", "#e69f00", "#cc79a7", "#009e73", "#c9bb00", "#56b4e9", "#8c959f"),
    lengths=("#440154", "#3b6ea8", "#2fa08a", "#7cc957", "#c9d630", "#f2c12e", "#ee8f3a", "#d9533f"),
)
DARK = Palette(
    surface="#14171c",
    ink="#e8ebef",
    muted="#a4adb8",
    grid="#343b45",
    baseline="#a4adb8",
    good="#4fd1a5",
    bad="#f59a5b",
    flag="#c3a3f0",
    neutral="#a4adb8",
    series=("#62b8f0", "#f59a5b", "#4fd1a5", "#e09fd0", "#e3b94a", "#a9a9ff"),
    parts=("#3d9ad6", "#f0803c", "#f2b441", "#dd92bd", "#2fbf94", "#e8dd5a", "#8fd0f5", "#8c959f"),
    lengths=("#a87fd0", "#6aa5e0", "#3cc0a5", "#8fdc5a", "#dbe646", "#ffd24d", "#ffa95c", "#ff7d66"),
)


def _names(palette: Palette) -> dict[str, str]:
    """CSS property -> colour; colours in a tuple are numbered."""
    found = {}
    for field in fields(palette):
        value = getattr(palette, field.name)
        if isinstance(value, str):
            found[f"--{field.name}"] = value
        else:
            found |= {f"--{field.name}-{number}": colour for number, colour in enumerate(value)}
    return found


def css_properties(palette: Palette) -> str:
    """The declarations that give the page's custom properties the colours of `palette`."""
    return "".join(f"{name}:{colour};" for name, colour in _names(palette).items())


def page_palette() -> Palette:
    """Colours that the page's style sheet decides, so that charts follow it to dark mode and to print."""

    def of(value: str | tuple[str, ...], name: str) -> Any:
        if isinstance(value, str):
            return f"var(--{name})"
        return tuple(f"var(--{name}-{number})" for number in range(len(value)))

    return Palette(**{field.name: of(getattr(LIGHT, field.name), field.name) for field in fields(Palette)})


class Style(NamedTuple):
    """The size of a chart in a file, in points: `width`, all of it; of the font; a factor for heights. Charts of
    several panels are made flatter down to `height` for all plots together, as far as their rows stay legible."""

    width: int
    font_size: float
    height_factor: float
    height: int


STYLES = {
    "screen": Style(720, 12, 1.0, 480),
    "paper": Style(241, 7.5, 0.7, 240),
    "paper-wide": Style(504, 8.5, 0.75, 280),
}
"""`paper` fits a column of a two-column paper (3.35 in), `paper-wide` both of them (7 in)."""


def config(palette: Palette, font_size: float = 12) -> dict[str, Any]:
    """Vega-Lite's settings for all charts."""
    words = {"labelFontSize": font_size, "titleFontSize": font_size, "titleFontWeight": "normal"}
    colours = {"labelColor": palette.ink, "titleColor": palette.muted}
    return {
        "background": None,
        "font": FONT,
        "padding": 4,
        "view": {"stroke": None},
        "axis": {**words, **colours, "gridColor": palette.grid, "domainColor": palette.grid, "tickColor": palette.grid},
        "axisY": {"labelLimit": 170},
        "legend": {
            **words,
            **colours,
            "orient": "top",
            "direction": "horizontal",
            "title": None,
            "columns": 4,
            "symbolOpacity": 1,
        },
        "text": {"color": palette.ink, "fontSize": font_size, "font": FONT},
        "title": {"color": palette.ink, "fontSize": font_size + 1, "anchor": "start", "fontWeight": "bold"},
        "bar": {"stroke": palette.surface, "strokeWidth": 0.5},
        "rule": {"color": palette.muted},
    }
