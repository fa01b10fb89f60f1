"""The smaller model computes the same, and a search that overspends is found out."""

from effnn import ltp
from effnn.experiments.pruning import checks, runs

SWEEP = runs.Sweep(rows=64, batch=16, trials=2, retrain_budgets=(0.6,), retrain_epochs=1)


def test_the_shrunk_and_the_saved_model_compute_what_the_masked_one_does(start):
    task, config, trained = start
    masks = runs.prune_checkpoint(task, config, 0.4, 0, SWEEP).stages["tune"]
    found = checks.check_identity(task, trained, masks)
    assert found["masked_shrunk"] < 1e-5 and found["loaded_shrunk"] == 0 and found["masked_dense"] > 1e-3


def test_a_search_that_overspends_is_found_out(start, monkeypatch):
    task, _, trained = start
    shape = ltp.Shape.of(trained.model)
    table = ltp.LatencyTable.from_values(range(shape.heads + 1), range(shape.filters + 1), 1.0, batch=4, seq_len=8)
    kept = checks.check_budgets(task, trained, SWEEP, table)
    assert len(kept) == 38 and kept.kept.all()
    monkeypatch.setattr(ltp, "search_macs", lambda *_: ltp.Masks.ones(shape))
    assert not checks.check_budgets(task, trained, SWEEP, table).kept.all()
