"""Growth points, projected savings on the authors' curves, and the cheapest plan of each growth path.

The authors' curves in data/published are thinned to 50 to 70 evaluations. Their own rule finds its points by the noise
between evaluations 50 steps apart, which is gone from these; what can still be had from them is held here.
"""

import math

import pytest
import torch

from effnn.base import InvalidInput
from effnn.report import published
from effnn.staged.planning.curves import Curve
from effnn.staged.planning.growth_plans import PATHS, best_plans
from effnn.staged.planning.loss_law import KAPLAN, LossLaw
from effnn.staged.planning.projection import (
    RHOS,
    Projection,
    authors_projection,
    best_projection,
    growth_rho,
    project,
    target_step,
)
from effnn.staged.planning.slope import TAUS, crossing, growth_tau, local_slope

# small model in the projections, in the curves; target; growth; parameters of the target over those of the small one
PAIRS = [
    ("GPT2_base_div2_depth", "GPT2_base_div2_depth", "GPT2_base", "depth", 2),
    ("GPT2_large_div2_depth", "GPT2_large_div2_depth", "GPT2_large", "depth", 2),
    ("GPT2_base_div4", "GPT2_base_div2_width", "GPT2_base", "width", 4),
    ("GPT2_large_div4", "GPT2_large_div2_width", "GPT2_large", "width", 4),
]
# best saving and the S_pre within one point of it, from the full logs smoothed by a mean over 9 evaluations
BRUTE = [(0.150, 3600, 5000), (0.155, 3750, 7850), (0.224, 3700, 6150), (0.263, 5450, 10350)]


def curve(model: str) -> Curve:
    rows = published.points("staged", model=model, metric="val_loss")
    return Curve((rows["x"] - 1).tolist(), rows["y"].tolist())  # the published steps count the first one as 0


def rows_of(pair) -> dict[str, float]:
    """The published projection: saving in percent, steps, rho, loss; by the first word of the metric."""
    rows = published.points("staged", model=f"{pair[0]}->{pair[2]}")
    return {metric.split()[0].split("=")[0].strip(":"): y for metric, y in zip(rows["metric"], rows["y"], strict=True)}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
def test_published_steps_give_the_published_savings(pair):
    row = rows_of(pair)
    found = Projection(pair[4], row["S_pre"], row["S_target"], row["S_opt"], row["loss"])
    assert 100 * found.saving == pytest.approx(row["oracle"], abs=0.05)
    assert found.rho == pytest.approx(row["rho"], abs=5e-4)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
def test_curves_give_the_published_savings_to_one_evaluation(pair):
    row = rows_of(pair)
    found = project(curve(pair[1]), curve(pair[2]), pair[4], row["S_pre"], row["S_opt"])
    assert found.loss == pytest.approx(row["loss"], abs=2e-3)
    assert found.target == pytest.approx(row["S_target"], abs=50)  # the authors round to an evaluation, every 50 steps
    assert found.rho == pytest.approx(row["rho"], rel=0.012)
    assert 100 * found.saving == pytest.approx(row["oracle"], abs=0.7)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
def test_the_authors_detector_needs_the_full_logs(pair):
    row = rows_of(pair)
    found = authors_projection(curve(pair[1]), curve(pair[2]), pair[4], TAUS[pair[3]])
    assert found.pre > 1.5 * row["S_pre"] and found.opt > 1.5 * row["S_opt"]
    # what their points have in common is another slope, which the law gives too
    small = curve(pair[1])
    slope = local_slope(small.x, small.losses)
    at = int((small.x - row["S_pre"]).abs().argmin())
    assert float(slope[at]) == pytest.approx(growth_tau(pair[4]), abs=0.02)
    assert float(slope[at]) < TAUS[pair[3]] - 0.015


@pytest.mark.parametrize(("pair", "brute"), list(zip(PAIRS, BRUTE, strict=True)), ids=[pair[0] for pair in PAIRS])
def test_the_best_growth_point_and_how_flat_it_is(pair, brute):
    small, target, opt = curve(pair[1]), curve(pair[2]), rows_of(pair)["S_opt"]
    found = best_projection(small, target, pair[4], opt)
    assert found.best.saving == pytest.approx(brute[0], abs=0.006)
    assert found.first == pytest.approx(brute[1], abs=500) and found.last == pytest.approx(brute[2], abs=500)
    assert found.first < found.best.pre < found.last
    # the detector with the law's own threshold, which knows neither the target's curve nor S_opt, is in the flat part
    pre = float(small.x[crossing(small.x, small.losses, growth_tau(pair[4]))])
    assert project(small, target, pair[4], pre, opt).saving > found.best.saving - 0.01


def test_the_authors_rule_step_by_step():
    """Curves without noise: the nearest evaluation, and the saving by hand."""
    steps = torch.arange(50, 20001, 50, dtype=torch.float64)
    small, target = (Curve(steps, floor + (1500 / steps) ** 0.76) for floor in (3.1, 2.9))
    found = authors_projection(small, target, 4, tau_growth=-0.1, tau_opt=-0.09)
    nearest = int((target.losses - small.losses[steps == found.pre]).abs().argmin())
    assert found.target == steps[nearest] and found.loss == float(small.losses[steps == found.pre])
    assert found.saving == pytest.approx((found.target - found.pre / 4) / found.opt)
    assert found.target == pytest.approx(project(small, target, 4, found.pre, found.opt).target, abs=25)


def test_rho_in_closed_form():
    assert [round(growth_rho(r), 2) for r in (2, 4, 8)] == [1.48, 2.20, 3.26]
    rows = published.points("staged", method="schedule constants").set_index("metric")["y"]
    assert RHOS == {kind: rows[f"rho_{kind.replace('+', '_')}"] for kind in ("depth", "width", "depth+width")}
    assert target_step(6249, RHOS["width"]) == pytest.approx(3518.6, abs=0.1)


@pytest.mark.parametrize(("path", "ratio"), [("2D", 2), ("2W", 4), ("2D2W", 8), ("4W", 16)])
def test_two_stages_agree_with_the_closed_forms(path, ratio):
    loss = KAPLAN.loss(12 * 24 * 1536**2, 30_000)
    (found,) = best_plans(KAPLAN, 24, 1536, loss, [path])
    small, large = found.stages
    assert small.last / large.first == pytest.approx(growth_rho(ratio), rel=1e-6)
    assert KAPLAN.loss(12 * small.layers * small.width**2, small.last) == pytest.approx(small.loss)
    slope = -KAPLAN.b * (KAPLAN.k / small.last) ** KAPLAN.b / small.loss
    assert slope == pytest.approx(growth_tau(ratio), rel=1e-6)


def test_a_plan_adds_up():
    n, tokens = 12 * 24 * 1536**2, 1000
    loss = KAPLAN.loss(n, 30_000)
    found = best_plans(KAPLAN, 24, 1536, loss, tokens_per_step=tokens)
    assert {plan.path for plan in found} == set(PATHS)
    assert [plan.flops for plan in found] == sorted(plan.flops for plan in found)
    for plan in found:
        assert plan.scratch_flops == pytest.approx(6 * n * tokens * 30_000)
        assert plan.saving == pytest.approx(1 - plan.flops / plan.scratch_flops)
        assert (plan.stages[-1].layers, plan.stages[-1].width, plan.stages[0].first) == (24, 1536, 0)
        assert plan.stages[-1].loss == loss
        for before, after in zip(plan.stages, plan.stages[1:], strict=False):
            assert KAPLAN.loss(12 * after.layers * after.width**2, after.first) == pytest.approx(before.loss)
            assert before.steps > 0
    by_path = {plan.path: plan.saving for plan in found}
    assert by_path["2W->2W"] > by_path["2W"] > by_path["2D"] > 0  # a further stage cannot cost
    assert by_path["2D->2D"] > by_path["4D"]


def test_three_stages_against_every_pair_of_switches():
    n = [12 * 6 * 64**2, 12 * 6 * 128**2, 12 * 12 * 128**2]
    law = LossLaw(nc=1e7, a=0.2, k=60, b=0.5)
    loss = law.loss(n[2], 4000)
    (found,) = best_plans(law, 12, 128, loss, ["2W->2D"], tokens_per_step=1)
    cheapest = math.inf
    grid = [loss + (6 - loss) * i / 300 for i in range(301)]
    for first in grid:
        for second in (value for value in grid if value <= first):
            cost = n[0] * law.step(n[0], first) + n[1] * (law.step(n[1], second) - law.step(n[1], first))
            cheapest = min(cheapest, 6 * (cost + n[2] * (4000 - law.step(n[2], second))))
    assert found.flops <= cheapest * (1 + 1e-9) and found.flops == pytest.approx(cheapest, rel=1e-3)


def test_where_growing_does_not_pay_the_plan_says_so():
    loss = KAPLAN.loss(12 * 24 * 1536**2, 9145)
    (found,) = best_plans(KAPLAN, 24, 1536, loss, ["2D"])
    assert found.stages[-1].steps == pytest.approx(0, abs=1e-3)
    assert found.flops == pytest.approx(found.continued_flops)
    (late,) = best_plans(KAPLAN, 24, 1536, KAPLAN.loss(12 * 24 * 1536**2, 1e5), ["2W"])
    assert late.flops < late.scratch_flops < late.continued_flops


def test_no_growth_before_the_warm_up_is_over():
    n = 12 * 24 * 1536**2
    (found,) = best_plans(KAPLAN, 24, 1536, KAPLAN.loss(n, 60_000), ["2D->2D"], earliest=20_000)
    assert found.stages[0].last == pytest.approx(20_000)
    assert best_plans(KAPLAN, 24, 1536, KAPLAN.loss(n, 60_000), ["2D->2D"])[0].flops < found.flops


def test_paths_that_do_not_divide_are_left_out_unless_asked_for():
    loss = KAPLAN.loss(12 * 6 * 64**2, 50_000)
    assert {plan.path for plan in best_plans(KAPLAN, 6, 64, loss)} == set(PATHS) - {"4D", "2D->2D"}
    with pytest.raises(InvalidInput, match="6 layers of width 64 cannot be divided as 4D says"):
        best_plans(KAPLAN, 6, 64, loss, ["4D"])


@pytest.mark.parametrize("path", ["", "2X", "1D", "0W", "2D2D", "D2", "2D->", "2D+2W", "2d"])
def test_an_unknown_path(path):
    with pytest.raises(InvalidInput, match="unknown growth path .* expected one like 2D, 2W"):
        best_plans(KAPLAN, 24, 1536, 2.5, [path])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda small, target: target_step(100, 1.0), "rho > 1, got 100 and 1.0"),
        (lambda small, target: growth_rho(0.5), "ratio above 1, got 0.5"),
        (lambda small, target: project(small, target, 1, 20, 40), "more parameters"),
        (lambda small, target: project(small, target, 2, 500, 40), "measured from 10 to 80"),
        (lambda small, target: project(small, target, 2, 20, 400), "measured from 10 to 80"),
        (lambda small, target: best_projection(small, Curve([10, 80], [2.0, 1.0]), 2, 80), "train it longer"),
        (lambda small, target: best_plans(KAPLAN, 24, 1536, 1.0), "1.0000 is not within"),
        (lambda small, target: best_plans(KAPLAN, 24, 1536, 3.0, earliest=1e4), "at step 10000 down to"),
    ],
)
def test_bad_input(call, sentence):
    small, target = Curve([10, 20, 40, 80], [5.0, 4.5, 4.2, 4.0]), Curve([10, 20, 40, 80], [5.0, 4.2, 3.8, 3.5])
    with pytest.raises(InvalidInput, match=sentence):
        call(small, target)
