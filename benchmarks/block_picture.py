"""Draws a run's chart by block as one SVG file, as README shows it.

    python benchmarks/block_picture.py RUN > docs/blocks.svg

The page's drawing takes its colours from the page; here they are written into it.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from cfsp.result.page.by_block import block_chart
from cfsp.result.page.chart import WIDE
from cfsp.result.page.page import page_file
from cfsp.result.runs import read_run


def main() -> None:
    """Print the drawing of the run that the command names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a directory that cfsp prune wrote")
    chart = block_chart([read_run(parser.parse_args().run)])
    assert chart is not None, "the run has no plan"
    light = page_file("style.css").partition("}")[0]
    colours = dict(re.findall(r"(--[\w-]+): (#\w+);", light))
    style = re.sub(r"var\((.*?)\)", lambda found: colours[found[1]], page_file("charts.css"))
    ground = f'<rect width="100%" height="100%" fill="{colours["--page"]}"/>'
    head = f' font-family="Roboto, Arial, sans-serif"><style>{style}</style>{ground}'
    print(str(chart.draw(WIDE)).replace(">", head, 1))


if __name__ == "__main__":
    main()
