"""The training experiments of notebook 03: compute counted whole, savings, other operators as described."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.growth_path import PATH, RATES
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from effnn import report, staged
from effnn.base import InvalidInput, imports
from effnn.data import corpus
from effnn.data.corpus import coders as tokens
from effnn.experiments.staged import comparisons, compute_saved, evaluation, other_operators, run_figures, runs, tuning
from effnn.experiments.staged.runs import Method, Setting
from effnn.runner.profiles import load_profile
from effnn.staged.training.step import Stepper


def each(size: tuple[int, int], setting: Setting, vocabulary: int, convention: str = "non-embedding") -> float:
    shape = staged.Shape(*size, vocabulary)
    return staged.training_flops(shape, setting.batch * setting.context, setting.context, convention)


def test_a_staged_run_is_charged_for_all_its_stages(setting):
    method = runs.standard_methods(PATH, [20], RATES)["staged"]
    budgets = [60 * each((1, 16), setting, 1), 90 * each((1, 16), setting, 1)]
    results = runs.run_method(method, budgets, setting, seed=0)
    vocabulary = setting.load().vocab_size
    for row in results.ends.itertuples():
        steps = row.steps - 20
        for column, convention in (("flops", "non-embedding"), ("flops_full", "full")):
            small, large = (each(size, setting, vocabulary, convention) for size in PATH)
            assert getattr(row, column) == 20 * small + steps * large
        assert abs(row.flops - row.budget) <= each((1, 16), setting, vocabulary)
        assert row.tokens == row.steps * setting.batch * setting.context
    assert list(results.points.phase.unique()) == [0, 1]
    jump = compute_saved.jumps(results.points)
    assert abs(jump.jump.item()) < 1e-5 and jump.before.item() > 0


def test_the_decay_ends_every_run_and_helps(setting):
    method = Method("scratch", ((1, 16),), (2e-2,))
    results = runs.run_method(method, [150 * each((1, 16), setting, 1)], setting, seed=0)
    assert results.ends.validation_loss.item() < results.ends.plateau_loss.item()


def test_runs_are_cached_and_come_back_in_order(setting, monkeypatch):
    methods = runs.standard_methods(PATH, [10], RATES)
    jobs = [(methods[name], [40 * each((1, 16), setting, 1)]) for name in ("small", "staged", "scratch")]
    monkeypatch.setattr(runs.pool, "cores", lambda: 1)
    first = runs.run_methods(jobs, [0, 1], setting)
    assert list(zip(first.ends.method, first.ends.seed, strict=True)) == [
        (name, seed) for name in ("small", "staged", "scratch") for seed in (0, 1)
    ]

    def fail(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(runs.staged, "train", fail)
    pd.testing.assert_frame_equal(runs.run_methods(jobs, [0, 1], setting).ends, first.ends)


def test_a_budget_that_the_first_stages_exceed_is_refused(setting):
    method = runs.standard_methods(PATH, [200], RATES)["staged"]
    with pytest.raises(InvalidInput, match="grow earlier, or take a larger budget"):
        runs.run_method(method, [10 * each((1, 16), setting, 1)], setting, seed=0)


def test_a_method_needs_a_rate_per_stage():
    with pytest.raises(InvalidInput, match="2 sizes need as many rates and one fewer steps"):
        Method("x", ((1, 8), (1, 16)), (1e-3,), (5,))


def test_a_width_that_does_not_divide_into_heads_is_refused(setting):
    with pytest.raises(InvalidInput, match="does not divide into heads of 8"):
        runs.run_method(Method("x", ((1, 12),), (1e-3,)), [1e9], setting, 0)


def test_the_other_methods_of_a_comparison():
    rates = {"staged": [1.0, 2.0, 3.0], "scratch": [4.0], "small": [5.0]}
    methods = runs.standard_methods([(1, 8), (1, 16), (2, 16)], [10, 20], rates)
    assert methods["small"].sizes == ((1, 8),) and methods["small"].rates == (5.0,) and methods["small"].steps == ()
    assert methods["once"].sizes == ((1, 8), (1, 16)) and methods["once"].rates == (1.0, 2.0)
    assert methods["once"].steps == (10,) and methods["reset"].growth == (("moments", "reset"),)
    assert methods["scratch"].sizes == ((2, 16),) and methods["scratch"].rates == (4.0,)
    assert set(runs.standard_methods(PATH, [10], RATES)) == {"scratch", "staged", "reset", "small"}


def test_every_kind_tries_the_same_rates_and_the_best_on_validation_is_taken():
    tried = tuning.candidate_methods(PATH, [10], RATES, [1e-3, 2e-3, 4e-3])
    assert sorted(method.name for method in tried) == sorted(
        f"{kind}@{rate}" for kind in ("scratch", "small", "staged", "reset") for rate in ("0.001", "0.002", "0.004")
    )
    assert next(method for method in tried if method.name == "staged@0.002").rates == (5e-3, 2e-3)
    assert next(method for method in tried if method.name == "reset@0.002").growth == (("moments", "reset"),)
    ends = pd.DataFrame({"method": [method.name for method in tried]})
    ends["validation_loss"] = [1.0 if method.rates[-1] == 2e-3 else 2.0 for method in tried]
    ends.loc[ends.method == "reset@0.004", "validation_loss"] = 0.5
    ends["test_loss"] = 3 - ends.validation_loss  # must not be looked at
    best = tuning.best_rates(ends)
    rates = tuning.tuned_rates(RATES, best)
    assert rates == {"scratch": [2e-3], "small": [2e-3], "staged": [5e-3, 2e-3], "reset": [5e-3, 4e-3]}
    assert best[best.edge].method.tolist() == ["reset"]


def test_the_key_of_the_cache_covers_the_code_that_trains():
    names = {path.relative_to(imports.PACKAGE).as_posix() for path in imports.files_behind(runs.run_method)}
    wanted = {f"staged/training/{name}.py" for name in ("train", "step", "begin", "batches")}
    wanted |= {f"staged/growth/{name}.py" for name in ("grow", "width", "depth", "optimizer")}
    wanted |= {f"staged/planning/{name}.py" for name in ("learning_rate", "flops")}
    assert wanted | {"experiments/staged/runs.py", "data/corpus/coders.py"} <= names


def test_a_decay_that_begins_before_the_re_warm_is_over_is_refused(setting):
    method = runs.standard_methods(PATH, [20], RATES)["staged"]
    slow = dataclasses.replace(setting, rewarm=60)
    with pytest.raises(InvalidInput, match="re-warm after growth ends at step 80, the decay .* begins at step 6"):
        runs.run_method(method, [60 * each((1, 16), setting, 1)], slow, seed=0)


def test_the_rate_of_a_grown_model_falls_from_the_peak_to_zero(setting, monkeypatch):
    seen, take = [], Stepper.__call__

    def watched(self, batch):
        loss = take(self, batch)
        seen.append(self.state.optimizer.param_groups[0]["lr"])
        return loss

    monkeypatch.setattr(Stepper, "__call__", watched)
    method = Method("staged", tuple(PATH), (5e-3, 4e-3), (20,))
    runs.run_method(method, [50 * each((1, 16), setting, 1)], setting, seed=0)
    decay = len(seen) - seen.index(max(seen[20:]), 20) - seen[20:].count(max(seen[20:]))
    falling = seen[-decay - 1 :]
    assert falling[0] == 4e-3 and falling[-1] == pytest.approx(4e-3 / (decay + 1))
    assert np.diff(falling) == pytest.approx(-4e-3 / (decay + 1)) and decay >= 8


def test_more_windows_than_the_corpus_has_are_refused_before_training(setting, monkeypatch):
    monkeypatch.setattr(runs.staged, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(InvalidInput, match="asks for 100000"):
        method = Method("scratch", ((1, 16),), (5e-3,))
        runs.run_method(method, [1e9], dataclasses.replace(setting, evaluated=100_000), 0)


def test_a_long_run_goes_on_from_its_checkpoints(setting, monkeypatch):
    kept = dataclasses.replace(setting, checkpoint_every=7)
    method = runs.standard_methods(PATH, [20], RATES)["staged"]
    budgets = [40 * each((1, 16), setting, 1), 60 * each((1, 16), setting, 1)]
    whole = runs.run_method(method, budgets, setting, seed=0)
    take, done = Stepper.__call__, []

    def interrupted(self, batch):
        if len(done) == 50:
            raise KeyboardInterrupt
        done.append(None)
        return take(self, batch)

    monkeypatch.setattr(Stepper, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runs.run_method(method, budgets, kept, seed=0)
    monkeypatch.setattr(Stepper, "__call__", lambda self, batch: done.append(1) or take(self, batch))
    again = runs.run_method(method, budgets, kept, seed=0)
    assert len(done) <= whole.ends.steps.max() + whole.ends.steps.max() // 3 + 7
    columns = ["steps", "flops", "validation_loss", "test_loss"]
    pd.testing.assert_frame_equal(again.ends[columns], whole.ends[columns])


def test_the_laptop_takes_the_rates_that_the_study_chose():
    values, study = (
        load_profile(name, ["01_post_training_pruning", "03_staged_training", "06_backends"]).values(
            "03_staged_training"
        )
        for name in ("laptop", "study")
    )
    tried = report.load("study", "03_staged_training").table("tuning")
    best = tried[tried.best].set_index("method").rate
    assert [values[name] for name in ("scratch_rate", "small_rate")] == [best["scratch"], best["small"]]
    assert values["staged_rates"] == [study["staged_rates"][0], best["staged"]]
    assert best["reset"] == best["staged"]  # the laptop has one entry for both
    assert not tried[tried.method.isin(["scratch", "staged"])].edge.any()


def frontier(name: str, seed: int, points: list[tuple[float, float]]) -> pd.DataFrame:
    rows = [(name, seed, x, x, 2 * x, 3 * x, loss) for x, loss in points]
    columns = ["method", "seed", "budget", "flops", "flops_full", "seconds", "test_loss"]
    return pd.DataFrame(rows, columns=columns)


def test_savings_are_read_between_the_end_points():
    ends = pd.concat(
        [
            frontier("scratch", 0, [(50.0, 3.0), (100.0, 2.0)]),
            frontier("staged", 0, [(64.0, 2.0 * 1.25), (100.0, 2.0 / 1.25)]),
            frontier("small", 0, [(100.0, 2.1)]),
        ]
    )
    table = compute_saved.savings(ends).set_index(["method", "axis"])
    # a power law through both points: halfway in log loss is halfway in log compute, sqrt(64 * 100) = 80
    for axis in compute_saved.AXES:
        assert table.loc[("staged", axis)].saving == pytest.approx(20.0)
    assert table.loc[("small", "flops")].spent == math.inf
    samples, note = compute_saved.claimed_savings(ends)
    assert samples == pytest.approx([20.0]) and "in 1 of 1" in note and "never gets there in 1" in note
    assert "in seconds of steps timed in turn 20.0" in note
    counted = compute_saved.claimed_savings(ends.drop(columns="seconds"))
    assert counted[0] == samples and "seconds" not in counted[1]


SCRATCH, STAGED = [(100.0, 2.0)], [(64.0, 2.5), (100.0, 1.6)]


@pytest.mark.parametrize(
    ("staged_points", "small", "sample", "words"),
    [
        (STAGED, [(50.0, 2.2), (70.0, 1.9)], "against small", "in 0 of 1 seeds"),
        (STAGED, [(90.0, 1.9)], 0.0, "in 0 of 1 seeds"),  # how much less small would need is not known
        (STAGED, [(50.0, 2.5), (99.0, 1.99)], 20.0, "in 1 of 1 seeds"),
        ([(64.0, 2.5), (96.0, 2.1)], [(99.0, 2.05)], 0.0, "not reached in 1"),
        ([(64.0, 2.5), (120.0, 2.1)], [(99.0, 2.05)], -20.0, "not reached in 1"),
    ],
)
def test_what_a_seed_counts_where_growing_does_not_pay(staged_points, small, sample, words):
    ends = pd.concat(
        [frontier("scratch", 0, SCRATCH), frontier("staged", 0, staged_points), frontier("small", 0, small)]
    )
    samples, note = compute_saved.claimed_savings(ends)
    if sample == "against small":
        spent = compute_saved.compute_to_loss(ends[ends.method == "staged"], 2.0)
        sample = 100 * (1 - spent / compute_saved.compute_to_loss(ends[ends.method == "small"], 2.0))
        assert sample < 0
    assert samples == pytest.approx([sample]) and words in note


def test_the_cheapest_smaller_model_is_the_one_to_beat():
    ends = pd.concat(
        [
            frontier("scratch", 0, [(100.0, 2.0)]),
            frontier("staged", 0, [(64.0, 2.5), (100.0, 1.6)]),
            frontier("small", 0, [(100.0, 2.1)]),
            frontier("once", 0, [(50.0, 2.2), (70.0, 1.9)]),
        ]
    )
    assert not compute_saved.pays(ends).pays.any()
    assert compute_saved.pays(ends[ends.method != "once"]).pays.all()


def test_savings_at_a_smaller_horizon():
    ends = pd.concat([frontier("scratch", 0, [(50.0, 3.0), (100.0, 2.0)]), frontier("staged", 0, [(40.0, 3.0)])])
    table = compute_saved.savings(ends, horizon=50.0)
    assert table[table.axis == "flops"].saving.item() == pytest.approx(20.0)
    small = frontier("small", 0, [(30.0, 3.5), (60.0, 2.9)])
    assert compute_saved.claimed_savings(pd.concat([ends, small]), horizon=50.0)[0] == pytest.approx([20.0])


def test_savings_over_the_horizon():
    exponent = math.log(3 / 2) / math.log(2)  # of a power law through both of scratch's points
    points = [(x, 2 * (x / 80) ** -exponent) for x in (50.0, 64.0, 72.0)]  # four fifths of scratch's compute
    ends = pd.concat([frontier("scratch", 0, [(50.0, 3.0), (100.0, 2.0)]), frontier("staged", 0, points)])
    table = comparisons.by_horizon(ends, count=5)
    assert table.horizon.tolist() == pytest.approx([50 * 2 ** (i / 4) for i in range(5)])
    assert table.at_least.tolist() == [True, True, False, False, False]
    assert table.saving[2:].tolist() == pytest.approx([20.0, 20.0, -math.inf])
    figure = run_figures.draw_horizons(table, 20.0, "talk", 70.0)
    drawn = {line.get_label(): line for line in figure.axes[0].lines}
    assert drawn["staged"].get_xdata() == pytest.approx([50 * 2**0.5, 50 * 2**0.75])
    assert drawn["published: talk"].get_ydata() == [20.0]


@settings(max_examples=60, deadline=None)
@given(clock=st.lists(st.floats(0.0, 1e4), min_size=6, max_size=6), order=st.permutations(range(6)))
def test_seconds_that_are_out_of_order_are_fitted(clock, order):
    ends = pd.concat(
        [
            frontier("scratch", 0, [(50.0, 3.0), (100.0, 2.0)]),
            frontier("staged", 0, [(40.0, 2.9), (64.0, 2.5), (90.0, 1.8)]),
            frontier("small", 0, [(100.0, 2.1)]),
        ]
    )
    jittered = ends.assign(seconds=clock)
    table = compute_saved.savings(jittered).set_index(["method", "axis"])
    exact = compute_saved.savings(ends).set_index(["method", "axis"])
    for axis in ("flops", "flops_full"):
        assert table.loc[("staged", axis)].spent == exact.loc[("staged", axis)].spent
    own = jittered[jittered.method == "staged"].seconds
    assert own.min() <= table.loc[("staged", "seconds")].spent <= own.max()
    assert compute_saved.claimed_savings(jittered)[0] == compute_saved.claimed_savings(ends)[0]
    assert compute_saved.pays(jittered)[lambda t: t.axis == "flops"].pays.all()


def test_a_method_already_better_at_its_smallest_budget_is_charged_all_of_it():
    assert compute_saved.compute_to_loss(frontier("x", 0, [(60.0, 1.5), (80.0, 1.2)]), 2.0) == 60.0


def law(step: np.ndarray, speed: float = 1.0) -> np.ndarray:
    return 4 * (speed * step) ** -0.3


def walk(method: str, phase: np.ndarray, steps: np.ndarray, losses: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"method": method, "seed": 0, "phase": phase, "step": steps, "validation_loss": losses})


@pytest.mark.parametrize("speed", [0.5, 1.0, 2.0])
def test_the_slope_ratio_is_the_speed_of_the_grown_model(speed):
    steps = np.arange(10, 1010, 10)
    scratch = walk("scratch", np.zeros(100, int), steps, law(steps))
    entry, small_steps = 200.0, 300
    small = walk("staged", np.zeros(1, int), np.array([small_steps]), law(np.array([entry])))
    after = np.arange(0, 400, 10)
    grown = walk("staged", np.ones(40, int), small_steps + after, law(entry + speed * after))
    ratios = compute_saved.slope_ratios(pd.concat([scratch, small, grown]), steps=200)
    assert ratios.after_recovery.item() == pytest.approx(speed, rel=0.01)
    assert ratios.ratio.item() == pytest.approx(speed, rel=0.05)


def test_the_ratio_starts_at_the_small_models_loss_however_rare_the_evaluations():
    steps = np.arange(10, 1010, 10)
    scratch = walk("scratch", np.zeros(100, int), steps, law(steps))
    small = walk("staged", np.zeros(1, int), np.array([300]), law(np.array([200.0])))
    after = np.arange(0, 600, 100)  # the first evaluation is already far below
    grown = walk("staged", np.ones(6, int), 300 + after, law(200.0 + after))
    row = compute_saved.slope_ratios(pd.concat([scratch, small, grown]), steps=300).iloc[0]
    assert row.upper == pytest.approx(float(law(np.array([200.0]))[0])) and row.ratio == pytest.approx(1.0, rel=0.02)


def test_the_bump_after_growth_counts_in_the_ratio_from_growth():
    steps = np.arange(10, 1010, 10)
    scratch = walk("scratch", np.zeros(100, int), steps, law(steps))
    small = walk("staged", np.zeros(1, int), np.array([300]), law(np.array([200.0])))
    after = np.arange(0, 500, 10)
    losses = np.where(after < 100, law(np.array([200.0])) + 0.1 * (after > 0), law(200.0 + np.maximum(after - 100, 0)))
    grown = walk("staged", np.ones(50, int), 300 + after, losses)
    row = compute_saved.slope_ratios(pd.concat([scratch, small, grown]), steps=200).iloc[0]
    assert row.recovery == pytest.approx(100, abs=10) and row.after_recovery == pytest.approx(1.0, rel=0.05)
    assert row.ratio == pytest.approx(200 / 300, rel=0.05)


def model(layers: int = 2, dtype: torch.dtype = torch.float64) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_positions=16, n_layer=layers, n_embd=16, n_head=2, bos_token_id=0, eos_token_id=0,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    made = GPT2LMHeadModel(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize(("operator", "exact"), [("hypercloning", True), ("lemon", True), ("bert2bert", False)])
def test_what_other_operators_keep(operator, exact):
    small, ids = model(), torch.arange(32).view(2, 16)
    grown = other_operators.widened(operator, small, 2)
    with torch.no_grad():
        difference = float((grown(ids).logits - small(ids).logits).abs().max())
    assert (difference < 1e-10) if exact else (difference > 1e-3)
    weight = grown.transformer.h[0].mlp.c_fc.weight
    blocks = weight.view(2, 16, 2, -1)
    swapped = blocks.flip(0, 2)
    assert not torch.equal(blocks, swapped)  # exchanging the halves is no symmetry
    assert (blocks.abs().amax((1, 3)) > 0).all()  # and they read each other


def test_bert2bert_takes_the_second_half_from_the_layer_above():
    small = model()
    grown = other_operators.widened("bert2bert", small, 2)
    own, above = (small.transformer.h[layer].attn.c_attn for layer in (0, 1))
    mixed = grown.transformer.h[0].attn.c_attn
    assert torch.equal(mixed.bias.view(3, 2, -1)[:, 0], own.bias.view(3, -1))
    assert torch.equal(mixed.bias.view(3, 2, -1)[:, 1], above.bias.view(3, -1))
    parts = mixed.weight.view(2, 16, 3, 2, 16)  # input copy, input, part, output copy, output
    for copy in parts:
        assert torch.equal(copy[:, :, 0], own.weight.view(16, 3, 16) / 2)
        assert torch.equal(copy[:, :, 1], above.weight.view(16, 3, 16) / 2)
    last = grown.transformer.h[1].attn.c_attn.bias.view(3, 2, -1)
    assert torch.equal(last[:, 0], above.bias.view(3, -1)) and torch.equal(last[:, 1], above.bias.view(3, -1))


@pytest.mark.parametrize(("operator", "relative"), [("lemon", False), ("hypercloning", True)])
def test_random_blocks_sum_to_the_small_matrix(operator, relative):
    small = model()
    weight = small.transformer.h[0].mlp.c_fc.weight
    copies = other_operators.widened(operator, small, 2).transformer.h[0].mlp.c_fc.weight.view(2, 16, 2, 64)
    assert torch.allclose(copies.sum(0), weight[:, None].expand(-1, 2, -1))
    noise = copies - weight[:, None] / 2
    block = staged.grow(small, width=2, noise=0.0).model.transformer.h[0].mlp.c_fc.weight.std()
    expected = other_operators.NOISE * block if relative else small.config.initializer_range
    assert float(noise.detach().std()) == pytest.approx(float(torch.as_tensor(expected).detach()) * 0.5**0.5, rel=0.1)


def test_an_operator_of_width_refuses_depth(setting):
    with pytest.raises(InvalidInput, match="lemon grows in width alone"):
        other_operators.grow_state("lemon", None, 1, 2, None)
    with pytest.raises(InvalidInput, match="choices: stack"):
        other_operators.grow_state("net2net", None, 2, 1, None)


def test_other_operators_are_charged_and_measured_like_ours(setting, monkeypatch):
    monkeypatch.setattr(runs.pool, "cores", lambda: 1)
    wide = Method("", ((2, 8), (2, 16)), (5e-3, 5e-3), (10,))
    deep = Method("", ((1, 16), (2, 16)), (5e-3, 5e-3), (10,))
    large = each((2, 16), setting, 1)
    budgets = [40 * large, 60 * large]
    scratch = runs.run_methods([(Method("scratch", ((2, 16),), (5e-3,)), budgets)], [0], setting)
    seen, run = [], runs.run_methods
    monkeypatch.setattr(comparisons, "run_methods", lambda *given: seen.append(run(*given)) or seen[-1])
    table, tuned = comparisons.compare_operators(
        wide, deep, [1e-3, 5e-3], (budgets[0], 9), budgets, scratch, None, [0], setting
    )
    assert list(table.method) == ["ours (width)", "ours (depth)", *other_operators.OTHER_OPERATORS]
    assert tuned.groupby("method").rate.apply(sorted).tolist() == [[1e-3, 5e-3]] * 6
    assert table.set_index("method").rate.to_dict() == tuned[tuned.best].set_index("method").rate.to_dict()
    assert set(seen[0].ends.seed) == {9} and set(seen[1].ends.seed) == {0}
    jump = table.set_index("method").jump
    for exact in ("ours (width)", "ours (depth)", "hypercloning", "lemon"):
        assert abs(jump[exact]) < 1e-4
    assert abs(jump["stack"]) > 1e-4 and abs(jump["bert2bert"]) > 1e-4
    for row in seen[1].ends.itertuples():
        small = (1, 16) if row.method in ("ours (depth)", "stack") else (2, 8)
        assert row.flops == 10 * each(small, setting, 1) + (row.steps - 10) * large
    figure = run_figures.draw_operators(table.assign(saving=[1.0, 2, 3, 4, 5, -math.inf]))
    assert any(text.get_text() == "loss not reached" for text in figure.axes[1].texts)


def test_the_map_holds_every_path_with_its_small_model(setting, monkeypatch):
    monkeypatch.setattr(runs.pool, "cores", lambda: 1)
    budgets = [60 * each((2, 16), setting, 1), 90 * each((2, 16), setting, 1)]
    scratch = runs.run_methods([(Method("scratch", ((2, 16),), (5e-3,)), budgets)], [0], setting)
    points = [
        ["width", [[2, 8], [2, 16]], [20], [5e-3]],
        ["three stages", [[1, 8], [1, 16], [2, 16]], [10, 10], [5e-3, 5e-3]],
    ]
    table = comparisons.by_growth_point(points, scratch, 5e-3, {"staged": budgets, "small": budgets[:1]}, [0], setting)
    assert list(table.kind) == ["width", "three stages"] * 2 and list(table.steps) == ["20", "10+10"] * 2
    assert list(table.path[:2]) == ["2x8 to 2x16", "1x8 to 1x16 to 2x16"]
    assert table.horizon.tolist() == [budgets[0]] * 2 + [budgets[1]] * 2
    spent = 20 * each((2, 8), setting, 1), 10 * each((1, 8), setting, 1) + 10 * each((1, 16), setting, 1)
    assert table.slope.isna().all()  # too few evaluations here
    reference = scratch.ends.flops.tolist()
    assert table.share.tolist() == pytest.approx([flops / whole for whole in reference for flops in spent])
    figure = run_figures.draw_growth_points(
        table.assign(saving=[5.0, -math.inf, 6.0, 7.0], at_least=False), 20.0, "talk"
    )
    drawn = [line for line in figure.axes[-1].lines if line.get_label() == "published: talk"]
    assert drawn[0].get_ydata() == [20.0] and len(figure.axes) == 2
    reached = table.assign(saving=8.0, at_least=False)
    missed = run_figures.draw_growth_points(
        pd.concat([reached, reached.assign(saving=-math.inf), reached]), 20.0, "talk"
    )
    means = [line.get_ydata() for line in missed.axes[0].lines if line.get_markersize() == 9 and len(line.get_ydata())]
    assert means and all(value == -6.0 for values in means for value in values)  # neither 8 nor in between
    assert "loss missed for a seed" in [line.get_label() for line in missed.axes[0].lines]
    mostly_bounds = table.assign(saving=5.0, at_least=[True, True, True, False])
    assert len(run_figures.draw_growth_points(mostly_bounds, 20.0, "talk").axes) == 1


def test_the_slope_at_growth_is_that_of_the_stage_before_it():
    first, second = np.arange(1, 11) * 10.0, np.arange(0, 31) * 10.0
    own = pd.concat(
        [
            walk("x", np.zeros(10, int), first, 4 * first**-0.5).assign(flops=first),
            walk("x", np.ones(31, int), second, 3 * (second + 1e-9) ** -0.2).assign(flops=100 + second),
            walk("x", np.full(2, 2), first[:2], np.ones(2)).assign(flops=400 + first[:2]),
        ]
    )
    assert comparisons.slope_at_growth(own) == pytest.approx(-0.2, abs=1e-3)
    assert comparisons.slope_at_growth(own[own.phase < 2]) == pytest.approx(-0.5, abs=1e-3)
    assert math.isnan(comparisons.slope_at_growth(own[(own.phase != 1) | (own.step < 30)]))


def test_perplexity_is_exp_of_the_mean_loss():
    small = model(dtype=torch.float32)
    ids = torch.randint(40, (65,), generator=torch.Generator().manual_seed(1))
    windows = torch.stack([ids[i : i + 9] for i in range(0, 64, 8)])
    with torch.no_grad():
        logits = small(windows[:, :-1]).logits
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp()
    assert evaluation.perplexity(small, ids, 8, rows=3) == pytest.approx(float(plain), rel=1e-5)


def test_last_words_are_judged_whole():
    coder = tokens.train("character", ["abcd \n"])

    class Parrot(torch.nn.Module):
        """Says the next letter of the alphabet, whatever stands before."""

        config = GPT2Config(n_positions=16, vocab_size=coder.vocab_size)
        device = torch.device("cpu")

        def forward(self, input_ids):
            following = {coder.encode(a)[0]: coder.encode(b)[0] for a, b in zip("abc ", "bcda", strict=True)}
            logits = torch.zeros(*input_ids.shape, coder.vocab_size)
            for position, token in enumerate(input_ids[0].tolist()):
                logits[0, position, following.get(token, coder.encode(" ")[0])] = 5.0
            return type("Output", (), {"logits": logits})

    examples = [corpus.LambadaExample("abcd", "abc"), corpus.LambadaExample("abcd", "abb")]
    found = evaluation.last_words(Parrot(), examples, coder)
    assert found["lambada_accuracy"] == 0.5 and found["lambada_perplexity"] > 1
