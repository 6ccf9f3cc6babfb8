"""The look of the report's figures: one mark per method, axes, labels, and SVG text to put inside a page.

Figures are 4.2 inches wide with 9-10 point text, so that a phone shows one per row and a desktop three, both readable. A method
keeps its colour, marker and line style in every figure (Okabe-Ito, safe for the colour-blind), a domain its tab20 colour.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

from lldfast.report.html import text as escaped

WIDTH = 4.2
OKABE_ITO = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195"]
GREY, BLACK = "#757575", "#000000"
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
DASHES: list[Any] = ["-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1))]
RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.2,
    "text.parse_math": False,  # a domain may be called "$x$"
    "figure.facecolor": "white",
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Mark:
    """How a method looks in every figure."""

    color: str
    marker: str
    dash: Any


def method_marks(names: Sequence[str], uniform: Sequence[str] = (), oracle: Sequence[str] = ()) -> dict[str, Mark]:
    """A mark per method, by its order in the run: grey for (the first run on) uniform weights, black for the ground truth's."""
    marks: dict[str, Mark] = {}
    used = 0
    for name in names:
        if name in uniform[:1]:
            marks[name] = Mark(GREY, "o", (0, (4, 2)))
        elif name in oracle:
            marks[name] = Mark(BLACK, "*", (0, (1, 1.2)))
        else:
            turn, place = divmod(used, len(OKABE_ITO))
            marks[name] = Mark(OKABE_ITO[place], MARKERS[(place + turn) % len(MARKERS)], DASHES[turn % len(DASHES)])
            used += 1
    return marks


def domain_colors(domains: Sequence[str]) -> dict[str, str]:
    """A tab20 colour per domain: the ten dark ones first, then the ten light ones."""
    table = matplotlib.colormaps["tab20"]
    order = [*range(0, 20, 2), *range(1, 20, 2)]
    return {domain: to_hex(table(order[i % 20])) for i, domain in enumerate(domains)}


def short_labels(names: Sequence[str], width: int = 20) -> dict[str, str]:
    """A label of at most `width` characters per name (the middle is cut), all different."""
    labels: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
        head, tail = (width - 1) * 2 // 3, width - 1 - (width - 1) * 2 // 3
        label = clean if len(clean) <= width else f"{clean[:head]}\N{HORIZONTAL ELLIPSIS}{clean[-tail:]}"
        number = 2
        while label in taken:
            suffix = f" ({number})"
            label, number = clean[: width - len(suffix)] + suffix, number + 1
        labels[name] = label
        taken.add(label)
    return labels


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, no exponent for usual sizes; an en dash for None."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size >= 6 or size < -4:
        return f"{value:.{digits - 1}e}"
    text = f"{value:.{max(0, digits - 1 - size)}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def new_figure(height: float, **layout: Any) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained", **layout)


def to_svg(figure: Figure, key: str, label: str) -> str:
    """SVG text of the figure for use inside a page: no fonts or scripts, ids made unique by `key`, `label` read aloud."""
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context({**RC, "svg.hashsalt": key}):
        # The text stays text: the reader's fonts draw it, whatever the fonts here lack.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out now; saving would do it again
        inked = figure.get_tightbbox()
        # Full width, so that text has one size in all figures; as high as the ink; wider where a name reaches out.
        box = Bbox([[min(0.0, inked.x0), inked.y0 - 0.05], [max(WIDTH, inked.x1), inked.y1 + 0.05]])
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches=box)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'(?<=\sid=")([^"]+)(?=")', rf"{key}-\1", text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{key}-\1"', text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escaped(label)}" ', 1)


def plain(value: float, _: Any = None) -> str:
    """Tick labels without exponents: 1000 -> 1k."""
    if value and abs(value) >= 1000 and value % 100 == 0:
        return f"{value / 1000:g}k"
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def step_axis(axes: Axes, last: float, log: bool, label: str | None = "training step") -> None:
    """Steps along x. Logarithmic above 1 and linear from 0 to 1, as step 0 is measured too and measures are dense early."""
    if log and last > 2:
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)
        powers = [10**i for i in range(int(math.log10(last)) + 1)]
        axes.xaxis.set_major_locator(FixedLocator([0, *powers]))
        axes.set_xlim(-0.15, last * 1.25)
    elif last <= 2:
        axes.xaxis.set_major_locator(FixedLocator([0, 1, 2]))
        axes.set_xlim(-0.5, last + 0.5)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    if label:
        axes.set_xlabel(label)


def value_axis(axes: Axes, low: float, high: float, most: int = 7) -> None:
    """A logarithmic y axis where values span more than a factor of 8 (differences near the end would vanish otherwise)."""
    if low > 0 and high / low > 8:
        axes.set_yscale("log")
        ticks = [m * 10.0**e for e in range(-8, 9) for m in (1, 2, 5) if low * 0.6 <= m * 10.0**e <= high * 1.6]
        if len(ticks) > 2 * most:
            ticks = [tick for tick in ticks if f"{tick:e}".startswith("1")]
        ticks = ticks[:: -(-len(ticks) // most)]
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(plain))


def top_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = 2 if max(map(len, labels)) <= 20 else 1
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, columnspacing=1.2, borderaxespad=0.1)
