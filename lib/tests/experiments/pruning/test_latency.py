"""Latency curves and latency targets."""

import pytest
import torch
from helpers.encoders import build

from effnn import ltp
from effnn.experiments.pruning import latency, runs, tables

SWEEP = runs.Sweep(rows=64, batch=16, trials=2, retrain_budgets=(0.6,), retrain_epochs=1)


def test_latency_curves_are_ratios_to_the_dense_model():
    model, _ = build("bert")
    trained = type("Trained", (), {"model": model})
    masks = {0.5: ltp.Masks(torch.ones(3, 4), (torch.arange(48) < 12).float().repeat(3, 1))}
    curves = latency.latency_curves(trained, masks, latency.TimedBatch(2, 13, rounds=3))
    row = curves.iloc[0]
    assert row.masked_low <= row.masked <= row.masked_high and row.shrunk > 0 and row.speedup > 0
    assert row.mac_ratio == pytest.approx(ltp.MacCost(ltp.Shape.of(model), 13.0).ratio(masks[0.5]))


def test_a_latency_budget_that_the_table_refuses_does_not_end_the_run(start, monkeypatch):
    task, _, trained = start
    shape = ltp.Shape.of(trained.model)
    table = ltp.LatencyTable.from_values(range(shape.heads + 1), range(shape.filters + 1), 50.0, batch=4, seq_len=8)
    monkeypatch.setattr(ltp.LatencyTable, "measure", lambda *_, **__: table)
    found, _ = latency.latency_targets(task, [trained], [0.1, 0.9], SWEEP, latency.TimedBatch(4, 8, rounds=1))
    assert found.refused.tolist() == [True, False] and found.measured[0] == 1.0
    assert found.accuracy[0] == trained.accuracy and found.searches[1] >= 1
    samples, note = tables.latency_kept(found)
    assert samples == [pytest.approx(max(10.0, found.measured[1] / 0.9))] and "1 of 2 refused" in note
