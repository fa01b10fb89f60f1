"""Figures of notebook 03 that are made of training runs; what they show is computed in staged_savings.py."""

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
}
_COLORS = dict(zip(LABELS, PALETTE, strict=False))
_STYLES = dict(zip(LABELS, LINE_STYLES, strict=False))


def draw_frontier(ends: pd.DataFrame) -> Figure:
    """Test loss after the decay against what was spent, in both conventions of FLOPs; bands: 95 % over seeds."""
    fig, axes = new_figure(2)
    for ax, axis, label in zip(
        axes, ("flops", "flops_full"), ("FLOPs without embeddings", "FLOPs in full"), strict=True
    ):
        for name in [name for name in LABELS if name in set(ends.line)]:
            groups = ends[ends.line == name].groupby("budget")
            x, mean = groups[axis].mean(), groups.test_loss.mean()
            spans = [interval(rows.test_loss.tolist()) or (rows.test_loss.mean(),) * 2 for _, rows in groups]
            low, high = zip(*spans, strict=True)
            look = {"color": _COLORS[name], "linestyle": _STYLES[name], "marker": "o", "label": LABELS[name]}
            if len(x) == 1:
                error = [[mean.iloc[0] - low[0]], [high[0] - mean.iloc[0]]]
                ax.errorbar(x, mean, yerr=error, capsize=4, **look | {"linestyle": "none"})
            else:
                band(ax, x, mean, low, high, **look)
        target = ends[(ends.line == "scratch") & (ends.budget == ends[ends.line == "scratch"].budget.max())]
        ax.axhline(target.test_loss.mean(), color="0.35", lw=1.2, ls=":", label="loss that is compared")
        ax.set(xlabel=label, title=f"Loss against {label}")
        _plain_log(ax)
    axes[0].set_ylabel("test loss after the decay, nats a token")
    legend_outside(fig, "below")
    return fig


def draw_way(points: pd.DataFrame) -> Figure:
    """Validation loss on the way, at a constant rate, against FLOPs; thin: each seed, thick: their mean."""
    fig, ax = new_figure(width=8.0)
    for name in [name for name in LABELS if name in set(points.line)]:
        own = points[(points.line == name) & (points.flops > 0)]
        look = {"color": _COLORS[name], "marker": "", "ls": _STYLES[name]}
        for _, rows in own.groupby("seed"):
            ax.plot(rows.flops, rows.validation_loss, lw=0.7, alpha=0.35, **look | {"ls": "-"})
        shared = own.groupby(["phase", "step"], sort=False)[["flops", "validation_loss"]].mean()
        ax.plot(shared.flops, shared.validation_loss, label=LABELS[name], **look)
        born = own[own.phase == 0].groupby("seed").flops.max()
        if name == "staged" and own.phase.nunique() > 1:
            ax.axvline(born.mean(), color="0.35", lw=1.2, ls=":", label="growth")
    ax.set(
        xscale="log", xlabel="FLOPs without embeddings", ylabel="validation loss, nats a token",
        title="On the way, before any decay",
    )  # fmt: skip
    low = points.validation_loss.min()
    ax.set_ylim(low - 0.05, low + 1.2)
    legend_outside(ax)
    return fig


def draw_dynamics(points: pd.DataFrame, ratios: pd.DataFrame) -> Figure:
    """The grown model beside the same size from scratch, put at the step where that has the small model's loss."""
    seeds = list(ratios.seed)[:3]
    fig, axes = new_figure(len(seeds), width=5.0, squeeze=False, sharey=True)
    for ax, seed in zip(axes[0], seeds, strict=True):
        row = ratios[ratios.seed == seed].iloc[0]
        own, other = (points[(points.seed == seed) & (points.line == name)] for name in ("staged", "scratch"))
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
    axes[0][0].set_ylabel("validation loss, nats a token")
    legend_outside(fig, "below")
    return fig


def draw_map(table: pd.DataFrame, published: float, label: str) -> Figure:
    """Saving against the growth point: when growing pays, and whether it beats continuing the small model.

    table: as `staged_savings.run_map` makes it. A path that never reaches the loss stands at the lower edge.
    """
    fig, ax = new_figure(width=8.0)
    worst = min(table.saving[np.isfinite(table.saving)].min(), 0) - 8
    for (kind, rows), color, style in zip(table.groupby("kind", sort=False), PALETTE, LINE_STYLES * 3, strict=False):
        means = rows.assign(saving=rows.saving.clip(lower=worst)).groupby("share").saving.mean()
        ax.plot(means.index, means, color=color, ls=style, marker="o", label=kind)
        ax.plot(rows.share, rows.saving.clip(lower=worst), color=color, ls="none", marker=".", ms=5, alpha=0.6)
        own = rows.small_saving.clip(lower=worst)
        if len(own) and math.isfinite(own.mean()) and own.mean() > worst:
            ax.axhline(own.mean(), color=color, ls=":", lw=1.2, label=f"its small model continued ({kind})")
    ax.axhline(0, color="0.35", lw=1.2)
    ax.annotate("costs more than scratch", (0.99, 0), xycoords=("axes fraction", "data"), ha="right", va="top",
                fontsize=11, color="0.3", xytext=(0, -4), textcoords="offset points")  # fmt: skip
    draw_published(ax, [table.share.max() * 1.08], [published], label)
    ax.set(
        xlabel="compute spent when growing / compute of scratch", ylabel="FLOPs saved, percent",
        title="When growing pays",
    )  # fmt: skip
    legend_outside(ax)
    return fig


def _plain_log(ax) -> None:
    """A logarithmic axis of FLOPs over less than a decade, with ticks that can be read."""
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    power = math.floor(math.log10(high))
    ticks = [m * 10.0**p for p in (power - 1, power) for m in (1, 1.5, 2, 3, 4, 6, 8)]
    ax.set_xticks([tick for tick in ticks if low <= tick <= high])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 10.0**power:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(f"{ax.get_xlabel()}, $10^{{{power}}}$")
