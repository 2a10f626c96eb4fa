"""Charts drawn by Vega-Lite: the catalogue, one chart as a file, and the script that draws them in a page.

vl-convert does it without a browser and without network. It comes with `spdbench[report]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, cast, get_args

from spdbench.errors import InputError, install_command
from spdbench.judge.comparison.compare import Table
from spdbench.render.report import drafts, speed, timing
from spdbench.render.report.chart import Chart, Panel, Spec
from spdbench.render.report.style import LIGHT, STYLES, ImageFormat, Style, config

CHARTS: dict[str, Chart[Table]] = {chart.name: chart for chart in (*speed.CHARTS, *drafts.CHARTS, *timing.CHARTS)}
"""All charts, in the order of the page."""
VEGA_LITE = "6.1"
NAMES_SHARE, NUMBERS_SHARE = 0.3, 0.1
"""Of a file's width, for what stands at the left of charts of several panels."""
LETTER_WIDTH = 0.6
"""Of a heading in bold, as a share of the font's size: enough for what does not fit to go to the next line."""
ROW_HEIGHT = 1.2
"""The least of a row with a name, as a share of the font's size."""
NARROW = 300
"""Points: a file below this has room for two columns of a legend, not four."""
PIXELS_A_POINT = 4
"""In PNG files: 288 dots an inch."""


def vl_convert() -> Any:
    """The library.

    Raises:
        InputError: it is not installed.
    """
    try:
        import vl_convert
    except ImportError:
        command = install_command("spdbench[report]")
        raise InputError(f"reports need vl-convert-python, which is not installed: {command}") from None
    return vl_convert


def format_of(option: str, path: Path) -> ImageFormat:
    """The format that the name of a chart's file ends with.

    Raises:
        InputError: it is none that a chart can have.
    """
    allowed = get_args(ImageFormat)
    form = next((each for each in allowed if path.suffix.lower() == f".{each}"), None)
    if form is None:
        raise InputError(f"{option} {path}: is no picture's name. Allowed: {', '.join(f'.{each}' for each in allowed)}")
    return cast(ImageFormat, form)


def script() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, which defines `vegaEmbed`."""
    bundle: str = vl_convert().javascript_bundle(vl_version=VEGA_LITE)
    return bundle


def to_file(chart: Chart[Any], panels: Sequence[Panel], form: ImageFormat, style: str) -> bytes:
    """`panels` of `chart` in one file, in the size that `style` names, with the chart's own name above."""
    drawn = _whole(chart, panels, style)
    library = vl_convert()
    if form == "svg":
        text: str = library.vegalite_to_svg(drawn, vl_version=VEGA_LITE)
        return text.encode()
    if form == "pdf":
        pdf: bytes = library.vegalite_to_pdf(drawn, vl_version=VEGA_LITE)
        return pdf
    png: bytes = library.vegalite_to_png(drawn, vl_version=VEGA_LITE, scale=PIXELS_A_POINT)
    return png


def _whole(chart: Chart[Any], panels: Sequence[Panel], name: str) -> Spec:
    style = STYLES[name]
    settings = config(LIGHT, style.font_size) | {"background": LIGHT.surface}
    words = chart.describe([row for panel in panels for row in panel.rows])
    common = {"config": settings, "description": words}
    sized = _sized([panel.spec for panel in panels], style)
    if len(panels) == 1:
        title = {"title": wrap(panels[0].heading, _letters(style.width, style))} if panels[0].heading else {}
        size = {"width": style.width, "autosize": {"type": "fit-x", "contains": "padding"}}
        return {**sized[0], **common, **title, **size}
    has_names = any(map(_has_names, panels))
    labels = round(style.width * (NAMES_SHARE if has_names else NUMBERS_SHARE))
    settings["axisY"] |= {"minExtent": labels, "maxExtent": labels}
    if style.width < NARROW:
        settings["legend"] |= {"columns": 2}
    axis_title = 0 if has_names else 2 * style.font_size
    width = style.width - labels - axis_title - 3 * settings["padding"]
    titles = [wrap(panel.heading or "", _letters(width, style)) for panel in panels]
    parts = [
        {**spec, "width": width, "title": title} for spec, title in zip(_with_one_axis(sized), titles, strict=True)
    ]
    # Each panel has colours of its own: in shared scales those of several panels' values would get mixed up.
    return {"vconcat": parts, "resolve": {"scale": {"color": "independent"}}, **common}


def _letters(width: float, style: Style) -> int:
    """Of a heading, in a line that is `width` points wide."""
    return round(width / (LETTER_WIDTH * style.font_size))


def _sized(specs: Sequence[Spec], style: Style) -> list[Spec]:
    """`specs` with the heights that they have in `style`."""
    factor = style.height_factor
    if len(specs) > 1:
        factor = min(factor, style.height / sum(spec["height"] for spec in specs))
    least = ROW_HEIGHT * style.font_size
    return [spec | {"height": max(spec["height"] * factor, least * _num_names(spec))} for spec in specs]


def _with_one_axis(specs: Sequence[Spec]) -> list[Spec]:
    """Of panels on the same horizontal axis only the last one has its numbers and its title."""
    axes = [spec.get("encoding", {}).get("x") for spec in specs]
    if axes[0] is None or any(axis != axes[0] for axis in axes):
        return list(specs)
    bare = {**axes[0], "title": None, "axis": {**axes[0].get("axis", {}), "labels": False, "ticks": False}}
    return [*({**spec, "encoding": {**spec["encoding"], "x": bare}} for spec in specs[:-1]), specs[-1]]


def _has_names(panel: Panel) -> bool:
    """True if its vertical axis has names, and no numbers."""
    return _num_names(panel.spec) > 0


def _num_names(spec: Spec) -> int:
    """Of its vertical axis; 0 where that has numbers."""
    axes = (layer["encoding"].get("y", {}) for layer in spec.get("layer", [spec]))
    return max((len(axis["scale"]["domain"]) for axis in axes if axis.get("type") == "nominal"), default=0)
