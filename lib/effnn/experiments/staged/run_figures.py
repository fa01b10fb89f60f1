"""Figures of notebook 03 made of training runs; their data are computed in compute_saved.py and comparisons.py."""

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from effnn import staged
from effnn.report.figures import LINE_STYLES, PALETTE, band, draw_published, legend_outside, new_figure
from effnn.report.values import interval

LABELS = {
    "scratch": "from scratch",
    "staged": "staged",
    "reset": "staged, moments reset",
    "small": "small model continued",
    "once": "grown once, not again",
}
_COLORS = dict(zip(LABELS, PALETTE, strict=False))
_STYLES = dict(zip(LABELS, LINE_STYLES, strict=False))


def draw_frontier(ends: pd.DataFrame, horizon: float | None = None) -> Figure:
    """Test loss after the decay against FLOPs in both conventions; bands: 95 % intervals over seeds."""
    fig, axes = new_figure(2)
    for ax, axis, label in zip(
        axes, ("flops", "flops_full"), ("FLOPs without embeddings", "FLOPs in full"), strict=True
    ):
        for name in [name for name in LABELS if name in set(ends.method)]:
            groups = ends[ends.method == name].groupby("budget")
            x, mean = groups[axis].mean(), groups.test_loss.mean()
            spans = [interval(rows.test_loss.tolist()) or (rows.test_loss.mean(),) * 2 for _, rows in groups]
            low, high = zip(*spans, strict=True)
            look = {"color": _COLORS[name], "linestyle": _STYLES[name], "marker": "o", "label": LABELS[name]}
            if len(x) == 1:
                error = [[mean.iloc[0] - low[0]], [high[0] - mean.iloc[0]]]
                ax.errorbar(x, mean, yerr=error, capsize=4, **look | {"linestyle": "none"})
            else:
                band(ax, x, mean, low, high, **look)
        scratch = ends[ends.method == "scratch"]
        target = scratch[scratch.budget == (horizon or scratch.budget.max())]
        ax.axhline(target.test_loss.mean(), color="0.35", lw=1.2, ls=":", label="loss that is compared")
        ax.set(xlabel=label, title=f"Loss against {label}")
        _plain_log(ax)
    axes[0].set_ylabel("test loss after the decay, nats per token")
    legend_outside(fig, "below")
    return fig


def draw_training_curves(points: pd.DataFrame) -> Figure:
    """Validation loss at a constant rate against FLOPs; thin: each seed, thick: their mean."""
    fig, ax = new_figure(width=8.0)
    for name in [name for name in LABELS if name in set(points.method)]:
        own = points[(points.method == name) & (points.flops > 0)]
        look = {"color": _COLORS[name], "marker": "", "ls": _STYLES[name]}
        for _, rows in own.groupby("seed"):
            ax.plot(rows.flops, rows.validation_loss, lw=0.7, alpha=0.35, **look | {"ls": "-"})
        shared = own.groupby(["phase", "step"], sort=False)[["flops", "validation_loss"]].mean()
        ax.plot(shared.flops, shared.validation_loss, label=LABELS[name], **look)
        born = own[own.phase == 0].groupby("seed").flops.max()
        if name == "staged" and own.phase.nunique() > 1:
            ax.axvline(born.mean(), color="0.35", lw=1.2, ls=":", label="growth")
    ax.set(
        xscale="log", xlabel="FLOPs without embeddings", ylabel="validation loss, nats per token",
        title="In training, before any decay",
    )  # fmt: skip
    low = points.validation_loss.min()
    ax.set_ylim(low - 0.05, low + 1.2)
    legend_outside(ax)
    return fig


def draw_dynamics(points: pd.DataFrame, ratios: pd.DataFrame) -> Figure:
    """The grown model beside the same size from scratch, shifted to the step at which both have the same loss."""
    seeds = list(ratios.seed)[:3]
    fig, axes = new_figure(len(seeds), width=5.0, squeeze=False, sharey=True)
    for ax, seed in zip(axes[0], seeds, strict=True):
        row = ratios[ratios.seed == seed].iloc[0]
        own, other = (points[(points.seed == seed) & (points.method == name)] for name in ("staged", "scratch"))
        other = other[other.step > 0]
        entry = staged.Curve(other.step.tolist(), other.validation_loss.tolist()).x_at(row.upper)
        grown = own[own.phase == own.phase.max()]
        ax.plot(other.step, other.validation_loss, color=_COLORS["scratch"], ls="--", marker="", label="from scratch")
        ax.plot(
            grown.step - grown.step.min() + entry, grown.validation_loss, color=_COLORS["staged"], marker="",
            label="grown, from the step of equal loss",
        )  # fmt: skip
        ax.axhspan(row.lower, row.upper, color="0.9", lw=0, zorder=-1, label="losses that are compared")
        ax.set(xlabel="steps of the large model", title=f"seed {seed}: slope {row.ratio:.2f} of scratch")
        ax.set_ylim(points.validation_loss.min() - 0.05, row.upper + 0.4)
    axes[0][0].set_ylabel("validation loss, nats per token")
    legend_outside(fig, "below")
    return fig


def draw_horizons(table: pd.DataFrame, published: float, label: str, marked: float | None = None) -> Figure:
    """Saving of each method against the budget of scratch; bands: 95 % intervals over seeds.

    Growing pays where staged is above 0 and above the small model. A method is drawn where its saving is known for
    every seed: it reaches the loss, and was not better at its smallest budget already.

    table: of `comparisons.by_horizon`. published, label: the published saving. marked: the horizon of the claim.
    """
    fig, ax = new_figure(width=8.0)
    for name in [name for name in LABELS if name in set(table.method)]:
        known = [
            (x, rows.saving.tolist())
            for x, rows in table[table.method == name].groupby("horizon")
            if np.isfinite(rows.saving).all() and not rows.at_least.any()
        ]
        if known:
            spans = [interval(saving) or (np.mean(saving),) * 2 for _, saving in known]
            look = {"color": _COLORS[name], "linestyle": _STYLES[name], "marker": "", "label": LABELS[name]}
            band(ax, [x for x, _ in known], [np.mean(saving) for _, saving in known], *zip(*spans, strict=True), **look)
    ax.axhline(0, color="0.35", lw=1.2)
    ax.text(
        0.99, 0, "from scratch", transform=ax.get_yaxis_transform(), va="bottom", ha="right", fontsize=11, color="0.3"
    )
    if marked is not None:
        ax.axvline(marked, color="0.35", lw=1.2, ls=":", label="compared in the claim")
    draw_published(ax, [1.0], [published], label, transform=ax.get_yaxis_transform(), clip_on=False)
    ax.set(xlabel="FLOPs of scratch (without embeddings)", ylabel="FLOPs saved to equal loss, percent")
    ax.set_title("Growing against continuing, by the length of training")
    _plain_log(ax)
    legend_outside(ax)
    return fig


def draw_growth_points(table: pd.DataFrame, published: float, label: str) -> Figure:
    """Saving against the growth point, one panel per horizon: when growing pays, and when not.

    Large marks are means over seeds: filled where growing also beats continuing the small model of the path, hollow
    where it does not. Small marks are seeds. A path that misses the loss for some seed has no mean: a cross at the
    lower edge. Horizons at which fewer than half of the savings are known are left out.

    table: of `comparisons.by_growth_point`. published, label: the published saving.
    """
    known = (np.isfinite(table.saving) & ~table.at_least).groupby(table.horizon).mean()
    horizons = sorted(known.index[known >= 0.5])
    fig, axes = new_figure(len(horizons), width=4.6, squeeze=False, sharey=True)
    worst = min(table.saving[np.isfinite(table.saving)].min(), 0) - 6
    for ax, horizon in zip(axes[0], horizons, strict=True):
        here = table[table.horizon == horizon]
        for (kind, rows), color, style in zip(here.groupby("kind", sort=False), PALETTE, LINE_STYLES * 3, strict=False):
            means = rows.groupby(["path", "steps"])[["share", "saving", "small_saving"]].mean().sort_values("share")
            beaten = (means.saving > means.small_saving) | np.isinf(means.small_saving)
            for _, path in means.groupby(level="path"):
                ax.plot(path.share, path.saving.where(np.isfinite(path.saving)), color=color, ls=style, marker="")
            missed = means[np.isinf(means.saving)]
            ax.plot(missed.share, [worst] * len(missed), color=color, ls="none", marker="X", ms=9)
            for filled, part in means[np.isfinite(means.saving)].groupby(beaten):
                fill = color if filled else "white"
                ax.plot(part.share, part.saving, color=color, ls="none", marker="o", ms=9, mfc=fill, mew=2)
            ax.plot([], [], color=color, ls=style, marker="o", label=kind)
            ax.plot(rows.share, rows.saving.clip(lower=worst), color=color, ls="none", marker=".", ms=5, alpha=0.6)
        ax.axhline(0, color="0.35", lw=1.2)
        power = math.floor(math.log10(horizon))
        ax.set_title(f"scratch: {horizon / 10.0**power:.2g}$\\cdot 10^{{{power}}}$ FLOPs")
        ax.set_xlabel("compute when growing / scratch's")
    axes[0][0].plot([], [], color="0.35", ls="none", marker="o", ms=9, mfc="white", mew=2, label="small one cheaper")
    if np.isinf(table.saving[table.horizon.isin(horizons)]).any():
        axes[0][0].plot([], [], color="0.35", ls="none", marker="X", ms=9, label="loss missed for a seed")
    last = axes[0][-1]  # at the edge: the published models' own scale is another one
    draw_published(last, [1.0], [published], label, transform=last.get_yaxis_transform(), clip_on=False)
    axes[0][0].set_ylabel("FLOPs saved, percent")
    legend_outside(fig, "below")
    return fig


def draw_operators(table: pd.DataFrame) -> Figure:
    """Loss jump at growth, and FLOPs saved, by growth operator. table: of `comparisons.compare_operators`."""
    fig, (left, right) = new_figure(2, width=5.6, sharey=True)
    colors = [PALETTE[1] if name.startswith("ours") else PALETTE[0] for name in table.method]
    place = range(len(table))[::-1]
    left.barh(place, table.jump, color=colors)
    left.set(yticks=place, yticklabels=table.method, xlabel="validation loss after growth minus before, nats per token")
    left.set_title("Loss jump")
    reached = np.isfinite(table.saving)
    right.barh(place, table.saving.where(reached, 0), color=colors)
    for y, row, ok in zip(place, table.itertuples(), reached, strict=True):
        if ok:
            right.plot([row.saving_low, row.saving_high], [y, y], color="0.25", ls="-", marker="|", ms=9)
        else:
            right.annotate("loss not reached", (0, y), xytext=(6, 0), textcoords="offset points", va="center")
    right.axvline(0, color="0.35", lw=1.2)
    right.set(
        xlabel="FLOPs saved against scratch, percent", title="To equal loss (whiskers: least and most of the seeds)"
    )
    return fig


def _plain_log(ax) -> None:
    """A logarithmic axis of FLOPs over less than a decade, with readable ticks."""
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    power = math.floor(math.log10(high))
    ticks = [m * 10.0**p for p in (power - 1, power) for m in (1, 1.2, 1.5, 2, 3, 4, 6, 8)]
    ax.set_xticks([tick for tick in ticks if low <= tick <= high])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 10.0**power:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(f"{ax.get_xlabel()}, $10^{{{power}}}$")
