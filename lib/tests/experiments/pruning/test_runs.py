"""What notebook 01 runs: baselines, samples of the claims, tables and figures, and the benchmark runner."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.encoders import build
from helpers.planted import TINY, planted_task

from effnn import ltp, paths
from effnn.base import InvalidInput
from effnn.experiments import bench
from effnn.experiments.pruning import bench as bench_ltp
from effnn.experiments.pruning import figures as pruning_figures
from effnn.experiments.pruning import runs as pruning
from effnn.experiments.shared import training
from effnn.experiments.shared.classifier import ClassifierConfig, train_classifier
from effnn.experiments.shared.measured import Measured
from effnn.report import claims, published


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.9])
def test_the_competitors_keep_the_budget_and_the_same_share_of_every_layer(budget):
    model, _ = build("bert")
    cost = ltp.MacCost(ltp.Shape.of(model), 13.0)
    found = pruning.baselines(model, cost, budget, seed=0)
    assert set(found) == {"magnitude", "random"}
    for masks in found.values():
        assert budget - 0.15 < cost.ratio(masks) <= budget
        assert len(set(masks.heads_per_layer)) == len(set(masks.filters_per_layer)) == 1
    assert not torch.equal(found["magnitude"].filters, found["random"].filters)
    again, other = (pruning.baselines(model, cost, budget, seed) for seed in (0, 1))
    assert torch.equal(again["random"].filters, found["random"].filters)
    assert torch.equal(again["magnitude"].filters, other["magnitude"].filters)


def test_magnitude_prunes_the_smallest_weights():
    model, _ = build("bert")
    parts = [ltp.adapter_for(model).parts(layer) for layer in ltp.adapter_for(model).layers(model)]
    with torch.no_grad():
        for part in parts:
            part.fc1.weight[5] = 0
            part.value.weight[: part.head_size] *= 1e-3
            part.out.weight[:, : part.head_size] *= 1e-3
    masks = pruning.baselines(model, ltp.MacCost(ltp.Shape.of(model), 13.0), 0.8, seed=0)["magnitude"]
    assert not masks.filters[:, 5].any() and not masks.heads[:, 0].any()


def test_jobs_cover_every_checkpoint_and_draws_only_at_the_extra_budgets():
    configs = [ClassifierConfig(family=f, seed=s) for f in ("bert", "electra") for s in (0, 1, 2)]
    listed = pruning.jobs(configs, [0.4, 0.6], [0.2, 0.4], [7, 8])
    assert len(listed) == len(set(listed)) == 2 * 6 + 1 * 2 * 2
    assert {(b, s) for c, b, s in listed if c == configs[1]} == {(0.4, 7), (0.6, 7)}
    assert {(b, s) for c, b, s in listed if c == configs[3]} == {(0.4, 7), (0.6, 7), (0.2, 7), (0.2, 8)}


def sweep_frame():
    """Three seeds, two budgets, with differences that are known."""
    rows = []
    for seed in range(3):
        for budget in (0.5, 0.6):
            accuracy = {
                "search": 0.70,
                "rearrange": 0.71,
                "tune": 0.73 + 0.01 * seed,
                "retrain": 0.74,
                "magnitude": 0.6,
                "random": 0.4,
            }
            for method, value in accuracy.items():
                if method == "retrain" and budget == 0.5:
                    continue
                times = {"seconds": 60.0 + seed, "prune_seconds": 2.0, "load": 1.0 + seed}
                times = times if method == "retrain" else dict.fromkeys(times, np.nan)
                rows.append(
                    {"family": "bert", "seed": seed, "calibration_seed": 0, "budget": budget, "method": method,
                     "accuracy": value, "loss": 1.0, "dense_accuracy": 0.75, "mac_ratio": budget,
                     "accepted": 3, "gain": 0.4, "trial": 0} | times
                )  # fmt: skip
    return pd.DataFrame(rows)


def test_the_claims_are_answered_by_paired_differences():
    found = pruning.claim_samples(sweep_frame(), "bert", 0)
    assert found["ltp.time"] == pytest.approx([30, 30.5, 31])
    assert found["ltp.tradeoff"] == pytest.approx([1, 0, -1])
    assert found["ltp.half"] == pytest.approx([2, 1, 0])
    assert found["ltp.stages"] == pytest.approx([1, 1, 1])
    known = {claim.id for claim in claims.rows()}
    assert set(found) <= known
    assert "ltp.half" not in pruning.claim_samples(sweep_frame().query("budget == 0.6"), "bert", 0)


def test_extra_budgets_of_one_checkpoint_do_not_enter_the_paired_differences():
    extra = sweep_frame().query("seed == 0 and budget == 0.5").assign(budget=0.2, accuracy=0.1)
    both = pd.concat([sweep_frame(), extra])
    assert (
        pruning.claim_samples(both, "bert", 0)["ltp.stages"]
        == pruning.claim_samples(sweep_frame(), "bert", 0)["ltp.stages"]
    )


def test_other_tasks_may_not_replace_the_built_in_results():
    pruning.check_profile("laptop", "docstrings"), pruning.check_profile("sst2", "sst2")
    with pytest.raises(InvalidInput, match="PROFILE=sst2"):
        pruning.check_profile("laptop", "sst2")


def test_the_time_table_sets_the_talks_rows_above_ours():
    talk = published.load("talk")
    talk = talk[talk.source.str.contains("LTP results slide (table)", regex=False)]
    table = pruning.time_table(sweep_frame(), talk, 2)
    assert table.source.tolist() == ["talk"] * 4 + ["measured here"] * 2
    assert table.seconds.tolist()[-2:] == pytest.approx([2.0, 61.0])
    row = table[table.method == "DynaBERT"].iloc[0]
    assert row.hours == float(talk[(talk.method == "DynaBERT") & (talk.unit == "hours")].value.iloc[0])


def test_published_bounds_come_from_the_file():
    bounds = pruning_figures.published_bounds(published.load("ltp"))
    assert len(bounds) == 2
    kwon = bounds[bounds.label.str.startswith("Kwon")].iloc[0]
    assert (kwon.macs_percent, kwon.points_lost) == (50, 1)


def test_figures_show_the_numbers_they_are_given():
    frame = sweep_frame()
    ax = pruning_figures.draw_tradeoff(frame, {"bag of words": 0.8}).axes[0]
    lines = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_allclose(lines["post-training pruning"].get_ydata(), [74, 74])
    np.testing.assert_allclose(lines["post-training pruning"].get_xdata(), [50, 60])
    assert lines["bag of words (80.0)"].get_ydata()[0] == pytest.approx(80)
    bounds = pruning_figures.published_bounds(published.load("ltp"))
    drawn = pruning_figures.draw_published_points(frame, bounds).axes[0]
    assert any("published" in line.get_label() and line.get_marker() == "D" for line in drawn.get_lines())
    gains = {line.get_label(): line for line in pruning_figures.draw_stages(frame).axes[0].get_lines()}
    np.testing.assert_allclose(gains["tuning"].get_ydata(), [3, 3])


def test_the_mask_picture_holds_every_unit():
    generator = torch.Generator().manual_seed(0)
    masks = ltp.Masks(
        (torch.rand(3, 4, generator=generator) < 0.5).float(), torch.rand(3, 20, generator=generator).round()
    )
    figure = pruning_figures.draw_pipeline({"search": masks, "tune": masks}, 0.4)
    shown = [np.ma.filled(ax.get_images()[0].get_array(), 0) for ax in figure.axes[:6]]
    np.testing.assert_array_equal(shown[1], masks.heads.numpy())
    np.testing.assert_array_equal(shown[4].sum(1), masks.filters.sum(1).numpy())


def test_latency_curves_are_ratios_to_the_dense_model():
    model, _ = build("bert")
    trained = type("Trained", (), {"model": model})
    masks = {0.5: ltp.Masks(torch.ones(3, 4), (torch.arange(48) < 12).float().repeat(3, 1))}
    curves = pruning.latency_curves(trained, masks, 2, 13, rounds=3)
    row = curves.iloc[0]
    assert row.masked_low <= row.masked <= row.masked_high and row.shrunk > 0 and row.speedup > 0
    assert row.mac_ratio == pytest.approx(ltp.MacCost(ltp.Shape.of(model), 13.0).ratio(masks[0.5]))


class TestSweep:
    """A planted task and a tiny model through the whole experiment."""

    SWEEP = pruning.Sweep(rows=64, batch=16, trials=2, retrain_budgets=(0.6,), retrain_epochs=1)

    TASK, CONFIG = planted_task(400), ClassifierConfig(**TINY | {"layers": 2})

    @pytest.fixture(scope="class")
    def trained_cache(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("trained")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paths, "CACHE", folder)
            train_classifier(self.TASK, self.CONFIG)
        return folder

    @pytest.fixture
    def start(self, trained_cache, tmp_path, monkeypatch):
        monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
        shutil.copytree(trained_cache, paths.CACHE)
        return self.TASK, self.CONFIG, train_classifier(self.TASK, self.CONFIG)

    @pytest.fixture
    def reads(self, monkeypatch):
        """Splits that a model was evaluated on, by their number of rows, in order; and what was fine-tuned."""
        seen, evaluate, fine_tune = [], pruning.evaluate, pruning.fine_tune

        def watched(model, batches):
            seen.append(len(batches.dataset))
            return evaluate(model, batches)

        def trained(model, rows, **options):
            seen.append(("fine_tune", model.config.model_type, options))
            return fine_tune(model, rows, **options)

        monkeypatch.setattr(pruning, "evaluate", watched)
        monkeypatch.setattr(pruning, "fine_tune", trained)
        return seen

    def test_choices_are_made_on_validation_and_dev_is_read_once_a_row(self, start, reads):
        task, config, trained = start
        frame = pruning.run_sweep(task, [(config, 0.6, 0)], self.SWEEP)
        assert sorted(frame.method) == ["magnitude", "random", "rearrange", "retrain", "search", "tune"]
        dev, validation = len(task.dev), len(task.validation)
        trained_with = [item[2] for item in reads if isinstance(item, tuple)]
        assert [options["learning_rate"] for options in trained_with] == list(pruning.RETRAIN_TRIALS[:2])
        read = [item for item in reads if not isinstance(item, tuple)]
        assert read[:2] == [validation, validation] and read[2:] == [dev] * 6
        row = frame.set_index("method")
        assert (frame.mac_ratio <= 0.6).all() and (frame.dense_accuracy == trained.accuracy).all()
        assert row.mac_ratio["retrain"] == row.mac_ratio["rearrange"]
        assert row.loc["retrain", ["seconds", "prune_seconds"]].min() > 0 and row.load["retrain"] >= 0
        # the same numbers, one by one
        tries = [pruning.prune_checkpoint(task, config, 0.6, 0, self.SWEEP, trial) for trial in (0, 1)]
        rows = pruning.encode_split(task.validation, trained.tokenizer, config.max_length)
        scores = [pruning._score(ltp.shrink(trained.model, one.stages["tune"]), rows) for one in tries]
        assert row.trial["tune"] == scores.index(max(scores))
        found = pruning.chosen(frame, task, config, 0.6, 0, self.SWEEP)
        assert torch.equal(found.stages["tune"].filters, tries[int(row.trial["tune"])].stages["tune"].filters)

    def test_pruning_and_retraining_are_timed_in_turn_and_the_training_is_the_same(self, start, monkeypatch):
        task, config, trained = start
        sweep = dataclasses.replace(self.SWEEP, trials=1, retrain_epochs=3)
        order, prune, run_epoch = [], ltp.prune, training.run_epoch
        monkeypatch.setattr(ltp, "prune", lambda *a, **k: (order.append("prune"), torch.rand(1), prune(*a, **k))[-1])
        monkeypatch.setattr(training, "run_epoch", lambda *a, **k: (order.append("epoch"), run_epoch(*a, **k))[-1])
        row = pruning.run_sweep(task, [(config, 0.6, 0)], sweep).set_index("method").loc["retrain"]
        assert order == ["prune", *["prune", "epoch"] * 3]  # the first is the pruning itself
        masks = pruning.prune_checkpoint(task, config, 0.6, 0, sweep).stages["rearrange"]
        rows = pruning.encode(task, trained.tokenizer, config.max_length)
        rate, seed = pruning.RETRAIN_TRIALS[0], config.seed
        alone = pruning.fine_tune(ltp.shrink(trained.model, masks), rows, epochs=3, learning_rate=rate, seed=seed)
        batches = pruning.loader(rows.dev, pruning.EVALUATION_BATCH)
        assert pruning.evaluate(alone.model, batches).loss == row.loss

    def test_what_the_sweep_pruned_is_not_pruned_again(self, start, monkeypatch):
        task, config, _ = start
        frame = pruning.run_sweep(task, [(config, 0.6, 0)], self.SWEEP)
        monkeypatch.setattr(ltp, "prune", None)
        for trial in (0, 1):
            later = frame.assign(trial=trial)
            assert pruning.chosen(later, task, config, 0.6, 0, self.SWEEP).report["rows"] == 64
        assert pruning.run_sweep(task, [(config, 0.6, 0)], self.SWEEP).equals(frame)

    def test_the_shrunk_and_the_saved_model_compute_what_the_masked_one_does(self, start):
        task, config, trained = start
        masks = pruning.prune_checkpoint(task, config, 0.4, 0, self.SWEEP).stages["tune"]
        found = pruning.check_identity(task, trained, masks)
        assert found["masked_shrunk"] < 1e-5 and found["loaded_shrunk"] == 0 and found["masked_dense"] > 1e-3

    def test_a_search_that_overspends_is_found_out(self, start, monkeypatch):
        task, _, trained = start
        shape = ltp.Shape.of(trained.model)
        table = ltp.LatencyTable.from_values(range(shape.heads + 1), range(shape.filters + 1), 1.0, batch=4, seq_len=8)
        kept = pruning.check_budgets(task, trained, self.SWEEP, table)
        assert len(kept) == 38 and kept.kept.all()
        monkeypatch.setattr(ltp, "search_macs", lambda *_: ltp.Masks.ones(shape))
        assert not pruning.check_budgets(task, trained, self.SWEEP, table).kept.all()

    def test_a_latency_budget_that_the_table_refuses_does_not_end_the_run(self, start, monkeypatch):
        task, _, trained = start
        shape = ltp.Shape.of(trained.model)
        table = ltp.LatencyTable.from_values(range(shape.heads + 1), range(shape.filters + 1), 50.0, batch=4, seq_len=8)
        monkeypatch.setattr(ltp.LatencyTable, "measure", lambda *_, **__: table)
        found, _ = pruning.latency_target(task, [trained], [0.1, 0.9], self.SWEEP, 4, 8, rounds=1)
        assert found.refused.tolist() == [True, False] and found.measured[0] == 1.0
        assert found.accuracy[0] == trained.accuracy and found.searches[1] >= 1
        samples, note = pruning.latency_kept(found)
        assert samples == [pytest.approx(max(10.0, found.measured[1] / 0.9))] and "1 of 2 refused" in note

    def test_numbers_of_tries_have_an_end(self):
        with pytest.raises(InvalidInput, match="1 to 3"):
            pruning.Sweep(trials=4)


def test_notes_say_what_was_measured():
    talk = published.load("talk")
    talk = talk[talk.source.str.contains("LTP results slide (table)", regex=False)]
    times = pruning.time_table(sweep_frame(), talk, 1)
    assert pruning.epoch_note(times) == "one epoch of retraining takes 30.5 times as long as pruning"
    assert "no retraining" in pruning.epoch_note(times[times.epochs == 0])


class TestBench:
    @pytest.fixture
    def fake(self, monkeypatch, tmp_path):
        monkeypatch.setattr(paths, "RESULTS", tmp_path)
        bars = tmp_path / "bars.csv"
        bars.write_text("key,bar,unit,meaning\nltp.prune_over_training_pass,<=1.35,ratio,x over y\n")
        monkeypatch.setattr(paths, "BENCH_BARS", bars)
        measured = Measured((1.4, 1.2, 1.3, 1.25, 1.35), (0.1,) * 5, {"a": (1.0,) * 5, "b": (1.0,) * 5}, 1)
        monkeypatch.setattr(bench, "BENCHMARKS", {"ltp.prune_over_training_pass": lambda: measured})
        return tmp_path / "bench.json"

    def test_the_median_is_judged_and_every_run_is_kept(self, fake):
        outcome = bench.run("ltp")[0]
        assert (outcome.median, outcome.met) == (1.3, True)
        entry = json.loads(fake.read_text())["ltp.prune_over_training_pass"]
        assert (entry["median"], entry["min"], entry["max"], entry["met"]) == (1.3, 1.2, 1.4, True)
        assert len(entry["runs"]) == len(entry["load"]) == 5 and entry["provenance"]["cpu"]

    def test_other_keys_results_stay(self, fake):
        fake.write_text(json.dumps({"comm.ccl_over_gloo_1mb": {"median": 0.5}}))
        bench.run("ltp")
        assert set(json.loads(fake.read_text())) == {"comm.ccl_over_gloo_1mb", "ltp.prune_over_training_pass"}

    def test_an_unknown_key_lists_the_keys(self):
        with pytest.raises(InvalidInput, match="parts are .*ltp"):
            bench.run("nothing")

    def test_every_measured_key_has_a_bar(self):
        assert set(bench_ltp.BENCHMARKS) <= set(bench.keys())
        assert set(bench_ltp.BENCHMARKS) == set(bench.keys("ltp"))

    def test_the_parts_of_the_memory_bound_add_up(self):
        model, batch = build("bert")
        found = bench_ltp.peak_memory(model, [batch] * 2)
        assert found["model_bytes"] == 4 * sum(p.numel() for p in model.parameters())
        assert found["states_bytes"] == 2 * 2 * batch["input_ids"].numel() * model.config.hidden_size * 4
