"""Seconds of a run: steps counted, each size's step timed in turn with the others'."""

import pandas as pd
import pytest
from helpers.growth_path import PATH, RATES

from effnn.experiments.staged import runs, step_times
from effnn.experiments.staged.runs import Method


def test_seconds_are_the_steps_at_each_size_times_a_step_of_that_size():
    methods = {
        "scratch": Method("scratch", ((2, 32),), (1e-3,)),
        "staged": Method("staged", ((2, 16), (2, 32)), (1e-3, 1e-3), (70,)),
        "two": Method("two", ((1, 16), (2, 16), (2, 32)), (1e-3,) * 3, (10, 20)),
    }
    times = pd.DataFrame({"layers": [2, 2, 1], "width": [16, 32, 16], "seconds": [0.5, 2.0, 0.25]})
    ends = pd.DataFrame({"method": ["scratch", "staged", "staged", "two"], "steps": [100, 100, 80, 31]})
    found = step_times.with_seconds(ends, methods, times)
    assert found.seconds.tolist() == pytest.approx([200.0, 35 + 60, 35 + 20, 2.5 + 10 + 2])
    assert "seconds" not in ends


def test_a_step_of_every_size_is_timed_once_and_larger_ones_are_seen(setting, monkeypatch):  # noqa: F811
    taken = []
    take = step_times.Stepper.__call__

    def watched(self, batch):
        taken.append((self.model.config.n_layer, self.model.config.n_embd))
        return take(self, batch)

    monkeypatch.setattr(step_times.Stepper, "__call__", watched)
    small, large = (tuple(size) for size in PATH)
    times = step_times.step_seconds([small, large, small], setting, rounds=3, steps=2)
    assert list(times[["layers", "width"]].itertuples(index=False, name=None)) == [small, large]
    assert taken == [size for _ in range(4) for size in (small, small, large, large)]  # in turn, one round of warm-up
    assert (times.low <= times.seconds).all() and (times.seconds <= times.high).all() and (times.low > 0).all()
    methods = runs.standard_methods(PATH, [20], RATES)
    every = {size for method in methods.values() for size in method.sizes}
    assert every == {small, large}
