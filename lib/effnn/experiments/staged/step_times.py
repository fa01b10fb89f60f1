"""Notebook 03: the cost of the methods in seconds, from the time of a training step of every model size.

Runs are long, cached, and trained side by side while the load of the machine changes, so their own seconds cannot be
compared. The time of a step depends on the size alone: the seconds of a run are its steps at each size times the time
of such a step, and all sizes are timed in turn.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import pandas as pd

from effnn import staged
from effnn.base import interleave, threads
from effnn.experiments.staged.runs import Method, Setting, configuration, recipe_of
from effnn.staged.training.batches import Batches
from effnn.staged.training.ranks import Ranks
from effnn.staged.training.step import Stepper

Size = tuple[int, int]


def step_seconds(
    sizes: Iterable[Size], setting: Setting, rounds: int = 9, steps: int = 20, count: int = 1
) -> pd.DataFrame:
    """Return the time of a training step (forward, backward, clipping, AdamW) of every size, measured in turn.

    sizes: (layers, width) each.
    setting: of the runs.
    rounds: of measurement.
    steps: taken by each size in a round.
    count: torch threads.

    Columns: layers, width, seconds (per step, median over rounds), low, high (extremes), load (highest load average).
    """
    text, ranks = setting.load(), Ranks.current(setting.device)
    recipe = replace(recipe_of(setting, rate=1e-3, seed=0), evaluate_sequences=1, checkpoint_every=None)
    batches = Batches(text.train, recipe.batch_size, recipe.context, text.vocab_size, recipe.seed)

    def trainer(size: Size):
        start = [configuration(size, setting, text.vocab_size), [staged.Stage(0)], recipe, text.train, text.validation]
        stepper = Stepper(staged.train(*start, device=setting.device, progress=False), recipe, ranks)

        def run() -> None:
            for number in range(steps):
                loss = stepper(batches(number))
            float(loss)  # waits for the device

        return run

    with threads(count):
        times = interleave({size: trainer(size) for size in dict.fromkeys(sizes)}, rounds=rounds, device=ranks.device)
    return pd.DataFrame(
        {
            "layers": layers,
            "width": width,
            "seconds": timing.median / steps,
            "low": timing.spread[0] / steps,
            "high": timing.spread[1] / steps,
            "load": max(timing.load),
        }
        for (layers, width), timing in times.items()
    )


def with_seconds(ends: pd.DataFrame, methods: Mapping[str, Method], times: pd.DataFrame) -> pd.DataFrame:
    """Return the end points with a column `seconds`: steps at each size times the time of a step (`step_seconds`).

    methods: by the names in `ends`; all of their sizes must be in `times`.
    """
    each = {(row.layers, row.width): row.seconds for row in times.itertuples()}

    def spent(row) -> float:
        method = methods[row.method]
        steps = (*method.steps, row.steps - sum(method.steps))
        return sum(count * each[size] for count, size in zip(steps, method.sizes, strict=True))

    return ends.assign(seconds=[spent(row) for row in ends.itertuples()])
