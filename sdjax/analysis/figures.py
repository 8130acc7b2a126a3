"""Line plots of runs as PNG files, in colours that colour-blind readers can tell apart.

Uses matplotlib's object interface (no pyplot, no global state, no display). What is plotted is
decided by `report`.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette without its yellow, which is too light for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
FAINT = "#777777"
STYLES = ("-", "--", "-.", ":")  # so that lines differ in print without colours too
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line; with several runs [N, X] it is their mean in a band of their spread.

    `values` is [X] or [N, X] over `steps` [X]; `faint` draws it thin, as a background.
    """

    label: str
    steps: np.ndarray
    values: np.ndarray
    faint: bool = False


@dataclasses.dataclass(frozen=True)
class Panel:
    """One set of axes with its curves; `unit_range` fixes the vertical axis to a fraction's."""

    title: str
    ylabel: str
    curves: Sequence[Curve]
    unit_range: bool = False


def save(panels: Sequence[Panel], path: epath.Path, xlabel: str = "training step") -> None:
    """Draws the panels, at most three in a row. One legend when all share their labels."""
    columns = len(panels) if len(panels) <= 3 else 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.3 * rows + 0.3), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[len(panels) :]:
        unused.remove()
    axes = axes[: len(panels)]
    labels = [tuple(curve.label for curve in panel.curves) for panel in panels]
    shared = len(set(labels)) == 1
    for ax, panel in zip(axes, panels, strict=True):
        _draw(ax, panel, xlabel)
        if not shared and len(panel.curves) > 1:
            ax.legend(fontsize=8, framealpha=0.9)
    if shared and len(labels[0]) > 1:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    path.write_bytes(png.getvalue())


def _draw(ax: Axes, panel: Panel, xlabel: str) -> None:
    for index, curve in enumerate(panel.curves):
        _draw_curve(ax, curve, index)
    ax.set_title(panel.title, fontsize=10, loc="left")
    ax.set_xlabel(xlabel)
    ax.set_ylabel(panel.ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
    ax.set_ylim(0.0, 1.0 if panel.unit_range else 1.05 * ax.get_ylim()[1])
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#dddddd", linewidth=0.7)
    ax.set_axisbelow(True)


def _draw_curve(ax: Axes, curve: Curve, index: int) -> None:
    colour = FAINT if curve.faint else COLOURS[index % len(COLOURS)]
    values = np.atleast_2d(curve.values)
    mean = values.mean(axis=0)
    few = len(curve.steps) <= 25
    ax.plot(
        curve.steps,
        mean,
        label=curve.label,
        color=colour,
        linestyle="-" if curve.faint else STYLES[index % len(STYLES)],
        linewidth=1.0 if curve.faint else 1.8,
        alpha=0.7 if curve.faint else 1.0,
        marker=MARKERS[index % len(MARKERS)] if few and not curve.faint else None,
        markersize=4,
    )
    if len(values) > 1:
        spread = values.std(axis=0, ddof=1)
        ax.fill_between(curve.steps, mean - spread, mean + spread, color=colour, alpha=0.15, lw=0)
