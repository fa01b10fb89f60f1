"""The figures show the numbers that they are given."""

import numpy as np
import pytest
import torch
from helpers.planted import sweep_frame

from effnn import ltp
from effnn.experiments.pruning import figures
from effnn.report import published


def test_published_bounds_come_from_the_file():
    bounds = figures.published_bounds(published.load("ltp"))
    assert len(bounds) == 2
    kwon = bounds[bounds.label.str.startswith("Kwon")].iloc[0]
    assert (kwon.macs_percent, kwon.points_lost) == (50, 1)


def test_figures_show_the_numbers_they_are_given():
    frame = sweep_frame()
    ax = figures.draw_tradeoff(frame, {"bag of words": 0.8}).axes[0]
    lines = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_allclose(lines["post-training pruning"].get_ydata(), [74, 74])
    np.testing.assert_allclose(lines["post-training pruning"].get_xdata(), [50, 60])
    assert lines["bag of words (80.0)"].get_ydata()[0] == pytest.approx(80)
    bounds = figures.published_bounds(published.load("ltp"))
    drawn = figures.draw_published_points(frame, bounds).axes[0]
    assert any("published" in line.get_label() and line.get_marker() == "D" for line in drawn.get_lines())
    gains = {line.get_label(): line for line in figures.draw_stages(frame).axes[0].get_lines()}
    np.testing.assert_allclose(gains["tuning"].get_ydata(), [3, 3])


def test_the_mask_picture_holds_every_unit():
    generator = torch.Generator().manual_seed(0)
    masks = ltp.Masks(
        (torch.rand(3, 4, generator=generator) < 0.5).float(), torch.rand(3, 20, generator=generator).round()
    )
    figure = figures.draw_pipeline({"search": masks, "tune": masks}, 0.4)
    shown = [np.ma.filled(ax.get_images()[0].get_array(), 0) for ax in figure.axes[:6]]
    np.testing.assert_array_equal(shown[1], masks.heads.numpy())
    np.testing.assert_array_equal(shown[4].sum(1), masks.filters.sum(1).numpy())
