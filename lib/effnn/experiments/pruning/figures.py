"""The figures of notebook 01, from the DataFrames of the other files. Drawing only: nothing is measured here."""

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from effnn import ltp
from effnn.report import PALETTE, band, draw_published, legend_outside, new_figure
from effnn.report.values import interval

METHODS = {
    "tune": ("post-training pruning", PALETTE[0]),
    "search": ("search only", PALETTE[5]),
    "magnitude": ("magnitude", PALETTE[4]),
    "random": ("random", PALETTE[3]),
}
STAGE_TITLES = {"dense": "dense", "search": "after search", "rearrange": "after rearrangement", "tune": "after tuning"}


def draw_pipeline(stages: dict[str, ltp.Masks], budget: float) -> Figure:
    """The masks, one column per stage: heads above, filters below. Grey is pruned; colours are scales of kept units.

    Filters of a layer stand in the order of the number of stages that keep them, so that equal masks look equal.
    """
    shown = {"dense": _ones_like(stages["search"])} | stages
    order = sum((masks.filters != 0).float() for masks in shown.values()).argsort(dim=1, descending=True, stable=True)
    fig, axes = new_figure(len(shown), 2, width=3.0, height=2.5, squeeze=False, sharey="row")
    for column, (name, masks) in enumerate(shown.items()):
        heads, filters = masks.heads, masks.filters.gather(1, order)
        image = _draw_scales(axes[0, column], heads, f"{STAGE_TITLES[name]}\n{int(heads.count_nonzero())} heads")
        _draw_scales(axes[1, column], filters, f"{int(filters.count_nonzero())} filters")
        axes[0, column].set_xlabel("head")
        axes[1, column].set_xlabel("filter (sorted)")
        if heads.numel() <= 64:
            for (row, place), scale in np.ndenumerate(heads.numpy()):
                axes[0, column].text(place, row, f"{scale:.2f}" if scale else "", ha="center", va="center", fontsize=9)
    for row in axes[:, 0]:
        row.set_ylabel("layer")
    bar = fig.colorbar(image, ax=axes, label="scale of a kept unit", fraction=0.03, pad=0.02, extend="both")
    bar.outline.set_visible(False)
    fig.suptitle(f"Masks after each stage, at {budget:.0%} of the MACs (grey: pruned)")
    return fig


def _draw_scales(ax: Axes, mask: Tensor, title: str) -> AxesImage:
    """Kept units in a diverging colour around 1, pruned ones grey."""
    colors = colormaps["PuOr"].with_extremes(bad="#8C8C8C")
    array = np.ma.masked_equal(mask.numpy(), 0)
    image = ax.imshow(array, aspect="auto", interpolation="nearest", cmap=colors, vmin=0, vmax=2)
    ax.set_title(title, fontsize=12)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    return image


def draw_tradeoff(frame: pd.DataFrame, baselines: dict[str, float], title: str = "Accuracy against compute") -> Figure:
    """Dev accuracy against the share of MACs, mean over seeds; retraining as points.

    Bands are 95 % intervals. The competitors' runs scatter too widely for a band, so each run is a small dot.
    baselines: name -> accuracy of horizontal lines (bag of words, majority).
    """
    fig, ax = new_figure(width=7.6, height=4.8)
    for method, (label, color) in METHODS.items():
        x, mean, low, high = _curve(frame[frame.method == method])
        if method in ("magnitude", "random"):
            runs = frame[frame.method == method]
            ax.scatter(100 * runs.budget, 100 * runs.accuracy, s=14, color=color, alpha=0.45, lw=0, zorder=2)
            low = high = mean
        band(ax, x, mean, low, high, label, color)
    retrain = frame[frame.method == "retrain"]
    if len(retrain):
        x, mean, low, high = _curve(retrain)
        error = [np.array(mean) - low, np.array(high) - mean]
        ax.errorbar(
            x, mean, yerr=error, fmt="P", ms=9, color=PALETTE[1], capsize=4, label="prune, then retrain", zorder=6
        )
    dense = 100 * frame.drop_duplicates(["family", "seed"]).dense_accuracy.mean()
    ax.axhline(dense, color="black", lw=1.4, label=f"dense ({dense:.1f})")
    for (name, value), style in zip(baselines.items(), (":", "-."), strict=False):
        ax.axhline(100 * value, color="0.45", lw=1.2, ls=style, label=f"{name} ({100 * value:.1f})")
    bottom, top = ax.get_ylim()
    ax.set_ylim(max(bottom, 0), min(top, 100))  # an interval of three values may reach beyond what an accuracy can be
    ax.set(xlabel="MACs kept (percent of dense)", ylabel="dev accuracy (percent)", title=title)
    legend_outside(ax)
    return fig


def draw_stages(frame: pd.DataFrame) -> Figure:
    """Points that rearrangement and tuning add to the stage before, by budget: mean and 95 % interval."""
    fig, ax = new_figure(width=7.0)
    accuracy = frame.pivot_table(
        index=["family", "seed", "calibration_seed", "budget"], columns="method", values="accuracy"
    )
    steps = {
        "rearrangement": accuracy["rearrange"] - accuracy["search"],
        "tuning": accuracy["tune"] - accuracy["rearrange"],
    }
    for (name, gain), color in zip(steps.items(), (PALETTE[2], PALETTE[0]), strict=True):
        x, mean, low, high = _curve(gain.rename("accuracy").reset_index())
        band(ax, x, mean, low, high, name, color)
    ax.axhline(0, color="black", lw=1)
    ax.set(xlabel="MACs kept (percent of dense)", ylabel="points over the stage before", title="What each stage adds")
    ax.legend()
    return fig


def draw_latency(curves: pd.DataFrame) -> Figure:
    """Counted MACs, masked latency and shrunk latency, as shares of the dense model's, by budget."""
    fig, ax = new_figure(width=7.2, height=4.6)
    x = 100 * curves.budget
    ax.plot(x, 100 * curves.mac_ratio, label="counted MACs", color="black", marker="", ls="--")
    for name, label, color in (("masked", "masked model", PALETTE[1]), ("shrunk", "shrunk model", PALETTE[0])):
        band(ax, x, 100 * curves[name], 100 * curves[f"{name}_low"], 100 * curves[f"{name}_high"], label, color)
    ax.set(
        xlabel="MAC budget (percent of dense)", ylabel="percent of the dense model", ylim=(0, None),
        title="Only the shrunk model turns fewer MACs into less time",
    )  # fmt: skip
    legend_outside(ax)
    return fig


def draw_published_points(frame: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Points lost against the share of MACs: ours, and what the papers state (other tasks, other models)."""
    fig, ax = new_figure(width=7.4, height=4.6)
    chosen = frame[frame.method == "tune"].assign(accuracy=lambda f: f.dense_accuracy - f.accuracy)
    x, mean, low, high = _curve(chosen)
    band(ax, x, mean, low, high, "ours: post-training pruning", PALETTE[0])
    for _, row in published.iterrows():
        draw_published(ax, row.macs_percent, row.points_lost, row.label)
        ax.annotate("", xy=(row.macs_percent, row.points_lost - 0.8), xytext=(row.macs_percent, row.points_lost),
                    arrowprops={"arrowstyle": "->", "color": "0.4"})  # fmt: skip
    ax.axhline(0, color="black", lw=1)
    ax.set(xlabel="MACs kept (percent of dense)", ylabel="points of accuracy lost", title="Beside the published bounds")
    legend_outside(ax)
    return fig


def draw_times(table: pd.DataFrame) -> Figure:
    """End-to-end time on a logarithmic scale: the talk's table, and ours (own model and task: compare ratios only)."""
    fig, ax = new_figure(width=8.0, height=3.6)
    for place, row in enumerate(table.itertuples()):
        if row.source == "talk":
            draw_published(ax, row.seconds, place, "the talk's table" if place == 0 else "_")
        else:
            ax.plot(row.seconds, place, "o", ms=9, color=PALETTE[0], label="measured here", zorder=5)
        ax.annotate(_duration(row.seconds), (row.seconds, place), xytext=(10, -4), textcoords="offset points")
    handles, labels = ax.get_legend_handles_labels()
    keep = {label: handle for handle, label in zip(handles, labels, strict=True) if not label.endswith("_")}
    ax.legend(keep.values(), keep.keys(), loc="upper center", ncols=2, bbox_to_anchor=(0.5, -0.2))
    ax.set_yticks(range(len(table)), [f"{row.method} ({_epochs(row.epochs)})" for row in table.itertuples()])
    ax.set(xscale="log", xlabel="end-to-end time (seconds)", title="Time to prune")
    ax.margins(x=0.15, y=0.12)
    ax.invert_yaxis()
    return fig


def published_bounds(points: pd.DataFrame) -> pd.DataFrame:
    """Published statements that name both a share of FLOPs and a bound on the loss, from data/published/ltp.csv.

    Columns: label, macs_percent, points_lost (an upper bound). Read off the rows' own words: "FLOPs reduction at <1%
    loss" is a factor, "FLOPs removed %" a share.
    """
    rows = []
    for _, row in points.iterrows():
        if row.metric == "max FLOPs reduction at <1% loss" and "post-training" in row.method:
            rows.append(("Kwon et al.: below 1 point", 100 / float(row.y), 1.0))
        if row.x_name == "FLOPs removed %" and row.metric.startswith("max accuracy loss"):
            rows.append((f"{row.method}: below {float(row.y):g} points", 100 - float(row.x), float(row.y)))
    return pd.DataFrame(rows, columns=["label", "macs_percent", "points_lost"])


def _curve(frame: pd.DataFrame) -> tuple[list[float], list[float], list[float], list[float]]:
    """Budgets in percent; mean, low and high of the accuracy in points over all seeds of a budget."""
    x, mean, low, high = [], [], [], []
    for budget, group in frame.groupby("budget"):
        values = tuple(100 * group.accuracy)
        span = interval(values) or (min(values), max(values))
        x.append(100 * budget)
        mean.append(float(np.mean(values)))
        low.append(span[0])
        high.append(span[1])
    return x, mean, low, high


def _ones_like(masks: ltp.Masks) -> ltp.Masks:
    return ltp.Masks(masks.heads * 0 + 1, masks.filters * 0 + 1)


def _duration(seconds: float) -> str:
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (float("inf"), "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return ""


def _epochs(count: float) -> str:
    return "1 epoch" if count == 1 else f"{count:g} epochs"
