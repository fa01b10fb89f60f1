"""The latency target in the end: fixed part, drift, corrections that converge, and clocks that cannot be relied on."""

import itertools
import logging
import random
import time

import pytest
import torch
from helpers.clocks import counting_clock
from helpers.encoders import FAMILIES, rows_of
from torch import nn

from effnn import ltp
from effnn.base import LEAST, InvalidInput, Timing
from effnn.ltp.pruning.latency import blocks as latency_blocks
from effnn.ltp.pruning.latency import measured_search
from effnn.ltp.pruning.latency import table as latency_table
from effnn.ltp.pruning.latency.measured_search import LARGEST_CORRECTION, TOLERANCE, measured_ratio, search_measured
from effnn.ltp.pruning.latency.search import Latency, LatencyTable
from effnn.ltp.pruning.masks import Masks, Shape

RATIOS = [0.8, 0.7, 0.6, 0.5]


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(
        logging.ERROR, logger="effnn.ltp.pruning.calibration.calibrate"
    )  # random models: of course they are near chance


def importances(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape.layers, shape.heads, generator=generator), torch.rand(
        shape.layers, shape.filters, generator=generator
    )


def linear_table(shape, rest=1.0):
    heads = [0.05 + 0.5 * count for count in range(shape.heads + 1)]
    return LatencyTable.from_values(heads, [0.05 + 0.04 * count for count in range(shape.filters + 1)], rest)


def measuring(monkeypatch, truth):
    """Models are not run: `truth(masks)` gives the share of the dense latency; returns the masks asked for."""
    asked = []

    def pair(model, masks, target):
        asked.append(masks)
        return {"dense": Timing("dense", (1.0,), (0.0,)), "pruned": Timing("pruned", (truth(masks),), (0.0,))}

    monkeypatch.setattr(measured_search, "measure_pair", pair)
    return asked


# --- the table --------------------------------------------------------------------------------------------------------


def slow_outside_the_layers(model, seconds, now):
    """Makes the embeddings take `seconds` on the counting clock; survives copies of the model."""

    class Slow(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __deepcopy__(self, memo):
            return Slow(self.inner)

        def forward(self, *args, **kwargs):
            now[0] += seconds
            return self.inner(*args, **kwargs)

    model.bert.embeddings = Slow(model.bert.embeddings)


def test_what_is_outside_the_layers_counts(monkeypatch):
    """A model that spends most of its time elsewhere has to lose more of its layers for the same share."""
    now = [0.0]

    def advance(module, inputs, output):
        if isinstance(module, nn.Linear):
            now[0] += 1e-6 * module.weight.numel() * inputs[0].shape[:-1].numel()

    handle = nn.modules.module.register_module_forward_hook(advance)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    try:
        kept = []
        for share in (0.0, 0.2):
            model, _ = FAMILIES["bert"]()
            target, shape = Latency(0.7, batch=2, seq_len=6, grid=12, repeats=2), Shape.of(model)
            plain = LatencyTable.measure(model, target, progress=False)
            seconds = share * plain.dense_ms / 1000
            slow_outside_the_layers(model, seconds, now)
            table = LatencyTable.measure(model, target, progress=False)
            assert table.rest_ms == pytest.approx(plain.rest_ms + 1000 * seconds)
            assert table.dense_ms == pytest.approx(plain.dense_ms + 1000 * seconds)
            masks = ltp.search_latency(*importances(shape), table, target)
            assert 0.6 < table.predict(masks) / table.dense_ms <= 0.7 * (1 + 1e-9)
            kept.append(table.predict(masks) - table.rest_ms)  # is left of the layers
        assert kept[1] < 0.95 * kept[0] * (table.dense_ms - table.rest_ms) / (plain.dense_ms - plain.rest_ms)
    finally:
        handle.remove()


def test_drift_cancels(monkeypatch):
    """A machine that becomes ten times slower in the course of the measurement gives the table of a steady one."""
    model, _ = FAMILIES["bert"]()
    target = Latency(0.5, batch=2, seq_len=6, grid=20, repeats=6)
    with counting_clock(monkeypatch):
        steady = LatencyTable.measure(model, target, progress=False)
    rounds, slower = [0], [1.0]
    spread = latency_blocks._spread

    def next_round(counts, size, order):  # called twice a round
        rounds[0] += 1
        slower[0] = 1 + 9 * (rounds[0] // 2) / 7
        return spread(counts, size, order)

    monkeypatch.setattr(latency_blocks, "_spread", next_round)
    ms = latency_blocks._Clock.ms
    monkeypatch.setattr(latency_blocks._Clock, "ms", lambda *args: slower[0] * ms(*args))
    with counting_clock(monkeypatch):
        drifting = LatencyTable.measure(model, target, progress=False)
    unit = drifting.dense_ms / steady.dense_ms
    assert unit > 2
    assert drifting.head_ms == pytest.approx([unit * ms for ms in steady.head_ms])
    assert drifting.filter_ms == pytest.approx([unit * ms for ms in steady.filter_ms])
    assert drifting.rest_ms == pytest.approx(unit * steady.rest_ms)


def test_the_dense_model_takes_turns_with_all_widths(monkeypatch):
    model, _ = FAMILIES["bert"]()
    ran = []
    run = latency_blocks._MarkedModel.run

    def spy(self, inputs):
        layers = self.model.bert.encoder.layer
        ran.append([layer.intermediate.dense.out_features for layer in layers])
        return run(self, inputs)

    monkeypatch.setattr(latency_blocks._MarkedModel, "run", spy)
    LatencyTable.measure(model, Latency(0.5, batch=1, seq_len=4, grid=2, repeats=2), progress=False)
    a_round = len(ran) // 3  # two rounds and one that warms up
    full = [48] * 3
    for start in range(0, len(ran), a_round):
        widths = ran[start : start + a_round]
        places = [place for place, width in enumerate(widths) if width == full]
        assert places[0] == 0 and len(places) >= 3
        assert max(b - a for a, b in itertools.pairwise([*places, a_round])) <= latency_blocks.PASSES_PER_DENSE_RUN + 2
        assert {width for layers in widths for width in layers} == {0, 1, 47, *range(2, 49, 2)}


class _Clocks:
    """Clocks that cannot be relied on."""

    @staticmethod
    def jittering():
        order, tick, last = random.Random(0), time.process_time, [0.0, 0.0]

        def read():
            now = tick()
            last[1] += (now - last[0]) * order.uniform(1 / 3, 3)
            last[0] = now
            return last[1]

        return read

    @staticmethod
    def backwards():
        order = random.Random(0)
        return lambda: order.uniform(0.0, 1.0)

    @staticmethod
    def standing():
        return lambda: 7.0


@pytest.mark.parametrize("kind", ["jittering", "backwards", "standing"])
def test_no_clock_keeps_a_table_from_being_measured_or_a_search_from_ending(kind, monkeypatch):
    model, _ = FAMILIES["bert"]()
    shape = Shape.of(model)
    target = Latency(0.95, batch=2, seq_len=13, grid=8, repeats=3)
    monkeypatch.setattr(time, "perf_counter", getattr(_Clocks, kind)())
    table = LatencyTable.measure(model, target, progress=False)
    for ms in (table.head_ms, table.filter_ms[::8]):
        assert all(a <= b for a, b in itertools.pairwise(ms)) and ms[0] >= 0
    assert table.dense_prediction(shape.layers) > 0
    plan = search_measured(model, *importances(shape), table, target)
    plan.masks.check(shape)
    assert 1 <= len(plan.attempts) <= 1 + target.corrections


@pytest.mark.parametrize("measured", [(), (0,), (3,), (48,), (0, 3)])
def test_a_table_can_be_made_of_any_measured_times(measured, monkeypatch):
    """Whichever widths the clock stood still for."""
    model, _ = FAMILIES["bert"]()
    shape = Shape.of(model)
    filters = {count: float(count in measured) for count in latency_blocks.measured_filters(shape.filters, 8)}
    filters[3] = float(3 in measured)  # between multiples of the grid
    times = latency_blocks.BlockTimes(dict.fromkeys(range(shape.heads + 1), 0.0), filters, 0.0, 1.0)
    monkeypatch.setattr(latency_table, "measure_blocks", lambda *_: times)
    table = LatencyTable.measure(model, Latency(0.5, grid=8), progress=False)
    assert table.dense_prediction(shape.layers) > 0 and len(table.filter_ms) == shape.filters + 1


def test_a_whole_pruning_ends_under_a_clock_that_jitters(monkeypatch):
    model, batch = FAMILIES["bert"]()
    monkeypatch.setattr(time, "perf_counter", _Clocks.jittering())
    target = Latency(0.9, batch=2, seq_len=13, grid=8, repeats=3)
    result = ltp.prune(model, rows_of(batch, 4), target, progress=False)
    assert 1 <= len(result.report.latency.attempts) <= 4
    assert result.report.latency.ratio > 0


# --- corrections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("fixed", [0.0, 0.05, 0.1])
def test_corrections_converge_where_the_table_is_wrong(ratio, fixed, monkeypatch):
    """The truth has a part that the table knows nothing of; the table alone would be over the budget."""
    model, _ = FAMILIES["bert"]()
    shape = Shape.of(model)
    table = linear_table(shape)

    def truth(masks):
        return fixed + (1 - fixed) * table.predict(masks) / table.dense_prediction(shape.layers)

    asked = measuring(monkeypatch, truth)
    target = Latency(ratio)
    plan = search_measured(model, *importances(shape), table, target)
    assert len(asked) == len(plan.attempts) <= 1 + target.corrections
    assert truth(plan.masks) <= (1 + TOLERANCE) * ratio
    assert truth(plan.masks) >= 0.9 * ratio  # and not far below it
    assert plan.target.ratio <= ratio and (fixed > 0) == (plan.target.ratio < ratio)
    assert plan.attempts[0].planned == ratio
    assert [attempt.measured for attempt in plan.attempts] == [truth(masks) for masks in asked]


def test_a_budget_that_is_kept_at_once_is_measured_once(monkeypatch):
    model, _ = FAMILIES["bert"]()
    shape = Shape.of(model)
    asked = measuring(monkeypatch, lambda masks: 0.6)
    plan = search_measured(model, *importances(shape), linear_table(shape), Latency(0.6))
    assert len(asked) == 1 and plan.target.ratio == 0.6
    searched = ltp.search_latency(*importances(shape), linear_table(shape), Latency(0.6))
    assert torch.equal(plan.masks.filters, searched.filters) and torch.equal(plan.masks.heads, searched.heads)


def test_without_corrections_nothing_is_measured(monkeypatch):
    model, _ = FAMILIES["bert"]()
    shape = Shape.of(model)
    asked = measuring(monkeypatch, lambda masks: 0.99)
    plan = search_measured(model, *importances(shape), linear_table(shape), Latency(0.6, corrections=0))
    assert not asked and not plan.attempts and plan.target.ratio == 0.6


def test_measurements_that_never_fit_end_in_the_nearest_attempt_and_a_warning(monkeypatch, caplog):
    model, _ = FAMILIES["bert"]()
    shape = Shape.of(model)
    values = iter([0.9, 0.75, 0.8, 0.85])
    asked = measuring(monkeypatch, lambda masks: next(values))
    with caplog.at_level(logging.WARNING, logger="effnn.ltp.pruning.latency.measured_search"):
        plan = search_measured(model, *importances(shape), linear_table(shape), Latency(0.6))
    assert len(asked) == 4 and torch.equal(plan.masks.filters, asked[1].filters)
    assert "0.750 of the dense latency, over the budget of 0.600, after 4 attempts" in caplog.text
    assert plan.target.ratio == plan.attempts[1].planned


def test_one_bad_measurement_does_not_empty_the_model(monkeypatch):
    model, _ = FAMILIES["bert"]()
    shape = Shape.of(model)
    values = iter([30.0, 0.5])
    measuring(monkeypatch, lambda masks: next(values))
    plan = search_measured(model, *importances(shape), linear_table(shape), Latency(0.6))
    assert plan.target.ratio == pytest.approx(0.6 * LARGEST_CORRECTION)
    assert plan.masks.filters.mean() > 0.3


def test_where_the_table_knows_nothing_faster_the_last_candidate_stays(monkeypatch, caplog):
    model, _ = FAMILIES["bert"]()
    shape = Shape.of(model)
    table = linear_table(shape, rest=18.0)
    asked = measuring(monkeypatch, lambda masks: 0.95)
    with pytest.raises(InvalidInput, match="smallest feasible"):
        ltp.search_latency(*importances(shape), table, Latency(0.6))
    plan = search_measured(model, *importances(shape), table, Latency(0.8))
    assert 1 <= len(asked) < 4 and len(plan.attempts) == len(asked)
    assert torch.equal(plan.masks.filters, asked[0].filters)


def test_ratios_are_taken_round_by_round():
    times = {"dense": Timing("dense", (1.0, 10.0, 2.0, 0.0), (0.0,) * 4),
             "pruned": Timing("pruned", (0.5, 5.0, 1.2, 3.0), (0.0,) * 4)}  # fmt: skip
    assert measured_ratio(times) == 0.5
    least = {"dense": Timing("dense", (1.0, LEAST), (0.0,) * 2), "pruned": Timing("pruned", (0.5, 3.0), (0.0,) * 2)}
    assert measured_ratio(least) == 0.5  # an interval of zero, as `interleave` gives it
    still = {name: Timing(name, (0.0, 0.0), (0.0,) * 2) for name in times}
    assert measured_ratio(still) == 1.0


def test_the_report_tells_what_was_tried(monkeypatch):
    model, batch = FAMILIES["bert"]()
    shape = Shape.of(model)
    table = linear_table(shape)

    def truth(masks):
        return 0.1 + 0.9 * table.predict(masks) / table.dense_prediction(shape.layers)

    measuring(monkeypatch, truth)
    target = Latency(0.6, batch=2, seq_len=13, repeats=2)
    result = ltp.prune(model, rows_of(batch, 4), target, table=table, progress=False)
    latency = result.report.latency
    assert len(latency.attempts) > 1 and latency.attempts[0].planned == 0.6
    assert truth(result.masks) <= 0.6 * (1 + TOLERANCE)
    written = result.report.to_dict()["latency"]["attempts"]
    assert [attempt["measured"] for attempt in written] == [attempt.measured for attempt in latency.attempts]
    # the teacher of mask tuning follows what was planned, and the stages keep their predicted latency
    assert result.report.stages[-1].latency_ms <= latency.attempts[-1].planned * latency.dense_predicted * (1 + 1e-9)
    assert Masks.ones(shape).heads.shape == result.masks.heads.shape


def test_corrections_are_a_whole_number():
    for wrong in (-1, 1.5):
        with pytest.raises(InvalidInput, match="corrections"):
            Latency(0.5, corrections=wrong)
