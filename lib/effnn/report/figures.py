"""One look for every figure: style sheet, colours, and the few drawings that several notebooks need.

Published values are always drawn by `draw_published`: hollow grey diamonds, labelled as published, apart from anything
measured here. `to_svg` and `to_png` give equal bytes for equal content.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from effnn.base import InvalidInput

STYLE = Path(__file__).with_name("effnn.mplstyle")
# Okabe and Ito's colours in the order of the style sheet; yellow comes last, for filled areas only.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "v", "P", "X", "*")  # the diamond belongs to published values
LINE_STYLES = ("-", "--", "-.", ":", "-", "--", "-.")
PUBLISHED_GREY = "#5F5F5F"
DPI = 150
_SEPARATED_CELLS = 24  # more rows or columns than this and white lines would hide the cells


def use_style() -> None:
    """Apply effnn.mplstyle to all figures made from now on."""
    plt.style.use(STYLE)


def new_figure(
    ncols: int = 1, nrows: int = 1, width: float | None = None, height: float | None = None, **options: object
) -> tuple[Figure, Axes | np.ndarray]:
    """Return (figure, axes) of `plt.subplots` in the project's style; `width` and `height` are inches for one panel.

    One panel is 6.4 x 4.2; panels side by side are 5.2 wide each. `options` go to `plt.subplots`.
    """
    width = width or (6.4 if ncols == 1 else 5.2)
    height = height or 4.2
    with plt.style.context(STYLE):
        made = plt.subplots(nrows, ncols, figsize=(width * ncols, height * nrows), **options)
        interactive = matplotlib.is_interactive()
    # The first figure of a notebook switches interactive mode on; leaving the context would switch it off again, and
    # no later figure would be shown.
    matplotlib.interactive(interactive)
    return made


def draw_published(ax: Axes, x: object, y: object, label: str = "", **options: object) -> Line2D:
    """Draw published points as hollow grey diamonds without a line; the legend says "published: <label>"."""
    look = {"marker": "D", "markersize": 8, "markeredgewidth": 1.8, "linestyle": "none", "zorder": 5}
    look |= {"color": PUBLISHED_GREY, "markerfacecolor": "white"} | options
    text = f"published: {label}" if label else "published"
    return ax.plot(np.atleast_1d(x), np.atleast_1d(y), label=text, **look)[0]


def band(
    ax: Axes,
    x: Sequence[float],
    mean: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    label: str,
    color: str | None = None,
    **options: object,
) -> Line2D:
    """Draw a mean with its 95 % interval (low to high) as a shaded band; returns the line.

    ax: where it is drawn.
    x: abscissae, as many as the three series have values.
    mean: the line.
    low: lower edge of the band.
    high: upper edge.
    label: in the legend.
    color: of both, with the marker and line style that belong to it; None takes the next of the cycle.
    options: go to `ax.plot`.
    """
    if not len(x) == len(mean) == len(low) == len(high):
        raise InvalidInput(f"band {label!r}: x, mean, low and high have {len(x)}, {len(mean)}, {len(low)}, {len(high)}")
    if color is not None:
        options = {"color": color} | (_look_of(color) | options)
    line = ax.plot(x, mean, label=label, **options)[0]
    ax.fill_between(x, low, high, color=line.get_color(), alpha=0.18, linewidth=0, zorder=line.get_zorder() - 0.5)
    return line


def heatmap(
    ax: Axes,
    array: np.ndarray,
    title: str = "",
    *,
    xlabel: str = "head",
    ylabel: str = "layer",
    colorbar: str = "",
    vmin: float | None = None,
    vmax: float | None = None,
    annotate: bool | None = None,
) -> Artist:
    """Draw a 2-D array, rows downwards, with its colour bar; returns the image.

    Arrays of 0 and 1 (masks) get two tones and a bar with the words pruned and kept; others get a continuous scale.
    ax: where it is drawn.
    array: 2-D.
    title: above it.
    xlabel: of the columns.
    ylabel: of the rows.
    colorbar: label of the bar.
    vmin: lower end of the scale; None takes 0, or the smallest value where one is negative.
    vmax: upper end; None takes the largest value.
    annotate: whether cells show their numbers; None shows them where there are few cells.
    """
    array = np.asarray(array, dtype=float)
    if array.ndim != 2 or not array.size:
        raise InvalidInput(f"heatmap {title!r}: expected a 2-D array with at least one cell, got shape {array.shape}")
    binary = bool(np.isin(array, (0, 1)).all()) and vmin is None and vmax is None
    if binary:
        look = {"cmap": ListedColormap(["#E3E3E3", PALETTE[0]]), "norm": BoundaryNorm([-0.5, 0.5, 1.5], 2)}
    else:
        look = {"cmap": "cividis", "vmin": min(0.0, array.min()) if vmin is None else vmin, "vmax": vmax}
    image = ax.imshow(array, aspect="auto", interpolation="nearest", **look)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    for axis, length in ((ax.xaxis, array.shape[1]), (ax.yaxis, array.shape[0])):
        axis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1) if length > 1 else NullLocator())
    if max(array.shape) <= _SEPARATED_CELLS:
        ax.hlines(np.arange(0.5, array.shape[0] - 1), -0.5, array.shape[1] - 0.5, color="white", linewidth=1)
        ax.vlines(np.arange(0.5, array.shape[1] - 1), -0.5, array.shape[0] - 0.5, color="white", linewidth=1)
    bar = ax.figure.colorbar(image, ax=ax, label=colorbar, pad=0.03, fraction=0.06)
    bar.outline.set_visible(False)
    bar.ax.grid(False)
    if binary:
        bar.set_ticks([0, 1], labels=["pruned", "kept"])
    elif annotate or (annotate is None and array.shape[0] <= 16 and array.shape[1] <= (12 if _whole(array) else 6)):
        _write_cells(ax, array, image)
    return image


def legend_outside(target: Axes | Figure, where: str = "right", **options: object) -> Legend:
    """Put one legend for the whole figure beside ("right") or under ("below") its panels; returns it.

    Entries of the same label in several panels appear once. The figure grows by the legend's size.
    """
    places = {"right": "outside right upper", "below": "outside lower center"}
    if where not in places:
        raise InvalidInput(f"where={where!r}: choose one of {', '.join(places)}")
    figure = target if isinstance(target, Figure) else target.figure
    panels = figure.axes if isinstance(target, Figure) else [target]
    entries: dict[str, Artist] = {}
    for ax in panels:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
        if ax.get_legend() is not None:
            ax.get_legend().remove()
    if where == "below":
        options = {"ncols": min(len(entries) or 1, 3)} | options
    legend = figure.legend(entries.values(), entries.keys(), loc=places[where], **options)
    # The figure grows by what the legend takes, so the panels keep their size.
    extent = legend.get_window_extent()
    width, height = figure.get_size_inches()
    extra = extent.width / figure.dpi + 0.2 if where == "right" else 0.0
    figure.set_size_inches(width + extra, height + (extent.height / figure.dpi if where == "below" else 0.0))
    return legend


def to_svg(figure: Figure) -> bytes:
    """Return the figure as SVG; the same content gives the same bytes (fixed ids, no date)."""
    return _save(figure, "svg", {"Date": None, "Creator": None})


def to_png(figure: Figure) -> bytes:
    """Return the figure as PNG at 150 dots an inch, without the writer's name or a date."""
    return _save(figure, "png", {"Software": None})


def _save(figure: Figure, kind: str, metadata: dict[str, None]) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "effnn", "svg.fonttype": "path"}):
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def _look_of(color: str) -> dict[str, str]:
    names = [known.lower() for known in PALETTE[: len(MARKERS)]]
    place = names.index(color.lower()) if color.lower() in names else 0
    return {"marker": MARKERS[place], "linestyle": LINE_STYLES[place]}


def _whole(array: np.ndarray) -> bool:
    return bool((array == np.round(array)).all())


def _write_cells(ax: Axes, array: np.ndarray, image: Artist) -> None:
    whole = _whole(array)
    for (row, column), number in np.ndenumerate(array):
        red, green, blue, _ = image.cmap(image.norm(number))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        text = f"{number:.0f}" if whole else f"{number:.2f}"
        ax.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
