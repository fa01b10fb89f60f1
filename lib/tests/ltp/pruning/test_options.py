"""Options out of their range are refused by name before a batch is read, and budgets as soon as they are known."""

import pytest
import torch
from helpers.encoders import FAMILIES, FILTERS, HEADS, build, rows_of

from effnn import ltp
from effnn.base import InvalidInput
from effnn.ltp.pruning.options import check_floating

MACS, LATENCY = ltp.Macs(0.5), ltp.Latency(0.5, batch=2, seq_len=6, repeats=1)


def table_of(model, rest=0.2):
    shape = ltp.Shape.of(model)
    return ltp.LatencyTable.from_values(range(shape.heads + 1), range(shape.filters + 1), rest)


class Loader:
    """Counts the batches that are read."""

    def __init__(self, batch):
        self.batch, self.read = batch, 0

    def __iter__(self):
        for batch in rows_of(self.batch, 3):
            self.read += 1
            yield batch


WRONG = [
    (MACS, {"solver": "qr"}, 'solver=\'qr\': expected "ridge" or "lsmr"'),
    (MACS, {"fisher": "row"}, 'fisher=\'row\': expected "batch" or "sample"'),
    (MACS, {"labels": "own"}, 'labels=\'own\': expected "data" or "model"'),
    (MACS, {"holdout": "a"}, "holdout='a': expected a share"),
    (MACS, {"holdout": 1.0}, "holdout=1.0: expected a share"),
    (MACS, {"holdout": float("nan")}, "holdout=nan: expected a share"),
    (MACS, {"seed": "a"}, "seed='a': expected a whole number"),
    (MACS, {"seed": 1.5}, "seed=1.5: expected a whole number"),
    (MACS, {"round_to": 1.5}, f"round_to=1.5: expected a whole number from 1 to {FILTERS}, the filters"),
    (MACS, {"round_to": 0}, "round_to=0: expected"),
    (MACS, {"round_to": FILTERS + 1}, f"round_to={FILTERS + 1}: expected"),
    (MACS, {"offload": torch.int8}, "offload=torch.int8: expected None or a floating dtype of at least 16 bits"),
    (MACS, {"offload": torch.float8_e4m3fn}, "offload=torch.float8_e4m3fn: expected None or a floating dtype"),
    (MACS, {"offload": "bf16"}, "offload='bf16': expected None or a floating dtype"),
    (MACS, {"autocast": torch.int32}, "autocast=torch.int32: expected None or a floating dtype"),
    (MACS, {"autocast": True}, "autocast=True: expected None or a floating dtype"),
    (LATENCY, {"table": "cpu.json"}, "table='cpu.json': expected None or an effnn.ltp.LatencyTable"),
    (ltp.Macs(0.5, min_heads=HEADS + 1), {}, f"min_heads={HEADS + 1}: expected .* from 0 to {HEADS}, the heads"),
    (ltp.Latency(0.5, min_filters=FILTERS + 1), {}, f"min_filters={FILTERS + 1}: expected .* from 0 to {FILTERS}"),
    (ltp.Macs(0.2, seq_len=8, min_heads=3, min_filters=36), {}, "smallest feasible ratio is 0.7500"),
]


@pytest.mark.parametrize(("target", "options", "message"), WRONG)
def test_no_batch_is_read_under_a_wrong_option(target, options, message):
    model, batch = FAMILIES["bert"]()
    loader = Loader(batch)
    with pytest.raises(InvalidInput, match=message):
        ltp.prune(model, loader, target, progress=False, **options)
    assert loader.read == 0


@pytest.mark.parametrize("kind", [ltp.Macs, ltp.Latency])
@pytest.mark.parametrize(
    "wrong", [{"ratio": "0.5"}, {"ratio": True}, {"ratio": float("nan")}, {"min_heads": 1.5}, {"min_filters": "1"},
              {"seq_len": float("inf")}]
)  # fmt: skip
def test_a_target_of_another_type_is_refused(kind, wrong):
    with pytest.raises(InvalidInput, match=f"{next(iter(wrong))}=.*expected"):
        kind(**{"ratio": 0.5} | wrong)


def test_a_dtype_too_narrow_to_measure_in_is_refused():
    with pytest.raises(InvalidInput, match="Latency.dtype=.*at least 16 bits"):
        ltp.Latency(0.5, dtype="float8_e4m3fn")
    with pytest.raises(InvalidInput, match="Latency.dtype='bf16'"):
        ltp.Latency(0.5, dtype="bf16")
    for dtype in (None, torch.bfloat16, torch.float16, torch.float32, torch.float64):
        check_floating("offload", dtype)


def test_steps_called_alone_check_their_own_options():
    model, batch = FAMILIES["bert"]()
    for options in ({"offload": torch.int8}, {"autocast": "bf16"}, {"fisher": 1}, {"holdout": -0.1}):
        with pytest.raises(InvalidInput, match=f"{next(iter(options))}=.*expected"):
            ltp.calibrate(model, [batch], **options)
    masks = ltp.Masks.ones(ltp.Shape.of(model))
    for options in ({"solver": None}, {"offload": torch.uint8}, {"autocast": 16}):
        inputs = ltp.calibrate(model, [batch]).inputs
        with pytest.raises(InvalidInput, match=f"{next(iter(options))}=.*expected"):
            ltp.tune_masks(model, inputs, masks, masks, **options)


def test_a_given_table_is_checked_before_a_batch_is_read():
    model, batch = FAMILIES["bert"]()
    loader, other = Loader(batch), build("bert", num_attention_heads=2)[0]
    with pytest.raises(InvalidInput, match="a model with heads=2, this model has 4"):
        ltp.prune(model, loader, LATENCY, table=table_of(other), progress=False)
    with pytest.raises(ltp.BudgetTooSmall, match="smallest feasible ratio is"):
        ltp.prune(model, loader, ltp.Latency(0.05), table=table_of(model, rest=1e3), progress=False)
    assert loader.read == 0


def test_a_budget_below_a_measured_table_is_refused_before_the_calibration(monkeypatch):
    model, batch = FAMILIES["bert"]()
    loader = Loader(batch)
    monkeypatch.setattr(ltp.LatencyTable, "measure", lambda *_, **__: table_of(model, rest=1e3))
    with pytest.raises(ltp.BudgetTooSmall, match="smallest feasible ratio is"):
        ltp.prune(model, loader, ltp.Latency(0.05), progress=False)
    assert loader.read == 1  # which is checked before a table is measured
