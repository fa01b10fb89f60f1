"""Curves, the loss law, and the slope and its crossings."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter1d

from effnn.base import InvalidInput
from effnn.report import published
from effnn.staged.planning.curves import Curve
from effnn.staged.planning.loss_law import KAPLAN, LossLaw, fit_loss_law
from effnn.staged.planning.slope import (
    TAU_OPT,
    TAUS,
    authors_crossing,
    crossing,
    find_crossing,
    growth_tau,
    local_slope,
    stopping_tau,
    without_spikes,
)

STEPS = torch.arange(50, 20001, 50, dtype=torch.float64)
SMOOTH = 2.9 + (1500 / STEPS) ** 0.76


def noisy(seed: int, noise: float = 1e-3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return SMOOTH * (1 + noise * torch.randn(len(STEPS), generator=generator, dtype=torch.float64))


def test_a_curve_is_read_off_its_lower_envelope():
    curve = Curve([1, 2, 4, 8, 16], [8.0, 4.0, 5.0, 2.0, 2.5])
    assert curve.loss_at(2) == pytest.approx(4)
    assert curve.loss_at(4) == pytest.approx(4 / math.sqrt(2))  # half way in log x between (2, 4) and (8, 2)
    assert curve.loss_at(16) == pytest.approx(2)
    assert curve.x_at(8) == pytest.approx(1)
    assert curve.x_at(math.sqrt(32)) == pytest.approx(math.sqrt(2))
    assert curve.x_at(2) == pytest.approx(8)


def test_step_and_loss_are_inverse():
    curve = Curve(STEPS, noisy(0))
    for loss in (8.0, 4.0, 3.3, 3.2):
        assert curve.loss_at(curve.x_at(loss)) == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize(
    ("x", "losses", "sentence"),
    [
        ([1, 2], [3.0], "one loss for each step"),
        ([1], [3.0], "too few"),
        ([1, 3, 2], [3.0, 2.0, 1.0], "must increase; evaluation 2 is at 2 after 3"),
        ([1, 1], [3.0, 2.0], "must increase"),
        ([0, 1], [3.0, 2.0], "leave out step 0"),
        ([1, 2], [3.0, float("nan")], "NaN"),
    ],
)
def test_what_is_no_curve_is_refused(x, losses, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        Curve(x, losses)


def test_outside_a_curve_nothing_is_invented():
    curve = Curve([10, 20], [3.0, 2.0])
    with pytest.raises(InvalidInput, match="from 3.0000 to 2.0000, 1.9000 is not in it; train it longer"):
        curve.x_at(1.9)
    with pytest.raises(InvalidInput, match="measured from 10 to 20"):
        curve.loss_at(21)


def test_the_law_and_its_inverse():
    assert KAPLAN.loss(85e6, 5000) == pytest.approx((8.8e13 / 85e6) ** 0.076 + (4200 / 5000) ** 0.76)
    assert KAPLAN.step(85e6, KAPLAN.loss(85e6, 5000)) == pytest.approx(5000)
    assert KAPLAN.step(85e6, KAPLAN.floor(85e6)) == math.inf
    with pytest.raises(InvalidInput, match="above 0"):
        LossLaw(1, 0, 1, 1)


@pytest.mark.parametrize("law", [KAPLAN, LossLaw(nc=3e6, a=0.2, k=30, b=0.45)])
@pytest.mark.parametrize("noise", [0, 2e-3])
def test_the_fit_returns_the_law_that_made_the_curves(law, noise):
    sizes = [2e7, 4e7, 8e7, 3e8]
    steps = torch.logspace(2, 4.3, 60)
    curves = []
    for i, n in enumerate(sizes):
        wobble = torch.randn(60, generator=torch.Generator().manual_seed(i)).double()
        clean = torch.tensor([law.loss(n, float(step)) for step in steps], dtype=torch.float64)
        clean[:20] *= 1.5  # a warm-up, which the fit must not see
        curves.append(Curve(steps, clean * (1 + noise * wobble)))
    fit = fit_loss_law(sizes, curves, warmup=float(steps[19]))
    assert fit.rms == pytest.approx(noise, rel=0.1, abs=1e-7)
    assert [len(residual) for residual in fit.residuals] == [40] * 4
    if noise == 0:
        for name in ("nc", "a", "k", "b"):
            assert getattr(fit.law, name) == pytest.approx(getattr(law, name), rel=1e-3)
    for n in sizes:
        assert fit.law.loss(n, 1e4) == pytest.approx(law.loss(n, 1e4), rel=max(noise, 1e-6))


def test_the_fit_of_the_authors_six_curves():
    shapes = {"base": (12, 768), "base_div2_depth": (6, 768), "base_div2_width": (12, 384)}
    shapes |= {"large": (24, 1536), "large_div2_depth": (12, 1536), "large_div2_width": (24, 768)}
    rows = [published.points("staged", model=f"GPT2_{name}", metric="val_loss") for name in shapes]
    curves = [Curve(frame["x"].tolist(), frame["y"].tolist()) for frame in rows]
    fit = fit_loss_law([12 * layers * width**2 for layers, width in shapes.values()], curves, warmup=3000)
    assert fit.rms < 0.008  # one law for all six is good to a percent, no better
    assert fit.law.b == pytest.approx(KAPLAN.b, abs=0.06)
    assert fit.law.a == pytest.approx(KAPLAN.a, abs=0.03)


def test_what_no_law_can_be_fitted_to_is_refused():
    curve = Curve(STEPS, SMOOTH)
    with pytest.raises(InvalidInput, match="two different N"):
        fit_loss_law([1e6, 1e6], [curve, curve])
    with pytest.raises(InvalidInput, match="fewer than 3 evaluations after step 19950 of N = 1e"):
        fit_loss_law([1e6, 2e6], [curve, curve], warmup=19950)
    with pytest.raises(InvalidInput, match="not better at equal steps"):
        fit_loss_law([1e6, 2e6], [curve, Curve(STEPS, SMOOTH * 1.1)])


def test_the_local_slope_of_a_power_law_is_its_exponent():
    slope = local_slope(STEPS, 7 * STEPS**-0.3)
    assert slope[~slope.isnan()].numpy() == pytest.approx(-0.3, abs=1e-9)
    assert int(slope.isnan().sum()) < 100 and slope[:2].isnan().all() and slope[-1].isnan()


@pytest.mark.parametrize("window", [0.1, 0.2, 0.5])
def test_the_local_slope_is_a_straight_line_fit(window):
    x, y = STEPS.log10().numpy(), noisy(1).log10().numpy()
    slope = local_slope(STEPS, noisy(1), window)
    for i in (2, 10, 60, 200):
        j = next(j for j in range(2, 400) if x[i + j] - x[i - j] >= window)
        assert float(slope[i]) == pytest.approx(np.polyfit(x[i - j : i + j + 1], y[i - j : i + j + 1], 1)[0])


def test_the_detector_stands_noise_that_throws_the_authors_off():
    tau = growth_tau(4)
    truth = float(STEPS[crossing(STEPS, SMOOTH, tau)])
    for seed in range(20):
        losses = noisy(seed)
        assert float(STEPS[crossing(STEPS, losses, tau)]) == pytest.approx(truth, rel=0.08)
        assert float(STEPS[authors_crossing(STEPS, losses, tau)]) < 0.8 * truth


def test_a_spike_does_not_move_the_detector():
    tau = growth_tau(4)
    spiked = noisy(3)
    spiked[[40, 70, 71, 110]] *= 1.4
    clean = float(STEPS[crossing(STEPS, noisy(3), tau)])
    assert float(STEPS[crossing(STEPS, spiked, tau)]) == pytest.approx(clean, rel=0.05)


def test_the_detector_asks_for_three_in_a_row():
    tau = -0.2
    losses = SMOOTH.clone()
    slope = local_slope(STEPS, losses)
    first = int((slope > tau).nonzero()[0])
    assert [crossing(STEPS, losses, tau, hits=hits) - first for hits in (1, 2, 3)] == [0, 1, 2]


def test_during_training_the_answer_is_none_until_it_is_known():
    tau = growth_tau(4)
    losses = noisy(5)
    index = crossing(STEPS, losses, tau)
    answers = [find_crossing(STEPS[:n], losses[:n], tau) for n in range(1, 201, 2)]
    known = next(i for i, answer in enumerate(answers) if answer is not None)
    assert answers[known] == index  # what was found early stays
    assert 1 < STEPS[2 * known] / STEPS[index] < 10**0.11  # and it is found half a window later


def test_a_threshold_that_is_never_reached_says_the_slopes():
    with pytest.raises(InvalidInput, match=r"steepest point, -0\.\d+, .*tau = -0.0100; it ends at -0.0\d+: train long"):
        crossing(STEPS, SMOOTH, -0.01)
    with pytest.raises(InvalidInput, match="shorter than one window"):
        crossing(STEPS[:4], SMOOTH[:4], -0.05)
    with pytest.raises(InvalidInput, match="train longer"):
        authors_crossing(STEPS, SMOOTH, -0.001)
    with pytest.raises(InvalidInput, match="too few"):
        local_slope([1, 2], [2.0, 1.0])
    with pytest.raises(InvalidInput, match="must increase"):
        crossing([1, 2, 3, 5, 4], [5.0, 4, 3, 2, 1], -0.05)
    with pytest.raises(InvalidInput, match="below 0; got 0.05"):
        crossing(STEPS, SMOOTH, 0.05)
    with pytest.raises(InvalidInput, match="0.1 decades or more"):
        local_slope(STEPS, SMOOTH, window=0.05)


@pytest.mark.parametrize("tau", [-0.0575, -0.1, -0.2])
def test_the_authors_estimator_against_numpy(tau):
    losses = noisy(7)
    losses[[90, 91, 200]] *= 1.05
    kept = without_spikes(losses)
    assert kept == [i for i in range(len(losses)) if i not in (90, 91, 200)]
    mean = uniform_filter1d(losses[kept].log10().numpy(), 5)
    slope = np.diff(mean) / np.diff(STEPS[kept].log10().numpy())
    at = slope.argmin()
    assert authors_crossing(STEPS, losses, tau) == kept[at + (slope[at:] > tau).argmax()]


def test_thresholds_are_the_published_ones_and_those_of_the_law():
    rows = published.points("staged", method="schedule constants").set_index("metric")["y"]
    assert TAU_OPT == rows["tau_opt"]
    assert TAUS == {kind: rows[f"tau_{kind.replace('+', '_')}"] for kind in ("depth", "width", "depth+width")}
    assert [round(growth_tau(r), 3) for r in (2, 4, 8)] == [-0.097, -0.083, -0.069]
    # the published end of training is Kaplan's optimum in compute at the critical batch, which is steeper in steps
    assert stopping_tau() / (1 - stopping_tau() / 0.21) == pytest.approx(TAU_OPT, abs=2e-5)
    with pytest.raises(InvalidInput, match="above 1, got 1"):
        growth_tau(1)
