"""What notebook 03 runs without training: the authors' curves, the operators on a small model, and their figures."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

from effnn import report, staged
from effnn.base import InvalidInput
from effnn.experiments.staged import figures, operators, published_curves
from effnn.experiments.staged.toy_model import (
    ToyModel,
    batches,
    checked_tokens,
    held_out,
    synthetic_tokens,
    train_toy_model,
)
from effnn.report import published

TOY = ToyModel(width=16, heads=2, context=16, steps=60)


@pytest.fixture(scope="module")
def projections():
    return published_curves.projections()


@pytest.fixture(scope="module")
def differences():
    return operators.loss_differences((0, 1), toy=TOY)


def test_the_logs_give_the_authors_own_savings(projections):
    stated = [published_curves.published_projection(pair)["saving"] for pair in published_curves.PAIRS]
    assert projections.authors_saving.round(1).tolist() == stated == projections.published_saving.tolist()
    for name in ("pre", "target", "opt"):
        assert projections[f"authors_{name}"].tolist() == projections[f"published_{name}"].tolist()
    assert (projections.authors_rho - projections.published_rho).abs().max() <= 5e-4


def test_the_logs_are_those_that_the_thinned_rows_come_from():
    curves, compared = published_curves.authors_curves(), 0
    assert sum(len(curve.x) for curve in curves.values()) == 2683 and set(curves) == set(published_curves.SHAPES)
    for model, curve in curves.items():
        assert curve.x[0] == 49 and set((curve.x.diff() % 50).tolist()) == {0}  # after 50 steps, the first being 0
        thinned = published.points("staged", model=model, metric="val_loss").set_index("x").y
        full = dict(zip((curve.x + 1).tolist(), curve.losses.tolist(), strict=True))
        steps = [step for step in thinned.index if step in full]
        compared += len(steps)
        assert max(abs(full[step] - thinned[step]) for step in steps) <= 5.1e-5
    assert compared == len(published.points("staged", metric="val_loss"))


def test_pairs_are_of_the_sizes_that_the_rates_were_made_for():
    rates = published.points("staged", method="peak learning rate").set_index("model").y
    for model in published_curves.SHAPES:
        assert staged.peak_learning_rate(published_curves.parameters(model)) == pytest.approx(rates[model], rel=1e-9)
    assert [pair.size_ratio for pair in published_curves.PAIRS] == [2, 2, 4, 4]


def test_other_rules_stay_near_the_best(projections):
    table = projections
    for pair, row in zip(published_curves.PAIRS, table.itertuples(), strict=True):
        tried = published_curves.saving_curve(pair)
        assert tried.saving.max() == pytest.approx(row.best_saving)
        near = tried.pre[tried.saving >= row.best_saving - 1]
        assert (near.min(), near.max()) == (row.best_first, row.best_last)
        for name in ("robust", "closed"):
            at = tried.set_index("pre").loc[getattr(row, f"{name}_pre")]
            by_hand = (at.target - getattr(row, f"{name}_pre") / row.size_ratio) / row.published_opt
            assert getattr(row, f"{name}_saving") == pytest.approx(100 * by_hand)
            assert row.best_saving - 1.5 < at.saving < row.best_saving
        assert row.best_saving - 2.6 < row.authors_saving < row.best_saving
    assert (table.robust_own_saving < table.robust_saving).all() and (table.robust_opt > table.published_opt).all()
    assert np.allclose(table.closed_rho, [staged.growth_rho(ratio) for ratio in table.size_ratio])


def test_a_pair_without_its_row_is_refused(monkeypatch):
    rows = published.points("staged", model=published_curves.PAIRS[0].published)
    monkeypatch.setattr(published, "points", lambda name, **filters: rows[rows.metric != "loss at growth"])
    with pytest.raises(InvalidInput, match="no row 'loss at growth' for GPT2_base_div2_depth->GPT2_base"):
        published_curves.published_projection(published_curves.PAIRS[0])


def test_paths_under_the_fitted_law():
    frame = published_curves.best_paths(warmups=(3000, 4000))
    assert len(frame) == 2 * 2 * len(staged.PATHS) and set(frame.path) == set(staged.PATHS)
    fits = {cut: published_curves.law_fit(cut) for cut in (3000, 4000)}
    assert dict(zip(frame.warmup, frame.rms, strict=True)) == pytest.approx({cut: fits[cut].rms for cut in fits})
    assert max(fit.rms for fit in fits.values()) < 0.008
    saving = frame.set_index(["target", "warmup", "path"]).saving
    opt = published_curves.published_projection(published_curves.PAIRS[1])["opt"]
    loss = fits[4000].law.loss(published_curves.parameters("GPT2_large"), opt)
    (plan,) = staged.best_plans(fits[4000].law, 24, 1536, loss, ["2W->2D"], earliest=3000)
    assert saving["GPT2_large", 4000, "2W->2D"] == pytest.approx(100 * plan.saving)
    for (target, cut), rows in frame.groupby(["target", "warmup"]):
        assert rows.saving.is_monotonic_decreasing
        assert saving[target, cut, "2W->2W"] > saving[target, cut, "2W"] > saving[target, cut, "2D"] > 0
    row = frame[(frame.target == "GPT2_large") & (frame.path == "2W->2D")].iloc[0]
    assert row.switches.startswith("12 x 768 to ") and row.switches.endswith("24 x 1536 to 7749")
    with pytest.raises(InvalidInput, match="no S_opt is published for GPT2_base_div2_depth; choices: GPT2_base, "):
        published_curves.best_paths(["GPT2_base_div2_depth"])


def test_every_operator_keeps_the_loss_in_every_precision(differences):
    kept = differences[differences.preserving].set_index("dtype")
    assert len(kept) == 2 * 3 * 14 and set(kept.kind) == {"width", "depth", "both"}
    assert kept.loc["float64"].logit_difference.max() <= 1e-10
    assert kept.loc["float32"].loss_difference.max() <= 1e-5
    assert kept.loc["bfloat16"].loss_difference.max() <= 5e-3
    depth = kept[kept.kind == "depth"]
    assert len(depth) == 2 * 3 * 7 and not depth.loss_difference.any() and not depth.logit_difference.any()
    # wide models are not the small ones: rounding shows in float32
    assert kept.loc["float32"].query("kind != 'depth'").logit_difference.min() > 0


def test_the_claims_number_leaves_copies_out_and_would_show_a_wrong_operator(differences):
    worst = operators.largest_loss_differences(differences)
    assert len(worst) == 2 and max(worst) <= 1e-5
    copies = differences[~differences.preserving]
    assert set(copies.operator) == {"copy (stacking), interleave", "copy (stacking), append"}
    assert copies.loss_difference.min() > 1e-2
    assert min(operators.largest_loss_differences(differences.assign(preserving=True))) > 1e-2
    with pytest.raises(InvalidInput, match="no float16 row"):
        operators.largest_loss_differences(differences, "float16")
    with pytest.raises(InvalidInput, match="unknown precision float16; choices: float64, float32, bfloat16"):
        operators.loss_differences(dtypes=["float16"])


def test_a_precision_does_not_depend_on_the_one_before(differences):
    chosen = operators.OPERATORS[:2]
    frame = operators.loss_differences((1,), toy=TOY, dtypes=("bfloat16", "float64"), operators=chosen)
    for how in chosen:
        for dtype in ("bfloat16", "float64"):
            one, other = (
                table[(table.operator == how.name) & (table["dtype"] == dtype) & (table.seed == 1)]
                for table in (frame, differences)
            )
            assert one.loss_before.item() == other.loss_before.item()
            assert one.logit_difference.item() == other.logit_difference.item()


def test_the_small_model_is_trained_and_never_on_what_is_held_out():
    tokens = synthetic_tokens()
    before = torch.random.get_rng_state()
    model, _ = train_toy_model(TOY, tokens)
    assert torch.equal(before, torch.random.get_rng_state())
    untrained, _ = train_toy_model(replace(TOY, steps=0), tokens)
    batch = held_out(tokens, TOY)
    assert staged.evaluate_loss(model, batch) < staged.evaluate_loss(untrained, batch) - 0.5
    marked = torch.zeros(5000, dtype=torch.long)
    marked[-batch.numel() :] = 1
    assert held_out(marked, TOY).all() and not any(b.any() for b in batches(marked, TOY, 0, 200))
    first, again, other = (next(batches(tokens, TOY, seed, 1, first=7)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(checked_tokens(np.asarray(tokens, dtype=np.uint16), TOY), tokens)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.zeros(639, dtype=torch.long), r"int64 of shape \(639,\)"),
        (torch.zeros(700, 2, dtype=torch.long), r"shape \(700, 2\)"),
        (torch.zeros(700), "float32"),
        (-torch.ones(700, dtype=torch.long), "of 0 or more"),
    ],
)
def test_what_is_no_text_is_refused(tokens, words):
    with pytest.raises(InvalidInput, match=f"expected at least 640 token ids .*{words}"):
        train_toy_model(TOY, tokens)


@pytest.fixture(scope="module")
def symmetry():
    return operators.symmetry_trap(20, toy=TOY, rates=(3e-3,), every=10)


def test_halves_stay_equal_without_noise_and_part_with_it(symmetry):
    rows = symmetry.set_index(["dtype", "noise", "step"])
    assert symmetry.step.unique().tolist() == [0, 10, 20] and not symmetry[symmetry.step == 0].asymmetry.any()
    for dtype, rounding in (("float64", 1e-12), ("float32", 1e-4)):
        assert rows.asymmetry[dtype, 0.0, 20] < rounding < 1e-3 < rows.asymmetry[dtype, 0.3, 20]
        assert rows.loss[dtype, 0.0, 0] == pytest.approx(rows.loss[dtype, 0.3, 0], abs=1e-5)
    assert rows.loss["float64", 0.0, 20] != rows.loss["float64", 0.3, 20]


@pytest.fixture(scope="module")
def trajectory():
    return operators.exact_trajectory(10, toy=TOY)


def test_only_the_width_rule_with_consistent_moments_goes_on_exactly(trajectory):
    furthest = trajectory.groupby("variant").logit_difference.max()
    exact = "1/k rule, consistent moments"
    assert set(furthest.index) == set(operators.TRAJECTORIES) and furthest[exact] <= 1e-9
    assert furthest.drop(exact).min() > 1e-2
    start = trajectory[trajectory.step == 0]
    assert start.logit_difference.max() <= 1e-9 and start.loss_before.nunique() == 1
    assert trajectory[trajectory.variant == exact].loss_after.nunique() > 5  # it trains


@pytest.mark.parametrize("order", staged.ORDERS)
def test_what_of_a_new_layer_learns_at_once(order):
    table = operators.new_layer_gradients(toy=TOY, order=order).set_index("init")
    d = TOY.width
    layer = 12 * d**2 + 13 * d
    # zero_proj: both projections and their biases; ln_zero: vectors but for query's and key's biases, for identity
    # also but for what the rectangular identity cuts off of the MLP's inner bias
    expected = {"zero_proj": 5 * d**2 + 2 * d, "ln_zero": 11 * d, "identity": 8 * d}
    for init, count in expected.items():
        assert table.share[init] == pytest.approx(count / layer) and table.loss_difference[init] == 0
    assert table.share["copy"] > 0.99 and table.loss_difference["copy"] > 1e-2
    assert table.matrices.to_dict() == {"zero_proj": 4, "ln_zero": 0, "identity": 0, "copy": 8}


def test_the_matrices_of_the_picture_are_what_growing_makes():
    found = operators.grown_matrices()
    small, zero = found["small"], np.zeros((4, 4), dtype=np.float32)
    assert np.array_equal(found["width x2"], np.block([[small, zero], [zero, small]]))
    noise = found["width x2 + noise"] - found["width x2"]
    assert np.abs(noise).min() > 0 and np.abs(noise[:4] + noise[4:]).max() < 1e-7
    assert np.array_equal(found["new layer, zero_proj"], zero)
    assert np.array_equal(found["new layer, identity"], np.eye(4))


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def lines(ax) -> dict[str, object]:
    return {line.get_label(): line for line in ax.get_lines()}


def test_figures_of_the_operators_show_their_data(differences, symmetry, trajectory):
    matrices = operators.grown_matrices()
    images = [ax.get_images()[0].get_array() for ax in figures.draw_grown_matrices(matrices).axes[:5]]
    assert all(np.array_equal(image, matrix) for image, matrix in zip(images, matrices.values(), strict=True))
    ax = figures.draw_loss_differences(differences).axes[0]
    shown = lines(ax)["float32"].get_xdata()
    assert np.allclose(
        sorted(shown), sorted(differences[differences["dtype"] == "float32"].loss_difference.clip(1e-18))
    )
    assert lines(ax)["allowed in float32"].get_xdata()[0] == 1e-5
    assert [text.get_text() for text in ax.get_yticklabels()] == [how.name for how in operators.OPERATORS]
    apart, loss = figures.draw_symmetry(symmetry).axes
    assert len(lines(apart)["float64, no noise"].get_xdata()) == 2 and len(loss.get_lines()) == 4
    left, right = figures.draw_trajectory(trajectory).axes
    assert max(lines(left)["1/k rule, consistent moments"].get_ydata()) <= 1e-9
    assert max(lines(right)["same rate, moments reset"].get_ydata()) > 1e-3


def test_figures_of_the_schedule_show_their_data(projections):
    row = projections[projections.pair == "depth_base"].iloc[0]
    ax = figures.draw_curves(projections, published_curves.authors_curves()).axes[0]
    cost = published_curves.flops_per_step("GPT2_base")
    grown, stop = lines(ax)["grown (projected)"], lines(ax)["stop at S_opt"]
    assert stop.get_xdata()[0] == cost * row.published_opt
    saved = 1 - grown.get_xdata()[-1] / stop.get_xdata()[0]
    assert 100 * saved == pytest.approx(row.authors_saving) and grown.get_ydata()[-1] == stop.get_ydata()[0]
    figure = figures.draw_saving_curves(projections)
    assert len(figure.legends) == 1 and len(figure.axes) == 4
    drawn = lines(figure.axes[0])
    hollow = drawn["published: the authors' point"]
    assert (hollow.get_xdata()[0], hollow.get_ydata()[0]) == (row.published_pre / 1000, row.published_saving)
    assert to_hex(hollow.get_color()) == report.figures.PUBLISHED_GREY.lower()
    assert hollow.get_markerfacecolor() == "white"
    assert drawn["best"].get_ydata()[0] == row.best_saving == drawn["every growth point tried"].get_ydata().max()


def test_the_figure_of_the_paths_shows_its_data(projections):
    rows = [("2D", 3000, 12.0), ("2W->2D", 3000, 17.0), ("2D", 2000, 11.0), ("2W->2D", 2000, 18.0)]
    frame = pd.DataFrame(rows, columns=["path", "warmup", "saving"]).assign(target="GPT2_base")
    ax = figures.draw_paths(frame, projections).axes[0]
    assert [bar.get_height() for bar in ax.patches[:2]] == [12, 17]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["2D", "2W->2D"]
    published_point = lines(ax)["published: read off two curves"]
    assert published_point.get_ydata()[0] == projections.set_index("pair").published_saving["depth_base"]
