"""Charts as pictures: the page's drawings with their colours written in, as SVG or PNG."""

from __future__ import annotations

import re
from collections.abc import Callable

from markupsafe import Markup, escape

from cfsp.errors import MissingExtraError
from cfsp.report.chart import Chart
from cfsp.report.drawing import WIDE, cross, element, join
from cfsp.report.page import page_file

_SCALE = 2.0
_MARGIN = 24.0
_HEADING = 64.0
# A family that the renderer brings along, so that pictures are alike on every machine.
_FONT = "Roboto, Liberation Sans, Arial, sans-serif"


def picture_svg(chart: Chart) -> str:
    """Return a chart with its title on a white ground, complete in itself."""
    inner = str(chart.draw(WIDE))
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', inner)
    assert box is not None, "every drawing has a view box from zero"
    width, height = float(box[1]) + 2 * _MARGIN, float(box[2]) + 2 * _MARGIN + _HEADING
    placed = inner.replace(
        "<svg", f'<svg x="{_MARGIN:g}" y="{_MARGIN + _HEADING:g}" width="{box[1]}" '
        f'height="{box[2]}"', 1,
    )  # fmt: skip
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="{_FONT}"><style>{_plain_style()}</style>'
        f'<rect width="100%" height="100%" fill="{_colours()["--page"]}"/>'
        f'<text class="picture-title" x="{_MARGIN:g}" y="{_MARGIN + 12:g}">{escape(chart.title)}'
        f"</text>{_legend(chart)}{placed}</svg>"
    )


def _legend(chart: Chart) -> Markup:
    """Return what the marks mean, below the title; letters are taken to be 7 pixels wide."""
    x, y = _MARGIN, _MARGIN + 36
    parts = []
    for entry in chart.legend:
        parts += [
            _swatch(entry.swatch, x + 6, y),
            element("text", entry.name, x=x + 20, y=y + 4),
        ]
        x += 44 + 7 * len(entry.name)
    return join(parts)


def _swatch(kind: str, x: float, y: float) -> Markup:
    if kind in ("before", "after"):
        return element("circle", class_=kind, cx=x, cy=y, r=4.5)
    if kind == "rejected":
        return cross(x, y, 4.5)
    return element("rect", class_=kind, x=x - 6, y=y - 6, width=12, height=12, rx=2)


def load_renderer() -> Callable[[str], bytes]:
    """Return what turns SVG into PNG.

    Raises:
        MissingExtraError: the extra `report` is not installed.
    """
    try:
        from vl_convert import svg_to_png
    except ImportError as error:
        raise MissingExtraError("--png", "report") from error
    return lambda svg: bytes(svg_to_png(str(svg), scale=_SCALE))


def _plain_style() -> str:
    """Return the charts' style with the light palette in place of its variables."""
    colours = _colours()
    return re.sub(r"var\((--[\w-]+)\)", lambda match: colours[match[1]], page_file("charts.css"))


def _colours() -> dict[str, str]:
    """Return the variables that the page's style defines first: the light palette."""
    root = re.search(r":root\s*{([^}]*)}", page_file("style.css"))
    assert root is not None, "style.css begins with the palette"
    return {
        name: value.strip()
        for name, value in re.findall(r"(--[\w-]+)\s*:\s*([^;]+);", root[1])
    }  # fmt: skip
