"""A chart as a value: its words, its panels at any width, and the table behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import wrap

from markupsafe import Markup

from cfsp.result.page.svg import Scale, element, join, mark
from cfsp.result.runs import RunFacts

# Of the page's drawings: for a wide window, and for a phone.
WIDE, NARROW = 920, 400
# Of a drawing: its margins, a line of a heading, the room below an axis and between panels.
LEFT, RIGHT, LINE, FOOT, GAP = 52.0, 16.0, 16.0, 40.0, 24.0
# Of a letter of a heading, wider than most; between labels of columns; letters of a run's name.
_LETTER, _LEAST_GAP, _LONGEST_NAME = 7.0, 26.0, 24


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names the row, the others are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Legend:
    """What the marks mean: the class of a swatch, and its name."""

    swatch: str
    name: str


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: the heading, as long as it likes.
        height: from the highest value to the lowest, in pixels.
        scale: of values, from `height` to 0.
        marks: what is drawn.
        across: labels of the horizontal axis by their pixels; empty where a panel below has it.
        axis: its name.
        ticks: labelled values; None for some round ones.
    """

    title: str
    height: float
    scale: Scale
    marks: Markup
    across: dict[float, str]
    axis: str
    ticks: Sequence[float] | None = None

    def draw(self, width: int) -> tuple[Markup, float]:
        """Return it in a drawing of this width, and its height with heading and axis."""
        right = width - RIGHT
        lines = wrap(self.title, int((right - LEFT) / _LETTER))
        heading = [
            element("text", line, class_="panel", x=LEFT, y=LINE * number - 2)
            for number, line in enumerate(lines, start=1)
        ]
        parts = []
        for value in self.scale.ticks(4) if self.ticks is None else self.ticks:
            y = self.scale(value)
            parts.append(element("line", class_="grid", x1=LEFT, x2=right, y1=y, y2=y))
            label = f"{value:g}" if self.ticks is None else f"{value:,.0f}"
            parts.append(element("text", label, class_="tick end", x=LEFT - 8, y=y + 4))
        parts.append(self.marks)
        if self.across:
            y = self.height
            parts.append(element("line", class_="axis", x1=LEFT, x2=right, y1=y, y2=y))
            parts += [
                element("text", label, class_="tick middle", x=x, y=y + 16)
                for x, label in self.across.items()
            ]
            parts.append(element("text", self.axis, class_="tick end", x=right, y=y + 32))
        top = LINE * len(lines) + 10
        inner = element("g", *parts, transform=f"translate(0 {top:g})")
        return join([*heading, inner]), top + self.height + (FOOT if self.across else 0)


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        key: short name, for anchors.
        title: the heading.
        caption: what it shows and how to read it.
        label: what is seen, for those who do not see it.
        panels: gives the panels for a width in pixels, to stand under each other.
        table: the same values as text.
        legend: what the marks mean.
    """

    key: str
    title: str
    caption: str
    label: str
    panels: Callable[[int], Sequence[Panel]]
    table: Table
    legend: Sequence[Legend] = ()

    @property
    def drawings(self) -> list[Markup]:
        """The drawings of the page: for a wide window and for a phone."""
        return [self.draw(WIDE), self.draw(NARROW)]

    def draw(self, width: int) -> Markup:
        """Return the drawing, an SVG image."""
        parts, top = [], 0.0
        for panel in self.panels(width):
            drawn, height = panel.draw(width)
            parts.append(element("g", drawn, transform=f"translate(0 {top:g})"))
            top += height + GAP
        return element(
            "svg",
            *parts,
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {width} {top - GAP:g}",
            role="img",
            aria_label=self.label,
            class_="wide" if width >= WIDE else "narrow",
        )


@dataclass(frozen=True)
class Bands:
    """Equal columns side by side, and what stands below each: its block."""

    names: Sequence[str]
    drawing: int

    @property
    def width(self) -> float:
        """Width of a column with its gap."""
        return (self.drawing - RIGHT - LEFT) / len(self.names)

    def middle(self, index: int) -> float:
        """Return the middle of a column."""
        return LEFT + (index + 0.5) * self.width

    @property
    def across(self) -> dict[float, str]:
        """The labels that have room, by their pixels."""
        steps = (n for n in (1, 2, 5, 10, 20, 50) if n * self.width >= _LEAST_GAP)
        step = next(steps, len(self.names))
        return {self.middle(i): self.names[i] for i in range(0, len(self.names), step)}

    def marks(self, height: float, columns: Sequence[tuple[str, Markup]]) -> Markup:
        """Return the marks of columns: the words about each, and what is drawn in it.

        Invisible behind each is what catches the pointer and shows which one is selected.
        """

        def hit(index: int) -> Markup:
            x = LEFT + index * self.width
            return element("rect", class_="hit", x=x, y=-6, width=self.width, height=height + 6)

        return join(mark(say, i, hit(i), drawn) for i, (say, drawn) in enumerate(columns))


def panel_title(title: str, run: RunFacts, runs: Sequence[RunFacts]) -> str:
    """Return a panel's heading: with the run's name where there are several."""
    return title if len(runs) == 1 else f"{short_label(run.name)}: {title[0].lower()}{title[1:]}"


def short_label(name: str) -> str:
    """Return the end of a long name, which tells paths apart better than the beginning."""
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def block_table(
    heads: Sequence[Sequence[str]], names: Sequence[str], rows: Sequence[Sequence[Sequence[str]]]
) -> Table:
    """Return the table behind a chart by block.

    Args:
        heads: of each run or step, the names of its columns.
        names: of the rows.
        rows: of each run or step, the cells of each row.
    """
    return Table(
        ["block", *(name for head in heads for name in head)],
        [
            [name, *(cell for cells in each for cell in cells)]
            for name, each in zip(names, zip(*rows, strict=True), strict=True)
        ],
    )
