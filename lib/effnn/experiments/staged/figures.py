"""The figures of notebook 03, from the DataFrames of its experiments. Drawing only, one function per figure."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from effnn import staged
from effnn.experiments.staged import published_curves
from effnn.report import LINE_STYLES, PALETTE, draw_published, legend_outside, new_figure
from effnn.staged.planning.slope import without_spikes

_DTYPES = {"float64": (PALETTE[2], "^"), "float32": (PALETTE[0], "o"), "bfloat16": (PALETTE[4], "P")}
LOSS_TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 5e-3}
"""Largest loss difference, in nats per token, that counts as rounding; in bfloat16 with noise."""
_PAIR_TITLES = {"depth": "depth x2", "width": "width x2", "base": "GPT2-base", "large": "GPT2-large"}


def draw_grown_matrices(matrices: dict[str, np.ndarray]) -> Figure:
    """One matrix before and after growing (`operators.grown_matrices`), all on one scale."""
    titles = {
        "small": "small model",
        "width x2": "width x2:\ntwo copies, no cross-talk",
        "width x2 + noise": "width x2 + noise:\ncancels on equal halves",
        "new layer, zero_proj": "new layer,\nzero_proj",
        "new layer, identity": "new layer, identity\n(ones, off the scale)",
    }
    sizes = [len(matrix) for matrix in matrices.values()]
    fig, axes = new_figure(len(matrices), width=2.6, height=4.1, width_ratios=[max(size, 5.5) for size in sizes])
    # the identity's ones are far above other weights: they saturate
    limit = float(np.abs(matrices["small"]).max())
    for ax, (name, matrix) in zip(axes, matrices.items(), strict=True):
        image = ax.imshow(matrix, cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest")
        ax.set_title(titles.get(name, name), fontsize=11.5)
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.spines[:].set(visible=True, color="0.6")
        if len(matrix) == 2 * sizes[0]:
            ax.axhline(sizes[0] - 0.5, color="0.4", lw=1)
            ax.axvline(sizes[0] - 0.5, color="0.4", lw=1)
    axes[0].set_ylabel("input")
    axes[0].set_xlabel("output")
    bar = fig.colorbar(image, ax=axes, label="weight", fraction=0.025, pad=0.02, extend="both")
    bar.outline.set_visible(False)
    fig.suptitle("How growing works: attention's output projection of one layer")
    return fig


def draw_loss_differences(frame: pd.DataFrame) -> Figure:
    """|loss after - before| of every operator and precision, one mark per seed; dotted: what the tests allow.

    A difference of exactly zero is in the column "0".
    """
    names = list(dict.fromkeys(frame.operator))
    fig, ax = new_figure(width=8.6, height=1.6 + 0.32 * len(names))
    floor = 1e-18
    for shift, (dtype, (color, marker)) in zip((-0.22, 0.0, 0.22), _DTYPES.items(), strict=True):
        rows = frame[frame["dtype"] == dtype]
        if rows.empty:
            continue
        ax.plot(
            rows.loss_difference.clip(lower=floor), rows.operator.map(names.index) + shift, ls="none", marker=marker,
            color=color, ms=6.5, alpha=0.85, label=dtype,
        )  # fmt: skip
        ax.axvline(LOSS_TOLERANCE[dtype], color=color, ls=":", lw=1.6, zorder=0, label=f"allowed in {dtype}")
    breaking = frame.operator[~frame.preserving].unique()
    for name in breaking:
        ax.axhspan(names.index(name) - 0.5, names.index(name) + 0.5, color="#F0F0F0", zorder=-1, lw=0)
    if len(breaking):
        last = max(names.index(name) for name in breaking)
        ax.annotate("copying layers does not\nclaim to keep the loss", (1e-9, last), va="bottom", ha="center",
                    fontsize=11, color="0.25", bbox={"fc": "#F0F0F0", "ec": "none", "pad": 1})  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xscale("log")
    ax.set_xlim(floor / 4, 10)
    ticks = [10.0**power for power in range(-16, 1, 4)]
    ax.xaxis.set_major_locator(FixedLocator([floor, *ticks]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "0" if x < 1e-17 else f"$10^{{{round(np.log10(x))}}}$"))
    ax.set(xlabel="|loss after - loss before|, nats per token", title="Growing keeps the loss, up to rounding")
    legend_outside(ax)
    return fig


def draw_symmetry(frame: pd.DataFrame) -> Figure:
    """Distance of the halves of a model grown in width, a panel per learning rate, and the loss at the last one."""
    rates = list(dict.fromkeys(frame.learning_rate))
    fig, axes = new_figure(len(rates) + 1, width=4.7)
    for dtype, noise in frame[["dtype", "noise"]].drop_duplicates().itertuples(index=False):
        label = f"{dtype}, " + ("no noise" if noise == 0 else f"noise {noise:g}")
        look = {"color": _DTYPES[dtype][0], "ls": "--" if noise == 0 else "-", "marker": "", "label": label}
        # both precisions often lie on one line: the wide pale one stays visible below the other
        look |= {"lw": 4.5, "alpha": 0.55} if dtype == "float64" else {}
        runs = frame[(frame["dtype"] == dtype) & (frame.noise == noise)]
        for ax, rate in zip(axes, rates, strict=False):
            after = runs[(runs.learning_rate == rate) & (runs.step > 0)]  # at growth the halves are equal
            ax.plot(after.step, after.asymmetry, **look)
        last = runs[runs.learning_rate == rates[-1]]
        axes[-1].plot(last.step, last.loss, **look)
    lowest = frame.asymmetry[frame.asymmetry > 0].min()
    for ax, rate in zip(axes, rates, strict=False):
        ax.set(yscale="log", ylim=(lowest / 3, 1), title=f"Halves apart, learning rate {rate:g}")
    axes[0].set_ylabel("||half 1 - half 2|| / ||embedding||")
    axes[-1].set(ylabel="validation loss, nats per token", title=f"Loss, learning rate {rates[-1]:g}")
    for ax in axes:
        ax.set_xlabel("steps after growth")
    legend_outside(fig, "below", ncols=4)
    return fig


def draw_trajectory(frame: pd.DataFrame) -> Figure:
    """Distance of the grown model from the small one in training, by how AdamW's state was grown (float64)."""
    fig, (left, right) = new_figure(2)
    floor = 1e-17
    for (name, rows), color, style in zip(
        frame.groupby("variant", sort=False), (PALETTE[0], *PALETTE[1:4], PALETTE[4]), LINE_STYLES, strict=False
    ):
        look = {"color": color, "ls": style, "marker": "", "label": name}
        left.plot(rows.step, rows.logit_difference.clip(lower=floor), **look)
        right.plot(rows.step, rows.loss_after - rows.loss_before, **look)
    left.set(yscale="log", xlabel="steps after growth", ylabel="largest |logit difference|")
    left.set_title("Distance from the small model's function")
    right.set(
        xlabel="steps after growth",
        ylabel="loss - small model's, nats per token",
        title="Loss beside the small model's",
    )
    legend_outside(fig, "below", ncols=2)
    return fig


def draw_curves(table: pd.DataFrame, curves: dict[str, staged.Curve]) -> Figure:
    """The authors' curves, loss against compute, with the growth points of their rule; one panel per pair.

    table: `published_curves.projections`. "Grown" is the target's curve from S_target on, moved to the compute that was
    really spent; the dotted line is the small model without growth. Evaluations more than 1 % above the one before are
    left out, as the authors do.
    """
    fig, axes = new_figure(2, 2, height=3.9, sharex="row", sharey="row")
    for ax, row in zip(axes.flat, table.sort_values(["size", "operator"]).itertuples(), strict=True):
        small_x, small, at_pre = _over_compute(curves[row.small], row.small, row.authors_pre)
        target_x, target, at_opt = _over_compute(curves[row.target], row.target, row.authors_opt)
        cost = published_curves.flops_per_step(row.target)
        at_target = cost * row.authors_target
        used, grown = small_x <= at_pre[0], (target_x >= at_target) & (target_x <= at_opt[0])
        shift = at_pre[0] - at_target
        ax.plot(small_x[used], small[used], color=PALETTE[0], marker="", label="small model")
        ax.plot(small_x[~used], small[~used], color=PALETTE[0], marker="", ls=":", lw=1.5, label="small continued")
        ax.plot(target_x, target, color=PALETTE[1], marker="", label="target from scratch")
        ax.plot(target_x[grown] + shift, target[grown], color=PALETTE[2], marker="", ls="--", label="grown (projected)")
        look = {"ls": "none", "ms": 9, "mec": "white", "zorder": 6}
        ax.plot(*at_pre, marker="^", color=PALETTE[0], label="grow at S_pre", **look)
        ax.plot(at_target, at_pre[1], marker="s", color=PALETTE[1], label="S_target: same loss", **look)
        ax.plot(*at_opt, marker="o", color=PALETTE[1], label="stop at S_opt", **look)
        ax.hlines(at_pre[1], at_pre[0], at_target, color="0.5", lw=1, ls=":")
        ax.annotate("", xy=(at_opt[0] + shift, at_opt[1]), xytext=at_opt, arrowprops={"arrowstyle": "->", "lw": 1.4})
        ax.text(at_opt[0], at_opt[1] - 0.05, f"saved: {row.authors_saving:.1f} %", va="top", ha="right", fontsize=11)
        ax.set(xscale="log", xlabel="training compute, FLOPs", ylim=(at_opt[1] - 0.18, at_opt[1] + 1.2))
        ax.set_xlim(0.05 * at_opt[0], 2 * at_opt[0])
        ax.set_title(f"{_PAIR_TITLES[row.operator]} to {_PAIR_TITLES[row.size]}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.tick_params(labelbottom=True)
    for ax in axes[:, 0]:
        ax.set_ylabel("validation loss, nats per token")
    legend_outside(fig, "below", ncols=4)
    return fig


def _over_compute(curve: staged.Curve, run: str, step: float) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """FLOPs and losses of a run without spikes, and its point at an evaluated step."""
    kept, cost = without_spikes(curve.losses), published_curves.flops_per_step(run)
    at = int((curve.x - step).abs().argmin())
    point = cost * float(curve.x[at]), float(curve.losses[at])
    return cost * curve.x[kept].numpy(), curve.losses[kept].numpy(), point


def draw_saving_curves(table: pd.DataFrame) -> Figure:
    """Projected saving against the growth point, one panel per pair; published points are hollow."""
    fig, axes = new_figure(2, 2, height=3.5)
    for ax, row in zip(axes.flat, table.sort_values(["size", "operator"]).itertuples(), strict=True):
        pair = next(pair for pair in published_curves.PAIRS if pair.name == row.pair)
        found = published_curves.saving_curve(pair)
        found = found[(found.pre > 1000) & (found.saving > 0)]
        ax.axvspan(row.best_first / 1000, row.best_last / 1000, color=PALETTE[2], alpha=0.14, lw=0,
                   label="from first to last within 1 point of the best")  # fmt: skip
        ax.plot(found.pre / 1000, found.saving, color=PALETTE[0], marker="", lw=1.6, label="every growth point tried")
        marks = {"best": ("*", PALETTE[2], 15), "robust": ("s", PALETTE[1], 9), "closed": ("^", PALETTE[3], 9)}
        names = {"best": "best", "robust": "slope detector, tau from the law", "closed": "rho in closed form"}
        for name, (marker, color, size) in marks.items():
            at = getattr(row, f"{name}_pre"), getattr(row, f"{name}_saving")
            ax.plot(at[0] / 1000, at[1], marker=marker, color=color, ms=size, mec="white", ls="none",
                    label=names[name], zorder=6)  # fmt: skip
        draw_published(ax, row.published_pre / 1000, row.published_saving, "the authors' point")
        ax.set(xlabel="grown at, thousand steps", ylim=(0, 1.22 * row.best_saving), xlim=(0, None))
        ax.set_title(f"{_PAIR_TITLES[row.operator]} to {_PAIR_TITLES[row.size]}")
    for ax in axes[:, 0]:
        ax.set_ylabel("projected saving, percent")
    legend_outside(fig, "below", ncols=2)
    return fig


def draw_paths(frame: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Saving of the cheapest plan by growth path, from the fitted law; whiskers: other warm-up cuts of the fit.

    frame: `published_curves.best_paths`; its first cut is drawn. table: `projections`, for the published points.
    """
    targets = list(dict.fromkeys(frame.target))
    fig, axes = new_figure(len(targets), sharey=True, squeeze=False)
    first = frame.warmup.iloc[0]
    order = _path_order(frame[(frame.warmup == first) & (frame.target == targets[-1])])
    for ax, target in zip(axes[0], targets, strict=True):
        rows = frame[frame.target == target].pivot(index="path", columns="warmup", values="saving").reindex(order)
        stages = [path.count("->") + 2 for path in rows.index]
        colors = [PALETTE[0] if count == 2 else PALETTE[2] for count in stages]
        ax.bar(range(len(rows)), rows[first], color=colors, width=0.72, zorder=2)
        ends = [rows[first] - rows.min(axis=1), rows.max(axis=1) - rows[first]]
        ax.errorbar(range(len(rows)), rows[first], yerr=ends, fmt="none", ecolor="0.25", capsize=4, zorder=3,
                    label="fit to other parts of the curves")  # fmt: skip
        _published_paths(ax, table[table.target == target], list(rows.index))
        ax.set_xticks(range(len(rows)), rows.index, rotation=40, ha="right", rotation_mode="anchor")
        ax.grid(axis="x", visible=False)
        ax.set(xlabel="growth path", title=target.replace("_", "-"))
    fig.suptitle("Cheapest plan by growth path, from the fitted law (2D: depth x2, 2W: width x2, ->: next stage)")
    axes[0, 0].set_ylabel("saving over scratch, percent")
    for color, text in ((PALETTE[0], "two stages"), (PALETTE[2], "three stages")):
        axes[0, 0].bar(0, 0, color=color, label=text)
    legend_outside(fig, "below", ncols=2)
    return fig


def _path_order(rows: pd.DataFrame) -> list[str]:
    return rows.sort_values("saving").path.tolist()


def _published_paths(ax: Axes, rows: pd.DataFrame, paths: list[str]) -> None:
    for row in rows.itertuples():
        path = {"depth": "2D", "width": "2W"}[row.operator]
        if path in paths:
            draw_published(ax, paths.index(path), row.published_saving, "read off two curves")
