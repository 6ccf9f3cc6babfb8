"""Figures of the report: each function draws one small figure and returns it as SVG text to put inside a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import NDArray

from lldfast.report.style import (
    BLACK,
    GREY,
    RC,
    Mark,
    domain_colors,
    new_figure,
    number,
    plain,
    short_labels,
    step_axis,
    to_svg,
    top_legend,
    value_axis,
)

PANELS = 12  # domains in one figure: more would not fit a phone's screen


def curves(
    series: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
    marks: Mapping[str, Mark],
    *,
    key: str,
    label: str,
    ylabel: str,
    log_steps: bool = True,
    markers: bool = True,
    may_log: bool = True,
) -> str:
    """One line per method over training steps: KL (paper Fig. 5), gap, loss. `series`: name -> (steps [S], values [S])."""
    with matplotlib.rc_context(RC):
        figure = new_figure(3.1)
        axes = figure.subplots()
        labels = short_labels(list(series))
        for name, (steps, values) in series.items():
            mark = marks[name]
            style: dict[str, Any] = {"color": mark.color, "linestyle": mark.dash, "label": labels[name]}
            axes.plot(steps, values, marker=mark.marker if markers or len(steps) == 1 else None, **style)
        values = np.concatenate([values for _, values in series.values()])
        if may_log:
            value_axis(axes, float(values.min()), float(values.max()))
        elif values.min() < 0 < values.max():
            axes.axhline(0, color="#555555", linewidth=0.8)
        step_axis(axes, max(float(steps.max()) for steps, _ in series.values()), log_steps)
        axes.set_ylabel(ylabel)
        top_legend(figure, axes)
        return to_svg(figure, key, label)


def split_bars(rows: Sequence[tuple[str, float, float]], marks: Mapping[str, Mark], *, key: str, label: str) -> str:
    """Between- and within-domain parts of the final KL, stacked, one bar per method. rows: (name, between, within)."""
    with matplotlib.rc_context(RC):
        figure = new_figure(0.9 + 0.34 * len(rows))
        axes = figure.subplots()
        labels = short_labels([name for name, _, _ in rows])
        for place, (name, between, within) in enumerate(rows):
            color = marks[name].color if name in marks else GREY
            axes.barh(place, between, color=color, height=0.62)
            axes.barh(place, within, left=between, color=color, alpha=0.35, height=0.62)
            end = between + within
            axes.annotate(number(end), (end, place), xytext=(3, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(rows)), [labels[name] for name, _, _ in rows])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlim(0, 1.17 * max(between + within for _, between, within in rows))
        axes.set_xlabel("bits per byte")
        return to_svg(figure, key, label)


def weight_bars(
    domains: Sequence[str],
    weights: Mapping[str, Mapping[str, float]],
    errors: Mapping[str, Mapping[str, float] | None],
    truth: Mapping[str, float] | None,
    marks: Mapping[str, Mark],
    *,
    limit: float,
    uniform: float,
    key: str,
    label: str,
) -> str:
    """Weights by domain (paper Fig. 4): a group of horizontal bars per domain, the ground truth first and outlined."""
    count = len(weights) + (truth is not None)
    with matplotlib.rc_context(RC):
        figure = new_figure(1.0 + len(domains) * (0.12 + 0.105 * max(count, 1)))
        axes = figure.subplots()
        labels = short_labels(domains)
        height = 0.82 / max(count, 1)
        places = np.arange(len(domains), dtype=np.float64)
        first = places - 0.41 + height / 2
        if truth is not None:
            values = [truth[domain] for domain in domains]
            axes.barh(first, values, height, facecolor="#dddddd", edgecolor=BLACK, linewidth=0.9, label="ground truth")
        for turn, name in enumerate(weights, start=int(truth is not None)):
            error = errors.get(name)
            xerr = [error[domain] for domain in domains] if error else None
            axes.barh(
                first + turn * height, [weights[name][domain] for domain in domains], height * 0.92, color=marks[name].color,
                xerr=xerr, error_kw={"elinewidth": 1.0, "capsize": 1.5, "ecolor": "#222222"},
                label=short_labels([name], 44)[name],
            )  # fmt: skip
        axes.axvline(uniform, color=GREY, linestyle=(0, (4, 2)), linewidth=1.2, label=f"uniform ({number(uniform, 2)})")
        axes.set_yticks(places, [labels[domain] for domain in domains])
        axes.set_ylim(len(domains) - 0.45, -0.55)
        axes.set_xlim(0, limit)
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.set_xlabel("domain weight")
        top_legend(figure, axes)
        return to_svg(figure, key, label)


def small_multiples(
    domains: Sequence[str],
    panels: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]],
    marks: Mapping[str, Mark],
    reference: Mapping[str, float] | None,
    *,
    span: tuple[float, float],
    ylabel: str,
    reference_label: str,
    key: str,
    label: str,
) -> str:
    """A panel per domain with a line per method, all panels on the same scale.

    panels: method -> (steps [S], values [S, K], standard errors [S, K] or None), K in the order of `domains`.
    reference: a level per domain, drawn dashed (ground-truth weights), or None.
    """
    columns = min(3, len(domains))
    rows = math.ceil(len(domains) / columns)
    logarithmic = span[0] > 0 and span[1] / span[0] > 8
    with matplotlib.rc_context({**RC, "axes.titlesize": 8.5, "xtick.labelsize": 8, "ytick.labelsize": 8}):
        figure = new_figure(0.85 + 1.0 * rows)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        titles = short_labels(domains, 16 if columns == 3 else 30)
        last = max(float(steps.max()) for steps, _, _ in panels.values())
        names = short_labels(list(panels))
        for place, domain in enumerate(domains):
            axes = grid[place // columns][place % columns]
            if reference is not None:
                axes.axhline(reference[domain], color=BLACK, linestyle=(0, (2, 1.5)), linewidth=1.1, label=reference_label)
            for name, (steps, values, error) in panels.items():
                mark = marks[name]
                line, dots = values[:, place], mark.marker if len(steps) == 1 else None
                axes.plot(steps, line, color=mark.color, linestyle=mark.dash, linewidth=1.5, marker=dots, label=names[name])
                if error is not None:
                    low, high = line - error[:, place], line + error[:, place]
                    axes.fill_between(steps, low, high, color=mark.color, alpha=0.2, linewidth=0)
            axes.set_title(titles[domain], pad=3)
            step_axis(axes, last, True, None)
        for empty in range(len(domains), rows * columns):
            grid[empty // columns][empty % columns].set_visible(False)
            grid[empty // columns - 1][empty % columns].tick_params(labelbottom=True)
        pad = (span[1] - span[0]) * 0.06 or 0.1
        grid[0][0].set_ylim((span[0] / 1.25, span[1] * 1.25) if logarithmic else (span[0] - pad, span[1] + pad))
        value_axis(grid[0][0], *span, most=4)
        figure.supxlabel("training step", fontsize=9)
        figure.supylabel(ylabel, fontsize=9)
        top_legend(figure, grid[0][0])
        return to_svg(figure, key, label)


def heat_map(
    values: NDArray[np.float64],
    ticks: Sequence[str],
    *,
    key: str,
    label: str,
    bar: str,
    axis: str | None = None,
    decades: float | None = None,
    top: float | None = None,
) -> str:
    """A square heat map: JSD between steps (paper Fig. 10), |G^-1| between domains (Fig. 6).

    decades: a logarithmic colour scale that reaches so many decades below the largest value; None for a linear one from 0.
    """
    size = len(values)
    with matplotlib.rc_context({**RC, "axes.grid": False, "axes.spines.top": True, "axes.spines.right": True}):
        figure = new_figure(3.6 if axis else 4.3)
        axes = figure.subplots()
        peak = top if top else float(values.max()) or 1.0
        norm = LogNorm(peak * 10**-decades, peak, clip=True) if decades else None
        limits = {} if decades else {"vmin": 0.0, "vmax": peak}
        shown = np.maximum(values, peak * 10**-decades) if decades else values
        image = axes.imshow(shown, cmap="cividis", norm=norm, interpolation="none", **limits)
        every = max(1, math.ceil(size / 24))
        chosen = list(range(0, size, every))
        columns = chosen if axis or size <= 16 else chosen[::2]
        small = 9 if size <= 12 else 7.5
        # Names would not fit below: rows carry name and number, columns the number.
        below = [ticks[i] if axis else str(i + 1) for i in columns]
        axes.set_xticks(columns, below, rotation=90 if axis and size > 8 else 0, fontsize=small if axis else min(small, 8))
        axes.set_yticks(chosen, [ticks[i] for i in chosen], fontsize=small)
        if axis:
            axes.set_xlabel(axis)
            axes.set_ylabel(axis)
        # Names on the left leave no room for a bar on the right.
        colors = figure.colorbar(image, ax=axes, location="right" if axis else "bottom", shrink=0.85, pad=0.02, aspect=24)
        colors.set_label(bar)
        line = colors.ax.yaxis if axis else colors.ax.xaxis
        line.set_major_formatter(FuncFormatter(plain))
        line.set_minor_locator(NullLocator())
        return to_svg(figure, key, label)


def mean_scatter(
    geometric: NDArray[np.float64], arithmetic: NDArray[np.float64], domains: Sequence[str], *, key: str, label: str
) -> str:
    """Geometric against arithmetic mean of the weights over steps, a point per domain (paper Fig. 9)."""
    colors = domain_colors(domains)
    labels = short_labels(domains, 16)
    with matplotlib.rc_context(RC):
        figure = new_figure(3.5)
        axes = figure.subplots()
        both = np.concatenate([geometric, arithmetic])
        if both.min() > 0 and both.max() / both.min() > 8:
            axes.set_xscale("log")
            axes.set_yscale("log")
            low, high = both.min() / 1.4, both.max() * 1.9
            ticks = [m * 10.0**e for e in range(-8, 1) for m in (1, 3) if low <= m * 10.0**e <= high]
            for line in (axes.xaxis, axes.yaxis):
                line.set_major_locator(FixedLocator(ticks))
                line.set_minor_locator(NullLocator())
        else:
            low, high = 0.0, float(both.max()) * 1.25
        for line in (axes.xaxis, axes.yaxis):
            line.set_major_formatter(FuncFormatter(plain))
        axes.plot([low, high], [low, high], color=GREY, linestyle=(0, (4, 2)), linewidth=1.1)
        for place, domain in enumerate(domains):
            spot = (arithmetic[place], geometric[place])
            axes.scatter(*spot, s=34, color=colors[domain], edgecolor=BLACK, linewidth=0.5, zorder=3)
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        axes.set_aspect("equal")
        heights = (axes.transScale + axes.transLimits).transform(np.stack([arithmetic, geometric], axis=1))[:, 1]
        lowest = [2.0, 2.0]  # height of the last name on the left and on the right, in axes units
        for place in np.argsort(-geometric)[:8]:
            right = int(lowest[0] < lowest[1])
            if lowest[right] - heights[place] < 0.06:
                continue  # no room: it would write over another name
            lowest[right] = heights[place]
            axes.annotate(
                labels[domains[place]], (arithmetic[place], geometric[place]), xytext=(6 if right else -6, 0), fontsize=8.5,
                textcoords="offset points", ha="left" if right else "right", va="top" if right else "bottom",
            )  # fmt: skip
        axes.set_xlabel("arithmetic mean weight")
        axes.set_ylabel("geometric mean weight")
        return to_svg(figure, key, label)


def map_figure(
    trails: Mapping[str, tuple[NDArray[np.int64], NDArray[np.float64]]],
    target: NDArray[np.float64],
    marks: Mapping[str, Mark],
    explained: tuple[float, float] | None,
    *,
    unit: str,
    key: str,
    label: str,
) -> str:
    """Model map with training trails (paper Fig. 1): trails from the base model (square) towards the target (star)."""
    with matplotlib.rc_context(RC):
        figure = new_figure(3.9)
        axes = figure.subplots()
        labels = short_labels(list(trails))
        for name, (_, points) in trails.items():
            mark = marks[name]
            axes.plot(points[:, 0], points[:, 1], color=mark.color, linestyle=mark.dash, linewidth=1.4, zorder=2)
            sizes = np.linspace(8, 30, len(points)) if len(points) > 1 else np.array([30.0])
            axes.scatter(points[:-1, 0], points[:-1, 1], s=sizes[:-1], color=mark.color, marker="o", linewidth=0, zorder=3)
            axes.scatter(
                points[-1:, 0], points[-1:, 1], s=62, color=mark.color, marker=mark.marker, edgecolor="white", linewidth=0.7,
                zorder=4, label=labels[name],
            )  # fmt: skip
        starts = [(steps[0], points[0]) for steps, points in trails.values() if len(points)]
        if starts and min(step for step, _ in starts) == 0:
            start = next(point for step, point in starts if step == 0)
            square: dict[str, Any] = {"marker": "s", "facecolor": "white", "edgecolor": BLACK, "linewidth": 1.4}
            axes.scatter(*start, s=52, zorder=5, label="base (step 0)", **square)
        axes.scatter(*target, s=170, marker="*", color="#F0E442", edgecolor=BLACK, linewidth=1.0, zorder=6, label="target")
        axes.set_aspect("equal", adjustable="datalim")
        axes.margins(0.1)
        for line in (axes.xaxis, axes.yaxis):
            line.set_major_formatter(FuncFormatter(plain))
        axes.set_xlabel(f"axis 1 ({explained[0]:.0%} of the spread), \N{SQUARE ROOT}({unit})" if explained else "axis 1 (t-SNE)")
        axes.set_ylabel(f"axis 2 ({explained[1]:.0%})" if explained else "axis 2")
        top_legend(figure, axes)
        return to_svg(figure, key, label)
