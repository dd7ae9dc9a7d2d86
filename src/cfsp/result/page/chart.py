"""A chart as a value: its words, its panels at any width, and the table behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from textwrap import wrap

from markupsafe import Markup

from cfsp.result.page.svg import Scale, element, join, mark
from cfsp.result.runs import RunFacts
from cfsp.result.tables import Table

# Of the page's drawings: for a wide window, and for a phone.
WIDE, NARROW = 920, 400
# Of a drawing: its margins, a line of a heading, the room below an axis and between panels.
LEFT, RIGHT, LINE, FOOT, GAP = 52.0, 16.0, 16.0, 40.0, 24.0
# Of a letter of a heading, wider than most; between labels of columns; letters of a run's name.
_LETTER, _LEAST_GAP, _LONGEST_NAME = 7.0, 26.0, 24


@dataclass(frozen=True)
class Legend:
    """What the marks mean: the class of a swatch, and its name."""

    swatch: str
    name: str


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str  # as long as it likes
    height: float  # from the highest value to the lowest
    scale: Scale  # of values, from `height` to 0
    marks: Markup
    across: dict[float, str] = field(default_factory=dict)  # labels by pixel, unless below has them
    axis: str = ""
    ticks: Sequence[float] | None = None  # None for some round values

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
    """A chart."""

    key: str  # for anchors
    title: str
    caption: str  # what it shows and how to read it
    label: str  # what is seen, for those who do not see it
    panels: Callable[[int], Sequence[Panel]]  # for a width, to stand under each other
    table: Table  # the same values as text
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


# Draws what is in a column, from its middle and its width.
Draw = Callable[[float, float], Markup]


@dataclass(frozen=True)
class Columns:
    """A panel with a column for each block, side by side: the words about it, and its drawing."""

    title: str
    scale: Scale
    columns: Sequence[tuple[str, Draw]]
    ticks: Sequence[float] | None = None

    def panel(self, below: Sequence[str], width: int, *, is_last: bool) -> Panel:
        """Return the panel; under the last one stands what is below each column, as has room."""
        room, height = (width - RIGHT - LEFT) / len(below), self.scale.start
        middle = [LEFT + (index + 0.5) * room for index in range(len(below))]
        # Invisible behind each is what catches the pointer and shows which one is selected.
        marks = [
            mark(
                say,
                index,
                element("rect", class_="hit", x=x - room / 2, y=-6, width=room, height=height + 6),
                draw(x, room),
            )
            for index, (x, (say, draw)) in enumerate(zip(middle, self.columns, strict=True))
        ]
        fitting = (n for n in (1, 2, 5, 10, 20, 50) if n * room >= _LEAST_GAP)
        step = next(fitting, len(below)) if is_last else len(below)
        across = {middle[i]: below[i] for i in range(0, len(below), step)} if is_last else {}
        return Panel(self.title, height, self.scale, join(marks), across, "block", self.ticks)


def by_block(panels: Sequence[Columns], below: Sequence[str]) -> Callable[[int], Sequence[Panel]]:
    """Return for any width panels under each other that share the axis of blocks."""
    return lambda width: [each.panel(below, width, is_last=each is panels[-1]) for each in panels]


def nothing(x: float, width: float) -> Markup:
    """Draw nothing in a column."""
    return Markup("")


def panel_title(title: str, run: RunFacts, runs: Sequence[RunFacts]) -> str:
    """Return a panel's heading: with the run's name where there are several."""
    if len(runs) == 1:
        return title
    begin = title[0] if title[1].isupper() else title[0].lower()  # FFN, KV
    return f"{short_label(run.name)}: {begin}{title[1:]}"


def short_label(name: str) -> str:
    """Return the end of a long name, which tells paths apart better than the beginning."""
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def block_table(
    heads: Sequence[Sequence[str]], names: Sequence[str], rows: Sequence[Sequence[Sequence[str]]]
) -> Table:
    """Return the table behind a chart by block.

    Of each run or step there are the names of its columns, and the cells of each named row.
    """
    return Table(
        ["block", *(name for head in heads for name in head)],
        [
            [name, *(cell for cells in each for cell in cells)]
            for name, each in zip(names, zip(*rows, strict=True), strict=True)
        ],
    )
