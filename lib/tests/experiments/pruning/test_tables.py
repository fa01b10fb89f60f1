"""Samples of the claims and the table of times, from a sweep whose numbers are known."""

import pandas as pd
import pytest
from helpers.planted import sweep_frame

from effnn.experiments.pruning import tables
from effnn.report import claims, published


def test_the_claims_are_answered_by_paired_differences():
    found = tables.claim_samples(sweep_frame(), "bert", 0)
    assert found["ltp.time"] == pytest.approx([30, 30.5, 31])
    assert found["ltp.tradeoff"] == pytest.approx([1, 0, -1])
    assert found["ltp.half"] == pytest.approx([2, 1, 0])
    assert found["ltp.stages"] == pytest.approx([1, 1, 1])
    known = {claim.id for claim in claims.rows()}
    assert set(found) <= known
    assert "ltp.half" not in tables.claim_samples(sweep_frame().query("budget == 0.6"), "bert", 0)


def test_extra_budgets_of_one_checkpoint_do_not_enter_the_paired_differences():
    extra = sweep_frame().query("seed == 0 and budget == 0.5").assign(budget=0.2, accuracy=0.1)
    both = pd.concat([sweep_frame(), extra])
    assert (
        tables.claim_samples(both, "bert", 0)["ltp.stages"]
        == tables.claim_samples(sweep_frame(), "bert", 0)["ltp.stages"]
    )


def test_the_time_table_sets_the_talks_rows_above_ours():
    talk = published.load("talk")
    talk = talk[talk.source.str.contains("LTP results slide (table)", regex=False)]
    table = tables.time_table(sweep_frame(), talk, 2)
    assert table.source.tolist() == ["talk"] * 4 + ["measured here"] * 2
    assert table.seconds.tolist()[-2:] == pytest.approx([2.0, 61.0])
    row = table[table.method == "DynaBERT"].iloc[0]
    assert row.hours == float(talk[(talk.method == "DynaBERT") & (talk.unit == "hours")].value.iloc[0])


def test_notes_say_what_was_measured():
    talk = published.load("talk")
    talk = talk[talk.source.str.contains("LTP results slide (table)", regex=False)]
    times = tables.time_table(sweep_frame(), talk, 1)
    assert tables.epoch_note(times) == "one epoch of retraining takes 30.5 times as long as pruning"
    assert "no retraining" in tables.epoch_note(times[times.epochs == 0])
