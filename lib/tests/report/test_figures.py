"""Figures: published values are drawn apart, equal content gives equal bytes, and no text lies over another."""

import re

import matplotlib
import numpy as np
import pytest

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.colors import to_hex

from effnn.base import InvalidInput
from effnn.report import PALETTE, band, draw_published, figures, heatmap, legend_outside, new_figure, use_style


@pytest.fixture(autouse=True)
def _style():
    with plt.rc_context():
        use_style()
        yield
    plt.close("all")


def curve():
    figure, ax = new_figure()
    x = np.linspace(0.2, 0.9, 5)
    band(ax, x, x, x - 0.1, x + 0.1, "measured")
    draw_published(ax, 0.5, 0.4, label="Table 3")
    ax.set(title="Title", xlabel="x", ylabel="y")
    legend_outside(ax)
    return figure, ax


def test_published_points_are_apart_from_measured_ones():
    figure, ax = curve()
    measured, points = ax.get_lines()
    assert points.get_marker() == "D" and points.get_linestyle() == "None"
    assert to_hex(points.get_markerfacecolor()) == "#ffffff"
    assert to_hex(points.get_color()).upper() == figures.PUBLISHED_GREY
    assert points.get_label() == "published: Table 3"
    assert points.get_zorder() > measured.get_zorder()
    assert "D" not in figures.MARKERS and figures.PUBLISHED_GREY not in PALETTE
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["measured", "published: Table 3"]


def test_equal_content_gives_equal_bytes():
    first, second = (curve()[0] for _ in range(2))
    assert figures.to_svg(first) == figures.to_svg(second)
    assert figures.to_png(first) == figures.to_png(second)


def test_bytes_name_neither_date_nor_software():
    figure, ax = curve()
    svg = figures.to_svg(figure).decode()
    assert not re.search(r"<dc:date>|<dc:creator>|Matplotlib", svg)
    assert b"Software" not in figures.to_png(figure)
    before = figures.to_svg(figure)
    ax.get_lines()[0].set_ydata(np.zeros(5))
    assert figures.to_svg(figure) != before


def test_the_style_tells_curves_apart_without_colour():
    cycle = list(plt.rcParams["axes.prop_cycle"])
    assert [entry["color"] for entry in cycle] == list(PALETTE[: len(cycle)])
    assert [entry["marker"] for entry in cycle] == list(figures.MARKERS)
    assert [entry["linestyle"] for entry in cycle] == list(figures.LINE_STYLES)
    assert len({entry["marker"] for entry in cycle}) == len(cycle)
    sizes = ("font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize")
    assert all(plt.rcParams[name] >= 11 for name in sizes)
    assert not plt.rcParams["axes.spines.top"] and not plt.rcParams["axes.spines.right"]


def test_new_figure_has_the_style_without_use_style():
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        figure, ax = new_figure(ncols=2)
        assert not ax[0].spines["top"].get_visible()
        assert figure.get_layout_engine() is not None
        assert tuple(figure.get_size_inches()) == (10.4, 4.2)


def test_band_shades_low_to_high_and_keeps_the_look_of_a_colour():
    _, ax = new_figure()
    line = band(ax, [0, 1], [1, 2], [0.5, 1.5], [1.5, 2.5], "a", color=PALETTE[2])
    assert (line.get_marker(), line.get_linestyle()) == (figures.MARKERS[2], figures.LINE_STYLES[2])
    heights = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() == 0.5 and heights.max() == 2.5
    with pytest.raises(InvalidInput, match="2, 2, 1, 2"):
        band(ax, [0, 1], [1, 2], [0.5], [1.5, 2.5], "b")


def test_heatmap_of_a_mask_says_pruned_and_kept():
    figure, ax = new_figure()
    mask = np.random.default_rng(0).integers(0, 2, (4, 6))
    image = heatmap(ax, mask, "Heads")
    assert (np.asarray(image.get_array()) == mask).all()
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["pruned", "kept"]
    assert to_hex(image.cmap(image.norm(0))) != to_hex(image.cmap(image.norm(1)))
    assert not ax.texts


def test_heatmap_of_counts_starts_at_zero_and_writes_few_numbers():
    figure, ax = new_figure()
    image = heatmap(ax, np.array([[5, 7], [6, 12]]), "Kept", colorbar="filters")
    assert image.norm.vmin == 0 and image.norm.vmax == 12
    assert sorted(text.get_text() for text in ax.texts) == ["12", "5", "6", "7"]
    assert figure.axes[1].get_ylabel() == "filters"
    _, ax = new_figure()
    heatmap(ax, np.random.default_rng(0).random((12, 40)), "Many")
    assert not ax.texts
    with pytest.raises(InvalidInput, match="2-D"):
        heatmap(ax, np.zeros(3), "flat")


def shown(axis):
    """Labels of the ticks within view; matplotlib also keeps those just outside, undrawn."""
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [label for tick in ticks for label in (tick.label1, tick.label2) if label.get_visible()]


def boxes(figure):
    figure.canvas.draw()
    found = []
    for ax in figure.axes:
        found += [
            ax.title,
            ax._left_title,
            ax.xaxis.label,
            ax.yaxis.label,
            *shown(ax.xaxis),
            *shown(ax.yaxis),
        ]
    found += [text for legend in figure.legends for text in legend.get_texts()]
    return [(text.get_text(), text.get_window_extent()) for text in found if text.get_text() and text.get_visible()]


@pytest.mark.parametrize("where", ["right", "below"])
def test_no_text_lies_over_another_or_outside(where):
    figure, axes = new_figure(ncols=2)
    band(axes[0], [0, 1], [1, 2], [0.5, 1.5], [1.5, 2.5], "post-training pruning")
    draw_published(axes[0], 0.5, 1, label="Kwon et al. 2022")
    axes[0].set(title="Accuracy against FLOPs", xlabel="share of MACs", ylabel="accuracy (%)")
    heatmap(axes[1], np.random.default_rng(0).integers(0, 3072, (12, 1)), "Filters kept", colorbar="filters")
    width = axes[0].get_window_extent().width
    legend_outside(figure, where)
    found = boxes(figure)
    for place, (name, box) in enumerate(found):
        assert figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1, name
        for other, other_box in found[place + 1 :]:
            assert not box.overlaps(other_box), (name, other)
    assert axes[0].get_window_extent().width > 0.75 * width


def test_one_legend_entry_a_label():
    figure, axes = new_figure(ncols=2)
    for ax in axes:
        ax.plot([0, 1], label="same")
        ax.legend()
    legend = legend_outside(figure, "below")
    assert [text.get_text() for text in legend.get_texts()] == ["same"]
    assert all(ax.get_legend() is None for ax in axes)
    with pytest.raises(InvalidInput, match="right, below"):
        legend_outside(figure, "above")
