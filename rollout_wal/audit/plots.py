"""The figures of a report, as SVG whose colours and fonts are those of the page, in light and in dark.

matplotlib draws with stand-in colours, which are then replaced by the CSS variables of `page.css`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MissingExtra
from .lengths import Floats, LengthDistribution

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Number of series colours in `page.css`; 0 is the reference.
COLOURS = 8
_NAMES = ["ink", "quiet", "line", "band", "card", *(f"s{i}" for i in range(COLOURS))]
_STAND_IN = {name: f"#01{i:02x}fe" for i, name in enumerate(_NAMES)}
_WIDTH = 8.6
_LEGEND_CHARACTERS = 100


@dataclass(frozen=True, eq=False, slots=True)
class Series:
    """One arm in a figure. `predicted` is the exact law for it, where there is one."""

    label: str
    colour: int
    lengths: LengthDistribution
    predicted: LengthDistribution | None = None


@dataclass(frozen=True, slots=True)
class Bias:
    """One row of the bias figure; all but the label and colour are fractions of the reference mean."""

    label: str
    colour: int
    delta: float
    low: float
    high: float
    predicted: float | None = None


def lengths(series: Sequence[Series], reference: LengthDistribution, *, bins: int = 40) -> str:
    """One panel per arm: its lengths as an area, those of the reference as a line. Use fewer bins for few rollouts."""
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    figure = _figure(_WIDTH, 2.35 * rows + 0.5)
    edges = _edges([reference, *(s.lengths for s in series)], bins)
    base = _binned(reference, edges)
    top = 1.08 * max(base.max(), *(_binned(s.lengths, edges).max() for s in series))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, one in zip(grid, series):
        measured = _binned(one.lengths, edges)
        axes.stairs(measured, edges, fill=True, color=_colour(one.colour), alpha=0.45, linewidth=0)
        axes.stairs(base, edges, color=_STAND_IN["ink"], linewidth=1.1)
        axes.axvline(reference.mean, color=_STAND_IN["ink"], linewidth=1, linestyle=(0, (2, 2)))
        axes.axvline(one.lengths.mean, color=_colour(one.colour), linewidth=1.8)
        axes.set_title(f"{one.label} · mean {one.lengths.mean:,.1f}", loc="left", fontsize=10)
        axes.set_ylim(0, top)
        axes.set_xlim(0, edges[-1])
        axes.set_yticks([])
        _frame(axes)
        axes.tick_params(labelbottom=True)
    for axes in grid[len(series) :]:
        axes.set_visible(False)
    return _svg(figure, "lengths")


def tilt(series: Sequence[Series], reference: LengthDistribution, *, bins: int = 40) -> str:
    """How much more or less often each length is delivered than it ought to be: points measured, lines predicted."""
    figure = _figure(_WIDTH, 3.7)
    axes = figure.subplots()
    edges = _edges([reference, *(s.lengths for s in series)], bins)
    centre = (edges[1:] + edges[:-1]) / 2
    base = _binned(reference, edges)
    seen = base > 0.002 / len(centre)  # bins in which a ratio would be noise are left out
    lowest, highest = 0.5, 2.0
    for one in series:
        ratio = np.divide(_binned(one.lengths, edges), base, out=np.full(len(base), np.nan), where=seen)
        ratio[ratio <= 0] = np.nan
        axes.plot(centre, ratio, "o", color=_colour(one.colour), markersize=4, markeredgewidth=0, label=one.label)
        if one.predicted is not None:
            curve = np.divide(_binned(one.predicted, edges), base, out=np.full(len(base), np.nan), where=seen)
            curve[curve <= 0] = np.nan
            axes.plot(centre, curve, "-", color=_colour(one.colour), linewidth=1.6, alpha=0.9)
        if np.isfinite(ratio).any():
            lowest, highest = min(lowest, float(np.nanmin(ratio))), max(highest, float(np.nanmax(ratio)))
    axes.axhline(1, color=_STAND_IN["ink"], linewidth=1, linestyle=(0, (2, 2)))
    axes.set_yscale("log", base=2)
    axes.set_ylim(max(lowest / 1.25, 1 / 64), min(highest * 1.25, 64))
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(base=2))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}×" if y >= 1 else f"1/{1 / y:g}×"))
    axes.set_xlim(0, edges[-1])
    axes.set_xlabel("length in tokens")
    axes.set_ylabel("delivered, relative to true")
    axes.grid(axis="y", color=_STAND_IN["line"], linewidth=0.8)
    _legend(figure, axes, markerscale=1.8)
    _frame(axes)
    return _svg(figure, "tilt")


def bias(rows: Sequence[Bias], margin: float) -> str:
    """One row per arm: the measured bias with its interval, the prediction as a diamond, the margin as a band."""
    figure = _figure(_WIDTH, 0.42 * len(rows) + 1.0)
    axes = figure.subplots()
    axes.axvspan(-100 * margin, 100 * margin, color=_STAND_IN["band"], linewidth=0)
    axes.axvline(0, color=_STAND_IN["ink"], linewidth=1)
    for y, row in enumerate(rows):
        colour = _colour(row.colour)
        axes.plot([100 * row.low, 100 * row.high], [y, y], color=colour, linewidth=3.2, solid_capstyle="round")
        axes.plot([100 * row.delta], [y], "o", color=colour, markersize=7, markeredgewidth=0)
        if row.predicted is not None:
            axes.plot(
                [100 * row.predicted],
                [y],
                "D",
                markersize=9.5,
                markerfacecolor="none",
                markeredgecolor=_STAND_IN["ink"],
                markeredgewidth=1.1,
            )
    reach = max([3 * margin, *(max(abs(r.low), abs(r.high), abs(r.predicted or 0.0)) for r in rows)]) * 115
    signed = [x for r in rows for x in (r.low, r.high)]
    axes.set_xlim(-reach if min(signed) < -margin else -reach / 4, reach if max(signed) > margin else reach / 4)
    axes.set_yticks(range(len(rows)), [r.label for r in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("bias of the mean length, in % of the true mean")
    axes.grid(axis="x", color=_STAND_IN["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    _frame(axes)
    axes.tick_params(axis="y", length=0, labelcolor=_STAND_IN["ink"])
    return _svg(figure, "bias")


def compounding(rows: Sequence[tuple[str, int, Sequence[float]]]) -> str:
    """Mean length over training steps on the delivered data; rows of (label, colour, means from step 0 on)."""
    figure = _figure(_WIDTH, 3.0)
    axes = figure.subplots()
    for label, colour, means in rows:
        axes.plot(range(len(means)), means, color=_colour(colour), linewidth=2, label=label)
    axes.set_xlabel("training steps")
    axes.set_ylabel("mean length")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, max(len(means) for _, _, means in rows) - 1)
    axes.grid(axis="y", color=_STAND_IN["line"], linewidth=0.8)
    _legend(figure, axes)
    _frame(axes)
    return _svg(figure, "compounding")


def lines(
    name: str,
    rows: Sequence[tuple[str, int, Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    marks: Sequence[float] = (),
    percent: bool = False,
    bottom: float | None = 0.0,
) -> str:
    """Curves over a common axis; rows of (label, colour, x values, y values).

    Args:
        name: of the figure, unique on its page.
        x, y: what the axes show.
        marks: places on the x axis where something happened: thin lines behind the curves.
        percent: y values are fractions.
        bottom: of the y axis; None leaves it to the values.
    """
    figure = _figure(_WIDTH, 2.9)
    axes = figure.subplots()
    for mark in marks:
        axes.axvline(mark, color=_STAND_IN["line"], linewidth=1.2)
    for label, colour, xs, ys in rows:
        axes.plot(xs, np.asarray(ys) * (100 if percent else 1), color=_colour(colour), linewidth=2, label=label)
    axes.set_xlabel(x)
    axes.set_ylabel(f"{y}, %" if percent else y)
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    axes.grid(axis="y", color=_STAND_IN["line"], linewidth=0.8)
    _legend(figure, axes)
    _frame(axes)
    return _svg(figure, name)


def shares(name: str, panels: Sequence[tuple[str, int, Sequence[Sequence[float]]]], *, x: str, y: str) -> str:
    """How a distribution moves: one panel each, of (title, colour, counts), a column per x and a row per y value.

    The darker a cell, the larger its share of its column.
    """
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgba

    figure = _figure(_WIDTH, 2.7)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, colour, counts) in zip(grid, panels):
        corners, faces = [], []
        for i, column in enumerate(counts):
            total = sum(column)
            for j, count in enumerate(column):
                if count:
                    corners.append([(i, j - 0.5), (i + 1, j - 0.5), (i + 1, j + 0.5), (i, j + 0.5)])
                    faces.append(to_rgba(_colour(colour), 0.06 + 0.94 * count / total))
        axes.add_collection(PolyCollection(corners, facecolors=faces, linewidths=0))
        axes.set_xlim(0, max(1, len(counts)))
        axes.set_ylim(0.5, max((len(c) for c in counts), default=1) - 0.5)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel(x)
        _frame(axes)
    grid[0].set_ylabel(y)
    return _svg(figure, name)


def _colour(number: int) -> str:
    return _STAND_IN[f"s{number % COLOURS}"]


def _edges(laws: Sequence[LengthDistribution], bins: int) -> Floats:
    """Bins of a whole number of tokens, so that none holds more lengths than another."""
    longest = max(law.quantile(0.999) for law in laws)
    width = max(1, -(-longest // bins))
    return np.asarray(np.arange(0, longest + width, width) + 0.5)


def _binned(law: LengthDistribution, edges: Floats) -> Floats:
    return np.asarray(np.histogram(np.arange(len(law.pmf_L)), bins=edges, weights=law.pmf_L)[0])


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "audit", "drawing a report") from error
    # A Figure of its own rather than pyplot: no global state, no display, safe in threads.
    return Figure(figsize=(width, height), layout="constrained")


def _legend(figure: Figure, axes: Axes, **more: Any) -> None:
    """Above the axes, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), _LEGEND_CHARACTERS // (max(map(len, labels)) + 5)))
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        fontsize=9.5,
        labelcolor=_STAND_IN["ink"],
        columnspacing=1.4,
        handletextpad=0.5,
        **more,
    )


def _frame(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_STAND_IN["line"])
    axes.tick_params(colors=_STAND_IN["quiet"], labelsize=9, length=3)
    axes.xaxis.label.set_color(_STAND_IN["quiet"])
    axes.yaxis.label.set_color(_STAND_IN["quiet"])
    axes.xaxis.label.set_size(9.5)
    axes.yaxis.label.set_size(9.5)
    axes.title.set_color(_STAND_IN["ink"])
    axes._left_title.set_color(_STAND_IN["ink"])


def _svg(figure: Figure, name: str) -> str:
    import matplotlib as mpl

    settings: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "axes.unicode_minus": True}
    out = io.StringIO()
    with mpl.rc_context(settings):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    for variable, stand_in in _STAND_IN.items():
        svg = svg.replace(stand_in, f"var(--{variable})")
    # `font: 10px 'DejaVu Sans', ...` names the fonts of this machine; the page has its own.
    svg = re.sub(r"(font: [^;\"]*?[\d.]+px) [^;\"]*", r"\1 var(--sans)", svg)
    # Ids must be unique over all figures of a page.
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
