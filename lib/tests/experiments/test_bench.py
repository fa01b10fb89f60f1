"""The benchmark runner: the median beside its bar, and the parts of the memory bound."""

import json

import pytest
from helpers.encoders import build

from effnn import paths
from effnn.base import InvalidInput
from effnn.experiments import bench
from effnn.experiments.pruning import bench as bench_ltp
from effnn.experiments.shared.measured import Measured


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
